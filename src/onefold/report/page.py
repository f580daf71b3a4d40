"""write_report: one HTML file with text, tables, figures and style, which loads nothing from elsewhere.

This file decides what the page says; `templates/page.html.j2` is its markup, `templates/style.css` its style. Names in
the inputs can hold anything - tags, line ends, bytes that are no UTF-8: the template escapes every string that is not
Markup, after replacing what cannot be shown, and only the SVG of `figures` is Markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from onefold.accuracy_intervals import wilson_interval
from onefold.bench import Machine
from onefold.errors import BadArgument, BadData
from onefold.file_io import write_text
from onefold.report import format as formats
from onefold.report.figures import (
    NUM_COLOURS,
    Curve,
    LatencyRow,
    RatioRow,
    ReportFigure,
    draw_confusion_matrix,
    draw_curves,
    draw_latency_histograms,
    draw_ratios,
    draw_reliability_diagram,
    legend_entry,
    require_matplotlib,
)
from onefold.report.format import (
    format_count,
    format_latency,
    format_percent,
    format_scientific,
    format_significant,
    join_words,
    one_line,
    printable,
)
from onefold.report.grouping import ComparedPair, MeasurementGroup, ReportData, group_inputs, subject_label
from onefold.report.load_results import GateResult, RunLog, load_report_inputs
from onefold.report.pareto_figure import pareto_figures
from onefold.report.predictions import Predictions
from onefold.report.study_figures import study_section
from onefold.report.tables import (
    Table,
    artifact_table,
    class_table,
    comparison_table,
    confusion_table,
    latency_table,
    run_table,
)

_FILTERS = ("format_count", "format_latency", "format_percent", "format_with_interval", "one_line")
_MAX_ROWS = 12  # of a figure
_MAX_PREDICTIONS = 4  # runs whose predictions are shown
_MAX_MATRIX_CLASSES = 20  # classes up to which the confusion matrix is drawn


def write_report(
    path: Path,
    *,
    runs: Sequence[Path] = (),
    results: Sequence[Path] = (),
    artifacts: Sequence[Path] = (),
    gates: Sequence[Path] = (),
    accuracies: Sequence[Path] = (),
    studies: Sequence[Path] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the page about runs, result files (JSON lines), artifact folders, gates, accuracies and studies.

    The same inputs give the same bytes. What is missing or damaged is said on the page, after `notes`. Raises BadData
    where nothing at all is given, BadArgument where `path` is a folder, MissingExtra without matplotlib, NotWritable.
    """
    if not (runs or results or artifacts or gates or studies or accuracies):
        raise BadData("a report needs something to report: give a run folder, a results file or an artifact folder")
    if Path(path).is_dir():
        raise BadArgument(f"{path} is a folder: give the name of the page to write, as in {Path(path) / 'report.html'}")
    require_matplotlib()
    write_text(
        Path(path),
        render_page(group_inputs(load_report_inputs(runs, results, artifacts, gates, accuracies, studies)), notes),
    )


def render_page(data: ReportData, notes: Sequence[str] = ()) -> str:
    """Return the page's HTML."""
    inputs, measurements = data.inputs, data.inputs.all_measurements
    undecided = [_undecided(gate) for gate in inputs.gates if gate.verdict == "undecided" and gate.within_bound]
    packages = {name: version for artifact in inputs.artifacts for name, version in artifact.made_with.items()}
    page = _template().render(
        title=_title(data),
        lead=_lead(data),
        tiles=_tiles(data),
        warnings=_warnings(data),
        notes=[*notes, *undecided, *inputs.notes],
        inputs=inputs,
        training=_training(inputs.runs) if inputs.runs else None,
        latency=[_latency(data, machine, index) for index, machine in enumerate(data.machines)],
        studies=[study_section(study, index) for index, study in enumerate(inputs.studies)],
        artifacts=artifact_table(inputs) if inputs.artifacts else None,
        procedures=list(dict.fromkeys(m.procedure for m in measurements)),
        clocks=sorted({(m.resolution_ns, m.overhead_ns) for m in measurements}),
        machines=data.machines,
        packages=sorted(packages.items()),
        max_rows=_MAX_ROWS,
    )
    return f"{page.strip()}\n"


