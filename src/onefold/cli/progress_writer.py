"""The process that writes on stderr how far a command is: `python -I -S progress_writer.py HOW FIRST EVERY WHAT`.

A thread of the command could not keep time: while a large library is loaded or a network is converted, Python may not
change threads for seconds, and what converters print is kept from the terminal by pointing stderr elsewhere. This file
is run by itself, and imports little, so that the first line is there at once.

HOW is "live", each line on a terminal in place of the one before, or "log"; FIRST and EVERY are the seconds before the
first line and between two. On stdin come updates, a line each, of three parts between tabs: seconds spent on what is
counted, its share that is done (0 to 1; 0 where nothing is counted), and what is done now. An empty one says that the
command has written a line of its own: in a log the next one is EVERY seconds away then.
"""

from __future__ import annotations

import os
import sys
import threading
import time

ERASE = "\r\x1b[2K"  # the line that the cursor is in
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Clock:
    """What is done, since when, and when it will have ended, as far as the last update tells."""

    def __init__(self, what: str, now: float) -> None:
        self._what, self._began, self._ends = what, now, now

    def update(self, line: str, now: float) -> None:
        """Take an update that was written now."""
        spent, share, what = line.rstrip("\n").split("\t", 2)
        self._what, self._ends = what, now
        if float(share) > 0.05:
            self._ends += float(spent) * (1 / float(share) - 1)

    def text(self, now: float, width: int = sys.maxsize) -> str:
        """Give what is done, for how long, and for how long still where that is known; the first is cut to `width`."""
        left = f", about {_minutes(self._ends - now)} left" if self._ends - now >= 0.5 else ""
        times = f": {_minutes(now - self._began)}{left}"
        room = max(width - len(times), 0)
        return (self._what if len(self._what) <= room else self._what[: max(room - 3, 0)] + "...") + times


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def live_line(clock: Clock, now: float, width: int, spinner: str) -> str:
    """Give the line on a terminal of so many columns, over the one before."""
    return f"{ERASE}{spinner[int(5 * now) % len(spinner)]} {clock.text(now, width - 3)}"


def _width() -> int:
    try:
        return os.get_terminal_size(2).columns or 80  # 0 where a terminal does not know
    except OSError:
        return 80


def main(how: str, first: str, every: str, what: str) -> None:
    """Write until the command ends, or closes its end of the pipe."""
    clock, ended, parent = Clock(what, time.monotonic()), threading.Event(), os.getppid()
    due = time.monotonic() + float(first)

    def read() -> None:
        nonlocal due
        for line in iter(sys.stdin.readline, ""):
            if line.strip("\n"):
                clock.update(line, time.monotonic())
            elif how == "log":
                due = time.monotonic() + float(every)
        ended.set()

    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    threading.Thread(target=read, daemon=True).start()
    spinner = _SPINNER if sys.stderr.encoding.lower().startswith("utf") else "|/-\\"
    while not ended.wait(max(due - time.monotonic(), 0)) and os.getppid() == parent:
        now = time.monotonic()
        if now < due:  # it was put off meanwhile
            continue
        line = live_line(clock, now, _width(), spinner) if how == "live" else f"{clock.text(now)}\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except OSError:  # the terminal is gone
            break
        due = now + float(every)
    os._exit(0)  # not by way of the thread, which may still read


if __name__ == "__main__":
    main(*sys.argv[1:])
