"""Damaged image files as a training meets them: a crop, or left out by name with a reason; nothing else, and soon."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from onefold.data import Augment, HorizontalFlip, ImageLoader, Preprocessing, RandomResizedCrop
from onefold.data.crop import CropBox
from onefold.data.decode import decode_crop, decode_image
from onefold.data.folders import ImageFiles
from onefold.errors import BadData
from test_decode import SEEDS, mutated

LIMIT_S = 5.0  # of processor time, for one file; the slowest seen take 0.1
WINDOW = CropBox(size=16, place=lambda sides: (0, 0, max(1, sides[0] // 2), max(1, sides[1] // 2)))


def damaged(folder: Path, count: int, seed: int) -> list[str]:
    """`count` files, each a mutation of one of the seed formats; names say which."""
    rng = random.Random(seed)
    kinds = list(SEEDS.items())
    names = []
    for i in range(count):
        kind, data = kinds[i % len(kinds)]
        names.append(f"{i:05d}-{kind.replace(' ', '-')}.jpg")  # the suffix of a photo, whatever it holds
        (folder / names[-1]).write_bytes(mutated(data, rng.choice(kinds)[1], rng))
    return names


def taken(path: Path) -> str | None:
    """Why a file is refused, None where it is not; both ways of reading it must hold to their word."""
    started = time.process_time()
    why = []
    for read in (
        lambda: decode_crop(path, WINDOW).resized().shape == (16, 16, 3),
        lambda: decode_image(path).mode == "RGB",
    ):
        try:
            sound, reason = read(), None
        except BadData as error:
            sound, reason = True, str(error)
        assert sound
        assert reason is None or (path.name in reason and reason.isprintable())
        why.append(reason)
    assert time.process_time() - started < LIMIT_S, f"{path.name} took long"
    return why[0]


def fuzz(folder: Path, count: int, seed: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for part in range(0, count, 500):
        names = damaged(folder, min(500, count - part), seed + part)
        for name in names:
            refused += taken(folder / name) is not None
            (folder / name).unlink()
    assert 0.2 < refused / count < 0.98  # the mutations reach the decoders, and some of them hurt
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: 1 GiB


@pytest.mark.filterwarnings("ignore")
def test_three_hundred_damaged_files(tmp_path: Path) -> None:
    fuzz(tmp_path, 300, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    fuzz(tmp_path, 10_000, seed=7)


@pytest.mark.filterwarnings("ignore")
def test_a_training_goes_on_over_damaged_and_vanishing_files(tmp_path: Path) -> None:
    names = damaged(tmp_path, 120, seed=3)
    for i in range(40):
        names.append(f"good-{i}.png")
        (tmp_path / names[-1]).write_bytes(SEEDS["png"])
    for gone in names[5:120:10]:
        (tmp_path / gone).unlink()
    source = ImageFiles(tmp_path, names, [i % 2 for i in range(len(names))], ("a", "b"))
    steps = (RandomResizedCrop(size=16, scale=(0.3, 1.0)), HorizontalFlip())
    augment = Augment(steps=steps, preprocessing=Preprocessing(size=16))
    batches = ImageLoader(
        source, augment, batch_size=20, shuffle=True, on_bad="skip", max_bad=len(names), num_workers=2
    )
    for n in range(2):
        seen = 0
        for images, labels in batches.epoch(n):
            assert images.shape[1:] == (3, 16, 16)
            assert np.isfinite(images.numpy()).all()
            seen += len(labels)
        assert seen >= 40  # no image is put in the place of a bad one
        assert seen + len(batches.bad) == len(names)
    assert set(names[5:120:10]) <= set(batches.bad)
    assert all(name in reason for name, reason in batches.bad.items())
    strict = ImageLoader(source, augment, batch_size=20, shuffle=True, on_bad="skip", max_bad=3)
    with pytest.raises(BadData, match="more than 3 of 160"):
        list(strict.epoch(0))
