"""The custom operators are what ``torch.compile`` takes them for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gist_fast.functional.operator  # noqa: F401, registers the operators
from gist_fast import guided_contrastive_loss
from gist_fast.functional.backends import dense
from gist_fast.functional.loss_config import LossConfig


def embeddings(guided: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = (9, 12, 4)
    student = [torch.randn(n, 8, generator=generator, requires_grad=True) for n in sizes]
    return student, [torch.randn(n, 5, generator=generator) for n in sizes] if guided else []


def check_operators(backend: str) -> None:
    """`torch.library.opcheck` on both operators, with and without a guide, bits kept or not."""
    two = [torch.arange(12) // 2, torch.arange(16) // 3]
    for guided, self_guided, keep_mask_bits, one_sign, groups in (
        (True, False, True, False, []),
        (True, False, False, True, two),
        (False, True, True, True, two[:1]),
        (False, False, False, False, []),
    ):
        student, guide = embeddings(guided)
        temperature = torch.tensor(0.1, requires_grad=True)
        config = LossConfig(margin=0.1, self_guided=self_guided)
        static = (None, groups, [], keep_mask_bits, False, one_sign, 2, *config.to_arguments())
        arguments = (backend, student, guide, temperature, *static)
        torch.library.opcheck(torch.ops.gist_fast.guided_forward.default, arguments)
        _, lse2, *_, bits = torch.ops.gist_fast.guided_forward(*arguments)
        # Without gradients: this operator refuses to be differentiated, by name.
        student, temperature = [x.detach() for x in student], temperature.detach()
        arguments = (torch.ones(1, 9), lse2.detach(), bits, backend, student, guide, temperature, *static)
        torch.library.opcheck(torch.ops.gist_fast.guided_backward.default, arguments)


def check_a_compiled_step(backend: str) -> None:
    """Loss and gradients of a step compiled without graph breaks are those of the plain one."""
    student, guide = embeddings(True)

    def step(*leaves: torch.Tensor) -> torch.Tensor:
        return guided_contrastive_loss(
            2 * leaves[0], leaves[1], *guide[:2], leaves[2:], guide[2:], margin=0.1, offset=3, backend=backend
        )

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
        0,
        *LossConfig().to_arguments(),
    )
    _, lse2, *_ = torch.ops.gist_fast.guided_forward(*arguments)
    gradients = torch.autograd.grad(lse2.sum(), leaves)
    assert all((g == 0).all() for g in gradients)
