"""Running a study: networks are built, fused, exported, their answers checked, and timed interleaved, group by group.

Each comparison is appended to a file of results, as `onefold bench` writes them. Every row there has the digest of what
was measured and how; a row that is wanted again is not measured again. So a run that is stopped, or ends with its
minutes, goes on with the same command.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from onefold.bench import (
    Comparison,
    Measurement,
    Procedure,
    Ratio,
    append_results,
    compare,
    read_results,
)
from onefold.errors import BadArgument, BadData, MissingExtra, OnefoldError
from onefold.report.format import format_count
from onefold.runtimes import ModelInfo, Session, UnfusedWarning, import_runtime, load
from onefold.runtimes.base import installed_versions
from onefold.runtimes.exporter import TracedModel
from onefold.studies.networks import Prepared, prepare
from onefold.studies.study import Measured, Point, Row, Study, Target

Say = Callable[[str], None]

_progress = logging.getLogger("onefold.progress")

_EXPORT_S, _CALL_S = 6.0, 0.015  # of one network, about, before any was measured
_MAX_INPUT_BYTES = 64 << 20  # of the made-up inputs of one network
_NUM_CALIBRATION_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Where and how to measure: runtimes by name, precisions (None: the study's), the procedure, and a time limit."""

    runtimes: Sequence[str]
    precisions: Sequence[str] | None = None
    procedure: Procedure = field(default_factory=Procedure)
    minutes: float | None = None

    def targets(self, study: Study) -> list[Target]:
        """Every runtime with every precision that both it and the order have. Raises BadArgument where one has none."""
        found = []
        for name in dict.fromkeys(self.runtimes):
            kind = import_runtime(name)
            if kind.unavailable_reason is not None and (reason := kind.unavailable_reason()):
                raise BadArgument(f"{name} cannot be measured here: {reason}")
            wanted = [each for each in self.precisions or study.precisions if each in kind.PRECISIONS]
            if not wanted:
                raise BadArgument(f"{name} has none of these precisions: it has {', '.join(kind.PRECISIONS)}")
            found += [Target(runtime=name, precision=precision) for precision in wanted]
        if not found:
            raise BadArgument("there is no runtime to measure in: give one or more with --to")
        return found


class _Pace:
    """How long a row takes, from those measured so far, and what is left of the limit."""

    def __init__(self, options: StudyOptions) -> None:
        how = options.procedure
        calls = how.samples * (1 + how.lead_calls) * _CALL_S
        self._guess, self._limit = _EXPORT_S + how.warmup_seconds + calls, options.minutes
        self._began, self._spent, self._rows = time.monotonic(), 0.0, 0

    @property
    def seconds_per_row(self) -> float:
        """The mean of the rows measured so far; before the first a guess."""
        return self._spent / self._rows if self._rows else self._guess

    def num_affordable(self, wanted: int) -> int:
        """How many of so many rows there is time for."""
        if self._limit is None:
            return wanted
        left = 60 * self._limit - (time.monotonic() - self._began)
        return max(0, min(wanted, int(left / self.seconds_per_row)))

    def add(self, seconds: float, rows: int) -> None:
        """Note that so many rows took so long."""
        self._spent, self._rows = self._spent + seconds, self._rows + rows


class _Book:
    """The rows of a file of results, by the digest of what was measured and how."""

    def __init__(self, path: Path) -> None:
        self.path, self._rows = path, dict[str, tuple[Measurement, Ratio]]()
        if path.is_file():
            with suppress(BadData):  # a file of which no line is left whole: all is measured again
                for comparison in read_results(path).comparisons:
                    self._note(comparison)

    def get(self, key: str) -> tuple[Measurement, Ratio] | None:
        """The newest row of this digest."""
        return self._rows.get(key)

    def append(self, comparison: Comparison) -> None:
        """Keep a comparison on disk, and its rows here."""
        append_results(self.path, [comparison])
        self._note(comparison)

    def _note(self, comparison: Comparison) -> None:
        for name, measurement in comparison.measurements.items():
            if key := measurement.subject.get("study_key"):
                is_baseline = name == comparison.baseline
                ratio = Ratio(value=1.0, low=1.0, high=1.0) if is_baseline else comparison.ratio(name)
                self._rows[str(key)] = measurement, ratio


