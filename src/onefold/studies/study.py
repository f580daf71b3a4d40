"""What a study is: groups of networks to be timed together, the paper's numbers, and what is concluded from the times.

A group is timed interleaved, and each of its networks against its first one, the baseline. Nothing here imports torch:
a network is built when it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from onefold.bench import LatencyBound, Measurement, Ratio
from onefold.report.format import format_significant, join_words
from onefold.report.study_results import Conclusion, FigurePoint, FigureSeries, StudyFigure, StudyTable

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Published:
    """A number of a paper; one that no source here confirms says so wherever it is printed."""

    value: float
    confirmed: bool = True

    def __str__(self) -> str:
        """The number, and whether it is not confirmed."""
        return f"{self.value:g}" if self.confirmed else f"{self.value:g} (not confirmed)"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One network of a study.

    `build` gives the training network; it is measured fused, unless `is_fused` is False. `shape` is that of one input
    (C, H, W). `published` holds the paper's numbers under the titles of their columns, `values` what the study computes
    with, such as a width.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int] = (3, 224, 224)
    is_fused: bool = True
    published: Mapping[str, Published] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What networks are measured in: a runtime and a precision."""

    runtime: str
    precision: str

    def __str__(self) -> str:
        """Both as one word each."""
        return f"{self.runtime} {self.precision}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network measured in one target: `ratio` is its time over that of its group's baseline, of the same rounds."""

    point: Point
    baseline: str
    measurement: Measurement
    ratio: Ratio

    @property
    def ms(self) -> float:
        """The median of one call in milliseconds."""
        return self.measurement.median_ns / 1e6

    @property
    def macs(self) -> float:
        """Multiply-adds of one image."""
        return float(self.measurement.subject["macs"])

    @property
    def params(self) -> float:
        """Parameters of the network that was measured."""
        return float(self.measurement.subject["params"])

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval of the ratio, as wide as the machine's noise may have made it wrong."""
        return self.ratio.low / self.ratio.noise, self.ratio.high * self.ratio.noise


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a study: rows by target and name of the network, in the study's order.

    `unavailable` has a sentence for each network that could not be measured.
    """

    rows: Mapping[Target, Mapping[str, Row]]
    unavailable: tuple[str, ...] = ()

    def with_bounds(self, bound: Callable[[Mapping[str, Any]], LatencyBound | None]) -> Measured:
        """The same with the least time of each row on its machine, as `bound` gives it for a subject."""

        def bounded(row: Row) -> Row:
            return replace(row, measurement=replace(row.measurement, bound=bound(row.measurement.subject)))

        rows = {target: {name: bounded(row) for name, row in found.items()} for target, found in self.rows.items()}
        return replace(self, rows=rows)

    @property
    def beaten_bounds(self) -> list[LatencyBound]:
        """The bounds that a call was quicker than: of limits that were measured on a busier machine."""
        measured = [row.measurement for rows in self.rows.values() for row in rows.values()]
        return [each.bound for each in measured if each.beats_roofline and each.bound is not None]


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """What a study concludes: tables, figures, one conclusion a claim and target, and notes."""

    tables: tuple[StudyTable, ...]
    figures: tuple[StudyFigure, ...]
    conclusions: tuple[Conclusion, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment of a paper. `notes` say what differs from the paper's own, and what of it is not confirmed.

    Where `measured_as` names another study, the rows are that one's too: what it has measured is not measured again.
    """

    name: str
    question: str
    source: str
    groups: Callable[[], Sequence[Sequence[Point]]]
    summarize: Callable[[Measured], StudySummary]
    precisions: tuple[str, ...] = ("fp32",)
    notes: tuple[str, ...] = ()
    measured_as: str = ""

    @property
    def file_name(self) -> str:
        """The study under whose name its rows are kept."""
        return self.measured_as or self.name


def grouped_by_baseline(points: Sequence[Point], size: int = 8) -> list[list[Point]]:
    """Divide points into groups of at most `size` and the first point, which is the baseline of each."""
    baseline, rest = points[0], points[1:]
    return [[baseline, *rest[first : first + size]] for first in range(0, len(rest), size)]


# ------------------------------------------------------------------------------------------------ tables


def latency_tables(measured: Measured) -> tuple[StudyTable, ...]:
    """One table a target: each network's cost, the paper's numbers, and beside them what was measured here."""
    return tuple(_latency_table(target, list(rows.values())) for target, rows in measured.rows.items() if rows)


