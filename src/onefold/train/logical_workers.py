"""Logical workers: a run is computed by V of them, fixed for its life, on any number W of processes.

Logical worker v of V has every V-th image of a batch, its own random numbers, its own BatchNorm statistics and its own
gradient. Process r of W computes V/W of them, from worker r V/W on. What a worker computes in a step is a function of
(seed, step, v) alone, so a run can go on with another W, and `plan.reduce` decides how its gradients are added:

"exact"  Gradients are added in one binary tree over the workers: below V/W leaves inside of a process, above by
         recursive doubling between processes. IEEE addition is commutative, so both sides of an exchange get the same
         bits, and the sum is the same at every W. V and W are powers of two.
"fast"   Gradients are added as they come and by all-reduce, overlapped with backward: the same samples, the same
         random numbers, another rounding.

Running statistics of norms, like all floating-point buffers, start each step equal and become the mean over the
workers: each of them saw a V-th of the batch, and worker 0's alone would be V times as noisy. Other buffers (counters)
are those of the process's first worker.

One worker in one process is the plain case and goes through none of this. F below is the number of floats in a model's
gradients and buffers together, laid out in one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

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


class Reducer(Protocol):
    """Collects a step: `begin_step`, then backward and `add_worker` for each worker here, then `finish_step`."""

    weight: float
    """What a worker's loss, a sum over its images divided by the batch's size, is multiplied by before backward."""

    def begin_step(self) -> None:
        """Save the buffers that all workers start from."""

    def add_worker(self, loss: Tensor, count: int) -> None:
        """Add a worker's gradient, buffers, sum of losses () and images, and restore the buffers for the next one."""

    def finish_step(self, flag: bool = False) -> tuple[float, int, bool]:
        """Set the gradient of all images, and the buffers; gives the mean loss and the images of all workers.

        Last comes whether any process gave the `flag`, which travels with the sums.
        """


def create_reducer(model: nn.Module, plan: Plan, world: World) -> Reducer | None:
    """Give the plan's reducer; None for one worker in one process. Makes the processes start from equal weights.

    Raises BadArgument for a model whose forward communicates with other processes, where `plan.reduce` is "exact".
    """
    if plan.logical_workers == 1:
        return None
    if world.size > 1:
        for value in model.state_dict().values():
            world.broadcast_tensor_(value)
    if plan.reduce == "fast":
        return _FastReducer(model, plan, world)
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise BadArgument(
            "plan.reduce 'exact' cannot have SyncBatchNorm, whose statistics depend on the number of processes: "
            "use BatchNorm (each logical worker normalizes its own images), or plan.reduce 'fast'"
        )
    return _ExactReducer(model, plan, world)


