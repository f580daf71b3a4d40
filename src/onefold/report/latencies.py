"""The part of the page about latency: comparisons in words, distributions, accuracy against latency, the table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from onefold.bench import Machine
from onefold.report import figures
from onefold.report.canvas import Words
from onefold.report.evidence import Evidence, Pair
from onefold.report.figures import Contest, Point, Row
from onefold.report.groups import Group, pareto_front
from onefold.report.html import Column, Markup, bullets, classed, element, joined, paragraph, plain, table
from onefold.report.words import digits, latency, many, percent, share

_MOST_ROWS = 12
UNFUSED = classed("span", "tag alarm", "UNFUSED")
_FUSED = classed("span", "tag good", "fused")
_UNSTATED = classed("span", "tag", "fused: not stated")


def latencies(evidence: Evidence) -> Markup:
    """Everything about latency, machine by machine: figures of two machines never share an axis."""
    several = len(evidence.machines) > 1
    parts: list[Markup] = []
    for place, machine in enumerate(evidence.machines):
        if several:
            parts.append(element("h3", f"On {plain(machine.chip)}, {many(machine.cores, 'core')}"))
        groups, pairs = evidence.groups_on(machine), evidence.pairs_on(machine)
        drawn = [*_compared(pairs, place), *_distributed(groups, place), *_weighed(groups, place)]
        said = [joined(element("strong", pair.sentence()), f" ({pair.context}; {_floor(pair)})") for pair in pairs]
        parts += [bullets(said), classed("div", "figures packed", *drawn), _unknown(groups), _table(groups, machine)]
    return joined(*parts)


def tag(fused: bool | None) -> Markup:
    """Fused, UNFUSED, or not stated: said of every row."""
    return _UNSTATED if fused is None else _FUSED if fused else UNFUSED


def _compared(pairs: Sequence[Pair], place: int) -> list[Markup]:
    """Every ratio with its interval, in one figure."""
    drawn = pairs[:_MOST_ROWS]
    if not drawn:
        return []
    contests = [Contest(_contest(pair), _times(pair), pair.ratio) for pair in drawn]
    words = Words(f"ratios-{place}", "Compared, with 95 % intervals", " ".join(pair.sentence() for pair in drawn))
    note = "Dots are ratios of times, bars 95 % intervals, the grey band the noise floor; a grey dot is no difference."
    return [_figure(words, figures.forest(words, contests), note)]


def _figure(words: Words, svg: Markup, note: str, *more: Markup) -> Markup:
    return element("figure", element("h3", words.title), svg, *more, element("figcaption", note))


def _floor(pair: Pair) -> str:
    return f"the same network against itself differs by up to {100 * pair.ratio.floor:.1f} % here"


def _contest(pair: Pair) -> str:
    names = ("fused", "unfused") if pair.is_folding else (pair.first, pair.second)
    return f"{' / '.join(names)}, {pair.context}"


def _times(pair: Pair) -> str:
    ratio = pair.ratio
    return f"{digits(ratio.value)} ({digits(ratio.low)}–{digits(ratio.high)})"


def _distributed(groups: Sequence[Group], place: int) -> list[Markup]:
    """One figure a model, one row a subject."""
    by_model = sorted(groups, key=_model)
    drawn = []
    for at, (model, members) in enumerate(groupby(by_model, key=_model)):
        rows = [_row(group) for group in members]
        words = Words(f"latency-{place}-{at}", f"Latency of {model}" if model else "Latency", _told(rows))
        more = f" The quickest {_MOST_ROWS} of {len(rows)} are drawn." if len(rows) > _MOST_ROWS else ""
        note = (
            "Each row holds every call measured, the last bar all that took longer still. "
            f"The line marks the median, the broken line p90 (99 % sure).{more}"
        )
        legend = classed("div", "legend", *_legend(rows[:_MOST_ROWS]))
        drawn.append(_figure(words, joined(legend, figures.distributions(words, rows[:_MOST_ROWS])), note))
    return drawn


def _model(group: Group) -> str:
    drawn = " (random weights)" if group.subject.get("untrained") else ""
    return plain(group.subject.get("model") or "", 60) + drawn


def _row(group: Group) -> Row:
    model, threads = _model(group), many(group.threads, "thread")
    known = [plain(group.subject[key], 30) for key in ("runtime", "precision") if group.subject.get(key)]
    name = " ".join(known) if model and known else group.label
    p90 = group.p90_ns
    return Row(
        label=f"{plain(name, 32)}{' UNFUSED' if group.fused is False else ''}, {threads}",
        note=latency(group.median_ns) + ("" if p90 is None else f", p90 {latency(p90)}"),
        latencies_ms=group.latencies_ms,
        median_ms=group.median_ns / 1e6,
        p90_ms=None if p90 is None else p90 / 1e6,
        fused=group.fused,
    )


def _told(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.label}: median {row.note}" for row in rows) + "."


def _legend(rows: Sequence[Row]) -> list[Markup]:
    entries = ((True, "series-0", "fused"), (False, "alarm-mark", "UNFUSED"), (None, "series-7", "not stated"))
    states = {row.fused for row in rows}
    return [
        classed("span", f"swatch {kind}", element("i", "■"), f" {says}")
        for fused, kind, says in entries
        if fused in states
    ]


def _weighed(groups: Sequence[Group], place: int) -> list[Markup]:
    """Accuracy against latency, one figure for each number of threads."""
    known = sorted((group for group in groups if group.top1 is not None), key=lambda group: group.threads)
    by_threads = groupby(known, key=lambda group: group.threads)
    return [_scatter(list(members), f"pareto-{place}-{threads}", threads) for threads, members in by_threads]


def _unknown(groups: Sequence[Group]) -> Markup:
    names = list(dict.fromkeys(group.title for group in groups if group.top1 is None))
    if not names:
        return Markup("")
    count = "Nothing" if all(group.top1 is None for group in groups) else "Not everything"
    said = f"{count} measured has a known accuracy; not drawn against it: {', '.join(names)}."
    return classed("p", "note", said)


def _scatter(groups: Sequence[Group], key: str, threads: int) -> Markup:
    front = pareto_front(groups)
    points, entries = [], []
    for index, group in enumerate(groups, 1):
        leads = any(group is each for each in front)
        points.append(Point(index, group.median_ns / 1e6, group.top1 or 0.0, group.fused, leads))
        told = f"{group.label}: {percent(group.top1)}, {latency(group.median_ns)}"
        alarm = joined(" ", UNFUSED) if group.fused is False else None
        entries.append(classed("li", "front" if leads else "behind", classed("span", "key", str(index)), told, alarm))
    best = "; ".join(f"{group.label} with {percent(group.top1)} at {latency(group.median_ns)}" for group in front)
    words = Words(key, f"Accuracy against latency, {many(threads, 'thread')}", f"On the front: {best}.")
    note = "Filled points are on the Pareto front: nothing measured is both quicker and more accurate."
    listed = classed("ol", "points", *entries)
    return _figure(words, figures.scatter(words, points), note, listed)


def _table(groups: Sequence[Group], machine: Machine) -> Markup:
    has_p99 = any(group.p99_ns is not None for group in groups)
    columns = [Column("measured"), Column("network"), Column("threads, input"), Column("median", True)]
    columns += [Column("p90", True), *([Column("p99", True)] if has_p99 else []), Column("spread", True)]
    columns += [Column("first call", True), Column("samples"), Column("machine was")]
    rows = [_cells(group, has_p99) for group in groups]
    caption = (
        f"Latency of one call on {plain(machine.chip)}, the quickest first. p90 and p99 are bounds that hold with 99 % "
        "confidence; a dash means too few samples to say. Spread is the width of the middle 80 % over the median."
    )
    noisy = [f"{group.title}: {' '.join(group.reasons)}" for group in groups if group.noisy]
    reasons = joined(paragraph("Why some are noisy:"), bullets(noisy)) if noisy else None
    return joined(table(caption, columns, rows), reasons)


def _cells(group: Group, has_p99: bool) -> list[str]:
    first = group.measurements[0]
    count = sum(len(each.samples_ns) for each in group.measurements)
    runs = f" in {len(group.measurements)} runs" if len(group.measurements) > 1 else ""
    calls = f" of {digits(first.calls_per_sample)} calls" if first.calls_per_sample > 1 else ""
    cells: list[str] = [group.label, tag(group.fused), _setting(group)]
    cells += [latency(group.median_ns), latency(group.p90_ns)]
    cells += [latency(group.p99_ns)] if has_p99 else []
    cells += [share(group.spread), latency(float(first.warmup_ns[0]) if first.warmup_ns else None)]
    return [*cells, f"{count}{calls}{runs}", _verdict(group)]


def _verdict(group: Group) -> Markup:
    total = len(group.measurements)
    if not group.noisy:
        return classed("span", "tag good", "quiet")
    return classed("span", "tag alarm", "noisy" if total == 1 else f"noisy, {group.noisy}/{total}")


def _setting(group: Group) -> str:
    shape = group.subject.get("input_shape")
    known = "×".join(plain(size, 12) for size in shape) if isinstance(shape, tuple) else ""
    return ", ".join(part for part in (many(group.threads, "thread"), known) if part)
