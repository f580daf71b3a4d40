"""Where figures are drawn: matplotlib's SVG made fit for the page, which lends it the colours.

The same data give the same bytes: no date, no random ids, none of the user's own settings. Text stays text. A figure is
drawn small (324 points wide) so that its letters are still letters on a phone, unless it must hold much: then a phone
scrolls.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onefold.errors import MissingExtra
from onefold.report.html import Markup, element

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

POINTS = 72  # in an inch
WIDTH = 4.5  # inches
FAR_APART = 6.0  # an axis that spans more than this factor is logarithmic
SERIES = 8

# Colours that matplotlib is given to draw with, and that the page's style sheet then replaces.
INK, MUTED, GRID, SURFACE, ALARM = "#010101", "#020202", "#030303", "#040404", "#050505"
_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SURFACE: "var(--surface)",
    ALARM: "var(--alarm)",
    **{f"#0a000{index}": f"var(--series-{index})" for index in range(SERIES)},
}


@dataclass(frozen=True)
class Words:
    """What a figure is for those who do not see it, and what stands below it for all."""

    key: str
    title: str
    description: str


@contextmanager
def canvas(height: float, width: float = WIDTH) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure of so many inches, and the settings it is to be drawn under, for as long as it is drawn."""
    figure_of, settings = _matplotlib()
    with settings:
        figure = figure_of(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(True, axis="both", color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        yield figure, axes


def _matplotlib() -> tuple[type[Figure], AbstractContextManager[None]]:
    """The class of figures and the settings they are drawn under, whatever the user's own; MissingExtra without it."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a report needs matplotlib for its figures: pip install 'onefold[report]'") from error
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "onefold",
        "text.parse_math": False,
        "font.size": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.unicode_minus": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    return Figure, style.context(["default", settings])


def scale(axes: Axes, low: float, high: float) -> None:
    """The x axis from low to high, logarithmic where they lie far apart."""
    axes.set_xlim(low, high)
    if high / low >= FAR_APART:
        logarithmic(axes.xaxis, low, high)


def logarithmic(axis: Axis, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers, as many as there is room for."""
    from matplotlib.axis import XAxis
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps = (1.0, 2.0, 3.0, 5.0) if high / low < 30 else (1.0, 3.0) if high / low < 3000 else (1.0,)
    (axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(10, subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def series(index: int) -> str:
    """The colour of the series with this index; there are eight, then they begin again."""
    return f"#0a000{index % SERIES}"


def finished(figure: Figure, words: Words) -> Markup:
    """The figure as an `svg` element that stands alone in the page: its own ids, the page's colours, a title."""
    drawn = io.StringIO()
    with warnings.catch_warnings():
        # The page's fonts draw the letters; that matplotlib's own lacks one is of no account.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=empty)
    text = drawn.getvalue()
    inner = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = re.sub(r'\bid="([^"]+)"', rf'id="{words.key}-\1"', inner)
    inner = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{words.key}-", inner)
    inner = re.sub(
        r"\b(fill|stroke): (#[0-9a-f]{6})", lambda found: f"{found[1]}: {_COLOURS.get(found[2], found[2])}", inner
    )
    width, height = (size * POINTS for size in figure.get_size_inches())
    named = f'role="img" aria-labelledby="{words.key}-name {words.key}-words"'
    head = f'<svg viewBox="0 0 {width:g} {height:g}" {named} xmlns:xlink="http://www.w3.org/1999/xlink">'
    name = element("title", words.title, attributes={"id": f"{words.key}-name"})
    description = element("desc", words.description, attributes={"id": f"{words.key}-words"})
    return Markup(f"{head}{name}{description}{inner}</svg>")
