"""What a suite is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gist_fast.bench.timing import Parts

SCALES = ("small", "medium", "large")
"""Within a minute, within five, and as long as it takes."""


@dataclass(frozen=True)
class Scope:
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


class Suite:
    """Cases, competitors, and the calls to time. It travels to other processes: no state.

    A case has a ``size`` (rows of a batch, texts; 0 where nothing grows), a ``device`` and an ``as_dict``.
    """

    name: str
    title: str
    isolated = True
    """Whether memory is measured in a process of its own by `build`; else `memory` tells."""
    grows = 1.0
    """The power of the size that an iteration's time is expected to grow with, at most."""
    baseline: str | None = "gist_fast"
    """The competitor that ratios are taken to."""
    looks_at: tuple[str, ...] = ("sizes",)
    """What of a scope its cases depend on, beside the device: ``sizes``, ``dtype``."""

    def cases(self, scope: Scope) -> Sequence[Any]:
        raise NotImplementedError

    def competitors(self, case: Any) -> Sequence[str]:
        """In the order of the table."""
        raise NotImplementedError

    def obstacle(self, case: Any, name: str) -> str | None:
        """Why a competitor cannot compute a case."""
        return None

    def has_own_process(self, case: Any) -> bool:
        """Whether a competitor is checked and its memory measured in its own process. On a card neither needs one."""
        return self.isolated and not case.device.startswith("cuda")

    def least_memory(self, case: Any, name: str) -> float:
        """Bytes, a lower bound by formula."""
        return 0.0

    def check(self, case: Any, name: str) -> None:
        """Raise `gist_fast.bench.cases.WrongResult` unless the competitor's result is the reference's."""
        raise NotImplementedError

    def check_whole(self, case: Any, name: str) -> None:
        """The same at the case's own size, as far as that can be afforded and `check` has not seen all of it."""

    def build(self, case: Any, name: str) -> Parts:
        """What one iteration does."""
        raise NotImplementedError

    def memory(self, case: Any, name: str) -> int | None:
        """Bytes, of a suite that is not `isolated`."""
        return None
