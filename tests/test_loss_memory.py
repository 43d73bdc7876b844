"""What a step adds to its inputs at its peak, counted while the very code runs that runs on a GPU.

Tensors are fake: they have shapes and storages, and no memory. Kernels are recorded, and neither run nor allocate
anything. What an operation of torch's allocates inside itself is not seen; on a GPU that is cuBLAS's workspace, some
32 MiB.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from gist_fast.kernels import dlogits, unpack
from gist_fast.kernels.chunks import make_plan
from gist_fast.kernels.launch import record_launches

from gist_fast.functional import mask_products, operands, operator
from gist_fast.functional.backends import triton
from gist_fast.functional.blocks import make_blocks
from gist_fast.functional.loss_config import LossConfig

GB = 10**9


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until nobody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def ignore(self, tensors: list[Tensor]) -> None:
        """Leave out tensors that were there before."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, n_bytes: int) -> None:
        self._known.remove(key)
        self.now -= n_bytes

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*arguments, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out


def add_product_apart(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """The dearer of the two ways of a GPU: the product apart, in float32."""
    total.add_(torch.empty(a.shape[0], b.shape[1]))


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # They are tensors of a CPU, since a torch without CUDA cannot cut up those of a GPU. What a CPU would do besides:
    # look for numbers that are not finite, and multiply half types in float32.
    monkeypatch.setattr(operands, "_refuse_not_finite", lambda *_: None)
    for module in (dlogits, unpack):
        monkeypatch.setattr(module, "add_product", add_product_apart)
    # Tables of chunks are kept from call to call, and those that are made here hold nothing.
    make_plan.cache_clear()
    with FakeTensorMode(), record_launches():
        yield
    make_plan.cache_clear()


def peaks(
    batch: int,
    width: int,
    guide_width: int,
    *,
    keep_mask_bits: bool,
    config: LossConfig = LossConfig(margin=0.05),  # noqa: B008
    grouped: bool = False,
    widths: tuple[int, ...] = (),
    negatives: int = 0,
) -> tuple[int, int]:
    """Most bytes above the inputs in the forward pass and in all, gradients by the embeddings included."""
    student = [torch.empty(batch, width, dtype=torch.bfloat16) for _ in range(2 + negatives)]
    guide = [torch.empty(batch, guide_width, dtype=torch.bfloat16) for _ in range(2 + negatives)]
    temperature = torch.empty(())
    groups = [torch.empty(2 * batch, dtype=torch.int64)] if grouped else []
    others = (None, groups, widths, keep_mask_bits, False, True, batch, 0, *config.to_arguments())
    with Peak() as peak:
        peak.ignore([*student, *guide, temperature, *groups])
        loss, lse2, *statistics, bits = operator.forward_rows("triton", student, guide, temperature, *others)
        forward = peak.most
        # `_setup_context` lets the guide go. Here it stays, an input that does not count: storages made
        # where its own were freed would not count either.
        needed = [] if len(bits) > 0 else guide
        gradients = operator.backward_rows(
            torch.empty_like(loss), lse2, bits, "triton", student, needed, temperature, *others
        )
        assert [g.dtype for g in gradients[:2]] == [torch.bfloat16] * 2
        kept = sum(x.untyped_storage().nbytes() for x in (loss, lse2, *statistics, bits, *gradients))
        # Nothing is left behind but what was returned.
        del loss, lse2, statistics, bits, gradients
        assert kept > 2 * batch * width * 2
        # Tables of chunks are kept for the next call of the shape.
        assert peak.now < 300_000
        make_plan.cache_clear()
        assert peak.now < 1000
    return forward, peak.most


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(("keep_mask_bits", "limit"), [(False, GB), (True, 8 * GB)])
def test_the_largest_batch_adds_less_than_is_promised(keep_mask_bits: bool, limit: int) -> None:
    forward, both = peaks(131_072, 384, 1024, keep_mask_bits=keep_mask_bits)
    print(f"bits kept: {keep_mask_bits}; forward {forward / GB:.3f} GB, with backward {both / GB:.3f} GB")
    assert forward <= both < limit
    # The bits alone, or the gradients in float32 and the operands: less would mean that the count misses them.
    assert both > (6.4 * GB if keep_mask_bits else 0.6 * GB)


VARIANTS = {
    "hard, of groups": ({"config": LossConfig(margin=0.05, hard=True), "grouped": True}, GB),
    "hardness weighting": (
        {"config": LossConfig(margin=0.05, hardness_mode="in_batch_negatives", hardness_strength=5.0)},
        GB,
    ),
    # Of each column: its operands, its gradients in float32, and those in the embeddings' type.
    "a column of negatives": ({"negatives": 1}, 1.3 * GB),
    # Of each narrower dim: its operands, and gradients in float32 that are summed in float32.
    "Matryoshka dims": ({"widths": (384, 192, 96)}, 1.8 * GB),
    "a softmax each of two directions": (
        {
            "config": LossConfig(
                margin=0.05, directions=["query_to_doc", "doc_to_query"], partition_mode="per_direction"
            )
        },
        GB,
    ),
    "every direction": (
        {
            "config": LossConfig(
                margin=0.05, directions=["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
            ),
            "negatives": 1,
        },
        1.3 * GB,
    ),
}


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "direction" in name else name for name in VARIANTS]
)
def test_variants_hold_no_matrix_and_never_ask_the_device(name: str) -> None:
    """Fake tensors have no values: a host that waited for one would raise."""
    options, limit = VARIANTS[name]
    _, both = peaks(131_072, 384, 1024, keep_mask_bits=False, **options)
    print(f"{name}: {both / GB:.3f} GB")
    assert both < limit


@pytest.mark.usefixtures("no_memory")
def test_a_mask_is_multiplied_chunk_by_chunk() -> None:
    config = LossConfig()
    blocks = make_blocks(131_072, (131_072, 131_072), config)
    bits = torch.empty(triton.mask_bytes(blocks, 1), dtype=torch.uint8)
    other = torch.empty(131_072, 392)
    with Peak() as peak:
        peak.ignore([bits, other])
        found = mask_products._mask_product("triton", bits, other, False, 1, torch.bfloat16, [131_072] * 3 + [1, 0],
            *config.to_arguments())  # fmt: skip
        assert found.shape == (131_072, 392)
    print(f"{peak.most / GB:.3f} GB")
    assert peak.most < 0.8 * GB
