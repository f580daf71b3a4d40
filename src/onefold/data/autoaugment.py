"""AutoAugment and RandAugment, and the operations that they draw from.

A level is a share of an operation's range, 0 to 1. Three readings of it are in use, and they differ in more than
detail: in the one of the EfficientNet code, a high level posterizes and solarizes less, not more (see `_Reading`).

Both policies carry a `strength`, by which a curriculum makes them milder: levels are multiplied by it, and so are the
probabilities of operations without a level. At 1 they are what their papers say; near 0 they change almost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from onefold.data.preprocessing import PIL_FILTERS, Interpolation
from onefold.errors import BadArgument

_Reading = Literal["autoaugment", "efficientnet", "increasing"]
"""How a level is read.

"autoaugment": a higher level changes more; 8 to 4 bits are kept (Cubuk et al., arXiv 1805.09501, Table 6, in the order
of torchvision). "efficientnet": as in Google's EfficientNet code, and timm's `rand-m9` after it: factors from 0.1 to
1.9, so that the middle changes nothing, 0 to 4 bits kept, and a threshold that solarizes less the higher it is.
"increasing": timm's `inc1`: a higher level changes more; 4 to 0 bits are kept.
"""

_Operation = Literal[
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
OPERATIONS: tuple[_Operation, ...] = get_args(_Operation)
OPERATIONS_WITHOUT_LEVEL: tuple[_Operation, ...] = ("autocontrast", "equalize", "invert")

_Fill = tuple[int, int, int]
_Colour = tuple[int, ...] | int
_Apply = Callable[[Image.Image, float, _Colour, Image.Resampling], Image.Image]

_MAX_SHEAR, _MAX_DEGREES, _MAX_ADD = 0.3, 30.0, 110  # AutoAugment's Table 6; solarize_add is RandAugment's
_MAX_SHIFT = {"autoaugment": 150 / 331, "efficientnet": 0.45, "increasing": 0.45}  # of a side
_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_BLENDS = ("color", "contrast", "brightness", "sharpness")


def level_to_argument(name: _Operation, level: float, reading: _Reading, rng: np.random.Generator) -> float:
    """Give what `level`, 0 to 1, means for an operation: degrees, a factor, bits, a threshold, a share of a side.

    Directions are drawn, each with probability 1/2 (a number is drawn for every operation, whether it has a direction
    or not). Operations in WITHOUT_LEVEL have no parameter: 0.0.
    """
    sign = 1.0 if rng.random() < 0.5 else -1.0
    if name in _SIGNED:
        most = {"rotate": _MAX_DEGREES, "shear_x": _MAX_SHEAR, "shear_y": _MAX_SHEAR}.get(name, _MAX_SHIFT[reading])
        return sign * level * most
    if name in _BLENDS:
        return 0.1 + 1.8 * level if reading == "efficientnet" else max(0.1, 1.0 + sign * 0.9 * level)
    if name == "posterize":
        return {"autoaugment": 8 - round(4 * level), "efficientnet": int(4 * level)}.get(reading, 4 - int(4 * level))
    if name == "solarize":
        falling = 255.0 * (1 - level) if reading == "autoaugment" else 256 - int(256 * level)
        return int(256 * level) if reading == "efficientnet" else falling
    return float(int(_MAX_ADD * level)) if name == "solarize_add" else 0.0


def apply_operation(
    name: _Operation, image: Image.Image, value: float, fill: _Fill, interpolation: Interpolation
) -> Image.Image:
    """Apply one operation to an RGB or grey picture; `fill` is what moves in from outside."""
    colour = fill if image.mode == "RGB" else sum(fill) // 3
    return _APPLY[name](image, value, colour, PIL_FILTERS[interpolation])


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: _Colour, how: Image.Resampling) -> Image.Image:
    """Take pixel (x, y) of the result from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=fill)


def _rotate(image: Image.Image, degrees: float, fill: _Colour, how: Image.Resampling) -> Image.Image:
    return image.rotate(degrees, how, fillcolor=fill)


def _shear_x(image: Image.Image, share: float, fill: _Colour, how: Image.Resampling) -> Image.Image:
    return _affine(image, (1, share, 0, 0, 1, 0), fill, how)


