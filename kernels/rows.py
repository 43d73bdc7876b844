"""Embeddings to operands, and what a pass needs to know of each row: a kernel for each, over all rows of a model.

See `gist_fast.functional.operands` for the same in plain torch, which the other backends compute with.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from gist_fast.kernels.numbers import LN2, inverse, operand_norm, sigmoid2, softplus2
from gist_fast.kernels.operand_rows import find_rows, operand_rows, pick, row_grid
from torch import Tensor

ROWS, WIDTH, WARPS = 8, 512, 4
"""Rows and columns that a program looks at at a time."""
PAIR_WIDTH = 256
"""Columns where it looks at two rows at a time, which else spills 8 bytes in float32 here and there."""


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def units_kernel(
    embeddings,  # tuples, see `gist_fast.kernels.operand_rows.operand_rows`
    sizes,
    row_strides,
    column_strides,
    units,  # [S, dim]: written
    norms,  # [S]: written; or None
    temperature,  # [1]: rows get the norm of student operands; None for unit vectors
    is_bad,  # [1], int64: set to 1 where a row is not finite; or None
    embedding_dim,  # columns that are the embedding's; of the others, up to dim, zeros are made
    dim,
    TF32: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    operand, first_row, rows, count = find_rows(sizes, ROWS)
    inside = rows < count
    lane = tl.arange(0, WIDTH)
    x = pick(embeddings, operand) + rows.to(tl.int64)[:, None] * pick(row_strides, operand)
    stride = pick(column_strides, operand)
    squared = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, embedding_dim, WIDTH):
        column = first + lane[None, :]
        there = inside[:, None] & (column < embedding_dim)
        value = tl.load(x + column.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)
        squared += tl.sum(value * value, axis=1)
    norm = tl.sqrt(squared)
    factor = inverse(norm)
    if norms is not None:
        tl.store(norms + first_row + rows, norm, mask=inside)
    if is_bad is not None:
        bad = tl.max(tl.where(inside & (factor != factor), 1, 0))
        tl.atomic_max(is_bad, bad.to(tl.int64), mask=bad > 0, sem="relaxed")
    if temperature is not None:
        factor = operand_norm(temperature) * factor
    out = units + (first_row + rows).to(tl.int64)[:, None] * dim
    for first in range(0, dim, WIDTH):
        column = first + lane[None, :]
        there = inside[:, None] & (column < embedding_dim)
        value = tl.load(x + column.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)
        unit = value * factor[:, None]
        if TF32:
            # As the matrix units will round, so that thresholds (summed in float32) and scores see equal factors: TF32
            # keeps 10 of the 23 mantissa bits, so add half of the last kept one, and cut.
            cut = ((unit.to(tl.int32, bitcast=True) + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
            # A card's own NaN has all bits set, and would become a zero.
            unit = tl.where(unit == unit, cut, unit)
        tl.store(out + column, unit.to(units.dtype.element_ty), mask=inside[:, None] & (column < dim))


def make_units(
    embeddings: Sequence[Tensor],
    units: Tensor,
    norms: Tensor | None,
    temperature: Tensor | None,
    is_bad: Tensor | None,
    embedding_dim: int,
    *,
    tf32: bool,
) -> None:
    """Normalise the rows of several operands into one stack.

    Args:
        embeddings: ``[N_k, >= embedding_dim]``, S rows in all.
        units: ``[>= S, D]``; the first S rows are written, zeros behind the embedding's columns among them.
        norms: ``[S]``, fp32; written; or None.
        temperature: ``[1]``, fp32, for student operands, whose norm is ``sqrt(log2(e) / temperature)``; else None.
        is_bad: ``[1]``, int64; becomes 1 where a row is not finite.
        tf32: float32 will be multiplied in TF32.
    """
    start(
        units_kernel,
        row_grid(embeddings, ROWS),
        **operand_rows(embeddings),
        units=units,
        norms=norms,
        temperature=temperature,
        is_bad=is_bad,
        embedding_dim=embedding_dim,
        dim=units.shape[1],
        TF32=tf32,
        ROWS=ROWS,
        WIDTH=WIDTH,
        **options_of(WARPS),
    )


@triton.jit
def row_dots(stack, rows, partner, inside, dim, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """``[ROWS]``: dot products of rows of a matrix ``[.., dim]`` with those that stand `partner` rows further on,
    fp32."""
    lane = tl.arange(0, WIDTH)
    x = stack + rows.to(tl.int64)[:, None] * dim
    y = x + partner.to(tl.int64) * dim
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, dim, WIDTH):
        column = first + lane[None, :]
        there = inside[:, None] & (column < dim)
        a = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
        b = tl.load(y + column, mask=there, other=0.0).to(tl.float32)
        total += tl.sum(a * b, axis=1)
    return total


@triton.jit
def lowered(own, margin, margins, rows, inside, relative):
    """The guide's scores of anchors with their positives, less the margin; see
    `gist_fast.functional.operands.make_thresholds`."""
    if margins is not None:
        margin = tl.load(margins + rows, mask=inside, other=0.0)
    return own - margin * tl.where(relative != 0, tl.abs(own), 1.0)


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def thresholds_kernel(
    student,  # the student's stack, [S, dim]; None where the positives' logits are known
    guide,  # the guide's, [S, guide_dim]; None without a guide but the student
    temperature,  # [1]
    margins,  # [B], in the place of `margin`; or None
    positives,  # [B]: written, the base-2 logits of anchors with their positives; None where they are known
    guide_thresholds,  # [B]: written; or None
    student_thresholds,  # [B]: written; or None
    count,  # anchors in the stacks
    first,  # which of the B the first one is
    partner,  # rows from an anchor to its positive
    margin,
    relative,  # 1 where it is a share of the score, else 0
    guide_band,  # negative where ties are masked
    student_band,
    dim,
    guide_dim,
    SELF_GUIDED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    anchors = first + rows
    if student is not None:
        own_logits = row_dots(student, rows, partner, inside, dim, ROWS, WIDTH)
        tl.store(positives + anchors, own_logits, mask=inside)
        # Student scores carry this factor, so what they are compared with must too.
        norm = operand_norm(temperature)
        squared = norm * norm
        if SELF_GUIDED:
            found = (lowered(own_logits / squared, margin, margins, anchors, inside, relative) + guide_band) * squared
            tl.store(guide_thresholds + anchors, found, mask=inside)
        if student_thresholds is not None:
            tl.store(student_thresholds + anchors, own_logits - student_band * squared, mask=inside)
    if guide is not None:
        own = row_dots(guide, rows, partner, inside, guide_dim, ROWS, WIDTH)
        found = lowered(own, margin, margins, anchors, inside, relative) + guide_band
        tl.store(guide_thresholds + anchors, found, mask=inside)


def make_thresholds(
    student: Tensor | None,
    guide: Tensor | None,
    count: int,
    partner: int,
    temperature: Tensor,
    margin: float | Tensor,
    positives: Tensor | None,
    guide_thresholds: Tensor | None,
    student_thresholds: Tensor | None,
    *,
    first: int,
    guide_band: float,
    student_band: float,
    self_guided: bool,
    relative: bool,
) -> None:
    """Write what anchors have to do with their own positives.

    Args:
        student: the student's stack; None where `positives` are known.
        guide: the stack of a guide that is not the student; None without.
        count: anchors in the stacks, their first rows.
        partner: rows from an anchor to its positive.
        temperature: ``[1]``, fp32.
        margin: one, or ``[B]``, fp32; `relative`: a share of the score.
        positives: ``[B]``, fp32; written: base-2 logits.
        guide_thresholds: ``[B]``, fp32, or None; written: scores above it are masked.
        student_thresholds: ``[B]``, fp32, or None; written: logits below it are masked.
        first: which of the B anchors is the first one of the stacks.
        guide_band: what ties may differ by, negative where they are to be masked; `student_band` likewise, which is
            positive always.
    """
    start(
        thresholds_kernel,
        (triton.cdiv(count, ROWS),),
        student=student,
        guide=guide,
        temperature=temperature,
        margins=margin if isinstance(margin, Tensor) else None,
        positives=positives,
        guide_thresholds=guide_thresholds,
        student_thresholds=student_thresholds,
        count=count,
        first=first,
        partner=partner,
        margin=0.0 if isinstance(margin, Tensor) else margin,
        relative=int(relative),
        guide_band=guide_band,
        student_band=student_band,
        dim=None if student is None else student.shape[1],
        guide_dim=None if guide is None else guide.shape[1],
        SELF_GUIDED=self_guided,
        ROWS=ROWS,
        WIDTH=PAIR_WIDTH,
        **options_of(WARPS),
    )


@triton.jit
def upstream_scale(least, largest, LARGEST_WEIGHT: tl.constexpr):
    """What the largest upstream gradient is in magnitude, in base 2 and divided by LARGEST_WEIGHT; see
    `gist_fast.functional.backends.interface.LARGEST_WEIGHT`."""
    magnitude = tl.maximum(
        tl.abs(tl.load(least)), tl.abs(tl.load(largest)), propagate_nan=tl.PropagateNan.ALL
    )  # fmt: skip
    # The least normal number instead of 0.
    magnitude = tl.maximum(magnitude * LN2, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    return magnitude / LARGEST_WEIGHT


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def weights_kernel(
    upstream,  # [B]: the gradient by each row's loss
    least,  # [1]: the smallest of all rows and dims
    largest,  # [1]
    lse2,  # [B]: of the negatives
    stack,  # the student's, [S, dim]
    total,  # [B]: written: with the positive; less log2 |weight| where `weights` is None
    weights,  # [B]: written; None where no two are of different sign
    positive_dlogits,  # [B]: written: the derivative by each positive's logit
    count,  # B
    partner,  # rows from an anchor to its positive
    dim,
    LARGEST_WEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    # d loss / d base-2 logit carries ln 2.
    weight = tl.load(upstream + rows, mask=inside, other=0.0) * LN2 / upstream_scale(least, largest, LARGEST_WEIGHT)
    negatives = tl.load(lse2 + rows, mask=inside, other=0.0)
    positive = row_dots(stack, rows, partner, inside, dim, ROWS, WIDTH)
    above = negatives - positive
    found = positive + softplus2(above)
    if weights is None:
        # The sign is of all rows, and goes into the factor of all gradients.
        weight = tl.abs(weight)
        found -= tl.log2(weight)
    else:
        tl.store(weights + rows, weight, mask=inside)
    tl.store(total + rows, found, mask=inside)
    tl.store(positive_dlogits + rows, -weight * sigmoid2(above), mask=inside)


def weigh(
    upstream: Tensor,
    extremes: tuple[Tensor, Tensor],
    lse2: Tensor,
    stack: Tensor,
    partner: int,
    total: Tensor,
    weights: Tensor | None,
    positive_dlogits: Tensor,
    largest_weight: float,
) -> None:
    """Write what the backward pass of one Matryoshka dim needs of each row; ``[B]``, fp32, but for `stack`.

    Args:
        upstream: the gradients by the rows' losses.
        extremes: the smallest and the largest of all rows and dims, 0-d.
        lse2: of the negatives.
        stack: the student's.
        partner: rows from an anchor to its positive.
        total: written: the base-2 logsumexp with the positive; less ``log2 |weight|`` without `weights`.
        weights: written: upstream gradients, the largest of them `largest_weight` in magnitude; None where no two are
            of different sign.
        positive_dlogits: written: the derivatives by the positives' logits.
    """
    start(
        weights_kernel,
        (triton.cdiv(upstream.numel(), ROWS),),
        upstream=upstream,
        least=extremes[0],
        largest=extremes[1],
        lse2=lse2,
        stack=stack,
        total=total,
        weights=weights,
        positive_dlogits=positive_dlogits,
        count=upstream.numel(),
        partner=partner,
        dim=stack.shape[1],
        LARGEST_WEIGHT=largest_weight,
        ROWS=ROWS,
        WIDTH=PAIR_WIDTH,
        **options_of(WARPS),
    )
