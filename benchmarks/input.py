"""Images a second on one core, from JPEG files to a normalised batch: ours against PIL as torchvision puts it together.

    python benchmarks/input.py [--photos FOLDER] [--rounds 40] [--side 500x375]

The photos of FOLDER (without it, of the shared sample of ImageNet) are resized to 500 x 375, JPEG, quality 90, in a
temporary folder. Both sides read the same files, draw the same crops and flips from the same numbers, and end with
float32 (32, 3, 224, 224). Interleaved in one process, one thread; the outputs are compared before anything is timed,
and the run ends if they differ by more than stated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, __version__

from onefold.bench import Procedure, compare
from onefold.data import Augment, HorizontalFlip, ImageLoader, Preprocessing, RandomResizedCrop, crop, find_images
from onefold.data.folders import ImageFiles
from onefold.data.sampler import sample_generator

SIZE, BATCH, NUM_PHOTOS = 224, 32, 96
CROP = RandomResizedCrop(size=SIZE, scale=(0.08, 1.0))
FLIP = HorizontalFlip()
NETWORK = Preprocessing(size=SIZE)
TOLERANCE = 1.0  # of 255 levels, any value of any image


def photos(folder: Path, out: Path, sides: tuple[int, int]) -> ImageFiles:
    """The first photos of a folder, resized."""
    names = []
    for i, path in enumerate(find_images([folder])[:NUM_PHOTOS]):
        names.append(f"{i:03d}.jpg")
        with Image.open(path) as photo:
            photo.convert("RGB").resize(sides, Image.Resampling.BICUBIC).save(out / names[-1], quality=90)
    return ImageFiles(out, names, [0] * len(names), ("photo",))


def usual(source: ImageFiles, n: int, samples: list[int]) -> torch.Tensor:
    """RandomResizedCrop, flip, to tensor, normalise: the order and the operations of torchvision's PIL transforms."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (NETWORK.mean, NETWORK.std))
    images = []
    for i in samples:
        rng = sample_generator(0, n, i)
        with (source.root / source.names[i]).open("rb") as file:
            image = Image.open(file).convert("RGB")
        image = image.crop(CROP.box(image.size, rng)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if rng.random() < FLIP.p:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        images.append(tensor.sub_(mean).div_(std))
    return torch.stack(images)


class Ours:
    """Epochs of a training's batches, one batch a call."""

    def __init__(self, source: ImageFiles, decoder: Callable[[], object]) -> None:
        augment = Augment(steps=(CROP, FLIP), preprocessing=NETWORK)
        self.batches = ImageLoader(source, augment, batch_size=BATCH, shuffle=True)
        self.decoder, self.n, self.step = decoder, 0, 0

    def __call__(self) -> torch.Tensor:
        crop.import_simplejpeg = self.decoder
        if self.step == len(self.batches):
            self.n, self.step = self.n + 1, 0
        images, _ = next(self.batches.epoch(self.n, self.step))
        self.step += 1
        return images


class Usual(Ours):
    """The same batches by the usual operations."""

    def __call__(self) -> torch.Tensor:
        if self.step == len(self.batches):
            self.n, self.step = self.n + 1, 0
        samples = self.batches.samples(self.n, self.step).tolist()
        self.step += 1
        return usual(self.batches.source, self.n, samples)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The largest and the mean difference of two batches, in levels of 255."""
    levels = (ours - theirs).abs() * 255 * torch.tensor(NETWORK.std).view(3, 1, 1)
    return float(levels.max()), float(levels.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = Path(os.environ.get("ONEFOLD_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--photos", type=Path, default=shared / "imagenet-sample")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--side", default="500x375")
    given = parser.parse_args()
    if not given.photos.is_dir():
        raise SystemExit(f"no photos at {given.photos}: give --photos FOLDER")
    width, height = map(int, given.side.split("x"))
    torch.set_num_threads(1)
    fast = crop.import_simplejpeg
    with tempfile.TemporaryDirectory() as folder:
        source = photos(given.photos, Path(folder), (width, height))
        size = sum(source.num_bytes(i) for i in range(len(source))) / len(source)
        print(f"{len(source)} photos of {width} x {height}, {size / 1024:.0f} KiB each; Pillow {__version__}, ", end="")
        print(f"torch {torch.__version__}, simplejpeg {getattr(fast(), '__version__', 'absent')}, one thread")
        makers = {"PIL as in torchvision": Usual(source, fast), "onefold": Ours(source, fast)}
        makers["onefold, Pillow only"] = Ours(source, lambda: None)
        reference = Usual(source, fast)()
        for name in list(makers)[1:]:
            most, mean = difference(Ours(source, makers[name].decoder)(), reference)
            print(f"{name}: at most {most:.2f} of 255 levels from PIL's batch, {mean:.4f} on average")
            if most > TOLERANCE + 0.01 and (width, height) == (500, 375):
                raise SystemExit(f"the outputs differ by more than {TOLERANCE} level: no speed is reported")
        outcome = compare(makers, Procedure(samples=given.rounds, warmup_calls=2, warmup_seconds=0))
        for name, m in outcome.measurements.items():
            rate = BATCH / (m.median_ns / 1e9)
            spread = f"spread {100 * m.spread:.0f} %"
            print(f"{name:24} {rate:7.0f} images/s  median {m.median_ns / 1e6 / BATCH:.3f} ms an image  {spread}")
        print(*outcome.sentences(), sep="\n")


if __name__ == "__main__":
    main()
