"""weights -> a folder for devices: an artifact a runtime and precision, verified, scored, timed, and explained.

    deploy/  onnx-fp32/ onnx-int8/ ...   the artifacts, each with its manifest, its proof and its own README.md
             README.md                   which to take: accuracy, answers changed, latency, size; how to load it
             MODEL_CARD.md               what the network is, and on what it was scored
             report.html  results/       the measurements, drawn and raw

Everything is made aside and put in its place at the end. A gate that fails loses none of it: where an artifact loses
more accuracy than is allowed, or a runtime's answer is not PyTorch's, the rest is finished, the folder is put in its
place, its README.md and report.html say so in their first lines, and then GateFailed is raised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onefold.bench import Comparison, Measurement, Procedure
from onefold.commands.bench import BenchOptions, measure_sources, note_accuracy
from onefold.commands.evaluate import class_indices
from onefold.commands.export import Calibration, Int8Network, export_made, quantized
from onefold.commands.held_out import (
    Photos,
    count_trained,
    photos_to_deploy,
    records_of,
    sets_to_evaluate,
    unlabelled,
    without_copies,
    without_labels,
)
from onefold.commands.open_network import Network, Predictor, open_network, open_predictor, predictor_of
from onefold.commands.report import write_page
from onefold.data import Dataset, ImageLoader
from onefold.errors import BadArgument, BadData, GateFailed, MissingExtra
from onefold.models.weights_file import hub_readme
from onefold.report import GATES, require_matplotlib
from onefold.runtimes import Artifact, Runtime, find_runtime
from onefold.runtimes.base import installed_versions
from onefold.storage import replacing, write_text
from onefold.train.evaluate import drop_interval

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """What to deploy to: runtimes and precisions by name, and the photos.

    `data` calibrates int8: a folder of photos, or class folders, or one with train/ and val/, or "digits". `val` is
    what to score on; without it the part of `data` that was not trained on, and where that has no labels the answers
    are compared with the float network's. No photo that calibrates is scored. `max_drop` is in percent points of
    top-1, against the float network in PyTorch. With `exact_fp32` a 32-bit artifact fails its gate by a single answer
    that is not the network's. Without `timed` no latency is measured; `procedure` then says only on how many threads.
    """

    runtimes: Sequence[str]
    precisions: Sequence[str]
    calibration: Calibration
    val: str | None = None
    max_drop: float = 1.0
    exact_fp32: bool = False
    size: int | None = None
    procedure: Procedure = field(default_factory=lambda: Procedure(samples=200))
    timed: bool = True


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
    """A check that an artifact must pass before it is shipped, and in one sentence what was measured and is allowed."""

    name: str
    kind: Literal["fusing", "parity", "accuracy"]
    passed: bool
    sentence: str


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
            + (f". {advice}" if any(gate.kind == "accuracy" for gate in self.failed) else "")
        )


def deploy(source: str | Path, out: Path, order: DeployOptions, *, name: str | None = None, say: Say) -> DeployResult:
    """Export, verify, score, time and explain; see the top of the file.

    Raises GateFailed once the folder is written, where a gate did not hold; the rest as `build_deployment` does.
    """
    done = build_deployment(source, out, order, name=name, say=say)
    if done.failure is not None:
        raise done.failure
    return done


def build_deployment(
    source: str | Path, out: Path, order: DeployOptions, *, name: str | None = None, say: Say
) -> DeployResult:
    """What `deploy` does, the failed gates left to the caller: see `DeployResult.failure`.

    Raises MissingExtra before anything is done, where a runtime or matplotlib is not installed; BadArgument where `out`
    holds something else.
    """
    require_matplotlib()  # for the report at the end, after minutes of work
    wanted = _wanted(order)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadArgument(f"{out} is not empty: choose another --out, or remove it")
    network = open_network(source, name=name)
    if not network.is_fused:
        network, drift = network.fused()
        say(f"fused     drift {drift:.1e}")
    network = network.with_size(order.size)
    calibrates = network.card.int8 is None and any(precision == "int8" for _, precision in wanted)
    photos = _photos(network, order, calibrates=calibrates)
    made = None
    if any(precision == "int8" for _, precision in wanted):
        made = quantized(network, replace(order.calibration, photos=photos.calibration) if calibrates else None, say)
    with replacing(out) as aside:
        aside.mkdir()
        done = _deploy(network, made, photos, wanted, order, aside, say)
        _explain(done)
    for gate in done.failed:
        say(f"FAILED    {gate.sentence}")
    return replace(done, folder=out)


def write_gates(gates: Sequence[Gate], results: Path) -> None:
    """Keep what each gate found in `results`/gates.json, where the report reads it."""
    write_text(results / GATES, json.dumps({"gates": [vars(gate) for gate in gates]}, indent=1) + "\n")


def _wanted(order: DeployOptions) -> list[tuple[str, str]]:
    """Every runtime with every precision that both it and the order have. MissingExtra, BadArgument."""
    wanted = []
    for name in dict.fromkeys(order.runtimes):
        kind = find_runtime(name)
        _check_installed(name, kind)
        known = [precision for precision in order.precisions if precision in kind.PRECISIONS]
        if not known:
            raise BadArgument(
                f"{name} has none of {', '.join(order.precisions)}: it can do {', '.join(kind.PRECISIONS)}"
            )
        wanted += [(name, precision) for precision in known]
    if not wanted:
        raise BadArgument("--to names no runtime")
    return wanted


def _deploy(
    network: Network,
    made: Int8Network | None,
    photos: Photos,
    wanted: Sequence[tuple[str, str]],
    order: DeployOptions,
    out: Path,
    say: Say,
) -> DeployResult:
    artifacts, refused = _exported(network, made, wanted, out, say)
    title = photos.title
    asked = _Exam(photos.scored, network, photos.labelled)
    with predictor_of(network, threads=order.procedure.threads) as torch_network:
        true, right, top1 = asked.answers(torch_network)
        if asked.bad:
            title += f", without {len(asked.bad)} of {len(photos.scored)} photos, which cannot be read"
            say(f"left out  {len(asked.bad)} of {len(photos.scored)} photos, which cannot be read")
        if top1 is not None:
            say(f"scored    {'torch-fp32':20} top-1 {top1:.2f} %")
    verdicts, runs = [], [name for name, each in artifacts.items() if _runs_here(each)]
    for name in runs:
        with open_predictor(out / name, threads=order.procedure.threads) as predictor:
            answers, still_right, scored = asked.answers(predictor)
            if scored is not None:
                note_accuracy(predictor, title, scored, out / "results")
        changed = int((answers != true).sum())
        lost, won = changed, 0
        if right is not None and still_right is not None:
            lost, won = int((right & ~still_right).sum()), int((still_right & ~right).sum())
        verdict = Verdict(
            name=name, artifact=artifacts[name], top1=scored, changed=changed, count=len(true), lost=lost, won=won
        )
        verdicts.append(verdict)
        say(f"scored    {name:20} {_score(scored, changed, len(true))}")
    timed = _timed(out, runs, order, say) if order.timed else {}
    verdicts = [replace(each, measurement=timed.get(each.name)) for each in verdicts]
    gates = (*refused, *(_gate(each, order) for each in verdicts))
    write_gates(gates, out / "results")
    return DeployResult(folder=out, network=network, verdicts=tuple(verdicts), gates=gates, top1=top1, data=title)


def _exported(
    network: Network, made: Int8Network | None, wanted: Sequence[tuple[str, str]], out: Path, say: Say
) -> tuple[dict[str, Artifact], list[Gate]]:
    """The artifacts by name, and a failed gate for each runtime whose answer is not PyTorch's, which leaves none."""
    artifacts, refused = {}, []
    for runtime, precision in wanted:
        name = f"{runtime}-{precision}"
        try:
            artifacts[name] = export_made(
                network, made if precision == "int8" else None, out / name, runtime, precision
            )
        except GateFailed as error:
            refused.append(Gate(name=name, kind="parity", passed=False, sentence=f"{name}: {error}"))
            say(f"refused   {name:20} {error}")
        else:
            say(f"exported  {name:20} {_proof(artifacts[name])}")
    return artifacts, refused


