"""Crops that are chosen before a picture is decoded, so that no more of it is decoded than the crop needs.

`CropBox` says which part is wanted and at what size; `Crop` holds the decoded pixels around that part and resizes them.
A crop is cut first and resized then, so no pixel outside it counts (torchvision's convention). Resizing is one compiled
pass (resample.cpp), or torch and Pillow where there is no compiler; both are within one level of 255 of Pillow's
`crop(...).resize(..., BILINEAR)`.

`decode_jpeg_crop` decodes a plain JPEG with simplejpeg: only the rows and the scale that the crop needs. What it
decodes is bit for bit what Pillow would decode there (both are libjpeg-turbo, with the accurate transform). Plain is:
baseline or progressive, 8 bits, grey or three components, whole to the end marker. Everything else is left to Pillow.

H = W = size, h and w are the sides of decoded pixels.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.cpp_extension import is_native_disabled, load_library
from onefold.data.preprocessing import PIL_FILTERS, Interpolation, ValueRange

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
_FloatBox = tuple[float, float, float, float]  # the same; an edge may lie within a pixel

EXIF_ORIENTATION = 0x0112
"""The EXIF tag of a picture's orientation, 1 to 8 (EXIF 2.3, table 4)."""


@dataclass(frozen=True, kw_only=True)
class CropBox:
    """A part of a picture, chosen once the size of the picture is known, wanted at size x size pixels."""

    size: int
    place: Callable[[tuple[int, int]], Box]  # (width, height) of the picture with its orientation applied -> the box
    interpolation: Interpolation = "bilinear"
    value_range: ValueRange | None = None  # see `decode`

    def crop_image(self, image: Image.Image) -> Crop:
        """Give the crop of an RGB picture that is decoded whole."""
        return self.crop_pixels(np.asarray(image), self.place(image.size))

    def crop_pixels(self, pixels: NDArray[np.uint8], box: _FloatBox) -> Crop:
        """Give the crop that lies at `box` in pixels (h, w, 3)."""
        return Crop(pixels=pixels, box=box, size=self.size, interpolation=self.interpolation)


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """Decoded pixels and the part of them that is wanted, not yet resized."""

    pixels: NDArray[np.uint8]  # (h, w, 3), perhaps a view with swapped or reversed axes
    box: _FloatBox
    size: int
    interpolation: Interpolation = "bilinear"

    def resized(self) -> NDArray[np.uint8]:
        """Resize the crop: uint8 (H, W, 3)."""
        if self.interpolation == "bilinear":
            return resize(self.pixels, self.box, self.size)
        pixels, box = _enclosing_pixels(self.pixels, self.box)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((self.size, self.size), PIL_FILTERS[self.interpolation], box=box))

    def image(self) -> Image.Image:
        """Resize the crop and give it as a picture."""
        return Image.fromarray(np.ascontiguousarray(self.resized()))

    def normalised(
        self, scale: NDArray[np.float32], offset: NDArray[np.float32], *, mirror: bool
    ) -> NDArray[np.float32]:
        """Resize the crop, mirror it if asked, and give v * scale + offset, float32 (3, H, W), C-contiguous.

        `scale` and `offset` are float32 (3,), one value per channel.
        """
        if self.interpolation == "bilinear":
            return resize_and_normalise(self.pixels, self.box, self.size, mirror=mirror, scale=scale, offset=offset)
        pixels = self.resized()[:, ::-1] if mirror else self.resized()
        return np.ascontiguousarray((pixels * scale + offset).transpose(2, 0, 1), np.float32)


# ------------------------------------------------------------------------------------------- resizing

_SCALE_1, _OFFSET_0 = np.ones(3, np.float32), np.zeros(3, np.float32)


def load_resampler() -> ctypes.CDLL | None:
    """Load the compiled resize; None without a compiler, or with ONEFOLD_KERNELS=plain in the environment."""
    return None if is_native_disabled("ONEFOLD_KERNELS") else _library()


@cache
def _library() -> ctypes.CDLL | None:
    library = load_library("resample")
    if library is None:
        return None
    number, address = ctypes.c_int, ctypes.c_void_p
    strides = (ctypes.c_int64, ctypes.c_int64)
    library.resample.restype = None
    library.resample.argtypes = (address, *strides, number, number, address, number, number, address, address, address)
    return library


