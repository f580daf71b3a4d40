"""Datasets of labelled images, and `read_dataset`, the one reader of what a user has: classes, splits, left out.

`read_place` finds the images of a place and the splits that it names; here their classes are numbered, and the missing
split is made. The classes are those of train, in NFC: as the place numbers them where it does, in the order of numbers
where all are numbers, else sorted by code points. val may lack classes but have no others.

Where a place has no val it is cut out of train (`splits.split_by_seed`). test is never cut, and never chooses anything:
it is kept aside and scored by `onefold eval`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.class_difference import class_difference
from onefold.data.crop import Crop, CropBox
from onefold.data.dataset_info import SPLITS, DatasetInfo, LeftOut, PlaceImages, Split, SplitImages, SplitInfo
from onefold.data.dataset_layouts import read_place
from onefold.data.decode import printable_name
from onefold.data.folders import join_names
from onefold.data.photo_copies import are_classes_of_one, group_by_photo, notes_of_shared_groups, notes_of_shared_photos
from onefold.data.pixel_tables import PixelImages
from onefold.data.preprocessing import ValueRange
from onefold.data.remote_files import REMOTE_PREFIXES
from onefold.data.repeated_images import notes_of_repeated
from onefold.data.shard_patterns import SHARD_SUFFIXES
from onefold.data.splits import split_by_seed, split_into_words
from onefold.data.table_columns import find_joined_names
from onefold.errors import BadArgument, BadData, MissingExtra
from onefold.file_io import normalize_class_name, suggest_path

_DOUBTFUL = frozenset(("background", "clutter", "unknown", "unlabeled", "unlabelled", "undefined", "tbd", "todo")) | {
    *("unsorted", "uncategorized", "uncategorised", "unclassified", "trash", "tmp", "temp"),
}

_NUM_NAMES = 100  # images whose names show whether Roboflow called them


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

    def image(self, i: int, *, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
        """Decode image i, RGB; with `min_side` above 0 perhaps at a smaller scale, each side no less than that.

        `value_range` are the values that become 0 and 255 where samples have more than 8 bits.
        """

    def raw_samples(self, i: int) -> NDArray[Any] | None:
        """Read the samples of image i as stored, (h, w) or (h, w, 3), where they have more than 8 bits, else None."""

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Decode a crop of image i; no more of the image need be decoded."""

    def num_bytes(self, i: int) -> int:
        """Give the stored size of image i, or -1 where it is gone or not known."""

    def digest(self, i: int) -> str:
        """Give a digest of the stored bytes of image i, as `digest_bytes` does; "" where they cannot be read."""


