"""Images in tar shards and Parquet files, read in place: which files a place names, and of which split they are.

| place | split |
|---|---|
| one .tar or .parquet file; a pattern (train-*.tar); braces (train-{000..009}.tar), also as a URL | by seed |
| any of these with {split} in it, which becomes each word for a split; on the web train and val | as they are |
| a folder that holds them, with words for splits in their names, or in those of their folders | as they are |
| a folder that holds them under other names | as folders, samples or a column inside say, else by seed |

How classes and splits are found inside is said in tars.py, parquet.py and shard_classes.py.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Crop, CropBox
from onefold.data.dataset_info import SPLITS, LeftOut, Split, SplitImages
from onefold.data.decode import decode_crop, decode_image, printable_name, read_samples
from onefold.data.folders import join_names
from onefold.data.parquet import ParquetImages
from onefold.data.preprocessing import ValueRange
from onefold.data.remote_files import REMOTE_PREFIXES, LocalFile, digest_bytes, open_blob
from onefold.data.repeated_images import find_copied_files
from onefold.data.shard_classes import FindNames, forget_missing_words_, group_images, name_classes
from onefold.data.splits import SPLIT_WORDS, SplitName, parse_split_name, resolve_ambiguous_split
from onefold.data.table_columns import (
    read_split_column,
    split_word,
)
from onefold.data.tars import TarImages, left_out_members, read_tar_index, tars_by_split
from onefold.errors import BadData

SHARD_SUFFIXES = (".tar", ".parquet")
"""Of files that hold many images each."""

_MAX_SHARDS = 100_000


@dataclass(frozen=True, eq=False)
class ShardedImages:
    """Labelled images in files that hold many of them each. A Dataset."""

    files: Sequence[TarImages | ParquetImages]
    labels: Sequence[int]
    classes: tuple[str, ...]
    starts: NDArray[np.int64]  # the number of each file's first image

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        """Give the class index of image i."""
        return self.labels[i]

    def name(self, i: int) -> str:
        """Give the name of image i within its file."""
        file, row = self._locate(i)
        return file.name(row)

    def image(self, i: int, *, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
        """Decode image i; see `decode_image`."""
        file, row = self._locate(i)
        return decode_image(file.read(row), name=file.name(row), min_side=min_side, value_range=value_range)

    def raw_samples(self, i: int) -> NDArray[Any] | None:
        """Read the samples of image i where they have more than 8 bits; see `read_samples`."""
        file, row = self._locate(i)
        return read_samples(file.read(row), name=file.name(row))

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Decode a crop of image i; see `decode_crop`."""
        file, row = self._locate(i)
        return decode_crop(file.read(row), crop_box, name=file.name(row))

    def num_bytes(self, i: int) -> int:
        """Give the stored size of image i, or -1 where it is not known without reading it."""
        file, row = self._locate(i)
        return file.num_bytes(row)

    def digest(self, i: int) -> str:
        """Give a digest of image i, "" where it cannot be read; behind a network, of its tar's identity and name."""
        file, row = self._locate(i)
        if isinstance(file, TarImages) and not isinstance(file.blob, LocalFile):
            return hashlib.sha256(f"{file.blob.identity} {file.name(row)}".encode()).hexdigest()
        try:
            data = file.read(row)
        except BadData:
            return ""
        return digest_bytes(lambda start, count: data[start : start + count], len(data))

    def _locate(self, i: int) -> tuple[TarImages | ParquetImages, int]:
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.files[number], i - int(self.starts[number])


# -------------------------------------------------------------------------------------- finding shards

_Shards = dict[Split | None, list[str]]
"""The files of each split; under None those whose names say none."""


def expand_split_patterns(text: str) -> _Shards:
    """Expand a pattern with {split} in it, for which each word for a split may stand."""
    found: _Shards = {}
    for split in SPLITS:
        words = [word for word, said in SPLIT_WORDS.items() if said == split]
        for word in (form(word) for word in words for form in (str.lower, str.capitalize, str.upper)):
            # What is on the web or in an object store is not listed, so there it is train and val.
            if text.startswith(REMOTE_PREFIXES) and word not in ("train", "val"):
                continue
            if split not in found and (paths := expand_patterns(text.replace("{split}", word))):
                found[split] = paths
    if "val" not in found and "test" not in found:
        raise BadData(f"{printable_name(text)}: there is nothing where {{split}} is val, test or another word for them")
    return found


