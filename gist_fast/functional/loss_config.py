"""What a loss is built from: its settings, checked and frozen, and what follows from them."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Sequence
from dataclasses import KW_ONLY, Field, FrozenInstanceError, dataclass, fields
from typing import Any, Literal

from gist_fast.functional.choices import Direction
from gist_fast.functional.combinations import check_combination, check_dims
from gist_fast.functional.loss_settings import LossSettings, setting
from gist_fast.functional.values import check_choice, check_flags, check_number, one_of
from gist_fast.runtime.errors import InputError, InputTypeError, nearest


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
        check_combination(self)

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
    def compared(self) -> tuple[Direction, ...]:
        """The directions that are compared, whichever settings say so; see `gist_fast.functional.blocks`."""
        if self.directions is not None:
            return tuple(self.directions)
        flags: dict[Direction, bool] = {
            "query_to_doc": True, "query_to_query": self.contrast_anchors, "doc_to_doc": self.contrast_positives,
        }  # fmt: skip
        return tuple(direction for direction, compared in flags.items() if compared)

    @property
    def softmaxes(self) -> int:
        """Of each row."""
        return len(self.compared) if self.partition_mode == "per_direction" else 1

    @property
    def counts_positive_twice(self) -> bool:
        """Whether the one softmax has the positive in both of the directions that contain it."""
        return self.softmaxes == 1 and "doc_to_query" in self.compared

    def comparing(self) -> LossConfig:
        """What says which pairs are compared, and no more."""
        return LossConfig(
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            directions=self.directions,
            partition_mode=self.partition_mode,
        )

    @property
    def needs_masks(self) -> bool:
        """Whether a row's loss has means or counts over its negatives, for which masks are kept and multiplied."""
        return self.triplet_margin is not None or self.label_smoothing > 0 or self.positive_prior > 0

    @property
    def has_row_terms(self) -> bool:
        """Whether there is anything that `gist_fast.functional.row_terms` does."""
        return self.needs_masks or self.spread_out_weight > 0

    @property
    def gathers_anchors(self) -> bool:
        """Whether the anchors of all ranks are candidates, where candidates are gathered."""
        return self.directions is not None and len({"query_to_query", "doc_to_query"} & set(self.directions)) > 0

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
        # Operators know no lists of words.
        kinds = {name: "str" if _FIELDS[name].kind is list else _FIELDS[name].kind.__name__ for name in _DECIDING}
        return ", ".join(f"{kind}{'?' if _FIELDS[name].optional else ''} {name}" for name, kind in kinds.items())

    def to_arguments(self) -> tuple[Any, ...]:
        """What `schema` declares, as an operator takes it."""
        values = (getattr(self, name) for name in _DECIDING)
        return tuple(",".join(value) if isinstance(value, list | tuple) else value for value in values)

    @classmethod
    def from_arguments(cls, arguments: Sequence[Any]) -> LossConfig:
        """The inverse of `to_arguments`; all else is at its default."""
        return _of_arguments(*arguments)

    def decided(self) -> LossConfig:
        """For a backward pass that has its mask bits: nothing is left that decides masks."""
        settings = zip(_DECIDING, self.to_arguments(), strict=True)
        off = {"self_guided": False, "hard": False, "mask_negatives": True}
        return _of_arguments(*(off.get(name, value) for name, value in settings))


@functools.lru_cache(maxsize=256, typed=True)
def _of_arguments(*arguments: Any) -> LossConfig:
    # Each operator of each step reads them, and checking takes longer than a launch.
    settings = dict(zip(_DECIDING, arguments, strict=True))
    for name, value in settings.items():
        if _FIELDS[name].kind is list and value is not None:
            settings[name] = tuple(value.split(","))
    return LossConfig(**settings)


@dataclass(frozen=True)
class _Expected:
    """What a setting may be by itself."""

    kind: type
    """bool, float, str or list."""
    choices: tuple[str, ...]
    listed: bool
    """Whether it may be a list of choices, too."""
    optional: bool
    bounds: dict[str, Any]


def _expected(f: Field, hint: Any) -> _Expected:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    member, *lists = (m for m in members if m is not type(None))
    origin = typing.get_origin(member)
    choices = typing.get_args(member) if origin is Literal else ()
    kind = str if choices else origin or member
    if kind is list and typing.get_origin(item := typing.get_args(member)[0]) is Literal:
        choices = typing.get_args(item)
    return _Expected(kind, choices, bool(lists), type(None) in members, dict(f.metadata["bounds"]))


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
    listed = expected.kind is list and len(expected.choices) > 0
    if listed and not isinstance(value, list | tuple):
        raise InputTypeError(f"{name}: expected a list of {one_of(expected.choices)}, got {value!r}.")
    if listed or (expected.listed and isinstance(value, list | tuple)):
        for k, each in enumerate(value):
            check_choice(f"{name}[{k}]", each, expected.choices)
    elif expected.choices:
        check_choice(name, value, expected.choices)
    elif expected.kind is bool:
        check_flags(**{name: value})
    elif expected.kind is float:
        check_number(name, value, **expected.bounds)
