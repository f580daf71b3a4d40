"""Measurements put together: groups of the same subject, and ratios between the calls of one comparison."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

from onefold.bench import Comparison, Machine, Measurement, Ratio, pool_ratios
from onefold.errors import BadArgument
from onefold.report.format import format_count, one_line
from onefold.report.load_results import Accuracy, ReportInputs

_IDENTITY = ("model", "runtime", "precision")
# Keys of a subject that were measured or say where it came from: they do not make it another subject.
_RESULTS = frozenset(
    {
        "answer",
        "condition",
        "drift",
        "macs",
        "num_bytes",
        "params",
        "parity",
        "source",
        "top1",
        "top1_count",
        "top1_on",
        "top5",
    }
)


@dataclass(frozen=True, kw_only=True)
class MeasurementGroup:
    """Measurements of one subject with the same number of threads on one machine: a table row, a point in a figure.

    The process is the unit: figures are medians over the processes, not over all their samples, because the samples
    of a process share what that process met. `gate` is the verdict of its artifact's gate, where it had one.
    """

    measurements: tuple[Measurement, ...]
    accuracy: Accuracy | None = None
    gate: str | None = None

    @property
    def top1(self) -> float | None:
        """The accuracy in percent; None where it is not known."""
        return None if self.accuracy is None else self.accuracy.top1

    @property
    def num_scored(self) -> int | None:
        """Of how many images the accuracy is; None where that is not known."""
        return None if self.accuracy is None else self.accuracy.num_images

    @property
    def subject(self) -> Mapping[str, Any]:
        """What was measured: model, runtime, precision, and more."""
        return self.measurements[0].subject

    @property
    def machine(self) -> Machine:
        """The machine it was measured on."""
        return self.measurements[0].machine

    @property
    def threads(self) -> int:
        """The number of threads that the calls used."""
        return self.measurements[0].procedure.threads

    @property
    def label(self) -> str:
        """A short name of the subject."""
        return subject_label(self.subject)

    @property
    def title(self) -> str:
        """The label, which says UNFUSED where the network was not fused: for text that has no column for it."""
        return f"{self.label} UNFUSED" if self.fused is False else self.label

    @property
    def fused(self) -> bool | None:
        """Whether the network was fused; None where the subject does not say."""
        fused = self.subject.get("fused")
        return fused if isinstance(fused, bool) else None

    @cached_property
    def median_ns(self) -> float:
        """The median latency of a call, in nanoseconds."""
        return median(m.median_ns for m in self.measurements)

    @property
    def p90_ns(self) -> float | None:
        """The 90th percentile, in nanoseconds; None where a process has too few samples for one."""
        return self.median_of(lambda m: m.p90_ns)

    @property
    def num_noisy(self) -> int:
        """How many of the measurements are noisy."""
        return sum(m.verdict == "noisy" for m in self.measurements)

    def median_of(self, value: Callable[[Measurement], float | None]) -> float | None:
        """Return the median of a value over the processes; None where it is unknown for any of them."""
        known = [number for m in self.measurements if (number := value(m)) is not None]
        return median(known) if len(known) == len(self.measurements) else None


@dataclass(frozen=True, kw_only=True)
class ComparedPair:
    """Two calls of a comparison: `ratio` is the time of `first` over the time of `second`.

    `second` is the baseline of its comparison; of a network before and after fusing, it is the unfused one. `folder`
    tells it from another pair of the same names; it is empty where there is none.
    """

    first: str
    second: str
    first_subject: Mapping[str, Any]
    second_subject: Mapping[str, Any]
    ratio: Ratio
    measurement: Measurement
    num_processes: int = 1
    folder: str = ""

    @property
    def machine(self) -> Machine:
        """The machine both were measured on."""
        return self.measurement.machine

    @property
    def is_fusion(self) -> bool:
        """Whether the two are one network after and before fusing."""
        fused = {self.first_subject.get("fused"), self.second_subject.get("fused")}
        same = all(self.first_subject.get(key) == self.second_subject.get(key) for key in _IDENTITY)
        return same and fused == {True, False}

    @property
    def context(self) -> str:
        """What both have in common: model, runtime, precision, threads."""
        shared = {
            key: value
            for key, value in self.first_subject.items()
            if key in _IDENTITY and self.second_subject.get(key) == value
        }
        threads = format_count(self.measurement.procedure.threads, "thread")
        threads += f", in {self.folder}" if self.folder else ""
        return f"{subject_label(shared)}, {threads}" if shared else threads

    def sentence(self) -> str:
        """Return the verdict with its interval, and over how many processes it was pooled."""
        names = ("the fused network", "the unfused network") if self.is_fusion else (self.first, self.second)
        verdict = self.ratio.describe(*names)
        verdict = f"T{verdict[1:]}" if verdict.startswith("the ") else verdict
        return f"{verdict} Over {self.num_processes} processes." if self.num_processes > 1 else verdict


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The inputs and what was computed from them: groups, fastest first on each machine, and pairs."""

    inputs: ReportInputs
    groups: tuple[MeasurementGroup, ...]
    pairs: tuple[ComparedPair, ...]

    @property
    def machines(self) -> list[Machine]:
        """Every machine once, in the order of the inputs."""
        return list({m.machine.slug: m.machine for m in self.inputs.all_measurements}.values())

    @property
    def fastest(self) -> MeasurementGroup | None:
        """The fastest fused network; without one, the fastest not known to be fused, then the fastest unfused one.

        One whose artifact failed its gate, or may have, is none of them.
        """
        return self._fastest_of(group for group in self.groups if group.gate in (None, "passed"))

    @property
    def fastest_not_passed(self) -> MeasurementGroup | None:
        """The fastest fused network whose artifact did not pass its gate, where it is faster than `fastest`."""
        best, other = self.fastest, self._fastest_of(g for g in self.groups if g.gate not in (None, "passed"))
        return other if other and (best is None or other.median_ns < best.median_ns) else None

    @staticmethod
    def _fastest_of(groups: Iterable[MeasurementGroup]) -> MeasurementGroup | None:
        candidates = [group for group in groups if not group.subject.get("planted")]
        order = {True: 0, None: 1, False: 2}
        return min(candidates, key=lambda group: (order[group.fused], group.median_ns), default=None)

    @property
    def best_fusion(self) -> ComparedPair | None:
        """The comparison of a network after and before fusing that gained most."""
        fusions = (pair for pair in self.pairs if pair.is_fusion)
        return min(fusions, key=lambda pair: pair.ratio.value, default=None)


