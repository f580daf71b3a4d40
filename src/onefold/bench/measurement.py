"""A measurement as a value: what was measured, where, how, and every sample of it."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from onefold.bench.cold_start import ColdStart
from onefold.bench.machine import Machine
from onefold.bench.roofline import LatencyBound
from onefold.bench.timing_noise import SystemCounters, TimingNoise, percentile, percentile_confidence_bound
from onefold.errors import BadArgument, BadData

_progress = logging.getLogger("onefold.progress")

_CENTURY_NS = 100 * 366 * 24 * 3600 * 10**9


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """How to measure. Both of a pair (calls and seconds, samples and seconds) are reached before it ends.

    `threads` is what the calls were told to use: a record, and a part of the verdict on noise. `seed` draws the order
    of calls in a comparison and the resamples of its interval. MLPerf's single stream asks for 1024 samples and 60 s.
    In a comparison each timed call follows `lead_calls` of its own that are not timed, as in a stream of images: what
    the one before it left in the caches would depend on whom it is compared with.
    """

    warmup_calls: int = 20
    warmup_seconds: float = 1.0
    lead_calls: int = 2
    samples: int = 1024
    min_seconds: float = 0.0
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("warmup_calls", 1), ("lead_calls", 0), ("samples", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BadArgument(f"{name} must be a whole number, {least} or more; got {value!r}")
        for name in ("warmup_seconds", "min_seconds"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise BadArgument(f"{name} must be a number of seconds, 0 or more; got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Procedure:
        """The inverse of `to_dict`; unknown keys, of a later version, are left out. Older rows had no lead calls."""
        known = {name.name: plain[name.name] for name in fields(cls) if name.name in plain}
        return cls(**{"lead_calls": 0, **known})


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing measured once.

    `subject` says what was measured: model, runtime, precision, fused, input_shape, batch, params, macs, drift,
    sha256 ... `samples_ns` are the raw times, each of `calls_per_sample` calls; `warmup_ns` those of the first calls,
    the cold one first. `bound` is the least time that this machine could take, `cold` what a fresh process saw. All
    properties below are for one call, in nanoseconds.
    """

    subject: Mapping[str, Any]
    machine: Machine
    procedure: Procedure
    samples_ns: tuple[int, ...]
    calls_per_sample: int = 1
    warmup_ns: tuple[int, ...] = ()
    resolution_ns: int = 1
    overhead_ns: int = 0
    noise: TimingNoise = field(default_factory=TimingNoise)
    bound: LatencyBound | None = None
    cold: ColdStart | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.subject, Mapping):
            raise BadData(f"the subject of a measurement is a mapping of names to values; got {self.subject!r}")
        object.__setattr__(self, "subject", _as_tuples(self.subject))
        whole = all(isinstance(each, int) for each in (*self.samples_ns, *self.warmup_ns, self.calls_per_sample))
        sane = whole and self.samples_ns and min(self.samples_ns) > 0 and max(self.samples_ns) < _CENTURY_NS
        if not sane or self.calls_per_sample < 1:
            raise BadData("a measurement needs samples, each a whole number of ns above 0; is the clock broken?")

    @cached_property
    def latencies_ns(self) -> tuple[float, ...]:
        """The time of one call, sample by sample."""
        return tuple(sample / self.calls_per_sample for sample in self.samples_ns)

    @property
    def median_ns(self) -> float:
        """Half of the calls were at most this long."""
        return percentile(self.latencies_ns, 0.5)

    @property
    def min_ns(self) -> float:
        """The shortest."""
        return min(self.latencies_ns)

    @property
    def p10_ns(self) -> float | None:
        """99 % sure: at most one call in ten is shorter. None when the samples are too few to say."""
        return self._sure(0.10)

    @property
    def p90_ns(self) -> float | None:
        """99 % sure: nine calls in ten are no longer. None with fewer than 64 samples, or samples of several calls."""
        return self._sure(0.90)

    @property
    def p99_ns(self) -> float | None:
        """99 % sure: 99 calls in 100 are no longer. None with fewer than 662 samples, or samples of several calls."""
        return self._sure(0.99)

    @property
    def spread(self) -> float:
        """The width of the middle 80 % of the samples, as a share of the median."""
        return (percentile(self.latencies_ns, 0.9) - percentile(self.latencies_ns, 0.1)) / self.median_ns

    @property
    def roofline_share(self) -> float | None:
        """What share (0 to 1) of the machine's measured limit the median reaches; None where that is not known."""
        return None if self.bound is None else self.bound.fraction(self.median_ns)

    @property
    def beats_roofline(self) -> bool:
        """Whether its quickest call took less than the least time: the limit was measured on a busier machine, then.

        Or the runtime saves multiplications, as Winograd's convolutions do.
        """
        return self.bound is not None and (self.bound.fraction(self.min_ns) or 0.0) > 1

    @property
    def verdict(self) -> Literal["quiet", "noisy"]:
        """Whether the machine was quiet enough to trust the figures; `reasons` say why not."""
        return "noisy" if self.reasons else "quiet"

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """What speaks against the figures, one sentence each."""
        return self.noise.reasons(self.latencies_ns, self.machine, self.procedure.threads)

    def _sure(self, share: float) -> float | None:
        # The mean of several calls hides their tail.
        return percentile_confidence_bound(self.latencies_ns, share) if self.calls_per_sample == 1 else None


def _as_tuples(value: Any, place: str = "subject") -> Any:
    """The same plain values, with tuples for sequences, as JSON gives them back; BadArgument for others."""
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _as_tuples(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_as_tuples(item, place) for item in value)
    raise BadArgument(f"{place} must be made of names, numbers that are finite, true, false and lists; got {value!r}")


Call = Callable[[], object]
Clock = Callable[[], int]

