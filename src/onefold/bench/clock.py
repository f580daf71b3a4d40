"""A stopwatch: how long a call takes, with the raw samples, the procedure and the machine in the result.

One sample is the time of one call, or of several calls back to back where one is too short for the clock. Warm-up is
fixed before any data is seen, no sample is ever dropped, and garbage is not collected while the clock runs.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from onefold.bench.machine import Machine
from onefold.bench.measurement import Measurement, Procedure, settled
from onefold.bench.noise import Noise, Vitals
from onefold.bench.statistics import percentile

Call = Callable[[], object]
Clock = Callable[[], int]

_TICKS_A_SAMPLE = 1000
_MOST_REPEATS = 1_000_000
_KEPT_WARMUP = 50


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What a measurement reads: a clock in nanoseconds, the system's counters, and the machine itself."""

    clock: Clock = time.perf_counter_ns
    vitals: Callable[[], Vitals] = Vitals.now
    machine: Machine = field(default_factory=Machine.this)


@dataclass(frozen=True)
class Timing:
    """The raw times of one call in a series of rounds: sample i was taken in round i."""

    samples_ns: tuple[int, ...]
    warmup_ns: tuple[int, ...]
    calls_per_sample: int


@dataclass(frozen=True)
class Series:
    """The times of several calls measured together, and what the clock and the machine did meanwhile."""

    timings: tuple[Timing, ...]
    resolution_ns: int
    overhead_ns: int
    noise: Noise


def measure(
    call: Call,
    procedure: Procedure,
    subject: Mapping[str, Any] | None = None,
    instruments: Instruments | None = None,
) -> Measurement:
    """Time `call`; whatever it raises passes through. `subject` is kept; BadArgument where it is not fit for JSON."""
    instruments = instruments or Instruments()
    plain = settled(subject or {})  # before the long run, not after it
    (measurement,) = as_measurements([plain], run_series([call], procedure, instruments), procedure, instruments)
    return measurement


def as_measurements(
    subjects: Sequence[Mapping[str, Any]], series: Series, procedure: Procedure, instruments: Instruments
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


def run_series(calls: Sequence[Call], procedure: Procedure, instruments: Instruments) -> Series:
    """Time the calls in rounds: each once a round after its lead calls, in an order drawn anew (see `orders`)."""
    clock = instruments.clock
    lead = range(procedure.lead_calls if len(calls) > 1 else 0)  # one alone follows itself in any case
    resolution = _resolution(clock)
    order = orders(len(calls), random.Random(procedure.seed))
    samples: list[list[int]] = [[] for _ in calls]
    with _no_garbage_collection():
        overhead = sorted(_time(_nothing, 1, clock) for _ in range(101))[50]
        warmups = _warm_up(calls, procedure, clock)
        repeats = [_repeats(warmup, resolution) for warmup in warmups]
        before = instruments.vitals()
        start = clock()
        enough = procedure.min_seconds * 1e9 * len(calls)
        while len(samples[0]) < procedure.samples or clock() - start < enough:
            for which in next(order):
                for _ in lead:
                    calls[which]()
                samples[which].append(_time(calls[which], repeats[which], clock))
        after = instruments.vitals()
    timings = (
        Timing(tuple(sample), tuple(warmup[:_KEPT_WARMUP]), repeat)
        for sample, warmup, repeat in zip(samples, warmups, repeats, strict=True)
    )
    return Series(tuple(timings), resolution, overhead, Noise.between(before, after))


def orders(count: int, random_source: random.Random) -> Iterator[tuple[int, ...]]:
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
