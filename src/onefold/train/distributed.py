"""World: the processes that train together, their collectives, and the signals that stop them.

One process is a world of one, and its collectives cost nothing. A process that waits for another which is gone raises
LostWorker, and one whose launcher is gone ends itself, so that no orphaned process goes on writing to a run folder.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onefold.errors import BadArgument, LostWorker

T = TypeVar("T")

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_REPEAT_SECONDS = 0.5  # a launcher passes on what the terminal has sent to all processes already: one request

ORPHAN_GRACE_SECONDS = 8.0
"""How long a process has, once its launcher is gone, to save and end by itself."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among `size` processes that run the same program."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one process that writes files and reports progress."""
        return self.rank == 0

    def max(self, value: int) -> int:
        """Give the greatest `value` of any process, on all of them."""
        if self.size == 1:
            return value
        box = torch.tensor(value, device=self.device)
        with lost_worker_errors():
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box.item())

    def broadcast(self, value: T) -> T:
        """Give rank 0's `value`, on all processes; pickled, as between these processes alone."""
        if self.size == 1:
            return value
        box = [value]
        with lost_worker_errors():
            dist.broadcast_object_list(box, src=0)
        return box[0]

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

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            with lost_worker_errors():
                dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, made to average its gradients over all processes in backward; its buffers are left alone."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


@contextmanager
def start_world(device: str = "auto") -> Iterator[World]:
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
    with lost_worker_errors():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield World(rank=rank, size=size, device=own_device)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the DistributedDataParallel of a training that failed
        raise
    finally:
        # A DistributedDataParallel that outlives its process group is the group's last owner: its destructor joins
        # gloo's threads while it holds the GIL, which such a thread may wait for. So all of them have to go first.
        gc.collect()
        dist.destroy_process_group()


def import_ahead() -> None:
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


def _exit_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the process that started this one ends, and exit in any case soon after.

    torchrun's workers otherwise outlive an agent that was killed, and go on writing beside their successors.
    """
    launcher = int(os.environ.get("ONEFOLD_LAUNCHER", os.getppid()))
    kernel_signals = sys.platform == "linux" and os.getppid() == launcher
    if kernel_signals:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def watch() -> None:
        # The launcher may have been gone before prctl, and other systems have no such signal: so it is polled too.
        while os.getppid() == launcher:
            time.sleep(0.5)
        if not kernel_signals:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE_SECONDS)
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


# ------------------------------------------------------------------------------------------ signals


class Interrupted(BaseException):
    """Raised by a signal inside of `StopSignals.raise_on_signal`; it never leaves the training loop."""


class StopSignals:
    """A block in which the first SIGTERM, SIGINT or SIGHUP is kept in `received`, and the second ends the process.

    A SIGHUP that is ignored, as nohup and a service manager have it, stays ignored. After one that is not, the terminal
    is gone: what would be written to it is dropped, since the error of writing there would end the process before it
    has saved. Outside of the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: str = ""
        self._received_at = 0.0
        self._interrupts = False
        self._previous: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
            self._terminals = [handle for handle in (1, 2) if os.isatty(handle)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def raise_on_signal(self) -> Iterator[None]:
        """A block, without effects of its own, that a signal ends at once by Interrupted."""
        if self.received:
            raise Interrupted
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for handle in self._terminals:
                os.dup2(nowhere, handle)
            os.close(nowhere)
        if self.received and time.monotonic() - self._received_at < _REPEAT_SECONDS:
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        if self._interrupts:
            raise Interrupted
