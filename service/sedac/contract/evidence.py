"""Statistics of what is measured on live requests: limits of mean losses, of shares and of ratios of means.

The limits hold at every moment at once, so that they may be looked at after every request and acted upon the first time they pass a
bound. Losses come as histograms in thousandths, which add up over engines. Plain numbers in, plain numbers out; the control service
alone calls it.

Source: I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86(1), 2024 (arXiv 2010.09686),
section 4: wealth prod(1 + lambda_i (x_i - m)) is a non-negative martingale under mean m, so that it passes 1 / alpha with probability at
most alpha, ever (Ville's inequality); here the mean wealth of fixed bets (`lambda = c / m`), which depends on nothing but the
histogram. I. Waudby-Smith, D. Arbour, R. Sinha, E. H. Kennedy, A. Ramdas, "Time-uniform central limit theory and asymptotic
confidence sequences", Annals of Statistics 52(6), 2024 (arXiv 2103.06476), theorem 2.2 in its one-sided form, for the ratio of means.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float64]
_UNIT = 1000
_BETS = 1 / (1 + np.exp2(np.arange(-7.0, 11.0)))
"""Shares of the stake on each value, from 0.992 for large gaps and few requests down to 0.001 for small gaps and many."""
_NUM_HALVINGS = 40
_MIN_MEAN, _MAX_SUM = 1e-12, 1e30
"""Smallest mean and largest sum. Beyond them the rounding of floating point would decide."""
_TUNED_FOR = 200
"""Number of requests of the smaller side at which the limit of a ratio is as tight as it can be."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A mean with limits, each of which holds at the given confidence at every moment at once."""

    lower: float
    mean: float
    """The mean. NaN where nothing was counted."""
    upper: float


@dataclass(frozen=True)
class LossCounts:
    """How many requests had which loss, in thousandths rounded down; pairs in ascending order, none of count 0."""

    items: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_mapping(cls, counts: Mapping[int, int], low: int, high: int) -> Self:
        """Read a histogram of losses between `low` and `high` (in ones).

        Raises:
            ValueError: a loss is outside, or a count negative.
        """
        for thousandths, count in counts.items():
            if not low * _UNIT <= thousandths <= high * _UNIT:
                raise ValueError(f"a loss of {thousandths} thousandths is outside {low * _UNIT}..{high * _UNIT}")
            if count < 0:
                raise ValueError(f"{count} requests had a loss of {thousandths} thousandths; a count is not negative")
        return cls(tuple(sorted((k, n) for k, n in counts.items() if n)))

    def __add__(self, other: LossCounts) -> LossCounts:
        """Return the counts of both together."""
        total = dict(self.items)
        for thousandths, count in other.items:
            total[thousandths] = total.get(thousandths, 0) + count
        return LossCounts(tuple(sorted(total.items())))

    @property
    def num_requests(self) -> int:
        """How many were counted."""
        return sum(count for _, count in self.items)

    @property
    def mean(self) -> float:
        """Mean of the rounded losses; NaN where nothing was counted."""
        total = self.num_requests
        return sum(k * n for k, n in self.items) / total / _UNIT if total else math.nan


@dataclass(frozen=True)
class Moments:
    """Sums over one value per request; they add up."""

    count: int = 0
    sum: float = 0.0
    sum_squares: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        """Return the sums of both together."""
        return Moments(self.count + other.count, self.sum + other.sum, self.sum_squares + other.sum_squares)

    def __sub__(self, earlier: Moments) -> Moments:
        """Return the sums of what came after `earlier`; without what floating point leaves below zero."""
        return Moments(self.count - earlier.count, max(0.0, self.sum - earlier.sum), max(0.0, self.sum_squares - earlier.sum_squares))

    @property
    def mean(self) -> float:
        """NaN where nothing was counted."""
        return self.sum / self.count if self.count else math.nan

    def find_problem(self) -> str:
        """Return why these can't be sums over values >= 0; empty: they can."""
        if not (math.isfinite(self.sum) and math.isfinite(self.sum_squares)):
            return f"sum {self.sum}, sum_squares {self.sum_squares}: not finite"
        if max(self.count, self.sum, self.sum_squares) > _MAX_SUM:
            return f"count {self.count}, sum {self.sum}, sum_squares {self.sum_squares}: over {_MAX_SUM:g}"
        if self.count < 0 or self.sum < 0 or self.sum_squares < 0:
            return f"count {self.count}, sum {self.sum}, sum_squares {self.sum_squares}: negative"
        if self.count == 0 and (self.sum or self.sum_squares):
            return f"sum {self.sum} of no values"
        if self.sum**2 > self.count * self.sum_squares * (1 + 1e-6) + 1e-12:
            return f"sum_squares {self.sum_squares} is too small for {self.count} values with the sum {self.sum}"
        return ""


