"""Images that lie in a place several times: copies of folders, and files that are in two splits.

Kaggle's archives hold a dataset inside itself (`chest_xray/chest_xray/`), or once more under a name of another case.
Such a copy would be another class, or count its images twice: it is left out, and said. A folder is a copy of another
where it holds the same names with the same sizes, and, of up to 16 that are compared, the same bytes. Splits and
classes beside each other are kept where they are the same, unless their names are those of copies (`cat - Copy`).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path

from onefold.data.dataset_info import SPLITS, LeftOut, SplitImages
from onefold.data.decode import printable_name
from onefold.data.folders import FolderListing, ImageFiles, join_names
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
    copies, same = find_copied_folders(images, files)
    notes = [f"{copy}/ and {original}/ hold the same files" for copy, original in same]
    left_out, kept = [], list(images)
    for copy, original in copies.items():
        inside = [image for image in kept if image.startswith(f"{copy}/")]
        kept = [image for image in kept if not image.startswith(f"{copy}/")]
        where = f"those in {original}/" if original else "those beside it"
        left_out.append(LeftOut(count=len(inside), what=f"images in {copy}/", reason=f"copies of {where}"))
    return kept, left_out, notes


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


def find_copied_folders(images: Sequence[str], files: Files) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Give the folders that are copies, each with what it is a copy of, and pairs that are the same but are kept."""
    below: dict[str, list[str]] = defaultdict(list)
    for image in images:
        for i, letter in enumerate(image):
            if letter == "/":
                below[image[:i]].append(image[i + 1 :])
    known = set(images)
    copies: dict[str, str] = {}

    def is_within(folder: str) -> bool:
        return any(folder.startswith(f"{copy}/") for copy in copies)

    folders = sorted(below, key=lambda folder: (folder.count("/"), len(folder), folder))  # copies have longer names
    for folder in folders:  # inside of what they are a copy of
        if not is_within(folder) and (outer := _copied_ancestor(files, folder, below[folder], known)) is not None:
            copies[folder] = outer
    groups: dict[tuple[int, frozenset[str]], list[str]] = defaultdict(list)
    for folder in folders:
        if folder not in copies and not is_within(folder):
            groups[len(below[folder]), frozenset(below[folder])].append(folder)
    same: list[tuple[str, str]] = []
    for those in groups.values():
        for first, other in _pairs(those, copies):
            if is_within(other) or is_within(first) or not _are_same(files, f"{first}/", f"{other}/", below[first]):
                continue
            if _may_be_left_out(first, other, below[first]):
                copies[other] = first
            elif not any(other.startswith(f"{b}/") for _, b in same):
                same.append((first, other))
    return copies, same


def _copied_ancestor(files: Files, folder: str, names: Sequence[str], images: Collection[str]) -> str | None:
    """Give the folder around this one that holds the same files outside of it; None where there is none."""
    parts = folder.split("/")
    for depth in range(len(parts)):
        prefix = "".join(f"{part}/" for part in parts[:depth])
        is_there = all((path := prefix + name) in images and not path.startswith(f"{folder}/") for name in names)
        if is_there and _are_same(files, prefix, f"{folder}/", names):
            return prefix.removesuffix("/")
    return None


def _pairs(folders: Sequence[str], copies: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Give pairs of folders with the same names, none inside the other, as long as neither is a copy."""
    for first, other in combinations(folders, 2):
        if first not in copies and other not in copies and not other.startswith(f"{first}/"):
            yield first, other


def _may_be_left_out(first: str, other: str, names: Sequence[str]) -> bool:
    """Whether the second of two folders with the same files is a copy, and no split and no class of its own."""
    splits = [[said for part in folder.split("/") if (said := parse_split_name(part))] for folder in (first, other)]
    if [(s.split, s.stem) for s in splits[0]] != [(s.split, s.stem) for s in splits[1]]:
        return False
    plain = [_COPY.sub("", folder.rpartition("/")[2]).casefold() for folder in (first, other)]
    holds_folders = any("/" in name for name in names)
    return plain[0] == plain[1] or holds_folders


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
