"""The loss of each row by the backend that was chosen: by way of a custom operator, or of ordinary operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gist_fast.functional.backends import may_fall_back, reference, remember_failure, streaming_backend
from gist_fast.functional.backends.interface import GuidedRows
from gist_fast.functional.blocks import ANCHORS, Block
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.mask_products import MaskProduct, dense_product, kept_product
from gist_fast.functional.operands import prepare
from gist_fast.functional.operator import guided_forward

KEPT_SHARE = 8
"""``mask_bits="auto"`` keeps the masks while they fill at most a `KEPT_SHARE`-th of the device's memory."""


def guided_rows(
    chosen: str,
    config: LossConfig,
    count: int,
    offset: int,
    student: tuple[Tensor, ...],
    guide: tuple[Tensor, ...],
    temperature: Tensor,
    margins: Tensor | None,
    groups: tuple[Tensor, ...],
    dims: tuple[int, ...],
    blocks: Sequence[Block],
    one_sign: bool,
) -> tuple[GuidedRows, MaskProduct | None]:
    """The loss of each of `count` rows by the backend `chosen`, and products of its masks, where a triplet term needs
    them."""
    device, dtype = student[ANCHORS].device, student[ANCHORS].dtype
    wants_masks = config.needs_masks and (config.guided or len(groups) > 0)
    if chosen == "reference":
        with torch.autocast(device.type, enabled=False):
            operands = prepare(
                student, guide, temperature, config, count, offset, margins=margins, groups=groups, dims=dims,
                differentiable=True,
            )  # fmt: skip
            rows = reference.forward(operands, blocks, temperature)
            return rows, dense_product(operands, blocks) if wants_masks else None
    refuse_transforms((*student, temperature))
    # What a traced graph runs is decided while it is traced.
    automatic = config.backend == "auto" and chosen == "triton" and not torch.compiler.is_compiling()
    levels = max(1, len(dims))

    def stream(streaming: str) -> tuple[GuidedRows, MaskProduct | None]:
        keep = wants_masks or _keeps_masks(config.mask_bits, streaming, blocks, levels, device)
        settings = config.to_arguments()
        rows = GuidedRows(
            *guided_forward(
                streaming,
                student,
                guide,
                temperature,
                margins,
                groups,
                dims,
                keep,
                automatic,
                one_sign,
                count,
                offset,
                *settings,
            )
        )
        if not wants_masks:
            return rows, None
        sizes = [count, *(x.shape[0] for x in student), levels, offset]
        return rows, kept_product(streaming, rows.mask_bits, dtype, sizes, config)

    if not automatic:
        return stream(chosen)
    try:
        return stream(chosen)
    except Exception as error:
        if not may_fall_back(chosen, error):
            raise
        found = stream("tiled")
        remember_failure(device, dtype, error)
        return found


def inside_transform() -> bool:
    """Whether a transform of torch.func (``grad``, ``vmap``, ``jvp``) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms(tensors: Sequence[Tensor]) -> None:
    """Raise where torch would take the operators' lack of a rule for a derivative of zero, or say nothing of use."""
    if torch.compiler.is_compiling():
        return
    forward_mode = forward_ad._current_level >= 0
    if inside_transform() or (forward_mode and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)):
        raise RuntimeError(
            "guided_contrastive_loss: the streaming backends know ordinary backward passes only, no forward mode and "
            "no transform of torch.func; backend='reference' is made of ordinary torch operations and knows them."
        )


def _keeps_masks(mask_bits: str, backend: str, blocks: Sequence[Block], dims: int, device: torch.device) -> bool:
    """Whether the masks of so many Matryoshka dims are kept for the backward pass."""
    if mask_bits != "auto":
        return mask_bits == "keep"
    return streaming_backend(backend).mask_bytes(blocks, dims) * KEPT_SHARE <= _device_memory(device)


@torch.compiler.assume_constant_result
def _device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil  # not where a GPU is measured by nothing but torch

    return psutil.virtual_memory().total