def _gate(verdict: Verdict, order: DeployOptions) -> Gate:
    """Whether an artifact that was scored keeps what the order asks of it."""
    name, top1 = verdict.name, verdict.top1
    if order.exact_fp32 and verdict.artifact.precision == "fp32" and verdict.changed:
        sentence = f"{verdict.changed} of {verdict.count} answers of {name} are not the network's, and none may differ"
        return Gate(name=name, kind="parity", passed=False, sentence=sentence)
    lost = f"{verdict.drop:.2f} points of top-1" if top1 is not None else f"{verdict.drop:.2f} % of the answers"
    low, high = verdict.interval
    passed = verdict.drop <= order.max_drop
    sentence = (
        f"{name} lost {lost} ({low:.1f} to {high:.1f} on {verdict.count} photos), and {order.max_drop:g} may be lost"
    )
    if passed and high > order.max_drop:
        sentence += ": so few photos cannot show that it loses no more"
    return Gate(name=name, kind="accuracy", passed=passed, sentence=sentence)


def _check_installed(name: str, kind: Runtime) -> None:
    """Say what is missing before an hour's work, not after it."""
    missing = [package for package in kind.PACKAGES if package not in installed_versions(kind.PACKAGES)]
    if missing:
        raise MissingExtra(f'the runtime {name} needs {", ".join(missing)}; type: pip install "onefold[{name}]"')


