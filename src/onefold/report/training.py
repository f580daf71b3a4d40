"""The part of the page about training: curves, and what was reached against what was expected."""

from __future__ import annotations

from collections.abc import Sequence

from onefold.report import figures
from onefold.report.canvas import SERIES, Words
from onefold.report.figures import Line
from onefold.report.format import digits, many, percent
from onefold.report.html import Column, Markup, bullets, classed, element, joined, table
from onefold.report.load import Run

_MOST_CURVES = SERIES


def training(runs: Sequence[Run]) -> Markup:
    """Sentences, two figures and a table."""
    drawn = list(runs[:_MOST_CURVES])
    parts: list[str] = [bullets([verdict(run) for run in runs])]
    if len(runs) > _MOST_CURVES:
        parts.append(element("p", f"The figures show the first {_MOST_CURVES} of {many(len(runs), 'run')}."))
    accuracy = [Line(run.name, run.curve("top1"), run.expected_top1) for run in drawn]
    figure = _figure(Words("top1", "Top-1 accuracy", _ends(accuracy, " %")), accuracy, "top-1 accuracy, %")
    losses = _losses(drawn)
    parts.append(
        classed("div", "figures", figure, _figure(Words("loss", "Loss", _ends(losses, "")), losses, "loss, nats"))
    )
    parts.append(_table(runs))
    return joined(*parts)


def verdict(run: Run) -> str:
    """What the run reached, in a sentence."""
    if run.best is None:
        return f"{run.name} has no accuracy in its log."
    epoch, top1 = run.best
    reached = f"{run.name} reached {percent(top1)} top-1, in epoch {epoch:g} of {len(run.epochs)}"
    if run.expected_top1 is None:
        return f"{reached}. Nothing was stated that it should reach."
    gap = top1 - run.expected_top1
    far = "exactly" if abs(gap) < 0.05 else f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
    source = f" ({run.expected_source})" if run.expected_source else ""
    return f"{reached}: {far} the {percent(run.expected_top1)} that was expected{source}."


def _losses(runs: Sequence[Run]) -> list[Line]:
    if len(runs) > 1:
        return [Line(run.name, run.curve("loss")) for run in runs]
    keys = (("loss", "in training"), ("val_loss", "in evaluation"))
    return [Line(says, run.curve(key)) for run in runs for key, says in keys]


def _figure(words: Words, lines: Sequence[Line], unit: str) -> Markup:
    known = [(index, line) for index, line in enumerate(lines) if line.points]
    heading = element("h3", words.title)
    if not known:
        return element("figure", heading, classed("p", "note", "The logs hold no numbers for this figure."))
    entries = [figures.swatch(index, line.label) for index, line in known]
    if any(line.expected is not None for _, line in known):
        entries.append(classed("span", "swatch", element("i", "┄┄"), " expected, in the same colour"))
    legend = classed("div", "legend", *entries)
    return element(
        "figure", heading, legend, figures.curves(words, lines, unit), element("figcaption", words.description)
    )


def _ends(lines: Sequence[Line], unit: str) -> str:
    """Where each curve starts and ends, in words."""
    told = [
        f"{line.label}: {digits(line.points[0][1])}{unit} after epoch {line.points[0][0]:g}, "
        f"{digits(line.points[-1][1])}{unit} after epoch {line.points[-1][0]:g}"
        for line in lines
        if line.points
    ]
    return f"{'; '.join(told)}." if told else "No numbers."


def _table(runs: Sequence[Run]) -> Markup:
    columns = [
        Column("run"),
        Column("epochs", True),
        Column("best top-1", True),
        Column("expected", True),
        Column("last top-1", True),
        Column("last top-5", True),
        Column("last training loss", True),
        Column("images/s", True),
    ]
    rows = []
    for run in runs:
        best, speed, loss = run.best, run.last("images_per_s"), run.last("loss")
        cells = [run.name, str(len(run.epochs)), percent(best[1] if best else None), percent(run.expected_top1)]
        cells += [percent(run.last("top1")), percent(run.last("top5"))]
        cells += ["–" if loss is None else digits(loss), "–" if speed is None else digits(speed)]
        rows.append(cells)
    return table(
        "Training runs. Accuracies are those of the averaged weights, which are also the ones kept.", columns, rows
    )
