"""Preprocessing to the pixel, sources and their errors, augmentation, order, batches, resume, bad images."""

from __future__ import annotations

import builtins
import csv
import itertools
import json
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onefold.data import (
    Augment,
    CachedDataset,
    CentreCrop,
    Dataset,
    HorizontalFlip,
    ImageFiles,
    ImageLoader,
    Preprocessing,
    RandomAffine,
    RandomResizedCrop,
    RandomShift,
    Resize,
    Subset,
    find_images,
    open_dataset,
)
from onefold.data.crop import Crop, CropBox
from onefold.data.dataset import fingerprint
from onefold.data.decode import decode
from onefold.data.preprocessing import IMAGENET
from onefold.data.sampler import sample_generator, shuffled
from onefold.errors import BadArgument, BadData, MissingExtra

SMALL = Preprocessing(size=8, crop_pct=1.0)
SPECKLED = Augment(steps=(RandomResizedCrop(size=8, scale=(0.3, 1.0)), HorizontalFlip()), preprocessing=SMALL)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def plant(folder: Path, files: Sequence[str]) -> Path:
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

    def image(self, i: int, *, min_side: int = 0) -> Image.Image:
        return Image.new("RGB", (8, 8), (i % 256, i // 256, 0))

    def num_bytes(self, i: int) -> int:
        return 192


PLAIN = Preprocessing(size=8, crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


def who(images: torch.Tensor) -> list[int]:
    values = (images[:, :2, 0, 0] * 255).round().int()
    return (values[:, 0] + 256 * values[:, 1]).tolist()


# Preprocessing


@pytest.mark.parametrize(
    ("size", "width", "height", "crop_pct", "resized", "corner"),
    [
        (224, 500, 375, 0.875, (341, 256), (58, 16)),  # 256 * 500 / 375 = 341.3; (341 - 224) / 2 = 58.5, halves to even
        (224, 375, 500, 0.875, (256, 341), (16, 58)),
        (224, 259, 256, 0.875, (259, 256), (18, 16)),  # not resized; 17.5 to even
        (160, 640, 427, 0.875, (274, 183), (57, 12)),  # round(182.86); 274.28; 11.5 to even
        (32, 8, 8, 1.0, (32, 32), (0, 0)),
    ],
)
def test_the_crop_is_where_the_conventions_put_it(
    size: int, width: int, height: int, crop_pct: float, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = noise(height, width)
    left, top = corner
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    cropped = Preprocessing(size=size, crop_pct=crop_pct).crop(image)
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(expected))


def test_the_numbers_are_scaled_and_in_planes() -> None:
    pixel = Image.new("RGB", (1, 1), (0, 128, 255))
    value = Preprocessing(size=1, crop_pct=1.0)(pixel)
    assert value.dtype == np.float32
    assert value.shape == (3, 1, 1)
    assert value.flags.c_contiguous
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(value[:, 0, 0], expected, rtol=1e-7)
    image = noise(9, 7)
    planes = IMAGENET.normalise(image)
    direct = (np.asarray(image, np.float64) / 255 - IMAGENET.mean) / IMAGENET.std
    np.testing.assert_allclose(planes, direct.transpose(2, 0, 1), rtol=1e-6, atol=1e-7)


def test_one_channel_is_grey() -> None:
    grey = Preprocessing(size=8, crop_pct=1.0, channels=1, mean=(0.5,), std=(0.5,))
    value = grey(Image.new("RGB", (20, 10), (255, 255, 255)))
    np.testing.assert_array_equal(value, np.ones((1, 8, 8), np.float32))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("sides", [(1, 3_000_000), (3_000_000, 1), (1, 1), (2, 3)])
def test_odd_shapes_give_an_input_in_bounded_memory(sides: tuple[int, int]) -> None:
    assert IMAGENET(Image.new("RGB", sides, (255, 0, 0))).shape == (3, 224, 224)


def test_preprocessing_goes_through_json_and_refuses_what_cannot_be() -> None:
    value = Preprocessing(size=160, crop_pct=0.9, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic")
    assert Preprocessing.from_dict(json.loads(json.dumps(value.to_dict()))) == value
    assert Preprocessing.from_dict({}) == IMAGENET
    for bad in (
        {"size": 0},
        {"size": 224.0},
        {"crop_pct": 0.0},
        {"crop_pct": 1.5},
        {"mean": [0.5]},
        {"std": [0.1, 0.0, 0.1]},
        {"std": [0.1, float("nan"), 0.1]},
        {"interpolation": "lanczos"},
        {"channels": 1},
        {"mena": [0.5, 0.5, 0.5]},
    ):
        with pytest.raises(BadArgument, match="preprocessing"):
            Preprocessing.from_dict(bad)


# Sources


def test_the_digits_are_embedded_and_split_by_class() -> None:
    train = open_dataset("digits", "train", seed=0, val_fraction=0.2)
    val = open_dataset("digits", "val", seed=0, val_fraction=0.2)
    assert train.classes == val.classes == tuple("0123456789")
    assert len(train) + len(val) == 1797
    assert not {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))}
    held = Counter(val.label(i) for i in range(len(val)))
    assert all(35 <= held[digit] <= 37 for digit in range(10))  # a fifth of 174 to 183
    pixels = np.asarray(train.image(0))
    assert pixels.shape == (8, 8, 3)
    assert pixels.max() > 200
    other = open_dataset("digits", "val", seed=1, val_fraction=0.2)
    assert {val.name(i) for i in range(len(val))} != {other.name(i) for i in range(len(other))}


def test_the_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r'pip install "onefold\[digits\]"'):
        open_dataset("digits", "train", seed=0, val_fraction=0.2)


def labelled(source: Dataset) -> dict[str, str]:
    return {source.name(i): source.classes[source.label(i)] for i in range(len(source))}


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_folder_that_is_split_already(tmp_path: Path, held_out: str) -> None:
    plant(tmp_path, ["train/dog/1.jpg", "train/cat/2.JPEG", "train/cat/deep/er/3.png", f"{held_out}/cat/4.png"])
    plant(tmp_path, [f"{held_out}/dog/5.webp"])
    (tmp_path / "train/cat/.hidden.jpg").write_bytes(b"")
    (tmp_path / "train/.DS_Store").write_bytes(b"")
    (tmp_path / "train/__MACOSX").mkdir()
    (tmp_path / "train/cat/notes.txt").write_text("a note")
    train = open_dataset(tmp_path, "train", seed=0, val_fraction=0.5)
    assert train.classes == ("cat", "dog")
    assert labelled(train) == {"cat/2.JPEG": "cat", "cat/deep/er/3.png": "cat", "dog/1.jpg": "dog"}
    val = open_dataset(str(tmp_path), "val", seed=0, val_fraction=0.5)
    assert labelled(val) == {"cat/4.png": "cat", "dog/5.webp": "dog"}
    np.testing.assert_array_equal(np.asarray(val.image(0)), np.asarray(noise(12, 16, 3)))


def test_one_folder_of_class_folders_is_split_by_names_and_seed(tmp_path: Path) -> None:
    files = [f"{kind}/{i}.png" for kind in ("a", "b") for i in range(10)] + ["c/only.png", "train/1.png", "train/2.png"]
    plant(tmp_path, files)  # a class may be called train
    train, val = (labelled(open_dataset(tmp_path, s, seed=3, val_fraction=0.3)) for s in ("train", "val"))
    assert sorted({**train, **val}) == sorted(files)
    assert Counter(val.values()) == {"a": 3, "b": 3, "train": 1}
    plant(tmp_path, ["a/new.png"])
    later = labelled(open_dataset(tmp_path, "val", seed=3, val_fraction=0.3))
    assert len(set(val) - set(later)) <= 1
    everything = open_dataset(tmp_path, "val", seed=3, val_fraction=1.0)
    assert len(everything) == len(files) + 1
    assert len(open_dataset(tmp_path, "train", seed=3, val_fraction=0.0)) == len(files) + 1


def test_train_alone_is_split_and_val_alone_can_be_evaluated_on(tmp_path: Path) -> None:
    plant(tmp_path / "one", [f"train/{kind}/{i}.png" for kind in "ab" for i in range(4)])
    train, val = (labelled(open_dataset(tmp_path / "one", s, seed=0, val_fraction=0.25)) for s in ("train", "val"))
    assert (len(train), len(val), set(train.values())) == (6, 2, {"a", "b"})
    plant(tmp_path / "two", ["val/a/1.png", "val/b/1.png"])
    assert len(open_dataset(tmp_path / "two", "val", seed=0, val_fraction=0.2)) == 2
    with pytest.raises(BadData, match="has val/ and no train/"):
        open_dataset(tmp_path / "two", "train", seed=0, val_fraction=0.2)


@pytest.mark.parametrize("table", ["file,label\n{}", "\ufeffFile ; Label ; extra\n{};x", "label\tfile\n"])
def test_labels_by_name(tmp_path: Path, table: str) -> None:
    plant(tmp_path, ["images/1.png", "2.png", "images/3.png", "4.png"])
    names = {"1.png": "zebra", "2.png": "ant, red", "images/3.png": "zebra", "4.png": "ant, red"}
    separator = max(",;\t", key=table.count)
    columns = [c.strip() for c in table.splitlines()[0].split(separator)]
    with (tmp_path / "labels.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter=separator)
        writer.writerow(columns)
        for file, label in names.items():
            writer.writerow([{"file": file, "label": label}.get(c.strip("\ufeff").lower(), "x") for c in columns])
    source = open_dataset(tmp_path, "val", seed=0, val_fraction=1.0)
    assert source.classes == ("ant, red", "zebra")
    expected = {"images/1.png": "zebra", "2.png": "ant, red", "images/3.png": "zebra", "4.png": "ant, red"}
    assert labelled(source) == expected
    half = open_dataset(tmp_path, "train", seed=0, val_fraction=0.5)
    assert Counter(labelled(half).values()) == {"ant, red": 1, "zebra": 1}


def test_labels_by_index(tmp_path: Path) -> None:
    plant(tmp_path, ["1.png", "2.png"])
    table = tmp_path / "labels.csv"
    table.write_text("index,file,name\n3,1.png,owl\n0,2.png,elk\n")
    source = open_dataset(tmp_path, "val", seed=0, val_fraction=1.0)
    assert (source.classes, source.label(0), source.label(1)) == (("0", "1", "2", "3"), 3, 0)
    with pytest.raises(BadData, match="classes without an image to train on: 1, 2"):
        open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    table.write_text("index,file,label\n3,1.png,owl\n0,2.png,elk\n")
    assert open_dataset(tmp_path, "val", seed=0, val_fraction=1.0).classes == ("elk", "1", "2", "owl")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected the columns file,label or file,index"),
        ("name,label\n1.png,a\n", "expected the columns file,label or file,index"),
        ("file,class\n1.png,a\n", "expected the columns"),
        ("file,label\n", "lists no images"),
        ("file,label\n1.png,a\ngone.png,b\nlost.png,b\n", "lists 2 files that are not there: gone.png, lost.png"),
        ("file,label\n1.png,a\n1.png,b\n", "lists 1.png twice, in lines 2 and 3"),
        ("file,label\n1.png,\n", "line 2: expected a file and its class"),
        ("file,label\n1.png\n", "line 2: expected a file and its class"),
        ("file,index\n1.png,-1\n", "line 2: the index is '-1'"),
        ("file,index\n1.png,two\n", "line 2: the index is 'two'"),
        ("file,index\n1.png,0\n2.png,1000000\n", "line 3: the index is '1000000', expected a number from 0"),
        ("file,index\n1.png,99999999999999999999\n", "line 2: the index is"),
        ("file,index,label\n1.png,0,a\n2.png,0,b\n", "line 3: index 0 is called both 'a' and 'b'"),
    ],
)
def test_a_table_of_labels_that_cannot_be_used(tmp_path: Path, text: str, sentence: str) -> None:
    plant(tmp_path, ["1.png", "2.png"])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(BadData, match=r"labels\.csv") as caught:
        open_dataset(tmp_path, "val", seed=0, val_fraction=1.0)
    assert sentence in str(caught.value)


