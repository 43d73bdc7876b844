"""Profiler regions: named stretches of a training step, as a profile shows them.

A region is marked where it happens (``with within(GUIDE): ...``, or ``@named(GUIDE)`` on a function), and the mark is a
``record_function`` range while torch's profiler records. When none does, it costs the look at one flag; code under
``torch.compile`` is traced as if it were not there. Regions may lie in each other: the inner one counts, as
`gist_fast.profiling.trace` reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

P = ParamSpec("P")
T = TypeVar("T")

WAITING = "waiting for data"
TOKENISE = "tokenise"
GUIDE = "guide"
STUDENT_FORWARD = "student forward"
LOSS_FORWARD = "loss forward"
LOSS_BACKWARD = "loss backward"
STUDENT_FORWARD_AGAIN = "student forward again"
STUDENT_BACKWARD = "student backward"
OPTIMIZER = "optimizer"

MEANINGS = {
    WAITING: "until the next batch is there, tokenising by this process left out",
    TOKENISE: "texts to tokens, the student's and the guide's (none of it here, where dataloader workers do it)",
    GUIDE: "the guide's embeddings of the batch",
    STUDENT_FORWARD: "the student's embeddings of the batch",
    LOSS_FORWARD: "from embeddings to the loss",
    LOSS_BACKWARD: "from the loss to the gradient by the embeddings",
    STUDENT_FORWARD_AGAIN: "gradient caching's second pass, of mini-batches whose activations were not kept",
    STUDENT_BACKWARD: "from the gradient by the embeddings to that by the weights",
    OPTIMIZER: "clipping, the optimizer's and the schedule's step",
}
"""What each region covers, in the order of a step."""
NAMES = tuple(MEANINGS)
OTHER = "other"
"""What of a step no region covers."""
IDLE = "idle"
"""What of a step the device does nothing in."""


def step_name(number: int | str) -> str:
    """The region of a whole step of a profiled run; the first is 1."""
    return f"step {number}"


_NOTHING: AbstractContextManager[None] = nullcontext()


def recording() -> bool:
    """Whether a profiler records now, in code that is not being compiled."""
    # In that order: a compiled function is not to be compiled again because a profiler starts.
    return not torch.compiler.is_compiling() and profiler._is_profiler_enabled


def within(name: str) -> AbstractContextManager:
    """A context that belongs to the region `name`."""
    return profiler.record_function(name) if recording() else _NOTHING


def named(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function all of which belongs to the region `name`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            with within(name):
                return function(*args, **kwargs)

        return wrapped

    return decorate


def follow_backward(loss: Tensor, embeddings: Sequence[Tensor]) -> None:
    """Tell `LOSS_BACKWARD` from `STUDENT_BACKWARD` in a backward pass that is one for both.

    The first lasts from the gradient by the loss to the first gradient by an embedding (autograd runs what was computed
    last first, so that all of the loss then lies behind), the second to the end of the pass. Does nothing where no
    profiler records.

    Args:
        loss: 0-d.
        embeddings: the student's, ``[B, D]`` each, that it was computed from.
    """
    if not recording() or not loss.requires_grad:
        return
    # What a pass that failed may have left.
    _SWITCH.off()

    def of_loss(gradient: Tensor) -> None:
        # Runs when the whole pass is over.
        torch.autograd.Variable._execution_engine.queue_callback(_SWITCH.off)
        _SWITCH.to(LOSS_BACKWARD)

    loss.register_hook(of_loss)
    for embedding in embeddings:
        if embedding.requires_grad:
            embedding.register_hook(lambda _: _SWITCH.to(STUDENT_BACKWARD))


class _Switch:
    """At most one open region, where the next one's begin is the end of the last one."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._open: profiler.record_function | None = None

    def to(self, name: str) -> None:
        if name == self._name:
            return
        self.off()
        if recording():
            self._name, self._open = name, profiler.record_function(name)
            self._open.__enter__()

    def off(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._name = self._open = None


_SWITCH = _Switch()
"""One for all losses of a backward pass, which take turns where a decorator calls one several times."""
