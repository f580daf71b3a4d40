"""weights -> a folder for devices: an artifact a runtime and precision, verified, scored, timed, and explained.

    deploy/  onnx-fp32/ onnx-int8/ ...   the artifacts, each with its manifest, its proof and its own README.md
             README.md                   which to take: accuracy, answers changed, latency, size; how to load it
             MODEL_CARD.md               what the network is, and on what it was scored
             report.html  results/       the measurements, drawn and raw

Everything is made aside and put in its place at the end. Where an artifact loses more accuracy than is allowed, the
folder is there all the same, says so in its first lines, and GateFailed is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onefold.bench import Comparison, Measurement, Procedure
from onefold.commands.bench import BenchOptions, bench, note_accuracy
from onefold.commands.evaluate import class_indices
from onefold.commands.fuse import export_made
from onefold.commands.handout import handout
from onefold.commands.open import Network, Predictor, open_network, open_predictor, predictor_of, validation_images
from onefold.commands.quantizing import Calibration, held_out, quantized, unlabelled
from onefold.commands.report import write_page
from onefold.data import Dataset, ImageLoader
from onefold.errors import BadArgument, BadData, GateFailed, MissingExtra
from onefold.models.weights_file import hub_readme
from onefold.quantize import Quantized
from onefold.report import require_matplotlib
from onefold.runtimes import Artifact, Runtime, find_runtime
from onefold.runtimes.base import installed_versions
from onefold.storage import replacing, write_text

Say = Callable[[str], None]
FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """What to deploy to: runtimes and precisions by name, and the photos.

    `data` calibrates int8: a folder of photos, or class folders, or one with train/ and val/, or "digits". `val` is
    what to score on; without it the held-out part of `data`, and where that has no labels the answers are compared
    with the float network's. `max_drop` is in percent points of top-1, against the float network in PyTorch.
    """

    runtimes: Sequence[str]
    precisions: Sequence[str]
    calibration: Calibration
    val: str | None = None
    max_drop: float = 1.0
    size: int | None = None
    procedure: Procedure = field(default_factory=lambda: Procedure(samples=200))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of one artifact: `top1` in percent, None without labels; `changed` answers of `count`; its latency."""

    name: str
    artifact: Artifact
    top1: float | None
    drop: float
    changed: int
    count: int
    measurement: Measurement | None = None


@dataclass(frozen=True, kw_only=True)
class DeployResult:
    """The folder, and a verdict for each artifact; `top1` of the float network in PyTorch; `data` it was scored on."""

    folder: Path
    network: Network
    verdicts: tuple[Verdict, ...]
    top1: float | None
    data: str
    max_drop: float

    @property
    def failed(self) -> list[Verdict]:
        """Those that lose more than is allowed."""
        return [each for each in self.verdicts if each.drop > self.max_drop]


