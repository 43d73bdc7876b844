"""A mask as a matrix to multiply by: bits of a chunk to memory as 0 and 1, then library products.

The soft triplet term needs a few columns' sums over what is masked. A product of the bits costs no product of scores;
the 0 and 1 of a chunk, in the operands' type, are its price, as coefficients are in `gist_fast.kernels.staged`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gist_fast.kernels import tile
from gist_fast.kernels.launch import PLACES
from gist_fast.kernels.layout import TILE, tiles
from gist_fast.kernels.owned import under, upright
from gist_fast.kernels.parts import chunks
from gist_fast.kernels.staged import add_product
from torch import Tensor

CHUNK_TILES = 64
"""Rows and columns of a chunk, in tiles; as large as one of coefficients."""
WARPS = 8


@triton.jit(do_not_specialize=PLACES)
def unpack_kernel(
    bits,  # words of the whole part
    masked,  # [rows of the chunk, columns of the chunk], padded to tiles: 1 where an entry is masked, else 0
    excluded,
    chunk_row,
    chunk_column,
    column_tiles,
    all_column_tiles,
    SYMMETRIC: tl.constexpr,
    TILE: tl.constexpr,
):
    tile_row = tl.program_id(0) // column_tiles
    tile_column = tl.program_id(0) % column_tiles
    r = chunk_row + tile_row
    c = chunk_column + tile_column
    words = tile.words_of_tile(bits, r, c, all_column_tiles)
    hidden = upright(words, 0, 0, TILE, TILE, TILE)
    if SYMMETRIC and r > c:
        # Below the diagonal stands what the columns of the tile above it decided, as that tile is oriented.
        hidden = under(words, 0, 0, TILE, TILE, TILE)
    lane = tl.arange(0, TILE)
    never = (r * TILE + lane)[:, None] + excluded == (c * TILE + lane)[None, :]
    value = tl.where(hidden & ~never, 1.0, 0.0).to(masked.dtype.element_ty)
    # A chunk has less than 2^31 entries, whatever the part.
    down = tile_row * TILE + lane
    across = tile_column * TILE + lane
    tl.store(masked + down[:, None] * (column_tiles * TILE) + across[None, :], value)


def add_masked(
    bits: Tensor, shape: tuple[int, int], excluded: int, symmetric: bool, other: Tensor, transposed: bool, total: Tensor
) -> None:
    """Add a part's mask, times a matrix, to `total`.

    Args:
        bits: the part's words.
        shape: its rows and columns.
        excluded: column ``excluded + i`` counts as not masked in row i.
        other: ``[columns, E]``, or ``[rows, E]`` where `transposed`.
        total: ``[rows, E]``, or ``[columns, E]``, fp32; updated.
    """
    height, breadth = (min(CHUNK_TILES, tiles(length)) for length in shape)
    scratch = torch.empty(height * breadth * TILE * TILE, dtype=other.dtype, device=other.device)
    for chunk in chunks(*shape, height, breadth):
        padded = scratch[: chunk.row_tiles * chunk.column_tiles * TILE * TILE].view(chunk.row_tiles * TILE, -1)
        unpack_kernel[(chunk.row_tiles * chunk.column_tiles,)](
            bits,
            padded,
            excluded,
            chunk.row,
            chunk.column,
            chunk.column_tiles,
            tiles(shape[1]),
            SYMMETRIC=symmetric,
            TILE=TILE,
            num_warps=WARPS,
        )
        rows, columns = slice(chunk.rows.start, min(chunk.rows.stop, shape[0])), chunk.columns
        columns = slice(columns.start, min(columns.stop, shape[1]))
        masked = padded[: rows.stop - rows.start, : columns.stop - columns.start]
        if transposed:
            add_product(total[columns], masked.T, other[rows])
        else:
            add_product(total[rows], masked, other[columns])
