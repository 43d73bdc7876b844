"""The processes of one job, started by ``torchrun`` or ``accelerate launch``, doing something together.

A process that fails tells the others, so that none waits for it until a timeout.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from gist_fast.runtime.errors import InputError, WrongInput

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long processes wait for one that is at work: as long as embedding or writing may take. The job's own timeout is
some minutes, meant for a step of training. A process that is gone is noticed at once, by its closed connection."""
_kept: tuple[weakref.ref, weakref.ref] | None = None
"""The job's own group, and the one for waiting. Weakly: torch must be able to end both before the process ends."""


class Team:
    """This process and the others of its job; alone where there are none."""

    def __init__(self) -> None:
        available = dist.is_available()
        self._met_here = available and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self._met_here:
            from accelerate import PartialState

            PartialState()
        joined = available and dist.is_initialized()
        self.size = dist.get_world_size() if joined else 1
        self.rank = dist.get_rank() if joined else 0
        self._group = _patient_group() if self.size > 1 else None

    @property
    def device(self) -> str | None:
        """This process's own; None for whatever there is, where it is alone."""
        if self.size == 1:
            return None
        from accelerate import PartialState

        return str(PartialState().device)

    def part(self) -> None:
        """End the group of processes where this team made it."""
        if self._met_here:
            dist.destroy_process_group()

    def first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, on all of them.

        Raises:
            Exception: what `compute` raised; on the others a ValueError or RuntimeError with its message.
        """
        return self.together(lambda: compute() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> list[T]:
        """What each process's work gave, by rank, once all are done.

        Raises:
            Exception: what this process's work raised, or else a ValueError or RuntimeError with what another's did.
        """
        if self.size == 1:
            return [work()]
        failed: Exception | None = None
        value: Any = None
        try:
            value = work()
        except Exception as error:
            failed = error
        kind = InputError if isinstance(failed, WrongInput) else RuntimeError
        problem = failed and f"{type(failed).__name__}: {failed}"
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (problem, kind, value), group=self._group)
        if failed is not None:
            raise failed
        for rank, (problem, kind, _) in enumerate(everyone):
            if problem is not None:
                raise kind(f"process {rank} failed: {problem}")
        return [value for *_, value in everyone]

    def agree(self, name: str, value: object) -> None:
        """Check that all processes have the same.

        Raises:
            ValueError: they do not.
        """
        values = self.together(lambda: value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(f"{name}: process {rank} has another than process 0; all must have the same.")


def _patient_group() -> Any:
    """All processes of the job, connected over the host whatever the job's own backend is; made once a job."""
    global _kept
    world = dist.group.WORLD
    group = None if _kept is None or _kept[0]() is not world else _kept[1]()
    if group is None:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        _kept = (weakref.ref(world), weakref.ref(group))
    return group
