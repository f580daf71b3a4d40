"""How far a command is, on stderr: a live line or bar on a terminal, in a log a line now and then."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from onefold.commands.progress import progress_handler

if TYPE_CHECKING:
    from onefold.train import Progress

_OnProgress = Callable[["Progress"], None]
_FIRST_S, _EVERY_S = 2.0, 10.0  # before the first line of a log, and between two


@contextmanager
def show_progress(what: str) -> Iterator[None]:
    """Shows what is done, how far it is and how long it will take, while the block runs.

    The library says what it does to the logger "onefold.progress": a sentence, with `done` and `total` steps where they
    are counted. A stage within another comes from another function, and is the share of a step that it has done.
    """
    stages = _Stages(what)
    with progress_handler(stages), _live(stages) if _is_live() else _lines(stages):
        yield


def _is_live() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_PROGRESS")


class _Stages(logging.Handler):
    """The stages that are under way, the outermost first: what, how many steps are done, and of how many."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what, self._began = what, time.monotonic()
        self._stages: dict[tuple[str, str], tuple[str, int, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the stage, in place of what its function said before and of all within that; drop one that is done."""
        key, known = (record.pathname, record.funcName), list(self._stages)
        for inner in known[known.index(key) :] if key in known else ():
            del self._stages[inner]
        done, total = getattr(record, "done", 0), getattr(record, "total", 0)
        if not total or done < total:
            self._stages[key] = record.getMessage(), done, total

    @property
    def share(self) -> float:
        """How much of all is done, from 0 to 1."""
        share = 0.0
        for _, done, total in reversed(list(self._stages.values())):
            share = (done + share) / total if total else 0.0
        return share

    def __str__(self) -> str:
        """What is done, for how long, and for how long still."""
        stages = [f"{what} ({done + 1} of {total})" if total else what for what, done, total in self._stages.values()]
        spent, share = time.monotonic() - self._began, self.share
        left = f", about {timedelta(seconds=round(spent * (1 - share) / share))} left" if share > 0.05 else ""
        return f"{', '.join(stages) or self._what}: {timedelta(seconds=round(spent))}{left}"

    def __rich__(self) -> str:
        return str(self).replace("[", r"\[")


@contextmanager
def _live(stages: _Stages) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    console = Console(stderr=True, highlight=False)
    with Live(Spinner("dots", stages), console=console, transient=True, redirect_stdout=sys.stdout.isatty()):
        yield


@contextmanager
def _lines(stages: _Stages) -> Iterator[None]:
    ended = threading.Event()

    def write() -> None:
        seconds = _FIRST_S
        while not ended.wait(seconds):
            print(stages, file=sys.stderr, flush=True)
            seconds = _EVERY_S

    writer = threading.Thread(target=write, name="onefold-progress", daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


@contextmanager
def show_training_progress() -> Iterator[_OnProgress]:
    """Draws a training as it goes: a live bar on a terminal, a line an epoch elsewhere; both on stderr.

    Before the first step, and after the last, it shows what is done as `show_progress` does.
    """
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(None), bars.TextColumn("{task.fields[now]}"))
    console, live = Console(stderr=True, highlight=False), _is_live()
    bar = bars.Progress(*columns, console=console, disable=not live, expand=True, redirect_stdout=sys.stdout.isatty())
    task = bar.add_task("", total=None, now="")
    with ExitStack() as shown:

        def on_progress(at: Progress) -> None:
            steps = at.epochs * at.steps
            if not bar.tasks[task].total:
                shown.close()
                shown.enter_context(bar)
            epoch, now = f"epoch {at.epoch}/{at.epochs}", progress_values(at)
            bar.update(task, completed=at.global_step, now=now, description=epoch, total=steps)
            if at.is_evaluation:
                line = f"{epoch}  {now}"
                console.print(line) if live else print(line, file=sys.stderr, flush=True)
                if at.global_step >= steps:
                    shown.close()
                    shown.enter_context(show_progress("saving"))

        shown.enter_context(show_progress("preparing the first step"))
        yield on_progress


def progress_values(at: Progress) -> str:
    """Loss, accuracy of the last evaluation, speed, memory and the time that is left, as far as they are known."""
    parts = [f"loss {at.loss:.3f}"]
    if "top1" in at.metrics:
        parts.append(f"top-1 {at.metrics['top1']:.2f} %")
    if math.isfinite(at.images_per_s):
        parts.append(f"{at.images_per_s:.0f} images/s")
    if at.memory_bytes:
        parts.append(f"{at.memory_bytes / 2**20:.0f} MiB")
    if math.isfinite(at.eta_s):
        parts.append(f"{timedelta(seconds=round(at.eta_s))} left")
    return "  ".join(parts)
