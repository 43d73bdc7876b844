"""The settings of the loss as type checkers see them, where they are passed by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from gist_fast.functional.choices import (
    Backend,
    Direction,
    Groups,
    HardnessMode,
    MaskBits,
    PartitionMode,
    Scope,
)


class SharedKeywords(TypedDict, total=False):
    """The settings that the function and the losses take by name, with the same types."""

    backend: Backend
    mask_bits: MaskBits
    directions: Sequence[Direction] | None
    partition_mode: PartitionMode
    mask_ties: bool
    mask_negatives: bool
    negatives_scope: Scope | Sequence[Scope]
    hard: bool
    hardness_mode: HardnessMode | None
    hardness_strength: float
    distill_weight: float
    distill_temperature: float
    triplet_margin: float | None
    label_smoothing: float
    positive_prior: float
    spread_out_weight: float
    matryoshka_dims: Sequence[int] | None
    matryoshka_weights: Sequence[float] | None


class LossKeywords(SharedKeywords, total=False):
    """All settings that a loss takes by name alone."""

    self_guided: bool
    row_margins: bool
    groups: Groups | None
    learn_temperature: bool
    temperature_min: float
    temperature_max: float
    gather_guide_dtype: Literal["float16", "bfloat16"] | None
    guide_cache: bool
    guided: bool