def _with_unit(text: str) -> str:
    """Keep a number and its per cent sign in one line, in sentences that are written for a terminal too."""
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)


@cache
def _template() -> Template:
    # StrictUndefined: a misspelt name is an error here, and not an empty place on the page.
    environment = Environment(
        loader=PackageLoader("onefold.report"),
        autoescape=True,
        finalize=lambda value: _with_unit(printable(value)) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(formats, name) for name in _FILTERS}
    environment.globals["legend_entry"] = legend_entry
    return environment.get_template("page.html.j2")


# ---- head of the page ------------------------------------------------------------------------------------------------


def _title(data: ReportData) -> str:
    inputs = data.inputs
    models = [one_line(group.subject.get("model") or "", 60) for group in data.groups]
    models += [one_line(artifact.model) for artifact in inputs.artifacts]
    names = [model for model in dict.fromkeys(models) if model] or list(dict.fromkeys(run.name for run in inputs.runs))
    names = names or list(dict.fromkeys(f"{one_line(study.name, 60)} study" for study in inputs.studies))
    nothing = "Accuracy" if inputs.accuracies else "An empty report"
    what = (join_words(names) if len(names) <= 2 else format_count(len(names), "model")) or nothing
    chips = [one_line(machine.chip, 60) for machine in data.machines]
    where = join_words(chips) if len(chips) <= 2 else format_count(len(chips), "machine")
    return f"{what} on {where}" if chips else what


def _lead(data: ReportData) -> str:
    """Return one paragraph for somebody who reads nothing else."""
    inputs, fastest = data.inputs, data.fastest
    counts = [
        format_count(len(items), *words)
        for items, words in (
            (inputs.runs, ("training run",)),
            (inputs.artifacts, ("exported artifact",)),
            (data.groups, ("measured latency", "measured latencies")),
            (inputs.studies, ("study", "studies")),
        )
        if items
    ]
    sentences = [f"This report covers {join_words(counts)}." if counts else "There is nothing to report yet."]
    if not counts and inputs.accuracies:
        scores = [
            f"{each.top1:.1f} % on {each.data or 'images'}"
            + ("" if each.num_images is None else f" ({format_count(each.num_images, 'image')})")
            for each in inputs.accuracies.values()
        ]
        sentences = [f"Evaluated, with no run, artifact or measurement beside it: top-1 {join_words(scores)}."]
    expected = [run for run in inputs.runs if run.expected_top1 is not None]
    if len(inputs.runs) == 1 or len(expected) == 1:
        sentences.append(_verdict((expected or inputs.runs)[0], bool(expected)))
    elif expected:
        reached = sum(bool(run.best and run.best[1] >= (run.expected_top1 or 0.0) - 0.05) for run in expected)
        sentences.append(f"{reached} of the {format_count(len(expected), 'run')} with an expected accuracy reached it.")
    elif inputs.runs:
        runs = [run for run in inputs.runs if run.best]
        best_run = max(runs, key=lambda run: run.best[1], default=None)  # type: ignore[index]
        sentences.append("None of the runs has an accuracy." if best_run is None else _verdict(best_run, False))
    if fastest is None and data.fastest_not_passed:
        sentences.append("None of the measured networks is known to keep its accuracy.")
    if fastest:
        kind = {True: "fused network", None: "network (not known to be fused)", False: "network"}[fastest.fused]
        p90 = "" if fastest.p90_ns is None else f", p90 {format_latency(fastest.p90_ns)}"
        sentences.append(
            f"The fastest {kind} is {fastest.label}: median latency {format_latency(fastest.median_ns)}{p90}, with "
            f"{format_count(fastest.threads, 'thread')}."
        )
    if other := data.fastest_not_passed:
        count = other.num_scored
        photos = "the photos that were scored" if count is None else format_count(count, "photo")
        told = f"whether it keeps its accuracy cannot be told by {photos}"
        why = "failed its accuracy gate" if other.gate == "failed" else f"is undecided: {told}"
        sentences.append(f"{other.label}, median latency {format_latency(other.median_ns)}, {why}.")
    pair = data.best_fusion or next(iter(data.pairs), None)
    if pair:
        sentences.append(f"{pair.sentence().rstrip('.')} ({pair.context}).")
    return " ".join(sentences)


