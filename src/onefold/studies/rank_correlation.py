"""Spearman's rank correlation with its p-value and a bootstrap interval, from ranks.

scipy is no requirement of this package; tests compare with it where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onefold.errors import BadData
from onefold.report.format import format_significant

_RESAMPLES = 2000
_LEVEL = 0.95
_FEWEST = 4
_TERMS, _CLOSE, _TINY = 300, 1e-15, 1e-300  # of the continued fraction


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Spearman's rho of `count` pairs, its two-sided p-value, and its 95 % bootstrap interval over pairs."""

    rho: float
    p_value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """All of it as text."""
        p = "p < 0.001" if self.p_value < 1e-3 else f"p {format_significant(self.p_value, 2)}"
        return f"{self.rho:.2f} (95 % CI {self.low:.2f} to {self.high:.2f}, {p}, n {self.count})"


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> RankCorrelation:
    """Correlate the ranks of two series of equal length. Raises BadData for fewer than four pairs, or a constant."""
    if len(x) != len(y) or len(x) < _FEWEST:
        raise BadData(f"a rank correlation needs {_FEWEST} pairs or more; got {len(x)} and {len(y)} values")
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    rho = spearman(first, second)
    if math.isnan(rho):
        raise BadData("a rank correlation needs values that differ")
    random = np.random.default_rng(seed)
    drawn = [random.integers(0, len(first), len(first)) for _ in range(_RESAMPLES)]
    found = np.array([spearman(first[each], second[each]) for each in drawn])
    low, high = np.nanquantile(found, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return RankCorrelation(
        rho=rho, p_value=spearman_p_value(rho, len(first)), low=float(low), high=float(high), count=len(first)
    )


def spearman(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Pearson's correlation of the ranks; not a number where one of the series is constant."""
    a, b = (each - each.mean() for each in (average_ranks(x), average_ranks(y)))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale > 0 else math.nan


def average_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def spearman_p_value(rho: float, count: int) -> float:
    """The two-sided p-value by Student's t with count - 2 degrees of freedom, as scipy's `spearmanr` has it."""
    degrees = count - 2
    if abs(rho) >= 1:
        return 0.0
    t = rho * math.sqrt(degrees / ((1 - rho) * (1 + rho)))
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22) after Lentz."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction of the complement converges faster
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    value, c, d = 1.0, 1.0, 0.0
    for term in range(_TERMS):
        m = term // 2
        if term == 0:
            numerator = 1.0
        elif term % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (_away_from_zero(1 + numerator * d))
        c = _away_from_zero(1 + numerator / c)
        value *= c * d
        if abs(c * d - 1) < _CLOSE:
            break
    return front * (value - 1)


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
