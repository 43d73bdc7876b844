"""Distillation from the guide: what it is, its operators, its kernels, and what happens where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from oracle import Problem, assert_close, make_problem, values_and_gradients
from torch import Tensor

from gist_fast import guided_contrastive_loss
from gist_fast.functional import backends
from gist_fast.functional.backends import tiled, tiled_distillation
from gist_fast.functional.loss_config import LossConfig
from gist_fast.losses import GISTEmbedLoss

WEIGHT = 4.0
"""Of the divergence, beside which nothing in the rows' losses is large."""


@dataclass(frozen=True)
class Case:
    """A call."""

    rows: int
    columns: int
    negatives: tuple[int, ...] = ()
    offset: int = 0
    directions: tuple[str, ...] = ()
    per_direction: bool = False
    others: bool = False
    dims: tuple[int, ...] = ()
    width: int = 16
    guide_width: int = 9
    temperature: float = 0.1
    guide_temperature: float = 0.07
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def problem(self) -> Problem:
        anchors = self.columns if self.others else self.rows
        shape = self.rows, self.columns, self.negatives, self.width, self.guide_width
        made = make_problem(*shape, anchors=anchors, offset=self.offset, temperature=self.temperature, seed=self.seed)
        return made.to(self.dtype)


@st.composite
def draw_case(draw: st.DrawFn, most: int) -> Case:
    rows, offset = draw(st.integers(1, most)), draw(st.integers(0, 20))
    columns = rows + offset + draw(st.integers(0, 30))
    # Of a few leading columns the norm may be next to nothing, and a gradient of 0 the difference of large terms.
    width = draw(st.integers(16, 40))
    others = draw(st.lists(st.sampled_from(["query_to_query", "doc_to_query", "doc_to_doc"]), unique=True))
    directions = ("query_to_doc", *others) if draw(st.booleans()) else ()
    return Case(
        rows,
        columns,
        tuple(columns + n for n in draw(st.lists(st.integers(0, 9), max_size=1))),
        offset,
        directions,
        per_direction=len(directions) > 0 and set(others) <= {"doc_to_query"} and draw(st.booleans()),
        others=bool({"query_to_query", "doc_to_query"} & set(directions)) and draw(st.booleans()),
        dims=draw(st.sampled_from([(), (width,), (width, width // 2)])),
        width=width,
        guide_width=draw(st.integers(1, 40)),
        temperature=draw(st.floats(0.02, 1.0)),
        guide_temperature=draw(st.floats(0.02, 1.0)),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        seed=draw(st.integers(0, 2**16)),
    )


def run(problem: Problem, backend: str, case: Case, **more: Any) -> Tensor:
    """The rows' losses."""
    return guided_contrastive_loss(
        **problem.arguments(), backend=backend, reduction="none", rows=case.rows, distill_weight=WEIGHT,
        distill_temperature=case.guide_temperature, directions=list(case.directions) or None,
        partition_mode="per_direction" if case.per_direction else "joint", matryoshka_dims=list(case.dims) or None,
        **more,
    )  # fmt: skip


def kl(problem: Problem, **options: Any) -> Tensor:
    """The mean divergence, by the statistics."""
    _, stats = guided_contrastive_loss(**problem.arguments(), distill_weight=1.0, return_stats=True, **options)
    return stats.distillation


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_it_is_0_for_a_student_that_is_the_guide(backend: str) -> None:
    problem = make_problem(40, negatives=(40,), guide_width=12, temperature=0.05)
    # In memory of their own, or the student would guide itself.
    a, p, *n = (x.detach().clone() for x in (problem.anchors, problem.positives, *problem.negatives))
    clones = replace(problem, guide_anchors=a, guide_positives=p, guide_negatives=tuple(n))
    assert abs(kl(clones, backend=backend, distill_temperature=0.05).item()) < 1e-12
    assert kl(clones, backend=backend, distill_temperature=0.2).item() > 0.01


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_what_the_guide_masks_is_distilled_too(backend: str) -> None:
    problem = make_problem(30, width=6, guide_width=5)
    plain, masking = (kl(replace(problem, margin=margin), backend=backend) for margin in (0.0, 0.9))
    assert torch.equal(plain, masking)


@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_a_guide_of_another_type_changes_no_type_of_the_loss(backend: str) -> None:
    for dtype, guide in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        problem = make_problem(20, negatives=(20,)).to(dtype, guide)
        found = run(problem, backend, Case(rows=20, columns=20))
        assert found.dtype == dtype
        exact = problem.to(torch.float64)
        assert_close([found.double()], [run(exact, "reference", Case(rows=20, columns=20))], 1e-5)


def test_a_loss_whose_guide_is_the_student_refuses_it(student) -> None:
    with pytest.raises(ValueError, match=r"distill_weight: expected 0 where the guide is the student itself.*got 1\.0"):
        GISTEmbedLoss(student, student, distill_weight=1.0)


def test_training_on_it_alone_brings_the_student_to_the_guide() -> None:
    """With embeddings that are free, the divergence goes towards 0."""
    problem = make_problem(20, width=16, guide_width=16, learned_temperature=False)
    x = [problem.anchors.detach().clone().requires_grad_(), problem.positives.detach().clone().requires_grad_()]
    optimizer, found = torch.optim.Adam(x, lr=0.05), []
    for _ in range(60):
        _, stats = (loss := guided_contrastive_loss(
            *x, problem.guide_anchors, problem.guide_positives, temperature=0.1, distill_weight=100.0,
            distill_temperature=0.1, return_stats=True,
        ))  # fmt: skip
        optimizer.zero_grad()
        loss[0].backward()
        optimizer.step()
        found.append(stats.distillation.item())
    assert found[-1] < 0.1 * found[0]


def check_operators(backend: str) -> None:
    """`torch.library.opcheck` on both operators."""
    config = LossConfig(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(n, 6, generator=generator, requires_grad=True) for n in (12, 16)]
    guide = [torch.randn(n, 5, generator=generator) for n in (12, 16)]
    temperature = torch.tensor(0.1, requires_grad=True)
    arguments = (backend, student, guide, temperature, 0.2, [6, 3], False, 12, 2, *config.to_arguments())
    torch.library.opcheck(torch.ops.gist_fast.distil_forward.default, arguments)
    lse, _, guide_lse, _ = torch.ops.gist_fast.distil_forward(*arguments)
    assert lse.shape == (2, 24) and guide_lse.shape == (24,)
    # Without gradients: this operator refuses to be differentiated, by name.
    detached = [x.detach() for x in student], temperature.detach()
    upstream = torch.randn(2, *lse.shape, generator=generator).unbind()
    more = (*upstream, lse.detach(), guide_lse.detach(), backend, detached[0], guide, detached[1], *arguments[4:])
    torch.library.opcheck(torch.ops.gist_fast.distil_backward.default, more)


@pytest.mark.filterwarnings("ignore")
def test_opcheck() -> None:
    check_operators("tiled")


def test_tiles_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
    case = Case(rows=50, columns=70, negatives=(80,), offset=9, directions=directions, others=True, dims=(16, 7))
    found = []
    for tile in (8, 24, 768):
        monkeypatch.setattr(tiled, "TILE", tile)
        problem = case.problem().to(torch.float64)
        found.append(values_and_gradients(run(problem, "tiled", case), problem))
    for other in found[1:]:
        assert_close(other, found[0], 1e-12, floor=1.0)


def test_a_row_that_has_nothing_but_its_positive_has_no_divergence() -> None:
    problem = make_problem(1, contrast_anchors=False, contrast_positives=False)
    for backend in ("reference", "tiled"):
        assert kl(problem, backend=backend).item() == 0.0
        loss = guided_contrastive_loss(**problem.arguments(), backend=backend, distill_weight=1.0)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, problem.tensors))


def test_second_derivatives_are_refused_by_name() -> None:
    problem = make_problem(9)
    loss = guided_contrastive_loss(**problem.arguments(), backend="tiled", distill_weight=1.0)
    (gradient,) = torch.autograd.grad(loss, problem.anchors, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_a_compiled_step_has_no_graph_break() -> None:
    problem = make_problem(16, negatives=(16,), width=8, learned_temperature=False).to(torch.float32)

    def step(anchors: Tensor) -> Tensor:
        arguments = problem.arguments() | {"anchors": anchors}
        return guided_contrastive_loss(**arguments, backend="tiled", distill_weight=1.0, matryoshka_dims=[8, 3])

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(each(problem.anchors), problem.anchors)[0] for each in (step, compiled)]
    assert_close(found[:1], found[1:], 1e-5)


def test_kernels_that_fail_under_auto_are_replaced_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: a forward pass, and a backward pass from another backend's numbers."""

    class Failing:
        forward_fails = True

        @classmethod
        def forward(cls, *arguments: Any) -> Any:
            if cls.forward_fails:
                raise RuntimeError("PassManager::run failed")
            return tiled_distillation.forward(*arguments)

        @staticmethod
        def backward(*_: Any) -> Any:
            raise RuntimeError("PassManager::run failed")

    from gist_fast.functional import distillation_operator

    problem = make_problem(9).to(torch.float32)
    case = Case(rows=9, columns=9)
    expected = values_and_gradients(run(problem, "tiled", case), problem)
    streaming = backends.streaming_backend
    monkeypatch.setattr("gist_fast.functional.function.choose_backend", lambda *_: "triton")
    monkeypatch.setattr("gist_fast.functional.operator.streaming_backend", lambda _: streaming("tiled"))
    monkeypatch.setattr("gist_fast.functional.rows.streaming_backend", lambda _: streaming("tiled"))
    monkeypatch.setattr(
        distillation_operator, "distilling_backend", lambda name: Failing if name == "triton" else tiled_distillation
    )
    remembered = []
    monkeypatch.setattr(distillation_operator, "remember_failure", lambda *failure: remembered.append(failure))
    for forward_fails, count in ((True, 2), (False, 1)):
        Failing.forward_fails = forward_fails
        remembered.clear()
        assert_close(values_and_gradients(run(problem, "auto", case), problem), expected, 1e-5)
        assert len(remembered) == count
    with pytest.raises(RuntimeError, match="PassManager"):
        run(problem, "triton", case).sum().backward()


@pytest.mark.longest
def test_the_kernels_in_the_interpreter_agree_with_float64() -> None:
    interpreted(1, "-m", "not slow")


@pytest.mark.slow
def test_the_kernels_in_the_interpreter_agree_with_float64_at_length() -> None:
    interpreted(40, "-m", "slow or not slow")


def interpreted(examples: int, *which: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *which, str(here / "distil_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "GIST_FAST_TEST_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
