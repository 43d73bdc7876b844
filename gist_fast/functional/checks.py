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

from gist_fast.functional.loss_config import HARDNESS_MODES
from gist_fast.runtime.errors import InputError, InputTypeError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
STRATEGIES = ("absolute", "relative")
REDUCTIONS = ("mean", "sum", "none")
# A gradient by an embedding goes as 1 / (temperature * norm): float16 ends at 65,504, and float32's logits at 3e38.
_LEAST_TEMPERATURE = {torch.float16: 1e-6, torch.bfloat16: 1e-30, torch.float32: 1e-30}
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


def check_temperature(temperature: float | Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless `temperature` is a positive finite number or a 0-d floating tensor (its value unseen on a GPU).

    Args:
        dtype: of the embeddings, where it is known.
    """
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
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature: got {temperature}; {wanted}.")
    least = 0.0 if dtype is None else _LEAST_TEMPERATURE.get(dtype, 0.0)
    if temperature < least:
        raise InputError(
            f"temperature: got {temperature}, at which gradients of {dtype} embeddings overflow; {least} or more would "
            "do, or another type."
        )


def check_margin(margin: float | Tensor, margin_strategy: str, rows: int | None = None, name: str = "margin") -> None:
    """Raise unless `margin` is a finite number, or where `rows` are given a tensor with one for each, and the strategy
    is known."""
    if isinstance(margin, Tensor) and rows is not None:
        if tuple(margin.shape) != (rows,) or not margin.is_floating_point():
            raise InputError(
                f"margin: got a tensor of shape {_shape(margin)} and type {margin.dtype}; a float, or a floating "
                f"tensor [{rows}] with one for each anchor, would do."
            )
        look = margin.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and len(bad := torch.nonzero(~torch.isfinite(margin))):
            raise InputError(f"margin: row {int(bad[0, 0])} is {margin[bad[0, 0]].item()}; finite numbers would do.")
    elif not _is_number(margin):
        raise InputTypeError(f"{name}: got {margin!r} of type {type(margin).__name__}; a float would do.")
    elif not -math.inf < margin < math.inf:  # not isfinite, which torch.compile cannot trace for a float that changes
        raise InputError(f"{name}: got {margin}; a finite float would do.")
    check_choice("margin_strategy", margin_strategy, STRATEGIES)


def check_groups(groups: Tensor | None, anchors: Tensor, candidates: int) -> None:
    """Raise unless `groups` is None or a whole number for each candidate."""
    if groups is None:
        return
    wanted = f"a tensor [{candidates}] of whole numbers, the group of each row of positives, would do"
    if not isinstance(groups, Tensor):
        raise InputTypeError(f"groups: got {type(groups).__name__}; {wanted}.")
    if groups.dtype not in (torch.int64, torch.int32):
        raise InputTypeError(f"groups: got type {groups.dtype}; {wanted} (int64 or int32).")
    if tuple(groups.shape) != (candidates,):
        raise InputError(f"groups: got shape {_shape(groups)}; {wanted}.")
    if groups.device != anchors.device:
        raise InputError(f"groups: on {groups.device}, but anchors are on {anchors.device}; move all to one device.")


def check_hardness(mode: str | None, strength: float) -> None:
    """Raise unless the mode is known and has a strength."""
    if not _is_number(strength):
        raise InputTypeError(
            f"hardness_strength: got {strength!r} of type {type(strength).__name__}; a float would do."
        )
    if not 0 <= strength < math.inf:
        raise InputError(f"hardness_strength: got {strength}; a finite float of at least 0 would do.")
    if mode is None:
        if strength:
            raise InputError(
                f"hardness_strength: got {strength} without a hardness_mode; one of "
                f"{', '.join(map(repr, HARDNESS_MODES))} would do."
            )
        return
    check_choice("hardness_mode", mode, HARDNESS_MODES)
    if not strength:
        raise InputError(f"hardness_strength: got {strength}, with which {mode!r} does nothing; above 0 would do.")


def check_widths(
    dims: Sequence[int] | None, weights: Sequence[float] | None, width: int | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The widths of a ladder, the widest first, and their weights; both empty without one.

    Args:
        width: of the embeddings; None where it is not known yet.
    """
    if dims is None:
        if weights is not None:
            raise InputError("matryoshka_weights: given without matryoshka_dims; give both or neither.")
        return (), ()
    if isinstance(dims, str) or not isinstance(dims, Sequence) or not all(type(d) is int for d in dims):
        raise InputTypeError(f"matryoshka_dims: got {dims!r}; a list of ints would do.")
    if not dims:
        raise InputError("matryoshka_dims: got an empty list; at least one width would do, or None.")
    if min(dims) < 1 or len(set(dims)) < len(dims):
        raise InputError(f"matryoshka_dims: got {list(dims)}; different widths of at least 1 would do.")
    if width is not None and max(dims) > width:
        raise InputError(f"matryoshka_dims: got {max(dims)}, but the embeddings are {width} wide; no more would do.")
    if weights is None:
        weights = [1.0] * len(dims)
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not all(_is_number(w) for w in weights):
        raise InputTypeError(f"matryoshka_weights: got {weights!r}; a list of floats would do.")
    if len(weights) != len(dims):
        raise InputError(f"matryoshka_weights: got {len(weights)}, and {len(dims)} widths; one for each would do.")
    if not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise InputError(f"matryoshka_weights: got {list(weights)}; finite weights of at least 0, not all 0, would do.")
    pairs = sorted(zip(dims, weights, strict=True), reverse=True)
    return tuple(d for d, _ in pairs), tuple(float(w) for _, w in pairs)


def check_combination(
    *,
    guided: bool,
    self_guided: bool,
    margin: float | Tensor,
    margin_strategy: str,
    mask_ties: bool,
    hard: bool,
    triplet_margin: float | None,
    mask_bits: str,
    grouped: bool = False,
) -> None:
    """Raise where settings, each right by itself, make no sense together.

    Args:
        guided: whether there is a guide, be it the student itself.
        self_guided: whether it is the student itself.
        grouped: whether rows have groups.
    """
    if triplet_margin is not None:
        if not _is_number(triplet_margin):
            raise InputTypeError(f"triplet_margin: got {triplet_margin!r}; a float above 0 would do, or None.")
        if not 0 < triplet_margin < math.inf:
            raise InputError(f"triplet_margin: got {triplet_margin}; a finite float above 0 would do, or None.")
        if not (guided or grouped):
            raise InputError("triplet_margin: nothing says what else is positive; give a guide or groups with it.")
        if hard:
            raise InputError(
                "hard: with triplet_margin, whose means are over all that the guide leaves; one of the two would do."
            )
        if mask_bits == "recompute":
            raise InputError("mask_bits: 'recompute' with triplet_margin, which reads the masks; 'keep' would do.")
    if not guided:
        if isinstance(margin, Tensor) or margin:
            got = "a tensor" if isinstance(margin, Tensor) else margin
            raise InputError(f"margin: got {got} without a guide, whose threshold it lowers; 0.0 would do, or a guide.")
        if margin_strategy != "absolute":
            raise InputError(
                f"margin_strategy: got {margin_strategy!r} without a guide, whose threshold a margin lowers; "
                "'absolute' would do, or a guide."
            )
        if mask_ties:
            raise InputError("mask_ties: there is no guide to tie with; False would do, or a guide.")
    if hard and self_guided:
        raise InputError(
            "hard: the student guides itself by the same scores, so that hardly a negative is left; a guide of its own "
            "would do, or hard=False."
        )


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
        if x.layout != torch.strided:
            raise InputTypeError(f"{name}: got layout {x.layout}; a dense tensor, as of {name}.to_dense(), would do.")
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
