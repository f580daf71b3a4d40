"""The page's figures: plain values in, an inline SVG drawn by matplotlib out.

The same data give the same bytes: no date, no random ids, none of the user's matplotlib settings. Text stays text. A
figure is drawn small (324 points wide), so that its letters are still legible on a phone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from onefold.bench import Ratio, percentile
from onefold.errors import MissingExtra, NotWritable
from onefold.report.format import format_count, format_percent, format_significant, one_line, printable
from onefold.report.predictions import NUM_BINS, Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

POINTS_PER_INCH = 72
MARKERS = "osD^vP*X"
NUM_COLOURS = 8

# matplotlib draws with these placeholder colours; `to_svg` replaces them by variables of the page's style sheet, so
# that one figure serves the light and the dark page.
_INK, MUTED_COLOUR, _GRID, SURFACE_COLOUR, ALARM_COLOUR = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "ink", MUTED_COLOUR: "muted", _GRID: "grid", SURFACE_COLOUR: "surface", ALARM_COLOUR: "alarm"}
_VARIABLES |= {f"#0a000{index}": f"series-{index}" for index in range(NUM_COLOURS)}

_WIDTH = 4.5  # inches
_LOG_FACTOR = 6.0  # an axis that spans more than this factor is logarithmic
_SYMBOLS = "●■◆▲▼✚★✖"  # MARKERS, for a legend outside of the figure
_DASHES: Sequence[str | tuple[int, tuple[float, ...]]] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_NUM_BINS = 90  # of a histogram of latencies
_MAX_NUMBERED_CLASSES = 12  # classes up to which the cells of a confusion matrix hold numbers


class LegendEntry(NamedTuple):
    """An entry of a figure's legend: a symbol, the CSS class of its colour, and a text."""

    symbol: str
    style: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ReportFigure:
    """A figure of the page; the caption says in words what the curves show, for those who do not see them."""

    title: str
    svg: Markup | None
    caption: str
    legend: tuple[LegendEntry, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A curve of (epoch, value) points, and the value that was expected at its end."""

    label: str
    points: tuple[tuple[float, float], ...]
    expected: float | None = None


@dataclass(frozen=True)
class LatencyRow:
    """The latencies of one subject, in milliseconds."""

    label: str
    note: str
    latencies_ms: tuple[float, ...]
    median_ms: float
    p90_ms: float | None
    fused: bool | None


@dataclass(frozen=True)
class RatioRow:
    """A ratio of two latencies under a label, and the ratio as text."""

    label: str
    note: str
    ratio: Ratio


def series_colour(index: int) -> str:
    """Return the placeholder colour of the series with this index; there are eight, then they begin again."""
    return f"#0a000{index % NUM_COLOURS}"


def legend_entry(index: int, text: str) -> LegendEntry:
    """Return the legend entry of the series with this index."""
    return LegendEntry(_SYMBOLS[index % NUM_COLOURS], f"series-{index % NUM_COLOURS}", text)


def require_matplotlib() -> None:
    """Raise MissingExtra where matplotlib is not installed, NotWritable where it finds no place for its font cache."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtra("a report needs matplotlib for its figures", "report") from error
    except OSError as error:  # it keeps a cache beside its configuration, else in a temporary folder
        raise NotWritable(
            f"matplotlib cannot write its font cache ({error}): set MPLCONFIGDIR to a folder you can write to"
        ) from error


@contextmanager
def new_figure(height: float, width: float = _WIDTH) -> Iterator[tuple[Figure, Axes]]:
    """Give an empty figure (inches), under settings that hold while it is drawn, whatever the user's own are."""
    require_matplotlib()
    from matplotlib import style
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "onefold",
        "text.parse_math": False,  # a name may hold a dollar sign
        "font.size": 9,
        "axes.edgecolor": MUTED_COLOUR,
        "axes.labelcolor": MUTED_COLOUR,
        "xtick.color": MUTED_COLOUR,
        "ytick.color": MUTED_COLOUR,
        "axes.unicode_minus": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with style.context(["default", settings]):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="both", color=_GRID, lw=0.6)
        axes.set_axisbelow(True)
        yield figure, axes


