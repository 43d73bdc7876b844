"""Compiles ahead, in several processes, what tuning will try: for the part ``tuned``, which has little time.

Kernels are compiled for no width, so a tiny batch brings those of a large one onto the disk.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
from gist_fast.kernels import tuning
from gist_fast.kernels.config import Config, choose_config

from benchmarks.gpu.processes import outcomes
from gist_fast.functional.backends import triton
from gist_fast.functional.function import guided_contrastive_loss

ROWS, WIDTH = 130, 160
"""Of the tiny batch, which has a symmetric part."""


def compile_candidates(device: torch.device, dtype: torch.dtype, *, toy: bool) -> dict[str, str]:
    """Compile them. What failed, as a launch does that is too large for the card, with why; tuning will leave it."""
    default = choose_config(triton.generation(device), dtype.itemsize)
    found = candidates(default)
    if toy:
        found = itertools.islice(found, 2)
    work = {str(replace(config, note="")): functools.partial(run_once, device, dtype, config) for config in found}
    return {name: str(error)[:100] for name, error in outcomes(work, here=toy) if isinstance(error, Exception)}


def candidates(default: Config) -> Iterator[Config]:
    """What tuning a guided batch may come to, each launch by itself."""
    steps = [default.block_k, *tuning.other_steps(default)]
    for direction, step in itertools.product(("guided forward", "backward"), steps):
        stepped = tuning.with_step(default, step)
        yield stepped
        for field in tuning.FIELDS[direction]:
            yield from tuning.candidates(stepped, field)


def run_once(device: torch.device, dtype: torch.dtype, config: Config) -> None:
    """Both passes of a tiny batch by this configuration."""
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(ROWS, WIDTH, generator=generator).to(device, dtype) for _ in range(4)]
    leaves = [x.requires_grad_() for x in embeddings[:2]]
    with mock.patch.dict(os.environ), mock.patch.object(triton, "choose_config", return_value=config):
        os.environ.pop(tuning.SWITCH, None)
        guided_contrastive_loss(*leaves, *embeddings[2:], backend="triton").backward()
