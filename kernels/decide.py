"""What does not count in a tile: what stands outside, what a guide masks, what lies below a floor.

Each kind of comparison is reduced to packed words before the next begins, and so before the next product takes its
registers. The forward pass and `gist_fast.kernels.masks` share all of this, so that they decide alike.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import tile

NO_GUIDE = tl.constexpr(0)
OWN_GUIDE = tl.constexpr(1)
"""The guide has embeddings of its own."""
SELF_GUIDE = tl.constexpr(2)
"""The student's own scores decide: no second product."""


@triton.jit
def never_counts(rows, first_column, row_count, column_count, excluded, WORDS: tl.constexpr):
    """Words ``[ROWS, WORDS]`` of the entries that never count: outside the matrix, or column ``excluded + row``.

    Made as words, which are a 32nd of the entries, so that no tile pays for what only those on an edge have.
    """
    first = first_column + 32 * tl.arange(0, WORDS)
    inside = column_count - first
    outside = tl.where(inside >= 32, 0, -1 << tl.minimum(tl.maximum(inside, 0), 31))
    outside = tl.where(inside <= 0, -1, outside)
    place = rows[:, None] + excluded - first[None, :]
    own = tl.where((place >= 0) & (place < 32), 1 << (place & 31), 0)
    return tl.where((rows >= row_count)[:, None], -1, outside[None, :] | own)


@triton.jit
def above(scores, limits, rows, columns, row_count, words, mirrored, SYMMETRIC: tl.constexpr, WORDS: tl.constexpr):
    """Or into the words what lies above the limits: as the rows decide, and as the columns do in a symmetric part.

    Args:
        scores: ``[ROWS, COLUMNS]``
        words: of what did not count before; `mirrored` likewise.
    """
    limit = tl.load(limits + tl.minimum(rows, row_count - 1))
    words = words | tile.pack(scores > limit[:, None], rows.shape[0], WORDS)
    if SYMMETRIC:
        limit = tl.load(limits + tl.minimum(columns, row_count - 1))
        mirrored = mirrored | tile.pack(scores > limit[None, :], rows.shape[0], WORDS)
    return words, mirrored


@triton.jit
def below(logits, floors, owners, row_count, words, AXIS: tl.constexpr, WORDS: tl.constexpr):
    """The words, with what lies below the floors of its rows (AXIS 1) or of its columns (AXIS 0).

    Args:
        owners: ``[ROWS]`` or ``[COLUMNS]``: who of the R rows they are.
    """
    floor = tl.expand_dims(tl.load(floors + tl.minimum(owners, row_count - 1)), AXIS)
    return words | tile.pack(logits < floor, logits.shape[0], WORDS)


@triton.jit
def count_hidden(words, mirrored, both, SYMMETRIC: tl.constexpr):
    """How many pairs do not count; in a symmetric part also of those that the columns decided, where `both`."""
    count = tl.sum(tile.count_bits(words))
    if SYMMETRIC:
        count += tl.where(both, tl.sum(tile.count_bits(mirrored)), 0)
    return count
