"""Several processes of one program on this machine: started together, started again together when one is lost.

The processes find each other by the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT, TORCHELASTIC_RESTART_COUNT). They are in sessions of their own, so that a Ctrl-C reaches them once, through
here; and they end by themselves when this process is gone (`train.distributed`). This file imports no torch: what it
watches over takes all the memory there is.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from onefold.errors import LostWorker, Stopped

_log = logging.getLogger("onefold.launch")

_LOST = (LostWorker.exit_status, 70)  # its neighbour is gone, or it ended in a way that nobody thought of
_POLL_SECONDS = 0.02
_SAME_SECONDS = 0.5
_GRACE_SECONDS = {0: 60.0, Stopped.exit_status: 60.0}  # for the others, after one of them has ended so
_LONG_LIFE_SECONDS = 600.0  # after which earlier losses are forgotten


def launch(program: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run `program` in that many processes to its end; the exit status.

    When one is lost (killed, or ended by something that is not the user's doing) all are ended, and all are started
    again, at most `max_restarts` times in a row. A SIGTERM or SIGINT is passed on once; a second one kills.
    Raises LostWorker where that does not help.
    """
    losses, lives = 0, 0
    with _Signals() as signals:
        while True:
            began = time.monotonic()
            life = _Life(program, processes, lives, signals)
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

    def __init__(self, program: Sequence[str], processes: int, lives: int, signals: _Signals) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        common = {"OMP_NUM_THREADS": threads, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **os.environ}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        common |= {"TORCHELASTIC_RESTART_COUNT": str(lives), "ONEFOLD_LAUNCHER": str(os.getpid())}
        self._said: list[IO[bytes]] = []
        self._workers: list[subprocess.Popen[bytes]] = []
        self._signals = signals
        for rank in range(processes):
            said = tempfile.TemporaryFile()  # noqa: SIM115  (what the first says, the user sees)
            places: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": said} if rank else {}
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._workers.append(subprocess.Popen(program, env=own, start_new_session=True, **places))
            self._said.append(said)

    def outcome(self) -> tuple[int, str | None]:
        """How it ended: an exit status; and what was lost, if it is worth another life."""
        deadline: float | None = None
        while None in (codes := [worker.poll() for worker in self._workers]):
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

    def _send(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(number)

    def end(self) -> None:
        """Kill whoever is left."""
        self._send(signal.SIGKILL)
        for worker, said in zip(self._workers, self._said, strict=True):
            worker.wait()
            said.close()


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

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
