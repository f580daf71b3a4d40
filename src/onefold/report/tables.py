"""The page's tables: training runs, predictions by class, latencies, artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from onefold.accuracy_intervals import drop_interval
from onefold.report.format import (
    format_accuracy,
    format_count,
    format_latency,
    format_percent,
    format_scientific,
    format_significant,
    format_size,
    format_with_interval,
    one_line,
)
from onefold.report.grouping import MeasurementGroup
from onefold.report.load_results import ReportInputs, RunLog
from onefold.report.predictions import Predictions
from onefold.runtimes.artifact import Artifact

_MAX_CONFUSIONS = 10
_MAX_CLASSES = 30
_OF_NETWORK = "network: "
_GATE_TERM = (
    "Accuracy kept: what onefold deploy found; undecided where the photos are too few to tell whether more was lost "
    "than may be."
)


class Column(NamedTuple):
    """A column of a table; numbers are right-aligned."""

    title: str
    is_number: bool = False


class Badge(NamedTuple):
    """A cell that is set off: `style` is good, alarm, code, or empty for a plain badge."""

    text: str
    style: str = ""


class Table(NamedTuple):
    """A table; the first cell of a row is its header."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Badge]]


def run_table(runs: Sequence[RunLog]) -> Table:
    """Return one row a training run."""
    expected = any(run.expected_top1 is not None for run in runs)
    titles = ("epochs", "best top-1", *(["expected"] * expected), "last top-1", "last top-5", "last training loss")
    rows = [
        [
            run.name,
            str(run.num_epochs),
            _best(run),
            *([format_percent(run.expected_top1)] * expected),
            format_percent(run.last("top1")),
            format_percent(run.last("top5")),
            format_significant(run.last("loss")),
            format_significant(run.last("images_per_s")),
        ]
        for run in runs
    ]
    caption = (
        "Training runs. Accuracies are those of the averaged weights (EMA), which are also the ones kept; in brackets "
        "95 % intervals, of runs with predictions."
    )
    return Table(caption, [Column("run"), *(Column(title, True) for title in (*titles, "images/s"))], rows)


def _best(run: RunLog) -> str:
    """Return the best accuracy, with its interval where it is that of the predictions."""
    found = run.predictions
    if run.best is None:
        return "–"
    same = found is not None and abs(found.top1 - run.best[1]) < 0.05
    return (
        format_with_interval(run.best[1], found.num_images)
        if found is not None and same
        else format_percent(run.best[1])
    )


def comparison_table(named: Sequence[tuple[str, Predictions]]) -> Table:
    """Return one row a run, of several with predictions for the same images: the best first, and held against it."""
    ranked = sorted(named, key=lambda each: -each[1].top1)
    first, best = ranked[0]
    right, *others = ({name for name, (a, b) in found.answers.items() if a == b} for _, found in ranked)
    rows = [[first, format_with_interval(best.top1, best.num_images), "–", "–", "–", format_percent(best.ece)]]
    for (run, found), own in zip(ranked[1:], others, strict=True):
        lost, won = len(right - own), len(own - right)
        low, high = drop_interval(lost, won, found.num_images)
        behind = f"{best.top1 - found.top1:.1f} ({low:.1f} to {high:.1f})".replace("-", "\N{MINUS SIGN}")
        top1 = format_with_interval(found.top1, found.num_images)
        rows.append([run, top1, behind, str(won), str(lost), format_percent(found.ece)])
    titles = ("top-1", "points below the first", "right where the first is wrong", "wrong where the first is right")
    return Table(
        f"{format_count(len(named), 'run')} compared on the same {format_count(best.num_images, 'image')}, the best "
        "first, with 95 % intervals. Where the interval of a difference holds zero, it may be chance.",
        [Column("run"), *(Column(title, True) for title in (*titles, "calibration error"))],
        rows,
    )


