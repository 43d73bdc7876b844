"""`guided_contrastive_loss` against mathematics written independently, on both backends that run everywhere."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, make_problem, oracle, oracle_logits, values_and_gradients
from torch.autograd import forward_ad

from gist_fast import GuidedContrastiveStats, guided_contrastive_loss
from gist_fast.functional.backends import dense, kept, tiled

EVERYWHERE = ["reference", "tiled", "auto"]
"""``auto`` computes batches as small as these at once."""
backends = pytest.mark.parametrize("backend", EVERYWHERE)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, so that small problems have many, whole and ragged."""
    monkeypatch.setattr(tiled, "TILE", 16)


def run(problem, backend, **kwargs):
    return guided_contrastive_loss(**problem.arguments(), backend=backend, reduction="none", **kwargs)


def past_ties(margin: float) -> float:
    """A margin is none, or far beyond the band in which two scores count as equal: in it another rule holds."""
    return margin if abs(margin) > 1e-9 else 0.0


@st.composite
def problems(draw):
    rows = draw(st.integers(1, 40))
    offset = draw(st.integers(0, 40))
    guide_width = draw(st.none() | st.integers(1, 20))
    return make_problem(
        rows,
        rows + offset + draw(st.integers(0, 40)),
        tuple(draw(st.lists(st.integers(1, 40), max_size=3))),
        draw(st.integers(1, 20)),
        guide_width,
        seed=draw(st.integers(0, 2**20)),
        temperature=draw(st.floats(0.003, 1.0)),
        learned_temperature=draw(st.booleans()),
        margin=0.0 if guide_width is None else draw(st.floats(-0.5, 0.5).map(past_ties)),
        margin_strategy="absolute" if guide_width is None else draw(st.sampled_from(["absolute", "relative"])),
        contrast_anchors=draw(st.booleans()),
        contrast_positives=draw(st.booleans()),
        offset=offset,
    )


@backends
@settings(max_examples=60, deadline=None)
@given(problem=problems(), mask_bits=st.sampled_from(["keep", "recompute"]))
def test_float64_agrees_with_the_oracle(backend, problem, mask_bits):
    loss, stats = run(problem, backend, mask_bits=mask_bits, return_stats=True)
    expected, counts = oracle(problem)
    # 1 / temperature is the size of a gradient before anything cancels: at width 1, all of it does.
    size = 1.0 / torch.as_tensor(problem.temperature).item()
    assert_close(values_and_gradients(loss, problem), values_and_gradients(expected, problem), 1e-9, floor=size)
    assert stats.blocks == tuple(counts)
    assert stats.compared == tuple(compared for compared, _ in counts.values())
    assert stats.masked.tolist() == [masked for _, masked in counts.values()]


@pytest.mark.parametrize("sizes", [(900, 1700, 755, (800,)), (769, 769, 0, ()), (768, 1536, 768, (1, 1540))])
def test_shipped_tiles_agree_with_the_oracle(monkeypatch, sizes):
    monkeypatch.undo()
    rows, columns, offset, negatives = sizes
    problem = make_problem(rows, columns, negatives, 5, 3, offset=offset, margin=0.05)
    expected, _ = oracle(problem)
    assert_close(values_and_gradients(run(problem, "tiled"), problem), values_and_gradients(expected, problem), 1e-9)


@backends
def test_gradcheck(backend):
    problem = make_problem(5, 8, (3,), 4, 3, offset=2, temperature=0.3)

    def function(anchors, positives, negative, temperature):
        return run(
            replace(problem, anchors=anchors, positives=positives, negatives=(negative,), temperature=temperature),
            backend,
        )

    assert torch.autograd.gradcheck(function, problem.tensors)


