"""`branches`: what fusing is worth, by the number of branches and by the runtime (MobileOne-S0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from onefold.report.format import format_significant, join_words
from onefold.report.study_results import Conclusion
from onefold.studies.study import Measured, Point, Row, Study, StudySummary, Target, latency_tables, ratio_figure

if TYPE_CHECKING:
    from torch import nn

FUSED = "fused"
NUM_BRANCHES = (1, 2, 3, 4, 5)


def _build(branches: int) -> nn.Module:
    from dataclasses import replace

    from onefold.models.mobileone import VARIANTS, mobileone

    return mobileone(replace(VARIANTS["s0"], branches=branches), 1000, 3)


def _groups() -> Sequence[Sequence[Point]]:
    fused = Point(name=FUSED, build=partial(_build, 4))
    unfused = [
        Point(name=f"unfused, k = {k}", build=partial(_build, k), is_fused=False, values={"k": k}) for k in NUM_BRANCHES
    ]
    return [[fused, *unfused]]


def _summarize(measured: Measured) -> StudySummary:
    expected = {
        name: row.macs / rows[FUSED].macs
        for rows in list(measured.rows.values())[:1]
        if FUSED in rows
        for name, row in rows.items()
    }
    return StudySummary(
        tables=latency_tables(measured),
        figures=(ratio_figure(measured, "What branches cost that are not fused", expected, "multiply-adds, counted"),),
        conclusions=tuple(
            _conclusion(target, rows) for target, rows in measured.rows.items() if FUSED in rows and len(rows) > 1
        ),
    )


def _conclusion(target: Target, rows: Mapping[str, Row]) -> Conclusion:
    unfused = [row for name, row in rows.items() if name != FUSED]
    counted = [f"k = {row.point.values['k']:g} {format_significant(row.macs / rows[FUSED].macs)}x" for row in unfused]
    times = [f"k = {row.point.values['k']:g} {format_significant(row.ratio.value)}x" for row in unfused]
    decided = [row.bounds[0] > 1 for row in unfused]
    return Conclusion(
        where=str(target),
        paper=f"branches are removed for inference; without it the multiply-adds are {join_words(counted)} (counted)",
        here=f"unfused it takes {join_words(times)} the time",
        verdict="agrees" if all(decided) else "agrees in part" if any(decided) else "not decided",
    )


STUDIES = {
    "branches": Study(
        name="branches",
        question="What is fusing worth, by the number of branches?",
        source="MobileOne (arXiv 2206.04040), section 3",
        groups=_groups,
        summarize=_summarize,
        notes=(
            "The paper has no latencies of unfused networks. Runtimes fold norms by themselves, but no branches.",
            "The network is MobileOne-S0; fused it is the same whatever k was in training.",
        ),
    )
}
