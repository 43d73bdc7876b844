"""Wrong input to the function: each is refused by name, with what came and what would do."""

from __future__ import annotations

import pytest
import torch

from gist_fast import guided_contrastive_loss


def x(rows: int = 4, width: int = 3, **kwargs) -> torch.Tensor:
    return torch.ones(rows, width, **kwargs)


GOOD = {"anchors": x(), "positives": x(), "guide_anchors": x(width=2), "guide_positives": x(width=2)}
WRONG = [
    ({"anchors": [[1.0]]}, TypeError, r"anchors: got list"),
    ({"anchors": x(dtype=torch.int64)}, TypeError, r"anchors: got type torch.int64; float32"),
    ({"guide_positives": x(width=2).bool()}, TypeError, r"guide_positives: got type torch.bool"),
    ({"anchors": torch.ones(3)}, ValueError, r"anchors: got shape \[3\]; a matrix"),
    ({"anchors": x(0)}, ValueError, r"anchors: got shape \[0, 3\]; at least one row"),
    ({"positives": x(4, 0)}, ValueError, r"positives: got shape \[4, 0\]; at least one row and one column"),
    ({"positives": x(width=5)}, ValueError, r"positives: got width 5, but anchors have 3"),
    ({"positives": x().half()}, TypeError, r"positives: got type torch.float16, but anchors have torch.float32"),
    ({"positives": x(3)}, ValueError, r"positives: 4 anchors at offset 0 need at least 4 rows.*\[3, 3\]"),
    ({"offset": 1}, ValueError, r"positives: 4 anchors at offset 1 need at least 5 rows"),
    ({"offset": -1}, ValueError, r"offset: got -1"),
    ({"offset": 0.0}, TypeError, r"offset: got 0.0 of type float; an int"),
    ({"guide_positives": None}, ValueError, r"guide_positives: missing, though guide_anchors came"),
    ({"guide_anchors": None}, ValueError, r"guide_anchors: missing, though guide_positives came"),
    ({"guide_anchors": x(3, 2)}, ValueError, r"guide_anchors: got 3 rows and anchors 4"),
    ({"guide_positives": x(width=7)}, ValueError, r"guide_positives: got width 7, but guide_anchors have 2"),
    ({"negatives": (x(),)}, ValueError, r"guide_negatives: 1 columns of negatives came and 0 of the guide's"),
    ({"negatives": x()}, TypeError, r"negatives: got one tensor of shape \[4, 3\]; a tuple"),
    ({"negatives": (x(), x(width=9)), "guide_negatives": (x(), x())}, ValueError, r"negatives\[1\]: got width 9"),
    ({"negatives": (x(),), "guide_negatives": x()}, TypeError, r"guide_negatives: got one tensor of shape \[4, 3\]"),
    ({"negatives": 3}, TypeError, r"negatives: got int; a tuple"),
    ({"guide_negatives": (x(width=2),)}, ValueError, r"guide_negatives: 0 columns of negatives came and 1"),
    ({"temperature": 0.0}, ValueError, r"temperature: got 0.0; a float above 0"),
    ({"temperature": -1}, ValueError, r"temperature: got -1"),
    ({"temperature": float("nan")}, ValueError, r"temperature: got nan"),
    ({"temperature": "0.1"}, TypeError, r"temperature: got '0.1' of type str"),
    ({"temperature": torch.ones(2)}, ValueError, r"temperature: got a tensor of shape \[2\]"),
    ({"temperature": torch.tensor(-0.5)}, ValueError, r"temperature: got -0.5"),
    ({"temperature": 1e-31}, ValueError, r"temperature: got 1e-31.*torch.float32 embeddings overflow; 1e-30 or more"),
    ({"anchors": x().to_sparse()}, TypeError, r"anchors: got layout torch.sparse_coo; .*anchors.to_dense\(\)"),
    ({"margin": None}, TypeError, r"margin: got None"),
    ({"margin": float("inf")}, ValueError, r"margin: got inf"),
    ({"margin_strategy": "both"}, ValueError, r"margin_strategy: got 'both'; one of 'absolute', 'relative'"),
    ({"reduction": "max"}, ValueError, r"reduction: got 'max'; one of 'mean', 'sum', 'none'"),
    ({"backend": "cuda"}, ValueError, r"backend: got 'cuda'; one of 'auto', 'triton', 'tiled', 'reference'"),
    ({"mask_bits": True}, ValueError, r"mask_bits: got True; one of 'auto'"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[m[:40] for _, _, m in WRONG])
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        guided_contrastive_loss(**{**GOOD, **change})


def test_a_temperature_at_which_half_types_overflow_is_refused():
    half = {name: embeddings.half() for name, embeddings in GOOD.items()}
    with pytest.raises(ValueError, match=r"temperature: got 9e-07, .*torch.float16 embeddings overflow; 1e-06 or more"):
        guided_contrastive_loss(**half, temperature=9e-7)
    leaves = [torch.randn(30, 24).half().requires_grad_() for _ in range(2)]
    guided_contrastive_loss(*leaves, temperature=1e-6).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_devices_must_agree():
    with pytest.raises(ValueError, match=r"positives: on meta, but anchors are on cpu; use one device"):
        guided_contrastive_loss(**{**GOOD, "positives": x(device="meta")})
    guide = {"guide_anchors": x(width=2, device="meta"), "guide_positives": x(width=2, device="meta")}
    with pytest.raises(ValueError, match=r"guide_anchors: on meta, but anchors are on cpu; move all to one device"):
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
