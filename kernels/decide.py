"""What masks the pairs of a tile: standing outside the matrix, a guide threshold, a student threshold.

Each comparison is packed before the next begins, and so before the next product takes its registers. The forward pass
and `gist_fast.kernels.masks` share all of this, so that they decide alike.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import tile


@triton.jit
def never_counts(rows, first_column, row_count, column_count, excluded, WORDS: tl.constexpr):
    """Packed mask ``[ROWS, WORDS]`` of what never counts: outside the matrix, or column ``excluded + row``.

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
def above_guide_threshold(
    scores, guide_thresholds, rows, columns, row_count, packed, mirrored, SYMMETRIC: tl.constexpr
):
    """The packed masks, with what lies above the guide thresholds: those of the rows, and in a symmetric rectangle
    those of the columns.

    Args:
        scores: ``[ROWS, COLUMNS]``
        packed: of what did not count before; `mirrored` likewise, as the columns decide.
    """
    threshold = tl.load(guide_thresholds + tl.minimum(rows, row_count - 1))
    packed = packed | tile.pack(scores > threshold[:, None])
    if SYMMETRIC:
        threshold = tl.load(guide_thresholds + tl.minimum(columns, row_count - 1))
        mirrored = mirrored | tile.pack(scores > threshold[None, :])
    return packed, mirrored


@triton.jit
def below_student_threshold(logits, student_thresholds, owners, row_count, packed, AXIS: tl.constexpr):
    """The packed mask, with what lies below the student thresholds of its rows (AXIS 1) or of its columns (AXIS 0).

    Args:
        owners: ``[ROWS]`` or ``[COLUMNS]``: who of the R rows they are.
    """
    threshold = tl.expand_dims(tl.load(student_thresholds + tl.minimum(owners, row_count - 1)), AXIS)
    return packed | tile.pack(logits < threshold)


@triton.jit
def count_masked(packed, mirrored, both, SYMMETRIC: tl.constexpr):
    """How many pairs do not count; in a symmetric rectangle also of those that the columns decided, where `both`."""
    count = tl.sum(tile.count_bits(packed))
    if SYMMETRIC:
        count += tl.where(both, tl.sum(tile.count_bits(mirrored)), 0)
    return count
