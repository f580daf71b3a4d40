"""What to deploy, and what came of it: a verdict an artifact, the gates, and the README.md that says which to take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onefold.accuracy_intervals import wilson_interval
from onefold.bench import Procedure
from onefold.commands.calibration_cache import CalibrationOptions
from onefold.commands.deploy_gates import ArtifactResult, Gate, describe_same_logits, gates_error
from onefold.commands.held_out_images import DeploymentPhotos
from onefold.commands.open_network import Network
from onefold.commands.predictor import Predictor
from onefold.errors import BadArgument, GateFailed
from onefold.quantize import QuantizationMethod
from onefold.report.format import format_count, join_words, plain_size

_log = logging.getLogger("onefold")

_QUICK_CALIBRATE, QUICK_MAX_SCORED, _QUICK_SAMPLES = 64, 128, 50
WARMUP_S, _QUICK_WARMUP_S = 0.5, 0.2  # of each artifact, before it is timed
QUICK_NOTE = (
    f"quick: at most {_QUICK_CALIBRATE} photos calibrate, {QUICK_MAX_SCORED} are scored and {_QUICK_SAMPLES} calls are "
    "timed, so that accuracies and latencies are less certain; left out are the search for a method of calibration "
    "(the default one is taken), cold starts and the limits of this machine"
)


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """What to deploy to: runtimes and precisions by name, and the photos.

    `data` calibrates int8: a folder of photos, or class folders, or one with train/ and val/, or "digits". `val` is
    what to score on; without it the part of `data` that was not trained on, and where that has no labels the answers
    are compared with the float network's. No photo that calibrates is scored. `max_drop` is in percent points of
    top-1, against the float network in PyTorch; what is undecided on few photos, see `accuracy_gate`. With
    `exact_fp32` a 32-bit artifact fails its gate by a single answer that is not the network's. Without `timed` no
    latency is measured; `procedure` then says only on how many threads. With `quick` at most 64 photos calibrate, by
    `calibration.method`, 128 are scored and 50 calls timed; no method is searched for, and neither cold starts nor the
    machine's limits are measured. After `minutes` nothing more is begun but the texts: methods of calibration,
    artifacts but the first, scores and times are left out, and named.
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
class DeployResult:
    """The folder, a verdict for each artifact that was scored, and the gates; `top1` of the float network in PyTorch.

    An artifact whose export failed its parity gate is not in the folder. `data` names what was scored on, `count`
    photos; `notes` say how the deployment was cut short, in images, samples or time, and `seen` how many of the photos
    were trained on, where some were.
    """

    folder: Path
    network: Network
    verdicts: tuple[ArtifactResult, ...]
    gates: tuple[Gate, ...]
    top1: float | None
    data: str
    notes: tuple[str, ...] = ()
    count: int = 0
    seen: str = ""

    @property
    def seen_notes(self) -> list[str]:
        """A sentence where photos that are scored were trained on, else none."""
        return [f"of {format_count(self.count, 'photo')} that are scored {self.seen}"] if self.seen else []

    @property
    def failed(self) -> list[Gate]:
        """The gates that did not hold."""
        return [gate for gate in self.gates if gate.verdict == "failed"]

    @property
    def undecided(self) -> list[Gate]:
        """The gates that the photos are too few to decide."""
        return [gate for gate in self.gates if gate.verdict == "undecided"]

    @property
    def recommended(self) -> str | None:
        """The artifact to take, by its name: the fastest that passed, else the fastest that is undecided, else None."""
        verdicts = {gate.name: gate.verdict for gate in self.gates}
        known = [each for each in self.verdicts if each.measurement and verdicts.get(each.name) != "failed"]
        ranked = [
            (verdicts.get(each.name) == "undecided", each.measurement.median_ns, each.name)
            for each in known
            if each.measurement
        ]
        return min(ranked)[2] if ranked else None

    @property
    def recommendation(self) -> str:
        """Which artifact to take: the fastest on this machine of those that passed, and what the others take."""
        failed, doubted = ({gate.name for gate in gates} for gates in (self.failed, self.undecided))
        times = {each.name: each.measurement.median_ns / 1e6 for each in self.verdicts if each.measurement is not None}
        passed = sorted((ms, name) for name, ms in times.items() if name not in failed | doubted)
        unsure = sorted((ms, name) for name, ms in times.items() if name in doubted)
        if not passed and not unsure:
            return "No artifact here was both timed and good enough to be recommended."
        phone = "A phone is another machine: measure there (`onefold phone`)."
        count = next(format_count(each.count, "photo") for each in self.verdicts)
        if not passed:
            listed = join_words([f"{name}, {ms:.2f} ms" for ms, name in unsure])
            return f"Whether an artifact keeps its accuracy cannot be told by {count}: {listed}. {phone}"
        (best, name), others = passed[0], [f"{other} {ms / passed[0][0]:.2f} times as long" for ms, other in passed[1:]]
        compared = f"; {', '.join(others)}" if others else ""
        doubt = ""
        if unsure:
            lost = {each.name: describe_loss(each) for each in self.verdicts}
            beside = [f"{other} takes {ms / best:.2f} times as long and lost {lost[other]}" for ms, other in unsure]
            they = "they keep their" if len(unsure) > 1 else "it keeps its"
            remedies = dict.fromkeys(gate.remedy for gate in self.undecided if gate.remedy)
            decided = f": {next(iter(remedies))}" if len(remedies) == 1 else ""
            doubt = f" {join_words(beside)}; whether {they} accuracy cannot be told by {count}{decided}."
        best_one = f"Fastest on this machine of those that keep their accuracy: {name}, {best:.2f} ms{compared}."
        return f"{best_one}{doubt} {phone}"

    @property
    def failure(self) -> GateFailed | None:
        """The error that says which gates did not hold, None where all did."""
        return gates_error(self.gates, self.folder)