def _tiles(data: ReportData) -> list[dict[str, str]]:
    """Return the headline figures: what it is, its value, and what it belongs to."""
    tiles: list[tuple[str, str, str]] = []
    best_run = max((run for run in data.inputs.runs if run.best), key=lambda run: run.best[1], default=None)  # type: ignore[index]
    if best_run and best_run.best:
        expected = "" if best_run.expected_top1 is None else f"; {format_percent(best_run.expected_top1)} expected"
        found = best_run.predictions
        interval = ""
        if found is not None and abs(found.top1 - best_run.best[1]) < 0.05:
            low, high = wilson_interval(round(found.top1 / 100 * found.num_images), found.num_images)
            interval = f"95 % interval {low:.1f}–{high:.1f}; "
        tiles.append(("Top-1 accuracy", format_percent(best_run.best[1]), f"{interval}{best_run.name}{expected}"))
    if data.fastest is None and data.fastest_not_passed:
        tiles.append(("Lowest median latency", "–", "of the measured artifacts none is known to keep its accuracy"))
    if group := data.fastest:
        p90 = "" if group.p90_ns is None else f"p90 {format_latency(group.p90_ns)}; "
        kept = ", accuracy kept" if group.gate == "passed" else ""
        tiles.append(
            (
                f"Lowest median latency{kept}",
                format_latency(group.median_ns),
                f"{p90}{group.title}, {format_count(group.threads, 'thread')}",
            )
        )
    if pair := data.best_fusion:
        ratio = pair.ratio
        interval = f"95 % CI {format_significant(1 / ratio.high)}–{format_significant(1 / ratio.low)}"
        doubt = "" if ratio.verdict == "faster" else " (not a gain)"
        title = f"Speedup by fusing{doubt if ratio.is_robust_to_noise else ' (within the noise)'}"
        tiles.append((title, f"{format_significant(1 / ratio.value)}×", f"{interval}; {pair.context}"))
    drifts = [(artifact.drift, artifact) for artifact in data.inputs.artifacts if artifact.drift is not None]
    if drifts:
        drift, artifact = max(drifts, key=lambda entry: entry[0])
        among = f", of {format_count(len(drifts), 'artifact')}" if len(drifts) > 1 else ""
        tiles.append(("Largest drift by fusing", format_scientific(drift), f"{artifact.folder.name}{among}"))
    return [{"title": title, "value": value, "detail": one_line(detail, 200)} for title, value, detail in tiles]


def _undecided(gate: GateResult) -> str:
    return f"Undecided: {gate.sentence.rstrip('.')}."


def _warnings(data: ReportData) -> list[str]:
    """Return what must not be overlooked: gates that did not pass, unfused networks, noisy measurements."""
    unfused = [group.label for group in data.groups if group.fused is False]
    unfused += [one_line(artifact.folder.name) for artifact in data.inputs.artifacts if not artifact.fused]
    unstated = [group.label for group in data.groups if group.fused is None]
    num_noisy = sum(bool(group.num_noisy) for group in data.groups)
    gates = data.inputs.gates
    warnings = [f"A gate FAILED: {gate.sentence.rstrip('.')}." for gate in gates if gate.verdict == "failed"]
    warnings += [_undecided(gate) for gate in gates if gate.verdict == "undecided" and not gate.within_bound]
    if unfused:
        names = ", ".join(dict.fromkeys(unfused))
        warnings.append(
            f"UNFUSED networks are among these: {names}. Their latencies are not those of the deployed network."
        )
    if unstated:
        warnings.append(f"It is not stated whether these were fused: {', '.join(dict.fromkeys(unstated))}.")
    if num_noisy:
        total = format_count(len(data.groups), "measured latency", "measured latencies")
        warnings.append(f"{num_noisy} of {total} came from a noisy machine.")
    return warnings


# ---- training --------------------------------------------------------------------------------------------------------


