"""Adding the gradients of logical workers, over the workers of a process and over processes, as `plan.reduce` says.

"exact"  Gradients are added in one binary tree over the workers: below V/W leaves inside of a process, above by
         recursive doubling between processes. IEEE addition is commutative, so both sides of an exchange get the same
         bits, and the sum is the same at every W. V and W are powers of two.
"fast"   Gradients are added as they come and by all-reduce, overlapped with backward: the same samples, the same
         random numbers, another rounding.

Running statistics of norms, like all floating-point buffers, start each step equal and become the mean over the
workers: each of them saw a V-th of the batch, and worker 0's alone would be V times as noisy. Other buffers (counters)
are those of the process's first worker.

F below is the number of floats in a model's gradients and buffers together, laid out in one vector.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from onefold.errors import BadArgument
from onefold.train.distributed import World
from onefold.train.hyperparameters import Plan


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
