"""The kernels of distillation run by Triton's interpreter, held to float64. `test_distillation.py` starts this file in
a process of its own, because the interpreter must be chosen before Triton is imported:

    TRITON_INTERPRET=1 python -m pytest tests/distil_interpreted.py
"""

from __future__ import annotations

import os

import pytest
import torch
from gist_fast.kernels import layout
from hypothesis import HealthCheck, given, settings
from oracle import values_and_gradients
from test_distillation import WEIGHT, Case, check_operators, draw_case, run

from benchmarks.gpu.interpreter import hurry
from gist_fast.functional.backends import kernel_work

assert os.environ.get("TRITON_INTERPRET") == "1", "see above"
hurry()
EXAMPLES = int(os.environ.get("GIST_FAST_TEST_EXAMPLES", "3"))


def check(case: Case) -> None:
    """Loss and gradients err no more than the reference does in the same type, plus what another order of sums makes
    of a logit; as a share of each one's largest value, but of the temperature's gradient as one of its terms, which
    cancel."""
    narrow = case.problem()
    exact = narrow.to(torch.float64)
    truth = values_and_gradients(run(exact, "reference", case), exact)
    # KL's derivative by it: a difference of shares, 2 at most in all, times a similarity over its square.
    terms = 2 * WEIGHT * narrow.weights.abs().sum().item() / case.temperature**2
    sizes = [*(max(t.abs().max().item(), 1e-6) for t in truth[:-1]), max(truth[-1].abs().item(), terms)]
    ours, plain = (
        [(x.double() - t).abs().max().item() / size for x, t, size in zip(found, truth, sizes, strict=True)]
        for found in (values_and_gradients(run(narrow, backend, case), narrow) for backend in ("triton", "reference"))
    )
    more = 8 * torch.finfo(torch.float32).eps * (1 / case.temperature + 1 / case.guide_temperature)
    # dlogits are rounded to the operands' type.
    more += 0.0 if case.dtype == torch.float32 else 2 * torch.finfo(case.dtype).eps
    for k, (error, allowed) in enumerate(zip(ours, plain, strict=True)):
        assert error <= allowed + more, (k, error, allowed, more)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=draw_case(most=150))
def test_it_agrees_with_float64(case: Case) -> None:
    check(case)


DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


def test_over_several_chunks_with_a_guide_not_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_TILES", 1)
    monkeypatch.setattr(kernel_work, "HELD_BYTES", 0)
    check(Case(rows=130, columns=140, offset=7, directions=DIRECTIONS[:3], others=True))


@pytest.mark.slow
@pytest.mark.parametrize("held", [kernel_work.HELD_BYTES, 0])
@pytest.mark.parametrize("tiles", [1, 2])
def test_over_many_chunks_with_and_without_the_guide_held_whole(
    tiles: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_TILES", tiles)
    monkeypatch.setattr(kernel_work, "HELD_BYTES", held)
    check(Case(rows=140, columns=300, negatives=(300,), offset=21, directions=DIRECTIONS, others=True, dims=(16, 5)))


def test_one_softmax_a_direction_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_TILES", 1)
    directions = ("query_to_doc", "doc_to_query")
    check(Case(rows=150, columns=180, offset=13, directions=directions, per_direction=True, dtype=torch.float16))


@pytest.mark.slow
def test_opcheck() -> None:
    check_operators("triton")
