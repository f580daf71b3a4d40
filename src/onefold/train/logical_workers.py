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

import torch
from torch import Tensor, nn

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


class Reducer(Protocol):
    """Collects a step: `begin`, then backward and `take` for each worker of this process, then `finish`."""

    weight: float
    """What a worker's loss, a sum over its images divided by the batch's size, is multiplied by before backward."""

    def begin(self) -> None:
        """Before the first worker: remember the buffers that all of them start from."""

    def take(self, loss: float, count: int) -> None:
        """After a worker's backward: its gradient, buffers, sum of losses and images are in; its successor's turn."""

    def finish(self) -> tuple[float, int]:
        """Put the gradient of all images, and the buffers, in place; the mean loss and the images of all workers."""


def make_reducer(model: nn.Module, plan: Plan, world: World) -> Reducer | None:
    """The plan's way of adding; None for one worker in one process. Makes the processes start from equal weights.

    Raises BadArgument for a model whose forward talks to other processes, where the plan asks for exactness.
    """
    if plan.logical_workers == 1:
        return None
    if world.size > 1:
        for value in model.state_dict().values():
            world.send_from_first_(value)
    if plan.reduce == "fast":
        return _Fast(model, plan, world)
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise BadArgument(
            "plan.reduce 'exact' cannot have SyncBatchNorm, whose statistics depend on the number of processes: "
            "use BatchNorm (each logical worker normalizes its own images), or plan.reduce 'fast'"
        )
    return _Exact(model, plan, world)


class _Buffers:
    """The floating-point buffers of a model, as a vector; and what the others were after the first worker."""

    def __init__(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        self.floats = [b for b in buffers if b.is_floating_point()]
        self._others = [b for b in buffers if not b.is_floating_point()]
        self._start: list[Tensor] = []
        self._kept: list[Tensor] | None = None

    def begin(self) -> None:
        self._start = [b.clone() for b in (*self.floats, *self._others)]
        self._kept = None

    def rewind(self) -> None:
        """Back to where the step began."""
        if self._kept is None:
            self._kept = [b.clone() for b in self._others]
        for buffer, value in zip((*self.floats, *self._others), self._start, strict=True):
            buffer.copy_(value)

    def finish(self) -> None:
        for buffer, value in zip(self._others, self._kept or [], strict=True):
            buffer.copy_(value)


class _Exact:
    """A binary counter of partial sums: after worker v there is one for each bit that is set in v + 1."""

    weight = 1.0

    def __init__(self, model: nn.Module, plan: Plan, world: World) -> None:
        self._buffers, self._world, self._plan, self._model = _Buffers(model), world, plan, model
        self._parameters: list[nn.Parameter] = []
        places = [*model.parameters(), *self._buffers.floats]
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in places) else torch.float32
        self._partial: list[tuple[int, Tensor]] = []  # workers in it, and their sum (F + 2,)

    @torch.no_grad()
    def begin(self) -> None:
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._buffers.begin()
        self._partial = []

    @torch.no_grad()
    def take(self, loss: float, count: int) -> None:
        # a parameter that this worker's graph did not reach has a gradient of zero: another's may have reached it
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        floats = [value.reshape(-1).to(self._dtype) for value in (*grads, *self._buffers.floats)]
        ends = torch.tensor([loss, count], dtype=self._dtype, device=self._world.device)
        size, summed = 1, torch.cat([*floats, ends])
        for parameter in self._parameters:
            parameter.grad = None
        self._buffers.rewind()
        while self._partial and self._partial[-1][0] == size:
            size, summed = 2 * size, self._partial.pop()[1].add_(summed)
        self._partial.append((size, summed))

    @torch.no_grad()
    def finish(self) -> tuple[float, int]:
        [(_, summed)] = self._partial
        self._partial = []
        distance = 1
        while distance < self._world.size:
            theirs = self._world.swap(summed, self._world.rank ^ distance)
            summed, distance = summed.add_(theirs), 2 * distance
        loss, count = summed[-2:].tolist()
        images = round(count)
        sizes = [p.numel() for p in (*self._parameters, *self._buffers.floats)]
        values = iter(summed[:-2].split(sizes))
        for parameter in self._parameters:
            value = next(values).view(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(value)
            if images != self._plan.batch_size:
                parameter.grad.mul_(self._plan.batch_size / images)
        for buffer in self._buffers.floats:
            buffer.copy_((next(values) / self._plan.logical_workers).view(buffer.shape))
        self._buffers.finish()
        return loss / images, images


class _Fast:
    """Gradients are added where they lie, and averaged over processes by DistributedDataParallel during backward."""

    def __init__(self, model: nn.Module, plan: Plan, world: World) -> None:
        self._model, self._buffers, self._world, self._plan = model, _Buffers(model), world, plan
        self.weight = float(world.size)  # what the average divides by
        self._summed = torch.zeros(0)

    @torch.no_grad()
    def begin(self) -> None:
        self._buffers.begin()
        size = sum(b.numel() for b in self._buffers.floats)
        self._summed = torch.zeros(size + 2, dtype=torch.float64, device=self._world.device)

    @torch.no_grad()
    def take(self, loss: float, count: int) -> None:
        floats = [b.reshape(-1).double() for b in self._buffers.floats]
        self._summed += torch.cat([*floats, self._summed.new_tensor([loss, count])])
        self._buffers.rewind()

    @torch.no_grad()
    def finish(self) -> tuple[float, int]:
        self._world.add_up_(self._summed)
        loss, count = self._summed[-2:].tolist()
        images = round(count)
        if images != self._plan.batch_size:
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._plan.batch_size / images)
        sizes = [b.numel() for b in self._buffers.floats]
        means = (self._summed[:-2] / self._plan.logical_workers).split(sizes)
        for buffer, mean in zip(self._buffers.floats, means, strict=True):
            buffer.copy_(mean.view(buffer.shape))
        self._buffers.finish()
        return loss / images, images
