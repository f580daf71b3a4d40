"""Artifacts and the vendors' programs on a phone, each run once a round, in an order drawn anew.

A round starts every artifact's program once, with a rest before each; the first artifact, the baseline, is run twice,
as in `bench.compare`. Nothing is measured while the phone is warm: it is given time to cool, and where that does
not help the figures say so."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onefold.bench import Comparison, Machine, Measurement, Procedure, TimingNoise
from onefold.bench.measurement import random_orders
from onefold.errors import BadArgument, DeviceFailed, GateFailed
from onefold.phone.adb import PHONE_FOLDER, Adb
from onefold.phone.device import THERMAL_STATUS, PhoneCondition, PhoneInfo, read_condition, read_thermal_status
from onefold.phone.programs import BenchmarkProgram, ProgramCall, ProgramTimes

_LONGEST_RUN_S = 900.0
_COOLING_STEP_S = 10.0
_LONGEST_COOLING_S = 300.0
_FEWEST_ROUNDS = 5
_SIGNALS = {
    129: "hung up",
    134: "aborted",
    135: "bus error",
    137: "killed, perhaps for memory",
    139: "crashed",
    143: "ended",
}


@dataclass(frozen=True, kw_only=True)
class PhoneArtifact:
    """An artifact to be measured: its file, its name and facts, and the bytes of the first reference image.

    `check` is given the bytes of the phone's answer and raises where it is not the one that was promised.
    """

    title: str
    subject: Mapping[str, Any]
    program: BenchmarkProgram
    model: Path
    sha256: str
    image: Path
    image_sha256: str
    shape: tuple[int, int, int]
    precision: str
    check: Callable[[bytes], None]


@dataclass(frozen=True, kw_only=True)
class PhoneBenchPlan:
    """How to measure: processes an artifact, runs in each, its warm-up, rests in seconds, which cores.

    `anyway` measures a phone that is hot, low or saving too, and says so.
    """

    rounds: int = 20
    runs: int = 20
    warmup: int = 5
    rest_s: float = 2.0
    threads: int = 1
    cores: str = "big"
    seed: int = 0
    anyway: bool = False
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("runs", 2), ("warmup", 1), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise BadArgument(f"{name} must be {least} or more, not {getattr(self, name)}")
        if not 0 <= self.rest_s <= 600:
            raise BadArgument(f"rest must be from 0 to 600 seconds, not {self.rest_s}")


def benchmark_artifacts(
    adb: Adb, phone: PhoneInfo, loads: Sequence[PhoneArtifact], plan: PhoneBenchPlan
) -> Measurement | Comparison:
    """Measure artifacts whose programs and files are on the phone: one, or several against the first.

    Raises GateFailed where the phone is not fit or an answer is wrong, DeviceFailed where a program fails.
    """
    if len(loads) > 1 and plan.rounds < _FEWEST_ROUNDS:
        raise BadArgument(f"a comparison needs {_FEWEST_ROUNDS} rounds or more, not {plan.rounds}")
    cores = phone.cpu_mask(plan.cores, plan.threads)
    before = read_condition(adb)
    _must_be_fit(before, plan)
    runner = _Runner(adb=adb, plan=plan, mask=_mask(adb, phone, cores))
    proofs = [runner.prove(load) for load in loads]
    times, heats = runner.series(loads)
    remarks = _remarks(before, read_condition(adb), heats)
    parts = [
        {**load.subject, "name": load.title, "answer": proof, "cores": plan.cores, "condition": asdict(before)}
        for load, proof in zip(loads, proofs, strict=True)
    ]
    measured = _Result(plan=plan, machine=phone.machine(cores), noise=TimingNoise(remarks=remarks))
    return measured.of(parts, times)


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """Runs programs on the phone, on some of its cores."""

    adb: Adb
    plan: PhoneBenchPlan
    mask: tuple[str, ...]

    def series(self, loads: Sequence[PhoneArtifact]) -> tuple[list[list[ProgramTimes]], list[int]]:
        """Every process's times, artifact by artifact and the baseline's twin last; the heat before each round."""
        runs = [*loads, loads[0]] if len(loads) > 1 else list(loads)
        order = random_orders(len(runs), random.Random(self.plan.seed))
        times: list[list[ProgramTimes]] = [[] for _ in runs]
        heats = []
        for _ in range(self.plan.rounds):
            heats.append(self._cool())
            for which in next(order):
                self.plan.sleep(self.plan.rest_s)
                times[which].append(self.time(runs[which]))
        return times, heats

    def time(self, load: PhoneArtifact) -> ProgramTimes:
        """One process of a program."""
        call = self._call(load)
        program = load.program
        if program.tells:
            self.adb.shell(["rm", "-f", call.times])
        since = self.adb.shell_output("date", "+%Y-%m-%d %H:%M:%S.000").strip() if program.log else ""
        text = self._run(program.command(call), program)
        if program.tells:
            text = (self.adb.read(call.times) or b"").decode("utf-8", "replace")
        elif program.log is not None and program.log.sign not in text:
            text += self.adb.shell_output("logcat", "-d", "-v", "raw", "-T", since, f"{program.log.tag}:I", "*:S")
        return program.parse(text, call)

    def prove(self, load: PhoneArtifact) -> str:
        """Have the phone answer the first reference image, and compare; what can be said of its answer."""
        program = load.program
        if load.precision not in program.proves:
            return f"not checked on the phone: {program.name} cannot be asked for it"
        call = self._call(load)
        self.adb.shell(["rm", "-f", call.answer])
        with suppress(DeviceFailed):  # an older program does not know how to be asked; what fails for more, fails again
            self._run(program.proof(call), program)
        answer = self.adb.read(call.answer)
        if answer is None:
            return f"not checked on the phone: this {program.name} does not write it"
        load.check(answer)
        return "checked on the phone"

    def _call(self, load: PhoneArtifact) -> ProgramCall:
        folder = phone_path(load)
        return ProgramCall(
            program=f"{PHONE_FOLDER}/{load.program.name}",
            model=f"{folder}/{load.program.file}",
            image=f"{folder}/image.bin",
            answer=f"{folder}/answer-0.bin",
            times=f"{folder}/times.csv",
            shape=load.shape,
            threads=self.plan.threads,
            warmup=self.plan.warmup,
            runs=self.plan.runs,
        )

    def _run(self, command: Sequence[str], program: BenchmarkProgram) -> str:
        """Both outputs of a program that succeeded."""
        surrounded = ["env", f"LD_LIBRARY_PATH={PHONE_FOLDER}", *self.mask, *command]
        ran = self.adb.shell(surrounded, timeout_s=_LONGEST_RUN_S)
        if ran.status in (126, 127):
            raise DeviceFailed(
                f"{program.name} cannot be started on the phone ({ran.last_words}): build it for the phone's "
                "processor, and give the libraries that it needs with --program too"
            )
        if ran.status != 0:
            why = _SIGNALS.get(ran.status, f"status {ran.status}")
            raise DeviceFailed(f"{program.name} failed on the phone ({why}): {ran.last_words}")
        return f"{ran.output}\n{ran.errors}"

    def _cool(self) -> int:
        """Wait until the phone is no longer warm, or for five minutes; its heat then."""
        waited = 0.0
        while True:
            heat = read_thermal_status(self.adb) or 0
            if heat == 0 or waited >= _LONGEST_COOLING_S:
                return heat
            self.plan.sleep(_COOLING_STEP_S)
            waited += _COOLING_STEP_S


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What all measurements of a run have in common."""

    plan: PhoneBenchPlan
    machine: Machine
    noise: TimingNoise

    def of(self, subjects: Sequence[Mapping[str, Any]], times: list[list[ProgramTimes]]) -> Measurement | Comparison:
        """One measurement, or a comparison of several; `times` ends with the baseline's twin then."""
        if len({(each.calls_per_sample, len(each.samples_ns)) for series in times for each in series}) > 1:
            times = [[_summed(each) for each in series] for series in times]  # a sample of each is a process's sum
        if len(times) == 1:
            return self._measurement(subjects[0], times[0])
        *measured, twin = times
        named = {
            str(subject["name"]): self._measurement(subject, series)
            for subject, series in zip(subjects, measured, strict=True)
        }
        return Comparison(measurements=named, twin=self._measurement(subjects[0], twin))

    def _measurement(self, subject: Mapping[str, Any], series: Sequence[ProgramTimes]) -> Measurement:
        plan = self.plan
        samples = tuple(ns for each in series for ns in each.samples_ns)
        procedure = Procedure(
            warmup_calls=plan.warmup,
            warmup_seconds=0.0,
            lead_calls=0,  # each sample is one of a program's own run
            samples=len(samples),
            threads=plan.threads,
            seed=plan.seed,
        )
        return Measurement(
            subject=subject,
            machine=self.machine,
            procedure=procedure,
            samples_ns=samples,
            calls_per_sample=series[0].calls_per_sample,
            warmup_ns=tuple(ns for each in series for ns in each.warmup_ns)[:50],
            resolution_ns=1000,
            overhead_ns=0,
            noise=self.noise,
        )


