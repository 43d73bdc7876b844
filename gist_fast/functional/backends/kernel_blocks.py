"""Blocks of the loss as rectangles of the kernels' stack.

Embeddings of a model are stood below each other in one *stack* (`gist_fast.kernels.chunks`), and a block becomes a
rectangle of it. A block ``pp`` that has more columns than rows (candidates gathered from all ranks) becomes three: a
symmetric square, and the plain rectangles left and right of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from gist_fast.functional.blocks import ANCHORS, Block
from gist_fast.kernels.chunks import NOWHERE, Rectangle
from gist_fast.kernels.layout import mask_words


class _Extent(NamedTuple):
    """Where a rectangle lies in its block."""

    first: int
    columns: int
    excluded: int
    symmetric: bool


def mask_bytes(blocks: Sequence[Block], dims: int) -> int:
    """Bytes of the mask bits, which serve all Matryoshka dims; see
    `gist_fast.functional.backends.interface.StreamingBackend`."""
    extents = ((block.rows, extent) for block in blocks for extent in _extents(block))
    return 4 * sum(mask_words(rows, extent.columns, extent.symmetric) for rows, extent in extents)


def starts(blocks: Sequence[Block]) -> list[int]:
    """The first row of each operand in the stack."""
    sizes = {ANCHORS: blocks[0].rows} | {b.column_operand: b.columns for b in blocks if b.column_operand != ANCHORS}
    return [0, *accumulate(sizes[k] for k in range(len(sizes) - 1))]


@functools.lru_cache(maxsize=64)
def rectangles(blocks: tuple[Block, ...]) -> tuple[Rectangle, ...]:
    """The rectangles of all blocks."""
    first_rows = starts(blocks)
    return tuple(
        Rectangle(
            block=index,
            x=first_rows[block.row_operand] + block.row_start,
            y=first_rows[block.column_operand] + extent.first,
            rows=block.rows,
            columns=extent.columns,
            excluded=extent.excluded,
            symmetric=extent.symmetric,
            own_negative=NOWHERE if block.own_negative is None else block.own_negative,
            scales_own=block.scaled in ("all", "own"),
            scales_others=block.scaled in ("all", "others"),
            guided=block.guided,
        )
        for index, block in enumerate(blocks)
        for extent in _extents(block)
    )


def _extents(block: Block) -> Iterator[_Extent]:
    """The block's rectangles, from left to right."""
    if not block.symmetric or block.excluded is None:
        yield _Extent(0, block.columns, NOWHERE if block.excluded is None else block.excluded, symmetric=False)
        return
    square, right = block.excluded, block.excluded + block.rows
    if square > 0:
        yield _Extent(0, square, excluded=NOWHERE, symmetric=False)
    yield _Extent(square, block.rows, excluded=0, symmetric=True)
    if right < block.columns:
        yield _Extent(right, block.columns - right, excluded=NOWHERE, symmetric=False)
