"""Numbers as people read them: with a unit that stays beside them, and no more digits than they carry."""

from __future__ import annotations

import math

_SPACE = "\N{NO-BREAK SPACE}"


def latency(nanoseconds: float | None) -> str:
    """Three digits in the unit that fits; a dash where it is not known."""
    if nanoseconds is None:
        return "–"
    if nanoseconds >= 1e10:
        return f"{digits(nanoseconds / 1e9)}{_SPACE}s"
    return f"{digits(nanoseconds / 1e6)}{_SPACE}ms" if nanoseconds >= 1e5 else f"{digits(nanoseconds / 1e3)}{_SPACE}µs"


def digits(number: float, count: int = 3) -> str:
    """`count` significant digits without an exponent: 0.412, 3.42, 34.2, 1230."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    places = max(0, count - 1 - math.floor(math.log10(abs(number))))
    return f"{number:.{places}f}"


def percent(number: float | None, places: int = 1) -> str:
    """A number that is already in percent."""
    return "–" if number is None else f"{number:.{places}f}{_SPACE}%"


def share(number: float | None, places: int = 1) -> str:
    """A share (0 to 1) in percent."""
    return "–" if number is None else percent(100 * number, places)


def scientific(number: float | None) -> str:
    """A small number: 4.1e-07; a dash where it is not known."""
    return "–" if number is None else f"{number:.1e}" if number else "0"


def size(num_bytes: int | None) -> str:
    """Bytes in MB or kB (powers of ten, as file managers show them)."""
    if num_bytes is None:
        return "–"
    return f"{digits(num_bytes / 1e6)}{_SPACE}MB" if num_bytes >= 1e5 else f"{digits(num_bytes / 1e3)}{_SPACE}kB"


def many(number: int, thing: str, things: str | None = None) -> str:
    """`1 run`, `2 runs`, `no runs`."""
    named = thing if number == 1 else (things or f"{thing}s")
    return f"{number or 'no'} {named}"


def listed(items: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
