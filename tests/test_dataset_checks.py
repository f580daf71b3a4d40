"""The first look at the data: each planted fault is found, named, and nothing is said of sound data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from onefold.data import Preprocessing, Subset, duplicates, open_dataset, read_dataset
from onefold.data.dataset_checks import (
    DataCheck,
    check_data,
    class_name_captions,
    contact_sheet,
    denormalise,
    find_swapped_classes,
)
from onefold.data.duplicates import near_duplicates, thumbnail_stats
from onefold.errors import BadData

COLOURS = {"ash": (200, 60, 60), "birch": (60, 200, 60), "cedar": (60, 60, 200)}


def picture(seed: int, colour: tuple[int, int, int], side: int = 48) -> Image.Image:
    """A blurred noise of a class's colour, so that neighbours tell classes apart."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 40, (6, 6, 3)) + np.array(colour)
    return Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """train/ with 24 and val/ with 10 pictures of each of three classes."""
    for s, (split, count) in enumerate((("train", 24), ("val", 10))):
        for c, (name, colour) in enumerate(COLOURS.items()):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(10_000 * s + 100 * c + i, colour).save(folder / f"{i:02d}.png")
    return tmp_path


def checked(folder: Path, size: int = 32) -> DataCheck:
    train, val = (open_dataset(folder, split, seed=0, val_fraction=0.2) for split in ("train", "val"))
    return check_data(train, val, size)


def test_nothing_is_said_of_sound_data(photos: Path):
    found = checked(photos)
    assert found.findings == ()
    assert (found.num_train, found.num_val) == (72, 30)
    found.raise_for_errors()


def swap(folder: Path) -> None:
    """val/ash and val/birch change names."""
    (folder / "val/ash").rename(folder / "val/x")
    (folder / "val/birch").rename(folder / "val/ash")
    (folder / "val/x").rename(folder / "val/birch")


def rotate(folder: Path) -> None:
    swap(folder)
    (folder / "val/cedar").rename(folder / "val/x")
    (folder / "val/ash").rename(folder / "val/cedar")
    (folder / "val/x").rename(folder / "val/ash")


def renumber(folder: Path) -> None:
    """Tables that number the same classes otherwise."""
    for split, order in (("train", ("ash", "birch", "cedar")), ("val", ("birch", "ash", "cedar"))):
        lines = [
            f"{p.relative_to(folder / split)},{order.index(p.parent.name)},{p.parent.name}"
            for p in sorted((folder / split).rglob("*.png"))
        ]
        (folder / split / "labels.csv").write_text("file,index,label\n" + "\n".join(lines) + "\n")


def overlap(count: int) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for i in range(count):
            shutil.copy(folder / f"train/ash/{i:02d}.png", folder / f"val/ash/copy{i}.png")

    return plant


def recompress(folder: Path) -> None:
    Image.open(folder / "train/cedar/03.png").save(folder / "val/cedar/again.jpg", quality=90)


