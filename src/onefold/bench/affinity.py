"""Which processors this process may use: read, and set for as long as something is measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from onefold.errors import BadArgument


def affinity() -> tuple[int, ...]:
    """The processors, by number; empty where the system does not tell (macOS, Windows)."""
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        return ()


@contextmanager
def pinned(processors: Sequence[int] | None) -> Iterator[None]:
    """Have this thread, and those it starts, use these processors only; None leaves all as it is. BadArgument."""
    if processors is None:
        yield
        return
    before = affinity()
    if not before:
        raise BadArgument("this system does not let a program choose its processors: leave out --pin")
    if not processors or (missing := sorted(set(processors) - set(before))):
        gone = f"there is no processor {', '.join(map(str, missing))}" if processors else "none is named"
        raise BadArgument(f"cannot pin: {gone}; this process may use {', '.join(map(str, before))}")
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
