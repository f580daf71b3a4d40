"""The least time that a network can take on a machine, from what the machine was measured to do (see `peaks`).

A call that does `macs` multiply-adds and reads `num_bytes` takes at least as long as the quicker of doing only the one
and only the other. Source: Williams, Waterman and Patterson, "Roofline", CACM 2009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# What arithmetic a precision is computed in; where the processor has no such arithmetic, the next one serves.
_ARITHMETIC = {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "int8": ("int8",)}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A rate that was measured: `kind` is fp32, bf16 or int8 (multiply-adds a second), or read (bytes a second).

    `median` is that of several runs, `best` the quickest of them: what disturbs a run only slows it. `how` names the
    instruction or the library. `num_bytes` is the size of what was read again and again, by all threads together.
    """

    kind: str
    threads: int
    median: float
    best: float
    how: str
    num_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call must do at the least: multiply-adds, and the bytes of weights, input and output that it reads."""

    macs: int
    num_bytes: int
    precision: str
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time that one call can take, in nanoseconds, by each limit alone; None where that is not known."""

    compute_ns: float | None = None
    memory_ns: float | None = None
    how: str = ""

    @property
    def ns(self) -> float | None:
        """The least time; None where the arithmetic was not measured, since memory alone is no limit worth its name."""
        return None if self.compute_ns is None else max(self.compute_ns, self.memory_ns or 0.0)

    @property
    def side(self) -> Literal["compute", "memory"]:
        """Which of the two binds."""
        return "memory" if (self.memory_ns or 0.0) > (self.compute_ns or 0.0) else "compute"

    def fraction(self, latency_ns: float) -> float | None:
        """What share (0 to 1) of the machine's limit a call reaches that takes this long."""
        return None if self.ns is None else self.ns / latency_ns

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Bound:
        """The inverse of `to_dict`."""
        known = {name: plain.get(name) for name in ("compute_ns", "memory_ns")}
        real = {name: None if value is None else float(value) for name, value in known.items()}
        return cls(how=str(plain.get("how", "")), **real)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What a machine was measured to do at the most, and the `features` that its processor had then."""

    limits: tuple[Limit, ...]
    features: tuple[str, ...] = ()

    @property
    def threads(self) -> tuple[int, ...]:
        """For which numbers of threads it was measured."""
        return tuple(sorted({limit.threads for limit in self.limits}))

    def bound(self, work: Work) -> Bound:
        """The least time of this work. Bytes are read at the speed of the smallest place measured that holds them."""
        kinds = _ARITHMETIC.get(work.precision.split("-")[0], ())
        compute = next((limit for kind in kinds for limit in self._of(kind, work.threads)), None)
        places = sorted(self._of("read", work.threads), key=lambda limit: limit.num_bytes or 0)
        memory = next((limit for limit in places if work.num_bytes <= (limit.num_bytes or 0)), (*places[-1:], None)[0])
        return Bound(
            compute_ns=None if compute is None else 1e9 * work.macs / compute.best,
            memory_ns=None if memory is None else 1e9 * work.num_bytes / memory.best,
            how="" if compute is None else compute.how,
        )

    def with_limits(self, limits: Sequence[Limit]) -> Roofline:
        """The same machine with further limits; of two for one thing the quicker stays."""
        found = {(limit.kind, limit.threads, limit.num_bytes): limit for limit in self.limits}
        for limit in limits:
            key = (limit.kind, limit.threads, limit.num_bytes)
            found[key] = max(limit, found.get(key, limit), key=lambda each: each.best)
        return Roofline(limits=tuple(found.values()), features=self.features)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"features": list(self.features), "limits": [asdict(limit) for limit in self.limits]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Roofline:
        """The inverse of `to_dict`; raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            limits=tuple(_limit(each) for each in plain["limits"]),
            features=tuple(str(name) for name in plain["features"]),
        )

    def _of(self, kind: str, threads: int) -> list[Limit]:
        return [limit for limit in self.limits if limit.kind == kind and limit.threads == threads]


def _limit(plain: Mapping[str, Any]) -> Limit:
    num_bytes = plain.get("num_bytes")
    limit = Limit(
        kind=str(plain["kind"]),
        threads=int(plain["threads"]),
        median=float(plain["median"]),
        best=float(plain["best"]),
        how=str(plain["how"]),
        num_bytes=None if num_bytes is None else int(num_bytes),
    )
    if not 0 < limit.median <= limit.best < 1e18:
        raise ValueError(f"a rate must be above 0 and its best run no slower than its median, not {plain!r}")
    return limit