def test_the_sample_of_imagenet_opens(shared_data: Path) -> None:
    source = open_dataset(shared_data / "imagenet-sample", "val", seed=0, val_fraction=1.0)
    assert (len(source), len(source.classes)) == (1000, 1000)
    assert sorted(source.label(i) for i in range(1000)) == list(range(1000))
    assert source.name(0) == "images/n01440764_tench.jpg"
    assert IMAGENET(source.image(999)).shape == (3, 224, 224)


def folder_faults(root: Path) -> dict[str, str]:
    """Folders that cannot be used for training, each with what the sentence must say."""
    plant(root / "flat", ["1.png", "2.png"])
    (root / "nothing").mkdir()
    (root / "file.png").write_bytes(b"")
    (root / "set.zip").write_bytes(b"")
    plant(root / "one", ["cat/1.png"])
    plant(root / "hollow", ["cat/1.png", "dog/1.png"])
    (root / "hollow/emu").mkdir()
    (root / "hollow/fox/.git").mkdir(parents=True)
    (root / "heic/cat").mkdir(parents=True)
    (root / "heic/cat/1.heic").write_bytes(b"")
    (root / "heic/dog").mkdir()
    plant(root / "differ", ["train/cat/1.png", "train/dog/1.png", "val/dog/1.png", "val/owl/1.png", "val/yak/1.png"])
    plant(root / "flat-split", ["train/1.png", "val/2.png"])
    plant(root / "single", ["a/1.png", "b/1.png"])
    return {
        "missing": "missing is not there: expected a folder of images, or the word digits",
        "file.png": "is a file: expected a folder",
        "set.zip": "is an archive: unpack it",
        "flat": "holds 2 images and no class folders",
        "nothing": "holds no images: it has no files at all",
        "one": "has one class only, cat: training needs two or more",
        "hollow": "class folders without images in",
        "heic": "holds no images: of files it has 1 .heic",
        "differ": "the classes differ; only in train: cat; only in val: owl, yak",
        "flat-split": "train holds 1 images and no class folders",
    }