def run_study(study: Study, options: StudyOptions, path: Path, *, say: Say) -> Measured:
    """Measure what of a study is not in the file `path` yet, and give all of it that is there then.

    `say` hears beforehand how long it may take, of each group when it is there, and what was left out for want of time.
    Raises BadArgument, MissingExtra, NotWritable.
    """
    targets, groups = options.targets(study), [list(group) for group in study.groups()]
    book, pace, found = _Book(path), _Pace(options), _Found(targets)
    _say_beforehand(study, options, sum(map(len, groups)) * len(targets), pace, say)
    for number, group in enumerate(groups):
        _progress.debug("building networks", extra={"done": number, "total": len(groups)})
        prepared = found.prepare(group)
        for target in targets if len(prepared) > 1 else ():
            keys = {each.point.name: _row_key(study, each, prepared[0], target, options.procedure) for each in prepared}
            missing = [each for each in prepared[1:] if book.get(keys[each.point.name]) is None]
            count = pace.num_affordable(len(missing) + 1) - 1 if missing else 0  # the baseline is measured beside them
            if missing and count < len(missing):
                found.left_out += [f"{each.point.name} in {target}" for each in missing[max(0, count) :]]
            if count > 0:
                began = time.monotonic()
                chosen = [prepared[0], *missing[:count]]
                outcome = _measured_together(study, chosen, target, keys, options, found)
                pace.add(time.monotonic() - began, len(chosen))
                if outcome is not None:
                    book.append(outcome)
                    say(_progress_line(target, outcome))
            found.add(target, group[0].name, [(each.point, book.get(keys[each.point.name])) for each in prepared])
    if found.left_out:
        say(
            f"left out for want of time: {format_count(len(found.left_out), 'row')}; the same command goes on with them"
        )
    return found.measured()


class _Found:
    """What has come of a study so far."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.rows: dict[Target, dict[str, Row]] = {target: {} for target in targets}
        self.unavailable: list[str] = []
        self.left_out: list[str] = []

    def prepare(self, group: Sequence[Point]) -> list[Prepared]:
        """Build the networks of a group; those that cannot be are noted. Raises MissingExtra for the baseline's."""
        made: list[Prepared] = []
        for point in group:
            try:
                made.append(prepare(point))
            except MissingExtra as error:
                if not made:
                    raise
                self.note(f"{point.name} was not measured: {error}")
        return made

    def note(self, sentence: str) -> None:
        """Keep a sentence once."""
        if sentence not in self.unavailable:
            self.unavailable.append(sentence)

    def add(
        self, target: Target, baseline: str, known: Sequence[tuple[Point, tuple[Measurement, Ratio] | None]]
    ) -> None:
        """Keep the rows of a group; the baseline's first one stays."""
        for point, row in known:
            if row is not None and point.name not in self.rows[target]:
                measurement, ratio = row
                self.rows[target][point.name] = Row(
                    point=point, baseline=baseline, measurement=measurement, ratio=ratio
                )

    def measured(self) -> Measured:
        """All of it; what was left out for want of time is a sentence of its own."""
        late = [f"Not measured for want of time: {', '.join(self.left_out)}."] if self.left_out else []
        return Measured(rows=self.rows, unavailable=(*self.unavailable, *late))


def _say_beforehand(study: Study, options: StudyOptions, rows: int, pace: _Pace, say: Say) -> None:
    minutes = rows * pace.seconds_per_row / 60
    limit = "" if options.minutes is None else f"; it ends after about {options.minutes:g} min (--minutes)"
    say(
        f"{study.name}: {format_count(rows, 'row')} of a network in a runtime, about {minutes:.0f} min "
        f"if none is kept{limit}"
    )


