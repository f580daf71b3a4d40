"""The compiled kernels: built when first needed, kept for the next time; None where that cannot be done."""

from __future__ import annotations

import ctypes
import os
import subprocess
import warnings
from functools import cache
from pathlib import Path

from onefold.native import built

SOURCES = ("pointwise.cpp", "depthwise.cpp", "mixed.cpp", "algebra.cpp", "memory.cpp")
HEADERS = ("vector.h", "pointwise.h")


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
        here = Path(__file__).parent
        return ctypes.CDLL(str(built("kernels", [here / name for name in SOURCES], [here / name for name in HEADERS])))
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr.strip().splitlines()[-1:] if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"training is slower: cannot compile its kernels ({reason})", SlowerRouteWarning, stacklevel=2)
        return None
