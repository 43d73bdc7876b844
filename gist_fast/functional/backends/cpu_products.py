"""float32 matrix products on a CPU, by the faster of the libraries that torch carries.

``torch.mm`` goes through MKL, whose code for AMD's processors reaches half the rate of oneDNN's on a Zen 5, which has
AVX-512 at its full width. torch has oneDNN's as the operator that its compiler takes for linear layers. It multiplies
and sums in float32 all the same. Its sums are longer chains: of 384 columns they stay within 11 units of the last
place of 1.0 (MKL's within 5), and so inside the band of ties (`gist_fast.functional.operands.tie_band`).

The choice depends on the machine and the build alone, never on a clock: a run that is resumed multiplies as before.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from gist_fast.runtime.environment import cpu_family

logger = logging.getLogger(__name__)

ZEN_5 = "AuthenticAMD", 26
"""Whose processors, and the least family. Earlier ones that know AVX-512 have it at half the width; not measured."""
LEAST_WORK = 2**20
"""Multiplications of a product from which on oneDNN is asked. At 128 x 128 x 128, twice that, it took 29 us on one
thread, MKL 43; at 16 x 32 x 384, a fifth, 14 and 7."""


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b``, of one type: in `out`, or in new memory where the library makes its own."""
    return _linear(a, b) if _by_onednn(a, b) else torch.mm(a, b, out=out)


def put_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, of one type."""
    if _by_onednn(a, b):
        out.copy_(_linear(a, b))
    else:
        torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, of one type."""
    if _by_onednn(a, b):
        total.add_(_linear(a, b))
    else:
        total.addmm_(a, b)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= LEAST_WORK
        and not a.is_cuda
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)  # how a user of torch turns oneDNN off
    )


def _linear(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 here; said once where it should and cannot."""
    (vendor, family), (amd, zen_5) = cpu_family(), ZEN_5
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not (wide and libraries and vendor == amd and family >= zen_5):
        return False
    a = torch.arange(6.0, device="cpu").view(2, 3)
    try:
        # It is no public operator: another version of torch may have it otherwise, or not at all.
        found = _linear(a, a.T)
        if not torch.equal(found, a @ a.T):
            raise RuntimeError(f"expected {(a @ a.T).tolist()}, got {found.tolist()}")
    except (AttributeError, TypeError, RuntimeError) as error:
        logger.warning(
            "float32 products go through MKL, at half the speed that this CPU could have: torch %s's operator "
            "mkldnn::_linear_pointwise failed (%s: %s).",
            torch.__version__,
            type(error).__name__,
            " ".join(str(error).split())[:300],
        )
        return False
    return True
