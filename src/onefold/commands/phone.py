"""artifact -> results/<phone>.jsonl: latencies on an Android phone, by the runtimes' own programs over adb."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onefold.bench import Comparison, Measurement, append_results
from onefold.commands.bench import check_is_fused, saved_accuracy, unique_title
from onefold.commands.predictor import Floats, artifact_facts
from onefold.errors import BadArgument, GateFailed, MissingExtra
from onefold.phone import (
    PROGRAMS,
    Adb,
    BenchmarkProgram,
    PhoneArtifact,
    PhoneBenchPlan,
    benchmark_artifacts,
    connect,
    find_program,
    read_phone_info,
)
from onefold.phone.adb import PHONE_FOLDER
from onefold.phone.benchmark import phone_path
from onefold.runtimes import open_artifact
from onefold.runtimes.artifact import REFERENCE_FILE, Artifact, read_files
from onefold.runtimes.exporter import tolerance_of
from onefold.runtimes.reference_logits import read_reference, relative_difference

_PROGRAM_MODE = "755"


@dataclass(frozen=True, kw_only=True)
class PhoneBenchOptions:
    """What to measure on which phone, and how; `programs` are local files: vendors' programs, and their libraries."""

    sources: Sequence[str]
    serial: str | None = None
    programs: Sequence[Path] = ()
    allow_unfused: bool = False
    plan: PhoneBenchPlan = field(default_factory=PhoneBenchPlan)


def bench_on_phone(order: PhoneBenchOptions, results: Path) -> tuple[Measurement | Comparison, Path]:
    """Measure artifacts on a phone; appends to `results`/<phone>.jsonl. Raises what adb and phone cause."""
    if not order.sources:
        raise BadArgument("there is nothing to measure: give artifacts, as `onefold export` makes them")
    artifacts = [open_artifact(source) for source in order.sources]
    programs = [find_program(artifact.runtime) for artifact in artifacts]
    given = _given(order.programs)
    adb = connect(order.serial)
    phone = read_phone_info(adb)
    if phone.is_emulator:
        raise BadArgument(f"{adb.serial} is an emulator, and its times say nothing of any phone: connect a phone")
    builds = _send_programs(adb, programs, given)
    with tempfile.TemporaryDirectory() as folder:
        loads: list[PhoneArtifact] = []
        for number, (artifact, program) in enumerate(zip(artifacts, programs, strict=True)):
            check_is_fused(artifact.fused, str(artifact.folder), order.allow_unfused)
            title = unique_title(artifact.title, {load.title for load in loads})
            facts = {**artifact_facts(artifact), "batch": 1, "program": f"{program.name} {builds[program.name]}"}
            subject = {**facts, **saved_accuracy(facts, results)}
            loads.append(_load(artifact, program, (title, subject), Path(folder) / f"{number}.bin"))
            _send(adb, loads[-1])
        outcome = benchmark_artifacts(adb, phone, loads, order.plan)
    path = results / f"{phone.machine(range(phone.cores)).slug}.jsonl"
    append_results(path, [outcome])
    return outcome, path


def _load(
    artifact: Artifact, program: BenchmarkProgram, named: tuple[str, dict[str, object]], image: Path
) -> PhoneArtifact:
    """What is measured of an artifact; its first reference image is written to `image` as the program reads it."""
    content = read_files(artifact)
    reference = read_reference(content[REFERENCE_FILE], artifact.input_shape, artifact.num_classes)
    first = reference.images[0]
    image.write_bytes(np.ascontiguousarray(first if program.order == "CHW" else first.transpose(1, 2, 0)).tobytes())
    title, subject = named
    return PhoneArtifact(
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
    allowed = tolerance_of(artifact)

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


def _send(adb: Adb, load: PhoneArtifact) -> None:
    place = phone_path(load)
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


def _send_programs(adb: Adb, programs: Sequence[BenchmarkProgram], given: dict[str, Path]) -> dict[str, str]:
    """Put what was given on the phone; the build of every program that is needed, by its hash. Raises MissingExtra."""
    builds = {}
    for name, file in given.items():
        adb.push(file, f"{PHONE_FOLDER}/{name}", hashlib.sha256(file.read_bytes()).hexdigest())
        adb.shell(["chmod", _PROGRAM_MODE, f"{PHONE_FOLDER}/{name}"])
    for program in dict.fromkeys(each.name for each in programs):
        if adb.shell(["test", "-x", f"{PHONE_FOLDER}/{program}"]).status != 0:
            raise MissingExtra(
                f"{program} is not on the phone at {PHONE_FOLDER}: build it for Android, or download it from its "
                "vendor (docs/phones.md), and give it with --program PATH"
            )
        builds[program] = (adb.remote_sha256(f"{PHONE_FOLDER}/{program}") or "of unknown build")[:12]
    return builds
