"""Measurements of the same thing on the same machine, put together: one row of a table, one line of a figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from onefold.bench import Machine, Measurement
from onefold.report.html import plain

# What was found out about a subject, or how it came here: none of it makes it another one.
_FINDINGS = frozenset(
    {"answer", "condition", "drift", "macs", "num_bytes", "params", "parity", "source", "top1", "top1_on", "top5"}
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Measurements of one subject with the same threads. A process is the unit: figures are medians of theirs."""

    measurements: tuple[Measurement, ...]
    top1: float | None = None

    @property
    def subject(self) -> Mapping[str, Any]:
        """What was measured."""
        return self.measurements[0].subject

    @property
    def machine(self) -> Machine:
        """Where."""
        return self.measurements[0].machine

    @property
    def threads(self) -> int:
        """With how many threads."""
        return self.measurements[0].procedure.threads

    @property
    def label(self) -> str:
        """What was measured, in a few words."""
        return label(self.subject)

    @property
    def title(self) -> str:
        """The label where nothing beside it says that the network is unfused."""
        return f"{self.label} UNFUSED" if self.fused is False else self.label

    @property
    def fused(self) -> bool | None:
        """Whether the network was folded; None where nobody said."""
        fused = self.subject.get("fused")
        return fused if isinstance(fused, bool) else None

    @property
    def median_ns(self) -> float:
        """The median of the medians."""
        return median(each.median_ns for each in self.measurements)

    @property
    def p90_ns(self) -> float | None:
        """The median of the sure 90th percentiles; None where one of them has none."""
        return _median_of([each.p90_ns for each in self.measurements])

    @property
    def p99_ns(self) -> float | None:
        """The same for the 99th."""
        return _median_of([each.p99_ns for each in self.measurements])

    @property
    def spread(self) -> float:
        """The median of the spreads."""
        return median(each.spread for each in self.measurements)

    @property
    def roofline(self) -> float | None:
        """The median of the shares (0 to 1) of the machine's limit; None where one of them has none."""
        return _median_of([each.roofline for each in self.measurements])

    @property
    def beats_limit(self) -> bool:
        """Whether a call was quicker than the limit it is held against."""
        return any(each.beats_limit for each in self.measurements)

    @property
    def binds(self) -> str | None:
        """Which side of the machine binds, compute or memory."""
        return next((each.bound.side for each in self.measurements if each.bound is not None), None)

    @property
    def num_bytes(self) -> int | None:
        """The size of what a user ships."""
        size = self.subject.get("num_bytes")
        return size if type(size) is int else None

    @property
    def cold_ns(self) -> float | None:
        """From nothing to the first answer in a fresh process: the median over those that were started."""
        seen = [each.cold.start_ns for each in self.measurements if each.cold is not None]
        return median(seen) if seen else None

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that a fresh process used for it."""
        seen = [each.cold.peak_bytes for each in self.measurements if each.cold is not None]
        return max((peak for peak in seen if peak is not None), default=None)

    @property
    def noisy(self) -> int:
        """How many of the measurements are noisy."""
        return sum(each.verdict == "noisy" for each in self.measurements)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, each reason once."""
        return tuple(dict.fromkeys(reason for each in self.measurements for reason in each.reasons))

    @property
    def latencies_ms(self) -> tuple[float, ...]:
        """Every sample of all of them."""
        return tuple(latency / 1e6 for each in self.measurements for latency in each.latencies_ns)


def label(subject: Mapping[str, Any]) -> str:
    """Model, runtime and precision, and the name it was compared under where that says more."""
    known = [plain(subject[key], 60) for key in ("model", "runtime", "precision") if subject.get(key)]
    known += ["random weights"] if known and subject.get("untrained") else []
    name = plain(subject.get("name") or "", 60)
    if not known:
        return name or "something unnamed"
    planted = subject.get("planted")
    if isinstance(planted, int | float):  # slowed on purpose, as a control
        return f"{' '.join(known)} made {100 * planted:g} % slower"
    told = {"fused", "unfused", "not", *" ".join(known).lower().split()}
    return " ".join(known) + ("" if told.issuperset(name.lower().split()) else f" ({name})")


def grouped(measurements: Iterable[Measurement], accuracies: Mapping[str, float]) -> list[Group]:
    """Groups, the quickest first, machine by machine in the order they come; `accuracies` by the key of a subject."""
    found: dict[tuple[str, int, str], list[Measurement]] = {}
    for each in measurements:
        found.setdefault((each.machine.slug, each.procedure.threads, subject_key(each.subject)), []).append(each)
    groups = [
        Group(measurements=tuple(members), top1=accuracies.get(subject)) for (_, _, subject), members in found.items()
    ]
    machines = list(dict.fromkeys(group.machine.slug for group in groups))
    return sorted(groups, key=lambda group: (machines.index(group.machine.slug), group.median_ns))


def subject_key(subject: Mapping[str, Any]) -> str:
    """What tells subjects apart, as one string: all but what was found out about them."""
    bare = {key: value for key, value in subject.items() if key not in _FINDINGS}
    if label({**bare, "name": ""}) == label(subject):  # its name says nothing more
        bare.pop("name", None)
    return json.dumps(bare, sort_keys=True)


def pareto_front(groups: Iterable[Group]) -> list[Group]:
    """Those that no other beats in both latency and accuracy, the quickest first; without an accuracy it is none."""
    front: list[Group] = []
    best = float("-inf")
    known = [(group.median_ns, -group.top1, at, group) for at, group in enumerate(groups) if group.top1 is not None]
    for _, negative_top1, _, group in sorted(known, key=lambda entry: entry[:3]):
        if -negative_top1 > best:
            front.append(group)
            best = -negative_top1
    return front


def _median_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None
