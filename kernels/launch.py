"""How a kernel is started: arguments that it is not compiled for, options that belong to the launch, the precision of
float32 products, the kind of boost."""

from __future__ import annotations

from typing import Any

import torch
from gist_fast.kernels import tile
from gist_fast.kernels.config import Launch
from gist_fast.kernels.parts import Part
from torch import Tensor

from gist_fast.functional.operands import multiplies_in_tf32

PLACES = [
    *("row_count", "column_count", "own_count", "other_count"),
    *("chunk_row", "chunk_column", "row_tiles", "column_tiles", "all_column_tiles"),
    *("excluded", "own_negative", "count", "depth", "stride"),
]
"""Arguments of the kernels that say where in the matrix a launch works. None is a multiple of anything that a kernel
could make use of, and a kernel for each that happens to be would be compiled in the middle of a run."""
ALIGNED_OR_NOT = [
    *("limits", "lse2", "weights", "row_groups", "column_groups", "counts", "all_counts", "maximum", "total"),
]
"""Pointers of which some launches get a row or a slice of a tensor, so that 16 bytes may or may not divide them. A
tile reads or writes but a few numbers there, and a kernel for each case would be compiled in the middle of a run."""


def options(launch: Launch) -> dict[str, Any]:
    """Keyword arguments of a kernel launch.

    Fused multiply-adds are asked for by name: Triton is about to change its default, and forward and backward pass
    must not depend on what a user's environment says.
    """
    return {
        "BLOCK_K": launch.block_k,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,
    }


def precision(operand: Tensor) -> str:
    """How ``tl.dot`` multiplies float32: as torch's own matmul does. Half types have one way only."""
    return "tf32" if operand.dtype == torch.float32 and operand.is_cuda and multiplies_in_tf32() else "ieee"


def boost(part: Part) -> int:
    """What a kernel multiplies the logits of a part by, as a constant of its."""
    if part.boosts is None:
        return tile.NO_BOOST.value
    return tile.ALL_BOOSTED.value if part.own is None else tile.OWN_DIFFERS.value