_TICKS_A_SAMPLE = 1000
_MOST_REPEATS = 1_000_000
_KEPT_WARMUP = 50
_TOLD_EVERY = 20  # rounds: how far a measurement is, between two of them


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What a measurement reads: a clock in nanoseconds, the system's counters, and the machine itself."""

    clock: Clock = time.perf_counter_ns
    vitals: Callable[[], SystemCounters] = SystemCounters.read
    machine: Machine = field(default_factory=Machine.detect)


@dataclass(frozen=True)
class _Timing:
    """The raw times of one call in a series of rounds: sample i was taken in round i."""

    samples_ns: tuple[int, ...]
    warmup_ns: tuple[int, ...]
    calls_per_sample: int


@dataclass(frozen=True)
class _Series:
    """The times of several calls measured together, and what the clock and the machine did meanwhile."""

    timings: tuple[_Timing, ...]
    resolution_ns: int
    overhead_ns: int
    noise: TimingNoise


def measure(
    call: Call,
    procedure: Procedure,
    subject: Mapping[str, Any] | None = None,
    instruments: Instruments | None = None,
) -> Measurement:
    """Time `call`; whatever it raises passes through. `subject` is kept; BadArgument where it is not fit for JSON."""
    instruments = instruments or Instruments()
    plain = _as_tuples(subject or {})  # before the long run, not after it
    (measurement,) = measurements_from_series(
        [plain], time_interleaved([call], procedure, instruments), procedure, instruments
    )
    return measurement


def measurements_from_series(
    subjects: Sequence[Mapping[str, Any]], series: _Series, procedure: Procedure, instruments: Instruments
) -> list[Measurement]:
    """One measurement for each call of a series."""
    return [
        Measurement(
            subject=subject,
            machine=instruments.machine,
            procedure=procedure,
            samples_ns=timing.samples_ns,
            calls_per_sample=timing.calls_per_sample,
            warmup_ns=timing.warmup_ns,
            resolution_ns=series.resolution_ns,
            overhead_ns=series.overhead_ns,
            noise=series.noise,
        )
        for subject, timing in zip(subjects, series.timings, strict=True)
    ]


def time_interleaved(calls: Sequence[Call], procedure: Procedure, instruments: Instruments) -> _Series:
    """Time the calls in rounds: each once a round after its lead calls, in an order drawn anew."""
    clock = instruments.clock
    lead = range(procedure.lead_calls if len(calls) > 1 else 0)  # one alone follows itself in any case
    resolution = _resolution(clock)
    order = random_orders(len(calls), random.Random(procedure.seed))
    samples: list[list[int]] = [[] for _ in calls]
    with _no_garbage_collection():
        overhead = sorted(_time(_nothing, 1, clock) for _ in range(101))[50]
        _progress.debug("warming up")
        warmups = _warm_up(calls, procedure, clock)
        repeats = [_repeats(warmup, resolution) for warmup in warmups]
        before = instruments.vitals()
        start = clock()
        enough = procedure.min_seconds * 1e9 * len(calls)
        while len(samples[0]) < procedure.samples or clock() - start < enough:
            if not len(samples[0]) % _TOLD_EVERY and len(samples[0]) < procedure.samples:
                _progress.debug("calls of each", extra={"done": len(samples[0]), "total": procedure.samples})
            for which in next(order):
                for _ in lead:
                    calls[which]()
                samples[which].append(_time(calls[which], repeats[which], clock))
        after = instruments.vitals()
    _progress.debug("calls are timed", extra={"done": 1, "total": 1})
    timings = (
        _Timing(tuple(sample), tuple(warmup[:_KEPT_WARMUP]), repeat)
        for sample, warmup, repeat in zip(samples, warmups, repeats, strict=True)
    )
    return _Series(tuple(timings), resolution, overhead, TimingNoise.from_counters(before, after))


def random_orders(count: int, random_source: random.Random) -> Iterator[tuple[int, ...]]:
    """Orders of `count` calls, without end: random, and balanced in every `count` successive rounds.

    In such a block each call stands once in each place (the rotations of one shuffle, shuffled), so that neither the
    first place nor a drift of the machine favours one.
    """
    while True:
        shuffled = random_source.sample(range(count), count)
        for turn in random_source.sample(range(count), count):
            yield tuple(shuffled[turn:] + shuffled[:turn])


def _time(call: Call, repeats: int, clock: Clock) -> int:
    if repeats == 1:  # no loop between the two readings
        start = clock()
        call()
        return clock() - start
    turns = range(repeats)
    start = clock()
    for _ in turns:
        call()
    return clock() - start


def _warm_up(calls: Sequence[Call], procedure: Procedure, clock: Clock) -> list[list[int]]:
    """The first times of each call, until each was called often enough and for long enough, in turns."""
    times: list[list[int]] = [[] for _ in calls]
    start = clock()
    enough = procedure.warmup_seconds * 1e9 * len(calls)
    while len(times[0]) < procedure.warmup_calls or clock() - start < enough:
        for which, call in enumerate(calls):
            times[which].append(_time(call, 1, clock))
    return times


def _repeats(warmup: Sequence[int], resolution: int) -> int:
    """How many calls make one sample: one, unless a call is shorter than 1000 steps of the clock."""
    usual = max(1.0, percentile(warmup[len(warmup) // 2 :], 0.5))
    return min(_MOST_REPEATS, max(1, math.ceil(_TICKS_A_SAMPLE * resolution / usual)))


def _resolution(clock: Clock) -> int:
    """The smallest step between two readings of the clock, in nanoseconds."""
    readings = [clock() for _ in range(1000)]
    steps = [later - earlier for earlier, later in itertools.pairwise(readings) if later > earlier]
    return min(steps, default=1)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _nothing() -> None:
    return None
