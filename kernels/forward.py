"""The forward pass: scores, masks and logsumexp of a rectangle, without a matrix of scores in memory.

A program computes one tile. The guide's scores come first and are reduced to mask bits, a 32nd of their size, before
the student's are computed in the same registers: two programs fit on a multiprocessor, so that one's matrix products
run under the other's exponentials. Each tile leaves a partial softmax of every row: a maximum and a sum of exp2. A
second small kernel reduces those of a launch into the running ones, always in the same order, so that results are the
same from run to run.

Groups have been compared before, by a kernel of their own, whose mask this one begins with. Where student thresholds
decide, all else has been decided before, and the student's scores are compared with them before the mask is written.
Of the Matryoshka dims the widest decides, and the launches of the others read its mask: the one kept for the backward
pass, or a chunk's.

**Symmetry.** In a symmetric rectangle, tile (r, c) above the diagonal holds the scores of tile (c, r) too. It is
compared along both sides, with the thresholds of its rows and with those of its columns, and leaves a maximum and a sum
along both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.config import Config, Launch
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options, options_of, precision, start
from gist_fast.kernels.layout import TILE, tiles
from gist_fast.kernels.masks import chunk_words, predicate_arguments, write_initial_mask
from gist_fast.kernels.rectangle import Chunk, Predicates, Rectangle, chunks
from torch import Tensor

CHUNK_TILES = 128
"""Rows and columns of one launch, in tiles: 2^28 pairs at most, 32 MiB of maxima and sums between it and the reduction,
and a guide's operands of 2^15 rows."""
REDUCE_ROWS, REDUCE_DEPTH, REDUCE_WARPS = 64, 16, 4


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def forward_kernel(
    x,  # [R, D]
    y,  # [C, D]
    guide_x,  # [rows of the chunk, G]; None where no guide decides, or the student itself
    guide_y,  # [columns of the chunk, G]
    guide_thresholds,  # [R] or None
    student_thresholds,  # [R] or None
    logit_scales,  # [2] or None
    mask_bits,  # of the whole rectangle or of the chunk: written, and read before where HAS_INITIAL_MASK; or None
    counts,  # [tiles of the chunk]: pairs that a guide or their group masked, and what never counts; or None
    all_counts,  # [tiles of the chunk]: with those below a student threshold; or None
    row_maximum,  # [column tiles of the chunk, rows of the chunk], and its sums
    row_sum,
    column_maximum,  # [row tiles of the chunk, columns of the chunk], and its sums; None where not symmetric
    column_sum,
    dim,
    guide_dim,
    own_negative,  # or None
    row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles,
    SYMMETRIC: tl.constexpr, CHUNK_MASK: tl.constexpr, HAS_INITIAL_MASK: tl.constexpr, PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    at = tile.locate(
        tl.program_id(0), row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles, GROUP
    )
    if SYMMETRIC and at.column < at.row:
        return
    lane = tl.arange(0, TILE)
    rows = at.row * TILE + lane
    columns = at.column * TILE + lane
    # Masks are made or read between the products: the fewer registers one has to leave them, the better.
    if guide_x is not None:
        scores = tile.guide_scores(guide_x, guide_y, at, guide_dim, BLOCK_K, GUIDE_PRECISION)
    else:
        scores = tile.student_scores(x, y, at, dim, BLOCK_K, PRECISION)
    if HAS_INITIAL_MASK:
        packed, mirrored = tile.load_masks(mask_bits, at, SYMMETRIC, CHUNK_MASK)
    else:
        packed = decide.never_counts(rows, at.column * TILE, row_count, column_count, excluded, tile.ROW_WORDS)
        mirrored = packed
    if guide_thresholds is not None:
        packed, mirrored = decide.above_guide_threshold(
            scores, guide_thresholds, rows, columns, row_count, packed, mirrored, SYMMETRIC
        )
    if counts is not None:
        # On the diagonal both sides are the same pairs.
        masked_count = decide.count_masked(packed, mirrored, at.column > at.row, SYMMETRIC)
        tl.store(counts + tl.program_id(0), masked_count)
    if student_thresholds is None and (guide_thresholds is not None or not HAS_INITIAL_MASK):
        tile.store_mask(mask_bits, packed, at, False, CHUNK_MASK)
        if SYMMETRIC:
            tile.store_mask(mask_bits, mirrored, at, True, CHUNK_MASK)

    logits = scores if guide_x is None else tile.student_scores(x, y, at, dim, BLOCK_K, PRECISION)
    if student_thresholds is not None:
        # One side after the other, as few words as can be at a time beside the scores.
        packed = decide.below_student_threshold(logits, student_thresholds, rows, row_count, packed, 1)
        count = tl.sum(tile.count_bits(packed))
        tile.store_mask(mask_bits, packed, at, False, CHUNK_MASK)
    # Places in the tile: those in the matrix take as many registers again.
    logits = tile.scale(logits, logit_scales, own_negative, (at.row - at.column) * TILE, lane, lane)
    maximum, total = partial_softmax(tl.where(tile.unpack(packed), float("-inf"), logits), 1)
    place = at.column_in_chunk * (row_tiles * TILE) + at.row_in_chunk * TILE + lane
    tl.store(row_maximum + place, maximum)
    tl.store(row_sum + place, total)
    if student_thresholds is not None:
        if SYMMETRIC:
            mirrored = decide.below_student_threshold(logits, student_thresholds, columns, row_count, mirrored, 0)
            count += tl.where(at.column > at.row, tl.sum(tile.count_bits(mirrored)), 0)
            tile.store_mask(mask_bits, mirrored, at, True, CHUNK_MASK)
        tl.store(all_counts + tl.program_id(0), count)
    if SYMMETRIC and at.column > at.row:
        maximum, total = partial_softmax(tl.where(tile.unpack(mirrored), float("-inf"), logits), 0)
        place = at.row_in_chunk * (column_tiles * TILE) + at.column_in_chunk * TILE + lane
        tl.store(column_maximum + place, maximum)
        tl.store(column_sum + place, total)


@triton.jit
def partial_softmax(logits, AXIS: tl.constexpr):
    """Maximum and sum of ``exp2(logit - maximum)`` along an axis; -inf and 0 where all are -inf."""
    maximum = tl.max(logits, axis=AXIS)
    # -inf - -inf would be NaN.
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    return maximum, tl.sum(tl.exp2(logits - tl.expand_dims(base, AXIS)), axis=AXIS)


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def reduce_kernel(
    maximum,  # [count]: running, of the whole rectangle
    total,
    partial_maximum,  # [depth, stride]
    partial_sum,
    count,
    depth,
    stride,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Reduce a launch's partial softmax into the running one."""
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = column < count
    running = tl.load(maximum + column, mask=inside, other=float("-inf"))
    running_sum = tl.load(total + column, mask=inside, other=0.0)
    for first in range(0, depth, DEPTH):
        layer = first + tl.arange(0, DEPTH)
        at = layer[:, None] * stride + column[None, :]
        there = (layer < depth)[:, None] & inside[None, :]
        partial = tl.load(partial_maximum + at, mask=there, other=float("-inf"))
        # Tiles that no program computed hold -inf, and whatever was in memory as their sum.
        summed = tl.load(partial_sum + at, mask=there & (partial > float("-inf")), other=0.0)
        risen = tl.maximum(running, tl.max(partial, axis=0))
        base = tl.where(risen == float("-inf"), 0.0, risen)
        running_sum = running_sum * tl.exp2(running - base) + tl.sum(summed * tl.exp2(partial - base[None, :]), axis=0)
        running = risen
    tl.store(maximum + column, running, mask=inside)
    tl.store(total + column, running_sum, mask=inside)


def forward_pass(rectangle: Rectangle, maximum: Tensor, total: Tensor, config: Config) -> Tensor:
    """Compute a rectangle and reduce it into the running softmax of its rows.

    Args:
        maximum: ``[L, R]``, fp32, the running maximum at each Matryoshka dim; updated.
        total: ``[L, R]``, fp32, the running sum of ``exp2(logit - maximum)``; updated.

    Returns:
        ``[2]``, int64: how many pairs a guide or their group masked, excluded ones not counted; and how many of the
        others a student threshold did.
    """
    rows, columns, symmetric = rectangle.rows.shape[0], rectangle.columns.shape[0], rectangle.symmetric
    height, breadth = min(CHUNK_TILES, tiles(rows)), min(CHUNK_TILES, tiles(columns))
    partial = total.new_empty((4 if symmetric else 2, height * breadth * TILE))
    counts = torch.zeros((2, height * breadth), dtype=torch.int32, device=total.device)
    found = torch.zeros(2, dtype=torch.int64, device=total.device)
    predicates = rectangle.predicates
    has_initial_mask = predicates is not None and predicates.has_initial_mask
    mask_bits, chunk_mask = rectangle.mask_bits, False
    if mask_bits is None and predicates is not None and (has_initial_mask or len(rectangle.matryoshka) > 1):
        # Between the kernels that decide, or from the widest dim to the others.
        chunk_mask = True
        mask_bits = torch.empty(chunk_words(height, breadth, symmetric), dtype=torch.int32, device=total.device)
    launch = _launch_of(rectangle, config)
    for chunk in chunks(rows, columns, height, breadth, upper=symmetric):
        counts.zero_()
        if has_initial_mask:
            assert mask_bits is not None
            write_initial_mask(rectangle, chunk, mask_bits, chunk_mask, config)
        for index in range(len(rectangle.matryoshka)):
            if symmetric:
                # Below the diagonal no program runs, and none mirrors a tile on it.
                partial[0::2].fill_(float("-inf"))
            _start(rectangle, chunk, index, mask_bits, chunk_mask, partial, counts, launch)
            _reduce(maximum[index], total[index], partial[:2], chunk.rows, chunk.column_tiles)
            if symmetric:
                _reduce(maximum[index], total[index], partial[2:], chunk.columns, chunk.row_tiles)
        if predicates is not None:
            found += counts.sum(1, dtype=torch.int64)
    if predicates is None:
        return found
    masked, masked_in_all = found.unbind()
    easy_negatives = masked_in_all if predicates.student_thresholds is None else masked_in_all - masked
    # Every pair of every tile was counted once, those outside and the excluded ones as masked.
    return torch.stack([masked - (rectangle.padded - rectangle.compared), easy_negatives])


def _launch_of(rectangle: Rectangle, config: Config) -> Launch:
    if rectangle.symmetric:
        return config.forward_symmetric
    return config.forward if rectangle.own_negative is None else config.forward_own_scale


def _start(
    rectangle: Rectangle,
    chunk: Chunk,
    index: int,
    mask_bits: Tensor | None,
    chunk_mask: bool,
    partial: Tensor,
    counts: Tensor,
    launch: Launch,
) -> None:
    x, y = rectangle.matryoshka[index]
    decides = index == 0 and rectangle.predicates is not None
    predicates = rectangle.predicates.remaining if decides else Predicates()
    has_initial_mask = index > 0 or (rectangle.predicates is not None and rectangle.predicates.has_initial_mask)
    start(
        forward_kernel,
        (chunk.row_tiles * chunk.column_tiles,),
        x=x,
        y=y,
        **predicate_arguments(predicates, chunk),
        logit_scales=rectangle.logit_scales,
        mask_bits=mask_bits,
        counts=counts[0] if decides else None,
        all_counts=None if predicates.student_thresholds is None else counts[1],
        row_maximum=partial[0],
        row_sum=partial[1],
        column_maximum=partial[2] if rectangle.symmetric else None,
        column_sum=partial[3] if rectangle.symmetric else None,
        dim=x.shape[1],
        own_negative=rectangle.own_negative,
        **rectangle.geometry(chunk),
        SYMMETRIC=rectangle.symmetric,
        CHUNK_MASK=chunk_mask,
        HAS_INITIAL_MASK=mask_bits is not None and has_initial_mask,
        PRECISION=precision(x),
        GROUP=launch.group,
        **options(launch),
    )


def _reduce(maximum: Tensor, total: Tensor, partial: Tensor, own: slice, depth: int) -> None:
    maximum, total = maximum[own], total[own]
    start(
        reduce_kernel,
        (triton.cdiv(len(maximum), REDUCE_ROWS),),
        maximum=maximum,
        total=total,
        partial_maximum=partial[0],
        partial_sum=partial[1],
        count=len(maximum),
        depth=depth,
        stride=tiles(own.stop - own.start) * TILE,
        ROWS=REDUCE_ROWS,
        DEPTH=REDUCE_DEPTH,
        **options_of(REDUCE_WARPS),
    )
