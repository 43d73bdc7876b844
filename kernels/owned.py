"""Accumulate in registers (*owned* for short): a program owns a block of gradient rows and streams the other operand.

Nothing but the gradient reaches memory, it is written once a launch, by one program, and no atomics are needed. A
program holds ``[ROWS, SLICE]`` of it in fp32 registers; where the dim is more than a slice, several programs share the
rows, and each computes the scores again. So this is for narrow embeddings, or for memory that has no room for the
chunks of dlogits.

The owner may be the rectangle's row (`DIRECT`: mask bits as they stand), its column (`MIRRORED`: those of the
transposed tile), or, in a symmetric rectangle, both at once, by one product of scores and one of ``W + W^T``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.config import Owned
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options, precision, start
from gist_fast.kernels.layout import TILE
from gist_fast.kernels.rectangle import Rectangle
from gist_fast.kernels.staged import dlogit
from torch import Tensor


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def owned_kernel(
    own,  # [N, D]: whose gradient it is
    other,  # [K, D]: streamed
    lse2,  # [R], and R is N or K or both
    weights,  # [R]
    logit_scales,  # [2] or None
    mask_bits,  # of the whole rectangle, or None
    gradient,  # [N, D], fp32; added to
    dim,
    own_count,
    other_count,
    excluded,  # row excluded + i of `other` never counts for row i of `own`
    own_negative,  # row own_negative + i of `other` and row i of `own` came together; or None
    DIRECT: tl.constexpr, MIRRORED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    own_rows = tl.minimum(rows, own_count - 1)
    depth = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    across = tl.cdiv(other_count if DIRECT else own_count, TILE)
    if DIRECT:
        row_lse2 = tl.load(lse2 + own_rows)
        row_weight = tl.load(weights + own_rows)
    total = tl.zeros((ROWS, SLICE), dtype=tl.float32)
    for begin in range(0, other_count, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        other_rows = tl.minimum(columns, other_count - 1)
        logits = tile.scores(
            own, other, first, begin, own_count - 1, other_count - 1, dim, ROWS, COLUMNS, BLOCK_K, PRECISION
        )
        logits = tile.scale(logits, logit_scales, own_negative, 0, rows, columns)
        if mask_bits is None:
            masked = tile.unpack(decide.never_counts(rows, begin, own_count, other_count, excluded, COLUMNS // 32))
        value = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if DIRECT:
            if mask_bits is not None:
                packed = tile.mask_of_rows(mask_bits, first // TILE, begin // TILE, across)
                if MIRRORED and first // TILE > begin // TILE:
                    masked = load_transposed(packed, first, begin, TILE, ROWS, COLUMNS)
                else:
                    masked = load_upright(packed, first, begin, TILE, ROWS, COLUMNS)
            value += dlogit(logits, masked, row_lse2[:, None], row_weight[:, None])
        if MIRRORED:
            if mask_bits is not None:
                if DIRECT and first // TILE <= begin // TILE:
                    packed = tile.mask_of_columns(mask_bits, first // TILE, begin // TILE, across)
                    masked = load_upright(packed, first, begin, TILE, ROWS, COLUMNS)
                else:
                    packed = tile.mask_of_rows(mask_bits, begin // TILE, first // TILE, across)
                    masked = load_transposed(packed, first, begin, TILE, ROWS, COLUMNS)
            other_lse2 = tl.load(lse2 + other_rows)
            other_weight = tl.load(weights + other_rows)
            value += dlogit(logits, masked, other_lse2[None, :], other_weight[None, :])
        at = other + other_rows.to(tl.int64)[:, None] * dim + depth[None, :]
        values = tl.load(at, mask=(depth < dim)[None, :], other=0.0)
        total = tl.dot(value.to(values.dtype), values, total, input_precision=PRECISION)
    at = gradient + rows.to(tl.int64)[:, None] * dim + depth[None, :]
    inside = (rows < own_count)[:, None] & (depth < dim)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def load_upright(packed, first, begin, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What is masked, ``[ROWS, COLUMNS]``, of owners `first` on and streamed rows `begin` on, where the rows of the
    tile's mask are the owners.

    Args:
        packed: where the tile's mask begins.
    """
    word_row = first % TILE + tl.arange(0, ROWS)
    word = begin % TILE // 32 + tl.arange(0, COLUMNS // 32)
    return tile.unpack(tl.load(packed + word_row[:, None] * tile.ROW_WORDS + word[None, :]))


@triton.jit
def load_transposed(packed, first, begin, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same where the rows of the tile's mask are the streamed rows."""
    word_row = begin % TILE + tl.arange(0, COLUMNS)
    word = first % TILE // 32 + tl.arange(0, ROWS // 32)
    return tile.unpack_transposed(tl.load(packed + word_row[None, :] * tile.ROW_WORDS + word[:, None]))


def backward_owned(
    rectangle: Rectangle,
    index: int,
    lse2: Tensor,
    weights: Tensor,
    row_gradient: Tensor,
    column_gradient: Tensor,
    launch: Owned,
) -> None:
    """Add a rectangle's gradients by its rows and columns, at one of its Matryoshka dims.

    Args:
        index: which.
        lse2: ``[R]``, positive included.
        weights: ``[R]``
        row_gradient: ``[R, D]``, fp32; updated.
        column_gradient: ``[C, D]``, fp32; updated. Not looked at for a symmetric rectangle.

    The rectangle's mask bits must be there, or nothing be masked: masks decided again in tiles of another shape could
    differ from the forward pass's.
    """
    rows, columns = rectangle.matryoshka[index]
    if rectangle.symmetric:
        _start(rectangle, rows, rows, lse2, weights, row_gradient, launch, direct=True, mirrored=True)
        return
    _start(rectangle, rows, columns, lse2, weights, row_gradient, launch, direct=True, mirrored=False)
    _start(rectangle, columns, rows, lse2, weights, column_gradient, launch, direct=False, mirrored=True)


def _start(
    rectangle: Rectangle,
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
    dim = own.shape[1]
    slice_width = min(launch.slice_width, max(16, triton.next_power_of_2(dim)))
    sign = 1 if direct else -1
    start(
        owned_kernel,
        (triton.cdiv(own.shape[0], launch.rows), triton.cdiv(dim, slice_width)),
        own=own,
        other=other,
        lse2=lse2,
        weights=weights,
        logit_scales=rectangle.logit_scales,
        mask_bits=rectangle.mask_bits,
        gradient=gradient,
        dim=dim,
        own_count=own.shape[0],
        other_count=other.shape[0],
        excluded=sign * rectangle.excluded,
        own_negative=None if rectangle.own_negative is None else sign * rectangle.own_negative,
        DIRECT=direct,
        MIRRORED=mirrored,
        PRECISION=precision(own),
        TILE=TILE,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        SLICE=slice_width,
        **options(launch),
    )
