"""All suites within one budget of time: who fits, who is right, what memory they take, and then who is how fast."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gist_fast.bench.growth import fit_power, fit_split
from gist_fast.bench.isolated import LIMIT_SHARE, TAKEN, check_and_measure, in_own_process, start_server
from gist_fast.bench.loss import LossSuite, matmul
from gist_fast.bench.results import (
    COUNTED,
    FAILED,
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    UNSUPPORTED,
    WHOLE,
    WRONG,
    Results,
    Row,
)
from gist_fast.bench.start import StartSuite
from gist_fast.bench.suite import Scope, Suite
from gist_fast.bench.timing import (
    CHEAP,
    LEAST_ROUNDS,
    NO_TIME,
    Iterations,
    Parts,
    Stopwatch,
    time_iterations,
    to_skip,
    too_slow,
)
from gist_fast.bench.training import EngineSuite, GuideSuite, StepSuite
from gist_fast.runtime.environment import machine
from gist_fast.runtime.errors import InputError, nearest
from gist_fast.runtime.memory import free_memory

_ALL: tuple[Suite, ...] = (
    LossSuite(),
    LossSuite("self", "The loss, guided by the student itself: embeddings to gradients", "self"),
    LossSuite(
        "unguided", "The loss without a guide, anchors with positives alone: embeddings to gradients", "none", ("ap",)
    ),
    EngineSuite(),
    GuideSuite(),
    StepSuite(),
    StartSuite(),
)
SUITES = {suite.name: suite for suite in _ALL}
ON_A_CARD = ("self", "unguided")
"""Suites that are there for peers which need a card: elsewhere they are measured only if they are asked for."""
WEIGHTS = {"loss": 6.0, "self": 2.0, "unguided": 2.0, "engine": 2.5, "guide": 1.5, "step": 3.5, "start": 2.0}
"""How the budget is shared; a suite of another name counts 1."""
BUDGETS = {"small": 45.0, "medium": 225.0, "large": 1800.0}
"""Seconds that are planned for, by scale."""
OVERRUN = 1.25
"""So many times what was planned for, and nothing more is begun."""
SMALLEST_MEMORY = 1 << 20
"""Bytes: growth of less is that of allocators."""
PATIENCE = 30.0
"""Seconds, at least, until a first iteration is given up: a compiler may be at work in it."""
FIRST_CASE = 12
"""The first case of a suite gets as much of its budget as this many more: libraries load and compilers work in it, and
it is the one that slow peers can do."""
ALREADY = " already"
"""How the reason ends of who was not tried, since a smaller case told."""
_MATMUL = "matmul"
Say = Callable[[str], None]
SecondsLeft = Callable[[], float]
"""Until a run begins nothing more; what is under way then aside."""


@dataclass(frozen=True)
class Candidate:
    """A competitor that fits and is right."""

    row: Row
    seconds: float
    """Of an iteration, as `gist_fast.bench.isolated.Outcome` has it; 0 if it took none."""
    smaller: Candidate | None = None
    """The same competitor in the case before."""

    @property
    def iteration(self) -> float:
        """Seconds of an iteration: of its rounds, where it was timed."""
        timing = self.row.timing()
        return timing.median if timing else self.seconds


def suites_named(names: str | None, device: str = "cpu") -> list[Suite]:
    """Suites by their names with commas between; None: all that say something on the device.

    Raises:
        InputError: there is no such suite.
    """
    if names is None:
        return [suite for suite in _ALL if device.startswith("cuda") or suite.name not in ON_A_CARD]
    chosen = []
    for name in (part.strip() for part in names.split(",")):
        if name not in SUITES:
            raise InputError(f"--suite: expected any of {', '.join(SUITES)}, got {name!r}{nearest(name, SUITES)}.")
        chosen.append(SUITES[name])
    return list(dict.fromkeys(chosen))


def run(
    suites: Sequence[Suite],
    scope: Scope,
    *,
    command: str,
    budget: float,
    rounds: int = 15,
    say: Say = lambda text: None,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure.

    Args:
        command: that the figures came from.
        budget: seconds, for all suites; the start of what they run in does not count.
        rounds: of a fast competitor, at most.
        say: told what is being measured.
        keep: given what there is so far whenever a case is done.
    """
    started = time.monotonic()
    results = Results(machine(scope.device), command)
    if not scope.device.startswith("cuda") and any(suite.isolated for suite in suites):
        start_server()
    begin = time.monotonic()

    def seconds_left() -> float:
        return begin + OVERRUN * budget - time.monotonic()

    for place, suite in enumerate(suites):
        left = budget - (time.monotonic() - begin)
        share = _weight(suite) / sum(map(_weight, suites[place:]))
        for _ in _run_suite(suite, scope, results, max(5.0, left * share), seconds_left, rounds, say):
            results.fits = fits(results.rows)
            results.seconds = time.monotonic() - started
            keep(results)
    return results


