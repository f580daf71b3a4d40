"""Progress of the verbs in Python: tqdm's bars in a terminal and in a notebook, elsewhere a line now and then."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from onefold.progress_steps import Stages, seconds_left

if TYPE_CHECKING:
    from onefold.train import Progress

_logger = logging.getLogger("onefold.progress")
_COLUMNS, _ROWS = 80, 24  # of a terminal that does not know its own
_LONG_EPOCH_S = 30.0  # without a line, where no bar is shown
_FIRST_S, _EVERY_S = 2.0, 10.0  # before the first line, and between two, where no bar is shown


def _has_viewer() -> bool:
    """Whether somebody looks: stderr is a terminal, or this is the kernel of a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _width() -> dict[str, Any]:
    """Give tqdm's options for the width: a terminal that does not know its own says 0, and tqdm would show nothing."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # no terminal
        columns = -1
    return {"ncols": _COLUMNS, "nrows": _ROWS} if columns == 0 else {"dynamic_ncols": True}


@contextmanager
def _bar(**options: Any) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of widgets that are not installed, where text does
        from tqdm.auto import tqdm

        bar = tqdm(disable=not _has_viewer(), **_width(), **options)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def training_bar() -> Iterator[Callable[[Progress], None]]:
    """Show a training's steps, loss and accuracy of the last validation; gives the callback for each step.

    Before the first step it shows what is done as `show_progress` does. Where no bar is shown, a line is written for
    each validation, and in a long epoch now and then.
    """
    due = time.monotonic() + _LONG_EPOCH_S
    with ExitStack() as preparing, ExitStack() as shown:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first alone is shown
            preparing.enter_context(show_progress())
        bar: Any = None

        def on_progress(at: Progress) -> None:
            nonlocal bar, due
            if bar is None:
                preparing.close()
                bar = shown.enter_context(_bar(unit="step"))
            if bar.disable and (at.is_evaluation or time.monotonic() >= due):
                due = time.monotonic() + _LONG_EPOCH_S
                sys.stderr.write(f"{training_line(at)}\n")
                sys.stderr.flush()
            bar.total = at.epochs * at.steps
            bar.set_description(f"epoch {at.epoch}/{at.epochs}", refresh=False)
            top1 = {"val top-1": f"{at.metrics['top1']:.2f} %"} if "top1" in at.metrics else {}
            bar.set_postfix({"loss": f"{at.loss:.3f}", **top1}, refresh=False)
            bar.update(at.global_step - bar.n)

        yield on_progress


def training_line(at: Progress) -> str:
    """Give where a training is, in one line."""
    step = "" if at.is_evaluation else f", step {at.step} of {at.steps}"
    top1 = f", val top-1 {at.metrics['top1']:.2f} %" if "top1" in at.metrics else ""
    left = f", about {at.eta_s:.0f} s left" if at.eta_s >= 1 else ""  # NaN where it is not known
    return f"epoch {at.epoch} of {at.epochs}{step}: loss {at.loss:.3f}{top1}{left}"


class _Stages(logging.Handler):
    """Shows on a bar, or in lines now and then, what is under way, how far it is and how long it takes still."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self.bar = bar
        self.began = time.monotonic()
        self.due = self.began + _FIRST_S
        self._stages = Stages()

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        self._stages.add(record)
        left = seconds_left(*self._stages.progress())
        text = f"{self._stages}, about {left:.0f} s left" if left >= 1 else str(self._stages)
        if not self.bar.disable:
            self.bar.set_description_str(text)
        elif (now := time.monotonic()) >= self.due:
            self.due = now + _EVERY_S
            sys.stderr.write(f"{text}: {now - self.began:.0f} s\n")
            sys.stderr.flush()


@contextmanager
def show_progress() -> Iterator[None]:
    """Show what the library does in the block, where no handler shows it yet, as the command line does."""
    if _logger.handlers:
        yield
        return
    with _bar(bar_format="{desc} [{elapsed}]", leave=False) as bar, use_progress_handler(_Stages(bar)):
        yield


@contextmanager
def use_progress_handler(handler: logging.Handler) -> Iterator[None]:
    """Have a handler, and no other, hear what the library says that it does."""
    level, propagate = _logger.level, _logger.propagate
    _logger.addHandler(handler)
    _logger.setLevel(logging.DEBUG)
    _logger.propagate = False
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        _logger.propagate = propagate
