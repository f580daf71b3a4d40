"""Which files are images, and decoding any of them to 8-bit RGB; BadData says in one sentence why one cannot be used.

| in the file | becomes |
|---|---|
| EXIF orientation | applied; an unreadable EXIF block counts as none |
| alpha, palette or colour-key transparency | over white; `UNUSUAL_ALPHA` where alpha seems to be no transparency |
| samples of 16 bits, without a `value_range` | 0 to 65535: grey as round(v / 257), colour by its high byte |
| samples of 16 or 32 bits or floats, with one | low to high become 0 to 255, what lies outside is clipped |
| floats or integers of 32 bits, without one | refused: their range is not known |
| CMYK | the naive conversion; JPEG as Adobe stores it, inverted |
| animated GIF, WebP, PNG; multi-picture JPEG and TIFF | the first frame |
| colour profile | ignored, as networks are trained |
| more than `MAX_PIXELS` | comes at 1/2, 1/4 or 1/8 of its scale, the first that has no more |
| more than fit into the free memory, or than so few bytes can hold | refused from the header, before it is decoded |
| HEIC | decoded by pillow-heif (the extra `heic`), refused without it |
| a JPEG of more than `_MAX_SCANS` scans, each of which decodes the whole picture again | refused |
| truncated, empty, not an image, not a regular file | refused |

Colour conversion and decoding are Pillow's, so what Pillow raises on damaged bytes becomes BadData here.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from onefold.data.crop import (
    EXIF_ORIENTATION,
    EXIF_TRANSPOSE,
    Crop,
    CropBox,
    count_jpeg_scans,
    decode_jpeg_crop,
    oriented_crop,
    stored_box,
)
from onefold.data.preprocessing import FULL_16_BIT_RANGE, ValueRange, scale_to_8_bits
from onefold.data.value_range import decode_high_bit_depth
from onefold.errors import BadData
from onefold.system_resources import free_memory

_T = TypeVar("_T")

MAX_PIXELS = 50_000_000
"""The most pixels that a decoded picture has: a larger one comes at 1/2, 1/4 or 1/8 of its scale."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")

