"""What every kernel of tiles shares: where its program works, a tile of scores on the matrix units, and its mask."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from gist_fast.kernels import layout
from gist_fast.kernels.chunks import FIELDS

TILE = tl.constexpr(layout.TILE)
TILE_WORDS = tl.constexpr(layout.TILE_WORDS)
ROW_WORDS = tl.constexpr(layout.TILE // layout.WORD_BITS)
WIDTH = tl.constexpr(len(FIELDS))
X, Y = tl.constexpr(FIELDS.index("x")), tl.constexpr(FIELDS.index("y"))
GUIDE_X, GUIDE_Y = tl.constexpr(FIELDS.index("guide_x")), tl.constexpr(FIELDS.index("guide_y"))
ROWS, COLUMN_COUNT = tl.constexpr(FIELDS.index("rows")), tl.constexpr(FIELDS.index("columns"))
EXCLUDED = tl.constexpr(FIELDS.index("excluded"))
ROW_TILES, COLUMN_TILES = tl.constexpr(FIELDS.index("row_tiles")), tl.constexpr(FIELDS.index("column_tiles"))
ROW_OWNER, COLUMN_OWNER = tl.constexpr(FIELDS.index("row_owner")), tl.constexpr(FIELDS.index("column_owner"))
TRIANGLE, MASK = tl.constexpr(FIELDS.index("triangle")), tl.constexpr(FIELDS.index("mask"))
BLOCK, MIRROR_BLOCK = tl.constexpr(FIELDS.index("block")), tl.constexpr(FIELDS.index("mirror_block"))
ROW_PARTIALS = tl.constexpr(FIELDS.index("row_partials"))
COLUMN_PARTIALS = tl.constexpr(FIELDS.index("column_partials"))
DLOGITS = tl.constexpr(FIELDS.index("dlogits"))
OWN_NEGATIVE = tl.constexpr(FIELDS.index("own_negative"))
SCALES_OWN = tl.constexpr(FIELDS.index("scales_own"))
SCALES_OTHERS = tl.constexpr(FIELDS.index("scales_others"))


class Location(NamedTuple):
    """Where a program works: its chunk, and its tile in it or, where programs share one, some columns of a tile."""

    chunk: tl.tensor
    """The chunk's row in the table."""
    row: tl.tensor
    """Of the tile in the chunk, counted in tiles."""
    column: tl.tensor
    share: tl.tensor
    """Which of the programs that share the tile."""
    row_tiles: tl.tensor
    """The chunk's size."""
    column_tiles: tl.tensor
    triangle: tl.tensor
    """Whether the chunk is on the diagonal of a triangular rectangle."""
    rows: tl.tensor
    """The tile's rows that are in the matrix, from its first one on; may be more than it has."""
    columns: tl.tensor
    """Columns from the program's first one on."""
    first: tl.tensor
    """The program's first column in the chunk."""