def group_inputs(inputs: ReportInputs) -> ReportData:
    """Group the measurements and compute the ratios of the comparisons."""
    compared = (m for comparison in inputs.comparisons for m in _without_names(comparison))
    measurements = [*inputs.measurements, *compared]
    found = ((subject_key(m.subject), inputs.accuracy_of(m.subject)) for m in measurements)
    accuracies = {key: accuracy for key, accuracy in found if accuracy is not None}
    same: dict[tuple[str, ...], list[Comparison]] = {}
    folders = dict(zip(map(id, inputs.comparisons), inputs.comparison_folders, strict=False))
    for comparison in inputs.comparisons:
        subjects = (subject_key(m.subject) for m in comparison.measurements.values())
        key = (comparison.twin.machine.slug, str(comparison.twin.procedure.threads), *subjects)
        same.setdefault(key, []).append(comparison)
    pairs = [
        replace(pair, folder=folders.get(id(comparisons[0]), ""))
        for alike in same.values()
        for comparisons in _pooled(alike)
        for pair in _pairs(comparisons)
    ]
    told = Counter((pair.first, pair.second, replace(pair, folder="").context) for pair in pairs)
    pairs = [
        pair if told[pair.first, pair.second, replace(pair, folder="").context] > 1 else replace(pair, folder="")
        for pair in pairs
    ]
    groups = group_by_subject(measurements, accuracies)
    groups = [replace(group, gate=inputs.gate_of(group.subject)) for group in groups]
    return ReportData(inputs=inputs, groups=tuple(groups), pairs=tuple(pairs))


