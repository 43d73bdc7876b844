"""What every kernel shares: where its program works, a tile of scores on the matrix units, and the tile's mask."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from gist_fast.kernels import layout

TILE = tl.constexpr(layout.TILE)
TILE_WORDS = tl.constexpr(layout.TILE_WORDS)
ROW_WORDS = tl.constexpr(layout.TILE // layout.WORD_BITS)


class Location(NamedTuple):
    """Where a program works: the geometry of its launch, and its tile."""

    row_count: tl.tensor
    """Rows of the rectangle."""
    column_count: tl.tensor
    excluded: tl.tensor
    """Column ``excluded + row`` never counts."""
    row: tl.tensor
    """Of the tile in the rectangle, counted in tiles."""
    column: tl.tensor
    row_in_chunk: tl.tensor
    """Of the same tile in the chunk that the launch covers."""
    column_in_chunk: tl.tensor
    row_tiles: tl.tensor
    """The chunk's size."""
    column_tiles: tl.tensor


@triton.jit
def locate(
    program, row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles, GROUP: tl.constexpr
):
    """A program's tile: down GROUP rows, then a column on, so that programs running together share operands in L2."""
    band = program // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - band * GROUP, GROUP)
    inside = program % (GROUP * column_tiles)
    row = band * GROUP + inside % height
    column = inside // height
    return Location(
        row_count, column_count, excluded, chunk_row + row, chunk_column + column, row, column, row_tiles, column_tiles
    )