def _weight(suite: Suite) -> float:
    return WEIGHTS.get(suite.name, 1.0)


def fits(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How time and memory of every competitor grow with the size."""
    found: list[dict[str, Any]] = []
    for suite, what in dict.fromkeys((row.suite, row.what) for row in rows):
        own = [row for row in rows if (row.suite, row.what) == (suite, what) and row.outcome in COUNTED]
        times = [(row.size, timing.median) for row in own if (timing := row.timing()) is not None]
        memory = [(row.size, float(row.memory)) for row in own if row.memory and row.memory >= SMALLEST_MEMORY]
        for quantity, points in (("time", times), ("memory", memory)):
            sizes, costs = [size for size, _ in points], [cost for _, cost in points]
            power = fit_power(sizes, costs) if points else None
            if power is None:
                continue
            split = fit_split(sizes, costs)
            entry = {"suite": suite, "what": what, "quantity": quantity, "largest": max(sizes)}
            found.append({**entry, "power": asdict(power), "split": split and split.as_dict()})
    return found


def _run_suite(
    suite: Suite, scope: Scope, results: Results, budget: float, seconds_left: SecondsLeft, rounds: int, say: Say
) -> Iterator[None]:
    begin = time.monotonic()
    cases = list(suite.cases(scope))
    stopwatch = Stopwatch(scope.device if suite.isolated else "cpu")
    # The larger a case, the more of the budget it gets; the first one has more to do than its size says.
    floor = max(1.0, budget / (4 * len(cases)))
    weights = [1.0 + FIRST_CASE, *(place + 1.0 for place in range(1, len(cases)))]
    last: dict[str, Candidate] = {}
    for place, case in enumerate(cases):
        # However long the cases before took, each has a quarter of an even share, until the run ends.
        left = max(floor, budget - (time.monotonic() - begin))
        share = max(floor, left * weights[place] / sum(weights[place:]))
        beyond = share if place else max(floor, left / (sum(weights) - FIRST_CASE))
        say(f"{suite.name} {case.size or ''}".rstrip() + " ...")
        candidates: dict[str, Candidate] = {}
        for name in suite.competitors(case):
            # Ours may take from the cases to come: without it no row says anything.
            allowed = left if name == suite.baseline else share
            candidates[name] = _qualify(suite, case, name, allowed, last.get(name), seconds_left)
        last = candidates
        # What qualifying took is not taken from the rounds, as long as the suite has time left.
        share = max(floor, min(share, budget - (time.monotonic() - begin)))
        _time(suite, case, candidates, results, stopwatch, share, beyond, seconds_left, rounds)
        results.rows += [candidate.row for candidate in candidates.values()]
        yield


def _qualify(
    suite: Suite, case: Any, name: str, budget: float, smaller: Candidate | None, seconds_left: SecondsLeft
) -> Candidate:
    """Whether a competitor fits and is right, and what memory it takes."""
    row = Row(suite.name, case.as_dict(), case.size, name)

    def ends(outcome: str, why: str, seconds: float = 0.0) -> Candidate:
        row.outcome, row.why = outcome, why
        return Candidate(row, seconds, smaller and replace(smaller, smaller=None))

    reason = suite.obstacle(case, name)
    if reason is not None:
        return ends(UNSUPPORTED, reason)
    free, least = free_memory(case.device), suite.least_memory(case, name)
    limit = int(free * LIMIT_SHARE)
    if least > limit:
        row.least_memory = least
        return ends(OUT_OF_MEMORY, does_not_fit(least, free))
    if smaller is not None and smaller.row.outcome in (WRONG, FAILED, OUT_OF_MEMORY, NOT_RUN):
        # The size at which it was so first, however many were not tried since.
        why = smaller.row.why if smaller.row.why.endswith(ALREADY) else f"at B {smaller.row.size}{ALREADY}"
        return ends(smaller.row.outcome, why)
    expected = _expected(smaller, case.size, suite.grows, baseline=name == suite.baseline)
    if expected * LEAST_ROUNDS > max(budget, CHEAP):
        why = f"an iteration would take some {expected:.1f} s, and {LEAST_ROUNDS} of them more than the "
        why += f"{budget:.1f} s for it"
        return ends(NOT_RUN, why, expected)
    if seconds_left() <= 0:
        return ends(NOT_RUN, NO_TIME)
    if suite.has_own_process(case):
        # Whoever hangs leaves half of a run's time to those that have qualified already.
        patience = min(max(PATIENCE, budget), seconds_left() * (1.0 if name == suite.baseline else 0.5))
        outcome = in_own_process(suite, case, name, limit, patience, known_right=smaller is not None, budget=budget)
    else:
        outcome = check_and_measure(suite, case, name, budget=budget, patience=seconds_left())
    row.memory = outcome.memory
    return ends(outcome.outcome, outcome.why, outcome.seconds)


def does_not_fit(least: float, free: int) -> str:
    """Why somebody who needs so many bytes at least is not tried where so many are free."""
    return f"needs {least / 2**30:.1f} GiB at least, by formula; {free / 2**30:.1f} GiB are free, of which {TAKEN}"


def _expected(smaller: Candidate | None, size: int, grows: float, *, baseline: bool = False) -> float:
    """Seconds of an iteration by those of smaller cases, at least; 0 where they say nothing.

    It grows on as it grew between the last two, by a power from 1 to `grows`. Of one alone that power is not known: by
    the largest, a small case that is all overhead would say far too much, on which the baseline is not left out.
    """
    if smaller is None or not smaller.row.size or size <= smaller.row.size:
        return 0.0
    before = smaller.smaller
    if before is not None and 0 < before.row.size < smaller.row.size and min(before.iteration, smaller.iteration) > 0:
        seen = math.log(smaller.iteration / before.iteration) / math.log(smaller.row.size / before.row.size)
        power = min(max(seen, 1.0), grows)
    elif baseline:
        return 0.0
    else:
        power = grows
    return smaller.iteration * (size / smaller.row.size) ** power


def _time(
    suite: Suite,
    case: Any,
    candidates: dict[str, Candidate],
    results: Results,
    stopwatch: Stopwatch,
    budget: float,
    beyond: float,
    seconds_left: SecondsLeft,
    rounds: int,
) -> None:
    """Time all that are left, and write down what they took; `budget` and `beyond` as `time_iterations` has them."""
    calls: dict[str, Parts] = {}
    for name, candidate in candidates.items():
        if candidate.row.outcome != OK:
            continue
        if to_skip(candidate.seconds, budget) and name != suite.baseline:
            candidate.row.outcome, candidate.row.why = NOT_RUN, too_slow(candidate.seconds, budget - candidate.seconds)
            continue
        calls[name] = suite.build(case, name)
    work = 0.0
    if isinstance(suite, LossSuite) and calls:
        calls[_MATMUL], work = matmul(case, suite.matmul_side(case))
    iterations = time_iterations(
        calls,
        stopwatch=stopwatch,
        budget=budget,
        beyond=beyond,
        most=rounds,
        always=(suite.baseline or "", _MATMUL),
        out_of_time=lambda: seconds_left() <= 0,
    )
    product = iterations.get(_MATMUL, Iterations()).parts.get(WHOLE)
    if product is not None:
        results.rates.append({"case": case.as_dict(), "flops": work, "seconds": list(product.rounds)})
    for name, timed in iterations.items():
        if name == _MATMUL:
            continue
        row = candidates[name].row
        if timed.skipped:
            row.outcome, row.why = NOT_RUN, timed.skipped
            continue
        row.seconds = {part: list(timing.rounds) for part, timing in timed.parts.items()}
    first = candidates[suite.baseline].row.timing() if suite.baseline in candidates else None
    for name, candidate in candidates.items():
        timing = candidate.row.timing()
        if timing is None:
            continue
        if first is not None and name != suite.baseline:
            candidate.row.ratio = asdict(timing.against(first))
        if product is not None:
            candidate.row.share = asdict(product.against(timing).scaled(case.flops() / work))