def deploy(source: str | Path, out: Path, order: DeployOptions, *, name: str | None = None, say: Say) -> DeployResult:
    """Export, verify, score, time and explain; see the top of the file.

    Raises GateFailed once the folder is written, where an artifact loses more than `max_drop`; MissingExtra before
    anything is done, where a runtime or matplotlib is not installed; BadArgument where `out` holds something else.
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
    made = None
    if any(precision == "int8" for _, precision in wanted):
        made = quantized(network, None if network.card.int8 is not None else order.calibration, say)
    with replacing(out) as aside:
        aside.mkdir()
        done = _deploy(network, made, wanted, order, aside, say)
        _explain(done)
    done = replace(done, folder=out)
    for each in done.failed:
        say(f"FAILED    {each.name}: {_lost(each)}, {order.max_drop:g} points are allowed")
    if done.failed:
        raise GateFailed(
            f"{len(done.failed)} of {len(done.verdicts)} artifacts lose more than --max-drop {order.max_drop:g} points "
            f"of top-1: {', '.join(each.name for each in done.failed)}; {out}/README.md has the table. More photos to "
            "calibrate with, or training for 8 bits (onefold train --int8), win it back"
        )
    return done


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
    made: Quantized | None,
    wanted: Sequence[tuple[str, str]],
    order: DeployOptions,
    out: Path,
    say: Say,
) -> DeployResult:
    artifacts = {}
    for runtime, precision in wanted:
        name = f"{runtime}-{precision}"
        artifacts[name] = export_made(network, made if precision == "int8" else None, out / name, runtime, precision)
        say(f"exported  {name:20} {_proof(artifacts[name])}")
    photos, title, labelled = _photos_to_score(network, order)
    asked = _Exam(photos, network, labelled)
    with predictor_of(network, threads=order.procedure.threads) as torch_network:
        true, top1 = asked.answers(torch_network)
        if top1 is not None:
            say(f"scored    {'torch-fp32':20} top-1 {top1:.2f} %")
    verdicts, runs = [], [name for name, each in artifacts.items() if _runs_here(each)]
    for name in runs:
        with open_predictor(out / name, threads=order.procedure.threads) as predictor:
            answers, scored = asked.answers(predictor)
            if scored is not None:
                note_accuracy(predictor, title, scored, out / "results")
        changed = int((answers != true).sum())
        drop = 100 * changed / len(true) if top1 is None or scored is None else top1 - scored
        verdict = Verdict(name=name, artifact=artifacts[name], top1=scored, drop=drop, changed=changed, count=len(true))
        verdicts.append(verdict)
        say(f"scored    {name:20} {_score(scored, changed, len(true))}")
    timed = _timed(out, runs, order, say)
    verdicts = [replace(each, measurement=timed.get(each.name)) for each in verdicts]
    return DeployResult(
        folder=out, network=network, verdicts=tuple(verdicts), top1=top1, data=title, max_drop=order.max_drop
    )


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
    """The photos, and how to ask for them."""

    photos: Dataset
    network: Network
    labelled: bool

    def answers(self, predictor: Predictor) -> tuple[NDArray[np.int64], float | None]:
        """The best class of each photo (N,), and top-1 in percent where the photos have labels."""
        batches = ImageLoader(self.photos, self.network.preprocessing, batch_size=32, shuffle=False, on_bad="skip")
        found, labels = [], []
        for images, truth in batches.epoch(0):
            found.append(predictor.session(images.numpy()).argmax(1))
            labels.append(truth.numpy())
        answers = np.concatenate(found)
        if not self.labelled:
            return answers, None
        index = np.array(class_indices(predictor, self.photos))
        return answers, 100 * float((answers == index[np.concatenate(labels)]).mean())


def _photos_to_score(network: Network, order: DeployOptions) -> tuple[Dataset, str, bool]:
    """The photos, what to call them, and whether they have labels that the network knows."""
    given = order.val or order.calibration.data
    try:
        photos = held_out(given) if order.val is None else validation_images("", order.val)[0]
        class_indices(predictor_of(network), photos)
        return photos, given if order.val else f"{given} (held out)", True
    except BadData:
        if order.val is not None:
            raise
    return unlabelled(given), f"{given} (not labelled: answers compared with the float network's)", False


def _timed(out: Path, runs: Sequence[str], order: DeployOptions, say: Say) -> dict[str, Measurement]:
    """All of them interleaved in one run; the first is the baseline of the ratios."""
    if not runs:
        return {}
    outcome, _ = bench(
        BenchOptions(sources=[str(out / name) for name in runs], procedure=order.procedure), out / "results"
    )
    found = list(outcome.measurements.values()) if isinstance(outcome, Comparison) else [outcome]
    for name, each in zip(runs, found, strict=True):
        say(f"timed     {name:20} {each.median_ns / 1e6:.2f} ms, {each.verdict}")
    return dict(zip(runs, found, strict=True))


def _explain(done: DeployResult) -> None:
    """The texts and the page."""
    write_text(done.folder / "README.md", handout(done))
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


def _lost(each: Verdict) -> str:
    return f"{each.drop:.2f} points lost" if each.top1 is not None else f"{each.drop:.2f} % of the answers changed"
