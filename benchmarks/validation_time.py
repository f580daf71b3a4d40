"""The validation of a training, by one process and by two of one thread each: how long, and what it is spent on.

    python benchmarks/validation_time.py [--images 50000] [--rounds 3] [--model mobilenetv1_025] [--img-size 32]

Pictures are drawn and written to a folder, and a network evaluates them as `train` does (see `validation_loop.py`). In
turns: by one process; by two, each every other batch, with their metrics put together; and by two that know nothing of
each other, half of the images each, which is what this machine can gain at the most. Times are from a common start to
the last process's metrics, without the start of the processes. The metrics of one process and of two must be equal to
the bit. `shared 2 / 1` is the ratio that counts; where other work takes the processors, that of processor time (of the
process that used more) says what it would be without. Linux.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from onefold.commands.open_network import Network
from onefold.commands.validation_loop import Evaluator
from onefold.data import ImageLoader, Subset
from onefold.data.folders import ImageFiles
from onefold.models import create_model
from onefold.models.load_model import Card
from onefold.recipes import make_recipe
from onefold.train import World, evaluate, init_world
from onefold.train.launch import launch


def draw(folder: Path, count: int, size: int) -> ImageFiles:
    """Write so many JPEGs of drawn shapes on noise, of ten classes."""
    rng, names = np.random.default_rng(0), []
    low = rng.integers(0, 255, (count, 4, 4, 3), np.uint8)
    for i in range(count):
        names.append(f"{i:06d}.jpg")
        Image.fromarray(low[i]).resize((size + 8, size), Image.Resampling.BICUBIC).save(folder / names[-1], quality=90)
    return ImageFiles(folder, names, [i % 10 for i in range(count)], tuple("0123456789"))


def timed(parts: Counter[str], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that adds the seconds that it takes to one of `parts`."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            parts[part] += time.perf_counter() - began

    return call


def validate(images: ImageFiles, model: str, size: int, out: Path, shared: bool) -> int:
    """Evaluate as one of several processes; writes seconds, parts and metrics beside `out`."""
    parts = Counter[str]()
    for owner, name, part in (
        (Network, "fused", "fuse"),
        (ImageLoader, "_make", "decode"),
        (ImageLoader, "_collate", "stack"),
        (evaluate, "_predictions", "count"),
    ):
        setattr(owner, name, timed(parts, part, getattr(owner, name)))
    with init_world("cpu") as world:
        torch.manual_seed(0)
        network = create_model(model, num_classes=10).eval()
        recipe = make_recipe("digits:w025", {"model": model}, size=size)
        card = Card(model=model, num_classes=10, preprocessing=recipe.preprocessing.to_dict())
        own = images if shared else Subset(images, list(range(world.rank, len(images), world.size)))
        place = world if shared else World()
        evaluator = Evaluator(card=card, validation=own, recipe=recipe, world=place)
        world.max(0)  # all are here
        began, used = time.perf_counter(), time.process_time()
        share = evaluator(network)
        parts["own share"] = time.perf_counter() - began
        shares = place.all_gather(share)
        parts["gather"] = time.perf_counter() - began - parts["own share"]
        metrics = evaluator.combine(shares)
        seconds = time.perf_counter() - began
        parts["combine"] = seconds - parts["own share"] - parts["gather"]
        told = {"seconds": seconds, "cpu": time.process_time() - used, "parts": parts, "metrics": metrics}
        out.with_name(f"{out.name}.{world.rank}").write_text(json.dumps(told))
    return 0


def main() -> None:
    """Print a line for each measurement, and the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="mobilenetv1_025")
    parser.add_argument("--img-size", type=int, default=32)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    ratios = {f"{kind}, {what}": list[float]() for kind in ("shared", "apart") for what in ("seconds", "cpu")}
    with tempfile.TemporaryDirectory() as folder:
        images = draw(Path(folder), given.images, given.img_size)
        print(f"{given.images} images, {given.model} at {given.img_size} px, load {os.getloadavg()[0]:.1f}")
        for _ in range(given.rounds):
            one = dict[str, Any]()
            for processes, kind in ((1, "alone"), (2, "shared"), (2, "apart")):
                out = Path(folder, "told")
                work = functools.partial(validate, images, given.model, given.img_size, out, kind != "apart")
                if launch(work, processes, 0):
                    raise SystemExit("a process was lost")
                told = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]
                most = {what: max(each[what] for each in told) for what in ("seconds", "cpu")}
                parts = {name: [round(each["parts"][name], 1) for each in told] for name in told[0]["parts"]}
                print(
                    f"{kind:7} {processes} {most['seconds']:6.1f} s, processor {most['cpu']:6.1f} s  {parts}",
                    flush=True,
                )
                if kind == "alone":
                    one = told[0]
                    continue
                for what, value in most.items():
                    ratios[f"{kind}, {what}"].append(value / one[what])
                if kind == "shared" and told[0]["metrics"] != one["metrics"]:
                    raise SystemExit(f"the metrics differ: {told[0]['metrics']}, {one['metrics']}")
    for kind, values in ratios.items():
        print(f"{kind:15} 2 / 1: {statistics.median(values):.3f} of {[round(value, 3) for value in values]}")


if __name__ == "__main__":
    main()
