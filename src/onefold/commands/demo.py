"""The whole road on embedded data, as a newcomer runs it first: train, fuse, deploy, measure, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from onefold.bench import Comparison, Procedure
from onefold.commands.bench import ROOFLINE_SUFFIX, BenchOptions, measure_sources, save_accuracy
from onefold.commands.calibration_cache import CalibrationOptions
from onefold.commands.deploy import build_deployment
from onefold.commands.deploy_gates import Gate, write_gates
from onefold.commands.deploy_results import DeployOptions, DeployResult
from onefold.commands.fuse import fuse
from onefold.commands.optional_dependencies import require_extras
from onefold.commands.predictor import open_predictor
from onefold.commands.report import write_report_page
from onefold.commands.train import Callbacks, start_run
from onefold.errors import BadArgument, GateFailed
from onefold.quantize import QuantizationMethod
from onefold.recipes import Recipe, find_recipe, with_epochs
from onefold.report import require_matplotlib
from onefold.runtimes.openvino import int8_sums_saturate
from onefold.train import Progress

_RUNTIMES = ("onnx", "openvino")

_Say = Callable[[str], None]


def demo(
    out: Path,
    *,
    say: _Say,
    on_progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
    epochs: int | None = None,
) -> Path:
    """Train MobileOne-S0 on the digits, fuse, deploy to two runtimes in fp32 and int8, time, report; the report's path.

    Raises GateFailed where an answer of an fp32 artifact differs from the network's, int8 loses too much accuracy, or
    fusing changes the answers: once all that could still be made, the report among it, is written.
    """
    require_extras(["demo"])
    require_matplotlib()  # that it works is seen here too, not at the report, after minutes of work
    if out.exists() and any(out.iterdir()):
        raise BadArgument(f"{out} is not empty: choose another --out, or remove it")
    torch.set_num_threads(1)  # on maps of 16 pixels and less, threads wait for each other longer than they compute
    run = out / "runs" / "digits-s0"
    recipe, order = demo_recipe(seed, epochs), deploy_options(full=epochs is None)
    say(f"1/5  train   {recipe.model} on scikit-learn's digits, {recipe.plan.epochs} epochs, seed {seed}")
    outcome = start_run(recipe, run, callbacks=Callbacks(on_progress=on_progress))
    low, high = outcome.interval
    say(f"             top-1 {outcome.top1:.2f} % ({low:.1f} to {high:.1f}) on {outcome.count} held-out digits")
    try:
        failure = _from_run(run, out, order, say).failure
    except GateFailed as error:  # fusing's: nothing could be deployed
        write_gates([Gate(name=run.name, kind="fusing", verdict="failed", sentence=str(error))], out / "results")
        failure = error
    page = out / "report.html"
    write_report_page([out], page)
    say(f"5/5  report  {page}")
    if failure is not None:
        raise failure
    return page


def demo_recipe(seed: int, epochs: int | None = None) -> Recipe:
    """The training of the demo: digits:s0 with this seed in its plan."""
    recipe = find_recipe("digits:s0")
    recipe = replace(recipe, plan=replace(recipe.plan, seed=seed))
    return recipe if epochs is None else with_epochs(recipe, epochs)


def deploy_options(*, full: bool = True) -> DeployOptions:
    """What the demo deploys, and how it is calibrated; where the training is not the full one, int8 may lose anything.

    int8 is calibrated on 200 images, evenly over the training part. They are of the same kind as those that are scored:
    so correcting the weights for the errors of earlier layers pays, it takes away about a third of the noise
    (benchmarks/demo_seeds.py). Weights have 8 bits, or 7 where OpenVINO's sums would saturate on this processor.
    """
    method = QuantizationMethod(correct_weights=True, weight_qmax=63 if int8_sums_saturate() else 127)
    return DeployOptions(
        runtimes=_RUNTIMES,
        precisions=("fp32", "int8"),
        calibration=CalibrationOptions(data="digits", count=200 if full else 32, method=method),
        val="digits",
        max_drop=1.0 if full else 100.0,
        exact_fp32=True,
        procedure=Procedure(samples=80, warmup_seconds=0.5) if full else Procedure(samples=16, warmup_seconds=0.1),
    )


def _from_run(run: Path, out: Path, order: DeployOptions, say: _Say) -> DeployResult:
    """Fuse, deploy, and time the network before and after; gates of the deployment that failed are in what it gives."""
    results, artifacts = out / "results", out / "artifacts"
    folded = fuse(run, out / "fused.safetensors")
    say(f"2/5  fuse    drift {folded.drift:.1e}; {folded.before.params:,} -> {folded.after.params:,} parameters")

    say(f"3/5  deploy  {' and '.join(order.runtimes)}, in {' and '.join(order.precisions)}")
    deployed = build_deployment(folded.path, artifacts, order, say=lambda line: say(f"             {line}"))
    scores = {folded.path: deployed.top1}
    scores |= {artifacts / each.name: each.top1 for each in deployed.verdicts if each.name == "onnx-fp32"}
    for source, top1 in scores.items():
        with open_predictor(source) as predictor:
            save_accuracy(predictor, deployed.data, top1 or 0.0, results, count=deployed.count)

    for limits in (artifacts / "results").glob(f"*{ROOFLINE_SUFFIX}"):  # this machine's, not to be measured twice
        shutil.copy(limits, results / limits.name)
    # The unfused network is so much slower that fewer calls tell it: 64, the fewest that have a p90.
    procedure = replace(order.procedure, samples=min(order.procedure.samples, 64), lead_calls=1)
    compared, _ = measure_sources(
        BenchOptions(sources=[str(run), *map(str, scores)], procedure=procedure, allow_unfused=True, cold=False),
        results,
    )
    assert isinstance(compared, Comparison)
    for number, sentence in enumerate(compared.sentences()):
        say(f"{'4/5  bench ' if not number else '':11}  {sentence}")
    return deployed
