"""What `gist_fast.guided_contrastive_loss` accepts, and what it says to everything else.

Each message names the argument, what came and what would do. Values are looked at only where that does not make an
accelerator's host wait; shapes, types and devices always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from gist_fast.errors import InputError, InputTypeError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
STRATEGIES = ("absolute", "relative")
REDUCTIONS = ("mean", "sum", "none")
MASK_BITS = ("auto", "keep", "recompute")


def check_embeddings(
    anchors: Tensor,
    positives: Tensor,
    negatives: Sequence[Tensor] | None,
    guide_anchors: Tensor | None,
    guide_positives: Tensor | None,
    guide_negatives: Sequence[Tensor] | None,
    offset: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The student's and the guide's embeddings as two tuples (anchors, positives, *negatives); the guide's may be ().

    Raises:
        TypeError: an argument is no tensor, or not of a floating type.
        ValueError: shapes, widths, devices or numbers of columns do not go together.
    """
    for name, columns in (("negatives", negatives), ("guide_negatives", guide_negatives)):
        if isinstance(columns, Tensor) or not isinstance(columns, Sequence | None):
            got = f"one tensor of shape {_shape(columns)}" if isinstance(columns, Tensor) else type(columns).__name__
            raise InputTypeError(f"{name}: got {got}; a tuple of [N, D] tensors, one for each column, would do.")
    negatives = tuple(negatives or ())
    student = _check_family("", anchors, positives, negatives)
    rows = anchors.shape[0]
    if not isinstance(offset, int) or isinstance(offset, bool):
        raise InputTypeError(f"offset: got {offset!r} of type {type(offset).__name__}; an int would do.")
    if offset < 0:
        raise InputError(f"offset: got {offset}; it counts positives from 0.")
    if positives.shape[0] < offset + rows:
        raise InputError(
            f"positives: {rows} anchors at offset {offset} need at least {offset + rows} rows (anchor i's positive is "
            f"row offset + i); got shape {_shape(positives)}."
        )
    if guide_anchors is None and guide_positives is None:
        if guide_negatives:
            raise InputError("guide_negatives: given without guide_anchors and guide_positives; give all or none.")
        return student, ()
    if guide_anchors is None or guide_positives is None:
        missing, given = ("anchors", "positives") if guide_anchors is None else ("positives", "anchors")
        raise InputError(f"guide_{missing}: missing, though guide_{given} came; give both, or neither for no guide.")
    if len(guide_negatives or ()) != len(negatives):
        raise InputError(
            f"guide_negatives: {len(negatives)} columns of negatives came and {len(guide_negatives or ())} of the "
            "guide's; each column needs the guide's embeddings of the same texts."
        )
    guide = _check_family("guide_", guide_anchors, guide_positives, guide_negatives or ())
    for name, ours, theirs in zip(_names("", len(student)), student, guide, strict=True):
        if ours.shape[0] != theirs.shape[0]:
            raise InputError(
                f"guide_{name}: got {theirs.shape[0]} rows and {name} {ours.shape[0]}; both embed the same texts."
            )
    if guide[0].device != anchors.device:
        raise InputError(
            f"guide_anchors: on {guide[0].device}, but anchors are on {anchors.device}; move all to one device."
        )
    return student, guide


def check_temperature(temperature: float | Tensor) -> None:
    """Raise unless `temperature` is a positive finite number or a 0-d floating tensor (its value unseen on a GPU)."""
    wanted = "a float above 0, or a 0-d floating tensor, would do"
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0 or not temperature.is_floating_point():
            raise InputError(
                f"temperature: got a tensor of shape {_shape(temperature)} and type {temperature.dtype}; {wanted}."
            )
        # Reading a value would make the host wait for a GPU, and would break a compiled graph.
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return
        temperature = temperature.item()
    elif not _is_number(temperature):
        raise InputTypeError(f"temperature: got {temperature!r} of type {type(temperature).__name__}; {wanted}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"temperature: got {temperature}; {wanted}.")


def check_margin(margin: float, margin_strategy: str) -> None:
    """Raise unless `margin` is a finite number and the strategy is known."""
    if not _is_number(margin):
        raise InputTypeError(f"margin: got {margin!r} of type {type(margin).__name__}; a float would do.")
    if not math.isfinite(margin):
        raise InputError(f"margin: got {margin}; a finite float would do.")
    check_choice("margin_strategy", margin_strategy, STRATEGIES)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}: got {value!r}; one of {', '.join(map(repr, choices))} would do.")


def check_flags(**flags: object) -> None:
    """Raise TypeError unless each is True or False: ``"no"`` would count as yes."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InputTypeError(f"{name}: got {value!r} of type {type(value).__name__}; True or False would do.")


def _check_family(prefix: str, anchors: Tensor, positives: Tensor, negatives: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Embeddings of one model: matrices of one width, type and device."""
    family = (anchors, positives, *negatives)
    for name, x in zip(_names(prefix, len(family)), family, strict=True):
        if not isinstance(x, Tensor):
            raise InputTypeError(f"{name}: got {type(x).__name__}; a floating tensor [N, D] would do.")
        if x.dtype not in FLOATS:
            raise InputTypeError(f"{name}: got type {x.dtype}; float32, float16, bfloat16 or float64 would do.")
        if x.ndim != 2:
            raise InputError(f"{name}: got shape {_shape(x)}; a matrix [N, D] would do.")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise InputError(f"{name}: got shape {_shape(x)}; at least one row and one column are needed.")
        if x.shape[1] != anchors.shape[1]:
            raise InputError(
                f"{name}: got width {x.shape[1]}, but {prefix}anchors have {anchors.shape[1]}; one model's embeddings "
                "have one width."
            )
        if x.dtype != anchors.dtype:
            raise InputTypeError(
                f"{name}: got type {x.dtype}, but {prefix}anchors have {anchors.dtype}; convert to one type."
            )
        if x.device != anchors.device:
            raise InputError(f"{name}: on {x.device}, but {prefix}anchors are on {anchors.device}; use one device.")
    return family


def _names(prefix: str, count: int) -> list[str]:
    return [prefix + n for n in ("anchors", "positives", *(f"negatives[{k}]" for k in range(count - 2)))]


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
