"""The forward pass: scores, masks and logsumexp of a part, without a matrix of scores in memory.

A program computes one tile. The guide's scores come first and are reduced to mask bits, a 32nd of their size, before
the student's are computed in the same registers: two programs fit on a multiprocessor, so that one's matrix products
run under the other's exponentials. Each tile leaves a maximum and a sum of exp2 a row; a second small kernel folds
those of a launch into the running ones, always in the same order, so that results are the same from run to run.

Groups have been compared before, by a kernel of their own, whose words this one begins with. Where floors decide, all
else has been decided before, and the student's scores are compared with them before the bits are written. Of a ladder
of widths the widest decides, and the launches of the others read its bits: those kept for the backward pass, or a
chunk's.

**Symmetry.** In a symmetric part, tile (r, c) above the diagonal holds the scores of tile (c, r) too. It is compared
along both sides, with the limits of its rows and with those of its columns, and leaves a maximum and a sum along both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.config import Config, Launch
from gist_fast.kernels.launch import ALIGNED_OR_NOT, PLACES, boost, options, precision
from gist_fast.kernels.layout import TILE, tiles
from gist_fast.kernels.masks import begin, chunk_words, decision_arguments, decision_constants
from gist_fast.kernels.parts import Chunk, Part, chunks
from torch import Tensor

CHUNK_TILES = 128
"""Rows and columns of one launch, in tiles: 2^28 pairs at most, 32 MiB of maxima and sums between it and the fold, and
a guide's operands of 2^15 rows."""
FOLD_ROWS, FOLD_DEPTH, FOLD_WARPS = 64, 16, 4


