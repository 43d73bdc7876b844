"""How a cost grows with the batch: a power of it, or a linear and a quadratic part."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEAST_SIZES = 3
CONFIDENCE = 0.95
WIDEST = 1.0
"""An exponent whose interval is wider is not shown."""
NOT_CLEAR = "not clear"


@dataclass(frozen=True)
class Power:
    """``cost = factor * B**exponent``, with an interval of the exponent."""

    exponent: float
    low: float
    high: float
    factor: float
    sizes: int

    @property
    def clear(self) -> bool:
        """Whether the interval tells one whole power from the next."""
        return self.high - self.low <= WIDEST

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"B^{self.exponent:.2f} ({self.low:.2f} to {self.high:.2f})" if self.clear else NOT_CLEAR


@dataclass(frozen=True)
class Split:
    """``cost = fixed + linear * B + quadratic * B**2``, none of them negative."""

    fixed: float
    linear: float
    quadratic: float

    @property
    def crossing(self) -> float:
        """The batch at which the quadratic part is as large as the linear; infinite where there is none."""
        return self.linear / self.quadratic if self.quadratic > 0 else math.inf

    def in_words(self, largest: float) -> str:
        """Which part counts, by the largest batch that was measured."""
        if self.fixed > self.linear * largest + self.quadratic * largest**2:
            return "mostly constant"
        if self.crossing == 0:
            return "quadratic"
        return f"quadratic from B {self.crossing:,.0f}" if math.isfinite(self.crossing) else "linear"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "crossing": self.crossing if math.isfinite(self.crossing) else None}


def fit_power(sizes: Sequence[float], costs: Sequence[float]) -> Power | None:
    """The straight line through the logarithms, and the interval in which its slope lies with 95 % by Student's t.

    The interval is that of points that scatter about a line; where the true growth bends, it widens.

    Returns:
        None with fewer than three sizes, or a cost that is not above 0.
    """
    if len(set(sizes)) < LEAST_SIZES or min(costs) <= 0:
        return None
    # Not scipy.stats, which takes seconds to import.
    from scipy.special import stdtrit

    x, y = [math.log(b) for b in sizes], [math.log(c) for c in costs]
    slope, intercept = statistics.linear_regression(x, y)
    left_over = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    free = len(x) - 2
    error = math.sqrt(left_over / free / sum((a - statistics.fmean(x)) ** 2 for a in x))
    half = float(stdtrit(free, (1 + CONFIDENCE) / 2)) * error
    return Power(slope, slope - half, slope + half, math.exp(intercept), len(sizes))


def fit_split(sizes: Sequence[float], costs: Sequence[float]) -> Split | None:
    """The least squares of relative errors under non-negative parts.

    Returns:
        None with fewer than three sizes, or a cost that is not above 0.
    """
    if len(set(sizes)) < LEAST_SIZES or min(costs) <= 0:
        return None
    import numpy as np

    scale = max(sizes)
    parts = np.array([[1.0, b / scale, (b / scale) ** 2] for b in sizes]) / np.array(costs)[:, None]
    wanted = np.ones(len(costs))
    best, least = np.zeros(3), math.inf
    # The best with parts that are not negative is the best of those parts alone that are not zero.
    for used in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        found, *_ = np.linalg.lstsq(parts[:, used], wanted, rcond=None)
        missed = float(((parts[:, used] @ found - wanted) ** 2).sum())
        if found.min() >= 0 and missed < least:
            best, least = np.zeros(3), missed
            best[list(used)] = found
    return Split(float(best[0]), float(best[1]) / scale, float(best[2]) / scale**2)