def to_svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """Return the figure as an `svg` element: ids made unique by `key`, the page's colours, a title for screen readers.

    To be called inside of `new_figure`, whose settings hold for writing too. Names in the figure are escaped by
    matplotlib, `title` and `description` here.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The page's fonts draw the letters, so it does not matter that matplotlib's own lacks one.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    inner = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', inner)
    inner = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", inner)
    inner = re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", _variable, inner)
    width, height = (size * POINTS_PER_INCH for size in figure.get_size_inches())
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{key}-name {key}-text"'
        f' xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{key}-name">{escape(printable(title))}</title>'
        f'<desc id="{key}-text">{escape(printable(description))}</desc>{inner}</svg>'
    )


def set_x_scale(axes: Axes, low: float, high: float) -> None:
    """Set the limits of the x axis, which is logarithmic where they lie far apart."""
    axes.set_xlim(low, high)
    if high / low >= _LOG_FACTOR:
        _set_logarithmic(axes.xaxis, low, high)


def set_y_scale(axes: Axes, low: float, high: float) -> None:
    """Set the limits of the y axis, which is logarithmic where they lie far apart."""
    axes.set_ylim(low, high)
    if high / low >= _LOG_FACTOR:
        _set_logarithmic(axes.yaxis, low, high)


# ---- training --------------------------------------------------------------------------------------------------------


def draw_curves(key: str, title: str, lines: Sequence[Curve], unit: str, suffix: str = "") -> ReportFigure:
    """Draw curves over epochs, with a dotted line at the expected value; a curve without points keeps its colour free.

    `unit` labels the y axis, `suffix` follows the numbers in the caption.
    """
    drawn = [(index, line) for index, line in enumerate(lines) if line.points]
    if not drawn:
        return ReportFigure(title=title, svg=None, caption="The logs hold no numbers for this figure.")
    parts = []
    for _, line in drawn:
        (first, start), (last, end) = line.points[0], line.points[-1]
        before = f"{format_significant(start)}{suffix} after epoch {first:g}, " if last > first else ""
        parts.append(f"{line.label}: {before}{format_significant(end)}{suffix} after epoch {last:g}")
    caption = f"{'; '.join(parts)}."
    legend = [legend_entry(index, line.label) for index, line in drawn]
    if any(line.expected is not None for _, line in drawn):
        legend.append(LegendEntry("┄┄", "", "expected, in the same colour"))
    with new_figure(2.5) as (figure, axes):
        for index, line in drawn:
            colour, (x, y) = series_colour(index), zip(*line.points, strict=True)
            axes.plot(
                x,
                y,
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                markevery=max(1, len(x) // 8),
                ms=3.5,
                lw=1.6,
                ls=_DASHES[index % len(_DASHES)],
            )
            if line.expected is not None:
                axes.axhline(line.expected, color=colour, lw=1.0, ls=(0, (1, 2)))
        epochs, values = zip(*(point for _, line in drawn for point in line.points), strict=True)
        if min(values) > 0 and max(values) / min(values) > 50:
            _set_logarithmic(axes.yaxis, min(values), max(values))
        if max(epochs) == min(epochs):  # one epoch: ticks at fractions of it would say nothing
            axes.set_xticks([epochs[0]])
        else:
            from matplotlib.ticker import MaxNLocator

            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(xlabel="epoch", ylabel=unit)
        if suffix.strip() == "%":  # no accuracy is more than that
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -1.0), min(high, 101.0))
        return ReportFigure(title=title, svg=to_svg(figure, key, title, caption), caption=caption, legend=tuple(legend))


def draw_confusion_matrix(key: str, found: Predictions) -> ReportFigure:
    """Draw a square for each pair of classes, the fuller the more of the class's images are in it."""
    title, count, totals = "Confusion matrix", len(found.classes), found.images_per_class
    caption = "Rows are true classes, columns predicted ones; cells hold percent of the class's images."
    for a, b, times in found.confusions[:1]:
        caption += f" Most often, {found.name(a)} is predicted as {found.name(b)}: {format_count(times, 'image')}."
    with new_figure(1.0 + 3.4 * min(1.0, 0.45 + count / 20)) as (figure, axes):
        axes.grid(False)
        for (label, predicted), number in sorted(found.pairs.items()):
            if predicted < 0:
                continue
            share, colour = number / totals[label], series_colour(0 if label == predicted else 1)
            across = [predicted, predicted + 1, predicted + 1, predicted]
            axes.fill(across, [label, label, label + 1, label + 1], color=colour, alpha=0.12 + 0.68 * share, lw=0)
            if count <= _MAX_NUMBERED_CLASSES:
                text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
                axes.text(predicted + 0.5, label + 0.5, text, ha="center", va="center", fontsize=7.5, color=_INK)
        for line in range(count + 1):
            axes.plot([0, count], [line, line], color=_GRID, lw=0.5)
            axes.plot([line, line], [0, count], color=_GRID, lw=0.5)
        axes.set(xlim=(0, count), ylim=(count, 0), xlabel="predicted class", ylabel="true class", aspect="equal")
        names = [one_line(name, 14) for name in found.classes]
        middles = [index + 0.5 for index in range(count)]
        axes.set_xticks(middles, names)
        axes.set_yticks(middles, names)
        if max(map(len, names)) * count > 44:
            for tick in axes.get_xticklabels():
                tick.set(rotation=60, ha="right", rotation_mode="anchor")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return ReportFigure(title=title, svg=to_svg(figure, key, title, caption), caption=caption)


