"""Pictures, datasets and loaders that the tests of data share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from onefold.data import (
    Augment,
    AutoAugment,
    CachedDataset,
    ColorJitter,
    Curriculum,
    Dataset,
    HorizontalFlip,
    ImageLoader,
    Preprocessing,
    ProgressiveAugment,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    Stage,
    open_dataset,
)
from onefold.data.crop import Crop, CropBox
from onefold.data.preprocessing import ValueRange

SMALL = Preprocessing(size=8, crop_pct=1.0)
CROP_AND_FLIP = Augment(steps=(RandomResizedCrop(size=8, scale=(0.3, 1.0)), HorizontalFlip()), preprocessing=SMALL)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write_images(folder: Path, files: Sequence[str]) -> Path:
    """A small, different image at each of these names."""
    for i, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(12, 16, i).save(folder / name)
    return folder


@dataclass(frozen=True)
class Shades:
    """A source whose image i is one shade of grey, so that a pixel tells which sample it is."""

    count: int
    classes: tuple[str, ...] = ("even", "odd")

    def __len__(self) -> int:
        return self.count

    def label(self, i: int) -> int:
        return i % 2

    def name(self, i: int) -> str:
        return f"shade-{i}"

    def image(self, i: int, *, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
        return Image.new("RGB", (8, 8), (i % 256, i // 256, 0))

    def raw_samples(self, i: int) -> None:
        """Eight bits."""

    def num_bytes(self, i: int) -> int:
        return 192

    def digest(self, i: int) -> str:
        return f"{i:064x}"


PLAIN = Preprocessing(size=8, crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


def image_numbers(images: torch.Tensor) -> list[int]:
    values = (images[:, :2, 0, 0] * 255).round().int()
    return (values[:, 0] + 256 * values[:, 1]).tolist()


def picture(seed: int = 0, side: int = 37) -> Image.Image:
    """A smooth gradient with noise, so that histograms and neighbourhoods matter."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 220, side * (side + 6)).reshape(side, side + 6, 1)
    return Image.fromarray((ramp + rng.integers(-20, 35, (side, side + 6, 3))).astype(np.uint8))


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


class Pictures:
    """Twenty-four pictures in memory."""

    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return 24

    def image(self, i: int, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
        return picture(i)

    def crop(self, i: int, window: CropBox) -> Crop:
        return window.crop_image(picture(i))

    def label(self, i: int) -> int:
        return i % 3

    def name(self, i: int) -> str:
        return f"{i}.png"

    def size(self, i: int) -> int:
        return 1


def photos(tmp_path: Path, count: int = 24) -> Dataset:
    return open_dataset(
        write_images(tmp_path, [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(count)]), "train", seed=0, val_fraction=0.0
    )


def same_batches(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def everything(size: int = 24) -> Augment:
    return Augment(
        steps=(
            RandomResizedCrop(size=size, scale=(0.2, 1.0)),
            HorizontalFlip(),
            AutoAugment(),
            RandAugment(num_ops=2, magnitude=9, std=0.5, p=0.5),
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        ),
        preprocessing=Preprocessing(size=size),
        erase=RandomErasing(p=0.5),
    )


CURRICULUM = Curriculum(stages=(Stage(epoch=0, size=16, strength=0.3), Stage(epoch=2, size=24)))


def batches(**given: object) -> ImageLoader:
    grows = ProgressiveAugment(augment=everything(), curriculum=CURRICULUM)
    return ImageLoader(CachedDataset(Pictures()), grows, batch_size=8, seed=4, shuffle=True, **given)  # type: ignore[arg-type]
