"""The figures: curves, distributions, ratios; plain values in, an `svg` element out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onefold.bench import Ratio, percentile
from onefold.report.canvas import (
    ALARM,
    FAR_APART,
    GRID,
    INK,
    MUTED,
    SERIES,
    Words,
    canvas,
    finished,
    logarithmic,
    scale,
    series,
    whole_numbers,
)
from onefold.report.html import Markup, classed, element, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES: Sequence[str | tuple[int, tuple[float, ...]]] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vP*X"
_GLYPHS = "●■◆▲▼✚★✖"  # the same for a legend


@dataclass(frozen=True)
class Line:
    """A curve of (x, y) points, and the value it was expected to reach."""

    label: str
    points: tuple[tuple[float, float], ...]
    expected: float | None = None


@dataclass(frozen=True)
class Row:
    """The latencies of one subject, in milliseconds."""

    label: str
    note: str
    latencies_ms: tuple[float, ...]
    median_ms: float
    p90_ms: float | None
    fused: bool | None


@dataclass(frozen=True)
class Contest:
    """A ratio of two latencies under a label, and the ratio in words."""

    label: str
    note: str
    ratio: Ratio


def swatch(index: int, label: str) -> Markup:
    """An entry of a legend: the colour, the dashes and the marker of series `index`, and its name."""
    return classed("span", f"swatch series-{index % SERIES}", element("i", _GLYPHS[index % len(_GLYPHS)]), " ", label)


def curves(words: Words, lines: Sequence[Line], unit: str) -> Markup:
    """Curves over epochs, with a dotted line at what was expected; a line without points keeps its colour free."""
    with canvas(2.5) as (figure, axes):
        for index, line in enumerate(lines):
            if not line.points:
                continue
            colour, (x, y) = series(index), zip(*line.points, strict=True)
            marker = MARKERS[index % len(MARKERS)]
            every = max(1, len(x) // 8)
            axes.plot(
                x, y, color=colour, marker=marker, markevery=every, ms=3.5, lw=1.6, ls=_DASHES[index % len(_DASHES)]
            )
            if line.expected is not None:
                axes.axhline(line.expected, color=colour, lw=1.0, ls=(0, (1, 2)))
        values = [y for line in lines for _, y in line.points]
        if min(values) > 0 and max(values) / min(values) > 50:
            logarithmic(axes.yaxis, min(values), max(values))
        whole_numbers(axes)
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        return finished(figure, words)


def distributions(words: Words, rows: Sequence[Row]) -> Markup:
    """One histogram a row over a shared axis of milliseconds, with marks at the median and at p90."""
    with canvas(0.62 + 0.52 * len(rows)) as (figure, axes):
        edges = _edges(rows)
        for index, row in enumerate(rows):
            foot = float(len(rows) - 1 - index)
            colour = ALARM if row.fused is False else series(0 if row.fused else 7)
            _ridge(axes, row, edges, foot, colour)
            axes.plot([row.median_ms] * 2, [foot, foot + 0.55], color=INK, lw=1.4)
            if row.p90_ms is not None:
                axes.plot([row.p90_ms] * 2, [foot, foot + 0.34], color=INK, lw=1.0, ls=(0, (2, 1.2)))
            _write(axes, (0.0, foot + 0.68), row.label, ALARM if row.fused is False else INK)
            _write(axes, (1.0, foot + 0.68), row.note, MUTED)
        scale(axes, edges[0], edges[-1])
        axes.set_ylim(-0.05, len(rows) + 0.02)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("latency of one call, milliseconds")
        return finished(figure, words)


def forest(words: Words, contests: Sequence[Contest]) -> Markup:
    """Ratios with their intervals; the band around 1 is the noise floor."""
    with canvas(0.72 + 0.44 * len(contests)) as (figure, axes):
        floor = max(contest.ratio.floor for contest in contests)
        axes.axvspan(1 / (1 + floor), 1 + floor, color=MUTED, alpha=0.22, lw=0)
        axes.axvline(1, color=MUTED, lw=1)
        bounds = [bound for contest in contests for bound in (contest.ratio.low, contest.ratio.high)]
        low, high = min(0.93, *bounds) / 1.06, max(1.07, *bounds) * 1.06
        scale(axes, low, high)
        for index, contest in enumerate(contests):
            ratio, foot = contest.ratio, len(contests) - 1 - index
            colour = MUTED if ratio.verdict == "no difference" else series(0)
            axes.plot([ratio.low, ratio.high], [foot, foot], color=colour, lw=2.6, solid_capstyle="round")
            axes.plot(ratio.value, foot, "o", color=colour, ms=6)
            _write(axes, (0.0, foot + 0.24), contest.label, INK)
            right = ratio.value < (low + high) / 2  # the side with more room
            place, gap, side = (ratio.high, 7, "left") if right else (ratio.low, -7, "right")
            beside = axes.annotate(
                contest.note, (place, foot), (gap, 0), textcoords="offset points", ha=side, va="center"
            )
            beside.set(color=MUTED, fontsize=8.5)
        axes.set_ylim(-0.4, len(contests) - 0.3)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("time relative to the baseline (left is faster)")
        return finished(figure, words)


def _write(axes: Axes, place: tuple[float, float], text: str, colour: str) -> None:
    """A line of text at `place`: x as a share of the width (from its left end at 0, its right end at 1), y as data."""
    side = "right" if place[0] else "left"
    written = axes.text(*place, plain(text, 64), transform=axes.get_yaxis_transform(), ha=side, fontsize=8.5)
    written.set_color(colour)


def _ridge(axes: Axes, row: Row, edges: Sequence[float], foot: float, colour: str) -> None:
    import numpy as np

    counts, _ = np.histogram(np.clip(row.latencies_ms, edges[0], edges[-1]), bins=list(edges))
    heights = 0.55 * counts / max(1, counts.max())
    axes.stairs(foot + heights, list(edges), baseline=foot, fill=True, color=colour, alpha=0.55, lw=0)
    axes.plot([edges[0], edges[-1]], [foot, foot], color=GRID, lw=0.8, zorder=0)


def _edges(rows: Sequence[Row]) -> list[float]:
    """Bins that all rows share: logarithmic where the rows lie far apart; the last one takes what is beyond."""
    low = min(min(row.latencies_ms) for row in rows)
    high = max(max(percentile(row.latencies_ms, 0.99), row.p90_ms or 0) for row in rows)
    count = 90
    if high / low >= FAR_APART:
        low, high = low * 0.9, high * 1.1
        return [low * (high / low) ** (index / count) for index in range(count + 1)]
    gap = max((high - low) * 0.06, low * 0.02)
    low, high = max(low - gap, low / 2), min(high + gap, 0.99 * FAR_APART * low)
    return [low + (high - low) * index / count for index in range(count + 1)]
