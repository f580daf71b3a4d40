"""study -> results/<machine>-<study>.jsonl, .study.json, .svg: an experiment of a paper, run again on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from onefold.bench import LatencyBound, Machine, Procedure, Roofline
from onefold.commands.bench import latency_bound, load_or_measure_roofline
from onefold.commands.optional_dependencies import require_extras
from onefold.commands.predictor import Source, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.errors import BadArgument, MissingExtra
from onefold.file_io import write_text
from onefold.report.format import format_count, join_words
from onefold.report.study_figures import draw_study_figure, standalone_svg
from onefold.report.study_results import STUDY_SUFFIX, Conclusion, StudyResult, StudyTable, write_study
from onefold.studies import Study, find_study
from onefold.studies.run_study import StudyOptions, run_study
from onefold.studies.study import Measured

_FEWEST_SAMPLES = 16
_MORE_ATTEMPTS = 3  # to measure a limit that a call was quicker than


@dataclass(frozen=True, kw_only=True, repr=False)
class StudyRun:
    """What a study found, and where it lies: raw samples, the outcome for `report`, and a figure a file."""

    result: StudyResult
    samples: Path
    outcome: Path
    figures: tuple[Path, ...]

    def __repr__(self) -> str:
        tables = [f"{table.caption}: {format_count(len(table.rows), 'network')}" for table in self.result.tables]
        return "\n".join([f"{self.result.name}: {self.result.question}", *tables, *map(str, self.result.conclusions)])


@suggest_argument_names
def study(
    name: str,
    *,
    to: str | Sequence[str] = "onnx",
    precision: str | Sequence[str] | None = None,
    results: Source = "results",
    samples: int = 100,
    warmup: float = 0.5,
    threads: int = 1,
    seed: int = 0,
    minutes: float | None = None,
    say: Callable[[str], None] | None = None,
) -> StudyRun:
    """Run an experiment of a paper again on this machine: its networks at random weights, timed beside its table.

    `name` is one of `onefold study --list`. The networks are fused, exported `to` runtimes in the precisions of the
    study, or those given, their answers compared with PyTorch's, and timed interleaved as by `bench`: `warmup` seconds
    and `samples` calls of each on `threads` threads, in an order drawn by `seed`. What `results` holds already is not
    measured again; after `minutes` the rest is left out, and named. `say` hears how long it may take, and each row.

    Raises BadArgument, MissingExtra, NotWritable.

        onefold.study("activations", to=["onnx", "openvino"], minutes=20).result.conclusions
    """
    found, runtimes = find_study(name), [to] if isinstance(to, str) else list(to)
    if samples < _FEWEST_SAMPLES:
        raise BadArgument(f"a study compares networks, which needs {_FEWEST_SAMPLES} samples or more; got {samples}")
    if minutes is not None and not minutes > 0:
        raise BadArgument(f"minutes must be above 0, not {minutes:g}")
    options = StudyOptions(
        runtimes=runtimes,
        precisions=[precision] if isinstance(precision, str) else precision,
        procedure=Procedure(samples=samples, warmup_seconds=warmup, threads=threads, seed=seed),
        minutes=minutes,
    )
    options.targets(found)
    require_extras(runtimes)
    with show_progress():
        return _run(found, options, Path(os.fspath(results)), say or (lambda _: None))


def _run(found: Study, options: StudyOptions, results: Path, say: Callable[[str], None]) -> StudyRun:
    machine = Machine.detect()
    base = f"{machine.slug}-{found.name}"
    samples, outcome = results / f"{machine.slug}-{found.file_name}.jsonl", results / f"{base}{STUDY_SUFFIX}"
    measured = _held_against_limits(run_study(found, options, samples, say=say), options.procedure.threads, results)
    summary = found.summarize(measured)
    dates = sorted(
        {str(row.measurement.subject["measured_on"]) for rows in measured.rows.values() for row in rows.values()}
    )
    result = StudyResult(
        name=found.name,
        question=found.question,
        source=found.source,
        date=join_words(dates) or datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        machine=f"{machine.chip}, {machine.usable_cores} of {machine.cores} cores",
        conditions=_conditions(options),
        tables=summary.tables,
        figures=summary.figures,
        conclusions=_with_noise(summary.conclusions, measured),
        notes=(
            *found.notes,
            *summary.notes,
            *measured.unavailable,
            *_noise_notes(summary.tables),
            *_limit_notes(measured),
        ),
    )
    write_study(outcome, result)
    return StudyRun(result=result, samples=samples, outcome=outcome, figures=_draw(result, results / base, say))


def _held_against_limits(measured: Measured, threads: int, results: Path) -> Measured:
    """The same with the least times that this machine could take; a limit that a call beats is measured again."""
    beaten = list[str]()
    for attempt in range(1 + _MORE_ATTEMPTS):
        roofline = load_or_measure_roofline(results, [threads], again=attempt > 0, kinds=beaten)
        measured = measured.with_bounds(partial(_bound, roofline, threads))
        beaten = sorted({roofline.binding_kind(bound) for bound in measured.beaten_bounds})
        if not beaten:
            break
    return measured


def _bound(roofline: Roofline, threads: int, subject: Mapping[str, Any]) -> LatencyBound | None:
    return latency_bound(roofline, subject, threads)


def _conditions(options: StudyOptions) -> str:
    how = options.procedure
    return (
        f"One image a call, {format_count(how.threads, 'thread')}, random weights; {how.samples} calls of each, "
        f"interleaved, after {how.warmup_seconds:g} s of warm-up."
    )


def _with_noise(conclusions: Sequence[Conclusion], measured: Measured) -> tuple[Conclusion, ...]:
    """The same, with a word in the verdict on each target of which a row came from a noisy machine."""
    noisy = {
        str(target)
        for target, rows in measured.rows.items()
        if any(row.measurement.verdict == "noisy" for row in rows.values())
    }
    return tuple(
        replace(each, verdict=f"{each.verdict}, on a noisy machine") if each.where in noisy else each
        for each in conclusions
    )


def _limit_notes(measured: Measured) -> list[str]:
    """That calls were quicker than a limit, where that was measured again and they still are."""
    count = len(measured.beaten_bounds)
    return (
        [
            f"{format_count(count, 'row')} had calls quicker than the limit here: it was measured on a busy machine "
            "(`onefold limits --again` measures anew), or the runtime needs fewer multiplications (Winograd). "
            "Their shares of the limit say nothing."
        ]
        if count
        else []
    )


def _noise_notes(tables: Sequence[StudyTable]) -> list[str]:
    """How many rows came from a noisy machine, where any did."""
    verdicts = [
        row[table.columns.index("machine")] for table in tables if "machine" in table.columns for row in table.rows
    ]
    noisy = verdicts.count("noisy")
    return [f"{noisy} of {format_count(len(verdicts), 'row')} came from a noisy machine."] if noisy else []


def _draw(result: StudyResult, base: Path, say: Callable[[str], None]) -> tuple[Path, ...]:
    """Write each figure that has points as an SVG file; without matplotlib that is said, and none is written."""
    written = []
    for number, figure in enumerate(result.figures, 1):
        try:
            drawn = standalone_svg(draw_study_figure(f"{result.name}-{number}", figure))
        except MissingExtra as error:
            say(f"no figures: {error}")
            break
        if drawn is not None:
            path = base.with_name(f"{base.name}-{number}.svg")
            write_text(path, drawn)
            written.append(path)
    return tuple(written)
