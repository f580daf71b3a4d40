"""From a picture to a network's input: `Preprocessing`, the one value that training, evaluation and artifacts share.

C = channels, H = W = size. The conventions to the pixel (torchvision's, which published ImageNet weights expect): the
short side to round(size / crop_pct), the long side floored; the corner of the centre crop rounded, halves to even;
bilinear and bicubic with antialiasing (Pillow's), so that shrinking averages instead of skipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.errors import BadArgument

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

STRIP = 16

Interpolation = Literal["bilinear", "bicubic", "nearest"]
FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a network's input; called with one, it gives float32 (C, H, W), contiguous."""

    size: int = 224
    crop_pct: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    channels: Literal[1, 3] = 3

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise BadArgument(f"preprocessing: {problem}")

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Resize, crop and normalise an RGB picture of any size."""
        return self.normalise(self.crop(image))

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of the picture that the network sees, size x size."""
        shrunk = resize_short_side(image, round(self.size / self.crop_pct), self.interpolation)
        return centre_crop(shrunk, self.size)

    def normalise(self, image: Image.Image) -> NDArray[np.float32]:
        """(v / 255 - mean) / std of each pixel, float32 (C, H, W): one look-up, since a pixel has 256 values."""
        mode = "RGB" if self.channels == 3 else "L"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        planes = pixels.reshape(*pixels.shape[:2], self.channels)
        table = _levels(self.mean, self.std)
        return np.stack([table[c].take(planes[:, :, c]) for c in range(self.channels)])

    def line(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(gain, offset), (C,) each: level * gain + offset is within 1e-6 of `normalise`, and quicker."""
        return _line(self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` reads it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The value that `to_dict` wrote; what is missing has its default, an unknown name is BadArgument."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise BadArgument(f"preprocessing has no {', '.join(unknown)}: expected {', '.join(known)}")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)

    def _problem(self) -> str | None:
        if not isinstance(self.size, int) or not 1 <= self.size <= 8192:
            return f"size is {self.size!r}, expected 1 to 8192 pixels"
        if not isinstance(self.crop_pct, float | int) or not 0 < self.crop_pct <= 1:
            return f"crop_pct is {self.crop_pct!r}, expected more than 0 and at most 1"
        if self.interpolation not in FILTERS:
            return f"interpolation is {self.interpolation!r}, expected one of {', '.join(FILTERS)}"
        if self.channels not in (1, 3):
            return f"channels is {self.channels!r}, expected 1 or 3"
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple) or len(values) != self.channels or not np.isfinite(values).all():
                return f"{name} is {values!r}, expected {self.channels} numbers, one a channel"
        return None if min(self.std) > 0 else f"std is {self.std!r}, expected numbers above 0"


IMAGENET = Preprocessing()


def resize_short_side(image: Image.Image, short: int, interpolation: Interpolation = "bilinear") -> Image.Image:
    """The picture with its short side `short` pixels and its shape kept; the picture itself where it is so already.

    Of a strip only the middle is kept, `STRIP` times as long as it is wide: enlarged whole, it could fill the memory.
    """
    width, height = image.size
    shorter = min(width, height)
    if max(width, height) > STRIP * shorter:
        left, top = (max(0, side - STRIP * shorter) // 2 for side in image.size)
        image = image.crop((left, top, width - left, height - top))
        width, height = image.size
    if shorter == short:
        return image
    return image.resize((width * short // shorter, height * short // shorter), FILTERS[interpolation])


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size x size pixels; neither side may be shorter than `size`."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


@lru_cache(maxsize=64)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """(C, 256): what each of a pixel's 256 values becomes, computed in float64 and rounded once."""
    values = np.arange(256) / 255
    table = (values - np.array(mean)[:, None]) / np.array(std)[:, None]
    return table.astype(np.float32)


@lru_cache(maxsize=64)
def _line(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    gain, offset = 1 / (255 * np.array(std)), -np.array(mean) / np.array(std)
    return gain.astype(np.float32), offset.astype(np.float32)
