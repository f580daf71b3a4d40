"""What this process may use: the processors of its affinity and the free memory, as far as its container lets it;
and what it does with memory that it has freed.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from onefold.errors import BadArgument


def cpu_affinity() -> tuple[int, ...]:
    """The processors, by number; empty where the system does not tell (macOS, Windows)."""
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        return ()


@contextmanager
def pin_to_cpus(processors: Sequence[int] | None) -> Iterator[None]:
    """Have this thread, and those it starts, use these processors only; None leaves all as it is. BadArgument."""
    if processors is None:
        yield
        return
    before = cpu_affinity()
    if not before:
        raise BadArgument("this system does not let a program choose its processors: leave out --pin")
    if not processors or (missing := sorted(set(processors) - set(before))):
        gone = f"there is no processor {', '.join(map(str, missing))}" if processors else "none is named"
        raise BadArgument(f"cannot pin: {gone}; this process may use {', '.join(map(str, before))}")
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def num_usable_cpus() -> int:
    """How many processors the affinity leaves."""
    return len(cpu_affinity()) or os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that a container may use (cgroup v2, else v1); None where there is no limit.

    The quota of a group holds for all groups in it, so the least of them counts. `root` is where /proc and /sys are.
    """
    top = root / "sys/fs/cgroup"
    inside = _groups(root)
    limits = [_read(each / "cpu.max").split() for each in inside]
    limits += [[_read(top / "cpu" / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]]
    found = [int(most) / int(period) for most, period in (pair for pair in limits if len(pair) == 2) if most.isdigit()]
    return min((each for each in found if each > 0), default=None)


def available_threads(root: Path = Path("/")) -> int:
    """How many threads have a processor for themselves: what affinity and quota leave, at least one."""
    return max(1, int(min(num_usable_cpus(), cpu_quota(root) or num_usable_cpus())))


_SPIN_COUNT = "10000"  # by GNU's OpenMP, of which PyTorch has its own; other OpenMP runtimes do not read it


def limit_library_threads() -> None:
    """Have libraries that are imported from now on start as many threads as the quota has processors.

    They see the affinity themselves, and nothing of a quota: a container of 2 on a host of 64 would get 64 threads.
    Threads that wait for others do so awake for some tens of microseconds and then sleep, unless the environment says
    otherwise. GNU's OpenMP stays awake for milliseconds, and beside busy processes takes the processor from those that
    are waited for: with four on two cores a training step of MobileOne-S0 takes 3.3 times as long, `fuse` 2.5 times.
    On a quiet machine the step takes the same time (asleep at once, OMP_WAIT_POLICY=PASSIVE, 1.3 times as long).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    limit = cpu_quota()
    if limit is not None and limit < num_usable_cpus():
        os.environ.setdefault("OMP_NUM_THREADS", str(available_threads()))


def _read(path: Path) -> str:
    with suppress(OSError, UnicodeError):
        return path.read_text(encoding="utf-8")
    return ""


_UNKNOWN_MEMORY = 4 << 30  # taken for free where the system does not say


def free_memory(root: Path = Path("/")) -> int:
    """Give the bytes of memory that this process may still take: what is free, or what its cgroup leaves of it."""
    found = re.search(r"MemAvailable:\s+(\d+)", _read(root / "proc/meminfo"))
    free = [1024 * int(found[1]) if found else _UNKNOWN_MEMORY]
    for folder, most, used in (
        *((group, "memory.max", "memory.current") for group in _groups(root)),
        (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, current = _read(folder / most).strip(), _read(folder / used).strip()
        if limit.isdigit() and current.isdigit():  # files that the kernel can drop from its cache count as free
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
            free.append(int(limit) - int(current) + (int(cached[1]) if cached else 0))
    return max(0, min(free))


def _groups(root: Path) -> list[Path]:
    """The folders of this process's control group (version 2) and of those that it lies in: all of them limit it."""
    top = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    folder = top / own[1] if own else top
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]


_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees, for its next allocations; whether it does. glibc alone.

    By default maps of more than 32 MiB go back to the system when they are freed, and come back page by page, each
    filled with zeros, in the next training step: that can take as long as the step's own work. What is kept is not
    more than the process held at its peak. A user's own MALLOC_ variables are left as they are.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    # One heap, as a mapping of its own is what large allocations of other heaps get; and none of it is given back.
    return bool(mallopt(_M_ARENA_MAX, 1) and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