def test_a_folder_that_cannot_be_used_is_explained(tmp_path: Path) -> None:
    for name, sentence in folder_faults(tmp_path).items():
        with pytest.raises(BadData) as caught:
            open_dataset(tmp_path / name, "train", seed=0, val_fraction=0.2)
        assert sentence in str(caught.value)
    with pytest.raises(BadData, match="emu, fox; fill or remove them"):
        open_dataset(tmp_path / "hollow", "val", seed=0, val_fraction=0.2)
    assert len(open_dataset(tmp_path / "one", "val", seed=0, val_fraction=1.0)) == 1  # to evaluate, one class will do
    with pytest.raises(BadData, match="leaves no image for val"):
        open_dataset(tmp_path / "single", "val", seed=0, val_fraction=0.2)
    for split, fraction in (("test", 0.2), ("train", 1.5)):
        with pytest.raises(BadArgument):
            open_dataset(tmp_path / "one", split, seed=0, val_fraction=fraction)  # type: ignore[arg-type]


@pytest.mark.timeout(20)
def test_loops_of_links_and_special_files_do_not_hang(tmp_path: Path) -> None:
    plant(tmp_path, ["a/1.png", "b/1.png"])
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "a/self").symlink_to("self")
    (tmp_path / "b/self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "b/pipe.jpg")
    source = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    assert [source.name(i) for i in range(len(source))] == [
        "a/1.png",
        "a/up/b/1.png",
        "a/up/b/pipe.jpg",
        "a/up/b/self.png",
        "b/1.png",
        "b/pipe.jpg",
        "b/self.png",
    ]
    batches = ImageLoader(source, SMALL, batch_size=7, on_bad="skip")
    ((images, labels),) = batches.epoch(0)
    assert (len(images), labels.tolist()) == (3, [0, 0, 1])
    assert list(batches.bad) == ["a/up/b/pipe.jpg", "a/up/b/self.png", "b/pipe.jpg", "b/self.png"]


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    raw = os.fsdecode(b"caf\xe9")
    plant(tmp_path, [f"{raw}/{raw}.png", "plain/<b>\n.png"])
    source = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    assert source.classes == (raw, "plain")
    assert os.fsencode(source.name(0)) == b"caf\xe9/caf\xe9.png"
    assert source.image(0).size == (16, 12)
    assert json.loads(json.dumps(source.name(0))) == source.name(0)
    assert len(fingerprint(source)) == 64
    table = b"file,label\ncaf\xe9.png,caf\xe9\nother.png,x\n"
    listed = plant(tmp_path / "listed", [f"{raw}.png", "other.png"])
    (listed / "labels.csv").write_bytes(table)
    assert open_dataset(listed, "train", seed=0, val_fraction=0.0).classes == (raw, "x")[:: 1 if raw < "x" else -1]


def test_find_images(tmp_path: Path) -> None:
    plant(tmp_path, ["b/2.png", "b/a/1.jpg", "c.tif"])
    (tmp_path / "b/.x.png").write_bytes(b"")
    (tmp_path / "odd.data").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    found = find_images([tmp_path / "odd.data", str(tmp_path / "b"), tmp_path / "b/2.png", tmp_path / "c.tif"])
    assert found == [tmp_path / "odd.data", tmp_path / "b/2.png", tmp_path / "b/a/1.jpg", tmp_path / "c.tif"]
    with pytest.raises(BadData, match="empty holds no images"):
        find_images([tmp_path / "empty"])
    with pytest.raises(BadData, match="nowhere is not there"):
        find_images([tmp_path / "c.tif", tmp_path / "nowhere"])


def test_the_fingerprint_sees_names_sizes_labels_and_classes(tmp_path: Path) -> None:
    plant(tmp_path, ["a/1.png", "b/1.png"])
    base = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    prints = {fingerprint(base)}
    assert fingerprint(open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)) in prints
    one = ImageFiles(tmp_path, ["a/1.png", "b/1.png"], [0, 1], ("a", "b"))
    assert fingerprint(one) in prints
    prints |= {fingerprint(replace(one, labels=[1, 0])), fingerprint(replace(one, classes=("a", "c")))}
    prints |= {fingerprint(Subset(one, [1, 0])), fingerprint(Subset(one, [0]))}
    with (tmp_path / "a/1.png").open("ab") as file:
        file.write(b"!")
    prints.add(fingerprint(one))
    (tmp_path / "a/1.png").unlink()
    prints.add(fingerprint(one))
    assert len(prints) == 7


