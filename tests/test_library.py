"""How products of the library are summed in float32, and what finding that out must not hide."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from gist_fast.kernels import library


@pytest.fixture(autouse=True)
def unknown():
    library.way_to_add.cache_clear()
    yield
    library.way_to_add.cache_clear()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_a_full_or_broken_card_is_told_and_not_remembered(error: RuntimeError, monkeypatch) -> None:
    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "addmm", fails)
        with pytest.raises(type(error)):
            library.way_to_add(torch.device("cpu"), torch.float16)
    monkeypatch.setattr(torch, "addmm", lambda total, *_, **__: total.fill_(17))
    assert library.way_to_add(torch.device("cpu"), torch.float16) == "in place"


@pytest.mark.parametrize(("missing", "way"), [((), "in place"), (("addmm",), "apart"), (("addmm", "mm"), "cast")])
def test_a_product_that_torch_lacks_is_gone_round(missing, way, monkeypatch) -> None:
    def unknown(*_, **__):
        raise TypeError("unexpected keyword argument 'out_dtype'")

    monkeypatch.setattr(torch, "addmm", lambda total, *_, **__: total.fill_(17))
    monkeypatch.setattr(torch, "mm", lambda *_, **__: None)
    for name in missing:
        monkeypatch.setattr(torch, name, unknown)
    assert library.way_to_add(torch.device("cpu"), torch.float16) == way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_are_those_of_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(300, 70).to(dtype), torch.randn(70, 33).to(dtype)
    total = torch.ones(300, 33)
    library.add_product(total, a, b)
    torch.testing.assert_close(total.double(), 1 + a.double() @ b.double(), atol=1e-4, rtol=1e-5)
    nothing = torch.full((300, 33), torch.nan)
    library.add_product(nothing, a, b, fresh=True)
    torch.testing.assert_close(nothing.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-5)
