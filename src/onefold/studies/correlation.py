"""`correlation`: whether multiply-adds or parameters tell a latency (MobileOne, Table 1 and Figures 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onefold.errors import BadData
from onefold.models.catalogue import CATALOGUE
from onefold.report.format import format_significant
from onefold.report.study_results import Conclusion, FigurePoint, FigureSeries, StudyFigure
from onefold.studies.networks import TIMM, named_point
from onefold.studies.published import TABLE_1_CPU, TABLE_1_MOBILE, TABLE_9, Table9Row
from onefold.studies.rank_correlation import RankCorrelation, rank_correlation
from onefold.studies.study import (
    Measured,
    Point,
    Published,
    Row,
    Study,
    StudySummary,
    Target,
    grouped_by_baseline,
    interval_verdict,
    latency_tables,
)

# The networks by the names of Table 9; those that it has and neither we nor timm have are left out.
NETWORKS = {
    "MobileNetV1": "mobilenetv1_100",
    "MobileOne-S0": "mobileone_s0",
    "MobileOne-S1": "mobileone_s1",
    "MobileOne-S2": "mobileone_s2",
    "MobileOne-S3": "mobileone_s3",
    "MobileOne-S4": "mobileone_s4",
    "MobileNetV1-x0.75": "mobilenetv1_075",
    "MobileNetV1-x0.5": "mobilenetv1_050",
    "MobileNetV1-x0.25": "mobilenetv1_025",
    "Mobile-Former-26M": "mobileformer_26m",
    "Mobile-Former-52M": "mobileformer_52m",
    "Mobile-Former-96M": "mobileformer_96m",
    "Mobile-Former-151M": "mobileformer_151m",
    "Mobile-Former-214M": "mobileformer_214m",
    "Mobile-Former-294M": "mobileformer_294m",
    "Mobile-Former-508M": "mobileformer_508m",
    "MobileNetV2-x1.0": "timm:mobilenetv2_100",
    "MobileNetV2-x1.4": "timm:mobilenetv2_140",
    "MobileNetV3-S": "timm:mobilenetv3_small_100",
    "MobileNetV3-L": "timm:mobilenetv3_large_100",
    "EfficientNet-B0": "timm:efficientnet_b0",
    "MNASNet-A1": "timm:semnasnet_100",
    "MixNet-S": "timm:mixnet_s",
    "RepVGG-A0": "timm:repvgg_a0",
    "RepVGG-A1": "timm:repvgg_a1",
    "RepVGG-A2": "timm:repvgg_a2",
    "RepVGG-B0": "timm:repvgg_b0",
    "RepVGG-B1": "timm:repvgg_b1",
    "MobileViT-XXS": "timm:mobilevit_xxs",
    "MobileViT-XS": "timm:mobilevit_xs",
    "MobileViT-S": "timm:mobilevit_s",
    "DeiT-tiny": "timm:deit_tiny_patch16_224",
    "ConViT-tiny": "timm:convit_tiny",
    "PiT-ti": "timm:pit_ti_224",
}
COSTS: Mapping[str, Callable[[Row], float]] = {"MACs": lambda row: row.macs, "parameters": lambda row: row.params}
_OF_TABLE_9: Mapping[str, Callable[[Table9Row], float]] = {
    "MACs": lambda row: row.mflops,
    "parameters": lambda row: row.mparams,
}


def network_points() -> list[Point]:
    """The networks with the paper's numbers, MobileNetV1 first."""
    return [named_point(name, title=title, published=_published(title, name)) for title, name in NETWORKS.items()]


def _published(title: str, name: str) -> dict[str, Published]:
    row = TABLE_9.get(title)
    top1 = row.top1 if row is not None else None if name.startswith(TIMM) else CATALOGUE[name].top1
    found = {} if top1 is None else {"top-1 %": Published(top1)}
    if row is not None:
        found |= {"paper, CPU ms": Published(row.cpu_ms), "paper, iPhone ms": Published(row.mobile_ms)}
    return found


