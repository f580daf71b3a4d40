"""Resizing part of a picture with an antialiased triangle filter: compiled when first needed, or torch and Pillow.

Both ways are within one level of 255 of Pillow's `crop(...).resize(..., BILINEAR)`; which one it is, `resampler` says.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from onefold.native import loaded

Part = tuple[float, float, float, float]  # left, top, right, bottom; a border may lie between two pixels
_Floats = ctypes.POINTER(ctypes.c_float)
_ONES, _ZEROS = np.ones(3, np.float32), np.zeros(3, np.float32)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled way, or None: without a compiler, or with ONEFOLD_KERNELS=plain in the environment."""
    found = loaded(Path(__file__).with_name("resample.cpp"), switch="ONEFOLD_KERNELS")
    if found is None:
        return None
    found.resample.restype = None
    number, address = ctypes.c_int, ctypes.c_void_p
    strides = (ctypes.c_int64, ctypes.c_int64)
    found.resample.argtypes = (address, *strides, number, number, address, number, number, address, address, address)
    return found


def resampler() -> str:
    """Which way this process resizes, for logs: values may differ by one level of 255 between the two."""
    return "compiled" if library() is not None else "torch"


def levels(pixels: NDArray[np.uint8], part: Part, size: int) -> NDArray[np.uint8]:
    """A part of pixels (h, w, 3), resized: uint8 (size, size, 3)."""
    if library() is not None:
        return scaled(pixels, part, size, mirror=False, gain=_ONES, offset=_ZEROS).astype(np.uint8).transpose(1, 2, 0)
    left, top, right, bottom = outward(part)
    inside = pixels[top:bottom, left:right]
    if (left, top, right, bottom) != part:
        within = (part[0] - left, part[1] - top, part[2] - left, part[3] - top)
        whole = Image.fromarray(np.ascontiguousarray(inside))
        return np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=within))
    planes = torch.from_numpy(np.array(inside)).permute(2, 0, 1)[None]  # a copy: contiguous, and Pillow's is read-only
    resized = torch.ops.aten._upsample_bilinear2d_aa(planes, [size, size], False)
    return resized[0].permute(1, 2, 0).numpy()


def scaled(
    pixels: NDArray[np.uint8],
    part: Part,
    size: int,
    *,
    mirror: bool,
    gain: NDArray[np.float32],
    offset: NDArray[np.float32],
) -> NDArray[np.float32]:
    """A part of pixels (h, w, 3), resized, mirrored if asked: float32 (3, size, size), level * gain + offset.

    gain and offset are float32 (3,), one value a channel.
    """
    compiled = library()
    if compiled is None:
        resized = levels(pixels, part, size).transpose(2, 0, 1)
        planes = torch.from_numpy(np.ascontiguousarray(resized[:, :, ::-1] if mirror else resized))
        return planes.to(torch.float32).mul_(_column(gain)).add_(_column(offset)).numpy()
    left, top, right, bottom = outward(part)
    inside = pixels[top:bottom, left:right]
    if inside.strides[2] != 1:
        inside = np.ascontiguousarray(inside)
    within = np.array((part[0] - left, part[1] - top, part[2] - left, part[3] - top), np.float32)
    out = np.empty((3, size, size), np.float32)
    height, width = inside.shape[:2]
    addresses = (within.ctypes.data, size, mirror, gain.ctypes.data, offset.ctypes.data, out.ctypes.data)
    compiled.resample(inside.ctypes.data, inside.strides[0], inside.strides[1], width, height, *addresses)
    return out


def outward(part: Part) -> tuple[int, int, int, int]:
    """The whole pixels that a part touches."""
    return math.floor(part[0]), math.floor(part[1]), math.ceil(part[2]), math.ceil(part[3])


def _column(values: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(values)[:, None, None]
