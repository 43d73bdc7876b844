"""What masks the pairs of a tile: standing outside the matrix, a guide threshold, a student threshold.

Each comparison is packed before the next begins. The forward pass and `gist_fast.kernels.masks` share all of this, so
that they decide alike.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import tile


@triton.jit
def never_counts(at, COLUMNS: tl.constexpr):
    """Packed mask ``[TILE, COLUMNS // 32]`` of what never counts: outside the matrix, or excluded.

    Made as words, so that no tile pays for what only those on an edge have.
    """
    rows = tl.arange(0, tile.TILE)
    first = 32 * tl.arange(0, COLUMNS // 32)
    inside = at.columns - first
    outside = tl.where(inside >= 32, 0, -1 << tl.minimum(tl.maximum(inside, 0), 31))
    outside = tl.where(inside <= 0, -1, outside)
    own = tile.diagonal(tl.load(at.chunk + tile.EXCLUDED) + at.row * tile.TILE - at.first, COLUMNS)
    return tl.where((rows >= at.rows)[:, None], -1, outside[None, :] | own)


@triton.jit
def owners_of_rows(numbers, at):
    """``[TILE, 1]`` of the numbers ``[B]`` that an anchor has: those of the tile's rows; 0 outside the matrix."""
    lane = tl.arange(0, tile.TILE)
    place = tl.load(at.chunk + tile.ROW_OWNER) + at.row * tile.TILE + lane
    return tl.load(numbers + place, mask=lane < at.rows, other=0.0)[:, None]


@triton.jit
def owners_of_columns(numbers, at, COLUMNS: tl.constexpr):
    """``[1, COLUMNS]``: those of the columns, in a symmetric rectangle."""
    lane = tl.arange(0, COLUMNS)
    place = tl.load(at.chunk + tile.COLUMN_OWNER) + at.first + lane
    return tl.load(numbers + place, mask=lane < at.columns, other=0.0)[None, :]


@triton.jit
def above(scores, thresholds, packed, mirrored, at, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr):
    """The packed masks, with what lies above the guide thresholds: those of the rows, and in a symmetric rectangle
    those of the columns.

    Args:
        scores: ``[TILE, COLUMNS]``
        packed: of what did not count before; `mirrored` likewise, as the columns decide.
    """
    packed = packed | tile.pack(scores > owners_of_rows(thresholds, at))
    if SYMMETRIC:
        mirrored = mirrored | tile.pack(scores > owners_of_columns(thresholds, at, COLUMNS))
    return packed, mirrored


@triton.jit
def below(logits, thresholds, packed, mirrored, at, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr):
    """The same with what lies below the student thresholds."""
    packed = packed | tile.pack(logits < owners_of_rows(thresholds, at))
    if SYMMETRIC:
        mirrored = mirrored | tile.pack(logits < owners_of_columns(thresholds, at, COLUMNS))
    return packed, mirrored


@triton.jit
def count_more(counts, packed, mirrored, known, known_mirrored, at, SYMMETRIC: tl.constexpr):
    """Add how many pairs are masked that were not known to be, to the counts ``[blocks]`` of rows and of columns. On
    the diagonal both sides are the same pairs."""
    tile.add_count(counts, at, tile.count_bits(packed & ~known), tile.BLOCK)
    if SYMMETRIC:
        more = tl.where(tile.serves_columns(at), tile.count_bits(mirrored & ~known_mirrored), 0)
        tile.add_count(counts, at, more, tile.MIRROR_BLOCK)