def _latency_table(target: Target, rows: Sequence[Row]) -> StudyTable:
    titles = list(dict.fromkeys(title for row in rows for title in row.point.published))
    baselines = {row.baseline for row in rows}
    against = f"x {baselines.pop()}" if len(baselines) == 1 else "x its baseline"
    lines = [
        (
            row.point.name,
            format_significant(row.macs / 1e6, 4),
            format_significant(row.params / 1e6),
            *(str(row.point.published.get(title, "-")) for title in titles),
            format_significant(row.ms),
            _ratio_text(row),
            _limit_text(row.measurement),
            row.measurement.verdict,
        )
        for row in rows
    ]
    columns = ("network", "MACs M", "params M", *titles, "here ms", f"{against} (95 % CI)", "of the limit", "machine")
    return StudyTable(caption=str(target), columns=columns, rows=tuple(lines))


def _ratio_text(row: Row) -> str:
    if row.point.name == row.baseline:
        return "1"
    return " ".join((format_significant(row.ratio.value), f"({ratio_interval(row.ratio)})"))


def ratio_interval(ratio: Ratio) -> str:
    """The interval of a ratio as text."""
    return f"{format_significant(ratio.low)}-{format_significant(ratio.high)}"


def _limit_text(measurement: Measurement) -> str:
    share = measurement.roofline_share
    return "-" if share is None else f"{100 * share:.0f} %"


# ----------------------------------------------------------------------------------------------- figures


def ratio_figure(measured: Measured, title: str, paper: Mapping[str, float], paper_label: str) -> StudyFigure:
    """A dot plot of each network's time over the baseline's, in each target, and the paper's where it has them."""
    series = [
        FigureSeries(label=str(target), points=tuple(ratio_point(row) for row in rows.values()))
        for target, rows in measured.rows.items()
    ]
    names = {name for rows in measured.rows.values() for name in rows}
    known = tuple(FigurePoint(y=value, label=name) for name, value in paper.items() if name in names)
    series += [FigureSeries(label=paper_label, points=known)] if known else []
    baselines = {row.baseline for rows in measured.rows.values() for row in rows.values()}
    over = f"{baselines.pop()}'s" if len(baselines) == 1 else "the baseline's of each group"
    return StudyFigure(kind="dots", title=title, x_label="", y_label=f"time over {over}", series=tuple(series))


def ratio_point(row: Row) -> FigurePoint:
    """A network's ratio as a point of a dot plot."""
    low, high = (row.ratio.low, row.ratio.high) if row.point.name != row.baseline else (None, None)
    return FigurePoint(y=row.ratio.value, low=low, high=high, label=row.point.name)


# -------------------------------------------------------------------------------------------- conclusions


def order_conclusion(
    target: Target, rows: Mapping[str, Row], paper: Mapping[str, float], *, is_confirmed: bool = True
) -> Conclusion:
    """Whether the networks stand in the paper's order: of each pair, whether the intervals of the two decide it."""
    names = [name for name in paper if name in rows]
    base = paper[next(iter(paper))] if paper else 1.0
    same, contrary = 0, 0
    for first, second in _pairs(names):
        low, high = sorted((first, second), key=lambda name: paper[name])
        same += rows[low].bounds[1] < rows[high].bounds[0]
        contrary += rows[high].bounds[1] < rows[low].bounds[0]
    total = len(names) * (len(names) - 1) // 2
    said = join_words([f"{name} {format_significant(paper[name] / base)}x" for name in names])
    here = join_words([f"{name} {format_significant(rows[name].ratio.value)}x" for name in names])
    counts = (
        f"{same} of {total} pairs in the paper's order, {contrary} in the other, {total - same - contrary} not decided"
    )
    said += "" if is_confirmed else " (not confirmed)"
    return Conclusion(where=str(target), paper=said, here=f"{here}: {counts}", verdict=order_verdict(same, contrary))


def cost_conclusion(target: Target, row: Row, said: str, expected: float) -> Conclusion:
    """Whether a time over the baseline's is what the multiply-adds alone would make it: `expected` times."""
    value = format_significant(row.ratio.value)
    return Conclusion(
        where=str(target),
        paper=f"{said}: {format_significant(expected)}x the multiply-adds of {row.baseline}",
        here=f"{row.point.name} takes {value}x its time (95 % CI {ratio_interval(row.ratio)})",
        verdict=ratio_verdict(row, expected),
    )


def ratio_verdict(row: Row, expected: float) -> str:
    """Whether the expected ratio lies in the interval; on a noisy machine that decides nothing."""
    if not row.bounds[0] <= expected <= row.bounds[1]:
        return "does not agree"
    return "agrees" if row.ratio.noise <= 1 else "not decided"


def order_verdict(same: int, contrary: int) -> str:
    """The verdict on pairs that stand in the paper's order, and in the other."""
    if same + contrary == 0:
        return "not decided"
    return "agrees" if not contrary else "does not agree" if contrary >= same else "agrees in part"


def interval_verdict(value: float, low: float, high: float) -> str:
    """Whether the paper's value lies within the interval that was measured here."""
    return "agrees" if low <= value <= high else "does not agree"


def _pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            yield first, second
