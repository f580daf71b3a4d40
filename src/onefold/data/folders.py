"""Images on disk: finding them, and the classes that folders give them.

Hidden files (a leading dot) and the droppings of archives and file servers are passed over; folders are read at any
depth, links are followed, and a folder that is reached twice is read once, so that a loop of links ends. An image is
known by its name's suffix; what is inside is `decode`'s business, and so are pipes, devices and links to nothing.
Names are relative to the folder, with "/", in the order of their code points; bytes that are not UTF-8 are kept.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from onefold.data.crop import Cut, Window
from onefold.data.decode import SUFFIXES, decode, decode_crop, printable
from onefold.errors import BadData

_DROPPINGS = frozenset(("__MACOSX", "@eaDir", "lost+found"))


@dataclass(frozen=True)
class Files:
    """Labelled images in one folder; `names` are relative to `root`. A Source."""

    root: Path
    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def label(self, i: int) -> int:
        """The class index of image i."""
        return self.labels[i]

    def name(self, i: int) -> str:
        """The name of image i, relative to the folder."""
        return self.names[i]

    def image(self, i: int, *, at_least: int = 0) -> Image.Image:
        """Image i as `decode` gives it; BadData where it cannot."""
        return decode(self.root / self.names[i], at_least=at_least)

    def crop(self, i: int, window: Window) -> Cut:
        """A part of image i as `decode_crop` gives it; BadData where it cannot."""
        return decode_crop(os.path.join(self.root, self.names[i]), window)

    def num_bytes(self, i: int) -> int:
        """The size of the file of image i, or -1 where it cannot be seen."""
        try:
            return (self.root / self.names[i]).stat().st_size
        except OSError:
            return -1


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """Every image that `paths` (files and folders) name, folders read at any depth, each path once; for predicting.

    Raises BadData for a path that is not there and for a folder without images.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not os.path.isdir(path):
            if not os.path.lexists(path):
                raise BadData(f"{printable(path)} is not there: expected an image or a folder of images")
            found[path] = None
            continue
        names, others = walk(path)
        if not names:
            raise BadData(f"{printable(path)} holds no images{_instead(others)}")
        found.update(dict.fromkeys(path / name for name in names))
    return list(found)


def class_folders(folder: Path) -> Files:
    """The images of `folder`, whose subfolders are the classes, sorted by name.

    Raises BadData where there are no class folders, and where one of them holds no images.
    """
    classes = visible_folders(folder)
    if not classes:
        raise BadData(_no_classes(folder))
    names: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(classes):
        inside, strangers = walk(folder / name)
        others.update(strangers)
        names.extend(f"{name}/{image}" for image in inside)
        labels.extend([label] * len(inside))
        if not inside:
            empty.append(name)
    if not names:
        raise BadData(f"{printable(folder)} holds no images{_instead(others)}")
    if empty:
        raise BadData(f"class folders without images in {printable(folder)}: {listed(empty)}; fill or remove them")
    return Files(folder, names, labels, tuple(classes))


def visible_folders(folder: Path) -> list[str]:
    """The names of the subfolders of `folder`, hidden ones left out, sorted."""
    return sorted(name for name, is_folder in _entries(folder) if is_folder)


def walk(folder: Path) -> tuple[list[str], Counter[str]]:
    """The sorted names of the images under `folder`, and how many other files there are of each suffix."""
    images: list[str] = []
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        identity = _identity(folder / inner)
        if identity in seen:
            continue
        seen.add(identity)
        for name, is_folder in _entries(folder / inner):
            suffix = os.path.splitext(name)[1].lower()
            if is_folder:
                waiting.append(f"{inner}{name}/")
            elif suffix in SUFFIXES:
                images.append(inner + name)
            else:
                others[suffix or "unsuffixed"] += 1
    return sorted(images), others


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names and how many more there are, for a message."""
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what `folder` holds, sorted."""
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith(".") and e.name not in _DROPPINGS]
            return sorted((entry.name, _is_folder(entry)) for entry in visible)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _unreadable(folder: Path, error: OSError) -> BadData:
    return BadData(f"cannot read the folder {printable(folder)}: {error.strerror or error}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _instead(others: Counter[str]) -> str:
    if not others:
        return ": it has no files at all"
    kinds = ", ".join(f"{count} {printable(suffix)}" for suffix, count in others.most_common(3))
    return f": of files it has {kinds} (images are {' '.join(sorted(SUFFIXES))})"


def _no_classes(folder: Path) -> str:
    images, others = walk(folder)
    if not images:
        return f"{printable(folder)} holds no images{_instead(others)}"
    return (
        f"{printable(folder)} holds {len(images)} images and no class folders: put the images of each class "
        "in a folder of its own, or add a labels.csv with the columns file,label"
    )
