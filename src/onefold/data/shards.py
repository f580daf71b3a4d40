"""Images in tar shards and Parquet files, read in place: what of them makes training and validation, which classes.

| what is given | |
|---|---|
| one .tar or .parquet file; a pattern (train-*.tar); braces (train-{000..009}.tar), also as a URL | by seed |
| any of these with {split} in it, which becomes train and val | as they are |
| a folder that holds them; names that start with train, and with val, validation or test | as they are |
| a folder that holds them under other names | by seed |
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Cut, Window
from onefold.data.decode import decode, decode_crop, printable
from onefold.data.folders import listed
from onefold.data.parquet import ParquetFile
from onefold.data.remote import STORES, Blob, open_blob
from onefold.data.tars import Member, members
from onefold.errors import BadData

SUFFIXES = (".tar", ".parquet")
HELD_OUT = ("val", "validation", "test")
_AFAR = ("http://", "https://", *STORES)
_MOST_SHARDS = 100_000


class TarFile:
    """The images of one tar."""

    def __init__(self, blob: Blob, found: Sequence[Member], prefix: str) -> None:
        self._blob, self._members = blob, found
        self._skipped = len(prefix)
        self.labels: list[int | str] = [self._class(member) for member in found]
        self.classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self._members)

    def name(self, i: int) -> str:
        """The image's name in the tar, without the folders that all share."""
        return self._members[i].name[self._skipped :]

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises BadData where they cannot be read."""
        return self._blob.read(self._members[i].offset, self._members[i].size)

    def member(self, i: int) -> Member:
        """Where image i lies in the tar."""
        return self._members[i]

    def num_bytes(self, i: int) -> int:
        """The size of image i."""
        return self._members[i].size

    def _class(self, member: Member) -> int | str:
        if member.label is not None:
            return member.label
        folder, slash, _ = member.name[self._skipped :].partition("/")
        if not slash:
            where = f"{self._blob.name}: {printable(member.name)}"
            raise BadData(f"{where} is in no class folder and has no .cls or .json beside it")
        return folder


@dataclass(frozen=True, eq=False)
class Packed:
    """Labelled images in files that hold many of them each. A Source."""

    files: Sequence[TarFile | ParquetFile]
    labels: Sequence[int]
    classes: tuple[str, ...]
    starts: NDArray[np.int64]  # the number of each file's first image

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        """The class index of image i."""
        return self.labels[i]

    def name(self, i: int) -> str:
        """What image i is called within its file."""
        file, row = self._place(i)
        return file.name(row)

    def image(self, i: int, *, at_least: int = 0) -> Image.Image:
        """Image i as `decode` gives it; BadData where it cannot."""
        file, row = self._place(i)
        return decode(file.read(row), name=file.name(row), at_least=at_least)

    def crop(self, i: int, window: Window) -> Cut:
        """A part of image i as `decode_crop` gives it; BadData where it cannot."""
        file, row = self._place(i)
        return decode_crop(file.read(row), window, name=file.name(row))

    def num_bytes(self, i: int) -> int:
        """The stored size of image i, or -1 where it is not known without reading it."""
        file, row = self._place(i)
        return file.num_bytes(row)

    def _place(self, i: int) -> tuple[TarFile | ParquetFile, int]:
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.files[number], i - int(self.starts[number])


def places_of(spec: str | Path) -> dict[str, list[str]] | None:
    """The archives that `spec` names: {"train": ..., "val": ...}, or {"all": ...}; None where it names no archives."""
    text = os.fspath(spec)
    if "{split}" in text:
        sides = {"train": _expanded(text.replace("{split}", "train"))}
        for name in HELD_OUT:
            found = _expanded(text.replace("{split}", name), afar_counts=name == HELD_OUT[0])
            if found:
                return {**sides, "val": found}
        raise BadData(f"{printable(text)}: there is nothing where {{split}} is val, validation or test")
    if text.startswith(_AFAR) or (text.endswith(SUFFIXES) and not os.path.isdir(text)):
        found = _expanded(text)
        if not found:
            raise BadData(f"{printable(text)} is not there: expected tar shards or Parquet files")
        return {"all": found}
    return _in_folder(Path(text)) if os.path.isdir(text) else None


def open_packed(places: dict[str, list[str]], split: str) -> Packed:
    """The images of one side, with the classes of both. Raises BadData where the sides have different classes."""
    sides = {side: _opened(paths) for side, paths in places.items()}
    wanted = sides.get(split, sides.get("all"))
    if wanted is None:
        raise BadData(f"there are no archives to {'train' if split == 'train' else 'validate'} with")
    classes, number = _classes(sides)
    labels = [number[label] for file in wanted for label in file.labels]
    starts = np.array([0, *accumulate(len(file) for file in wanted)][:-1], np.int64)
    return Packed(files=wanted, labels=labels, classes=classes, starts=starts)


def _in_folder(folder: Path) -> dict[str, list[str]] | None:
    for inner in (folder, folder / "data"):
        try:
            names = sorted(name for name in os.listdir(inner) if name.endswith(SUFFIXES) and not name.startswith("."))
        except OSError:
            continue
        if names:
            break
    else:
        return None
    paths = {name: str(inner / name) for name in names}
    train = [path for name, path in paths.items() if name.startswith("train")]
    held = next(filter(None, ([p for n, p in paths.items() if n.startswith(side)] for side in HELD_OUT)), None)
    if train and held:
        return {"train": train, "val": held}
    return {"all": train or held or list(paths.values())}


def _expanded(text: str, afar_counts: bool = True) -> list[str]:
    """The places that a name with braces or a pattern stands for; on this disk those that are there."""
    names, span = [text], re.compile(r"\{(\d+)\.\.(\d+)\}")
    while match := span.search(names[0]):
        first, last = match.groups()
        if int(last) - int(first) >= _MOST_SHARDS:
            raise BadData(f"{printable(text)} stands for more than {_MOST_SHARDS} files")
        numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
        names = [span.sub(number, name, count=1) for name in names for number in numbers]
    if text.startswith(_AFAR):
        return names if afar_counts else []
    return [
        path
        for name in names
        for path in sorted(glob.glob(name) if glob.has_magic(name) else [name])
        if os.path.exists(path)
    ]


def _opened(places: Sequence[str]) -> list[TarFile | ParquetFile]:
    parquet = [place for place in places if place.endswith(".parquet")]
    if parquet and len(parquet) < len(places):
        raise BadData(f"there are tars and Parquet files side by side: {listed(list(places))}; give one kind")
    if parquet:
        return [ParquetFile(Path(place)) for place in places]
    blobs = [open_blob(place) for place in places]
    found = [members(blob) for blob in blobs]
    prefix = _shared_folders([member.name for inside in found for member in inside if member.label is None])
    return [TarFile(blob, inside, prefix) for blob, inside in zip(blobs, found, strict=True)]


def _shared_folders(names: Sequence[str]) -> str:
    """The folders that all names start with, as "a/b/"; at least one folder of each name, its class, is left."""
    if not names:
        return ""
    depth = min(name.count("/") for name in names) - 1
    both = zip(min(names).split("/")[: max(0, depth)], max(names).split("/"), strict=False)
    return "".join(f"{a}/" for a, _ in takewhile(lambda pair: pair[0] == pair[1], both))


def _classes(
    sides: dict[str, list[TarFile | ParquetFile]],
) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """The names of the classes, and the number of each label that occurs."""
    seen = {side: {label for file in files for label in file.labels} for side, files in sides.items()}
    union = set().union(*seen.values())
    numbers, names = {x for x in union if isinstance(x, int)}, {x for x in union if isinstance(x, str)}
    if numbers and names:
        raise BadData(f"some classes are numbers ({min(numbers)}), others names ({printable(min(names))}): use one")
    if names:
        for side, labels in seen.items():
            if missing := sorted(names - {x for x in labels if isinstance(x, str)}):
                raise BadData(f"the classes differ; none in {side} of: {listed(missing)}")
        classes = tuple(sorted(names))
        return classes, {name: i for i, name in enumerate(classes)}
    told = next((file.classes for files in sides.values() for file in files if file.classes), None)
    least = max(numbers) + 1 if numbers else 0
    if min(numbers, default=0) < 0 or least > 1_000_000 or (told is not None and len(told) < least):
        most = len(told or ()) or 1_000_000
        raise BadData(f"the classes are numbered {min(numbers)} to {max(numbers)}: expected 0 to {most - 1}")
    classes = told or tuple(str(i) for i in range(least))
    return classes, {i: i for i in numbers}
