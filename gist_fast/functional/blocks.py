"""The kinds of pairs that the guided loss compares, as rectangles of one score matrix each.

A block is a (row operand, column operand) pair. Operands are numbered as the loss receives them: 0 the anchors,
1 the positives, 2 and up the columns of negatives. Row ``i`` of every block belongs to anchor ``i``: it is compared
with that anchor's threshold and feeds that anchor's logsumexp.

==========  ===================  ===========================  ==============================================
block       score of entry i, j  columns                      the entry of row i that never counts
==========  ===================  ===========================  ==============================================
``ap``      a_i . p_j            all M positives              j = offset + i, the positive itself
``aa``      a_i . a_j            the B anchors                j = i, the pair of a row with itself
``pp``      p_{offset+i} . p_j   all M positives              j = offset + i, the pair of a row with itself
``an_k``    a_i . n_kj           the N_k negatives            none
==========  ===================  ===========================  ==============================================

The positive enters each row's softmax too, but not as an entry of a block: it is one number a row, which the backends
add to the softmax of the negatives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gist_fast.functional.loss_config import HardnessMode, LossConfig

ANCHORS, POSITIVES, FIRST_NEGATIVES = 0, 1, 2


@dataclass(frozen=True)
class Block:
    """One rectangle of scores, ``[rows, columns]``."""

    name: str
    row_operand: int
    row_start: int
    """Row ``i`` of the block is row ``row_start + i`` of the row operand."""
    column_operand: int
    rows: int
    columns: int
    excluded: int | None
    """Column ``excluded + i`` never counts in row ``i``; None where every column counts."""
    scaled: Literal["none", "all", "others", "own"] = "none"
    """Which entries hardness weighting scales: those of column ``own_negative + i`` in row i, all others, or both."""
    own_negative: int | None = None
    """Column ``own_negative + i`` is the negative that came with anchor i; None where that makes no difference."""
    guided: bool = True
    """Whether a guide, be it the student, may mask entries."""

    @property
    def symmetric(self) -> bool:
        """Whether rows and columns are of one operand, so that entry (i, j) equals entry (j, i)."""
        return self.row_operand == self.column_operand

    @property
    def compared(self) -> int:
        """How many pairs the block compares: all but the excluded ones."""
        return self.rows * self.columns - (0 if self.excluded is None else self.rows)


def make_blocks(rows: int, columns: Sequence[int], config: LossConfig, offset: int = 0) -> list[Block]:
    """The blocks of a problem with ``rows`` anchors and ``columns = (M, N_1, N_2, ...)`` candidates.

    Anchor i's positive is row ``offset + i`` of the positives.
    """
    # Every call of a training has the same ones. Sizes in a traced graph may be symbols, which have no hash.
    known = not torch.compiler.is_compiling() and all(type(size) is int for size in (rows, offset, *columns))
    make = _make_blocks if known else _make_blocks.__wrapped__
    contrast = config.contrast_anchors, config.contrast_positives
    return list(make(rows, tuple(columns), config.hardness_mode, *contrast, config.mask_negatives, offset))


@functools.lru_cache(maxsize=64)
def _make_blocks(
    rows: int,
    columns: tuple[int, ...],
    hardness_mode: HardnessMode | None,
    contrast_anchors: bool,
    contrast_positives: bool,
    mask_negatives: bool,
    offset: int,
) -> list[Block]:
    positives, *negatives = columns
    in_batch = hardness_mode in ("in_batch_negatives", "all_negatives")
    own = hardness_mode in ("hard_negatives", "all_negatives")
    blocks = [
        Block("ap", ANCHORS, 0, POSITIVES, rows, positives, excluded=offset, scaled="all" if in_batch else "none")
    ]
    if contrast_anchors:
        blocks.append(Block("aa", ANCHORS, 0, ANCHORS, rows, rows, excluded=0))
    if contrast_positives:
        blocks.append(Block("pp", POSITIVES, offset, POSITIVES, rows, positives, excluded=offset))
    scaled: Literal["none", "all", "others", "own"] = "none"
    if in_batch or own:
        scaled = "all" if in_batch and own else "others" if in_batch else "own"
    differs = offset if scaled in ("others", "own") else None
    for k, count in enumerate(negatives):
        blocks.append(
            Block(
                f"an_{k + 1}", ANCHORS, 0, FIRST_NEGATIVES + k, rows, count, excluded=None,
                scaled=scaled, own_negative=differs, guided=mask_negatives,
            )
        )  # fmt: skip
    return blocks
