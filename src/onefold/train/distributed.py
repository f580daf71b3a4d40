"""World: the processes that train together. One process is a world of one, and pays nothing for it.

A process that waits for another which is gone raises LostWorker, and one whose launcher is gone ends itself: there is
never a half of a world that goes on writing.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
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

ORPHANED_SECONDS = 8.0
"""How long a process has, once its launcher is gone, to save and end by itself."""


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

    def most(self, value: int) -> int:
        """The greatest `value` of any process; all of them get the same answer."""
        if self.size == 1:
            return value
        box = torch.tensor(value, device=self.device)
        with talking():
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box.item())

    def share(self, value: T) -> T:
        """The first process's `value`, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        with talking():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def send_from_first_(self, value: Tensor) -> None:
        """Make a tensor what it is on the first process."""
        if self.size > 1:
            with talking():
                dist.broadcast(value, src=0)

    def add_up_(self, value: Tensor) -> None:
        """Make a tensor its sum over all processes, in an order that depends on their number."""
        if self.size > 1:
            with talking():
                dist.all_reduce(value)

    def swap(self, value: Tensor, peer: int) -> Tensor:
        """Give a tensor to another process that gives one of the same shape, and get its."""
        theirs = torch.empty_like(value)
        with talking():
            calls = [dist.P2POp(dist.isend, value, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(calls):
                work.wait()
        return theirs

    def wait(self) -> None:
        """Wait here for all processes."""
        if self.size > 1:
            with talking():
                dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, made to average its gradients over all processes in backward; its buffers are left alone."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


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
    _end_with_the_launcher()
    rank, size, local = (_from_environment(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    with talking():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield World(rank=rank, size=size, device=place)
    finally:
        dist.destroy_process_group()


def import_ahead() -> None:
    """Import what a first step would: torch imports two seconds' worth of itself when an optimizer is made."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def is_restarted() -> bool:
    """Whether a launcher started these processes again after some of them were lost: theirs is the run in the folder.

    TORCHELASTIC_RESTART_COUNT is how torchrun says so, and ours as well.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def without_sync(network: nn.Module) -> AbstractContextManager[object]:
    """A block whose backward keeps the gradients of this process to itself, for all but the last piece of a step."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


@contextmanager
def talking() -> Iterator[None]:
    """A block in which a process that no longer answers is a LostWorker: torch raises RuntimeErrors of many kinds."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and not any(word in text for word in _TALK):
            raise
        raise LostWorker(
            f"another process of this training does not answer ({text[:160]}); what was saved is safe: resume the run"
        ) from error


_TALK = ("gloo", "Gloo", "NCCL", "nccl", "Connection", "connection", "Broken pipe", "Socket", "TCPStore", "recv")


def _end_with_the_launcher() -> None:
    """Ask the kernel for a SIGTERM when the process that started this one ends, and see to it that it suffices.

    torchrun's workers otherwise outlive an agent that was killed, and go on writing beside their successors.
    """
    launcher = int(os.environ.get("ONEFOLD_LAUNCHER", os.getppid()))
    kernel_tells = sys.platform == "linux" and os.getppid() == launcher
    if kernel_tells:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        if not kernel_tells:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHANED_SECONDS)
        os._exit(LostWorker.exit_status)  # waiting for another orphan, or in one long evaluation

    threading.Thread(target=watch, daemon=True, name="onefold-orphan").start()
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and _shares_a_store():
        _log.warning(
            "torchrun cannot restart this training (its processes would look for the dead ones' addresses): "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before starting it"
        )


def _shares_a_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


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


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 0.5  # a launcher passes on what the terminal has sent to all processes already: that is one request


class Interrupted(BaseException):
    """Raised by a signal inside of `StopSignals.interrupting`; never leaves this room."""


class StopSignals:
    """A block in which a signal to stop is a note to read, `asked`. Outside of the main thread it does nothing."""

    def __init__(self) -> None:
        self.asked: str = ""
        self._since = 0.0
        self._interrupts = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block, without effects of its own, that a signal ends at once by Interrupted."""
        if self.asked:
            raise Interrupted
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._since < _SAME_SECONDS:
            return
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked, self._since = signal.Signals(number).name, time.monotonic()
        if self._interrupts:
            raise Interrupted
