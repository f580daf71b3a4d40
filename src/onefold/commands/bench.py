"""artifact -> results/<machine>.jsonl: how fast things answer, measured side by side in one run."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from onefold.bench import (
    Bound,
    ColdStart,
    Comparison,
    Machine,
    Measurement,
    Procedure,
    Roofline,
    Work,
    append,
    compare,
    measure,
    measure_cold_start,
    measure_roofline,
    pinned,
    planted,
    self_test,
)
from onefold.commands.open_network import Floats, Predictor, facts_of, open_predictor
from onefold.errors import BadArgument, BadData, GateFailed, MissingExtra
from onefold.phone import PROGRAMS, Adb, Load, Plan, Program, connect, look, measure_on, program_of
from onefold.phone.adb import FOLDER
from onefold.phone.benchmark import place_of
from onefold.runtimes import open_artifact
from onefold.runtimes.artifact import REFERENCE, Artifact, is_artifact, read_files
from onefold.runtimes.exporter import TOLERANCES
from onefold.runtimes.reference_logits import read_reference, relative_difference
from onefold.storage import locked, write_text

ACCURACY = "accuracy.json"
"""In a folder of results: top-1 of what was evaluated, by its digest."""

_MORE_ATTEMPTS = 3

DISTINCT = 64
"""Different inputs that a measurement cycles through, so that nothing can be remembered from call to call."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure: artifacts or weights, and how. `batch` images a call.

    A network that is not fused is refused unless `allow_unfused`, and then labelled in every row. `cold` has every
    artifact started in a fresh process too. `pin` names the processors to use. Two controls, each of one source: `aa`
    measures it against itself, `plant` against itself made slower by a share (0.02: 2 %).
    """

    sources: Sequence[str]
    procedure: Procedure
    batch: int = 1
    allow_unfused: bool = False
    name: str | None = None
    cold: bool = True
    pin: tuple[int, ...] | None = None
    aa: bool = False
    plant: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """One thing to measure: `cold` is filled in once it was."""

    source: str
    call: Callable[[], object]
    subject: dict[str, object]
    cold: ColdStart | None = None


def bench(order: BenchOptions, results: Path) -> tuple[Measurement | Comparison, Path]:
    """Measure one source, or several interleaved against the first; appends to `results`/<machine>.jsonl."""
    _must_be_sound(order)
    with pinned(order.pin), ExitStack() as opened:
        candidates = _opened(order, results, opened)
        outcome = _timed(order, candidates)
        completed = {title: _completed(each, order) for title, each in candidates.items()}
    outcome = _held_against_limits(_with_cold_starts(outcome, completed), order, results)
    path = results / f"{Machine.this().slug}.jsonl"
    append(path, [outcome])
    return outcome, path


def _must_be_sound(order: BenchOptions) -> None:
    if order.batch < 1:
        raise BadArgument(f"batch must be 1 or more, not {order.batch}")
    if not order.sources:
        raise BadArgument("there is nothing to measure: give artifacts, runs or files of weights")
    if (order.aa or order.plant is not None) and len(order.sources) > 1:
        raise BadArgument("a self-test is of one source: give --aa or --plant one artifact, run or file of weights")
    if order.aa and order.plant is not None:
        raise BadArgument("--aa and --plant are two tests: give one of them; the second holds the first in it")
    if order.plant is not None and not 0 < order.plant <= 10:
        raise BadArgument(f"the slowdown to plant must lie above 0 and be at most 1000 %, not {100 * order.plant:g} %")


def _opened(order: BenchOptions, results: Path, opened: ExitStack) -> dict[str, _Candidate]:
    """What is to be measured, under its title; closed with `opened`."""
    candidates: dict[str, _Candidate] = {}
    for source in order.sources:
        predictor = opened.enter_context(
            open_predictor(source, name=order.name, threads=order.procedure.threads, fused=False)
        )
        refuse_unfused(bool(predictor.facts["fused"]), source, order.allow_unfused)
        subject = {**predictor.facts, "batch": order.batch, **known_accuracy(predictor.facts, results)}
        call = call_of(predictor, order.batch)
        candidates[free_title(predictor.title, candidates)] = _Candidate(source=source, call=call, subject=subject)
    return candidates


def _timed(order: BenchOptions, candidates: dict[str, _Candidate]) -> Measurement | Comparison:
    calls = {title: each.call for title, each in candidates.items()}
    subjects = {title: each.subject for title, each in candidates.items()}
    title = next(iter(calls))
    if order.aa:
        return self_test(calls[title], order.procedure, {**subjects[title], "name": title})
    if order.plant is not None:
        slower = f"{title} made {100 * order.plant:g} % slower"
        calls[slower] = planted(calls[title], order.plant, time.perf_counter_ns)
        subjects[slower] = {**subjects[title], "planted": order.plant}
    if len(calls) == 1:
        return measure(calls[title], order.procedure, {**subjects[title], "name": title})
    return compare(calls, order.procedure, subjects)


def _completed(candidate: _Candidate, order: BenchOptions) -> _Candidate:
    """Where it is an artifact, its start in a fresh process."""
    seen = None
    if order.aa or order.plant is not None:  # a control says something of the machine, not of its subject
        return candidate
    if order.cold and is_artifact(Path(candidate.source)):
        arguments = [candidate.source, str(order.procedure.threads), str(order.batch)]
        seen = measure_cold_start("onefold.runtimes.base:first_call", arguments)
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

    A call quicker than a limit shows that the limit was measured on a busy machine: it is then measured again.
    """
    threads = order.procedure.threads
    for attempt in range(1 + _MORE_ATTEMPTS):
        held_against = partial(_bounded, roofline=measured_limits(results, [threads], again=attempt > 0))
        outcome = _each(outcome, held_against)
        measured = outcome.measurements.values() if isinstance(outcome, Comparison) else [outcome]
        if not any(each.beats_limit for each in measured):
            break
    return outcome


