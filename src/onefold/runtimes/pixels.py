"""Images channel by channel, as PyTorch has them, made pixel by pixel: compiled when first needed, or numpy.

For a runtime that reads channels last this is a part of every call, and with numpy a long one where a network of 8
bits takes a millisecond. Both ways give the same bits.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onefold.native import loaded
from onefold.runtimes.reference import Floats

_LOWEST, _HIGHEST = -128, 127
_MOST_CHANNELS = 4  # MOST in pixels.cpp


def put_as_they_are(images: Floats, place: Floats) -> None:
    """Images (B, C, H, W) float32, contiguous, into `place` (B, H, W, C)."""
    compiled = _library()
    if compiled is not None and images.shape[1] <= _MOST_CHANNELS:
        compiled.as_they_are(*_sizes(images, place))
    else:
        _fill(place, images)


def put_on_grid(images: Floats, place: npt.NDArray[np.int8], scale: float, zero: int) -> None:
    """The whole numbers nearest to images / scale + zero, of images (B, C, H, W), into `place` (B, H, W, C)."""
    steps, zero_point = np.float32(1 / scale), np.float32(zero)
    compiled = _library()
    if compiled is not None and images.shape[1] <= _MOST_CHANNELS:
        compiled.on_grid(*_sizes(images, place), ctypes.c_float(steps), ctypes.c_float(zero_point))
        return
    whole = np.multiply(images, steps)
    np.rint(whole, out=whole)
    whole += zero_point
    _fill(place, np.clip(whole, _LOWEST, _HIGHEST, out=whole))


def _fill(place: npt.NDArray[Any], planes: Floats) -> None:
    """Channel by channel, which numpy does quicker than one transposed copy."""
    for channel in range(planes.shape[1]):
        place[..., channel] = planes[:, channel]


def _sizes(images: Floats, place: npt.NDArray[Any]) -> tuple[object, ...]:
    batch, channels, height, width = images.shape
    addresses = (ctypes.c_void_p(images.ctypes.data), ctypes.c_void_p(place.ctypes.data))
    return (*addresses, *map(ctypes.c_int64, (batch, channels, height * width)))


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled way, or None: without a compiler, or with ONEFOLD_KERNELS=plain in the environment."""
    library = loaded(Path(__file__).with_name("pixels.cpp"), switch="ONEFOLD_KERNELS")
    if library is not None:
        library.as_they_are.restype = library.on_grid.restype = None
    return library
