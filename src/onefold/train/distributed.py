"""World: the processes that train together. One process is a world of one, and pays nothing for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from onefold.errors import BadArgument

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among `size` processes that run the same program."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files and talks."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """The mean of `value` over all processes."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.size

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process; all of them get the same answer."""
        return self._reduce(float(flag), dist.ReduceOp.MAX) > 0

    def share(self, value: T) -> T:
        """The first process's `value`, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Wait here for all processes."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, made to average its gradients over all processes in backward."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def _reduce(self, value: float, how: dist.ReduceOp.RedOpType) -> float:
        if self.size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, how)
        return box.item()


@contextmanager
def start_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, ...), or be a world of one.

    `device` is "auto" (the GPU if there is one), "cpu" or "cuda"; processes talk through nccl on GPUs and gloo
    otherwise. Raises BadArgument where the device is absent or the environment cannot be read.
    """
    kind = _device_kind(device)
    if "RANK" not in os.environ:
        yield World(device=torch.device(kind))
        return
    rank, size, local = (_from_environment(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield World(rank=rank, size=size, device=place)
    finally:
        dist.destroy_process_group()


def without_sync(network: nn.Module) -> AbstractContextManager[object]:
    """A block whose backward keeps the gradients of this process to itself, for all but the last piece of a step."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def _device_kind(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise BadArgument(f"device must be one of 'auto', 'cpu', 'cuda', not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadArgument("device is 'cuda', but torch sees no GPU here: use 'cpu'")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _from_environment(key: str) -> int:
    text = os.environ.get(key, "0" if key == "LOCAL_RANK" else "")
    if not text.isdecimal():
        raise BadArgument(f"the environment variable {key} must be a whole number, not {text!r}: start with torchrun")
    return int(text)
