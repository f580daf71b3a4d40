"""Accuracy after the same wall time: MobileOne-S0 as ours and as timm's, the same recipe, three seeds each.

    python benchmarks/same_time.py run ours|timm SEED --data FOLDER [--seconds 240]
    python benchmarks/same_time.py report

The recipe is photos:scratch on photos at 64 px, on one thread; both start at their skips, as it says. A contender's
step and evaluation are timed first - timm's in both memory formats, of which the quicker is taken -, and the recipe is
as many epochs long as fit the time: so each goes through the whole of its schedule. FOLDER holds train/ and val/. Two
runs may go side by side on two cores. Results are kept beside this file; `report` prints them and draws
docs/same-time.svg.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from onefold.bench import Machine
from onefold.data import CachedDataset, ImageLoader, open_dataset
from onefold.models import create_model
from onefold.models.mobileone import zero_init_branches_
from onefold.recipes import Recipe, find_recipe, with_epochs, with_image_size
from onefold.reparam import quickest, set_route_
from onefold.train import RunOptions, compute_accuracy, seed_everything, train
from train_step import timm_model

HERE = Path(__file__).parent
SIZE, CLASSES = 64, 10


def build(contender: str, seed: int) -> nn.Module:
    seed_everything(seed)
    if contender == "ours":
        ours = create_model("mobileone_s0", num_classes=CLASSES)
        zero_init_branches_(ours)
        return set_route_(ours, quickest)
    model = timm_model("mobileone_s0")
    model.reset_classifier(CLASSES)
    for unit in model.modules():
        if type(unit).__name__ == "MobileOneBlock":
            branches = [*unit.conv_kxk, *([] if unit.conv_scale is None else [unit.conv_scale])]
            for branch in branches:
                nn.init.constant_(branch.bn.weight, len(branches) ** -0.5 if unit.identity is None else 0.0)
    return model


def seconds_of(call: Callable[[], object], times: int = 5) -> float:
    """The median, after one that is not counted."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def step_seconds(contender: str, batches: ImageLoader, channels_last: bool) -> float:
    model = build(contender, 0).train()
    images, labels = next(batches.epoch(0))
    if channels_last:
        model, images = (value.to(memory_format=torch.channels_last) for value in (model, images))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds_of(step)


def run(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    recipe: Recipe = with_image_size(find_recipe("photos:scratch"), SIZE)
    training = CachedDataset(open_dataset(str(given.data), "train", seed=0, val_fraction=0.2))
    held_out = CachedDataset(open_dataset(str(given.data), "val", seed=0, val_fraction=0.2))
    plan = replace(recipe.plan, seed=given.seed, workers=0)
    batches = ImageLoader(
        training, recipe.augment, batch_size=plan.batch_size, seed=given.seed, shuffle=True, on_bad="skip"
    )
    judged = ImageLoader(held_out, recipe.preprocessing, batch_size=plan.batch_size)

    def score(model: nn.Module) -> dict[str, float]:
        return compute_accuracy(model.eval(), judged.epoch(0)).metrics()

    for epoch in (batches.epoch(0), judged.epoch(0)):
        list(epoch)  # every photo decoded, for both alike
    loading = seconds_of(lambda: [None for _ in batches.epoch(1)], 1)
    formats = (True,) if given.contender == "ours" else (False, True)
    steps = {channels_last: step_seconds(given.contender, batches, channels_last) for channels_last in formats}
    channels_last = min(steps, key=steps.get)
    judging = seconds_of(lambda: score(build(given.contender, 0)), 1)
    epoch_s = loading + steps[channels_last] * len(batches) + judging
    epochs = max(1, int(given.seconds / epoch_s))
    sized = with_epochs(replace(recipe, plan=replace(plan, channels_last=channels_last)), epochs)
    model, curve, start = build(given.contender, given.seed).train(), [], time.perf_counter()

    def evaluate(model: nn.Module) -> dict[str, float]:
        found = score(model)
        curve.append((time.perf_counter() - start, found["top1"]))
        return found

    with tempfile.TemporaryDirectory() as folder:
        train(model, batches, sized.plan, RunOptions(out=Path(folder) / "run", evaluate=evaluate))
    result = {
        "benchmark": "same_time", "date": datetime.date.today().isoformat(), "machine": Machine.detect().to_dict(),
        "torch": torch.__version__, "contender": given.contender, "seed": given.seed, "seconds": given.seconds,
        "channels_last": channels_last, "epochs": epochs, "step_s": steps[channels_last], "curve": curve,
        "wall_s": time.perf_counter() - start, "top1": curve[-1][1],
    }  # fmt: skip
    with open(ledger(), "a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{given.contender} {given.seed}: {epochs} epochs, {result['wall_s']:.0f} s, top-1 {result['top1']:.1f} %")


def ledger() -> Path:
    return HERE / "results" / f"same-time-{Machine.detect().slug}.jsonl"


def report() -> None:
    from matplotlib.figure import Figure

    runs = [json.loads(line) for line in ledger().read_text().splitlines()]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for contender, colour in (("ours", "#0d9488"), ("timm", "#c2410c")):
        own = [run for run in runs if run["contender"] == contender]
        scores = [run["top1"] for run in own]
        spread = statistics.stdev(scores) if len(scores) > 1 else math.nan
        seconds = statistics.median(run["wall_s"] for run in own)
        epochs = statistics.median(run["epochs"] for run in own)
        label: str | None = f"{contender}: {statistics.mean(scores):.1f} % in {seconds:.0f} s, {epochs:.0f} epochs"
        print(f"{label}; seeds {scores}, s.d. {spread:.1f}")
        for run in own:
            at, top1 = zip((0, 100 / CLASSES), *run["curve"], strict=True)
            axes.plot(at, top1, color=colour, lw=1.2, marker=".", ms=3, label=label)
            label = None
    axes.set_xlabel("seconds of training on one thread")
    axes.set_ylabel("top-1 on held-out photos, %")
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs" / "same-time.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run")
    running.add_argument("contender", choices=("ours", "timm"))
    running.add_argument("seed", type=int)
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--seconds", type=float, default=240)
    verbs.add_parser("report")
    given = parser.parse_args()
    run(given) if given.verb == "run" else report()


if __name__ == "__main__":
    main()