def warn_constant_predictions(answers: NDArray[np.int64], photos: DeploymentPhotos, network: Predictor) -> str:
    """Warn where a network answers all scored photos with one class, though they are of several; the end of a title."""
    several = len({photos.scored.label(i) for i in range(len(photos.scored))} if photos.labelled else answers) > 1
    if not several or not bool((answers == answers[0]).all()):
        return ""
    one = f"each is predicted as {network.class_name(int(answers[0]))!r}, so that equal predictions show little"
    _log.warning("of %d photos %s: the network has not learned to tell them apart", len(answers), one)
    return f"; {one}"


def render_readme(done: DeployResult) -> str:
    """README.md in Markdown: which artifact to take, by what was measured."""
    network = done.network
    lines = [f"# {network.card.model}, for devices", ""]
    if done.failed:
        lines += [f"**Not to be shipped: {', '.join(gate.sentence for gate in done.failed)}.**", ""]
    lines += [f"**Undecided: {gate.sentence}.**\n" for gate in done.undecided]
    lines += [f"**{note[:1].upper()}{note[1:]}.**\n" for note in (*done.seen_notes, *done.notes)]
    float_score = "without labels" if done.top1 is None else "top-1 " + _share(done.top1, done.count)
    float_score += "" if done.top1 is None else " in PyTorch, fp32"
    lines += [f"Scored on {done.data}: {float_score}. In brackets 95 % intervals.", "", *_table(done), ""]
    lines += [done.recommendation, ""]
    lines += [
        "Each folder is complete by itself: its `README.md` has code that loads it (Python without PyTorch, C++, "
        "Swift, Kotlin, JavaScript, as far as the runtime has them), its `manifest.json` the classes and the "
        "preprocessing, its `reference.npz` a pair of images with the answers that it must give.",
        "",
        "`report.html` draws the measurements; `results/` has every sample. `MODEL_CARD.md` says what the network is.",
    ]
    return "\n".join(lines) + "\n"


def _table(done: DeployResult) -> list[str]:
    head = ["artifact", "accuracy kept", "top-1 %", "lost, points", "predictions changed", "latency, median", "threads"]
    head += ["machine", "size"]
    verdicts = {gate.name: gate.verdict for gate in done.gates}
    of_all = "in all" if done.seen else "held out"
    rows = [_row(each, verdicts.get(each.name, "-"), of_all) for each in done.verdicts]
    scored = {each.name for each in done.verdicts}
    folders = sorted(path.name for path in done.folder.iterdir() if (path / "manifest.json").is_file())
    rows += [
        [name, "not scored" if done.notes else "not run here", *["-"] * (len(head) - 2)]
        for name in folders
        if name not in scored
    ]
    return [_line(head), "|---" * 2 + "|--:" * (len(head) - 2) + "|", *map(_line, rows)]


def _row(each: ArtifactResult, verdict: str, of_all: str) -> list[str]:
    timed, (low, high) = each.measurement, each.interval
    held_out = each.num_held_out or each.count
    of_more = f" ({held_out} {of_all})" if held_out > each.count else ""
    drop = f"{each.drop:.2f} ({low:.1f} to {high:.1f})"
    why = f": {describe_same_logits(each)}" if each.is_exact else ""  # its interval holds the bound all the same
    return [
        each.name,
        {"passed": f"yes{why}", "failed": "NO"}.get(verdict, verdict),
        "-" if each.top1 is None else _share(each.top1, each.count).replace(" %", ""),
        drop if each.top1 is not None else f"{drop}, % of the predictions",
        f"{each.changed} of {each.count}{of_more}",
        "-" if timed is None else f"{timed.median_ns / 1e6:.2f} ms ({timed.verdict})",
        "-" if timed is None else str(timed.procedure.threads),
        "-" if timed is None else timed.machine.chip,
        plain_size(each.artifact.num_bytes),
    ]


def describe_loss(each: ArtifactResult) -> str:
    """What an artifact lost, with its interval: 0.00 points (-2.6 to 2.6)."""
    low, high = each.interval
    return f"{each.drop:.2f} {'points' if each.top1 is not None else '%'} ({low:.1f} to {high:.1f})"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _share(top1: float, count: int) -> str:
    """A top-1 in percent, with its interval: 93.75 % (82.8 to 97.9)."""
    low, high = wilson_interval(round(top1 / 100 * count), count)
    return f"{top1:.2f} % ({low:.1f} to {high:.1f})"


def describe_score(top1: float | None, count: int, *, changed: int | None = None) -> str:
    """Top-1 where it is known, with its interval, and how many predictions differ from PyTorch's in fp32."""
    low, high = wilson_interval(round((top1 or 0.0) / 100 * count), count)
    scored = [] if top1 is None else [f"top-1 {top1:.2f} % (95 % interval {low:.1f} to {high:.1f})"]
    scored += [] if changed is None else [f"{changed} of {count} predictions differ from PyTorch fp32"]
    return ", ".join(scored)