def _bounded(measurement: Measurement, roofline: Roofline) -> Measurement:
    return replace(measurement, bound=bound(roofline, measurement.subject, measurement.procedure.threads))


def _each(outcome: Measurement | Comparison, change: Callable[[Measurement], Measurement]) -> Measurement | Comparison:
    if isinstance(outcome, Measurement):
        return change(outcome)
    return replace(outcome, measurements={name: change(each) for name, each in outcome.measurements.items()})


def note_accuracy(
    predictor: Predictor, data: str, top1: float, results: Path, *, trained_on: int | None = None
) -> None:
    """Keep the accuracy of what answered, so that measurements of the same bytes can be shown with it.

    `trained_on` images of the data were trained on.
    """
    path = results / ACCURACY
    noted: dict[str, object] = {"top1": top1, "top1_on": data}
    noted |= {"top1_trained_on": trained_on} if trained_on else {}
    with locked(path):  # another process may note one too
        known = _accuracies(results)
        known[str(predictor.facts["sha256"])] = noted
        write_text(path, json.dumps(known, indent=1, sort_keys=True) + "\n")


def known_accuracy(facts: Mapping[str, Any], results: Path) -> dict[str, object]:
    """What `note_accuracy` kept of the same bytes; empty where nothing."""
    return _accuracies(results).get(str(facts["sha256"]), {})


def _accuracies(results: Path) -> dict[str, dict[str, object]]:
    path = results / ACCURACY
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadData(f"{path} is damaged ({error}): remove it, and score again") from error
    return known if isinstance(known, dict) else {}


def refuse_unfused(fused: bool, source: str, allowed: bool) -> None:
    """Raises BadArgument for a network that is not, unless that is allowed."""
    if not fused and not allowed:
        raise BadArgument(
            f"{source} is not fused, and its time says nothing of the deployed network: `onefold fuse` it first, "
            "or pass --allow-unfused to measure it and have every row say so"
        )


