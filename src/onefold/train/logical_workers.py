"""Logical workers: a run is computed by V of them, fixed for its life, on any number W of processes.

Logical worker v of V has every V-th image of a batch, its own random numbers, its own BatchNorm statistics and its own
gradient. Process r of W computes V/W of them, from worker r V/W on. What a worker computes in a step is a function of
(seed, step, v) alone, so a run can go on with another W. Their gradients are added in gradient_reduction.py.

One worker in one process is the plain case and goes through none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import Protocol

from torch import Tensor

from onefold.errors import BadArgument
from onefold.train.distributed import World
from onefold.train.hyperparameters import Plan

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """The images and labels of this process, in an order that depends on nothing but the epoch."""

    def __len__(self) -> int:
        """Batches in an epoch; the same for every epoch."""
        ...

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """Batches start, start + 1, ... of epoch n: images (B, C, H, W) float32 and labels.

        Labels are (B,) int64 classes, or (B, classes) float32 probabilities. What a batch holds must not depend on
        `start`. Where a process computes several logical workers (see `worker_batches`), a step is the first's
        `plan.accumulate` batches, then the second's, and so on.
        """
        ...

    def fingerprint(self) -> str:
        """Give a digest of the data, by which a resume knows them again."""
        ...


def local_workers(plan: Plan, world: World) -> range:
    """Give the logical workers of this process. Raises BadArgument where the processes do not divide them.

    Where `plan.reduce` is "exact" the workers are a power of two, and so is any number of processes that divides them.
    """
    count, rest = divmod(plan.logical_workers, world.size)
    if rest or not count:
        raise BadArgument(
            f"{world.size} processes cannot share {plan.logical_workers} logical workers: start a number of processes "
            f"that divides {plan.logical_workers}, or start a run with another plan.logical_workers"
        )
    return range(world.rank * count, (world.rank + 1) * count)


def worker_batches(make: Callable[[int], Batches], plan: Plan, world: World) -> Batches:
    """Give the batches of this process, where `make(v)` gives those of logical worker v of `plan.logical_workers`."""
    parts = [make(v) for v in local_workers(plan, world)]
    return parts[0] if len(parts) == 1 else _Interleaved(parts, plan.accumulate)


class _Interleaved:
    """The batches of some logical workers: a step's of the first, then a step's of the second, and so on."""

    def __init__(self, parts: Sequence[Batches], accumulate: int) -> None:
        self._parts, self._accumulate = parts, accumulate

    def __len__(self) -> int:
        return len(self._parts) * len(self._parts[0])

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """Batches of epoch n from `start`, the first of a step, on."""
        first, rest = divmod(start, len(self._parts))
        if rest or first % self._accumulate:
            raise BadArgument(f"an epoch can be started at the first batch of a step, and batch {start} is within one")
        return self._epoch([part.epoch(n, first) for part in self._parts])

    def _epoch(self, streams: list[Iterator[Batch]]) -> Iterator[Batch]:
        try:
            while True:
                for stream in streams:
                    batches = list(islice(stream, self._accumulate))
                    if not batches:
                        return
                    yield from batches
        finally:
            for stream in streams:
                if isinstance(stream, Generator):  # its threads end now, not when it is collected
                    stream.close()

    def fingerprint(self) -> str:
        """Give the digest of the data, which is the same for all workers."""
        return self._parts[0].fingerprint()
