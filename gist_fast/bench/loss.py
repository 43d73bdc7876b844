"""The suite of the loss alone, from embeddings to gradients, beside a matrix product of the same type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from gist_fast.bench.cases import (
    BLOCKS,
    CHECKED_ROWS,
    OUR_TOLERANCE,
    TOLERANCES,
    Embeddings,
    LossCase,
    coarse,
    exact_gradients,
    hold_to,
)
from gist_fast.bench.peers import OURS, PEERS, Peer
from gist_fast.bench.results import WHOLE
from gist_fast.bench.suite import Scope, Suite
from gist_fast.bench.timing import BOTH, Parts

CPU_SIZES = (256, 512, 1024, 2048, 4096, 8192)
CUDA_SIZES = (1024, 4096, 16384, 32768, 65536, 131072)
SAMPLED_ROWS = 64
"""Whose gradients are compared at full size."""
SMALL = 4
"""Sizes at the scale small: the smallest so many."""


class LossSuite(Suite):
    """Every peer of `gist_fast.bench.peers`.

    Args:
        guide: of its cases, as `LossCase` has it.
    """

    grows = 2.0
    looks_at = ("sizes", "dtype")
    peers: Mapping[str, Peer] = PEERS
    """Others, which a suite may be given, do not travel to other processes."""

    def __init__(
        self,
        name: str = "loss",
        title: str = "The loss: embeddings to gradients",
        guide: Literal["model", "self", "none"] = "model",
        blocks: tuple[str, ...] = BLOCKS,
    ) -> None:
        self.name, self.title, self._guide, self._blocks = name, title, guide, blocks

    def cases(self, scope: Scope) -> Sequence[LossCase]:
        cuda = scope.device.startswith("cuda")
        sizes = scope.sizes_of(CUDA_SIZES if cuda else CPU_SIZES, SMALL)
        width, guide_width = (768, 1024) if cuda else (384, 384)
        return [
            LossCase(rows, width, guide_width, scope.dtype, scope.device, self._guide, self._blocks) for rows in sizes
        ]

    def competitors(self, case: LossCase) -> Sequence[str]:
        # What a compiler makes of the plain version is seen where there is a guide, and costs much of a run's time.
        return [name for name in self.peers if case.guide == "model" or name != "plain compiled"]

    def obstacle(self, case: LossCase, name: str) -> str | None:
        if case.matryoshka_dims and not name.startswith(OURS):
            return "it knows no Matryoshka dims"
        return self.peers[name].obstacle(case)

    def least_memory(self, case: LossCase, name: str) -> float:
        return self.peers[name].least_memory(case)

    def check(self, case: LossCase, name: str) -> None:
        if self.peers[name].compiled and not self.has_own_process(case):
            # At another size it would be compiled for that too. A process of its own keeps to a small one: what a
            # large check left with the allocator, memory that is measured next would lack.
            self._check_sample(case, name)
            return
        small = replace(case, rows=min(case.rows, CHECKED_ROWS))
        e = coarse(small.embeddings())
        loss = self._value(small, name, e)
        self._compare(small, name, (loss, e.anchors.grad, e.positives.grad), exact_gradients(small, e))

    @staticmethod
    def _compare(case: LossCase, name: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
        allowed = TOLERANCES[case.dtype]
        if name.startswith(OURS):
            allowed = min(allowed, OUR_TOLERANCE)
        parts = ("loss", "gradient of the anchors", "gradient of the positives")
        for what, got, want in zip(parts, found, wanted, strict=True):
            hold_to(f"the {what}", got, want, allowed, f" at B {case.rows}")

    def check_whole(self, case: LossCase, name: str) -> None:
        """Ours also at its full size, in which it has many tiles and other ways to keep its masks: by sampled rows."""
        if name != OURS or case.rows <= CHECKED_ROWS or case.matryoshka_dims:
            return
        self._check_sample(case, name)

    def _check_sample(self, case: LossCase, name: str) -> None:
        """The loss of a whole batch, and the gradients of a few of its rows."""
        import torch

        from gist_fast.bench.exact import exact_sample

        e = coarse(case.embeddings())
        rows = torch.randperm(case.rows, generator=torch.Generator().manual_seed(0))[:SAMPLED_ROWS].to(case.device)
        loss = self._value(case, name, e)
        gradients = [x.grad[rows] for x in (e.anchors, e.positives) if x.grad is not None]
        self._compare(case, name, (loss, *gradients), exact_sample(case, e, rows))

    def build(self, case: LossCase, name: str) -> Parts:
        e = case.embeddings()
        loss = self.peers[name].make(case)
        kept: list[Any] = []

        def forward() -> None:
            e.anchors.grad = e.positives.grad = None
            kept[:] = [loss(e)]

        def backward() -> None:
            kept.pop().backward()

        return {BOTH: forward} if self.peers[name].whole else {"forward": forward, "backward": backward}

    def _value(self, case: LossCase, name: str, e: Embeddings) -> Any:
        """The loss, with the gradients left in the leaves."""
        loss = self.peers[name].make(case)(e)
        if not self.peers[name].whole:
            loss.backward()
        return loss.detach()

    def matmul_side(self, case: LossCase) -> int:
        """Of a square product that is large enough for the full rate."""
        return 8192 if case.device.startswith("cuda") else 2048


def matmul(case: LossCase, side: int) -> tuple[Parts, float]:
    """A square product in the case's type and on its device, by the faster library there, and its FLOPs."""
    import torch

    from gist_fast.functional.backends.cpu_products import product

    generator = torch.Generator(case.device).manual_seed(1)
    a, b = torch.randn(2, side, side, generator=generator, device=case.device).to(getattr(torch, case.dtype))
    out = torch.empty_like(a)
    return {WHOLE: lambda: product(a, b, out)}, 2.0 * side**3
