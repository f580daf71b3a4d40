"""The signals that stop a training: kept until the step is saved, or ending at once what has nothing to save.

A signal to one process reaches the others, so that none waits in a collective for one that has left.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # torch does not say what it exports

from onefold.errors import Stopped
from onefold.train.distributed import Interrupted, World

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""The signals that ask a training to save and to end; Windows has no SIGHUP."""
_REPEAT_SECONDS = 0.5  # within which a second signal is the same request, sent by the terminal and a job system both
_RELAY_SECONDS = 0.2


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