@triton.jit
def locate(table, start, chunks, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's tile: down GROUP rows, then a column on, so that programs running together share operands in L2."""
    SHARES: tl.constexpr = TILE // COLUMNS
    # Programs that share a tile run next to each other.
    program = tl.program_id(0) // SHARES
    share = tl.program_id(0) % SHARES
    chunk = table + start
    for following in range(1, chunks):
        chunk += tl.where(tl.load(table + start + following * WIDTH) <= program, WIDTH, 0)
    program -= tl.load(chunk)
    row_tiles = tl.load(chunk + ROW_TILES)
    column_tiles = tl.load(chunk + COLUMN_TILES)
    band = program // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - band * GROUP, GROUP)
    inside = program % (GROUP * column_tiles)
    row = band * GROUP + inside % height
    column = inside // height
    first = column * TILE + share * COLUMNS
    return Location(
        chunk, row, column, share, row_tiles, column_tiles, tl.load(chunk + TRIANGLE),
        tl.load(chunk + ROWS) - row * TILE, tl.load(chunk + COLUMN_COUNT) - first, first,
    )  # fmt: skip


@triton.jit
def is_idle(at):
    """Whether nobody needs a location's tile: it is below the diagonal of a triangular rectangle."""
    return (at.triangle != 0) & (at.column < at.row)


@triton.jit
def serves_columns(at):
    """Whether a tile of a symmetric rectangle serves its columns too: it is above the diagonal."""
    return (at.triangle == 0) | (at.column > at.row)


@triton.jit
def scores(
    x, y, at, dim,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    GUIDE: tl.constexpr,
):  # fmt: skip
    """Scores of a location's pairs, fp32 ``[TILE, COLUMNS]``; `dim` is a multiple of BLOCK_K.

    Rows past the operand's last are those of the next one, or of the stack's padding: what comes of them is never
    used, and no load needs a mask. Offsets within a tile fit 32 bits, which keeps half as many registers busy with
    addresses; only the tile's own place needs 64.

    Args:
        x: the stack, or with DESCRIPTORS its tensor descriptor of blocks ``[TILE, BLOCK_K]``.
        y: the same, of blocks ``[COLUMNS, BLOCK_K]``.
        GUIDE: it is a guide's stack.
    """
    if GUIDE:
        first_row = tl.load(at.chunk + GUIDE_X) + at.row * TILE
        first_column = tl.load(at.chunk + GUIDE_Y) + at.first
    else:
        first_row = tl.load(at.chunk + X) + at.row * TILE
        first_column = tl.load(at.chunk + Y) + at.first
    total = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(0, dim, BLOCK_K):
            total = tl.dot(
                x.load([first_row, k]), tl.trans(y.load([first_column, k])), total, input_precision=PRECISION
            )
    else:
        depth = tl.arange(0, BLOCK_K)
        in_x = tl.arange(0, TILE)[:, None] * dim + depth[None, :]
        in_y = tl.arange(0, COLUMNS)[:, None] * dim + depth[None, :]
        x += dim.to(tl.int64) * first_row
        y += dim.to(tl.int64) * first_column
        for _ in range(0, dim, BLOCK_K):
            total = tl.dot(tl.load(x + in_x), tl.trans(tl.load(y + in_y)), total, input_precision=PRECISION)
            x += BLOCK_K
            y += BLOCK_K
    return total


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
    """How many bits are set."""
    x = packed.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return tl.sum(((x * 0x01010101) >> 24).to(tl.int32))


@triton.jit
def find_tile(mask_bits, at, row, column):
    """Where the words begin of tile (row, column) of a location's chunk.

    Args:
        mask_bits: uint8, as the host holds them, which spares it a view of them in each pass.
    """
    place = tl.load(at.chunk + MASK).to(tl.int64) + row * at.column_tiles + column
    return mask_bits.to(tl.pointer_type(tl.int32), bitcast=True) + place * TILE_WORDS


@triton.jit
def find_mask(mask_bits, at, row, column, COLUMNS: tl.constexpr):
    """Where the words are of a location's columns of that tile, ``[TILE, COLUMNS // 32]``."""
    word = at.share * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    return find_tile(mask_bits, at, row, column) + (tl.arange(0, TILE)[:, None] * ROW_WORDS + word[None, :])


@triton.jit
def find_mirrored_mask(mask_bits, at, COLUMNS: tl.constexpr):
    """The same of the bits that the tile's columns decided; see `gist_fast.kernels.layout`."""
    # In a chunk above the diagonal they follow as many tiles further on.
    row = tl.where(at.triangle != 0, at.column, at.row_tiles + at.row)
    column = tl.where(at.triangle != 0, at.row, at.column)
    on_the_diagonal = (at.triangle != 0) & (at.row == at.column)
    row = tl.where(on_the_diagonal, at.row_tiles, row)
    return find_mask(mask_bits, at, row, column, COLUMNS)


@triton.jit
def load_masks(mask_bits, at, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr):
    """Both packed masks of a location, ``[TILE, COLUMNS // 32]``; one and the same where it is not symmetric."""
    packed = tl.load(find_mask(mask_bits, at, at.row, at.column, COLUMNS))
    mirrored = packed
    if SYMMETRIC:
        mirrored = tl.load(find_mirrored_mask(mask_bits, at, COLUMNS))
    return packed, mirrored


@triton.jit
def store_masks(mask_bits, packed, mirrored, at, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr):
    """Write them."""
    tl.store(find_mask(mask_bits, at, at.row, at.column, COLUMNS), packed)
    if SYMMETRIC:
        tl.store(find_mirrored_mask(mask_bits, at, COLUMNS), mirrored)


@triton.jit
def add_count(counts, at, n, FIELD: tl.constexpr):
    """Add to the count of the block that a field of the location's chunk names, of ``[blocks]``. Sums of integers are
    the same in any order."""
    tl.atomic_add(counts + tl.load(at.chunk + FIELD), n.to(tl.int64), sem="relaxed")


@triton.jit
def diagonal(shift, COLUMNS: tl.constexpr):
    """Packed mask ``[TILE, COLUMNS // 32]`` with the bit of column ``row + shift`` set in each row that has it.

    Made as words, which are a 32nd of the entries: compared pair by pair, rows and columns take as many registers
    again as the scores.
    """
    place = tl.arange(0, TILE)[:, None] + shift - 32 * tl.arange(0, COLUMNS // 32)[None, :]
    return tl.where((place >= 0) & (place < 32), 1 << (place & 31), 0)


@triton.jit
def scale(logits, temperature, strength, at, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr):
    """The logits times what hardness weighting makes of them, ``1 + strength * temperature`` where the chunk says so;
    none in symmetric rectangles.

    Args:
        temperature: ``[1]``, or None where nothing is weighted.
    """
    if temperature is not None and not SYMMETRIC:
        own = diagonal(tl.load(at.chunk + OWN_NEGATIVE) + at.row * TILE - at.first, COLUMNS)
        scaled = tl.where(tl.load(at.chunk + SCALES_OWN) != 0, own, 0)
        scaled = scaled | tl.where(tl.load(at.chunk + SCALES_OTHERS) != 0, ~own, 0)
        logits = tl.where(unpack(scaled), logits * (1.0 + strength * tl.load(temperature)), logits)
    return logits
