"""Timing on machines that are never quiet: all are timed once a round, and ratios are taken within rounds.

A ratio is worth printing only if it is larger than its own noise. `Ratio.seen` says so, on logarithms, so that a and b
may change places: with the quartiles q1, q2, q3 of ln(a / b) over the rounds, a difference is seen if there are at
least `LEAST_ROUNDS` rounds and the spread q3 - q1 is smaller than the difference abs(q2).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST_ROUNDS = 3
"""Fewer say nothing about their spread."""
CHEAP = 1.0
"""Seconds: a competitor whose least rounds take no longer than this is always timed, whatever is left of a budget."""
COLD = 5.0
"""Seconds: a first iteration of no more is run again whatever the budget: it may have been long for being first."""
L2_SPARE = 4
"""The L2 cache is overwritten this many times over between two calls on a GPU."""
NOT_SEEN = "no difference seen"
NO_TIME = "the time was up"

Call = Callable[[], object]
Parts = Mapping[str, Call]
"""What one iteration does, in this order, each timed by itself: ``{"forward": ..., "backward": ...}`` or one part."""
BOTH = "both"
"""The parts of an iteration together, where there are several."""


def log_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the logarithms of positive numbers."""
    import numpy as np

    low, middle, high = np.quantile(np.log(values), (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


@dataclass(frozen=True)
class Ratio:
    """Quartiles of a ratio over rounds."""

    low: float
    median: float
    high: float
    rounds: int

    @property
    def seen(self) -> bool:
        """Whether the difference from 1 is larger than the spread."""
        return self.rounds >= LEAST_ROUNDS and math.log(self.high / self.low) < abs(math.log(self.median))

    def __str__(self) -> str:
        return f"{_figure(self.median)}x ({_figure(self.low)} to {_figure(self.high)})" if self.seen else NOT_SEEN

    def scaled(self, factor: float) -> Ratio:
        return Ratio(self.low * factor, self.median * factor, self.high * factor, self.rounds)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles of the logarithms: 0.1 is about a tenth. Infinite where rounds are too few."""
        low, _, high = log_quartiles(self.rounds)
        return high - low if len(self.rounds) >= LEAST_ROUNDS else math.inf

    def against(self, other: Timing) -> Ratio:
        """``self / other``, over the rounds that both took part in."""
        ratios = [a / b for a, b in zip(self.rounds, other.rounds, strict=False)]
        low, middle, high = map(math.exp, log_quartiles(ratios))
        return Ratio(low, middle, high, len(ratios))


@dataclass
class Iterations:
    """What one competitor's iterations took, by part; or why it took none."""

    parts: dict[str, Timing] = field(default_factory=dict)
    skipped: str = ""


class Stopwatch:
    """Seconds of a call: by the clock on a CPU; on a GPU by device events, with nothing of use in its L2 cache."""

    def __init__(self, device: str = "cpu") -> None:
        self._cuda, self._device = device.startswith("cuda"), device
        self._flush: Any = None
        if self._cuda:
            import torch

            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
            self._flush = torch.empty(max(L2_SPARE * cache, 64 << 20), dtype=torch.uint8, device=device)

    def __call__(self, function: Call) -> float:
        if not self._cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        import torch

        # Events are recorded on the current device, which need not be this one.
        with torch.cuda.device(self._device):
            self._flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3


def time_iterations(
    competitors: Mapping[str, Parts],
    *,
    stopwatch: Callable[[Call], float],
    budget: float = math.inf,
    beyond: float = math.inf,
    most: int = 15,
    least: int = LEAST_ROUNDS,
    always: Collection[str] = (),
    out_of_time: Callable[[], bool] = lambda: False,
) -> dict[str, Iterations]:
    """Time competitors round by round, within a budget.

    Each is warmed up first. Then the fast take part in `most` rounds and slow ones in as many as their share of the
    budget allows, `least` at least; the slowest, for whom those alone are more than is left and more than `CHEAP`, are
    left out. The order within a round is turned round from one to the next.

    Args:
        budget: seconds for all rounds.
        beyond: seconds after which nobody takes more iterations than `least`.
        always: who is never left out for the budget's sake, such as the one that ratios are taken to.
        out_of_time: asked before each iteration; once it is true, what was had until then is all.
    """
    iterations = {name: Iterations() for name in competitors}
    expected: dict[str, float] = {}
    spare = max(budget, COLD)
    for name in sorted(competitors, key=lambda name: name not in always):
        if out_of_time():
            iterations[name].skipped = NO_TIME
            continue
        parts = competitors[name]
        seconds = sum(_iteration(parts, stopwatch).values())
        # A first iteration compiles and fills caches: what is to be expected is the second. After long ones, which may
        # have been long for nothing else, second ones take no more than the budget (or `COLD`) once over.
        long = seconds * least > max(budget, CHEAP)
        if not (long and seconds > spare) and not out_of_time():
            seconds = sum(_iteration(parts, stopwatch).values())
            spare -= seconds if long else 0.0
        expected[name] = seconds
    left, rounds = budget, {}
    for name, seconds in sorted(expected.items(), key=lambda item: (item[0] not in always, item[1])):
        if seconds * least > max(left, CHEAP) and name not in always:
            iterations[name].skipped = too_slow(seconds, left, least)
            continue
        rounds[name] = least
        left = max(0.0, left - least * seconds)
    left = min(left, max(0.0, beyond - least * sum(expected[name] for name in rounds)))
    for place, name in enumerate(sorted(rounds, key=expected.__getitem__)):
        share = left / (len(rounds) - place)
        more = most - least if expected[name] * (most - least) <= share else int(share / expected[name])
        rounds[name] += max(0, more)
        left = max(0.0, left - more * expected[name])
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in rounds}
    for number in range(max(rounds.values(), default=0)):
        names = [name for name in competitors if rounds.get(name, 0) > number]
        for name in names if number % 2 == 0 else reversed(names):
            if not out_of_time():
                taken[name].append(_iteration(competitors[name], stopwatch))
    for name, rows in taken.items():
        if rows:
            iterations[name].parts = {part: Timing(tuple(row[part] for row in rows)) for part in rows[0]}
        else:
            iterations[name].skipped = NO_TIME
    return iterations


def to_skip(seconds: float, budget: float) -> bool:
    """Whether a competitor that took so long for an iteration in another process is skipped here.

    Here an iteration may be much shorter than there (sentence-transformers' losses take a third), so there is one to be
    warmed up by as long as two of there fit.
    """
    return 2 * seconds > budget and LEAST_ROUNDS * seconds > CHEAP


def too_slow(seconds: float, left: float, least: int = LEAST_ROUNDS) -> str:
    """Why somebody whose iteration takes so long is left out where only so much time is left."""
    left = max(0.0, left)
    return f"an iteration takes {seconds:.1f} s, and {least} of them more than the {left:.1f} s that are left for it"


def _iteration(parts: Parts, stopwatch: Callable[[Call], float]) -> dict[str, float]:
    seconds = {name: stopwatch(call) for name, call in parts.items()}
    return {**seconds, BOTH: sum(seconds.values())} if len(seconds) > 1 else seconds


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.1f}"
