"""AutoAugment and RandAugment: which operations a picture meets, drawn from this sample's random numbers.

Both carry a `strength`, by which a curriculum makes them milder: levels are multiplied by it, and so are the chances of
operations without a level. At 1 they are what their papers say; near 0 they change almost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

from onefold.data.operations import LEVELLESS, NAMES, Fill, Name, Reading, amount, apply
from onefold.data.preprocessing import Interpolation
from onefold.errors import BadArgument

Draw = tuple[Name, float, int]
"""An operation, its chance, and its level of 0 to 9."""

GREY: Fill = (128, 128, 128)

# arXiv 1805.09501, Table 9. Some rows stand there twice: the search was free to, and so they are drawn twice as often.
IMAGENET_POLICY: tuple[tuple[Draw, Draw], ...] = (
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
_LAST = 9  # AutoAugment's levels are 0 to 9


@dataclass(frozen=True, kw_only=True)
class AutoAugment:
    """One of a learned policy's 25 pairs of operations, each of the two with its own chance (arXiv 1805.09501)."""

    policy: Literal["imagenet"] = "imagenet"
    strength: float = 1.0
    fill: Fill = GREY
    interpolation: Interpolation = "bilinear"
    at_least: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.policy != "imagenet":
            raise BadArgument(f"policy is {self.policy!r}, expected 'imagenet'")
        _check_strength(self.strength)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture after none, one or both operations of a pair."""
        for name, chance, level in IMAGENET_POLICY[int(rng.integers(len(IMAGENET_POLICY)))]:
            if rng.random() < chance * (self.strength if name in LEVELLESS else 1.0):
                value = amount(name, self.strength * level / _LAST, "autoaugment", rng)
                image = apply(name, image, value, self.fill, self.interpolation)
        return image


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_ops` operations, any, at one magnitude of 0 to 10 (arXiv 1909.13719, with what timm adds).

    timm's `rand-m9-mstd0.5` is num_ops 2, magnitude 9, std 0.5, p 0.5, reading "efficientnet"; with `inc1`, reading
    "increasing". Each operation is skipped with chance 1 - p, and its magnitude is normal around `magnitude`.
    """

    num_ops: int
    magnitude: float
    std: float = 0.0
    p: float = 1.0
    reading: Reading = "increasing"
    strength: float = 1.0
    fill: Fill = GREY
    interpolation: Interpolation = "bilinear"
    at_least: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_ops <= 100:
            raise BadArgument(f"num_ops is {self.num_ops}, expected 1 to 100 operations")
        if not 0 <= self.magnitude <= 10 or not 0 <= self.std <= 10:
            raise BadArgument(f"magnitude is {self.magnitude} and std {self.std}, expected numbers from 0 to 10")
        if not 0 <= self.p <= 1:
            raise BadArgument(f"p is {self.p}, expected a chance from 0 to 1")
        _check_strength(self.strength)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture after the operations, in the order in which they are drawn."""
        for number in rng.integers(len(NAMES), size=self.num_ops).tolist():
            name = NAMES[number]
            if rng.random() < self.p * (self.strength if name in LEVELLESS else 1.0):
                level = self.strength * min(max(rng.normal(self.magnitude, self.std), 0.0), 10.0) / 10
                image = apply(name, image, amount(name, level, self.reading, rng), self.fill, self.interpolation)
        return image


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise BadArgument(f"strength is {strength}, expected a share from 0 to 1")
