"""What rows of logits say of each other: points lost, photos answered otherwise, and the bounds that we set ourselves.

drop      percent points of top-1 against PyTorch's float network
differ    photos whose best class is not the float network's; of these, those that were right (lost) or became so (won)
device    photos whose best class is not that of our simulation of the same network
noise     of the logits against the float network's: |q - f| / |f - mean of f|
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FLOAT, SIMULATION = ("fp32", "torch"), "simulation"
MOST_DROP = {"fp32": 0.1, "ours-channel": 1.0, "ours-searched": 1.0, "ours-tensor": 2.5}
LEAST_AGREEMENT = 0.99  # of a device with our simulation


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The logits (N, classes) of one row, or why there are none; `facts` are plain."""

    network: str
    method: str
    runtime: str
    logits: Floats | None = None
    refused: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> NDArray[np.int64]:
        assert self.logits is not None
        return self.logits.argmax(1)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A row of the table: `drop` in percent points, counts of `photos`, `noise` a share; `missed` the bounds."""

    network: str
    method: str
    runtime: str
    photos: int = 0
    top1: float | None = None
    drop: float | None = None
    differ: int | None = None
    lost: int | None = None
    won: int | None = None
    device: int | None = None
    noise: float | None = None
    missed: tuple[str, ...] = ()
    refused: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def scores(rows: Sequence[Answers], labels: NDArray[np.int64]) -> list[Score]:
    """The rows of one network, each against the float one in PyTorch; none without that one."""
    known = {(row.method, row.runtime): row for row in rows if row.logits is not None}
    if FLOAT not in known:
        return []
    return [_score(row, known[FLOAT], known.get((row.method, SIMULATION)), labels) for row in rows]


def _score(row: Answers, true: Answers, simulated: Answers | None, labels: NDArray[np.int64]) -> Score:
    if row.logits is None:
        return Score(network=row.network, method=row.method, runtime=row.runtime, refused=row.refused)
    was, now = true.best == labels, row.best == labels
    lost, won = int((was & ~now).sum()), int((now & ~was).sum())
    drop = 100 * (lost - won) / len(labels)
    is_device = simulated is not None and row is not simulated
    device = int((row.best != simulated.best).sum()) if is_device else None
    missed = []
    most = MOST_DROP.get(row.method)
    if most is not None and (abs(drop) if row.method == "fp32" else drop) > most:
        missed.append(f"drop {drop:.1f}, {most:g} allowed")
    if device is not None and device > (1 - LEAST_AGREEMENT) * len(labels) + 1e-9:
        missed.append(f"{device} photos not as simulated, {(1 - LEAST_AGREEMENT) * len(labels):.0f} allowed")
    spread = np.linalg.norm(true.logits - true.logits.mean(0))
    return Score(
        network=row.network,
        method=row.method,
        runtime=row.runtime,
        photos=len(labels),
        top1=100 * float(now.mean()),
        drop=drop,
        differ=int((row.best != true.best).sum()),
        lost=lost,
        won=won,
        device=device,
        noise=float(np.linalg.norm(row.logits - true.logits) / spread),
        missed=tuple(missed),
        facts=row.facts,
    )


HEAD = ("network", "method", "runtime", "top-1", "drop", "differ", "lost", "won", "device", "noise", "bound")


def table(found: Sequence[Score]) -> str:
    """The rows as text; the bound of a row is "held" or what is missed, empty where none was set."""
    lines = [HEAD]
    for row in found:
        if row.top1 is None:
            lines.append((row.network, row.method, row.runtime, *["-"] * 7, f"refused: {row.refused}"))
            continue
        bound = "; ".join(f"MISSED: {each}" for each in row.missed) or ("held" if row.method in MOST_DROP else "")
        counts = ["" if n is None else str(n) for n in (row.differ, row.lost, row.won, row.device)]
        cells = (f"{row.top1:.1f}", f"{row.drop:+.1f}", *counts, _percent(row.noise), bound)
        lines.append((row.network, row.method, row.runtime, *cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join(_line(line, widths) for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share >= 5e-5 or share == 0 else "<0.01 %"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = {0, 1, 2, len(HEAD) - 1}
    pairs = enumerate(zip(cells, widths, strict=True))
    return "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in pairs).rstrip()


def page(found: Sequence[Score], about: Mapping[str, Any]) -> str:
    """The table with what was measured, on what and with what; then what each method was."""
    machine, names = about["machine"], about["calibration_photos"]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    missed = [f"{row.network} {row.method}:{row.runtime}: {each}" for row in found for each in row.missed]
    parts = [
        "What 8 bits cost: top-1 on real photos, in percent.",
        "drop      points against PyTorch's float network, whose best class `differ` photos no longer have;",
        "          of these, `lost` were right before, and `won` are right now",
        "device    photos whose best class is not the one of our simulation of the same network of 8 bits",
        "noise     of the logits: |q - f| / |f - mean of f|",
        f"bound     of drop: {', '.join(f'{method} {most:g}' for method, most in MOST_DROP.items())}; "
        f"of device: {100 * (1 - LEAST_AGREEMENT):.0f} % of the photos",
        "",
        f"{about['date']}; {machine['chip']}, {machine['cores']} cores, {machine['system']}",
        f"Python {machine['python']}, {', '.join(f'{k} {version}' for k, version in machine['versions'].items())}",
        f"Scored on all photos of {about['scored_on']}. Calibrated on {about['calibrated_on']}:",
        f"{names[0]}, {names[1]}, ... {names[-1]} (SHA-256 of the names, a line each: {digest[:16]}; all: .jsonl)",
        f"Seed {about['seed']}; nothing here draws at random. On another number of threads our calibration rounds its "
        "sums otherwise, and the network of 8 bits is another one: a few answers more or less.",
        *(f"{key}: {title}" for key, title in about["networks"].items()),
        "",
        table(found),
        "",
        f"Bounds missed: {len(missed)}.",
        *missed,
        "",
        *methods(found),
    ]
    return "\n".join(parts) + "\n"


def methods(found: Sequence[Score]) -> list[str]:
    """What each method was, once; and the noise of those that were tried, on calibration photos held out."""
    lines = {}
    for row in found:
        if "method" in row.facts and row.method != "fp32":
            vendor = row.method.startswith("vendor")
            name = f"vendor, {row.runtime}" if vendor else f"{row.network} {row.method}"
            tried = row.facts.get("held_out_noise", {})
            noises = [f"\n    {100 * noise:5.2f} % held-out noise: {title}" for title, noise in tried.items()]
            threads = f"; quantized on {row.facts['threads']} thread(s)" if "threads" in row.facts else ""
            lines[name] = f"{name}: {row.facts['method']}{threads}{''.join(noises)}"
    return list(lines.values())


def lines_of(found: Sequence[Score], about: Mapping[str, Any]) -> str:
    """The same as JSON lines: first what was measured and with what, then a line a row."""
    first = {"kind": "int8-accuracy", **about}
    return "".join(json.dumps(each) + "\n" for each in (first, *({"kind": "row", **asdict(s)} for s in found)))
