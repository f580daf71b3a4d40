"""World: the processes that train together, their collectives, and how one notices that another is gone.

One process is a world of one, and its collectives cost nothing. A process that waits for another which is gone raises
LostWorker; what one process alone can know, or fails at, all are told (`first`, `agree`); and one whose launcher is
gone ends itself, so that no orphaned process goes on writing to a run folder.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not say what it exports
from torch.nn.parallel import DistributedDataParallel

from onefold.errors import BadArgument, LostWorker, OnefoldError

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

_ORPHAN_GRACE_SECONDS = 8.0
"""How long a process has, once its launcher is gone, to save and end by itself."""


class Interrupted(BaseException):
    """Raised by a signal inside of `StopSignals.raise_on_signal`; it never leaves `train` or `stop_at_once`."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among `size` processes that run the same program.

    The steps' collectives have ten minutes. All others go through the group `control`, which waits for as long as its
    processes live: one of them may check the data, evaluate, or write to a slow disk. `store` is where a process that
    is stopped during an evaluation tells the others.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one process that writes files and reports progress."""
        return self.rank == 0

    def max(self, value: int) -> int:
        """Give the greatest `value` of any process, on all of them."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        with lost_worker_errors():
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box.item())

    def all_gather(self, value: _T) -> list[_T]:
        """Give the `value` of every process, by rank, on all of them; pickled, as between these processes alone."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with lost_worker_errors():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: _T) -> _T:
        """Give rank 0's `value`, on all processes."""
        if self.size == 1:
            return value
        box = [value]
        with lost_worker_errors():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """A block whose OnefoldError, or signal to stop, on one process is raised on all of them at its end.

        So none waits for one that has left, and each says why the training ends.
        """
        error: OnefoldError | Interrupted | None = None
        try:
            yield
        except (OnefoldError, Interrupted) as raised:
            if self.size == 1:
                raise
            error = raised
        errors = self.all_gather(error)
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                where = f"process {rank + 1} of {self.size}: "
                raise other if isinstance(other, Interrupted) or not rank else type(other)(f"{where}{other}")

    def run_on_main(self, make: Callable[[], _T]) -> _T:
        """Call `make` on rank 0 alone, and give on all processes what it gives; its error is raised on all."""
        answer: Any = None
        with self.raise_together():
            if self.is_main:
                answer = make()
        return self.broadcast(answer)

    def broadcast_tensor_(self, value: Tensor) -> None:
        """Make a tensor what it is on rank 0."""
        if self.size > 1:
            with lost_worker_errors():
                dist.broadcast(value, src=0)

    def all_reduce_(self, value: Tensor) -> None:
        """Make a tensor its sum over all processes, in an order that depends on their number."""
        if self.size > 1:
            with lost_worker_errors():
                dist.all_reduce(value)

    def sendrecv(self, value: Tensor, peer: int) -> Tensor:
        """Send a tensor to another process, and give the tensor of the same shape that it sends in turn."""
        received = torch.empty_like(value)
        with lost_worker_errors():
            calls = [dist.P2POp(dist.isend, value, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(calls):
                work.wait()
        return received

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """`model`, made to average its gradients over all processes in backward; its buffers are left alone."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


@contextmanager
def init_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that a launcher started (RANK, WORLD_SIZE, LOCAL_RANK, ...), or be a world of one.

    `device` is "auto" (the GPU if there is one), "cpu" or "cuda"; processes communicate through nccl on GPUs and gloo
    otherwise. Raises BadArgument where the device is absent or the environment cannot be read.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise BadArgument(f"device must be one of 'auto', 'cpu', 'cuda', not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadArgument("device is 'cuda', but torch sees no GPU here: use 'cpu'")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ:
        yield World(device=torch.device(kind))
        return
    _exit_with_launcher()
    rank, size, local_rank = (_from_environment(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    own_device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(own_device)
    with process_group("nccl" if kind == "cuda" else "gloo") as store:
        with lost_worker_errors():
            control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        yield World(rank=rank, size=size, device=own_device, control=control, store=store)


@contextmanager
def process_group(backend: str, init_method: str = "env://", **place: int) -> Iterator[Store]:
    """A block within the default process group of torch; gives the store by which its processes have met.

    `place` is rank and world_size, where `init_method` does not say them. Use it in place of `init_process_group` and
    `destroy_process_group`: a DistributedDataParallel that outlives its group (in a variable, a cycle, the traceback
    of an error) is the group's last owner by its reducer, whose destructor joins gloo's threads while it holds the
    GIL, and such a thread may wait for the GIL: a deadlock. So all reducers go first.
    """
    timeout = timedelta(minutes=10)
    with lost_worker_errors():
        store, rank, size = next(dist.rendezvous(init_method, timeout=timeout, **place))  # type: ignore[attr-defined]
        store.set_timeout(timeout)
        group_store = PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield store
    finally:
        gc.collect()
        for each in gc.get_objects():
            if issubclass(type(each), DistributedDataParallel):  # isinstance would ask each object for its __class__
                each.reducer = each.logger = None  # the logger owns the reducer too
        dist.destroy_process_group()


def import_training_modules() -> None:
    """Import what a first step would: torch imports two seconds' worth of itself when an optimizer is made."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def is_restarted() -> bool:
    """Whether a launcher started these processes again after some of them were lost: they resume the run they find.

    TORCHELASTIC_RESTART_COUNT is how torchrun says so, and `launch` as well.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def no_sync(network: nn.Module) -> AbstractContextManager[object]:
    """A block whose forward and backward keep the gradients to this process: for all micro-batches but the last."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


# torch says that a peer is gone by RuntimeErrors without a type of their own. Those of the back ends name the source
# file or the class that they come from, which is what tells them from an error of a model, whatever that speaks of.
_BACKEND = re.compile(r"\bgloo/|\bgloo::|\bNCCL error|\bProcessGroup(Gloo|NCCL)|\bc10d::|\bTCPStore\b")
_PEER = re.compile(r"[Gg]loo|NCCL|nccl|[Cc]onnection|Broken pipe|Socket|TCPStore|recv")


@contextmanager
def lost_worker_errors(*, in_model: bool = False) -> Iterator[None]:
    """A block in which the loss of another process is raised as LostWorker.

    With `in_model` the block computes a model too, whose own errors pass: there only what a communication back end
    has signed counts. Elsewhere nothing but a collective runs, and any word of a connection does.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and not (_BACKEND if in_model else _PEER).search(text):
            raise
        raise LostWorker(
            f"another process of this training does not answer ({text[:160]}); what was saved is safe: resume the run"
        ) from error


def terminate_with_parent(launcher: int) -> bool:
    """Ask the kernel for a SIGTERM when the process that started this one ends; whether it can (Linux can)."""
    if sys.platform != "linux" or os.getppid() != launcher:
        return False
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    return True


def _exit_with_launcher() -> None:
    """End with the process that started this one: by a SIGTERM when it ends, and in any case soon after.

    torchrun's workers otherwise outlive an agent that was killed, and go on writing beside their successors.
    """
    launcher = int(os.environ.get("ONEFOLD_LAUNCHER", os.getppid()))
    kernel_signals = terminate_with_parent(launcher)

    def watch() -> None:
        # The launcher may have been gone before prctl, and other systems have no such signal: so it is polled too.
        while os.getppid() == launcher:
            time.sleep(0.5)
        if not kernel_signals:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ORPHAN_GRACE_SECONDS)
        os._exit(LostWorker.exit_status)  # in a collective with another orphan, or in one long evaluation

    threading.Thread(target=watch, daemon=True, name="onefold-orphan").start()
    restarts, shares_store = (os.environ.get(f"TORCHELASTIC_{key}") for key in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if restarts not in (None, "0") and shares_store == "True":
        _log.warning(
            "torchrun cannot restart this training (its processes would look for the dead ones' addresses): "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before starting it"
        )


def _from_environment(key: str) -> int:
    text = os.environ.get(key, "0" if key == "LOCAL_RANK" else "")
    if not text.isdecimal():
        raise BadArgument(f"the environment variable {key} must be a whole number, not {text!r}: start with torchrun")
    return int(text)


def check_run_folder(out: Path, hosts: Sequence[str | None]) -> None:
    """Raise BadArgument where the run folder is on the machine of another process than the first, which writes it.

    A launcher that starts again may number the machines anew; then the first would begin another run.
    """
    elsewhere = next((host for host in hosts if host is not None), None)
    if hosts[0] is None and elsewhere is not None:
        raise BadArgument(
            f"{out} is on {elsewhere}, and not on {socket.gethostname()}, where the first process is: put it where "
            "all machines see it, or start the processes so that the first one is there"
        )
