"""The variants of the guided loss against mathematics written independently, on both backends that run everywhere."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Problem, assert_close, cosine, loss_by_settings, make_problem, values_and_gradients
from torch import Tensor

from gist_fast import guided_contrastive_loss
from gist_fast.functional.backends import kept, tiled
from gist_fast.functional.blocks import Block
from gist_fast.functional.mask_products import MaskProduct, sum_similarities

EVERYWHERE = ["reference", "tiled", "auto"]
"""``auto`` computes batches as small as these at once."""
backends = pytest.mark.parametrize("backend", EVERYWHERE)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, so that small problems have many, whole and ragged."""
    monkeypatch.setattr(tiled, "TILE", 16)


def draw_scopes(draw: st.DrawFn, rows: int, negatives: tuple[int, ...], options: dict[str, Any]) -> tuple[int, ...]:
    """Make columns of negatives each anchor's own, of one a row or of fewer, and return their sizes."""
    scopes = draw(st.sampled_from(["own", *([["own", "all"], ["all", "own"]] if len(negatives) == 2 else [])]))
    options["negatives_scope"] = scopes if negatives else "all"
    found, owners = [], []
    for k, size in enumerate(negatives):
        owner = None
        if scopes == "own" or scopes[k] == "own":
            size = draw(st.integers(1, rows))
            if size < rows or draw(st.booleans()):
                owner = torch.tensor(draw(st.permutations(range(rows)))[:size])
        found.append(size)
        owners.append(owner)
    if any(owner is not None for owner in owners):
        options["negative_rows"] = owners
    return tuple(found)


def draw_directions(draw: st.DrawFn, rows: int, columns: int, options: dict[str, Any]) -> int:
    """Say what is compared by directions, and return how many anchors there are."""
    others = draw(st.lists(st.sampled_from(["query_to_query", "doc_to_query", "doc_to_doc"]), unique=True))
    options["directions"] = draw(st.permutations(["query_to_doc", *others]))
    if set(others) <= {"doc_to_query"}:
        options["partition_mode"] = draw(st.sampled_from(["joint", "per_direction"]))
    if set(others) & {"query_to_query", "doc_to_query"} and draw(st.booleans()):
        options["rows"] = rows
        return columns
    return rows