def _training(runs: Sequence[RunLog]) -> dict[str, Any]:
    drawn = runs[:NUM_COLOURS]
    accuracy = [Curve(run.name, run.curve("top1"), run.expected_top1) for run in drawn]
    losses = [Curve(run.name, run.curve("loss")) for run in drawn]
    if len(drawn) == 1:
        losses = [Curve("training", drawn[0].curve("loss")), Curve("validation", drawn[0].curve("val_loss"))]
    together = _same_answers(runs)
    shown = together[:_MAX_PREDICTIONS]
    return {
        "findings": _told_once((run.name, sentence) for run in runs for sentence in run.data_findings),
        "datasets": _told_once((run.name, sentence) for run in runs for sentence in run.dataset),
        "verdicts": [_verdict(run, any(each.expected_top1 is not None for each in runs)) for run in runs],
        "note": f"The figures show the first {NUM_COLOURS} of {len(runs)} runs." if len(runs) > len(drawn) else "",
        "figures": [
            draw_curves("top1", "Top-1 accuracy", accuracy, "top-1 accuracy, %", " %"),
            draw_curves("loss", "Loss", losses, "loss (cross-entropy), nats"),
        ],
        "table": run_table(runs),
        "comparisons": _comparisons([each for group in together for each in group]),
        "predictions": [_predictions(group, f"run{index}") for index, group in enumerate(shown)],
        "predictions_note": f"Shown are the first {len(shown)} of {len(together)} runs with different predictions."
        if len(together) > len(shown)
        else "",
    }


def _told_once(named: Iterable[tuple[str, str]]) -> list[str]:
    """Return each sentence once, after the names of all that it is said of."""
    names: dict[str, list[str]] = {}
    for name, sentence in named:
        names.setdefault(sentence, []).append(name)
    return [f"{join_words(of)}: {sentence}" for sentence, of in names.items()]


def _same_answers(runs: Sequence[RunLog]) -> list[list[tuple[str, Predictions]]]:
    """Group the runs with predictions: those that answer every image alike are told once, under all their names."""
    groups: dict[object, list[tuple[str, Predictions]]] = {}
    for run in runs:
        if run.predictions is not None:
            answers = frozenset(run.predictions.answers.items())
            key = (run.predictions.classes, answers) if answers else id(run)
            groups.setdefault(key, []).append((run.name, run.predictions))
    return list(groups.values())


def _comparisons(predicted: Sequence[tuple[str, Predictions]]) -> list[Table]:
    """Return a table for each set of images that several runs have predictions for."""
    sets: dict[object, list[tuple[str, Predictions]]] = {}
    for name, found in predicted:
        images = frozenset((image, label) for image, (label, _) in found.answers.items())
        sets.setdefault((found.classes, images or id(found)), []).append((name, found))
    return [comparison_table(named) for named in sets.values() if len(named) > 1]


def _verdict(run: RunLog, some_expected: bool = True) -> str:
    """Return what the run reached, held against what was expected where that is so of some runs, in a sentence."""
    if run.best is None:
        return f"{run.name} has no accuracy in its log."
    epoch, top1 = run.best
    when = (
        f"in epoch {epoch:g} of {run.num_epochs}" if epoch else "before its first epoch, as the network it began with"
    )
    reached = f"{run.name} reached {format_percent(top1)} top-1, {when}"
    if run.expected_top1 is None:
        return f"{reached}. Its recipe states no expected accuracy." if some_expected else f"{reached}."
    gap = top1 - run.expected_top1
    distance = "exactly" if abs(gap) < 0.05 else f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
    source = f" ({run.expected_source})" if run.expected_source else ""
    return f"{reached}: {distance} the expected {format_percent(run.expected_top1)}{source}."


def _predictions(group: Sequence[tuple[str, Predictions]], key: str) -> dict[str, Any]:
    """Return the part about the predictions that runs have in common: figures, tables, the largest loss first."""
    (run, found), names = group[0], join_words([name for name, _ in group])
    matrix = [draw_confusion_matrix(f"{key}-confusion", found)] if len(found.classes) <= _MAX_MATRIX_CLASSES else []
    return {
        "runs": names,
        "shared": f"They predict the same class for every image; the probabilities are those of {run}."
        if len(group) > 1
        else "",
        "found": found,
        "figures": [*matrix, draw_reliability_diagram(f"{key}-calibration", found)],
        "confusions": None if matrix else confusion_table(found),
        "all_right": not found.confusions,
        "classes": class_table(found),
        "misclassified": sorted(found.misclassified, key=lambda image: (image.label_probability, -image.confidence)),
    }