def free_title(title: str, taken: Collection[str]) -> str:
    """The title, numbered where it is taken: two sources may be of one kind."""
    if title not in taken:
        return title
    number = 2
    while f"{title} #{number}" in taken:
        number += 1
    return f"{title} #{number}"


def call_of(predictor: Predictor, batch: int = 1) -> Callable[[], object]:
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
        count = max(4, DISTINCT // shape[0])
        found = _known[shape] = np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)
    return found


# Bytes of a parameter in the network that runs.
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def measured_limits(results: Path, threads: Sequence[int], *, again: bool = False) -> Roofline:
    """The machine's limits with these numbers of threads: from the file, or measured, two seconds each, and kept there.

    `again` measures in any case; of two rates for one thing the quicker stays, for others' work only slows.
    """
    machine = Machine.this(packages=())
    path = results / f"{machine.slug}-roofline.json"
    known = _read(path)
    if known is None or known.features != machine.features:
        known = Roofline(limits=(), features=machine.features)
    wanted = [number for number in threads if again or number not in known.threads]
    if wanted:
        fresh = measure_roofline(wanted)
        known = (replace(known, notes=()) if again else known).merged(fresh)
        write_text(path, json.dumps(known.to_dict(), indent=1) + "\n")
    return known


def bound(roofline: Roofline, subject: Mapping[str, Any], threads: int) -> Bound | None:
    """The least time of one call of a subject; None where its multiply-adds or its precision are not known."""
    size = _BYTES.get(str(subject["precision"]).split("-")[0])
    if size is None or "macs" not in subject or "params" not in subject:
        return None
    batch, (channels, height, width) = subject.get("batch", 1), subject["input_shape"]
    num_bytes = size * subject["params"] + 4 * batch * channels * height * width
    work = Work(macs=batch * subject["macs"], num_bytes=num_bytes, precision=subject["precision"], threads=threads)
    return roofline.bound(work)


def _read(path: Path) -> Roofline | None:
    try:
        return Roofline.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


_PROGRAM_MODE = "755"


@dataclass(frozen=True, kw_only=True)
class PhoneBenchOptions:
    """What to measure on which phone, and how; `programs` are local files: vendors' programs, and their libraries."""

    sources: Sequence[str]
    serial: str | None = None
    programs: Sequence[Path] = ()
    allow_unfused: bool = False
    plan: Plan = field(default_factory=Plan)


def bench_on_phone(order: PhoneBenchOptions, results: Path) -> tuple[Measurement | Comparison, Path]:
    """Measure artifacts on a phone; appends to `results`/<phone>.jsonl. Raises what adb and phone cause."""
    if not order.sources:
        raise BadArgument("there is nothing to measure: give artifacts, as `onefold export` makes them")
    artifacts = [open_artifact(source) for source in order.sources]
    programs = [program_of(artifact.runtime) for artifact in artifacts]
    given = _given(order.programs)
    adb = connect(order.serial)
    phone = look(adb)
    if phone.is_emulator:
        raise BadArgument(f"{adb.serial} is an emulator, and its times say nothing of any phone: connect a phone")
    builds = _send_programs(adb, programs, given)
    with tempfile.TemporaryDirectory() as folder:
        loads: list[Load] = []
        for number, (artifact, program) in enumerate(zip(artifacts, programs, strict=True)):
            refuse_unfused(artifact.fused, str(artifact.folder), order.allow_unfused)
            title = free_title(artifact.title, {load.title for load in loads})
            facts = {**facts_of(artifact), "batch": 1, "program": f"{program.name} {builds[program.name]}"}
            subject = {**facts, **known_accuracy(facts, results)}
            loads.append(_load(artifact, program, (title, subject), Path(folder) / f"{number}.bin"))
            _send(adb, loads[-1])
        outcome = measure_on(adb, phone, loads, order.plan)
    path = results / f"{phone.machine(range(phone.cores)).slug}.jsonl"
    append(path, [outcome])
    return outcome, path


