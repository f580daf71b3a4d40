"""What else the machine was doing while it was measured, and when that is too much to trust a figure."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onefold.bench.machine import Machine, current_mhz, load_average

_SURE = 0.99
_RESAMPLES = 2000
_LEVEL = 0.95
_AT_ONCE = 1_000_000  # resampled values held in memory


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the samples lie, linear between the two nearest samples."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def percentile_confidence_bound(samples: Sequence[float], share: float) -> float | None:
    """A value that is, 99 % sure, no better than the true percentile: for the tail that `share` (0 to 1) points to.

    For share >= 0.5 it lies at or above the true percentile, for share < 0.5 at or below. None where the samples are
    too few to say: p90 needs 64, p99 needs 662. Source: the early-stopping estimate of MLPerf's LoadGen.
    """
    upper = share >= 0.5
    left_out = max_discarded_samples(len(samples), share if upper else 1 - share)
    if left_out is None:
        return None
    ordered = sorted(samples)
    return ordered[-1 - left_out] if upper else ordered[left_out]


def max_discarded_samples(count: int, share: float, sure: float = _SURE) -> int | None:
    """How many of the `count` largest samples may be left out before the largest left is read off as the percentile.

    t - 1, where t is the largest number with BinomialCDF(t; count, 1 - share) <= 1 - sure; None where no t >= 1 has.
    """
    logs = math.log(share), math.log1p(-share)
    total, most = 0.0, -1
    for over in range(count + 1):
        ways = math.lgamma(count + 1) - math.lgamma(over + 1) - math.lgamma(count - over + 1)
        total += math.exp(ways + over * logs[1] + (count - over) * logs[0])
        if total > 1 - sure:
            break
        most = over
    return most - 1 if most >= 1 else None


def paired_ratio_interval(a: Sequence[float], b: Sequence[float], seed: int) -> tuple[float, float, float]:
    """The ratio b / a and its 95 % interval (value, low, high), from samples a[i] and b[i] of the same round i.

    The value is exp(median(log b[i] - log a[i])). What slows a whole round cancels in its pair, so on a machine that
    drifts the interval is far narrower than that of the ratio of the two medians. The bootstrap draws whole stretches
    of n^(1/3) rounds (circular blocks), since neighbouring rounds are alike.
    """
    logs = np.log(np.asarray(b, dtype=np.float64)) - np.log(np.asarray(a, dtype=np.float64))
    low, high = _interval(logs, max(1, round(len(logs) ** (1 / 3))), seed)
    return math.exp(float(np.median(logs))), math.exp(low), math.exp(high)


def pooled_ratio_interval(ratios: Sequence[float], seed: int) -> tuple[float, float, float]:
    """The median of independent ratios (one a process) and its 95 % bootstrap interval: (value, low, high)."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    low, high = _interval(logs, 1, seed)
    return math.exp(float(np.median(logs))), math.exp(low), math.exp(high)


