"""Accuracy against latency: Pareto fronts, their figure, and the placement of labels in it.

adjustText was measured against the placement here, on the latencies of 16 to 74 networks: it left 7 to 37 points
under labels (here none) and 2 to 28 labels on lines (here 0 to 6), in twice the time and with scipy as a dependency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup

from onefold.report.figures import (
    ALARM_COLOUR,
    MARKERS,
    MUTED_COLOUR,
    POINTS_PER_INCH,
    SURFACE_COLOUR,
    LegendEntry,
    ReportFigure,
    legend_entry,
    new_figure,
    series_colour,
    set_x_scale,
    to_svg,
)
from onefold.report.format import format_accuracy, format_count, format_latency, format_percent, one_line
from onefold.report.grouping import MeasurementGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Position = tuple[float, float]

_PRECISIONS = ("fp32", "int8", "bf16", "fp16")  # fixed, so that a precision has one colour on every page
_SIZE = 8.0, 4.9  # inches
_FONT_SIZE = 8.0  # points
_LETTER_WIDTH = 0.57  # of the font size: the usual width of a letter in the page's fonts, rounded up
_MAX_ALL_LABELLED = 14  # points up to which all of them have a label, and not only those on a front

# Where a label may stand: in these directions from its point, in order of preference, at these distances (points).
_ANGLES = (135, 112, 158, 90, 180, 68, 202, 45, 225, 0, 22, 248, 270, 315, 292, 338)  # degrees
_RADII = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 76.0, 94.0)
_MARKER_HALF = 4.5  # half of the side of the square that a marker occupies
_LABEL_GAP = 1.5  # between two labels
_SWEEPS = 3
_MIN_LEADER = 9.0  # a label farther from its point than that is tied to it by a line


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """A subject by latency and accuracy.

    `on_front`: nothing measured is both faster and more accurate; `on_precision_front`: nothing of its precision is.
    `series` numbers its precision.
    """

    group: MeasurementGroup
    label: str
    series: int
    on_front: bool
    on_precision_front: bool

    @property
    def position(self) -> _Position:
        """Milliseconds and percent."""
        return self.group.median_ns / 1e6, self.group.top1 or 0.0

    @property
    def text(self) -> str:
        """The point in words."""
        top1 = format_accuracy(self.group.top1, self.group.num_scored)
        return f"{self.group.label}: {top1}, {format_latency(self.group.median_ns)}"


@dataclass(frozen=True, kw_only=True)
class ParetoFigure:
    """A figure of accuracy against latency, with all its points as a list: those on a front, and the others."""

    drawing: ReportFigure
    front: tuple[ParetoPoint, ...]
    dominated: tuple[ParetoPoint, ...]
    is_open: bool  # whether the list of the dominated is unfolded from the start


def pareto_front(groups: Iterable[MeasurementGroup]) -> list[MeasurementGroup]:
    """Return those that no other beats in both latency and accuracy, the fastest first; none without an accuracy."""
    front: list[MeasurementGroup] = []
    best = -math.inf
    known = [
        (group.median_ns, -group.top1, index, group) for index, group in enumerate(groups) if group.top1 is not None
    ]
    for _, negative_top1, _, group in sorted(known, key=lambda entry: entry[:3]):
        if -negative_top1 > best:
            front.append(group)
            best = -negative_top1
    return front


def pareto_figures(groups: Sequence[MeasurementGroup], key: str) -> list[ParetoFigure]:
    """Return one figure for each number of threads, without what was slowed on purpose; `key` makes its ids unique."""
    known = [group for group in groups if group.top1 is not None and not group.subject.get("planted")]
    by_threads = groupby(sorted(known, key=lambda group: group.threads), key=lambda group: group.threads)
    return [_figure(pareto_points(list(members)), f"{key}-{threads}", threads) for threads, members in by_threads]


def pareto_points(groups: Sequence[MeasurementGroup]) -> list[ParetoPoint]:
    """Return the points, each with the fronts that it is on; labels leave out what all have in common."""
    precisions = [one_line(group.subject.get("precision") or "", 20) for group in groups]
    others = sorted(set(precisions) - set(_PRECISIONS))
    series_of = {name: index for index, name in enumerate((*_PRECISIONS, *others))}
    fronts = [
        id(group)
        for precision in set(precisions)
        for group in pareto_front(g for g, own in zip(groups, precisions, strict=True) if own == precision)
    ]
    best = [id(group) for group in pareto_front(groups)]
    varied = [key for key in ("model", "runtime") if len({str(group.subject.get(key)) for group in groups}) > 1]
    points = []
    for group, precision in zip(groups, precisions, strict=True):
        name = " ".join(one_line(group.subject[key], 24) for key in varied if group.subject.get(key))
        name = name or one_line(group.subject.get("precision") or group.label, 24)
        points.append(
            ParetoPoint(
                group=group,
                label=f"{name} UNFUSED" if group.fused is False else name,
                series=series_of[precision],
                on_front=id(group) in best,
                on_precision_front=id(group) in fronts,
            )
        )
    return points


def _figure(points: Sequence[ParetoPoint], key: str, threads: int) -> ParetoFigure:
    front = sorted((point for point in points if point.on_front), key=lambda point: point.position)
    best = "; ".join(
        f"{point.group.title} with {format_percent(point.group.top1)} at {format_latency(point.group.median_ns)}"
        for point in front
    )
    title = f"Accuracy against latency, {format_count(threads, 'thread')}"
    names = {p.series: one_line(p.group.subject.get("precision") or "precision not stated", 20) for p in points}
    legend = [legend_entry(series, names[series]) for series in sorted(names)]
    if any(point.group.fused is False for point in points):
        legend.append(LegendEntry("○", "alarm-mark", "UNFUSED"))
    drawing = ReportFigure(
        title=title,
        svg=_draw(points, key, title, f"On the front: {best}."),
        caption="Filled points are on the Pareto front of their precision, joined by the line of its colour: nothing "
        "measured in that precision is both faster and more accurate. Ringed points, bold below, are on the front of "
        "all precisions.",
        legend=tuple(legend),
    )
    return ParetoFigure(
        drawing=drawing,
        front=tuple(point for point in points if point.on_precision_front),
        dominated=tuple(point for point in points if not point.on_precision_front),
        is_open=len(points) <= _MAX_ALL_LABELLED,
    )


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _draw(points: Sequence[ParetoPoint], key: str, title: str, description: str) -> Markup:
    all_series = sorted({point.series for point in points})
    lines = [_staircase([p for p in points if p.series == series and p.on_precision_front]) for series in all_series]
    with new_figure(_SIZE[1], _SIZE[0]) as (figure, axes):
        _set_limits(axes, points)
        axes.set(xlabel="median latency, milliseconds (left is better)", ylabel="top-1 accuracy, % (up is better)")
        for series, line in zip(all_series, lines, strict=True):
            if len(line) > 1:
                axes.plot(*zip(*line, strict=True), color=series_colour(series), lw=1.3, alpha=0.5, zorder=1)
        for point in sorted(points, key=lambda p: (p.on_precision_front, p.on_front)):
            colour, marker = _colour(point), MARKERS[point.series % len(MARKERS)]
            if point.on_front:
                axes.plot(*point.position, marker, ms=10.5, mfc="none", mec=colour, mew=0.9, zorder=4)
            size, fill = (6, colour) if point.on_precision_front else (4.4, SURFACE_COLOUR)
            axes.plot(*point.position, marker, ms=size, mfc=fill, mec=colour, mew=1.1, zorder=3)
        figure.draw_without_rendering()  # the layout decides where the axes lie: labels are placed after it
        _draw_labels(figure, axes, points, lines)
        return to_svg(figure, key, title, description)


def _set_limits(axes: Axes, points: Sequence[ParetoPoint]) -> None:
    """Leave room for labels: above, and to the left of the fastest."""
    latencies, accuracies = zip(*(point.position for point in points), strict=True)
    gap = max(1.16, (max(latencies) / min(latencies)) ** 0.1)
    set_x_scale(axes, min(latencies) / gap**1.3, max(latencies) * gap)
    room = max(0.5, 0.1 * (max(accuracies) - min(accuracies)))
    low, high = min(accuracies) - room, max(accuracies) + 1.6 * room
    axes.set_ylim(low, high)
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(high, 100.0)])  # no tick above 100 %


def _staircase(points: Sequence[ParetoPoint]) -> list[_Position]:
    """Return a front as steps: the accuracy that can be had at each latency."""
    front = sorted(point.position for point in points)
    return [*front[:1], *(corner for (_, low), (x, high) in pairwise(front) for corner in ((x, low), (x, high)))]


def _draw_labels(
    figure: Figure, axes: Axes, points: Sequence[ParetoPoint], lines: Sequence[Sequence[_Position]]
) -> None:
    """Label the points on the fronts, and all points where they are few."""
    per_point = figure.dpi / POINTS_PER_INCH

    def to_page(position: _Position) -> _Position:
        x, y = axes.transData.transform(position)
        return float(x) / per_point, float(y) / per_point

    def to_data(position: _Position) -> _Position:
        x, y = axes.transData.inverted().transform((position[0] * per_point, position[1] * per_point))
        return float(x), float(y)

    labelled = [point for point in points if point.on_precision_front or len(points) <= _MAX_ALL_LABELLED]
    labelled.sort(key=lambda point: (not point.on_front, not point.on_precision_front, point.position))
    labels = [
        Label(to_page(point.position), _LETTER_WIDTH * _FONT_SIZE * len(point.label), 1.15 * _FONT_SIZE)
        for point in labelled
    ]
    area = Box(*(float(value) / per_point for value in axes.get_window_extent().extents))
    page_lines = [[to_page(position) for position in line] for line in lines]
    boxes = place_labels(labels, [to_page(point.position) for point in points], page_lines, area)
    for point, label, box in zip(labelled, labels, boxes, strict=True):
        if box is None:  # no room: the point stands in the list below the figure
            continue
        # Anchored at the side that faces the point, since letters are seldom exactly as wide as was assumed.
        x, side = (box.left + box.right) / 2, "center"
        if box.right <= label.position[0]:
            x, side = box.right, "right"
        elif box.left >= label.position[0]:
            x, side = box.left, "left"
        at = to_data((x, (box.bottom + box.top) / 2))
        axes.text(*at, point.label, va="center", ha=side, color=_colour(point), fontsize=_FONT_SIZE)
        if line := leader_line(label, box):
            axes.plot(*zip(*map(to_data, line), strict=True), color=MUTED_COLOUR, lw=0.5, zorder=2)


def _colour(point: ParetoPoint) -> str:
    return ALARM_COLOUR if point.group.fused is False else series_colour(point.series)


# ---- placement of labels; all lengths are in points (1/72 inch) ------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box, gap: float = 0.0) -> bool:
        """Whether the two have a place in common, or lie closer than `gap`."""
        across = self.left < other.right + gap and other.left < self.right + gap
        return across and self.bottom < other.top + gap and other.bottom < self.top + gap

    def is_inside(self, other: Box) -> bool:
        """Whether it lies in the other."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top

    def nearest(self, position: _Position) -> _Position:
        """Return the place in it that is nearest to a position."""
        return min(max(position[0], self.left), self.right), min(max(position[1], self.bottom), self.top)

    def is_crossed_by(self, start: _Position, end: _Position) -> bool:
        """Whether the segment passes through it (Liang and Barsky, 1984)."""
        enter, leave = 0.0, 1.0
        sides = ((start[0], end[0], self.left, self.right), (start[1], end[1], self.bottom, self.top))
        for first, last, low, high in sides:
            if first == last:
                if not low < first < high:
                    return False
                continue
            near, far = sorted(((low - first) / (last - first), (high - first) / (last - first)))
            enter, leave = max(enter, near), min(leave, far)
        return enter < leave


