"""A mask as a matrix to multiply by: mask bits of a chunk to memory as 0 and 1, then library products.

The soft triplet term (`gist_fast.functional.triplet`) needs a few columns' sums over what is masked. A product of the
mask costs no product of scores; the 0 and 1 of a chunk, in the operands' type, are its price, as dlogits are in
`gist_fast.kernels.dlogits`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gist_fast.kernels import tile
from gist_fast.kernels.dlogits import add_product
from gist_fast.kernels.launch import NOT_SPECIALISED, options_of, start
from gist_fast.kernels.layout import TILE, tiles
from gist_fast.kernels.rectangle import chunks, geometry
from torch import Tensor

CHUNK_TILES = 64
"""Rows and columns of a chunk, in tiles; as large as one of dlogits."""
WARPS = 8


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def unpack_kernel(
    mask_bits,  # of the whole rectangle
    masked,  # [rows of the chunk, columns of the chunk], padded to tiles: 1 where an entry is masked, else 0
    row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles,
    SYMMETRIC: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    at = tile.locate(
        tl.program_id(0), row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles, 1
    )
    lane = tl.arange(0, TILE)
    packed = tile.mask_of_rows(mask_bits, at.row, at.column, tl.cdiv(column_count, TILE))
    found = tile.unpack(tl.load(packed + tile.words_grid()))
    if SYMMETRIC and at.row > at.column:
        # Below the diagonal stands what the columns of the tile above it decided, as that tile is oriented.
        words = tl.arange(0, tile.ROW_WORDS)[:, None] + lane[None, :] * tile.ROW_WORDS
        found = tile.unpack_transposed(tl.load(packed + words))
    never = (at.row * TILE + lane)[:, None] + excluded == (at.column * TILE + lane)[None, :]
    value = tl.where(found & ~never, 1.0, 0.0).to(masked.dtype.element_ty)
    # A chunk has less than 2^31 entries, whatever the rectangle.
    down = at.row_in_chunk * TILE + lane
    across = at.column_in_chunk * TILE + lane
    tl.store(masked + down[:, None] * (column_tiles * TILE) + across[None, :], value)


def add_masked(
    mask_bits: Tensor,
    shape: tuple[int, int],
    excluded: int,
    symmetric: bool,
    other: Tensor,
    transposed: bool,
    total: Tensor,
) -> None:
    """Add a rectangle's mask, times a matrix, to `total`.

    Args:
        mask_bits: the rectangle's packed mask.
        shape: its rows and columns.
        excluded: column ``excluded + i`` counts as not masked in row i.
        other: ``[columns, E]``, or ``[rows, E]`` where `transposed`.
        total: ``[rows, E]``, or ``[columns, E]``, fp32; updated.
    """
    height, breadth = (min(CHUNK_TILES, tiles(length)) for length in shape)
    scratch = torch.empty(height * breadth * TILE * TILE, dtype=other.dtype, device=other.device)
    for chunk in chunks(*shape, height, breadth):
        padded = scratch[: chunk.row_tiles * chunk.column_tiles * TILE * TILE].view(chunk.row_tiles * TILE, -1)
        start(
            unpack_kernel,
            (chunk.row_tiles * chunk.column_tiles,),
            mask_bits=mask_bits,
            masked=padded,
            **geometry(shape, excluded, chunk),
            SYMMETRIC=symmetric,
            **options_of(WARPS),
        )
        rows, columns = slice(chunk.rows.start, min(chunk.rows.stop, shape[0])), chunk.columns
        columns = slice(columns.start, min(columns.stop, shape[1]))
        masked = padded[: rows.stop - rows.start, : columns.stop - columns.start]
        if transposed:
            add_product(total[columns], masked.T, other[rows])
        else:
            add_product(total[rows], masked, other[columns])
