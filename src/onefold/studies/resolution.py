"""`resolution`: Mobile-Former against MobileNetV3-L and MobileOne by image size, and where the lines cross."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onefold.report.format import format_significant
from onefold.report.study_results import Conclusion, FigurePoint, FigureSeries, StudyFigure
from onefold.studies.networks import named_point
from onefold.studies.study import Measured, Point, Row, Study, StudySummary, Target, latency_tables

SIZES = (128, 192, 256, 384, 512, 640, 768, 896, 1024)
NETWORKS = {
    "MobileNetV3-L": "timm:mobilenetv3_large_100",
    "Mobile-Former-294M": "mobileformer_294m",
    "MobileOne-S2": "mobileone_s2",
}
_BASELINE, _SUBJECT = "MobileNetV3-L", "Mobile-Former-294M"
_RESAMPLES = 2000
_DEVIATIONS = 2 * 1.959964  # in a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """The size at which a ratio falls to 1, with its 95 % interval; `share` of the resamples crossed at all."""

    size: float
    low: float
    high: float
    share: float

    def __str__(self) -> str:
        """The size with its interval as text."""
        often = "" if self.share > 0.975 else f", and in {100 * (1 - self.share):.0f} % of resamples nowhere"
        return f"at {self.size:.0f} px (95 % CI {self.low:.0f} to {self.high:.0f}{often})"


def find_crossing(
    sizes: Sequence[float], ratios: Sequence[tuple[float, float, float]], seed: int = 0
) -> Crossing | None:
    """Find where ratios (value, low, high) at increasing sizes fall from above 1 to 1; None where they do not.

    Between two sizes the logarithm of the ratio is taken as linear in that of the size. The interval is of resamples
    that draw each ratio from the normal distribution, of logarithms, that its interval is of.
    """
    logs = np.log(np.array(ratios))
    size = _first_fall(np.log(sizes), logs[:, 0])
    if size is None:
        return None
    random = np.random.default_rng(seed)
    spread = (logs[:, 2] - logs[:, 1]) / _DEVIATIONS
    drawn = (_first_fall(np.log(sizes), random.normal(logs[:, 0], spread)) for _ in range(_RESAMPLES))
    found = [each for each in drawn if each is not None]
    low, high = np.quantile(found, [0.025, 0.975])
    return Crossing(size=size, low=float(low), high=float(high), share=len(found) / _RESAMPLES)


def _first_fall(sizes: npt.NDArray[np.float64], ratios: npt.NDArray[np.float64]) -> float | None:
    for place in range(len(sizes) - 1):
        first, second = ratios[place], ratios[place + 1]
        if first > 0 >= second:
            share = first / (first - second)
            return math.exp(sizes[place] + share * (sizes[place + 1] - sizes[place]))
    return None


def _groups() -> Sequence[Sequence[Point]]:
    return [
        [named_point(name, size, title=f"{title} at {size}", values={"size": size}) for title, name in NETWORKS.items()]
        for size in SIZES
    ]


def _summarize(measured: Measured) -> StudySummary:
    return StudySummary(
        tables=latency_tables(measured),
        figures=(_figure(measured),),
        conclusions=tuple(
            each
            for target, rows in measured.rows.items()
            if (each := _conclusion(target, _of(rows, _SUBJECT))) is not None
        ),
    )


def _of(rows: Mapping[str, Row], title: str) -> list[Row]:
    """The rows of one network, by size."""
    found = [row for name, row in rows.items() if name.startswith(f"{title} at ")]
    return sorted(found, key=lambda row: row.point.values["size"])


def _conclusion(target: Target, rows: Sequence[Row]) -> Conclusion | None:
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    crossing = find_crossing(
        [row.point.values["size"] for row in rows],
        [(row.ratio.value, row.ratio.low, row.ratio.high) for row in rows],
    )
    ends = " and ".join(
        f"{format_significant(row.ratio.value)}x at {row.point.values['size']:g} px" for row in (first, last)
    )
    where = f"the lines cross {crossing}" if crossing is not None else "the lines do not cross"
    is_slower, is_faster = first.bounds[0] > 1, last.bounds[1] < 1
    against = first.bounds[1] < 1 or last.bounds[0] > 1
    return Conclusion(
        where=str(target),
        paper=f"slower than {_BASELINE} for small images, faster for large ones, from about 750 px (not confirmed) on",
        here=f"it takes {ends} of the time of {_BASELINE}; {where}",
        verdict="agrees" if is_slower and is_faster else "does not agree" if against else "not decided",
    )


def _figure(measured: Measured) -> StudyFigure:
    series = [
        FigureSeries(
            label=f"{title}, {target}",
            points=tuple(FigurePoint(x=row.point.values["size"], y=row.ms) for row in _of(rows, title)),
        )
        for target, rows in measured.rows.items()
        for title in NETWORKS
    ]
    return StudyFigure(
        kind="lines", title="Latency by image size", x_label="side, px", y_label="median, ms", series=tuple(series)
    )


STUDIES = {
    "resolution": Study(
        name="resolution",
        question="From which image size on is Mobile-Former faster than MobileNetV3-L?",
        source="Mobile-Former (arXiv 2108.05895), the figure of latency by image size",
        groups=_groups,
        summarize=_summarize,
        notes=(
            "That it is slower for small images and faster for large ones is confirmed; where the lines cross is not.",
            "It needs timm, which has MobileNetV3-L.",
        ),
    )
}