@dataclass(frozen=True)
class Label:
    """A text of this width and height that belongs to a position."""

    position: _Position
    width: float
    height: float

    def box(self, radius: float, degrees: float) -> Box:
        """Return its box in a direction: the side or corner that faces the position is `radius` away from it."""
        across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        x, y = self.position[0] + radius * across, self.position[1] + radius * up
        left = x - self.width if across < -0.3 else x if across > 0.3 else x - self.width / 2
        bottom = y - self.height if up < -0.3 else y if up > 0.3 else y - self.height / 2
        return Box(left, bottom, left + self.width, bottom + self.height)


def place_labels(
    labels: Sequence[Label], points: Sequence[_Position], lines: Sequence[Sequence[_Position]], area: Box
) -> list[Box | None]:
    """Return a box for each label, or None where there is no room: none over another, over a point or outside `area`.

    Greedy, then improved: each label in turn is placed anew among all the others, a few times.
    """
    segments = [segment for line in lines for segment in pairwise(line)]
    markers = [Box(x - _MARKER_HALF, y - _MARKER_HALF, x + _MARKER_HALF, y + _MARKER_HALF) for x, y in points]
    chosen: list[Box | None] = [None] * len(labels)
    for _ in range(_SWEEPS):
        for index, label in enumerate(labels):
            others = [(labels[at], box) for at, box in enumerate(chosen) if box is not None and at != index]
            leaders = [(other.position, box.nearest(other.position)) for other, box in others]
            chosen[index] = _best_box(label, markers, [box for _, box in others], [*segments, *leaders], area)
    return chosen


