"""Data augmentation: transforms of pictures, each a frozen value that is called, and `Augment`, a series of them.

A transform takes a picture and the random generator of this sample in this epoch, and gives a new picture. It draws
from nothing else, so what a sample becomes does not depend on workers, batches or order. AutoAugment and RandAugment
are in autoaugment.py, mixup and CutMix, which work on batches, in mixup.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from onefold.data.crop import Box, Crop, CropBox
from onefold.data.preprocessing import Interpolation, Preprocessing, centre_crop, resize_short_side
from onefold.errors import BadArgument

_ATTEMPTS = 10  # to fit a box of the drawn area and shape, as torchvision does


class ImageTransform(Protocol):
    """One augmentation of a picture."""

    @property
    def min_decode_side(self) -> int:
        """The shortest side, in pixels, at which a picture may be decoded without loss for this transform.

        0 means at full size. It is asked of the first transform only, which sees the picture as decoded.
        """

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Give a new picture; `image` stays as it is."""


_T = TypeVar("_T", bound=ImageTransform)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resizes the short side to `size`, the aspect ratio kept."""

    size: int
    interpolation: Interpolation = "bilinear"

    @property
    def min_decode_side(self) -> int:
        """Twice the size, so that the resize still has pixels to average."""
        return 2 * self.size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Resize the picture."""
        return resize_short_side(image, self.size, self.interpolation)


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """Cuts out the middle `size` x `size` pixels."""

    size: int
    min_decode_side: ClassVar[int] = 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Give the middle; black where the picture is too small."""
        return centre_crop(image, self.size)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """Cuts a box of random area and aspect ratio and resizes it to size x size (arXiv 1409.4842, section 6).

    `scale` bounds the box's share of the area (uniform), `ratio` its width over its height (log-uniform). Where no box
    fits in ten attempts, the largest one in the middle is taken, its ratio clipped to the bounds.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise BadArgument(f"scale is {self.scale}, expected two rising shares of the area, above 0 and at most 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise BadArgument(f"ratio is {self.ratio}, expected two rising numbers above 0")

    @property
    def min_decode_side(self) -> int:
        """Enough that the smallest crop, at its narrowest, is not enlarged because it was decoded small."""
        narrowest = min(self.ratio[0], 1 / self.ratio[1])
        return math.ceil(self.size / math.sqrt(self.scale[0] * narrowest))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Cut and resize."""
        return self.crop_box(rng).crop_image(image).image()

    def crop_box(self, rng: np.random.Generator) -> CropBox:
        """Give the crop as a dataset takes it, which then need not decode what lies outside."""
        return CropBox(size=self.size, place=partial(self.box, rng=rng), interpolation=self.interpolation)

    def box(self, sides: tuple[int, int], rng: np.random.Generator) -> Box:
        """Draw where the crop lies in a picture of `sides` (width, height): left, top, right, bottom."""
        width, height = sides
        for _ in range(_ATTEMPTS):
            area = width * height * rng.uniform(*self.scale)
            shape = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, round(height * self.ratio[1])), min(height, round(width / self.ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + max(w, 1), top + max(h, 1)


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """Mirrors the picture with probability `p`. Not for digits and letters."""

    p: float = 0.5
    min_decode_side: ClassVar[int] = 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Give the picture or its mirror image."""
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.p else image


@dataclass(frozen=True, kw_only=True)
class RandomShift:
    """Moves the picture by up to `pixels` whole pixels each way; black moves in."""

    pixels: int
    min_decode_side: ClassVar[int] = 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Move the picture."""
        left, top = (int(rng.random() * (2 * self.pixels + 1)) - self.pixels for _ in range(2))
        return image.crop((left, top, left + image.width, top + image.height))


@dataclass(frozen=True, kw_only=True)
class RandomAffine:
    """Rotates by up to `degrees`, scales by a factor in `zoom`, moves by up to `shift` of a side; black moves in."""

    degrees: float
    shift: float
    zoom: tuple[float, float] = (1.0, 1.0)
    min_decode_side: ClassVar[int] = 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Rotate about the middle, scale and move, in one bilinear resampling."""
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        zoom = rng.uniform(*self.zoom)
        right, down = (side * rng.uniform(-self.shift, self.shift) for side in image.size)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        x, y = image.width / 2, image.height / 2
        # Pillow wants the inverse, from a pixel of the result to where it comes from: back by the shift, then the
        # inverse rotation and scale about the middle.
        row_x = (cos, sin, x - cos * (x + right) - sin * (y + down))
        row_y = (-sin, cos, y + sin * (x + right) - cos * (y + down))
        matrix = (*row_x, *row_y)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Changes brightness, contrast, saturation by factors of 1 - x to 1 + x, hue by +-x of the circle, in any order."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    min_decode_side: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation) < 0 or not 0 <= self.hue <= 0.5:
            given = f"{self.brightness}, {self.contrast}, {self.saturation} and hue {self.hue}"
            raise BadArgument(f"the jitter is {given}: expected numbers of 0 or more, and a hue from 0 to 0.5")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Change the colours; a grey picture has neither saturation nor hue."""
        strengths = (self.brightness, self.contrast, self.saturation)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for number in rng.permutation(4).tolist():
            if number == 3:
                image = _shift_hue(image, rng.uniform(-self.hue, self.hue)) if self.hue else image
            elif strengths[number]:
                factor = rng.uniform(max(0.0, 1 - strengths[number]), 1 + strengths[number])
                image = enhancers[number](image).enhance(factor)
        return image


def _shift_hue(image: Image.Image, share: float) -> Image.Image:
    if image.mode != "RGB":
        return image
    hue, *rest = image.convert("HSV").split()
    shift = round(share * 256)
    hue = hue.point([(value + shift) % 256 for value in range(256)])
    return Image.merge("HSV", (hue, *rest)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """Overwrites a rectangle of the normalised picture, with probability `p` (arXiv 1708.04896).

    `area` bounds the rectangle's share of the picture (uniform), `ratio` its height over its width (log-uniform). It is
    filled with standard normal numbers, one per value ("pixel"), or with 0, the mean of all pictures ("mean").
    """

    p: float
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 10 / 3)
    fill: Literal["pixel", "mean"] = "pixel"

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise BadArgument(f"p is {self.p}, expected a probability from 0 to 1")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            given = f"area is {self.area} and ratio {self.ratio}"
            raise BadArgument(f"{given}: expected rising shares above 0 and at most 1, and rising numbers above 0")
        if self.fill not in ("pixel", "mean"):
            raise BadArgument(f"fill is {self.fill!r}, expected 'pixel' or 'mean'")

    def __call__(self, pixels: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """Give float32 (C, H, W) with a rectangle overwritten; `pixels` stays as it is."""
        box = self.box(pixels.shape[1], pixels.shape[2], rng) if rng.random() < self.p else None
        if box is None:
            return pixels
        top, left, height, width = box
        erased = pixels.copy()
        part = erased[:, top : top + height, left : left + width]
        part[:] = rng.standard_normal(part.shape, np.float32) if self.fill == "pixel" else 0.0
        return erased

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
        """Draw where the rectangle lies: top, left, height, width; None where none fits in ten attempts."""
        for _ in range(_ATTEMPTS):
            area = height * width * rng.uniform(*self.area)
            shape = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < h < height and 0 < w < width:
                return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
        return None


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training does to each picture: the transforms `steps` in order, then normalisation, then `erase`.

    The transforms must leave the preprocessing's size (RandomResizedCrop, or Resize and CentreCrop do): nothing is
    resized behind their back.
    """

    steps: tuple[ImageTransform, ...]
    preprocessing: Preprocessing
    erase: RandomErasing | None = None

    @property
    def min_decode_side(self) -> int:
        """The shortest side at which a picture may be decoded, as the first transform says; 0: full size."""
        return self.steps[0].min_decode_side if self.steps else 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.float32]:
        """Give float32 (C, H, W). BadArgument where the transforms leave another size than the preprocessing's."""
        return self._apply(self.steps, image, rng)

    def crop_box(self, rng: np.random.Generator) -> CropBox | None:
        """Give the crop that the first transform takes of the stored picture; None where it needs the whole picture."""
        first = self.steps[0] if self.steps else None
        if not isinstance(first, RandomResizedCrop):
            return None
        return replace(first.crop_box(rng), value_range=self.preprocessing.value_range)

    def after_crop(self, crop: Crop, rng: np.random.Generator) -> NDArray[np.float32]:
        """Apply the transforms after the first to the crop that `crop_box` asked for: float32 (C, H, W)."""
        steps = self.steps[1:]
        only_flips = all(isinstance(step, HorizontalFlip) for step in steps)
        if not only_flips or self.preprocessing.channels != 3 or crop.size != self.preprocessing.size:
            return self._apply(steps, crop.image(), rng)
        # The usual case: resize, mirror and normalise in one pass. The flips draw what they would draw one by one.
        mirror = sum(rng.random() < step.p for step in steps if isinstance(step, HorizontalFlip)) % 2 == 1
        pixels = crop.normalised(*self.preprocessing.scale_and_offset(), mirror=mirror)
        return pixels if self.erase is None else self.erase(pixels, rng)

    def _apply(
        self, steps: tuple[ImageTransform, ...], image: Image.Image, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        for step in steps:
            image = step(image, rng)
        size = self.preprocessing.size
        if image.size != (size, size):
            sizes = f"{image.width} x {image.height} pixels, the network takes {size} x {size}"
            raise BadArgument(f"the augmentation leaves {sizes}: have it resize and crop to that")
        pixels = self.preprocessing.normalise(image)
        return pixels if self.erase is None else self.erase(pixels, rng)


def with_image_size(steps: tuple[_T, ...], size: int) -> tuple[_T, ...]:
    """Give the same transforms for images of another size, in pixels."""
    sized = (RandomResizedCrop, Resize, CentreCrop)
    return tuple(replace(step, size=size) if isinstance(step, sized) else step for step in steps)