@st.composite
def cases(draw: st.DrawFn) -> tuple[Problem, dict[str, Any]]:
    rows, offset = draw(st.integers(1, 34)), draw(st.integers(0, 20))
    columns = rows + offset + draw(st.integers(0, 20))
    width = draw(st.integers(2, 16))
    hardness = draw(st.sampled_from([None, "in_batch_negatives", "hard_negatives", "all_negatives"]))
    negatives = tuple(columns + n for n in draw(st.lists(st.integers(0, 9), max_size=2)))
    if hardness == "hard_negatives" and not negatives:
        negatives = (columns,)
    options: dict[str, Any] = {"mask_bits": draw(st.sampled_from(["keep", "recompute"]))}
    if draw(st.booleans()):
        negatives = draw_scopes(draw, rows, negatives, options)
    anchors, asked = rows, draw(st.booleans())
    if asked:
        anchors = draw_directions(draw, rows, columns, options)
    guide = draw(st.sampled_from(["own", "self", "none"]))
    problem = make_problem(
        rows,
        columns,
        negatives,
        width,
        draw(st.integers(1, 9)) if guide == "own" else None,
        anchors=anchors,
        seed=draw(st.integers(0, 2**20)),
        temperature=draw(st.floats(0.01, 1.0)),
        margin=0.0 if guide == "none" else draw(st.just(0.0) | st.floats(0.001, 0.4) | st.floats(-0.4, -0.001)),
        margin_strategy="absolute" if guide == "none" else draw(st.sampled_from(["absolute", "relative"])),
        contrast_anchors=asked or draw(st.booleans()),
        contrast_positives=asked or draw(st.booleans()),
        offset=offset,
    )
    if guide != "none" and draw(st.booleans()):
        problem.margin = torch.linspace(-0.3, 0.3, rows, dtype=torch.float64)
    if guide != "none":
        options["mask_ties"], options["mask_negatives"] = draw(st.booleans()), draw(st.booleans())
    if count := draw(st.integers(0, 2)):
        generator = torch.Generator().manual_seed(rows)
        most = 1 + columns // 2
        options["groups"] = [torch.randint(0, most, (columns,), generator=generator) for _ in range(count)]
        if draw(st.booleans()):
            options["negative_groups"] = [torch.randint(0, most, (n,), generator=generator) for n in negatives]
    if draw(st.booleans()):
        options["triplet_margin"], options["mask_bits"] = draw(st.floats(0.01, 1.5)), "keep"
        if guide == "none" and "groups" not in options:
            del options["triplet_margin"]
    term = draw(st.sampled_from([None, None, "label_smoothing", "positive_prior"]))
    weighed = term == "label_smoothing" and hardness is not None
    if term is not None and not weighed and "doc_to_query" not in options.get("directions", ()):
        options[term], options["mask_bits"] = draw(st.floats(0.001, 0.6)), "keep"
    if guide == "own" and options["mask_negatives"] and draw(st.booleans()):
        options["distill_weight"], options["distill_temperature"] = (
            draw(st.floats(0.1, 3.0)),
            draw(st.floats(0.02, 1.0)),
        )
    if draw(st.booleans()):
        options["spread_out_weight"] = draw(st.floats(0.1, 5.0))
    if guide != "self" and not options.keys() & {"triplet_margin", "label_smoothing", "positive_prior"}:
        options["hard"] = draw(st.booleans())
    if hardness is not None:
        options |= {"hardness_mode": hardness, "hardness_strength": draw(st.floats(0.1, 9.0))}
    if draw(st.booleans()):
        dims = draw(st.lists(st.integers(1, width), min_size=1, max_size=4, unique=True))
        options["matryoshka_dims"] = dims
        options["matryoshka_weights"] = [1.0 / (1 + k) for k in range(len(dims))]
    if guide == "self":
        options["self_guided"] = True
    return problem, options


def run(problem: Problem, backend: str, self_guided: bool = False, **options: Any) -> Any:
    arguments = problem.arguments()
    if self_guided:
        arguments |= {"guide_anchors": problem.anchors, "guide_positives": problem.positives}
        arguments["guide_negatives"] = problem.negatives
    return guided_contrastive_loss(**arguments, backend=backend, reduction="none", **options)


@backends
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_values_and_gradients(backend: str, case: tuple[Problem, dict[str, Any]]) -> None:
    check(backend, case)


@pytest.mark.slow
@backends
@settings(max_examples=1000, deadline=None)
@given(case=cases())
def test_values_and_gradients_in_more_cases(backend: str, case: tuple[Problem, dict[str, Any]]) -> None:
    check(backend, case)


def check(backend: str, case: tuple[Problem, dict[str, Any]]) -> None:
    """Loss, gradients and statistics are the oracle's."""
    problem, options = case
    found, stats = run(problem, backend, return_stats=True, **options)
    known: dict[str, Any] = {}
    expected = loss_by_settings(problem, **{k: v for k, v in options.items() if k != "mask_bits"}, statistics=known)
    counts = zip(stats.blocks, stats.masked.tolist(), strict=True)
    counted = {f"masked_{name}": n for name, n in counts}
    if stats.easy is not None:
        counted |= {f"easy_{name}": n for name, n in zip(stats.blocks, stats.easy.tolist(), strict=True)}
    hardest = known.pop("hardest")
    if "distill_weight" in options:
        assert torch.allclose(stats.distillation, known.pop("distillation"), atol=1e-9)
    assert counted == known
    assert torch.allclose(stats.hardest_negative_similarity, hardest, atol=1e-9, equal_nan=True)
    size = 1.0 / problem.temperature.item()
    assert_close(values_and_gradients(found, problem), values_and_gradients(expected, problem), 1e-8, floor=size)


