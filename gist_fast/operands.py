"""From embeddings to operands: what every backend multiplies, and the way back for the gradient.

Each student embedding ``x`` becomes ``u = x / |x| * sqrt(log2(e) / temperature)``. Then a plain dot product of two
operands is a finished logit in base 2, for every block alike (``aa`` and ``pp`` stay symmetric, which scaling only
one side would break), a backend never sees the temperature, and its softmax uses ``exp2``, which is the hardware's
own instruction on a GPU and over twice as fast as ``exp`` in torch's CPU vectorisation.

Guide embeddings become plain unit vectors. Each row's threshold is turned into a *limit*, the guide score above which
an entry is masked, with the margin already taken off.

**Ties.** The rule is ``guide score > threshold``, strictly, so that another copy of the positive's text stays a
negative. A dot product summed in another order differs in its last bits, and would decide such a tie at random: the
limit therefore stands `TIE_ULPS` units of the last place of 1.0 (in the type the dot product is summed in) above the
threshold. That is 1.9e-6 for everything summed in float32 and 3.6e-15 for float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gist_fast.blocks import ANCHORS, POSITIVES
from gist_fast.errors import InputError

TIE_ULPS = 16
ZERO_NORM = 1e-12
"""Rows of a smaller norm are zero vectors: similarity 0 to everything, and no gradient."""


@dataclass(frozen=True)
class Operands:
    """What a backend computes with. ``B`` anchors, ``D`` student width, ``G`` guide width."""

    student: tuple[Tensor, ...]
    """Anchors ``[B, D]``, positives ``[M, D]``, negatives ``[N_k, D]``, in the type of the embeddings. A dot product
    of two rows is their logit in base 2."""
    guide: tuple[Tensor, ...] | None
    """The guide's unit vectors, same rows, ``[.., G]``; `student` itself (the same object) where the student guides
    itself; None without a guide."""
    limits: Tensor | None
    """``[B]``, accumulation type: entries of row i whose guide score exceeds ``limits[i]`` are masked."""
    positives: Tensor
    """``[B]``, accumulation type: the logit (base 2) of each anchor with its own positive."""
    norms: tuple[Tensor, ...]
    """Norms of the raw student rows, ``[.., 1]`` each, accumulation type."""

    @property
    def self_guided(self) -> bool:
        return self.guide is self.student


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which dot products of this type are summed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logit_scale(temperature: Tensor) -> Tensor:
    """``sqrt(log2(e) / temperature)``: the norm of every student operand."""
    return (math.log2(math.e) / temperature).sqrt()


def prepare(
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    *,
    margin: float,
    relative: bool,
    self_guided: bool,
    offset: int,
) -> Operands:
    """Normalise, scale and round the embeddings, and work out each row's limit. Differentiable by the student.

    Args:
        student: anchors ``[B, D]``, positives ``[M, D]``, then any negatives ``[N_k, D]``, as the user gave them.
        guide: the guide's embeddings of the same texts, or an empty sequence.
        temperature: 0-d.
        self_guided: the student's own scores decide the mask; `guide` is empty then.

    Raises:
        ValueError: on the CPU, when a row is not finite; it is named. On an accelerator looking would make the host
            wait, so the loss comes out as NaN instead.
    """
    scale = logit_scale(temperature.to(accumulation_dtype(student[0].dtype)))
    operands, norms = zip(*(_normalise(x, scale, _student_name(k)) for k, x in enumerate(student)), strict=True)
    batch = student[ANCHORS].shape[0]
    own = slice(offset, offset + batch)
    positives = _row_dots(operands[ANCHORS], operands[POSITIVES][own])

    guides, limits = None, None
    if self_guided:
        guides = operands
        with torch.no_grad():
            # The student's scores carry the factor scale**2, so the limits must carry it too.
            unit = positives / scale.square()
            limits = _limits(unit, margin, relative) * scale.square()
    elif guide:
        with torch.no_grad():
            one = torch.ones((), dtype=accumulation_dtype(guide[0].dtype), device=guide[0].device)
            pairs = [_normalise(x, one, "guide_" + _student_name(k)) for k, x in enumerate(guide)]
            guides = tuple(_as_multiplied(unit) for unit, _ in pairs)
            limits = _limits(_row_dots(guides[ANCHORS], guides[POSITIVES][own]), margin, relative)
            # A guide row that is not finite would compare as false and mask nothing, unseen: make every limit NaN.
            limits = limits + torch.stack([(norm - norm).sum() for _, norm in pairs]).sum()
    return Operands(operands, guides, limits, positives, norms)


def embedding_gradients(
    gradients: Sequence[Tensor], student: Sequence[Tensor], norms: Sequence[Tensor], temperature: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Carry gradients by the operands back to the embeddings and the temperature.

    With ``v = x / |x|`` and ``u = scale * v``: ``dx = scale / |x| * (du - v (v . du))``, and since ``scale`` goes as
    ``temperature ** -0.5``, ``d temperature = -1 / (2 temperature) * sum(u . du)``. The rounding of ``u`` to the
    embeddings' type is passed straight through.

    Args:
        gradients: by each operand, accumulation type. Overwritten.
        student: the raw embeddings, as given to `prepare`.
        norms: ``Operands.norms``.

    Returns:
        The gradients by the embeddings, in their types, and the gradient by the temperature, 0-d.
    """
    temperature = temperature.to(accumulation_dtype(student[0].dtype))
    scale = logit_scale(temperature)
    by_embedding, along = [], torch.zeros_like(temperature)
    for du, x, norm in zip(gradients, student, norms, strict=True):
        inverse = _inverse(norm)
        direction = x.to(norm.dtype) * inverse
        radial = (direction * du).sum(dim=1, keepdim=True)
        along = along + radial.sum()
        du.addcmul_(direction, radial, value=-1).mul_(scale * inverse)
        by_embedding.append(du.to(x.dtype))
    return by_embedding, -scale * along / (2 * temperature)


