"""The main road on embedded data, start to end: what a newcomer runs first, and what must never break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from onefold.bench import Comparison, Procedure
from onefold.commands.bench import BenchOptions, bench, note_accuracy
from onefold.commands.deploy import DeployOptions, DeployResult, deploy
from onefold.commands.fuse import fuse
from onefold.commands.open import open_predictor
from onefold.commands.quantizing import Calibration
from onefold.commands.report import write_page
from onefold.commands.train import Callbacks, start_run
from onefold.errors import BadArgument, GateFailed
from onefold.quantize import Method
from onefold.recipes import at_epochs, find_recipe
from onefold.report import require_matplotlib
from onefold.train import Progress

_RUNTIMES = ("onnx", "openvino")

Say = Callable[[str], None]


def demo(
    out: Path, *, say: Say, on_progress: Callable[[Progress], None] | None = None, epochs: int | None = None
) -> Path:
    """Train MobileOne-S0 on the digits, fuse, deploy to two runtimes in 32 and 8 bits, time, report; the page's path.

    Raises GateFailed where an answer of a 32-bit artifact differs from the network's, or 8 bits lose too much.
    """
    require_matplotlib()  # for the report at the end, after minutes of work
    if out.exists() and any(out.iterdir()):
        raise BadArgument(f"{out} is not empty: choose another --out, or remove it")
    run, results, artifacts = out / "runs" / "digits-s0", out / "results", out / "artifacts"

    torch.set_num_threads(1)  # on maps of 16 pixels and less, threads wait for each other longer than they compute
    recipe = find_recipe("digits:s0")
    if epochs is not None:
        recipe = at_epochs(recipe, epochs)
    say(f"1/5  train   {recipe.model} on scikit-learn's digits, {recipe.plan.epochs} epochs")
    outcome = start_run(recipe, run, callbacks=Callbacks(on_progress=on_progress))
    say(f"             top-1 {outcome.top1:.2f} % on {outcome.count} held-out digits")

    folded = fuse(run, out / "fused.safetensors")
    say(f"2/5  fuse    drift {folded.drift:.1e}; {folded.before.params:,} -> {folded.after.params:,} parameters")

    say(f"3/5  deploy  {' and '.join(_RUNTIMES)}, in 32 and in 8 bits")
    made = deploy(folded.path, artifacts, _order(full=epochs is None), say=lambda line: say(f"             {line}"))
    _check(made)
    with open_predictor(folded.path) as network, open_predictor(artifacts / "onnx-fp32") as artifact:
        for each in (network, artifact):
            note_accuracy(each, made.data, made.top1 or 0.0, results)

    order = BenchOptions(
        sources=[str(run), str(folded.path), str(artifacts / "onnx-fp32")],
        procedure=Procedure(samples=80, warmup_seconds=0.5),
        allow_unfused=True,
        cold=False,
    )
    compared, _ = bench(order, results)
    assert isinstance(compared, Comparison)
    for number, sentence in enumerate(compared.sentences()):
        say(f"{'4/5  bench ' if not number else '':11}  {sentence}")

    page = out / "report.html"
    write_page([out], page)
    say(f"5/5  report  {page}")
    return page


def _order(*, full: bool) -> DeployOptions:
    """What the demo deploys. Weights of 7 bits, so that every processor computes the same sums (see Method)."""
    return DeployOptions(
        runtimes=_RUNTIMES,
        precisions=("fp32", "int8"),
        calibration=Calibration(data="digits", count=64, method=Method(weight_qmax=63)),
        val="digits",
        max_drop=1.0 if full else 100.0,  # a network that has not learned may lose anything
        procedure=Procedure(samples=80, warmup_seconds=0.5),
    )


def _check(made: DeployResult) -> None:
    """Raises GateFailed where a 32-bit artifact gives another answer than the network to any digit."""
    for each in made.verdicts:
        if each.artifact.precision == "fp32" and each.changed:
            raise GateFailed(f"{each.changed} of {each.count} answers of {each.name} are not the network's")
