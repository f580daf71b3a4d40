"""The first moments: how long something takes to open and to answer once, and how much memory it takes, in a process
of its own that has done nothing before.

What is opened is named as "module:function", since a fresh process holds no objects: the function is called with plain
strings and gives the call to time.
"""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onefold.errors import BadData, describe_exit_status

_CALLS = 9
_LIMIT_S = 120


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """What a fresh process saw: times in nanoseconds, `warm_ns` the median of the calls after the first.

    `open_ns` includes the import of whatever is needed. `peak_bytes` is the most memory that was resident, less what
    the bare interpreter held before; None where the system does not say.
    """

    open_ns: int
    first_ns: int
    warm_ns: int
    peak_bytes: int | None = None

    @property
    def time_to_first_answer_ns(self) -> int:
        """From nothing to the first answer."""
        return self.open_ns + self.first_ns

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ColdStart:
        """The inverse of `to_dict`."""
        peak = plain.get("peak_bytes")
        times = {name: int(plain[name]) for name in ("open_ns", "first_ns", "warm_ns")}
        return cls(**times, peak_bytes=None if peak is None else int(peak))


def measure_cold_start(opener: str, arguments: Sequence[str]) -> ColdStart:
    """Have a fresh process call `opener` ("module:function") and what it gives. BadData where it cannot."""
    command = [sys.executable, "-c", "from onefold.bench.cold_start import main; main()", opener, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LIMIT_S)
        return ColdStart.from_dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        said = next((line for line in reversed(error.stderr.splitlines()) if line.strip()), "")
        why = said if said and error.returncode > 0 else f"it {describe_exit_status(error.returncode)}"
        raise BadData(f"the fresh process that was to open {arguments[0]} failed: {why}") from error
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        raise BadData(f"cannot measure the cold start of {arguments[0]} in a fresh process: {error}") from error


def measure_in_this_process(opener: str, arguments: Sequence[str]) -> ColdStart:
    """The same in this process, which should be a fresh one."""
    module, _, function = opener.partition(":")
    before = _resident()
    start = time.perf_counter_ns()
    call = getattr(importlib.import_module(module), function)(*arguments)
    times = [time.perf_counter_ns()]
    for _ in range(1 + _CALLS):
        call()
        times.append(time.perf_counter_ns())
    peak = _status("VmHWM")
    calls = [later - earlier for earlier, later in itertools.pairwise(times)]
    return ColdStart(
        open_ns=times[0] - start,
        first_ns=calls[0],
        warm_ns=int(statistics.median(calls[1:])),
        peak_bytes=None if peak is None or before is None else max(0, peak - before),
    )


def _resident() -> int | None:
    """The memory of this process now, from which on its peak is counted anew where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """A size in bytes from Linux's account of this process; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def main() -> None:
    """What the fresh process runs: opener and arguments from the command line, the figures as JSON to stdout."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # what others print must not end among the figures
    seen = measure_in_this_process(sys.argv[1], sys.argv[2:])
    stdout.write(f"\n{json.dumps(seen.to_dict())}\n")