VARIANTS: dict[str, dict[str, Any]] = {
    "hard": {"hard": True},
    "groups": {"groups": torch.tensor([0, 1, 0, 2, 1, 3, 4, 2])},
    "two groups": {
        "groups": [torch.tensor([0, 1, 0, 2, 1, 3, 4, 2]), torch.tensor([0, 1, 2, 3, 3, 4, 5, 6])],
        "negative_groups": [torch.tensor([0, 7, 2, 3, 4, 9, 8, 7])],
    },
    "protected": {"mask_negatives": False},
    "own negatives": {"negatives_scope": "own", "negative_rows": [torch.tensor([3, 0, 1, 4])]},
    "all directions": {"directions": ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]},
    "one softmax a direction": {"directions": ["query_to_doc", "doc_to_query"], "partition_mode": "per_direction"},
    "in-batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 4.0},
    "own": {"hardness_mode": "hard_negatives", "hardness_strength": 4.0},
    "all": {"hardness_mode": "all_negatives", "hardness_strength": 4.0},
    "triplet": {"triplet_margin": 2.5},
    "distilled": {"distill_weight": 2.0, "distill_temperature": 0.1},
    "smooth labels": {"label_smoothing": 0.2},
    "debiased": {"positive_prior": 0.01},  # a larger one makes more of each rounding
    "spread out": {"spread_out_weight": 3.0},
    "ladder": {"matryoshka_dims": [4, 2, 1], "matryoshka_weights": [1.0, 0.5, 0.25]},
    "ties": {"mask_ties": True},
    "margins": {"margin": torch.tensor([0.1, -0.1, 0.0, 0.2, 0.05], dtype=torch.float64)},
}


