"""A mask as a matrix to multiply by: mask bits of a chunk to memory as 0 and 1, then library products.

Terms of a row that are means over its negatives (`gist_fast.functional.mask_products`) need sums over what is masked. A
product of the
mask costs no product of scores; the 0 and 1 of a chunk, in the operands' type, are its price, as dlogits are in
`gist_fast.kernels.dlogits`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import tile
from gist_fast.kernels.chunks import ChunkSet
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from gist_fast.kernels.layout import TILE
from gist_fast.kernels.library import add_product
from torch import Tensor

WARPS = 8


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def unpack_kernel(
    mask_bits,
    matrix,  # [rows of the chunk, columns of the chunk], padded to tiles: 1 where an entry is masked, else 0
    table,
    start,  # of one chunk's row in it
    chunks,
    SYMMETRIC: tl.constexpr, BY_COLUMNS: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    at = tile.locate(table, start, chunks, 1, TILE)
    lane = tl.arange(0, TILE)
    if BY_COLUMNS:
        found = tile.unpack(tl.load(tile.find_mirrored_mask(mask_bits, at, TILE)))
    else:
        found = tile.unpack(tl.load(tile.find_mask(mask_bits, at, at.row, at.column, TILE)))
        if SYMMETRIC and tile.is_idle(at):
            # Below the diagonal stands what the columns of the tile above it decided, as that tile is oriented.
            first = tile.find_tile(mask_bits, at, at.row, at.column)
            words = tl.arange(0, tile.ROW_WORDS)[:, None] + lane[None, :] * tile.ROW_WORDS
            found = tile.unpack_transposed(tl.load(first + words))
    never = lane[:, None] + (tl.load(at.chunk + tile.EXCLUDED) + at.row * TILE - at.first) == lane[None, :]
    value = tl.where(found & ~never, 1.0, 0.0).to(matrix.dtype.element_ty)
    # A chunk has less than 2^31 entries, whatever the rectangle.
    down, across = at.row * TILE + lane, at.first + lane
    tl.store(matrix + down[:, None] * (at.column_tiles * TILE) + across[None, :], value)


def add_masked(
    chunks: ChunkSet,
    block: int,
    table: Tensor,
    mask_bits: Tensor,
    other: Tensor,
    total: Tensor,
    scratch: Tensor,
    first_column: int,
    *,
    transposed: bool,
) -> None:
    """Add a block's mask in one chunk, times a matrix, to `total`. Excluded entries count as not masked.

    Args:
        chunks: of a single chunk.
        block: whose rows are the chunk's rows, or its columns, or both.
        table: where its row is, on the device.
        other: ``[columns, E]`` of the whole block, or ``[rows, E]`` where `transposed`.
        total: ``[rows, E]`` of the whole block, or ``[columns, E]``, fp32; updated.
        scratch: flat, in the type of `other`, of a chunk's tiles.
        first_column: the block's first column in the stack.
    """
    (chunk,) = chunks.chunks
    rectangle = chunk.rectangle
    sides = [False] if rectangle.block == block else []
    sides += [True] if chunk.mirrored and rectangle.mirror_block == block else []
    for by_columns in sides:
        padded = scratch[: chunk.tiles * TILE * TILE].view(chunk.row_tiles * TILE, -1)
        start(
            unpack_kernel,
            (chunk.tiles,),
            mask_bits=mask_bits,
            matrix=padded,
            table=table,
            start=chunks.start,
            chunks=1,
            SYMMETRIC=chunks.symmetric,
            BY_COLUMNS=by_columns,
            **options_of(WARPS),
        )
        masked = padded[: chunk.rows, : chunk.columns]
        rows, columns = slice(chunk.row * TILE, chunk.row * TILE + chunk.rows), _moved(chunk.y, -first_column)
        if by_columns:
            # Of what a tile's columns decided the columns are the rows, and the other way round.
            rows, columns = (
                slice(chunk.column * TILE, chunk.column * TILE + chunk.columns),
                _moved(chunk.x, -first_column),
            )
            masked = masked.T
        if transposed:
            add_product(total[columns], masked.T, other[rows])
        else:
            add_product(total[rows], masked, other[columns])


def _moved(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)
