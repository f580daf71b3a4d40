"""The least time that a network can take on a machine, from what the machine was measured to do (PeakRate, Roofline).

A call that does `macs` multiply-adds and reads `num_bytes` takes at least as long as the quicker of doing only the one
and only the other. Source: Williams, Waterman and Patterson, "Roofline", CACM 2009."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Barrier
from typing import Any, Literal

import numpy as np

from onefold.bench.machine import Machine
from onefold.cpp_extension import is_native_disabled, load_library
from onefold.errors import describe_exit_status

_ARITHMETIC_KINDS = ("fp32", "bf16", "int8")
_KINDS = (*_ARITHMETIC_KINDS, "read")
_RUNS = 5
_RUN_NS = 50_000_000
_PROBE_NS = 5_000_000
_PROBES = 5
_LARGE = 256 << 20  # bytes, and four times the largest cache where that is more: no cache holds it
_LIMIT_S = 300
_SINGLE = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

_Amounts = tuple[int, int]  # how much was done, and in how many nanoseconds
_Turn = Callable[[int], _Amounts]  # does it for at least so many nanoseconds


def measure_roofline(threads: Sequence[int], kinds: Sequence[str] = _KINDS) -> Roofline:
    """What this machine can do with each of these numbers of threads; some seconds for each.

    Reading memory takes most of it, since no cache may hold what is read; `kinds` are those to measure of fp32, bf16,
    int8 and read.

    Every limit is measured in five runs of 50 ms or more, in a process of its own, so that an instruction that the
    system forbids ends that process and not this one: what died is left out, and `notes` say so, as they say when
    numpy measured because the loops could not be compiled.
    """
    limits: list[PeakRate] = []
    notes: list[str] = []
    without: list[str] = []  # variants that died
    plain = _library() is None  # compiled here, so that the warning of a missing compiler is this process's
    if plain:
        notes.append("without compiled loops numpy's product and copy are measured: bf16 and int8 are not known")
    while True:
        order = {"threads": list(threads), "kinds": list(kinds), "without": without, "plain": plain}
        command = [sys.executable, "-c", "from onefold.bench.roofline import main; main()", json.dumps(order)]
        environment = {**os.environ, **dict.fromkeys(_SINGLE, "1")}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, env=environment)
            output, ended = done.stdout, describe_exit_status(done.returncode) if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            ended = f"took longer than {_LIMIT_S} s"
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
        limits = [_limit_from_dict(line["limit"]) for line in lines if "limit" in line]
        if not ended:
            break
        last = lines[-1].get("trying") if lines else None
        if last and not plain:
            without.append(last)
            notes.append(f"{last} is left out: its loop {ended}")
        elif not plain:
            plain = True
            notes.append(
                f"the compiled loops {ended}: numpy's product and copy are measured, bf16 and int8 are not known"
            )
        else:
            notes.append(f"numpy's product {ended}: what was not measured is not known")
            break
    return Roofline(limits=tuple(limits), features=Machine.detect(packages=()).features, notes=tuple(notes))


def cache_sizes(root: Path = Path("/")) -> tuple[tuple[int, bool], ...]:
    """(bytes, whether cores share it) of the second- and third-level caches; usual sizes where the system is silent."""
    found: dict[int, tuple[int, bool]] = {}
    for folder in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with suppress(OSError, ValueError):
            level = int((folder / "level").read_text())
            size = (folder / "size").read_text().strip()
            shared = (folder / "shared_cpu_list").read_text().strip()
            found[level] = (
                int(size.rstrip("KM")) << (20 if size.endswith("M") else 10),
                "," in shared or "-" in shared,
            )
    return tuple(found[level] for level in sorted(found) if level >= 2) or ((1 << 20, False),)


def _measure_limits(
    threads: int,
    kinds: Sequence[str] = _KINDS,
    *,
    without: Sequence[str] = (),
    plain: bool = False,
    trying: Callable[[str], object] = lambda _: None,
) -> Iterator[PeakRate]:
    """Measure, in this process; `trying` hears the name of each loop before it runs, for it may be the last word."""
    library = None if plain else _library()
    if library is None:
        yield from _plain_limits(threads, kinds)
        return
    for kind, name in enumerate(_ARITHMETIC_KINDS):
        if name not in kinds:
            continue
        variants = {which: each for which, each in enumerate(_names(library, kind)) if each not in without}
        rates: dict[int, float] = {}
        for _ in range(_PROBES):  # in turns: others' work shifts
            for which, each in variants.items():
                trying(each)
                rate = _rate([_multiplying(library, kind, which)], _PROBE_NS)
                rates[which] = max(rate, rates.get(which, 0.0))
        if rates:
            chosen = max(rates, key=lambda which: rates[which])
            trying(variants[chosen])
            yield _limit(name, [_multiplying(library, kind, chosen)] * threads, variants[chosen])
    if "read" not in kinds:
        return
    places = _places(threads)
    buffers = [np.ones(max(places) // threads, dtype=np.uint8) for _ in range(threads)]
    for num_bytes in places:
        parts = [buffer[: num_bytes // threads] for buffer in buffers]
        yield _limit(
            "read",
            [_reading(library, part) for part in parts],
            "vector loads",
            sum(part.nbytes for part in parts),
        )


def _limit(kind: str, turns: Sequence[_Turn], how: str, num_bytes: int | None = None) -> PeakRate:
    """One turn a thread, all at once, again and again."""
    rates = [_rate(turns, _RUN_NS) for _ in range(_RUNS)]
    median, best = statistics.median(rates), max(rates)
    return PeakRate(kind=kind, threads=len(turns), median=median, best=best, how=how, num_bytes=num_bytes)


def _rate(turns: Sequence[_Turn], least_ns: int) -> float:
    """How much all turns do in a second, done at the same time by a thread each."""
    together = Barrier(len(turns))

    def one(turn: _Turn) -> float:
        together.wait()
        done, passed = turn(least_ns)
        return 1e9 * done / passed

    with ThreadPoolExecutor(len(turns)) as pool:
        return sum(pool.map(one, turns))


def _places(threads: int) -> list[int]:
    """How many bytes to read over and over: half of what each cache holds for them, and far more than any."""
    caches = [(size if shared else size * threads) // 2 for size, shared in cache_sizes()]
    return [*caches, max(_LARGE, 8 * max(caches))]


# ------------------------------------------------------------------------------ the compiled loops


def _library() -> ctypes.CDLL | None:
    """The loops, or None where they cannot be compiled; ONEFOLD_PEAKS=plain in the environment asks for None."""
    if is_native_disabled("ONEFOLD_PEAKS"):
        return None
    library = load_library("roofline")
    if library is not None:
        library.variant_name.restype = ctypes.c_char_p
    return library


def _names(library: ctypes.CDLL, kind: int) -> Iterator[str]:
    which = 0
    while (name := library.variant_name(kind, which)) is not None:
        yield name.decode()
        which += 1


def _multiplying(library: ctypes.CDLL, kind: int, which: int) -> _Turn:
    def turn(least_ns: int) -> _Amounts:
        out = (ctypes.c_int64 * 2)()
        library.multiply(kind, which, ctypes.c_int64(least_ns), out)
        return out[0], out[1]

    return turn


def _reading(library: ctypes.CDLL, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> _Turn:
    place = buffer.ctypes.data_as(ctypes.c_void_p)

    def turn(least_ns: int) -> _Amounts:
        out = (ctypes.c_int64 * 2)()
        library.read_all(place, ctypes.c_int64(buffer.nbytes), ctypes.c_int64(least_ns), out)
        return out[0], out[1]

    return turn


# ------------------------------------------------------------------------------ without a compiler


def _plain_limits(threads: int, kinds: Sequence[str]) -> Iterator[PeakRate]:
    if "fp32" in kinds:
        yield _limit("fp32", [_product(512) for _ in range(threads)], "numpy's matrix product")
    for num_bytes in _places(threads) if "read" in kinds else ():
        copies = [_copying(num_bytes // threads // 2) for _ in range(threads)]
        yield _limit("read", copies, "numpy's copy, bytes read and written", num_bytes)


def _product(side: int) -> _Turn:
    a, b, out = (np.full((side, side), 0.5, dtype=np.float32) for _ in range(3))
    return _repeating(lambda: np.matmul(a, b, out=out), side**3)


def _copying(num_bytes: int) -> _Turn:
    source, target = np.ones(num_bytes, dtype=np.uint8), np.zeros(num_bytes, dtype=np.uint8)
    return _repeating(lambda: np.copyto(target, source), 2 * num_bytes)


def _repeating(call: Callable[[], object], amount: int) -> _Turn:
    def turn(least_ns: int) -> _Amounts:
        start, calls = time.perf_counter_ns(), 0
        while not calls or time.perf_counter_ns() - start < least_ns:
            call()
            calls += 1
        return calls * amount, time.perf_counter_ns() - start

    return turn


def main() -> None:
    """What the process of its own runs: an order from the command line; a line of JSON for each loop and limit."""
    order = json.loads(sys.argv[1])

    def write(**line: Any) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()  # before what may end this process

    for number in order["threads"]:
        found = _measure_limits(
            number,
            order["kinds"],
            without=order["without"],
            plain=order["plain"],
            trying=lambda name: write(trying=name),
        )
        for limit in found:
            write(limit=asdict(limit))


# What arithmetic a precision is computed in; where the processor has no such arithmetic, the next one serves.
_ARITHMETIC = {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "int8": ("int8",)}


@dataclass(frozen=True, kw_only=True)
class PeakRate:
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
class Workload:
    """What one call must do at the least: multiply-adds, and the bytes of weights, input and output that it reads."""

    macs: int
    num_bytes: int
    precision: str
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class LatencyBound:
    """The least time that one call can take, in nanoseconds, by each limit alone; None where that is not known."""

    compute_ns: float | None = None
    memory_ns: float | None = None
    how: str = ""

    @property
    def ns(self) -> float | None:
        """The least time; None where the arithmetic was not measured, since memory alone is no limit worth its name."""
        return None if self.compute_ns is None else max(self.compute_ns, self.memory_ns or 0.0)

    @property
    def limited_by(self) -> Literal["compute", "memory"]:
        """Which of the two binds."""
        return "memory" if (self.memory_ns or 0.0) > (self.compute_ns or 0.0) else "compute"

    def fraction(self, latency_ns: float) -> float | None:
        """What share (0 to 1) of the machine's limit a call reaches that takes this long."""
        return None if self.ns is None else self.ns / latency_ns

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LatencyBound:
        """The inverse of `to_dict`."""
        known = {name: plain.get(name) for name in ("compute_ns", "memory_ns")}
        real = {name: None if value is None else float(value) for name, value in known.items()}
        return cls(how=str(plain.get("how", "")), **real)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What a machine was measured to do at the most, and the `features` that its processor had then.

    `notes` say what could not be measured, and why.
    """

    limits: tuple[PeakRate, ...]
    features: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def threads(self) -> tuple[int, ...]:
        """For which numbers of threads it was measured."""
        return tuple(sorted({limit.threads for limit in self.limits}))

    def latency_bound(self, work: Workload) -> LatencyBound:
        """The least time of this work. Bytes are read at the speed of the smallest place measured that holds them."""
        kinds = _ARITHMETIC.get(work.precision.split("-")[0], ())
        compute = next((limit for kind in kinds for limit in self._of(kind, work.threads)), None)
        places = sorted(self._of("read", work.threads), key=lambda limit: limit.num_bytes or 0)
        memory = next((limit for limit in places if work.num_bytes <= (limit.num_bytes or 0)), (*places[-1:], None)[0])
        return LatencyBound(
            compute_ns=None if compute is None else 1e9 * work.macs / compute.best,
            memory_ns=None if memory is None else 1e9 * work.num_bytes / memory.best,
            how="" if compute is None else compute.how,
        )

    def binding_kind(self, bound: LatencyBound) -> str:
        """The kind of the limit that binds: read, or the arithmetic that the least time was computed with."""
        kinds = [limit.kind for limit in self.limits if limit.how == bound.how and limit.kind != "read"]
        return "read" if bound.limited_by == "memory" or not kinds else kinds[0]

    def merged(self, other: Roofline) -> Roofline:
        """The same machine with the limits of `other` too; of two for one thing the quicker stays."""
        found = {(limit.kind, limit.threads, limit.num_bytes): limit for limit in self.limits}
        for limit in other.limits:
            key = (limit.kind, limit.threads, limit.num_bytes)
            found[key] = max(limit, found.get(key, limit), key=lambda each: each.best)
        notes = tuple(dict.fromkeys((*self.notes, *other.notes)))
        return Roofline(limits=tuple(found.values()), features=self.features, notes=notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "features": list(self.features),
            "limits": [asdict(limit) for limit in self.limits],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Roofline:
        """The inverse of `to_dict`; raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            limits=tuple(_limit_from_dict(each) for each in plain["limits"]),
            features=tuple(str(name) for name in plain["features"]),
            notes=tuple(str(note) for note in plain["notes"]),
        )

    def _of(self, kind: str, threads: int) -> list[PeakRate]:
        return [limit for limit in self.limits if limit.kind == kind and limit.threads == threads]


def _limit_from_dict(plain: Mapping[str, Any]) -> PeakRate:
    num_bytes = plain.get("num_bytes")
    limit = PeakRate(
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
