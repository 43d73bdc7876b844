"""The guided loss as two custom operators, with fake implementations and an autograd formula.

Custom operators are opaque to ``torch.compile``: it sees two calls with known output shapes instead of a loop over
tiles, so a compiled training step has no graph break. ``torch.library`` builds the ``torch.autograd.Function`` out of
the formula registered here.

Masks are decided once, in the forward pass, and have no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gist_fast.functional.backends import may_fall_back, remember_failure, streaming_backend
from gist_fast.functional.backends.interface import Problem, refuse_double_backward
from gist_fast.functional.blocks import ANCHORS
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import accumulation_dtype

_ARGUMENTS = (
    "str backend, Tensor[] student, Tensor[] guide, Tensor temperature, Tensor? margins, Tensor[] groups, "
    f"SymInt[] dims, bool keep_mask_bits, bool automatic, bool one_sign, SymInt rows, int offset, {LossConfig.schema()}"
)


def forward_rows(
    backend: str,
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    margins: Tensor | None,
    groups: Sequence[Tensor],
    dims: Sequence[int],
    keep_mask_bits: bool,
    automatic: bool,
    one_sign: bool,
    rows: int,
    offset: int,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """The fields of `GuidedRows`.

    Args:
        backend: the streaming backend.
        student: anchors, positives and columns of negatives.
        guide: the same of the guide, of those operands that it may mask; or empty.
        margins: ``[B]`` or None.
        groups: two at most, int64; see `gist_fast.functional.backends.interface.Problem`.
        dims: Matryoshka dims, the largest first; empty for the whole width alone.
        keep_mask_bits: whether what was masked is kept for the backward pass.
        automatic: the backend was nobody's choice by name, so that a backward pass that fails may take another.
        one_sign: the upstream gradients of no two rows will be of different sign, as those of their mean or sum.
        rows: how many of the anchors, from the first on, the loss is of.
        offset: anchor i's positive is row ``offset + i`` of the positives.
        settings: see `gist_fast.functional.loss_config.LossConfig.to_arguments`.
    """
    problem = _problem(student, guide, temperature, margins, groups, dims, one_sign, rows, offset, settings)
    with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):
        return tuple(streaming_backend(backend).forward(problem, keep_mask_bits))


guided_forward = torch.library.custom_op(
    "gist_fast::guided_forward",
    forward_rows,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@guided_forward.register_fake
def _(
    backend, student, guide, temperature, margins, groups, dims, keep_mask_bits, automatic, one_sign, rows, offset,
    *settings,
):  # fmt: skip
    problem = _problem(student, guide, temperature, margins, groups, dims, one_sign, rows, offset, settings)
    blocks, count = problem.blocks, max(1, len(dims))
    n_bytes = streaming_backend(backend).mask_bytes(blocks, count) if keep_mask_bits and problem.masks else 0
    a = student[ANCHORS]
    losses = a.new_empty((count, problem.config.softmaxes * rows), dtype=accumulation_dtype(a.dtype))
    counts = a.new_empty(len(blocks), dtype=torch.int64)
    return (
        losses,
        torch.empty_like(losses),
        losses.new_empty(rows),
        losses.new_empty(rows),
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
    groups: Sequence[Tensor],
    *static: Any,
) -> list[Tensor]:
    """Gradients by each of `student` and, last, by `temperature`, given ``grad_loss [L, R]``; see `forward_rows`."""
    dims, _, automatic, one_sign, rows, offset, *settings = static
    problem = _problem(student, guide, temperature, margins, groups, dims, one_sign, rows, offset, settings)
    config, bits = problem.config, mask_bits if len(mask_bits) > 0 else None
    with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):
        try:
            found = streaming_backend(backend).backward(problem, grad_loss, lse2, bits)
        except Exception as error:
            spared = bits is not None and not guide and _kernels(backend, student, dims, one_sign, config) in _proven
            if spared or not automatic or not may_fall_back(backend, error):
                raise
            # Decides the masks again, so its own logsumexp goes with them: a pair on the threshold that is in one and
            # not in the other could have any weight.
            found = streaming_backend("tiled").backward(problem, grad_loss, None, None)
            remember_failure(student[ANCHORS].device, student[ANCHORS].dtype, error)
        else:
            _proven.add(_kernels(backend, student, dims, one_sign, config))
        return found


guided_backward = torch.library.custom_op(
    "gist_fast::guided_backward",
    backward_rows,
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor lse2, Tensor mask_bits, {_ARGUMENTS}) -> Tensor[]",
)


@guided_backward.register_fake
def _(grad_loss, lse2, mask_bits, backend, student, guide, temperature, *static):
    return [*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in student), temperature.new_empty(())]


def _problem(
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    margins: Tensor | None,
    groups: Sequence[Tensor],
    dims: Sequence[int],
    one_sign: bool,
    rows: int,
    offset: int,
    settings: Sequence[Any],
) -> Problem:
    config = LossConfig.from_arguments(settings)
    return Problem(
        tuple(student), tuple(guide), temperature, margins, tuple(groups), tuple(dims), rows, offset, one_sign, config
    )


_proven: set[tuple] = set()
"""The `_kernels` whose backward pass has run: they are known to compile and start here."""


def _kernels(backend: str, student: Sequence[Tensor], dims: Sequence[int], one_sign: bool, config: LossConfig) -> tuple:
    """What decides which kernels a backward pass from kept masks compiles."""
    x = student[ANCHORS]
    # The blocks there are, which may be symmetric or not, and the dims.
    blocks = config.compared, config.directions is None, config.softmaxes, len(student)
    return backend, x.device.type, x.dtype, x.shape[1], tuple(dims), one_sign, blocks, config.hardness_mode


def _setup_context(ctx, inputs, output) -> None:
    # Or autograd would make zeros as large as the mask bits, as their gradient.
    ctx.set_materialize_grads(False)
    backend, student, guide, temperature, margins, groups, *static = inputs
    _, lse2, *_, mask_bits = output
    # Where the masks are kept the guide is done with, and its memory can go; but for the first backward pass of its
    # kind, which may have to fall back on a backend that does not know these mask bits.
    dims, _, automatic, one_sign, _, _, *settings = static
    spared = len(mask_bits) > 0 and (
        not automatic or _kernels(backend, student, dims, one_sign, LossConfig.from_arguments(settings)) in _proven
    )
    needed = () if spared else guide
    ctx.backend, ctx.static = backend, static
    ctx.students, ctx.guides, ctx.groups = len(student), len(guide), len(groups)
    ctx.save_for_backward(lse2, mask_bits, temperature, margins, *groups, *student, *needed)


def _backward(ctx, grad_loss, *_):
    lse2, mask_bits, temperature, margins, *others = ctx.saved_tensors
    groups, embeddings = others[: ctx.groups], others[ctx.groups :]
    student, guide = embeddings[: ctx.students], embeddings[ctx.students :]
    if grad_loss is None:
        grad_loss = torch.zeros_like(lse2)
    *by_student, by_temperature = torch.ops.gist_fast.guided_backward(
        grad_loss, lse2, mask_bits, ctx.backend, student, guide, temperature, margins, groups, *ctx.static
    )
    none = [None] * ctx.guides, [None] * ctx.groups
    return (None, by_student, none[0], by_temperature, None, none[1], *no_gradients(ctx.static))


def no_gradients(arguments: Sequence[Any]) -> list[Any]:
    """What an operator's autograd formula returns for arguments that are no tensors: None, and for an empty list, which
    torch takes for one of tensors, an empty list."""
    return [[] if isinstance(x, list | tuple) and not x else None for x in arguments]


guided_forward.register_autograd(_backward, setup_context=_setup_context)
guided_backward.register_autograd(refuse_double_backward)
