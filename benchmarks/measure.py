"""Timing on machines that are never quiet: alternate what is compared, and take ratios round by round."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of ``self / other``, paired round by round."""
        ratios = sorted(a / b for a, b in zip(self.rounds, other.rounds, strict=True))
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high


def alternate(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time each function once a round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if k > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes of resident memory that a call adds at its peak, sampled every few milliseconds."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak - before
