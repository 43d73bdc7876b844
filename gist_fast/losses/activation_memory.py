"""How many activations may be kept, and how many a forward pass did keep.

An activation kept for the backward pass spares a second forward pass; the budget here says for how many there is room.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from gist_fast.runtime.errors import InputError
from gist_fast.runtime.memory import GIB, free_memory, processes_here

CPU_SHARE, GPU_SHARE = 0.5, 0.8
"""Of the memory that is free, the share that "auto" takes. What else grows meanwhile (the loss, the workspace of a
matrix product, fragmentation; on a CPU all other programs) has the rest."""


class ActivationMemory:
    """A budget for kept activations, and what they have been seen to take.

    Args:
        limit: GiB, 0 or more; or ``"auto"`` for a share of what is free when a batch begins.

    Raises:
        ValueError: another value.
    """

    def __init__(self, limit: float | Literal["auto"]) -> None:
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        known = limit == "auto" or (number and 0 <= limit < math.inf)  # type: ignore[operator]
        if not known:
            raise InputError(f"activation_memory: expected 'auto', or a number of GiB of at least 0, got {limit!r}.")
        self.limit = limit
        self._per_token = 0.0
        self._trained = False
        """Whether a step was taken before: gradients' and the optimizer's memory then exists already."""

    def budget(self, model: nn.Module, device: torch.device) -> int:
        """Bytes of activations that a batch may keep now."""
        if self.limit != "auto":
            return int(float(self.limit) * GIB)
        trained = [p for p in model.parameters() if p.requires_grad]
        # Not there yet, but before the activations are gone: gradients, and at first Adam's two moments.
        coming = sum(p.nbytes * (1 if self._trained else 3) for p in trained if p.grad is None)
        self._trained = True
        if device.type == "cuda":
            return max(0, int(free_memory(device) * GPU_SHARE) - coming)
        if device.type == "cpu":
            return max(0, int(free_memory() * CPU_SHARE / processes_here()) - coming)
        return 0

    def estimate(self, tokens: int) -> float:
        """Bytes that a mini-batch of so many padded tokens keeps, by the largest rate seen; 0 before any was."""
        return self._per_token * tokens

    def observe(self, tokens: int, kept: int) -> None:
        """Learn from a mini-batch that kept `kept` bytes."""
        self._per_token = max(self._per_token, kept / max(1, tokens))


class Kept:
    """Bytes that a forward pass keeps for its backward pass."""

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def measure_kept(model: nn.Module, device: torch.device) -> Iterator[Kept]:
    """Count what the forward pass in this context keeps, the model's own weights left out."""
    kept = Kept()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        yield kept
        kept.bytes = torch.cuda.memory_allocated(device) - before
        return
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.bytes += storage.nbytes()
        # Not the tensor itself: it may be the output of the very node that saves it, which it would keep alive, and
        # the node it. Where no backward pass breaks that circle (BERT's pooler, of no use to the loss), it never goes.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield kept