@triton.jit(do_not_specialize=PLACES, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def forward_kernel(
    x,  # [R, D]
    y,  # [C, D]
    guide_x,  # [rows of the chunk, G]
    guide_y,  # [columns of the chunk, G]
    limits,  # [R]
    floors,  # [R]
    boosts,  # [2]
    bits,  # words of the whole part or of the chunk: written, and read before where GIVEN
    counts,  # [tiles of the chunk]: pairs that a guide or their group masked, and what never counts
    all_counts,  # [tiles of the chunk]: with those below a floor; written where HARD
    row_maximum,  # [column tiles of the chunk, rows of the chunk], and its sums
    row_sum,
    column_maximum,  # [row tiles of the chunk, columns of the chunk], and its sums
    column_sum,
    row_count,
    column_count,
    width,
    guide_width,
    excluded,
    own_negative,
    chunk_row,
    chunk_column,
    row_tiles,
    column_tiles,
    all_column_tiles,
    GUIDE: tl.constexpr,
    HARD: tl.constexpr,
    BOOST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    GIVEN: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    TILE: tl.constexpr = tile.TILE
    WORDS: tl.constexpr = tile.ROW_WORDS
    tile_row, tile_column = tile.place(tl.program_id(0), row_tiles, column_tiles, GROUP)
    r = chunk_row + tile_row
    c = chunk_column + tile_column
    if SYMMETRIC and c < r:
        return
    lane = tl.arange(0, TILE)
    rows = r * TILE + lane
    columns = c * TILE + lane
    # Words are made or read between the products: the fewer registers one has to leave them, the better.
    if GUIDE == decide.OWN_GUIDE:
        guide = tile.scores(
            guide_x, guide_y, tile_row * TILE, tile_column * TILE,
            row_count - 1 - chunk_row * TILE, column_count - 1 - chunk_column * TILE, guide_width,
            TILE, TILE, BLOCK_K, GUIDE_PRECISION,
        )  # fmt: skip
    else:
        logits = tile.scores(
            x, y, r * TILE, c * TILE, row_count - 1, column_count - 1, width, TILE, TILE, BLOCK_K, PRECISION
        )
    if GIVEN:
        words, mirrored = tile.load_words(
            bits, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, SYMMETRIC, BITS
        )
    else:
        words = decide.never_counts(rows, c * TILE, row_count, column_count, excluded, WORDS)
        mirrored = words
    if GUIDE == decide.OWN_GUIDE:
        words, mirrored = decide.above(guide, limits, rows, columns, row_count, words, mirrored, SYMMETRIC, WORDS)
    elif GUIDE == decide.SELF_GUIDE:
        words, mirrored = decide.above(logits, limits, rows, columns, row_count, words, mirrored, SYMMETRIC, WORDS)
    if COUNTED:
        # On the diagonal both sides are the same pairs.
        tl.store(counts + tl.program_id(0), decide.count_hidden(words, mirrored, c > r, SYMMETRIC))
    if not HARD and (GUIDE != decide.NO_GUIDE or not GIVEN):
        tile.store_words(
            bits, words, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, False, BITS
        )
        if SYMMETRIC:
            tile.store_words(
                bits, mirrored, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, True, BITS
            )

    if GUIDE == decide.OWN_GUIDE:
        logits = tile.scores(
            x, y, r * TILE, c * TILE, row_count - 1, column_count - 1, width, TILE, TILE, BLOCK_K, PRECISION
        )
    if HARD:
        # One side after the other, as few words as can be at a time beside the scores.
        words = decide.below(logits, floors, rows, row_count, words, 1, WORDS)
        count = tl.sum(tile.count_bits(words))
        tile.store_words(
            bits, words, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, False, BITS
        )
    # Places in the tile: those in the matrix take as many registers again.
    logits = tile.boost(logits, boosts, own_negative + (r - c) * TILE, lane, lane, BOOST)
    hidden = tile.unpack(words, TILE, WORDS)
    maximum, total = softmax_parts(tl.where(hidden, float("-inf"), logits), 1)
    at = tile_column * (row_tiles * TILE) + tile_row * TILE + lane
    tl.store(row_maximum + at, maximum)
    tl.store(row_sum + at, total)
    if HARD:
        if SYMMETRIC:
            mirrored = decide.below(logits, floors, columns, row_count, mirrored, 0, WORDS)
            count += tl.where(c > r, tl.sum(tile.count_bits(mirrored)), 0)
            tile.store_words(
                bits, mirrored, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, True, BITS
            )
        tl.store(all_counts + tl.program_id(0), count)
    if SYMMETRIC and c > r:
        hidden = tile.unpack(mirrored, TILE, WORDS)
        maximum, total = softmax_parts(tl.where(hidden, float("-inf"), logits), 0)
        at = tile_row * (column_tiles * TILE) + tile_column * TILE + lane
        tl.store(column_maximum + at, maximum)
        tl.store(column_sum + at, total)


@triton.jit
def softmax_parts(logits, AXIS: tl.constexpr):
    """Maximum and sum of ``exp2(logit - maximum)`` along an axis; -inf and 0 where all are -inf."""
    maximum = tl.max(logits, axis=AXIS)
    # -inf - -inf would be NaN.
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    return maximum, tl.sum(tl.exp2(logits - tl.expand_dims(base, AXIS)), axis=AXIS)


@triton.jit(do_not_specialize=PLACES, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def fold_kernel(
    maximum,  # [count]: running, of the whole part
    total,
    partial_maximum,  # [depth, stride]
    partial_sum,
    count,
    depth,
    stride,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Fold a launch's maxima and sums into the running ones."""
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = column < count
    running = tl.load(maximum + column, mask=inside, other=float("-inf"))
    running_sum = tl.load(total + column, mask=inside, other=0.0)
    for first in range(0, depth, DEPTH):
        level = first + tl.arange(0, DEPTH)
        at = level[:, None] * stride + column[None, :]
        there = (level < depth)[:, None] & inside[None, :]
        part = tl.load(partial_maximum + at, mask=there, other=float("-inf"))
        # Tiles that no program computed hold -inf, and whatever was in memory as their sum.
        part_sum = tl.load(partial_sum + at, mask=there & (part > float("-inf")), other=0.0)
        risen = tl.maximum(running, tl.max(part, axis=0))
        base = tl.where(risen == float("-inf"), 0.0, risen)
        running_sum = running_sum * tl.exp2(running - base) + tl.sum(part_sum * tl.exp2(part - base[None, :]), axis=0)
        running = risen
    tl.store(maximum + column, running, mask=inside)
    tl.store(total + column, running_sum, mask=inside)


def forward_part(part: Part, maximum: Tensor, total: Tensor, config: Config) -> Tensor:
    """Compute a part and fold it into the running softmax of its rows.

    Args:
        maximum: ``[L, R]``, fp32, the running maximum at each width; updated.
        total: ``[L, R]``, fp32, the running sum of ``exp2(logit - maximum)``; updated.

    Returns:
        ``[2]``, int64: how many pairs a guide or their group masked, excluded ones not counted; and how many of the
        others a floor did.
    """
    rows, columns = part.rows.shape[0], part.columns.shape[0]
    height, breadth = min(CHUNK_TILES, tiles(rows)), min(CHUNK_TILES, tiles(columns))
    scratch = total.new_empty((4 if part.symmetric else 2, height * breadth * TILE))
    counts = torch.zeros((2, height * breadth), dtype=torch.int32, device=total.device)
    found = torch.zeros(2, dtype=torch.int64, device=total.device)
    decision = part.decision
    begun = decision is not None and decision.begun
    hard = decision is not None and decision.floors is not None
    kept, where = part.bits, tile.PART_BITS
    if kept is None and decision is not None and (begun or len(part.ladder) > 1):
        # Between the kernels that decide, or from the widest to the others.
        where = tile.CHUNK_BITS
        kept = torch.empty(chunk_words(height, breadth, part.symmetric), dtype=torch.int32, device=total.device)
    where = where if kept is not None else tile.NO_BITS
    launch = _launch_of(part, config)
    for chunk in chunks(rows, columns, height, breadth, upper=part.symmetric):
        counts.zero_()
        if begun:
            assert kept is not None
            begin(part, chunk, kept, where, config)
        for level in range(len(part.ladder)):
            if part.symmetric:
                # Below the diagonal no program runs, and none mirrors a tile on it.
                scratch[0::2].fill_(float("-inf"))
            _launch(part, chunk, level, kept, where, scratch, counts, launch)
            _fold(maximum[level], total[level], scratch[:2], chunk.rows, chunk.column_tiles)
            if part.symmetric:
                _fold(maximum[level], total[level], scratch[2:], chunk.columns, chunk.row_tiles)
        if decision is not None:
            found += counts.sum(1, dtype=torch.int64)
    masked, hidden = found.unbind()
    if decision is None:
        return found
    easy = hidden - masked if hard else hidden
    # Every pair of every tile was counted once, those outside and the excluded ones as masked.
    return torch.stack([masked - (part.padded - part.compared), easy])


def _launch_of(part: Part, config: Config) -> Launch:
    if part.symmetric:
        return config.forward_symmetric
    return config.forward if part.own is None else config.forward_own_differs


def _launch(
    part: Part,
    chunk: Chunk,
    level: int,
    bits: Tensor | None,
    where: tl.constexpr,
    scratch: Tensor,
    counts: Tensor,
    launch: Launch,
) -> None:
    x, y = part.ladder[level]
    decision = part.decision.rest if level == 0 and part.decision is not None else None
    begun = part.decision is not None and part.decision.begun
    guide_rows, guide_columns, *compared = decision_arguments(decision, part, chunk, counts)
    forward_kernel[(chunk.row_tiles * chunk.column_tiles,)](
        x,
        y,
        guide_rows,
        guide_columns,
        *compared,
        counts if part.boosts is None else part.boosts,
        counts if bits is None else bits,
        *counts,
        *(scratch if part.symmetric else (*scratch, *scratch)),
        x.shape[0],
        y.shape[0],
        x.shape[1],
        guide_rows.shape[1],
        part.excluded,
        part.own or 0,
        chunk.row,
        chunk.column,
        chunk.row_tiles,
        chunk.column_tiles,
        tiles(y.shape[0]),
        **decision_constants(decision),
        BOOST=boost(part),
        SYMMETRIC=part.symmetric,
        BITS=where.value,
        GIVEN=bits is not None and (level > 0 or begun),
        COUNTED=decision is not None,
        PRECISION=precision(x),
        GUIDE_PRECISION=precision(guide_rows),
        GROUP=launch.group,
        **options(launch),
    )


def _fold(maximum: Tensor, total: Tensor, partial: Tensor, own: slice, depth: int) -> None:
    maximum, total = maximum[own], total[own]
    count = len(maximum)
    stride = tiles(own.stop - own.start) * TILE
    fold_kernel[(triton.cdiv(count, FOLD_ROWS),)](
        maximum, total, partial[0], partial[1], count, depth, stride, ROWS=FOLD_ROWS, DEPTH=FOLD_DEPTH,
        num_warps=FOLD_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