def draw_reliability_diagram(key: str, found: Predictions) -> ReportFigure:
    """Draw accuracy by confidence in `NUM_BINS` bins (Guo et al., arXiv 1706.04599, figure 1), with their sizes."""
    filled = [(index, held) for index, held in enumerate(found.bins) if held[0]]
    mean = 100 * sum(sums for _, (_, _, sums) in filled) / max(1, sum(number for _, (number, _, _) in filled))
    most, width = max((number for _, (number, _, _) in filled), default=1), 100 / NUM_BINS
    title = "Reliability diagram"
    caption = (
        f"Predictions in {NUM_BINS} bins by confidence; on the dashed line confidence equals accuracy. The network is "
        f"{'overconfident' if mean > found.top1 else 'underconfident'}: its mean confidence is {format_percent(mean)}. "
        "Bars below the axis show how many predictions have that confidence."
    )
    with new_figure(3.2) as (figure, axes):
        axes.plot([0, 100], [0, 100], color=MUTED_COLOUR, lw=1.2, ls=(0, (4, 2)))
        for index, (number, right, sums) in filled:
            middle, half = (index + 0.5) * width, 0.43 * width
            axes.bar(middle, 100 * right / number, 2 * half, color=series_colour(0), alpha=0.75, lw=0)
            axes.plot([middle - half, middle + half], [100 * sums / number] * 2, color=series_colour(1), lw=2)
            axes.bar(middle, -14 * number / most, 2 * half, bottom=-3, color=MUTED_COLOUR, alpha=0.6, lw=0)
        axes.axhline(0, color=MUTED_COLOUR, lw=0.8)
        axes.set(xlim=(0, 100), ylim=(-18, 102), xlabel="confidence, %", ylabel="accuracy, %")
        axes.set_yticks([0, 20, 40, 60, 80, 100])
        legend = (LegendEntry("■", "series-0", "accuracy"), LegendEntry("▬", "series-1", "mean confidence"))
        return ReportFigure(title=title, svg=to_svg(figure, key, title, caption), caption=caption, legend=legend)


# ---- latency ---------------------------------------------------------------------------------------------------------


def draw_latency_histograms(key: str, title: str, rows: Sequence[LatencyRow], more: str = "") -> ReportFigure:
    """Draw one histogram a row over a shared axis of milliseconds, with marks at the median and at p90."""
    states = {row.fused for row in rows}
    kinds = ((True, "series-0", "fused"), (False, "alarm-mark", "UNFUSED"), (None, "series-7", "not stated"))
    description = "; ".join(f"{row.label}: median {row.note}" for row in rows) + "."
    with new_figure(0.62 + 0.52 * len(rows)) as (figure, axes):
        edges = _shared_edges(rows)
        for index, row in enumerate(rows):
            base = float(len(rows) - 1 - index)
            _draw_histogram(axes, row, edges, base)
            _write(axes, (0.0, base + 0.68), row.label, ALARM_COLOUR if row.fused is False else _INK)
            _write(axes, (1.0, base + 0.68), row.note, MUTED_COLOUR)
        set_x_scale(axes, edges[0], edges[-1])
        axes.set(ylim=(-0.05, len(rows) + 0.02), yticks=[], xlabel="latency of one call, milliseconds")
        axes.spines["left"].set_visible(False)
        return ReportFigure(
            title=title,
            svg=to_svg(figure, key, title, description),
            caption=f"A row is the histogram of all calls; its last bin holds everything slower. The line marks the "
            f"median, the broken line p90 (with 99 % confidence).{more}",
            legend=tuple(LegendEntry("■", style, text) for fused, style, text in kinds if fused in states),
        )


