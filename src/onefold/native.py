"""C++ compiled when it is first needed, and kept for the next time under XDG_CACHE_HOME (~/.cache).

A library is kept by the hash of sources, flags, compiler and processor. CXX in the environment names the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
LIMIT_S = 300  # a compiler that takes longer hangs


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


def loaded(source: Path, *, switch: str) -> ctypes.CDLL | None:
    """The library of one file; None where it cannot be compiled, or where the environment's `switch` is "plain"."""
    if os.environ.get(switch) == "plain":
        return None
    try:
        return ctypes.CDLL(str(built(source.stem, [source])))
    except (OSError, subprocess.SubprocessError):
        return None


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