def confusion_table(found: Predictions) -> Table:
    """Return the most frequent pairs of a class and another that it was predicted as."""
    totals, pairs = found.images_per_class, found.confusions
    shown = f" {_MAX_CONFUSIONS} of {len(pairs)}." if len(pairs) > _MAX_CONFUSIONS else ""
    return Table(
        f"The most frequent confusions.{shown}",
        [Column("class"), Column("predicted as"), Column("images", True), Column("of the class's images", True)],
        [
            [found.name(a), found.name(b), str(count), format_percent(100 * count / totals[a])]
            for a, b, count in pairs[:_MAX_CONFUSIONS]
        ],
    )


def class_table(found: Predictions) -> Table:
    """Return the accuracy of each class, the worst first."""
    totals = found.images_per_class
    rates = sorted((100 * found.pairs.get((index, index), 0) / count, index) for index, count in totals.items())
    shown = f" The worst {_MAX_CLASSES} of {len(rates)} classes." if len(rates) > _MAX_CLASSES else ""
    return Table(
        f"Accuracy of each class, the worst first, with 95 % intervals.{shown}",
        [Column("class"), Column("images", True), Column("accuracy", True)],
        [
            [found.name(index), str(totals[index]), format_with_interval(rate, totals[index])]
            for rate, index in rates[:_MAX_CLASSES]
        ],
    )


def latency_table(groups: Sequence[MeasurementGroup]) -> Table:
    """Return one row a group; columns that none of them has are left out."""
    shown = [
        (column, cell) for column, cell in _LATENCY_COLUMNS if any(cell(group) not in ("", "–") for group in groups)
    ]
    caption = (
        f"Latency of one call on {one_line(groups[0].machine.chip)}, the fastest first. p90 and p99 are upper bounds "
        "with 99 % confidence; a dash means too few samples for one. Spread is the width of the middle 80 % over the "
        "median."
    )
    if any(m.roofline_share is not None for group in groups for m in group.measurements):
        caption += (
            " Of the limit: the least time in which this machine could do the multiply-adds, or read the weights, over "
            "the median, and which of the two binds."
        )
    if any(group.accuracy is not None and group.accuracy.num_images for group in groups):
        caption += " Top-1 is with its 95 % interval."
    if any(group.gate is not None for group in groups):
        caption += f" {_GATE_TERM}"
    rows = [[group.label, *(cell(group) for _, cell in shown)] for group in groups]
    return Table(caption, [Column("network"), *(column for column, _ in shown)], rows)


def _fused_badge(fused: bool | None) -> Badge:
    return (
        Badge("fused: not stated") if fused is None else Badge("fused", "good") if fused else Badge("UNFUSED", "alarm")
    )


def _gate_badge(verdict: str | None) -> str | Badge:
    """Return what the accuracy gate of a deployment found; a dash where there was none."""
    if verdict is None:
        return "–"
    return Badge(
        {"passed": "yes", "failed": "NO"}.get(verdict, verdict), {"passed": "good", "failed": "alarm"}.get(verdict, "")
    )


def _setting(group: MeasurementGroup) -> str:
    shape = group.subject.get("input_shape")
    sizes = "×".join(one_line(length, 12) for length in shape) if isinstance(shape, tuple) else ""
    return ", ".join(part for part in (format_count(group.threads, "thread"), sizes) if part)


def _limit(group: MeasurementGroup) -> str:
    share = group.median_of(lambda m: m.roofline_share)
    side = next((m.bound.limited_by for m in group.measurements if m.bound is not None), None)
    return "–" if share is None or side is None else f"{format_percent(100 * share, 0)} {side}"


def _peak_memory(group: MeasurementGroup) -> str:
    peaks = [m.cold.peak_bytes for m in group.measurements if m.cold is not None and m.cold.peak_bytes is not None]
    return format_size(max(peaks, default=None))


def _cold_start(group: MeasurementGroup) -> str:
    starts = [m.cold.time_to_first_answer_ns for m in group.measurements if m.cold is not None]
    return format_latency(median(starts) if starts else None)


def _first_call(group: MeasurementGroup) -> str:
    """Return the first call of the measuring process, where none was started afresh for it."""
    first = group.measurements[0]
    return "–" if first.cold is not None or not first.warmup_ns else format_latency(float(first.warmup_ns[0]))


