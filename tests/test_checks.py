"""Wrong input to the function: each is refused by name, with what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from gist_fast import guided_contrastive_loss


def x(rows: int = 4, width: int = 3, **kwargs) -> torch.Tensor:
    return torch.ones(rows, width, **kwargs)


GOOD = {"anchors": x(), "positives": x(), "guide_anchors": x(width=2), "guide_positives": x(width=2)}
WRONG = [
    ({"anchors": [[1.0]]}, TypeError, r"anchors: expected a floating tensor \[N, D\], got list\."),
    (
        {"anchors": x(dtype=torch.int64)},
        TypeError,
        r"anchors: expected float32, float16, bfloat16 or float64, got torch\.int64\.",
    ),
    (
        {"guide_positives": x(width=2).bool()},
        TypeError,
        r"guide_positives: expected float32, float16, bfloat16 or float64, got torch\.bool\.",
    ),
    ({"anchors": torch.ones(3)}, ValueError, r"anchors: expected a matrix \[N, D\], got shape \[3\]\."),
    ({"anchors": x(0)}, ValueError, r"anchors: expected at least one row and one column, got shape \[0, 3\]\."),
    ({"positives": x(4, 0)}, ValueError, r"positives: expected at least one row and one column, got shape \[4, 0\]\."),
    ({"positives": x(width=5)}, ValueError, r"positives: expected width 3, as anchors have, got 5\."),
    (
        {"positives": x().half()},
        TypeError,
        r"positives: expected torch\.float32, as anchors have, got torch\.float16\.",
    ),
    ({"positives": x(3)}, ValueError, r"positives: expected at least 4 rows for 4.* got shape \[3, 3\]\."),
    ({"offset": 1}, ValueError, r"positives: expected at least 5 rows for 4.* got shape \[4, 3\]\."),
    ({"offset": -1}, ValueError, r"offset: expected an int of at least 0, got -1\."),
    ({"offset": 0.0}, TypeError, r"offset: expected an int, got 0\.0 \(float\)\."),
    ({"guide_positives": None}, ValueError, r"guide_positives: missing, though guide_anchors came"),
    ({"guide_anchors": None}, ValueError, r"guide_anchors: missing, though guide_positives came"),
    ({"guide_anchors": x(3, 2)}, ValueError, r"guide_anchors: expected 4 rows, as anchors have, got 3\."),
    ({"guide_positives": x(width=7)}, ValueError, r"guide_positives: expected width 2, as guide_anchors have, got 7\."),
    ({"negatives": (x(),)}, ValueError, r"guide_negatives: expected 1, one for each column of negatives, got 0\."),
    ({"negatives": x()}, TypeError, r"negatives: expected a tuple of \[N, D\].* got one tensor of shape \[4, 3\]\."),
    (
        {"negatives": (x(), x(width=9)), "guide_negatives": (x(), x())},
        ValueError,
        r"negatives\[1\]: expected width 3, as anchors have, got 9\.",
    ),
    (
        {"negatives": (x(),), "guide_negatives": x()},
        TypeError,
        r"guide_negatives: expected a tuple of \[N,.* got one tensor of shape \[4, 3\]\.",
    ),
    ({"negatives": 3}, TypeError, r"negatives: expected a tuple of \[N, D\] tensors, one for each column, got int\."),
    (
        {"guide_negatives": (x(width=2),)},
        ValueError,
        r"guide_negatives: expected 0, one for each column of negatives, got 1\.",
    ),
    ({"temperature": 0.0}, ValueError, r"temperature: expected a finite float above 0, got 0\.0\."),
    ({"temperature": -1}, ValueError, r"temperature: expected a finite float above 0, got -1\."),
    ({"temperature": float("nan")}, ValueError, r"temperature: expected a finite float above 0, got nan\."),
    ({"temperature": "0.1"}, TypeError, r"temperature: expected a finite float above 0, got '0\.1' \(str\)\."),
    (
        {"temperature": torch.ones(2)},
        ValueError,
        r"temperature: expected a float above 0, or.* got a tensor of shape \[2\] and type torch\.float32\.",
    ),
    ({"temperature": torch.tensor(-0.5)}, ValueError, r"temperature: expected a finite float above 0, got -0\.5\."),
    ({"temperature": 1e-31}, ValueError, r"temperature: expected at least 1e-30,.* got 1e-31"),
    (
        {"anchors": x().to_sparse()},
        TypeError,
        r"anchors: expected a dense tensor, as of.* got layout torch\.sparse_coo\.",
    ),
    ({"margin": None}, TypeError, r"margin: expected a finite float, got None \(NoneType\)\."),
    ({"margin": float("inf")}, ValueError, r"margin: expected a finite float, got inf\."),
    ({"margin_strategy": "both"}, ValueError, r"margin_strategy: expected 'absolute' or 'relative', got 'both'\."),
    ({"reduction": "max"}, ValueError, r"reduction: expected 'mean', 'sum' or 'none', got 'max'\."),
    ({"backend": "cuda"}, ValueError, r"backend: expected 'auto', 'triton', 'tiled' or 'reference', got 'cuda'\."),
    ({"mask_bits": True}, ValueError, r"mask_bits: expected 'auto', 'keep' or 'recompute', got True\."),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[m[:40] for _, _, m in WRONG])
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        guided_contrastive_loss(**{**GOOD, **change})


def test_a_temperature_at_which_half_types_overflow_is_refused():
    half = {name: embeddings.half() for name, embeddings in GOOD.items()}
    with pytest.raises(
        ValueError, match=r"temperature: expected at least 1e-06, .* torch.float16 embeddings overflow, got 9e-07"
    ):
        guided_contrastive_loss(**half, temperature=9e-7)
    leaves = [torch.randn(30, 24).half().requires_grad_() for _ in range(2)]
    guided_contrastive_loss(*leaves, temperature=1e-6).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_devices_must_agree():
    with pytest.raises(ValueError, match=r"positives: expected on cpu, as anchors, got on meta"):
        guided_contrastive_loss(**{**GOOD, "positives": x(device="meta")})
    guide = {"guide_anchors": x(width=2, device="meta"), "guide_positives": x(width=2, device="meta")}
    with pytest.raises(ValueError, match=r"guide_anchors: expected on cpu, as the anchors, got on meta"):
        guided_contrastive_loss(**{**GOOD, **guide})


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("name", ["anchors", "positives", "guide_anchors", "guide_positives", "negatives[1]"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named_with_their_row(backend, name, value):
    given = {k: v.clone() for k, v in GOOD.items()}
    given |= {"negatives": (x(5), x(6)), "guide_negatives": (x(5, 2), x(6, 2))}
    tensor = given["negatives"][1] if name.startswith("negatives") else given[name]
    tensor[2, 1] = value
    found = str(value).replace("-", r"\-")
    with pytest.raises(ValueError, match=rf"^{name.replace('[', '.').replace(']', '.')}: row 2, column 1 is {found}\."):
        guided_contrastive_loss(**given, backend=backend)


def test_a_norm_that_overflows_is_named():
    given = {**GOOD, "anchors": x() * 1e30}
    with pytest.raises(ValueError, match=r"anchors: the norm of row 0 overflows torch.float32"):
        guided_contrastive_loss(**given)


def test_nothing_is_changed_in_place():
    given = {k: torch.randn_like(v) for k, v in GOOD.items()}
    before = {k: v.clone() for k, v in given.items()}
    given["anchors"].requires_grad_()
    guided_contrastive_loss(**given).backward()
    assert all(torch.equal(given[k], before[k]) for k in given)
