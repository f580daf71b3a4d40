"""`tokens`: Mobile-Former-294M by the number and the width of its tokens, and without parts of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from onefold.report.format import format_significant
from onefold.report.study_results import Conclusion, FigurePoint, FigureSeries, StudyFigure
from onefold.studies.study import (
    Measured,
    Point,
    Published,
    Row,
    Study,
    StudySummary,
    Target,
    latency_tables,
    ratio_figure,
)

if TYPE_CHECKING:
    from torch import nn

_NETWORK = "294m"
_WHOLE = "6 tokens of 192"
NUMBERS, WIDTHS = (1, 3, 9, 12), (64, 128, 256, 320)  # beside 6 of 192
# Top-1 in percent after 300 epochs: by the number of tokens, confirmed; by their width, and of the parts, not.
_NUMBER_TOP1 = {1: 77.1, 3: 77.6, 6: 77.8}
_WIDTH_TOP1 = {64: 76.8, 128: 77.3, 192: 77.8, 256: 77.8}
_PARTS = {
    "without Former": ("former",),
    "without bridges": ("to_former", "to_mobile"),
    "without DY-ReLU": ("act",),
    "without Former and bridges": ("former", "to_former", "to_mobile"),
    "Mobile alone": ("former", "to_former", "to_mobile", "act"),
}
_PARTS_TOP1 = {"Mobile alone": 74.2, "without DY-ReLU": 76.8}
_ADDED_SHARE = 1.12  # of FLOPs, by the Former and the bridges


def _build(number: int, width: int, without: tuple[str, ...]) -> nn.Module:
    from onefold.models.mobileformer import VARIANTS, mobileformer
    from onefold.studies.mobileformer_parts import remove_parts_

    net = mobileformer(replace(VARIANTS[_NETWORK], tokens=(number, width)), 1000, 3)
    remove_parts_(net, without)
    return net


def _point(number: int, width: int) -> Point:
    name, published = f"{number} token{'s' if number > 1 else ''} of {width}", {}
    if width == 192 and number in _NUMBER_TOP1:
        published = {"top-1 %": Published(_NUMBER_TOP1[number])}
    elif number == 6 and width in _WIDTH_TOP1:
        published = {"top-1 %": Published(_WIDTH_TOP1[width], confirmed=False)}
    values = {"number": number, "width": width}
    return Point(name=name, build=partial(_build, number, width, ()), published=published, values=values)


def _groups() -> Sequence[Sequence[Point]]:
    whole = _point(6, 192)
    parts = [
        Point(
            name=name,
            build=partial(_build, 6, 192, removed),
            published={"top-1 %": Published(_PARTS_TOP1[name], confirmed=False)} if name in _PARTS_TOP1 else {},
        )
        for name, removed in _PARTS.items()
    ]
    return [
        [whole, *(_point(number, 192) for number in NUMBERS)],
        [whole, *(_point(6, width) for width in WIDTHS)],
        [whole, *parts],
    ]


def _summarize(measured: Measured) -> StudySummary:
    parts = {
        target: {name: row for name, row in rows.items() if name in (_WHOLE, *_PARTS)}
        for target, rows in measured.rows.items()
    }
    return StudySummary(
        tables=latency_tables(measured),
        figures=(
            _figure(measured, "number", "number of tokens, of width 192", lambda values: values.get("width") == 192),
            _figure(measured, "width", "width of 6 tokens", lambda values: values.get("number") == 6),
            ratio_figure(replace(measured, rows=parts), "Without parts of the blocks", {}, "the paper"),
        ),
        conclusions=tuple(each for target, rows in measured.rows.items() for each in _conclusions(target, rows)),
    )


def _conclusions(target: Target, rows: Mapping[str, Row]) -> list[Conclusion]:
    found = []
    if {"Mobile alone", "without DY-ReLU"} <= rows.keys():
        alone, both = rows["Mobile alone"], rows["without DY-ReLU"]
        value, low, high = (
            both.ratio.value / alone.ratio.value,
            both.bounds[0] / alone.bounds[1],
            both.bounds[1] / alone.bounds[0],
        )
        found.append(
            Conclusion(
                where=str(target),
                paper="the Former and the bridges add 12 % of FLOPs and 2.6 points of top-1",
                here=f"they add {100 * (value - 1):.0f} % of time ({100 * (low - 1):.0f} to {100 * (high - 1):.0f} %)",
                verdict="does not agree" if not low <= _ADDED_SHARE <= high else "agrees" if low > 1 else "not decided",
            )
        )
    if "without DY-ReLU" in rows:
        row = rows["without DY-ReLU"]
        found.append(
            Conclusion(
                where=str(target),
                paper="DY-ReLU adds 1.0 point of top-1; its time is not told",
                here=f"without it the network takes {format_significant(row.ratio.value)}x the time",
                verdict="nothing to compare with",
            )
        )
    if "1 token of 192" in rows:
        row = rows["1 token of 192"]
        found.append(
            Conclusion(
                where=str(target),
                paper="six tokens in place of one add 0.7 points of top-1, more add nothing; their time is not told",
                here=f"one takes {format_significant(row.ratio.value)}x the time of six",
                verdict="nothing to compare with",
            )
        )
    return found


def _figure(measured: Measured, key: str, label: str, is_drawn: Callable[[Mapping[str, float]], bool]) -> StudyFigure:
    series = [
        FigureSeries(
            label=str(target),
            points=tuple(
                FigurePoint(
                    x=row.point.values[key],
                    y=row.ratio.value,
                    low=row.ratio.low if row.point.name != _WHOLE else None,
                    high=row.ratio.high if row.point.name != _WHOLE else None,
                )
                for row in rows.values()
                if is_drawn(row.point.values)
            ),
        )
        for target, rows in measured.rows.items()
    ]
    return StudyFigure(
        kind="lines",
        title=f"Time by the {key} of tokens",
        x_label=label,
        y_label=f"time over that of {_WHOLE}",
        series=tuple(series),
    )


STUDIES = {
    "tokens": Study(
        name="tokens",
        question="What do Mobile-Former's tokens and the parts of its blocks cost?",
        source="Mobile-Former (arXiv 2108.05895), the ablations",
        groups=_groups,
        summarize=_summarize,
        notes=(
            "Of the ablations only differences are confirmed: +2.6 points for Former and bridges, +1.0 for DY-ReLU, "
            "and +0.5 and +0.7 for three and six tokens in place of one.",
            "Without its to-Former bridges the tokens are the same for every image; the head keeps its own.",
        ),
    )
}
