"""Logical workers: a run is computed by V of them, fixed for its life, on whatever processes there are that day.

Logical worker v of V has every V-th image of a batch, its own random numbers, its own BatchNorm statistics and its own
gradient. Process r of W stands in for the workers from r V/W on to the next process's. What a step computes is a
function of (seed, step, v) alone, so a run can go on with another W, and `plan.reduce` decides in how many bits:

"exact"  Gradients are added in one binary tree over the workers: below V/W leaves inside of a process, above by
         recursive doubling between processes. IEEE addition is commutative, so both sides of an exchange get the same
         bits, and the sum is the same at every W. V and W are powers of two.
"fast"   Gradients are added as they come and by all-reduce, overlapped with backward: the same samples, the same
         random numbers, another rounding.

Running statistics of norms, like all floating-point buffers, start each step equal and become the mean over the
workers: each of them saw a V-th of the batch, and worker 0's alone would be V times as noisy. Other buffers (counters)
are those of the process's first worker.

One worker in one process is the plain case and goes through none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import Protocol

from torch import Tensor

from onefold.errors import BadArgument
from onefold.train.distributed import World
from onefold.train.plan import Plan

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """The images and labels of this process, in an order that depends on nothing but the epoch."""

    def __len__(self) -> int:
        """Batches in an epoch; the same for every epoch."""
        ...

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """Batches start, start + 1, ... of epoch n: images (B, C, H, W) float32 and labels.

        Labels are (B,) int64 classes, or (B, classes) float32 shares. What a batch holds must not depend on `start`.
        Where a process stands in for K logical workers (see `of_workers`), a step is the first's `plan.accumulate`
        batches, then the second's, and so on.
        """
        ...

    def fingerprint(self) -> str:
        """What tells these data from others."""
        ...


def own_workers(plan: Plan, world: World) -> range:
    """The logical workers that this process stands in for. Raises BadArgument where the processes do not divide them.

    Of numbers of processes that do, those work with "exact" that divide a power of two.
    """
    share, rest = divmod(plan.logical_workers, world.size)
    if rest or not share:
        raise BadArgument(
            f"{world.size} processes cannot share {plan.logical_workers} logical workers: start a number of processes "
            f"that divides {plan.logical_workers}, or begin a run with another plan.logical_workers"
        )
    return range(world.rank * share, (world.rank + 1) * share)


def of_workers(make: Callable[[int], Batches], plan: Plan, world: World) -> Batches:
    """The batches of this process: `make(v)` gives those of logical worker v of `plan.logical_workers`."""
    parts = [make(v) for v in own_workers(plan, world)]
    return parts[0] if len(parts) == 1 else _InTurn(parts, plan.accumulate)


class _InTurn:
    """The batches of some logical workers: a step's of the first, then a step's of the second, and so on."""

    def __init__(self, parts: Sequence[Batches], accumulate: int) -> None:
        self._parts, self._accumulate = parts, accumulate

    def __len__(self) -> int:
        return len(self._parts) * len(self._parts[0])

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """Batches of epoch n from `start`, the first of a step, on."""
        first, rest = divmod(start, len(self._parts))
        if rest or first % self._accumulate:
            raise BadArgument(f"an epoch can be begun where a step begins, and batch {start} is within one")
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
        """What tells these data from others."""
        return self._parts[0].fingerprint()
