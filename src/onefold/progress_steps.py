"""How far a command is: steps told to the logger "onefold.progress", and what of its records is under way.

A record says what is done now, with `done` and `total` where steps are counted (`unit` says what these are, where the
name does not), and with the `costs` of steps that are not alike (`Steps`). A stage within another is the share of a
step that it has done (`Stages`). What is left is reckoned from the time that was spent on that share; of a stage that
is a `part` of something longer, only within that.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_progress = logging.getLogger("onefold.progress")
_numbers: Iterator[int] = itertools.count()
_MOST_SHOWN = 2  # stages, so that a line has room for them
_LEAST_SHARE = 0.05  # that is done, before which nothing is said of what is left


class Steps:
    """Steps that are not alike: what each does, and how long that takes, in any unit that is the same for all.

    What is left is reckoned from both, so that the costs need to be right in proportion only. Names of steps that
    have numbers of their own are not `numbered` again.
    """

    def __init__(self, steps: Sequence[tuple[str, float]], *, numbered: bool = True) -> None:
        self._names = [name for name, _ in steps]
        self._extra = {"total": len(steps), "costs": [cost for _, cost in steps], "stage": next(_numbers)}
        self._extra["numbered"] = numbered

    def begin(self, number: int) -> None:
        """Tell that a step begins, by its number from 0."""
        _progress.debug("%s", self._names[number], extra={**self._extra, "done": number})

    def end(self) -> None:
        """Tell that all are done."""
        _progress.debug("done", extra={**self._extra, "done": len(self._names)})


@contextmanager
def show_step(what: str) -> Iterator[None]:
    """Tell what is done while the block runs, where no step of it is counted."""
    extra: dict[str, object] = {"stage": next(_numbers)}
    _progress.debug("%s", what, extra=extra)
    try:
        yield
    finally:
        _progress.debug("done", extra={**extra, "done": 1, "total": 1})


@dataclass(frozen=True, kw_only=True)
class _Stage:
    what: str
    done: float
    total: int
    costs: Sequence[float] | None
    is_part: bool
    began: float
    unit: str | None = ""

    def __str__(self) -> str:
        if self.unit is None or self.total <= 1:
            return self.what
        return f"{self.what} ({self.unit}{self.done + 1} of {self.total})"

    def share(self, inner: float) -> float:
        """Give the share that is done, where `inner` is that of the step under way."""
        if not self.total:
            return 0.0
        if self.costs is None:
            return (self.done + inner) / self.total
        number = int(self.done)
        return (sum(self.costs[:number]) + inner * self.costs[number]) / sum(self.costs)


class Stages:
    """The stages that are under way, the outermost first: what, how many steps are done, and of how many."""

    def __init__(self) -> None:
        self._stages: dict[object, _Stage] = {}

    def add(self, record: logging.LogRecord, now: float | None = None) -> None:
        """Take a record in place of what its function, or its `Steps`, said before and of all within that."""
        key: object = getattr(record, "stage", (record.pathname, record.funcName))
        known, now = list(self._stages), time.monotonic() if now is None else now
        before = self._stages.get(key)
        for inner in known[known.index(key) :] if before else ():
            del self._stages[inner]
        done, total = getattr(record, "done", 0), getattr(record, "total", 0)
        if not total or done < total:
            began = before.began if before and before.total == total else now
            self._stages[key] = _Stage(
                what=record.getMessage(),
                done=done,
                total=total,
                costs=getattr(record, "costs", None),
                is_part=getattr(record, "part", False),
                began=began,
                unit=getattr(record, "unit", "") if getattr(record, "numbered", True) else None,
            )

    def progress(self, now: float | None = None) -> tuple[float, float]:
        """Give the seconds that were spent on what is counted, from the outermost stage on, and its share done."""
        counted = list(itertools.dropwhile(lambda stage: stage.is_part or not stage.total, self._stages.values()))
        share = 0.0
        for stage in reversed(counted):
            share = stage.share(share)
        now = time.monotonic() if now is None else now
        return (now - counted[0].began if counted else 0.0), share

    def __str__(self) -> str:
        return ", ".join([str(stage) for stage in self._stages.values() if stage.what][:_MOST_SHOWN])


def seconds_left(spent: float, share: float) -> float:
    """Give how long it takes still; 0 where too little is done to tell."""
    return spent * (1 / share - 1) if share > _LEAST_SHARE else 0.0
