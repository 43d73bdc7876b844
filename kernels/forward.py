"""The forward pass: scores, masks and logsumexp of a part, without a matrix of scores in memory.

A program computes one tile. The guide's scores come first and are reduced to mask bits, a 32nd of their size, before
the student's are computed in the same registers: two programs fit on a multiprocessor, so that one's matrix products
run under the other's exponentials. Each tile leaves a maximum and a sum of exp2 a row; a second small kernel folds
those of a launch into the running ones, always in the same order, so that results are the same from run to run.

**Symmetry.** In a symmetric part, tile (r, c) above the diagonal holds the scores of tile (c, r) too. It is compared
along both sides, with the limits of its rows and with those of its columns, and leaves a maximum and a sum along both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gist_fast.kernels import tile
from gist_fast.kernels.config import Config, Launch
from gist_fast.kernels.launch import options, precision
from gist_fast.kernels.layout import TILE, tiles
from gist_fast.kernels.parts import Chunk, Part, chunks
from torch import Tensor

CHUNK_TILES = 128
"""Rows and columns of one launch, in tiles: 2^28 pairs at most, 32 MiB of maxima and sums between it and the fold, and
a guide's operands of 2^15 rows."""
FOLD_ROWS, FOLD_DEPTH = 64, 16


@triton.jit(
    do_not_specialize=[
        "row_count",
        "column_count",
        "excluded",
        "chunk_row",
        "chunk_column",
        "row_tiles",
        "column_tiles",
        "all_column_tiles",
    ]
)
def forward_kernel(
    x,  # [R, D]
    y,  # [C, D]
    guide_x,  # [rows of the chunk, G]
    guide_y,  # [columns of the chunk, G]
    limits,  # [R]
    bits,  # words of the whole part
    counts,  # [tiles of the chunk]
    row_maximum,  # [column tiles of the chunk, rows of the chunk], and its sums
    row_sum,
    column_maximum,  # [row tiles of the chunk, columns of the chunk], and its sums
    column_sum,
    row_count,
    column_count,
    width,
    guide_width,
    excluded,
    chunk_row,
    chunk_column,
    row_tiles,
    column_tiles,
    all_column_tiles,
    GUIDE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    KEEP_BITS: tl.constexpr,
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
    words = tile.never_counts(rows, c * TILE, row_count, column_count, excluded, WORDS)
    mirrored = words

    if GUIDE == tile.OWN_GUIDE:
        guide = tile.scores(
            guide_x, guide_y, tile_row * TILE, tile_column * TILE,
            row_count - 1 - chunk_row * TILE, column_count - 1 - chunk_column * TILE, guide_width,
            TILE, TILE, BLOCK_K, GUIDE_PRECISION,
        )  # fmt: skip
    if GUIDE == tile.SELF_GUIDE:
        guide = tile.scores(
            x, y, r * TILE, c * TILE, row_count - 1, column_count - 1, width, TILE, TILE, BLOCK_K, PRECISION
        )
    if GUIDE != tile.NO_GUIDE:
        words, mirrored = tile.decide(guide, limits, rows, columns, row_count, words, SYMMETRIC, WORDS)
        count = tl.sum(tile.count_bits(words))
        if SYMMETRIC:
            # On the diagonal both sides are the same pairs.
            count += tl.where(c > r, tl.sum(tile.count_bits(mirrored)), 0)
        if KEEP_BITS:
            tl.store(tile.words_of_tile(bits, r, c, all_column_tiles) + tile.words_grid(), words)
            if SYMMETRIC:
                tl.store(tile.mirrored_words(bits, r, c, all_column_tiles) + tile.words_grid(), mirrored)
        tl.store(counts + tl.program_id(0), count)

    if GUIDE == tile.SELF_GUIDE:
        logits = guide
    else:
        logits = tile.scores(
            x, y, r * TILE, c * TILE, row_count - 1, column_count - 1, width, TILE, TILE, BLOCK_K, PRECISION
        )
    hidden = tile.unpack(words, TILE, WORDS)
    maximum, total = softmax_parts(tl.where(hidden, float("-inf"), logits), 1)
    at = tile_column * (row_tiles * TILE) + tile_row * TILE + lane
    tl.store(row_maximum + at, maximum)
    tl.store(row_sum + at, total)
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


@triton.jit(do_not_specialize=["count", "depth", "stride"])
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


def forward_part(
    part: Part, limits: Tensor | None, self_guided: bool, maximum: Tensor, total: Tensor, config: Config
) -> Tensor:
    """Compute a part and fold it into the running softmax of its rows.

    Args:
        limits: ``[R]``, None without a guide.
        maximum: ``[R]``, fp32, the running maximum; updated.
        total: ``[R]``, fp32, the running sum of ``exp2(logit - maximum)``; updated.

    Returns:
        0-d int64: how many pairs were masked, excluded ones not counted.
    """
    down, across = tiles(part.rows.shape[0]), tiles(part.columns.shape[0])
    height, breadth = min(CHUNK_TILES, down), min(CHUNK_TILES, across)
    scratch = total.new_empty((4 if part.symmetric else 2, height * breadth * TILE))
    counts = torch.zeros(height * breadth, dtype=torch.int32, device=total.device)
    masked = torch.zeros((), dtype=torch.int64, device=total.device)
    launch = config.forward_symmetric if part.symmetric else config.forward
    for chunk in chunks(part, height, breadth):
        if part.symmetric:
            # Below the diagonal no program runs, and none mirrors a tile on it.
            scratch[0::2].fill_(float("-inf"))
            counts.zero_()
        _launch(part, chunk, limits, self_guided, scratch, counts, launch)
        _fold(maximum, total, scratch[:2], chunk.rows, chunk.column_tiles)
        if part.symmetric:
            _fold(maximum, total, scratch[2:], chunk.columns, chunk.row_tiles)
        masked += counts[: chunk.row_tiles * chunk.column_tiles].sum(dtype=torch.int64)
    # Every pair of every tile was counted once, those outside and the excluded ones as hidden.
    return masked - (part.padded - part.compared) if limits is not None else masked


def _launch(
    part: Part, chunk: Chunk, limits: Tensor | None, self_guided: bool, scratch: Tensor, counts: Tensor, launch: Launch
) -> None:
    guide_rows, guide_columns = part.rows, part.columns
    kind = tile.SELF_GUIDE if self_guided else tile.NO_GUIDE
    if part.guide_rows is not None:
        kind = tile.OWN_GUIDE
        guide_rows, guide_columns = part.guide_rows(chunk.rows), part.guide_columns(chunk.columns)
    forward_kernel[(chunk.row_tiles * chunk.column_tiles,)](
        part.rows,
        part.columns,
        guide_rows,
        guide_columns,
        counts if limits is None else limits,
        counts if part.bits is None else part.bits,
        counts,
        *(scratch if part.symmetric else (*scratch, *scratch)),
        part.rows.shape[0],
        part.columns.shape[0],
        part.rows.shape[1],
        guide_rows.shape[1],
        part.excluded,
        chunk.row,
        chunk.column,
        chunk.row_tiles,
        chunk.column_tiles,
        tiles(part.columns.shape[0]),
        GUIDE=kind.value,
        SYMMETRIC=part.symmetric,
        KEEP_BITS=part.bits is not None,
        PRECISION=precision(part.rows),
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
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