def _interval(values: npt.NDArray[np.float64], block: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the median of `values` (n,), drawn in circular blocks."""
    random = np.random.default_rng(seed)
    count = len(values)
    rows = max(1, _AT_ONCE // count)
    medians = []
    for first in range(0, _RESAMPLES, rows):
        starts = random.integers(0, count, size=(min(rows, _RESAMPLES - first), -(-count // block), 1))
        drawn = (starts + np.arange(block)) % count
        medians.append(np.median(values[drawn.reshape(len(drawn), -1)[:, :count]], axis=1))
    low, high = np.quantile(np.concatenate(medians), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


# pyperf calls a benchmark unstable at a standard deviation of 10 % of the mean or an extreme 50 % off it, on some sixty
# averaged values. On a thousand single calls one hiccup is normal, so the deviation is read off p90 - p10 (2.563
# standard deviations of a normal distribution), and extremes count once they are more than one in a hundred.
_MOST_DEVIATION = 0.10
_DEVIATIONS_P10_TO_P90 = 2.563
_FAR_OFF = 1.5
_MOST_FAR_OFF = 0.01
_MOST_STEAL = 0.01
_MOST_TREND = 0.05
_MOST_OTHERS = 0.25
_MOST_CLOCK = 0.05
_FEWEST_FOR_TREND = 64
_FEWEST_TICKS = 20


@dataclass(frozen=True, kw_only=True)
class SystemCounters:
    """One look at the system's counters, since its start. None where the system does not say.

    Ticks count the time of all `host_cores` together; `own_ns` is this process's processor time, `at_ns` the time of
    the look, `mhz` the clock of the quickest core.
    """

    load: float | None = None
    switches: int | None = None
    stolen_ticks: int | None = None
    busy_ticks: int | None = None
    ticks: int | None = None
    host_cores: int = 1
    own_ns: int = 0
    at_ns: int = 0
    mhz: float | None = None

    @classmethod
    def read(cls, root: Path = Path("/")) -> SystemCounters:
        """Read them all; `root` is where /proc is."""
        stolen, busy, ticks, cores = _ticks(root)
        return cls(
            load=load_average(root),
            switches=_switches(),
            stolen_ticks=stolen,
            busy_ticks=busy,
            ticks=ticks,
            host_cores=cores,
            own_ns=time.process_time_ns(),
            at_ns=time.monotonic_ns(),
            mhz=current_mhz(root),
        )


@dataclass(frozen=True, kw_only=True)
class TimingNoise:
    """What happened between two looks.

    `switches`: how often this process lost its core to another. `steal`: the share (0 to 1) of all cores' time that a
    hypervisor took. `others`: how many cores' worth of time other processes used. `mhz_before` and `mhz_after`:
    the clock of the quickest core at either end. `remarks` are the caller's sentences about what else speaks
    against the figures, such as a phone's heat.
    """

    load_before: float | None = None
    load_after: float | None = None
    switches: float | None = None
    steal: float | None = None
    others: float | None = None
    mhz_before: float | None = None
    mhz_after: float | None = None
    remarks: tuple[str, ...] = ()

    @classmethod
    def from_counters(cls, before: SystemCounters, after: SystemCounters) -> TimingNoise:
        """The difference of two looks; shares are None when too little time passed to tell."""
        ticks = _difference(before.ticks, after.ticks)
        enough = ticks is not None and ticks >= _FEWEST_TICKS
        stolen = _difference(before.stolen_ticks, after.stolen_ticks)
        return cls(
            load_before=before.load,
            load_after=after.load,
            switches=_difference(before.switches, after.switches),
            steal=stolen / ticks if enough and ticks and stolen is not None else None,
            others=_others(before, after) if enough else None,
            mhz_before=before.mhz,
            mhz_after=after.mhz,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TimingNoise:
        """The inverse of `to_dict`."""
        known = {each.name: plain.get(each.name) for each in fields(cls) if each.name != "remarks"}
        numbers = {name: None if value is None else float(value) for name, value in known.items()}
        return cls(**numbers, remarks=tuple(str(each) for each in plain.get("remarks", ())))

    def reasons(self, samples: Sequence[float], machine: Machine, threads: int) -> tuple[str, ...]:
        """Why a figure from these samples is not to be trusted, one sentence each; empty when it is."""
        of_machine = (*_of_load(self, machine.available_cores, threads), *_of_others(self, machine.available_cores))
        return (*self.remarks, *of_machine, *_of_samples(samples))

    def max_slowdown(self, machine: Machine, threads: int) -> float:
        """By what factor what else the machine did may have slowed a call at the most; 1 where it did nothing.

        Each counts as if the call had lost what others got: the cores that others used (the load, where that is not
        known), the time that a hypervisor took, the clock's change, threads without a core of their own. A remark, of
        which the effect is not known, counts as a factor of 2.
        """
        cores, load = machine.available_cores, max(self.load_before or 0.0, (self.load_after or 0.0) - threads)
        others = load if self.others is None else self.others
        clocks = (
            sorted((self.mhz_before or 1.0, self.mhz_after or 1.0)) if self.mhz_before and self.mhz_after else (1, 1)
        )
        taken = 1 / max(1e-3, 1 - (self.steal or 0.0))
        return (
            (1 + others / cores)
            * taken
            * (clocks[1] / clocks[0])
            * max(1.0, threads / cores)
            * (2.0 if self.remarks else 1.0)
        )


def _of_load(noise: TimingNoise, cores: float, threads: int) -> list[str]:
    """The load rule: more than half the cores; where other processes' time is known, on top of this process's own."""
    allowed = cores / 2 + (0 if noise.others is None else threads)
    found = []
    if noise.load_before is not None and noise.load_before > allowed:
        found.append(f"The machine was busy before: load {noise.load_before:.2f} on {cores:g} cores.")
    if noise.load_after is not None and noise.load_after > cores / 2 + threads:
        found.append(
            f"The machine was busy after: load {noise.load_after:.2f} on {cores:g} cores, this run's included."
        )
    if threads > cores:
        found.append(f"{threads} threads shared {cores:g} cores.")
    return found


def _of_others(noise: TimingNoise, cores: float) -> list[str]:
    found = []
    if noise.others is not None and noise.others > _MOST_OTHERS * cores:
        found.append(f"Other programs used {noise.others:.1f} of {cores:g} cores meanwhile.")
    if noise.steal is not None and noise.steal > _MOST_STEAL:
        found.append(f"The hypervisor took {100 * noise.steal:.1f} % of the time for others.")
    clocks = noise.mhz_before, noise.mhz_after
    if clocks[0] and clocks[1] and abs(math.log(clocks[1] / clocks[0])) > _MOST_CLOCK:
        found.append(f"The processor's clock went from {clocks[0]:.0f} to {clocks[1]:.0f} MHz meanwhile.")
    return found


def _of_samples(samples: Sequence[float]) -> list[str]:
    found = []
    median = percentile(samples, 0.5)
    deviation = (percentile(samples, 0.9) - percentile(samples, 0.1)) / (_DEVIATIONS_P10_TO_P90 * median)
    if deviation >= _MOST_DEVIATION:
        found.append(f"The samples scatter: their standard deviation is {100 * deviation:.0f} % of the median.")
    far = sum(sample >= _FAR_OFF * median for sample in samples) / len(samples)
    if far > _MOST_FAR_OFF:
        found.append(f"{100 * far:.1f} % of the samples took more than {_FAR_OFF:g} times the median.")
    trend = _trend(samples, median)
    if abs(trend) >= _MOST_TREND:
        change = "slower" if trend > 0 else "faster"
        found.append(f"It did not hold still: the second half ran {100 * abs(trend):.0f} % {change} than the first.")
    return found


def _trend(samples: Sequence[float], median: float) -> float:
    """How much the median of the second half differs from the first's, as a share of the whole's."""
    if len(samples) < _FEWEST_FOR_TREND:
        return 0.0
    half = len(samples) // 2
    return (percentile(samples[half:], 0.5) - percentile(samples[:half], 0.5)) / median


def _others(before: SystemCounters, after: SystemCounters) -> float | None:
    busy, ticks = _difference(before.busy_ticks, after.busy_ticks), _difference(before.ticks, after.ticks)
    passed = after.at_ns - before.at_ns
    if busy is None or not ticks or passed <= 0:
        return None
    return max(0.0, busy / ticks * after.host_cores - (after.own_ns - before.own_ns) / passed)


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _ticks(root: Path) -> tuple[int | None, int | None, int | None, int]:
    """(stolen, busy, all) ticks since the start of the system, over all cores, and their number: /proc/stat."""
    try:
        lines = (root / "proc/stat").read_text().splitlines()
    except OSError:
        return None, None, None, 1
    words = lines[0].split() if lines else []
    if len(words) < 9:
        return None, None, None, 1
    counts = [int(word) for word in words[1:9]]
    _user, _nice, _system, idle, waiting, _irq, _softirq, stolen = counts
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return stolen, sum(counts) - idle - waiting - stolen, sum(counts), max(1, cores)


def _switches() -> int | None:
    try:
        resource = importlib.import_module("resource")  # not on Windows
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)