def resize(pixels: NDArray[np.uint8], box: _FloatBox, size: int) -> NDArray[np.uint8]:
    """Resize the part `box` of pixels (h, w, 3) with an antialiased triangle filter: uint8 (size, size, 3)."""
    if load_resampler() is not None:
        planes = resize_and_normalise(pixels, box, size, mirror=False, scale=_SCALE_1, offset=_OFFSET_0)
        return planes.astype(np.uint8).transpose(1, 2, 0)
    part, inner = _enclosing_pixels(pixels, box)
    if inner != (0, 0, part.shape[1], part.shape[0]):  # torch cannot resize a box with edges within pixels
        image = Image.fromarray(np.ascontiguousarray(part))
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=inner))
    import torch  # not needed where the pass is compiled

    stacked = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None]  # a copy: contiguous, and Pillow's is read-only
    resized = torch.ops.aten._upsample_bilinear2d_aa(stacked, [size, size], False)
    return resized[0].permute(1, 2, 0).numpy()


def resize_and_normalise(
    pixels: NDArray[np.uint8],
    box: _FloatBox,
    size: int,
    *,
    mirror: bool,
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Resize the part `box` of pixels (h, w, 3), mirror it if asked: float32 (3, size, size), v * scale + offset.

    `scale` and `offset` are float32 (3,), one value per channel. Values are rounded to whole levels before they are
    scaled, so that the result is the same as that of `resize`.
    """
    library = load_resampler()
    if library is None:
        resized = resize(pixels, box, size).transpose(2, 0, 1)
        planes = np.ascontiguousarray(resized[:, :, ::-1] if mirror else resized, dtype=np.float32)
        return planes * scale[:, None, None] + offset[:, None, None]
    part, inner = _enclosing_pixels(pixels, box)
    if part.strides[2] != 1:  # the pass reads any stride of rows and columns, but a pixel's three values in a row
        part = np.ascontiguousarray(part)
    edges = np.array(inner, np.float32)
    out = np.empty((3, size, size), np.float32)
    height, width = part.shape[:2]
    addresses = (edges.ctypes.data, size, mirror, scale.ctypes.data, offset.ctypes.data, out.ctypes.data)
    library.resample(part.ctypes.data, part.strides[0], part.strides[1], width, height, *addresses)
    return out


def _enclosing_pixels(pixels: NDArray[np.uint8], box: _FloatBox) -> tuple[NDArray[np.uint8], _FloatBox]:
    """Give the whole pixels that a box touches, a view, and the box within them."""
    left, top = math.floor(box[0]), math.floor(box[1])
    part = pixels[top : math.ceil(box[3]), left : math.ceil(box[2])]
    return part, (box[0] - left, box[1] - top, box[2] - left, box[3] - top)


# ------------------------------------------------------------------------- EXIF orientation and crops

EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What Pillow does to a stored picture of each EXIF orientation to show it as it was taken."""

# The way back, from the shown picture to the stored one: (swap the axes, then mirror columns, then mirror rows).
_TO_STORED = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_AS_STORED = (False, False, False)


def stored_box(crop_box: CropBox, sides: tuple[int, int], orientation: int) -> tuple[Box, int]:
    """Find a crop in the picture as stored, `sides` (width, height): its box there, and the scale to decode at.

    The scale is 1, 2, 4 or 8: the picture may be decoded at 1/scale and the crop still is not enlarged.
    """
    swap, mirror_x, mirror_y = _TO_STORED.get(orientation, _AS_STORED)
    width, height = sides
    left, top, right, bottom = crop_box.place((height, width) if swap else sides)
    if swap:
        left, top, right, bottom = top, left, bottom, right
    if mirror_x:
        left, right = width - right, width - left
    if mirror_y:
        top, bottom = height - bottom, height - top
    fits = min(right - left, bottom - top) // crop_box.size
    return (left, top, right, bottom), next(scale for scale in (8, 4, 2, 1) if fits >= scale or scale == 1)


def oriented_crop(crop_box: CropBox, pixels: NDArray[np.uint8], box: Box, scale: int, orientation: int) -> Crop:
    """Cut `box` out of pixels as stored (h, w, 3) that were decoded at 1/scale, and apply the EXIF orientation.

    Nothing is copied. Rows and columns after the crop may be missing from the pixels.
    """
    swap, mirror_x, mirror_y = _TO_STORED.get(orientation, _AS_STORED)
    left, top, right, bottom = (side / scale for side in box)
    height, width = pixels.shape[:2]
    if mirror_x:
        pixels, left, right = pixels[:, ::-1], width - right, width - left
    if mirror_y:
        pixels, top, bottom = pixels[::-1], height - bottom, height - top
    if swap:
        pixels, left, top, right, bottom = pixels.transpose(1, 0, 2), top, left, bottom, right
    return crop_box.crop_pixels(pixels, (left, top, right, bottom))


# ----------------------------------------------------------------------------------------- plain JPEGs

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers SOF0 to SOF15: ITU-T T.81, table B.1
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman coded
_PROGRESSIVE, _START_OF_SCAN, _APP1 = 0xC2, 0xDA, 0xE1
_END_OF_IMAGE, _EXIF = b"\xff\xd9", b"Exif\0\0"
_MAX_SEARCHED = 200_000_000  # bytes in which scans are counted


@dataclass(frozen=True, kw_only=True)
class JpegHeader:
    """What is known of a plain JPEG before it is decoded; sides in pixels as stored."""

    width: int
    height: int
    height_at: int  # where in the file the height stands, in two bytes
    mcu_height: int  # pixels in a row of blocks (MCUs) where the file stores rows in order, 0 where it does not
    orientation: int


@cache
def import_simplejpeg() -> ModuleType | None:
    """Import simplejpeg; None where it is not installed (the extra `jpeg`)."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decode_jpeg_crop(data: bytes, crop_box: CropBox, max_pixels: int) -> Crop | None:
    """Decode a crop of a plain JPEG; None where the file is not plain, has more pixels than that, or is damaged."""
    package = import_simplejpeg()
    head = read_jpeg_header(data) if package is not None else None
    if package is None or head is None or head.width * head.height > max_pixels:
        return None
    box, scale = stored_box(crop_box, (head.width, head.height), head.orientation)
    reduced = -(-head.width // scale)
    shortened = _without_rows_below(data, head, box[3])
    try:
        pixels = package.decode_jpeg(shortened, "RGB", min_width=reduced if scale > 1 else 0, strict=False)
    except ValueError:
        return None
    return oriented_crop(crop_box, pixels, box, scale, head.orientation) if pixels.shape[1] == reduced else None


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the header of a plain JPEG that is whole to its end marker; None for any other bytes."""
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(_END_OF_IMAGE):
        return None
    frame, at, orientation = None, 2, 1
    while at + 4 <= len(data):  # one marker segment after another: 0xFF, kind, length in two bytes, body
        start, kind, length = data[at], data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if start != 0xFF or kind in (0x01, 0xFF) or 0xD0 <= kind <= 0xD9 or length < 2:
            return None
        if kind == _START_OF_SCAN:  # what follows is entropy-coded: all that is wanted came before it
            return None if frame is None else _header(frame, body, orientation)
        if kind in _FRAMES:
            if frame is not None or kind not in _PLAIN_FRAMES or len(body) < 6:
                return None
            frame = (kind, at + 5, body)
        elif kind == _APP1 and body.startswith(_EXIF):
            orientation = 1
            with suppress(Exception):  # an EXIF block that cannot be read counts as none
                exif = Image.Exif()
                exif.load(body)
                orientation = int(exif.get(EXIF_ORIENTATION, 1))
        at += 2 + length
    return None


def count_jpeg_scans(file: BinaryIO) -> int:
    """Count the scans of a JPEG; of one that is sequential, with all components in its first scan, no more is read."""
    file.seek(0)
    is_sequential, components, at = False, b"", file.read(2)
    while at and len(segment := file.read(4)) == 4 and segment[0] == 0xFF:
        kind, body = segment[1], file.read(max(0, int.from_bytes(segment[2:], "big") - 2))
        if kind == _START_OF_SCAN:
            if is_sequential and body[:1] == components:
                return 1  # the decoder ends with this scan, whatever follows
            break
        if kind in _FRAMES:
            is_sequential, components = kind & 3 != 2, body[5:6]
    file.seek(0)
    return file.read(_MAX_SEARCHED).count(bytes((0xFF, _START_OF_SCAN)))  # in coded data a zero follows 0xFF


def _header(frame: tuple[int, int, bytes], scan: bytes, orientation: int) -> JpegHeader | None:
    kind, height_at, body = frame
    depth, num_components = body[0], body[5]
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if depth != 8 or num_components not in (1, 3) or len(body) != 6 + 3 * num_components or not (width and height):
        return None
    # Rows are stored in order where one scan holds all components; a progressive file has several scans.
    in_order = kind != _PROGRESSIVE and scan[:1] == bytes([num_components])
    vertical_sampling = max(body[7::3]) & 15 if num_components == 3 else 1
    mcu_height = 8 * vertical_sampling if in_order else 0
    return JpegHeader(width=width, height=height, height_at=height_at, mcu_height=mcu_height, orientation=orientation)


def _without_rows_below(data: bytes, head: JpegHeader, bottom: int) -> bytes:
    """Write a smaller height into the file, so that the decoder stops after the rows of blocks down to `bottom`.

    One more row of blocks is decoded, since chroma is interpolated across their border.
    """
    if not head.mcu_height:
        return data
    height = (-(-bottom // head.mcu_height) + 1) * head.mcu_height
    if height >= head.height:
        return data
    return b"".join((data[: head.height_at], height.to_bytes(2, "big"), data[head.height_at + 2 :]))
