"""Images on disk: finding them, and the classes that folders give them.

Folders are read at any depth and links are followed; a folder that is reached twice is read once, so that a loop of
links ends. Hidden files (a leading dot) and the folders that archives and file servers leave behind are skipped. What
is an image is for `left_out_as` to say; what is inside, or whether it is a pipe or a broken link, is for `decode`.
Names are relative to the folder, with "/", in the order of their code points; bytes that are not UTF-8 are kept.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from onefold.data.crop import Crop, CropBox
from onefold.data.decode import (
    MASKS,
    SUFFIXES,
    decode,
    decode_crop,
    first_bytes,
    left_out_as,
    left_out_reason,
    masks_beside,
    printable,
)
from onefold.data.remote import LocalFile, digest_bytes
from onefold.errors import BadData

_LOG = logging.getLogger("onefold.data")
_SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "lost+found"))


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images in one folder; `names` are relative to `root`. A Dataset."""

    root: Path
    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def label(self, i: int) -> int:
        """Give the class index of image i."""
        return self.labels[i]

    def name(self, i: int) -> str:
        """Give the name of image i, relative to the folder."""
        return self.names[i]

    def image(self, i: int, *, min_side: int = 0) -> Image.Image:
        """Decode image i; see `decode`."""
        return decode(self.root / self.names[i], min_side=min_side)

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Decode a crop of image i; see `decode_crop`."""
        return decode_crop(os.path.join(self.root, self.names[i]), crop_box)

    def num_bytes(self, i: int) -> int:
        """Give the size of the file of image i, or -1 where it is gone."""
        try:
            return (self.root / self.names[i]).stat().st_size
        except OSError:
            return -1

    def digest(self, i: int) -> str:
        """Give a digest of the file of image i, or "" where it is gone, or no file."""
        file = LocalFile(self.root / self.names[i])
        try:  # a pipe would be waited for
            return digest_bytes(file.read, file.num_bytes) if file.path.is_file() else ""
        except BadData:
            return ""


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """List every image that `paths` (files and folders) name, folders read at any depth, each path once.

    Raises BadData for a path that is not there and for a folder without images.
    """
    images: dict[Path, None] = {}  # a set that keeps the order
    for path in map(Path, paths):
        if not os.path.isdir(path):
            if not os.path.lexists(path):
                raise BadData(f"{printable(path)} is not there: expected an image or a folder of images")
            images[path] = None
            continue
        names, others = walk_images(path)
        if not names:
            raise BadData(f"{printable(path)} holds no images{_other_files(others)}")
        images.update(dict.fromkeys(path / name for name in names))
        _say_left_out(path, others)
    return list(images)


def read_class_folders(folder: Path) -> ImageFiles:
    """List the images of `folder`, whose subfolders are the classes, sorted by name.

    Raises BadData where there are no class folders, and where one of them holds no images.
    """
    classes = subfolders(folder)
    if not classes:
        images, others = walk_images(folder)
        if not images:
            raise BadData(f"{printable(folder)} holds no images{_other_files(others)}")
        raise BadData(
            f"{printable(folder)} holds {len(images)} images and no class folders: put the images of each class "
            "in a folder of its own, or add a labels.csv with the columns file,label"
        )
    names: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    others = Counter()
    for label, name in enumerate(classes):
        images, other = walk_images(folder / name)
        others.update(other)
        names.extend(f"{name}/{image}" for image in images)
        labels.extend([label] * len(images))
        if not images:
            empty.append(name)
    if not names:
        raise BadData(f"{printable(folder)} holds no images{_other_files(others)}")
    _say_left_out(folder, others)
    if empty:
        raise BadData(f"class folders without images in {printable(folder)}: {join_names(empty)}; fill or remove them")
    return ImageFiles(folder, names, labels, tuple(classes))


def subfolders(folder: Path) -> list[str]:
    """List the names of the subfolders of `folder`, hidden ones left out, sorted."""
    return sorted(name for name, is_folder in _entries(folder) if is_folder)


def walk_images(folder: Path) -> tuple[list[str], Counter[str]]:
    """List the names of the images under `folder`, sorted, and count what is left out: see `left_out_as`."""
    images: list[str] = []
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        inner = pending.pop()
        try:
            status = (folder / inner).stat()
        except OSError as error:
            raise _unreadable(folder / inner, error) from error
        identity = status.st_dev, status.st_ino
        if identity in seen:
            continue
        seen.add(identity)
        for name, is_folder in _entries(folder / inner):
            if is_folder:
                pending.append(f"{inner}{name}/")
                continue
            kind = left_out_as(name, partial(first_bytes, os.path.join(folder, inner, name)))
            if kind is None:
                images.append(inner + name)
            else:
                others[kind] += 1
    masks = set(masks_beside(images))
    if masks:
        others[MASKS] = len(masks)
    return sorted(set(images) - masks), others


def join_names(names: Sequence[str], most: int = 5) -> str:
    """Join the first few names and say how many more there are, for a message."""
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """List (name, whether it is a folder) of what `folder` holds, sorted."""
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith(".") and e.name not in _SYSTEM_FOLDERS]
            return sorted((entry.name, _is_folder(entry)) for entry in visible)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _unreadable(folder: Path, error: OSError) -> BadData:
    return BadData(f"cannot read the folder {printable(folder)}: {error.strerror or error}")


def _say_left_out(folder: Path, others: Counter[str]) -> None:
    for kind, count in others.most_common():
        _LOG.warning("%s: left out %d %s: %s", printable(folder), count, printable(kind), left_out_reason(kind))


def _other_files(others: Counter[str]) -> str:
    """Say which files a folder without images holds."""
    if not others:
        return ": it has no files at all"
    kinds = [f"{count} {printable(kind)} ({left_out_reason(kind)})" for kind, count in others.most_common(3)]
    return f": of files it has {', '.join(kinds)} (images are {' '.join(sorted(SUFFIXES))})"
