"""The studies of MobileNetV1 (arXiv 1704.04861): `width-resolution`, Tables 6 and 7 and Figure 4."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from onefold.report.study_results import Conclusion, FigurePoint, FigureSeries, StudyFigure
from onefold.studies.networks import named_point
from onefold.studies.published import TABLES_6_AND_7_TOP1, TF_SLIM_TOP1
from onefold.studies.study import (
    Measured,
    Point,
    Published,
    Row,
    Study,
    StudySummary,
    Target,
    grouped_by_baseline,
    latency_tables,
)

_RESAMPLES = 2000
_FEWEST = 6


def _grid() -> Sequence[Sequence[Point]]:
    points = []
    for (width, size), top1 in TF_SLIM_TOP1.items():
        published = {"top-1 %, TF-slim": Published(top1)}
        if (width, size) in TABLES_6_AND_7_TOP1:
            published = {"top-1 %, paper": Published(TABLES_6_AND_7_TOP1[width, size]), **published}
        points.append(
            named_point(
                f"mobilenetv1_{round(100 * width):03d}",
                size,
                title=f"{width:g} at {size}",
                published=published,
                values={"width": width, "resolution": size},
            )
        )
    return grouped_by_baseline(points)


def exponents(
    rows: Sequence[Row], value: Callable[[Row], float], seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """By which power of the width and of the resolution a value grows: least squares of logarithms over the points.

    Each with its 95 % bootstrap interval over points (value, low, high).
    """
    logs = [[1.0, math.log(row.point.values["width"]), math.log(row.point.values["resolution"])] for row in rows]
    x, y = np.array(logs), np.log([value(row) for row in rows])
    random, fits = np.random.default_rng(seed), list[npt.NDArray[np.float64]]()
    for _ in range(_RESAMPLES):
        drawn = random.integers(0, len(rows), len(rows))
        if np.linalg.matrix_rank(x[drawn]) == x.shape[1]:
            fits.append(_fit(x[drawn], y[drawn]))
    low, high = np.quantile(fits, [0.025, 0.975], axis=0)
    found = _fit(x, y)
    return {
        name: (float(found[place]), float(low[place]), float(high[place]))
        for place, name in ((1, "width"), (2, "resolution"))
    }


def _fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.linalg.lstsq(x, y, rcond=None)[0], dtype=np.float64)


def _summarize_grid(measured: Measured) -> StudySummary:
    conclusions = [
        each
        for target, rows in measured.rows.items()
        if len(rows) >= _FEWEST and len({row.point.values["resolution"] for row in rows.values()}) > 1
        for each in _scaling(target, list(rows.values()))
    ]
    return StudySummary(
        tables=latency_tables(measured),
        figures=(
            _figure(measured, "Accuracy and latency", "median, ms", lambda row: row.ms),
            _figure(measured, "Accuracy and multiply-adds", "MACs, millions", lambda row: row.macs / 1e6),
        ),
        conclusions=tuple(conclusions),
    )


def _scaling(target: Target, rows: Sequence[Row]) -> list[Conclusion]:
    time = exponents(rows, lambda row: row.ratio.value)
    macs: Mapping[str, tuple[float, float, float]] = exponents(rows, lambda row: row.macs)
    found = []
    for name, (value, low, high) in time.items():
        found.append(
            Conclusion(
                where=str(target),
                paper=f"cost falls with about the square of the {name} (multiply-adds by {macs[name][0]:.2f}, counted)",
                here=f"time falls with its power {value:.2f} (95 % CI {low:.2f} to {high:.2f})",
                verdict="agrees" if low <= 2 <= high else "does not agree",
            )
        )
    return found


def _figure(measured: Measured, title: str, x_label: str, x: Callable[[Row], float]) -> StudyFigure:
    series = [
        FigureSeries(
            label=f"{target}",
            points=tuple(
                FigurePoint(x=x(row), y=row.point.published["top-1 %, TF-slim"].value, label=name)
                for name, row in rows.items()
            ),
        )
        for target, rows in measured.rows.items()
    ]
    return StudyFigure(
        kind="scatter", title=title, x_label=x_label, y_label="top-1 of TF-slim's weights, %", series=tuple(series)
    )


STUDIES = {
    "width-resolution": Study(
        name="width-resolution",
        question="What do MobileNetV1's width and resolution save in time?",
        source="MobileNetV1 (arXiv 1704.04861), Tables 6 and 7, Figure 4",
        groups=_grid,
        summarize=_summarize_grid,
        notes=("Accuracies are published: the paper's Tables 6 and 7, and TF-slim's checkpoints, which have all 16.",),
    )
}
