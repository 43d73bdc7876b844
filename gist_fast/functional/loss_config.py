"""Every setting of the guided loss, once: type, default, range, help and source; and how it is checked.

`LossSettings` declares them. `LossConfig` is what a loss is built from: the same fields, checked and frozen.
`gist_fast.GISTTrainingArguments` inherits the declaration, the losses take the settings as arguments, and the YAML
section ``loss``, the record of a run and the model card are made from them. Without torch, which a configuration is
read before.

To add a setting, follow its row in the table of ``CONTRIBUTING.md``.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import KW_ONLY, Field, FrozenInstanceError, dataclass, field, fields
from typing import Any, Literal, TypedDict

from gist_fast.functional.values import check_choice, check_flags, check_number, is_number, one_of
from gist_fast.runtime.errors import InputError, InputTypeError, nearest

STOCK = "sentence-transformers 6.2"
MarginStrategy = Literal["absolute", "relative"]
Groups = Literal["anchor", "column"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
Backend = Literal["auto", "triton", "tiled", "reference"]
MaskBits = Literal["auto", "keep", "recompute"]


def setting(
    default: Any,
    help: str,  # as transformers' own argument parser calls it
    *,
    source: str = "",
    decides: bool = False,
    recorded: bool = True,
    **bounds: Any,
) -> Any:
    """A field of `LossSettings`.

    Args:
        help: one or two sentences, for ``--help`` and the documentation.
        source: the paper or the library that it comes from.
        decides: whether it says which pairs count, or with what weight, so that the custom operators need it.
        recorded: whether the model card and the record of a run list it: False where it changes no more than how the
            loss is computed.
        bounds: of a number, as `gist_fast.functional.values.check_number` takes them.
    """
    about = {"help": help, "source": source, "decides": decides, "recorded": recorded, "bounds": bounds}
    return field(default=default, metadata=about)


@dataclass
class LossSettings:
    """The settings of a guided loss that training arguments have too; not checked until a `LossConfig` is made of them.

    The first six are positional in the losses of sentence-transformers, in this order.

    Example:
        >>> LossSettings(margin=0.05).loss_settings()["margin"]
        0.05
    """

    temperature: float = setting(0.01, "Divides the cosine similarities in the softmax.", source=STOCK, above=0)
    margin_strategy: MarginStrategy = setting(
        "absolute",
        "How the margin lowers the guide's threshold t: 'absolute' (t - margin) or 'relative' (t - |t| * margin).",
        source=STOCK,
        decides=True,
    )
    margin: float = setting(
        0.0, "The larger, the more pairs are taken for false negatives and dropped.", source=STOCK, decides=True
    )
    contrast_anchors: bool = setting(True, "Whether anchors are negatives of each other.", source=STOCK, decides=True)
    contrast_positives: bool = setting(
        True, "Whether positives are negatives of each other; retrieval may prefer False.", source=STOCK, decides=True
    )
    gather_across_devices: bool = setting(
        False, "Whether the candidates of all ranks are negatives on every rank.", source=STOCK
    )
    _: KW_ONLY
    self_guided: bool = setting(
        False,
        "Whether the student's own similarities decide what is a false negative, without a guide; mostly with a "
        "negative margin, as -0.1.",
        decides=True,
    )
    mask_ties: bool = setting(
        False, "Whether what ties with the positive for the guide, as copies of its text do, is dropped.", decides=True
    )
    row_margins: bool = setting(
        False, "Whether each row brings a margin of its own, in the column 'margin', which is added to 'margin'."
    )
    groups: Groups | None = setting(
        None,
        "Rows that are no negatives of each other: 'anchor', those of the same anchor text; 'column', those with the "
        "same whole number in the column 'group'. None: all are.",
    )
    hard: bool = setting(
        False, "Whether negatives that the student already ranks below the positive are dropped too.", decides=True
    )
    hardness_mode: HardnessMode | None = setting(
        None,
        "Which negatives weigh the more the more similar they are: 'in_batch_negatives', 'hard_negatives' (each row's "
        "own) or 'all_negatives'.",
        source="arXiv 2503.04812, arXiv 2509.20354",
        decides=True,
    )
    hardness_strength: float = setting(
        0.0,
        "How much more: this times the similarity is added to their logits.",
        source="arXiv 2503.04812, arXiv 2509.20354",
        decides=True,
        at_least=0,
    )
    triplet_margin: float | None = setting(
        None,
        "Margin of an added soft triplet term (guided-triplet-soft). None: no such term.",
        source="GISTEmbed's training code",
        above=0,
    )
    matryoshka_dims: list[int] | None = setting(
        None,
        "Dims of nested embeddings to train, which share one run of the guide. None: the whole width alone.",
        source="arXiv 2205.13147",
    )
    matryoshka_weights: list[float] | None = setting(
        None, "A weight for each of matryoshka_dims. None: 1 each.", source="arXiv 2205.13147"
    )
    learn_temperature: bool = setting(False, "Whether the temperature is trained, from 'temperature' on.")
    temperature_min: float = setting(0.001, "The least that a learnt temperature may become.", above=0)
    temperature_max: float = setting(1.0, "The most that a learnt temperature may become.", above=0)
    gather_guide_dtype: Literal["float16", "bfloat16"] | None = setting(
        None,
        "The type that the guide's embeddings are rounded to before they are gathered: 'float16' or 'bfloat16'. None: "
        "the type they have.",
        recorded=False,
    )
    guide_cache: bool = setting(
        False,
        "Whether to remember the guide's embedding of each text over steps and epochs, in main memory.",
        recorded=False,
    )
    backend: Backend = setting(
        "auto", "How the loss is computed: 'auto', 'triton', 'tiled' or 'reference'.", recorded=False
    )
    mask_bits: MaskBits = setting(
        "auto",
        "Whether masks are kept for the backward pass ('keep'), decided again ('recompute'), or by size ('auto').",
        recorded=False,
    )

    def loss_settings(self) -> dict[str, Any]:
        """The settings by name."""
        return {f.name: getattr(self, f.name) for f in fields(LossSettings)}


@dataclass
class LossConfig(LossSettings):
    """The settings of one loss, checked and frozen; `dataclasses.replace` makes a changed one.

    Raises:
        TypeError: a value is of a wrong type.
        ValueError: a value is out of range, or makes no sense together with another.

    Example:
        >>> from dataclasses import replace
        >>> replace(LossConfig(temperature=0.05), mask_ties=True).mask_ties
        True
    """

    _: KW_ONLY
    guided: bool = setting(True, "Whether there is a guide of any kind. False: all in-batch negatives count.")

    def __post_init__(self) -> None:
        for name in _FIELDS:
            check_setting(name, getattr(self, name))
        _check_combination(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # By hand, because a frozen dataclass cannot share its fields with the arguments of a trainer, which are not.
        if name in self.__dict__ or name not in _FIELDS:
            raise FrozenInstanceError(f"{name}: a LossConfig is frozen; dataclasses.replace makes a changed one.")
        super().__setattr__(name, value)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> LossConfig:
        """From keyword arguments of a loss.

        Raises:
            TypeError: one has no such name; and as the class.
        """
        for name in settings:
            if name not in _FIELDS:
                raise InputTypeError(f"{name}: no such argument of a guided loss{nearest(name, _FIELDS)}.")
        return cls(**settings)

    def check_models(self, *, guide: bool, width: int | None) -> None:
        """Raise where the settings do not go with the models.

        Args:
            guide: whether there is a guide that is a model of its own.
            width: of the student's embeddings; None where it is not known yet.
        """
        if guide and (self.self_guided or not self.guided):
            name, other = ("self_guided", False) if self.self_guided else ("guided", True)
            raise InputError(f"{name}: expected {other} with a guide, got {not other}. Leave out one of the two.")
        check_dims(self.matryoshka_dims, self.matryoshka_weights, width)

    @property
    def relative(self) -> bool:
        """Whether the margin is a share of the threshold."""
        return self.margin_strategy == "relative"

    def recorded(self) -> dict[str, Any]:
        """What the model card and the record of a run list: the positional settings, and what is not at its default."""
        found = {}
        for f in fields(LossSettings):
            value = getattr(self, f.name)
            if not f.kw_only or (f.metadata["recorded"] and value != f.default):
                found[f.name] = value
        return found

    @classmethod
    def schema(cls) -> str:
        """What a custom operator needs of it, as part of the operator's schema."""
        found = ((name, _FIELDS[name]) for name in _DECIDING)
        return ", ".join(f"{each.kind.__name__}{'?' if each.optional else ''} {name}" for name, each in found)

    def to_arguments(self) -> tuple[Any, ...]:
        """What `schema` declares, as an operator takes it."""
        return tuple(getattr(self, name) for name in _DECIDING)

    @classmethod
    def from_arguments(cls, arguments: Sequence[Any]) -> LossConfig:
        """The inverse of `to_arguments`; all else is at its default."""
        return _of_arguments(*arguments)

    def decided(self) -> LossConfig:
        """For a backward pass that has its mask bits: nothing is left that decides masks."""
        settings = zip(_DECIDING, self.to_arguments(), strict=True)
        return _of_arguments(*(False if name in ("self_guided", "hard") else value for name, value in settings))