def _samples(group: MeasurementGroup) -> str:
    first = group.measurements[0]
    count = sum(len(m.samples_ns) for m in group.measurements)
    calls = f" of {format_significant(first.calls_per_sample)} calls" if first.calls_per_sample > 1 else ""
    runs = f" in {len(group.measurements)} runs" if len(group.measurements) > 1 else ""
    return f"{count}{calls}{runs}"


def _noise(group: MeasurementGroup) -> Badge:
    total = len(group.measurements)
    if not group.num_noisy:
        return Badge("quiet", "good")
    return Badge("noisy" if total == 1 else f"noisy, {group.num_noisy}/{total}", "alarm")


_LATENCY_COLUMNS: tuple[tuple[Column, Callable[[MeasurementGroup], str | Badge]], ...] = (
    (Column("state"), lambda group: _fused_badge(group.fused)),
    (Column("threads, input"), _setting),
    (Column("accuracy kept"), lambda group: _gate_badge(group.gate)),
    (Column("top-1", True), lambda group: format_accuracy(group.top1, group.num_scored)),
    (Column("median", True), lambda group: format_latency(group.median_ns)),
    (Column("p90", True), lambda group: format_latency(group.p90_ns)),
    (Column("p99", True), lambda group: format_latency(group.median_of(lambda m: m.p99_ns))),
    (Column("spread", True), lambda group: format_percent(100 * median(m.spread for m in group.measurements))),
    (Column("of the limit"), _limit),
    (Column("size", True), lambda group: format_size(_num_bytes(group))),
    (Column("peak memory", True), _peak_memory),
    (Column("cold start", True), _cold_start),
    (Column("first call", True), _first_call),
    (Column("samples"), _samples),
    (Column("machine was"), _noise),
)


def _num_bytes(group: MeasurementGroup) -> int | None:
    num_bytes = group.subject.get("num_bytes")
    return num_bytes if type(num_bytes) is int else None


def artifact_table(inputs: ReportInputs) -> Table:
    """Return one row an exported artifact."""
    is_gated = any(inputs.gate_of_artifact(artifact) is not None for artifact in inputs.artifacts)
    columns = [Column("artifact"), Column("state"), *([Column("accuracy kept")] * is_gated), Column("network")]
    columns += [Column("size", True), Column("drift", True), Column("parity", True), Column("top-1", True)]
    columns += [Column("classes", True), Column("license"), Column("SHA-256 of the model")]
    rows: list[list[str | Badge]] = [
        [
            one_line(artifact.folder.name),
            _fused_badge(artifact.fused),
            *([_gate_badge(inputs.gate_of_artifact(artifact))] * is_gated),
            one_line(f"{artifact.model} {artifact.runtime} {artifact.precision}"),
            format_size(artifact.num_bytes),
            format_scientific(artifact.drift),
            _parity(artifact),
            _artifact_top1(inputs, artifact),
            str(artifact.num_classes),
            one_line(artifact.licence or "not stated"),
            Badge(
                next((f.sha256[:12] for name, f in artifact.files.items() if name.startswith("model.")), "–"), "code"
            ),
        ]
        for artifact in inputs.artifacts
    ]
    caption = (
        "Exported artifacts. Each carries a reference input with its logits, and is measured only if it gives them."
    )
    if any(isinstance(cell, str) and cell.startswith(_OF_NETWORK) for row in rows for cell in row):
        caption += " Top-1 of the network: the run's own, where the artifact itself was not evaluated."
    if is_gated:
        caption += f" {_GATE_TERM}"
    return Table(caption, columns, rows)


def _artifact_top1(inputs: ReportInputs, artifact: Artifact) -> str:
    own, network = inputs.accuracy_of_artifact(artifact), inputs.float_predictions(artifact)
    if own is not None or network is None:
        return format_accuracy(own.top1, own.num_images) if own is not None else format_percent(None)
    return f"{_OF_NETWORK}{format_with_interval(network.top1, network.num_images)}"


def _parity(artifact: Artifact) -> str:
    if artifact.parity is None:
        return "not run where it was exported"
    agreement = artifact.parity.top1_agreement
    differs = f", same class in {format_percent(100 * agreement, 0)}" if agreement < 1 else ""
    return f"{format_scientific(artifact.parity.difference)}{differs}"
