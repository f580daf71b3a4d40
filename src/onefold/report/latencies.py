"""The part of the page about latency: comparisons in words, distributions, accuracy against latency, the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from onefold.bench import Comparison, Machine
from onefold.report import figures
from onefold.report.aggregate import Group, label
from onefold.report.canvas import Words
from onefold.report.evidence import Evidence, Pair
from onefold.report.figures import Contest, Row
from onefold.report.format import digits, latency, many, percent, share, size
from onefold.report.html import Column, Markup, bullets, classed, element, joined, paragraph, plain, table
from onefold.report.pareto import tradeoffs, unknown

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
        said: list[str] = [
            joined(element("strong", pair.sentence()), f" ({pair.context}; {_floor(pair)})") for pair in pairs
        ]
        said += [_self_test(each) for each in evidence.self_tests_on(machine)]
        drawn = classed("div", "figures packed", *_compared(pairs, place), *_distributed(groups, place))
        parts += [bullets(said), *tradeoffs(groups, place), unknown(groups), drawn, _table(groups, machine)]
    return joined(*parts)


def tag(fused: bool | None) -> Markup:
    """Fused, UNFUSED, or not stated: said of every row."""
    return _UNSTATED if fused is None else _FUSED if fused else UNFUSED


def _compared(pairs: Sequence[Pair], place: int) -> list[Markup]:
    """Every ratio with its interval, in one figure."""
    drawn = pairs[:_MOST_ROWS]
    if not drawn:
        return []
    against = drawn[0].second if len({pair.second for pair in drawn}) == 1 and not drawn[0].is_folding else None
    contests = [Contest(pair.first if against else _contest(pair), _times(pair), pair.ratio) for pair in drawn]
    words = Words(f"ratios-{place}", "Compared, with 95 % intervals", " ".join(pair.sentence() for pair in drawn))
    times = f"times to {against}" if against else "times"
    note = (
        f"Dots are ratios of {times}, bars 95 % intervals, the grey band the noise floor; a grey dot is no difference."
    )
    return [_figure(words, figures.forest(words, contests), note)]


def _figure(words: Words, svg: Markup, note: str, *more: Markup) -> Markup:
    return element("figure", element("h3", words.title), svg, *more, element("figcaption", note))


def _floor(pair: Pair) -> str:
    return f"the same network against itself differs by up to {100 * pair.ratio.floor:.1f} % here"


def _self_test(comparison: Comparison) -> str:
    """The noise floor that a self-test found."""
    subject, threads = comparison.twin.subject, many(comparison.twin.procedure.threads, "thread")
    return (
        f"Self-test: {label(subject)} with {threads} differs by up to {100 * comparison.floor.floor:.1f} % from itself."
    )


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


def _table(groups: Sequence[Group], machine: Machine) -> Markup:
    """One row a group; columns of what none of them has are left out."""
    shown = [column for column in _COLUMNS if any(column.cell(group) not in ("", "–") for group in groups)]
    columns = [Column("measured"), *(Column(column.title, column.is_number) for column in shown)]
    rows = [[group.label, *(column.cell(group) for column in shown)] for group in groups]
    caption = (
        f"Latency of one call on {plain(machine.chip)}, the quickest first. p90 and p99 are bounds that hold with 99 % "
        "confidence; a dash means too few samples to say. Spread is the width of the middle 80 % over the median."
    )
    if any(group.roofline is not None for group in groups):
        caption += (
            " Of the limit: the least time in which this machine could do the multiply-adds, or read the weights, over "
            "the median; the word is what binds."
        )
    noisy = [f"{group.title}: {' '.join(group.reasons)}" for group in groups if group.noisy]
    reasons = joined(paragraph("Why some are noisy:"), bullets(noisy)) if noisy else None
    beaten = ", ".join(group.title for group in groups if group.beats_limit)
    doubts = f"Some calls were quicker than the limit, which was measured on a busier machine then: {beaten}."
    return joined(table(caption, columns, rows), classed("p", "note", doubts) if beaten else None, reasons)


@dataclass(frozen=True)
class _Shown:
    """A column of the table of latencies."""

    title: str
    cell: Callable[[Group], str]
    is_number: bool = True


def _reached(group: Group) -> str:
    return "–" if group.roofline is None or group.binds is None else f"{share(group.roofline, 0)} {group.binds}"


def _first_call(group: Group) -> str:
    """In the process that measured, unless a fresh one was asked."""
    warmup = group.measurements[0].warmup_ns
    return "–" if group.cold_ns is not None or not warmup else latency(float(warmup[0]))


def _samples(group: Group) -> str:
    first = group.measurements[0]
    count = sum(len(each.samples_ns) for each in group.measurements)
    runs = f" in {len(group.measurements)} runs" if len(group.measurements) > 1 else ""
    calls = f" of {digits(first.calls_per_sample)} calls" if first.calls_per_sample > 1 else ""
    return f"{count}{calls}{runs}"


def _verdict(group: Group) -> Markup:
    total = len(group.measurements)
    if not group.noisy:
        return classed("span", "tag good", "quiet")
    return classed("span", "tag alarm", "noisy" if total == 1 else f"noisy, {group.noisy}/{total}")


def _setting(group: Group) -> str:
    shape = group.subject.get("input_shape")
    known = "×".join(plain(size, 12) for size in shape) if isinstance(shape, tuple) else ""
    return ", ".join(part for part in (many(group.threads, "thread"), known) if part)


_COLUMNS = (
    _Shown("network", lambda group: tag(group.fused), False),
    _Shown("threads, input", _setting, False),
    _Shown("top-1", lambda group: percent(group.top1)),
    _Shown("median", lambda group: latency(group.median_ns)),
    _Shown("p90", lambda group: latency(group.p90_ns)),
    _Shown("p99", lambda group: latency(group.p99_ns)),
    _Shown("spread", lambda group: share(group.spread)),
    _Shown("of the limit", _reached, False),
    _Shown("size", lambda group: size(group.num_bytes)),
    _Shown("peak memory", lambda group: size(group.peak_bytes)),
    _Shown("cold start", lambda group: latency(group.cold_ns)),
    _Shown("first call", _first_call),
    _Shown("samples", _samples, False),
    _Shown("machine was", _verdict, False),
)