def find_shards(paths: Sequence[str], *, is_chosen: bool, below: Path | None = None) -> tuple[_Shards, list[LeftOut]]:
    """Divide shards into splits by their names, or else by the folders that they lie in `below` a place.

    Where some names say a split, the others are left out, and said. Shards that the user has chosen by a pattern and
    that are all of one split are of none: they are what is there to train on, or to evaluate on.
    """
    found: dict[Split | None, list[str]] = defaultdict(list)
    words: dict[str, SplitName] = {}
    for path in paths:
        parts = Path(path).relative_to(below).parts if below else (path.rpartition("/")[2],)
        said = next(filter(None, (parse_split_name(part.rpartition(".")[0] or part) for part in reversed(parts))), None)
        if said:
            words[path] = said
    strong = any(said.split == "val" and not said.is_ambiguous for said in words.values())
    for path in paths:
        found[None if path not in words else resolve_ambiguous_split(words[path], strong)].append(path)
    if len(found) == 1 and is_chosen:
        return {None: list(paths)}, []
    left_out = []
    if len(found) > 1 and (unnamed := found.pop(None, [])):
        names = tuple(path.rpartition("/")[2] for path in unnamed)
        left_out = [LeftOut(count=len(names), what="shards", reason="their names say no split", examples=names[:3])]
    return dict(found), left_out


def expand_braces(text: str) -> list[str]:
    """Expand numbers in braces, as in train-{000..009}.tar."""
    names, braces = [text], re.compile(r"\{(\d+)\.\.(\d+)\}")
    while match := braces.search(names[0]):
        first, last = match.groups()
        if int(last) - int(first) >= _MAX_SHARDS:
            raise BadData(f"{printable_name(text)} stands for more than {_MAX_SHARDS} files")
        numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
        names = [braces.sub(number, name, count=1) for name in names for number in numbers]
    return names


def expand_patterns(text: str) -> list[str]:
    """Expand braces and patterns; of files on this disk only those that are there."""
    names = expand_braces(text)
    if text.startswith(REMOTE_PREFIXES):
        return names
    return [
        path
        for name in names
        for path in sorted(glob.glob(name) if glob.has_magic(name) else [name])
        if os.path.exists(path)
    ]


# ------------------------------------------------------------------------------------ splits and classes


def read_shards(
    shards: Mapping[Split | None, Sequence[str]], shown: str, find_names: FindNames
) -> tuple[list[SplitImages], list[LeftOut], list[str]]:
    """Read the images of shards, by split; gives also what is left out, and notes.

    `find_names` gives the names of numbered classes, where a file beside the shards has some.

    Raises BadData where they cannot be read, or where no image has a class.
    """
    places = [place for paths in shards.values() for place in paths]
    parquet = [place for place in places if place.endswith(".parquet")]
    if parquet and len(parquet) < len(places):
        raise BadData(f"there are tars and Parquet files side by side: {join_names(places)}; give one kind")
    shown_parts = 1 if len({place.rpartition("/")[0] for place in places}) == 1 else 2  # the name, or its folder too
    left_out: list[LeftOut] = []
    notes: list[str] = []
    files: dict[Split | None, list[TarImages | ParquetImages]] = defaultdict(list)
    sources: dict[Split | None, str] = {}
    for split, paths in shards.items():
        copies = find_copied_files(paths)
        for copy, original in copies.items():
            name, reason = copy.rpartition("/")[2], f"a copy of {original.rpartition('/')[2]}"
            left_out.append(LeftOut(count=1, what="shard", reason=reason, examples=(name,)))
        paths = [path for path in paths if path not in copies]
        sources[split] = join_names(["/".join(path.split("/")[-shown_parts:]) for path in paths], 3)
        if parquet:
            opened = [ParquetImages(Path(place)) for place in paths]
            for inner, parts in _parquet_by_split(opened, split, shown, left_out, notes).items():
                files[inner] += parts
            notes += [note for file in opened for note in file.notes]
            notes += [f"{printable_name(file.path.name)} has no rows" for file in opened if not len(file)]
        else:
            blobs = [open_blob(place) for place in paths]
            indexes = [read_tar_index(blob) for blob in blobs]
            for inner, tars in tars_by_split(blobs, indexes, split, shown, left_out, notes).items():
                files[inner] += tars
            left_out += left_out_members([index.others for index in indexes])
            pairs = zip(blobs, indexes, strict=True)
            notes += [f"{printable_name(blob.name)} holds no images" for blob, index in pairs if not index.members]
    notes += _notes_of_copies(shards)
    if parquet:
        forget_missing_words_([file for those in files.values() for file in those])
    labels = {split: [label for file in those for label in file.labels] for split, those in files.items()}
    is_labelled = any(label is not None for split in labels if split != "test" for label in labels[split])
    for split, those in labels.items():
        unlabelled = those.count(None)
        if not unlabelled or not (is_labelled or split == "test"):
            continue
        what = f"images of {split}" if split else "images"
        reason = "no labels to score by" if split == "test" else "no class (-1 or nothing)"
        left_out.append(LeftOut(count=unlabelled, what=what, reason=reason))
        files[split] = [
            file.select([i for i, label in enumerate(file.labels) if label is not None]) for file in files[split]
        ]
        labels[split] = [label for label in those if label is not None]
    labels = {split: those for split, those in labels.items() if those}
    if not labels:
        raise BadData(f"{shown}: no image has a class to train on or to score by")
    named, orders = name_classes({split: files[split] for split in labels}, shown, find_names, notes)
    column, groups = group_images({split: files[split] for split in labels}, named)
    return (
        [
            SplitImages(
                split=split,
                source=sources.get(split) or f"{join_names(list(sources.values()), 3)} ({split} inside)",
                labels=named[split],
                numbered=orders[split],
                open=partial(_sharded_images, files[split]),
                groups=groups.get(split),
                group_column=column,
                photo_names=_photo_names(files[split]),
            )
            for split in labels
        ],
        left_out,
        notes,
    )


