"""Pairs of one group never count: the words of a chunk, before any product.

A kernel by itself. Beside a product, the comparison of two int32 for each pair takes registers that no configuration
has left on all cards; here it costs the words' way to memory and back, 2 KiB a tile and side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.launch import ALIGNED_OR_NOT, PLACES
from gist_fast.kernels.layout import tiles
from gist_fast.kernels.parts import Chunk, Part
from torch import Tensor

WARPS = 4


@triton.jit(do_not_specialize=PLACES, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def groups_kernel(
    row_groups,  # [R]
    column_groups,  # [C]
    bits,  # words of the whole part or of the chunk: written
    row_count,
    column_count,
    excluded,
    chunk_row,
    chunk_column,
    row_tiles,
    column_tiles,
    all_column_tiles,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
):
    TILE: tl.constexpr = tile.TILE
    WORDS: tl.constexpr = tile.ROW_WORDS
    tile_row = tl.program_id(0) // column_tiles
    tile_column = tl.program_id(0) % column_tiles
    r = chunk_row + tile_row
    c = chunk_column + tile_column
    if SYMMETRIC and c < r:
        return
    rows = r * TILE + tl.arange(0, TILE)
    columns = c * TILE + tl.arange(0, TILE)
    row_group = tl.load(row_groups + tl.minimum(rows, row_count - 1))
    column_group = tl.load(column_groups + tl.minimum(columns, column_count - 1))
    words = tile.pack(row_group[:, None] == column_group[None, :], TILE, WORDS)
    words |= decide.never_counts(rows, c * TILE, row_count, column_count, excluded, WORDS)
    tile.store_words(bits, words, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, False, BITS)
    if SYMMETRIC:
        # Both sides see the same groups.
        tile.store_words(
            bits, words, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, True, BITS
        )


def decide_groups(part: Part, chunk: Chunk, bits: Tensor, where: tl.constexpr) -> None:
    """Write what never counts in a chunk, pairs of one group among it.

    Args:
        bits: words of the part or of the chunk, as `where` says.
    """
    assert part.decision is not None
    groups_kernel[(chunk.row_tiles * chunk.column_tiles,)](
        part.decision.row_groups,
        part.decision.column_groups,
        bits,
        part.rows.shape[0],
        part.columns.shape[0],
        part.excluded,
        chunk.row,
        chunk.column,
        chunk.row_tiles,
        chunk.column_tiles,
        tiles(part.columns.shape[0]),
        SYMMETRIC=part.symmetric,
        BITS=where.value,
        num_warps=WARPS,
    )