def operand_name(index: int) -> str:
    """The argument of `gist_fast.guided_contrastive_loss` that operand `index` comes from."""
    return _student_name(index)


def _student_name(index: int) -> str:
    return ("anchors", "positives")[index] if index < 2 else f"negatives[{index - 2}]"


def _normalise(x: Tensor, scale: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """``x`` with rows of norm `scale`, in its own type, and the norms ``[N, 1]`` in the accumulation type."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=accumulation_dtype(x.dtype))
    # A traced graph cannot branch on values; there, as on an accelerator, the loss comes out as NaN.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_finite(x, norm, name)
    return (x.to(norm.dtype) * (scale * _inverse(norm))).to(x.dtype), norm


def _inverse(norm: Tensor) -> Tensor:
    # The inner where keeps the derivative of the branch not taken finite. Infinite and NaN norms become NaN (the
    # difference is 0 for all others): 1 / inf would make a zero vector of an overflow, silently.
    zero = norm <= ZERO_NORM
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, norm)) + (norm - norm)


def _check_finite(x: Tensor, norm: Tensor, name: str) -> None:
    if torch.isfinite(norm).all():
        return
    row = int(torch.nonzero(~torch.isfinite(norm[:, 0]))[0, 0])
    bad = torch.nonzero(~torch.isfinite(x[row]))
    if len(bad):
        column = int(bad[0, 0])
        found = f"row {row}, column {column} is {x[row, column].item()}"
    else:
        found = f"the norm of row {row} overflows {norm.dtype}"
    raise InputError(f"{name}: {found}. Embeddings must be finite; look at the model or the text of that row.")


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    accumulate = accumulation_dtype(a.dtype)
    return (a.to(accumulate) * b.to(accumulate)).sum(dim=1)


def _limits(thresholds: Tensor, margin: float, relative: bool) -> Tensor:
    lowered = thresholds - (thresholds.abs() * margin if relative else margin)
    return lowered + TIE_ULPS * torch.finfo(thresholds.dtype).eps


def _as_multiplied(unit: Tensor) -> Tensor:
    """Round as the matrix units will, so that thresholds (summed here) and scores (summed there) see equal factors."""
    if unit.dtype == torch.float32 and unit.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        # TF32 keeps 10 of float32's 23 mantissa bits: add half of the last kept one, and cut.
        return ((unit.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return unit