def test_reference_has_second_derivatives_and_tiled_refuses_them():
    problem = make_problem(4, width=3, temperature=0.3, learned_temperature=False)
    function = lambda a, p: run(replace(problem, anchors=a, positives=p), "reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, problem.tensors)
    (first, *_) = torch.autograd.grad(run(problem, "tiled").sum(), problem.tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        first.sum().backward()


def test_transforms_and_forward_mode_are_refused_by_the_streaming_backends():
    problem = make_problem(4, width=3, temperature=0.3, learned_temperature=False)
    anchors, tangent = problem.anchors.detach(), torch.ones_like(problem.anchors)

    def function(backend):
        return lambda a: run(replace(problem, anchors=a), backend).mean()

    value, derivative = torch.func.jvp(function("reference"), (anchors,), (tangent,))
    assert derivative.abs() > 0
    for transform in (
        lambda: torch.func.jvp(function("tiled"), (anchors,), (tangent,)),
        lambda: torch.func.grad(function("tiled"))(anchors),
    ):
        with pytest.raises(RuntimeError, match="backend='reference'"):
            transform()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(anchors, tangent)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            function("tiled")(dual)
        assert function("tiled")(anchors).item() == pytest.approx(value.item())


@backends
def test_reductions(backend):
    problem = make_problem(19, temperature=0.2)
    rows, _ = oracle(problem)
    for reduction in ("mean", "sum"):
        loss = guided_contrastive_loss(**problem.arguments(), backend=backend, reduction=reduction)
        assert loss.shape == ()
        expected = getattr(rows, reduction)()
        gradients = torch.autograd.grad(expected, problem.tensors, retain_graph=True)
        assert_close([loss, *torch.autograd.grad(loss, problem.tensors)], [expected, *gradients], 1e-9)


@backends
def test_statistics(backend):
    problem = make_problem(33, 40, (9,), offset=4, margin=0.1)
    loss, stats = run(problem, backend, return_stats=True)
    assert isinstance(stats, GuidedContrastiveStats)
    a, p = problem.anchors, problem.positives
    positive = torch.cosine_similarity(a, p[4 : 4 + 33]).mean()
    assert stats.positive_similarity.item() == pytest.approx(positive.item(), rel=1e-9)
    logits, own, _ = oracle_logits(problem)
    logits[torch.arange(33), own] = -torch.inf
    hardest = (logits.amax(dim=1) * problem.temperature).mean()
    assert stats.hardest_negative_similarity.item() == pytest.approx(hardest.item(), rel=1e-9)
    names = ("masked_ap", "masked_aa", "masked_pp", "masked_an_1", "positive_similarity", "hardest_negative_similarity")
    assert tuple(stats.as_dict()) == names
    assert not stats.positive_similarity.requires_grad
    assert loss.requires_grad


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_self_guided_needs_no_second_product_and_equals_a_guide_of_the_same_values(backend, dtype):
    problem = make_problem(37, 45, (11,), 16, None, offset=3, margin=-0.2, learned_temperature=False).to(dtype)
    same = replace(
        problem,
        guide_anchors=problem.anchors.detach(),
        guide_positives=problem.positives,
        guide_negatives=tuple(n.detach() for n in problem.negatives),
    )
    copies = replace(
        same,
        guide_anchors=problem.anchors.detach().clone(),
        guide_positives=problem.positives.detach().clone(),
        guide_negatives=tuple(n.detach().clone() for n in problem.negatives),
    )
    first, second = (run(q, backend, return_stats=True) for q in (same, copies))
    # Scaled and rounded, the student's own scores may part from the guide's at a threshold; here they do not.
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    if dtype == torch.float32:
        assert first[1].masked.tolist() == second[1].masked.tolist()
    assert_close([first[0].mean()], [second[0].mean()], tolerance)


@backends
def test_copies_of_the_positive_tie_and_stay(backend):
    """A negative with the positive's very text is not closer than the positive: strictly greater masks, a tie not."""
    for seed in range(20):
        q = make_problem(40, negatives=(40,), width=24, guide_width=300, seed=seed, learned_temperature=False)
        q = q.to(torch.float32)
        q.guide_negatives = (q.guide_positives.clone(),)
        q = replace(q, contrast_anchors=False, contrast_positives=False)
        _, stats = run(q, backend, return_stats=True)
        # Against itself the diagonal ties; all that the oracle masks off the diagonal is masked here too.
        gram = torch.cosine_similarity(q.guide_anchors[:, None].double(), q.guide_positives[None].double(), dim=-1)
        strictly = (gram > gram.diagonal()[:, None] + 1e-5).sum().item()
        assert stats.masked.tolist() == [strictly, strictly]


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_vectors_have_similarity_zero_and_no_gradient(backend, dtype):
    problem = make_problem(9, negatives=(4,)).to(dtype)
    with torch.no_grad():
        problem.anchors[2] = 0
        problem.positives[5] = 0
        problem.guide_anchors[1] = 0
    loss, *gradients = values_and_gradients(run(problem, backend), problem)
    assert all(torch.isfinite(x).all() for x in (loss, *gradients))
    assert (gradients[0][2] == 0).all()
    assert (gradients[1][5] == 0).all()
    assert (gradients[0][0] != 0).any()


@backends
def test_rows_without_any_negative_lose_nothing(backend):
    problem = make_problem(6, margin=3.0)  # the limit is below every cosine: all is masked
    loss, stats = run(problem, backend, return_stats=True)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), problem.tensors))
    assert stats.masked.tolist() == list(stats.compared)
    assert stats.hardest_negative_similarity.isnan()
    alone = make_problem(1)
    assert run(alone, backend).item() == 0.0


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_temperatures_stay_finite_and_exact(backend, dtype):
    problem = make_problem(21, width=3, temperature=0.001)
    expected = values_and_gradients(oracle(problem)[0], problem)
    rounded = problem.to(dtype)
    # Masks may part where float32 cannot tell a score from its threshold, so compare with masks fixed by no guide.
    if dtype == torch.float32:
        problem = replace(problem, guide_anchors=None, guide_positives=None, guide_negatives=None)
        expected = values_and_gradients(oracle(problem)[0], problem)
        rounded = problem.to(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3  # logits of 1000 carry a relative 6e-8 each
    assert_close(values_and_gradients(run(rounded, backend), rounded), expected, tolerance)


def test_tiny_losses_keep_their_digits():
    problem = make_problem(8, width=30, temperature=0.02)
    with torch.no_grad():  # t_i = 1, so that nothing is masked
        problem.positives.copy_(problem.anchors + 1e-3 * problem.positives)
        problem.guide_positives.copy_(problem.guide_anchors)
    problem = replace(problem, contrast_anchors=False, contrast_positives=False)
    loss = run(problem, "tiled")
    cosines = torch.cosine_similarity(problem.anchors[:, None], problem.positives[None], dim=-1)
    odds = ((cosines - cosines.diagonal()[:, None]) / problem.temperature).exp().fill_diagonal_(0.0)
    expected = torch.log1p(odds.sum(1))
    assert expected.max() < 1e-8
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0.0)


