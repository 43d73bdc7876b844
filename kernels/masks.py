"""The masks of a chunk once more: for a backward pass that kept no bits.

Bits of a batch of B rows fill ``3 B^2 / 8`` bytes. Where that is too much, the guide's product is repeated in the
backward pass, chunk by chunk, in tiles of the forward pass's own shape, operands and order of summation: every
comparison falls out the same. It is a kernel by itself because one that computed coefficients too would hold two
products' worth of registers, and spilled on two of the generations in the table.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import tile
from gist_fast.kernels.config import Config
from gist_fast.kernels.launch import options, precision
from gist_fast.kernels.layout import TILE_WORDS
from gist_fast.kernels.parts import Chunk, Part
from torch import Tensor


@triton.jit(
    do_not_specialize=[
        "row_count",
        "column_count",
        "excluded",
        "chunk_row",
        "chunk_column",
        "row_tiles",
        "column_tiles",
    ]
)
def masks_kernel(
    guide_x,  # [rows of the chunk, G]
    guide_y,  # [columns of the chunk, G]
    limits,  # [R]
    bits,  # words of the chunk
    row_count,
    column_count,
    guide_width,
    excluded,
    chunk_row,
    chunk_column,
    row_tiles,
    column_tiles,
    SYMMETRIC: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    TILE: tl.constexpr = tile.TILE
    WORDS: tl.constexpr = tile.ROW_WORDS
    tile_row, tile_column = tile.place(tl.program_id(0), row_tiles, column_tiles, GROUP)
    r = chunk_row + tile_row
    c = chunk_column + tile_column
    if SYMMETRIC and c < r:
        return
    rows = r * TILE + tl.arange(0, TILE)
    columns = c * TILE + tl.arange(0, TILE)
    words = tile.never_counts(rows, c * TILE, row_count, column_count, excluded, WORDS)
    guide = tile.scores(
        guide_x, guide_y, tile_row * TILE, tile_column * TILE,
        row_count - 1 - chunk_row * TILE, column_count - 1 - chunk_column * TILE, guide_width,
        TILE, TILE, BLOCK_K, GUIDE_PRECISION,
    )  # fmt: skip
    words, mirrored = tile.decide(guide, limits, rows, columns, row_count, words, SYMMETRIC, WORDS)
    at = tile.words_of_tile(bits, tile_row, tile_column, column_tiles) + tile.words_grid()
    tl.store(at, words)
    if SYMMETRIC:
        tl.store(at + row_tiles.to(tl.int64) * column_tiles * tile.TILE_WORDS, mirrored)


def chunk_words(row_tiles: int, column_tiles: int, symmetric: bool) -> int:
    """Words that the bits of a chunk fill."""
    return (1 + symmetric) * row_tiles * column_tiles * TILE_WORDS


def decide_chunk(part: Part, chunk: Chunk, limits: Tensor, bits: Tensor, config: Config) -> None:
    """Fill `bits` with what does not count in a chunk of a part that has a guide of its own."""
    launch = config.masks_symmetric if part.symmetric else config.masks
    guide_rows, guide_columns = part.guide_rows(chunk.rows), part.guide_columns(chunk.columns)
    masks_kernel[(chunk.row_tiles * chunk.column_tiles,)](
        guide_rows,
        guide_columns,
        limits,
        bits,
        part.rows.shape[0],
        part.columns.shape[0],
        guide_rows.shape[1],
        part.excluded,
        chunk.row,
        chunk.column,
        chunk.row_tiles,
        chunk.column_tiles,
        SYMMETRIC=part.symmetric,
        GUIDE_PRECISION=precision(guide_rows),
        GROUP=launch.group,
        **options(launch),
    )
