"""The part of the page about a run's answers: confusions, classes, calibration, and the worst mistakes as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onefold.report.canvas import GRID, INK, MUTED, Words, canvas, finished, series
from onefold.report.format import many, percent
from onefold.report.html import Column, Markup, bullets, classed, element, joined, plain, table
from onefold.report.load import Run
from onefold.report.predictions import BINS, Mistake, Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_RUNS = 4
_MATRIX = 20  # classes up to which the whole matrix is drawn
_NUMBERED = 12  # and up to which its cells have numbers
_ROWS = 30  # classes in a table


def answers(runs: Sequence[Run]) -> Markup:
    """What each run that kept its answers got wrong."""
    known = [(run, run.predictions) for run in runs if run.predictions is not None]
    parts = [_of_run(run.name, found, f"run{number}") for number, (run, found) in enumerate(known[:_MOST_RUNS])]
    if len(known) > _MOST_RUNS:
        parts.append(element("p", f"Shown are the first {_MOST_RUNS} of {many(len(known), 'run')} with kept answers."))
    return joined(*parts)


def looked_at(runs: Sequence[Run]) -> Markup:
    """What the first look at the data of each run found."""
    told = [f"{run.name}: {sentence}" for run in runs for sentence in run.findings]
    if not told:
        return Markup("")
    return classed("div", "callout", element("p", "The first look at the data found:"), bullets(told))


def _of_run(name: str, found: Predictions, key: str) -> Markup:
    top5 = f", top-5 {percent(found.top5)}" if found.top5 is not None and len(found.classes) > 5 else ""
    ece = f", calibration error {percent(found.ece)}" if found.ece is not None else ""
    said = f"{found.data}: top-1 {percent(found.top1)}{top5}{ece}, on {many(found.count, 'image')}."
    figures = [_calibration(found, key)]
    if len(found.classes) <= _MATRIX:
        figures.insert(0, _matrix(found, key))
    return joined(
        element("h3", f"What {name} answers"),
        element("p", said),
        classed("div", "figures", *figures),
        _confusions(found),
        _per_class(found),
        _gallery(found),
    )


# ------------------------------------------------------------------------------------------------ figures


def _matrix(found: Predictions, key: str) -> Markup:
    told = "A row is a class, a column an answer; its images in percent."
    for a, b, times in _most_confused(found)[:1]:
        told += f" Most often, {found.name(a)} is taken for {found.name(b)}: {many(times, 'image')}."
    words, count = Words(f"{key}-confusion", "Who is taken for whom", told), len(found.classes)
    with canvas(1.0 + 3.4 * min(1.0, 0.45 + count / 20)) as (figure, axes):
        axes.grid(False)
        _cells(axes, found)
        for line in range(count + 1):
            axes.plot([0, count], [line, line], color=GRID, lw=0.5)
            axes.plot([line, line], [0, count], color=GRID, lw=0.5)
        axes.set(xlim=(0, count), ylim=(count, 0), xlabel="answer", ylabel="class", aspect="equal")
        names = [plain(name, 14) for name in found.classes]
        middles = [place + 0.5 for place in range(count)]
        axes.set_xticks(middles, names)
        axes.set_yticks(middles, names)
        if max(map(len, names)) * count > 44:
            for name in axes.get_xticklabels():
                name.set(rotation=60, ha="right", rotation_mode="anchor")
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        return _framed(words, finished(figure, words))


def _cells(axes: Axes, found: Predictions) -> None:
    """A square for each pair, the fuller the more of the class's images are in it; a number where there is room."""
    labels, count = found.labels, len(found.classes)
    for (label, answer), number in sorted(found.pairs.items()):
        if answer < 0:
            continue
        share, colour = number / labels[label], series(0 if label == answer else 1)
        across, down = [answer, answer + 1, answer + 1, answer], [label, label, label + 1, label + 1]
        axes.fill(across, down, color=colour, alpha=0.12 + 0.68 * share, lw=0)
        if count <= _NUMBERED:
            text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            axes.text(answer + 0.5, label + 0.5, text, ha="center", va="center", fontsize=7.5).set_color(INK)