@backends
@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("in-batch", "own", "all")])
def test_gradcheck(backend: str, name: str) -> None:
    """Hardness weighting is left out: what it adds is constant by definition, not by value."""
    problem = make_problem(5, 8, (4 if name == "own negatives" else 8,), 4, 3, offset=2, temperature=0.3)

    def function(anchors: Tensor, positives: Tensor, negative: Tensor, temperature: Tensor) -> Tensor:
        changed = replace(problem, anchors=anchors, positives=positives, negatives=(negative,), temperature=temperature)
        arguments = changed.arguments() | VARIANTS[name]
        return guided_contrastive_loss(**arguments, backend=backend, reduction="none")

    assert torch.autograd.gradcheck(function, problem.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_half_types_err_no_more_than_the_reference(name: str, dtype: torch.dtype) -> None:
    options = dict(VARIANTS[name])
    if name == "groups":
        options["groups"] = torch.arange(60) // 3
    if name == "two groups":
        options = {"groups": [torch.arange(60) // 3, torch.arange(60) % 20], "negative_groups": [torch.arange(60) // 2]}
    if name == "own negatives":
        options["negative_rows"] = [None]
    if name == "margins":
        options["margin"] = torch.linspace(-0.2, 0.2, 50)
    negatives = 50 if name == "own negatives" else 60
    wide = make_problem(50, 60, (negatives,), 24, 17, offset=7, temperature=0.2, learned_temperature=False)
    narrow = wide.to(dtype)
    exact = narrow.to(torch.float64)
    if "margin" in options:
        narrow.margin = exact.margin = options.pop("margin")
    truth = values_and_gradients(run(exact, "reference", **options), exact)
    ours = values_and_gradients(run(narrow, "tiled", **options), narrow)
    theirs = values_and_gradients(run(narrow, "reference", **options), narrow)
    for got, other, want in zip(ours, theirs, truth, strict=True):
        size = want.abs().max()
        error, allowed = (got - want).abs().max() / size, (other - want).abs().max() / size
        # Sums in another order: a logit comes with a step of its own size, which is up to 1 / temperature + strength.
        # bfloat16's gradient products are rounded once more, as documented.
        more = torch.finfo(torch.float32).eps * (1 / wide.temperature + options.get("hardness_strength", 0.0))
        more += 4 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else torch.finfo(dtype).eps
        assert error <= allowed + more, (name, error, allowed)


@backends
def test_a_copy_of_the_positive_stays_or_goes_as_asked(backend: str) -> None:
    problem = make_problem(12, width=6, guide_width=64)
    with torch.no_grad():
        for x in (problem.positives, problem.guide_positives):
            x[6:] = x[:6]
    arguments = problem.arguments() | {"contrast_anchors": False, "contrast_positives": False}
    counts = []
    for ties in (False, True):
        _, stats = guided_contrastive_loss(**arguments, backend=backend, mask_ties=ties, return_stats=True)
        counts.append(int(stats.masked))
    others = counts[0]
    assert counts[1] == others + 12  # each row's one copy


@backends
def test_the_statistics_tell_the_guide_s_pairs_from_the_easy_ones(backend: str) -> None:
    problem = make_problem(30, negatives=(30,), width=6, guide_width=5, temperature=0.3)
    _, plain = guided_contrastive_loss(**problem.arguments(), backend=backend, return_stats=True)
    _, stats = guided_contrastive_loss(**problem.arguments(), backend=backend, return_stats=True, hard=True)
    assert stats.masked.tolist() == plain.masked.tolist()
    assert plain.easy is None and plain.easy_share == {}
    a, p = problem.anchors.detach(), problem.positives.detach()
    floor = torch.cosine_similarity(a, p, dim=-1)
    guide = cosine(problem.guide_anchors, problem.guide_positives)
    left = (cosine(a, p) < floor[:, None] - 1e-9) & ~(guide > guide.diagonal()[:, None])
    assert stats.easy[0].item() == left.sum().item() > 0
    assert {k for k in stats.as_dict() if k.startswith("easy_")} == {"easy_ap", "easy_aa", "easy_pp", "easy_an_1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_over_few_that_are_left_is_no_difference_of_roundings(dtype: torch.dtype) -> None:
    """Of 700 entries a row that have much in common 5 count: what both sums are rounded by is the same."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (1 + 0.1 * torch.randn(n, 64, generator=generator) for n in (3, 700))
    left = torch.zeros(3, 700)
    left[:, :5] = 1
    product = MaskProduct(lambda _, x: (1 - left) @ x.to(dtype).to(x.dtype), dtype)
    block = Block("ap", 0, 0, 1, 3, 700, excluded=None)
    found, number = sum_similarities([rows, columns], [(0, block)], product).negatives
    unit = [x / x.norm(dim=1, keepdim=True) for x in (rows.double(), columns.double())]
    wanted = (unit[0] @ unit[1].to(dtype).double().T * left).sum(1)
    assert number.tolist() == [5, 5, 5]
    assert torch.allclose(found.double(), wanted, atol=5e-4)
    assert not torch.allclose(MaskProduct(product.multiply).rounded(columns), product.rounded(columns))


def test_a_row_without_a_negative_has_no_loss() -> None:
    problem = make_problem(30).to(torch.float32)
    for options in ({"label_smoothing": 0.2}, {"positive_prior": 0.1}, {"triplet_margin": 0.5}):
        loss = run(problem, "tiled", groups=torch.zeros(30, dtype=torch.int64), **options)
        assert (loss == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), problem.tensors))


def test_a_whole_ladder_of_one_width_is_the_plain_loss() -> None:
    problem = make_problem(20, width=8)
    found = values_and_gradients(run(problem, "tiled", matryoshka_dims=[8]), problem)
    assert_close(found, values_and_gradients(run(problem, "tiled"), problem), 1e-12)


def test_bits_serve_a_ladder_as_kept_scores_do(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(40, 70, (33,), offset=11, margin=0.05).to(torch.float32)
    options: dict[str, Any] = {"matryoshka_dims": [12, 5, 3], "groups": torch.arange(70) // 4, "triplet_margin": 0.7}
    found = []
    for pairs in (kept.SCORES_PAIRS, 0):
        monkeypatch.setattr(kept, "SCORES_PAIRS", pairs)
        found.append(values_and_gradients(run(problem, "tiled", **options), problem))
    assert_close(*found, 1e-6)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"directions": ["query_to_doc", "doc_to_query"], "partition_mode": "per_direction"},
    ],
)
def test_a_compiled_step_has_no_graph_break(more: dict[str, Any]) -> None:
    problem = make_problem(16, negatives=(16, 16), width=8, learned_temperature=False).to(torch.float32)
    options: dict[str, Any] = {
        "groups": [torch.arange(16) // 2, torch.arange(16) // 3], "negative_groups": [torch.arange(16)] * 2,
        "negatives_scope": ["all", "own"], "matryoshka_dims": [8, 4], "triplet_margin": 0.5, "mask_ties": True,
        "hardness_mode": "all_negatives", "hardness_strength": 3.0, **more,
    }  # fmt: skip

    def step(*leaves: Tensor) -> Tensor:
        return run(replace(problem, anchors=leaves[0], positives=leaves[1], negatives=leaves[2:]), "tiled", **options)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = [values_and_gradients(each(*problem.tensors), problem) for each in (step, compiled)]
    assert_close(*found, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_masks_product() -> None:
    from gist_fast.functional.loss_config import LossConfig

    every: Any = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
    for directions, anchors, index in ((None, 9, 0), (every, 12, 3)):
        problem = make_problem(9, 12, (12,), anchors=anchors, offset=2).to(torch.float32)
        config = LossConfig(margin=0.1, directions=directions)
        student = [x.detach() for x in (problem.anchors, problem.positives, *problem.negatives)]
        guide = [problem.guide_anchors, problem.guide_positives, *problem.guide_negatives]
        forward = functools.partial(torch.ops.gist_fast.guided_forward.default, "tiled", student, guide)
        *_, bits = forward(torch.tensor(0.1), None, [], [], True, False, False, 9, 2, *config.to_arguments())
        other = torch.randn(12, 5, requires_grad=True)
        sizes = [9, anchors, 12, 12, 1, 2]
        arguments = ("tiled", bits, other, False, index, torch.float32, sizes, *config.to_arguments())
        torch.library.opcheck(torch.ops.gist_fast.mask_product.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(
    ("student_type", "guide_type"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_copies_tie_whatever_the_types_of_student_and_guide(backend, student_type, guide_type):
    """Every pair stands there twice, and its copy is a tie: in a type of the guide's own as well."""
    generator = torch.Generator().manual_seed(3)
    half = [torch.randn(16, 24, generator=generator, dtype=torch.float64) for _ in range(2)]
    guide = [x.repeat(2, 1) for x in half]
    guide[1] = guide[0] + 0.3 * guide[1]
    student = [torch.randn(32, 8, generator=generator).to(student_type) for _ in range(2)]
    shares = []
    for mask_ties in (False, True):
        _, stats = guided_contrastive_loss(
            *student,
            *(x.to(guide_type) for x in guide),
            mask_ties=mask_ties,
            contrast_anchors=False,
            contrast_positives=False,
            backend=backend,
            return_stats=True,
        )
        shares.append(round(float(stats.masked_share["ap"]) * 32 * 31))
    assert shares[1] - shares[0] == 32


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_row_of_zeros_has_no_gradient_by_the_triplet_term_either(backend):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(6, 8, generator=generator) for _ in range(2)]
    leaves[0][2] = 0
    leaves = [x.requires_grad_() for x in leaves]
    guide = torch.randn(6, 8, generator=generator)
    loss = guided_contrastive_loss(*leaves, guide, guide.roll(1, 0), triplet_margin=0.5, backend=backend)
    gradients = torch.autograd.grad(loss, leaves)
    assert (gradients[0][2] == 0).all()
    assert all(x.isfinite().all() and x.abs().max() < 100 for x in gradients)
