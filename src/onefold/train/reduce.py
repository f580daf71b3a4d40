"""How the gradients of logical workers become the gradient of a step: see `logical` for what each way promises.

F = the floats of a model's gradients and buffers together, laid out in one vector.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from onefold.errors import BadArgument
from onefold.train.distributed import World
from onefold.train.plan import Plan


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
