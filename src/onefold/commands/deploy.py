"""weights -> a folder for devices: an artifact a runtime and precision, verified, scored, timed, and explained.

    deploy/  onnx-fp32/ onnx-int8/ ...   the artifacts, each with its manifest, its proof and its own README.md
             README.md                   which to take: accuracy, predictions changed, latency, size; how to load it
             MODEL_CARD.md               what the network is, and on what it was scored
             report.html  results/       the measurements, drawn and raw

Everything is made in a folder beside it, deploy.unfinished, that takes its place at the end. Where a deployment is
stopped, that folder is left, and the same command goes on with the artifacts in it. A gate that fails loses none of it:
where an artifact loses more accuracy than is allowed, or a runtime's answer is not PyTorch's, the rest is finished, the
folder is put in its place, its README.md and report.html say so in their first lines, and then GateFailed is raised.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from onefold.bench import Comparison, Measurement, Procedure
from onefold.commands.bench import BenchOptions, measure_sources, save_accuracy
from onefold.commands.calibration_cache import CalibrationOptions, Int8Network, TimeBudget, calibrated_network
from onefold.commands.deploy_gates import (
    ArtifactResult,
    Gate,
    accuracy_gate,
    describe_held_out,
    too_few_photos_note,
    write_gates,
)
from onefold.commands.deploy_photos import Evaluation, deployment_photos
from onefold.commands.deploy_results import (
    QUICK_NOTE,
    WARMUP_S,
    DeployOptions,
    DeployResult,
    describe_score,
    render_readme,
    warn_constant_predictions,
)
from onefold.commands.deploy_steps import DeploySteps, plan_deployment
from onefold.commands.export import export_artifact, trace
from onefold.commands.held_out_images import DeploymentPhotos
from onefold.commands.open_network import Network, make_predictor, open_network
from onefold.commands.optional_dependencies import extras_for_sources, require_extras
from onefold.commands.predictor import Source, open_predictor, select_ema_weights, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.commands.report import write_report_page
from onefold.data.fingerprint import image_keys
from onefold.errors import BadArgument, BadArtifact, GateFailed, OnefoldError, options_as_arguments
from onefold.file_io import atomic_replace, write_text
from onefold.models.weights_file import render_hub_readme, tensors_sha256
from onefold.quantize import QuantizationMethod
from onefold.report import require_matplotlib
from onefold.report.format import join_words
from onefold.runtimes import Artifact, import_runtime, open_artifact

_Say = Callable[[str], None]

_KEY = "unfinished.key"  # in the folder of a deployment that is not finished: what it is of

_log = logging.getLogger("onefold")


@suggest_argument_names
def deploy(
    source: Source,
    data: Source,
    *,
    out: Source = "deploy",
    to: str | Sequence[str] = "onnx",
    int8: bool = False,
    half: bool = False,
    val: Source | None = None,
    max_drop: float = 1.0,
    calibrate: int = 200,
    weight_bits: int = 8,
    per_tensor: bool = False,
    skip_layers: int = 0,
    samples: int = 200,
    threads: int = 1,
    quick: bool = False,
    minutes: float | None = None,
    model: str | None = None,
    use_ema: bool | None = None,
    img_size: int | None = None,
    say: _Say | None = None,
) -> DeployResult:
    """Export, verify, evaluate and measure artifacts in one new folder: see the top of the file, and `DeployOptions`.

    `data` are photos to calibrate int8 with and to evaluate on. With `quick` no method of calibration is searched for,
    at most 64 photos calibrate, 128 are scored and 50 calls timed. After `minutes` later candidates, artifacts and the
    timing are left out, and named.

    Raises GateFailed once the folder is written, where an artifact loses more than `max_drop` points of top-1 (0: one
    photo of these, without an interval); GateUndecided, which is one, where it lost more on photos too few to tell, and
    of 10 to 99 photos more than one; the rest as `build_deployment` does.

        onefold.deploy("runs/photos-finetune", "photos/", to=["onnx", "litert"], int8=True).folder
    """
    method = QuantizationMethod(weights="tensor" if per_tensor else "channel", weight_qmax=2 ** (weight_bits - 1) - 1)
    photos = os.fspath(data)
    order = DeployOptions(
        runtimes=[to] if isinstance(to, str) else to,
        precisions=["fp32", *(["fp16", "bf16"] if half else []), *(["int8"] if int8 else [])],
        calibration=CalibrationOptions(
            data=photos, count=calibrate, method=method, search=True, skip_layers=skip_layers
        ),
        val=None if val is None else os.fspath(val),
        max_drop=max_drop,
        size=img_size,
        procedure=Procedure(samples=samples, threads=threads, warmup_seconds=WARMUP_S),
        quick=quick,
        minutes=minutes,
    )
    with show_progress():
        weights = select_ema_weights(source, use_ema)
        done = build_deployment(weights, Path(out), order, name=model, say=say or (lambda _: None))
    if done.failure is not None:
        raise done.failure
    for gate in done.undecided if say is None else ():  # nothing has said so
        _log.warning("undecided: %s", options_as_arguments(gate.sentence))
    for note in done.seen_notes if say is None else ():
        _log.warning("%s", note)
    return done


def build_deployment(
    source: str | Path, out: Path, order: DeployOptions, *, name: str | None = None, say: _Say
) -> DeployResult:
    """What `deploy` does, the failed gates left to the caller: see `DeployResult.failure`.

    Raises MissingExtra before anything is done, where a runtime or matplotlib is not installed; BadArgument where `out`
    holds something else.
    """
    order, budget = order.with_quick_limits(), TimeBudget(order.minutes)
    wanted = _wanted(order)
    require_extras([*order.runtimes, "report", *extras_for_sources(source, order.calibration.data, order.val)])
    require_matplotlib()  # that it works is seen here too, not at the report, after minutes of work
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadArgument(f"{out} is not empty: choose another --out, or remove it")
    network = open_network(source, name=name)
    if not network.is_fused:
        network, drift = network.fused()
        say(f"fused     drift {drift:.1e}")
    network = network.with_size(order.size)
    network.preprocessing.check_takes_photos()
    calibrates = network.card.int8 is None and any(precision == "int8" for _, precision in wanted)
    photos = deployment_photos(network, order, calibrates=calibrates)
    counted = describe_held_out(len(photos.scored), photos.num_held_out, labelled=photos.labelled)
    say(f"to score  {counted}; {photos.seen}" if photos.seen else f"held out  {counted}")
    if too_few := too_few_photos_note(len(photos.scored), order.max_drop, photos.num_held_out):
        _log.warning("%s", too_few if OnefoldError.on_command_line else options_as_arguments(too_few))
    order = replace(order, calibration=replace(order.calibration, photos=photos.calibration))
    with atomic_replace(out) as aside, _unfinished(out, _key(network, order, calibrates=calibrates), say) as folder:
        if order.quick:
            say(QUICK_NOTE)
        quantize = partial(calibrated_network, network, order.calibration, say, budget)
        kept, details = _kept_artifacts(folder, wanted, say), {"deployed": QUICK_NOTE} if order.quick else {}
        steps = plan_deployment(network, order, wanted, kept, len(photos.scored), calibrates=calibrates)
        artifacts, refused = _exported(network, quantize, wanted, kept, budget, folder, say, details, steps)
        done = _scored(network, artifacts, photos, order, budget, folder, say, steps)
        done = replace(done, gates=(*refused, *done.gates))
        write_gates(done.gates, folder / "results", [*done.notes, *done.seen_notes])
        steps.begin("explain")
        _explain(done)
        (folder / _KEY).unlink()
        folder.rename(aside)
    for gate in done.gates:
        say(f"{'FAILED' if gate.verdict == 'failed' else gate.verdict:9} {gate.sentence}")
    if order.timed:
        say(done.recommendation)
    return replace(done, folder=out)


def _key(network: Network, order: DeployOptions, *, calibrates: bool) -> str:
    """The digest of what the artifacts of a deployment depend on."""
    calibration = order.calibration
    photos = [] if calibration.photos is None or not calibrates else image_keys(calibration.select_photos(), "content")
    how = [asdict(calibration.method), calibration.search, calibration.skip_layers, order.quick]
    facts = [tensors_sha256(network.model.state_dict()), network.card.to_dict(), how, photos]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _unfinished(out: Path, key: str, say: _Say) -> Iterator[Path]:
    """The folder that a deployment is made in; one that was stopped is gone on with if it is of the same `key`.

    Raises BadArgument where another process is at work in it, and where it holds what no deployment has left.
    """
    folder = Path(os.path.abspath(out))
    folder = folder.with_name(f"{folder.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BadArgument(f"another process is making {out}: wait for it, or choose another --out") from error
    try:
        is_ours = (folder / _KEY).is_file()
        if not is_ours and any(folder.iterdir()):
            raise BadArgument(f"{folder} is not empty, and no deployment left it: rename it, or choose another --out")
        if is_ours and (folder / _KEY).read_text(encoding="utf-8") != key:
            say(f"removed   {folder.name}: it was left by a deployment of other weights, photos or options")
            shutil.rmtree(folder)
            folder.mkdir()
        write_text(folder / _KEY, key)
        shutil.rmtree(folder / "results", ignore_errors=True)
        try:
            yield folder
        except BaseException:
            made = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
            if made:
                _log.info("stopped: the same command goes on with %s, in %s", join_words(made), folder)
            elif folder.exists():
                shutil.rmtree(folder)
            raise
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _kept_artifacts(folder: Path, wanted: Sequence[tuple[str, str]], say: _Say) -> dict[str, Artifact]:
    """The artifacts that a stopped deployment has left whole, by name."""
    kept = {}
    for name in (f"{runtime}-{precision}" for runtime, precision in wanted):
        if (folder / name).is_dir():
            with suppress(BadArtifact):
                kept[name] = open_artifact(folder / name)
                say(f"kept      {name:20} from the deployment that was stopped")
    for path in folder.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path)
    return kept


def _wanted(order: DeployOptions) -> list[tuple[str, str]]:
    """Every runtime with every precision that both it and the order have. Raises BadArgument."""
    wanted = []
    for name in dict.fromkeys(order.runtimes):
        kind = import_runtime(name)
        known = [precision for precision in order.precisions if precision in kind.PRECISIONS]
        if not known:
            raise BadArgument(
                f"{name} has none of {', '.join(order.precisions)}: it can do {', '.join(kind.PRECISIONS)}"
            )
        wanted += [(name, precision) for precision in known]
    if not wanted:
        raise BadArgument("--to names no runtime")
    return wanted


def _scored(
    network: Network,
    artifacts: Mapping[str, Artifact],
    photos: DeploymentPhotos,
    order: DeployOptions,
    budget: TimeBudget,
    out: Path,
    say: _Say,
    steps: DeploySteps,
) -> DeployResult:
    """Score and time what runs here, as long as there is time."""
    title = photos.title
    asked = Evaluation(photos.scored, network, photos.labelled)
    steps.begin("score torch")
    with make_predictor(network, threads=order.procedure.threads) as torch_network:
        reference = asked.answers(torch_network)
        _, true, right, top1 = reference
        if asked.bad:
            title += f", without {len(asked.bad)} of {len(photos.scored)} photos, which cannot be read"
            say(f"left out  {len(asked.bad)} of {len(photos.scored)} photos, which cannot be read")
        title += warn_constant_predictions(true, photos, torch_network)
        held_out = max(photos.num_held_out, len(true))
        some = f"; {len(true)} of {held_out} held-out photos" if held_out > len(photos.scored) else ""
        some = f"; {len(true)} photos, {photos.seen}" if photos.seen else some
        say(
            f"scored    {'torch-fp32':20} "
            + (f"{describe_score(top1, len(true))}{some}" if top1 is not None else f"without labels: {title}")
        )
    verdicts, longest = [], 0.0
    whys = {name: import_runtime(each.runtime).unavailable_reason for name, each in artifacts.items()}
    runs = [name for name, why in whys.items() if why is None or why() is None]
    for name in runs:
        if not budget.allows(f"the score of {name}", longest):
            continue
        steps.begin(f"score {name}")
        began = time.monotonic()
        with open_predictor(out / name, threads=order.procedure.threads) as predictor:
            logits, answers, still_right, scored = asked.answers(predictor)
            if scored is not None:
                num_seen = photos.num_seen
                save_accuracy(predictor, title, scored, out / "results", count=len(answers), trained_on=num_seen)
        longest = max(longest, time.monotonic() - began)
        changed = int((answers != true).sum())
        lost, won = changed, 0
        if right is not None and still_right is not None:
            lost, won = int((right & ~still_right).sum()), int((still_right & ~right).sum())
        verdict = ArtifactResult(
            name=name,
            artifact=artifacts[name],
            top1=scored,
            changed=changed,
            count=len(true),
            lost=lost,
            won=won,
            num_held_out=held_out,
            same_logits=bool(np.array_equal(logits, reference.logits)),
        )
        verdicts.append(verdict)
        say(f"scored    {name:20} {describe_score(scored, len(true), changed=changed)}{some}")
    timed = _timed(out, runs, order, budget, say, steps) if order.timed else {}
    verdicts = [replace(each, measurement=timed.get(each.name)) for each in verdicts]
    notes = [*([QUICK_NOTE] if order.quick else []), *([budget.note] if budget.note else [])]
    if budget.note:
        say(budget.note)
    return DeployResult(
        folder=out,
        network=network,
        verdicts=tuple(verdicts),
        gates=tuple(accuracy_gate(each, order.max_drop, exact_fp32=order.exact_fp32) for each in verdicts),
        top1=top1,
        data=title,
        notes=tuple(notes),
        count=len(true),
        seen=photos.seen,
    )


def _exported(
    network: Network,
    quantize: Callable[[], Int8Network],
    wanted: Sequence[tuple[str, str]],
    kept: Mapping[str, Artifact],
    budget: TimeBudget,
    out: Path,
    say: _Say,
    details: Mapping[str, object],
    steps: DeploySteps,
) -> tuple[dict[str, Artifact], list[Gate]]:
    """The artifacts by name, and a failed gate for each runtime whose answer is not PyTorch's, which leaves none.

    Those of 8 bits come last, since calibration takes longest.
    """
    artifacts, refused, longest, made = {**kept}, [], 0.0, None
    traced = trace(network, None)
    for runtime, precision in sorted(wanted, key=lambda each: each[1] == "int8"):
        name = f"{runtime}-{precision}"
        if name in kept or (artifacts and not budget.allows(name, longest)):
            continue
        if precision == "int8" and made is None:
            steps.begin("calibrate")
            made = quantize()
            traced = trace(network, made)
        steps.begin(f"export {name}")
        began = time.monotonic()
        try:
            artifacts[name] = export_artifact(network, made, out / name, runtime, precision, details, traced)
        except GateFailed as error:
            refused.append(Gate(name=name, kind="parity", verdict="failed", sentence=f"{name}: {error}"))
            say(f"refused   {name:20} {error}")
        else:
            parity = artifacts[name].parity
            proof = "not run here: its first load checks its logits"
            proof = proof if parity is None else f"parity with {artifacts[name].compared_with} {parity.difference:.1e}"
            say(f"exported  {name:20} {proof}")
        longest = max(longest, time.monotonic() - began)
    names = [f"{runtime}-{precision}" for runtime, precision in wanted]
    return {name: artifacts[name] for name in names if name in artifacts}, refused


def _timed(
    out: Path, runs: list[str], order: DeployOptions, budget: TimeBudget, say: _Say, steps: DeploySteps
) -> dict[str, Measurement]:
    """All of them interleaved in one run, if there is time; the first is the baseline of the ratios."""
    if not runs or not budget.allows("the timing", steps.timing_seconds):
        return {}
    steps.begin("time")
    options = BenchOptions(sources=[str(out / name) for name in runs], procedure=order.procedure)
    outcome, _ = measure_sources(replace(options, cold=not order.quick, limits=not order.quick), out / "results")
    found = list(outcome.measurements.values()) if isinstance(outcome, Comparison) else [outcome]
    for name, each in zip(runs, found, strict=True):
        say(f"timed     {name:20} {each.median_ns / 1e6:.2f} ms, {each.verdict}")
    return dict(zip(runs, found, strict=True))


def _explain(done: DeployResult) -> None:
    """The texts and the page."""
    write_text(done.folder / "README.md", render_readme(done))
    seen = f" ({done.seen})" if done.seen else ""
    metrics = {} if done.top1 is None else {f"top1{seen}": done.top1}
    metrics |= {f"top1 {each.name}{seen}": each.top1 for each in done.verdicts if each.top1 is not None}
    write_text(done.folder / "MODEL_CARD.md", render_hub_readme(done.network.card, metrics, done.count))
    write_report_page([done.folder], done.folder / "report.html")
