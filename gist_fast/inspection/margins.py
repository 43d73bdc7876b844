"""What each of several margins would drop, counted in one pass over the guide's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from gist_fast.functional.blocks import Block
from gist_fast.functional.checks import STRATEGIES
from gist_fast.inspection.guide_scores import PLAIN, Variant, limits
from gist_fast.runtime.errors import InputError, InputTypeError, shown

LADDER = (-0.1, -0.05, 0.0, 0.02, 0.05, 0.1, 0.2)
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
        raise InputTypeError(f"{name}: got {shown(margins)}; a list of numbers such as [0, 0.05] would do.")
    for margin in margins:
        if not isinstance(margin, Real) or isinstance(margin, bool):
            raise InputTypeError(f"{name}: got {shown(margin)} among them; numbers such as 0.05 would do.")
        if not math.isfinite(margin):
            raise InputError(f"{name}: got {margin} among them; finite numbers would do.")
    distinct = sorted({float(margin) + 0.0 for margin in margins})
    if not 1 <= len(distinct) <= MOST:
        raise InputError(f"{name}: got {len(distinct)} of them; 1 to {MOST} would do.")
    return distinct


class MarginCounter:
    """Counts, tile by tile, what each margin would drop under each strategy.

    Args:
        thresholds: ``[B]``, before any margin.
        band: the guide's `gist_fast.inspection.guide_scores.tie`.
        margins: as `check_margins` returns them.
    """

    def __init__(self, thresholds: Tensor, band: float, margins: Sequence[float], variant: Variant = PLAIN) -> None:
        self._settings = [(strategy, margin) for strategy in STRATEGIES for margin in margins]
        self._limits = [limits(thresholds, band, margin, strategy, variant) for strategy, margin in self._settings]
        self._kept = torch.zeros(len(self._settings), len(thresholds), dtype=torch.int64)
        self._dropped: dict[str, Tensor] = {}

    def add(self, block: Block, rows: slice, scores: Tensor, below: Tensor | None = None) -> None:
        """Count a tile ``[n, columns]``, -inf where an entry never counts.

        Args:
            below: of the same shape, what is no negative whatever the margin: the student ranks it below the positive.
        """
        total = self._dropped.setdefault(block.name, torch.zeros(len(self._settings), dtype=torch.int64))
        compared = torch.isfinite(scores).sum(dim=1)
        for place, limit in enumerate(self._limits):
            dropped = scores > limit[rows, None]
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