def leader_line(label: Label, box: Box) -> tuple[_Position, _Position] | None:
    """Return the line from a point to its label, where that stands too far off to be understood without."""
    end = box.nearest(label.position)
    distance = math.dist(end, label.position)
    if distance < _MIN_LEADER:
        return None
    share = _MARKER_HALF / distance
    (x, y), (x_end, y_end) = label.position, end
    return (x + share * (x_end - x), y + share * (y_end - y)), end


def _best_box(
    label: Label,
    markers: Sequence[Box],
    others: Sequence[Box],
    segments: Sequence[tuple[_Position, _Position]],
    area: Box,
) -> Box | None:
    """Return the cheapest box that is free: near, above to the left, off the lines, nearest to its own point."""
    best, least = None, math.inf
    for radius in _RADII:
        for preference, degrees in enumerate(_ANGLES):
            box = label.box(radius, degrees)
            cost = radius + 0.8 * preference
            if cost >= least or not box.is_inside(area):
                continue
            if any(map(box.overlaps, markers)) or any(box.overlaps(other, _LABEL_GAP) for other in others):
                continue
            end = box.nearest(label.position)
            own_distance = math.dist(label.position, end) + 3.0
            cost += 8.0 * sum(box.is_crossed_by(*segment) for segment in segments)
            cost += 15.0 * sum(other.is_crossed_by(label.position, end) for other in others)
            for marker in markers:  # its own costs nothing, but is among them: 6 + 12 too much for every box alike
                center = (marker.left + marker.right) / 2, (marker.bottom + marker.top) / 2
                cost += 6.0 * marker.is_crossed_by(label.position, end)
                cost += 12.0 * (math.dist(center, box.nearest(center)) < own_distance)  # could be taken to belong there
            if cost < least:
                best, least = box, cost
    return best
