"""How measurements look in a terminal: latencies against the machine's limits, the limits, layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onefold.cli.display import emit_json, say, table

if TYPE_CHECKING:
    from onefold.bench import Comparison, Limit, Measurement
    from onefold.runtimes import Profile

_WHAT = {"fp32": "multiply-adds in fp32", "bf16": "multiply-adds in bf16", "int8": "multiply-adds in int8"}


def measured(outcome: Measurement | Comparison, path: Path, *, as_json: bool) -> None:
    """Latencies of one call, what share of the machine's limit each reaches, and in words what is faster than what."""
    from onefold.bench import Comparison

    together = outcome.measurements if isinstance(outcome, Comparison) else {str(outcome.subject["name"]): outcome}
    if as_json:
        emit_json(_plain(m, outcome) for m in together.values())
        return
    head = ["", "median ms", "p90 ms", "min ms", "spread", "of the limit", "verdict"]
    table(head, [_row(name, m) for name, m in together.items()])
    for name, m in together.items():
        for told in _beside(m):
            say(f"  {name}: {told}")
    for reason in dict.fromkeys(reason for m in together.values() for reason in m.reasons):
        say(f"  {reason}")
    if isinstance(outcome, Comparison):
        _compared(outcome)
    say(f"appended to {path}")


def limits(found: Sequence[Limit], *, as_json: bool) -> None:
    """What the machine can do at the most, the best of five runs and their median."""
    if as_json:
        emit_json(found)
        return
    if not found:
        say("nothing could be measured: neither the compiled loops nor numpy's product ran in a fresh process")
        return
    head = ["", "threads", "best of five", "median", "unit", "by"]
    rows = []
    for limit in sorted(found, key=lambda each: each.threads):
        reads = limit.num_bytes is not None
        what = f"reading {_size(limit.num_bytes)} over and over" if reads else _WHAT[limit.kind]
        best, median = (f"{rate / 1e9:.1f}" for rate in (limit.best, limit.median))
        rows.append([what, str(limit.threads), best, median, "GB/s" if reads else "GMAC/s", limit.how])
    table(head, rows)
    say("The best run is the limit, for what disturbs a run only slows it. A multiply-add is two operations (FLOP).")


def profiled(found: Profile, *, top: int, as_json: bool) -> None:
    """The slowest layers, and what each type of layer takes together."""
    total = found.ns or 1.0
    if as_json:
        for layer in found.layers:
            emit_json([{"name": layer.name, "type": layer.kind, "ms": layer.ns / 1e6, "share": layer.ns / total}])
        return
    slowest = sorted(found.layers, key=lambda layer: -layer.ns)[:top]
    rows = [[layer.name, layer.kind, f"{layer.ns / 1e6:.3f}", f"{100 * layer.ns / total:.1f} %"] for layer in slowest]
    rest = len(found.layers) - len(slowest)
    if rest:
        others = total - sum(layer.ns for layer in slowest)
        rows.append([f"{rest} more", "", f"{others / 1e6:.3f}", f"{100 * others / total:.1f} %"])
    table(["layer", "type", "ms", "share"], rows)
    kinds = ", ".join(f"{kind} {100 * ns / total:.1f} %" for kind, ns in found.by_kind().items() if ns >= 0.005 * total)
    say(f"{found.artifact.title}: {total / 1e6:.3f} ms in {len(found.layers)} layers, medians of {found.calls} calls")
    say(f"by type: {kinds}")


def _row(name: str, m: Measurement) -> list[str]:
    reached = "-" if m.roofline is None or m.bound is None else f"{100 * m.roofline:.0f} % ({m.bound.side})"
    p90 = "-" if m.p90_ns is None else f"{m.p90_ns / 1e6:.3f}"
    times = [f"{m.median_ns / 1e6:.3f}", p90, f"{m.min_ns / 1e6:.3f}"]
    return [name, *times, f"{100 * m.spread:.1f} %", reached, m.verdict]


def _beside(m: Measurement) -> list[str]:
    """What was found beside the times: the least time, the start in a fresh process, memory, size, energy."""
    told = []
    if m.roofline is not None and m.bound is not None:
        told.append(
            f"{100 * m.roofline:.0f} % of the roofline: {m.subject['precision']} with {_threads(m.procedure.threads)} "
            f"cannot take less than {(m.bound.ns or 0) / 1e6:.3f} ms here ({m.bound.how}; bound by {m.bound.side})"
        )
    if m.beats_limit:
        told.append(
            "its quickest call beats this limit: that was measured on a busier machine (`onefold limits --again`), "
            "or the runtime saves multiplications"
        )
    if m.cold is not None:
        peak = (
            "memory not visible" if m.cold.peak_bytes is None else f"{_size(m.cold.peak_bytes)} of memory at the peak"
        )
        times = f"opened in {m.cold.open_ns / 1e6:.0f} ms, first call {m.cold.first_ns / 1e6:.1f} ms"
        file = f", {_size(m.subject['num_bytes'])} on disk" if "num_bytes" in m.subject else ""
        told.append(f"in a fresh process {times}, then {m.cold.warm_ns / 1e6:.1f} ms; {peak}{file}")
    if m.energy is not None and m.energy.joules is not None:
        told.append(f"{1e3 * m.energy.joules:.3g} mJ a call ({m.energy.source}, over {m.energy.calls} calls)")
    return told


def _compared(outcome: Comparison) -> None:
    for sentence in outcome.sentences():
        say(sentence)
    floor = f"{100 * outcome.floor.floor:.2g} %"
    if len(outcome.measurements) == 1:
        say(f"Noise floor: against itself it differs by up to {floor} here; a smaller difference is none.")
    for name, m in outcome.measurements.items():
        if "planted" in m.subject:
            found = outcome.ratio(name).verdict == "slower"
            told = f"The {100 * m.subject['planted']:g} % that were planted were {'found' if found else 'NOT found'}"
            say(f"{told}; the noise floor is {floor}.")


def _plain(m: Measurement, outcome: Measurement | Comparison) -> dict[str, Any]:
    from onefold.bench import Comparison

    return {
        "subject": dict(m.subject),
        "median_ms": m.median_ns / 1e6,
        "verdict": m.verdict,
        "roofline": m.roofline,
        "bound": None if m.bound is None else {**m.bound.to_dict(), "side": m.bound.side},
        "cold": None if m.cold is None else m.cold.to_dict(),
        "energy": None if m.energy is None else m.energy.to_dict(),
        "floor": outcome.floor.floor if isinstance(outcome, Comparison) else None,
    }


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _size(num_bytes: int | None) -> str:
    count = num_bytes or 0
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"
