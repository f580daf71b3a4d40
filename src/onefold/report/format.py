"""Numbers and names as text: units, significant digits, one printable line out of whatever a file may hold; and numbers
and objects out of it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from onefold.accuracy_intervals import wilson_interval
from onefold.file_io import parse_json

_LARGEST_NUMBER = 1e15  # no figure here can be larger; the comparison also leaves out infinities and NaN
_SPACE = "\N{NO-BREAK SPACE}"
# Bidirectional controls: they reorder the text after them, so that a page could read differently from its source.
_BIDIRECTIONAL = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def printable(text: str) -> str:
    """Replace control characters by spaces, and what no page can show (surrogates, bidi controls) by U+FFFD."""
    return text if text.isascii() and text.isprintable() else "".join(map(_printable, text))


def one_line(value: object, longest: int = 160) -> str:
    """Return the value as one line of printable text; text longer than `longest` characters is cut in its middle."""
    text = " ".join(printable(str(value)).split())
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def format_latency(nanoseconds: float | None) -> str:
    """Format a latency with three significant digits in the unit that fits (µs, ms or s); a dash for None."""
    if nanoseconds is None:
        return "–"
    if nanoseconds >= 1e10:
        return f"{format_significant(nanoseconds / 1e9)}{_SPACE}s"
    if nanoseconds >= 1e5:
        return f"{format_significant(nanoseconds / 1e6)}{_SPACE}ms"
    return f"{format_significant(nanoseconds / 1e3)}{_SPACE}µs"


def format_significant(number: float | None, digits: int = 3) -> str:
    """Format with so many significant digits and no exponent: 0.412, 3.42, 34.2, 1230; a dash for None."""
    if number is None:
        return "–"
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    return f"{number:.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}"


def format_percent(number: float | None, places: int = 1) -> str:
    """Format a number that is in percent already; a dash for None."""
    return "–" if number is None else f"{number:.{places}f}{_SPACE}%"


def format_with_interval(right: float, total: int) -> str:
    """Format a share of images, given in percent, with its 95 % interval (Wilson's): 85.0 % (80.1–88.9)."""
    low, high = wilson_interval(round(right / 100 * total), total)
    return f"{format_percent(right)} ({low:.1f}–{high:.1f})"


def format_accuracy(top1: float | None, num_images: int | None) -> str:
    """Format a top-1 in percent, with its interval where it is known of how many images it is; a dash for None."""
    return format_percent(top1) if top1 is None or num_images is None else format_with_interval(top1, num_images)


def format_scientific(number: float | None) -> str:
    """Format a small number: 4.1e-07; a dash for None."""
    return "–" if number is None else f"{number:.1e}" if number else "0"


def format_size(num_bytes: int | None) -> str:
    """Format bytes in MB or kB (powers of ten, as file managers show them); a dash for None."""
    if num_bytes is None:
        return "–"
    if num_bytes >= 1e5:
        return f"{format_significant(num_bytes / 1e6)}{_SPACE}MB"
    return f"{format_significant(num_bytes / 1e3)}{_SPACE}kB"


def plain_size(num_bytes: int) -> str:
    """Format bytes as `format_size` does, for a terminal, where a blank is one."""
    return format_size(num_bytes).replace(_SPACE, " ")


def format_count(number: int, noun: str, nouns: str | None = None) -> str:
    """Return `1 run`, `2 runs`, `no runs`; `nouns` is the plural where it is not made with an s."""
    return f"{number or 'no'} {noun if number == 1 else (nouns or f'{noun}s')}"


def join_words(items: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _printable(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cc", "Zl", "Zp"):  # controls, line and paragraph separators
        return " "
    if category == "Cs" or unicodedata.bidirectional(character) in _BIDIRECTIONAL:
        return "\ufffd"
    return character


def finite_number(values: Mapping[str, Any], key: str) -> float | None:
    """Return the number under `key`; None where there is none, or one that is not finite or absurdly large."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST_NUMBER else None


def parse_json_object(text: str) -> Mapping[str, Any]:
    """Return the JSON object in `text`; an empty one for anything else."""
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, Mapping) else {}
