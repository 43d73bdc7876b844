"""Tiles, chunks, and where in memory the mask bit of a pair stands.

Scores are computed in square tiles of `TILE` rows and columns, by every kernel and on every device. So the backward
pass finds the mask bits where the forward pass put them, and decides again exactly as it did. Tiles are cut into
*chunks* of at most `CHUNK_TILES` by `CHUNK_TILES`, each with a region of mask bits to itself.

A mask bit is one bit a pair. A set bit means that the pair does not count: masked by a guide or a group, excluded, or
outside the matrix. Mask bits are packed in 32-bit words; a *packed mask* is an int32 tensor of them. A tile fills
`TILE_WORDS` consecutive words: row after row, columns 0 to 31 of a row in its first word, column c in bit ``c % 32``.
Tile (r, c) of a chunk is its tile ``r * column_tiles + c``.

In a symmetric square only tiles on and above the diagonal are computed. Such a tile decides ``(i, j)`` for row i and
``(j, i)`` for row j. The second set of bits stands *in the orientation of the first*: word row i, bit j. So nobody
transposes bits on the way in or out, except the kernel that unpacks them. In a chunk on the diagonal the second set of
tile (r, c) stands in the place of tile (c, r), which nobody computes; that of tile (r, r) in one more column of tiles
behind all others. In a chunk above the diagonal all second sets stand behind all first ones.
"""

from __future__ import annotations

TILE = 128
WORD_BITS = 32
TILE_WORDS = TILE * TILE // WORD_BITS
CHUNK_TILES = 64
"""Rows and columns of a chunk, in tiles: its dlogits fill 128 MiB in a half type, 256 MiB in float32."""


def tiles(length: int) -> int:
    """Tiles that cover `length` rows or columns."""
    return (length + TILE - 1) // TILE


def mask_words(rows: int, columns: int, symmetric: bool) -> int:
    """32-bit words that the packed mask of a ``[rows, columns]`` rectangle fills, in chunks of any size."""
    return tiles(rows) * (tiles(columns) + symmetric) * TILE_WORDS
