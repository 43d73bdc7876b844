"""A temperature that is learnt: a parameter of the loss, bounded, and the same on all ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gist_fast.losses.gather import is_distributed

LOG_TEMPERATURE = "log_temperature"
"""The parameter's name in a loss. Its logarithm is trained, so that steps are relative and it stays above 0."""


def as_float(temperature: float | Tensor) -> float:
    """What it is now, whether it is learnt or not."""
    return float(temperature.detach() if isinstance(temperature, Tensor) else temperature)


def make_parameter(temperature: float) -> nn.Parameter:
    """The parameter, at its start."""
    parameter = nn.Parameter(torch.tensor(math.log(temperature)))
    # A loss is no part of what DistributedDataParallel wraps, so nothing else would average this gradient.
    parameter.register_hook(_mean_over_ranks)
    return parameter


def bounded(parameter: nn.Parameter, low: float, high: float) -> Tensor:
    """The temperature, 0-d, differentiable. A step beyond a bound is taken back first, so that it can return."""
    with torch.no_grad():
        parameter.clamp_(math.log(low), math.log(high))
    return parameter.float().exp()


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    if not is_distributed():
        return gradient
    total = gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