# Augmentation


@settings(deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    low=st.floats(0.01, 1),
    sample=st.integers(0, 1 << 40),
)
def test_a_random_crop_lies_inside_and_has_the_stated_area_and_shape(
    width: int, height: int, low: float, sample: int
) -> None:
    crop = RandomResizedCrop(size=8, scale=(low, 1.0))
    left, top, right, bottom = crop.box((width, height), sample_generator(0, 0, sample))
    w, h = right - left, bottom - top
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) >= 50 and low >= 0.1 and w < width and h < height:
        assert low * 0.85 <= w * h / (width * height) <= 1
        assert 0.7 <= w / h <= 1.4


def test_random_crops_are_spread_evenly() -> None:
    crop = RandomResizedCrop(size=8, scale=(0.1, 0.5))
    boxes = np.array([crop.box((300, 300), sample_generator(0, 0, i)) for i in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert abs((w * h / 300**2).mean() - 0.3) < 0.005
    assert abs(np.log(w / h).mean()) < 0.02
    assert abs((boxes[:, 0] / (300 - w)).mean() - 0.5) < 0.02
    # golden: a change here changes every training run
    assert boxes[:3].tolist() == GOLDEN_BOXES


GOLDEN_BOXES = [[23, 110, 113, 215], [13, 100, 162, 243], [93, 92, 300, 286]]


def test_what_is_decoded_small_is_never_enlarged_for_it() -> None:
    crop = RandomResizedCrop(size=224, scale=(0.08, 1.0))
    side = crop.min_side
    boxes = np.array([crop.box((side, side), sample_generator(0, 0, i)) for i in range(3000)])
    assert (boxes[:, 2] - boxes[:, 0]).min() >= 223
    assert (boxes[:, 3] - boxes[:, 1]).min() >= 223
    assert Augment(steps=(crop, HorizontalFlip()), preprocessing=IMAGENET).min_side == side
    assert Augment(steps=(HorizontalFlip(), crop), preprocessing=IMAGENET).min_side == 0


def test_flip_and_shift() -> None:
    image = noise(6, 5)
    pixels = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(HorizontalFlip(p=1.0)(image, sample_generator(0, 0, 0))), pixels[:, ::-1])
    assert HorizontalFlip(p=0.0)(image, sample_generator(0, 0, 0)) is image
    flips = sum(HorizontalFlip()(image, sample_generator(0, 0, i)) is not image for i in range(1000))
    assert 440 < flips < 560
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 6, x : x + 5].tobytes(): (x, y) for x, y in itertools.product(range(5), repeat=2)}
    seen = Counter(
        windows[np.asarray(RandomShift(pixels=2)(image, sample_generator(0, 0, i))).tobytes()] for i in range(1000)
    )
    assert len(seen) == 25
    assert min(seen.values()) > 15