# ---- latency ---------------------------------------------------------------------------------------------------------


def _latency(data: ReportData, machine: Machine, index: int) -> dict[str, Any]:
    """Return the part about one machine: latencies of two machines never share an axis."""
    groups = [group for group in data.groups if group.machine.slug == machine.slug]
    pairs = [pair for pair in data.pairs if pair.machine.slug == machine.slug]
    self_tests = [
        comparison
        for comparison in data.inputs.comparisons
        if len(comparison.measurements) == 1 and comparison.twin.machine.slug == machine.slug
    ]
    unknown = list(dict.fromkeys(group.title for group in groups if group.top1 is None))
    some = "Nothing" if all(group.top1 is None for group in groups) else "Not everything"
    return {
        "machine": machine,
        "pairs": pairs,
        "self_tests": [(subject_label(test.twin.subject), test) for test in self_tests],
        "pareto_figures": pareto_figures(groups, f"pareto-{index}"),
        "without_accuracy": f"{some} measured has a known accuracy; not drawn against it: {', '.join(unknown)}."
        if unknown
        else "",
        "figures": [*_ratio_figures(pairs, index), *_distribution_figures(groups, index)],
        "table": latency_table(groups),
        "beats_limit": ", ".join(g.title for g in groups if any(m.beats_roofline for m in g.measurements)),
        "noisy": [
            f"{group.title}: {' '.join(dict.fromkeys(reason for m in group.measurements for reason in m.reasons))}"
            for group in groups
            if group.num_noisy
        ],
    }


def _ratio_figures(pairs: Sequence[ComparedPair], index: int) -> list[ReportFigure]:
    """Return every ratio with its interval, in one figure; none where nothing was compared."""
    drawn = pairs[:_MAX_ROWS]
    if not drawn:
        return []
    baseline = drawn[0].second if len({pair.second for pair in drawn}) == 1 and not drawn[0].is_fusion else None
    rows = []
    for pair in drawn:
        first, second = ("fused", "unfused") if pair.is_fusion else (pair.first, pair.second)
        ratio = pair.ratio
        text = f"{format_significant(ratio.value)} ({format_significant(ratio.low)}–{format_significant(ratio.high)})"
        rows.append(RatioRow(pair.first if baseline else f"{first} / {second}, {pair.context}", text, ratio))
    return [draw_ratios(f"ratios-{index}", rows, " ".join(pair.sentence() for pair in drawn), baseline)]


def _distribution_figures(groups: Sequence[MeasurementGroup], index: int) -> list[ReportFigure]:
    """Return one figure a model, one row a subject."""
    drawings = []
    by_model = groupby(sorted(groups, key=_model), key=_model)
    for at, (model, members) in enumerate(by_model):
        rows = [_latency_row(group) for group in members]
        more = f" The fastest {_MAX_ROWS} of {len(rows)} are drawn." if len(rows) > _MAX_ROWS else ""
        title = f"Latency of {model}" if model else "Latency"
        drawings.append(draw_latency_histograms(f"latency-{index}-{at}", title, rows[:_MAX_ROWS], more))
    return drawings


def _model(group: MeasurementGroup) -> str:
    return one_line(group.subject.get("model") or "", 60) + (
        " (random weights)" if group.subject.get("untrained") else ""
    )


def _latency_row(group: MeasurementGroup) -> LatencyRow:
    known = [one_line(group.subject[key], 30) for key in ("runtime", "precision") if group.subject.get(key)]
    name = " ".join(known) if _model(group) and known else group.label
    state = " UNFUSED" if group.fused is False else ""
    p90 = "" if group.p90_ns is None else f", p90 {format_latency(group.p90_ns)}"
    return LatencyRow(
        label=f"{one_line(name, 32)}{state}, {format_count(group.threads, 'thread')}",
        note=f"{format_latency(group.median_ns)}{p90}",
        latencies_ms=tuple(ns / 1e6 for m in group.measurements for ns in m.latencies_ns),
        median_ms=group.median_ns / 1e6,
        p90_ms=None if group.p90_ns is None else group.p90_ns / 1e6,
        fused=group.fused,
    )
