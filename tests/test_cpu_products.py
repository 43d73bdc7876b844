"""float32 products on a CPU: oneDNN's are what MKL's are, and are taken where they are known to be faster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import largest_errors, make_problem, values_and_gradients
from torch import Tensor

from gist_fast import guided_contrastive_loss
from gist_fast.functional.backends import cpu_products, tiled
from gist_fast.functional.operands import tie_band
from gist_fast.runtime import environment

has_operator = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch is built without oneDNN's operator",
)
SHAPES = [(1, 1, 1), (1, 70, 33), (70, 1, 33), (17, 5, 1), (127, 333, 61), (96, 130, 384)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """oneDNN takes every float32 product, and each of them is counted."""
    found: list[str] = []
    linear = cpu_products._linear

    def count(a: Tensor, b: Tensor) -> Tensor:
        found.append("oneDNN")
        return linear(a, b)

    monkeypatch.setattr(cpu_products, "_linear", count)
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_products, "LEAST_WORK", 0)
    return found


@pytest.fixture
def fresh() -> Iterator[None]:
    """The choice is made anew, and again afterwards."""
    cpu_products.onednn_is_faster.cache_clear()
    yield
    cpu_products.onednn_is_faster.cache_clear()


def unit_rows(rows: int, width: int, seed: int) -> Tensor:
    rows_ = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows_, dim=1).float()


@has_operator
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(
    calls: list[str], shape: tuple[int, int, int], transposed: tuple[bool, bool]
) -> None:
    m, n, k = shape
    a, b = unit_rows(m, k, 0), unit_rows(n, k, 1).T
    if transposed[0]:
        a = a.T.contiguous().T
    if transposed[1]:
        b = b.contiguous()
    exact, band = a.double() @ b.double(), tie_band(torch.float32, k)
    wide = torch.full((m, 2 * n), 7.0)
    cpu_products.put_product(wide[:, :n], a, b)
    total = torch.ones(m, n)
    cpu_products.add_product(total, a, b)
    for found in (cpu_products.product(a, b, torch.empty(m, n)), wide[:, :n], total - 1):
        assert found.dtype == torch.float32 and found.shape == (m, n)
        assert (found.double() - exact).abs().max() < band
    assert (wide[:, n:] == 7).all()
    assert len(calls) == 3


@has_operator
@pytest.mark.parametrize("width", [64, 200, 256, 384, 1024, 4096])
def test_sums_leave_room_in_the_band_of_ties(calls: list[str], width: int) -> None:
    """The room is for the threshold, which is summed elsewhere."""
    for x in (torch.rand(300, width), torch.randn(300, width), 1 + 0.01 * torch.rand(300, width)):
        x = torch.nn.functional.normalize(x, dim=1)
        found = cpu_products.product(x, x.T, torch.empty(300, 300))
        assert (found.double() - x.double() @ x.double().T).abs().max() < tie_band(torch.float32, width) * 0.75
    assert calls


@has_operator
def test_what_is_not_finite_stays_in_its_row(calls: list[str]) -> None:
    a, b = unit_rows(20, 40, 0), unit_rows(30, 40, 1)
    a[3, 5], a[7, 0] = torch.nan, torch.inf
    found = cpu_products.product(a, b.T, torch.empty(20, 30))
    assert found[3].isnan().all() and found[7].isinf().all()
    assert found.isfinite().all(dim=1).sum() == 18


CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "a guide": ((37, 37, (), 33, 21), {}, {}),
    "gathered candidates and negatives": ((29, 71, (71, 40), 17, 9), {"offset": 23, "margin": 0.1}, {}),
    "no guide": ((37, 37, (5,), 16, None), {}, {}),
    "hard": ((37, 37, (37,), 16, 9), {}, {"hard": True}),
    "hardness": ((37, 37, (37,), 16, 9), {}, {"hardness_mode": "in_batch_negatives", "hardness_strength": 2.0}),
    "Matryoshka": ((37, 37, (), 16, 9), {}, {"matryoshka_dims": [16, 7], "matryoshka_weights": [1.0, 0.5]}),
    "groups": ((37, 37, (), 16, 9), {}, {"groups": torch.arange(37) // 3}),
    "decided again": ((37, 37, (5,), 16, 9), {}, {"mask_bits": "recompute"}),
    "a triplet term": ((37, 37, (), 16, 9), {}, {"triplet_margin": 0.2}),
    "packed masks": ((37, 37, (), 16, 9), {}, {"mask_bits": "keep"}),
}


@has_operator
@pytest.mark.parametrize("backend", ["tiled", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_every_variant_is_as_near_to_float64_as_by_mkl(
    monkeypatch: pytest.MonkeyPatch, calls: list[str], name: str, dtype: torch.dtype, backend: str
) -> None:
    monkeypatch.setattr(tiled, "TILE", 16)
    if name == "packed masks":
        monkeypatch.setattr("gist_fast.functional.backends.kept.SCORES_PAIRS", 0)
    sizes, about, options = CASES[name]
    problem = make_problem(*sizes, learned_temperature=False, **about).to(dtype)
    exact = problem.to(torch.float64)

    def run(which: Any, backend: str) -> tuple[list[Tensor], dict[str, Any]]:
        loss, stats = guided_contrastive_loss(
            **which.arguments(), reduction="none", backend=backend, return_stats=True, **options
        )
        return values_and_gradients(loss, which), stats.as_dict()

    wanted, counts = run(exact, "reference")
    found, found_counts = run(problem, backend)
    taken = len(calls)
    assert taken > 0
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: False)
    by_mkl, _ = run(problem, backend)
    assert len(calls) == taken
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert found_counts == pytest.approx(counts, rel=tolerance, abs=tolerance, nan_ok=True)
    for ours, theirs in zip(largest_errors(found, wanted), largest_errors(by_mkl, wanted), strict=True):
        assert ours <= 1.5 * theirs + 8 * torch.finfo(torch.float32).eps


@has_operator
def test_copies_of_the_positives_text_stay_ties(calls: list[str]) -> None:
    """Equal texts tie with the threshold, whoever sums."""
    problem = make_problem(60, 60, (60,), 33, 256, learned_temperature=False).to(torch.float32)
    guide = problem.guide_positives.clone()
    guide[1::2] = guide[::2]
    problem = replace(problem, guide_positives=guide)
    masked = {}
    for backend in ("tiled", "auto", "reference"):
        _, stats = guided_contrastive_loss(**problem.arguments(), backend=backend, return_stats=True)
        masked[backend] = stats.masked.tolist()
    assert calls
    assert masked["tiled"] == masked["auto"] == masked["reference"]


def test_other_types_and_small_products_are_torchs_own(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        a, out = torch.eye(4, dtype=dtype), torch.empty(4, 4, dtype=dtype)
        assert cpu_products.product(a, a, out) is out
    assert torch.equal(out, a)
    a, out = torch.eye(8), torch.empty(8, 8)
    monkeypatch.setattr(cpu_products, "LEAST_WORK", 8**3 + 1)
    assert cpu_products.product(a, a, out) is out
    monkeypatch.setattr(cpu_products, "LEAST_WORK", 8**3)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert cpu_products.product(a, a, out) is out
    assert calls == []


@pytest.mark.parametrize(
    ("family", "capability", "mkl", "taken"),
    [
        (("AuthenticAMD", 26), "AVX512", True, True),
        (("AuthenticAMD", 25), "AVX512", True, False),
        (("AuthenticAMD", 26), "AVX2", True, False),
        (("AuthenticAMD", 26), "AVX512", False, False),
        (("GenuineIntel", 27), "AVX512", True, False),
        (("", 0), "DEFAULT", True, False),
    ],
)
@has_operator
@pytest.mark.usefixtures("fresh")
def test_the_machine_decides(
    monkeypatch: pytest.MonkeyPatch, family: tuple[str, int], capability: str, mkl: bool, taken: bool
) -> None:
    pretend(monkeypatch, family, capability, mkl)
    assert cpu_products.onednn_is_faster() is taken


@pytest.mark.parametrize("fault", [RuntimeError("no such thing"), "wrong"])
@pytest.mark.usefixtures("fresh")
def test_an_operator_that_fails_is_named_once_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception | str
) -> None:
    pretend(monkeypatch, cpu_products.ZEN_5, "AVX512", True)

    def fails(a: Tensor, b: Tensor) -> Tensor:
        if isinstance(fault, Exception):
            raise fault
        return torch.zeros(a.shape[0], b.shape[1])

    monkeypatch.setattr(cpu_products, "_linear", fails)
    monkeypatch.setattr(cpu_products, "LEAST_WORK", 0)
    a, out = unit_rows(9, 9, 0), torch.empty(9, 9)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert cpu_products.product(a, a, out) is out
    assert (out.double() - a.double() @ a.double()).abs().max() < 1e-6
    (said,) = [record.getMessage() for record in caplog.records]
    assert ("no such thing" if isinstance(fault, Exception) else "got [[0.0, 0.0]") in said


def pretend(monkeypatch: pytest.MonkeyPatch, family: tuple[str, int], capability: str, mkl: bool) -> None:
    """That this machine is such a one."""
    monkeypatch.setattr(cpu_products, "cpu_family", lambda: family)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


def test_the_family_is_that_of_this_machine_or_what_windows_says(monkeypatch: pytest.MonkeyPatch) -> None:
    vendor, family = environment.cpu_family()
    info = Path("/proc/cpuinfo")
    if info.exists() and "cpu family" in info.read_text():
        assert f": {vendor}\n" in info.read_text() and f": {family}\n" in info.read_text()
    monkeypatch.setattr(environment, "_cpu_info", lambda key: None)
    for said, found in (
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", ("AuthenticAMD", 26)),
        ("arm", ("", 0)),
        ("", ("", 0)),
    ):
        monkeypatch.setattr(environment.platform, "processor", lambda said=said: said)
        assert environment.cpu_family() == found
