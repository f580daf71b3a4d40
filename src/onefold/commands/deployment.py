"""What came of a deployment: a verdict for each artifact, the gates, and the README.md that says which to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onefold.accuracy_intervals import drop_interval
from onefold.bench import Measurement
from onefold.checksums import write_sealed_json
from onefold.commands.open_network import Network
from onefold.errors import GateFailed
from onefold.report import GATES
from onefold.report.format import plural
from onefold.runtimes import Artifact


@dataclass(frozen=True, kw_only=True)
class Verdict:
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

    `has_too_few` is whether it was scored on too few photos to tell what was lost from what may be.
    """

    name: str
    kind: Literal["fusing", "parity", "accuracy"]
    passed: bool
    sentence: str
    has_too_few: bool = False


@dataclass(frozen=True, kw_only=True)
class DeployResult:
    """The folder, a verdict for each artifact that was scored, and the gates; `top1` of the float network in PyTorch.

    An artifact whose export failed its parity gate is not in the folder. `data` names what was scored on.
    """

    folder: Path
    network: Network
    verdicts: tuple[Verdict, ...]
    gates: tuple[Gate, ...]
    top1: float | None
    data: str

    @property
    def failed(self) -> list[Gate]:
        """The gates that did not hold."""
        return [gate for gate in self.gates if not gate.passed]

    @property
    def failure(self) -> GateFailed | None:
        """The error that says which gates did not hold, None where all did."""
        if not self.failed:
            return None
        advice = "More photos to calibrate with, or training for 8 bits (onefold train --int8), win accuracy back"
        return GateFailed(
            f"{len(self.failed)} of {len(self.gates)} artifacts failed their gate: "
            f"{', '.join(gate.sentence for gate in self.failed)}; {self.folder / 'README.md'} has the table"
            + (f". {advice}" if any(gate.kind == "accuracy" and not gate.has_too_few for gate in self.failed) else "")
        )


def too_few(count: int, max_drop: float) -> str:
    """Say that a loss of `max_drop` points cannot be told on `count` photos, and what to type."""
    one = 100 / count
    told = f"one answer is {one:.3g} points; " if one > max_drop else ""
    other = f", or --max-drop {math.ceil(one * 10) / 10:g}" if told else ""
    points = f"{max_drop:g} point{'' if max_drop == 1 else 's'}"
    photos = plural(count, "photo")
    return f"{photos} cannot tell {points} from none: {told}give more held-out photos with --val{other}"


def write_gates(gates: Sequence[Gate], results: Path) -> None:
    """Keep what each gate found in `results`/gates.json, where the report reads it."""
    write_sealed_json(results / GATES, {"gates": [vars(gate) for gate in gates]})


def readme(done: DeployResult) -> str:
    """README.md in Markdown: which artifact to take, by what was measured."""
    network = done.network
    lines = [f"# {network.card.model}, for devices", ""]
    if done.failed:
        lines += [f"**Not to be shipped: {', '.join(gate.sentence for gate in done.failed)}.**", ""]
    float_score = "without labels" if done.top1 is None else f"top-1 {done.top1:.2f} % in PyTorch, fp32"
    lines += [f"Scored on {done.data}: {float_score}.", "", *_table(done), "", *_choice(done), ""]
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
    rows += [[name, "not run here", *["-"] * (len(head) - 2)] for name in folders if name not in scored]
    return [_line(head), "|---" + "|--:" * (len(head) - 1) + "|", *map(_line, rows)]


def _row(each: Verdict) -> list[str]:
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


def _choice(done: DeployResult) -> list[str]:
    """The quickest that may be shipped, by this machine's times."""
    failed = {gate.name for gate in done.failed}
    fit = [each for each in done.verdicts if each.measurement is not None and each.name not in failed]
    if not fit:
        return ["Nothing here was both timed and good enough to be recommended."]
    best = min(fit, key=lambda each: each.measurement.median_ns if each.measurement else 0.0)
    return [
        f"Quickest of those that keep their accuracy, on this machine: **{best.name}**. A phone is another machine: "
        "measure there (`onefold phone`)."
    ]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
