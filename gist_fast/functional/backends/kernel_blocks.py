"""Blocks of the loss as rectangles of the kernels' stack.

Embeddings of a model are stood below each other in one *stack* (`gist_fast.kernels.chunks`), and a block becomes a
rectangle of it, or up to three where a square of it serves rows and columns: the square, and the plain rectangles left
and right of it (`gist_fast.functional.blocks.strips`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

from gist_fast.functional.blocks import ANCHORS, Block, strips
from gist_fast.kernels.chunks import NOWHERE, Rectangle
from gist_fast.kernels.layout import mask_words


def mask_bytes(blocks: Sequence[Block], dims: int) -> int:
    """Bytes of the mask bits, which serve all Matryoshka dims; see
    `gist_fast.functional.backends.interface.StreamingBackend`."""
    words = 0
    for strip in strips(blocks):
        own = mask_words(strip.block.rows, strip.columns, strip.symmetric)
        words += own if strip.mirror is None or strip.symmetric else 2 * own
    return 4 * words


def starts(blocks: Sequence[Block]) -> list[int]:
    """The first row of each operand in the stack."""
    # The anchors are columns where there are more of them than rows.
    sizes = {ANCHORS: blocks[0].rows} | {b.column_operand: b.columns for b in blocks}
    return [0, *accumulate(sizes[k] for k in range(len(sizes) - 1))]


@functools.lru_cache(maxsize=64)
def rectangles(blocks: tuple[Block, ...]) -> tuple[Rectangle, ...]:
    """The rectangles of all blocks."""
    first_rows = starts(blocks)
    return tuple(
        Rectangle(
            block=strip.index,
            mirror_block=strip.index if strip.mirror is None else strip.mirror,
            x=first_rows[block.row_operand] + block.row_start,
            y=first_rows[block.column_operand] + strip.first,
            rows=block.rows,
            columns=strip.columns,
            excluded=NOWHERE if strip.excluded is None else strip.excluded,
            symmetric=strip.mirror is not None,
            softmax=block.softmax,
            mirror_softmax=strip.mirror_softmax,
            softmax_rows=block.rows,
            own_negative=NOWHERE if block.own_negative is None else block.own_negative,
            scales_own=block.scaled in ("all", "own"),
            scales_others=block.scaled in ("all", "others"),
            guided=block.guided,
        )
        for strip in strips(blocks)
        for block in (strip.block,)
    )
