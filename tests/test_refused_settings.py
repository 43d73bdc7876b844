"""Settings of the loss that make no sense, alone or together, are refused by name."""

from __future__ import annotations

import pytest
import torch
from oracle import make_problem
from test_variants import run

from gist_fast import guided_contrastive_loss

REFUSED = {
    "a margin without a guide": ({"margin": 0.1}, False, r"margin: expected 0\.0 without a guide,.* got 0\.1"),
    "ties without a guide": ({"mask_ties": True}, False, r"mask_ties: expected False without a.* got True"),
    "margins of another length": (
        {"margin": torch.zeros(3)},
        True,
        r"margin: expected a float, or a floating.* got a tensor of shape \[3\] and type torch\.float32\.",
    ),
    "margins that are NaN": ({"margin": torch.full((9,), torch.nan)}, True, r"margin: expected .*got nan in row 0\."),
    "a triplet term with nothing to go by": ({"triplet_margin": 0.1}, False, r"triplet_margin: nothing says"),
    "a triplet margin of 0": ({"triplet_margin": 0.0}, True, r"triplet_margin: expected .*got 0\.0\."),
    "a triplet term of hard negatives": ({"triplet_margin": 0.1, "hard": True}, True, r"hard: expected .*got True\."),
    "a triplet term without masks": (
        {"triplet_margin": 0.1, "mask_bits": "recompute"},
        True,
        r"mask_bits: expected 'keep' with.* got 'recompute'\.",
    ),
    "groups of another length": (
        {"groups": torch.zeros(3, dtype=torch.int64)},
        True,
        r"groups: expected a tensor \[9\] of int64 or.* got shape \[3\]\.",
    ),
    "groups that are floats": ({"groups": torch.zeros(9)}, True, r"groups: expected .*got type torch\.float32\."),
    "groups in a list": ({"groups": [0] * 9}, True, r"groups: expected a tensor \[9\] of int64 or.* got list\."),
    "an unknown mode": (
        {"hardness_mode": "hard", "hardness_strength": 1.0},
        True,
        r"hardness_mode: expected.* got 'hard'\.",
    ),
    "a mode that does nothing": ({"hardness_mode": "all_negatives"}, True, r"hardness_strength: expected .*got 0\.0\."),
    "a strength without a mode": ({"hardness_strength": 2.0}, True, r"hardness_strength: expected .*got 2\.0"),
    "a negative strength": (
        {"hardness_mode": "all_negatives", "hardness_strength": -1.0},
        True,
        r"hardness_strength: expected a finite float of at least 0, got -1\.0\.",
    ),
    "own negatives that are not there": (
        {"hardness_mode": "hard_negatives", "hardness_strength": 2.0},
        True,
        r"hardness_mode: expected.* got 'hard_negatives'\.",
    ),
    "widths above the model's": ({"matryoshka_dims": [64, 8]}, True, r"matryoshka_dims: expected .*got 64\."),
    "a width twice": ({"matryoshka_dims": [8, 8]}, True, r"matryoshka_dims: expected .*got \[8, 8\]\."),
    "no width": ({"matryoshka_dims": []}, True, r"matryoshka_dims: expected different ints of at least 1, got \[\]\."),
    "a width that is no int": ({"matryoshka_dims": [8.0]}, True, r"matryoshka_dims: expected .*got \[8\.0\]\."),
    "too few weights": (
        {"matryoshka_dims": [8, 4], "matryoshka_weights": [1.0]},
        True,
        r"matryoshka_weights: expected 2, one for each of the dims, got 1\.",
    ),
    "weights alone": ({"matryoshka_weights": [1.0]}, True, r"matryoshka_weights: given without"),
    "no direction": ({"directions": []}, True, r"directions: expected 'query_to_doc' among them.* got \[\]\."),
    "a direction twice": (
        {"directions": ["query_to_doc"] * 2},
        True,
        r"directions: expected each once, got 'query_to_doc' 2 times",
    ),
    "directions without the positives": (
        {"directions": ["doc_to_query"]},
        True,
        r"directions: .*got \['doc_to_qu",
    ),
    "a direction in a word": (
        {"directions": "query_to_doc"},
        True,
        r"directions: expected a list of .*got 'query_to",
    ),
    "an unknown direction": (
        {"directions": ["query_to_doc", "doc_to_querry"]},
        True,
        r"directions\[1\]: expected .*got 'doc_to_querry'\.",
    ),
    "two ways to say what is compared": (
        {"directions": ["query_to_doc"], "contrast_anchors": False},
        True,
        r"contrast_anchors: got False beside direct",
    ),
    "softmaxes of nothing": ({"partition_mode": "per_direction"}, True, r"partition_mode: expected 'joint' without"),
    "a softmax without a positive": (
        {"directions": ["query_to_doc", "doc_to_doc"], "partition_mode": "per_direction"},
        True,
        r"partition_mode: expected 'joint' with 'doc_to_doc'.* got 'per_direction'\.",
    ),
    "rows that are no number": ({"rows": "9"}, True, r"rows: expected an int or None, got '9' \(str\)\."),
    "more rows than anchors": ({"rows": 10}, True, r"rows: expected from 1 to 9, .*got 10\."),
    "anchors that nobody is compared with": (
        {"rows": 5},
        True,
        r"rows: expected 9, the number of anchors, got 5: ",
    ),
    "smooth labels of hard negatives": (
        {"label_smoothing": 0.1, "hard": True},
        True,
        r"hard: expected False with label_smoothing.*got True\.",
    ),
    "debiasing without masks": (
        {"positive_prior": 0.1, "mask_bits": "recompute"},
        True,
        r"mask_bits: expected 'keep' with positive_prior",
    ),
    "debiasing with the positive twice": (
        {"positive_prior": 0.1, "directions": ["query_to_doc", "doc_to_query"]},
        True,
        r"positive_prior: expected 0 with 'doc_to_query' in directions.*got 0\.1\.",
    ),
    "smooth labels of other weights": (
        {"label_smoothing": 0.1, "positive_prior": 0.1},
        True,
        r"label_smoothing: expected 0 with positive_prior.*0\.1",
    ),
    "nobody to learn from": (
        {"distill_weight": 1.0},
        False,
        r"distill_weight: expected 0\.0 without a guide.*got 1\.0",
    ),
    "a guide that does not read all": (
        {"distill_weight": 1.0, "mask_negatives": False},
        True,
        r"mask_negatives: expected True with distill_weight",
    ),
    "a temperature of nothing": (
        {"distill_temperature": 0.1},
        True,
        r"distill_temperature: got 0\.1 without distill_weight\. Set",
    ),
    "all of the target smoothed away": ({"label_smoothing": 1.0}, True, r"label_smoothing: expected .*below 1.*got 1"),
    "a flag that is a text": ({"hard": "no"}, True, r"hard: expected True or False, got 'no' \(str\)\."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    options, guided, message = REFUSED[name]
    problem = make_problem(9, guide_width=7 if guided else None)
    with pytest.raises((ValueError, TypeError), match=message):
        guided_contrastive_loss(**problem.arguments() | options)


def test_hard_negatives_of_a_student_that_guides_itself_are_refused() -> None:
    problem = make_problem(9)
    with pytest.raises(ValueError, match="hard: expected False with self_guided, got True"):
        run(problem, "tiled", self_guided=True, hard=True)


def test_a_student_does_not_learn_from_itself() -> None:
    problem = make_problem(9)
    with pytest.raises(ValueError, match=r"distill_weight: expected 0 where the student guides itself.*got 1\.0"):
        run(problem, "tiled", self_guided=True, distill_weight=1.0)


def test_other_anchors_are_those_of_all_positives() -> None:
    problem = make_problem(5, 9, anchors=7)
    with pytest.raises(ValueError, match=r"anchors: expected 5 rows, as rows says, or 9, as positives have, got 7\."):
        run(problem, "tiled", rows=5, directions=["query_to_doc", "doc_to_query"])


def test_negatives_of_the_positives_are_told_from_a_row_s_own() -> None:
    problem = make_problem(9, negatives=(5,))
    with pytest.raises(ValueError, match=r"negatives\[0\]: expected at least 9 rows with 'doc_to_doc'.*got 5\. Or"):
        run(problem, "tiled", directions=["query_to_doc", "doc_to_doc"])