def phone_path(load: PhoneArtifact) -> str:
    """The folder of an artifact on the phone: nothing that a user wrote is in its name."""
    return f"{PHONE_FOLDER}/{load.sha256[:16]}"


def _summed(times: ProgramTimes) -> ProgramTimes:
    return ProgramTimes(
        samples_ns=(sum(times.samples_ns),),
        warmup_ns=times.warmup_ns[:1],
        calls_per_sample=times.calls_per_sample * len(times.samples_ns),
    )


def _must_be_fit(now: PhoneCondition, plan: PhoneBenchPlan) -> None:
    if now.refusals and not plan.anyway:
        raise GateFailed(
            f"the phone is not fit to be measured: {'; '.join(now.refusals)}; let it cool or charge, or pass --anyway "
            "to measure it and have every row say so"
        )


def _mask(adb: Adb, phone: PhoneInfo, cores: Sequence[int]) -> tuple[str, ...]:
    """What binds a program to these cores; nothing where that is all of them."""
    if len(cores) == phone.cores:
        return ()
    bits = f"{sum(1 << core for core in cores):x}"
    if adb.shell(["taskset", bits, "true"]).status != 0:
        raise DeviceFailed("this phone cannot bind a program to some of its cores (taskset): give --cores all")
    return ("taskset", bits)


def _remarks(before: PhoneCondition, after: PhoneCondition, heats: Sequence[int]) -> tuple[str, ...]:
    """What both looks say, once; and where it grew hot meanwhile."""
    hottest = max((*heats, after.heat or 0))
    found = [*before.remarks, *after.remarks]
    if hottest > (before.heat or 0):
        where = next((f"round {at}" for at, heat in enumerate(heats, 1) if heat == hottest), "the end")
        found.append(f"The phone grew hot meanwhile: thermal status {THERMAL_STATUS[min(hottest, 6)]} at {where}.")
    return tuple(dict.fromkeys(found))
