"""Every kernel that the loss can start, found by starting it: the backend's own code runs on tensors without memory,
with each of the loss's variants, and its launches are recorded.

``gist-fast kernels`` compiles what is found here, for cards that need not be present.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import Problem
from gist_fast.functional.backends.kernel_passes import backward_with, forward_with, multiply_mask
from gist_fast.functional.loss_config import LossConfig
from gist_fast.kernels.compile_report import Compiled, compile_variant
from gist_fast.kernels.compile_variants import Variant, variants_of
from gist_fast.kernels.config import HALF, SINGLE, TABLE, Config
from gist_fast.kernels.launch import record_launches
from gist_fast.kernels.targets import TARGETS, Target

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 130
"""Of anchors, positives and negatives, whose launches are recorded."""
PLAIN: dict[str, Any] = {"contrast_positives": False}
"""Of positives with one another no other kernels run."""
DIM, GUIDE_DIM = 256, 64


def report(
    target: str, *, dim: int = 384, guide_dim: int = 1024, every: bool = False, size: int | None = None
) -> Iterator[Compiled]:
    """Compile what the shipped configurations start on `target`, one of `TARGETS`; work is counted for those dims.

    Args:
        every: the kernels of all of the loss's variants, and those of a student and a guide of different types; the
            kernels of the plain loss alone without it.
        size: only those of elements of so many bytes.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}.")
    card = TARGETS[target]
    for variant in shipped(card, every=every, size=size):
        yield compile_variant(card, variant, dim=dim, guide_dim=guide_dim)


def shipped(card: Target, *, every: bool, size: int | None = None) -> list[Variant]:
    """The kernels that the table's configurations start on a card, each once."""
    found: dict[Variant, None] = {}
    for n_bytes in (HALF, SINGLE) if size is None else (size,):
        config = TABLE[card.generation, n_bytes]
        if n_bytes == HALF:
            found |= dict.fromkeys(recorded(config, BF16, BF16, every=every))
            continue
        # torch multiplies float32 in full on gfx942, unless told otherwise.
        for tf32 in (False,) if card.generation == "gfx942" else (True, False):
            found |= dict.fromkeys(recorded(config, FP32, FP32, tf32=tf32, every=every))
            if every:
                found |= dict.fromkeys(recorded(config, BF16, FP32, tf32=tf32, every=True))
                # What looks at no embeddings of the guide is as above.
                found |= dict.fromkeys(recorded(config, FP32, BF16, tf32=tf32, every=True))
    return list(found)


def recorded(
    config: Config, student: torch.dtype, guide: torch.dtype, *, tf32: bool = False, every: bool = True
) -> list[Variant]:
    """The kernels that a configuration starts for embeddings of those types."""
    with record_launches(tf32=tf32) as launches:
        # Types differ only where there is a guide with embeddings of its own.
        guides = ("own", "self", "none") if student == guide else ("own",)
        for loss, options in _losses(guides) if every else [(LossConfig(**PLAIN), {})]:
            _run(config, student, guide, loss, **options)
    return variants_of(launches)


def _losses(guides: Sequence[str]) -> Iterator[tuple[LossConfig, dict]]:
    """All that changes which kernels run: guide, student thresholds, groups, hardness weighting, Matryoshka dims."""
    # Where negatives are weighted and nothing else, no other kernel runs.
    modes = (None, "in_batch_negatives", "all_negatives")
    for guide, hard, grouped, mode, nested in itertools.product(
        guides, (False, True), (False, True), modes, (False, True)
    ):
        # A student that guides itself by its own thresholds is refused.
        if not (guide == "self" and hard):
            weighting: dict[str, Any] = {"hardness_mode": mode, "hardness_strength": 1.0} if mode else {}
            loss = LossConfig(self_guided=guide == "self", hard=hard, **weighting, **PLAIN)
            yield loss, {"guided": guide == "own", "grouped": grouped, "nested": nested}


def _run(
    config: Config,
    student: torch.dtype,
    guide: torch.dtype,
    loss: LossConfig,
    *,
    guided: bool = True,
    grouped: bool = False,
    nested: bool = False,
) -> None:
    """Both passes with mask bits kept and not, of one batch of chunks and of several, and a product of the mask."""
    counts = (ROWS, ROWS, ROWS)
    problem = Problem(
        tuple(_empty(n, DIM, dtype=student) for n in counts),
        tuple(_empty(n, GUIDE_DIM, dtype=guide) for n in counts) if guided else (),
        _empty(dtype=FP32),
        None,
        _empty(ROWS, dtype=torch.int64) if grouped else None,
        (DIM, DIM // 2) if nested else (),
        0,
        True,
        loss,
    )
    kept = forward_with(config, problem, True)
    bits = kept.mask_bits if problem.masks else None
    for one_sign in (True, False):
        backward_with(config, replace(problem, one_sign=one_sign), kept.loss, kept.lse2, bits)
    if bits is None:
        return
    forward_with(config, problem, False)
    backward_with(config, problem, kept.loss, kept.lse2, None)
    if guided and not (loss.hard or grouped or nested or loss.hardness_mode):
        blocks = problem.blocks
        for index, block in enumerate(blocks):
            multiply_mask(blocks, bits, index, _empty(block.columns, 8, dtype=student), transposed=False)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
