"""A crop of a plain JPEG without decoding more of it than must be: simplejpeg, and only the rows and the scale needed.

What is decoded is bit for bit what Pillow would decode there (both are libjpeg-turbo, with the accurate transform), so
this is a quicker way and no other result. Only the plain are taken: baseline or progressive, 8 bits, grey or three
components, whole to the end marker. Everything else answers None, and Pillow decides what it is.

Rows below the crop are left undecoded by telling the decoder a smaller height: in a baseline file with one scan the
rows of blocks are stored in order. One more row of blocks is decoded, since chroma is interpolated across their border.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from PIL import Image

from onefold.data.crop import Cut, Window
from onefold.data.upright import ORIENTATION, stored_box, upright_cut

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # ITU-T T.81, table B.1
_PLAIN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman coded
_PROGRESSIVE, _SCAN, _APP1 = 0xC2, 0xDA, 0xE1
_END, _EXIF = b"\xff\xd9", b"Exif\0\0"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of a plain JPEG before it is decoded; sides in pixels as stored, before it is turned upright."""

    width: int
    height: int
    height_at: int  # where in the file the height stands, in two bytes
    row: int  # pixels in a row of blocks where rows are stored in order, 0 where they are not
    orientation: int


@cache
def simplejpeg() -> ModuleType | None:
    """The package, or None where it is not installed (the extra `jpeg`)."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def crop_jpeg(data: bytes, window: Window, max_pixels: int) -> Cut | None:
    """The crop, or None where the file is not plain, has more pixels than that, or is damaged."""
    package = simplejpeg()
    head = read_header(data) if package is not None else None
    if package is None or head is None or head.width * head.height > max_pixels:
        return None
    box, by = stored_box(window, (head.width, head.height), head.orientation)
    reduced = -(-head.width // by)
    rows = _without_rows_below(data, head, box[3])
    try:
        pixels = package.decode_jpeg(rows, "RGB", min_width=reduced if by > 1 else 0, strict=False)
    except ValueError:
        return None
    return upright_cut(window, pixels, box, by, head.orientation) if pixels.shape[1] == reduced else None


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG that is whole to its end marker; None for any other bytes."""
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(_END):
        return None
    frame, at, orientation = None, 2, 1
    while at + 4 <= len(data):
        start, kind, length = data[at], data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if start != 0xFF or kind in (0x01, 0xFF) or 0xD0 <= kind <= 0xD9 or length < 2:
            return None
        if kind == _SCAN:
            return None if frame is None else _header(frame, body, orientation)
        if kind in _FRAMES:
            if frame is not None or kind not in _PLAIN or len(body) < 6:
                return None
            frame = (kind, at + 5, body)
        elif kind == _APP1 and body.startswith(_EXIF):
            orientation = _exif_orientation(body)
        at += 2 + length
    return None


def _header(frame: tuple[int, int, bytes], scan: bytes, orientation: int) -> Header | None:
    kind, height_at, body = frame
    depth, num_components = body[0], body[5]
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if depth != 8 or num_components not in (1, 3) or len(body) != 6 + 3 * num_components or not (width and height):
        return None
    in_order = kind != _PROGRESSIVE and scan[:1] == bytes([num_components])
    tallest = max(body[7::3]) & 15 if num_components == 3 else 1
    row = 8 * tallest if in_order else 0
    return Header(width=width, height=height, height_at=height_at, row=row, orientation=orientation)


def _exif_orientation(body: bytes) -> int:
    with suppress(Exception):  # an EXIF block that cannot be read says nothing
        exif = Image.Exif()
        exif.load(body)
        return int(exif.get(ORIENTATION, 1))
    return 1


def _without_rows_below(data: bytes, head: Header, bottom: int) -> bytes:
    """The file with a height that ends a row of blocks below `bottom`."""
    if not head.row:
        return data
    height = (-(-bottom // head.row) + 1) * head.row
    if height >= head.height:
        return data
    return b"".join((data[: head.height_at], height.to_bytes(2, "big"), data[head.height_at + 2 :]))