def _shear_y(image: Image.Image, share: float, fill: _Colour, how: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, 0, share, 1, 0), fill, how)


def _translate_x(image: Image.Image, share: float, fill: _Colour, how: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, share * image.width, 0, 1, 0), fill, how)


def _translate_y(image: Image.Image, share: float, fill: _Colour, how: Image.Resampling) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, share * image.height), fill, how)


def _solarize_add(image: Image.Image, add: float, fill: _Colour, how: Image.Resampling) -> Image.Image:
    """Make the dark half of the values lighter by `add`."""
    table = [min(255, value + int(add)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _posterize(image: Image.Image, bits: float, fill: _Colour, how: Image.Resampling) -> Image.Image:
    """Keep the first `bits` bits of each value."""
    mask = 256 - (1 << (8 - int(bits)))
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


_APPLY: dict[_Operation, _Apply] = {
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


_PolicyStep = tuple[_Operation, float, int]
"""An operation, its probability, and its level of 0 to 9."""

_GREY: _Fill = (128, 128, 128)

# arXiv 1805.09501, Table 9. Some rows stand there twice, and so they are drawn twice as often.
IMAGENET_POLICY: tuple[tuple[_PolicyStep, _PolicyStep], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
_MAX_LEVEL = 9  # of AutoAugment; RandAugment's magnitudes go to 10


@dataclass(frozen=True, kw_only=True)
class AutoAugment:
    """Applies one of a learned policy's 25 pairs of operations, each with its own probability (arXiv 1805.09501)."""

    policy: Literal["imagenet"] = "imagenet"
    strength: float = 1.0
    fill: _Fill = _GREY
    interpolation: Interpolation = "bilinear"
    min_decode_side: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.policy != "imagenet":
            raise BadArgument(f"policy is {self.policy!r}, expected 'imagenet'")
        _check_strength(self.strength)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Apply none, one or both operations of a drawn pair."""
        for name, probability, level in IMAGENET_POLICY[int(rng.integers(len(IMAGENET_POLICY)))]:
            if rng.random() < probability * (self.strength if name in OPERATIONS_WITHOUT_LEVEL else 1.0):
                value = level_to_argument(name, self.strength * level / _MAX_LEVEL, "autoaugment", rng)
                image = apply_operation(name, image, value, self.fill, self.interpolation)
        return image


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Applies `num_ops` random operations at one magnitude of 0 to 10 (arXiv 1909.13719, with what timm adds).

    timm's `rand-m9-mstd0.5` is num_ops 2, magnitude 9, std 0.5, p 0.5, reading "efficientnet"; with `inc1`, reading
    "increasing". Each operation is skipped with probability 1 - p; its magnitude is normal around `magnitude`.
    """

    num_ops: int
    magnitude: float
    std: float = 0.0
    p: float = 1.0
    reading: _Reading = "increasing"
    strength: float = 1.0
    fill: _Fill = _GREY
    interpolation: Interpolation = "bilinear"
    min_decode_side: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_ops <= 100:
            raise BadArgument(f"num_ops is {self.num_ops}, expected 1 to 100 operations")
        if not 0 <= self.magnitude <= 10 or not 0 <= self.std <= 10:
            raise BadArgument(f"magnitude is {self.magnitude} and std {self.std}, expected numbers from 0 to 10")
        if not 0 <= self.p <= 1:
            raise BadArgument(f"p is {self.p}, expected a probability from 0 to 1")
        _check_strength(self.strength)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Apply the operations in the order in which they are drawn."""
        for number in rng.integers(len(OPERATIONS), size=self.num_ops).tolist():
            name = OPERATIONS[number]
            if rng.random() < self.p * (self.strength if name in OPERATIONS_WITHOUT_LEVEL else 1.0):
                level = self.strength * min(max(rng.normal(self.magnitude, self.std), 0.0), 10.0) / 10
                value = level_to_argument(name, level, self.reading, rng)
                image = apply_operation(name, image, value, self.fill, self.interpolation)
        return image


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise BadArgument(f"strength is {strength}, expected a share from 0 to 1")
