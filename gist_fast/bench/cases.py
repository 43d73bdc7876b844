"""One case of the loss: sizes, type, device, guide and blocks; its embeddings, its work, its truth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEMPERATURE = 0.05
SELF_MARGIN = -0.1
"""Of self-guided cases: only what is more similar than the positive by more than 0.1 is masked, as memeff has it."""
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
BLOCKS = ("ap", "aa", "pp")
CHECKED_ROWS = 123
"""A result is compared at this size, or a smaller one that is asked for; ragged for every tile."""
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
"""Relative error of a gradient, by its norm."""
OUR_TOLERANCE = 2e-2
"""Of our own backends, at most, whatever the type: they round to bfloat16 less often than others."""


class Embeddings(NamedTuple):
    """A batch: students ``[B, D]`` that take a gradient, the guide's ``[B, G]`` or None."""

    anchors: Tensor
    positives: Tensor
    guide_anchors: Tensor | None
    guide_positives: Tensor | None


class WrongResult(Exception):  # noqa: N818 - an outcome
    """A competitor's result is not that of the reference: it is not timed."""


def hold_to(what: str, found: Tensor, wanted: Tensor, allowed: float, where: str = "") -> None:
    """Raise `WrongResult` unless the relative error of what was found, by its norm, is allowed."""
    error = ((found.double() - wanted).norm() / wanted.norm()).item()
    if not error <= allowed:
        raise WrongResult(f"relative error of {what} {error:.1e}{where}, allowed {allowed:.0e}")


@dataclass(frozen=True)
class LossCase:
    """What is computed."""

    rows: int
    width: int = 384
    guide_width: int = 384
    dtype: str = "float32"
    device: str = "cpu"
    guide: Literal["model", "self", "none"] = "model"
    blocks: tuple[str, ...] = BLOCKS
    matryoshka_dims: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """What the cost grows with."""
        return self.rows

    @property
    def margin(self) -> float:
        return SELF_MARGIN if self.guide == "self" else 0.0

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `gist_fast.guided_contrastive_loss`."""
        return {
            "temperature": TEMPERATURE,
            "margin": self.margin,
            "contrast_anchors": "aa" in self.blocks,
            "contrast_positives": "pp" in self.blocks,
            "matryoshka_dims": self.matryoshka_dims or None,
        }

    def as_dict(self) -> dict[str, Any]:
        about = {**asdict(self), "blocks": list(self.blocks)}
        if not about.pop("matryoshka_dims"):
            return about
        return {**about, "matryoshka_dims": list(self.matryoshka_dims)}

    def flops(self, part: str = "both") -> float:
        """The least that the mathematics asks for, whatever is really computed.

        In units of ``2 B^2``: forward, D + G a block; backward, the scores again, and a product for the gradient of
        each operand. Of the symmetric blocks aa and pp half the scores do, and they have one operand. All three blocks:
        2 (D + G) and 6 D.
        """
        forward = backward = 0.0
        guide = self.guide_width if self.guide == "model" else 0
        for block in self.blocks:
            scores, operands = (1.0, 2) if block == "ap" else (0.5, 1)
            forward += scores * (self.width + guide)
            backward += (scores + operands) * self.width
        return {"forward": forward, "backward": backward, "both": forward + backward}[part] * 2 * self.rows**2

    def embeddings(self, rows: int | None = None) -> Embeddings:
        """Random ones in which positives resemble their anchors; the same ones for the same sizes."""
        import torch

        count = rows or self.rows
        generator = torch.Generator(self.device).manual_seed(0)

        def pair(width: int) -> list[torch.Tensor]:
            anchors = torch.randn(count, width, generator=generator, device=self.device)
            positives = 0.5 * anchors + torch.randn(count, width, generator=generator, device=self.device)
            return [x.to(getattr(torch, self.dtype)) for x in (anchors, positives)]

        a, p = (x.requires_grad_() for x in pair(self.width))
        if self.guide == "none":
            return Embeddings(a, p, None, None)
        if self.guide == "self":
            return Embeddings(a, p, a.detach(), p.detach())
        return Embeddings(a, p, *pair(self.guide_width))


def coarse(e: Embeddings) -> Embeddings:
    """The same students under a guide of few exact directions.

    Half types round the guide's scores, and a pair whose mask flips with them says nothing about a gradient; scores of
    these directions lie far from each other.
    """
    import torch

    if e.guide_anchors is None or e.guide_anchors.data_ptr() == e.anchors.data_ptr():
        return e
    rows, width = e.guide_anchors.shape
    directions = torch.eye(width)[: min(width, 7)]
    chosen = torch.randint(len(directions), (rows,), generator=torch.Generator().manual_seed(rows))
    guide = directions[chosen]
    other = guide + 0.5 * guide.roll(1, dims=1)
    like = e.guide_anchors
    return Embeddings(e.anchors, e.positives, guide.to(like), other.to(like))


def exact_gradients(case: LossCase, e: Embeddings) -> list[Tensor]:
    """The loss and its gradients by the reference in float64, from the same (rounded) values."""
    import torch

    from gist_fast.functional.function import guided_contrastive_loss

    a, p = (x.detach().double().requires_grad_() for x in (e.anchors, e.positives))
    if case.guide == "self":
        e = Embeddings(a, p, a.detach(), p.detach())
    else:
        e = Embeddings(a, p, *(None if x is None else x.double() for x in (e.guide_anchors, e.guide_positives)))
    loss = guided_contrastive_loss(*e, backend="reference", **case.options)
    return [loss.detach(), *torch.autograd.grad(loss, (a, p))]
