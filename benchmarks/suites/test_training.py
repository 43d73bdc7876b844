"""The mini-batch engine, the guide columns and the whole training step, on texts of mixed length.

A step of real models in the real trainers, each in a process of its own, is ``python -m benchmarks.step``.
"""

from __future__ import annotations

from collections.abc import Iterator

from gist_fast.bench.run import SUITES
from gist_fast.bench.training import TextCase

SIZES = {"tiny": (12,), "small": (64, 256), "medium": (128, 512, 2048), "large": (512, 4096, 16384)}


def cases(scale: str, device: str) -> Iterator[tuple[str, tuple[str, TextCase, str]]]:
    for kind in ("engine", "guide", "step"):
        for size in SIZES[scale]:
            case = TextCase(size, device)
            for name in SUITES[kind].competitors(case):
                yield f"{kind}-{name}-{size}".replace(" ", "_"), (kind, case, name)


def test_training(measured, measure):
    kind, case, name = measured
    measure(SUITES[kind], case, name, "whole")
