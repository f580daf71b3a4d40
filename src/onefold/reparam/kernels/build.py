"""The compiled kernels: built when first needed, kept for the next time; None where that cannot be done."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

SOURCES = ("pointwise.cpp", "depthwise.cpp", "mixed.cpp", "algebra.cpp", "memory.cpp")
HEADERS = ("vector.h", "pointwise.h")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
LIMIT_S = 300  # a compiler that takes longer hangs


class SlowerRouteWarning(UserWarning):
    """The kernels cannot be compiled: the `moments` route runs on plain torch, with the same numbers but slower."""


@cache
def library() -> ctypes.CDLL | None:
    """The kernels as a loaded library, or None - with one warning - where they cannot be had.

    ONEFOLD_KERNELS=plain in the environment asks for None; CXX names another compiler; the library is kept under
    XDG_CACHE_HOME (~/.cache), by the hash of sources, flags, compiler and machine.
    """
    if os.environ.get("ONEFOLD_KERNELS") == "plain":
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr.strip().splitlines()[-1:] if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"training is slower: cannot compile its kernels ({reason})", SlowerRouteWarning, stacklevel=2)
        return None


def _built() -> Path:
    """The library's path; compiled if it is not there yet."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler: install g++ or clang, or set CXX")
    here = Path(__file__).parent
    texts = [(here / name).read_bytes() for name in SOURCES + HEADERS]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=LIMIT_S).stdout
    key = hashlib.sha256(b"\0".join([*texts, repr(FLAGS).encode(), version, _processor().encode()])).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onefold"
    path = home / f"kernels-{key}.so"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        _compile(compiler, [str(here / name) for name in SOURCES], path)
    return path


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
