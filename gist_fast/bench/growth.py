"""How a cost grows with the batch: a power of it, or a sum of a constant, a linear and a quadratic part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LEAST_SIZES = 3
CONFIDENCE = 0.95
WIDEST = 1.0
"""An exponent whose interval is wider is not shown."""
FARTHEST = 0.1
"""Parts whose sum is farther than this from a measured cost, relatively, are not shown."""
EXACT = 1e-18
"""Variance of relative errors that is no more than rounding."""
SMALLEST_SHARE = 0.05
"""A part of less is not told: noise makes as much."""
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

    def __str__(self) -> str:
        return f"B^{self.exponent:.2f} ({self.low:.2f} to {self.high:.2f})" if self.clear else NOT_CLEAR


@dataclass(frozen=True)
class Split:
    """``cost = fixed + linear * B + quadratic * B**2``, none of them negative."""

    fixed: float
    linear: float
    quadratic: float
    missed: float = 0.0
    """The largest relative distance of a measured cost from the sum."""

    @property
    def clear(self) -> bool:
        """Whether the sum describes what was measured."""
        return self.missed <= FARTHEST

    @property
    def crossing(self) -> float:
        """The batch at which the quadratic part is as large as the linear; infinite where there is none."""
        return self.linear / self.quadratic if self.quadratic > 0 else math.inf

    def in_words(self, largest: float) -> str:
        """Each part's share of the cost of the largest batch that was measured."""
        if not self.clear:
            return NOT_CLEAR
        parts = {"constant": self.fixed, "linear": self.linear * largest, "quadratic": self.quadratic * largest**2}
        shares = {name: part / sum(parts.values()) for name, part in parts.items()}
        told = ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share >= SMALLEST_SHARE)
        crossed = 0 < self.crossing <= largest and shares["linear"] >= SMALLEST_SHARE
        crossing = f"; quadratic above linear from B {self.crossing:,.0f}" if crossed else ""
        return f"{told} at B {largest:,.0f}{crossing}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "crossing": self.crossing if math.isfinite(self.crossing) else None}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Split:
        """The inverse of `as_dict`."""
        return cls(**{name: value for name, value in given.items() if name != "crossing"})


def fit_power(sizes: Sequence[float], costs: Sequence[float]) -> Power | None:
    """The straight line through the logarithms, and the interval in which its slope lies with 95 % by Student's t.

    The interval is that of points that scatter about a line; where the true growth bends, it widens.

    Returns:
        None with fewer than three sizes, or a cost that is not above 0.
    """
    if len(set(sizes)) < LEAST_SIZES or min(costs) <= 0:
        return None
    import numpy as np

    (slope, intercept), covariance = np.polyfit(np.log(sizes), np.log(costs), 1, cov=True)
    half = _student(len(sizes) - 2) * math.sqrt(covariance[0, 0])
    return Power(float(slope), float(slope - half), float(slope + half), math.exp(intercept), len(sizes))


def fit_split(sizes: Sequence[float], costs: Sequence[float]) -> Split | None:
    """The least squares of relative errors under non-negative parts: of one, two or three.

    One part stands alone unless a second lowers what is left over by more than chance would: F, the fall over the
    variance that is then left, is above its 95 % quantile. A third has to do the same again, and takes five sizes.

    Returns:
        None with fewer than three sizes, or a cost that is not above 0.
    """
    if len(set(sizes)) < LEAST_SIZES or min(costs) <= 0:
        return None
    import numpy as np

    scale = max(sizes)
    parts = np.array([[1.0, b / scale, (b / scale) ** 2] for b in sizes]) / np.array(costs)[:, None]
    count = len(set(sizes))
    chosen: tuple[np.ndarray, float, float] | None = None
    # The best with parts that are not negative is the best of those parts alone that are not zero.
    for together in (1, 2, 3):
        free = count - together
        fits = [_least_squares(parts, used) for used in combinations(range(3), together)]
        fits = [fit for fit in fits if fit[0].min() >= 0]
        if free < (1 if together < 3 else 2) or not fits:
            break
        best = min(fits, key=lambda fit: fit[1])
        # An exact sum leaves rounding errors, of which no part is a finding.
        if chosen is not None and chosen[1] - best[1] <= _student(free) ** 2 * max(best[1] / free, EXACT):
            break
        chosen = best
    assert chosen is not None  # one part of positive costs is positive
    found, _, missed = chosen
    return Split(float(found[0]), float(found[1]) / scale, float(found[2]) / scale**2, missed)


def _least_squares(parts: np.ndarray, used: tuple[int, ...]) -> tuple[np.ndarray, float, float]:
    """All three parts with those not used at 0, the sum of squares left over, and the largest error."""
    import numpy as np

    columns = list(used)
    solved, *_ = np.linalg.lstsq(parts[:, columns], np.ones(len(parts)), rcond=None)
    errors = parts[:, columns] @ solved - 1.0
    found = np.zeros(3)
    found[columns] = solved
    return found, float((errors**2).sum()), float(np.abs(errors).max())


def _student(free: int) -> float:
    """The two-sided quantile of Student's t; its square is that of F with 1 and `free` degrees of freedom."""
    # Not scipy.stats, which takes seconds to import.
    from scipy.special import stdtrit

    return float(stdtrit(free, (1 + CONFIDENCE) / 2))
