"""Fits of growth on costs whose law is known."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest

from gist_fast.bench.growth import Split, fit_power, fit_split
from gist_fast.bench.results import Results
from gist_fast.bench.tables import fit_table

SIZES = (256, 512, 1024, 2048, 4096, 8192)


def test_an_exact_power_is_found():
    power = fit_power(SIZES, [3e-7 * b**2 for b in SIZES])
    assert (power.exponent, power.low, power.high, power.factor) == pytest.approx((2, 2, 2, 3e-7))
    assert str(power) == "B^2.00 (2.00 to 2.00)"


def test_the_interval_holds_the_exponent_nineteen_times_in_twenty():
    generator = random.Random(1)
    held = 0
    for _ in range(400):
        power = fit_power(SIZES, [b**1.5 * generator.lognormvariate(0, 0.1) for b in SIZES])
        held += power.low <= 1.5 <= power.high
    assert 0.91 <= held / 400 <= 0.985


def test_a_linear_and_a_quadratic_part_are_told_apart():
    split = fit_split(SIZES, [0.02 + 1e-3 * b + 2.5e-7 * b**2 for b in SIZES])
    assert (split.fixed, split.linear, split.quadratic) == pytest.approx((0.02, 1e-3, 2.5e-7))
    assert split.crossing == pytest.approx(4000)


def test_parts_are_never_negative():
    split = fit_split(SIZES, [1e-3 * b for b in SIZES])
    assert split.quadratic * 8192**2 < 1e-6 * 8.192
    assert split.as_dict()["crossing"] is None or split.crossing > 1e6
    assert split.missed < 1e-9
    bent = fit_split(SIZES, [float(b) ** 0.5 for b in SIZES])
    assert min(bent.fixed, bent.linear, bent.quadratic) >= 0


@pytest.mark.parametrize(("sizes", "costs"), [((1, 2), (1, 2)), ((1, 1, 2), (1, 1, 2)), ((1, 2, 3), (1, 0, 2))])
def test_too_little_is_no_fit(sizes, costs):
    assert fit_power(sizes, costs) is None
    assert fit_split(sizes, costs) is None


def test_a_wide_interval_is_not_shown():
    power = fit_power((16, 32, 64), (0.3, 0.64, 0.71))
    assert power.high - power.low > 1
    assert str(power) == "not clear"
    split = fit_split((16, 32, 64), (0.3, 0.64, 0.71))
    assert split.missed > 0.1
    fit = {"suite": "engine", "what": "x", "quantity": "time", "largest": 64, "power": asdict(power)}
    assert fit_table(Results({}, "", fits=[{**fit, "split": split.as_dict()}]))[1] == [
        ["engine", "x", "time", "not clear", "3", "not clear"]
    ]


def test_a_constant_and_a_linear_part_are_seen_where_no_power_is():
    """Three sizes of a step whose start-up counts: the exponent's interval is wide, the sum leaves little over."""
    sizes, costs = (32, 64, 128), (0.269, 0.355, 0.523)
    assert str(fit_power(sizes, costs)) == "not clear"
    split = fit_split(sizes, costs)
    assert (split.quadratic, split.clear) == (0, True)
    assert split.in_words(128) == "35% constant, 65% linear at B 128"


def test_a_sum_with_as_many_parts_as_sizes_is_no_finding():
    generator = random.Random(2)
    for _ in range(50):
        split = fit_split((1, 2, 4), [generator.uniform(1, 9) for _ in range(3)])
        assert (split.fixed, split.linear, split.quadratic).count(0) >= 1


@pytest.mark.parametrize("sizes", [(32, 64, 128), (32, 64, 128, 256), SIZES])
@pytest.mark.parametrize("power", [1, 2])
def test_noise_of_three_percent_makes_no_part(sizes, power):
    generator = random.Random(5)
    told = [
        fit_split(sizes, [b**power * generator.lognormvariate(0, 0.03) for b in sizes]).in_words(max(sizes))
        for _ in range(400)
    ]
    alone = {1: "100% linear", 2: "100% quadratic"}[power]
    assert sum("," not in words.split(" at B")[0] and "not" not in words for words in told) >= 0.9 * 400
    assert sum(words.startswith(alone) for words in told) >= 0.8 * 400


@pytest.mark.parametrize(("sizes", "found"), [((32, 64, 128, 256), 0.9), (SIZES, 0.95)])
def test_parts_that_are_there_are_found_through_such_noise(sizes, found):
    """A third constant at the smallest size; at four sizes and more."""
    generator = random.Random(6)
    told = [
        fit_split(sizes, [(b + sizes[0]) * generator.lognormvariate(0, 0.03) for b in sizes]).fixed > 0
        for _ in range(400)
    ]
    assert sum(told) >= found * 400


def test_a_guide_s_time_is_not_said_to_be_quadratic_in_part():
    """Medians of a run on a noisy machine: of what encodes text by text."""
    split = fit_split((32, 64, 128, 256), (0.075, 0.096, 0.145, 0.272))
    assert (split.quadratic, split.clear) == (0.0, True)


def test_small_parts_are_not_told():
    assert Split(1.0, 96e-3, 3e-6).in_words(1000) == "96% linear at B 1,000"


def test_parts_in_words():
    assert Split(5.0, 1e-3, 0.0).in_words(1000) == "83% constant, 17% linear at B 1,000"
    assert Split(0.0, 0.0, 1e-6).in_words(1000) == "100% quadratic at B 1,000"
    assert Split(0.0, 2e-3, 1e-6).in_words(8000) == (
        "20% linear, 80% quadratic at B 8,000; quadratic above linear from B 2,000"
    )
    assert Split(1.0, 1.0, 1.0, missed=0.2).in_words(8000) == "not clear"