def test_affine_turns_enlarges_and_moves() -> None:
    image = Image.new("RGB", (65, 65))
    image.paste((255, 255, 255), (50, 31, 53, 34))  # a dot 19 right of the middle
    np.testing.assert_array_equal(np.asarray(RandomAffine(degrees=0, shift=0)(image, sample_generator(0, 0, 0))), image)
    step = RandomAffine(degrees=40, shift=0.1, zoom=(0.8, 1.2))
    for i in range(20):
        rng = sample_generator(0, 0, i)  # the same draws, in the stated order
        angle, zoom, right, down = (rng.uniform(*r) for r in ((-40, 40), (0.8, 1.2), (-0.1, 0.1), (-0.1, 0.1)))
        mass = np.asarray(step(image, sample_generator(0, 0, i)).convert("L"), float)
        x, y = ((mass * grid).sum() / mass.sum() + 0.5 for grid in np.meshgrid(np.arange(65), np.arange(65)))
        assert abs(x - (32.5 + 65 * right + 19 * zoom * math.cos(math.radians(angle)))) < 0.15
        assert abs(y - (32.5 + 65 * down + 19 * zoom * math.sin(math.radians(angle)))) < 0.15


def test_augmentation_ends_at_the_networks_size_or_says_so() -> None:
    steps = (Resize(size=10), RandomShift(pixels=1), CentreCrop(size=8))
    chain = Augment(steps=steps, preprocessing=SMALL)
    assert chain(noise(20, 30), sample_generator(0, 0, 0)).shape == (3, 8, 8)
    with pytest.raises(BadArgument, match="leaves 15 x 10 pixels, the network takes 8 x 8"):
        Augment(steps=steps[:2], preprocessing=SMALL)(noise(20, 30), sample_generator(0, 0, 0))
    for scale, ratio in (((0.0, 1.0), (1.0, 1.0)), ((0.5, 0.2), (1.0, 1.0)), ((0.5, 1.0), (2.0, 1.0))):
        with pytest.raises(BadArgument):
            RandomResizedCrop(size=8, scale=scale, ratio=ratio)


