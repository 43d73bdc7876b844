"""The guided contrastive loss as a function of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import psutil
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gist_fast.backends import choose_backend, fall_back, reference, streaming_backend
from gist_fast.backends.interface import GuidedRows
from gist_fast.blocks import Block, make_blocks
from gist_fast.checks import (
    MASK_BITS,
    REDUCTIONS,
    check_choice,
    check_embeddings,
    check_margin,
    check_temperature,
)
from gist_fast.operands import accumulation_dtype, prepare
from gist_fast.operator import guided_forward
from gist_fast.stats import GuidedContrastiveStats, make_stats

BITS_SHARE = 8
"""``mask_bits="auto"`` keeps the bits while they fill at most a `BITS_SHARE`-th of the device's memory."""


@overload
def guided_contrastive_loss(
    *args: Any, return_stats: Literal[True], **kwargs: Any
) -> tuple[Tensor, GuidedContrastiveStats]: ...
@overload
def guided_contrastive_loss(*args: Any, return_stats: Literal[False] = False, **kwargs: Any) -> Tensor: ...


def guided_contrastive_loss(  # type: ignore[misc]
    anchors: Tensor,  # [B, D]
    positives: Tensor,  # [M, D], M >= offset + B
    guide_anchors: Tensor | None = None,  # [B, G]
    guide_positives: Tensor | None = None,  # [M, G]
    negatives: Sequence[Tensor] | None = None,  # K of [N_k, D]
    guide_negatives: Sequence[Tensor] | None = None,  # K of [N_k, G]
    temperature: float | Tensor = 0.01,
    margin: float = 0.0,
    margin_strategy: Literal["absolute", "relative"] = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    offset: int = 0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Literal["auto", "triton", "tiled", "reference"] = "auto",
    return_stats: bool = False,
    mask_bits: Literal["auto", "keep", "recompute"] = "auto",
) -> Tensor | tuple[Tensor, GuidedContrastiveStats]:
    """In-batch contrastive loss whose false negatives a guide model removes (GISTEmbed, arXiv 2402.16829).

    Every other text of the batch is a negative of anchor i, except those that the guide finds closer to the anchor
    than the anchor's own positive. With cosine similarity ``sim`` by the student, ``g`` by the guide, the threshold
    ``t_i = g(a_i, p_{offset+i})`` lowered by the margin, and entries (x, y) of the blocks ap (anchor, positive), aa
    (anchor, anchor), pp (positive, positive) and an_k (anchor, negative):

        loss_i = log(sum over entries of row i with not g(x, y) > t_i of exp(sim(x, y) / temperature))
                 - sim(a_i, p_{offset+i}) / temperature

    The positive itself is never masked, and the pair of a row with itself never counts. Embeddings need not be
    normalised nor contiguous. Rows of zeros are defined: similarity 0 to everything, and no gradient.

    Args:
        anchors: ``[B, D]``, float32, float16, bfloat16 or float64.
        positives: ``[M, D]`` of the same type; anchor i's positive is row ``offset + i``, all others are negatives.
        guide_anchors: ``[B, G]``, the guide's embeddings of the same texts, in a type and width of their own. No
            gradient reaches them. Pass the very tensors of the student (or their ``detach()``) to let it guide itself,
            which costs no second product.
        guide_positives: ``[M, G]``. Both guide arguments None: no guide, nothing is masked.
        negatives: K columns of negatives, ``[N_k, D]`` each; every one of their rows is a negative of every anchor.
        guide_negatives: K tensors ``[N_k, G]``; needed where there are negatives and a guide.
        temperature: above 0; a 0-d tensor may require a gradient.
        margin: lowers the threshold, so that a positive one masks more, in units of cosine similarity
            (``"absolute"``: ``t - margin``) or as a share (``"relative"``: ``t - |t| * margin``).
        margin_strategy: ``"absolute"`` or ``"relative"``.
        contrast_anchors: whether the block aa counts.
        contrast_positives: whether the block pp counts.
        offset: rows of `positives` that stand before the first anchor's positive: ``rank * B`` for candidates
            gathered from all ranks.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B]``.
        backend: ``"auto"`` takes ``"triton"`` where it can run and ``"tiled"`` elsewhere (the environment variable
            ``GIST_FAST_BACKEND`` overrides it); ``"reference"`` holds all scores in memory, and alone has second
            derivatives.
        return_stats: also return `GuidedContrastiveStats`.
        mask_bits: whether the masks are kept for the backward pass (``"keep"``) or decided again from the guide's
            embeddings (``"recompute"``: no memory, one guide product more a block). Kept, they take one bit a pair;
            ``"tiled"`` keeps the masked scores of up to 2**26 pairs instead, at four bytes each, and saves their
            product. ``"auto"`` keeps up to an eighth of the device's memory.

    Returns:
        The loss, 0-d or ``[B]``, float32 (float64 for float64 embeddings); with `return_stats`, a pair of it and the
        statistics.

    Raises:
        TypeError: an argument is of a wrong type, or embeddings of one model differ in type.
        ValueError: shapes, widths or devices do not go together; a value is out of range; a CPU embedding is not
            finite (its row is named; on an accelerator the loss is NaN instead); the backend cannot run here.
    """
    student, guide = check_embeddings(
        anchors, positives, negatives, guide_anchors, guide_positives, guide_negatives, offset
    )
    check_temperature(temperature)
    check_margin(margin, margin_strategy)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("mask_bits", mask_bits, MASK_BITS)
    chosen = choose_backend(backend, anchors.device.type, anchors.dtype)

    if not isinstance(temperature, Tensor):
        dtype = accumulation_dtype(anchors.dtype)
        temperature = torch.full((), float(temperature), dtype=dtype, device=anchors.device)
    blocks = make_blocks(
        anchors.shape[0],
        [x.shape[0] for x in student[1:]],
        offset=offset,
        contrast_anchors=contrast_anchors,
        contrast_positives=contrast_positives,
    )
    self_guided = len(guide) > 0 and all(map(_same_tensor, student, guide))
    student, guide = tuple(map(_ordinary, student)), tuple(map(_ordinary, guide))
    static: dict[str, Any] = {
        "margin": float(margin),
        "relative": margin_strategy == "relative",
        "self_guided": self_guided,
    }
    if self_guided:
        guide = ()
    if chosen == "reference":
        with torch.autocast(anchors.device.type, enabled=False):
            operands = prepare(student, guide, temperature, offset=offset, differentiable=True, **static)
            rows = reference.forward(operands, blocks, temperature)
    else:
        _refuse_transforms((*student, temperature))
        sides = {"contrast_anchors": contrast_anchors, "contrast_positives": contrast_positives, "offset": offset}

        # What a traced graph runs is decided while it is traced.
        automatic = backend == "auto" and chosen == "triton" and not torch.compiler.is_compiling()

        def stream(streaming: str) -> GuidedRows:
            return GuidedRows(
                *guided_forward(
                    streaming,
                    student,
                    guide,
                    temperature,
                    keep_bits=_keep_bits(mask_bits, streaming, blocks, anchors.device),
                    automatic=automatic,
                    **sides,
                    **static,
                )
            )

        if automatic:
            try:
                rows = stream(chosen)
            except Exception as error:
                if not fall_back(backend, chosen, anchors.device.type, anchors.dtype, error):
                    raise
                rows = stream("tiled")
        else:
            rows = stream(chosen)
    loss = rows.loss if reduction == "none" else getattr(rows.loss, reduction)()
    if not return_stats:
        return loss
    names, compared = zip(*((b.name, b.compared) for b in blocks), strict=True)
    return loss, make_stats(names, compared, rows.masked, rows.positive, rows.hardest)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or a view of all of the same memory, as ``x`` and ``x.detach()`` are."""
    if a is b:
        return True
    if torch.compiler.is_compiling() or _inside_transform():
        return False  # no memory to compare there
    return (
        a.data_ptr() == b.data_ptr()
        and (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
    )  # fmt: skip


def _inside_transform() -> bool:
    """Whether a transform of torch.func (``grad``, ``vmap``, ``jvp``) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _refuse_transforms(tensors: Sequence[Tensor]) -> None:
    """Raise where torch would take the operators' lack of a rule for a derivative of zero, or say nothing of use."""
    if torch.compiler.is_compiling():
        return
    forward_mode = forward_ad._current_level >= 0
    if _inside_transform() or (forward_mode and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)):
        raise RuntimeError(
            "guided_contrastive_loss: the streaming backends know ordinary backward passes only, no forward mode and "
            "no transform of torch.func; backend='reference' is made of ordinary torch operations and knows them."
        )


def _ordinary(x: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can keep where it came out of inference mode, as ``encode`` leaves them."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def _keep_bits(mask_bits: str, backend: str, blocks: Sequence[Block], device: torch.device) -> bool:
    if mask_bits != "auto":
        return mask_bits == "keep"
    return streaming_backend(backend).mask_bytes(blocks) * BITS_SHARE <= _device_memory(device)


@torch.compiler.assume_constant_result
def _device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