class _Buffers:
    """The buffers of a model over a step: the floats to be averaged, the others as the first worker left them."""

    def __init__(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        self.floats = [b for b in buffers if b.is_floating_point()]
        self._others = [b for b in buffers if not b.is_floating_point()]
        self._start: list[Tensor] = []
        self._saved: list[Tensor] | None = None

    def begin(self) -> None:
        self._start = [b.clone() for b in (*self.floats, *self._others)]
        self._saved = None

    def restore(self) -> None:
        """Put the buffers back to what they were when the step began."""
        if self._saved is None:
            self._saved = [b.clone() for b in self._others]
        for buffer, value in zip((*self.floats, *self._others), self._start, strict=True):
            buffer.copy_(value)

    def finish(self) -> None:
        for buffer, value in zip(self._others, self._saved or [], strict=True):
            buffer.copy_(value)


class _ExactReducer:
    """A binary counter of partial sums: after worker v there is one for each bit that is set in v + 1."""

    weight = 1.0

    def __init__(self, model: nn.Module, plan: Plan, world: World) -> None:
        self._buffers, self._world, self._plan, self._model = _Buffers(model), world, plan, model
        self._parameters: list[nn.Parameter] = []
        values = [*model.parameters(), *self._buffers.floats]
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in values) else torch.float32
        self._partial: list[tuple[int, Tensor]] = []  # (number of workers, sum of their vectors (F + 3,))

    @torch.no_grad()
    def begin_step(self) -> None:
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._buffers.begin()
        self._partial = []

    @torch.no_grad()
    def add_worker(self, loss: Tensor, count: int) -> None:
        # a parameter that this worker's graph did not reach has a gradient of zero: another's may have reached it
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        floats = [value.reshape(-1).to(self._dtype) for value in (*grads, *self._buffers.floats)]
        size, total = 1, torch.cat([*floats, _totals(loss, count).to(self._dtype)])
        for parameter in self._parameters:
            parameter.grad = None
        self._buffers.restore()
        # as a carry runs through a binary counter: equal sizes meet, so the tree is the same at any number of processes
        while self._partial and self._partial[-1][0] == size:
            size, total = 2 * size, self._partial.pop()[1].add_(total)
        self._partial.append((size, total))

    @torch.no_grad()
    def finish_step(self, flag: bool = False) -> tuple[float, int, bool]:
        [(_, total)] = self._partial
        self._partial = []
        total[-1] += flag
        # The upper levels of the tree: both sides add the same two vectors, and a + b = b + a to the bit.
        distance = 1
        while distance < self._world.size:
            received = self._world.sendrecv(total, self._world.rank ^ distance)
            total, distance = total.add_(received), 2 * distance
        loss, count, flags = total[-3:].tolist()
        images = round(count)
        sizes = [p.numel() for p in (*self._parameters, *self._buffers.floats)]
        values = iter(total[:-3].split(sizes))
        for parameter in self._parameters:
            value = next(values).view(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(value)
            if images not in (0, self._plan.batch_size):  # some could not be read: the mean is over those there were
                parameter.grad.mul_(self._plan.batch_size / images)
        for buffer in self._buffers.floats:
            buffer.copy_((next(values) / self._plan.logical_workers).view(buffer.shape))
        self._buffers.finish()
        return loss / max(1, images), images, flags > 0


class _FastReducer:
    """Gradients are added where they lie, and averaged over processes by DistributedDataParallel during backward."""

    def __init__(self, model: nn.Module, plan: Plan, world: World) -> None:
        self._model, self._buffers, self._world, self._plan = model, _Buffers(model), world, plan
        self.weight = float(world.size)  # what the average divides by
        self._summed = torch.zeros(0)

    @torch.no_grad()
    def begin_step(self) -> None:
        self._buffers.begin()
        size = sum(b.numel() for b in self._buffers.floats)
        self._summed = torch.zeros(size + 3, dtype=torch.float64, device=self._world.device)

    @torch.no_grad()
    def add_worker(self, loss: Tensor, count: int) -> None:
        floats = [b.reshape(-1).double() for b in self._buffers.floats]
        self._summed += torch.cat([*floats, _totals(loss, count)])
        self._buffers.restore()

    @torch.no_grad()
    def finish_step(self, flag: bool = False) -> tuple[float, int, bool]:
        self._summed[-1] += flag
        self._world.all_reduce_(self._summed)
        loss, count, flags = self._summed[-3:].tolist()
        images = round(count)
        if images not in (0, self._plan.batch_size):
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._plan.batch_size / images)
        sizes = [b.numel() for b in self._buffers.floats]
        means = (self._summed[:-3] / self._plan.logical_workers).split(sizes)
        for buffer, mean in zip(self._buffers.floats, means, strict=True):
            buffer.copy_(mean.view(buffer.shape))
        self._buffers.finish()
        return loss / max(1, images), images, flags > 0


def _totals(loss: Tensor, count: int) -> Tensor:
    """The end of a worker's vector (3,) float64: its sum of losses, its images, and room for the flags."""
    return torch.cat([loss.reshape(1).double(), loss.new_full((1,), count).double(), loss.new_zeros(1).double()])
