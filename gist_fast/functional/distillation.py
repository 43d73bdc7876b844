"""Distillation from the guide: how far the student's distribution over a row's candidates is from the guide's.

The candidates of row i are its positive, the entries of all its blocks but the excluded ones, and its own negatives.
What the guide or groups mask is among them: a text that the guide finds close is what it has most to say about. With
cosine similarity s by the student and g by the guide, over these candidates,

    KL_i = sum_j q_j (log q_j - log p_j),   q = softmax(g / distill_temperature),  p = softmax(s / temperature)

(as E5, arXiv 2212.03533, distils a cross-encoder's scores, and BGE M3, arXiv 2402.03216, its own). The guide has no
gradient, and ``d KL_i / d (s_j / temperature) = p_j - q_j``. Where there are several softmaxes, each has its own KL,
and they are averaged. Hardness weighting has no part in it.

Tiles give four numbers a row (`Distilled`); the positive and own negatives, which are in no tile, join them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gist_fast.functional.backends import reference
from gist_fast.functional.backends.interface import Distilled
from gist_fast.functional.blocks import ANCHORS, POSITIVES, make_blocks
from gist_fast.functional.cosines import row_cosines
from gist_fast.functional.distillation_operator import distil_forward
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import prepare
from gist_fast.functional.own_negatives import DROPPED, OwnTerms


class Row(NamedTuple):
    """Logits of candidates that are in no tile, ``[n, B]`` each."""

    student: Tensor
    """Differentiable."""
    guide: Tensor


def distil(
    chosen: str,
    config: LossConfig,
    rows: int,
    offset: int,
    student: tuple[Tensor, ...],
    guide: tuple[Tensor, ...],
    temperature: Tensor,
    dims: tuple[int, ...],
) -> Distilled:
    """The four numbers of each row, by the backend `chosen`."""
    if chosen == "reference":
        comparing = config.comparing()
        with torch.autocast(student[ANCHORS].device.type, enabled=False):
            operands = prepare(student, guide, temperature, comparing, rows, offset, dims=dims, differentiable=True)
            blocks = make_blocks(rows, [x.shape[0] for x in student], comparing, offset)
            return reference.distil(operands, blocks, config.distill_temperature)
    automatic = config.backend == "auto" and chosen == "triton" and not torch.compiler.is_compiling()
    lse, mean, *of_guide = distil_forward(
        chosen,
        student,
        guide,
        temperature,
        config.distill_temperature,
        dims,
        automatic,
        rows,
        offset,
        *config.to_arguments(),
    )
    return Distilled(lse, mean, *(x.detach() for x in of_guide))


def kl_rows(
    found: Distilled,
    config: LossConfig,
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    offset: int,
    temperature: float | Tensor,
    dims: Sequence[int],
    own_terms: OwnTerms | None,
) -> Tensor:
    """``[L, B]``, accumulation type, differentiable: the KL of each row at each Matryoshka dim.

    Args:
        found: of all blocks.
        student: anchors ``[A, D]`` and positives ``[M, D]``, perhaps negatives.
        guide: the guide's embeddings of the same.
        offset: anchor i's positive is row ``offset + i`` of the positives.
        dims: the largest first; empty for the whole width alone.
        own_terms: of negatives that are one anchor's alone.
    """
    rows = found.guide_lse.shape[0] // config.softmaxes
    own = slice(offset, offset + rows)
    with torch.no_grad():
        of_guide = [row_cosines(guide[ANCHORS][:rows], guide[POSITIVES][own])[None]]
        if own_terms is not None and own_terms.guide is not None:
            of_guide.append(own_terms.guide)
        guide_logits = [(x / config.distill_temperature).to(found.guide_lse.dtype) for x in of_guide]
    levels = []
    for level, dim in enumerate(dims or (student[ANCHORS].shape[1],)):
        positive = row_cosines(student[ANCHORS][:rows, :dim], student[POSITIVES][own, :dim])[None] / temperature
        found_here = []
        for softmax in range(config.softmaxes):
            part = slice(softmax * rows, (softmax + 1) * rows)
            numbers = found.lse[level], found.mean[level], found.guide_lse, found.guide_mean
            tiles = Distilled(*(each[part] for each in numbers))
            others = [Row(positive, guide_logits[0])]
            if config.counts_positive_twice:
                others *= 2
            if own_terms is not None and softmax == 0:
                own_logits = own_terms.cosines[level] / temperature, guide_logits[1]
                others.append(Row(*(torch.where(own_terms.there, x, DROPPED) for x in own_logits)))
            found_here.append(_kl(tiles, others))
        levels.append(torch.stack(found_here).mean(0) if len(found_here) > 1 else found_here[0])
    return torch.stack(levels)


def _kl(tiles: Distilled, others: Sequence[Row]) -> Tensor:
    """``[B]``, over what is in tiles and what is not."""
    student, guide = (torch.cat(each) for each in zip(*others, strict=True))
    guide_all = torch.cat([tiles.guide_lse[None], guide])
    guide_lse = guide_all.logsumexp(0)
    shares = (guide_all - guide_lse).exp()
    mean = (shares * torch.cat([tiles.mean[None], student])).sum(0)
    guide_mean = (shares * torch.cat([tiles.guide_mean[None], guide])).sum(0)
    lse = torch.cat([tiles.lse[None], student]).logsumexp(0)
    return guide_mean - guide_lse - mean + lse
