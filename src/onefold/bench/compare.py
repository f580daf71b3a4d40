"""Which of several calls is faster, by how much, and how sure one may be of it.

The calls are timed in rounds, each once a round, in an order drawn anew; the first one, the baseline, is timed twice
a round. What its two series differ by is the noise floor: a difference inside it is called no difference. Where the
machine was noisy, a difference has a verdict if it is larger than all that this noise could make of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from onefold.bench.measurement import (
    Call,
    Clock,
    Instruments,
    Measurement,
    Procedure,
    measurements_from_series,
    time_interleaved,
)
from onefold.bench.timing_noise import paired_ratio_interval, percentile, pooled_ratio_interval
from onefold.errors import BadArgument, BadData

FEWEST_ROUNDS = 16
_FEWEST_PROCESSES = 5


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Time of one call over time of another, with its 95 % interval; `floor` is the A/A band (0.01: within 1 %).

    `noise` is the factor by which a noisy machine may have changed it at the most, 1 on a quiet one.
    """

    value: float
    low: float
    high: float
    floor: float = 0.0
    noise: float = 1.0

    @property
    def is_robust_to_noise(self) -> bool:
        """Whether the machine was quiet, or the interval leaves out 1 also where the noise has widened it."""
        return self.noise <= 1 or not self.low / self.noise <= 1 <= self.high * self.noise

    @property
    def verdict(self) -> Literal["faster", "slower", "no difference"]:
        """By the samples: a difference counts when the interval leaves out 1 and the value is outside the floor."""
        inside = abs(math.log(self.value)) <= math.log1p(self.floor)
        if inside or self.low <= 1 <= self.high:
            return "no difference"
        return "faster" if self.value < 1 else "slower"

    def describe(self, name: str, baseline: str) -> str:
        """The verdict as a sentence, on a noisy machine with its noise; no verdict where that could change it."""
        seen = f"{_percent(self.value)} (95 % CI {_percent(self.low)} to {_percent(self.high)})"
        if not self.is_robust_to_noise:
            return (
                f"No verdict on {name} against {baseline}: {seen} was measured on a noisy machine, where times may be "
                f"off by a factor of {self.noise:.3g}; measure again when it is idle."
            )
        if self.verdict == "no difference":
            return f"No difference between {name} and {baseline}: {seen} lies within the noise."
        quick = self.verdict == "faster"
        times = [1 / self.value, 1 / self.high, 1 / self.low] if quick else [self.value, self.low, self.high]
        if times[0] >= 1.2:
            much = f"{times[0]:.3g}x (95 % CI {times[1]:.3g}-{times[2]:.3g}) {self.verdict} than"
        else:
            share = sorted(100 * abs(1 - bound) for bound in (self.low, self.high))
            much = f"{100 * abs(1 - self.value):.1f} % (95 % CI {share[0]:.1f}-{share[1]:.1f} %) {self.verdict} than"
        noise = f" on a noisy machine, which may have changed this by a factor of {self.noise:.3g} at the most"
        return f"{name} is {much} {baseline}{noise if self.noise > 1 else ''}."


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several calls measured in the same rounds, under their names, the baseline first; `twin` is the baseline again.

    Sample i of every measurement was taken in round i. Ratios are computed from the raw samples when asked for.
    """

    measurements: Mapping[str, Measurement]
    twin: Measurement

    def __post_init__(self) -> None:
        rounds = {len(each.samples_ns) for each in (*self.measurements.values(), self.twin)}
        if len(self.measurements) < 1 or len(rounds) != 1:
            raise BadData(f"a comparison needs the same number of samples of each call; this one has {sorted(rounds)}")

    @property
    def baseline(self) -> str:
        """The name that the others are compared with."""
        return next(iter(self.measurements))

    @cached_property
    def floor(self) -> Ratio:
        """The A/A ratio: the baseline against itself; its farther bound is the noise floor of all other ratios."""
        value, low, high = self._interval(self.twin)
        band = math.expm1(max(abs(math.log(low)), abs(math.log(high))))
        return Ratio(value=value, low=low, high=high, floor=band)

    def ratio(self, name: str) -> Ratio:
        """Time of `name` over time of the baseline: the median of the rounds' ratios, and its bootstrap interval.

        Its noise is what `TimingNoise.max_slowdown` knows of the machine, times the noise floor, times the ratio of the
        slow tenth of a call's samples to its quick tenth, of the one that scatters more.
        """
        if name not in self.measurements:
            raise BadArgument(f"no {name!r} in this comparison; it has {', '.join(self.measurements)}")
        base, other = self.measurements[self.baseline], self.measurements[name]
        value, low, high = self._interval(other)
        noise, floor = 1.0, self.floor.floor
        if "noisy" in (base.verdict, other.verdict):
            machine = max(each.noise.max_slowdown(each.machine, each.procedure.threads) for each in (base, other))
            tails = [percentile(each.latencies_ns, 0.9) / percentile(each.latencies_ns, 0.1) for each in (base, other)]
            noise = machine * (1 + floor) * max(tails)
        return Ratio(value=value, low=low, high=high, floor=floor, noise=noise)

    def sentences(self) -> list[str]:
        """One sentence for each call but the baseline."""
        return [self.ratio(name).describe(name, self.baseline) for name in list(self.measurements)[1:]]

    def _interval(self, other: Measurement) -> tuple[float, float, float]:
        base = self.measurements[self.baseline]
        return paired_ratio_interval(base.latencies_ns, other.latencies_ns, base.procedure.seed)


def compare(
    calls: Mapping[str, Call],
    procedure: Procedure,
    subjects: Mapping[str, Mapping[str, Any]] | None = None,
    instruments: Instruments | None = None,
) -> Comparison:
    """Time the calls against the first of them, interleaved; `subjects` say what they are, under the same names.

    `procedure.samples` is the number of rounds. Every subject is given its name as `name`.
    """
    if len(calls) < 2:
        raise BadArgument(f"a comparison needs two calls or more; got {len(calls)}")
    if unknown := set(subjects or {}) - set(calls):
        raise BadArgument(f"subjects are named {sorted(unknown)}, but the calls are {list(calls)}")
    measured, twin = _measure_together(calls, procedure, subjects or {}, instruments or Instruments())
    return Comparison(measurements=measured, twin=twin)


def measure_noise_floor(call: Call, procedure: Procedure, instruments: Instruments | None = None) -> Ratio:
    """The self-test: a call against itself. Its `floor` is the least difference that this machine can show now."""
    return compare_with_itself(call, procedure, {"name": "a"}, instruments).floor


def compare_with_itself(
    call: Call, procedure: Procedure, subject: Mapping[str, Any], instruments: Instruments | None = None
) -> Comparison:
    """The same with all that was measured: a comparison that holds its baseline, named by the subject, and its twin."""
    name = str(subject["name"])
    measured, twin = _measure_together({name: call}, procedure, {name: subject}, instruments or Instruments())
    return Comparison(measurements=measured, twin=twin)


def with_injected_slowdown(call: Call, share: float, clock: Clock) -> Call:
    """The same call made slower by `share` of its time (0.05: 5 %), to see that a comparison finds it."""

    def slower() -> object:
        start = clock()
        answer = call()
        end = clock()
        until = end + share * (end - start)
        while clock() < until:
            pass
        return answer

    return slower


def pool_ratios(comparisons: Sequence[Comparison], name: str) -> Ratio:
    """The ratio of `name` over several processes, one comparison each: the process is the unit, not the sample.

    The median of the processes' ratios and a bootstrap interval over processes; at least five are needed (BadArgument).
    The floor is the same for the baseline's twin; what noise did to single processes is in the interval.
    """
    if len(comparisons) < _FEWEST_PROCESSES:
        raise BadArgument(f"pooling needs {_FEWEST_PROCESSES} comparisons or more; got {len(comparisons)}")
    seed = comparisons[0].twin.procedure.seed
    _, low, high = pooled_ratio_interval([each.floor.value for each in comparisons], seed)
    band = math.expm1(max(abs(math.log(low)), abs(math.log(high))))
    value, low, high = pooled_ratio_interval([each.ratio(name).value for each in comparisons], seed)
    return Ratio(value=value, low=low, high=high, floor=band)


def _measure_together(
    calls: Mapping[str, Call],
    procedure: Procedure,
    subjects: Mapping[str, Mapping[str, Any]],
    instruments: Instruments,
) -> tuple[dict[str, Measurement], Measurement]:
    if procedure.samples < FEWEST_ROUNDS:
        raise BadArgument(f"a comparison needs {FEWEST_ROUNDS} samples or more; got {procedure.samples}")
    names = list(calls)
    named = [{**subjects.get(name, {}), "name": name} for name in names]
    series = time_interleaved([*calls.values(), calls[names[0]]], procedure, instruments)
    *measured, twin = measurements_from_series([*named, named[0]], series, procedure, instruments)
    return dict(zip(names, measured, strict=True)), twin


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"
