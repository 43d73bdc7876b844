"""How far a dot product may stand from another of the same vectors, and still be a tie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gist_fast.functional.operands import tie_band

WIDTHS = (16, 100, 256, 1024, 4096, 8192)


def towards_zero(exact: Tensor) -> Tensor:
    """float64 to float32, cut off."""
    nearest = exact.float()
    return torch.where(nearest.double().abs() > exact.abs(), torch.nextafter(nearest, torch.zeros(())), nearest)


def cut_dots(a: Tensor, b: Tensor, step: int) -> Tensor:
    """``[N]``: the rows' dot products as a matrix unit may sum them that cuts its sum off after `step` columns."""
    total = torch.zeros(a.shape[0])
    for first in range(0, a.shape[1], step):
        columns = slice(first, first + step)
        total = towards_zero(total.double() + (a[:, columns].double() * b[:, columns].double()).sum(dim=1))
    return total


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 8)])
@pytest.mark.parametrize("kind", ["alike", "of any signs"])
def test_sums_that_are_cut_stay_within_it(width: int, dtype: torch.dtype, step: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(width)
    vectors = torch.randn(200, width, generator=generator)
    # Where all products are positive, the sum is near 1 for the longest, and loses most.
    other = vectors if kind == "alike" else vectors + 0.3 * torch.randn(200, width, generator=generator)
    a, b = (torch.nn.functional.normalize(x).to(dtype) for x in (vectors, other))
    exact = (a.double() * b.double()).sum(dim=1)
    error = (cut_dots(a, b, step).double() - exact).abs().max().item()
    assert error < tie_band(torch.float32, width)
    if (width, kind) == (8192, "alike"):
        # A band that does not grow would be too narrow.
        assert error > 2 * tie_band(torch.float32, 256)


def test_it_is_of_the_type_that_sums() -> None:
    assert tie_band(torch.float32, 100) == tie_band(torch.float32, 256) == 2.0**-19
    assert tie_band(torch.float32, 1024) == 2.0**-17
    assert tie_band(torch.float64, 1024) == 2.0**-46
