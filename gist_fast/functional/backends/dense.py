"""Small batches on a CPU: all scores at once, in few operations, and the way back by hand.

At a few hundred rows a loss costs what its operations cost to start. Here there are some thirty of them each way: all
embeddings of a model are one matrix, each pair of them is scored in one product (two with the block ``pp``), masks are
0 and 1 in the place of the guide's scores, and exponentials are kept for the backward pass. What is computed is what
`gist_fast.functional.backends.tiled` computes, with the same rounding of operands and the same band of ties; ``auto``
takes it up to `PAIRS` pairs.

The scores ``[B, W]`` have their columns in this order: ``aa``, ``ap``, ``an_1``, ``an_2`` and so on, then ``pp``. The
first ones are one product of the anchors with the rows of the concatenated embeddings. With ``W`` the gradient by the
scores, ``aa`` and (where each positive has its anchor) ``pp`` need one product with ``W + W^T`` for both their sides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gist_fast.functional.backends.cpu_products import add_product, put_product
from gist_fast.functional.backends.interface import LN2, GuidedRows, refuse_double_backward
from gist_fast.functional.backends.kept import MASKED
from gist_fast.functional.blocks import ANCHORS, POSITIVES, Block
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import make_thresholds, reciprocal_norms, tie_band

PAIRS = 2**20
"""Up to so many pairs ``auto`` computes them at once on a CPU. On two threads, D = G = 384, a step took in float32 1 /
1.22 of ``tiled``'s time at 0.8 million pairs, 1 / 1.12 at 1.8 and 1 / 0.98 at 3.1; in bfloat16 1 / 1.00 and 1 / 0.92 at
the first two. By oneDNN's products: 1 / 1.29 at 0.8, 1 / 1.03 at 1.6 and 1 / 0.80 at 3.1; 1 / 1.19 and 1 / 1.01."""
_ZERO = torch.zeros((), device="cpu")
_NOTHING = torch.empty(0, device="cpu")


def covers(config: LossConfig, blocks: Sequence[Block], device_type: str) -> bool:
    """Whether a call that is left to ``auto`` is computed here."""
    if device_type != "cpu" or config.mask_bits == "recompute" or not all(map(_is_covered, blocks)):
        return False
    if sum([block.rows * block.columns for block in blocks]) > PAIRS:
        return False
    if config.hard or config.has_row_terms or config.distill_weight:
        return False
    return all(setting is None for setting in (config.hardness_mode, config.matryoshka_dims, config.groups))


def _is_covered(block: Block) -> bool:
    mixed = block.row_operand == POSITIVES and not block.symmetric
    others = block.column_operand == ANCHORS and block.columns != block.rows
    return block.guided and not mixed and not others


class _Columns(NamedTuple):
    """Where the scores of a batch lie."""

    sizes: list[int]
    """Rows of each of the concatenated embeddings."""
    rows: int
    candidates: int
    """M, the positives."""
    first: int
    """The first of those rows that the anchors are scored with: the first anchor, or the first positive."""
    end: int
    """Where the anchors' columns end and those of ``pp`` begin."""
    width: int
    own_positives: slice
    """Rows of the concatenated embeddings: each anchor's positive."""
    positives: slice
    """Rows of the concatenated embeddings."""
    positive: int
    """The diagonal of the scores that is the positives'."""
    excluded: Tensor
    """Places in the flat scores of what never counts."""
    by_name: dict[str, slice]


@functools.lru_cache(maxsize=64)
def _columns(rows: tuple[int, ...], contrast_anchors: bool, contrast_positives: bool, offset: int) -> _Columns:
    """For so many anchors, positives and negatives."""
    batch, candidates, *negatives = rows
    sizes = {"aa": batch} if contrast_anchors else {}
    sizes["ap"] = candidates
    sizes |= {f"an_{k + 1}": count for k, count in enumerate(negatives)}
    end = sum(sizes.values())
    if contrast_positives:
        sizes["pp"] = candidates
    by_name, start = {}, 0
    for name, count in sizes.items():
        by_name[name] = slice(start, start + count)
        start += count
    own = torch.arange(batch, device="cpu") * (start + 1)
    diagonals = {"ap": offset, "aa": 0, "pp": offset}
    return _Columns(
        sizes=list(rows),
        rows=batch,
        candidates=candidates,
        first=0 if contrast_anchors else batch,
        end=end,
        width=start,
        own_positives=slice(batch + offset, 2 * batch + offset),
        positives=slice(batch, batch + candidates),
        positive=by_name["ap"].start + offset,
        excluded=torch.cat([own + by_name[name].start + by for name, by in diagonals.items() if name in by_name]),
        by_name=by_name,
    )