def _calibration(found: Predictions, key: str) -> Markup:
    filled = [(place, held) for place, held in enumerate(found.bins) if held[0]]
    mean = 100 * sum(share for _, (_, _, share) in filled) / max(1, sum(number for _, (number, _, _) in filled))
    side = "surer than it is right" if mean > found.top1 else "less sure than it is right"
    words = Words(
        f"{key}-calibration",
        "How far its confidence can be believed",
        f"Answers in {BINS} bins by confidence; on the dashed line confidence is accuracy. The network is {side}: its "
        f"mean confidence is {percent(mean)}. Below the axis, how many answers have that confidence.",
    )
    most, width = max((number for _, (number, _, _) in filled), default=1), 100 / BINS
    with canvas(3.2) as (figure, axes):
        axes.plot([0, 100], [0, 100], color=MUTED, lw=1.2, ls=(0, (4, 2)))
        for place, (number, right, share) in filled:
            middle, half = (place + 0.5) * width, 0.43 * width
            axes.bar(middle, 100 * right / number, 2 * half, color=series(0), alpha=0.75, lw=0)
            axes.plot([middle - half, middle + half], [100 * share / number] * 2, color=series(1), lw=2)
            axes.bar(middle, -14 * number / most, 2 * half, bottom=-3, color=MUTED, alpha=0.6, lw=0)
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set(xlim=(0, 100), ylim=(-18, 102), xlabel="confidence, %", ylabel="right answers, %")
        axes.set_yticks([0, 20, 40, 60, 80, 100])
        rights = classed("span", "swatch series-0", element("i", "■"), " right answers")
        means = classed("span", "swatch series-1", element("i", "▬"), " mean confidence")
        return _framed(words, finished(figure, words), classed("div", "legend", rights, means))


def _framed(words: Words, drawn: Markup, legend: Markup | None = None) -> Markup:
    return element("figure", element("h3", words.title), legend, drawn, element("figcaption", words.description))


# ------------------------------------------------------------------------------------- tables and pictures


def _most_confused(found: Predictions) -> list[tuple[int, int, int]]:
    wrong = [(a, b, count) for (a, b), count in found.pairs.items() if a != b]
    return sorted(wrong, key=lambda each: (-each[2], each[0], each[1]))


def _confusions(found: Predictions) -> Markup:
    wrong, labels = _most_confused(found), found.labels
    if not wrong:
        return element("p", "Every image was answered rightly.")
    columns = [Column("class"), Column("taken for"), Column("times", True), Column("of the class's images", True)]
    rows = [[found.name(a), found.name(b), str(n), percent(100 * n / labels[a])] for a, b, n in wrong[:10]]
    of = f" Ten of {len(wrong)}." if len(wrong) > 10 else ""
    return table(f"The most frequent confusions.{of}", columns, rows)


def _per_class(found: Predictions) -> Markup:
    labels = found.labels
    rates = sorted((100 * found.pairs.get((c, c), 0) / count, c) for c, count in labels.items())
    rows = []
    for rate, c in rates[:_ROWS]:
        other = found.taken_for(c)[:1]
        taken = f"{found.name(other[0][0])} ({other[0][1]})" if other else "–"
        rows.append([found.name(c), str(labels[c]), percent(rate), taken])
    columns = [Column("class"), Column("images", True), Column("right", True), Column("most often taken for")]
    of = f" The worst {_ROWS} of {len(rates)} classes." if len(rates) > _ROWS else ""
    return table(f"Accuracy of each class, the worst first.{of}", columns, rows)


def _gallery(found: Predictions) -> Markup:
    if not found.mistakes:
        return Markup("")
    worst = sorted(found.mistakes, key=lambda each: each.own)
    shown = [_mistake(found, each) for each in worst]
    title = element("h4", "The worst mistakes: a wrong label, or something to learn")
    return joined(title, classed("div", "gallery", *shown))


def _mistake(found: Predictions, each: Mistake) -> Markup:
    told = f"{found.name(each.label)}, taken for {found.name(each.answer)}"
    source = f"data:image/jpeg;base64,{each.jpeg}"
    picture = element("img", attributes={"src": source, "alt": told, "loading": "lazy"})
    answer = f"said {found.name(each.answer)}, {percent(100 * each.confidence, 0)}"
    label = f"is {found.name(each.label)}, {percent(100 * each.own, 0)}"
    lines = (classed("span", "wrong", answer), classed("span", "label", label), classed("span", "file", each.name))
    return classed("figure", "mistake", picture, element("figcaption", *lines))