# Order


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-5, 1 << 62), epoch=st.integers(0, 1 << 30))
def test_an_epoch_holds_every_sample_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(np.arange(n), n, seed=seed, epoch=epoch).tolist()) == list(range(n))


def test_order_is_fixed_for_ever_and_changes_with_epoch_and_seed() -> None:
    assert shuffled(np.arange(10), 10, seed=0, epoch=0).tolist() == GOLDEN_ORDER
    orders = {tuple(shuffled(np.arange(1000), 1000, seed=s, epoch=e).tolist()) for s in range(5) for e in range(5)}
    assert len(orders) == 25


GOLDEN_ORDER = [5, 6, 3, 9, 8, 4, 2, 0, 7, 1]


def test_order_is_as_even_as_chance() -> None:
    n, epochs = 20, 500
    orders = np.stack([shuffled(np.arange(n), n, seed=5, epoch=e) for e in range(epochs)])
    table = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi2 = ((table - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi2 < 361 + 4 * math.sqrt(2 * 361)  # (n - 1)^2 degrees of freedom
    follows = np.bincount((np.diff(orders, axis=1) % n).ravel())[1:]
    assert follows.max() / follows.min() < 1.4


def test_order_needs_no_memory_for_a_thousand_million() -> None:
    n = 5_000_000_000
    some = shuffled(np.arange(n - 100_000, n), n, seed=0, epoch=0)
    assert len(np.unique(some)) == 100_000
    assert 0 <= some.min() < some.max() < n
    assert abs(some.mean() / n - 0.5) < 0.005


def test_each_sample_of_each_epoch_has_its_own_stream() -> None:
    streams = {
        (s, e, i): sample_generator(s, e, i).random(1000) for s in (0, 1) for e in (0, 1) for i in (0, 1, 1 << 40)
    }
    assert len({value for stream in streams.values() for value in stream}) == 12_000
    np.testing.assert_array_equal(sample_generator(1, 0, 1).random(1000), streams[1, 0, 1])
    assert sample_generator(0, 0, 0).random(2).tolist() == GOLDEN_RANDOM


GOLDEN_RANDOM = [0.011546754286331562, 0.24154919656271812]


# ImageLoader


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 60),
    share=st.integers(1, 8),
    world=st.integers(1, 5),
    epoch=st.integers(0, 9),
)
def test_over_the_ranks_every_sample_comes_exactly_once(n: int, share: int, world: int, epoch: int) -> None:
    ranks = [ImageLoader(Shades(n), PLAIN, batch_size=share * world, rank=r, world=world) for r in range(world)]
    assert sorted(i for b in ranks for images, _ in b.epoch(epoch) for i in who(images)) == list(range(n))
    assert all(len(list(b.epoch(epoch))) == len(b) for b in ranks)
    if n < share * world:
        return
    ranks = [replace_shuffled(b) for b in ranks]
    alone = replace_shuffled(ImageLoader(Shades(n), PLAIN, batch_size=share * world))
    together = [
        sorted(i for images, labels in step for i in who(images))
        for step in zip(*(b.epoch(epoch) for b in ranks), strict=True)
    ]
    assert together == [sorted(who(images)) for images, _ in alone.epoch(epoch)]
    assert all(len(step) == share * world for step in together)
    assert len({i for step in together for i in step}) == n // (share * world) * share * world


