"""Statistics of latencies: percentiles, a tail one may state with a confidence, intervals of paired ratios.

Legend: n samples or rounds, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_SURE = 0.99
_RESAMPLES = 2000
_LEVEL = 0.95
_AT_ONCE = 1_000_000  # resampled values held in memory


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the samples lie, linear between the two nearest samples."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def sure_percentile(samples: Sequence[float], share: float) -> float | None:
    """A value that is, 99 % sure, no better than the true percentile: for the tail that `share` (0 to 1) points to.

    For share >= 0.5 it lies at or above the true percentile, for share < 0.5 at or below. None where the samples are
    too few to say: p90 needs 64, p99 needs 662. Source: the early-stopping estimate of MLPerf's LoadGen.
    """
    upper = share >= 0.5
    left_out = discarded(len(samples), share if upper else 1 - share)
    if left_out is None:
        return None
    ordered = sorted(samples)
    return ordered[-1 - left_out] if upper else ordered[left_out]


def discarded(count: int, share: float, sure: float = _SURE) -> int | None:
    """How many of the `count` largest samples may be left out before the largest left is read off as the percentile.

    t - 1, where t is the largest number with BinomialCDF(t; count, 1 - share) <= 1 - sure; None where no t >= 1 has.
    """
    logs = math.log(share), math.log1p(-share)
    total, most = 0.0, -1
    for over in range(count + 1):
        ways = math.lgamma(count + 1) - math.lgamma(over + 1) - math.lgamma(count - over + 1)
        total += math.exp(ways + over * logs[1] + (count - over) * logs[0])
        if total > 1 - sure:
            break
        most = over
    return most - 1 if most >= 1 else None


def paired_interval(a: Sequence[float], b: Sequence[float], seed: int) -> tuple[float, float, float]:
    """The ratio b / a and its 95 % interval (value, low, high), from samples a[i] and b[i] of the same round i.

    The value is exp(median(log b[i] - log a[i])). What slows a whole round cancels in its pair, so on a machine that
    drifts the interval is far narrower than that of the ratio of the two medians. The bootstrap draws whole stretches
    of n^(1/3) rounds (circular blocks), since neighbouring rounds are alike.
    """
    logs = np.log(np.asarray(b, dtype=np.float64)) - np.log(np.asarray(a, dtype=np.float64))
    low, high = _interval(logs, max(1, round(len(logs) ** (1 / 3))), seed)
    return math.exp(float(np.median(logs))), math.exp(low), math.exp(high)


def interval_over(ratios: Sequence[float], seed: int) -> tuple[float, float, float]:
    """The median of independent ratios (one a process) and its 95 % bootstrap interval: (value, low, high)."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    low, high = _interval(logs, 1, seed)
    return math.exp(float(np.median(logs))), math.exp(low), math.exp(high)


def _interval(values: npt.NDArray[np.float64], block: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the median of `values` (n,), drawn in circular blocks."""
    random = np.random.default_rng(seed)
    count = len(values)
    rows = max(1, _AT_ONCE // count)
    medians = []
    for first in range(0, _RESAMPLES, rows):
        starts = random.integers(0, count, size=(min(rows, _RESAMPLES - first), -(-count // block), 1))
        drawn = (starts + np.arange(block)) % count
        medians.append(np.median(values[drawn.reshape(len(drawn), -1)[:, :count]], axis=1))
    low, high = np.quantile(np.concatenate(medians), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