@backends
def test_memory_layouts_do_not_matter(backend):
    problem = make_problem(20, 26, (5,), offset=2)
    expected = values_and_gradients(run(problem, backend), problem)
    strided = replace(
        problem,
        anchors=problem.anchors.detach().T.contiguous().T.requires_grad_(),
        positives=torch.cat([problem.positives.detach()] * 2, 1)[:, :12].requires_grad_(),
        guide_positives=problem.guide_positives.repeat_interleave(2, dim=0)[::2],
    )
    assert not strided.anchors.is_contiguous()
    assert_close(values_and_gradients(run(strided, backend), strided), expected, 1e-12)


@backends
def test_autocast_changes_nothing(backend):
    problem = make_problem(30, learned_temperature=False).to(torch.float32)
    expected = values_and_gradients(run(problem, backend), problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(problem, backend)
    assert loss.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(values_and_gradients(loss, problem), expected, strict=True))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_student_and_guide_may_differ(backend, dtype):
    problem = make_problem(30, 33, (7,), offset=1, learned_temperature=False)
    mixed = problem.to(dtype, guide_dtype=torch.float32)
    loss = run(mixed, backend)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss.sum(), mixed.tensors)
    assert {g.dtype for g in gradients} == {dtype}
    # Rounding moves the loss, but by no more than a few of the type's steps over the temperature.
    step = torch.finfo(dtype).eps / 0.05
    assert (loss.double() - oracle(problem)[0]).abs().max() < 3 * step