def _row_key(study: Study, each: Prepared, baseline: Prepared, target: Target, procedure: Procedure) -> str:
    """The digest of what decides a row: the network, its baseline, the runtime with its version, the procedure."""
    versions = installed_versions(import_runtime(target.runtime).PACKAGES)
    facts = [
        *(study.file_name, each.point.name, each.digest, each.is_fused, baseline.digest),
        *(target.runtime, target.precision, versions, procedure.to_dict()),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _measured_together(
    study: Study,
    prepared: Sequence[Prepared],
    target: Target,
    keys: Mapping[str, str],
    options: StudyOptions,
    found: _Found,
) -> Comparison | None:
    """Export networks to one target and time them interleaved; None where the baseline, or all others, cannot be."""
    threads = options.procedure.threads
    calls, subjects = dict[str, Callable[[], object]](), dict[str, dict[str, object]]()
    with tempfile.TemporaryDirectory(prefix="onefold-study-") as place, ExitStack() as opened:
        for number, each in enumerate(prepared):
            name = each.point.name
            _progress.debug(f"exporting {name} to {target}", extra={"done": number, "total": len(prepared)})
            try:
                session = opened.enter_context(_opened(each, target, Path(place) / str(number), threads))
            except MissingExtra:
                raise
            except OnefoldError as error:
                found.note(f"{name} was not measured in {target}: {error}")
                if number == 0:
                    return None
                continue
            calls[name] = _call(session, each.point.shape)
            subjects[name] = {**_subject(each, session, target), "study": study.file_name, "study_key": keys[name]}
        if len(calls) < 2:
            return None
        _progress.debug("timing %s in %s, interleaved", format_count(len(calls), "network"), target)
        return compare(calls, options.procedure, subjects)


def _opened(each: Prepared, target: Target, folder: Path, threads: int) -> Session:
    """Export a network and open it: its answers are PyTorch's, or it is refused."""
    import torch

    from onefold.quantize import MINMAX_METHOD, quantize

    model: Any = each.model
    if target.precision == "int8":
        images = torch.randn(_NUM_CALIBRATION_IMAGES, *each.point.shape, generator=torch.Generator().manual_seed(0))
        model = quantize(each.model, images, MINMAX_METHOD)  # of the methods the quickest; the graph is that of all
    info = ModelInfo(
        model=each.point.name,
        fused=each.is_fused,
        source="onefold study",
        details={"cost": {"params": each.cost.params, "macs": each.cost.macs}, "untrained": True},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfusedWarning)  # where a study asks for it, its rows say so
        traced = TracedModel(model, each.point.shape)
        traced.export(folder, runtime=target.runtime, info=info, precision=target.precision)
    return load(folder, threads=threads)


def _subject(each: Prepared, session: Session, target: Target) -> dict[str, object]:
    artifact = session.artifact
    digests = sorted(stored.sha256 for name, stored in artifact.files.items() if name.startswith("model."))
    return {
        "model": each.point.name,
        "runtime": target.runtime,
        "precision": target.precision,
        "fused": each.is_fused,
        "input_shape": each.point.shape,
        "batch": 1,
        "params": each.cost.params,
        "macs": each.cost.macs,
        "num_bytes": artifact.num_bytes,
        "sha256": digests[0],
        "untrained": True,
        "measured_on": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _call(session: Session, shape: tuple[int, int, int]) -> Callable[[], object]:
    """A call without arguments that answers the next of some made-up inputs, so that nothing can be remembered."""
    count = max(4, min(64, _MAX_INPUT_BYTES // (4 * int(np.prod(shape)))))
    inputs = np.random.default_rng(0).standard_normal((count, 1, *shape), dtype=np.float32)
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % count
        return session(inputs[turn])

    return call


def _progress_line(target: Target, outcome: Comparison) -> str:
    medians = ", ".join(f"{name} {each.median_ns / 1e6:.3g}" for name, each in outcome.measurements.items())
    return f"{target}: {medians} ms"