def replace_shuffled(batches: ImageLoader) -> ImageLoader:
    return ImageLoader(
        batches.dataset,
        batches.transform,
        batch_size=batches.batch_size,
        shuffle=True,
        seed=4,
        rank=batches.rank,
        world=batches.world,
    )


def test_labels_go_with_their_images() -> None:
    for images, labels in ImageLoader(Shades(300), PLAIN, batch_size=32, shuffle=True).epoch(1):
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.shape == (32, 3, 8, 8)
        assert labels.tolist() == [i % 2 for i in who(images)]


def photos(tmp_path: Path, count: int = 24) -> Dataset:
    return open_dataset(
        plant(tmp_path, [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(count)]), "train", seed=0, val_fraction=0.0
    )


def same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def test_batches_do_not_depend_on_workers_cache_start_or_world(tmp_path: Path) -> None:
    source = photos(tmp_path)
    inline = ImageLoader(source, SPECKLED, batch_size=4, shuffle=True, seed=7)
    whole = list(inline.epoch(2))
    assert len(whole) == len(inline) == 6
    for start in range(7):
        assert same(list(inline.epoch(2, start)), whole[start:])
    cached = CachedDataset(source)
    for workers, held in ((1, source), (3, source), (2, cached), (2, cached)):
        threaded = ImageLoader(held, SPECKLED, batch_size=4, shuffle=True, seed=7, num_workers=workers)
        assert same(list(threaded.epoch(2)), whole)
        assert same(list(threaded.epoch(2, 4)), whole[4:])
    for rank in (0, 1):
        share = list(ImageLoader(source, SPECKLED, batch_size=4, shuffle=True, seed=7, rank=rank, world=2).epoch(2))
        assert same(share, [(images[rank::2], labels[rank::2]) for images, labels in whole])
    assert not same(list(inline.epoch(3)), whole)
    assert not same(list(ImageLoader(source, SPECKLED, batch_size=4, shuffle=True, seed=8).epoch(2)), whole)


def test_a_cache_decodes_once_and_keeps_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photos(tmp_path, 6)
    asked: list[str] = []
    original = ImageFiles.image
    monkeypatch.setattr(ImageFiles, "image", lambda self, i, **k: asked.append(self.name(i)) or original(self, i, **k))
    cached, none = CachedDataset(source), CachedDataset(source, limit_mib=0)
    for _ in range(3):
        for i in range(6):
            np.testing.assert_array_equal(cached.image(i), none.image(i))
    assert Counter(asked) == dict.fromkeys(asked, 4)  # one, and three without room
    assert fingerprint(cached) == fingerprint(source)


