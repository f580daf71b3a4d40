"""Memory for the maps that the compiled kernels write: kept when a map is freed, for the next one of its size."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from onefold.reparam.kernels.base import library

SMALLEST = 1 << 18  # floats: the C library's own memory does for less


def new_map(*shape: int) -> Tensor:
    """A float32 tensor of any content. Needs the library, as whoever writes a map has it."""
    count = math.prod(shape)
    if count < SMALLEST:
        return torch.empty(*shape)
    make, capsule = _makers()
    address = make(count)
    if not address:
        raise MemoryError(f"no memory for a map of {count} floats")
    y: Tensor = from_dlpack(capsule(address, b"dltensor", None))
    return y.view(*shape)


@cache
def _makers() -> tuple[Callable[[int], int], Callable[[int, bytes, None], object]]:
    """The library's allocator, and python's maker of capsules."""
    kernels = library()
    assert kernels is not None
    make = kernels["new_map"]
    make.argtypes, make.restype = [ctypes.c_int64], ctypes.c_void_p
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return make, prototype(("PyCapsule_New", ctypes.pythonapi))


def release() -> None:
    """Give the memory that waits for a next map back to the system; maps in use stay."""
    kernels = library()
    if kernels is not None:
        kernels["drop_maps"]()
