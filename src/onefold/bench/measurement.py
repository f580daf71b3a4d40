"""A measurement as a value: what was measured, where, how, and every sample of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from onefold.bench.cold_start import Cold
from onefold.bench.energy import Energy
from onefold.bench.machine import Machine
from onefold.bench.noise import Noise
from onefold.bench.roofline import Bound
from onefold.bench.statistics import percentile, sure_percentile
from onefold.errors import BadArgument, BadData

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
    noise: Noise = field(default_factory=Noise)
    bound: Bound | None = None
    cold: Cold | None = None
    energy: Energy | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.subject, Mapping):
            raise BadData(f"the subject of a measurement is a mapping of names to values; got {self.subject!r}")
        object.__setattr__(self, "subject", settled(self.subject))
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
    def roofline(self) -> float | None:
        """What share (0 to 1) of the machine's measured limit the median reaches; None where that is not known."""
        return None if self.bound is None else self.bound.fraction(self.median_ns)

    @property
    def beats_limit(self) -> bool:
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
        return sure_percentile(self.latencies_ns, share) if self.calls_per_sample == 1 else None


def settled(value: Any, place: str = "subject") -> Any:
    """The same plain values, with tuples for sequences, as JSON gives them back; BadArgument for others."""
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: settled(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(settled(item, place) for item in value)
    raise BadArgument(f"{place} must be made of names, numbers that are finite, true, false and lists; got {value!r}")
