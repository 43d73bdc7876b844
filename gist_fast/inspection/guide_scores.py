"""What an inspection compares: unit vectors, the scores of anchors with their positives, and a block's in tiles.

All of it in float32, whatever type the embeddings came in. ``B`` rows, ``G`` the guide's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gist_fast.functional.blocks import ANCHORS, FIRST_NEGATIVES, POSITIVES, Block
from gist_fast.functional.operands import ZERO_NORM, tie_band

SCORES = 2**22
"""Scores at a time: 16 MiB."""


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


def scores(unit: Sequence[Tensor], block: Block, rows: slice, groups: Tensor | None = None) -> Tensor:
    """``[n, columns]``: the scores of some rows of a block; -inf where the entry never counts.

    Args:
        groups: ``[B]``; rows of one group are not compared in ap, aa and pp.
    """
    first = block.row_start + rows.start
    found = unit[block.row_operand][first : first + rows.stop - rows.start] @ unit[block.column_operand].T
    if block.excluded is not None:
        found.diagonal(block.excluded + rows.start).fill_(-math.inf)
    if groups is not None and block.column_operand < FIRST_NEGATIVES:
        found.masked_fill_(groups[rows, None] == groups, -math.inf)
    return found
