"""The loss's variants on a card against float64 of the same inputs, for ``benchmarks/gpu.py check``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gist_fast import guided_contrastive_loss

if TYPE_CHECKING:
    from benchmarks.gpu import Bench


def check_variants(bench: Bench, types: Sequence[torch.dtype]) -> dict[str, float]:
    """The errors of the loss's variants, by name and type, as `_error` counts them, with a column of negatives."""
    rows, columns, width, guide = (30, 44, 24, 16) if bench.toy else (507, 762, 385, 40)
    offset = (columns - rows) // 2
    generator = torch.Generator().manual_seed(rows)
    student = [torch.randn(n, width, generator=generator) for n in (rows, columns, columns + 9)]
    chosen = torch.randint(7, (columns + 9,), generator=generator)
    directions = torch.eye(guide)[chosen] + 0.5 * torch.eye(guide)[chosen].roll(1, dims=1)
    guides = [directions[offset : offset + rows], directions[:columns], directions.flip(0)]
    groups = {"groups": torch.arange(columns, device=bench.device) // 3}
    boost = {"hardness_mode": "all_negatives", "hardness_strength": 4.0}
    ladder = {"matryoshka_dims": [width, width // 2, width // 5]}
    variants: dict[str, dict[str, Any]] = {
        "groups and hardness": {**groups, **boost},
        "own negatives harder, a ladder": {**boost, **ladder, "hardness_mode": "hard_negatives"},
        "triplet": {**groups, "triplet_margin": 1.0, "mask_ties": True},
        "self-guided, groups": {**groups, "guide": "self", "margin": -0.1},
        # A student's own scores lie near each other: of half types more than rounding would decide.
        "hard, groups, a ladder": {**groups, **ladder, "hard": True, "only": torch.float32},
    }
    errors = {}
    for name, options in variants.items():
        for dtype in types:
            for bits in ("keep", "recompute"):
                arguments = {"margin": 0.1, "temperature": 0.2, "mask_bits": bits, "offset": offset, **options}
                kind, only = arguments.pop("guide", "own"), arguments.pop("only", dtype)
                # Nor do a student's own scores decide here in half types, for the same reason.
                if only != dtype or (kind == "self" and dtype != torch.float32):
                    continue
                if "triplet_margin" in options and bits == "recompute":
                    continue
                found = []
                for backend, cast in (("triton", dtype), ("reference", torch.float64)):
                    leaves = [x.to(bench.device, dtype).to(cast).requires_grad_() for x in student]
                    g = leaves if kind == "self" else [x.to(bench.device, dtype).to(cast) for x in guides]
                    loss = guided_contrastive_loss(
                        *leaves[:2], *g[:2], leaves[2:], g[2:], backend=backend, reduction="none", **arguments
                    )
                    found.append([loss, *torch.autograd.grad(loss.mean(), leaves)])
                pairs = zip(*found, strict=True)
                key = f"{name} {str(dtype)[6:]} {bits}"
                errors[key] = max(
                    ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs
                )
                print(f"{errors[key]:.2e}  {key}")
    return errors