def forward(
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: float | Tensor,
    config: LossConfig,
    offset: int,
    margins: Tensor | None,
    blocks: Sequence[Block],
    reduction: str,
    statistics: bool,
) -> GuidedRows:
    """The loss, ``[B]`` or reduced to 0-d already; see `gist_fast.functional.operator.forward_rows`.

    Args:
        statistics: whether what else `GuidedRows` has, but for `lse2`, is wanted; empty otherwise.
    """
    value = temperature.item() if isinstance(temperature, Tensor) else temperature
    made: list[_Made] = []

    def make() -> _Made:
        made.append(_make(student, guide, value, config, offset, margins, blocks, reduction, statistics))
        return made[0]

    loss = _Loss.apply(make, temperature, *student)
    return GuidedRows(loss, _NOTHING, *made[0].statistics, _NOTHING)


class _Made(NamedTuple):
    """What a forward pass makes."""

    loss: Tensor
    """``[B]``, or 0-d where it is reduced."""
    weight: float
    """Of each row in it."""
    temperature: float
    exponentials: Tensor
    """``[B, W]``: of the scores less their row's largest; 0 where one does not count."""
    sums: Tensor
    """``[B]``: theirs."""
    shares: Tensor
    """``[B]``: of the negatives in the softmax with the positive."""
    operands: Tensor
    """All rows as they are multiplied."""
    scaled: Tensor
    """The same before they are rounded to the embeddings' type."""
    factors: Tensor
    """``[N, 1]``: what made `scaled` of the embeddings."""
    scale: float
    columns: _Columns
    statistics: tuple[Tensor, Tensor, Tensor, Tensor]
    """`positive`, `hardest`, `masked` and `easy_negatives` of `GuidedRows`."""


def _make(
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: float,
    config: LossConfig,
    offset: int,
    margins: Tensor | None,
    blocks: Sequence[Block],
    reduction: str,
    statistics: bool,
) -> _Made:
    scale = math.sqrt(math.log2(math.e) / temperature)
    scaled, factors = _scaled_rows(student, scale, "")
    sizes = tuple([x.shape[0] for x in student])
    columns = _columns(sizes, "query_to_query" in config.compared, "doc_to_doc" in config.compared, offset)
    operands = _rounded(scaled, student[0].dtype)
    scores = _scores(operands, columns)
    positives = scores.diagonal(columns.positive).clone()
    counts = [_ZERO] * len(blocks)
    if config.guided:
        mask = _mask(scores, positives, scale, guide, config, margins, student[0].shape[1], columns)
        if statistics:
            mask.view(-1).index_fill_(0, columns.excluded, 0.0)
            counts = [mask[:, columns.by_name[block.name]].sum() for block in blocks]
        mask.view(-1).index_fill_(0, columns.excluded, 1.0)
        scores.sub_(mask, alpha=MASKED)
    else:
        scores.view(-1).index_fill_(0, columns.excluded, -MASKED)
    hardest = scores.amax(dim=1, keepdim=True)
    # Of a row that has nothing but masked entries all are 1, at a maximum of -MASKED: nothing, next to the positive.
    exponentials = scores.sub_(hardest).exp2_()
    sums, hardest = exponentials.sum(dim=1), hardest[:, 0]
    behind = (sums.log2() + hardest).sub_(positives).mul_(LN2)
    loss = torch.logaddexp(behind, _ZERO)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    weight = 1 / columns.rows if reduction == "mean" else 1.0
    found = (_NOTHING,) * 4
    if statistics:
        to_cosine, masked = LN2 * temperature, torch.stack(counts).to(torch.int64)
        hardest = hardest.masked_fill(hardest <= -MASKED / 2, -torch.inf)
        found = positives * to_cosine, hardest * to_cosine, masked, torch.zeros_like(masked)
    shares = behind.sigmoid_()
    return _Made(
        loss, weight, temperature, exponentials, sums, shares, operands, scaled, factors, scale, columns, found
    )


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[[], _Made], temperature: float | Tensor, *student: Tensor) -> Tensor:
        # Here, where autograd is off already.
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                made = make()
        else:
            made = make()
        ctx.save_for_backward(made.exponentials, made.sums, made.shares, made.operands, made.scaled, made.factors)
        ctx.columns, ctx.scale, ctx.weight, ctx.temperature = made.columns, made.scale, made.weight, made.temperature
        ctx.temperature_dtype = temperature.dtype if isinstance(temperature, Tensor) else None
        ctx.dtype = student[0].dtype
        return made.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        # Each of the two costs microseconds that most backward passes need not spend.
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            return None, *_gradients(ctx, grad_loss)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            gradients = _gradients(ctx, grad_loss)
        if torch.is_grad_enabled():
            gradients = _Refuse.apply(torch.zeros((), requires_grad=True), *gradients)
        return None, *gradients