@functools.lru_cache(maxsize=256, typed=True)
def _of_arguments(*arguments: Any) -> LossConfig:
    # Each operator of each step reads them, and checking takes longer than a launch.
    return LossConfig(**dict(zip(_DECIDING, arguments, strict=True)))


class SharedKeywords(TypedDict, total=False):
    """For type checkers: the settings that the function and the losses take by name, with the same types."""

    backend: Backend
    mask_bits: MaskBits
    mask_ties: bool
    hard: bool
    hardness_mode: HardnessMode | None
    hardness_strength: float
    triplet_margin: float | None
    matryoshka_dims: Sequence[int] | None
    matryoshka_weights: Sequence[float] | None


class LossKeywords(SharedKeywords, total=False):
    """For type checkers: all settings that a loss takes by name alone."""

    self_guided: bool
    row_margins: bool
    groups: Groups | None
    learn_temperature: bool
    temperature_min: float
    temperature_max: float
    gather_guide_dtype: Literal["float16", "bfloat16"] | None
    guide_cache: bool
    guided: bool


@dataclass(frozen=True)
class _Expected:
    """What a setting may be by itself."""

    kind: type
    """bool, float, str or list."""
    choices: tuple[str, ...]
    optional: bool
    bounds: dict[str, Any]


def _expected(f: Field, hint: Any) -> _Expected:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    (member,) = (m for m in members if m is not type(None))
    origin = typing.get_origin(member)
    choices = typing.get_args(member) if origin is Literal else ()
    kind = str if choices else origin or member
    return _Expected(kind, choices, type(None) in members, dict(f.metadata["bounds"]))


