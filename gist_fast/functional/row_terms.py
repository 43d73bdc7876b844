"""What else the loss of a row may be made of: label smoothing, debiasing, and a term that spreads embeddings.

All in plain torch, from numbers a row. With ``s_i`` the similarity of row i's positive, ``N_i`` its negatives that
count, and ``L_i`` the loss without any of this:

- **Label smoothing** by epsilon, over the classes ``{positive} and N_i``, of which each gets an equal share:

      L_i + epsilon * (s_i - mean over the classes of sim) / temperature

- **Debiasing** (arXiv 2007.00224): a share tau+ of what is taken for negatives is expected to be positive. With
  ``S_i = exp(s_i / temperature) * (exp(L_i) - 1)``, the sum over the negatives, and ``n`` their number, the loss has in
  its place ``n * max((S_i / n - tau+ * exp(s_i / temperature)) / (1 - tau+), exp(-1 / temperature))``.

- **Spread-out** (arXiv 1708.06320, as in arXiv 2509.20354): the mean over the batch's other rows of the squared
  similarity of the anchors, and the same of the positives. Its sum over rows is ``|X^T X|^2 - B`` for unit rows X,
  in ``O(B D^2)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gist_fast.functional.blocks import ANCHORS, POSITIVES, Block
from gist_fast.functional.cosines import row_cosines, unit_vectors
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.mask_products import MaskProduct, count_negatives, sum_similarities
from gist_fast.functional.operands import accumulation_dtype
from gist_fast.functional.own_negatives import OwnTerms
from gist_fast.functional.triplet import triplet_rows


def with_row_terms(
    losses: Tensor,
    config: LossConfig,
    student: Sequence[Tensor],
    blocks: Sequence[Block],
    offset: int,
    temperature: float | Tensor,
    dims: Sequence[int],
    product: MaskProduct | None,
    own_terms: OwnTerms | None,
) -> Tensor:
    """``[L, B]``: the losses of each row at each Matryoshka dim with what `config` adds to them or makes of them.

    Args:
        losses: ``[L, B]``
        student: anchors ``[A, D]``, positives ``[M, D]``, negatives that are everyone's.
        offset: anchor i's positive is row ``offset + i`` of the positives.
        dims: the largest first; empty for the whole width alone.
        product: by the masks of the same batch, where a term needs them; None where nothing masks.
        own_terms: of negatives that are one anchor's alone.
    """
    rows, found = blocks[0].rows, []
    for level, (loss, dim) in enumerate(zip(losses, dims or (student[ANCHORS].shape[1],), strict=True)):
        narrow = [x[:, :dim] for x in student]
        anchors, positives = narrow[ANCHORS][:rows], narrow[POSITIVES][offset : offset + rows]
        positive = row_cosines(anchors, positives)
        own = None if own_terms is None else (own_terms.cosines[level], own_terms.there, own_terms.masked)
        if config.positive_prior:
            count = count_negatives(blocks, product, positive.detach())
            if own is not None:
                count = count + (own[1] & ~own[2]).sum(0)
            loss = debiased(loss, positive, count, temperature, config.positive_prior)
        if config.label_smoothing:
            sums = sum_similarities(narrow, enumerate(blocks), product)
            sums = sums if own is None else sums.add(*own)
            loss = loss + smoothing(positive, *sums.negatives, temperature, config.label_smoothing)
        if config.triplet_margin is not None and product is not None:
            loss = loss + triplet_rows(narrow, positive, config.triplet_margin, blocks, product, own)
        if config.spread_out_weight:
            loss = loss + config.spread_out_weight * (spread_out(anchors) + spread_out(positives))
        found.append(loss)
    return torch.stack(found)


def smoothing(
    positive: Tensor, negatives: Tensor, count: Tensor | int, temperature: float | Tensor, epsilon: float
) -> Tensor:
    """``[B]``: what label smoothing adds to each row's loss.

    Args:
        positive: ``[B]``: similarities of the positives.
        negatives: ``[B]``: sums of those of the negatives that count.
        count: how many these are.
    """
    return epsilon * (positive - (positive + negatives) / (1 + count)) / temperature


def debiased(
    loss: Tensor, positive: Tensor, count: Tensor | int, temperature: float | Tensor, positive_prior: float
) -> Tensor:
    """``[B]``: the loss of each row with the sum of its negatives corrected.

    Args:
        loss: ``[B]``
        positive: ``[B]``: similarities of the positives.
        count: of the negatives that count.
        positive_prior: tau+
    """
    number = torch.as_tensor(count, dtype=loss.dtype, device=loss.device)
    expected = (number * positive_prior).clamp_min(torch.finfo(loss.dtype).tiny).log()
    # Logarithm of the negatives' sum over the positive's term, which may be beyond any float.
    above = loss.clamp_min(torch.finfo(loss.dtype).tiny)
    above = above + torch.log(-torch.expm1(-above))
    # Where less is left than is expected, the floor counts; beyond it the logarithm would be of 0 or less.
    left = above > expected
    difference = torch.where(left, above - expected, 1.0)
    corrected = above + torch.log(-torch.expm1(-difference)) - math.log1p(-positive_prior)
    floor = number.clamp_min(1).log() - (1 + positive) / temperature
    found = torch.where(left, torch.maximum(corrected, floor), floor)
    return torch.where(number > 0, torch.logaddexp(found, torch.zeros_like(found)), loss)


def spread_out(embeddings: Tensor) -> Tensor:
    """``[B]``, accumulation type: of each row of ``[B, D]`` the mean squared cosine similarity with the others; 0 where
    it is alone."""
    unit = unit_vectors(embeddings.to(accumulation_dtype(embeddings.dtype)))
    own = unit.square().sum(1).square()
    return ((unit @ (unit.T @ unit) * unit).sum(1) - own) / max(1, len(unit) - 1)
