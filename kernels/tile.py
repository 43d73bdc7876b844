"""What every kernel shares: a tile of scores on the matrix units, and its mask between bools and bits."""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import layout

TILE = tl.constexpr(layout.TILE)
WORD_BITS = tl.constexpr(layout.WORD_BITS)
TILE_WORDS = tl.constexpr(layout.TILE_WORDS)
ROW_WORDS = tl.constexpr(layout.TILE // layout.WORD_BITS)

NO_BITS = tl.constexpr(0)
PART_BITS = tl.constexpr(1)
"""Of the whole part, kept for the backward pass."""
CHUNK_BITS = tl.constexpr(2)
"""Of one chunk, for as long as it is worked on: all that rows decided, then all that columns did."""

NO_BOOST = tl.constexpr(0)
ALL_BOOSTED = tl.constexpr(1)
"""By one factor."""
OWN_DIFFERS = tl.constexpr(2)
"""The negative that came with an anchor has another factor than all others."""


@triton.jit
def place(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """A program's tile: down GROUP rows, then a column on, so that programs running together share operands in L2."""
    band = program // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - band * GROUP, GROUP)
    inside = program % (GROUP * column_tiles)
    return band * GROUP + inside % height, inside // height


@triton.jit
def scores(
    x,
    y,
    first_row,
    first_column,
    last_row,
    last_column,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x[first_row:] @ y[first_column:].T``, fp32 ``[ROWS, COLUMNS]``; `width` is a multiple of BLOCK_K.

    Rows past the last read the last again: what comes of them is never used, and no load needs a mask. Offsets within
    a tile fit 32 bits, which keeps half as many registers busy with addresses; only the tile's own place needs 64.
    """
    depth = tl.arange(0, BLOCK_K)
    rows = tl.minimum(tl.arange(0, ROWS), last_row - first_row)
    columns = tl.minimum(tl.arange(0, COLUMNS), last_column - first_column)
    in_x = rows[:, None] * width + depth[None, :]
    in_y = columns[:, None] * width + depth[None, :]
    x += width.to(tl.int64) * first_row
    y += width.to(tl.int64) * first_column
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(0, width, BLOCK_K):
        total = tl.dot(tl.load(x + in_x), tl.trans(tl.load(y + in_y)), total, input_precision=PRECISION)
        x += BLOCK_K
        y += BLOCK_K
    return total


@triton.jit
def pack(hidden, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """``[ROWS, 32 WORDS]`` bools to int32 words ``[ROWS, WORDS]``; distinct powers of two, so the sum is the union."""
    places = tl.arange(0, 32)
    bits = tl.reshape(hidden.to(tl.int32), (ROWS, WORDS, 32))
    return tl.sum(bits << places[None, None, :], axis=2)


@triton.jit
def unpack(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Words ``[ROWS, WORDS]`` to bools ``[ROWS, 32 WORDS]``."""
    places = tl.arange(0, 32)
    bits = (words[:, :, None] >> places[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, WORDS * 32)) != 0


@triton.jit
def unpack_transposed(words, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words ``[WORDS, COLUMNS]``, each of 32 consecutive rows, to bools ``[32 WORDS, COLUMNS]``."""
    places = tl.arange(0, 32)
    bits = (words[:, None, :] >> places[None, :, None]) & 1
    return tl.reshape(bits, (WORDS * 32, COLUMNS)) != 0


@triton.jit
def count_bits(words):
    """How many bits of each word are set."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def words_of_tile(bits, tile_row, tile_column, column_tiles):
    """Where the words begin that rows `tile_row` decided in a tile."""
    return bits + (column_tiles.to(tl.int64) * tile_row + tile_column) * TILE_WORDS


@triton.jit
def mirrored_words(bits, tile_row, tile_column, column_tiles):
    """Where the words begin that the columns decided in a tile on or above the diagonal of a symmetric part."""
    diagonal = column_tiles.to(tl.int64) * column_tiles + tile_row
    above = column_tiles.to(tl.int64) * tile_column + tile_row
    return bits + tl.where(tile_row == tile_column, diagonal, above) * TILE_WORDS


@triton.jit
def places_of_words(bits, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, BITS: tl.constexpr):
    """Where the words of tile (r, c) begin that rows decided, and those that columns did in a symmetric part.

    Args:
        tile_row: the tile's place in its chunk, as `tile_column` and the chunk's size; looked at with ``CHUNK_BITS``.
    """
    if BITS == PART_BITS:
        return words_of_tile(bits, r, c, all_column_tiles), mirrored_words(bits, r, c, all_column_tiles)
    else:
        at = words_of_tile(bits, tile_row, tile_column, column_tiles)
        return at, at + row_tiles.to(tl.int64) * column_tiles * TILE_WORDS


@triton.jit
def load_words(
    bits, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Both sides' words of a tile, ``[TILE, ROW_WORDS]``; one and the same where the part is not symmetric."""
    at, mirrored_at = places_of_words(
        bits, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, BITS
    )
    words = tl.load(at + words_grid())
    mirrored = words
    if SYMMETRIC:
        mirrored = tl.load(mirrored_at + words_grid())
    return words, mirrored


@triton.jit
def store_words(
    bits, words, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles,
    MIRRORED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write the words of a side of a tile where they are to be found again, if anybody will look."""
    if BITS != NO_BITS:
        at, mirrored_at = places_of_words(
            bits, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, BITS
        )
        if MIRRORED:
            at = mirrored_at
        tl.store(at + words_grid(), words)


@triton.jit
def boost(logits, boosts, own_negative, rows, columns, BOOST: tl.constexpr):
    """The logits with what hardness weighting multiplies them by.

    Args:
        boosts: ``[2]``: the factor of column ``own_negative + row``, and that of all others.
        rows: places counted from wherever `own_negative` is; which, decides how many registers they take.
    """
    if BOOST == ALL_BOOSTED:
        logits = logits * tl.load(boosts + 1)
    elif BOOST == OWN_DIFFERS:
        is_own = rows[:, None] + own_negative == columns[None, :]
        logits = logits * tl.where(is_own, tl.load(boosts), tl.load(boosts + 1))
    return logits


@triton.jit
def words_grid():
    """Offsets ``[TILE, ROW_WORDS]`` of a tile's words."""
    return tl.arange(0, TILE)[:, None] * ROW_WORDS + tl.arange(0, ROW_WORDS)[None, :]
