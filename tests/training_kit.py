"""A tiny network, tiny data, and a training of them that a test can start, stop and kill.

As a program: `python training_kit.py OUT resume|begin` trains to the end and prints a line a step. With `endless` as a
third argument it waits behind the last step, until it is killed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onefold.train import (
    SGD,
    Checkpoint,
    Cosine,
    Ema,
    Plan,
    Progress,
    RunOptions,
    Steps,
    WeightDecay,
    compute_accuracy,
    train,
    worker_batches,
)

NUM_CLASSES = 6


def network(seed: int = 0) -> nn.Module:
    """Conv, BatchNorm, depthwise conv, dropout: everything with a state."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8, NUM_CLASSES),
    )


@dataclass(frozen=True)
class Blobs:
    """Images of a colour a class, with noise that is a function of the epoch and the image."""

    num_images: int = 24
    batch_size: int = 4
    seed: int = 0
    spoilt: int = -1  # from this epoch on the images are infinite
    worker: int = 0
    num_workers: int = 1
    log: str = ""  # a file for a line a batch: which images it holds

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def fingerprint(self) -> str:
        return f"blobs {self.num_images} {self.seed}"

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        rng = torch.Generator().manual_seed(1000 * self.seed + n)
        order = torch.randperm(self.num_images, generator=rng)
        for at, whole in enumerate(order.split(self.batch_size)[start:], start):
            chosen = whole[self.worker :: self.num_workers]
            if self.log:
                with open(self.log, "ab", buffering=0) as log:  # one write: whole, whoever else writes
                    log.write(json.dumps([n, at, self.worker, chosen.tolist()]).encode() + b"\n")
            yield self.images(chosen, n), chosen % NUM_CLASSES

    def images(self, chosen: Tensor, n: int = 0) -> Tensor:
        noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(97 * i + n))) for i in chosen]
        colours = torch.randn(NUM_CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(self.seed))
        images = colours[chosen % NUM_CLASSES] + 0.5 * torch.stack(noise)
        return images / 0.0 if 0 <= self.spoilt <= n else images


PLAN = Plan(
    epochs=3,
    batch_size=4,
    optimizer=SGD(lr=0.1, momentum=0.9),
    schedule=Cosine(final=1e-3, warmup=Steps(3)),
    weight_decay=WeightDecay(start=1e-3, final=1e-4, skip=("norm", "bias")),
    label_smoothing=0.1,
    ema=Ema(decay=0.95, warmup=True),
    clip_grad_norm=5.0,
    checkpoint_every=Steps(2),
    seed=3,
)


def score(model: nn.Module) -> Mapping[str, float]:
    """Accuracy on images that training does not see."""
    data = Blobs(num_images=18, batch_size=9)
    torch.rand(1)  # an evaluation may draw, and must not change the run
    return compute_accuracy(model, data.epoch(10_000)).metrics()


def fresh(out: Path, plan: Plan = PLAN, data: Blobs = Blobs(), **run: object) -> Checkpoint:
    """A training of a new network in `out`, by as many logical workers as the plan says."""
    given: dict[str, object] = {"evaluate": score, **run}
    around = RunOptions(out=out, **given)  # type: ignore[arg-type]
    num_workers = plan.logical_workers
    batches = worker_batches(
        lambda v: replace(data, worker=v, num_workers=num_workers) if num_workers > 1 else data, plan, around.world
    )
    return train(network(), batches, plan, around)


class StoppedError(Exception):
    """A run that a test has stopped."""


def stop_at(epoch: int, step: int) -> Callable[[Progress], None]:
    """What a run can be told its progress through, to be stopped there."""

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (epoch, step):
            raise StoppedError

    return stop


def main(out: str, how: str, end: str = "") -> None:
    torch.set_num_threads(1)

    def say(progress: Progress) -> None:
        last = progress.global_step == progress.epochs * progress.steps
        print("last" if last else progress.global_step, flush=True)
        while last and end == "endless":
            time.sleep(60)

    print("digest", fresh(Path(out), resume=how == "resume", on_progress=say).digest(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