def correlations(rows: Mapping[str, Row]) -> dict[str, RankCorrelation]:
    """Spearman's correlation of the time, over that of the baseline beside it, with each cost. Raises BadData."""
    times = [row.ratio.value for row in rows.values()]
    return {cost: rank_correlation([of(row) for row in rows.values()], times) for cost, of in COSTS.items()}


def table_9_correlations() -> dict[str, dict[str, RankCorrelation]]:
    """What Table 9 itself gives, by its two columns of latencies and by cost: not what Table 1 states."""
    columns = {
        "CPU": [row.cpu_ms for row in TABLE_9.values()],
        "iPhone": [row.mobile_ms for row in TABLE_9.values()],
    }
    return {
        column: {cost: rank_correlation([of(row) for row in TABLE_9.values()], ms) for cost, of in _OF_TABLE_9.items()}
        for column, ms in columns.items()
    }


def _summarize(measured: Measured) -> StudySummary:
    conclusions, notes = list[Conclusion](), list[str]()
    for target, rows in measured.rows.items():
        try:
            conclusions += _conclusions(target, correlations(rows))
        except BadData as error:
            notes.append(f"{target}: {error}")
        notes += _of_same_networks(target, rows)
    for column, found in table_9_correlations().items():
        said = "; ".join(f"{cost} {each}" for cost, each in found.items())
        notes.append(
            f"Computed from the paper's own Table 9, {column}: {said}. Table 1 states less of the CPU; it does not say "
            "of which networks."
        )
    return StudySummary(
        tables=latency_tables(measured),
        figures=(_figure(measured, "MACs", 1e6), _figure(measured, "parameters", 1e6)),
        conclusions=tuple(conclusions),
        notes=tuple(notes),
    )


def _conclusions(target: Target, found: Mapping[str, RankCorrelation]) -> list[Conclusion]:
    return [
        Conclusion(
            where=str(target),
            paper=f"latency ranks with {cost} by {TABLE_1_CPU[cost]:g} on a CPU, {TABLE_1_MOBILE[cost]:g} on a phone",
            here=str(each),
            verdict=f"{interval_verdict(TABLE_1_CPU[cost], each.low, each.high)} with the CPU's",
        )
        for cost, each in found.items()
    ]


def _of_same_networks(target: Target, rows: Mapping[str, Row]) -> list[str]:
    """How the times here rank with the paper's, of the networks that both have."""
    both = {name: row for name, row in rows.items() if name in TABLE_9}
    try:
        times = [row.ratio.value for row in both.values()]
        cpu = rank_correlation([TABLE_9[name].cpu_ms for name in both], times)
        phone = rank_correlation([TABLE_9[name].mobile_ms for name in both], times)
    except BadData:
        return []
    return [f"{target}: times here rank with the paper's CPU by {cpu}, with its iPhone by {phone}."]


def _figure(measured: Measured, cost: str, unit: float) -> StudyFigure:
    series = [
        FigureSeries(
            label=str(target),
            points=tuple(
                FigurePoint(x=COSTS[cost](row) / unit, y=float(format_significant(row.ms, 4)), label=name)
                for name, row in rows.items()
            ),
        )
        for target, rows in measured.rows.items()
    ]
    return StudyFigure(
        kind="scatter",
        title=f"Latency and {cost}",
        x_label=f"{cost}, millions",
        y_label="median, ms",
        series=tuple(series),
    )


def _groups() -> Sequence[Sequence[Point]]:
    return grouped_by_baseline(network_points())


STUDIES = {
    "correlation": Study(
        name="correlation",
        question="Do multiply-adds or parameters tell how long a network takes?",
        source="MobileOne (arXiv 2206.04040), Table 1",
        groups=_groups,
        summarize=_summarize,
        notes=("Intervals are of a bootstrap over networks; these are no random sample of all networks.",),
    )
}
