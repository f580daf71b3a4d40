"""What to deploy, and what came of it: a verdict an artifact, the gates, and the README.md that says which to take."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onefold.accuracy_intervals import drop_interval
from onefold.bench import Measurement, Procedure
from onefold.checksums import write_sealed_json
from onefold.commands.calibration_cache import CalibrationOptions
from onefold.commands.held_out_images import DeploymentPhotos
from onefold.commands.open_network import Network
from onefold.commands.predictor import Predictor
from onefold.errors import BadArgument, GateFailed
from onefold.quantize import QuantizationMethod
from onefold.report import GATES_FILE
from onefold.report.format import format_count
from onefold.runtimes import Artifact
from onefold.runtimes.exporter import RANDOM_WEIGHTS_NOTE

_log = logging.getLogger("onefold")

_QUICK_CALIBRATE, QUICK_MAX_SCORED, _QUICK_SAMPLES = 64, 128, 50
WARMUP_S, _QUICK_WARMUP_S = 0.5, 0.2  # of each artifact, before it is timed
QUICK_NOTE = (
    f"quick: at most {_QUICK_CALIBRATE} photos calibrate, {QUICK_MAX_SCORED} are scored and {_QUICK_SAMPLES} calls are "
    "timed, so that accuracies and latencies are less certain; left out are the search for a method of calibration "
    "(the default one is taken), cold starts and the limits of this machine"
)
_ONE_MAY_BE_LOST = range(10, 100)  # photos: one of them is more than 1 point, and at most 10


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """What to deploy to: runtimes and precisions by name, and the photos.

    `data` calibrates int8: a folder of photos, or class folders, or one with train/ and val/, or "digits". `val` is
    what to score on; without it the part of `data` that was not trained on, and where that has no labels the answers
    are compared with the float network's. No photo that calibrates is scored. `max_drop` is in percent points of
    top-1, against the float network in PyTorch; of 10 to 99 photos one may be lost where it is more than that, and
    `max_drop` not 0. With `exact_fp32` a 32-bit artifact fails its gate by a single answer
    that is not the network's. Without `timed` no latency is measured; `procedure` then says only on how many threads.
    With `quick` at most 64 photos calibrate, by `calibration.method`, 128 are scored and 50 calls timed; no method is
    searched for, and neither cold starts nor the machine's limits are measured. After `minutes` nothing more is begun
    but the texts: methods of calibration, artifacts but the first, scores and times are left out, and named.
    """

    runtimes: Sequence[str]
    precisions: Sequence[str]
    calibration: CalibrationOptions
    val: str | None = None
    max_drop: float = 1.0
    exact_fp32: bool = False
    size: int | None = None
    procedure: Procedure = field(default_factory=lambda: Procedure(samples=200, warmup_seconds=WARMUP_S))
    timed: bool = True
    quick: bool = False
    minutes: float | None = None

    def __post_init__(self) -> None:
        if not self.max_drop >= 0:  # NaN neither
            raise BadArgument(f"max_drop is {self.max_drop:g}, expected 0 or more points")
        if "int8" not in self.precisions and (
            self.calibration.skip_layers or self.calibration.method != QuantizationMethod()
        ):
            raise BadArgument("--weight-bits, --per-tensor and --skip-layers are of int8: give --int8 too")
        if self.minutes is not None and not self.minutes > 0:
            raise BadArgument(f"minutes must be more than 0, not {self.minutes:g}")

    def with_quick_limits(self) -> DeployOptions:
        """The same; where it is quick, with no more photos to calibrate with and timed calls, and no search."""
        if not self.quick:
            return self
        calibration = replace(self.calibration, count=min(self.calibration.count, _QUICK_CALIBRATE), search=False)
        procedure = replace(
            self.procedure,
            samples=min(self.procedure.samples, _QUICK_SAMPLES),
            warmup_seconds=min(self.procedure.warmup_seconds, _QUICK_WARMUP_S),
        )
        return replace(self, calibration=calibration, procedure=procedure)


@dataclass(frozen=True, kw_only=True)
class ArtifactResult:
    """What came of one artifact: `top1` in percent, None without labels; `changed` answers of `count`; its latency.

    `lost` photos were right in PyTorch and are wrong in it, `won` the other way round; without labels all that changed
    are lost. `drop` is in points of top-1, or in percent of the answers.
    """

    name: str
    artifact: Artifact
    top1: float | None
    changed: int
    count: int
    lost: int
    won: int
    measurement: Measurement | None = None

    @property
    def drop(self) -> float:
        """What was lost, less what was won, in percent of the photos."""
        return 100 * (self.lost - self.won) / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the drop on all photos of the kind."""
        return drop_interval(self.lost, self.won, self.count)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A check that an artifact must pass before it is shipped, and in one sentence what was measured and is allowed.

    `has_too_few` is whether it was scored on too few photos to tell what was lost from what may be; `by_one_photo`
    whether it passed though it lost more, for that was one photo.
    """

    name: str
    kind: Literal["fusing", "parity", "accuracy"]
    passed: bool
    sentence: str
    has_too_few: bool = False
    by_one_photo: bool = False


@dataclass(frozen=True, kw_only=True)
class DeployResult:
    """The folder, a verdict for each artifact that was scored, and the gates; `top1` of the float network in PyTorch.

    An artifact whose export failed its parity gate is not in the folder. `data` names what was scored on; `notes` say
    how the deployment was cut short, in images, samples or time.
    """

    folder: Path
    network: Network
    verdicts: tuple[ArtifactResult, ...]
    gates: tuple[Gate, ...]
    top1: float | None
    data: str
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> list[Gate]:
        """The gates that did not hold."""
        return [gate for gate in self.gates if not gate.passed]

    @property
    def recommendation(self) -> str:
        """Which artifact to take: the fastest on this machine of those that passed, and by how much."""
        failed = {gate.name for gate in self.failed}
        times = {each.name: each.measurement.median_ns / 1e6 for each in self.verdicts if each.measurement is not None}
        passed = sorted((ms, name) for name, ms in times.items() if name not in failed)
        if not passed:
            return "No artifact here was both timed and good enough to be recommended."
        (best, name), others = passed[0], [f"{other} {ms / passed[0][0]:.2f} times as long" for ms, other in passed[1:]]
        compared = f"; {', '.join(others)}" if others else ""
        return (
            f"Fastest on this machine of those that keep their accuracy: {name}, {best:.2f} ms{compared}. A phone is "
            "another machine: measure there (`onefold phone`)."
        )

    @property
    def failure(self) -> GateFailed | None:
        """The error that says which gates did not hold, None where all did."""
        if not self.failed:
            return None
        said = ", ".join(gate.sentence for gate in self.failed)
        parts = [gate.sentence.partition(": ") for gate in self.failed]
        if len({tail for _, _, tail in parts}) == 1:  # what is the same of all, too few photos, is said once
            said = ", ".join(head for head, _, _ in parts) + "".join(parts[0][1:])
        advice = "More photos to calibrate with, or training for 8 bits (onefold train --int8), win accuracy back"
        return GateFailed(
            f"{len(self.failed)} of {len(self.gates)} artifacts failed their gate: "
            f"{said}; {self.folder / 'README.md'} has the table"
            + (f". {advice}" if any(gate.kind == "accuracy" and not gate.has_too_few for gate in self.failed) else "")
        )


def accuracy_gate(verdict: ArtifactResult, max_drop: float, *, exact_fp32: bool = False) -> Gate:
    """Whether an artifact that was scored loses no more than `max_drop` points, or on few photos than one photo; with
    `exact_fp32` no answer may differ that a 32-bit one gives."""
    name, top1 = verdict.name, verdict.top1
    if exact_fp32 and verdict.artifact.precision == "fp32" and verdict.changed:
        sentence = f"{verdict.changed} of {verdict.count} answers of {name} are not the network's, and none may differ"
        return Gate(name=name, kind="parity", passed=False, sentence=sentence)
    if verdict.artifact.details.get("untrained") is True and verdict.artifact.precision != "fp32":
        sentence = (
            f"{verdict.changed} of {verdict.count} answers of {name} are not the float network's. {RANDOM_WEIGHTS_NOTE}"
        )
        return Gate(name=name, kind="accuracy", passed=True, sentence=sentence)
    lost = f"{verdict.drop:.2f} points of top-1" if top1 is not None else f"{verdict.drop:.2f} % of the answers"
    low, high = verdict.interval
    one, may_be_one = 100 / verdict.count, one_may_be_lost(verdict.count, max_drop)
    by_one = may_be_one and max_drop < verdict.drop <= one
    passed = verdict.drop <= max_drop or by_one
    sentence = f"{name} lost {lost} ({low:.1f} to {high:.1f} on {verdict.count} photos), and {max_drop:g} may be lost"
    has_too_few = low <= max_drop < high and max_drop > 0
    if has_too_few and not passed:
        sentence += f": {too_few_photos_error(verdict.count, max_drop)}"
    elif may_be_one:
        sentence += f", or one photo, since 1 of {verdict.count} photos is {one:.2f} points"
    if passed and high > max_drop:
        sentence += ": so few photos cannot show that it loses no more"
    return Gate(
        name=name, kind="accuracy", passed=passed, sentence=sentence, has_too_few=has_too_few, by_one_photo=by_one
    )


def one_may_be_lost(count: int, max_drop: float) -> bool:
    """Whether one photo of `count` may be lost though it is more than `max_drop` points.

    An int8 network changes the answer to a photo here and there that the float network hardly knew: on so few photos a
    gate that one of them fails would judge by chance. From 100 photos on the bound is what it says, and with fewer than
    10 one photo is so large a share that nothing would be left of the gate.
    """
    return 0 < max_drop < 100 / count and count in _ONE_MAY_BE_LOST


def too_few_photos_error(count: int, max_drop: float) -> str:
    """Say that a loss of `max_drop` points cannot be told on `count` photos, and what to type."""
    one, points = 100 / count, f"{max_drop:g} point{'' if max_drop == 1 else 's'}"
    told, other = "", ""
    if one_may_be_lost(count, max_drop):
        told = f"1 of {count} photos is {one:.2f} points, and one may be lost; "
    elif one > max_drop:
        told, other = f"one answer is {one:.3g} points; ", f", or --max-drop {math.ceil(one * 10) / 10:g}"
    photos = format_count(count, "photo")
    return f"{photos} cannot tell {points} from none: {told}give more held-out photos with --val{other}"


def warn_constant_predictions(answers: NDArray[np.int64], photos: DeploymentPhotos, network: Predictor) -> str:
    """Warn where a network answers all scored photos with one class, though they are of several; the end of a title."""
    several = len({photos.scored.label(i) for i in range(len(photos.scored))} if photos.labelled else answers) > 1
    if not several or not bool((answers == answers[0]).all()):
        return ""
    one = f"each is answered {network.class_name(int(answers[0]))!r}, so that equal answers show little"
    _log.warning("of %d photos %s: the network has learned nothing of them", len(answers), one)
    return f"; {one}"


def write_gates(gates: Sequence[Gate], results: Path, notes: Sequence[str] = ()) -> None:
    """Keep what each gate found, and how a deployment was cut short, in `results`/gates.json for the report."""
    notes = [*notes, *(gate.sentence for gate in gates if gate.by_one_photo)]
    found: dict[str, object] = {"gates": [vars(gate) for gate in gates], **({"notes": notes} if notes else {})}
    write_sealed_json(results / GATES_FILE, found)


def render_readme(done: DeployResult) -> str:
    """README.md in Markdown: which artifact to take, by what was measured."""
    network = done.network
    lines = [f"# {network.card.model}, for devices", ""]
    if done.failed:
        lines += [f"**Not to be shipped: {', '.join(gate.sentence for gate in done.failed)}.**", ""]
    lines += [f"**{note[:1].upper()}{note[1:]}.**\n" for note in done.notes]
    lines += [f"{gate.sentence}.\n" for gate in done.gates if gate.by_one_photo]
    float_score = "without labels" if done.top1 is None else f"top-1 {done.top1:.2f} % in PyTorch, fp32"
    lines += [f"Scored on {done.data}: {float_score}.", "", *_table(done), "", done.recommendation, ""]
    lines += [
        "Each folder is complete by itself: its `README.md` has code that loads it (Python without PyTorch, C++, "
        "Swift, Kotlin, JavaScript, as far as the runtime has them), its `manifest.json` the classes and the "
        "preprocessing, its `reference.npz` a pair of images with the answers that it must give.",
        "",
        "`report.html` draws the measurements; `results/` has every sample. `MODEL_CARD.md` says what the network is.",
    ]
    return "\n".join(lines) + "\n"


def _table(done: DeployResult) -> list[str]:
    head = ["artifact", "top-1 %", "lost, points", "answers changed", "95 % interval", "latency, median", "threads"]
    head += ["machine", "size"]
    rows = [_row(each) for each in done.verdicts]
    scored = {each.name for each in done.verdicts}
    folders = sorted(path.name for path in done.folder.iterdir() if (path / "manifest.json").is_file())
    rows += [
        [name, "not scored" if done.notes else "not run here", *["-"] * (len(head) - 2)]
        for name in folders
        if name not in scored
    ]
    return [_line(head), "|---" + "|--:" * (len(head) - 1) + "|", *map(_line, rows)]


def _row(each: ArtifactResult) -> list[str]:
    timed = each.measurement
    return [
        each.name,
        "-" if each.top1 is None else f"{each.top1:.2f}",
        "-" if each.top1 is None else f"{each.drop:.2f}",
        f"{each.changed} of {each.count}",
        f"{each.interval[0]:.1f} to {each.interval[1]:.1f}",
        "-" if timed is None else f"{timed.median_ns / 1e6:.2f} ms ({timed.verdict})",
        "-" if timed is None else str(timed.procedure.threads),
        "-" if timed is None else timed.machine.chip,
        f"{each.artifact.num_bytes / 2**20:.1f} MiB",
    ]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def describe_score(top1: float | None, changed: int, count: int) -> str:
    """Top-1 where it is known, and how many answers are not the float network's."""
    scored = "" if top1 is None else f"top-1 {top1:.2f} %, "
    return f"{scored}{changed} of {count} answers are not the float network's"
