"""Starts several processes of one command on this machine, and starts all of them again when one is lost.

They are forks of this process, which has imported what they need: so they cost one start of torch together, and a
restart takes a second or two. They find each other by the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT, TORCHELASTIC_RESTART_COUNT); they are in sessions of their own, so that a Ctrl-C reaches them
once, through here; and they end by themselves when this process is gone (`train.distributed`).

torch's own launcher (`torch.distributed.launcher`, which torchrun is) serves several machines, and does not replace
this. With forks it restarts nearly as fast. But it takes every exit status for a loss, so that a missing folder would
be tried again; it kills a run that takes more than 30 seconds to save; and when it is stopped by a signal, the exit
statuses of its workers are lost.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

from onefold.errors import BadArgument, LostWorker, Stopped, describe_exit_status
from onefold.system_resources import available_threads
from onefold.train.distributed import terminate_with_parent
from onefold.train.stop_signals import STOP_SIGNALS, StopSignals

_log = logging.getLogger("onefold.launch")

_LOST = (LostWorker.exit_status, 70)  # another process is gone, or this one ended by an unexpected error
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 5.0  # for the other processes, after one has ended by an error of its own
_HUNG_SECONDS = 10.0  # for a group that is to end, in which none computes and none waits for a disk
_HUNG_POLL_SECONDS = 0.5
_UNHEARD = (-signal.SIGTERM, -signal.SIGHUP)
_STABLE_SECONDS = 600.0  # a group that has lived so long resets the count of restarts


def launch(command: Callable[[], int], processes: int, max_restarts: int) -> int:
    """Run `command`, which gives an exit status, in that many processes to its end; gives the exit status of all.

    When a process is lost (killed, or ended by an error that is not the user's) all are ended and started again, at
    most `max_restarts` times in a row. A SIGTERM, SIGINT or SIGHUP is passed on once, and who is stopped by SIGSTOP is
    woken to hear it; a second one kills, and so does this process where they wait for each other and none computes.
    Raises LostWorker where restarts do not help, and Stopped where a signal came before there was anything to save.
    Call it before anything has started a thread or used a GPU, since it forks.
    """
    if sys.platform != "linux":
        raise BadArgument("--processes works on Linux alone: start the processes by torchrun")
    losses, restarts = 0, 0
    with StopSignals(keep_repeated=True) as signals:
        while True:
            started = time.monotonic()
            group = _ProcessGroup(command, processes, restarts, signals)
            try:
                status, cause = group.wait()
            finally:
                group.kill()
            if cause is None:
                return status
            if signals.received:
                raise LostWorker(f"{cause} while it was to stop; what was saved is safe: resume the run")
            losses = 1 if time.monotonic() - started > _STABLE_SECONDS else losses + 1
            if losses > max_restarts:
                raise LostWorker(
                    f"{cause}, and {max_restarts} restarts did not help; what was saved is safe: resume the run"
                )
            restarts += 1
            _log.warning("%s: all %d start again (%d of %d)", cause, processes, losses, max_restarts)


class _ProcessGroup:
    """The processes from their start to the end of the last one."""

    def __init__(self, command: Callable[[], int], processes: int, restarts: int, signals: StopSignals) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, available_threads() // processes)))
        # Those of torchrun, so that a process need not know which of the two has started it.
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        variables |= {"OMP_NUM_THREADS": threads, "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        variables |= {"ONEFOLD_LAUNCHER": str(os.getpid())}
        self._stderr = [tempfile.TemporaryFile() for _ in range(processes)]  # noqa: SIM115  (closed by `kill`)
        self._pids: list[int] = []
        self._statuses: list[int | None] = [None] * processes
        self._signals, self._passed_on, self._is_ending = signals, False, False
        self._cpu_ticks = [0] * processes
        self._computed_at = self._looked_at = 0.0
        sys.stdout.flush()  # or a fork would write what is buffered once more
        sys.stderr.flush()
        launcher = os.getpid()
        for rank in range(processes):
            # A signal that comes between the fork and its own handlers waits: this process's would forget it there.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            pid = os.fork()
            if not pid:
                own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                _run_forked(command, own, self._stderr[rank] if rank else None, signals, launcher)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            self._pids.append(pid)

    def wait(self) -> tuple[int, str | None]:
        """Wait until all have ended; gives the exit status, and what was lost if that is worth a restart."""
        deadline: float | None = None
        while None in (statuses := self._poll()):
            if self._signals.is_repeated:
                self._send(signal.SIGKILL)
            elif self._signals.received and not self._passed_on:
                self._passed_on = True
                self._send(signal.SIGHUP if self._signals.received == "SIGHUP" else signal.SIGTERM)
                self._send(signal.SIGCONT)
            failed = [status for status in statuses if status is not None and status not in (0, Stopped.exit_status)]
            if deadline is None and failed:
                # The others may wait for the one that has ended, for as long as a collective's timeout.
                is_lost = failed[0] < 0 or failed[0] in _LOST
                deadline = time.monotonic() + (0.3 if is_lost else _GRACE_SECONDS)
            if deadline is not None and time.monotonic() > deadline and not self._passed_on:
                break
            if not self._is_ending and (self._passed_on or Stopped.exit_status in statuses):
                self._is_ending, self._computed_at = True, time.monotonic()
            if self._is_ending and self._is_hung():
                _log.warning("no process has computed for %.0f seconds: those that are left are killed", _HUNG_SECONDS)
                self._send(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        return self._outcome(statuses)

    def _is_hung(self) -> bool:
        """Whether none of the processes that are left has computed, or waited for a disk, for some time.

        A long step, or a checkpoint on a slow disk, is waited for; one that waits for a process that is gone is not.
        """
        now = time.monotonic()
        if now - self._looked_at > _HUNG_POLL_SECONDS:
            self._looked_at = now
            for rank, (pid, status) in enumerate(zip(self._pids, self._statuses, strict=True)):
                ticks, waits = _cpu_ticks(pid) if status is None else (0, False)
                if waits or ticks > self._cpu_ticks[rank] + 1:  # the threads that only watch take less than a tick
                    self._cpu_ticks[rank], self._computed_at = ticks, now
        return now - self._computed_at > _HUNG_SECONDS

    def _outcome(self, statuses: list[int | None]) -> tuple[int, str | None]:
        failed = {rank: status for rank, status in enumerate(statuses) if status}
        if not failed:
            return 0, None if None not in statuses else "a process did not end"
        # A process that ended by an error of its own tells the cause; its neighbours were lost for want of it. One that
        # was stopped says that all is saved.
        causes = {rank: status for rank, status in failed.items() if status > 0 and status not in _LOST}
        if causes:
            rank = next((r for r, status in causes.items() if status != Stopped.exit_status), min(causes))
            if rank:  # the first process has written to the terminal itself
                self._stderr[rank].seek(0)
                sys.stderr.write(self._stderr[rank].read().decode(errors="replace"))
            return causes[rank], None
        if self._passed_on and not self._signals.is_repeated and any(status in _UNHEARD for status in statuses):
            # it had no handler yet, and so nothing to save
            raise Stopped(f"stopped by {self._signals.received} while no step was under way: resume, or start again")
        rank = next((rank for rank, status in failed.items() if status < 0), min(failed))
        status = failed[rank]
        return LostWorker.exit_status, f"process {rank + 1} of {len(statuses)} {describe_exit_status(status)}"

    def _poll(self, options: int = os.WNOHANG) -> list[int | None]:
        """Give the exit statuses so far; that of a process killed by a signal is negative."""
        for rank, pid in enumerate(self._pids):
            if self._statuses[rank] is None:
                ended, status = os.waitpid(pid, options)
                self._statuses[rank] = os.waitstatus_to_exitcode(status) if ended else None
        return list(self._statuses)

    def _send(self, number: signal.Signals) -> None:
        for pid, status in zip(self._pids, self._poll(), strict=True):
            if status is None:
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill the processes that are left."""
        self._send(signal.SIGKILL)
        self._poll(0)
        for stderr in self._stderr:
            stderr.close()


def _run_forked(
    command: Callable[[], int], variables: dict[str, str], stderr: IO[bytes] | None, signals: StopSignals, launcher: int
) -> NoReturn:
    """Run the command in a fork. Rank 0 alone writes to the terminal; the others' stderr is kept in a file."""
    status = 70
    try:
        os.setsid()
        if not terminate_with_parent(launcher):
            os._exit(LostWorker.exit_status)  # it is gone already
        signals.restore_handlers()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        os.environ |= variables
        if stderr is not None:
            os.dup2(stderr.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        if (torch := sys.modules.get("torch")) is not None:  # it was imported, and has read the variable, before
            torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        status = command()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _cpu_ticks(pid: int) -> tuple[int, bool]:
    """Give the processor time of a process in the kernel's ticks, and whether one of its threads waits for a disk."""
    ticks, waits = 0, False
    with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            values = (task / "stat").read_text().rpartition(")")[2].split()
            ticks, waits = ticks + int(values[11]) + int(values[12]), waits or values[0] == "D"
    return ticks, waits
