"""What each of several margins would drop, counted in one pass over the guide's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from gist_fast.functional.backends.reference import masked_by_guide
from gist_fast.functional.blocks import Block
from gist_fast.functional.choices import MarginStrategy
from gist_fast.functional.operands import make_thresholds
from gist_fast.functional.values import check_number
from gist_fast.runtime.errors import InputError, InputTypeError, shown

MARGINS = (-0.1, -0.05, 0.0, 0.02, 0.05, 0.1, 0.2)
"""The margins that are tried where none are named."""
MOST = 64


@dataclass(frozen=True)
class MarginOutcome:
    """What one margin would do to a batch.

    Example:
        >>> outcome = MarginOutcome("absolute", 0.05, {"ap": 90, "aa": 90}, {"ap": 9, "aa": 0}, rows=10, rows_emptied=0)
        >>> outcome.share("ap"), outcome.share()
        (0.1, 0.05)
    """

    strategy: str
    margin: float
    compared: dict[str, int]
    """By block, how many pairs are compared."""
    dropped: dict[str, int]
    """By block, how many of them would be dropped."""
    rows: int
    rows_emptied: int
    """Rows that would be left without any negative, and so teach nothing."""

    def share(self, block: str | None = None) -> float:
        """The share of pairs that would be dropped, in a block or altogether."""
        names = self.compared if block is None else (block,)
        return sum(self.dropped[name] for name in names) / max(1, sum(self.compared[name] for name in names))

    @property
    def share_emptied(self) -> float:
        return self.rows_emptied / max(1, self.rows)


def check_margins(margins: Sequence[float], name: str = "margins") -> list[float]:
    """The margins, each once and rising.

    Raises:
        InputError, InputTypeError: there are none or too many, or one is no finite number.
    """
    if isinstance(margins, str) or not isinstance(margins, Sequence):
        raise InputTypeError(f"{name}: expected a list of numbers such as [0, 0.05], got {shown(margins)}.")
    for margin in margins:
        check_number(name, margin)
    distinct = sorted({float(margin) + 0.0 for margin in margins})
    if not 1 <= len(distinct) <= MOST:
        raise InputError(f"{name}: expected 1 to {MOST} of them, got {len(distinct)}.")
    return distinct


class MarginCounter:
    """Counts, tile by tile, what each margin would drop under each strategy.

    Args:
        own: ``[B]``, the guide's scores of the anchors with their positives.
        band: the guide's `gist_fast.inspection.guide_scores.tie`.
        margins: as `check_margins` returns them.
        mask_ties: whether ties are dropped.
        row_margins: ``[B]``, added to each margin; or 0.
    """

    def __init__(
        self, own: Tensor, band: float, margins: Sequence[float], mask_ties: bool, row_margins: Tensor | float
    ) -> None:
        self._settings = [(strategy, margin) for strategy in get_args(MarginStrategy) for margin in margins]
        self._thresholds = [
            make_thresholds(own, row_margins + margin, relative=strategy == "relative", mask_ties=mask_ties, band=band)
            for strategy, margin in self._settings
        ]
        self._kept = torch.zeros(len(self._settings), len(own), dtype=torch.int64)
        self._dropped: dict[str, Tensor] = {}

    def add(self, block: Block, rows: slice, scores: Tensor, below: Tensor | None = None) -> None:
        """Count a tile ``[n, columns]``, -inf where an entry never counts.

        Args:
            below: of the same shape, what is no negative whatever the margin: the student ranks it below the positive.
        """
        total = self._dropped.setdefault(block.name, torch.zeros(len(self._settings), dtype=torch.int64))
        compared = torch.isfinite(scores).sum(dim=1)
        for place, thresholds in enumerate(self._thresholds):
            dropped = masked_by_guide(scores, thresholds[rows]) & block.guided
            total[place] += dropped.sum()
            gone = dropped if below is None else dropped | below
            self._kept[place, rows] += compared - gone.sum(dim=1)

    def outcomes(self, compared: dict[str, int]) -> list[MarginOutcome]:
        """One a strategy and margin; `compared` as in `MarginOutcome`."""
        return [
            MarginOutcome(
                strategy=strategy,
                margin=margin,
                compared=compared,
                dropped={block: int(counts[place]) for block, counts in self._dropped.items()},
                rows=self._kept.shape[1],
                rows_emptied=int((self._kept[place] == 0).sum()),
            )
            for place, (strategy, margin) in enumerate(self._settings)
        ]
