"""Sources of labelled images, and how `open_source` makes one of what a user has.

| what the user has | classes | train / val |
|---|---|---|
| "digits" | 0 to 9: scikit-learn's 1797 scanned digits, 8 x 8 | by the seed |
| a folder with train/ and val/ (or validation/, or test/) | the folders inside, the same in both | as they are |
| a folder with train/ alone, or a folder of class folders | the folders inside | by the seed |
| tar shards, Parquet files, local or over http(s) | see shards.py | see shards.py |
| a folder with labels.csv (each of train/ and val/ may hold one too) | see labels.py | by the seed |

By the seed: of each class the `val_fraction` of images whose names' hashes are smallest. So the split hangs on nothing
but names and seed, and an image added later moves no more than a few others. A fraction of 0 or 1 gives all to one
side: 1 to evaluate on everything. A folder with val/ but no train/ can be evaluated on and not trained on.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Cut, Window
from onefold.data.decode import printable
from onefold.data.folders import Files, class_folders, listed, visible_folders
from onefold.data.labels import labels_csv
from onefold.data.shards import open_packed, places_of
from onefold.errors import BadArgument, BadData, MissingExtra

Split = Literal["train", "val"]
VALIDATION = ("val", "validation", "test")
_ARCHIVES = (".zip", ".gz", ".tgz", ".7z", ".zst")


class Source(Protocol):
    """Labelled images, numbered from 0. Reading an image raises BadData where it cannot be used."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their indices."""

    def __len__(self) -> int: ...

    def label(self, i: int) -> int:
        """The class index of image i."""

    def name(self, i: int) -> str:
        """What image i is called: the same wherever the source lies."""

    def image(self, i: int, *, at_least: int = 0) -> Image.Image:
        """Image i, RGB; with `at_least` above 0 perhaps smaller, but each side no less than that."""

    def crop(self, i: int, window: Window) -> Cut:
        """A part of image i, as the window asks; no more of it need be decoded."""

    def num_bytes(self, i: int) -> int:
        """The stored size of image i, or -1 where it is gone."""


@dataclass(frozen=True, eq=False)
class Digits:
    """scikit-learn's handwritten digits: grey, shown as RGB. A Source."""

    pixels: NDArray[np.uint8]  # (N, 8, 8)
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = tuple(str(digit) for digit in range(10))

    def __len__(self) -> int:
        return len(self.pixels)

    def label(self, i: int) -> int:
        """The digit that image i shows."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """The number of image i in scikit-learn's order."""
        return f"digit-{i:04d}"

    def image(self, i: int, *, at_least: int = 0) -> Image.Image:
        """Image i, 8 x 8, RGB."""
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def crop(self, i: int, window: Window) -> Cut:
        """A part of image i."""
        return window.of(self.image(i))

    def num_bytes(self, i: int) -> int:
        """64, of each."""
        return int(self.pixels[i].nbytes)


@dataclass(frozen=True)
class Subset:
    """Some images of a source, with all its classes. A Source."""

    source: Source
    indices: Sequence[int]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the whole source."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, i: int) -> int:
        """The class index of image i of the subset."""
        return self.source.label(self.indices[i])

    def name(self, i: int) -> str:
        """The name of image i of the subset."""
        return self.source.name(self.indices[i])

    def image(self, i: int, *, at_least: int = 0) -> Image.Image:
        """Image i of the subset."""
        return self.source.image(self.indices[i], at_least=at_least)

    def crop(self, i: int, window: Window) -> Cut:
        """A part of image i of the subset."""
        return self.source.crop(self.indices[i], window)

    def num_bytes(self, i: int) -> int:
        """The stored size of image i of the subset."""
        return self.source.num_bytes(self.indices[i])


def open_source(spec: str | Path, split: Split, *, seed: int, val_fraction: float) -> Source:
    """The training or the validation images of `spec`: "digits", a folder, or archives (see the top of this file).

    Raises BadData for a folder that cannot be used, and for training with fewer than two classes.
    """
    if split not in ("train", "val"):
        raise BadArgument(f"split is {split!r}, expected 'train' or 'val'")
    if not 0 <= val_fraction <= 1:
        raise BadArgument(f"val_fraction is {val_fraction}, expected 0 to 1")
    if spec == "digits":
        return _part(_digits(), split, seed, val_fraction, "the digits")
    places = places_of(spec)
    if places is not None:
        return _packed(places, split, seed, val_fraction, printable(spec))
    folder = Path(spec)
    _check_folder(folder)
    held_out = _held_out(folder)
    if held_out is not None:
        return _given(folder / "train", held_out, split)
    whole = _labelled(folder / "train" if _is_split(folder, "train") else folder)
    return _part(whole, split, seed, val_fraction, printable(folder))


