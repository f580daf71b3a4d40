"""The compiled C++ code: of the wheel where it has it for this processor, else compiled when it is first needed.

A wheel for Linux carries each library compiled for several kinds of processor (LEVELS), in a sealed folder; the best
that this processor has the instructions for is loaded. The name of a library's file holds the hash of its sources and
flags, so that one of another version is not found, and its checksum is compared before it is loaded: one that is empty,
half-written or another's would end the process by a signal. The libraries know neither Python nor torch, whose OpenMP
runtime they use: one wheel serves every version of either.

Where the wheel has none, or ONEFOLD_KERNELS=compile is in the environment, the library is compiled for this processor
and kept in the cache folder (see `storage.cache_folder`), by the hash of sources, flags, compiler and processor. CXX in
the environment is the compiler's command line, such as "ccache g++". Without a compiler everything works all the same,
more slowly; that is said once, by a `NotCompiledWarning`. ONEFOLD_KERNELS=plain does without compiled code.
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
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from onefold.checksums import read_sealed_folder, write_sealed_folder
from onefold.errors import BadCheckpoint
from onefold.file_io import cache_folder, file_lock

LIBRARY_SOURCES: dict[str, tuple[str, ...]] = {
    "kernels": tuple(
        f"reparam/kernels/{name}.cpp"
        for name in ("pointwise", "depthwise", "fused_norms", "moments_algebra", "allocator")
    ),
    "resample": ("data/resample.cpp",),
    "nchw_to_nhwc": ("runtimes/nchw_to_nhwc.cpp",),
    "roofline": ("bench/roofline.cpp",),
}
"""The files of each library, below this package; the headers beside the first of them belong to it, too."""

_LEVELS: dict[str, dict[str, str]] = {
    "x86_64": {
        "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl avx2 bmi1 bmi2 f16c fma abm movbe",
        "x86-64-v3": "avx2 bmi1 bmi2 f16c fma abm movbe",
        "x86-64": "",
    },
    "aarch64": {
        "armv8.2-a+dotprod+i8mm+bf16": "atomics asimdrdm asimddp i8mm bf16",
        "armv8.2-a+dotprod": "atomics asimdrdm asimddp",
        "armv8-a": "",
    },
}
"""What a wheel is compiled for on each kind of machine, best first: the compiler's -march, and the features in
/proc/cpuinfo that it needs. The first three are the levels of the x86-64 psABI."""

_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
_LIMIT_S = 300  # a compiler that takes longer hangs

WARNED_VARIABLE = "ONEFOLD_WARNED_NOT_COMPILED"
"""Set in the environment by the process that warns, so that those which it starts do not warn again."""

LIBRARY_ORIGINS: dict[str, str] = {}
"""Where each library that was asked for in this process comes from, in words."""

_PACKAGE = Path(__file__).parent
_WHEEL = _PACKAGE / "lib"
_LIBRARY = "library.so"
_SLOWER = "PyTorch and NumPy compute in its place, and a training step takes 2 to 6 times as long"
_log = logging.getLogger("onefold")
_warning = threading.Lock()  # the loader's threads may find out at the same time


class NotCompiledWarning(UserWarning):
    """The C++ code cannot be compiled: torch and numpy compute in its place, more slowly."""


def load_library(name: str) -> ctypes.CDLL | None:
    """The library `name` of SOURCES: the wheel's, or compiled if it is not there yet.

    None where it cannot be compiled, with one NotCompiledWarning for this process and all that it starts.
    """
    library = None if os.environ.get("ONEFOLD_KERNELS") == "compile" else _from_wheel(name)
    if library is not None:
        return library
    try:
        path = _build_if_needed(name)
        library = ctypes.CDLL(str(path))
        LIBRARY_ORIGINS[name] = f"compiled on this machine, kept in {path.parent.parent}"
    except (OSError, subprocess.SubprocessError) as error:
        LIBRARY_ORIGINS[name] = f"not compiled ({compiler_message(error)}): {_SLOWER}"
        _warn_once(error)
    return library


def is_native_disabled(switch: str) -> bool:
    """Whether the environment's `switch` is "plain": do without compiled code.

    It is read at each use and never cached: a library that is switched off once would be off for the whole process.
    """
    return os.environ.get(switch) == "plain"


def _key(name: str, *more: bytes) -> str:
    """A hash of all that a library is made from: its sources, the headers beside them, the flags, and what is given."""
    sources = [_PACKAGE / source for source in LIBRARY_SOURCES[name]]
    texts = [path.read_bytes() for path in (*sources, *sorted(sources[0].parent.glob("*.h")))]
    return hashlib.sha256(b"\0".join([*texts, repr(_FLAGS).encode(), *more])).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())


# ----------------------------------------------------------------------------------- from the wheel


def _from_wheel(name: str) -> ctypes.CDLL | None:
    """The wheel's library for this processor; None, with a note, where it has none that can be used."""
    if not _WHEEL.is_dir():
        return None  # a wheel without libraries, or a source tree
    features, levels = set(_processor().split()), _LEVELS.get(platform.machine().lower(), {})
    try:
        for level in (level for level, needed in levels.items() if set(needed.split()) <= features):
            file = f"{name}-{_key(name)}-{level}.so"
            if read_sealed_folder(_WHEEL, only=[file]):
                library = ctypes.CDLL(str(_WHEEL / file))
                LIBRARY_ORIGINS[name] = f"from the wheel, for {level}"
                return library
        why = f"it is of another version, or for other processors than this {platform.machine()}"
    except (BadCheckpoint, OSError) as error:
        why = str(error)
    _log.warning("the wheel's C++ library %s cannot be used: %s", name, why)
    return None


