"""What a suite is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gist_fast.bench.timing import Parts

SCALES = ("small", "medium", "large")
"""Within a minute, within five, and as long as it takes."""


@dataclass(frozen=True)
class Plan:
    """What is asked of a suite."""

    sizes: tuple[int, ...]
    """Empty: the suite's own."""
    device: str = "cpu"
    dtype: str = "float32"
    scale: str = "medium"
    """One of `SCALES`."""

    def sizes_of(self, medium: Sequence[int], small: int) -> tuple[int, ...]:
        """What was asked for; else of a suite's own ones the first `small`, all, or four times each."""
        if self.sizes:
            return self.sizes
        chosen = {"small": medium[:small], "medium": medium, "large": [4 * size for size in medium]}
        return tuple(chosen[self.scale])


class Case(Protocol):
    """Something to compute."""

    @property
    def size(self) -> int: ...

    def as_dict(self) -> dict[str, Any]: ...


class Suite(Protocol):
    """Cases, competitors, and the calls to time. It travels to other processes: no state."""

    name: str
    title: str
    isolated: bool
    """Whether memory is measured in a process of its own by `build`; else `memory` tells."""
    grows: float
    """The power of the size that an iteration's time is expected to grow with, at most."""
    baseline: str | None
    """The competitor that ratios are taken to."""
    looks_at: tuple[str, ...]
    """What of a plan its cases depend on, beside the device: ``sizes``, ``dtype``."""

    def cases(self, plan: Plan) -> Sequence[Any]: ...

    def competitors(self, case: Any) -> Sequence[str]:
        """In the order of the table."""

    def obstacle(self, case: Any, name: str) -> str | None:
        """Why a competitor cannot compute a case."""

    def least_memory(self, case: Any, name: str) -> float:
        """Bytes, a lower bound by formula."""

    def check(self, case: Any, name: str) -> None:
        """Raise `gist_fast.bench.cases.WrongResult` unless the competitor's result is the reference's."""

    def check_whole(self, case: Any, name: str) -> None:
        """The same at the case's own size, as far as that can be afforded."""

    def build(self, case: Any, name: str) -> Parts:
        """What one iteration does."""

    def device_of(self, case: Any) -> str: ...

    def memory(self, case: Any, name: str) -> int | None:
        """Bytes, of a suite that is not `isolated`."""