def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """By the temperature and each of the student's embeddings."""
    exponentials, sums, shares, operands, scaled, factors = ctx.saved_tensors
    columns: _Columns = ctx.columns
    rows, end = columns.rows, columns.end
    # By a base-2 logit, hence ln 2.
    by_negatives = (shares * grad_loss).mul_(LN2 * ctx.weight)
    dscores = exponentials * (by_negatives / sums)[:, None]
    torch.neg(by_negatives, out=dscores.diagonal(columns.positive))
    gradient = torch.empty_like(operands)
    put_product(gradient[rows:], dscores[:, rows - columns.first : end].T, operands[:rows])
    if columns.first == 0:
        aa = dscores[:, :rows]
        aa.copy_(aa + aa.T)
    put_product(gradient[:rows], dscores[:, :end], operands[columns.first :])
    if end < columns.width:
        pp, positives = dscores[:, end:], columns.positives
        if columns.candidates == rows:
            add_product(gradient[positives], pp + pp.T, operands[positives])
        else:
            add_product(gradient[columns.own_positives], pp, operands[positives])
            add_product(gradient[positives], pp.T, operands[columns.own_positives])
    # With v = x / |x|: dx = scale / |x| * (du - v (v . du)), and what is radial changes with the temperature.
    radial = (scaled * gradient).sum(dim=1, keepdim=True)
    by_temperature = None
    if ctx.needs_input_grad[1]:
        by_temperature = radial.sum().div_(-2 * ctx.temperature).to(ctx.temperature_dtype)
    gradient.addcmul_(scaled, radial, value=-1 / ctx.scale**2).mul_(factors)
    return by_temperature, *gradient.to(ctx.dtype).split(columns.sizes)


class _Refuse(torch.autograd.Function):
    """Hands gradients through that have no derivative of their own."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_double_backward()


def _scaled_rows(embeddings: Sequence[Tensor], scale: float, prefix: str) -> tuple[Tensor, Tensor]:
    """All rows ``[N, width]`` of norm `scale`, and what each was multiplied by, ``[N, 1]``; accumulation type."""
    raw = torch.cat(tuple(embeddings))
    factors = reciprocal_norms(embeddings, raw, prefix)
    if scale != 1:
        factors.mul_(scale)
    return raw * factors, factors


def _rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a type, as all backends round what they multiply; in the type that it had."""
    return rows if rows.dtype == dtype else rows.to(dtype).to(rows.dtype)


def _scores(operands: Tensor, columns: _Columns) -> Tensor:
    """``[B, W]``: of each row with its candidates in all blocks."""
    scores = operands.new_empty(columns.rows, columns.width)
    anchors, positives = operands[: columns.rows], operands[columns.positives]
    candidates = operands[columns.first :] if columns.first else operands
    put_product(scores[:, : columns.end], anchors, candidates.T)
    if columns.end < columns.width:
        own = positives if columns.candidates == columns.rows else operands[columns.own_positives]
        put_product(scores[:, columns.end :], own, positives.T)
    return scores


def _mask(
    scores: Tensor,
    positives: Tensor,
    scale: float,
    guide: Sequence[Tensor],
    config: LossConfig,
    margins: Tensor | None,
    width: int,
    columns: _Columns,
) -> Tensor:
    """``[B, W]``: 1.0 where the guide scores above its threshold, 0.0 elsewhere. (On a CPU torch compares into a float
    type several times as fast as into bool.)"""
    margin = config.margin if margins is None else margins.to(scores)
    rule = {"relative": config.relative, "mask_ties": config.mask_ties}
    if config.self_guided:
        squared = scale**2  # which the student's scores carry
        band = tie_band(scores.dtype, width)
        thresholds = make_thresholds(positives / squared, margin, band=band, **rule) * squared
        return torch.gt(scores, thresholds[:, None], out=torch.empty_like(scores))
    scaled, _ = _scaled_rows(guide, 1.0, "guide_")
    found = _scores(_rounded(scaled, guide[0].dtype), columns)
    band = tie_band(found.dtype, scaled.shape[1])
    thresholds = make_thresholds(found.diagonal(columns.positive), margin, band=band, **rule)
    return found.gt_(thresholds[:, None])