def _parquet_by_split(
    files: Sequence[ParquetImages], split: Split | None, shown: str, left_out: list[LeftOut], notes: list[str]
) -> dict[Split | None, list[ParquetImages]]:
    """Divide the images of Parquet files: of `split` all, without one as their column says that tells the split."""
    for file in files if split else ():
        said = {parse_split_name(split_word(file.split_column or "", value)) for value in {*file.split_values}}
        inside = {each.split for each in said if each} if None not in said else set()
        if inside - {split} if split == "train" else "train" in inside:
            which = f"{printable_name(file.path.name)} is {split} by its name, and its column {file.split_column}"
            what = f"says {' and '.join(sorted(inside))}"
            raise BadData(f"{shown}: {which} {what}: rename it, or give it by itself for what the column says")
    columns = {file.split_column for file in files}
    if split is None and None in columns and len(columns) > 1:
        some, none = (next(f for f in files if bool(f.split_column) is has) for has in (True, False))
        which = f"{printable_name(some.path.name)} has the column {some.split_column}"
        raise BadData(
            f"{shown}: {which}, and {printable_name(none.path.name)} has none: write it into all, or into none"
        )
    splits: Sequence[Split | None] | None = None
    if split is None and len(columns) == 1 and (column := columns.pop()):  # of all files, since each may have one value
        splits = read_split_column(column, [value for file in files for value in file.split_values], shown, notes)
    found: dict[Split | None, list[ParquetImages]] = defaultdict(list)
    start = 0
    for file in files:
        rows: dict[Split | None, list[int]] = defaultdict(list)
        for row in range(len(file)):
            rows[splits[start + row] if splits else split].append(row)
        if splits and (without := rows.pop(None, [])):
            reason = f"no split in {file.split_column}"
            left_out.append(LeftOut(count=len(without), what=f"images of {printable_name(file.path)}", reason=reason))
        for inner, those in rows.items():
            found[inner].append(file.select(those))
        start += len(file)
    return found


def _notes_of_copies(shards: Mapping[Split | None, Sequence[str]]) -> list[str]:
    """Say which shards of one split are copies of another split's."""
    split_of = {path: split for split, paths in shards.items() for path in paths}
    copies = find_copied_files([*split_of]) if len(shards) > 1 else {}
    pairs = [sorted(pair, key=lambda path: SPLITS.index(split_of[path] or "train")) for pair in copies.items()]
    return [
        f"{' and '.join(printable_name('/'.join(path.split('/')[-2:])) for path in (first, other))} have the same "
        f"bytes: the images of {split_of[other]} are in {split_of[first]} too, and the score flatters"
        for first, other in pairs
        if split_of[first] != split_of[other]
    ]


def _photo_names(files: Sequence[TarImages | ParquetImages]) -> list[str] | None:
    """Give what the photos were called, where that tells them apart."""
    names = [file.called(i) for file in files for i in range(len(file))]
    return names if len({*names}) == len(names) else None


def _sharded_images(
    files: Sequence[TarImages | ParquetImages], labels: Sequence[int], classes: tuple[str, ...]
) -> ShardedImages:
    starts = np.array([0, *accumulate(len(file) for file in files)][:-1], np.int64)
    return ShardedImages(files=files, labels=labels, classes=classes, starts=starts)
