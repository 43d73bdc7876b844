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

import torch
from torch import Tensor

from gist_fast.backends import fall_back, streaming_backend
from gist_fast.backends.interface import LN2
from gist_fast.blocks import ANCHORS, Block, make_blocks
from gist_fast.operands import accumulation_dtype, add_positives, embedding_gradients, prepare


def forward_rows(
    backend: str,
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    margin: float,
    relative: bool,
    self_guided: bool,
    contrast_anchors: bool,
    contrast_positives: bool,
    offset: int,
    keep_bits: bool,
    automatic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `GuidedRows`; the arguments are those of `gist_fast.guided_contrastive_loss`, checked.

    `automatic` says that the backend was nobody's choice by name, so that a backward pass that fails may take another.
    """
    blocks = _blocks(student, contrast_anchors, contrast_positives, offset)
    with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):
        operands = prepare(
            student,
            guide,
            temperature,
            margin=margin,
            relative=relative,
            self_guided=self_guided,
            offset=offset,
        )
        negatives = streaming_backend(backend).forward(operands, blocks, keep_bits)
        loss = torch.logaddexp(LN2 * (negatives.lse2 - operands.positives), torch.zeros_like(negatives.lse2))
        if operands.limits is not None:
            # NaN limits mask nothing; carry them into the loss, where they are seen.
            loss = loss + (operands.limits - operands.limits).to(loss.dtype)
        to_cosine = LN2 * temperature.to(loss.dtype)
        return (
            loss,
            negatives.lse2,
            operands.positives * to_cosine,
            negatives.hardest * to_cosine,
            negatives.masked,
            negatives.bits,
        )


guided_forward = torch.library.custom_op("gist_fast::guided_forward", mutates_args=())(forward_rows)


@guided_forward.register_fake
def _(
    backend,
    student,
    guide,
    temperature,
    margin,
    relative,
    self_guided,
    contrast_anchors,
    contrast_positives,
    offset,
    keep_bits,
    automatic,
):
    blocks = _blocks(student, contrast_anchors, contrast_positives, offset)
    guided = self_guided or len(guide) > 0
    n_bytes = streaming_backend(backend).mask_bytes(blocks) if keep_bits and guided else 0
    a = student[ANCHORS]
    rows = a.new_empty(a.shape[0], dtype=accumulation_dtype(a.dtype))
    return (
        rows,
        torch.empty_like(rows),
        torch.empty_like(rows),
        torch.empty_like(rows),
        a.new_empty(len(blocks), dtype=torch.int64),
        a.new_empty(n_bytes, dtype=torch.uint8),
    )


def backward_rows(
    grad_loss: Tensor,
    lse2: Tensor,
    bits: Tensor,
    backend: str,
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    margin: float,
    relative: bool,
    self_guided: bool,
    contrast_anchors: bool,
    contrast_positives: bool,
    offset: int,
    keep_bits: bool,
    automatic: bool,
) -> list[Tensor]:
    """Gradients by each of `student` and, last, by `temperature`, given ``grad_loss [B]``."""
    blocks = _blocks(student, contrast_anchors, contrast_positives, offset)

    def run(backend: str, lse2: Tensor | None, bits: Tensor | None) -> list[Tensor]:
        decide = bits is None  # With the bits at hand the guide is not needed again.
        operands = prepare(
            student,
            guide if decide else (),
            temperature,
            margin=margin,
            relative=relative,
            self_guided=self_guided and decide,
            offset=offset,
        )
        if lse2 is None:
            lse2 = streaming_backend(backend).forward(operands, blocks, False).lse2
        # d loss / d base-2 logit carries ln 2.
        weights = LN2 * grad_loss.to(lse2.dtype)
        largest = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        weights = weights / largest
        total = torch.logaddexp2(lse2, operands.positives)
        found = streaming_backend(backend).backward(operands, blocks, total, weights, bits)
        add_positives(found, operands, weights * -torch.sigmoid(LN2 * (lse2 - operands.positives)), offset)
        norms = operands.norms
        del operands
        by_embedding, by_temperature = embedding_gradients(found, student, norms, temperature, largest)
        return [*by_embedding, by_temperature.to(temperature.dtype)]

    with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):
        try:
            found = run(backend, lse2, bits if len(bits) > 0 else None)
        except Exception as error:
            x = student[ANCHORS]
            spared = len(bits) > 0 and not (guide or self_guided)
            if spared or not automatic or not fall_back("auto", backend, x.device.type, x.dtype, error):
                raise
        else:
            _proven.add(_kernels(backend, student))
            return found
        # Decides the masks again, so its own logsumexp goes with them: a pair on the threshold that is in one and not
        # in the other could have any weight.
        return run("tiled", None, None)


guided_backward = torch.library.custom_op("gist_fast::guided_backward", mutates_args=())(backward_rows)


@guided_backward.register_fake
def _(grad_loss, lse2, bits, backend, student, guide, temperature, *static):
    return [*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in student), temperature.new_empty(())]


def _blocks(student: Sequence[Tensor], contrast_anchors: bool, contrast_positives: bool, offset: int) -> list[Block]:
    rows, *columns = (x.shape[0] for x in student)
    return make_blocks(
        rows, columns, offset=offset, contrast_anchors=contrast_anchors, contrast_positives=contrast_positives
    )


_proven: set[tuple] = set()
"""The `_kernels` whose backward pass has run: they are known to compile and start here."""


def _kernels(backend: str, student: Sequence[Tensor]) -> tuple:
    """What decides which kernels a backward pass from bits compiles."""
    x = student[ANCHORS]
    return backend, x.device.type, x.dtype, x.shape[1]


def _setup_context(ctx, inputs, output) -> None:
    backend, student, guide, temperature, *static = inputs
    _, lse2, *_, bits = output
    # Where the bits are kept the guide is done with, and its memory can go; but for the first backward pass of its
    # kind, which may have to fall back on a backend that does not know these bits.
    automatic = static[-1]
    spared = len(bits) > 0 and (not automatic or _kernels(backend, student) in _proven)
    needed = () if spared else guide
    ctx.backend, ctx.static, ctx.students, ctx.guides = backend, static, len(student), len(guide)
    ctx.save_for_backward(lse2, bits, temperature, *student, *needed)


def _backward(ctx, grad_loss, *_):
    lse2, bits, temperature, *embeddings = ctx.saved_tensors
    student, guide = embeddings[: ctx.students], embeddings[ctx.students :]
    *by_student, by_temperature = torch.ops.gist_fast.guided_backward(
        grad_loss, lse2, bits, ctx.backend, student, guide, temperature, *ctx.static
    )
    return (None, by_student, [None] * ctx.guides, by_temperature, *(None for _ in ctx.static))


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "guided_contrastive_loss: the streaming backends are differentiable once; second derivatives need "
        "backend='reference', which is made of ordinary torch operations."
    )


guided_forward.register_autograd(_backward, setup_context=_setup_context)
guided_backward.register_autograd(_refuse_double_backward)
