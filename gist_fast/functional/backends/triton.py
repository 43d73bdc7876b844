"""The streaming backend on Triton kernels: where it can run, and by which configuration.

What it runs stands in `gist_fast.functional.backends.kernel_passes`, which is imported at its first use: Triton may not
be installed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import GuidedRows, Problem
from gist_fast.functional.backends.kernel_blocks import mask_bytes as mask_bytes
from gist_fast.functional.blocks import ANCHORS, Block
from gist_fast.kernels import tuning
from gist_fast.kernels.config import Config, Generation, choose_config, generation_of

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors of that device and type, or None where they can."""
    if dtype == torch.float64:
        return "the kernels compute in float32, and embeddings, the student's or the guide's, are float64"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, MINIMUM_TRITON))}"
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly"
        return None
    if device.type != "cuda":
        return f"the tensors are on a {device.type} device, and Triton kernels need a GPU"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < MINIMUM_CAPABILITY:
        return f"the GPU's compute capability {capability[0]}.{capability[1]} is below 8.0"
    try:
        with on_device(device):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton has no driver or compiler for this GPU ({type(error).__name__}: {error})"
    return None


def interpreted() -> bool:
    """Whether Triton kernels are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def forward(problem: Problem, keep_mask_bits: bool) -> GuidedRows:
    """See `gist_fast.functional.backends.interface.StreamingBackend`."""
    from gist_fast.functional.backends.kernel_passes import forward_with

    with on_device(problem.student[ANCHORS].device):
        config = _config(_forward_direction(problem), problem, lambda c: forward_with(c, problem, keep_mask_bits))
        return forward_with(config, problem, keep_mask_bits)


def backward(problem: Problem, grad_loss: Tensor, lse2: Tensor | None, mask_bits: Tensor | None) -> list[Tensor]:
    """See `gist_fast.functional.backends.interface.StreamingBackend`."""
    from gist_fast.functional.backends.kernel_passes import backward_with

    if mask_bits is not None:
        # Before the configuration is chosen: whether a guide is still there must not matter to it.
        problem = problem.decided()
    direction = "recompute" if problem.masks else "backward"
    with on_device(problem.student[ANCHORS].device):
        config = _config(direction, problem, lambda c: backward_with(c, problem, grad_loss, lse2, mask_bits))
        return backward_with(config, problem, grad_loss, lse2, mask_bits)


def mask_product(
    blocks: Sequence[Block], dims: int, mask_bits: Tensor, index: int, other: Tensor, transposed: bool
) -> Tensor:
    """See `gist_fast.functional.backends.interface.StreamingBackend`."""
    from gist_fast.functional.backends.kernel_passes import multiply_mask

    with on_device(other.device):
        return multiply_mask(blocks, mask_bits, index, other, transposed=transposed)


def _config(direction: str, problem: Problem, run: Callable[[Config], object]) -> Config:
    """The configuration of the table, or with ``GIST_FAST_AUTOTUNE=1`` the fastest known or found by `run`."""
    models = [model[ANCHORS] for model in (problem.student, problem.guide) if model]
    device = models[0].device
    default = choose_config(generation(device), max(x.element_size() for x in models))
    if not tuning.enabled() or device.type != "cuda":
        return default

    def key(direction: str) -> str:
        return tuning.make_key(
            direction,
            device=torch.cuda.get_device_name(device),
            versions=(torch.__version__, importlib.metadata.version("triton")),
            dtypes=tuple(str(x.dtype) for x in models),
            dims=(*(problem.dims or models[0].shape[1:]), models[1].shape[1] if problem.guide else 0),
            variant=" ".join(_variant(problem)),
            rows=models[0].shape[0],
            pairs=sum(block.rows * block.columns for block in problem.blocks),
        )

    def seconds(config: Config) -> float:
        from triton.testing import do_bench

        return do_bench(lambda: run(config), return_mode="median") / 1e3

    if direction != "recompute":
        return tuning.tuned(key(direction), default, direction, seconds)
    # Masks decided again must be summed in the forward pass's own steps.
    step = tuning.recall(key(_forward_direction(problem)), default).block_k
    return tuning.tuned(key(f"{direction} in steps of {step}"), tuning.with_step(default, step), direction, seconds)


def _variant(problem: Problem) -> Iterator[str]:
    """What of the loss's variants is on that changes which kernels run, or what they hold."""
    config = problem.config
    for name, on in {
        "self-guided": config.self_guided,
        "hard": config.hard,
        "groups": len(problem.groups) > 0,
        "own masks of negatives": not config.mask_negatives,
        str(config.hardness_mode): config.hardness_mode is not None,
        "weights": not problem.one_sign,
    }.items():
        if on:
            yield name


def _forward_direction(problem: Problem) -> str:
    """What the forward pass is to `gist_fast.kernels.tuning`."""
    return "guided forward" if problem.guide else "forward"


@functools.cache
def generation(device: torch.device) -> Generation:
    """The generation whose configurations a device gets; the interpreter takes any, and gets the newest common one."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return generation_of(*torch.cuda.get_device_capability(device))


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
