"""Timing: iterations, budgets, quartiles, and when a ratio is too noisy to print; on a clock made here."""

from __future__ import annotations

import contextlib
import math
import random
from types import SimpleNamespace

import pytest
import torch

from gist_fast.bench.timing import (
    BOTH,
    LEAST_ROUNDS,
    NO_TIME,
    NOT_SEEN,
    Ratio,
    Stopwatch,
    Timing,
    log_quartiles,
    time_iterations,
)


class Clock:
    """A stopwatch that believes what a call returns."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, function):
        name, seconds = function()
        self.calls.append(name)
        return seconds


def constant(name: str, seconds: float):
    return {"whole": lambda: (name, seconds)}


def test_quartiles_are_those_of_the_logarithms():
    low, middle, high = log_quartiles([1.0, 2.0, 4.0, 8.0, 16.0])
    assert [math.exp(x) for x in (low, middle, high)] == pytest.approx([2, 4, 8])


@pytest.mark.parametrize(
    ("ratios", "seen"),
    [
        ((1.10, 1.11, 1.12, 1.13, 1.14), True),  # quartiles 1.11 to 1.13: spread 1.8 % against 11 %
        ((0.90, 0.95, 1.02, 1.08, 1.20), False),
        ((1.01, 1.05, 1.05, 1.09, 1.2), True),  # 1.05 to 1.09: 3.7 % against 4.9 %
        ((1.01, 1.03, 1.05, 1.09, 1.2), False),  # 1.03 to 1.09: 5.7 % against 4.9 %
        ((0.5, 0.5), False),  # too few to know
        ((0.5, 0.5, 0.5), True),
        ((1.0, 1.0, 1.0), False),
    ],
)
def test_a_ratio_is_printed_only_if_it_is_larger_than_its_spread(ratios, seen):
    ratio = Timing(tuple(ratios)).against(Timing((1.0,) * len(ratios)))
    assert ratio.seen is seen
    assert (str(ratio) == NOT_SEEN) is not seen


def test_who_is_compared_may_change_places():
    generator = random.Random(3)
    for _ in range(200):
        a, b = (Timing(tuple(generator.lognormvariate(m, 0.2) for _ in range(6))) for m in (0.0, 0.1))
        one, other = a.against(b), b.against(a)
        assert one.seen is other.seen
        assert (one.low, one.median, one.high) == pytest.approx((1 / other.high, 1 / other.median, 1 / other.low))


def test_ratios_are_paired_within_rounds_that_both_took_part_in():
    # A machine that slows down tenfold: every round says 2, medians of the whole would not.
    a, b = Timing((2.0, 20.0, 200.0, 2000.0)), Timing((1.0, 10.0, 100.0))
    assert a.against(b) == Ratio(pytest.approx(2), pytest.approx(2), pytest.approx(2), 3)


def test_turns_alternate_and_turn_round():
    clock = Clock()
    iterations = time_iterations({"a": constant("a", 1.0), "b": constant("b", 2.0)}, stopwatch=clock, most=3)
    assert clock.calls[4:] == ["a", "b", "b", "a", "a", "b"]  # after two iterations each to warm up
    assert iterations["a"].parts["whole"].rounds == (1.0,) * 3


def test_the_slow_take_fewer_turns_and_the_slowest_none():
    clock = Clock()
    competitors = {"fast": constant("fast", 0.1), "slow": constant("slow", 2.0), "never": constant("never", 9.0)}
    iterations = time_iterations(competitors, stopwatch=clock, budget=20.0, most=15)
    rounds = {name: len(one.parts["whole"].rounds) for name, one in iterations.items() if one.parts}
    assert rounds == {"fast": 15, "slow": 9}  # of the 18.5 s that the fast leaves
    assert iterations["never"].skipped == (
        "an iteration takes 9.0 s, and 3 of them more than the 13.7 s that are left for it"
    )
    assert clock.calls.count("never") == 2


def test_everyone_who_takes_part_takes_enough_turns():
    iterations = time_iterations({n: constant(n, 5.0) for n in "abc"}, stopwatch=Clock(), budget=46.0, most=15)
    assert {len(one.parts["whole"].rounds) for one in iterations.values()} == {LEAST_ROUNDS}


def test_all_that_take_part_stay_within_the_budget_but_for_those_that_ratios_need():
    competitors = {"late": constant("late", 4.0), "ours": constant("ours", 9.0), "early": constant("early", 3.0)}
    clock = Clock()
    iterations = time_iterations(competitors, stopwatch=clock, budget=36.0, always=("ours",))
    assert clock.calls[:2] == ["ours", "ours"]
    assert {name: len(one.parts["whole"].rounds) for name, one in iterations.items() if one.parts} == {
        "ours": LEAST_ROUNDS,
        "early": LEAST_ROUNDS,
    }
    assert "an iteration takes 4.0 s" in iterations["late"].skipped
    # Twice the budget for ours alone: it is timed all the same.
    assert time_iterations(competitors, stopwatch=Clock(), budget=13.0, always=("ours",))["ours"].parts


def test_beyond_some_seconds_nobody_takes_more_than_the_least():
    def rounds(beyond: float) -> list[int]:
        competitors = {"a": constant("a", 1.0), "b": constant("b", 2.0)}
        iterations = time_iterations(competitors, stopwatch=Clock(), budget=100.0, beyond=beyond)
        return [len(iterations[name].parts["whole"].rounds) for name in "ab"]

    assert rounds(9.0) == [3, 3]
    assert rounds(15.0) == [6, 4]
    assert rounds(100.0) == [15, 15]


def test_a_first_turn_that_compiles_is_not_what_is_to_be_expected():
    seconds = iter([8.0, *[0.5] * 20])
    iterations = time_iterations({"a": {"whole": lambda: ("a", next(seconds))}}, stopwatch=Clock(), budget=30.0)
    assert len(iterations["a"].parts["whole"].rounds) == 15
    # Also where the first alone, three times over, would be more than the budget; not where it is the budget.
    for cold, rounds in ((20.0, 15), (31.0, 0)):
        seconds = iter([cold, *[0.5] * 20])
        found = time_iterations({"a": {"whole": lambda: ("a", next(seconds))}}, stopwatch=Clock(), budget=30.0)  # noqa: B023
        assert len(found["a"].parts["whole"].rounds if found["a"].parts else ()) == rounds


def test_second_turns_after_long_ones_take_no_more_than_the_budget_once_over():
    clock = Clock()
    time_iterations({name: constant(name, 4.0) for name in "abcd"}, stopwatch=clock, budget=11.0)
    assert clock.calls == ["a", "a", "b", "b", "c", "d"]


def test_the_cheap_have_three_rounds_whatever_is_left():
    competitors = {"ours": constant("ours", 4.0), "cheap": constant("cheap", 0.3), "dear": constant("dear", 0.4)}
    iterations = time_iterations(competitors, stopwatch=Clock(), budget=11.0, always=("ours",))
    assert [len(iterations[name].parts["whole"].rounds) for name in ("ours", "cheap")] == [LEAST_ROUNDS] * 2
    assert iterations["dear"].skipped == (
        "an iteration takes 0.4 s, and 3 of them more than the 0.0 s that are left for it"
    )


def test_once_the_time_is_up_no_turn_begins():
    clock = Clock()
    up = {"out_of_time": lambda: len(clock.calls) >= 7}
    iterations = time_iterations({"a": constant("a", 1.0), "b": constant("b", 1.0)}, stopwatch=clock, **up)
    assert len(clock.calls) == 7
    assert [len(iterations[name].parts["whole"].rounds) for name in "ab"] == [1, 2]
    clock.calls *= 9
    assert {one.skipped for one in time_iterations({"a": constant("a", 1.0)}, stopwatch=clock, **up).values()} == {
        NO_TIME
    }


def test_parts_are_timed_apart_and_together():
    clock = Clock()
    parts = {"forward": lambda: ("f", 1.0), "backward": lambda: ("b", 3.0)}
    iterations = time_iterations({"a": parts}, stopwatch=clock, most=3)
    assert {name: timing.median for name, timing in iterations["a"].parts.items()} == {
        "forward": 1,
        "backward": 3,
        BOTH: 4,
    }


def test_a_card_that_is_not_the_current_one_is_timed_on_itself(monkeypatch):
    """Events are recorded on the current device; without a card here, on made-up ones."""
    current, recorded = ["cuda:0"], []

    @contextlib.contextmanager
    def device(name):
        current.append(name)
        yield
        current.pop()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(current[-1])

        def synchronize(self): ...

        def elapsed_time(self, other):
            return 250.0

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(L2_cache_size=1 << 10))
    made = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: made(16, **options))
    seconds = Stopwatch("cuda:1")(lambda: recorded.append(current[-1]))
    assert seconds == 0.25
    assert recorded == ["cuda:1"] * 3
