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

from gist_fast.functional.backends import kernel_distillation
from gist_fast.functional.backends.interface import Problem
from gist_fast.functional.backends.kernel_passes import backward_with, forward_with, multiply_mask
from gist_fast.functional.loss_config import LossConfig
from gist_fast.kernels import layout
from gist_fast.kernels.compile_report import Compiled, compile_variant
from gist_fast.kernels.compile_variants import Variant, variants_of
from gist_fast.kernels.config import HALF, SINGLE, TABLE, Config
from gist_fast.kernels.launch import record_launches
from gist_fast.kernels.targets import TARGETS, Target

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 130
"""Of anchors, positives and negatives, whose launches are recorded."""
CHUNKS = 2
"""A side, and a few rows, of a problem that takes several batches of chunks."""
PLAIN: dict[str, Any] = {"contrast_positives": False}
"""Of positives with one another no other kernels run."""
DIM, GUIDE_DIM, WIDE = 256, 64, 4096
"""A guide of `WIDE` is not held whole at so many rows."""


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
        for guided in [kind == "own" for kind in guides if kind != "self"] if every else []:
            _run_in_batches(config, student, guide, guided=guided)
        for nested in (False, True) if every else ():
            _distil(config, student, guide, nested=nested)
    return variants_of(launches)


def _losses(guides: Sequence[str]) -> Iterator[tuple[LossConfig, dict]]:
    """All that changes which kernels run: guide, student thresholds, groups, hardness weighting, Matryoshka dims,
    margins of rows, negatives that no guide masks, and how many operands there are."""
    sides = (False, True)
    # Where negatives are weighted and nothing else, no other kernel runs.
    modes = (None, "in_batch_negatives", "all_negatives")
    for guide, hard in itertools.product(guides, sides):
        # A student that guides itself by its own thresholds is refused.
        if guide == "self" and hard:
            continue
        fixed: dict[str, Any] = {"self_guided": guide == "self", "hard": hard, **PLAIN}
        guided = {"guided": guide == "own"}
        for groups, mode, nested in itertools.product((0, 1), modes, sides):
            weighting: dict[str, Any] = {"hardness_mode": mode, "hardness_strength": 1.0} if mode else {}
            yield LossConfig(**fixed, **weighting), {**guided, "groups": groups, "nested": nested}
        # Only the kernel of groups knows of a second.
        yield LossConfig(**fixed), {**guided, "groups": 2}
        if guide != "none":
            yield LossConfig(**fixed), {**guided, "by_row": True}
            yield LossConfig(**fixed, mask_negatives=False), guided
    yield LossConfig(**PLAIN), {"negatives": 0}


def _run(
    config: Config,
    student: torch.dtype,
    guide: torch.dtype,
    loss: LossConfig,
    *,
    guided: bool = True,
    groups: int = 0,
    nested: bool = False,
    by_row: bool = False,
    negatives: int = 1,
) -> None:
    """Both passes with mask bits kept and not, and a product of the mask."""
    problem = _problem(loss, student, guide if guided else None, ROWS, GUIDE_DIM, nested=nested, negatives=negatives)
    # The second of two is of the negatives, too.
    sizes = (2 * ROWS, ROWS * (2 + negatives))[:groups]
    problem = replace(problem, groups=tuple(_empty(size, dtype=torch.int64) for size in sizes))
    if by_row:
        problem = replace(problem, margins=_empty(ROWS, dtype=FP32))
    kept = forward_with(config, problem, True)
    bits = kept.mask_bits if problem.masks else None
    for one_sign in (True, False):
        backward_with(config, replace(problem, one_sign=one_sign), kept.loss, kept.lse2, bits)
    if bits is None:
        return
    forward_with(config, problem, False)
    backward_with(config, problem, kept.loss, kept.lse2, None)
    if guided and not (loss.hard or groups or nested or loss.hardness_mode):
        _multiply_masks(problem, bits)


def _run_in_batches(config: Config, student: torch.dtype, guide: torch.dtype, *, guided: bool) -> None:
    """A forward pass of several batches of chunks, by a guide that is not held whole; and a product of its mask."""
    rows = CHUNKS * layout.CHUNK_TILES * layout.TILE + 2
    problem = _problem(LossConfig(**PLAIN), student, guide if guided else None, rows, WIDE, nested=True)
    kept = forward_with(config, problem, True)
    if guided:
        _multiply_masks(problem, kept.mask_bits)


def _distil(config: Config, student: torch.dtype, guide: torch.dtype, *, nested: bool) -> None:
    """Both passes of distillation, over several batches of chunks where dims are nested."""
    rows = CHUNKS * layout.CHUNK_TILES * layout.TILE + 2 if nested else ROWS
    problem = _problem(LossConfig(**PLAIN), student, guide, rows, GUIDE_DIM, nested=nested)
    found = kernel_distillation.forward_with(config, problem, 0.05)
    kernel_distillation.backward_with(config, problem, 0.05, found.lse, found.mean, found.lse, found.guide_lse)


def _problem(
    loss: LossConfig,
    student: torch.dtype,
    guide: torch.dtype | None,
    rows: int,
    guide_dim: int,
    *,
    nested: bool,
    negatives: int = 1,
) -> Problem:
    """Of anchors, positives and columns of negatives, `rows` of each."""
    return Problem(
        tuple(_empty(rows, DIM, dtype=student) for _ in range(2 + negatives)),
        () if guide is None else tuple(_empty(rows, guide_dim, dtype=guide) for _ in range(2 + negatives)),
        _empty(dtype=FP32),
        None,
        (),
        (DIM, DIM // 2) if nested else (),
        rows,
        0,
        True,
        loss,
    )


def _multiply_masks(problem: Problem, mask_bits: Tensor) -> None:
    """By a few columns, each block's."""
    for index, block in enumerate(problem.blocks):
        other = _empty(block.columns, 8, dtype=problem.student[0].dtype)
        multiply_mask(problem.blocks, mask_bits, index, other, transposed=False)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