_HINTS = typing.get_type_hints(LossConfig)
_FIELDS = {f.name: _expected(f, _HINTS[f.name]) for f in fields(LossConfig)}
_DECIDING = [f.name for f in fields(LossConfig) if f.metadata["decides"]]


def help_of(name: str) -> str:
    """What a setting is for, in a sentence or two."""
    return next(f.metadata["help"] for f in fields(LossConfig) if f.name == name)


def check_setting(name: str, value: Any) -> None:
    """Raise unless a setting can have that value, whatever the others are; what is no setting of a loss passes.

    Raises:
        TypeError: it is of a wrong type.
        ValueError: it is out of range.
    """
    expected = _FIELDS.get(name)
    if expected is None or (value is None and expected.optional):
        return
    if expected.choices:
        check_choice(name, value, expected.choices)
    elif expected.kind is bool:
        check_flags(**{name: value})
    elif expected.kind is float:
        check_number(name, value, **expected.bounds)


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


def _check_combination(config: LossConfig) -> None:
    """Raise where settings, each right by itself, make no sense together."""
    c = config
    if c.hardness_mode is None and c.hardness_strength:
        raise InputError(
            f"hardness_strength: expected 0 without a hardness_mode, got {c.hardness_strength}. Set hardness_mode to "
            f"{one_of(_FIELDS['hardness_mode'].choices)}, or leave both out."
        )
    if c.hardness_mode is not None and not c.hardness_strength:
        raise InputError(
            f"hardness_strength: expected a float above 0 with hardness_mode {c.hardness_mode!r}, got "
            f"{c.hardness_strength}."
        )
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
        if not c.learn_temperature and getattr(c, name) != getattr(LossConfig, name):
            raise InputError(
                f"{name}: got {getattr(c, name)}, which bounds a temperature that is learnt. Set "
                "learn_temperature=True, or leave it out."
            )
    if c.self_guided and not c.guided:
        raise InputError("self_guided: expected False with guided=False, got True. Leave out one of the two.")
    if not c.guided:
        for name in ("margin", "margin_strategy", "mask_ties", "row_margins"):
            value, default = getattr(c, name), getattr(LossConfig, name)
            if value != default:
                raise InputError(
                    f"{name}: expected {default!r} without a guide, whose thresholds it is about, got {value!r}. Leave "
                    "it out, or give a guide."
                )
    if c.triplet_margin is not None:
        if not c.guided and c.groups is None:
            raise InputError("triplet_margin: nothing says what else is positive. Give a guide or groups with it.")
        if c.hard:
            raise InputError(
                "hard: expected False with triplet_margin, whose means are over all that the guide leaves, got True."
            )
        if c.mask_bits == "recompute":
            raise InputError("mask_bits: expected 'keep' with triplet_margin, which reads the masks, got 'recompute'.")
    if c.hard and c.self_guided:
        raise InputError(
            "hard: expected False with self_guided, got True: the student decides by the same scores, so that hardly a "
            "negative is left. Set hard=False, or give a guide of its own."
        )
