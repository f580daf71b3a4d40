"""By what the images of a dataset are known again, and what weights say they were trained on."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onefold.data import ImageFiles, open_dataset
from onefold.data import fingerprint as fingerprints
from onefold.data.dataset import Dataset, Subset
from onefold.data.fingerprint import (
    ImageList,
    TrainedCopies,
    TrainedOn,
    dataset_fingerprint,
    find_trained_copies,
    find_trained_images,
    image_keys,
)
from onefold.data.remote_files import LocalFile, digest_bytes
from onefold.data.tars import read_tar_index
from onefold.errors import BadArgument, BadCheckpoint


def paint(root: Path, shade: int = 0, suffix: str = ".bmp", count: int = 4, side: int = 8) -> Dataset:
    for c in "ab":
        (root / c).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (side, side), (shade, i, ord(c))).save(root / c / f"{i}{suffix}")
    return open_dataset(root, "train", seed=0, val_fraction=0.0)


def scenes(root: Path, numbers: range, base: int = 0) -> Dataset:
    """Pictures of coarse noise, or, with a `base`, all like one picture."""
    (root / "a").mkdir(parents=True, exist_ok=True)
    for i in numbers:
        draw = np.random.default_rng(i)
        coarse = draw.integers(0, 256, (8, 8, 3)) // 8 + np.random.default_rng(base).integers(0, 224, (8, 8, 3))
        coarse = coarse if base else draw.integers(0, 256, (8, 8, 3))
        Image.fromarray(coarse.astype(np.uint8)).resize((96, 64)).save(root / "a" / f"{i}.png")
    return ImageFiles(root, [f"a/{i}.png" for i in numbers], [0] * len(numbers), ("a",))


def test_records_know_copies_by_their_pixels_where_pixels_tell(tmp_path: Path) -> None:
    trained = scenes(tmp_path / "trained", range(40))
    record = TrainedOn.from_keys(image_keys(trained, "content"), "content").with_pixels(trained)
    assert record.pixels.shape == (40, 2)
    assert np.array_equal(TrainedOn.from_dict(json.loads(json.dumps(record.to_dict()))).pixels, record.pixels)
    again = scenes(tmp_path / "again", range(30, 50))
    for i in range(30, 50):
        with Image.open(tmp_path / "again/a" / f"{i}.png") as image:
            image.resize((72, 48)).save(tmp_path / "again/a" / f"{i}.png")
    assert find_trained_copies([record], again) == TrainedCopies(numbers=(*range(10),), looked_at=20)
    assert find_trained_copies([record], trained) == TrainedCopies(numbers=(), looked_at=0)  # content knows them all
    assert find_trained_copies([replace(record, pixels=record.pixels[:0])], again) is None
    old = {key: value for key, value in record.to_dict().items() if key != "pixels"}
    assert len(TrainedOn.from_dict(old).pixels) == 0
    for wrong in ("AAAA", 5, record.to_dict()["pixels"] * 500):
        with pytest.raises(BadArgument, match="cannot be read"):
            TrainedOn.from_dict({**old, "pixels": wrong})
    alike = scenes(tmp_path / "alike", range(40), base=1)
    assert len(record.with_pixels(alike).pixels) == 0


@pytest.mark.parametrize("suffix", [".bmp", ".ppm", ".tif"])
def test_a_repainted_file_of_equal_size_and_time_has_another_fingerprint(tmp_path: Path, suffix: str) -> None:
    before = dataset_fingerprint(paint(tmp_path, suffix=suffix))
    path = tmp_path / "a" / f"1{suffix}"
    status = path.stat()
    Image.new("RGB", (8, 8), (9, 1, 97)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    after = dataset_fingerprint(open_dataset(tmp_path, "train", seed=0, val_fraction=0.0))
    assert before.partition("-")[0] == after.partition("-")[0]
    assert before != after


def test_of_a_large_file_the_ends_and_the_middle_count(tmp_path: Path) -> None:
    prints, content = set(), bytearray(3 << 20)
    for at in (None, 0, 3 << 19, (3 << 20) - 1):
        if at is not None:
            content[at] = 1
        (tmp_path / "x.bmp").write_bytes(content)
        file = LocalFile(tmp_path / "x.bmp")
        prints.add(digest_bytes(file.read, file.num_bytes))
    assert len(prints) == 4


def test_a_parquet_file_that_is_rewritten_has_another_fingerprint(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def write(shade: int) -> str:
        rows = []
        for i in range(8):
            png = io.BytesIO()
            Image.new("RGB", (8, 8), (shade, i, 0)).save(png, "PNG")
            rows.append({"bytes": png.getvalue(), "path": None})
        pq.write_table(pa.table({"image": rows, "label": [i % 2 for i in range(8)]}), tmp_path / "train.parquet")
        return dataset_fingerprint(open_dataset(tmp_path, "train", seed=0, val_fraction=0.2))

    assert write(0) == write(0) != write(200)


def test_a_tar_that_is_rewritten_with_the_same_size_and_time_is_indexed_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"

    def write(names: list[str]) -> list[str]:
        with tarfile.open(path, "w") as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = 3
                tar.addfile(entry, io.BytesIO(b"abc"))
        os.utime(path, ns=(10**18, 10**18))
        return [member.name for member in read_tar_index(LocalFile(path)).members]

    assert write(["a/1.png", "b/2.png"]) == ["a/1.png", "b/2.png"]
    assert write(["b/1.png", "a/2.png"]) == ["b/1.png", "a/2.png"]


def test_images_are_known_wherever_they_lie_and_whatever_they_are_called(tmp_path: Path) -> None:
    first = paint(tmp_path / "first")
    record = TrainedOn.from_keys(image_keys(Subset(first, [0, 1, 4]), "content"), "content", seed=3, val_fraction=0.25)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    os.rename(tmp_path / "second/a/0.bmp", tmp_path / "second/a/renamed.bmp")
    (tmp_path / "second/a/2.bmp").write_bytes(b"")
    second = open_dataset(tmp_path / "second", "train", seed=0, val_fraction=0.0)
    seen = {second.name(i): known for i, known in enumerate(find_trained_images([record], second))}
    assert [name for name, known in seen.items() if known] == ["a/1.bmp", "a/renamed.bmp", "b/0.bmp"]
    assert seen["a/2.bmp"] is False  # empty, and so not what was trained on
    again = TrainedOn.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again.to_dict() == record.to_dict()
    assert find_trained_images([again], second) == list(seen.values())
    assert find_trained_images([], second) == [False] * 8


def test_of_more_images_than_keys_some_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "MAX_CONTENTS", 2)
    record = TrainedOn.from_keys(["000000000001", "000000000009", "000000000005"], "name")
    assert record.images == 3
    assert not record.is_complete
    told = [record.contains(key) for key in ("000000000001", "000000000002", "000000000009", "00000000000a", "")]
    assert told == [True, False, None, None, False]
    assert TrainedOn.from_dict(record.to_dict()).contains("000000000005")


@pytest.mark.parametrize(
    "change", [{"keys": "AAAA"}, {"keys": 3}, {"images": "3"}, {"by": "guess"}, {"seed": None}, {"val_fraction": 2}]
)
def test_a_record_that_is_damaged_is_refused(change: dict[str, object]) -> None:
    plain = TrainedOn.from_keys(["000000000001", "000000000005"], "content").to_dict()
    with pytest.raises(BadArgument, match="cannot be read"):
        TrainedOn.from_dict({**plain, **change})


def test_a_list_of_images_says_what_is_other(tmp_path: Path) -> None:
    dataset = paint(tmp_path / "d")
    ImageList.from_splits({"train": dataset, "val": Subset(dataset, [0])}).write(tmp_path / "images.csv")
    listed = ImageList.read(tmp_path / "images.csv")
    assert listed is not None
    assert listed.difference("train", dataset) == ""
    assert len(listed.keys("val")) == 1
    shutil.move(tmp_path / "d/a/0.bmp", tmp_path / "d/b/9.bmp")
    Image.new("RGB", (8, 8), (77, 1, 97)).save(tmp_path / "d/a/1.bmp")
    other = listed.difference("train", open_dataset(tmp_path / "d", "train", seed=0, val_fraction=0.0))
    assert other == "of 8 train images 1 gone ('a/0.bmp'), 1 new ('b/9.bmp'), 1 of other content ('a/1.bmp')"
    assert "of another class" in listed.difference("train", Subset(_relabelled(dataset), range(8)))
    assert ImageList.read(tmp_path / "none.csv") is None
    (tmp_path / "images.csv").write_text("split\n")
    with pytest.raises(BadCheckpoint, match=r"images\.csv cannot be read"):
        ImageList.read(tmp_path / "images.csv")


def _relabelled(dataset: Dataset) -> Dataset:
    assert isinstance(dataset, Subset)
    assert isinstance(dataset.dataset, ImageFiles)
    return replace(dataset.dataset, labels=[1 - label for label in dataset.dataset.labels])


def test_names_that_are_not_utf8_are_listed(tmp_path: Path) -> None:
    dataset = paint(tmp_path / "d")
    os.rename(tmp_path / "d/a/0.bmp", os.fsencode(tmp_path / "d/a") + b"/\xe9\n.bmp")
    dataset = open_dataset(tmp_path / "d", "train", seed=0, val_fraction=0.0)
    ImageList.from_splits({"train": dataset}).write(tmp_path / "images.csv")
    listed = ImageList.read(tmp_path / "images.csv")
    assert listed is not None
    assert listed.difference("train", dataset) == ""
