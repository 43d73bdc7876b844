"""The forward pass: scores, masked, to a partial softmax of every row, without a matrix of scores in memory.

A program computes a tile, or some of its columns. Its mask has been written before (`gist_fast.kernels.masks`,
`gist_fast.kernels.groups`), or is decided here where the student's own scores decide: against guide thresholds where it
guides itself, against student thresholds where only hard negatives count. Each program leaves a maximum and a sum of
exp2 of every row. `gist_fast.kernels.reduce` makes one softmax of them, always in the same order, so that results are
the same from run to run.

Of the Matryoshka dims the widest decides, and the others read its mask: the one kept for the backward pass, or that of
a batch of chunks.

**Both sides.** In a symmetric rectangle a tile is masked along both sides, and leaves a maximum and a sum along both:
in the blocks ``aa`` and ``pp``, whose tile (r, c) above the diagonal holds the scores of tile (c, r) too, and in ``ap``
where ``pa`` is compared, whose scores are those of ``ap``, transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.chunks import ChunkSet
from gist_fast.kernels.config import Launch
from gist_fast.kernels.launch import (
    ALIGNED_OR_NOT,
    NOT_SPECIALISED,
    operand_arguments,
    start,
    tile_arguments,
    tile_grid,
)
from torch import Tensor


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def forward_kernel(
    x,  # the student's stack, [S, D]; see `gist_fast.kernels.tile.scores`
    y,
    dim,
    guide_thresholds,  # [B], or None where the student does not decide by them
    student_thresholds,  # [B] or None
    temperature,  # [1], or None where hardness weighting is off
    strength,
    mask_bits,  # read where HAS_INITIAL_MASK, written where thresholds decide; None where nothing masks
    masked,  # [blocks]: pairs that the guide or their group masked; None where they are counted elsewhere
    easy,  # [blocks]: pairs of the others that a student threshold did; None without
    maxima,  # partial softmaxes, a number a row and layer
    sums,
    table,
    start,
    chunks,
    HAS_INITIAL_MASK: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    SHARES: tl.constexpr = tile.TILE // COLUMNS
    at = tile.locate(table, start, chunks, GROUP, COLUMNS)
    if SYMMETRIC and tile.is_idle(at):
        return
    logits = tile.scores(x, y, at, dim, COLUMNS, BLOCK_K, PRECISION, DESCRIPTORS, False)
    if HAS_INITIAL_MASK:
        packed, mirrored = tile.load_masks(mask_bits, at, SYMMETRIC, COLUMNS)
    else:
        packed = decide.never_counts(at, COLUMNS)
        mirrored = packed
    if guide_thresholds is not None:
        packed, mirrored = decide.above(logits, guide_thresholds, packed, mirrored, at, SYMMETRIC, COLUMNS)
    if masked is not None:
        never = decide.never_counts(at, COLUMNS)
        decide.count_more(masked, packed, mirrored, never, never, at, SYMMETRIC)
    if student_thresholds is not None:
        # None of them was masked before, so that the difference of two counts is theirs.
        known, known_mirrored = packed, mirrored
        packed, mirrored = decide.below(logits, student_thresholds, packed, mirrored, at, SYMMETRIC, COLUMNS)
        decide.count_more(easy, packed, mirrored, known, known_mirrored, at, SYMMETRIC)
    if guide_thresholds is not None or student_thresholds is not None:
        tile.store_masks(mask_bits, packed, mirrored, at, SYMMETRIC, COLUMNS)
    logits = tile.scale(logits, temperature, strength, at, SYMMETRIC, COLUMNS)

    maximum, total = partial_softmax(tl.where(tile.unpack(packed), float("-inf"), logits), 1)
    layer = at.column * SHARES + at.share
    # A batch has less than 2^31 of them, whatever the problem.
    place = (tl.load(at.chunk + tile.ROW_PARTIALS) + layer * at.row_tiles + at.row) * TILE + tl.arange(0, TILE)
    tl.store(maxima + place, maximum)
    tl.store(sums + place, total)
    if SYMMETRIC and tile.serves_columns(at):
        highest, column_total = partial_softmax(tl.where(tile.unpack(mirrored), float("-inf"), logits), 0)
        first = (tl.load(at.chunk + tile.COLUMN_PARTIALS) + at.row * at.column_tiles) * TILE + at.first
        tl.store(maxima + first + tl.arange(0, COLUMNS), highest)
        tl.store(sums + first + tl.arange(0, COLUMNS), column_total)


@triton.jit
def partial_softmax(logits, AXIS: tl.constexpr):
    """Maximum and sum of ``exp2(logit - maximum)`` along an axis; -inf and 0 where all are -inf."""
    maximum = tl.max(logits, axis=AXIS)
    # -inf - -inf would be NaN.
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    return maximum, tl.sum(tl.exp2(logits - tl.expand_dims(base, AXIS)), axis=AXIS)


def start_forward(
    chunks: ChunkSet,
    table: Tensor,
    stack: Tensor,
    maxima: Tensor,
    sums: Tensor,
    launch: Launch,
    *,
    guide_thresholds: Tensor | None,
    student_thresholds: Tensor | None,
    temperature: Tensor | None,
    strength: float,
    mask_bits: Tensor | None,
    masked: Tensor | None,
    easy: Tensor | None,
    has_initial_mask: bool,
) -> None:
    """Write the partial softmaxes of some chunks.

    Args:
        table: where the chunks' set has its rows, on the device.
        stack: the student's, at one Matryoshka dim.
        maxima: of partial softmaxes, fp32, with `sums`; written, in places that the chunks' table names.
        guide_thresholds: ``[B]``, where the student guides itself and decides here.
        student_thresholds: ``[B]``, where they decide here.
        temperature: ``[1]``, fp32; None without hardness weighting, whose `strength` it goes with.
        mask_bits: read with `has_initial_mask`, written where thresholds are given; None where nothing masks.
        masked: ``[blocks]``, int64: pairs that a guide or their group masked are added; None where they are counted
            elsewhere.
        easy: ``[blocks]``, int64: pairs of the others that a student threshold did.
    """
    start(
        forward_kernel,
        tile_grid(chunks, launch),
        **operand_arguments(stack, launch),
        guide_thresholds=guide_thresholds,
        student_thresholds=student_thresholds,
        temperature=temperature if chunks.scaled else None,
        strength=strength,
        mask_bits=mask_bits,
        masked=masked,
        easy=easy if student_thresholds is not None else None,
        maxima=maxima,
        sums=sums,
        HAS_INITIAL_MASK=has_initial_mask,
        **tile_arguments(chunks, table, launch),
    )
