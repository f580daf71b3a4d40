"""What the inputs add up to: measurements in groups, comparisons in pairs. Computed once, told in several places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from onefold.bench import Comparison, Machine, Measurement, Ratio, pooled
from onefold.errors import BadArgument
from onefold.report.aggregate import Group, grouped, label, subject_key
from onefold.report.html import plain
from onefold.report.load import Inputs

_WHAT = ("model", "runtime", "precision")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One call against the baseline of its comparison: time of `first` over time of `second`.

    Of a network before and after folding, `first` is the folded one.
    """

    first: str
    second: str
    first_subject: Mapping[str, Any]
    second_subject: Mapping[str, Any]
    ratio: Ratio
    measurement: Measurement
    processes: int = 1

    @property
    def machine(self) -> Machine:
        """Where."""
        return self.measurement.machine

    @property
    def is_folding(self) -> bool:
        """Whether the two are one network before and after folding."""
        fused = (self.first_subject.get("fused"), self.second_subject.get("fused"))
        first, second = ({key: each.get(key) for key in _WHAT} for each in (self.first_subject, self.second_subject))
        return first == second and set(fused) == {True, False}

    def flipped(self) -> Pair:
        """The same, told the other way round."""
        ratio = replace(self.ratio, value=1 / self.ratio.value, low=1 / self.ratio.high, high=1 / self.ratio.low)
        return replace(
            self,
            first=self.second,
            second=self.first,
            first_subject=self.second_subject,
            second_subject=self.first_subject,
            ratio=ratio,
        )

    @property
    def context(self) -> str:
        """What both have in common, for people: model, runtime, precision, threads."""
        shared = {
            key: value
            for key, value in self.first_subject.items()
            if key in _WHAT and self.second_subject.get(key) == value
        }
        threads = self.measurement.procedure.threads
        told = f"{threads} thread{'s' if threads > 1 else ''}"
        return f"{label(shared)}, {told}" if shared else told

    def sentence(self) -> str:
        """The verdict, with its context and how many processes it rests on."""
        names = ("the fused network", "the unfused network") if self.is_folding else (self.first, self.second)
        said = self.ratio.words(*names)
        over = f" Over {self.processes} processes." if self.processes > 1 else ""
        return f"T{said[1:]}{over}" if said.startswith("the ") else f"{said}{over}"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All there is to tell."""

    inputs: Inputs
    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...]

    @property
    def machines(self) -> list[Machine]:
        """Every machine once, in the order they come."""
        return list({each.machine.slug: each.machine for each in self.inputs.all_measurements}.values())

    def groups_on(self, machine: Machine) -> list[Group]:
        """The groups measured there, the quickest first."""
        return [group for group in self.groups if group.machine.slug == machine.slug]

    def self_tests_on(self, machine: Machine) -> list[Comparison]:
        """The comparisons of something with nothing but itself, measured there."""
        alone = [each for each in self.inputs.comparisons if len(each.measurements) == 1]
        return [each for each in alone if each.twin.machine.slug == machine.slug]

    def pairs_on(self, machine: Machine) -> list[Pair]:
        """The pairs measured there."""
        return [pair for pair in self.pairs if pair.machine.slug == machine.slug]


def evidence(inputs: Inputs) -> Evidence:
    """Put together what belongs together."""
    within = (each for comparison in inputs.comparisons for each in _without_names(comparison))
    everything = [*inputs.measurements, *within]
    found = ((subject_key(each.subject), inputs.top1_of(each.subject)) for each in everything)
    accuracies = {key: top1 for key, top1 in found if top1 is not None}
    return Evidence(inputs=inputs, groups=tuple(grouped(everything, accuracies)), pairs=tuple(_pairs(inputs)))


def _without_names(comparison: Comparison) -> list[Measurement]:
    """The measurements as if each had been made alone, where what they are tells them apart without their names."""
    measured = list(comparison.measurements.values())
    bare = [{key: value for key, value in each.subject.items() if key != "name"} for each in measured]
    if len({subject_key(subject) for subject in bare}) < len(bare):
        return measured
    return [replace(each, subject=subject) for each, subject in zip(measured, bare, strict=True)]


def _pairs(inputs: Inputs) -> list[Pair]:
    same: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in inputs.comparisons:
        subjects = (subject_key(each.subject) for each in comparison.measurements.values())
        same.setdefault((comparison.twin.machine.slug, str(comparison.twin.procedure.threads), *subjects), []).append(
            comparison
        )
    return [pair for members in same.values() for pair in _pairs_of(members)]


def _pairs_of(comparisons: list[Comparison]) -> list[Pair]:
    """One pair a name where there are enough processes to pool, else one for each comparison."""
    names = list(comparisons[0].measurements)[1:]
    try:
        return [_pair(comparisons, name, pooled(comparisons, name)) for name in names]
    except BadArgument:
        return [_pair([each], name, each.ratio(name)) for each in comparisons for name in names]


def _pair(comparisons: list[Comparison], name: str, ratio: Ratio) -> Pair:
    comparison = comparisons[0]
    pair = Pair(
        first=plain(name, 60),
        second=plain(comparison.baseline, 60),
        first_subject=comparison.measurements[name].subject,
        second_subject=comparison.measurements[comparison.baseline].subject,
        ratio=ratio,
        measurement=comparison.twin,
        processes=len(comparisons),
    )
    return pair.flipped() if pair.is_folding and pair.second_subject["fused"] else pair
