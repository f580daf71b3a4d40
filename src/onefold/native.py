"""C++ compiled when it is first needed, and kept for the next time in the cache folder (see `storage.cache_folder`).

A library is kept by the hash of sources, flags, compiler and processor, in a sealed folder: one that is empty,
half-written or another's would end the process by a signal, so its checksum is compared before it is loaded, and it is
compiled anew where it differs. CXX in the environment is the compiler's command line, such as "ccache g++". Without a
compiler everything works all the same, more slowly; that is said once, by a `NotCompiledWarning`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from onefold.checksums import seal, unseal
from onefold.errors import BadCheckpoint
from onefold.storage import cache_folder, locked

FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
LIMIT_S = 300  # a compiler that takes longer hangs

WARNED = "ONEFOLD_WARNED_NOT_COMPILED"
"""Set in the environment by the process that warns, so that those which it starts do not warn again."""

_LIBRARY = "library.so"
_log = logging.getLogger("onefold")
_warning = threading.Lock()  # the loader's threads may find out at the same time


class NotCompiledWarning(UserWarning):
    """The C++ code cannot be compiled: torch and numpy compute in its place, more slowly."""


def built(name: str, sources: Sequence[Path], headers: Sequence[Path] = ()) -> Path:
    """The path of the library `name`, compiled if it is not there yet, or not as it was compiled.

    Raises OSError where there is no compiler or no place to write, subprocess.SubprocessError where compiling fails.
    """
    compiler = shlex.split(os.environ.get("CXX", ""), posix=os.name == "posix")
    compiler = compiler or list(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))[:1]
    if not compiler:
        raise OSError("no C++ compiler: install g++ or clang, or set CXX")
    texts = [path.read_bytes() for path in (*sources, *headers)]
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=LIMIT_S).stdout
    key = hashlib.sha256(b"\0".join([*texts, repr(FLAGS).encode(), version, _processor().encode()])).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{key}"
    if not _is_whole(folder):
        with locked(folder):  # another process may be compiling it
            if not _is_whole(folder):
                if folder.exists():
                    _log.warning("%s in the cache is damaged, or of another origin: it is compiled anew", folder)
                seal(folder, {_LIBRARY: _compiled(compiler, [str(source) for source in sources])})
    return folder / _LIBRARY


def _is_whole(folder: Path) -> bool:
    try:
        return unseal(folder).keys() == {_LIBRARY}
    except BadCheckpoint:
        return False


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


def _compiled(compiler: Sequence[str], sources: Sequence[str]) -> bytes:
    """Give the bytes of the library that the sources make, with what the compiler has of flags for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / _LIBRARY
        native = ("-march=native",) if platform.machine().lower() in ("x86_64", "amd64") else ("-mcpu=native",)
        attempts = [(*native, "-fopenmp"), ("-fopenmp",), native, ()]  # a compiler may lack either
        for number, extra in enumerate(attempts):
            command = [*compiler, *FLAGS, *extra, *sources, "-o", str(out)]
            try:
                subprocess.run(command, capture_output=True, check=True, timeout=LIMIT_S, text=True)
                break
            except subprocess.CalledProcessError:
                if number == len(attempts) - 1:
                    raise
        return out.read_bytes()


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())
