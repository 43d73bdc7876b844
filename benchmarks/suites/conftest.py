"""``--scale``, ``--bench-device``, and the one way that all suites go: fit, check, memory, time."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from typing import Any

import pytest

from gist_fast.bench.isolated import LIMIT_SHARE, check_and_measure, in_own_process
from gist_fast.bench.results import OK
from gist_fast.bench.run import does_not_fit
from gist_fast.bench.timing import Parts, Stopwatch
from gist_fast.runtime.memory import free_memory

SCALES = ("tiny", "small", "medium", "large")
PATIENCE = {"tiny": 60.0, "small": 60.0, "medium": 180.0, "large": 600.0}
ROUNDS = {"tiny": 1, "small": 5, "medium": 7, "large": 9}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gist_fast")
    group.addoption("--scale", choices=SCALES, default="small", help="sizes: seconds, minutes, or hours on a laptop")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's `cases(scale, device)` says what it measures: pairs of an identifier and a value."""
    if "measured" in metafunc.fixturenames:
        scale, device = metafunc.config.getoption("--scale"), metafunc.config.getoption("--bench-device")
        found = dict(metafunc.module.cases(scale, device))
        metafunc.parametrize("measured", list(found.values()), ids=list(found))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_scale_unit(unit: str) -> tuple[str, float]:
    """Milliseconds in all tables: each would choose a unit of its own."""
    return ("m", 1e3) if unit == "seconds" else ("", 1.0)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Measure one competitor on one case; skips with the reason where it cannot take part."""
    scale = request.config.getoption("--scale")

    def run(suite: Any, case: Any, name: str, part: str) -> None:
        reason = suite.obstacle(case, name)
        if reason is not None:
            pytest.skip(f"{name}: {reason}")
        device = case.device
        free, least = free_memory(device), suite.least_memory(case, name)
        limit = int(free * LIMIT_SHARE)
        if least > limit:
            pytest.skip(f"out of memory: {name} {does_not_fit(least, free)}")
        if suite.isolated and not device.startswith("cuda"):
            found = in_own_process(suite, case, name, limit, PATIENCE[scale])
        else:
            found = check_and_measure(suite, case, name)
        if found.outcome in ("out of memory", "not run"):
            pytest.skip(f"{found.outcome}: {name}: {found.why}")
        assert found.outcome == OK, found
        # Within a group its table gives ratios, however noisy: each competitor has one of its own, in which the problem
        # is told whole and comes first, so that they stand one below the other.
        told = " ".join(f"{key}={_flat(value)}" for key, value in case.as_dict().items() if key != "models")
        benchmark.group = f"{suite.name} {told} {part}: {name}"
        benchmark.extra_info.update(case=case.as_dict(), what=name, part=part, memory=found.memory)
        time_part(benchmark, suite.build(case, name), part, device, ROUNDS[scale])

    return run


def _flat(value: object) -> str:
    return "+".join(value) if isinstance(value, (list, tuple)) else str(value)


def time_part(benchmark: Any, parts: Parts, part: str, device: str, rounds: int) -> None:
    """Give pytest-benchmark one part of an iteration, those before it untimed; on a GPU device events too."""
    names = list(parts)
    timed = names if part not in parts else [part]
    before = [] if part not in parts else names[: names.index(part)]

    def setup() -> None:
        for name in before:
            parts[name]()
        if device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()

    def iteration() -> None:
        for name in timed:
            parts[name]()
        if device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()

    benchmark.pedantic(iteration, setup=setup, rounds=rounds, iterations=1, warmup_rounds=1)
    if device.startswith("cuda"):
        stopwatch = Stopwatch(device)
        events = []
        for _ in range(rounds):
            setup()
            events.append(stopwatch(lambda: [parts[name]() for name in timed]))
        benchmark.extra_info["event_seconds"] = events
