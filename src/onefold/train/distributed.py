"""World: the processes that train together, their collectives, and the signals that stop them.

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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not say what it exports
from torch.nn.parallel import DistributedDataParallel

from onefold.errors import BadArgument, LostWorker, OnefoldError, Stopped

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""The signals that ask a training to save and to end; Windows has no SIGHUP."""
_REPEAT_SECONDS = 0.5  # within which a second signal is the same request, sent by the terminal and a job system both
_RELAY_SECONDS = 0.2

_ORPHAN_GRACE_SECONDS = 8.0
"""How long a process has, once its launcher is gone, to save and end by itself."""


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


# ------------------------------------------------------------------------------------------ signals


class Interrupted(BaseException):
    """Raised by a signal inside of `StopSignals.raise_on_signal`; it never leaves `train` or `stop_at_once`."""


class StopSignals:
    """A block in which the first SIGTERM, SIGINT or SIGHUP is kept in `received`, and the second ends the process.

    With `keep_repeated` a second one is kept in `is_repeated` instead; so it is by default in a process that was
    started by a launcher, which passes on what a job system may have sent to all processes, and kills in the end.

    A SIGHUP that is ignored, as nohup and a service manager have it, stays ignored. After one that is not, the terminal
    is gone: what would be written to it is dropped, since the error of writing there would end the process before it
    has saved. Outside of the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, *, keep_repeated: bool | None = None) -> None:
        self.received: str = ""
        self.is_repeated = False
        self._keeps_repeated = "RANK" in os.environ if keep_repeated is None else keep_repeated
        self._received_at = 0.0
        self._interrupts = False
        self._previous: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in STOP_SIGNALS if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]
            self._terminals = [handle for handle in (1, 2) if os.isatty(handle)]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Put back the handlers from before the block; in a fork, so that its signals are its own."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def raise_on_signal(self, world: World | None = None) -> Iterator[None]:
        """A block, without effects of its own, that a signal ends at once by Interrupted: to any process of `world`."""
        store = world.store if world is not None and self._previous else None
        with _Relay(self, store) if store is not None else nullcontext():
            self._interrupts = True
            try:
                if self.received:
                    raise Interrupted
                yield
            finally:
                self._interrupts = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == "SIGHUP":
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for handle in self._terminals:
                os.dup2(nowhere, handle)
            os.close(nowhere)
        if self.received and time.monotonic() - self._received_at < _REPEAT_SECONDS:
            return
        self.is_repeated = bool(self.received)
        if self.received and not self._keeps_repeated:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
            if number == signal.SIGINT and 2 in self._terminals and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping: what is under way is saved first\n")
        if self._interrupts:
            self._interrupts = False  # once: what cleans up is not to be interrupted in its turn
            raise Interrupted


class _Relay(threading.Thread):
    """A block in which a signal that one process has received reaches all the others, by a key in their store.

    The steps of a training agree by their own collective. Here each process computes alone, for as long as its share
    takes, and one that has ended would wait for the rest.
    """

    def __init__(self, signals: StopSignals, store: Store) -> None:
        super().__init__(name="onefold-relay", daemon=True)
        self._signals, self._store, self._has_ended = signals, store, threading.Event()
        # torchrun may keep the store over a restart, and what stopped the processes before is not to stop these
        self._key = f"onefold/stop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def run(self) -> None:
        with suppress(RuntimeError):  # the process that has the store is gone: the next collective says so
            while not self._has_ended.wait(_RELAY_SECONDS) and not self._signals.received:
                if self._store.check([self._key]):
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            if self._signals.received:
                self._store.set(self._key, self._signals.received)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self._has_ended.set()
        self.join(timeout=_RELAY_SECONDS + 1.0)  # a store that does not answer is not waited for


@contextmanager
def stop_at_once() -> Iterator[None]:
    """A block with nothing to save, or around `train`, which saves: a signal ends it at once by Stopped."""
    with StopSignals() as signals:
        try:
            with signals.raise_on_signal():
                yield
        except Interrupted:
            by = signals.received or "a signal to another process"
            raise Stopped(
                f"stopped by {by} while no step was under way: a run that has saved something goes on with "
                "`onefold train --resume RUN`, else start again"
            ) from None


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
