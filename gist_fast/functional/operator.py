"""The guided loss as two custom operators, with fake implementations and an autograd formula.

Custom operators are opaque to ``torch.compile``: it sees two calls with known output shapes instead of a loop over
tiles, so a compiled training step has no graph break. ``torch.library`` builds the ``torch.autograd.Function`` out of
the formula registered here.

With ``S`` the natural-log logits of row i's unmasked negatives and ``s`` that of its positive:

    loss_i = log(sum(exp(S)) + exp(s)) - s = log(1 + exp(lse_negatives - s))
    d loss_i / d S_j = exp(S_j - lse_i),    d loss_i / d s = -sigmoid(lse_negatives - s)

The first is the backend's to multiply out (it needs the tiles again); the second is a single number a row, done here.
Masks are decided once, in the forward pass, and have no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gist_fast.functional.backends import may_fall_back, remember_failure, streaming_backend
from gist_fast.functional.backends.interface import LARGEST_WEIGHT, LN2, refuse_double_backward
from gist_fast.functional.blocks import ANCHORS, Block, make_blocks
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import accumulation_dtype, add_positives, embedding_gradients, prepare

_ARGUMENTS = (
    "str backend, Tensor[] student, Tensor[] guide, Tensor temperature, Tensor? margins, Tensor? groups, "
    f"SymInt[] dims, bool keep_mask_bits, bool automatic, bool one_sign, int offset, {LossConfig.schema()}"
)


def forward_rows(
    backend: str,
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    margins: Tensor | None,
    groups: Tensor | None,
    dims: Sequence[int],
    keep_mask_bits: bool,
    automatic: bool,
    one_sign: bool,
    offset: int,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """The fields of `GuidedRows`.

    Args:
        backend: the streaming backend.
        student: anchors, positives and columns of negatives.
        guide: the same of the guide, or empty.
        margins: ``[B]`` or None.
        groups: ``[M]``, int64, or None.
        dims: Matryoshka dims, the largest first; empty for the whole width alone.
        keep_mask_bits: whether what was masked is kept for the backward pass.
        automatic: the backend was nobody's choice by name, so that a backward pass that fails may take another.
        one_sign: the upstream gradients of no two rows will be of different sign, as those of their mean or sum.
        offset: anchor i's positive is row ``offset + i`` of the positives.
        settings: see `gist_fast.functional.loss_config.LossConfig.to_arguments`.
    """
    config = LossConfig.from_arguments(settings)
    blocks = _blocks(student, config, offset)
    with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):
        operands = prepare(student, guide, temperature, config, offset, margins=margins, groups=groups, dims=dims)
        negatives = streaming_backend(backend).forward(operands, blocks, keep_mask_bits)
        positives = torch.stack([each.positives for each in operands.matryoshka])
        loss = torch.logaddexp(LN2 * (negatives.lse2 - positives), torch.zeros_like(negatives.lse2))
        if operands.guide_thresholds is not None:
            # NaN thresholds mask nothing; carry them into the loss, where they are seen.
            loss = loss + (operands.guide_thresholds - operands.guide_thresholds).to(loss.dtype)
        to_cosine = LN2 * temperature.to(loss.dtype)
        return (
            loss,
            negatives.lse2,
            positives[0] * to_cosine,
            negatives.hardest * to_cosine,
            negatives.masked,
            negatives.easy_negatives,
            negatives.mask_bits,
        )


guided_forward = torch.library.custom_op(
    "gist_fast::guided_forward",
    forward_rows,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@guided_forward.register_fake
def _(
    backend, student, guide, temperature, margins, groups, dims, keep_mask_bits, automatic, one_sign, offset, *settings
):
    config = LossConfig.from_arguments(settings)
    blocks = _blocks(student, config, offset)
    count = max(1, len(dims))
    masks = config.self_guided or len(guide) > 0 or groups is not None or config.hard
    n_bytes = streaming_backend(backend).mask_bytes(blocks, count) if keep_mask_bits and masks else 0
    a = student[ANCHORS]
    rows = a.new_empty((count, a.shape[0]), dtype=accumulation_dtype(a.dtype))
    counts = a.new_empty(len(blocks), dtype=torch.int64)
    return (
        rows,
        torch.empty_like(rows),
        rows.new_empty(a.shape[0]),
        rows.new_empty(a.shape[0]),
        counts,
        torch.empty_like(counts),
        a.new_empty(n_bytes, dtype=torch.uint8),
    )


def backward_rows(
    grad_loss: Tensor,
    lse2: Tensor,
    mask_bits: Tensor,
    backend: str,
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    margins: Tensor | None,
    groups: Tensor | None,
    *static: Any,
) -> list[Tensor]:
    """Gradients by each of `student` and, last, by `temperature`, given ``grad_loss [L, B]``; see `forward_rows`."""
    dims, _, automatic, one_sign, offset, *settings = static
    config = LossConfig.from_arguments(settings)
    blocks = _blocks(student, config, offset)

    def run(backend: str, lse2: Tensor | None, mask_bits: Tensor | None) -> list[Tensor]:
        # With the masks at hand nothing needs to be decided again.
        decided = mask_bits is not None
        operands = prepare(
            student,
            () if decided else guide,
            temperature,
            replace(config, self_guided=False, hard=False) if decided else config,
            offset,
            margins=None if decided else margins,
            groups=None if decided else groups,
            dims=dims,
        )
        if lse2 is None:
            lse2 = streaming_backend(backend).forward(operands, blocks, False).lse2
        # d loss / d base-2 logit carries ln 2.
        weights = LN2 * grad_loss.to(lse2.dtype)
        largest = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        factor, weights = largest / LARGEST_WEIGHT, weights / largest * LARGEST_WEIGHT
        positives = torch.stack([each.positives for each in operands.matryoshka])
        total = torch.logaddexp2(lse2, positives)
        by_row: Tensor | None = weights
        if one_sign:
            # The sign is of all rows, and goes into the factor of all gradients.
            factor, weights, by_row = torch.where((weights < 0).any(), -factor, factor), weights.abs(), None
            total -= weights.log2()
        found = streaming_backend(backend).backward(operands, blocks, total, by_row, mask_bits)
        dlogits = weights * -torch.sigmoid(LN2 * (lse2 - positives))
        students = [(each.operands, each.norms) for each in operands.matryoshka]
        del operands
        return _by_embedding(found, students, dlogits, student, temperature, offset, factor)

    with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):
        try:
            found = run(backend, lse2, mask_bits if len(mask_bits) > 0 else None)
        except Exception as error:
            spared = len(mask_bits) > 0 and not guide and _kernels(backend, student, dims, config) in _proven
            if spared or not automatic or not may_fall_back(backend, error):
                raise
            # Decides the masks again, so its own logsumexp goes with them: a pair on the threshold that is in one and
            # not in the other could have any weight.
            found = run("tiled", None, None)
            remember_failure(student[ANCHORS].device, student[ANCHORS].dtype, error)
        else:
            _proven.add(_kernels(backend, student, dims, config))
        return found


def _by_embedding(
    found: list[list[Tensor]],
    operands_and_norms: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    dlogits: Tensor,
    student: Sequence[Tensor],
    temperature: Tensor,
    offset: int,
    factor: Tensor,
) -> list[Tensor]:
    """The gradients by the embeddings, summed over the Matryoshka dims, and by the temperature.

    Args:
        found: by each dim's operands, those of the positives left out; emptied.
        operands_and_norms: of each dim, the largest first; emptied.
        dlogits: ``[L, B]``, the derivative by each positive's logit.
        factor: 0-d; all gradients are multiplied by it.
    """
    sums: list[Tensor] = []
    by_temperature = torch.zeros_like(temperature)
    one = len(found) == 1
    for dlogit in dlogits:
        gradients, (operands, norms) = found.pop(0), operands_and_norms.pop(0)
        add_positives(gradients, operands, dlogit, offset)
        dim = operands[ANCHORS].shape[1]
        del operands
        by_dim, along = embedding_gradients(
            gradients, [x[:, :dim] for x in student], norms, temperature, factor, keep_wide=not one
        )
        by_temperature = by_temperature + along
        if not sums:
            # Sums of several dims are rounded once, at the end.
            sums = by_dim
            whole = [x.shape[1] - dim for x in student]
            sums = [torch.nn.functional.pad(g, (0, more)) if more else g for g, more in zip(sums, whole, strict=True)]
        else:
            for total, narrow in zip(sums, by_dim, strict=True):
                total[:, :dim] += narrow
    by_embedding = [total.to(x.dtype) for total, x in zip(sums, student, strict=True)]
    return [*by_embedding, by_temperature.to(temperature.dtype)]


guided_backward = torch.library.custom_op(
    "gist_fast::guided_backward",
    backward_rows,
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor lse2, Tensor mask_bits, {_ARGUMENTS}) -> Tensor[]",
)


@guided_backward.register_fake
def _(grad_loss, lse2, mask_bits, backend, student, guide, temperature, *static):
    return [*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in student), temperature.new_empty(())]


def _blocks(student: Sequence[Tensor], config: LossConfig, offset: int) -> list[Block]:
    rows, *columns = (x.shape[0] for x in student)
    return make_blocks(rows, columns, config, offset)


_proven: set[tuple] = set()
"""The `_kernels` whose backward pass has run: they are known to compile and start here."""


def _kernels(backend: str, student: Sequence[Tensor], dims: Sequence[int], config: LossConfig) -> tuple:
    """What decides which kernels a backward pass from kept masks compiles."""
    x = student[ANCHORS]
    # The blocks there are, which may be symmetric or not, and the dims, whose width decides between two methods.
    blocks = config.contrast_anchors, config.contrast_positives, len(student)
    return backend, x.device.type, x.dtype, x.shape[1], tuple(dims), blocks, config.hardness_mode


def _setup_context(ctx, inputs, output) -> None:
    # Or autograd would make zeros as large as the mask bits, as their gradient.
    ctx.set_materialize_grads(False)
    backend, student, guide, temperature, margins, groups, *static = inputs
    _, lse2, *_, mask_bits = output
    # Where the masks are kept the guide is done with, and its memory can go; but for the first backward pass of its
    # kind, which may have to fall back on a backend that does not know these mask bits.
    dims, _, automatic, _, _, *settings = static
    spared = len(mask_bits) > 0 and (
        not automatic or _kernels(backend, student, dims, LossConfig.from_arguments(settings)) in _proven
    )
    needed = () if spared else guide
    ctx.backend, ctx.static, ctx.students, ctx.guides = backend, static, len(student), len(guide)
    ctx.save_for_backward(lse2, mask_bits, temperature, margins, groups, *student, *needed)


def _backward(ctx, grad_loss, *_):
    lse2, mask_bits, temperature, margins, groups, *embeddings = ctx.saved_tensors
    student, guide = embeddings[: ctx.students], embeddings[ctx.students :]
    if grad_loss is None:
        grad_loss = torch.zeros_like(lse2)
    *by_student, by_temperature = torch.ops.gist_fast.guided_backward(
        grad_loss, lse2, mask_bits, ctx.backend, student, guide, temperature, margins, groups, *ctx.static
    )
    return (None, by_student, [None] * ctx.guides, by_temperature, None, None, *no_gradients(ctx.static))


def no_gradients(arguments: Sequence[Any]) -> list[Any]:
    """What an operator's autograd formula returns for arguments that are no tensors: None, and for an empty list, which
    torch takes for one of tensors, an empty list."""
    return [[] if isinstance(x, list | tuple) and not x else None for x in arguments]


guided_forward.register_autograd(_backward, setup_context=_setup_context)
guided_backward.register_autograd(refuse_double_backward)