def _packed(places: dict[str, list[str]], split: Split, seed: int, val_fraction: float, shown: str) -> Source:
    packed = open_packed(places, split)
    if "all" in places:
        return _part(packed, split, seed, val_fraction, shown)
    if split == "train":
        _check_training(packed, shown)
    return packed


def fingerprint(source: Source) -> str:
    """SHA-256 (hex) over classes, names, labels and stored sizes: two sources that agree are the same for a resume."""
    digest = hashlib.sha256(repr(source.classes).encode())
    for i in range(len(source)):
        line = f"{source.name(i)!r} {source.label(i)} {source.num_bytes(i)}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _check_folder(folder: Path) -> None:
    shown = printable(folder)
    if os.path.isdir(folder):
        return
    if not os.path.exists(folder):
        raise BadData(f"{shown} is not there: expected a folder of images, or the word digits")
    if folder.suffix.lower() in _ARCHIVES:
        raise BadData(f"{shown} is an archive: unpack it and give the folder")
    raise BadData(f"{shown} is a file: expected a folder of images")


def _held_out(folder: Path) -> Path | None:
    """The folder of validation images, if there is one beside train/, or alone."""
    names = visible_folders(folder)
    found = [name for name in VALIDATION if name in names]
    alone = set(names) <= set(VALIDATION) and all(_is_split(folder, name) for name in found)
    return folder / found[0] if found and ("train" in names or alone) else None


def _is_split(folder: Path, name: str) -> bool:
    """Whether folder/name holds classes of its own, rather than being a class that happens to be called so."""
    inner = folder / name
    return os.path.isdir(inner) and (_table(inner) is not None or bool(visible_folders(inner)))


def _table(folder: Path) -> Path | None:
    table = folder / "labels.csv"
    return table if os.path.isfile(table) else None


def _labelled(folder: Path) -> Files:
    table = _table(folder)
    return labels_csv(table) if table else class_folders(folder)


def _classes(folder: Path) -> tuple[str, ...]:
    table = _table(folder)
    return labels_csv(table).classes if table else tuple(visible_folders(folder))


def _given(train: Path, held_out: Path, split: Split) -> Source:
    """One half of a set that is split already, if both halves have the same classes."""
    if not os.path.isdir(train):
        if split == "train":
            raise BadData(f"{printable(train.parent)} has {held_out.name}/ and no train/: there is nothing to train on")
        return _labelled(held_out)
    half = _labelled(train if split == "train" else held_out)
    here, there = set(_classes(train)), set(_classes(held_out))
    if here != there:
        parts = [f"only in {train.name}: {listed(sorted(here - there))}"] if here - there else []
        parts += [f"only in {held_out.name}: {listed(sorted(there - here))}"] if there - here else []
        raise BadData(f"{printable(train.parent)}: the classes differ; {'; '.join(parts)}")
    if split == "train":
        _check_training(half, printable(train))
    return half


def _part(whole: Source, split: Split, seed: int, val_fraction: float, shown: str) -> Source:
    chosen = [i for i, held in enumerate(_holds_out(whole, seed, val_fraction)) if held == (split == "val")]
    if not chosen:
        raise BadData(f"{shown}: a val_fraction of {val_fraction} leaves no image for {split}")
    part = Subset(whole, chosen)
    if split == "train":
        _check_training(part, shown)
    return part


def _holds_out(source: Source, seed: int, fraction: float) -> list[bool]:
    """Of each image, whether it is for validation; a class of two or more is on both sides, unless all is on one."""
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(source)):
        members[source.label(i)].append(i)
    held = [fraction == 1] * len(source)
    if fraction in (0, 1):
        return held
    for group in members.values():
        count = min(max(round(fraction * len(group)), 1), len(group) - 1)
        for i in sorted(group, key=lambda i: _rank(seed, source.name(i)))[:count]:
            held[i] = True
    return held


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def _check_training(source: Source, shown: str) -> None:
    """BadData unless there are two classes or more, each with an image."""
    present = {source.label(i) for i in range(len(source))}
    if len(source.classes) < 2:
        raise BadData(f"{shown} has one class only, {listed(source.classes)}: training needs two or more")
    missing = [name for i, name in enumerate(source.classes) if i not in present]
    if missing:
        raise BadData(f"{shown}: classes without an image to train on: {listed(missing)}")


def _digits() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra('the digits need scikit-learn: pip install "onefold[digits]"') from error
    sixteenths, labels = load_digits(return_X_y=True)  # 0 to 16
    pixels = np.rint(sixteenths * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return Digits(pixels, labels.astype(np.int64))