@triton.jit
def scores(
    x, y, first_row, first_column, last_row, last_column, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x[first_row:] @ y[first_column:].T``, fp32 ``[ROWS, COLUMNS]``; `dim` is a multiple of BLOCK_K.

    Rows past the last read the last again: what comes of them is never used, and no load needs a mask. Offsets within
    a tile fit 32 bits, which keeps half as many registers busy with addresses; only the tile's own place needs 64.
    """
    depth = tl.arange(0, BLOCK_K)
    rows = tl.minimum(tl.arange(0, ROWS), last_row - first_row)
    columns = tl.minimum(tl.arange(0, COLUMNS), last_column - first_column)
    in_x = rows[:, None] * dim + depth[None, :]
    in_y = columns[:, None] * dim + depth[None, :]
    x += dim.to(tl.int64) * first_row
    y += dim.to(tl.int64) * first_column
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(0, dim, BLOCK_K):
        total = tl.dot(tl.load(x + in_x), tl.trans(tl.load(y + in_y)), total, input_precision=PRECISION)
        x += BLOCK_K
        y += BLOCK_K
    return total


@triton.jit
def student_scores(x, y, at, dim, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """The scores of a location's tile, of operands ``[R, D]`` and ``[C, D]``."""
    return scores(
        x, y, at.row * TILE, at.column * TILE, at.row_count - 1, at.column_count - 1, dim,
        TILE, TILE, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit
def guide_scores(x, y, at, dim, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """The same of operands that begin with the chunk's first row and column."""
    first_row = (at.row - at.row_in_chunk) * TILE
    first_column = (at.column - at.column_in_chunk) * TILE
    return scores(
        x, y, at.row_in_chunk * TILE, at.column_in_chunk * TILE,
        at.row_count - 1 - first_row, at.column_count - 1 - first_column, dim, TILE, TILE, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit
def pack(masked):
    """Bools ``[ROWS, 32 WORDS]`` to a packed mask ``[ROWS, WORDS]``; distinct powers of two, so the sum is the
    union."""
    WORDS: tl.constexpr = masked.shape[1] // 32
    bit = tl.arange(0, 32)
    bits = tl.reshape(masked.to(tl.int32), (masked.shape[0], WORDS, 32))
    return tl.sum(bits << bit[None, None, :], axis=2)


@triton.jit
def unpack(packed):
    """A packed mask ``[ROWS, WORDS]`` to bools ``[ROWS, 32 WORDS]``."""
    COLUMNS: tl.constexpr = packed.shape[1] * 32
    bit = tl.arange(0, 32)
    bits = (packed[:, :, None] >> bit[None, None, :]) & 1
    return tl.reshape(bits, (packed.shape[0], COLUMNS)) != 0


@triton.jit
def unpack_transposed(packed):
    """Words ``[WORDS, COLUMNS]``, each of 32 consecutive rows, to bools ``[32 WORDS, COLUMNS]``."""
    ROWS: tl.constexpr = packed.shape[0] * 32
    bit = tl.arange(0, 32)
    bits = (packed[:, None, :] >> bit[None, :, None]) & 1
    return tl.reshape(bits, (ROWS, packed.shape[1])) != 0


@triton.jit
def count_bits(packed):
    """How many bits of each word are set."""
    x = packed.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def mask_of_rows(mask_bits, row, column, all_column_tiles):
    """Where the mask begins that the rows of tile (row, column) of a rectangle decided."""
    return mask_bits + (all_column_tiles.to(tl.int64) * row + column) * TILE_WORDS


@triton.jit
def mask_of_columns(mask_bits, row, column, all_column_tiles):
    """Where the mask begins that the columns decided, in a tile on or above the diagonal of a symmetric rectangle."""
    diagonal = all_column_tiles.to(tl.int64) * all_column_tiles + row
    above = all_column_tiles.to(tl.int64) * column + row
    return mask_bits + tl.where(row == column, diagonal, above) * TILE_WORDS


@triton.jit
def find_masks(mask_bits, at, CHUNK_MASK: tl.constexpr):
    """Where the mask of a location's tile begins that rows decided, and that of the columns in a symmetric rectangle.

    Args:
        CHUNK_MASK: the packed mask is that of a chunk, for as long as it is worked on, and not of the whole rectangle:
            all that rows decided, then all that columns did.
    """
    if CHUNK_MASK:
        by_rows = mask_of_rows(mask_bits, at.row_in_chunk, at.column_in_chunk, at.column_tiles)
        return by_rows, by_rows + at.row_tiles.to(tl.int64) * at.column_tiles * TILE_WORDS
    else:
        across = tl.cdiv(at.column_count, TILE)
        return (
            mask_of_rows(mask_bits, at.row, at.column, across),
            mask_of_columns(mask_bits, at.row, at.column, across),
        )


@triton.jit
def load_masks(mask_bits, at, SYMMETRIC: tl.constexpr, CHUNK_MASK: tl.constexpr):
    """Both packed masks of a tile, ``[TILE, ROW_WORDS]``; one and the same where the rectangle is not symmetric."""
    by_rows, by_columns = find_masks(mask_bits, at, CHUNK_MASK)
    packed = tl.load(by_rows + words_grid())
    mirrored = packed
    if SYMMETRIC:
        mirrored = tl.load(by_columns + words_grid())
    return packed, mirrored


@triton.jit
def store_mask(mask_bits, packed, at, MIRRORED: tl.constexpr, CHUNK_MASK: tl.constexpr):
    """Write the packed mask of the rows of a tile, or of its columns, if anybody will look."""
    if mask_bits is not None:
        by_rows, by_columns = find_masks(mask_bits, at, CHUNK_MASK)
        if MIRRORED:
            by_rows = by_columns
        tl.store(by_rows + words_grid(), packed)


@triton.jit
def scale(logits, logit_scales, own_negative, shift, rows, columns):
    """The logits times the logit scales of hardness weighting, if there are any.

    Args:
        logit_scales: ``[2]``: that of column ``own_negative + shift + row``, and that of all others; or None.
        own_negative: None where all have the second.
        rows: counted from wherever `shift` says; which, decides how many registers they take.
    """
    if logit_scales is not None:
        if own_negative is None:
            logits = logits * tl.load(logit_scales + 1)
        else:
            is_own = rows[:, None] + (own_negative + shift) == columns[None, :]
            logits = logits * tl.where(is_own, tl.load(logit_scales), tl.load(logit_scales + 1))
    return logits


@triton.jit
def words_grid():
    """Offsets ``[TILE, ROW_WORDS]`` of a tile's words."""
    return tl.arange(0, TILE)[:, None] * ROW_WORDS + tl.arange(0, ROW_WORDS)[None, :]
