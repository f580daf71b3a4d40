"""artifact -> results/<machine>.jsonl: how fast things answer, measured side by side in one run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from onefold.bench import (
    ColdStart,
    Comparison,
    LatencyBound,
    Machine,
    Measurement,
    Procedure,
    Roofline,
    Workload,
    append_results,
    compare,
    compare_with_itself,
    measure,
    measure_cold_start,
    measure_roofline,
    with_injected_slowdown,
)
from onefold.checksums import read_sealed_json, write_sealed_json
from onefold.commands.predictor import Floats, Predictor, Source, open_predictor, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.errors import BadArgument, BadData, MissingExtra
from onefold.file_io import file_lock
from onefold.progress_steps import Steps
from onefold.report import ACCURACY_FILE
from onefold.report.format import format_count
from onefold.runtimes import Artifact, Session
from onefold.runtimes.artifact import manifest_sha256
from onefold.system_resources import pin_to_cpus

_log = logging.getLogger("onefold")

_MORE_ATTEMPTS = 3
# About, on two cores of a server: what is left is reckoned from their proportions.
COLD_S, LIMITS_S, RUNTIME_MACS_PER_S = 2.0, 4.0, 15e9
ROOFLINE_SUFFIX = "-roofline.json"  # how the name of a machine's limits ends, in a folder of results

_DISTINCT = 64
"""Different inputs that a measurement cycles through, so that nothing can be remembered from call to call."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure: artifacts or weights, and how. `batch` images a call.

    A network that is not fused is refused unless `allow_unfused`, and then labelled in every row. `cold` has every
    artifact started in a fresh process too, `limits` the machine's limits measured. `pin` names the processors to use.
    Two controls, each of one source: `aa` measures it against itself, `inject_slowdown` against itself made slower by
    a share (0.02: 2 %).
    """

    sources: Sequence[str]
    procedure: Procedure
    batch: int = 1
    allow_unfused: bool = False
    name: str | None = None
    cold: bool = True
    limits: bool = True
    pin: tuple[int, ...] | None = None
    aa: bool = False
    inject_slowdown: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """One thing to measure, and the artifact that it is of: `cold` is filled in once it was."""

    artifact: Artifact | None
    call: Callable[[], object]
    subject: dict[str, object]
    cold: ColdStart | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class BenchResult:
    """Latencies that were measured in one run: of one source a Measurement, of several a Comparison; kept in `path`."""

    outcome: Measurement | Comparison
    path: Path

    @property
    def measurements(self) -> Mapping[str, Measurement]:
        """The measurement of each source, by its title."""
        if isinstance(self.outcome, Comparison):
            return self.outcome.measurements
        return {str(self.outcome.subject["name"]): self.outcome}

    def __repr__(self) -> str:
        lines = [
            f"{name}: median {m.median_ns / 1e6:.3f} ms, min {m.min_ns / 1e6:.3f} ms"
            + (f"; noisy: {' '.join(m.reasons)}" if m.reasons else "")
            for name, m in self.measurements.items()
        ]
        compared = self.outcome.sentences() if isinstance(self.outcome, Comparison) else ()
        return "\n".join([*lines, *compared])


@suggest_argument_names
def bench(
    *sources: Source,
    results: Source = "results",
    samples: int = 300,
    warmup: float = 1.0,
    batch_size: int = 1,
    threads: int = 1,
    seed: int = 0,
    pin: Sequence[int] | None = None,
    no_cold: bool = False,
    aa: bool = False,
    inject_slowdown: float | None = None,
    model: str | None = None,
    allow_unfused: bool = False,
) -> BenchResult:
    """Measure latencies side by side: artifacts, runs, weights or timm:NAME; the first is the baseline.

    The calls are interleaved: `warmup` seconds of each, then `samples` timed calls of `batch_size` images (B, C, H, W)
    on `threads` threads, in an order drawn by `seed`, on the processors `pin`. Artifacts are also started in a fresh
    process, unless `no_cold`. Two controls, each of one source: `aa` measures it against itself,
    `inject_slowdown` against itself made slower by a share (0.02: 2 %). Times are kept in nanoseconds, and appended to
    `results`/<machine>.jsonl.

    Raises BadArgument for a network that is not fused, unless `allow_unfused`, which labels its rows.

        onefold.bench("artifacts/onnx-fp32", "artifacts/onnx-int8").measurements
    """
    order = BenchOptions(
        sources=[os.fspath(source) for source in sources],
        procedure=Procedure(warmup_seconds=warmup, samples=samples, threads=threads, seed=seed),
        batch=batch_size,
        allow_unfused=allow_unfused,
        name=model,
        cold=not no_cold,
        pin=None if pin is None else tuple(pin),
        aa=aa,
        inject_slowdown=inject_slowdown,
    )
    with show_progress():
        outcome, path = measure_sources(order, Path(results))
    return BenchResult(outcome=outcome, path=path)


def measure_sources(order: BenchOptions, results: Path) -> tuple[Measurement | Comparison, Path]:
    """Measure one source, or several interleaved against the first; appends to `results`/<machine>.jsonl."""
    _must_be_sound(order)
    with pin_to_cpus(order.pin), ExitStack() as opened:
        candidates = _opened(order, results, opened)
        steps = _steps(order, candidates)
        steps.begin(0)
        outcome = _timed(order, candidates)
        steps.begin(1)
        completed = {title: _completed(each, order) for title, each in candidates.items()}
    outcome = _with_cold_starts(outcome, completed)
    if order.limits:
        steps.begin(2)
        outcome = _held_against_limits(outcome, order, results)
    steps.end()
    path = results / f"{Machine.detect().slug}.jsonl"
    append_results(path, [outcome])
    return outcome, path


def _steps(order: BenchOptions, candidates: Mapping[str, _Candidate]) -> Steps:
    """What is done one after another, and how long each takes about."""
    macs = [int(str(each.subject.get("macs", 0))) * order.batch for each in candidates.values()]
    timing = sum(
        timing_seconds(1, each, warmup=order.procedure.warmup_seconds, samples=order.procedure.samples) for each in macs
    )
    is_control = order.aa or order.inject_slowdown is not None
    cold = sum(each.artifact is not None for each in candidates.values()) if order.cold and not is_control else 0
    return Steps(
        [
            (f"timing {format_count(len(candidates), 'source')}{', interleaved' * (len(candidates) > 1)}", timing),
            ("starting each in a fresh process", COLD_S * cold),
            ("comparing with this machine's limits", LIMITS_S * order.limits),
        ]
    )


def timing_seconds(count: int, macs: int, *, warmup: float, samples: int) -> float:
    """How long it takes, about, to time so many things of so many multiply-adds, interleaved."""
    return count * (warmup + samples * (1e-4 + macs / RUNTIME_MACS_PER_S))


def _must_be_sound(order: BenchOptions) -> None:
    if order.batch < 1:
        raise BadArgument(f"batch must be 1 or more, not {order.batch}")
    if not order.sources:
        raise BadArgument("there is nothing to measure: give artifacts, runs or files of weights")
    if (order.aa or order.inject_slowdown is not None) and len(order.sources) > 1:
        raise BadArgument(
            "a self-test is of one source: give --aa or --inject-slowdown one artifact, run or file of weights"
        )
    if order.aa and order.inject_slowdown is not None:
        raise BadArgument(
            "--aa and --inject-slowdown are two tests: give one of them; the second holds the first in it"
        )
    if order.inject_slowdown is not None and not 0 < order.inject_slowdown <= 10:
        raise BadArgument(
            f"the injected slowdown must lie above 0 and be at most 1000 %, not {100 * order.inject_slowdown:g} %"
        )


def _opened(order: BenchOptions, results: Path, opened: ExitStack) -> dict[str, _Candidate]:
    """What is to be measured, under its title; closed with `opened`."""
    candidates: dict[str, _Candidate] = {}
    missing: list[MissingExtra] = []  # of all sources, to be said at once
    for source in order.sources:
        try:
            predictor = opened.enter_context(
                open_predictor(source, name=order.name, threads=order.procedure.threads, fused=False)
            )
        except MissingExtra as error:
            missing.append(error)
            continue
        check_is_fused(bool(predictor.facts["fused"]), source, order.allow_unfused)
        subject = {**predictor.facts, "batch": order.batch, **saved_accuracy(predictor.facts, results)}
        call = make_timed_call(predictor, order.batch)
        artifact = predictor.session.artifact if isinstance(predictor.session, Session) else None
        candidates[unique_title(predictor.title, candidates)] = _Candidate(
            artifact=artifact, call=call, subject=subject
        )
    if missing:
        raise MissingExtra.from_errors(missing)
    return candidates


def _timed(order: BenchOptions, candidates: dict[str, _Candidate]) -> Measurement | Comparison:
    calls = {title: each.call for title, each in candidates.items()}
    subjects = {title: each.subject for title, each in candidates.items()}
    title = next(iter(calls))
    if order.aa:
        return compare_with_itself(calls[title], order.procedure, {**subjects[title], "name": title})
    if order.inject_slowdown is not None:
        slower = f"{title} made {100 * order.inject_slowdown:g} % slower"
        calls[slower] = with_injected_slowdown(calls[title], order.inject_slowdown, time.perf_counter_ns)
        subjects[slower] = {**subjects[title], "planted": order.inject_slowdown}
    if len(calls) == 1:
        return measure(calls[title], order.procedure, {**subjects[title], "name": title})
    return compare(calls, order.procedure, subjects)


def _completed(candidate: _Candidate, order: BenchOptions) -> _Candidate:
    """Where it is an artifact, its start in a fresh process."""
    seen = None
    if order.aa or order.inject_slowdown is not None:  # a control says something of the machine, not of its subject
        return candidate
    if order.cold and candidate.artifact is not None:
        artifact = candidate.artifact
        arguments = [str(artifact.folder), manifest_sha256(artifact), str(order.procedure.threads), str(order.batch)]
        seen = measure_cold_start("onefold.runtimes.base:open_for_cold_start", arguments)
    return replace(candidate, cold=seen)


def _with_cold_starts(outcome: Measurement | Comparison, completed: dict[str, _Candidate]) -> Measurement | Comparison:
    """The outcome with what was found beside the times."""

    def with_cold_start(measurement: Measurement) -> Measurement:
        candidate = completed.get(str(measurement.subject["name"]))
        return measurement if candidate is None else replace(measurement, cold=candidate.cold)

    return _each(outcome, with_cold_start)


def _held_against_limits(
    outcome: Measurement | Comparison, order: BenchOptions, results: Path
) -> Measurement | Comparison:
    """The outcome with the least times that this machine could take.

    A call quicker than a limit shows that the limit was measured on a busy machine: that one is then measured again.
    """
    threads, beaten = order.procedure.threads, list[str]()
    for attempt in range(1 + _MORE_ATTEMPTS):
        roofline = load_or_measure_roofline(results, [threads], again=attempt > 0, kinds=beaten)
        outcome = _each(outcome, partial(_bounded, roofline=roofline))
        measured = outcome.measurements.values() if isinstance(outcome, Comparison) else [outcome]
        bounds = [each.bound for each in measured if each.beats_roofline]
        beaten = sorted({roofline.binding_kind(bound) for bound in bounds if bound is not None})
        if not beaten:
            break
    return outcome


def _bounded(measurement: Measurement, roofline: Roofline) -> Measurement:
    return replace(measurement, bound=latency_bound(roofline, measurement.subject, measurement.procedure.threads))


def _each(outcome: Measurement | Comparison, change: Callable[[Measurement], Measurement]) -> Measurement | Comparison:
    if isinstance(outcome, Measurement):
        return change(outcome)
    return replace(outcome, measurements={name: change(each) for name, each in outcome.measurements.items()})


def save_accuracy(
    predictor: Predictor,
    data: str,
    top1: float,
    results: Path,
    *,
    count: int | None = None,
    trained_on: int | None = None,
) -> None:
    """Keep the accuracy of what answered on `count` images, so that measurements of the same bytes are shown with it.

    `trained_on` images of the data were trained on.
    """
    path = results / ACCURACY_FILE
    noted: dict[str, object] = {"top1": top1, "top1_on": data} | ({"top1_count": count} if count else {})
    noted |= {"top1_trained_on": trained_on} if trained_on else {}
    with file_lock(path):  # another process may note one too
        known = _accuracies(results)
        known[str(predictor.facts["sha256"])] = noted
        write_sealed_json(path, dict(sorted(known.items())))


def saved_accuracy(facts: Mapping[str, Any], results: Path) -> dict[str, object]:
    """What `save_accuracy` kept of the same bytes; empty where nothing."""
    return _accuracies(results).get(str(facts["sha256"]), {})


def _accuracies(results: Path) -> dict[str, dict[str, object]]:
    path = results / ACCURACY_FILE
    try:
        return {name: noted for name, noted in read_sealed_json(path).items() if isinstance(noted, dict)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadData(f"{path} is damaged ({error}): remove it, and score again") from error


def check_is_fused(fused: bool, source: str, allowed: bool) -> None:
    """Raises BadArgument for a network that is not, unless that is allowed."""
    if not fused and not allowed:
        raise BadArgument(
            f"{source} is not fused, and its time says nothing of the deployed network: `onefold fuse` it first, "
            "or pass --allow-unfused to measure it and have every row say so"
        )


def unique_title(title: str, taken: Collection[str]) -> str:
    """The title, numbered where it is taken: two sources may be of one kind."""
    if title not in taken:
        return title
    number = 2
    while f"{title} #{number}" in taken:
        number += 1
    return f"{title} #{number}"


def make_timed_call(predictor: Predictor, batch: int = 1) -> Callable[[], object]:
    """A call without arguments that answers the next of some made-up inputs, the same for all who take their shape."""
    inputs = list(_drawn((batch, *predictor.facts["input_shape"])))
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return predictor.session(inputs[turn])

    return call


_known: WeakValueDictionary[tuple[int, ...], Floats] = WeakValueDictionary()
"""Inputs by their shape, as long as a call holds them."""


def _drawn(shape: tuple[int, ...]) -> Floats:
    found = _known.get(shape)
    if found is None:
        # A batch is many images already: 64 batches of 256 at 224 px would be 10 GB, and four of them differ as well.
        count = max(4, _DISTINCT // shape[0])
        found = _known[shape] = np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)
    return found


# Bytes of a parameter in the network that runs.
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def load_or_measure_roofline(
    results: Path, threads: Sequence[int], *, again: bool = False, kinds: Sequence[str] = ()
) -> Roofline:
    """The machine's limits with these numbers of threads: from the file, or measured in seconds each, and kept there.

    `again` measures in any case, of these `kinds` of limits alone where some are given; of two rates for one thing the
    quicker stays, for others' work only slows.
    """
    machine = Machine.detect(packages=())
    path = results / f"{machine.slug}{ROOFLINE_SUFFIX}"
    known = _read(path)
    if known is None or known.features != machine.features:
        known = Roofline(limits=(), features=machine.features)
    wanted = [number for number in threads if again or number not in known.threads]
    if wanted:
        fresh = measure_roofline(wanted, kinds) if again and kinds else measure_roofline(wanted)
        known = (replace(known, notes=()) if again and not kinds else known).merged(fresh)
        write_sealed_json(path, known.to_dict())
    return known


def latency_bound(roofline: Roofline, subject: Mapping[str, Any], threads: int) -> LatencyBound | None:
    """The least time of one call of a subject; None where its multiply-adds or its precision are not known."""
    size = _BYTES.get(str(subject["precision"]).split("-")[0])
    if size is None or "macs" not in subject or "params" not in subject:
        return None
    batch, (channels, height, width) = subject.get("batch", 1), subject["input_shape"]
    num_bytes = size * subject["params"] + 4 * batch * channels * height * width
    work = Workload(macs=batch * subject["macs"], num_bytes=num_bytes, precision=subject["precision"], threads=threads)
    return roofline.latency_bound(work)


def _read(path: Path) -> Roofline | None:
    try:
        return Roofline.from_dict(read_sealed_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be read (%s): the machine's limits are measured again", path, error)
        return None
