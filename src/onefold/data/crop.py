"""A crop that is chosen before a picture is decoded (`Window`), and what is there of the picture for it (`Cut`).

H = W = size. A cut is made first and resized then, so no pixel outside the crop counts (torchvision's convention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.preprocessing import FILTERS, Interpolation
from onefold.data.resample import Part, levels, outward, scaled

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a picture, chosen once the size of the picture is known, wanted at size x size pixels."""

    size: int
    place: Callable[[tuple[int, int]], Box]  # (width, height) of the upright picture -> where the crop lies
    interpolation: Interpolation = "bilinear"

    def of(self, image: Image.Image) -> Cut:
        """The crop of an RGB picture that is there whole."""
        return self.cut(np.asarray(image), self.place(image.size))

    def cut(self, pixels: NDArray[np.uint8], part: Part) -> Cut:
        """The crop of pixels (h, w, 3), where it lies in them."""
        return Cut(pixels=pixels, part=part, size=self.size, interpolation=self.interpolation)

    def reduction(self, box: Box) -> int:
        """By how much (1, 2, 4 or 8) a picture may be decoded smaller so that this crop of it still is not enlarged."""
        fits = min(box[2] - box[0], box[3] - box[1]) // self.size
        return next(by for by in (8, 4, 2, 1) if fits >= by or by == 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """A part of decoded pixels, not yet resized."""

    pixels: NDArray[np.uint8]  # (h, w, 3), perhaps a view that is turned
    part: Part
    size: int
    interpolation: Interpolation = "bilinear"

    def levels(self) -> NDArray[np.uint8]:
        """The crop, uint8 (H, W, 3)."""
        if self.interpolation == "bilinear":
            return levels(self.pixels, self.part, self.size)
        left, top, right, bottom = outward(self.part)
        whole = Image.fromarray(np.ascontiguousarray(self.pixels[top:bottom, left:right]))
        within = (self.part[0] - left, self.part[1] - top, self.part[2] - left, self.part[3] - top)
        return np.asarray(whole.resize((self.size, self.size), FILTERS[self.interpolation], box=within))

    def image(self) -> Image.Image:
        """The crop as a picture."""
        return Image.fromarray(np.ascontiguousarray(self.levels()))

    def scaled(self, gain: NDArray[np.float32], offset: NDArray[np.float32], *, mirror: bool) -> NDArray[np.float32]:
        """The crop, mirrored if asked, as float32 (3, H, W): level * gain + offset, one of each a channel."""
        if self.interpolation == "bilinear":
            return scaled(self.pixels, self.part, self.size, mirror=mirror, gain=gain, offset=offset)
        turned = self.levels()[:, ::-1] if mirror else self.levels()
        return np.ascontiguousarray((turned * gain + offset).transpose(2, 0, 1), np.float32)