# ---------------------------------------------------------------------------------- which files are images

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
) | {".ppm", ".pgm", ".pbm", ".pnm"}
HEIC_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
ICLOUD_KIND = ".icloud"
ARCHIVE_SUFFIXES = frozenset((".zip", ".gz", ".tgz", ".7z", ".zst", ".rar", ".bz2", ".xz"))
_RAW_SUFFIXES = frozenset(
    (".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".orf", ".raf", ".rw2", ".pef", ".srw")
) | {".raw", ".rwl", ".3fr", ".iiq", ".x3f", ".kdc", ".dcr", ".mrw", ".erf", ".mef", ".mos"}
_ARRAY_SUFFIXES = frozenset(
    (".npz", ".npy", ".mat", ".h5", ".hdf5", ".pkl", ".pickle", ".bin", ".tfrecord", ".tfrec", ".mdb")
)
_NO_SUFFIX, MASK_KIND, _ARRAYS = "without a suffix", "masks beside their photos", "arrays without a suffix"
_IDX = "arrays in .gz"  # MNIST's

_SUFFIX = re.compile(r"\.[a-z0-9]{0,11}[a-z][a-z0-9]{0,11}$")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0\0\0\0|II\*\0|MM\0\*|P[1-6]\s+[#\d]|.{4}ftypavi[fs]",
    re.DOTALL,
)
_ARRAY_MAGIC = re.compile(rb"\x80[\x02-\x05]|\0\0\x08[\x01-\x04]\0")  # pickles, as of CIFAR; MNIST's idx files


def left_out_kind(name: str, head: Callable[[], bytes]) -> str | None:
    """Say as what a file of a dataset is left out: its suffix, or "without a suffix"; None where it is an image.

    The suffix decides: a dot and up to twelve letters and digits, one of them a letter; capitals and blanks at the end
    do not count. A file without one is an image where its first bytes, `head()`, are an image's. HEIC counts as an
    image where pillow-heif is installed.
    """
    lowered = name.strip().lower()
    match = _SUFFIX.search(lowered)
    suffix = match[0] if match else ""
    if not suffix and not lowered.endswith("~"):  # a tilde: an editor's copy of another file
        first = head()
        if _is_heif(first):
            suffix = ".heic"
        elif _MAGIC.match(first):
            return None
        suffix = suffix or _ARRAYS * bool(_ARRAY_MAGIC.match(first))
    if lowered.endswith("-ubyte.gz"):
        return _IDX
    if suffix in SUFFIXES or (suffix in HEIC_SUFFIXES and _heif_opener() is not None):
        return None
    return suffix or _NO_SUFFIX


def left_out_reason(kind: str) -> str:
    """Say why files of a kind that `left_out_kind` gave are not used, and what would make them images."""
    if kind in HEIC_SUFFIXES:
        return 'HEIC photos, which pip install "onefold[heic]" reads'
    if kind == MASK_KIND:
        return "another image's name and _mask, _seg, _gt or the like"
    if kind in _RAW_SUFFIXES:
        return "raw photos: export them as JPEG or 16-bit TIFF"
    if kind == ICLOUD_KIND:
        return "photos that iCloud has not downloaded: download them"
    if kind in ARCHIVE_SUFFIXES:
        return "archives: unpack them"
    if kind == ".arrow":
        return "what datasets' save_to_disk writes: write each split as Parquet, load_from_disk(...).to_parquet(...)"
    if kind in (_ARRAYS, _IDX) or kind in _ARRAY_SUFFIXES:
        return "arrays and records are not read: save each picture as a PNG, in the folder of its class"
    return "no image by their first bytes" if kind == _NO_SUFFIX else "no suffix of an image"


def read_first_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read the first 16 bytes of a file; none of what is not a regular file or cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(16)
    except (OSError, ValueError):
        return b""


@cache
def _heif_opener() -> Callable[..., ImageFile] | None:
    """Import pillow-heif's reader of HEIC; None where it is not installed (the extra `heic`)."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        return None
    opener: Callable[..., ImageFile] = HeifImageFile
    return opener


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


# ------------------------------------------------------------------------------------------------ decoding

# Other files that carry an image's suffix, by their first bytes.
_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image: run `git lfs pull`"),
    (b"%PDF", "a PDF document: export its pages as PNG"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"8BPS", "a Photoshop document: export it as PNG"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture: convert it to PNG"),
    (b"II*\0", "a TIFF of a kind that cannot be read (its number of channels or their bits), or damaged"),
    (b"MM\0*", "a TIFF of a kind that cannot be read (its number of channels or their bits), or damaged"),
)
_MAX_JPEG_BYTES = 200_000_000  # a file with more bytes is no photo, and is not read into memory
_TEXT = frozenset(range(32, 127)) | {9, 10, 13}

_BYTES_PER_PIXEL = 12  # Pillow keeps RGB in 4, and turning or converting it takes another 8 for a while
_BYTES_OF_COEFFICIENTS = 6  # a progressive JPEG is kept whole as coefficients, three of two bytes a pixel
_MAX_SCALE = 8
_MAX_SCANS = 100  # of a JPEG: encoders make about ten, and each takes as long as the picture has pixels
_MAX_UNSCALED_PIXELS = 1 << 30  # of a format that cannot be decoded at a smaller scale: seconds
# Pixels for each byte of a file, above `MAX_PIXELS`. No photo has 20; a JPEG of one colour has 350, a PNG of one 344.
_MAX_PIXELS_PER_JPEG_BYTE, _MAX_PIXELS_PER_BYTE = 400, 200


UNUSUAL_ALPHA = "alpha is no transparency"
"""A key of a decoded picture's `info`: its fourth channel has many values in most pixels, as infrared or depth has."""
UNUSUAL_ALPHA_NOTE = (
    "a fourth channel that does not look like transparency, by which they are laid over white (if it is infrared or "
    "depth, save them without it)"
)
"""What a message says of such pictures."""
_MIN_ODD_LEVELS = 16  # different values; a picture that is half transparent everywhere has one

_SAY_RANGE = "save it with 8 or 16 bits, unsigned, or give the values that become black and white (value_range)"


class _RefusedError(Exception):
    """What is wrong with a picture, as the rest of a sentence that begins with its name."""


def decode_image(
    image: Path | str | bytes, *, name: str | None = None, min_side: int = 0, value_range: ValueRange | None = None
) -> Image.Image:
    """Decode an image file, or a file's bytes: RGB, its EXIF orientation applied.

    `name` stands for the bytes in messages. With `min_side` above 0 a JPEG may come at 1/2, 1/4 or 1/8 of its scale,
    each side still `min_side` pixels or more: quicker, and for training only. `value_range` are the values that become
    0 and 255 where samples have more than 8 bits. Raises BadData, and nothing else.
    """
    finish = partial(_whole, min_side, value_range)
    return _with_file(image, name, lambda file, size, shown: _decode(file, size, shown, finish))


def pil_to_rgb(image: Image.Image, *, value_range: ValueRange | None = None) -> Image.Image:
    """Give an image that Pillow holds as `decode_image` gives a file: RGB, EXIF orientation applied, over white.

    Raises BadData where its file is damaged, and where its samples have a range that is not known.
    """
    try:
        image.load()
        if image.mode in ("F", "I") and value_range is None:
            raise BadData(f"a PIL image of mode {image.mode} has samples whose range is not known: {_SAY_RANGE}")
        is_deep = image.mode.startswith(("I", "F"))
        colours = (
            Image.fromarray(scale_to_8_bits(np.asarray(image), value_range or FULL_16_BIT_RANGE)) if is_deep else None
        )
        rgb = _over_white(image, None if colours is None else colours.convert("RGB"))
    except (OSError, ValueError) as error:
        raise error if isinstance(error, BadData) else BadData(f"a PIL image cannot be used: {error}") from error
    method = EXIF_TRANSPOSE.get(_orientation(image))
    oriented = rgb if method is None else rgb.transpose(method)
    oriented.info = {}
    return oriented


def decode_crop(image: Path | str | bytes, crop_box: CropBox, *, name: str | None = None) -> Crop:
    """Decode a crop of an image, and no more of the image than the crop needs; for training.

    `crop_box` is placed in the picture at its full size, its orientation applied. A JPEG is decoded at 1/2, 1/4 or 1/8
    of its scale where the crop then still is not enlarged; else the result is that of the whole picture. Raises BadData
    only.
    """
    return _with_file(image, name, lambda file, size, shown: _decode_crop(file, size, shown, crop_box))


def read_samples(image: Path | str | bytes, *, name: str | None = None) -> NDArray[Any] | None:
    """Read the stored samples of an image that has more than 8 bits: (h, w) or (h, w, 3); None where it has 8.

    Of 8 bits no more than the header is read. Raises BadData only.
    """
    return _with_file(image, name, lambda file, size, shown: _decode(file, size, shown, decode_high_bit_depth))


def printable_name(name: str | os.PathLike[str]) -> str:
    """Make a file's name fit for a message: control characters, and bytes that are not UTF-8, are escaped."""
    text = os.fspath(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _with_file(image: Path | str | bytes, name: str | None, use: Callable[[BinaryIO, int, str], _T]) -> _T:
    """Call `use` with the open file, its size in bytes and its name for messages. Raises BadData only."""
    if isinstance(image, bytes):
        return use(BytesIO(image), len(image), printable_name(name or f"an image of {len(image)} bytes"))
    shown = printable_name(name or image)
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
        crop = None if count_jpeg_scans(BytesIO(data)) > _MAX_SCANS else decode_jpeg_crop(data, crop_box, MAX_PIXELS)
        if crop is not None:
            return crop
        file = BytesIO(data)
    return _decode(file, num_bytes, shown, partial(_cropped, crop_box))


def _decode(file: BinaryIO, num_bytes: int, shown: str, finish: Callable[[ImageFile], _T]) -> _T:
    if num_bytes == 0:
        raise BadData(f"{shown} is empty (0 bytes)")
    try:
        opened = _open(file)
        _check_header(opened, num_bytes)
        if opened.format == "JPEG" and (scans := count_jpeg_scans(file)) > _MAX_SCANS:
            raise _RefusedError(f"has {scans} scans, and no photo has more than {_MAX_SCANS}: it is damaged, or a trap")
        return finish(opened)
    except _RefusedError as error:
        raise BadData(f"{shown} {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadData(f"{shown} has more pixels than Pillow decodes in this format: make it smaller first") from error
    except UnidentifiedImageError as error:
        raise BadData(f"{shown} is {_describe(file)}") from error
    except MemoryError as error:
        raise BadData(f"{shown} needs more memory to decode than there is") from error
    except Exception as error:  # Pillow has no one error for damaged bytes: SyntaxError, KeyError, struct.error ...
        raise BadData(f"{shown} is truncated or damaged ({type(error).__name__}: {error})") from error


def _open(file: BinaryIO) -> ImageFile:
    """Read the header, as `Image.open` does, which refuses by a number of pixels that is the same on every machine."""
    Image.init()
    head = file.read(16)
    for name in _FORMATS:
        opener, accept = _opener(name, head)
        if opener is not None and accept:
            file.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # it was another format's after all
                return opener(file, "")
    raise UnidentifiedImageError


def _opener(name: str, head: bytes) -> tuple[Callable[..., ImageFile] | None, bool]:
    """Give what opens a format, and whether a file's first bytes are of that format."""
    if name == "HEIF":
        return (_heif_opener(), True) if _is_heif(head) else (None, False)
    opener, accepts = Image.OPEN.get(name, (None, None))
    # of a JPEG with several pictures the first: Pillow's class for them refuses large ones
    return JpegImageFile if name == "JPEG" else opener, accepts is None or accepts(head) is True


def _check_header(image: ImageFile, num_bytes: int) -> None:
    """Raise for a picture that is too large for the free memory, or too large to be in so few bytes."""
    width, height = image.size
    pixels = width * height
    if pixels <= MAX_PIXELS // 10:
        return
    sides, is_jpeg = f"{width} x {height} pixels", image.format == "JPEG"
    most_per_byte = _MAX_PIXELS_PER_JPEG_BYTE if is_jpeg else _MAX_PIXELS_PER_BYTE
    if pixels > MAX_PIXELS and pixels > most_per_byte * num_bytes:
        raise _RefusedError(f"has {sides} in {num_bytes} bytes, more than a photo can have: it is damaged, or a trap")
    if pixels > (_MAX_SCALE**2 * MAX_PIXELS if is_jpeg else _MAX_UNSCALED_PIXELS):
        raise _RefusedError(f"has {sides}, more than can be decoded: make it smaller first")
    needed = _BYTES_PER_PIXEL * (pixels // _scale(image.size) ** 2 if is_jpeg else pixels)
    if "progressive" in image.info:
        needed += _BYTES_OF_COEFFICIENTS * pixels
    free = free_memory()
    if needed > free:
        memory = f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        raise _RefusedError(f"has {sides}, more than fit: decoding takes {memory}; make it smaller first")


def _scale(sides: tuple[int, int]) -> int:
    """Give 1, 2, 4 or 8: a picture of these sides is given at 1/scale."""
    pixels = sides[0] * sides[1]
    return next((scale for scale in (1, 2, 4) if pixels <= MAX_PIXELS * scale**2), _MAX_SCALE)


def _whole(min_side: int, value_range: ValueRange | None, opened: ImageFile) -> Image.Image:
    scale, (width, height) = _scale(opened.size), opened.size
    if opened.format == "JPEG" and (min_side > 0 or scale > 1):
        sides = width // scale, height // scale
        opened.draft(None, (min_side, min_side) if 0 < min_side <= min(sides) or scale == 1 else sides)
    image = _to_rgb(opened, value_range)
    method = EXIF_TRANSPOSE.get(_orientation(opened))  # asked for once it is loaded: Pillow turns a TIFF itself
    if image.width * image.height > MAX_PIXELS:  # a format that knows no smaller scale
        image = image.reduce(scale)
    oriented = image if method is None else image.transpose(method)
    is_odd = UNUSUAL_ALPHA in image.info
    oriented.info.clear()  # what it says of the file (orientation, profile, transparency) no longer holds
    if is_odd:
        oriented.info[UNUSUAL_ALPHA] = True
    return oriented


def _cropped(crop_box: CropBox, opened: ImageFile) -> Crop:
    if opened.format != "JPEG":
        return crop_box.crop_image(_whole(0, crop_box.value_range, opened))
    orientation, (width, height) = _orientation(opened), opened.size
    box, scale = stored_box(crop_box, opened.size, orientation)
    scale = max(scale, _scale(opened.size))
    # libjpeg takes the largest scale of its own that fits
    drafted = opened.draft(None, (width // scale, height // scale)) if scale > 1 else None
    scale = round(width / drafted[1][2]) if drafted else 1
    return oriented_crop(crop_box, np.asarray(_to_rgb(opened, None)), box, scale, orientation)


def _to_rgb(image: ImageFile, value_range: ValueRange | None) -> Image.Image:
    """Decode: RGB, 8 bits."""
    if value_range is None and (image.mode == "F" or (image.mode == "I" and image.format != "PPM")):
        kind = "float" if image.mode == "F" else "integer"
        raise _RefusedError(f"has {kind} samples whose range is not known: {_SAY_RANGE}")
    if image.mode.startswith(("I", "F")) or value_range is not None:
        samples = decode_high_bit_depth(image)
        if samples is not None:
            return _over_white(
                image, Image.fromarray(scale_to_8_bits(samples, value_range or FULL_16_BIT_RANGE)).convert("RGB")
            )
    image.load()
    return _over_white(image, None)


def _over_white(image: Image.Image, colours: Image.Image | None) -> Image.Image:
    """Lay a loaded picture over white where it is transparent; `colours` in place of its own where given."""
    if not image.has_transparency_data or image.mode.startswith(("I", "F")):
        return colours or image.convert("RGB")
    rgba = image.convert("RGBA")
    white, alpha = Image.new("RGB", image.size, (255, 255, 255)), rgba.getchannel("A")
    white.paste(colours or rgba.convert("RGB"), mask=alpha)
    counts = np.array(alpha.histogram())[1:-1]  # of what is neither transparent nor opaque
    if 2 * counts.sum() > image.width * image.height and np.count_nonzero(counts) >= _MIN_ODD_LEVELS:
        white.info[UNUSUAL_ALPHA] = True
    return white


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
    if _is_heif(head):
        return "a damaged HEIC photo" if _heif_opener() else 'a HEIC photo: pip install "onefold[heic]" reads it'
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not an image: the download went wrong"
    if b"<svg" in text:
        return "an SVG drawing: export it as PNG"
    if sum(byte in _TEXT for byte in head) > 0.8 * len(head):
        return "text, not an image"
    return f"not an image that can be read (one of {', '.join(_FORMATS)}), or damaged at its start"


def _file_type(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"
