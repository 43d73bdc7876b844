"""The settings of the loss that are plain values, and how they pass through a custom operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
"""As sentence-transformers' ``MultipleNegativesRankingLoss`` calls them."""


@dataclass(frozen=True)
class Rule:
    """Which pairs count, and with what weight; the fields are arguments of `gist_fast.guided_contrastive_loss`."""

    margin: float = 0.0
    """Of all rows; a margin a row is a tensor beside the rule."""
    relative: bool = False
    """``margin_strategy == "relative"``."""
    mask_ties: bool = False
    self_guided: bool = False
    hard: bool = False
    contrast_anchors: bool = True
    contrast_positives: bool = True
    offset: int = 0
    hardness_mode: str = ""
    """One of `HARDNESS_MODES`, or empty for none."""
    hardness_strength: float = 0.0

    def decided(self) -> Rule:
        """The rule of a pass that is told what is masked."""
        return replace(self, self_guided=False, hard=False)

    def to_arguments(self) -> tuple[Any, ...]:
        """The fields in their order, as an operator takes them."""
        return astuple(self)

    @classmethod
    def from_arguments(cls, arguments: Sequence[Any]) -> Rule:
        """The inverse of `to_arguments`."""
        return cls(*arguments)

    @classmethod
    def schema(cls) -> str:
        """The fields as part of an operator's schema."""
        return ", ".join(f"{field.type} {field.name}" for field in fields(cls))
