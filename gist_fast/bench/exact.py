"""The truth about a batch of any size: its loss, and the gradients of a few of its rows, without a matrix of scores.

A row takes part in every other row's softmax, whose sum is needed first: one pass over all pairs. After it the sampled
rows cost little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gist_fast.bench.cases import TEMPERATURE, Embeddings, LossCase

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_PAIRS = 1 << 23
"""Scores of a block at a time: 64 MiB."""
FLOAT64_ROWS = 2048
"""Larger batches are computed in float32, whose rounding is far below what is allowed, in half the time."""


class Sample(NamedTuple):
    """What a computed result is held to."""

    loss: Tensor
    anchors: Tensor
    """Gradients of the sampled rows, ``[R, D]``."""
    positives: Tensor


class _Side(NamedTuple):
    """Unit vectors ``[B, D]`` of the student, and of the guide where there is one."""

    unit: Tensor
    guide: Tensor | None


def exact_sample(case: LossCase, e: Embeddings, rows: Tensor) -> Sample:
    """The loss of all rows, and both gradients of `rows`.

    Args:
        e: the embeddings; a guide that is the student itself too.
        rows: ``[R]``, which ones.
    """
    import torch
    from torch.nn.functional import normalize

    exactly = case.dtype == "float64" or len(e.anchors) <= FLOAT64_ROWS
    wide = torch.float64 if exactly else torch.float32

    def side(student: Tensor, guide: Tensor | None) -> _Side:
        unit = normalize(student.detach().to(wide), dim=1)
        return _Side(unit, None if guide is None else normalize(guide.detach().to(wide), dim=1))

    a, p = side(e.anchors, e.guide_anchors), side(e.positives, e.guide_positives)
    thresholds = None if a.guide is None or p.guide is None else (a.guide * p.guide).sum(1) - case.margin
    blocks = [{"ap": (a, p), "aa": (a, a), "pp": (p, p)}[name] for name in case.blocks]
    count = len(a.unit)
    every = torch.arange(count, device=rows.device)

    def logits(of: _Side, to: _Side, these: Tensor, those: Tensor) -> Tensor:
        """Of rows `these` against columns `those`, those that do not count at minus infinity."""
        scores = of.unit[these] @ to.unit[those].T
        own = these[:, None] == those
        mask = torch.zeros_like(own)
        if of.guide is not None and to.guide is not None and thresholds is not None:
            mask = of.guide[these] @ to.guide[those].T > thresholds[these, None]
        mask = mask | own if of is to else mask & ~own
        return scores.div_(TEMPERATURE).masked_fill_(mask, -torch.inf)

    chunks = every.split(max(1, CHUNK_PAIRS // count))
    lse = torch.cat(
        [torch.stack([logits(*block, part, every).logsumexp(1) for block in blocks]).logsumexp(0) for part in chunks]
    )
    gradients = {id(a): -p.unit[rows], id(p): -a.unit[rows]}
    for of, to in blocks:
        for these in chunks:
            # As columns of every row, and below as rows themselves.
            weights = (logits(of, to, these, rows) - lse[these, None]).exp_()
            gradients[id(to)] += weights.T @ of.unit[these]
        gradients[id(of)] += (logits(of, to, rows, every) - lse[rows, None]).exp_() @ to.unit
    loss = (lse - (a.unit * p.unit).sum(1) / TEMPERATURE).mean()
    found = []
    for given, one in ((e.anchors, a), (e.positives, p)):
        by_unit = gradients[id(one)] / (TEMPERATURE * count)
        along = (by_unit * one.unit[rows]).sum(1, keepdim=True) * one.unit[rows]
        found.append((by_unit - along) / given.detach()[rows].to(wide).norm(dim=1, keepdim=True))
    return Sample(loss, *found)