def test_threads_end_with_the_epoch(tmp_path: Path) -> None:
    batches = ImageLoader(photos(tmp_path), SPECKLED, batch_size=2, num_workers=3)
    epoch = batches.epoch(0)
    next(epoch)
    assert any(t.name.startswith("onefold-data") for t in threading.enumerate())
    epoch.close()  # type: ignore[attr-defined]
    assert not any(t.name.startswith("onefold-data") for t in threading.enumerate())
    (tmp_path / "a/00.png").unlink()
    with pytest.raises(BadData) as caught:
        list(batches.epoch(0))
    assert caught.tb is not None  # which holds on to the frames
    assert not any(t.name.startswith("onefold-data") for t in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_left_out_and_not_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    source = photos(tmp_path)
    clean = list(ImageLoader(source, SPECKLED, batch_size=6, shuffle=True).epoch(0))
    order = ImageLoader(source, SPECKLED, batch_size=6, shuffle=True).samples(0, 1)
    name = source.name(int(order[2]))
    (tmp_path / name).write_bytes(b"<html>404</html>")
    batches = ImageLoader(source, SPECKLED, batch_size=6, shuffle=True, on_bad="skip", num_workers=workers)
    with caplog.at_level(logging.WARNING, "onefold.data"):
        first, second = list(batches.epoch(0)), list(batches.epoch(1))
    kept = [0, 1, 3, 4, 5]
    assert same(first, [clean[0], (clean[1][0][kept], clean[1][1][kept]), *clean[2:]])
    assert sum(len(labels) for _, labels in second) == 23
    assert list(batches.bad) == [name]
    assert "is an HTML page" in batches.bad[name]
    assert [name in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(BadData, match="is an HTML page"):
        list(ImageLoader(source, SPECKLED, batch_size=6, shuffle=True, num_workers=workers).epoch(0))


def test_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    source = photos(tmp_path)
    for i in (3, 11, 12):
        (tmp_path / source.name(i)).write_bytes(b"")
    assert sum(len(y) for _, y in ImageLoader(source, SMALL, batch_size=6, on_bad="skip", max_bad=3).epoch(0)) == 21
    with pytest.raises(BadData, match=r"more than 2 of 24 images are bad, the last: .* is empty"):
        list(ImageLoader(source, SMALL, batch_size=6, on_bad="skip", max_bad=2).epoch(0))


def test_a_batch_of_bad_images_only(tmp_path: Path) -> None:
    source = photos(tmp_path, 4)
    (tmp_path / source.name(3)).unlink()
    assert [len(y) for _, y in ImageLoader(source, SMALL, batch_size=3, on_bad="skip").epoch(0)] == [3]
    with pytest.raises(BadData, match="every image of a batch is bad"):
        list(ImageLoader(source, SPECKLED, batch_size=1, shuffle=True, on_bad="skip").epoch(0))


def test_an_image_that_goes_while_training_is_reported(tmp_path: Path) -> None:
    source = photos(tmp_path)
    batches = ImageLoader(source, SMALL, batch_size=4, on_bad="skip")
    epoch = batches.epoch(0)
    next(epoch)
    (tmp_path / source.name(9)).unlink()
    (tmp_path / source.name(10)).write_bytes((tmp_path / source.name(10)).read_bytes()[:300])
    assert sum(len(y) for _, y in epoch) == 18
    assert list(batches.bad) == [source.name(9), source.name(10)]
    assert ["No such file" in why or "truncated" in why for why in batches.bad.values()] == [True, True]


def test_batches_refuse_what_cannot_be() -> None:
    source = Shades(10)
    for wrong in (
        {"batch_size": 0},
        {"batch_size": 3, "world": 2},
        {"batch_size": 4, "world": 2, "rank": 2},
        {"batch_size": 4, "num_workers": -1},
        {"batch_size": 4, "on_bad": "ignore"},
    ):
        with pytest.raises(BadArgument):
            ImageLoader(source, PLAIN, **wrong)  # type: ignore[arg-type]
    with pytest.raises(BadData, match="10 images do not fill one batch of 11: choose a smaller batch size"):
        ImageLoader(source, PLAIN, batch_size=11, shuffle=True)
    batches = ImageLoader(source, SPECKLED, batch_size=4, shuffle=True)
    for n, start in ((-1, 0), (0, -1), (0, 3)):
        with pytest.raises(BadArgument):
            batches.epoch(n, start)
    assert batches.fingerprint() == fingerprint(source)


def test_training_decodes_large_photos_small_and_evaluation_does_not(tmp_path: Path) -> None:
    for kind in "ab":
        (tmp_path / kind).mkdir()
        noise(600, 800).save(tmp_path / kind / "1.jpg")
    source = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    assert SPECKLED.min_side == 17  # 8 / sqrt(0.3 * 3 / 4), rounded up
    sizes: list[tuple[int, int]] = []

    @dataclass(frozen=True)
    class Seen:
        source: Dataset
        classes: tuple[str, ...] = ("a", "b")

        def __len__(self) -> int:
            return 2

        def label(self, i: int) -> int:
            return i

        def name(self, i: int) -> str:
            return str(i)

        def num_bytes(self, i: int) -> int:
            return 0

        def image(self, i: int, *, min_side: int = 0) -> Image.Image:
            image = self.source.image(i, min_side=min_side)
            sizes.append(image.size)
            return image

        def crop(self, i: int, crop_box: CropBox) -> Crop:
            cut = self.source.crop(i, crop_box)
            sizes.append((cut.pixels.shape[1], 0))  # rows below the crop may be missing
            return cut

    list(ImageLoader(Seen(source), SPECKLED, batch_size=2).epoch(0))
    list(ImageLoader(Seen(source), SMALL, batch_size=2).epoch(0))
    assert sizes == [(100, 0)] * 2 + [(800, 600)] * 2
    np.testing.assert_array_equal(decode(tmp_path / "a/1.jpg"), np.asarray(source.image(0)))
