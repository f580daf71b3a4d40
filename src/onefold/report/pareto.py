"""Accuracy against latency: every model, runtime and precision in one figure, and what nothing else beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from onefold.report.aggregate import Group, pareto_front
from onefold.report.canvas import ALARM, MUTED, POINTS, SURFACE, Words, canvas, finished, scale, series
from onefold.report.figures import MARKERS, swatch
from onefold.report.format import latency, many, percent
from onefold.report.html import Markup, classed, element, joined, plain
from onefold.report.placing import Box, Spot, Tag, leader, placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PRECISIONS = ("fp32", "int8", "bf16", "fp16")
_SIZE = 8.0, 4.9  # inches
_FONT = 8.0  # points
_LETTER = 0.57  # of the font's size, a letter's usual width in the page's fonts, rounded up
_FEW = 14  # points, up to which all of them have a label


@dataclass(frozen=True, kw_only=True)
class Point:
    """One subject by latency and accuracy. `leads`: nothing beats it; `leads_kind`: nothing of its precision does."""

    group: Group
    label: str
    kind: int
    leads: bool
    leads_kind: bool

    @property
    def spot(self) -> Spot:
        """Milliseconds and percent."""
        return self.group.median_ns / 1e6, self.group.top1 or 0.0


def tradeoffs(groups: Sequence[Group], place: int) -> list[Markup]:
    """One figure for each number of threads, without what was slowed on purpose; `place` numbers the machine."""
    known = [group for group in groups if group.top1 is not None and not group.subject.get("planted")]
    by_threads = groupby(sorted(known, key=lambda group: group.threads), key=lambda group: group.threads)
    return [_figure(list(members), f"pareto-{place}-{threads}", threads) for threads, members in by_threads]


def unknown(groups: Sequence[Group]) -> Markup:
    """What has no accuracy to be drawn by."""
    names = list(dict.fromkeys(group.title for group in groups if group.top1 is None))
    if not names:
        return Markup("")
    count = "Nothing" if all(group.top1 is None for group in groups) else "Not everything"
    said = f"{count} measured has a known accuracy; not drawn against it: {', '.join(names)}."
    return classed("p", "note", said)


def points_of(groups: Sequence[Group]) -> list[Point]:
    """The points, each with the fronts that it is on; labels leave out what all have in common."""
    kinds = [plain(group.subject.get("precision") or "", 20) for group in groups]
    order = sorted(dict.fromkeys(kinds), key=lambda kind: (_PRECISIONS.index(kind) if kind in _PRECISIONS else 9, kind))
    by_kind = ([group for group, kind in zip(groups, kinds, strict=True) if kind == each] for each in order)
    fronts = [group for members in by_kind for group in pareto_front(members)]
    best = pareto_front(groups)
    shared = [key for key in ("model", "runtime") if len({str(group.subject.get(key)) for group in groups}) == 1]
    return [
        Point(
            group=group,
            label=_label(group, shared),
            kind=_PRECISIONS.index(kind) if kind in _PRECISIONS else len(_PRECISIONS) + order.index(kind),
            leads=any(group is each for each in best),
            leads_kind=any(group is each for each in fronts),
        )
        for group, kind in zip(groups, kinds, strict=True)
    ]


def _label(group: Group, shared: Sequence[str]) -> str:
    known = [
        plain(group.subject[key], 24) for key in ("model", "runtime") if key not in shared and group.subject.get(key)
    ]
    named = " ".join(known) or plain(group.subject.get("precision") or group.label, 24)
    return f"{named} UNFUSED" if group.fused is False else named


def _figure(groups: Sequence[Group], key: str, threads: int) -> Markup:
    points = points_of(groups)
    front = sorted((point for point in points if point.leads), key=lambda point: point.spot)
    best = "; ".join(f"{point.group.title} with {percent(point.group.top1)} at {_time(point)}" for point in front)
    words = Words(key, f"Accuracy against latency, {many(threads, 'thread')}", f"On the front: {best}.")
    svg = classed("div", "across", _drawn(words, points))
    note = (
        "A filled point is on the front of its precision, which the line of its colour joins: nothing measured in that "
        "precision is both quicker and more accurate. Those that nothing at all beats are ringed, and bold below."
    )
    parts = [element("h3", words.title), _legend(points), svg, element("figcaption", note), _listed(points)]
    return classed("figure", "wide", *parts)


def _legend(points: Sequence[Point]) -> Markup:
    kinds = {point.kind: plain(point.group.subject.get("precision") or "precision not stated", 20) for point in points}
    entries = [swatch(kind, kinds[kind]) for kind in sorted(kinds)]
    if any(point.group.fused is False for point in points):
        entries.append(classed("span", "swatch alarm-mark", element("i", "○"), " UNFUSED"))
    return classed("div", "legend", *entries)


def _listed(points: Sequence[Point]) -> Markup:
    """All of them in words, those that lead first; the rest folded away where they are many."""
    leading = [_entry(point) for point in points if point.leads_kind]
    others = [_entry(point) for point in points if not point.leads_kind]
    first = classed("ol", "points", *leading)
    if not others:
        return first
    rest = classed("ol", "points", *others)
    summary = element("summary", f"{many(len(others), 'point')} behind the fronts")
    open_too = {"open": ""} if len(points) <= _FEW else {}
    return joined(first, element("details", summary, rest, attributes=open_too))


def _entry(point: Point) -> Markup:
    group = point.group
    told = f"{group.label}: {percent(group.top1)}, {_time(point)}"
    said = element("strong", told) if point.leads else told
    alarm = Markup(' <span class="tag alarm">UNFUSED</span>') if group.fused is False else None
    return element("li", swatch(point.kind, ""), said, alarm)


def _time(point: Point) -> str:
    return latency(point.group.median_ns)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _drawn(words: Words, points: Sequence[Point]) -> Markup:
    with canvas(_SIZE[1], _SIZE[0]) as (figure, axes):
        _limit_(axes, points)
        axes.set_xlabel("median latency, milliseconds (left is better)")
        axes.set_ylabel("top-1 accuracy, % (up is better)")
        lines = [_steps(points, kind) for kind in sorted({point.kind for point in points})]
        for kind, line in zip(sorted({point.kind for point in points}), lines, strict=True):
            if len(line) > 1:
                axes.plot(*zip(*line, strict=True), color=series(kind), lw=1.3, alpha=0.5, zorder=1)
        for point in sorted(points, key=lambda each: (each.leads_kind, each.leads)):
            _mark(axes, point)
        figure.draw_without_rendering()  # settles where the axes lie
        _name(figure, axes, points, lines)
        return finished(figure, words)


def _limit_(axes: Axes, points: Sequence[Point]) -> None:
    """Axes with room for labels: above, and to the left of the quickest."""
    latencies, accuracies = zip(*(point.spot for point in points), strict=True)
    gap = max(1.16, (max(latencies) / min(latencies)) ** 0.1)
    scale(axes, min(latencies) / gap**1.3, max(latencies) * gap)
    room = max(0.5, 0.1 * (max(accuracies) - min(accuracies)))
    low, high = min(accuracies) - room, max(accuracies) + 1.6 * room
    axes.set_ylim(low, high)
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(high, 100.0)])  # no scale beyond all


def _steps(points: Sequence[Point], kind: int) -> list[Spot]:
    """The front of one precision as a staircase: what can be had at each latency."""
    front = sorted(point.spot for point in points if point.kind == kind and point.leads_kind)
    corners = [corner for (_, low), (x, high) in pairwise(front) for corner in ((x, low), (x, high))]
    return [*front[:1], *corners]


def _mark(axes: Axes, point: Point) -> None:
    colour = ALARM if point.group.fused is False else series(point.kind)
    marker = MARKERS[point.kind % len(MARKERS)]
    if point.leads:
        axes.plot(*point.spot, marker, ms=10.5, mfc="none", mec=colour, mew=0.9, zorder=4)
    filled = colour if point.leads_kind else SURFACE
    axes.plot(*point.spot, marker, ms=6 if point.leads_kind else 4.4, mfc=filled, mec=colour, mew=1.1, zorder=3)


def _name(figure: Figure, axes: Axes, points: Sequence[Point], lines: Sequence[Sequence[Spot]]) -> None:
    """Labels of the points on the fronts, and of all where they are few."""
    per_point = POINTS / figure.dpi

    def to_page(spot: Spot) -> Spot:
        x, y = axes.transData.transform(spot)
        return float(x) * per_point, float(y) * per_point

    labelled = [point for point in points if point.leads_kind or len(points) <= _FEW]
    labelled.sort(key=lambda point: (not point.leads, not point.leads_kind, point.spot))
    tags = [Tag(to_page(point.spot), _LETTER * _FONT * len(point.label), 1.15 * _FONT) for point in labelled]
    corners = [value * per_point for value in axes.get_window_extent().extents]
    boxes = placed(
        tags, [to_page(point.spot) for point in points], [[*map(to_page, line)] for line in lines], Box(*corners)
    )
    back = axes.transData.inverted()
    for point, tag, box in zip(labelled, tags, boxes, strict=True):
        if box is None:
            continue  # it stands in the list below
        colour = ALARM if point.group.fused is False else series(point.kind)
        side, anchor = _anchor(tag, box)
        x, y = back.transform((anchor[0] / per_point, anchor[1] / per_point))
        written = axes.text(x, y, point.label, va="center")
        written.set(color=colour, fontsize=_FONT, ha=side)
        if line := leader(tag, box):
            start, end = (back.transform((a / per_point, b / per_point)) for a, b in line)
            axes.plot([start[0], end[0]], [start[1], end[1]], color=MUTED, lw=0.5, zorder=2)


def _anchor(tag: Tag, box: Box) -> tuple[str, Spot]:
    """By which end a label is held: the one that faces its point, since letters are seldom as wide as was thought."""
    middle = (box.bottom + box.top) / 2
    if box.right <= tag.spot[0]:
        return "right", (box.right, middle)
    if box.left >= tag.spot[0]:
        return "left", (box.left, middle)
    return "center", ((box.left + box.right) / 2, middle)
