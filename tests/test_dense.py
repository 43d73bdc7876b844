"""Small batches on a CPU: all scores at once are what tiles of them are, and ``auto`` takes them up to a size."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import Problem, assert_close, largest_errors, make_problem, oracle, values_and_gradients

import gist_fast.functional.backends as backends
from gist_fast import guided_contrastive_loss
from gist_fast.functional.backends import dense


@pytest.fixture(autouse=True)
def _nobody_named_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one for each call that is computed at once."""
    calls: list[str] = []
    forward = dense.forward

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append("dense")
        return forward(*arguments, **options)

    monkeypatch.setattr(dense, "forward", count)
    return calls


def run(problem: Problem, backend: str = "auto", **options: Any) -> Any:
    return guided_contrastive_loss(**(problem.arguments() | {"reduction": "none"} | options), backend=backend)


CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "a batch": ((33, 33, (), 17, 9), {}),
    "one row": ((1, 1, (), 3, 2), {}),
    "gathered candidates and negatives": ((29, 71, (13, 40), 17, 9), {"offset": 23, "margin": 0.1}),
    "an offset without the anchors' block": ((29, 71, (), 17, 9), {"offset": 42, "contrast_anchors": False}),
    "the block ap alone": (
        (30, 30, (7,), 5, 4),
        {"contrast_anchors": False, "contrast_positives": False, "margin": -0.2},
    ),
    "no guide": ((31, 31, (5,), 6, None), {}),
    "a relative margin": ((31, 40, (), 6, 5), {"margin": 0.3, "margin_strategy": "relative"}),
}


@pytest.mark.parametrize("name", CASES)
def test_both_sides_of_the_limit_are_the_oracle(monkeypatch: pytest.MonkeyPatch, taken: list[str], name: str) -> None:
    sizes, options = CASES[name]
    problem = make_problem(*sizes, **options)
    expected, counts = oracle(problem)
    wanted = values_and_gradients(expected, problem)
    pairs = sum(compared for compared, _ in counts.values()) + sizes[0] * sum(not n.startswith("an_") for n in counts)
    every = []
    for limit in (pairs, pairs - 1):
        monkeypatch.setattr(dense, "PAIRS", limit)
        loss, stats = run(problem, return_stats=True)
        assert_close(values_and_gradients(loss, problem), wanted, 1e-9)
        assert stats.masked.tolist() == [masked for _, masked in counts.values()]
        every.append(stats.as_dict())
        assert (stats.blocks, stats.easy, stats.masked.dtype) == (tuple(counts), None, torch.int64)
    assert taken == ["dense"]
    assert every[0] == pytest.approx(every[1], rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_no_worse_than_the_reference_of_its_type(taken: list[str], dtype: torch.dtype) -> None:
    rounded = make_problem(121, 150, (37,), 48, 20, offset=11, learned_temperature=False).to(dtype)
    exact = rounded.to(torch.float64)
    expected = values_and_gradients(oracle(exact)[0], exact)
    ours, theirs = (
        largest_errors(values_and_gradients(run(rounded, backend), rounded), expected)
        for backend in ("auto", "reference")
    )
    assert taken == ["dense"]
    for error, allowed in zip(ours, theirs, strict=True):
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_reduces_as_the_others_do(reduction: str) -> None:
    problem = make_problem(20, 26, (9,), offset=3)
    problem.weights = torch.ones(())
    found = [values_and_gradients(run(problem, b, reduction=reduction), problem) for b in ("auto", "reference")]
    assert_close(*found, 1e-11)


def test_a_backward_pass_may_be_had_twice_and_differentiated_never() -> None:
    problem = make_problem(9)
    loss = run(problem).sum()
    first, second = (torch.autograd.grad(loss, problem.tensors, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (third, *_) = torch.autograd.grad(run(problem).sum(), problem.tensors, create_graph=True)
    assert torch.equal(third, first[0])
    with pytest.raises(RuntimeError, match="backend='reference'"):
        third.sum().backward()


def test_a_compiled_step_is_the_plain_one() -> None:
    problem = make_problem(14, 20, (5,), offset=2)
    expected = values_and_gradients(run(problem), problem)
    torch._dynamo.reset()
    step = functools.partial(guided_contrastive_loss, reduction="none")
    loss = torch.compile(step, backend="aot_eager", fullgraph=True)(**problem.arguments())
    assert_close(values_and_gradients(loss, problem), expected, 1e-10)


def test_what_was_named_or_is_not_covered_goes_through_tiles(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    problem = make_problem(8, negatives=(8,))
    run(problem, "tiled")
    for options in (
        {"hard": True},
        {"groups": torch.arange(8) // 2},
        {"matryoshka_dims": [8, 4]},
        {"triplet_margin": 0.5},
        {"hardness_mode": "all_negatives", "hardness_strength": 2.0},
        {"mask_bits": "recompute"},
    ):
        run(problem, **options)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "tiled")
    run(problem)
    assert taken == []
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE)
    run(problem)
    assert taken == ["dense"]


def test_settings_that_came_before_are_checked_by_type() -> None:
    problem = make_problem(8)
    run(problem, margin=0.0, mask_ties=True)
    for wrong in ({"margin": False}, {"mask_ties": 1}, {"margin": [0.0]}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}: expected"):
            run(problem, **({"margin": 0.0, "mask_ties": True} | wrong))


@pytest.mark.parametrize("name", ["anchors", "positives", "guide_positives"])
def test_a_row_that_is_not_finite_is_named(taken: list[str], name: str) -> None:
    problem = make_problem(8)
    for value in (float("nan"), float("inf")):
        broken = getattr(problem, name).detach().clone()
        broken[3, 2] = value
        with pytest.raises(ValueError, match=rf"{name}: row 3, column 2 is {value}"):
            run(replace(problem, **{name: broken}))
    assert len(taken) == 2
