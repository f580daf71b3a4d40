"""Preprocessing turns a picture into a network's input: resize, centre crop, normalise.

Training, evaluation and exported artifacts share one `Preprocessing` value. C = channels, H = W = size. It follows
torchvision to the pixel, as published ImageNet weights expect: the short side becomes round(size / crop_pct), the long
side is floored; the corner of the centre crop is rounded, halves to even; bilinear and bicubic filters are antialiased
(Pillow's), so that shrinking averages pixels instead of skipping them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.config import Range, check_fields, from_dict, to_dict
from onefold.errors import BadArgument

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bilinear", "bicubic", "nearest"]
PIL_FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
ValueRange = tuple[float, float]
"""The stored values that become 0 and 255, where samples have more than 8 bits."""

FULL_16_BIT_RANGE: ValueRange = (0, 65535)
"""What 16-bit samples have without a measured range."""

_MAX_ASPECT_RATIO = 16  # of a picture that is resized whole


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a network's input; called with one, it gives float32 (C, H, W), contiguous."""

    size: Annotated[int, Range(1, 8192)] = 224
    crop_pct: Annotated[float, Range(0.0, 1.0)] = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    channels: Annotated[int, Range(1, 1024)] = 3
    value_range: ValueRange | None = None  # None: 0 to 65535, see value_range.py

    def __post_init__(self) -> None:
        check_fields(self, "preprocessing")
        if self.crop_pct == 0:
            raise BadArgument("preprocessing.crop_pct is 0, expected more than 0 and at most 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels or not np.isfinite(values).all():
                raise BadArgument(
                    f"preprocessing.{name} is {values}, expected {self.channels} numbers, one per channel"
                )
        low, high = self.value_range or (0, 1)
        if not (np.isfinite((low, high)).all() and low < high):
            raise BadArgument(f"preprocessing.value_range is {self.value_range}, expected two rising numbers")
        if min(self.std) <= 0:
            raise BadArgument(f"preprocessing.std is {self.std}, expected numbers above 0")

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Resize, crop and normalise an RGB picture of any size: float32 (C, H, W).

        One with samples of more than 8 bits is mapped by the value range first. Raises BadArgument for one of floats or
        32 bits where there is none.
        """
        if image.mode.startswith(("I", "F")):
            if self.value_range is None and image.mode in ("I", "F"):
                raise BadArgument(
                    f"an image of mode {image.mode} has samples whose range is not known: set preprocessing.value_range"
                )
            image = Image.fromarray(scale_to_8_bits(np.asarray(image), self.value_range or FULL_16_BIT_RANGE)).convert(
                "RGB"
            )
        return self.normalise(self.crop(image))

    def crop(self, image: Image.Image) -> Image.Image:
        """Give the part of the picture that the network sees, resized: size x size pixels."""
        shrunk = resize_short_side(image, round(self.size / self.crop_pct), self.interpolation)
        return centre_crop(shrunk, self.size)

    def normalise(self, image: Image.Image) -> NDArray[np.float32]:
        """Compute (v / 255 - mean) / std of each pixel, float32 (C, H, W).

        A pixel has 256 values, so each is looked up in a table that was computed in float64.
        """
        self.check_takes_photos()
        mode = "RGB" if self.channels == 3 else "L"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        planes = pixels.reshape(*pixels.shape[:2], self.channels)
        table = _normalisation_table(self.mean, self.std)
        return np.stack([table[c].take(planes[:, :, c]) for c in range(self.channels)])

    def check_takes_photos(self) -> None:
        """Raise BadArgument where the network's images have channels that photos do not have."""
        if self.channels not in (1, 3):
            shape = (self.channels, self.size, self.size)
            raise BadArgument(
                f"the network takes images of {self.channels} channels, and photos are read as 3 or 1: in Python give "
                f"it arrays of floats {shape} that are prepared already"
            )

    def scale_and_offset(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give (scale, offset), (C,) each: v * scale + offset is within 1e-6 of `normalise`, and quicker."""
        return _scale_and_offset(self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON can hold them; `from_dict` reads them. A value range only where there is one."""
        return {name: value for name, value in to_dict(self).items() if name != "value_range" or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read what `to_dict` wrote. A missing field has its default, an unknown one raises BadArgument."""
        return from_dict(cls, values, "preprocessing")


IMAGENET_PREPROCESSING = Preprocessing()


def resize_short_side(image: Image.Image, short: int, interpolation: Interpolation = "bilinear") -> Image.Image:
    """Resize a picture to a short side of `short` pixels, its aspect ratio kept; unchanged where it has that already.

    Of a very long picture only the middle is kept, 16 times as long as it is wide: a strip of 1 x 3,000,000 pixels
    that is enlarged whole would fill the memory.
    """
    width, height = image.size
    shorter = min(width, height)
    if max(width, height) > _MAX_ASPECT_RATIO * shorter:
        left, top = (max(0, side - _MAX_ASPECT_RATIO * shorter) // 2 for side in image.size)
        image = image.crop((left, top, width - left, height - top))
        width, height = image.size
    if shorter == short:
        return image
    return image.resize((width * short // shorter, height * short // shorter), PIL_FILTERS[interpolation])


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Give the middle size x size pixels; neither side may be shorter than `size`."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def scale_to_8_bits(samples: NDArray[Any], value_range: ValueRange) -> NDArray[np.uint8]:
    """Map low to 0 and high to 255, rounded and clipped; what is no number becomes 0."""
    low, high = value_range
    levels = (samples.astype(np.float32 if samples.dtype.itemsize == 2 else np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(np.nan_to_num(levels, nan=0.0), 0, 255)).astype(np.uint8)


@lru_cache(maxsize=64)
def _normalisation_table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """Give (C, 256): what each of a pixel's 256 values becomes, computed in float64 and rounded once."""
    values = np.arange(256) / 255
    table = (values - np.array(mean)[:, None]) / np.array(std)[:, None]
    return table.astype(np.float32)


@lru_cache(maxsize=64)
def _scale_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    scale, offset = 1 / (255 * np.array(std)), -np.array(mean) / np.array(std)
    return scale.astype(np.float32), offset.astype(np.float32)
