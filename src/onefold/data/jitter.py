"""Colours changed at random, and parts of a picture erased."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from onefold.errors import BadArgument

_ATTEMPTS = 10  # to fit a rectangle of the drawn area and shape, before the picture stays whole


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Brightness, contrast and saturation by factors of 1 - x to 1 + x, hue by a share of the circle, in any order."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    at_least: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation) < 0 or not 0 <= self.hue <= 0.5:
            given = f"{self.brightness}, {self.contrast}, {self.saturation} and hue {self.hue}"
            raise BadArgument(f"the jitter is {given}: expected numbers of 0 or more, and a hue from 0 to 0.5")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture in other colours; a grey one has neither saturation nor hue."""
        reaches = (self.brightness, self.contrast, self.saturation)
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for number in rng.permutation(4).tolist():
            if number == 3:
                image = _turned(image, rng.uniform(-self.hue, self.hue)) if self.hue else image
            elif reaches[number]:
                factor = rng.uniform(max(0.0, 1 - reaches[number]), 1 + reaches[number])
                image = kinds[number](image).enhance(factor)
        return image


def _turned(image: Image.Image, share: float) -> Image.Image:
    if image.mode != "RGB":
        return image
    hue, *rest = image.convert("HSV").split()
    by = round(share * 256)
    hue = hue.point([(value + by) % 256 for value in range(256)])
    return Image.merge("HSV", (hue, *rest)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """A rectangle of the normalised picture put out, with chance `p` (arXiv 1708.04896).

    `area` bounds the rectangle's share of the picture, `ratio` its height over its width. It is filled with a normal
    number a value ("pixel"), or with 0, the mean of all pictures ("mean").
    """

    p: float
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 10 / 3)
    fill: Literal["pixel", "mean"] = "pixel"

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise BadArgument(f"p is {self.p}, expected a chance from 0 to 1")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            given = f"area is {self.area} and ratio {self.ratio}"
            raise BadArgument(f"{given}: expected rising shares above 0 and at most 1, and rising numbers above 0")
        if self.fill not in ("pixel", "mean"):
            raise BadArgument(f"fill is {self.fill!r}, expected 'pixel' or 'mean'")

    def __call__(self, pixels: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """float32 (C, H, W) -> the same, with a rectangle put out; the given array stays as it is."""
        box = self.box(pixels.shape[1], pixels.shape[2], rng) if rng.random() < self.p else None
        if box is None:
            return pixels
        top, left, height, width = box
        erased = pixels.copy()
        part = erased[:, top : top + height, left : left + width]
        part[:] = rng.standard_normal(part.shape, np.float32) if self.fill == "pixel" else 0.0
        return erased

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
        """Where the rectangle lies: top, left, height, width; None where none fits after a few attempts."""
        for _ in range(_ATTEMPTS):
            area = height * width * rng.uniform(*self.area)
            shape = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < h < height and 0 < w < width:
                return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
        return None
