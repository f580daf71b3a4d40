"""Datasets of labelled images, and how `open_dataset` makes one of what a user has.

| place | classes | train / val |
|---|---|---|
| "digits" | 0 to 9: scikit-learn's 1797 scanned digits, 8 x 8 | by the seed |
| a folder with train/ and val/ (or validation/, or test/) | the folders inside, the same in both | as they are |
| a folder with train/ alone, or a folder of class folders | the folders inside | by the seed |
| tar shards, local, over http(s) or in an object store; Parquet files | see shards.py | see shards.py |
| a folder with labels.csv (each of train/ and val/ may hold one too) | see `read_labels_csv` | by the seed |

By the seed: of each class the `val_fraction` of images whose names' hashes are smallest. So the split depends on
nothing but names and seed, and an image that is added later moves no more than a few others. A fraction of 0 or 1 gives
all to one side: 1 to evaluate on everything. A folder with val/ but no train/ can be evaluated on and not trained on.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Crop, CropBox
from onefold.data.dataset_info import SPLITS, DatasetInfo, Split, SplitInfo
from onefold.data.decode import printable
from onefold.data.folders import ImageFiles, join_names, read_class_folders, subfolders
from onefold.data.shards import MAX_CLASSES, VALIDATION, find_shards, open_shards
from onefold.errors import BadArgument, BadData, MissingExtra

_ARCHIVES = (".zip", ".gz", ".tgz", ".7z", ".zst")


class Dataset(Protocol):
    """Labelled images, numbered from 0. Reading an image raises BadData where it cannot be used."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their indices."""

    def __len__(self) -> int: ...

    def label(self, i: int) -> int:
        """Give the class index of image i."""

    def name(self, i: int) -> str:
        """Give the name of image i: the same wherever the dataset lies."""

    def image(self, i: int, *, min_side: int = 0) -> Image.Image:
        """Decode image i, RGB; with `min_side` above 0 perhaps at a smaller scale, each side no less than that."""

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Decode a crop of image i; no more of the image need be decoded."""

    def num_bytes(self, i: int) -> int:
        """Give the stored size of image i, or -1 where it is gone or not known."""

    def digest(self, i: int) -> str:
        """Give a digest of the stored bytes of image i, as `digest_bytes` does; "" where they cannot be read."""


@dataclass(frozen=True, eq=False)
class Digits:
    """scikit-learn's handwritten digits: grey, shown as RGB. A Dataset."""

    pixels: NDArray[np.uint8]  # (N, 8, 8)
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = tuple(str(digit) for digit in range(10))

    def __len__(self) -> int:
        return len(self.pixels)

    def label(self, i: int) -> int:
        """Give the digit that image i shows."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """Give the number of image i in scikit-learn's order."""
        return f"digit-{i:04d}"

    def image(self, i: int, *, min_side: int = 0) -> Image.Image:
        """Give image i, 8 x 8, RGB."""
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Give a crop of image i."""
        return crop_box.of(self.image(i))

    def num_bytes(self, i: int) -> int:
        """Give 64, for each."""
        return int(self.pixels[i].nbytes)

    def digest(self, i: int) -> str:
        """Give a digest of the pixels of image i."""
        return hashlib.sha256(self.pixels[i].tobytes()).hexdigest()


@dataclass(frozen=True)
class Subset:
    """Some images of a dataset, with all its classes. A Dataset."""

    dataset: Dataset
    indices: Sequence[int]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the whole dataset."""
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, i: int) -> int:
        """Give the class index of image i of the subset."""
        return self.dataset.label(self.indices[i])

    def name(self, i: int) -> str:
        """Give the name of image i of the subset."""
        return self.dataset.name(self.indices[i])

    def image(self, i: int, *, min_side: int = 0) -> Image.Image:
        """Decode image i of the subset."""
        return self.dataset.image(self.indices[i], min_side=min_side)

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Decode a crop of image i of the subset."""
        return self.dataset.crop(self.indices[i], crop_box)

    def num_bytes(self, i: int) -> int:
        """Give the stored size of image i of the subset."""
        return self.dataset.num_bytes(self.indices[i])

    def digest(self, i: int) -> str:
        """Give a digest of image i of the subset."""
        return self.dataset.digest(self.indices[i])


@dataclass(frozen=True, eq=False)
class DatasetSplits:
    """The splits of a place, and what is known of them: what `read_dataset` gives."""

    info: DatasetInfo
    datasets: Mapping[Split, Dataset]

    def __contains__(self, split: Split) -> bool:
        return split in self.datasets

    def open(self, split: Split) -> Dataset:
        """Give one split. Raises BadData where there is none, and for train with fewer than two classes."""
        if split not in self.datasets:
            raise BadData(f"{printable(self.info.place)} has no images for {split}")
        return self.datasets[split]


def read_dataset(place: str | Path, *, seed: int, val_fraction: float) -> DatasetSplits:
    """Look at a place ("digits", a folder, shards) and give its splits, and what they were read from.

    Raises BadData for a place that cannot be used or that can be understood in two ways.
    """
    datasets: dict[Split, Dataset] = {}
    for split in SPLITS[:2]:
        with suppress(BadData):
            datasets[split] = open_dataset(place, split, seed=seed, val_fraction=val_fraction)
    classes = next(iter(datasets.values())).classes
    splits = tuple(
        SplitInfo(name=name, source=printable(place), num_images=len(images), images_per_class=count_classes(images))
        for name, images in datasets.items()
    )
    info = DatasetInfo(
        place=str(place), container="images", classes=classes, class_order="sorted by name", splits=splits
    )
    return DatasetSplits(info, datasets)


def count_classes(dataset: Dataset) -> tuple[int, ...]:
    """Count the images of each class."""
    counts = Counter(dataset.label(i) for i in range(len(dataset)))
    return tuple(counts[label] for label in range(len(dataset.classes)))


def open_dataset(place: str | Path, split: Split, *, seed: int, val_fraction: float) -> Dataset:
    """Open the training or the validation images of a place: "digits", a folder, or shards (see the top of this file).

    Raises BadData for a folder that cannot be used, and for training with fewer than two classes.
    """
    if split not in ("train", "val"):
        raise BadArgument(f"split is {split!r}, expected 'train' or 'val'")
    if not 0 <= val_fraction <= 1:
        raise BadArgument(f"val_fraction is {val_fraction}, expected 0 to 1")
    if place == "digits":
        return _split_by_seed(_digits(), split, seed, val_fraction, "the digits")
    shards = find_shards(place)
    if shards is not None:
        images = open_shards(shards, split)
        if "all" in shards:
            return _split_by_seed(images, split, seed, val_fraction, printable(place))
        if split == "train":
            _check_training(images, printable(place))
        return images
    folder = Path(place)
    _check_folder(folder)
    val = _validation_folder(folder)
    if val is not None:
        return _open_split(folder / "train", val, split)
    whole = _read_labelled(folder / "train" if _holds_classes(folder / "train") else folder)
    return _split_by_seed(whole, split, seed, val_fraction, printable(folder))


def _digits() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra('the digits need scikit-learn: pip install "onefold[digits]"') from error
    sixteenths, labels = load_digits(return_X_y=True)  # 0 to 16
    pixels = np.rint(sixteenths * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return Digits(pixels, labels.astype(np.int64))


# ---------------------------------------------------------------------------------------------- splits


def _check_folder(folder: Path) -> None:
    shown = printable(folder)
    if os.path.isdir(folder):
        return
    if not os.path.exists(folder):
        raise BadData(f"{shown} is not there: expected a folder of images, or the word digits")
    if folder.suffix.lower() in _ARCHIVES:
        raise BadData(f"{shown} is an archive: unpack it and give the folder")
    raise BadData(f"{shown} is a file: expected a folder of images")


def _validation_folder(folder: Path) -> Path | None:
    """Find the folder of validation images beside train/, or alone; None where there is none."""
    names = subfolders(folder)
    present = [name for name in VALIDATION if name in names]
    alone = set(names) <= set(VALIDATION) and all(_holds_classes(folder / name) for name in present)
    return folder / present[0] if present and ("train" in names or alone) else None


def _holds_classes(folder: Path) -> bool:
    """Whether a folder called train or val holds classes of its own, rather than being a class with that name."""
    return os.path.isdir(folder) and (_labels_table(folder) is not None or bool(subfolders(folder)))


def _labels_table(folder: Path) -> Path | None:
    table = folder / "labels.csv"
    return table if os.path.isfile(table) else None


def _read_labelled(folder: Path) -> ImageFiles:
    table = _labels_table(folder)
    return read_labels_csv(table) if table else read_class_folders(folder)


def _open_split(train: Path, val: Path, split: Split) -> Dataset:
    """Open one half of a dataset that is split already, if both halves have the same classes."""
    if not os.path.isdir(train):
        if split == "train":
            raise BadData(f"{printable(train.parent)} has {val.name}/ and no train/: there is nothing to train on")
        return _read_labelled(val)
    half = _read_labelled(train if split == "train" else val)
    # Of class folders only the names are read: the images of the other half need not be listed for them.
    classes = {
        folder: set(read_labels_csv(table).classes if (table := _labels_table(folder)) else subfolders(folder))
        for folder in (train, val)
    }
    if classes[train] != classes[val]:
        only = ((train.name, classes[train] - classes[val]), (val.name, classes[val] - classes[train]))
        parts = [f"only in {name}: {join_names(sorted(names))}" for name, names in only if names]
        raise BadData(f"{printable(train.parent)}: the classes differ; {'; '.join(parts)}")
    if split == "train":
        _check_training(half, printable(train))
    return half


def _split_by_seed(whole: Dataset, split: Split, seed: int, val_fraction: float, shown: str) -> Dataset:
    """Give the images of one side; a class of two or more is on both sides, unless all images are on one."""
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(whole)):
        members[whole.label(i)].append(i)
    is_val = [val_fraction == 1] * len(whole)
    if 0 < val_fraction < 1:
        for images in members.values():
            count = min(max(round(val_fraction * len(images)), 1), len(images) - 1)
            for i in sorted(images, key=lambda i: _rank(seed, whole.name(i)))[:count]:
                is_val[i] = True
    part = Subset(whole, [i for i, held_out in enumerate(is_val) if held_out == (split == "val")])
    if not len(part):
        raise BadData(f"{shown}: a val_fraction of {val_fraction} leaves no image for {split}")
    if split == "train":
        _check_training(part, shown)
    return part


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def _check_training(dataset: Dataset, shown: str) -> None:
    """Raise BadData unless there are two classes or more, each with an image."""
    present = {dataset.label(i) for i in range(len(dataset))}
    if len(dataset.classes) < 2:
        raise BadData(f"{shown} has one class only, {join_names(dataset.classes)}: training needs two or more")
    missing = [name for i, name in enumerate(dataset.classes) if i not in present]
    if missing:
        raise BadData(f"{shown}: classes without an image to train on: {join_names(missing)}")


# ------------------------------------------------------------------------------------------ labels.csv


@dataclass(frozen=True)
class _Row:
    line: int
    file: str
    label: str | None
    index: str | None


def read_labels_csv(table: Path) -> ImageFiles:
    """Read which image is of which class, for a folder without class folders.

    The first line names the columns. `file` is needed (relative to the folder, or to its subfolder `images`), and
    one of
        label   the name of a class: the classes are the different names, sorted
        index   the number of a class, as a network counts them; the names then are the column `label`, or the numbers
    Other columns are ignored. Comma, semicolon or tab; UTF-8, and bytes that are not are kept as they are.
    Raises BadData naming the line or the files at fault.
    """
    rows = list(_rows(table))
    if not rows:
        raise BadData(f"{printable(table)} lists no images")
    names = _existing_files(table, rows)
    if rows[0].index is None:
        classes = sorted({row.label or "" for row in rows})
        number = {name: i for i, name in enumerate(classes)}
        return ImageFiles(table.parent, names, [number[row.label or ""] for row in rows], tuple(classes))
    labels = [_index(table, row) for row in rows]
    return ImageFiles(table.parent, names, labels, _names_by_index(table, rows, labels))


def _rows(table: Path) -> Iterator[_Row]:
    try:
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            header = lines.readline()
            separator = max(",;\t", key=header.count)
            columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
            if "file" not in columns or not {"label", "index"} & set(columns):
                expected = "expected the columns file,label or file,index"
                raise BadData(f"{printable(table)}: {expected}; its first line is {printable(header.strip()[:80])!r}")
            reader = csv.reader(lines, delimiter=separator)
            for values in reader:
                if values:
                    cells = {name: value.strip() for name, value in zip(columns, values, strict=False)}
                    row = _Row(reader.line_num + 1, cells.get("file", ""), cells.get("label"), cells.get("index"))
                    if not row.file or not (row.label or row.index):
                        raise BadData(f"{printable(table)}, line {row.line}: expected a file and its class")
                    yield row
    except (OSError, csv.Error) as error:
        raise BadData(f"cannot read {printable(table)}: {error}") from error


def _existing_files(table: Path, rows: list[_Row]) -> list[str]:
    """Give the files' names relative to the table's folder. BadData where some are not there or listed twice."""
    names: list[str] = []
    missing: list[str] = []
    lines: dict[str, int] = {}
    for row in rows:
        name = next((n for n in (row.file, f"images/{row.file}") if os.path.lexists(table.parent / n)), None)
        if name is None:
            missing.append(row.file)
            continue
        first = lines.setdefault(name, row.line)
        if first != row.line:
            raise BadData(f"{printable(table)} lists {printable(row.file)} twice, in lines {first} and {row.line}")
        names.append(name)
    if missing:
        raise BadData(f"{printable(table)} lists {len(missing)} files that are not there: {join_names(missing)}")
    return names


def _index(table: Path, row: _Row) -> int:
    text = row.index or ""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < MAX_CLASSES):
        where = f"{printable(table)}, line {row.line}"
        raise BadData(f"{where}: the index is {printable(text)!r}, expected a number from 0 to {MAX_CLASSES - 1}")
    return int(text)


def _names_by_index(table: Path, rows: list[_Row], labels: list[int]) -> tuple[str, ...]:
    """Name the classes by the column `label`; a class that no image is of, or without that column, by its number."""
    numbers = [str(i) for i in range(max(labels) + 1)]
    if rows[0].label is None:
        return tuple(numbers)
    names: dict[int, str] = {}
    for row, index in zip(rows, labels, strict=True):
        name = names.setdefault(index, row.label or "")
        if name != row.label:
            both = f"{printable(name)!r} and {printable(row.label or '')!r}"
            raise BadData(f"{printable(table)}, line {row.line}: index {index} is called both {both}")
    return tuple(names.get(i, number) for i, number in enumerate(numbers))
