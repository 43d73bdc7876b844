"""Gradients by operands to gradients by embeddings: the last kernel of a backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from gist_fast.kernels.numbers import inverse, operand_norm
from gist_fast.kernels.operand_rows import find_rows, operand_rows, pick, row_grid
from gist_fast.kernels.rows import ROWS, WARPS, WIDTH, upstream_scale
from torch import Tensor


@triton.jit
def gradient_and_direction(gradient, x, stride, dlogits, others, reciprocal, column, inside, paired):
    """``[ROWS, WIDTH]`` each, fp32: by some columns of the operands, the positives' part included, and those columns of
    the unit vectors."""
    du = tl.load(gradient + column, mask=inside, other=0.0)
    du += dlogits[:, None] * tl.load(others + column, mask=inside & paired[:, None], other=0.0).to(tl.float32)
    value = tl.load(x + column.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
    return du, value * reciprocal[:, None]


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def gradients_kernel(
    gradients,  # a tuple, [N_k, dim]: by the operands, fp32
    embeddings,  # tuples, see `gist_fast.kernels.operand_rows.operand_rows`
    sizes,
    row_strides,
    column_strides,
    outs,  # a tuple, [N_k, ..]: written; or added to where ADDS
    norms,  # [S]: read; then, in their place, what each row gives to the gradient by the temperature
    stack,  # the student's, [S, dim]
    positive_dlogits,  # [B]
    temperature,  # [1]
    least,  # see `gist_fast.kernels.rows.weights_kernel`
    largest,
    partner,  # rows of the stack from an anchor to its positive
    pairs,  # B
    out_width,  # columns from one row of `outs` to the next
    embedding_dim,
    dim,
    ONE_SIGN: tl.constexpr, ADDS: tl.constexpr, LARGEST_WEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    operand, first_row, rows, count = find_rows(sizes, ROWS)
    inside = rows < count
    lane = tl.arange(0, WIDTH)
    far = rows.to(tl.int64)[:, None]
    gradient = pick(gradients, operand) + far * dim
    x = pick(embeddings, operand) + far * pick(row_strides, operand)
    stride = pick(column_strides, operand)
    out = pick(outs, operand) + far * out_width
    place = first_row + rows
    # Anchors are the first rows of the stack; positives, from the first pair's on, follow in the same order.
    pair = tl.where(place < pairs, place, place - partner)
    paired = inside & (pair >= 0) & (pair < pairs)
    dlogits = tl.load(positive_dlogits + pair, mask=paired, other=0.0)
    others = stack + tl.where(place < pairs, place + partner, pair).to(tl.int64)[:, None] * dim
    reciprocal = inverse(tl.load(norms + place, mask=inside, other=0.0))
    norm = operand_norm(temperature)
    factor = upstream_scale(least, largest, LARGEST_WEIGHT)
    if ONE_SIGN:
        factor = tl.where(tl.load(least) < 0, -factor, factor)
    radial = tl.zeros((ROWS,), dtype=tl.float32)
    for begin in range(0, embedding_dim, WIDTH):
        column = begin + lane[None, :]
        there = inside[:, None] & (column < embedding_dim)
        du, direction = gradient_and_direction(gradient, x, stride, dlogits, others, reciprocal, column, there, paired)
        radial += tl.sum(du * direction, axis=1)
    # The operand's norm goes as temperature ** -0.5.
    tl.store(norms + place, -factor * norm * radial / (2.0 * tl.load(temperature)), mask=inside)
    for begin in range(0, embedding_dim, WIDTH):
        column = begin + lane[None, :]
        there = inside[:, None] & (column < embedding_dim)
        du, direction = gradient_and_direction(gradient, x, stride, dlogits, others, reciprocal, column, there, paired)
        found = (du - direction * radial[:, None]) * (factor * norm * reciprocal)[:, None]
        if ADDS:
            found += tl.load(out + column, mask=there, other=0.0)
        tl.store(out + column, found.to(out.dtype.element_ty), mask=there)


def carry_back(
    gradients: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    outs: Sequence[Tensor],
    norms: Tensor,
    stack: Tensor,
    partner: int,
    positive_dlogits: Tensor,
    temperature: Tensor,
    extremes: tuple[Tensor, Tensor],
    embedding_dim: int,
    largest_weight: float,
    *,
    one_sign: bool,
    adds: bool,
) -> None:
    """Carry the gradients by the operands back to their embeddings and the temperature.

    With ``v = x / |x|`` and ``u = scale * v``: ``dx = scale / |x| * (du - v (v . du))``, and since ``scale`` goes as
    ``temperature ** -0.5``, ``d temperature = -1 / (2 temperature) * sum(u . du)``. The rounding of ``u`` to the
    embeddings' type is passed straight through.

    Args:
        gradients: ``[N_k, D]``, fp32, by way of the negatives.
        embeddings: ``[N_k, >= embedding_dim]``, S rows in all.
        outs: ``[N_k, >= embedding_dim]``, contiguous and of one width; their first columns are written, or with `adds`
            (fp32) added to. May be `gradients` where the width is the same.
        norms: ``[S]``, fp32. In their place is written what each row adds to the gradient by the temperature.
        stack: the student's.
        partner: rows of the stack from an anchor to its positive, whose logit has the derivative
            ``positive_dlogits[i]``, ``[B]``.
        extremes: of the upstream gradients, see `gist_fast.kernels.rows.weigh`.
    """
    start(
        gradients_kernel,
        row_grid(embeddings, ROWS),
        gradients=tuple(gradients),
        **operand_rows(embeddings),
        outs=tuple(outs),
        norms=norms,
        stack=stack,
        positive_dlogits=positive_dlogits,
        temperature=temperature,
        least=extremes[0],
        largest=extremes[1],
        partner=partner,
        pairs=positive_dlogits.numel(),
        out_width=outs[0].shape[1],
        embedding_dim=embedding_dim,
        dim=stack.shape[1],
        ONE_SIGN=one_sign,
        ADDS=adds,
        LARGEST_WEIGHT=largest_weight,
        ROWS=ROWS,
        WIDTH=WIDTH,
        **options_of(WARPS),
    )