def draw_ratios(key: str, rows: Sequence[RatioRow], description: str, baseline: str | None) -> ReportFigure:
    """Draw ratios of latencies with their intervals (a forest plot); the band around 1 is the noise floor."""
    title = "Latency ratios with 95 % intervals"
    with new_figure(0.72 + 0.44 * len(rows)) as (figure, axes):
        floor = max(row.ratio.floor for row in rows)
        axes.axvspan(1 / (1 + floor), 1 + floor, color=MUTED_COLOUR, alpha=0.22, lw=0)
        axes.axvline(1, color=MUTED_COLOUR, lw=1)
        bounds = [bound for row in rows for bound in (row.ratio.low, row.ratio.high)]
        low, high = min(0.93, *bounds) / 1.06, max(1.07, *bounds) * 1.06
        set_x_scale(axes, low, high)
        for index, row in enumerate(rows):
            ratio, y = row.ratio, len(rows) - 1 - index
            colour = (
                MUTED_COLOUR if ratio.verdict == "no difference" or not ratio.is_robust_to_noise else series_colour(0)
            )
            axes.plot([ratio.low, ratio.high], [y, y], color=colour, lw=2.6, solid_capstyle="round")
            axes.plot(ratio.value, y, "o", color=colour, ms=6)
            _write(axes, (0.0, y + 0.24), row.label, _INK)
            has_room_right = ratio.value < (low + high) / 2
            x, gap, side = (ratio.high, 7, "left") if has_room_right else (ratio.low, -7, "right")
            axes.annotate(
                row.note,
                (x, y),
                (gap, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                color=MUTED_COLOUR,
                fontsize=8.5,
            )
        axes.set(ylim=(-0.4, len(rows) - 0.3), yticks=[], xlabel="time relative to the baseline (left is faster)")
        axes.spines["left"].set_visible(False)
        return ReportFigure(
            title=title,
            svg=to_svg(figure, key, title, description),
            caption=f"Dots are ratios of times{f' to {baseline}' if baseline else ''}, bars 95 % intervals, the grey "
            "band is the noise floor; a grey dot means no difference.",
        )


def _write(axes: Axes, place: tuple[float, float], text: str, colour: str) -> None:
    """Write a line at `place`: x is 0 (left-aligned) or 1 (right-aligned) of the axes' width, y is in data units."""
    side = "right" if place[0] else "left"
    axes.text(*place, one_line(text, 64), transform=axes.get_yaxis_transform(), ha=side, fontsize=8.5, color=colour)


def _draw_histogram(axes: Axes, row: LatencyRow, edges: Sequence[float], base: float) -> None:
    colour = ALARM_COLOUR if row.fused is False else series_colour(0 if row.fused else 7)
    counts, _ = np.histogram(np.clip(row.latencies_ms, edges[0], edges[-1]), bins=list(edges))
    heights = 0.55 * counts / max(1, counts.max())
    axes.stairs(base + heights, list(edges), baseline=base, fill=True, color=colour, alpha=0.55, lw=0)
    axes.plot([edges[0], edges[-1]], [base, base], color=_GRID, lw=0.8, zorder=0)
    axes.plot([row.median_ms] * 2, [base, base + 0.55], color=_INK, lw=1.4)
    if row.p90_ms is not None:
        axes.plot([row.p90_ms] * 2, [base, base + 0.34], color=_INK, lw=1.0, ls=(0, (2, 1.2)))


def _shared_edges(rows: Sequence[LatencyRow]) -> list[float]:
    """Return bin edges for all rows: logarithmic where the rows lie far apart; the last bin takes what is beyond."""
    low = min(min(row.latencies_ms) for row in rows)
    high = max(max(percentile(row.latencies_ms, 0.99), row.p90_ms or 0) for row in rows)
    if high / low >= _LOG_FACTOR:
        low, high = low * 0.9, high * 1.1
        return [low * (high / low) ** (index / _NUM_BINS) for index in range(_NUM_BINS + 1)]
    gap = max((high - low) * 0.06, low * 0.02)
    low, high = max(low - gap, low / 2), min(high + gap, 0.99 * _LOG_FACTOR * low)
    return [low + (high - low) * index / _NUM_BINS for index in range(_NUM_BINS + 1)]


def _set_logarithmic(axis: Axis, low: float, high: float) -> None:
    """Make an axis logarithmic, with plain numbers at as many ticks as there is room for."""
    from matplotlib.axis import XAxis
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps = (1.0, 2.0, 3.0, 5.0) if high / low < 30 else (1.0, 3.0) if high / low < 3000 else (1.0,)
    (axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(10, subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _variable(match: re.Match[str]) -> str:
    variable = _VARIABLES.get(match[2])
    return f"{match[1]}: {f'var(--{variable})' if variable else match[2]}"
