"""The value range of samples with more than 8 bits: which stored values become 0 and 255.

A 16-bit file does not say how many of its bits are used: a 12-bit camera fills a sixteenth of the range, a thermal one
a strip of it. So the range is a property of a training set. It is measured once, over its training images, kept in the
`Preprocessing`, and applied as it is in training, evaluation, prediction and artifacts: one value is one grey, in every
file and at every time. A range of each file's own would lose what classes that differ by level differ in.

The rule, over up to `_MAX_MEASURED` images spread evenly over the set:
    8, 10, 12, 14 or 16 bits, the first that the greatest value fits: 0 to 2^bits - 1. Floats: 0 to 1, or 0 to 255.
    Values that span less than a quarter of that, or that fit none: from the least to the greatest, a tenth of the span
    wider at each end. The least and greatest are of 998 in 1000 pixels of a file, so that a dead pixel does not count.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile

from onefold.data.preprocessing import FULL_16_BIT_RANGE, ValueRange
from onefold.errors import BadData

_MAX_MEASURED = 200

_BITS = (8, 10, 12, 14, 16)
_FLOAT_RANGES: tuple[ValueRange, ...] = ((0, 1), (0, 255))
_MIN_SHARE = 0.25  # of a range that values must span, or their own span is taken
_MARGIN = 0.1  # of the span, at each end: images that are still to come
_TAIL = 0.1  # percent of a file's pixels at each end that do not count
_MAX_COUNTED = 1 << 16  # pixels of a file whose order is found
_MAX_OPENED = 8  # files that by their suffix have 8 bits, and may have another format's name
_EIGHT_BIT_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".avif", ".heic"))


class _Images(Protocol):
    def __len__(self) -> int: ...
    def name(self, i: int) -> str: ...
    def raw_samples(self, i: int) -> NDArray[Any] | None: ...


@dataclass(frozen=True, kw_only=True)
class MeasuredRange:
    """The value range of some images, and the sentence that says what was seen. `is_float` is whether any holds floats
    or integers of 32 bits, which have no range of their own."""

    value_range: ValueRange
    sentence: str
    is_float: bool

    @property
    def is_full_range(self) -> bool:
        """Whether this is the range that 16-bit samples have anyway."""
        return self.value_range == FULL_16_BIT_RANGE


def measure_value_range(images: _Images) -> MeasuredRange | None:
    """Measure the value range of images by the rule above; None where none of those looked at has more than 8 bits."""
    found = list(_extremes(images))
    if not found:
        return None
    least, greatest, low, high = min(f[0] for f in found), max(f[1] for f in found), *_span(found)
    is_float = any(f[4] for f in found)
    whole: tuple[ValueRange, ...] = _FLOAT_RANGES if is_float else tuple((0, 2**bits - 1) for bits in _BITS)
    fitting = next((each for each in whole if least >= each[0] and greatest <= each[1]), None)
    if fitting is None or high - low < _MIN_SHARE * (fitting[1] - fitting[0]):
        margin = _MARGIN * (high - low) or 0.5
        wider = low - margin, high + margin
        fitting = wider if is_float else (max(0, math.floor(wider[0])), min(FULL_16_BIT_RANGE[1], math.ceil(wider[1])))
    kind = "float or 32-bit samples" if is_float else "16-bit samples"
    sentence = (
        f"{kind} lie between {low:g} and {high:g} in the {len(found)} images looked at: {fitting[0]:g} is taken as "
        f"black and {fitting[1]:g} as white (preprocessing.value_range), in training and ever after"
    )
    return MeasuredRange(value_range=fitting, sentence=sentence, is_float=is_float)


def describe_range_mismatch(images: _Images, value_range: ValueRange | None) -> str | None:
    """Say where images have samples that a network's value range shows nearly black or white, or not at all."""
    found = measure_value_range(images)
    if found is None:
        return None
    low, high = value_range or FULL_16_BIT_RANGE
    if value_range is None and found.is_float:
        return None  # each of them is refused by name
    inside = min(high, found.value_range[1]) - max(low, found.value_range[0])
    if inside >= _MIN_SHARE * (high - low) and inside >= _MIN_SHARE * (found.value_range[1] - found.value_range[0]):
        return None
    taken = found.sentence.split(":")[0]
    return (
        f"{taken}, and this network takes {low:g} as black and {high:g} as white, so it sees them nearly uniform: "
        "scale them as its training images were, or train on images like these"
    )


def _span(found: list[tuple[float, float, float, float, bool]]) -> ValueRange:
    return min(f[2] for f in found), max(f[3] for f in found)


def _extremes(images: _Images) -> Iterator[tuple[float, float, float, float, bool]]:
    """Give of each image with deep samples its least and greatest value, both without the tails, and its kind."""
    count, opened = len(images), 0
    for i in (n * count // _MAX_MEASURED for n in range(_MAX_MEASURED)) if count > _MAX_MEASURED else range(count):
        if os.path.splitext(images.name(i))[1].lower() in _EIGHT_BIT_SUFFIXES:
            opened += 1
            if opened > _MAX_OPENED:
                continue
        try:
            samples = images.raw_samples(i)
        except BadData:  # left out, and named, where it is used
            continue
        values = None if samples is None else samples.ravel()
        if values is None or not np.isfinite(values).any():
            continue
        finite = values[np.isfinite(values)]
        counted = finite[:: -(-len(finite) // _MAX_COUNTED)]
        low, high = np.percentile(counted, (_TAIL, 100 - _TAIL), method="nearest").tolist()
        is_float = finite.dtype.kind == "f" or finite.min() < 0 or finite.max() > FULL_16_BIT_RANGE[1]
        yield float(finite.min()), float(finite.max()), float(low), float(high), bool(is_float)


# --------------------------------------------------------------------------------- the samples of one file

_SWAPPED = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}  # of rawmodes: the other byte first


def decode_high_bit_depth(image: ImageFile) -> NDArray[Any] | None:
    """Decode an opened image that has more than 8 bits a sample: (h, w) or (h, w, 3); None where it has 8.

    The image is loaded then. Of 8 bits nothing but the header has been read.
    """
    if image.mode.startswith(("I", "F")):
        image.load()
        return np.asarray(image)
    args = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]
    if not args or not all(re.fullmatch(r"(RGB|RGBA|LA);16[LBN]", str(each[0])) for each in args):
        return None
    # Pillow keeps one byte of each colour: the picture is read twice, the second time with the bytes exchanged, or,
    # where it is grey with alpha, with a pixel's four bytes as if they were four colours.
    is_grey = str(args[0][0]).startswith("LA")
    if image.fp is None:
        image.load()
        return 257 * np.asarray(image.convert("RGB")).astype(np.uint16)  # Pillow has no way to the low byte of these
    image.fp.seek(0)
    again = type(image)(BytesIO(image.fp.read()))
    again.tile = [
        tile._replace(args=("RGBA" if is_grey else each[0][:-1] + _SWAPPED[each[0][-1]], *each[1:]))
        for tile, each in zip(image.tile, args, strict=True)
    ]
    image.load()
    again.load()
    if is_grey:
        read = np.asarray(again).astype(np.uint16)
        return 256 * read[..., 0] + read[..., 1]
    high, low = (np.asarray(each)[..., :3].astype(np.uint16) for each in (image, again))
    return 256 * high + low
