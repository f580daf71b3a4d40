"""How much energy a call takes, where the kernel lets one read the processor's own counters (RAPL, Intel's and AMD's).

The counters are those of whole packages: whatever else runs on them, and their idling, is counted along.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules a call, over `calls` calls; None, with the `reason`, where it cannot be known. `source`: the counters."""

    joules: float | None = None
    calls: int = 0
    source: str = ""
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Energy:
        """The inverse of `to_dict`."""
        joules = plain.get("joules")
        return cls(
            joules=None if joules is None else float(joules),
            calls=int(plain.get("calls", 0)),
            source=str(plain.get("source", "")),
            reason=str(plain.get("reason", "")),
        )


def measure_energy(call: Callable[[], object], seconds: float = _SECONDS, root: Path = Path("/")) -> Energy:
    """Make the call for so many seconds and read the counters before and after; at once where there are none."""
    counters, reason = _counters(root)
    if not counters:
        return Energy(reason=reason)
    before, start, calls = [_micro(each) for each in counters], time.monotonic(), 0
    while not calls or time.monotonic() - start < seconds:
        call()
        calls += 1
    after = [_micro(each) for each in counters]
    used = sum(_passed(*each) for each in zip(before, after, counters, strict=True))
    names = ", ".join(sorted(each.name for each in counters))
    return Energy(joules=used / 1e6 / calls, calls=calls, source=names)


def _counters(root: Path) -> tuple[list[Path], str]:
    """The folders of the packages' counters, or why there are none. What is inside a package has two colons."""
    zones = sorted((root / "sys/class/powercap").glob("*rapl*:*"))
    packages = [zone for zone in zones if zone.name.count(":") == 1]
    if not packages:
        return [], "the system shows no energy counters (/sys/class/powercap)"
    try:
        for zone in packages:
            _micro(zone)
    except (OSError, ValueError) as error:
        return [], f"the energy counters cannot be read ({type(error).__name__}): root may"
    return packages, ""


def _micro(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


def _passed(before: int, after: int, zone: Path) -> int:
    """Microjoules between two readings of a counter that starts again at its largest value."""
    if after >= before:
        return after - before
    return after - before + int((zone / "max_energy_range_uj").read_text())
