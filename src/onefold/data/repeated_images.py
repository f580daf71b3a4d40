"""Images that lie in a place several times: copies of folders, and files that are in two splits.

Kaggle's archives hold a dataset inside itself (`chest_xray/chest_xray/`), or once more under a name of another case.
Such a copy would be another class, or count its images twice: it is left out, and said. A folder is a copy of another
where it holds the same names with the same sizes, and, of up to 16 that are compared, the same bytes. Splits and
classes beside each other are kept where they are the same, unless their names are those of copies (`cat - Copy`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path

from onefold.data.dataset_info import SPLITS, LeftOut, SplitImages
from onefold.data.decode import printable_name
from onefold.data.folders import FolderListing, ImageFiles, check_depth, join_names
from onefold.data.splits import parse_split_name
from onefold.errors import BadData

_NUM_READ = 16  # files of a copy, or parts of a file, whose bytes are compared
_SAMPLE_BYTES = 1 << 16
_COPY = re.compile(r"[\W_]*(copy|kopie|copie|copia|\u526f\u672c)[\W_]*(of|de)?[\W_]*|\s*\(\d+\)\s*|\W+", re.IGNORECASE)


@dataclass(frozen=True)
class Files:
    """How files are compared: by the size of each, and by the bytes of some."""

    size: Callable[[str], int]
    read: Callable[[str], bytes]


def without_copies(place: Path, listing: FolderListing) -> tuple[FolderListing, list[LeftOut], list[str]]:
    """Give a listing without the images of folders that are copies of others, what is left out, and notes."""
    files = Files(lambda name: os.stat(place / name).st_size, lambda name: (place / name).read_bytes())
    kept, left_out, notes = leave_out_copies(listing.images, files)
    return (replace(listing, images=kept) if left_out else listing), left_out, notes


def leave_out_copies(images: Sequence[str], files: Files) -> tuple[list[str], list[LeftOut], list[str]]:
    """Give the images that are in no copy of a folder, what is left out, and notes on folders that are the same."""
    for image in images:
        check_depth(image)
    copies, same = find_copied_folders(images, files)
    notes = [
        f"{join_names([f'{other}/' for other in others], 3)} and {first}/ hold the same files" for first, others in same
    ]
    owners = [next((folder for folder in _folders_around(image) if folder in copies), None) for image in images]
    counts = Counter(owner for owner in owners if owner is not None)
    left_out = [
        LeftOut(
            count=counts[copy],
            what=f"images in {copy}/",
            reason=f"copies of {f'those in {original}/' if original else 'those beside it'}",
        )
        for copy, original in copies.items()
    ]
    return [image for image, owner in zip(images, owners, strict=True) if owner is None], left_out, notes


def find_copied_files(paths: Sequence[str]) -> dict[str, str]:
    """Give the files on this disk, shards, that are copies of others, each with what it is a copy of."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        if os.path.isfile(path):
            by_size[os.path.getsize(path)].append(path)
    copies: dict[str, str] = {}
    for size, those in by_size.items():
        for first, other in combinations(sorted(those, key=lambda path: (len(path), path)), 2):
            if size and first not in copies and other not in copies and _sample(first, size) == _sample(other, size):
                copies[other] = first
    return copies


