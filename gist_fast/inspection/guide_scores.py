"""What an inspection compares: unit vectors, the scores of anchors with their positives, and a block's in tiles.

All of it in float32, whatever type the embeddings came in. ``B`` rows, ``G`` the guide's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gist_fast.functional.blocks import ANCHORS, POSITIVES, Block
from gist_fast.functional.operands import ZERO_NORM, tie_band

SCORES = 2**22
"""Scores at a time: 16 MiB."""


@dataclass(frozen=True)
class NotCompared:
    """What never counts, besides the pair of a row with itself."""

    groups: Sequence[Sequence[Tensor | None]] = ()
    """Each: for anchors, positives and columns of negatives the group of each row, ``[B]``, or None without. A pair is
    not compared where one of them is the same for both."""
    own: Sequence[int] = ()
    """The operands whose row i is a negative of anchor i alone."""
    missing: Mapping[int, Tensor] = field(default_factory=dict)
    """Of operands that lack some rows, which those are, ``[B]``, bool."""


def unit_rows(embeddings: Tensor) -> Tensor:
    """``[n, G]`` of norm 1; rows that are all but zero stay zero."""
    rows = embeddings.float()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms <= ZERO_NORM, 0.0, rows / norms)


def own_scores(unit: Sequence[Tensor]) -> Tensor:
    """``[B]``: the similarity of each row's anchor and positive, which is the row's threshold before the margin."""
    return (unit[ANCHORS] * unit[POSITIVES]).sum(dim=1)


def tie(unit: Sequence[Tensor]) -> float:
    """How far above its threshold a score of such vectors still counts as equal to it, as in the loss."""
    return tie_band(torch.float32, unit[ANCHORS].shape[1])


def tiles(block: Block) -> Iterator[slice]:
    """A block's rows in slices of at most `SCORES` scores, or one row."""
    step = max(1, SCORES // max(1, block.columns))
    for start in range(0, block.rows, step):
        yield slice(start, min(start + step, block.rows))


def scores(unit: Sequence[Tensor], block: Block, rows: slice, never: NotCompared | None = None) -> Tensor:
    """``[n, columns]``: the scores of some rows of a block; -inf where the entry never counts."""
    first = block.row_start + rows.start
    found = unit[block.row_operand][first : first + rows.stop - rows.start] @ unit[block.column_operand].T
    return _left_out(found, block, rows, never or NotCompared())


def unscored(block: Block, rows: slice, never: NotCompared) -> Tensor:
    """The same of a block about which the guide has nothing to say: 0 in the place of a score."""
    return _left_out(torch.zeros(rows.stop - rows.start, block.columns), block, rows, never)


def _left_out(found: Tensor, block: Block, rows: slice, never: NotCompared) -> Tensor:
    if block.excluded is not None:
        found.diagonal(block.excluded + rows.start).fill_(-math.inf)
    for groups in never.groups:
        of_rows, of_columns = groups[POSITIVES], groups[block.column_operand]
        if of_rows is not None and of_columns is not None:
            found.masked_fill_(of_rows[rows, None] == of_columns, -math.inf)
    if block.column_operand in never.missing:
        found.masked_fill_(never.missing[block.column_operand], -math.inf)
    if block.column_operand in never.own:
        others = torch.ones_like(found, dtype=torch.bool)
        others.diagonal(rows.start).fill_(False)
        found.masked_fill_(others, -math.inf)
    return found
