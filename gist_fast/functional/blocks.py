"""The kinds of pairs that the guided loss compares, as rectangles of one score matrix each.

A block is a (row operand, column operand) pair. Operands are numbered as the loss receives them: 0 the anchors,
1 the positives, 2 and up the columns of negatives. Row ``i`` of every block belongs to anchor ``i``: it is compared
with that anchor's threshold and feeds that anchor's logsumexp.

==========  ==============  ===================  ================  ========================================
block       direction       score of entry i, j  columns           the entry of row i that never counts
==========  ==============  ===================  ================  ========================================
``ap``      query_to_doc    a_i . p_j            all M positives   j = offset + i, the positive itself
``aa``      query_to_query  a_i . a_j            all A anchors     j = i, the pair of a row with itself
``pp``      doc_to_doc      p_{offset+i} . p_j   all M positives   j = offset + i, the pair of a row with itself
``pa``      doc_to_query    p_{offset+i} . a_j   all A anchors     j = i, the positive itself
``an_k``    query_to_doc    a_i . n_kj           N_k negatives     none
``pn_k``    doc_to_doc      p_{offset+i} . n_kj  N_k negatives     j = offset + i, the row's own negative
==========  ==============  ===================  ================  ========================================

The first B of the A anchors are those that the loss is of; the others, of other ranks, are candidates alone. ``pn_k``
is there where doc_to_doc is asked for by that name; what `LossConfig` calls ``contrast_positives`` is ``pp`` alone.

The positive enters each row's softmax too, but not as an entry of a block: it is one number a row, which the backends
add to the softmax of the negatives.

**Both sides.** In ``aa`` and ``pp`` the scores of rows and columns that are of the same texts are symmetric, and the
scores of ``pa`` are those of ``ap``, transposed. `strips` cuts the blocks so that each of these is multiplied once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gist_fast.functional.choices import HardnessMode
from gist_fast.functional.loss_config import LossConfig

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
    softmax: int = 0
    """Which of each row's softmaxes its entries are in."""
    transposes: str | None = None
    """The block whose entry (j, i) has the same score as entry (i, j) here, for the columns of the batch's own rows."""

    @property
    def symmetric(self) -> bool:
        """Whether rows and columns are of one operand, so that entry (i, j) equals entry (j, i)."""
        return self.row_operand == self.column_operand

    @property
    def compared(self) -> int:
        """How many pairs the block compares: all but the excluded ones."""
        return self.rows * self.columns - (0 if self.excluded is None else self.rows)


@dataclass(frozen=True)
class Strip:
    """Neighbouring columns of a block, all its rows high, whose scores are computed together."""

    index: int
    """Of the block."""
    block: Block
    first: int
    """The first of its columns in the block."""
    columns: int
    mirror: int | None = None
    """The index of the block whose rows its columns are, in a square whose scores serve both; the block itself where
    the square is symmetric, so that half of it is enough. None where the scores serve their rows alone."""
    mirror_softmax: int = 0
    """`Block.softmax` of that block."""

    @property
    def excluded(self) -> int | None:
        """Column ``excluded + i`` of the strip never counts in row ``i``, and may lie outside; None: all count."""
        return None if self.block.excluded is None else self.block.excluded - self.first

    @property
    def symmetric(self) -> bool:
        """Whether entry (i, j) equals entry (j, i)."""
        return self.mirror == self.index


def make_blocks(rows: int, sizes: Sequence[int], config: LossConfig, offset: int = 0) -> list[Block]:
    """The blocks of a loss of the first `rows` anchors, among operands of ``sizes = (A, M, N_1, N_2, ...)`` rows.

    Anchor i's positive is row ``offset + i`` of the positives.
    """
    # Every call of a training has the same ones. Sizes in a traced graph may be symbols, which have no hash.
    known = not torch.compiler.is_compiling() and all(type(size) is int for size in (rows, offset, *sizes))
    make = _make_blocks if known else _make_blocks.__wrapped__
    return list(
        make(
            rows, tuple(sizes), config.compared, config.softmaxes, config.pairs_positives_with_negatives,
            config.hardness_mode, config.mask_negatives, offset,
        )
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _make_blocks(
    rows: int,
    sizes: tuple[int, ...],
    compared: tuple[str, ...],
    softmaxes: int,
    negatives_of_positives: bool,
    hardness_mode: HardnessMode | None,
    mask_negatives: bool,
    offset: int,
) -> list[Block]:
    anchors, positives, *negatives = sizes
    in_batch = hardness_mode in ("in_batch_negatives", "all_negatives")
    own = hardness_mode in ("hard_negatives", "all_negatives")
    blocks = [
        Block("ap", ANCHORS, 0, POSITIVES, rows, positives, excluded=offset, scaled="all" if in_batch else "none")
    ]
    if "query_to_query" in compared:
        blocks.append(Block("aa", ANCHORS, 0, ANCHORS, rows, anchors, excluded=0))
    if "doc_to_doc" in compared:
        blocks.append(Block("pp", POSITIVES, offset, POSITIVES, rows, positives, excluded=offset))
    if "doc_to_query" in compared:
        blocks.append(
            Block(
                "pa", POSITIVES, offset, ANCHORS, rows, anchors, excluded=0, softmax=softmaxes - 1,
                # Hardness weighting makes other logits of ap's scores.
                transposes=None if in_batch else "ap",
            )
        )  # fmt: skip
    scaled: Literal["none", "all", "others", "own"] = "none"
    if in_batch or own:
        scaled = "all" if in_batch and own else "others" if in_batch else "own"
    differs = offset if scaled in ("others", "own") else None
    for k, count in enumerate(negatives):
        operand = FIRST_NEGATIVES + k
        blocks.append(
            Block(
                f"an_{k + 1}", ANCHORS, 0, operand, rows, count, excluded=None,
                scaled=scaled, own_negative=differs, guided=mask_negatives,
            )
        )  # fmt: skip
        if negatives_of_positives:
            blocks.append(
                Block(
                    f"pn_{k + 1}", POSITIVES, offset, operand, rows, count, excluded=offset, guided=mask_negatives
                )
            )  # fmt: skip
    return blocks


def strips(blocks: Sequence[Block]) -> Iterator[Strip]:
    """The blocks cut up, so that no score is computed for two of them: of each block what is left of its square, the
    square on whose diagonal the excluded entries are, and what is right of it; or the block as a whole."""
    places = {block.name: place for place, block in enumerate(blocks)}
    mirrors = {block.transposes: places[block.name] for block in blocks if block.transposes is not None}
    for index, block in enumerate(blocks):
        mirror = index if block.symmetric else mirrors.get(block.name)
        transposed = block.transposes is not None
        if block.excluded is None or (mirror is None and not transposed):
            yield Strip(index, block, 0, block.columns)
            continue
        square, right = block.excluded, block.excluded + block.rows
        if square > 0:
            yield Strip(index, block, 0, square)
        if mirror is not None:
            yield Strip(index, block, square, block.rows, mirror, blocks[mirror].softmax)
        if right < block.columns:
            yield Strip(index, block, right, block.columns - right)
