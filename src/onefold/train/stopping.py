"""Stopping when asked: the first SIGTERM or SIGINT is noted, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

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