def _load(artifact: Artifact, program: Program, named: tuple[str, dict[str, object]], image: Path) -> Load:
    """What is measured of an artifact; its first reference image is written to `image` as the program reads it."""
    content = read_files(artifact)
    reference = read_reference(content[REFERENCE], artifact.input_shape, artifact.num_classes)
    first = reference.images[0]
    image.write_bytes(np.ascontiguousarray(first if program.order == "CHW" else first.transpose(1, 2, 0)).tobytes())
    title, subject = named
    return Load(
        title=title,
        subject=subject,
        program=program,
        model=artifact.folder / program.file,
        sha256=artifact.files[program.file].sha256,
        image=image,
        image_sha256=hashlib.sha256(image.read_bytes()).hexdigest(),
        shape=artifact.input_shape,
        precision=artifact.precision,
        check=_check(artifact, reference.logits[:1]),
    )


def _check(artifact: Artifact, logits: Floats) -> Callable[[bytes], None]:
    """Whether a phone's answer is the one that the artifact promises. Raises GateFailed."""
    exported = math.inf if artifact.parity is None else artifact.parity.tolerance
    allowed = min(exported, TOLERANCES[artifact.precision])

    def check(answer: bytes) -> None:
        if len(answer) != 4 * logits.size:
            raise GateFailed(
                f"{artifact.folder} answers on the phone with {len(answer)} bytes: expected {4 * logits.size}, "
                f"{logits.size} logits in float32"
            )
        distance = relative_difference(np.frombuffer(answer, "<f4").reshape(logits.shape), logits)
        if not distance <= allowed:
            raise GateFailed(
                f"{artifact.folder} does not answer on the phone as it promises: its logits differ from the reference "
                f"by {distance:.2g} of the largest, {allowed:.2g} is allowed; nothing was measured"
            )

    return check


def _send(adb: Adb, load: Load) -> None:
    place = place_of(load)
    adb.push(load.model, f"{place}/{load.program.file}", load.sha256)
    adb.push(load.image, f"{place}/image.bin", load.image_sha256)


def _given(files: Sequence[Path]) -> dict[str, Path]:
    """Vendors' programs by the name they have on the phone, and libraries by their own."""
    found = {}
    for file in files:
        if not file.is_file():
            raise BadArgument(f"there is no program {file}: give the vendor's, built for the phone (docs/phones.md)")
        known = next((each.name for each in PROGRAMS.values() if file.name.endswith(each.name)), None)
        if known is None and re.search(r"\.so(\.\d+)*$", file.name) is None:
            names = ", ".join(each.name for each in PROGRAMS.values())
            raise BadArgument(f"{file.name} is none of {names}, and no library (.so): name the file as its vendor does")
        found[known or file.name] = file
    return found


def _send_programs(adb: Adb, programs: Sequence[Program], given: dict[str, Path]) -> dict[str, str]:
    """Put what was given on the phone; the build of every program that is needed, by its hash. Raises MissingExtra."""
    builds = {}
    for name, file in given.items():
        adb.push(file, f"{FOLDER}/{name}", hashlib.sha256(file.read_bytes()).hexdigest())
        adb.shell(["chmod", _PROGRAM_MODE, f"{FOLDER}/{name}"])
    for program in dict.fromkeys(each.name for each in programs):
        if adb.shell(["test", "-x", f"{FOLDER}/{program}"]).status != 0:
            raise MissingExtra(
                f"{program} is not on the phone at {FOLDER}: build it for Android, or download it from its vendor "
                "(docs/phones.md), and give it with --program PATH"
            )
        builds[program] = (adb.hash_of(f"{FOLDER}/{program}") or "of unknown build")[:12]
    return builds
