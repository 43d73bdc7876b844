"""Distillation from the guide by the kernels; see `gist_fast.functional.distillation` and `gist_fast.kernels.distil`.

A pass has the student's operands and the guide's unit vectors in the places of `Work`, and goes over the same chunks as
the loss, one at a time: each leaves six numbers of every row and tile that it compares.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gist_fast.functional.backends import triton as backend
from gist_fast.functional.backends.interface import LARGEST_WEIGHT, LN2, Distilled, Problem
from gist_fast.functional.backends.kept import MASKED
from gist_fast.functional.backends.kernel_passes import by_embedding
from gist_fast.functional.backends.kernel_work import Work
from gist_fast.functional.blocks import ANCHORS
from gist_fast.kernels.config import Config, choose_config
from gist_fast.kernels.distil import NUMBERS, launch_of, start_distil, write_distil_dlogits
from gist_fast.kernels.distil_reduce import reduce_distilled
from gist_fast.kernels.dlogits import add_dlogits
from gist_fast.kernels.layout import TILE


def forward(problem: Problem, guide_temperature: float) -> Distilled:
    """See `gist_fast.functional.backends.interface.DistillingBackend`."""
    with backend.on_device(problem.student[ANCHORS].device):
        return forward_with(_config(problem), problem, guide_temperature)


def backward(
    problem: Problem, guide_temperature: float, by_lse: Tensor, by_mean: Tensor, lse: Tensor, guide_lse: Tensor
) -> list[Tensor]:
    """See `gist_fast.functional.backends.interface.DistillingBackend`."""
    with backend.on_device(problem.student[ANCHORS].device):
        return backward_with(_config(problem), problem, guide_temperature, by_lse, by_mean, lse, guide_lse)


def forward_with(config: Config, problem: Problem, guide_temperature: float) -> Distilled:
    """The forward pass by a given configuration."""
    work, launch = Work(problem, config), launch_of(config)
    work.hold_guide()
    batches = work.plan(1, shares=(launch.shares, launch.shares))
    partials = work.numbers(NUMBERS, TILE * max(batch.partial_tiles for batch in batches))
    running = work.numbers(work.levels, work.softmaxes, NUMBERS, problem.rows)
    for index, batch in enumerate(batches):
        guide = work.guide_of(batch)
        for level, stack in enumerate(work.stacks):
            for chunks in batch.sets:
                start_distil(chunks, work.table, stack, guide, _factor(guide_temperature), partials, launch)
            for softmax in range(work.softmaxes):
                reduce_distilled(partials, batch, work.table, running[level, softmax], softmax, first=index == 0)
    # [NUMBERS, L, R]
    guide_maximum, guide_total, guide_mean, mean, maximum, total = (
        running.permute(2, 0, 1, 3).reshape(NUMBERS, work.levels, -1).unbind()
    )
    none = guide_maximum == -torch.inf
    divisor = guide_total.masked_fill(none, 1.0)

    def natural(values: Tensor) -> Tensor:
        return (LN2 * values).masked_fill(none[: len(values)], -MASKED)

    lse, guide_lse = natural(maximum + total.log2()), natural((guide_maximum + guide_total.log2())[:1])
    return Distilled(lse, LN2 * mean / divisor, guide_lse[0], LN2 * guide_mean[0] / divisor[0])


def backward_with(
    config: Config,
    problem: Problem,
    guide_temperature: float,
    by_lse: Tensor,
    by_mean: Tensor,
    lse: Tensor,
    guide_lse: Tensor,
) -> list[Tensor]:
    """The backward pass by a given configuration."""
    work, launch = Work(problem, config, norms=True), launch_of(config)
    work.hold_guide()
    upstream = torch.stack([by_lse, by_mean])
    extremes = torch.aminmax(upstream)
    # By a base-2 logit, hence ln 2; see `gist_fast.kernels.rows.upstream_scale`.
    largest = torch.maximum(*(x.abs() for x in extremes)) * LN2
    weights = upstream * (LN2 * LARGEST_WEIGHT / largest.clamp_min(torch.finfo(torch.float32).tiny))
    lse2, guide_lse2 = lse / LN2, guide_lse / LN2
    batches = work.plan(1)
    dlogits = work.stacks[0].new_empty(TILE * TILE * max(batch.dlogits_tiles for batch in batches))
    operands = [stack.split(work.split) for stack in work.stacks]
    gradients, fresh = work.empty_gradients(batches)
    for batch in batches:
        guide = work.guide_of(batch)
        for level, stack in enumerate(work.stacks):
            both = (lse2[level], guide_lse2), (weights[0, level], weights[1, level])
            for chunks in batch.sets:
                write_distil_dlogits(
                    chunks, work.table, stack, guide, _factor(guide_temperature), *both, dlogits, launch
                )
                add_dlogits(chunks, operands[level], work.starts, dlogits, gradients[level], fresh=fresh[level])
    nothing = torch.zeros(work.levels, problem.rows, dtype=torch.float32, device=lse.device)
    return by_embedding(work, problem, gradients, nothing, extremes, one_sign=False)


def _config(problem: Problem) -> Config:
    models = problem.student[ANCHORS], problem.guide[ANCHORS]
    return choose_config(backend.generation(models[0].device), max(x.element_size() for x in models))


def _factor(guide_temperature: float) -> float:
    """From the guide's cosine similarities to base-2 logits."""
    return math.log2(math.e) / guide_temperature