def compile_for_wheel() -> dict[str, bytes]:
    """Compile every library for every level of this kind of machine, for `checksums.write_sealed_folder`: file name ->
    bytes.

    Raises OSError where there is no compiler or the machine is of a kind without levels, subprocess.SubprocessError
    where compiling fails.
    """
    compiler, levels = _compiler(), _LEVELS.get(platform.machine().lower(), {})
    if platform.system() != "Linux" or not levels:
        raise OSError(f"wheels carry compiled code on Linux on {' and '.join(_LEVELS)} only")
    pairs = list(product(LIBRARY_SOURCES, levels))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        contents = pool.map(lambda pair: _compiled_for(compiler, *pair), pairs)
        return {f"{n}-{_key(n)}-{level}.so": each for (n, level), each in zip(pairs, contents, strict=True)}


def _compiled_for(compiler: Sequence[str], name: str, level: str) -> bytes:
    """Give the bytes of a library for a level of processors.

    It is linked without OpenMP's runtime: its symbols are those of the one that torch has loaded for everybody, so that
    there is one pool of threads, and none to install.
    """
    sources = [str(_PACKAGE / source) for source in LIBRARY_SOURCES[name]]
    compiling = [*compiler, *_FLAGS, "-fopenmp", f"-march={level}", "-c"]
    linking = [*compiler, "-shared", "-s", "-o", _LIBRARY]
    with tempfile.TemporaryDirectory() as folder:
        for command in ([*compiling, *sources], [*linking, *(f"{Path(source).stem}.o" for source in sources)]):
            subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=_LIMIT_S, text=True)
        return (Path(folder) / _LIBRARY).read_bytes()


# -------------------------------------------------------------------------- compiled on this machine


def _build_if_needed(name: str) -> Path:
    """The path of the library `name`, compiled if it is not there yet, or not as it was compiled.

    Raises OSError where there is no compiler or no place to write, subprocess.SubprocessError where compiling fails.
    """
    compiler = _compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=_LIMIT_S).stdout
    flags = shlex.join(compiler).encode()  # CXX may hold some, such as -mno-avx512f
    folder = cache_folder() / f"{name}-{_key(name, version, flags, _processor().encode())}"
    if not _is_whole(folder):
        with file_lock(folder):  # another process may be compiling it
            if not _is_whole(folder):
                if folder.exists():
                    _log.warning("%s in the cache is damaged, or of another origin: it is compiled anew", folder)
                write_sealed_folder(folder, {_LIBRARY: _compiled(compiler, name)})
    return folder / _LIBRARY


def _compiler() -> list[str]:
    """The compiler's command line. Raises OSError where there is none."""
    try:
        named = shlex.split(os.environ.get("CXX", ""), posix=os.name == "posix")
    except ValueError as error:
        raise OSError(f"CXX is no command line: {error}") from error
    found = named or list(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))[:1]
    if not found:
        raise OSError("no C++ compiler: install g++ or clang, or set CXX")
    return found


def _is_whole(folder: Path) -> bool:
    try:
        return read_sealed_folder(folder).keys() == {_LIBRARY}
    except BadCheckpoint:
        return False


def _warn_once(error: Exception) -> None:
    with _warning:
        # Processes that a launcher starts side by side inherit nothing from each other: a machine's first one warns.
        if os.environ.get(WARNED_VARIABLE) or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        os.environ[WARNED_VARIABLE] = "1"
    warnings.warn(
        f"the C++ code cannot be compiled ({compiler_message(error)}): {_SLOWER}",
        NotCompiledWarning,
        stacklevel=3,
    )


def compiler_message(error: Exception) -> str:
    """Why compiling failed: the last line that the compiler wrote."""
    output = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
    lines = (output.decode(errors="replace") if isinstance(output, bytes) else output or "").strip().splitlines()
    return lines[-1] if lines else str(error)


def _compiled(compiler: Sequence[str], name: str) -> bytes:
    """Give the bytes of a library, compiled with what the compiler has of flags for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / _LIBRARY
        native = ("-march=native",) if platform.machine().lower() in ("x86_64", "amd64") else ("-mcpu=native",)
        attempts = [(*native, "-fopenmp"), ("-fopenmp",), native, ()]  # a compiler may lack either
        for number, extra in enumerate(attempts):
            command = [
                *compiler,
                *_FLAGS,
                *extra,
                *(str(_PACKAGE / source) for source in LIBRARY_SOURCES[name]),
                "-o",
                str(out),
            ]
            try:
                subprocess.run(command, capture_output=True, check=True, timeout=_LIMIT_S, text=True)
                break
            except subprocess.CalledProcessError:
                if number == len(attempts) - 1:
                    raise
        return out.read_bytes()