def _sample(path: str, size: int) -> bytes:
    """Read some bytes of a file: its beginning and end, and parts between, evenly."""
    with open(path, "rb") as file:
        parts = []
        for k in range(_NUM_READ + 1):
            file.seek(max(0, k * (size - _SAMPLE_BYTES) // _NUM_READ))
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)


def find_copied_folders(images: Sequence[str], files: Files) -> tuple[dict[str, str], list[tuple[str, list[str]]]]:
    """Give the folders that are copies, each with what it is a copy of; and those kept that are the same as another.

    Folders are compared by what stands for each of them (names, sizes, bytes), not in pairs: there may be thousands.
    """
    below: dict[str, list[str]] = defaultdict(list)
    for image in images:
        for folder in _folders_around(image):
            below[folder].append(image[len(folder) + 1 :])
    known = set(images)
    copies: dict[str, str] = {}

    def is_within_copy(folder: str) -> bool:
        return any(outer in copies for outer in _folders_around(folder))

    folders = sorted(below, key=lambda folder: (folder.count("/"), len(folder), folder))  # copies have longer names
    for folder in folders:  # inside of what they are a copy of
        if not is_within_copy(folder) and (outer := _copied_ancestor(files, folder, below[folder], known)) is not None:
            copies[folder] = outer
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for folder in folders:
        if folder not in copies and not is_within_copy(folder):
            groups[tuple(sorted(below[folder]))].append(folder)
    same: list[tuple[str, list[str]]] = []
    noted: set[str] = set()
    for names, those in groups.items():
        for equal in _equal_folders(files, those, names):
            originals: dict[object, str] = {}
            kept = []
            for folder in equal:
                if is_within_copy(folder):  # of an outer folder, found before
                    continue
                original = originals.setdefault(_copy_key(folder, names), folder)
                if original != folder:
                    copies[folder] = original
                elif not any(outer in noted for outer in _folders_around(folder)):
                    kept.append(folder)
            if len(kept) > 1:
                same.append((kept[0], kept[1:]))
                noted.update(kept[1:])
    return copies, same


def _folders_around(path: str) -> Iterator[str]:
    """Give the folders that a path is in, the outermost first."""
    return (path[:i] for i, letter in enumerate(path) if letter == "/")


def _equal_folders(files: Files, folders: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Group folders of the same names by the sizes of their files, then by the bytes of one, then by those of some."""
    step = max(1, len(names) // _NUM_READ)

    def sizes(folder: str) -> object:
        return tuple(files.size(f"{folder}/{name}") for name in names)

    def content(folder: str, some: Sequence[str]) -> object:
        return [hashlib.sha256(files.read(f"{folder}/{name}")).digest() for name in some]

    groups = [list(folders)]
    for of in (sizes, lambda folder: content(folder, names[:1]), lambda folder: content(folder, names[::step])):
        parted: dict[str, list[str]] = defaultdict(list)
        for number, group in enumerate(groups):
            for folder in group:
                try:
                    parted[f"{number} {of(folder)}"].append(folder)
                except (OSError, BadData):
                    continue  # what cannot be read is no copy
        groups = [group for group in parted.values() if len(group) > 1]
    return groups


def _copied_ancestor(files: Files, folder: str, names: Sequence[str], images: Collection[str]) -> str | None:
    """Give the folder around this one that holds the same files outside of it; None where there is none."""
    parts = folder.split("/")
    for depth in range(len(parts)):
        prefix = "".join(f"{part}/" for part in parts[:depth])
        is_there = all((path := prefix + name) in images and not path.startswith(f"{folder}/") for name in names)
        if is_there and _are_same(files, prefix, f"{folder}/", names):
            return prefix.removesuffix("/")
    return None


def _copy_key(folder: str, names: Sequence[str]) -> object:
    """Give what two folders with the same files share if one is a copy, and neither a split nor a class of its own."""
    splits = [(said.split, said.stem) for part in folder.split("/") if (said := parse_split_name(part))]
    holds_folders = any("/" in name for name in names)
    return str(splits), holds_folders or _COPY.sub("", folder.rpartition("/")[2]).casefold()


def _are_same(files: Files, first: str, other: str, names: Sequence[str]) -> bool:
    """Whether files have the same sizes below two folders, and some of them the same bytes."""
    try:
        if any(files.size(first + name) != files.size(other + name) for name in names):
            return False
        step = max(1, len(names) // _NUM_READ)
        return all(files.read(first + name) == files.read(other + name) for name in names[::step])
    except (OSError, BadData):
        return False


def notes_of_repeated(parts: Sequence[tuple[SplitImages, object]]) -> list[str]:
    """Say which files are in two splits, and of how many the two say different classes."""

    @cache
    def real(folder: str) -> str:
        return os.path.realpath(folder)

    found = []
    for part, dataset in parts:
        if isinstance(dataset, ImageFiles):
            paths = (os.path.split(os.path.join(dataset.root, name)) for name in dataset.names)
            found.append(
                (part, dict(zip((f"{real(folder)}/{name}" for folder, name in paths), part.labels, strict=True)))
            )
    notes = []
    found.sort(key=lambda each: SPLITS.index(each[0].split or "train"))
    for (one, files), (other, others) in combinations(found, 2):
        if not (both := [path for path in others if path in files]):
            continue
        shown = join_names([path.rpartition("/")[2] for path in both], 2)
        note = f"{len(both)} of the {len(others)} images of {other.source} are in {one.source} too ({shown})"
        if contradictions := [path for path in both if files[path] != others[path]]:
            path = contradictions[0]
            classes = f"{printable_name(files[path])} in {one.source}, {printable_name(others[path])} in {other.source}"
            note += f", {len(contradictions)} under another class ({path.rpartition('/')[2]}: {classes})"
        notes.append(note)
    return notes
