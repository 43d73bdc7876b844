"""Tiles, and where in memory a pair's mask bit stands.

Scores are computed in square tiles of `TILE`, by every kernel and on every device, so that the backward pass finds
the bits where the forward pass put them and decides again exactly as it did. A tile's bits are `TILE_WORDS`
consecutive 32-bit words: row after row, each row's columns 0 to 31 in its first word, column c in bit ``c % 32``.

A set bit means that the pair does not count: masked by the guide, excluded, or outside the matrix.

In a symmetric square only tiles on and above the diagonal are computed. Tile (r, c) with r < c decides ``(i, j)`` for
row i and ``(j, i)`` for row j; the second set of bits stands in the place of tile (c, r), *in the orientation of the
first*: word row i, bit j. For tiles on the diagonal, where that place is taken, the second set stands in one more
column of tiles behind all others. So nobody transposes bits on the way in or out, except who owns the columns.
"""

from __future__ import annotations

TILE = 128
WORD_BITS = 32
TILE_WORDS = TILE * TILE // WORD_BITS


def tiles(length: int) -> int:
    """Tiles that cover `length` rows or columns."""
    return (length + TILE - 1) // TILE


def mask_words(rows: int, columns: int, symmetric: bool) -> int:
    """32-bit words that the bits of a ``[rows, columns]`` rectangle fill."""
    return tiles(rows) * (tiles(columns) + symmetric) * TILE_WORDS
