"""The head of the page: what was done, the figures that matter most, and what must not be overlooked."""

from __future__ import annotations

from onefold.report.aggregate import Group
from onefold.report.evidence import Evidence, Pair
from onefold.report.format import digits, latency, listed, many, percent, scientific
from onefold.report.html import Markup, bullets, classed, element, joined, plain
from onefold.report.load import Export, number
from onefold.report.training import verdict


def title(evidence: Evidence) -> str:
    """What this report is about, in a few words."""
    inputs = evidence.inputs
    models = [plain(each.subject.get("model") or "", 60) for each in evidence.groups]
    models += [export.text("model") for export in inputs.exports]
    named = [model for model in dict.fromkeys(models) if model] or list(dict.fromkeys(run.name for run in inputs.runs))
    what = listed(named) if len(named) <= 2 else many(len(named), "model")
    where = [plain(machine.chip, 60) for machine in evidence.machines]
    place = listed(where) if len(where) <= 2 else many(len(where), "machine")
    return f"{what or 'An empty report'} on {place}" if where else what or "An empty report"


def lead(evidence: Evidence) -> str:
    """One paragraph for somebody who reads nothing else."""
    inputs = evidence.inputs
    counts = [
        many(len(inputs.runs), "training run"),
        many(len(inputs.exports), "exported artifact"),
        many(len(evidence.groups), "measured latency", "measured latencies"),
    ]
    present = [each for each in counts if not each.startswith("no ")]
    sentences = [f"This report covers {listed(present)}." if present else "There is nothing to report yet."]
    if len(inputs.runs) == 1:
        sentences.append(verdict(inputs.runs[0]))
    elif inputs.runs:
        sentences.append(_reached(evidence))
    quickest = _quickest(evidence)
    if quickest:
        p90 = f" and nine in ten at most {latency(quickest.p90_ns)}" if quickest.p90_ns is not None else ""
        kind = (
            "fused network"
            if quickest.fused
            else "network, not known to be fused,"
            if quickest.fused is None
            else "network"
        )
        sentences.append(
            f"The quickest {kind} is {quickest.label}: half of its calls took at most "
            f"{latency(quickest.median_ns)}{p90}, with {many(quickest.threads, 'thread')}."
        )
    folding = _folding(evidence)
    told = [folding] if folding else list(evidence.pairs[:1])
    sentences += [f"{pair.sentence().rstrip('.')} ({pair.context})." for pair in told]
    return " ".join(sentences)


def tiles(evidence: Evidence) -> Markup:
    """The headline figures, each with what it is and what to hold it against."""
    found = [*_accuracy_tile(evidence), *_latency_tile(evidence), *_folding_tile(evidence), *_drift_tile(evidence)]
    cells = [
        element("div", element("dt", what), classed("dd", "big", big), classed("dd", "small", beside), attributes=_TILE)
        for what, big, beside in found
    ]
    return classed("dl", "tiles", *cells) if cells else Markup("")


def warnings(evidence: Evidence) -> Markup:
    """What must not be overlooked: unfused networks, noisy measurements, inputs that could not be used."""
    groups, exports = evidence.groups, evidence.inputs.exports
    unfused = [*(group.label for group in groups if group.fused is False)]
    unfused += [export.folder for export in exports if export.fused is False]
    unstated = [group.label for group in groups if group.fused is None]
    noisy = sum(bool(group.noisy) for group in groups)
    said: list[str] = []
    if unfused:
        names = ", ".join(dict.fromkeys(unfused))
        said.append(f"UNFUSED networks are among these: {names}. Their figures are not those of the network in use.")
    if unstated:
        said.append(f"It is not stated whether these were fused: {', '.join(dict.fromkeys(unstated))}.")
    if noisy:
        said.append(
            f"{noisy} of {many(len(groups), 'measured latency', 'measured latencies')} came from a noisy machine."
        )
    alarm = classed("div", "callout alarm", bullets(said)) if said else None
    notes = evidence.inputs.notes
    return joined(alarm, classed("div", "callout", bullets(list(notes))) if notes else None)


_TILE = {"class": "tile"}


def _reached(evidence: Evidence) -> str:
    """How many of several runs kept their promise."""
    promised = [run for run in evidence.inputs.runs if run.expected_top1 is not None]
    if not promised:
        return "None of the runs states what it should reach."
    kept = sum(bool(run.best and run.best[1] >= (run.expected_top1 or 0.0) - 0.05) for run in promised)
    return f"{kept} of the {many(len(promised), 'run')} with an expected accuracy reached it."


def _quickest(evidence: Evidence) -> Group | None:
    """The quickest fused network, else the quickest of which nothing else is known, else the quickest of all."""
    for state in (True, None, False):
        matching = [group for group in evidence.groups if group.fused is state and not group.subject.get("planted")]
        if matching:
            return min(matching, key=lambda group: group.median_ns)
    return None


def _folding(evidence: Evidence) -> Pair | None:
    """The comparison of a network before and after folding that gained most."""
    pairs = [pair for pair in evidence.pairs if pair.is_folding]
    return min(pairs, key=lambda pair: pair.ratio.value) if pairs else None


def _accuracy_tile(evidence: Evidence) -> list[tuple[str, str, str]]:
    reached = [(run.best[1], run) for run in evidence.inputs.runs if run.best]
    if not reached:
        return []
    top1, run = max(reached, key=lambda entry: entry[0])
    beside = run.name if run.expected_top1 is None else f"{run.name}; {percent(run.expected_top1)} expected"
    return [("Top-1 accuracy", percent(top1), beside)]


def _latency_tile(evidence: Evidence) -> list[tuple[str, str, str]]:
    group = _quickest(evidence)
    if not group:
        return []
    p90 = f"p90 {latency(group.p90_ns)}; " if group.p90_ns is not None else ""
    state = " UNFUSED" if group.fused is False else ""
    beside = f"{p90}{group.label}{state}, {many(group.threads, 'thread')}"
    return [("Median latency, quickest", latency(group.median_ns), beside)]


def _folding_tile(evidence: Evidence) -> list[tuple[str, str, str]]:
    pair = _folding(evidence)
    if not pair:
        return []
    ratio = pair.ratio
    beside = f"95 % CI {digits(1 / ratio.high)}–{digits(1 / ratio.low)}; {pair.context}"
    what = "Faster by folding" if ratio.verdict == "faster" else "Speed by folding, not a gain"
    return [(what, f"{digits(1 / ratio.value)}×", beside)]


def _drift_tile(evidence: Evidence) -> list[tuple[str, str, str]]:
    known = [(drift, export) for export in evidence.inputs.exports if (drift := _drift(export)) is not None]
    if not known:
        return []
    worst, export = max(known, key=lambda entry: entry[0])
    among = f", of {many(len(known), 'artifact')}" if len(known) > 1 else ""
    return [("Largest drift by folding", scientific(worst), f"{export.folder}{among}")]


def _drift(export: Export) -> float | None:
    return number(export.manifest, "drift")
