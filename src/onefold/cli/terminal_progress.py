"""How far a command is, on stderr: a live line or bar on a terminal, in a log a line now and then."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, cast

from onefold.cli import progress_writer
from onefold.commands.progress_bars import use_progress_handler
from onefold.progress_steps import Stages

if TYPE_CHECKING:
    from onefold.train import Progress

_OnProgress = Callable[["Progress"], None]
_FIRST_S, _EVERY_S = 2.0, 10.0  # before the first line of a log, and between two
_LONG_EPOCH_S = 30.0  # without a line in a log
_REDRAWN_S = 0.2  # the line on a terminal
_BAR = 5  # characters of the bar of a training, so that its line fits into 80
_LONGEST = 1000  # characters of an update, which a pipe takes whole


@contextmanager
def show_progress(what: str) -> Iterator[None]:
    """Shows what is done, how far it is and how long it will take, while the block runs.

    The library says what it does to the logger "onefold.progress": a sentence, with `done` and `total` steps where they
    are counted. A stage within another comes from another function, and is the share of a step that it has done. A
    process writes it (see `progress_writer`); of a training on several processes the first one alone is shown.
    """
    with ExitStack() as shown:
        if sys.executable and os.environ.get("RANK", "0") == "0":
            with suppress(OSError, ValueError):  # stderr is no file, or there is no process to be had
                shown.enter_context(use_progress_handler(_Stages(what, shown.enter_context(_writer(what)))))
        yield


def _is_live() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_PROGRESS") and os.environ.get("TERM") != "dumb"


class _Stages(logging.Handler):
    """Tells the process that writes what is under way, see there."""

    def __init__(self, what: str, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._what, self._tell, self._stages = what, tell, Stages()

    def emit(self, record: logging.LogRecord) -> None:
        """Tell of one record."""
        self._stages.add(record)
        spent, share = self._stages.progress()
        self._tell(f"{spent:.3f}\t{share:.5f}\t{str(self._stages) or self._what}")


@contextmanager
def _writer(what: str, log_s: tuple[float, float] | None = None) -> Iterator[Callable[[str], None]]:
    """Starts the process that writes, and gives what tells it of an update; on a terminal, prints come above its line.

    In a log the first line comes after the first of the seconds `log_s`, and the next after the second, or after an
    empty update. Raises OSError where it cannot be started, ValueError where stderr is no file.
    """
    live = _is_live()
    first, every = (_REDRAWN_S, _REDRAWN_S) if live else log_s or (_FIRST_S, _EVERY_S)
    # Ctrl-C is the command's to hear: a signal that is blocked here is blocked for good in the process that is started.
    with _blocked(signal.SIGINT):
        process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                progress_writer.__file__,
                "live" if live else "log",
                str(first),
                str(every),
                _printable(what),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=sys.stderr.fileno(),
        )
    assert process.stdin is not None
    pipe = process.stdin.fileno()
    os.set_blocking(pipe, False)  # an update that finds the pipe full is left out

    def tell(update: str) -> None:
        with suppress(OSError):
            os.write(pipe, f"{_printable(update)}\n".encode("utf-8", "backslashreplace"))

    streams = [name for name in ("stdout", "stderr") if live and getattr(sys, name).isatty()]
    before = {name: getattr(sys, name) for name in streams}
    above = {name: _Above(stream) for name, stream in before.items()}
    for name, stream in above.items():
        setattr(sys, name, cast(TextIO, stream))
    try:
        yield tell
    finally:
        process.kill()
        process.wait()
        with suppress(OSError):
            process.stdin.close()
        if live:
            before["stderr"].write(progress_writer.ERASE)
            before["stderr"].flush()
        for name, stream in above.items():
            setattr(sys, name, before[name])
            stream.close()


def _discard_update(_update: str) -> None:
    """Where nothing can be written."""


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text[:_LONGEST])


class _Above:
    """A stream of a terminal whose last line is redrawn: whole lines are printed above that."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._rest = stream, ""

    def write(self, text: str) -> int:
        """Print the lines that are whole, in one piece."""
        whole, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._stream.write(f"{progress_writer.ERASE}{whole}\n")
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Keep what is not a whole line yet."""

    def close(self) -> None:
        """Print what is left, once the line is erased."""
        self._stream.write(self._rest)
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def show_training_progress() -> Iterator[_OnProgress]:
    """Draws a training as it goes: a live bar on a terminal; elsewhere a line an epoch, and in a long one now and then.

    Both are on stderr. Before the first step, and after the last, it shows what is done as `show_progress` does.
    """
    live = _is_live()
    tell: Callable[[str], None] | None = None
    with ExitStack() as shown:

        def on_progress(at: Progress) -> None:
            nonlocal tell
            done = at.global_step / max(at.epochs * at.steps, 1)
            if tell is None:
                shown.close()
                tell = _discard_update
                with suppress(OSError, ValueError):
                    tell = shown.enter_context(_writer("training", (_LONG_EPOCH_S, _LONG_EPOCH_S)))
            epoch, now = f"epoch {at.epoch}/{at.epochs}", progress_values(at)
            bar = round(_BAR * done)
            left, values = at.eta_s if math.isfinite(at.eta_s) else 0.0, progress_values(replace(at, eta_s=math.nan), 1)
            is_validating = at.step >= at.steps and not at.is_evaluation  # which comes next
            doing = "validating" if is_validating else f"step {at.step} of {at.steps}"
            where = f"{'━' * bar}{'─' * (_BAR - bar)}" if live else f"{doing} "
            tell(f"{left}\t0.5\t{epoch} {where} {values}")
            if at.is_evaluation:
                tell("")
                print(f"{epoch}  {now}", file=sys.stderr, flush=True)
                if at.global_step >= at.epochs * at.steps:  # a probe has none
                    shown.close()
                    shown.enter_context(show_progress("saving"))

        shown.enter_context(show_progress("preparing the first step"))
        yield on_progress


def progress_values(at: Progress, digits: int = 2) -> str:
    """Loss, accuracy of the last evaluation, speed, memory and the time that is left, as far as they are known."""
    parts = [f"loss {at.loss:.3f}"]
    if "top1" in at.metrics:
        parts.append(f"val top-1 {at.metrics['top1']:.{digits}f} %")
    if math.isfinite(at.images_per_s):
        parts.append(f"{at.images_per_s:.0f} images/s")
    if at.memory_bytes:
        parts.append(f"{at.memory_bytes / 2**20:.0f} MiB")
    if math.isfinite(at.eta_s):
        parts.append(f"{timedelta(seconds=round(at.eta_s))} left")
    return "  ".join(parts)
