"""Training's view of a picture: small steps, each a value with a call, and `Augment`, which puts them in series.

A step takes a picture and the random numbers of this sample in this epoch, and gives a new picture. It draws from
nothing else, so what a sample becomes does not hang on workers, batches or order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Cut, Window
from onefold.data.jitter import RandomErasing
from onefold.data.preprocessing import Interpolation, Preprocessing, centre_crop, resize_short_side
from onefold.errors import BadArgument

_ATTEMPTS = 10  # to fit a crop of the drawn area and shape, before the middle is taken


class Step(Protocol):
    """One augmentation."""

    @property
    def at_least(self) -> int:
        """How small, in pixels of either side, a picture may be decoded before this step loses by it; 0: not at all."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A new picture; the given one stays as it is."""


AnyStep = TypeVar("AnyStep", bound=Step)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """The short side to `size`, the shape kept."""

    size: int
    interpolation: Interpolation = "bilinear"

    @property
    def at_least(self) -> int:
        """Twice the size, so that the resize still has pixels to average."""
        return 2 * self.size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture, larger or smaller."""
        return resize_short_side(image, self.size, self.interpolation)


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """The middle `size` x `size` pixels."""

    size: int
    at_least: ClassVar[int] = 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The middle; black where the picture is too small."""
        return centre_crop(image, self.size)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A part of the picture with a random area and shape, resized to size x size (Szegedy et al. 2014, section 6).

    `scale` is the part's share of the area, `ratio` its width over its height, each drawn between two bounds.
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
    def at_least(self) -> int:
        """Enough that the smallest crop, at its narrowest, is not enlarged for having been decoded small."""
        narrowest = min(self.ratio[0], 1 / self.ratio[1])
        return math.ceil(self.size / math.sqrt(self.scale[0] * narrowest))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The crop, resized."""
        return self.window(rng).of(image).image()

    def window(self, rng: np.random.Generator) -> Window:
        """The crop as it can be asked of a source, which then need not decode what lies outside."""
        return Window(size=self.size, place=partial(self.box, rng=rng), interpolation=self.interpolation)

    def box(self, sides: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Where the crop lies: left, top, right, bottom."""
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
    """The mirror image, with probability `p`. Not for digits and letters."""

    p: float = 0.5
    at_least: ClassVar[int] = 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture or its mirror image."""
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.p else image


@dataclass(frozen=True, kw_only=True)
class RandomShift:
    """Moved by up to `pixels` whole pixels each way; black moves in."""

    pixels: int
    at_least: ClassVar[int] = 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture, moved."""
        left, top = (int(rng.random() * (2 * self.pixels + 1)) - self.pixels for _ in range(2))
        return image.crop((left, top, left + image.width, top + image.height))


@dataclass(frozen=True, kw_only=True)
class RandomAffine:
    """Turned by up to `degrees`, enlarged by a factor of `zoom`, moved by up to `shift` of a side; black moves in."""

    degrees: float
    shift: float
    zoom: tuple[float, float] = (1.0, 1.0)
    at_least: ClassVar[int] = 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture, turned about its middle, enlarged and moved; bilinear."""
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        zoom = rng.uniform(*self.zoom)
        right, down = (side * rng.uniform(-self.shift, self.shift) for side in image.size)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        x, y = image.width / 2, image.height / 2
        # Pillow asks where each pixel of the result comes from: back by the shift, then the inverse about the middle.
        across = (cos, sin, x - cos * (x + right) - sin * (y + down))
        along = (-sin, cos, y + sin * (x + right) - cos * (y + down))
        where = (*across, *along)
        return image.transform(image.size, Image.Transform.AFFINE, where, Image.Resampling.BILINEAR)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training does to each picture: the steps in their order, the preprocessing's normalisation, then `erase`.

    The steps leave the preprocessing's size (RandomResizedCrop, or Resize and CentreCrop): nothing is resized unasked.
    """

    steps: tuple[Step, ...]
    preprocessing: Preprocessing
    erase: RandomErasing | None = None

    @property
    def at_least(self) -> int:
        """How small a picture may be decoded: the first step says, since it sees the picture as decoded."""
        return self.steps[0].at_least if self.steps else 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.float32]:
        """float32 (C, H, W); BadArgument where the steps leave another size than the preprocessing's."""
        return self._finished(image, rng, self.steps)

    def window(self, rng: np.random.Generator) -> Window | None:
        """The crop that the first step takes of the stored picture; None where it wants the whole picture."""
        first = self.steps[0] if self.steps else None
        return first.window(rng) if isinstance(first, RandomResizedCrop) else None

    def after_crop(self, cut: Cut, rng: np.random.Generator) -> NDArray[np.float32]:
        """float32 (C, H, W) of what `window` asked for: the steps after the first."""
        steps = self.steps[1:]
        flips = all(isinstance(step, HorizontalFlip) for step in steps)
        if not flips or self.preprocessing.channels != 3 or cut.size != self.preprocessing.size:
            return self._finished(cut.image(), rng, steps)
        mirror = sum(rng.random() < step.p for step in steps if isinstance(step, HorizontalFlip)) % 2 == 1
        pixels = cut.scaled(*self.preprocessing.line(), mirror=mirror)
        return pixels if self.erase is None else self.erase(pixels, rng)

    def _finished(self, image: Image.Image, rng: np.random.Generator, steps: tuple[Step, ...]) -> NDArray[np.float32]:
        for step in steps:
            image = step(image, rng)
        size = self.preprocessing.size
        if image.size != (size, size):
            came = f"{image.width} x {image.height} pixels, the network takes {size} x {size}"
            raise BadArgument(f"the augmentation leaves {came}: have it resize and crop to that")
        pixels = self.preprocessing.normalise(image)
        return pixels if self.erase is None else self.erase(pixels, rng)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, for logs."""
        steps = [{"step": type(step).__name__, **vars(step)} for step in self.steps]
        erase = None if self.erase is None else vars(self.erase)
        return {"steps": steps, "preprocessing": self.preprocessing.to_dict(), "erase": erase}


def at_size(steps: tuple[AnyStep, ...], size: int) -> tuple[AnyStep, ...]:
    """The same steps for images of another size, in pixels."""
    sized = (RandomResizedCrop, Resize, CentreCrop)
    return tuple(replace(step, size=size) if isinstance(step, sized) else step for step in steps)