def _runs_here(artifact: Artifact) -> bool:
    kind = find_runtime(artifact.runtime)
    return kind.unavailable_reason is None or kind.unavailable_reason() is None


@dataclass(frozen=True, eq=False)
class _Exam:
    """The photos, how to ask for them, and which of them cannot be read (name -> why)."""

    photos: Dataset
    network: Network
    labelled: bool
    bad: dict[str, str] = field(default_factory=dict)

    def answers(self, predictor: Predictor) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None, float | None]:
        """The best class of each photo (N,); where they have labels, whether it is right (N,), and top-1 in percent."""
        batches = ImageLoader(
            self.photos,
            self.network.preprocessing,
            batch_size=32,
            on_bad="skip",
            max_bad=len(self.photos),
            bad=self.bad,
        )
        found, labels = [], []
        for images, truth in batches.epoch(0):
            found.append(predictor.session(images.numpy()).argmax(1))
            labels.append(truth.numpy())
        answers = np.concatenate(found)
        if not self.labelled:
            return answers, None, None
        right = answers == np.array(class_indices(predictor, self.photos))[np.concatenate(labels)]
        return answers, right, 100 * float(right.mean())


def _photos(network: Network, order: DeployOptions, *, calibrates: bool) -> Photos:
    """The photos to calibrate with, and those to score on, none of which is among them; what they are is in the title.

    Photos are without labels where none of their classes is the network's. Raises BadData for labels that are partly
    unknown, or damaged: the gate on accuracy is not to be lost with them.
    """
    place, records = order.calibration.data, records_of(network.title, network.card.trained_on)
    photos = photos_to_deploy(place, records)
    if order.val is not None:
        title, scored = next(iter(sets_to_evaluate("", order.val, records).items()))
        calibration = without_copies(photos.calibration, scored)
        photos = Photos(calibration=calibration, scored=scored, title=title)
    if photos.labelled:
        try:
            class_indices(predictor_of(network), photos.scored)
        except BadData as error:
            if order.val is not None or set(photos.scored.classes) & set(network.card.classes or ()):
                raise
            photos = without_labels(place, str(error))
    if not photos.labelled and not calibrates:
        photos = replace(photos, scored=unlabelled(place))
    trained = count_trained(records, photos.scored)
    seen = "what the network was trained on is not recorded" if trained is None else f"{trained} of them trained on"
    title = f"{photos.title}: {len(photos.scored)} photos, {seen}"
    return replace(photos, title=title + (f"; {photos.why_unlabelled}" if photos.why_unlabelled else ""))


def _timed(out: Path, runs: Sequence[str], order: DeployOptions, say: Say) -> dict[str, Measurement]:
    """All of them interleaved in one run; the first is the baseline of the ratios."""
    if not runs:
        return {}
    outcome, _ = measure_sources(
        BenchOptions(sources=[str(out / name) for name in runs], procedure=order.procedure), out / "results"
    )
    found = list(outcome.measurements.values()) if isinstance(outcome, Comparison) else [outcome]
    for name, each in zip(runs, found, strict=True):
        say(f"timed     {name:20} {each.median_ns / 1e6:.2f} ms, {each.verdict}")
    return dict(zip(runs, found, strict=True))


def _explain(done: DeployResult) -> None:
    """The texts and the page."""
    write_text(done.folder / "README.md", _readme(done))
    metrics = {} if done.top1 is None else {"top1": done.top1}
    metrics |= {f"top1 {each.name}": each.top1 for each in done.verdicts if each.top1 is not None}
    write_text(done.folder / "MODEL_CARD.md", hub_readme(done.network.card, metrics))
    write_page([done.folder], done.folder / "report.html")


def _proof(artifact: Artifact) -> str:
    parity = artifact.parity
    return "not run here: its first load proves it" if parity is None else f"parity {parity.difference:.1e}"


def _score(top1: float | None, changed: int, count: int) -> str:
    scored = "" if top1 is None else f"top-1 {top1:.2f} %, "
    return f"{scored}{changed} of {count} answers are not the float network's"


# ------------------------------------------------------------------------------------------ README.md


def _readme(done: DeployResult) -> str:
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
