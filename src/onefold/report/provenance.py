"""The parts of the page that let a reader judge and repeat it: artifacts, machines, the procedure, what to type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onefold.bench import Machine, Measurement, Procedure
from onefold.report.evidence import Evidence
from onefold.report.format import many, percent, scientific, share, size
from onefold.report.html import Column, Markup, bullets, element, facts, joined, paragraph, plain, table
from onefold.report.latencies import tag
from onefold.report.load import Export, Inputs, number

_TERMS = (
    ("fused", "every group of branches was folded into one convolution, as the network is meant to be used"),
    ("drift", "how far the fused network's answer lies from the trained one's, relative to its largest value"),
    ("parity", "how far the runtime's answer lay from PyTorch's when it was exported, relative to the largest logit"),
    ("median", "half of the calls took at most this long"),
    ("p90", "99 % sure: nine calls in ten take at most this long (the early-stopping estimate of MLPerf's LoadGen)"),
    ("spread", "the width of the middle 80 % of the samples over their median"),
    (
        "of the limit",
        "the least time that the machine was measured to need for so many multiply-adds in that precision, or for "
        "reading the weights, over the median: near 100 %, only a smaller network is quicker",
    ),
    ("first call", "the very first one in the measuring process: what a user waits for once"),
    ("cold start", "opening the artifact and the first call, in a fresh process: its imports included"),
    ("peak memory", "the most that the fresh process held, less what a bare interpreter holds"),
    ("95 % CI", "from a bootstrap over rounds in which the calls took turns, in random order; each round is one pair"),
    ("noise floor", "what the same call differs by against itself in the same rounds; less is called no difference"),
    ("noisy", "something spoke against trusting the figure: load, other programs, or samples that scatter or wander"),
)


def artifacts(inputs: Inputs) -> Markup:
    """The table of what was exported."""
    columns = [Column("artifact"), Column("network"), Column("what it is"), Column("size", True)]
    columns += [Column("drift", True), Column("parity", True), Column("top-1", True), Column("classes", True)]
    columns += [Column("licence"), Column("SHA-256")]
    caption = (
        "Exported artifacts. Each carries a reference input and its answer, and is measured only after it has given it."
    )
    return table(caption, columns, [_artifact(export, inputs.top1_of_export(export)) for export in inputs.exports])


def machines(found: Sequence[Machine]) -> Markup:
    """One table a machine."""
    return joined(*(_machine(machine) for machine in found))


def procedure(measurements: Sequence[Measurement]) -> Markup:
    """How it was measured, and what the words on this page mean."""
    ways = list(dict.fromkeys(_way(each.procedure) for each in measurements))
    clocks = sorted({(each.resolution_ns, each.overhead_ns) for each in measurements})
    clock = [f"The clock moves in steps of {step} ns; timing an empty call takes {cost} ns." for step, cost in clocks]
    kept = "No sample was dropped. Garbage collection was off while the clock ran."
    terms = bullets([joined(element("strong", term), f": {meaning}.") for term, meaning in _TERMS])
    meanings = element("details", element("summary", "What the words mean"), terms, attributes={"open": ""})
    return joined(bullets([*ways, *clock, kept]) if measurements else None, meanings)


def again(evidence: Evidence) -> Markup:
    """What to type to get these numbers again."""
    inputs = evidence.inputs
    lines = [f"onefold train --recipe {run.recipe}" for run in inputs.runs if run.recipe]
    lines += [f"onefold bench {export.folder}" for export in inputs.exports]
    commands = (
        element("pre", element("code", Markup("\n".join(element("span", line) for line in lines)))) if lines else None
    )
    raw = f"The raw samples are in {', '.join(inputs.sources)}." if inputs.sources else None
    near = "Run again on a quiet machine of the same kind, medians should come within 5 %." if evidence.groups else None
    versions = _versions(inputs)
    return joined(paragraph(raw, near), commands, paragraph(f"Made with {versions}.") if versions else None)


def _artifact(export: Export, top1: float | None) -> list[str]:
    digest = export.manifest.get("sha256")
    short = plain(digest)[:12] if isinstance(digest, str) else next(iter(sorted(export.hashes)), "")[:12]
    count = export.num_classes
    return [
        export.folder,
        tag(export.fused),
        " ".join(part for part in map(export.text, ("model", "runtime", "precision")) if part) or "–",
        size(export.num_bytes),
        scientific(number(export.manifest, "drift")),
        _parity(export.manifest),
        percent(top1),
        "–" if count is None else str(count),
        export.text("licence") or "not stated",
        element("code", short) if short else "–",
    ]


def _parity(manifest: Mapping[str, Any]) -> str:
    """The difference and the agreement of the best class; a manifest may also hold one number, or say there is none."""
    parity = manifest.get("parity")
    if parity is None and "parity" in manifest:
        return "not run where it was made"
    values: Mapping[str, Any] = parity if isinstance(parity, Mapping) else {"difference": parity}
    difference, agreement = number(values, "difference"), number(values, "top1_agreement")
    if difference is None:
        return "–"
    other = agreement is not None and agreement < 1
    return scientific(difference) + (f", best class the same in {share(agreement, 0)}" if other else "")


def _machine(machine: Machine) -> Markup:
    cores = many(machine.cores, "core")
    if machine.available_cores < machine.cores:
        cores += f", of which {machine.available_cores:g} may be used"
    governor = machine.governor or "not visible"
    speed = f", up to {machine.max_mhz:.0f} MHz" if machine.max_mhz else ""
    return facts(
        f"Machine {machine.slug}",
        [
            ("chip", plain(machine.chip)),
            ("architecture", plain(machine.architecture)),
            ("cores", cores),
            ("processors used", plain(", ".join(map(str, machine.affinity)), 80)),
            ("frequency governor", plain(f"{governor}{speed}")),
            ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB" if machine.memory_bytes else "not visible"),
            ("features", plain(", ".join(machine.features)) or "none seen"),
            ("system", plain(machine.system)),
            ("Python", plain(machine.python)),
            ("packages", plain(", ".join(f"{name} {version}" for name, version in machine.versions.items()), 400)),
        ],
    )


def _way(way: Procedure) -> str:
    least = f" and {way.min_seconds:g} s" if way.min_seconds else ""
    led = f", each after {many(way.lead_calls, 'call')} of its own" if way.lead_calls else ""
    return (
        f"With {many(way.threads, 'thread')}: {many(way.warmup_calls, 'call')} and {way.warmup_seconds:g} s warm-up, "
        f"then {many(way.samples, 'sample')}{least} of each{led}; seed {way.seed}."
    )


def _versions(inputs: Inputs) -> str:
    found: dict[str, str] = {}
    for export in inputs.exports:
        made_with = export.manifest.get("made_with")
        if isinstance(made_with, Mapping):
            found |= {plain(name, 40): plain(version, 40) for name, version in made_with.items()}
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
