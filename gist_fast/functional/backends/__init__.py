"""The ways to compute the loss, and which of them a call gets.

``reference`` holds every score in memory; ``tiled`` streams tiles in plain PyTorch on any device; ``triton`` streams
them through fused kernels on a GPU. The first is made of differentiable torch operations, the other two stand behind
the custom operators of `gist_fast.functional.operator`. Where ``auto`` comes to ``tiled`` on a CPU, small batches need
no tiles: `gist_fast.functional.backends.dense` computes them at once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import get_args

import torch

from gist_fast.functional.backends.interface import DistillingBackend, StreamingBackend
from gist_fast.functional.choices import Backend
from gist_fast.functional.values import one_of
from gist_fast.runtime.errors import InputError

logger = logging.getLogger(__name__)

BACKENDS = get_args(Backend)
ENVIRONMENT_VARIABLE = "GIST_FAST_BACKEND"
"""Overrides ``auto``, and only that: a backend named in the call stays."""
_failures: dict[tuple[torch.device, torch.dtype], str] = {}
"""Device and type of tensors that Triton could not be run on, though nothing spoke against it, and what it said."""


def _from_environment() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def left_to_auto(requested: str) -> bool:
    """Whether nobody named a backend, in the call or in the environment."""
    return requested == "auto" and _from_environment() == "auto"


def choose_backend(requested: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that a call runs on: `requested`, or what ``auto`` comes to, for tensors of that device and type.

    Raises:
        ValueError: `requested` (or `ENVIRONMENT_VARIABLE`) is no backend, or is ``triton`` and cannot run here.
    """
    source = "backend"
    if requested == "auto" and (named := _from_environment()) != "auto":
        source, requested = ENVIRONMENT_VARIABLE, named
    if requested not in BACKENDS:
        raise InputError(f"{source}: expected {one_of(BACKENDS)}, got {requested!r}.")
    if requested == "auto":
        return _automatic(_numbered(device), dtype)
    if requested == "triton" and (reason := triton_obstacle(_numbered(device), dtype)):
        raise InputError(f"{source}: 'triton' cannot run here: {reason}. Use 'auto' or 'tiled'.")
    return requested


# What `torch.compiler.assume_constant_result` does, without the seconds that its import costs: a compiled step runs
# this while it is traced and keeps the answer, instead of tracing how a driver is asked for its GPU.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain_choice(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that ``auto`` takes for embeddings of that type on that device, and why.

    Where it is ``tiled`` on a CPU, `gist_fast.functional.backends.dense` computes small batches in its place.
    """
    device, named = _numbered(device), _from_environment()
    if named != "auto":
        return choose_backend("auto", device, dtype), f"{ENVIRONMENT_VARIABLE}={named}"
    reason = _failures.get((device, dtype)) or triton_obstacle(device, dtype)
    if device.type != "cuda" and reason is None:
        reason = "Triton's interpreter is for tests; ask for 'triton' by name to use it"
    return ("tiled", reason) if reason else ("triton", "Triton kernels can run on this GPU")


def may_fall_back(chosen: str, error: Exception) -> bool:
    """Whether a call that was left to ``auto`` and failed in Triton should be tried on ``tiled`` instead.

    Memory that ran out is no failure of Triton's, and errors about arguments are the caller's.
    """
    left_open = chosen == "triton" and _from_environment() == "auto"
    return left_open and not isinstance(error, (torch.OutOfMemoryError, ValueError, TypeError))


def remember_failure(device: torch.device, dtype: torch.dtype, error: Exception) -> None:
    """From now on ``auto`` takes ``tiled`` for such tensors on that device, which is said once.

    To be called once ``tiled`` could do what failed: an error that it meets too is not Triton's.
    """
    device = _numbered(device)
    if (device, dtype) not in _failures:
        message = " ".join(str(error).split())[:500]
        _failures[device, dtype] = f"Triton's kernels failed here ({type(error).__name__}: {message})"
        _automatic.cache_clear()
        choose_backend("auto", device, dtype)


def streaming_backend(name: str) -> StreamingBackend:
    """The module behind the name of a streaming backend, imported at its first use."""
    # Import statements, because torch.compile traces through them and not through importlib.
    if name == "triton":
        from gist_fast.functional.backends import triton

        return triton
    from gist_fast.functional.backends import tiled

    return tiled


def distilling_backend(name: str) -> DistillingBackend:
    """The module that distils behind the name of a streaming backend."""
    if name == "triton":
        from gist_fast.functional.backends import kernel_distillation

        return kernel_distillation
    from gist_fast.functional.backends import tiled_distillation

    return tiled_distillation


@functools.cache
def triton_obstacle(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on tensors of that device and type, or None where they can."""
    if importlib.util.find_spec("gist_fast.functional.backends.triton") is None:
        return "this version carries no Triton kernels"
    from gist_fast.functional.backends import triton

    return triton.obstacle(torch.device(device), dtype)


def _numbered(device: torch.device | str) -> torch.device:
    """The device that tensors are on; of several GPUs, which may differ, the current one where none is named."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _automatic(device: torch.device, dtype: torch.dtype) -> str:
    backend, reason = explain_choice(device, dtype)
    if backend == "tiled" and (device.type == "cuda" or (device, dtype) in _failures):
        # Once for each device and type, because this function is cached.
        logger.warning("backend 'auto' falls back to 'tiled' on this GPU: %s.", reason)
    return backend
