"""Gradients by operands to gradients by embeddings: the last kernel of a backward pass."""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from gist_fast.kernels.numbers import inverse, operand_norm
from gist_fast.kernels.rows import ROWS, WARPS, WIDTH, upstream_scale
from torch import Tensor


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def gradients_kernel(
    gradient,  # [N, dim]: by the operands of some embeddings, fp32
    x,  # [N, ..]: the embeddings
    norms,  # [S]: read; then, of these rows, what each gives to the gradient by the temperature
    partners,  # the student's stack, [S, dim]; None where no row is of a pair
    positive_dlogits,  # [B]
    temperature,  # [1]
    least,  # see `gist_fast.kernels.rows.weights_kernel`
    largest,
    out,  # [N, ..]: written; or added to where ADDS
    count,  # N
    start_row,  # the first of their rows in the stack
    first,  # row `first + i` of these is a pair with row `partner + i` of the stack
    partner,
    pairs,  # B
    row_stride,  # of x, in elements
    column_stride,
    out_width,  # columns from one row of `out` to the next
    embedding_dim,
    dim,
    ONE_SIGN: tl.constexpr, ADDS: tl.constexpr, LARGEST_WEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < count)[:, None]
    lane = tl.arange(0, WIDTH)
    far = rows.to(tl.int64)[:, None]
    norms += start_row
    reciprocal = inverse(tl.load(norms + rows, mask=rows < count, other=0.0))
    norm = operand_norm(temperature)
    factor = upstream_scale(least, largest, LARGEST_WEIGHT)
    if ONE_SIGN:
        factor = tl.where(tl.load(least) < 0, -factor, factor)
    if partners is not None:
        pair = rows - first
        paired = (pair >= 0) & (pair < pairs)
        dlogit = tl.load(positive_dlogits + pair, mask=paired, other=0.0)
        partners += (partner + pair).to(tl.int64)[:, None] * dim
    radial = tl.zeros((ROWS,), dtype=tl.float32)
    for begin in range(0, embedding_dim, WIDTH):
        column = begin + lane[None, :]
        there = inside & (column < embedding_dim)
        du = tl.load(gradient + far * dim + column, mask=there, other=0.0)
        if partners is not None:
            other = tl.load(partners + column, mask=paired[:, None] & (column < embedding_dim), other=0.0)
            du += dlogit[:, None] * other.to(tl.float32)
        value = tl.load(x + far * row_stride + column.to(tl.int64) * column_stride, mask=there, other=0.0).to(
            tl.float32
        )
        radial += tl.sum(du * (value * reciprocal[:, None]), axis=1)
    # The operand's norm goes as temperature ** -0.5.
    tl.store(norms + rows, -factor * norm * radial / (2.0 * tl.load(temperature)), mask=rows < count)
    for begin in range(0, embedding_dim, WIDTH):
        column = begin + lane[None, :]
        there = inside & (column < embedding_dim)
        du = tl.load(gradient + far * dim + column, mask=there, other=0.0)
        if partners is not None:
            other = tl.load(partners + column, mask=paired[:, None] & (column < embedding_dim), other=0.0)
            du += dlogit[:, None] * other.to(tl.float32)
        value = tl.load(x + far * row_stride + column.to(tl.int64) * column_stride, mask=there, other=0.0).to(
            tl.float32
        )
        direction = value * reciprocal[:, None]
        found = (du - direction * radial[:, None]) * (factor * norm * reciprocal)[:, None]
        place = out + far * out_width + column
        if ADDS:
            found += tl.load(place, mask=there, other=0.0)
        tl.store(place, found.to(out.dtype.element_ty), mask=there)


def carry_back(
    gradient: Tensor,
    embeddings: Tensor,
    norms: Tensor,
    start_row: int,
    stack: Tensor,
    pair: tuple[int, int] | None,
    positive_dlogits: Tensor,
    temperature: Tensor,
    extremes: tuple[Tensor, Tensor],
    out: Tensor,
    embedding_dim: int,
    largest_weight: float,
    *,
    one_sign: bool,
    adds: bool,
) -> None:
    """Carry the gradients by some operands back to their embeddings and the temperature.

    With ``v = x / |x|`` and ``u = scale * v``: ``dx = scale / |x| * (du - v (v . du))``, and since ``scale`` goes as
    ``temperature ** -0.5``, ``d temperature = -1 / (2 temperature) * sum(u . du)``. The rounding of ``u`` to the
    embeddings' type is passed straight through.

    Args:
        gradient: ``[N, D]``, fp32, by way of the negatives.
        embeddings: ``[N, >= embedding_dim]``.
        norms: ``[S]``, fp32, of all rows of the stack. In their place of these rows is written what each adds to the
            gradient by the temperature.
        start_row: the first of these rows in the stack.
        stack: the student's.
        pair: a first row of these and one of the stack, from which on they are pairs; pair i's logit has the derivative
            ``positive_dlogits[i]``. None where no row is of a pair.
        extremes: of the upstream gradients, see `gist_fast.kernels.rows.weigh`.
        out: ``[N, >= embedding_dim]``, contiguous; its first columns are written, or with `adds` (fp32) added to.
    """
    start(
        gradients_kernel,
        (triton.cdiv(len(embeddings), ROWS),),
        gradient=gradient,
        x=embeddings,
        norms=norms,
        partners=None if pair is None else stack,
        positive_dlogits=positive_dlogits,
        temperature=temperature,
        least=extremes[0],
        largest=extremes[1],
        out=out,
        count=len(embeddings),
        start_row=start_row,
        first=0 if pair is None else pair[0],
        partner=0 if pair is None else pair[1],
        pairs=positive_dlogits.numel(),
        row_stride=embeddings.stride(0),
        column_stride=embeddings.stride(1),
        out_width=out.shape[1],
        embedding_dim=embedding_dim,
        dim=gradient.shape[1],
        ONE_SIGN=one_sign,
        ADDS=adds,
        LARGEST_WEIGHT=largest_weight,
        ROWS=ROWS,
        WIDTH=WIDTH,
        **options_of(WARPS),
    )
