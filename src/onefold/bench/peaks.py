"""Measuring what a machine can do at the most: multiply-adds in fp32, bf16 and int8, and reading.

The loops are C++ (peaks.cpp), compiled when first needed; without a compiler numpy's matrix product and copy stand in
for fp32 and for reading, and the rest is not known. All of it runs in a process of its own, which a wrong guess about
the processor could end, and in which numpy's own threads can be told to be one.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from onefold.bench.machine import Machine
from onefold.bench.roofline import Limit, Roofline
from onefold.native import loaded

KINDS = ("fp32", "bf16", "int8")
_RUNS = 5
_RUN_NS = 50_000_000
_PROBE_NS = 5_000_000
_PROBES = 5
_LARGE = 256 << 20  # bytes, and four times the largest cache where that is more: no cache holds it
_LIMIT_S = 300
_SINGLE = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Amounts = tuple[int, int]  # how much was done, and in how many nanoseconds
Turn = Callable[[int], Amounts]  # does it for at least so many nanoseconds


def measure_roofline(threads: Sequence[int]) -> Roofline:
    """What this machine can do with each of these numbers of threads; about two seconds for each.

    Every limit is measured in five runs of 50 ms or more. No limits at all where not even numpy could be asked.
    """
    found = Roofline(limits=(), features=Machine.this(packages=()).features)
    for plain in ("", "plain"):  # the second time without the compiled loops
        asked = {
            **os.environ,
            **dict.fromkeys(_SINGLE, "1"),
            "ONEFOLD_PEAKS": plain or os.environ.get("ONEFOLD_PEAKS", ""),
        }
        command = [sys.executable, "-c", "from onefold.bench.peaks import main; main()", *map(str, threads)]
        with suppress(OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LIMIT_S, env=asked)
            return found.with_limits(Roofline.from_dict(json.loads(done.stdout)).limits)
    return found


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


def limits(threads: int) -> Iterator[Limit]:
    """Measure, in this process."""
    library = _library()
    if library is None:
        yield from _plain_limits(threads)
        return
    for kind, name in enumerate(KINDS):
        variants = list(iter(_names(library, kind)))
        if variants:
            turns = [_multiplying(library, kind, which) for which in range(len(variants))]
            probes = [
                [_rate([turn], _PROBE_NS) for turn in turns] for _ in range(_PROBES)
            ]  # in turns: others' work shifts
            rates = [max(seen) for seen in zip(*probes, strict=True)]
            chosen = rates.index(max(rates))
            yield _limit(name, [turns[chosen]] * threads, variants[chosen])
    for num_bytes in _places(threads):
        buffers = [np.ones(num_bytes // threads, dtype=np.uint8) for _ in range(threads)]
        reads = [_reading(library, buffer) for buffer in buffers]
        yield _limit("read", reads, "vector loads", sum(buffer.nbytes for buffer in buffers))


def _limit(kind: str, turns: Sequence[Turn], how: str, num_bytes: int | None = None) -> Limit:
    """One turn a thread, all at once, again and again."""
    rates = [_rate(turns, _RUN_NS) for _ in range(_RUNS)]
    median, best = statistics.median(rates), max(rates)
    return Limit(kind=kind, threads=len(turns), median=median, best=best, how=how, num_bytes=num_bytes)


def _rate(turns: Sequence[Turn], least_ns: int) -> float:
    """How much all turns do in a second, done at the same time by a thread each."""
    together = Barrier(len(turns))

    def one(turn: Turn) -> float:
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
    library = loaded(Path(__file__).with_name("peaks.cpp"), switch="ONEFOLD_PEAKS")
    if library is not None:
        library.variant_name.restype = ctypes.c_char_p
    return library


def _names(library: ctypes.CDLL, kind: int) -> Iterator[str]:
    which = 0
    while (name := library.variant_name(kind, which)) is not None:
        yield name.decode()
        which += 1


def _multiplying(library: ctypes.CDLL, kind: int, which: int) -> Turn:
    def turn(least_ns: int) -> Amounts:
        out = (ctypes.c_int64 * 2)()
        library.multiply(kind, which, ctypes.c_int64(least_ns), out)
        return out[0], out[1]

    return turn


def _reading(library: ctypes.CDLL, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> Turn:
    place = buffer.ctypes.data_as(ctypes.c_void_p)

    def turn(least_ns: int) -> Amounts:
        out = (ctypes.c_int64 * 2)()
        library.read_all(place, ctypes.c_int64(buffer.nbytes), ctypes.c_int64(least_ns), out)
        return out[0], out[1]

    return turn


# ------------------------------------------------------------------------------ without a compiler


def _plain_limits(threads: int) -> Iterator[Limit]:
    yield _limit("fp32", [_product(512) for _ in range(threads)], "numpy's matrix product")
    for num_bytes in _places(threads):
        copies = [_copying(num_bytes // threads // 2) for _ in range(threads)]
        yield _limit("read", copies, "numpy's copy, bytes read and written", num_bytes)


def _product(side: int) -> Turn:
    a, b, out = (np.full((side, side), 0.5, dtype=np.float32) for _ in range(3))
    return _repeating(lambda: np.matmul(a, b, out=out), side**3)


def _copying(num_bytes: int) -> Turn:
    source, target = np.ones(num_bytes, dtype=np.uint8), np.zeros(num_bytes, dtype=np.uint8)
    return _repeating(lambda: np.copyto(target, source), 2 * num_bytes)


def _repeating(call: Callable[[], object], amount: int) -> Turn:
    def turn(least_ns: int) -> Amounts:
        start, calls = time.perf_counter_ns(), 0
        while not calls or time.perf_counter_ns() - start < least_ns:
            call()
            calls += 1
        return calls * amount, time.perf_counter_ns() - start

    return turn


def main() -> None:
    """What the process of its own runs: numbers of threads from the command line, the limits as JSON to stdout."""
    found = Roofline(limits=tuple(limit for word in sys.argv[1:] for limit in limits(int(word))))
    sys.stdout.write(json.dumps(found.to_dict()))