def get_limits(counts: LossCounts, confidence: float, low: int = 0, high: int = 1) -> Limits:
    """Return limits of the mean loss of requests whose losses lie between `low` and `high`; each limit alone holds at `confidence`.

    Conservative to the rounding: the lower limit takes every loss as small as its thousandth allows, the upper one as large.
    """
    if not counts.items:
        return Limits(lower=float(low), mean=math.nan, upper=float(high))
    return _find_limits(counts, confidence, low, high)


def exceeds(counts: LossCounts, bound: float, confidence: float, low: int = 0, high: int = 1) -> bool:
    """Whether the lower limit of the mean loss is over `bound`; one look costs tens of microseconds."""
    if bound < low:
        return True
    if bound >= high or not counts.items:
        return False
    shares, weights = _read(counts, low, high, upper=False)
    return _get_wealth((bound - low) / (high - low), shares, weights) >= -math.log1p(-confidence)


def get_ratio_limit(part: Moments, base: Moments, confidence: float) -> float:
    """Return the lower limit of mean(part) / mean(base) at `confidence`; 0 where one of them has fewer than two values or no mean to speak of.

    For means of many requests (delta method on the logarithms of both means); holds at every look from a few dozen requests on.
    """
    if min(part.count, base.count) < 2 or min(part.mean, base.mean) < _MIN_MEAN:
        return 0.0
    variance = sum(max(0.0, m.sum_squares / m.mean**2 - m.count) / (m.count - 1) / m.count for m in (part, base))
    doubt = -2 * math.log(2 * (1 - confidence))
    growth = min(part.count, base.count) * max(1.0, doubt + math.log(max(0.0, doubt) + 1)) / _TUNED_FOR
    factor = math.sqrt(2 * (growth + 1) / growth * math.log(1 + math.sqrt(growth + 1) / (2 * (1 - confidence))))
    return part.mean / base.mean * math.exp(-factor * math.sqrt(variance))


@functools.lru_cache(maxsize=512)
def _find_limits(counts: LossCounts, confidence: float, low: int, high: int) -> Limits:
    needed, width, mean = -math.log1p(-confidence), high - low, counts.mean
    lower = _find_limit(*_read(counts, low, high, upper=False), needed)
    upper = 1 - _find_limit(*_read(counts, low, high, upper=True), needed)
    return Limits(lower=low + width * lower, mean=mean, upper=low + width * upper)


def _read(counts: LossCounts, low: int, high: int, *, upper: bool) -> tuple[_Array, _Array]:
    """Return the losses as shares of the way from `low` to `high` (for the upper limit: from high to low), and how often each came."""
    thousandths, weights = np.array(counts.items, dtype=np.float64).T
    shares = (thousandths - low * _UNIT) / ((high - low) * _UNIT)
    if upper:
        shares = 1 - np.minimum(shares + 1 / ((high - low) * _UNIT), 1.0)
    return shares, weights


def _find_limit(shares: _Array, weights: _Array, needed: float) -> float:
    """Return the largest mean that the bets refute, from below; their wealth falls as the mean grows."""
    good, bad = 0.0, float(shares @ weights / weights.sum())  # at the mean itself no bet wins
    for _ in range(_NUM_HALVINGS):
        middle = (good + bad) / 2
        if middle > 0 and _get_wealth(middle, shares, weights) >= needed:
            good = middle
        else:
            bad = middle
    return good


def _get_wealth(mean: float, shares: _Array, weights: _Array) -> float:
    """Return the logarithm of the bets' mean wealth against `mean` or less."""
    if mean <= 0:
        return math.inf if shares.any() else -math.inf
    mean = max(mean, _MIN_MEAN)
    wealth = np.log1p(_BETS[:, None] * (shares[None, :] / mean - 1)) @ weights
    best = float(wealth.max())
    return best + math.log(float(np.exp(wealth - best).mean()))
