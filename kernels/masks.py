"""The mask of a batch's pairs: what never counts, and one product compared with thresholds.

A guide's scores become a packed mask, a 32nd of their size, before any of the student's is computed; the forward pass
reads it. So every kernel here has one product, and the registers that it needs are its own.

Mask bits of a batch of B rows fill ``3 B^2 / 8`` bytes. Where that is too much they are made again in the backward
pass, by the same kernel from the same operands: every comparison falls out the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.chunks import ChunkSet
from gist_fast.kernels.config import Launch
from gist_fast.kernels.launch import (
    ALIGNED_OR_NOT,
    NOT_SPECIALISED,
    operand_arguments,
    start,
    tile_arguments,
    tile_grid,
)
from torch import Tensor


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def masks_kernel(
    x,  # the stack whose scores decide, [S, D]; see `gist_fast.kernels.tile.scores`
    y,
    dim,
    thresholds,  # [B]
    mask_bits,  # written, and read before where HAS_INITIAL_MASK
    masked,  # [blocks], or None where they are known
    table,
    start,
    chunks,
    BELOW: tl.constexpr, GUIDE: tl.constexpr, HAS_INITIAL_MASK: tl.constexpr, SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    at = tile.locate(table, start, chunks, GROUP, COLUMNS)
    if SYMMETRIC and tile.is_idle(at):
        return
    scores = tile.scores(x, y, at, dim, COLUMNS, BLOCK_K, PRECISION, DESCRIPTORS, GUIDE)
    never = decide.never_counts(at, COLUMNS)
    if HAS_INITIAL_MASK:
        packed, mirrored = tile.load_masks(mask_bits, at, SYMMETRIC, COLUMNS)
    else:
        packed, mirrored = never, never
    if BELOW:
        packed, mirrored = decide.below(scores, thresholds, packed, mirrored, at, SYMMETRIC, COLUMNS)
    else:
        packed, mirrored = decide.above(scores, thresholds, packed, mirrored, at, SYMMETRIC, COLUMNS)
    tile.store_masks(mask_bits, packed, mirrored, at, SYMMETRIC, COLUMNS)
    if masked is not None:
        decide.count_more(masked, packed, mirrored, never, never, at, SYMMETRIC)


def write_masks(
    chunks: ChunkSet,
    table: Tensor,
    stack: Tensor,
    thresholds: Tensor,
    mask_bits: Tensor,
    masked: Tensor | None,
    launch: Launch,
    *,
    below: bool,
    guide: bool,
    has_initial_mask: bool,
) -> None:
    """Mask the pairs that score above (or `below`) their row's threshold.

    Args:
        table: where the chunks' set has its rows, on the device.
        stack: of the model that decides; of a `guide`, maybe of those of its rows alone that the chunks need.
        thresholds: ``[B]``, fp32.
        masked: ``[blocks]``, int64: pairs masked so far are added; None to leave them.
        has_initial_mask: add to what is masked already.
    """
    start(
        masks_kernel,
        tile_grid(chunks, launch),
        **operand_arguments(stack, launch),
        thresholds=thresholds,
        mask_bits=mask_bits,
        masked=masked,
        BELOW=below,
        GUIDE=guide,
        HAS_INITIAL_MASK=has_initial_mask,
        **tile_arguments(chunks, table, launch),
    )
