"""Decoding any image file to 8-bit RGB; what cannot be used raises BadData with one sentence that says why.

| in the file | becomes |
|---|---|
| EXIF orientation | applied; an unreadable EXIF block counts as none |
| alpha, palette or colour-key transparency | over white |
| 16-bit grey | scaled, round(v / 257); deeper colour by its high byte |
| CMYK | the naive conversion; JPEG as Adobe stores it, inverted |
| animated GIF, WebP, PNG; multi-picture JPEG and TIFF | the first frame |
| colour profile | ignored, as networks are trained |
| float or 32-bit integer samples | refused: their range is not known |
| more than `MAX_PIXELS` | refused from the header, before anything is decoded |
| truncated, empty, not an image, not a regular file | refused |

Colour conversion and decoding are Pillow's, so what Pillow raises on damaged bytes becomes BadData here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from onefold.data.crop import EXIF_ORIENTATION, TRANSPOSE, Crop, CropBox, crop_jpeg, oriented_crop, stored_box
from onefold.errors import BadData

T = TypeVar("T")

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
) | {".ppm", ".pgm", ".pbm", ".pnm"}

# Other files that carry an image's suffix, by their first bytes.
_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image: run `git lfs pull`"),
    (b"%PDF", "a PDF document: export its pages as PNG"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"8BPS", "a Photoshop document: export it as PNG"),
)
_JPEG = ("JPEG", "MPO")
_MAX_JPEG_BYTES = 4 * MAX_PIXELS  # a file with more bytes is no photo, and is not read into memory
_TEXT = frozenset(range(32, 127)) | {9, 10, 13}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def decode(image: Path | str | bytes, *, name: str | None = None, min_side: int = 0) -> Image.Image:
    """Decode an image file, or a file's bytes: RGB, its EXIF orientation applied.

    `name` stands for the bytes in messages. With `min_side` above 0 a JPEG may come at 1/2, 1/4 or 1/8 of its scale,
    each side still `min_side` pixels or more: quicker, and for training only. Raises BadData, and nothing else.
    """
    return _with_file(image, name, lambda file, size, shown: _decode(file, size, shown, partial(_whole, min_side)))


def decode_crop(image: Path | str | bytes, crop_box: CropBox, *, name: str | None = None) -> Crop:
    """Decode a crop of an image, and no more of the image than the crop needs; for training.

    `crop_box` is placed in the picture at its full size, its orientation applied. A JPEG is decoded at 1/2, 1/4 or 1/8
    of its scale where the crop then still is not enlarged; else the result is that of the whole picture. Raises BadData
    only.
    """
    return _with_file(image, name, lambda file, size, shown: _decode_crop(file, size, shown, crop_box))


def printable(name: str | os.PathLike[str]) -> str:
    """Make a file's name fit for a message: control characters, and bytes that are not UTF-8, are escaped."""
    text = os.fspath(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _with_file(image: Path | str | bytes, name: str | None, use: Callable[[BinaryIO, int, str], T]) -> T:
    """Call `use` with the open file, its size in bytes and its name for messages. Raises BadData only."""
    if isinstance(image, bytes):
        return use(BytesIO(image), len(image), printable(name or f"an image of {len(image)} bytes"))
    shown = printable(name or image)
    try:
        status = os.stat(image)
        if not stat.S_ISREG(status.st_mode):  # before opening it: a FIFO would wait for ever, a device may not end
            raise BadData(f"{shown} is {_file_type(status.st_mode)}: expected an image file")
        with open(image, "rb") as file:
            return use(file, status.st_size, shown)
    except BadData:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that holds a null character
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise BadData(f"cannot read {shown}: {reason}") from error


def _decode_crop(file: BinaryIO, num_bytes: int, shown: str, crop_box: CropBox) -> Crop:
    if num_bytes <= _MAX_JPEG_BYTES:
        data = file.read()
        crop = crop_jpeg(data, crop_box, MAX_PIXELS)
        if crop is not None:
            return crop
        file = BytesIO(data)
    return _decode(file, num_bytes, shown, partial(_cropped, crop_box))


def _decode(file: BinaryIO, num_bytes: int, shown: str, finish: Callable[[ImageFile], T]) -> T:
    if num_bytes == 0:
        raise BadData(f"{shown} is empty (0 bytes)")
    Image.init()  # an allow-list that names an unloaded plugin is a KeyError otherwise
    try:
        opened = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        _check_header(opened, shown)
        return finish(opened)
    except BadData:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadData(f"{shown} has more than {MAX_PIXELS} pixels: make it smaller first") from error
    except UnidentifiedImageError as error:
        raise BadData(f"{shown} is {_describe(file)}") from error
    except MemoryError as error:
        raise BadData(f"{shown} needs more memory to decode than there is") from error
    except Exception as error:  # Pillow has no one error for damaged bytes: SyntaxError, KeyError, struct.error ...
        raise BadData(f"{shown} is truncated or damaged ({type(error).__name__}: {error})") from error


def _whole(min_side: int, opened: ImageFile) -> Image.Image:
    if min_side > 0 and opened.format in _JPEG:
        opened.draft(None, (min_side, min_side))
    opened.load()
    method = TRANSPOSE.get(_orientation(opened))
    image = _to_rgb(opened)
    oriented = image if method is None else image.transpose(method)
    oriented.info.clear()  # what it says of the file (orientation, profile, transparency) no longer holds
    return oriented


def _cropped(crop_box: CropBox, opened: ImageFile) -> Crop:
    if opened.format not in _JPEG:
        return crop_box.of(_whole(0, opened))
    orientation, (width, height) = _orientation(opened), opened.size
    box, scale = stored_box(crop_box, opened.size, orientation)
    if scale > 1:
        opened.draft(None, (width // scale, height // scale))
    opened.load()
    scale = round(width / opened.width)  # which of the scales that libjpeg offers it took
    return oriented_crop(crop_box, np.asarray(_to_rgb(opened)), box, scale, orientation)


def _check_header(image: Image.Image, shown: str) -> None:
    """Raise BadData for what the header alone shows to be unusable."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadData(f"{shown} has {width} x {height} pixels, more than {MAX_PIXELS}: make it smaller first")
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "float" if image.mode == "F" else "integer"
        raise BadData(f"{shown} has {kind} samples whose range is not known: save it with 8 or 16 bits, unsigned")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips instead of scaling
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # an EXIF block that cannot be read counts as none
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    return 1


def _describe(file: BinaryIO) -> str:
    """Say what a file that is no known image seems to be."""
    file.seek(0)
    head = file.read(512)
    for magic, what in _OTHER_FILES:
        if head.startswith(magic):
            return what
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return "a HEIC photo: convert it to JPEG (heif-convert, or the export of a photo program)"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not an image: the download went wrong"
    if b"<svg" in text:
        return "an SVG drawing: export it as PNG"
    if sum(byte in _TEXT for byte in head) > 0.8 * len(head):
        return "text, not an image"
    return f"not an image that can be read (one of {', '.join(FORMATS)}), or damaged at its start"


def _file_type(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"
