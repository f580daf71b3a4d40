"""The figures: curves, distributions, accuracy against latency, ratios; plain values in, an `svg` element out."""

from __future__ import annotations

import math
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
    POINTS,
    SERIES,
    SURFACE,
    WIDTH,
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

_SCATTER_HEIGHT = 3.2  # inches
_APART = 8.5  # points between a number and anything else
_SIDES = ((0.0, 9.0), (9.0, 3.0), (0.0, -10.0), (-9.0, 3.0), (8.0, 9.0), (8.0, -9.0), (-8.0, 9.0), (-8.0, -9.0))

_DASHES: Sequence[str | tuple[int, tuple[float, ...]]] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = "osD^vP*X"
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
class Point:
    """One subject by latency and accuracy; `number` is its name in the list below the figure."""

    number: int
    latency_ms: float
    top1: float
    fused: bool | None
    on_front: bool


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
            marker = _MARKERS[index % len(_MARKERS)]
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
            axes.plot([row.median_ms] * 2, [foot, foot + 0.6], color=INK, lw=1.4)
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


def scatter(words: Words, points: Sequence[Point]) -> Markup:
    """Accuracy over latency, every point numbered, the front joined by a line."""
    with canvas(_SCATTER_HEIGHT) as (figure, axes):
        front = [(point.latency_ms, point.top1) for point in points if point.on_front]
        axes.plot(*zip(*front, strict=True), color=series(0), lw=1.4, alpha=0.55, drawstyle="steps-post", zorder=1)
        latencies, accuracies = [point.latency_ms for point in points], [point.top1 for point in points]
        gap = max(1.1, (max(latencies) / min(latencies)) ** 0.12)
        scale(axes, min(latencies) / gap, max(latencies) * gap)
        room = max(0.5, 0.16 * (max(accuracies) - min(accuracies)))
        axes.set_ylim(min(accuracies) - room, max(accuracies) + room)
        sides = _sides(list(zip(latencies, accuracies, strict=True)), axes)
        for point, side in zip(points, sides, strict=True):
            colour = ALARM if point.fused is False else series(0) if point.on_front else MUTED
            marker, place = "s" if point.fused is False else "o", (point.latency_ms, point.top1)
            axes.plot(*place, marker, ms=6, mfc=colour if point.on_front else SURFACE, mec=colour, mew=1.4)
            name = axes.annotate(str(point.number), place, side, textcoords="offset points", ha="center", va="center")
            name.set_color(colour)
        axes.set_xlabel("median latency, milliseconds (left is better)")
        axes.set_ylabel("top-1 accuracy, % (up is better)")
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


def _sides(places: Sequence[tuple[float, float]], axes: Axes) -> list[tuple[float, float]]:
    """For each point the offset, in points, of its number: the first of eight sides that is free, else above."""
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    width, height = 0.85 * WIDTH * POINTS, 0.85 * _SCATTER_HEIGHT * POINTS
    dots = [(float(x) * width, float(y) * height) for x, y in map(to_axes, places)]
    taken, chosen = list(dots), []
    for dot in dots:
        free = (side for side in _SIDES if _is_free(dot, side, [each for each in taken if each != dot]))
        side = next(free, _SIDES[0])
        taken.append((dot[0] + side[0], dot[1] + side[1]))
        chosen.append(side)
    return chosen


def _is_free(dot: tuple[float, float], side: tuple[float, float], taken: Sequence[tuple[float, float]]) -> bool:
    return all(math.dist((dot[0] + side[0], dot[1] + side[1]), other) >= _APART for other in taken)


def _ridge(axes: Axes, row: Row, edges: Sequence[float], foot: float, colour: str) -> None:
    import numpy as np

    counts, _ = np.histogram(np.clip(row.latencies_ms, edges[0], edges[-1]), bins=list(edges))
    heights = 0.6 * counts / max(1, counts.max())
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
