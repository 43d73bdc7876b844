"""The custom operators are what ``torch.compile`` takes them for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gist_fast.functional.operator  # noqa: F401, registers the operators
from gist_fast import guided_contrastive_loss
from gist_fast.functional.backends import dense
from gist_fast.functional.choices import Direction
from gist_fast.functional.loss_config import LossConfig

BOTH_WAYS: list[Direction] = ["query_to_doc", "doc_to_query"]
EVERY_WAY: list[Direction] = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]


def embeddings(guided: bool, anchors: int = 9) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = (anchors, 12, 14)
    student = [torch.randn(n, 8, generator=generator, requires_grad=True) for n in sizes]
    return student, [torch.randn(n, 5, generator=generator) for n in sizes] if guided else []


def check_operators(backend: str) -> None:
    """`torch.library.opcheck` on both operators, with and without a guide, bits kept or not, in any directions."""
    joint: dict[str, Any] = {"directions": EVERY_WAY}
    apart: dict[str, Any] = {"directions": BOTH_WAYS, "partition_mode": "per_direction"}
    # Anchors of other ranks behind the nine.
    for guided, self_guided, keep_mask_bits, one_sign, groups, ways, anchors in (
        (True, False, True, False, 0, {}, 9),
        (True, False, False, True, 2, {}, 9),
        (False, True, True, True, 1, {}, 9),
        (False, False, False, False, 0, {}, 9),
        (True, False, True, False, 2, joint, 12),
        (False, True, False, False, 1, apart, 12),
    ):
        student, guide = embeddings(guided, anchors)
        temperature = torch.tensor(0.1, requires_grad=True)
        config = LossConfig(margin=0.1, self_guided=self_guided, **ways)
        both = [torch.arange(anchors + 12) // 2, torch.arange(anchors + 12 + 14) // 3]
        static = (None, both[:groups], [], keep_mask_bits, False, one_sign, 9, 2, *config.to_arguments())
        arguments = (backend, student, guide, temperature, *static)
        torch.library.opcheck(torch.ops.gist_fast.guided_forward.default, arguments)
        loss, lse2, *_, bits = torch.ops.gist_fast.guided_forward(*arguments)
        assert loss.shape == lse2.shape == (1, 9 * config.softmaxes)
        # Without gradients: this operator refuses to be differentiated, by name.
        student, temperature = [x.detach() for x in student], temperature.detach()
        upstream = torch.ones_like(loss).detach()
        arguments = (upstream, lse2.detach(), bits, backend, student, guide, temperature, *static)
        torch.library.opcheck(torch.ops.gist_fast.guided_backward.default, arguments)


def check_a_compiled_step(backend: str) -> None:
    """Loss and gradients of a step compiled without graph breaks are those of the plain one."""
    apart: dict[str, Any] = {"rows": 9, "directions": BOTH_WAYS, "partition_mode": "per_direction"}
    for anchors, ways in ((9, {}), (12, apart), (12, {"rows": 9, "directions": EVERY_WAY})):
        student, guide = embeddings(True, anchors)

        def step(*leaves: torch.Tensor, guide: list[torch.Tensor] = guide, ways: dict = ways) -> torch.Tensor:
            return guided_contrastive_loss(
                2 * leaves[0], leaves[1], *guide[:2], leaves[2:], guide[2:], margin=0.1, offset=3, backend=backend,
                **ways,
            )  # fmt: skip

        torch._dynamo.reset()
        found = []
        for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            loss = run(*student)
            found.append([loss, *torch.autograd.grad(loss, student)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_floats_may_change_in_a_compiled_step(dynamic: bool | None) -> None:
    """A schedule of the temperature, a search over margins: no graph break, and the plain values."""
    student, guide = embeddings(True)

    def step(temperature: float, margin: float) -> torch.Tensor:
        return guided_contrastive_loss(
            student[0], student[1], *guide[:2], temperature=temperature, margin=margin, hardness_mode="all_negatives",
            hardness_strength=10 * temperature, triplet_margin=0.2, offset=3,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for temperature, margin in ((0.05, 0.0), (0.1, 0.1), (0.2, 0.05), (0.07, -0.1)):
        torch.testing.assert_close(compiled(temperature, margin), step(temperature, margin), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_opcheck() -> None:
    check_operators("tiled")


@pytest.mark.parametrize("backend", ["tiled", "auto"])
def test_a_compiled_step_has_no_graph_break(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    # A traced graph takes the operators whatever the size, and a plain step is to do so here: in float32 other sums
    # differ by more than is allowed. tests/test_dense.py compares the two in float64.
    monkeypatch.setattr(dense, "PAIRS", 0)
    check_a_compiled_step(backend)


class _Bytes(TorchDispatchMode):
    """Notes which operations make tensors of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.uint8 and leaf.numel() > 0:
                self.made.append(str(function))
        return out


def test_kept_mask_bits_get_no_gradient() -> None:
    """Zeros of their size would double what a large batch keeps."""
    leaves = [torch.randn(70, 16, requires_grad=True) for _ in range(2)]
    guide = [torch.randn(70, 8) for _ in range(2)]
    with _Bytes() as noted:
        guided_contrastive_loss(*leaves, *guide, backend="tiled", mask_bits="keep").backward()
    assert len(noted.made) == 1, noted.made  # by the forward pass


def test_a_statistic_alone_has_a_gradient_of_zeros() -> None:
    leaves = [torch.randn(9, 4, requires_grad=True) for _ in range(2)]
    arguments = (
        "tiled",
        leaves,
        [],
        torch.tensor(0.1),
        None,
        [],
        [],
        True,
        False,
        False,
        9,
        0,
        *LossConfig().to_arguments(),
    )
    _, lse2, *_ = torch.ops.gist_fast.guided_forward(*arguments)
    gradients = torch.autograd.grad(lse2.sum(), leaves)
    assert all((g == 0).all() for g in gradients)
