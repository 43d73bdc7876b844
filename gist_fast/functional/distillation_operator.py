"""The tiles' part of distillation as two custom operators; see `gist_fast.functional.operator` for why."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gist_fast.functional.backends import distilling_backend, may_fall_back, remember_failure
from gist_fast.functional.backends.interface import Problem, refuse_double_backward
from gist_fast.functional.blocks import ANCHORS
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import accumulation_dtype
from gist_fast.functional.operator import no_gradients

_ARGUMENTS = (
    "str backend, Tensor[] student, Tensor[] guide, Tensor temperature, float guide_temperature, SymInt[] dims, "
    f"bool automatic, SymInt rows, int offset, {LossConfig.schema()}"
)


def _forward(
    backend: str,
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    guide_temperature: float,
    dims: Sequence[int],
    automatic: bool,
    rows: int,
    offset: int,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """The fields of `Distilled`.

    Args:
        backend: the streaming backend.
        student, guide: anchors, positives and columns of negatives.
        guide_temperature: what divides the guide's similarities.
        dims: Matryoshka dims, the largest first; empty for the whole width alone.
        automatic: the backend was nobody's choice by name, so that where it fails another may be taken.
        rows: how many of the anchors, from the first on, the loss is of.
        offset: anchor i's positive is row ``offset + i`` of the positives.
        settings: see `gist_fast.functional.loss_config.LossConfig.to_arguments`; but only those have a part in it
            that say which pairs are compared.
    """
    problem = _problem(student, guide, temperature, dims, rows, offset, settings)
    return tuple(_run(backend, "forward", student, automatic, problem, guide_temperature))


distil_forward = torch.library.custom_op(
    "gist_fast::distil_forward",
    _forward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@distil_forward.register_fake
def _(backend, student, guide, temperature, guide_temperature, dims, automatic, rows, offset, *settings):
    problem = _problem(student, guide, temperature, dims, rows, offset, settings)
    count, of_all = max(1, len(dims)), problem.config.softmaxes * rows
    a = student[ANCHORS]
    lse = a.new_empty((count, of_all), dtype=accumulation_dtype(a.dtype))
    return lse, torch.empty_like(lse), lse.new_empty(of_all), lse.new_empty(of_all)


def _backward_rows(
    by_lse: Tensor,
    by_mean: Tensor,
    lse: Tensor,
    guide_lse: Tensor,
    backend: str,
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    *static: Any,
) -> list[Tensor]:
    """Gradients by each of `student` and, last, by `temperature`; see `_forward`."""
    guide_temperature, dims, automatic, rows, offset, *settings = static
    problem = _problem(student, guide, temperature, dims, rows, offset, settings)
    more = guide_temperature, by_lse, by_mean, lse, guide_lse
    return _run(backend, "backward", student, automatic, problem, *more)


distil_backward = torch.library.custom_op(
    "gist_fast::distil_backward",
    _backward_rows,
    mutates_args=(),
    schema=f"(Tensor by_lse, Tensor by_mean, Tensor lse, Tensor guide_lse, {_ARGUMENTS}) -> Tensor[]",
)


@distil_backward.register_fake
def _(by_lse, by_mean, lse, guide_lse, backend, student, guide, temperature, *static):
    return [*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in student), temperature.new_empty(())]


def _run(backend: str, name: str, student: Sequence[Tensor], automatic: bool, *arguments: Any) -> Any:
    with torch.no_grad(), torch.autocast(student[ANCHORS].device.type, enabled=False):
        try:
            return getattr(distilling_backend(backend), name)(*arguments)
        except Exception as error:
            if not automatic or not may_fall_back(backend, error):
                raise
            # Nothing is masked, so that one backend can go on from another's numbers.
            found = getattr(distilling_backend("tiled"), name)(*arguments)
            remember_failure(student[ANCHORS].device, student[ANCHORS].dtype, error)
            return found


def _problem(
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    dims: Sequence[int],
    rows: int,
    offset: int,
    settings: Sequence[Any],
) -> Problem:
    config = _comparing(*settings)
    return Problem(tuple(student), tuple(guide), temperature, None, (), tuple(dims), rows, offset, False, config)


@functools.lru_cache(maxsize=64, typed=True)
def _comparing(*settings: Any) -> LossConfig:
    return LossConfig.from_arguments(settings).comparing()


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    backend, student, guide, temperature, *static = inputs
    lse, _, guide_lse, _ = output
    ctx.backend, ctx.static = backend, static
    ctx.students, ctx.guides = len(student), len(guide)
    ctx.save_for_backward(lse, guide_lse, temperature, *student, *guide)


def _backward(ctx, by_lse, by_mean, *_):
    lse, guide_lse, temperature, *embeddings = ctx.saved_tensors
    student, guide = embeddings[: ctx.students], embeddings[ctx.students :]
    by_lse, by_mean = (torch.zeros_like(lse) if x is None else x for x in (by_lse, by_mean))
    *by_student, by_temperature = torch.ops.gist_fast.distil_backward(
        by_lse, by_mean, lse, guide_lse, ctx.backend, student, guide, temperature, *ctx.static
    )
    return (None, by_student, [None] * ctx.guides, by_temperature, *no_gradients(ctx.static))


distil_forward.register_autograd(_backward, setup_context=_setup_context)
distil_backward.register_autograd(refuse_double_backward)
