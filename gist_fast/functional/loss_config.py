"""Every setting of the guided loss, once: type, default, range, help and source; and how it is checked.

`LossSettings` declares them. `LossConfig` is what a loss is built from: the same fields, checked and frozen.
`gist_fast.GISTTrainingArguments` inherits the declaration, the losses take the settings as arguments, and the YAML
section ``loss``, the record of a run and the model card are made from them. Without torch, which a configuration is
read before.

To add a setting, follow its row in the table of ``CONTRIBUTING.md``.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Sequence
from dataclasses import KW_ONLY, Field, FrozenInstanceError, dataclass, field, fields
from typing import Any, Literal

from gist_fast.functional.choices import (
    Backend,
    Direction,
    Groups,
    HardnessMode,
    MarginStrategy,
    MaskBits,
    PartitionMode,
    Scope,
)
from gist_fast.functional.combinations import check_combination, check_dims
from gist_fast.functional.values import check_choice, check_flags, check_number, one_of
from gist_fast.runtime.errors import InputError, InputTypeError, nearest

STOCK = "sentence-transformers 6.2"


def setting(
    default: Any,
    help: str,  # as transformers' own argument parser calls it
    *,
    source: str = "",
    decides: bool = False,
    recorded: bool = True,
    needs_guide: bool = False,
    **bounds: Any,
) -> Any:
    """A field of `LossSettings`.

    Args:
        help: one or two sentences, for ``--help`` and the documentation.
        source: the paper or the library that it comes from.
        decides: whether it says which pairs count, or with what weight, so that the custom operators need it.
        recorded: whether the model card and the record of a run list it: False where it changes no more than how the
            loss is computed.
        needs_guide: whether it is about what a guide does, so that it stays at its default without any.
        bounds: of a number, as `gist_fast.functional.values.check_number` takes them.
    """
    about = {"help": help, "source": source, "decides": decides, "recorded": recorded, "needs_guide": needs_guide}
    return field(default=default, metadata={**about, "bounds": bounds})


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
        needs_guide=True,
    )
    margin: float = setting(
        0.0,
        "The larger, the more pairs are taken for false negatives and dropped.",
        source=STOCK,
        decides=True,
        needs_guide=True,
    )
    contrast_anchors: bool = setting(True, "Whether anchors are negatives of each other.", source=STOCK, decides=True)
    contrast_positives: bool = setting(
        True, "Whether positives are negatives of each other; retrieval may prefer False.", source=STOCK, decides=True
    )
    gather_across_devices: bool = setting(
        False, "Whether the candidates of all ranks are negatives on every rank.", source=STOCK
    )
    _: KW_ONLY
    directions: list[Direction] | None = setting(
        None,
        "What is compared, in the place of contrast_anchors and contrast_positives: 'query_to_doc' (anchors with "
        "positives and negatives; always), 'query_to_query', 'doc_to_query' (each positive with all anchors) and "
        "'doc_to_doc' (each positive with all other positives and negatives). None: as those two say.",
        source=f"arXiv 2308.03281; {STOCK}",
        decides=True,
    )
    partition_mode: PartitionMode = setting(
        "joint",
        "How many softmaxes there are: one over all directions ('joint'), or one each ('per_direction'), whose losses "
        "are averaged.",
        source=f"arXiv 2310.19923; {STOCK}",
        decides=True,
    )
    self_guided: bool = setting(
        False,
        "Whether the student's own similarities decide what is a false negative, without a guide; mostly with a "
        "negative margin, as -0.1.",
        decides=True,
    )
    mask_ties: bool = setting(
        False,
        "Whether what ties with the positive for the guide, as copies of its text do, is dropped.",
        decides=True,
        needs_guide=True,
    )
    row_margins: bool = setting(
        False,
        "Whether each row brings a margin of its own, in the column 'margin', which is added to 'margin'.",
        needs_guide=True,
    )
    groups: Groups | None = setting(
        None,
        "Rows that are no negatives of each other: 'anchor', those with the same anchor text; 'positive', those with "
        "the same positive text, and no mined negative of that text is one; 'anchor_or_positive', both; 'column', what "
        "the columns of groups say. None: all are.",
        source="'anchor_or_positive': arXiv 2503.07891",
    )
    mask_negatives: bool = setting(
        True,
        "Whether the guide may drop mined negatives too. False: it does not read the columns of negatives.",
        decides=True,
        needs_guide=True,
    )
    negatives_scope: Scope | list[Scope] = setting(
        "all",
        "Whose negatives the columns of negatives are: 'all', every anchor's, or 'own', the anchor's alone in whose "
        "row they stand; one for all columns, or a list of one a column.",
        source="'own': arXiv 2506.05176, arXiv 2503.07891",
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
    distill_weight: float = setting(
        0.0,
        "Weight of an added term: the KL divergence of the student's distribution over a row's candidates from the "
        "guide's, masked ones among them.",
        source="arXiv 2212.03533, arXiv 2402.03216",
        needs_guide=True,
        at_least=0,
    )
    distill_temperature: float = setting(
        0.05,
        "What divides the guide's similarities in its distribution.",
        source="arXiv 2212.03533",
        needs_guide=True,
        above=0,
    )
    triplet_margin: float | None = setting(
        None,
        "Margin of an added soft triplet term (guided-triplet-soft). None: no such term.",
        source="GISTEmbed's training code",
        above=0,
    )
    label_smoothing: float = setting(
        0.0,
        "Share of each row's target that the positive and all negatives that count get alike.",
        source="arXiv 1512.00567",
        at_least=0,
        below=1,
    )
    positive_prior: float = setting(
        0.0,
        "Share of the negatives that is expected to be positive, by which their sum is corrected (debiased contrastive "
        "learning).",
        source="arXiv 2007.00224",
        at_least=0,
        below=1,
    )
    spread_out_weight: float = setting(
        0.0,
        "Weight of an added term that spreads the embeddings: the mean squared similarity of the batch's anchors with "
        "each other, and of its positives.",
        source="arXiv 2509.20354, arXiv 1708.06320",
        at_least=0,
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

    def scopes_of(self, columns: int) -> Scope | Sequence[Scope]:
        """`negatives_scope` for so many columns of negatives, of which a batch may lack some: by one word where all
        have the same."""
        scope = self.negatives_scope
        return scope[0] if not isinstance(scope, str) and len(set(scope)) == 1 and columns <= len(scope) else scope

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
    def relative(self) -> bool:
        """Whether the margin is a share of the threshold."""
        return self.margin_strategy == "relative"

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
        names = "contrast_anchors", "contrast_positives", "directions", "partition_mode"
        return _comparing(*(tuple(v) if isinstance(v := getattr(self, name), list) else v for name in names))

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


@functools.lru_cache(maxsize=64, typed=True)
def _comparing(anchors: bool, positives: bool, directions: Any, partition_mode: Any) -> LossConfig:
    return LossConfig(
        contrast_anchors=anchors, contrast_positives=positives, directions=directions, partition_mode=partition_mode
    )


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
