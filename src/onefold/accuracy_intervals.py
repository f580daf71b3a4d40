"""Confidence intervals of accuracies, which are measured on samples: of one share, and of the difference of two."""

from __future__ import annotations

import math

_MOST_IMAGES = 1_000_000
_Z = 1.96  # quantile of the normal distribution: 95 % lie within so many standard deviations


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Give the 95 % interval, in percent, of a share of which `right` of `count` images are a sample (Wilson, 1927).

    Without an image everything is possible: 0 to 100.
    """
    if not count:
        return 0.0, 100.0
    share, z2 = right / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def drop_interval(lost: float, won: float, count: int) -> tuple[float, float]:
    """Give the 95 % interval, in percent, of the difference of two accuracies on the same `count` images.

    Wald's with half an image added to each of the four kinds of pairs, which keeps its level with few images, and with
    none that differ (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    total = count + 2
    middle = (lost - won) / total
    half = _Z * math.sqrt((lost + won + 1) / total - middle**2) / math.sqrt(total)
    return 100 * max(-1.0, middle - half), 100 * min(1.0, middle + half)


def photos_to_decide(lost: int, won: int, count: int, bound: float) -> int | None:
    """Give how many images tell whether more than `bound` percent are lost, if they go on as `count` of them began.

    Their interval then lies on one side of the bound. Without a loss or gain so far 0 is what goes on; None where it
    takes more than a million.
    """

    def decides(number: int) -> bool:
        low, high = drop_interval(lost * number / count, won * number / count, number)
        return high <= bound or low > bound

    most = 1
    while not decides(most):
        most *= 2
        if most > 2_000_000:
            return None
    least = most // 2  # does not decide, or is 0
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if decides(middle) else (middle, most)
    return most if most <= _MOST_IMAGES else None