def test_no_gradient_reaches_the_guide():
    problem = make_problem(9, learned_temperature=False)
    problem.guide_anchors.requires_grad_()
    for backend in EVERYWHERE:
        (gradient,) = torch.autograd.grad(run(problem, backend).sum(), [problem.guide_anchors], allow_unused=True)
        assert gradient is None or (gradient == 0).all()


@pytest.mark.parametrize("mask_bits", ["keep", "recompute"])
@pytest.mark.parametrize("few", [0, kept.SCORES_PAIRS])
def test_tiled_is_bitwise_the_same_from_run_to_run(monkeypatch, mask_bits, few):
    monkeypatch.setattr(kept, "SCORES_PAIRS", few)
    problem = make_problem(50, 70, (33,), offset=7).to(torch.float32)
    first, second = (values_and_gradients(run(problem, "tiled", mask_bits=mask_bits), problem) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kept_scores_kept_masks_and_neither_give_the_same_bits(monkeypatch):
    problem = make_problem(50, 70, (33,), offset=7).to(torch.float32)
    results = []
    for few, mask_bits in ((kept.SCORES_PAIRS, "keep"), (0, "keep"), (0, "recompute")):
        monkeypatch.setattr(kept, "SCORES_PAIRS", few)
        results.append(values_and_gradients(run(problem, "tiled", mask_bits=mask_bits), problem))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@backends
def test_a_compiled_step_has_no_graph_break(monkeypatch, backend):
    monkeypatch.setattr(dense, "PAIRS", 0)  # which a traced graph does not take; see tests/test_operator.py
    problem = make_problem(24, 30, (5,), offset=2).to(torch.float32)
    expected = values_and_gradients(run(problem, backend), problem)
    torch._dynamo.reset()
    step = functools.partial(guided_contrastive_loss, reduction="none", backend=backend)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss = compiled(**problem.arguments())
    assert_close(values_and_gradients(loss, problem), expected, 1e-5)


@backends
@pytest.mark.parametrize("mask_bits", ["keep", "recompute"])
def test_embeddings_out_of_inference_mode_are_taken(backend, mask_bits):
    problem = make_problem(20, negatives=(5,)).to(torch.float32)
    expected = values_and_gradients(run(problem, backend, mask_bits=mask_bits), problem)
    with torch.inference_mode():  # as a guide's `encode` leaves its embeddings
        inferred = replace(
            problem,
            guide_anchors=problem.guide_anchors.clone(),
            guide_positives=problem.guide_positives.clone(),
            guide_negatives=tuple(x.clone() for x in problem.guide_negatives),
        )
    got = values_and_gradients(run(inferred, backend, mask_bits=mask_bits), inferred)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_a_mean_times_a_factor_has_the_gradient_of_its_rows(backend: str, factor: float) -> None:
    """Where the upstream gradients of all rows have one sign, it and they go another way than rows of mixed signs."""

    def gradients(reduce) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(n, 16, generator=generator).requires_grad_() for n in (40, 45)]
        guide = [torch.randn(n, 8, generator=generator) for n in (40, 45)]
        temperature = torch.tensor(0.05, requires_grad=True)
        return torch.autograd.grad(reduce(leaves, guide, temperature), [*leaves, temperature])

    def by_mean(leaves, guide, temperature):
        return factor * guided_contrastive_loss(*leaves, *guide, temperature=temperature, offset=3, backend=backend)

    def by_rows(leaves, guide, temperature):
        rows = guided_contrastive_loss(
            *(x.double() for x in (*leaves, *guide)), temperature=temperature, offset=3, backend="reference",
            reduction="none",
        )  # fmt: skip
        return (rows * factor / len(rows)).sum()

    for ours, exact in zip(gradients(by_mean), gradients(by_rows), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6 * exact.abs().max().item())
