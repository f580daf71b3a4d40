"""The main road on embedded data, start to end: what a newcomer runs first, and what must never break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from onefold.bench import Comparison, Procedure
from onefold.data import Batches, Source
from onefold.errors import BadArgument, GateFailed
from onefold.recipes import at_epochs, find_recipe
from onefold.stages.answers import evaluate
from onefold.stages.folding import Order, export, fuse
from onefold.stages.measuring import Bench, bench, note_accuracy
from onefold.stages.network import Predictor, open_predictor
from onefold.stages.page import write_page
from onefold.stages.training import start_run, validation_images
from onefold.stages.watching import Watch
from onefold.train import Progress

Say = Callable[[str], None]


def demo(
    out: Path, *, say: Say, on_progress: Callable[[Progress], None] | None = None, epochs: int | None = None
) -> Path:
    """Train MobileOne-S0 on the digits, fuse, export to ONNX, check, time fused against unfused; the report's path.

    Raises GateFailed where any answer of the artifact differs from the network's.
    """
    if out.exists() and any(out.iterdir()):
        raise BadArgument(f"{out} is not empty: choose another --out, or remove it")
    run, results, artifacts = out / "runs" / "digits-s0", out / "results", out / "artifacts"

    torch.set_num_threads(1)  # on maps of 16 pixels and less, threads wait for each other longer than they compute
    recipe = find_recipe("digits:s0")
    if epochs is not None:
        recipe = at_epochs(recipe, epochs)
    say(f"1/6  train   {recipe.model} on scikit-learn's digits, {recipe.plan.epochs} epochs")
    outcome = start_run(recipe, run, watch=Watch(on_progress=on_progress))
    say(f"             top-1 {outcome.top1:.2f} % on {outcome.count} held-out digits")

    folded = fuse(run, out / "fused.safetensors")
    say(f"2/6  fuse    drift {folded.drift:.1e}; {folded.before.params:,} -> {folded.after.params:,} parameters")

    fused = export(folded.path, artifacts, Order(runtimes=["onnx"]))[0]
    parity = "not run where it was made" if fused.parity is None else f"parity {fused.parity.difference:.1e}"
    say(f"3/6  export  {fused.folder}, {parity}")

    images, label = validation_images(run, None)
    with open_predictor(folded.path) as network, open_predictor(fused.folder) as artifact:
        top1 = _check(network, artifact, images)
        for each in (network, artifact):
            note_accuracy(each, label, top1, results)
    say(f"4/6  check   ONNX Runtime answers as PyTorch on all {len(images)} digits: top-1 {top1:.2f} %")

    order = Bench(
        sources=[str(run), str(folded.path), str(fused.folder)],
        procedure=Procedure(samples=80, warmup_seconds=0.5),
        allow_unfused=True,
    )
    compared, _ = bench(order, results)
    assert isinstance(compared, Comparison)
    for number, sentence in enumerate(compared.sentences()):
        say(f"{'5/6  bench ' if not number else '':11}  {sentence}")

    page = write_page([out], out / "report.html")
    say(f"6/6  report  {page}")
    return page


def _check(network: Predictor, artifact: Predictor, images: Source) -> float:
    """The top-1 of both, once every single answer was found to be the same. Raises GateFailed."""
    batches = Batches(images, network.preprocessing, batch_size=64)
    differing = sum(
        int((network.answer(x.numpy()).argmax(1) != artifact.answer(x.numpy()).argmax(1)).sum())
        for x, _ in batches.epoch(0)
    )
    scores = [evaluate(each, images) for each in (network, artifact)]
    if differing or scores[0].top1 != scores[1].top1:
        raise GateFailed(f"{differing} of {len(images)} answers of the artifact are not the network's")
    return scores[1].top1
