"""`pareto`: published accuracy against measured latency and size, of all families here and of timm's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from onefold.report.format import format_significant, join_words
from onefold.report.study_results import Conclusion, FigurePoint, FigureSeries, StudyFigure, StudyTable
from onefold.studies.correlation import network_points
from onefold.studies.published import TABLE_9
from onefold.studies.study import Measured, Point, Row, Study, StudySummary, Target, grouped_by_baseline

_TOP1 = "top-1 %"


def front(points: Iterable[tuple[str, float, float]]) -> list[str]:
    """The names of those (name, cost, accuracy) than which no other is as cheap and more accurate, cheapest first."""
    best, found = float("-inf"), list[str]()
    for name, _, accuracy in sorted(points, key=lambda each: (each[1], -each[2])):
        if accuracy > best:
            best = accuracy
            found.append(name)
    return found


def _groups() -> Sequence[Sequence[Point]]:
    return grouped_by_baseline(network_points())


def _summarize(measured: Measured) -> StudySummary:
    tables, conclusions = list[StudyTable](), list[Conclusion]()
    for target, rows in measured.rows.items():
        known = {name: row for name, row in rows.items() if _TOP1 in row.point.published}
        if known:
            fastest = front((name, row.ratio.value, _top1(row)) for name, row in known.items())
            smallest = front((name, _size(row), _top1(row)) for name, row in known.items())
            tables.append(_table(target, known, fastest, smallest))
            conclusions += _conclusions(target, known, fastest)
    return StudySummary(
        tables=tuple(tables),
        figures=(
            _figure(measured, "Accuracy and latency", "median, ms", lambda row: row.ms),
            _figure(measured, "Accuracy and size", "size of the file, MB", _size),
        ),
        conclusions=tuple(conclusions),
    )


def _top1(row: Row) -> float:
    return row.point.published[_TOP1].value


def _size(row: Row) -> float:
    return float(row.measurement.subject["num_bytes"]) / 1e6


def _table(target: Target, rows: Mapping[str, Row], fastest: Sequence[str], smallest: Sequence[str]) -> StudyTable:
    ordered = sorted(rows.values(), key=lambda row: row.ratio.value)
    lines = [
        (
            row.point.name,
            f"{_top1(row):g}",
            format_significant(row.ms),
            f"{format_significant(row.ratio.value)}",
            format_significant(_size(row)),
            "yes" if row.point.name in fastest else "-",
            "yes" if row.point.name in smallest else "-",
            row.measurement.verdict,
        )
        for row in ordered
    ]
    columns = ("network", _TOP1, "here ms", f"x {ordered[0].baseline}", "size MB", "fastest", "smallest", "machine")
    return StudyTable(caption=str(target), columns=columns, rows=tuple(lines))


def _conclusions(target: Target, rows: Mapping[str, Row], fastest: Sequence[str]) -> list[Conclusion]:
    both = [name for name in rows if name in TABLE_9]
    theirs = front((name, TABLE_9[name].mobile_ms, TABLE_9[name].top1) for name in both)
    if len(both) < 2:
        return []
    ours = front((name, rows[name].ratio.value, TABLE_9[name].top1) for name in both)
    both_fronts = [name for name in theirs if name in ours]
    return [
        Conclusion(
            where=str(target),
            paper=f"of these networks {join_words(theirs)} are on the phone's front (computed from Table 9)",
            here=f"{join_words(ours)} are, {len(both_fronts)} of {len(theirs)}; of all measured {join_words(fastest)}",
            verdict="agrees"
            if theirs == ours
            else "agrees in part"
            if 2 * len(both_fronts) >= len(theirs)
            else "does not agree",
        )
    ]


def _figure(measured: Measured, title: str, x_label: str, x: Callable[[Row], float]) -> StudyFigure:
    series = [
        FigureSeries(
            label=str(target),
            points=tuple(
                FigurePoint(x=x(row), y=_top1(row), label=name)
                for name, row in rows.items()
                if _TOP1 in row.point.published
            ),
        )
        for target, rows in measured.rows.items()
    ]
    return StudyFigure(kind="scatter", title=title, x_label=x_label, y_label="published top-1, %", series=tuple(series))


STUDIES = {
    "pareto": Study(
        name="pareto",
        question="Which networks are the fastest, and the smallest, for their accuracy?",
        source="MobileOne (arXiv 2206.04040), Table 9",
        groups=_groups,
        summarize=_summarize,
        measured_as="correlation",
        notes=(
            "Accuracies are those that the papers state, of other trainings than each other's; none was measured here.",
            "A front is that of medians: neighbours on it may lie within each other's intervals.",
        ),
    )
}
