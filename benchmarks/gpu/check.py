"""The loss on a card against float64 of the same inputs, before anything is timed: ``python -m benchmarks.gpu check``.

Masks of half types may flip near the threshold, and one flipped pair can carry much weight; so the guide's embeddings
are few exact directions here, whose scores are far from each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gist_fast.functional.function import guided_contrastive_loss

LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Of relative errors, by type."""
NEED_MASKS = {"triplet_margin", "label_smoothing", "positive_prior"}
"""Settings that keep masks, always."""
EVERY_DIRECTION = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
BOTH_DIRECTIONS = ["query_to_doc", "doc_to_query"]
Loss = Callable[[list[Tensor], list[Tensor]], Tensor]
"""Of the student's embeddings and the guide's."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    dtype: torch.dtype
    error: Callable[[], float]
    """Computes it; can be sent to another process."""

    def wrong(self, error: float) -> bool:
        """Whether that is more than rounding. NaN is."""
        return not error <= LIMITS[self.dtype]


def checks(toy: bool) -> Iterator[Check]:
    """All of them: the plain loss at several shapes, then its variants."""
    types = [torch.float16, torch.float32] if toy else [torch.bfloat16, torch.float16, torch.float32]
    device = "cpu" if toy else "cuda"
    for shape in _shapes(toy):
        for dtype in types:
            for bits in ("keep", "recompute"):
                error = functools.partial(plain_error, device, dtype, bits, **shape)
                yield Check(f"{shape} {str(dtype)[6:]} {bits}", dtype, error)
    for name, options in _variants().items():
        # Of half types, a student's own scores lie so near each other that rounding would decide.
        own_scores_decide = "hard" in options or "self_guided" in options
        for dtype in [torch.float32] if own_scores_decide else types:
            for bits in ("keep",) if NEED_MASKS & options.keys() else ("keep", "recompute"):
                error = functools.partial(variant_error, device, dtype, bits, toy, options)
                yield Check(f"{name} {str(dtype)[6:]} {bits}", dtype, error)


def _shapes(toy: bool) -> Iterator[dict[str, int]]:
    if toy:
        yield {"rows": 20, "extra": 3, "width": 24, "guide": 8}
        return
    yield {"rows": 252, "extra": 255, "width": 96, "guide": 123}
    yield {"rows": 507, "extra": 0, "width": 385, "guide": 1024}
    yield {"rows": 1000, "extra": 1048, "width": 768, "guide": 384}
    yield {"rows": 129, "extra": 3, "width": 8192, "guide": 5}


def _variants() -> dict[str, dict[str, Any]]:
    """Of each variant: arguments of the loss, and what `variant_error` makes of ``groups``, ``of_negatives``,
    ``matryoshka``, ``self_guided`` and ``shape``."""
    groups = {"groups": 3}
    boost = {"hardness_mode": "all_negatives", "hardness_strength": 4.0}
    return {
        "groups and hardness": {**groups, **boost},
        "own negatives harder, a ladder": {**boost, "matryoshka": True, "hardness_mode": "hard_negatives"},
        "two groups, negatives that no guide masks": {**groups, "of_negatives": 5, "mask_negatives": False},
        "own negatives": {**groups, "of_negatives": 5, "negatives_scope": "own"},
        "every direction": {**groups, "directions": EVERY_DIRECTION},
        "a softmax a direction, a ladder": {
            "directions": BOTH_DIRECTIONS, "partition_mode": "per_direction", "matryoshka": True,
        },
        "distilled, a ladder": {"distill_weight": 2.0, "distill_temperature": 0.2, "matryoshka": True},
        "distilled, every direction": {"distill_weight": 2.0, "directions": EVERY_DIRECTION},
        "smooth labels": {**groups, "label_smoothing": 0.1},
        "debiased, spread out": {**groups, "positive_prior": 0.01, "spread_out_weight": 1.0},
        "triplet": {**groups, "triplet_margin": 1.0, "mask_ties": True},
        # Where the student's own scores decide, none of those of this shape is as near to its threshold as float32
        # rounds: a pair that flips carries any weight, and says nothing about the kernels.
        "self-guided, groups": {**groups, "self_guided": True, "margin": -0.1, "shape": (130, 195, 97, 40)},
        "hard, groups, a ladder": {**groups, "hard": True, "matryoshka": True, "shape": (150, 225, 97, 40)},
    }  # fmt: skip


SHAPE, TOY_SHAPE = (507, 762, 385, 40), (30, 44, 24, 16)
"""Of a variant: anchors, positives, width and guide's width."""


