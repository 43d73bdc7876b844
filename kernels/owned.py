"""The owning plan of the backward pass: a program owns a block of gradient rows and streams the other operand.

Nothing but the gradient reaches memory, it is written once a launch, by one program, and no atomics are needed. A
program holds ``[ROWS, SLICE]`` of it in fp32 registers; where the width is more than a slice, several programs share
the rows, and each computes the scores again. So this plan is for narrow embeddings, or for memory that has no room
for the chunks of the staged one.

The owner may be the part's row (`DIRECT`: bits as they stand), its column (`MIRRORED`: bits of the transposed tile),
or, in a symmetric part, both at once, by one product of scores and one of ``W + W^T``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.config import Owned
from gist_fast.kernels.launch import ALIGNED_OR_NOT, PLACES, boost, options, precision
from gist_fast.kernels.layout import TILE, tiles
from gist_fast.kernels.parts import Part
from gist_fast.kernels.staged import coefficient
from torch import Tensor


@triton.jit(do_not_specialize=PLACES, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def owned_kernel(
    own,  # [N, D]: whose gradient it is
    other,  # [K, D]: streamed
    lse2,  # [R], and R is N or K or both
    weights,  # [R]
    boosts,  # [2]
    bits,  # words of the whole part
    gradient,  # [N, D], fp32; added to
    own_count,
    other_count,
    width,
    excluded,  # in the part: column excluded + i never counts in row i
    own_negative,  # in the part: column own_negative + i is the negative that came with row i
    all_column_tiles,
    DIRECT: tl.constexpr,
    MIRRORED: tl.constexpr,
    HAVE_BITS: tl.constexpr,
    BOOST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    own_rows = tl.minimum(rows, own_count - 1)
    depth = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    if DIRECT:
        row_lse2 = tl.load(lse2 + own_rows)
        row_weight = tl.load(weights + own_rows)
    total = tl.zeros((ROWS, SLICE), dtype=tl.float32)
    for start in range(0, other_count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        other_rows = tl.minimum(columns, other_count - 1)
        logits = tile.scores(
            own, other, first, start, own_count - 1, other_count - 1, width, ROWS, COLUMNS, BLOCK_K, PRECISION
        )
        logits = tile.boost(logits, boosts, own_negative if DIRECT else -own_negative, rows, columns, BOOST)
        if not HAVE_BITS:
            side = excluded if DIRECT else -excluded
            hidden = tile.unpack(
                decide.never_counts(rows, start, own_count, other_count, side, COLUMNS // 32), ROWS, COLUMNS // 32
            )
        value = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if DIRECT:
            if HAVE_BITS:
                words = tile.words_of_tile(bits, first // TILE, start // TILE, all_column_tiles)
                if MIRRORED and first // TILE > start // TILE:
                    hidden = under(words, first, start, TILE, ROWS, COLUMNS)
                else:
                    hidden = upright(words, first, start, TILE, ROWS, COLUMNS)
            value += coefficient(logits, hidden, row_lse2[:, None], row_weight[:, None])
        if MIRRORED:
            if HAVE_BITS:
                if DIRECT and first // TILE <= start // TILE:
                    words = tile.mirrored_words(bits, first // TILE, start // TILE, all_column_tiles)
                    hidden = upright(words, first, start, TILE, ROWS, COLUMNS)
                else:
                    words = tile.words_of_tile(bits, start // TILE, first // TILE, all_column_tiles)
                    hidden = under(words, first, start, TILE, ROWS, COLUMNS)
            other_lse2 = tl.load(lse2 + other_rows)
            other_weight = tl.load(weights + other_rows)
            value += coefficient(logits, hidden, other_lse2[None, :], other_weight[None, :])
        at = other + other_rows.to(tl.int64)[:, None] * width + depth[None, :]
        values = tl.load(at, mask=(depth < width)[None, :], other=0.0)
        total = tl.dot(value.to(values.dtype), values, total, input_precision=PRECISION)
    at = gradient + rows.to(tl.int64)[:, None] * width + depth[None, :]
    inside = (rows < own_count)[:, None] & (depth < width)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def upright(words, first, start, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits ``[ROWS, COLUMNS]`` of owners `first` on and streamed rows `start` on: the tile's word rows are the owners.

    Args:
        words: where the tile's words begin.
    """
    word_row = first % TILE + tl.arange(0, ROWS)
    word = start % TILE // 32 + tl.arange(0, COLUMNS // 32)
    return tile.unpack(tl.load(words + word_row[:, None] * tile.ROW_WORDS + word[None, :]), ROWS, COLUMNS // 32)


@triton.jit
def under(words, first, start, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same where the tile's word rows are the streamed rows."""
    word_row = start % TILE + tl.arange(0, COLUMNS)
    word = first % TILE // 32 + tl.arange(0, ROWS // 32)
    return tile.unpack_transposed(
        tl.load(words + word_row[None, :] * tile.ROW_WORDS + word[:, None]), ROWS // 32, COLUMNS
    )


def backward_part_owned(
    part: Part, level: int, lse2: Tensor, weights: Tensor, row_gradient: Tensor, column_gradient: Tensor, launch: Owned
) -> None:
    """Add a part's gradients by its rows and columns, at one width of its ladder.

    Args:
        level: which.
        lse2: ``[R]``, positive included.
        weights: ``[R]``
        row_gradient: ``[R, D]``, fp32; updated.
        column_gradient: ``[C, D]``, fp32; updated. Not looked at for a symmetric part.

    The part's bits must be there, or nothing be masked: masks decided again in tiles of another shape could differ
    from the forward pass's.
    """
    rows, columns = part.ladder[level]
    if part.symmetric:
        _launch(part, rows, rows, lse2, weights, row_gradient, launch, direct=True, mirrored=True)
        return
    _launch(part, rows, columns, lse2, weights, row_gradient, launch, direct=True, mirrored=False)
    _launch(part, columns, rows, lse2, weights, column_gradient, launch, direct=False, mirrored=True)


def _launch(
    part: Part,
    own: Tensor,
    other: Tensor,
    lse2: Tensor,
    weights: Tensor,
    gradient: Tensor,
    launch: Owned,
    *,
    direct: bool,
    mirrored: bool,
) -> None:
    width = own.shape[1]
    slice_width = min(launch.slice_width, max(16, triton.next_power_of_2(width)))
    owned_kernel[(triton.cdiv(own.shape[0], launch.rows), triton.cdiv(width, slice_width))](
        own,
        other,
        lse2,
        weights,
        gradient if part.boosts is None else part.boosts,
        gradient if part.bits is None else part.bits,
        gradient,
        own.shape[0],
        other.shape[0],
        width,
        part.excluded,
        part.own or 0,
        tiles(part.columns.shape[0]),
        DIRECT=direct,
        MIRRORED=mirrored,
        HAVE_BITS=part.bits is not None,
        BOOST=boost(part),
        PRECISION=precision(own),
        TILE=TILE,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        SLICE=slice_width,
        **options(launch),
    )
