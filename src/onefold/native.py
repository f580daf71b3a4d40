"""C++ compiled when it is first needed, and kept for the next time under XDG_CACHE_HOME (~/.cache).

A library is kept by the hash of sources, flags, compiler and processor. CXX in the environment names the compiler.
Without one everything works all the same, more slowly; that is said once, by a `NotCompiledWarning`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
LIMIT_S = 300  # a compiler that takes longer hangs

WARNED = "ONEFOLD_WARNED_NOT_COMPILED"
"""Set in the environment by the process that warns, so that those which it starts do not warn again."""

_warning = threading.Lock()  # the loader's threads may find out at the same time


class NotCompiledWarning(UserWarning):
    """The C++ code cannot be compiled: torch and numpy compute in its place, more slowly."""


def built(name: str, sources: Sequence[Path], headers: Sequence[Path] = ()) -> Path:
    """The path of the library `name`, compiled if it is not there yet.

    Raises OSError where there is no compiler or no place to write, subprocess.SubprocessError where compiling fails.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler: install g++ or clang, or set CXX")
    texts = [path.read_bytes() for path in (*sources, *headers)]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=LIMIT_S).stdout
    key = hashlib.sha256(b"\0".join([*texts, repr(FLAGS).encode(), version, _processor().encode()])).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onefold"
    path = home / f"{name}-{key}.so"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        _compile(compiler, [str(source) for source in sources], path)
    return path


def is_plain(switch: str) -> bool:
    """Whether the environment's `switch` is "plain": do without compiled code.

    It is read at each use and never cached: a library that is switched off once would be off for the whole process.
    """
    return os.environ.get(switch) == "plain"


def loaded(name: str, sources: Sequence[Path], headers: Sequence[Path] = ()) -> ctypes.CDLL | None:
    """The library `name`, compiled if it is not there yet.

    None where it cannot be compiled, with one NotCompiledWarning for this process and all that it starts.
    """
    try:
        return ctypes.CDLL(str(built(name, sources, headers)))
    except (OSError, subprocess.SubprocessError) as error:
        _warn_once(error)
        return None


def _warn_once(error: Exception) -> None:
    with _warning:
        # Processes that a launcher starts side by side inherit nothing from each other: a machine's first one warns.
        if os.environ.get(WARNED) or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        os.environ[WARNED] = "1"
    output = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
    lines = (output.decode(errors="replace") if isinstance(output, bytes) else output or "").strip().splitlines()
    warnings.warn(
        f"the C++ code cannot be compiled ({lines[-1] if lines else error}): PyTorch and NumPy compute in its place, "
        "which is slower",
        NotCompiledWarning,
        stacklevel=3,
    )


def _compile(compiler: str, sources: list[str], path: Path) -> None:
    """Write aside, then rename: two processes may build at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        out = Path(aside) / path.name
        native = ("-march=native",) if platform.machine().lower() in ("x86_64", "amd64") else ("-mcpu=native",)
        attempts = [(*native, "-fopenmp"), ("-fopenmp",), native, ()]  # a compiler may lack either
        for number, extra in enumerate(attempts):
            command = [compiler, *FLAGS, *extra, *sources, "-o", str(out)]
            try:
                subprocess.run(command, capture_output=True, check=True, timeout=LIMIT_S, text=True)
                break
            except subprocess.CalledProcessError:
                if number == len(attempts) - 1:
                    raise
        os.replace(out, path)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())