def plain_error(device: str, dtype: torch.dtype, bits: str, rows: int, extra: int, width: int, guide: int) -> float:
    """The largest error of the Triton loss or one of its gradients, relative to the largest value."""

    def loss(backend: str) -> Callable[..., Tensor]:
        return lambda *given: guided_contrastive_loss(
            *given, temperature=0.05, margin=0.1, offset=extra // 2, backend=backend, mask_bits=bits, reduction="none"
        )

    return difference(device, dtype, loss("triton"), loss("reference"), rows, extra, width, guide)


def difference(
    device: str,
    dtype: torch.dtype,
    loss: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    rows: int,
    extra: int,
    width: int,
    guide: int,
) -> float:
    """The largest error of a loss or one of its gradients, against another one in float64 of the same inputs."""
    generator = torch.Generator().manual_seed(rows)
    sizes = (rows, rows + extra)
    student = [torch.randn(n, width, generator=generator).to(device, dtype) for n in sizes]
    directions = torch.eye(guide)[: min(guide, 7)]
    chosen = torch.randint(len(directions), (rows + extra,), generator=generator)
    guides = [directions[chosen[:rows]].to(device, dtype), directions[chosen].to(device, dtype)]
    guides[1] = guides[1] + 0.5 * guides[1].roll(1, dims=1)
    return _largest_error(student, guides, lambda leaves, g: loss(*leaves, *g), lambda leaves, g: exact(*leaves, *g))


def variant_error(device: str, dtype: torch.dtype, bits: str, toy: bool, options: dict[str, Any]) -> float:
    """The same of a variant, with a column of negatives.

    Args:
        options: arguments of the loss, but ``groups``: how many rows in turn are one; ``of_negatives``: how many second
            groups there are, which negatives have too; ``self_guided``; ``matryoshka``: whether there are narrower
            dims; and ``shape``, as `SHAPE` has it.
    """
    arguments = {"margin": 0.1, "temperature": 0.2, "mask_bits": bits, **options}
    shape = arguments.pop("shape", SHAPE)
    rows, columns, width, guide = TOY_SHAPE if toy else shape
    if arguments.pop("matryoshka", False):
        arguments["matryoshka_dims"] = [width, width // 2, width // 5]
    offset = (columns - rows) // 2
    generator = torch.Generator().manual_seed(rows)
    # Of own negatives there is one an anchor.
    sizes = (rows, columns, rows if arguments.get("negatives_scope") == "own" else columns + 9)
    student = [torch.randn(n, width, generator=generator).to(device, dtype) for n in sizes]
    chosen = torch.randint(7, (columns + 9,), generator=generator)
    directions = torch.eye(guide)[chosen] + 0.5 * torch.eye(guide)[chosen].roll(1, dims=1)
    guides = [directions[offset : offset + rows], directions[:columns], directions.flip(0)[: sizes[2]]]
    guides = [x.to(device, dtype) for x in guides]
    arguments["offset"] = offset
    self_guided = arguments.pop("self_guided", False)
    if "groups" in arguments:
        arguments["groups"] = torch.arange(columns, device=device) // arguments["groups"]
    if (count := arguments.pop("of_negatives", 0)) > 0:
        arguments["groups"] = [arguments["groups"], torch.arange(columns, device=device) % count]
        arguments["negative_groups"] = [torch.arange(sizes[2], device=device) % (3 * count)]

    def loss(backend: str) -> Loss:
        def computed(leaves: list[Tensor], g: list[Tensor]) -> Tensor:
            g = leaves if self_guided else g
            return guided_contrastive_loss(
                *leaves[:2], *g[:2], leaves[2:], g[2:], backend=backend, reduction="none", **arguments
            )

        return computed

    return _largest_error(student, guides, loss("triton"), loss("reference"))


def _largest_error(student: list[Tensor], guides: list[Tensor], loss: Loss, exact: Loss) -> float:
    """Of a loss and its gradients by the student's embeddings, against another one in float64 of the same, relative to
    the largest value of each."""
    found = []
    for computed, cast in ((loss, student[0].dtype), (exact, torch.float64)):
        leaves = [x.detach().to(cast).requires_grad_() for x in student]
        value = computed(leaves, [g.to(cast) for g in guides])
        # The sum: gradients of a mean would be subnormal in float16, as no trainer with its scaler leaves them.
        found.append([value, *torch.autograd.grad(value.sum(), leaves)])
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in zip(*found, strict=True)
    )
