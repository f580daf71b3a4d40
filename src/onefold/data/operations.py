"""The operations that augmentation policies draw from: what each does to a picture, and what a level means to it.

A level is a share of the operation's range, 0 to 1. Three readings of it are in use, and they differ in more than
detail: in the one of the EfficientNet code, a high level posterizes and solarizes less, not more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from onefold.data.preprocessing import FILTERS, Interpolation

Reading = Literal["autoaugment", "efficientnet", "increasing"]
"""How a level is read.

"autoaugment": a higher level changes more; 8 to 4 bits are kept (Cubuk et al., arXiv 1805.09501, Table 6, in the order
of torchvision). "efficientnet": as in Google's EfficientNet code, and timm's `rand-m9` after it: factors from 0.1 to
1.9, so that the middle changes nothing, 0 to 4 bits kept, and a threshold that solarizes less the higher it is.
"increasing": timm's `inc1`: a higher level changes more; 4 to 0 bits are kept.
"""

Name = Literal[
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
]
NAMES: tuple[Name, ...] = get_args(Name)
LEVELLESS: tuple[Name, ...] = ("autocontrast", "equalize", "invert")

Fill = tuple[int, int, int]
Colour = tuple[int, ...] | int
Apply = Callable[[Image.Image, float, Colour, Image.Resampling], Image.Image]

_SHEAR, _TURN, _ADD = 0.3, 30.0, 110  # Table 6 of AutoAugment; RandAugment's solarize_add
_SHIFT = {"autoaugment": 150 / 331, "efficientnet": 0.45, "increasing": 0.45}  # of a side
_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_BLENDS = ("color", "contrast", "brightness", "sharpness")


def amount(name: Name, level: float, reading: Reading, rng: np.random.Generator) -> float:
    """What `level`, 0 to 1, means for an operation: degrees, a factor, bits, a threshold, a share of a side.

    Directions are drawn, each with one half. The operations in LEVELLESS have no level: 0.0.
    """
    sign = 1.0 if rng.random() < 0.5 else -1.0
    if name in _SIGNED:
        reach = {"rotate": _TURN, "shear_x": _SHEAR, "shear_y": _SHEAR}.get(name, _SHIFT[reading])
        return sign * level * reach
    if name in _BLENDS:
        return 0.1 + 1.8 * level if reading == "efficientnet" else max(0.1, 1.0 + sign * 0.9 * level)
    if name == "posterize":
        return {"autoaugment": 8 - round(4 * level), "efficientnet": int(4 * level)}.get(reading, 4 - int(4 * level))
    if name == "solarize":
        falling = 255.0 * (1 - level) if reading == "autoaugment" else 256 - int(256 * level)
        return int(256 * level) if reading == "efficientnet" else falling
    return float(int(_ADD * level)) if name == "solarize_add" else 0.0


def apply(name: Name, image: Image.Image, value: float, fill: Fill, interpolation: Interpolation) -> Image.Image:
    """A new picture: `image`, RGB or grey, after one operation; `fill` is what moves in from outside."""
    colour = fill if image.mode == "RGB" else sum(fill) // 3
    return _APPLY[name](image, value, colour, FILTERS[interpolation])


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Colour, how: Image.Resampling) -> Image.Image:
    """Pixel (x, y) of the result comes from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=fill)


def _rotate(image: Image.Image, degrees: float, fill: Colour, how: Image.Resampling) -> Image.Image:
    return image.rotate(degrees, how, fillcolor=fill)


def _shear_x(image: Image.Image, share: float, fill: Colour, how: Image.Resampling) -> Image.Image:
    return _affine(image, (1, share, 0, 0, 1, 0), fill, how)


def _shear_y(image: Image.Image, share: float, fill: Colour, how: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, 0, share, 1, 0), fill, how)


def _translate_x(image: Image.Image, share: float, fill: Colour, how: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, share * image.width, 0, 1, 0), fill, how)


def _translate_y(image: Image.Image, share: float, fill: Colour, how: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, share * image.height), fill, how)


def _solarize_add(image: Image.Image, add: float, fill: Colour, how: Image.Resampling) -> Image.Image:
    """The dark half made lighter by `add`."""
    table = [min(255, value + int(add)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _posterize(image: Image.Image, bits: float, fill: Colour, how: Image.Resampling) -> Image.Image:
    """Only the first `bits` bits of each value kept."""
    mask = 256 - (1 << (8 - int(bits)))
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


_APPLY: dict[Name, Apply] = {
    "autocontrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": lambda image, threshold, *_: ImageOps.solarize(image, int(threshold)),
    "solarize_add": _solarize_add,
    "color": lambda image, factor, *_: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor, *_: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor, *_: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor, *_: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