def group_by_subject(measurements: Iterable[Measurement], accuracies: Mapping[str, Accuracy]) -> list[MeasurementGroup]:
    """Return groups, the fastest first, machine by machine in the order they come; `accuracies` by `subject_key`."""
    members: dict[tuple[str, int, str], list[Measurement]] = {}
    for m in measurements:
        members.setdefault((m.machine.slug, m.procedure.threads, subject_key(m.subject)), []).append(m)
    groups = [
        MeasurementGroup(measurements=tuple(group), accuracy=accuracies.get(key))
        for (_, _, key), group in members.items()
    ]
    machines = list(dict.fromkeys(group.machine.slug for group in groups))
    return sorted(groups, key=lambda group: (machines.index(group.machine.slug), group.median_ns))


def subject_label(subject: Mapping[str, Any]) -> str:
    """Return model, runtime and precision, with the name it was compared under where that says more."""
    parts = [one_line(subject[key], 60) for key in _IDENTITY if subject.get(key)]
    parts += ["random weights"] if parts and subject.get("untrained") else []
    parts += ["partly fused"] if parts and subject.get("left_norms") else []
    name = one_line(subject.get("name") or "", 60)
    if not parts:
        return name or "unnamed"
    planted = subject.get("planted")
    if isinstance(planted, int | float):  # slowed on purpose, as a control of the measurement
        return f"{' '.join(parts)} made {100 * planted:g} % slower"
    redundant = {"fused", "unfused", "not", *" ".join(parts).lower().split()}
    return " ".join(parts) + ("" if redundant.issuperset(name.lower().split()) else f" ({name})")


def subject_key(subject: Mapping[str, Any]) -> str:
    """Return what tells subjects apart as one string: all of it but what was measured about them."""
    bare = {key: value for key, value in subject.items() if key not in _RESULTS}
    if subject_label({**bare, "name": ""}) == subject_label(subject):  # its name says nothing more
        bare.pop("name", None)
    return json.dumps(bare, sort_keys=True)


def _without_names(comparison: Comparison) -> list[Measurement]:
    """Return the measurements without the names they were compared under, where they can be told apart without.

    A network measured in two comparisons under different names is then one group.
    """
    measurements = list(comparison.measurements.values())
    bare = [{key: value for key, value in m.subject.items() if key != "name"} for m in measurements]
    if len({subject_key(subject) for subject in bare}) < len(bare):
        return measurements
    return [replace(m, subject=subject) for m, subject in zip(measurements, bare, strict=True)]


def _pooled(comparisons: list[Comparison]) -> list[list[Comparison]]:
    """Return comparisons of the same in one list where there are enough processes to pool, else each in its own."""
    try:
        for name in list(comparisons[0].measurements)[1:]:
            pool_ratios(comparisons, name)
    except BadArgument:  # fewer processes than an interval over processes needs
        return [[one] for one in comparisons]
    return [comparisons]


def _pairs(comparisons: list[Comparison]) -> list[ComparedPair]:
    """Return one pair a name."""
    names = list(comparisons[0].measurements)[1:]
    if len(comparisons) == 1:
        return [_pair(comparisons, name, comparisons[0].ratio(name)) for name in names]
    return [_pair(comparisons, name, pool_ratios(comparisons, name)) for name in names]


def _pair(comparisons: list[Comparison], name: str, ratio: Ratio) -> ComparedPair:
    comparison = comparisons[0]
    names, measurements = (name, comparison.baseline), comparison.measurements
    pair = ComparedPair(
        first=one_line(names[0], 60),
        second=one_line(names[1], 60),
        first_subject=measurements[names[0]].subject,
        second_subject=measurements[names[1]].subject,
        ratio=ratio,
        measurement=comparison.twin,
        num_processes=len(comparisons),
    )
    if not (pair.is_fusion and pair.second_subject["fused"]):
        return pair
    # The fused network was the baseline: turn it round, so that every fusion is told as fused over unfused.
    return replace(
        pair,
        first=pair.second,
        second=pair.first,
        first_subject=pair.second_subject,
        second_subject=pair.first_subject,
        ratio=replace(ratio, value=1 / ratio.value, low=1 / ratio.high, high=1 / ratio.low),
    )
