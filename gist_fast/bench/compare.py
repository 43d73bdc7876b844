"""What moved from one run of the benchmarks to another, against the noise that both measured.

A time moved if the logarithm of new over old is larger than the spreads of both runs together, each the distance of the
quartiles of its logarithms over rounds. Where both runs timed a matrix product beside it, that is shown first: if it
moved, the machine did. Memory has no rounds: it moved by more than `MEMORY_NOISE`. An outcome moved if it changed to or
from one in which something went wrong; for want of time nothing went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gist_fast.bench.results import COUNTED, FAILED, NOT_RUN, OUT_OF_MEMORY, WRONG, Results, Row
from gist_fast.bench.timing import NOT_SEEN, Timing

OUTCOME = "outcome"
ENDED_BADLY = (WRONG, FAILED, OUT_OF_MEMORY)
"""An outcome moved if it changed to one of these, or from it."""
NOT_COMPARABLE = "not comparable"
"""Of an outcome that says nothing of the competitor, such as that there was no time left for it."""
MEMORY_NOISE = 0.05
SMALLEST_MEMORY = 2 << 20
"""Bytes: a difference of less is the allocator's."""
FACTS = (
    "device", "cpu", "gpu", "threads", "OMP_WAIT_POLICY", "platform", "python", "torch", "triton",
    "sentence-transformers", "transformers", "gist_fast", "commit",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One figure in two runs."""

    suite: str
    size: int
    what: str
    figure: str
    """A part of the time, or ``memory``, or ``outcome``."""
    old: float | str
    new: float | str
    ratio: float | None
    """new / old"""
    noise: float | None
    """What the ratio would have to leave 1 by, either way, on the logarithm; None where it is not known."""

    @property
    def moved(self) -> bool:
        if self.figure == OUTCOME:
            return NOT_RUN not in (self.old, self.new) and not {self.old, self.new}.isdisjoint(ENDED_BADLY)
        if self.ratio is None:
            return False
        return self.noise is not None and abs(math.log(self.ratio)) > self.noise

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            changed = f"was {self.old}, is {self.new}"
            return changed if self.moved else f"{NOT_COMPARABLE}: {changed}"
        if not self.moved:
            return NOT_SEEN
        factor = max(self.ratio, 1 / self.ratio)
        words = ("less", "more") if self.figure == "memory" else ("faster", "slower")
        return f"{factor:.2f}x {words[self.ratio > 1]}"


@dataclass(frozen=True)
class Comparison:
    """Two runs."""

    facts: list[tuple[str, Any, Any]]
    """Those that differ: name, old, new."""
    changes: list[Change]
    only_old: list[str]
    only_new: list[str]


def compare(old: Results, new: Results) -> Comparison:
    """Every figure that both hold."""
    names = [*FACTS, *sorted((set(old.machine) | set(new.machine)) - set(FACTS))]
    facts = [(name, old.machine.get(name), new.machine.get(name)) for name in names]
    before, after = ({row.key: row for row in results.rows} for results in (old, new))
    changes = _rates(old, new)
    for key, row in after.items():
        if key in before:
            changes += _changes(before[key], row)
    return Comparison(
        [fact for fact in facts if fact[1] != fact[2]],
        changes,
        [_label(row) for key, row in before.items() if key not in after],
        [_label(row) for key, row in after.items() if key not in before],
    )


def _changes(old: Row, new: Row) -> list[Change]:
    found = []
    if old.outcome != new.outcome:
        found.append(Change(new.suite, new.size, new.what, OUTCOME, old.outcome, new.outcome, None, None))
    if not {old.outcome, new.outcome} <= set(COUNTED):
        return found
    found += [
        _of_times(new.suite, new.size, new.what, part, old.seconds[part], new.seconds[part])
        for part in new.seconds
        if part in old.seconds
    ]
    if old.memory is not None and new.memory is not None and max(old.memory, new.memory) >= SMALLEST_MEMORY:
        a, b = max(old.memory, 1), max(new.memory, 1)
        noise = max(MEMORY_NOISE, SMALLEST_MEMORY / min(a, b))
        found.append(Change(new.suite, new.size, new.what, "memory", float(a), float(b), b / a, noise))
    return found


def _of_times(suite: str, size: int, what: str, part: str, old: Sequence[float], new: Sequence[float]) -> Change:
    a, b = Timing(tuple(old)), Timing(tuple(new))
    noise = a.spread + b.spread
    ratio = b.median / a.median
    return Change(suite, size, what, part, a.median, b.median, ratio, noise if math.isfinite(noise) else None)


def _rates(old: Results, new: Results) -> list[Change]:
    """The matrix products that stood beside the loss: all rounds of a type together."""

    def by_type(results: Results) -> dict[tuple[str, float], list[float]]:
        found: dict[tuple[str, float], list[float]] = {}
        for rate in results.rates:
            found.setdefault((rate["case"]["dtype"], rate["flops"]), []).extend(rate["seconds"])
        return found

    before, after = by_type(old), by_type(new)
    return [
        _of_times("machine", 0, f"matrix product, {key[0]}", "whole", before[key], after[key])
        for key in after
        if key in before
    ]


def _label(row: Row) -> str:
    return f"{row.suite} {row.size} {row.what}"