class Digits(PixelImages):
    """scikit-learn's handwritten digits, 8 x 8: grey, shown as RGB. A Dataset."""

    def name(self, i: int) -> str:
        """Give the number of image i in scikit-learn's order."""
        return f"digit-{i:04d}"


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

    def image(self, i: int, *, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
        """Decode image i of the subset."""
        return self.dataset.image(self.indices[i], min_side=min_side, value_range=value_range)

    def raw_samples(self, i: int) -> NDArray[Any] | None:
        """Read the samples of image i of the subset where they have more than 8 bits, else None."""
        return self.dataset.raw_samples(self.indices[i])

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
    """The splits of a place, and what is known of them: what `read_dataset` gives.

    `is_val_cut` is whether val was cut out of the other images by seed, since the place has none of its own.
    """

    info: DatasetInfo
    datasets: Mapping[Split, Dataset]
    is_val_cut: bool
    val_fraction: float

    def open(self, split: Split) -> Dataset:
        """Give one split. Raises BadData where there is none, and for train with a class that has no image."""
        shown = printable_name(self.info.place)
        if split not in self.datasets:
            if self.is_val_cut and split != "test":
                raise BadData(f"{shown}: a val_fraction of {self.val_fraction} leaves no image for {split}")
            there = ", ".join(s.source for s in self.info.splits)
            why = ": there is nothing to train on" if split == "train" else ""
            raise BadData(f"{shown} has {there} and no {split}/{why}")
        dataset = self.datasets[split]
        if split == "train":
            _check_training(dataset, shown)
        return dataset

    @property
    def evaluation_split(self) -> Split:
        """The split to score a network on: val where the place has one of its own, else test, else what val is cut."""
        return "test" if "test" in self.datasets and (self.is_val_cut or "val" not in self.datasets) else "val"


def read_dataset(
    place: str | Path,
    *,
    seed: int,
    val_fraction: float,
    class_order: Sequence[str] | None = None,
    test_is_val: bool = False,
    val: str | Path | None = None,
) -> DatasetSplits:
    """Look at a place ("digits", a folder, shards, a table) and give its splits, and what they were read from.

    `class_order` are the classes in an order that counts where the place has all of them (images of others are left
    out), and `test_is_val` takes test where there is no val: both for a run that goes on as it was started. `val` is
    another place, whose val, or else test, or else all images are val then. Raises BadData for a place that cannot be
    used or that can be understood in two ways.
    """
    if not 0 <= val_fraction <= 1:
        raise BadArgument(f"val_fraction is {val_fraction}, expected 0 to 1")
    images = _digits() if place == "digits" else read_place(place)
    parts, notes, left_out = list(images.splits), list(images.notes), list(images.left_out)
    shown = printable_name(place)
    if val is not None:
        own = [part.source for part in parts if part.split == "val"]
        notes += [f"{source} is not used: val is {printable_name(val)}" for source in own]
        elsewhere = _digits() if val == "digits" else read_place(val)
        notes += elsewhere.notes
        left_out += elsewhere.left_out
        held_out = {part.split: part for part in elsewhere.splits}
        chosen = next(held_out[split] for split in ("val", "test", None, "train") if split in held_out)
        parts = [replace(part, split=part.split or "train") for part in parts if part.split != "val"]
        parts.append(replace(chosen, split="val", source=f"{printable_name(val)} ({chosen.source})"))
    if test_is_val and not any(part.split == "val" for part in parts):
        parts = [replace(part, split="val") if part.split == "test" else part for part in parts]
    by_split = {part.split: part for part in parts}
    if len({part.split or "train" for part in parts}) < len(parts):
        each = ", ".join(f"{part.source} ({part.split or 'train'})" for part in parts)
        raise BadData(f"{shown} has one split in several parts, {each}: put it together, or give the folder of one")
    reference = next(by_split[split] for split in ("train", None, "val", "test") if split in by_split)
    present = frozenset(reference.labels)
    classes, class_order_rule = _order(reference)
    class_order = [*map(normalize_class_name, class_order or ())]
    of_run = {*class_order}
    if len(of_run) > 1 and of_run <= {*classes}:
        classes, class_order_rule = tuple(class_order), "in the order of the run"
    number = {name: i for i, name in enumerate(classes)}
    if gaps := _gaps(reference):
        notes.append(gaps)
    plain = {name: re.sub(r"[\W_]+", " ", name.casefold()).strip() for name in classes}
    counts = Counter(plain.values())
    if alike := sorted(name for name in classes if plain[name] and counts[plain[name]] > 1):
        only_case = len({name.casefold() for name in alike}) < len(alike)
        kind = "case" if only_case else "blanks and signs"
        notes.append(f"classes whose names differ in {kind} only are several: {join_names(alike)}")
    if doubtful := [
        name
        for name in classes
        if _DOUBTFUL & {*split_into_words(name)} or (name.isascii() and not any(map(str.isalnum, name)))
    ]:
        notes.append(f"{join_names(doubtful)} counts as a class: move it away if it stands for none")
    if len(classes) == 1 and reference.split in ("train", None):
        notes.append(f"one class only, {join_names(classes)}: enough to be scored on, not to train a classifier")
    if joined := find_joined_names(classes):
        notes.append(joined)
    opened: list[tuple[SplitImages, Dataset]] = []
    datasets: dict[Split, Dataset] = {}
    sources: dict[Split, str] = {}
    for part in parts:
        names = frozenset(part.labels)
        if part.split == "val" and names - present - set(classes):
            sides = ("train", "val") if val is None else (shown, printable_name(val))
            raise class_difference(shown, dict(zip(sides, (present, names), strict=True)))
        unknown = sum(label not in number for label in part.labels)
        if unknown:
            whose = "the run does" if present > {*classes} else "the others do"
            reason = f"of classes that {whose} not have ({join_names(sorted(names - set(classes)), 3)})"
            left_out.append(LeftOut(count=unknown, what=f"images of {part.source}", reason=reason))
        if part is not reference and (missing := sorted(present - names)):
            notes.append(f"{part.source} has no images of {join_names(missing)}")
        if part.numbered and [name for name in part.numbered if name in number] != [
            name for name in classes if name in {*part.numbered}
        ]:
            notes.append(f"in {part.source} the classes are numbered otherwise: their names count")
        whole = part.open([number.get(label, -1) for label in part.labels], classes)
        opened.append((part, whole))
        if unknown:
            whole = Subset(whole, [i for i in range(len(whole)) if whole.label(i) >= 0])
        if not len(whole):  # what was left out of it is said
            continue
        datasets[part.split or "train"] = whole
        sources[part.split or "train"] = part.source
    notes += [*notes_of_repeated(opened), *notes_of_shared_groups(parts)]
    if any(".rf." in whole.name(i) for _, whole in opened[1:] for i in range(min(len(whole), _NUM_NAMES))):
        notes += notes_of_shared_photos([(part, [*map(whole.name, range(len(whole)))]) for part, whole in opened])
    is_val_cut = "train" in datasets and "val" not in datasets
    if is_val_cut:
        whole, source = datasets.pop("train"), sources["train"]
        image_names, labels = [whole.name(i) for i in range(len(whole))], [whole.label(i) for i in range(len(whole))]
        is_kept = [label in number for label in reference.labels]
        things = None if reference.groups is None else [*compress(reference.groups, is_kept)]
        groups = _groups(replace(reference, groups=things), image_names, labels, notes)
        for split, numbers in split_by_seed(image_names, labels, seed, val_fraction, groups).items():
            side = Subset(whole, numbers)
            if len(side):
                wanted = val_fraction if split == "val" else 1 - val_fraction
                share = len(side) / len(whole)  # of small classes another one: each has an image on either side
                share = wanted if abs(share - wanted) < 0.01 and share < 1 else share
                datasets[split] = side
                sources[split] = f"{100 * share:.3g} % of {source}, by seed {seed}" if share < 1 else source
        if "val" not in datasets and val_fraction > 0:
            notes.append(f"no class of {source} has two images, so that there is none for val")
        if "test" in datasets and val_fraction < 1:
            notes.append(
                f"there is no val: it is cut out of {source}, and {sources['test']} is kept for `onefold eval`"
            )
    info = DatasetInfo(
        place=str(place),
        container=images.container,
        classes=classes,
        class_order=class_order_rule,
        splits=tuple(
            SplitInfo(
                name=split,
                source=sources[split],
                num_images=len(datasets[split]),
                images_per_class=_count_by_class(datasets[split]),
            )
            for split in SPLITS
            if split in datasets
        ),
        left_out=tuple(left_out),
        notes=tuple(dict.fromkeys(notes)),
    )
    return DatasetSplits(info, datasets, is_val_cut, val_fraction)


def _groups(part: SplitImages, names: Sequence[str], labels: Sequence[int], notes: list[str]) -> Sequence[str]:
    """Give of what each image is, where several are of one photo or one thing; says so in `notes`."""
    names = part.photo_names if part.photo_names and len(part.photo_names) == len(names) else names
    photos = group_by_photo(names, labels)
    if part.groups is None or len(part.groups) != len(names):
        groups = photos
    elif are_classes_of_one(part.groups, labels):
        only = f"most classes are of one {part.group_column} only"
        notes.append(f"{only}: images of one are on both sides where val is cut out")
        groups = photos
    else:
        things = len({*part.groups} - {""})
        notes.append(
            f"the {len(names)} images of {part.source} are of {things} of the column {part.group_column}: val has all "
            "images of one, or none"
        )
        return [group or photo for group, photo in zip(part.groups, photos, strict=True)]
    if several := [name for name, group in zip(names, groups, strict=True) if group]:
        count = len({*groups} - {""})
        which = f"{count} photos or videos" if count > 1 else "one photo or video"
        notes.append(
            f"{len(several)} images are of {which} by their names ({join_names(several, 2)}): val has all "
            "images of one, or none"
        )
    return groups


def _order(reference: SplitImages) -> tuple[tuple[str, ...], str]:
    """Give the classes in their order, and its rule."""
    if reference.numbered is not None:
        return reference.numbered, f"as {reference.source} numbers them"
    names = set(reference.labels)
    if all(name.isascii() and name.isdecimal() for name in names) and len({*map(int, names)}) == len(names):
        return tuple(sorted(names, key=int)), "in the order of their numbers"
    return tuple(sorted(names)), "sorted by name"


def _gaps(reference: SplitImages) -> str:
    """Say that the numbers of classes have gaps, and are no outputs of a network: "" where they are 0, or 1, to N."""
    numbers = reference.numbered or ()
    if not all(map(str.isdecimal, numbers)) or not numbers:
        return ""
    first, last = int(numbers[0]), int(numbers[-1])
    if first in (0, 1) and [*map(int, numbers)] == [*range(first, first + len(numbers))]:
        return ""
    return (
        f"{reference.source} numbers its {len(numbers)} classes {join_names(numbers, 3)} (up to {last}): a number that "
        "no image has is no class"
    )


def open_dataset(place: str | Path, split: Split, *, seed: int, val_fraction: float) -> Dataset:
    """Open one split of a place; see `read_dataset`. Raises BadData where the place has no such split."""
    if split not in SPLITS:
        raise BadArgument(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    return read_dataset(place, seed=seed, val_fraction=val_fraction).open(split)


def _count_by_class(dataset: Dataset) -> tuple[int, ...]:
    """Count the images of each class."""
    counts = Counter(dataset.label(i) for i in range(len(dataset)))
    return tuple(counts[label] for label in range(len(dataset.classes)))


def check_places_exist(*places: str | None) -> None:
    """Raise BadData where a folder or file is not on this machine; shards and remote places are not looked for."""
    for place in filter(None, places):
        elsewhere = "{" in place or place.startswith(REMOTE_PREFIXES) or place.endswith(SHARD_SUFFIXES)
        if place != "digits" and not elsewhere and not os.path.exists(place):
            raise BadData(
                f"{printable_name(place)} is not there"
                f"{suggest_path(place) or ': expected a folder of images, or the word digits'}"
            )


def _digits() -> PlaceImages:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("the digits need scikit-learn", "digits") from error
    sixteenths, labels = load_digits(return_X_y=True)  # 0 to 16
    pixels = np.rint(sixteenths * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    classes = tuple(str(digit) for digit in range(10))
    digits = Digits("digits", pixels, range(len(pixels)), labels.tolist(), classes)
    part = SplitImages(
        split=None, source="the digits", labels=list(map(str, labels.tolist())), open=lambda numbers, classes: digits
    )
    return PlaceImages(container="scikit-learn's scanned digits", splits=(part,))


def _check_training(dataset: Dataset, shown: str) -> None:
    """Raise BadData unless there are two classes or more, each with an image."""
    present = {dataset.label(i) for i in range(len(dataset))}
    if len(dataset.classes) < 2:
        raise BadData(
            f"{shown} has one class only, {join_names(dataset.classes)}: training needs two or more: put the "
            "images of each class in a folder of its own, or add a labels.csv with the columns file,label"
        )
    missing = [name for i, name in enumerate(dataset.classes) if i not in present]
    if missing:
        raise BadData(f"{shown}: classes without an image to train on: {join_names(missing)}")
