"""Several processes of one call on this machine: started together, started again together when one is lost.

They are forks of this process, which has imported what they need: so they cost one start of torch together, and the
next life begins within a second or two. They find each other by the variables that torchrun sets (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_RESTART_COUNT); they are in sessions of their own, so that a Ctrl-C
reaches them once, through here; and they end by themselves when this process is gone (`train.distributed`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, NoReturn

from onefold.errors import BadArgument, LostWorker, Stopped

_log = logging.getLogger("onefold.launch")

_LOST = (LostWorker.exit_status, 70)  # its neighbour is gone, or it ended in a way that nobody thought of
_POLL_SECONDS = 0.02
_SAME_SECONDS = 0.5
_GRACE_SECONDS = {0: 60.0, Stopped.exit_status: 60.0}  # for the others, after one of them has ended so
_LONG_LIFE_SECONDS = 600.0  # after which earlier losses are forgotten


def launch(work: Callable[[], int], processes: int, max_restarts: int) -> int:
    """Do `work`, which gives an exit status, in that many processes to its end; the exit status of all.

    When one is lost (killed, or ended by something that is not the user's doing) all are ended, and all are started
    again, at most `max_restarts` times in a row. A SIGTERM or SIGINT is passed on once; a second one kills.
    Raises LostWorker where that does not help. Call it before anything has started a thread or touched a GPU.
    """
    if sys.platform != "linux":
        raise BadArgument("several processes are started here on Linux alone: start them by torchrun")
    losses, lives = 0, 0
    with _Signals() as signals:
        while True:
            began = time.monotonic()
            life = _Life(work, processes, lives, signals)
            try:
                status, cause = life.outcome()
            finally:
                life.end()
            if cause is None or signals.asked:
                return status
            losses = 1 if time.monotonic() - began > _LONG_LIFE_SECONDS else losses + 1
            if losses > max_restarts:
                raise LostWorker(
                    f"{cause}, and {max_restarts} restarts did not help; what was saved is safe: resume the run"
                )
            lives += 1
            _log.warning("%s: all %d start again (%d of %d)", cause, processes, losses, max_restarts)


def is_worker() -> bool:
    """Whether this process was started by `launch`, or by torchrun."""
    return "RANK" in os.environ


class _Life:
    """The processes from their start to the end of the last one."""

    def __init__(self, work: Callable[[], int], processes: int, lives: int, signals: _Signals) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        common |= {"OMP_NUM_THREADS": threads, "TORCHELASTIC_RESTART_COUNT": str(lives)}
        common |= {"ONEFOLD_LAUNCHER": str(os.getpid())}
        self._said = [tempfile.TemporaryFile() for _ in range(processes)]  # noqa: SIM115  (closed by `end`)
        self._pids: list[int] = []
        self._codes: list[int | None] = [None] * processes
        self._signals = signals
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(processes):
            pid = os.fork()
            if not pid:
                signals.forget()
                _begin(work, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, self._said[rank] if rank else None)
            self._pids.append(pid)

    def outcome(self) -> tuple[int, str | None]:
        """How it ended: an exit status; and what was lost, if it is worth another life."""
        deadline: float | None = None
        while None in (codes := self._poll()):
            if self._signals.wants_end:
                self.end()
            elif self._signals.is_new():
                self._send(signal.SIGTERM)
            ended = [code for code in codes if code is not None]
            if deadline is None and ended:
                lost = ended[0] < 0 or ended[0] in _LOST
                deadline = time.monotonic() + (0.3 if lost else _GRACE_SECONDS.get(ended[0], 5.0))
            if deadline is not None and time.monotonic() > deadline and not self._signals.asked:
                break
            time.sleep(_POLL_SECONDS)
        return self._judged(codes)

    def _judged(self, codes: list[int | None]) -> tuple[int, str | None]:
        ended = {rank: code for rank, code in enumerate(codes) if code}
        if not ended:
            return 0, None if None not in codes else "a process did not end"
        told = {rank: code for rank, code in ended.items() if code > 0 and code not in _LOST}
        if told and (Stopped.exit_status not in told.values() or len(told) == len(ended)):
            rank = next((r for r, code in told.items() if code != Stopped.exit_status), min(told))
            self._repeat(rank)
            return told[rank], None
        rank = next((rank for rank, code in ended.items() if code < 0), min(ended))
        code = ended[rank]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return LostWorker.exit_status, f"process {rank + 1} of {len(codes)} {how}"

    def _repeat(self, rank: int) -> None:
        """What another process than the first had to say, where the first did not say it itself."""
        if rank:
            self._said[rank].seek(0)
            sys.stderr.write(self._said[rank].read().decode(errors="replace"))

    def _poll(self, options: int = os.WNOHANG) -> list[int | None]:
        """The exit statuses so far; a signal is a negative one."""
        for rank, pid in enumerate(self._pids):
            if self._codes[rank] is None:
                ended, status = os.waitpid(pid, options)
                self._codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
        return list(self._codes)

    def _send(self, number: signal.Signals) -> None:
        for pid, code in zip(self._pids, self._poll(), strict=True):
            if code is None:
                os.kill(pid, number)

    def end(self) -> None:
        """Kill whoever is left."""
        self._send(signal.SIGKILL)
        self._poll(0)
        for said in self._said:
            said.close()


def _begin(work: Callable[[], int], variables: dict[str, str], said: IO[bytes] | None) -> NoReturn:
    """What a fork does. Of all of them the first one speaks; the others' last words are kept in `said`."""
    status = 70
    try:
        os.setsid()
        os.environ |= variables
        if said is not None:
            os.dup2(said.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        if (torch := sys.modules.get("torch")) is not None:  # it has read its variable already
            torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class _Signals:
    """A block in which requests to stop are notes: the first is to be passed on, a second one is to be obeyed."""

    def __init__(self) -> None:
        self.asked = self.wants_end = False
        self._is_new, self._since = False, 0.0
        self._before: dict[int, Any] = {}

    def is_new(self) -> bool:
        """Whether there is a request that was not passed on; it counts as passed on from now."""
        was, self._is_new = self._is_new, False
        return was

    def _note(self, number: int, frame: object) -> None:
        if not self.asked:
            self.asked = self._is_new = True
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _SAME_SECONDS:
            self.wants_end = True

    def forget(self) -> None:
        """In a fork: signals are the fork's own."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        self.forget()
