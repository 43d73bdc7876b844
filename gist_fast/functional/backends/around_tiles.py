"""The loss around tiles of scores, in plain torch: from embeddings to operands, from the softmax of the negatives to
the loss, and back. The backend `gist_fast.functional.backends.tiled` computes what is between.

With ``S`` the natural-log logits of row i's unmasked negatives and ``s`` that of its positive:

    loss_i = log(sum(exp(S)) + exp(s)) - s = log(1 + exp(lse_negatives - s))
    d loss_i / d S_j = exp(S_j - lse_i),    d loss_i / d s = -sigmoid(lse_negatives - s)

The first is for the tiles to multiply out; the second is a single number a row, done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import LARGEST_WEIGHT, LN2, GuidedRows, Problem
from gist_fast.functional.blocks import ANCHORS, Block
from gist_fast.functional.operands import Operands, add_positives, embedding_gradients, prepare


class Negatives(NamedTuple):
    """The softmax over each row's unmasked negatives, positive left out; see `GuidedRows`."""

    lse2: Tensor
    """``[L, R]``, accumulation type."""
    hardest: Tensor
    """``[B]``, accumulation type: the largest logit (base 2) at the largest dim; -inf for a row that has none."""
    masked: Tensor
    """``[blocks]``, int64."""
    easy_negatives: Tensor
    """``[blocks]``, int64."""
    mask_bits: Tensor


NegativesBy = Callable[[Operands, Sequence[Block], bool], Negatives]
"""Of operands, blocks, and whether mask bits are kept."""
GradientsBy = Callable[[Operands, Sequence[Block], Tensor, Tensor | None, Tensor | None], list[list[Tensor]]]
"""``sum_ij weights_i * exp2(logit_ij - lse2_i) * d logit_ij`` over unmasked entries, by each student operand: for each
dim one tensor an operand, of its shape, accumulation type. Of operands, blocks, ``lse2 [L, R]`` with the positive
included, ``weights [L, R]`` (None for 1), and mask bits (None to decide the masks again)."""


def forward(problem: Problem, keep_mask_bits: bool, negatives_by: NegativesBy) -> GuidedRows:
    """See `gist_fast.functional.backends.interface.StreamingBackend.forward`."""
    operands = prepare_operands(problem)
    negatives = negatives_by(operands, problem.blocks, keep_mask_bits)
    positives = _positives(operands, problem)
    loss = torch.logaddexp(LN2 * (negatives.lse2 - positives), torch.zeros_like(negatives.lse2))
    if operands.guide_thresholds is not None:
        # NaN thresholds mask nothing; carry them into the loss, where they are seen.
        nothing = (operands.guide_thresholds - operands.guide_thresholds).to(loss.dtype)
        loss = loss + _in_each_softmax(nothing, problem)
    to_cosine = LN2 * problem.temperature.to(loss.dtype)
    return GuidedRows(
        loss,
        negatives.lse2,
        operands.matryoshka[0].positives * to_cosine,
        negatives.hardest * to_cosine,
        negatives.masked,
        negatives.easy_negatives,
        negatives.mask_bits,
    )


def backward(
    problem: Problem,
    grad_loss: Tensor,
    lse2: Tensor | None,
    mask_bits: Tensor | None,
    negatives_by: NegativesBy,
    gradients_by: GradientsBy,
) -> list[Tensor]:
    """See `gist_fast.functional.backends.interface.StreamingBackend.backward`."""
    operands = prepare_operands(problem if mask_bits is None else problem.decided())
    if lse2 is None:
        lse2 = negatives_by(operands, problem.blocks, False).lse2
    # d loss / d base-2 logit carries ln 2.
    weights = LN2 * grad_loss.to(lse2.dtype)
    largest = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
    factor, weights = largest / LARGEST_WEIGHT, weights / largest * LARGEST_WEIGHT
    positives = _positives(operands, problem)
    total = torch.logaddexp2(lse2, positives)
    by_row: Tensor | None = weights
    if problem.one_sign:
        # The sign is of all rows, and goes into the factor of all gradients.
        factor, weights, by_row = torch.where((weights < 0).any(), -factor, factor), weights.abs(), None
        total -= weights.log2()
    found = gradients_by(operands, problem.blocks, total, by_row, mask_bits)
    dlogits = weights * -torch.sigmoid(LN2 * (lse2 - positives))
    if problem.config.softmaxes > 1:
        # The positive's logit is in each of them.
        dlogits = dlogits.view(len(dlogits), problem.config.softmaxes, -1).sum(1)
    students = [(each.operands, each.norms) for each in operands.matryoshka]
    del operands
    return by_embedding(found, students, dlogits, problem, factor)


def _positives(operands: Operands, problem: Problem) -> Tensor:
    """``[L, R]``: the logits of the positives."""
    return _in_each_softmax(torch.stack([each.positives for each in operands.matryoshka]), problem)


def _in_each_softmax(values: Tensor, problem: Problem) -> Tensor:
    """``[.., R]`` of values a row, ``[.., B]``."""
    count = problem.config.softmaxes
    return values if count == 1 else torch.cat([values] * count, dim=-1)


def prepare_operands(problem: Problem) -> Operands:
    """Of a problem; see `prepare`."""
    return prepare(
        problem.student,
        problem.guide,
        problem.temperature,
        problem.config,
        problem.rows,
        problem.offset,
        margins=problem.margins,
        groups=problem.groups,
        dims=problem.dims,
    )


def by_embedding(
    found: list[list[Tensor]],
    operands_and_norms: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    dlogits: Tensor | None,
    problem: Problem,
    factor: Tensor,
) -> list[Tensor]:
    """The gradients by the embeddings, summed over the Matryoshka dims, and by the temperature.

    Args:
        found: by each dim's operands, those of the positives left out; emptied.
        operands_and_norms: of each dim, the largest first; emptied.
        dlogits: ``[L, B]``, the derivative by each positive's logit; None where it is 0.
        factor: 0-d; all gradients are multiplied by it.
    """
    student, temperature = problem.student, problem.temperature
    sums: list[Tensor] = []
    by_temperature = torch.zeros_like(temperature)
    one = len(found) == 1
    for dlogit in [None] * len(found) if dlogits is None else dlogits:
        gradients, (operands, norms) = found.pop(0), operands_and_norms.pop(0)
        if dlogit is not None:
            add_positives(gradients, operands, dlogit, problem.offset)
        dim = operands[ANCHORS].shape[1]
        del operands
        by_dim, along = embedding_gradients(
            gradients, [x[:, :dim] for x in student], norms, temperature, factor, keep_wide=not one
        )
        by_temperature = by_temperature + along
        if not sums:
            # Sums of several dims are rounded once, at the end.
            sums = by_dim
            whole = [x.shape[1] - dim for x in student]
            sums = [torch.nn.functional.pad(g, (0, more)) if more else g for g, more in zip(sums, whole, strict=True)]
        else:
            for total, narrow in zip(sums, by_dim, strict=True):
                total[:, :dim] += narrow
    by_embedding = [total.to(x.dtype) for total, x in zip(sums, student, strict=True)]
    return [*by_embedding, by_temperature.to(temperature.dtype)]
