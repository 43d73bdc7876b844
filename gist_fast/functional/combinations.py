"""Which settings of the loss go together, each of them right by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from gist_fast.functional.choices import HardnessMode
from gist_fast.functional.values import is_number, one_of
from gist_fast.runtime.errors import InputError, InputTypeError


def check_combination(config: Any) -> None:
    """Raise where settings of a `LossConfig`, each right by itself, make no sense together."""
    c = config
    if c.hardness_mode is None and c.hardness_strength:
        raise InputError(
            f"hardness_strength: expected 0 without a hardness_mode, got {c.hardness_strength}. Set hardness_mode to "
            f"{one_of(get_args(HardnessMode))}, or leave both out."
        )
    if c.hardness_mode is not None and not c.hardness_strength:
        raise InputError(
            f"hardness_strength: expected a float above 0 with hardness_mode {c.hardness_mode!r}, got "
            f"{c.hardness_strength}."
        )
    _check_directions(c)
    check_dims(c.matryoshka_dims, c.matryoshka_weights)
    if c.temperature_min >= c.temperature_max:
        raise InputError(
            f"temperature_min: expected a float below temperature_max {c.temperature_max}, got {c.temperature_min}."
        )
    if c.learn_temperature and not c.temperature_min <= c.temperature <= c.temperature_max:
        raise InputError(
            f"temperature: expected a start between temperature_min {c.temperature_min} and temperature_max "
            f"{c.temperature_max}, got {c.temperature}."
        )
    for name in ("temperature_min", "temperature_max"):
        if not c.learn_temperature and getattr(c, name) != getattr(type(c), name):
            raise InputError(
                f"{name}: got {getattr(c, name)}, which bounds a temperature that is learnt. Set "
                "learn_temperature=True, or leave it out."
            )
    if c.self_guided and not c.guided:
        raise InputError("self_guided: expected False with guided=False, got True. Leave out one of the two.")
    if not c.guided:
        for name, default in [(f.name, f.default) for f in fields(c) if f.metadata["needs_guide"]]:
            if (value := getattr(c, name)) != default:
                raise InputError(
                    f"{name}: expected {default!r} without a guide, which it is about, got {value!r}. Leave it out, or "
                    "give a guide."
                )
    _check_row_terms(c)
    _check_distillation(c)
    if c.hard and c.self_guided:
        raise InputError(
            "hard: expected False with self_guided, got True: the student decides by the same scores, so that hardly a "
            "negative is left. Set hard=False, or give a guide of its own."
        )


def _check_row_terms(c: Any) -> None:
    """Raise where a term that is a mean or a count over a row's negatives cannot have it, or has no meaning."""
    if c.triplet_margin is not None and not c.guided and c.groups is None:
        raise InputError("triplet_margin: nothing says what else is positive. Give a guide or groups with it.")
    terms = {name: getattr(c, name) for name in ("triplet_margin", "label_smoothing", "positive_prior")}
    for name in (name for name, value in terms.items() if value):
        if c.hard:
            raise InputError(f"hard: expected False with {name}, which is about all that the guide leaves, got True.")
        if c.mask_bits == "recompute":
            raise InputError(f"mask_bits: expected 'keep' with {name}, which reads the masks, got 'recompute'.")
    for name in (name for name in ("label_smoothing", "positive_prior") if terms[name]):
        if "doc_to_query" in c.compared:
            raise InputError(
                f"{name}: expected 0 with 'doc_to_query' in directions, where the positive counts twice, got "
                f"{terms[name]}."
            )
    if c.label_smoothing and (c.positive_prior or c.hardness_mode is not None):
        other = "positive_prior" if c.positive_prior else "hardness_mode"
        raise InputError(
            f"label_smoothing: expected 0 with {other}, which gives its classes other weights, got {c.label_smoothing}."
        )


def _check_distillation(c: Any) -> None:
    """Raise where there is no guide to distil, or it does not read all texts."""
    if not c.distill_weight:
        if c.distill_temperature != type(c).distill_temperature:
            raise InputError(
                f"distill_temperature: got {c.distill_temperature} without distill_weight. Set distill_weight above 0, "
                "or leave it out."
            )
        return
    if c.self_guided:
        raise InputError(
            "distill_weight: expected 0 where the student guides itself (self_guided, or its embeddings given as the "
            f"guide's), got {c.distill_weight}: it would learn from itself. Leave it out, or give another guide."
        )
    if not c.mask_negatives:
        raise InputError(
            "mask_negatives: expected True with distill_weight, for which the guide reads the negatives too, got False."
        )


def _check_directions(c: Any) -> None:
    """Raise where what is compared, and in how many softmaxes, makes no sense together."""
    if c.directions is None:
        if c.partition_mode != "joint":
            raise InputError(
                f"partition_mode: expected 'joint' without directions, got {c.partition_mode!r}. Set directions, as to "
                "['query_to_doc', 'doc_to_query'], or leave it out."
            )
        return
    directions = list(c.directions)
    if "query_to_doc" not in directions:
        raise InputError(
            f"directions: expected 'query_to_doc' among them, which alone is of anchors with their positives, got "
            f"{directions}."
        )
    if repeated := [d for d in dict.fromkeys(directions) if directions.count(d) > 1]:
        raise InputError(f"directions: expected each once, got {repeated[0]!r} {directions.count(repeated[0])} times.")
    for name in ("contrast_anchors", "contrast_positives"):
        if not getattr(c, name):
            raise InputError(f"{name}: got False beside directions, which say what is compared. Leave {name} out.")
    without = [d for d in directions if d in ("query_to_query", "doc_to_doc")]
    if c.partition_mode == "per_direction" and without:
        raise InputError(
            f"partition_mode: expected 'joint' with {', '.join(map(repr, without))} in directions, which has no "
            "positive for a softmax of its own, got 'per_direction'."
        )


def check_dims(
    dims: Sequence[int] | None, weights: Sequence[float] | None, width: int | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The Matryoshka dims, the largest first, and their weights; both empty without any.

    Args:
        width: of the embeddings; None where it is not known yet.
    """
    if dims is None:
        if weights is not None:
            raise InputError("matryoshka_weights: given without matryoshka_dims. Give both or neither.")
        return (), ()
    if isinstance(dims, str) or not isinstance(dims, Sequence) or not all(type(d) is int for d in dims):
        raise InputTypeError(f"matryoshka_dims: expected a list of ints, got {dims!r}.")
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
        raise InputError(f"matryoshka_dims: expected different ints of at least 1, got {list(dims)}.")
    if width is not None and max(dims) > width:
        raise InputError(f"matryoshka_dims: expected at most {width}, the width of the embeddings, got {max(dims)}.")
    if weights is None:
        weights = [1.0] * len(dims)
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not all(map(is_number, weights)):
        raise InputTypeError(f"matryoshka_weights: expected a list of floats, got {weights!r}.")
    if len(weights) != len(dims):
        raise InputError(f"matryoshka_weights: expected {len(dims)}, one for each of the dims, got {len(weights)}.")
    if not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise InputError(
            f"matryoshka_weights: expected finite floats of at least 0, not all of them 0, got {list(weights)}."
        )
    pairs = sorted(zip(dims, weights, strict=True), reverse=True)
    return tuple(d for d, _ in pairs), tuple(float(w) for _, w in pairs)
