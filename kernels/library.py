"""Matrix products of the library, summed in float32."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from gist_fast.kernels.launch import LIBRARY, pass_through
from torch import Tensor

logger = logging.getLogger(__name__)

CAST_ROWS = 1024
"""Rows of a factor made float32 at a time where torch cannot sum a product of half types in float32."""


def add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """``total += a @ b``, summed in fp32. ``[N, D]``, ``[N, K]``, ``[K, D]``.

    Args:
        fresh: `total` holds nothing yet, and becomes the product.
    """
    pass_through(LIBRARY, {"total": total, "a": a, "b": b}, lambda: _add_product(total, a, b, 0 if fresh else 1))


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
        return
    way = way_to_add(a.device, a.dtype) if a.is_cuda else "cast"
    if way == "in place":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif way == "apart":
        product = torch.mm(a, b, out_dtype=total.dtype)
        total.add_(product) if beta else total.copy_(product)
    else:
        b = b.to(total.dtype)
        for first in range(0, a.shape[0], CAST_ROWS):
            rows = total[first : first + CAST_ROWS]
            torch.addmm(rows, a[first : first + CAST_ROWS].to(total.dtype), b, beta=beta, out=rows)


@functools.cache
def way_to_add(device: torch.device, dtype: torch.dtype) -> str:
    """How this torch sums a product of half types into a float32 tensor; found out by doing it once.

    ``"in place"`` saves the product's way to memory; where torch has neither that nor a product of half types that is
    not rounded to a half type, ``"cast"`` multiplies in float32.
    """
    total = torch.ones(16, 16, device=device)
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    way = "cast"
    if _works(lambda: torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)) and (total == 17).all():
        way = "in place"
    elif _works(lambda: torch.mm(ones, ones, out_dtype=total.dtype)):
        way = "apart"
    logger.info("%s products are summed in float32: %s", dtype, way)
    return way


def _works(product: Callable[[], Tensor]) -> bool:
    """Whether torch knows such a product. A full or a broken card says nothing about that, and is nobody's to hide."""
    try:
        product()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, TypeError) as error:
        if "ALLOC_FAILED" in str(error):
            raise
        return False
    return True
