"""The variants of the guided loss, as the losses take them: one set of keyword arguments, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from gist_fast.data.names import GROUP, MARGIN
from gist_fast.functional.checks import (
    check_choice,
    check_combination,
    check_flags,
    check_hardness,
    check_margin,
    check_widths,
)
from gist_fast.runtime.errors import InputError, InputTypeError, nearest

Groups = Literal["anchor", "column"]
GROUPS = get_args(Groups)
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


class VariantArguments(TypedDict, total=False):
    """Keyword arguments of the losses; `Variants` says what each one is."""

    self_guided: bool
    mask_ties: bool
    row_margins: bool
    groups: Groups | None
    hard: bool
    hardness_mode: HardnessMode | None
    hardness_strength: float
    triplet_margin: float | None
    matryoshka_dims: Sequence[int] | None
    matryoshka_weights: Sequence[float] | None
    learn_temperature: bool
    temperature_min: float
    temperature_max: float


@dataclass(frozen=True)
class Variants:
    """What a guided loss does beside the plain one; see also `gist_fast.guided_contrastive_loss`."""

    self_guided: bool = False
    """The student's own embeddings of the batch decide what is a false negative, for nothing; mostly with a negative
    margin, as -0.1, since a student has no opinion of its own that would not please it."""
    mask_ties: bool = False
    """What ties with the positive for the guide, as another copy of its text does, is no negative."""
    row_margins: bool = False
    """Each row brings a margin of its own, in the dataset's column ``margin``, which is added to the loss's."""
    groups: Groups | None = None
    """Rows that are no negatives of each other: ``"anchor"``, those of the same anchor text (several positives a
    query); ``"column"``, those of the same value in the dataset's column ``group``."""
    hard: bool = False
    """Negatives that the student already ranks below the positive do not count."""
    hardness_mode: HardnessMode | None = None
    """Which negatives are the heavier the more similar they are."""
    hardness_strength: float = 0.0
    triplet_margin: float | None = None
    """Margin of the soft triplet term; None for none."""
    matryoshka_dims: Sequence[int] | None = None
    """Widths of nested embeddings, which share the guide's one decision."""
    matryoshka_weights: Sequence[float] | None = None
    learn_temperature: bool = False
    """The temperature is a parameter that is trained, from `temperature` on; not with a decay of weights."""
    temperature_min: float = 0.001
    """What a learnt temperature stays within."""
    temperature_max: float = 1.0

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Variants:
        """From keyword arguments.

        Raises:
            TypeError: one has no such name, or is of a wrong type.
            ValueError: a value is out of range.
        """
        names = [field.name for field in fields(cls)]
        for name in arguments:
            if name not in names:
                raise InputTypeError(f"{name}: no such argument of a guided loss{nearest(name, names)}.")
        return cls(**arguments)

    def __post_init__(self) -> None:
        check_flags(
            self_guided=self.self_guided,
            mask_ties=self.mask_ties,
            row_margins=self.row_margins,
            hard=self.hard,
            learn_temperature=self.learn_temperature,
        )
        if self.groups is not None:
            check_choice("groups", self.groups, GROUPS)
        check_hardness(self.hardness_mode, self.hardness_strength)
        check_widths(self.matryoshka_dims, self.matryoshka_weights, None)
        for name in ("temperature_min", "temperature_max"):
            check_margin(getattr(self, name), "absolute", name=name)
        if not 0 < self.temperature_min < self.temperature_max:
            raise InputError(
                f"temperature_min: got {self.temperature_min}, and temperature_max {self.temperature_max}; above 0, "
                "and the larger one second, would do."
            )
        for name in ("temperature_min", "temperature_max"):
            if not self.learn_temperature and getattr(self, name) != getattr(Variants, name):
                raise InputError(
                    f"{name}: got {getattr(self, name)}, which bounds a temperature that is learnt; "
                    "learn_temperature=True would do, or leave it out."
                )

    def check_with(
        self, *, guided: bool, guide: bool, margin: float, margin_strategy: str, mask_bits: str, width: int | None
    ) -> None:
        """Raise where these settings and the loss's others make no sense together.

        Args:
            guided: whether there is a guide of any kind.
            guide: whether it is a model of its own.
            width: of the student's embeddings, where it is known.
        """
        if self.self_guided and guide:
            raise InputError("self_guided: True, though a guide came; leave out one of the two.")
        if self.row_margins and not guided:
            raise InputError("row_margins: True without a guide, whose thresholds they lower; False would do.")
        check_widths(self.matryoshka_dims, self.matryoshka_weights, width)
        check_combination(
            guided=guided,
            self_guided=self.self_guided,
            margin=margin,
            margin_strategy=margin_strategy,
            mask_ties=self.mask_ties,
            hard=self.hard,
            triplet_margin=self.triplet_margin,
            mask_bits=mask_bits,
            grouped=self.groups is not None,
        )

    def check_data(self, key: str, columns: Sequence[str], texts: Sequence[str]) -> None:
        """Raise unless a dataset brings what these settings read from it, and nothing that is read by others alone.

        Args:
            key: which dataset, for the message.
            columns: all of its columns.
            texts: those that hold texts: anchor, positive, negatives.

        Raises:
            InputError: it lacks a column ``group`` or ``margin``, or has one that the loss does not ask for; it has no
                negatives.
        """
        for name, needed, setting in (
            (GROUP, self.groups == "column", "groups: 'column'"),
            (MARGIN, self.row_margins, "row_margins: True"),
        ):
            if needed and name not in columns:
                raise InputError(
                    f"{setting}, and {key} has no column {name!r}; its columns are {', '.join(columns)}. Add it, or "
                    f"name the one that is meant under the data's 'columns' ({name}: ...)."
                )
            if not needed and name in columns:
                raise InputError(
                    f"{key}: has a column {name!r}, and the loss does not ask for it; {setting} would do, or leave it "
                    "out of the data's 'columns'."
                )
        if self.hardness_mode == "hard_negatives" and len(texts) < 3:
            raise InputError(
                f"hardness_mode: 'hard_negatives', and {key} has no column of negatives; 'in_batch_negatives' would do."
            )

    def arguments(self) -> dict[str, Any]:
        """Those that `gist_fast.guided_contrastive_loss` takes as they are."""
        own = ("mask_ties", "hard", "hardness_mode", "hardness_strength", "triplet_margin")
        return {name: getattr(self, name) for name in (*own, "matryoshka_dims", "matryoshka_weights")}

    def changed(self) -> dict[str, Any]:
        """Those that are not at their default, for the model card and for what a run was started with."""
        return {f.name: value for f in fields(self) if (value := asdict(self)[f.name]) != f.default}
