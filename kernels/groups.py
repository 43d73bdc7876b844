"""Pairs of one group never count: the initial mask of a chunk, before any product.

A kernel by itself. Beside a product, the comparison of two int32 for each pair takes registers that no configuration
has left on all cards; here it costs the mask's way to memory and back, 2 KiB a tile and side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from gist_fast.kernels.rectangle import Chunk, Rectangle
from torch import Tensor

WARPS = 4


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def groups_kernel(
    row_groups,  # [R]
    column_groups,  # [C]
    mask_bits,  # of the whole rectangle or of the chunk: written
    row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles,
    SYMMETRIC: tl.constexpr, CHUNK_MASK: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    at = tile.locate(
        tl.program_id(0), row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles, 1
    )
    if SYMMETRIC and at.column < at.row:
        return
    rows = at.row * TILE + tl.arange(0, TILE)
    columns = at.column * TILE + tl.arange(0, TILE)
    row_group = tl.load(row_groups + tl.minimum(rows, row_count - 1))
    column_group = tl.load(column_groups + tl.minimum(columns, column_count - 1))
    packed = tile.pack(row_group[:, None] == column_group[None, :])
    packed |= decide.never_counts(rows, at.column * TILE, row_count, column_count, excluded, tile.ROW_WORDS)
    tile.store_mask(mask_bits, packed, at, False, CHUNK_MASK)
    if SYMMETRIC:
        # Both sides see the same groups.
        tile.store_mask(mask_bits, packed, at, True, CHUNK_MASK)


def mask_groups(rectangle: Rectangle, chunk: Chunk, mask_bits: Tensor, chunk_mask: bool) -> None:
    """Write what never counts in a chunk, pairs of one group among it.

    Args:
        mask_bits: of the chunk or of the whole rectangle, as `chunk_mask` says.
    """
    assert rectangle.predicates is not None
    start(
        groups_kernel,
        (chunk.row_tiles * chunk.column_tiles,),
        row_groups=rectangle.predicates.row_groups,
        column_groups=rectangle.predicates.column_groups,
        mask_bits=mask_bits,
        **rectangle.geometry(chunk),
        SYMMETRIC=rectangle.symmetric,
        CHUNK_MASK=chunk_mask,
        **options_of(WARPS),
    )
