"""Own negatives, negatives that no guide masks, and groups: what is not a matter of values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import assert_close, loss_by_settings, make_problem, values_and_gradients

from gist_fast import guided_contrastive_loss
from gist_fast.functional import cosines
from gist_fast.functional.cosines import row_cosines, unit_vectors

BACKENDS = ["reference", "tiled", "auto"]
OWN = {"negatives_scope": "own"}


def run(problem, **options):
    return guided_contrastive_loss(**problem.arguments(), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_statistics_stand_in_the_order_of_the_columns(backend):
    problem = make_problem(9, negatives=(9, 12, 9))
    _, stats = run(problem, backend=backend, negatives_scope=["own", "all", "own"], return_stats=True)
    assert stats.blocks == ("ap", "aa", "pp", "an_1", "an_2", "an_3")
    assert stats.compared == (72, 72, 72, 9, 108, 9)
    known = {}
    loss_by_settings(problem, negatives_scope=["own", "all", "own"], statistics=known)
    assert stats.masked.tolist() == [known[f"masked_{name}"] for name in stats.blocks]


@pytest.mark.parametrize("backend", BACKENDS)
def test_negatives_out_of_inference_mode(backend):
    problem = make_problem(7, negatives=(7,), learned_temperature=False).to(torch.float32)
    with torch.inference_mode():
        frozen = tuple(x.detach().clone() for x in problem.negatives)
    leaves = [problem.anchors, problem.positives]
    found, expected = (
        torch.autograd.grad(run(replace(problem, negatives=n), backend=backend, **OWN), leaves)
        for n in (frozen, problem.negatives)
    )
    assert_close(list(found), list(expected), 1e-6)


def test_the_reference_has_second_derivatives():
    problem = make_problem(4, negatives=(4,), width=3, temperature=0.5)

    def function(*leaves):
        changed = replace(problem, anchors=leaves[0], positives=leaves[1], negatives=(leaves[2],))
        return run(changed, backend="reference", **OWN)

    assert torch.autograd.gradgradcheck(function, [problem.anchors, problem.positives, *problem.negatives])


def test_large_ones_are_taken_in_pieces(monkeypatch):
    problem = make_problem(50, negatives=(50,))
    whole = values_and_gradients(run(problem, reduction="none", **OWN), problem)
    monkeypatch.setattr(cosines, "PIECE", 7 * 12)
    assert_close(values_and_gradients(run(problem, reduction="none", **OWN), problem), whole, 1e-12)


def test_rows_of_zeros_have_no_similarity_and_no_gradient():
    x, y = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    found = row_cosines(x, y)
    assert (found == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(found.sum(), [x, y]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_guide_masks_needs_none_of_its_embeddings(backend):
    problem = make_problem(20, negatives=(20, 20), margin=0.3)
    alone = replace(problem, guide_negatives=None)
    for options in ({}, OWN):
        found, expected = (
            values_and_gradients(run(p, backend=backend, mask_negatives=False, reduction="none", **options), problem)
            for p in (alone, problem)
        )
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_named(backend):
    problem = make_problem(5, 9, (9, 5), offset=3)
    scopes = {"negatives_scope": ["all", "own"], "backend": backend}
    # The other way round the column that is everyone's is counted anew further down.
    turned = make_problem(5, 9, (5, 9), offset=3)
    bad = turned.negatives[1].detach().clone(), turned.guide_negatives[1].clone()
    bad[0][6, 1] = bad[1][6, 1] = torch.inf
    for name, changed in (
        ("negatives", replace(turned, negatives=(turned.negatives[0], bad[0]))),
        ("guide_negatives", replace(turned, guide_negatives=(turned.guide_negatives[0], bad[1]))),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\[1\]: row 6, column 1 is inf"):
            run(changed, backend=backend, negatives_scope=["own", "all"])
    broken = [x.clone() for x in (problem.guide_positives, problem.negatives[1].detach(), problem.guide_negatives[1])]
    for x in broken:
        x[4, 0] = torch.nan
    for changed, message in (
        (replace(problem, guide_positives=broken[0]), "guide_positives: row 4, column 0 is nan"),
        (replace(problem, negatives=(problem.negatives[0], broken[1])), r"negatives\[1\]: row 4, column 0 is nan"),
        (
            replace(problem, guide_negatives=(problem.guide_negatives[0], broken[2])),
            r"guide_negatives\[1\]: row 4, column 0 is nan",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(changed, **scopes)


REFUSED = {
    "own ones that are not there": ((), OWN, "negatives_scope: expected 'all' without a column of negatives"),
    "another number of scopes": ((9,), {"negatives_scope": ["own", "all"]}, r"negatives_scope: expected 1, .*got 2"),
    "an unknown scope": ((9,), {"negatives_scope": "mine"}, "negatives_scope: expected 'all' or 'own', got 'mine'"),
    "an unknown one of several": (
        (9,),
        {"negatives_scope": ["mine"]},
        r"negatives_scope\[0\]: expected 'all' or 'own', got 'mine'",
    ),
    "another number of rows": ((8,), OWN, r"negatives\[0\]: expected 9 rows with negatives_scope 'own', .*got 8"),
    "rows of everyone's": (
        (9,),
        {"negative_rows": [torch.arange(9)]},
        r"negative_rows\[0\]: expected None for negatives of all anchors, got a tensor",
    ),
    "rows that are no anchor's": (
        (2,),
        {**OWN, "negative_rows": [torch.tensor([0, 9])]},
        r"negative_rows\[0\]: expected different numbers from 0 to 8, got \[0, 9\]",
    ),
    "rows twice": (
        (2,),
        {**OWN, "negative_rows": [torch.tensor([3, 3])]},
        r"negative_rows\[0\]: expected different numbers from 0 to 8, got \[3, 3\]",
    ),
    "rows that are floats": (
        (2,),
        {**OWN, "negative_rows": [torch.tensor([0.0, 1.0])]},
        r"negative_rows\[0\]: expected a tensor \[2\] of int64 or int32, .*got type torch.float32",
    ),
    "too many groups": ((), {"groups": [torch.zeros(9, dtype=torch.int64)] * 3}, "groups: expected a tensor, or two"),
    "groups of negatives alone": (
        (9,),
        {"negative_groups": [torch.zeros(9, dtype=torch.int64)]},
        "negative_groups: given without groups",
    ),
    "groups of too few columns": (
        (9,),
        {"groups": torch.zeros(9, dtype=torch.int64), "negative_groups": []},
        "negative_groups: expected 1, one for each column of negatives, got 0",
    ),
    "groups of another length": (
        (9,),
        {"groups": torch.zeros(9, dtype=torch.int64), "negative_groups": [torch.zeros(4, dtype=torch.int64)]},
        r"negative_groups\[0\]: expected a tensor \[9\] of int64 or int32, .*got shape \[4\]",
    ),
    "a scope that is a number": ((9,), {"negatives_scope": 5}, "negatives_scope: expected 'all' or 'own', got 5"),
    "rows in one tensor": ((9,), {**OWN, "negative_rows": torch.arange(9)}, "negative_rows: expected a list .*Tensor"),
    "no groups": ((), {"groups": []}, "groups: expected a tensor, or two, .*got 0"),
    "a flag that is a text": ((9,), {"mask_negatives": "no"}, "mask_negatives: expected True or False, got 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name):
    negatives, options, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        run(make_problem(9, negatives=negatives), **options)


def test_an_overflow_is_no_vector_of_zeros():
    found = unit_vectors(torch.tensor([[3e38, 3e38], [3.0, 4.0]]))
    assert found[0].isnan().all() and found[1].tolist() == pytest.approx([0.6, 0.8])


def test_no_guide_that_masks_nothing_is_refused():
    with pytest.raises(ValueError, match=r"mask_negatives: expected True without a guide, .* got False"):
        run(make_problem(9, negatives=(9,), guide_width=None), mask_negatives=False)
