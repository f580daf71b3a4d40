"""The figures of studies: dot plots, lines and scatters, drawn as the report's other figures are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from onefold.report.figures import (
    MARKERS,
    MUTED_COLOUR,
    ReportFigure,
    legend_entry,
    new_figure,
    series_colour,
    set_x_scale,
    set_y_scale,
    to_svg,
)
from onefold.report.format import format_count, one_line, printable
from onefold.report.study_results import FigurePoint, StudyFigure, StudyResult
from onefold.report.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_LABELLED = 40  # points of a scatter that are named
_COLOURS = {  # of a figure outside of the page
    **{"ink": "#1b2027", "muted": "#5b6572", "grid": "#dfe3e8", "surface": "#ffffff", "alarm": "#c02a3d"},
    **{"series-0": "#2563c9", "series-1": "#bf5408", "series-2": "#18794e", "series-3": "#8e3fb8"},
    **{"series-4": "#b3307e", "series-5": "#0b7285", "series-6": "#7a5a1e", "series-7": "#66717e"},
}


def study_section(study: StudyResult, index: int) -> dict[str, Any]:
    """The part of the page about one study: its tables and figures as those of the page, and its sentences."""
    return {
        "study": study,
        "tables": [
            Table(each.caption, [Column(title, place > 0) for place, title in enumerate(each.columns)], each.rows)
            for each in study.tables
        ],
        "figures": [
            draw_study_figure(f"study-{index}-{number}", figure) for number, figure in enumerate(study.figures)
        ],
    }


def draw_study_figure(key: str, figure: StudyFigure) -> ReportFigure:
    """Draw one figure; a series without points keeps its colour free. Raises MissingExtra without matplotlib."""
    drawn = [(index, series) for index, series in enumerate(figure.series) if series.points]
    if not drawn:
        return ReportFigure(title=figure.title, svg=None, caption="Nothing was measured for this figure yet.")
    bars = any(point.low is not None for _, series in drawn for point in series.points)
    caption = f"{figure.y_label[:1].upper()}{figure.y_label[1:]}{f', over {figure.x_label}' if figure.x_label else ''}."
    caption += " Bars are 95 % intervals." if bars else ""
    labels = list(dict.fromkeys(point.label for _, series in drawn for point in series.points))
    height = 0.9 + 0.3 * len(labels) if figure.kind == "dots" else 3.2
    draw: dict[str, Callable[[Axes, StudyFigure], None]] = {"dots": _dots, "lines": _lines, "scatter": _scatter}
    counts = "; ".join(f"{series.label}: {format_count(len(series.points), 'point')}" for _, series in drawn)
    with new_figure(height) as (canvas, axes):
        draw[figure.kind](axes, figure)
        svg = to_svg(canvas, key, figure.title, f"{caption} {counts}.")
    legend = tuple(legend_entry(index, printable(series.label)) for index, series in drawn)
    return ReportFigure(title=figure.title, svg=svg, caption=caption, legend=legend)


def standalone_svg(figure: ReportFigure) -> str | None:
    """The figure as an SVG file of its own, with colours in it and the legend below; None where nothing is drawn."""
    if figure.svg is None:
        return None
    start = str(figure.svg).partition(">")
    _, _, rest = start[0].partition('viewBox="0 0 ')
    width, height = (float(word) for word in rest.partition('"')[0].split())
    lines = [
        f'<text x="8" y="{height + 14 * (number + 1):g}" font-size="9" fill="var(--{entry.style})">'
        f"{Markup.escape(f'{entry.symbol} {entry.text}')}</text>"
        for number, entry in enumerate(figure.legend)
    ]
    total = height + 14 * len(lines) + 8
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {total:g}" width="{1.5 * width:g}" height="{1.5 * total:g}" '
        f'font-family="system-ui, sans-serif"><rect width="100%" height="100%" fill="#ffffff"/>'
        f'<svg width="{width:g}" height="{height:g}">{start[2].removesuffix("</svg>")}</svg>{"".join(lines)}</svg>\n'
    )
    return re.sub(r"var\(--([a-z0-9-]+)\)", lambda match: _COLOURS[match[1]], text)


def _dots(axes: Axes, figure: StudyFigure) -> None:
    """A row for each label, in the order in which they come; a marker of each series in it."""
    labels = list(dict.fromkeys(point.label for series in figure.series for point in series.points))
    rows = {label: len(labels) - 1 - number for number, label in enumerate(labels)}
    count = len(figure.series)
    for index, series in enumerate(figure.series):
        shift = 0.18 * ((count - 1) / 2 - index) if count > 1 else 0.0
        for point in series.points:
            y, colour = rows[point.label] + shift, series_colour(index)
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [y, y], lw=1.8, color=colour)
            axes.plot(point.y, y, MARKERS[index % len(MARKERS)], ms=4.5, color=colour)
    values = _bounds([point for series in figure.series for point in series.points])
    if values[0] > 0:
        set_x_scale(axes, values[0] / 1.1, values[1] * 1.1)
    if values[0] <= 1 <= values[1]:
        axes.axvline(1, color=MUTED_COLOUR, lw=0.8)
    axes.set(xlabel=figure.y_label, ylim=(-0.6, len(labels) - 0.4))
    axes.set_yticks(list(rows.values()), [one_line(label, 30) for label in rows])


def _lines(axes: Axes, figure: StudyFigure) -> None:
    for index, series in enumerate(figure.series):
        known = sorted((point for point in series.points if point.x is not None), key=lambda point: point.x or 0.0)
        colour, x = series_colour(index), [point.x or 0.0 for point in known]
        axes.plot(x, [p.y for p in known], color=colour, marker=MARKERS[index % len(MARKERS)], ms=4, lw=1.5)
        for point in known:
            if point.low is not None and point.high is not None:
                axes.plot([point.x or 0.0] * 2, [point.low, point.high], color=colour, lw=1.2)
    _set_scales(axes, figure)


def _scatter(axes: Axes, figure: StudyFigure) -> None:
    for index, series in enumerate(figure.series):
        for point in series.points:
            if point.x is not None:
                axes.plot(point.x, point.y, MARKERS[index % len(MARKERS)], color=series_colour(index), ms=4.5)
    named = [point for series in figure.series[:1] for point in series.points if point.x is not None and point.label]
    for point in named if len(named) <= _MAX_LABELLED else ():
        place = (point.x or 0.0, point.y)
        axes.annotate(
            one_line(point.label, 24), place, (3, 3), textcoords="offset points", fontsize=5.5, color=MUTED_COLOUR
        )
    _set_scales(axes, figure)


def _set_scales(axes: Axes, figure: StudyFigure) -> None:
    points = [point for series in figure.series for point in series.points]
    across = [point.x for point in points if point.x is not None]
    low, high = _bounds(points)
    if across and min(across) > 0:
        set_x_scale(axes, min(across) / 1.08, max(across) * 1.08)
    if low > 0:
        set_y_scale(axes, low / 1.1, high * 1.1)
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)


def _bounds(points: Sequence[FigurePoint]) -> tuple[float, float]:
    """The least and the largest y, intervals included."""
    values = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    return min(values), max(values)