def altered(change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        change(Image.open(folder / "train/cedar/03.png")).save(folder / "val/cedar/again.png")

    return plant


def two_labels(folder: Path) -> None:
    for i in range(2):
        shutil.copy(folder / f"train/ash/{i:02d}.png", folder / f"train/birch/same{i}.png")


def black(count: int) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for n, path in enumerate(sorted((folder / "train").rglob("*.png"))[:count]):
            Image.new("RGB", (40 + n, 40)).save(path)

    return plant


def all_the_same(folder: Path) -> None:
    for path in (folder / "val").rglob("*.png"):
        shutil.copy(folder / "train/ash/00.png", path)


def unreadable(count: int) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for path in sorted((folder / "train").rglob("*.png"))[:count]:
            path.write_bytes(b"not a picture")

    return plant


def twin_names(folder: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(folder / split / "ash", folder / split / "A-sh", dirs_exist_ok=True)
        for n, path in enumerate((folder / split / "A-sh").iterdir()):
            picture(77_000 + n + 500 * len(split), COLOURS["ash"]).save(path)


def uneven(folder: Path) -> None:
    for path in sorted((folder / "train/birch").iterdir())[1:]:
        path.unlink()


FAULTS: dict[str, tuple[bool, str, Callable[[Path], None]]] = {
    "classes swapped": (True, "val's ash look like train's birch; val's birch look like train's ash", swap),
    "classes rotated": (True, "3 classes have changed places", rotate),
    "copies in val": (True, "3 of 33 validation images are training images too", overlap(3)),
    "names of copies": (True, "ash/copy0.png (val) = ash/00.png (train)", overlap(1)),
    "a copy at another quality": (False, "cedar/again.jpg (val) = cedar/03.png (train)", recompress),
    "a mirrored copy": (False, "cedar/again.png (val) = cedar/03.png (train)", altered(ImageOps.mirror)),
    "a brighter copy": (
        False,
        "cedar/again.png (val) = cedar/03.png (train)",
        altered(lambda image: ImageEnhance.Brightness(image).enhance(1.15)),
    ),
    "a cropped copy": (
        False,
        "cedar/again.png (val) = cedar/03.png (train)",
        altered(lambda image: image.crop((1, 1, image.width - 1, image.height - 1))),
    ),
    "one picture, two labels": (True, "(birch) and ash/00.png (ash) have the same pixels", two_labels),
    "some black": (False, "2 of 72 images of train are of one colour: ash/00.png, ash/01.png", black(2)),
    "most black": (True, "40 of 72 images of train are of one colour", black(40)),
    "all the same": (True, "all 30 images of val are the same picture", all_the_same),
    "some unreadable": (False, "2 of 72 images of train cannot be read, the first: ", unreadable(2)),
    "most unreadable": (True, "50 of 72 images of train cannot be read", unreadable(50)),
    "names alike": (False, "'A-sh', 'ash' differ in case or spacing only", twin_names),
    "uneven": (False, "24 training images and birch has 1", uneven),
}


@pytest.mark.parametrize(("is_error", "says", "plant"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_found_and_named(photos: Path, is_error: bool, says: str, plant: Callable[[Path], None]):
    plant(photos)
    found = checked(photos)
    told = [finding for finding in found.findings if says in finding.text]
    assert len(told) == 1, found.findings
    assert told[0].is_error == is_error
    if is_error:
        with pytest.raises(BadData, match="train with no_check=True"):
            found.raise_for_errors()
    else:
        found.raise_for_errors()


def test_classes_that_val_numbers_otherwise_are_matched_by_name(photos: Path):
    renumber(photos)
    assert checked(photos).findings == ()
    assert "classes are numbered otherwise" in read_dataset(photos, seed=0, val_fraction=0.2).info.notes[0]


def test_small_photos_for_a_large_input_are_told(photos: Path):
    (finding,) = checked(photos, size=224).findings
    assert "48 pixels or less" in finding.text
    assert "--img-size 64" in finding.text
    assert checked(photos, size=96).findings == ()


class Relabelled:
    """A source whose labels are a function of the image's number."""

    def __init__(self, source, label_of):
        self.source, self.label = source, label_of
        self.classes, self.name, self.image, self.num_bytes = (
            source.classes,
            source.name,
            source.image,
            source.num_bytes,
        )

    def __len__(self) -> int:
        return len(self.source)


def test_labels_that_have_come_apart_from_the_images_are_told():
    digits, val = (open_dataset("digits", split, seed=0, val_fraction=0.2) for split in ("train", "val"))
    labels = np.random.default_rng(0).integers(0, 10, len(digits))
    found = check_data(Relabelled(digits, lambda i: int(labels[i])), val, 32)
    assert any("% is chance" in finding.text for finding in found.findings)
    assert check_data(digits, val, 32).findings == ()


def test_a_copy_is_found_in_more_images_than_are_looked_at(photos: Path):
    picture(5, COLOURS["ash"], side=99).save(photos / "train/ash/00.png")
    overlap(1)(photos)
    train, val = (open_dataset(photos, split, seed=0, val_fraction=0.2) for split in ("train", "val"))
    names = {thumbnail_stats(train, 8, other=val).name(n) for n in range(8)}
    assert "ash/00.png" in names  # its size is the copy's


@pytest.mark.parametrize("seed", range(5))
def test_classes_that_have_not_moved_are_left_alone(seed: int):
    """The likelihood gained by exchanging classes of sound data stays far below what counts as an error (30 nats)."""
    train, val = (
        thumbnail_stats(open_dataset("digits", split, seed=seed, val_fraction=0.2), 2000) for split in ("train", "val")
    )
    assert all(nats < 10 for _, nats in find_swapped_classes(train, val, 10))


def test_the_sheet_shows_what_the_network_sees():
    preprocessing = Preprocessing(size=24, crop_pct=1.0)
    original = picture(3, COLOURS["ash"], side=24)
    pixels = preprocessing(original)
    assert np.array_equal(np.asarray(denormalise(pixels, preprocessing)), np.asarray(original))
    paper = contact_sheet(
        [(pixels, "ash")] * 10 + [(pixels, "a very long name of a class that no tile is wide enough for")],
        preprocessing,
    )
    assert paper.size == (8 + 8 * 104, 8 + 2 * (96 + 20 + 8))
    shown = np.asarray(paper)[8 : 8 + 96 : 4, 8 : 8 + 96 : 4]
    assert np.array_equal(shown, np.asarray(original))


def test_captions_name_classes_and_shares():
    classes = ("ash", "birch", "cedar")
    assert list(class_name_captions(np.array([2, 0]), classes)) == ["cedar", "ash"]
    mixed = np.array([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.9667, 0.0167, 0.0167]])
    assert list(class_name_captions(mixed, classes)) == ["70% ash + 30% birch", "birch", "ash"]


def scenes(count: int, seed: int) -> list[Image.Image]:
    """Pictures with shapes and detail, no two alike."""
    rng = np.random.default_rng(seed)
    blocks = [np.kron(rng.integers(30, 220, (6, 6, 3)), np.ones((16, 16, 1))) for _ in range(count)]
    noisy = [np.clip(each + rng.normal(0, 8, each.shape), 0, 255).astype(np.uint8) for each in blocks]
    return [Image.fromarray(each) for each in noisy]


def cropped(image: Image.Image, share: float, left: float, top: float) -> Image.Image:
    side = round(share * image.width)
    x, y = round(left * (image.width - side)), round(top * (image.height - side))
    return image.crop((x, y, x + side, y + side))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized": lambda image: image.resize((64, 80)),
    "mirrored": ImageOps.mirror,
    "flipped": ImageOps.flip,
    "turned by a quarter": lambda image: image.rotate(90),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.4),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "turned": lambda image: image.rotate(8),
    "turned the other way": lambda image: image.rotate(-5),
    "cropped": lambda image: cropped(image, 0.9, 0.5, 0.5),
    "cropped in a corner": lambda image: cropped(image, 0.88, 1, 0),
    "several": lambda image: ImageEnhance.Brightness(cropped(ImageOps.mirror(image.rotate(4)), 0.92, 0.3, 0.7)).enhance(
        1.2
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_copies_are_found_and_nothing_else(change: Callable[[Image.Image], Image.Image]):
    copied, others, more = scenes(8, 1), scenes(40, 2), scenes(20, 3)
    train = thumbnail_stats(InMemory([*others, *copied]), 100)
    val = thumbnail_stats(InMemory([*map(change, copied), *more]), 100)
    assert near_duplicates(val, train) == [(n, 40 + n) for n in range(8)]
    assert near_duplicates(train, val) == [(40 + n, n) for n in range(8)]


class InMemory:
    """A dataset of pictures, of one class."""

    classes = ("a",)

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def label(self, i: int) -> int:
        return 0

    def image(self, i: int, *, min_side: int = 0, value_range: object = None) -> Image.Image:
        return self.images[i]


def test_a_copy_of_a_tiny_picture_must_be_nearly_equal():
    small = [image.resize((8, 8), Image.Resampling.BOX) for image in scenes(6, 4)]
    copies = [Image.fromarray(np.asarray(image) // 2 * 2) for image in small[:3]]
    brighter = [ImageEnhance.Brightness(image).enhance(1.2) for image in small[3:]]
    found = near_duplicates(*(thumbnail_stats(InMemory(images), 10) for images in ([*copies, *brighter], small)))
    assert found == [(0, 0), (1, 1), (2, 2)]


def test_pictures_that_are_alike_at_first_sight_only_are_no_copies() -> None:
    """Noise on one colour: of 256 pairs a few are aligned, and none of them stays."""

    def noise(seed: int) -> Image.Image:
        levels = np.random.default_rng(seed).integers(-30, 31, (48, 48, 3)) + np.array((204, 41, 41))
        return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))

    for first in (1000, 4000):
        val, train = (InMemory([noise(first + start + i) for i in range(n)]) for start, n in ((0, 8), (500, 32)))
        assert near_duplicates(thumbnail_stats(val, 99), thumbnail_stats(train, 99)) == []


def test_different_photos_are_no_copies_of_each_other(shared_data: Path):
    """Real photos, which share skies, grass and one thing in the middle: no false alarm among 150,000 pairs."""
    photos = open_dataset(str(shared_data / "imagenette-224-subset"), "train", seed=0, val_fraction=0.2)
    stats = [thumbnail_stats(Subset(photos, range(start, len(photos), 5)), 1000) for start in (0, 1)]
    assert len(stats[0]) * len(stats[1]) > 100_000
    assert near_duplicates(*stats) == []


def test_pairs_none_of_which_aligns_are_no_copies():
    """Noise gives candidates of which not one is kept for the finer comparison."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((6, 32, 32)).astype(np.float32)
    maps = np.tile(np.eye(2, 3, dtype=np.float32), (3, 1, 1))
    assert not duplicates._similarity(noise[:3], noise[3:], maps).any()
