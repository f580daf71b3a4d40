"""Places of shards: a folder that holds them, or files and patterns of them, and what lies beside them.

Beside shards lie lists of classes, which name what the shards number (see class_names.py). Of a numbered set
(train-00000-of-00004.parquet) that is not whole it is said which files are not there.
"""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onefold.data.class_names import find_class_names
from onefold.data.dataset_info import LeftOut, PlaceImages, Split
from onefold.data.decode import printable_name
from onefold.data.folders import FolderListing, join_names, left_out_images
from onefold.data.remote_files import REMOTE_PREFIXES
from onefold.data.shard_patterns import expand_braces, expand_patterns, expand_split_patterns, find_shards, read_shards
from onefold.data.splits import parse_split_name
from onefold.errors import BadData

_COUNTED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)(?P<of>[-_.]of[-_.])(?P<count>\d+)(?P<rest>\.\w+)", re.IGNORECASE)
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)(?P<rest>\.\w+)")
_MAX_COUNT = 100_000


def read_shard_pattern(text: str) -> PlaceImages:
    """Read a file, URL or pattern of shards. Raises BadData where there is nothing, or it cannot be used."""
    shown = printable_name(text)
    left_out: list[LeftOut] = []
    if "{split}" in text:
        found = expand_split_patterns(text)
    else:
        paths = expand_patterns(text)
        if not paths:
            raise BadData(f"{shown} is not there: expected tar shards or Parquet files")
        found, left_out = find_shards(paths, is_chosen=True)
    if text.startswith(REMOTE_PREFIXES):
        return _read(found, text, left_out, None)
    place = Path(os.path.commonpath([os.path.dirname(os.path.abspath(p)) for paths in found.values() for p in paths]))
    paths = [path for those in found.values() for path in those]
    notes = _notes_of_pattern(text, paths)
    others: dict[str, list[str]] = defaultdict(list)
    for name in sorted(os.listdir(place)):
        others[os.path.splitext(name)[1].lower()].append(name)
    listing = FolderListing(images=[], others=others, hidden=0, outputs=[], empty=[])
    read = _read(found, text, left_out, (place, listing))
    return replace(read, notes=(*notes, *read.notes[len(_notes_of_missing_shards(paths)) if notes else 0 :]))


def _notes_of_pattern(text: str, paths: Sequence[str]) -> list[str]:
    """Say which files that braces name are not there: what {split} stands for is looked for, not named."""
    named = [] if "{split}" in text else expand_braces(text)
    missing = [name for name in named if name not in {*paths} and not glob.has_magic(name)]
    if not missing or glob.has_magic(named[0]):
        return []
    names = [name.rpartition("/")[2] for name in missing]
    are = "is" if len(missing) == 1 else "are"
    return [f"{len(missing)} of {len(named)} shards {are} not there: {join_names(names, 3)}"]


def read_shard_folder(place: Path, listing: FolderListing, names: Sequence[str]) -> PlaceImages:
    """Read the shards that lie least deep, in one folder or in split folders beside each other."""
    depth = min(name.count("/") for name in names)
    used = [name for name in names if name.count("/") == depth]
    folders = {"/".join(part for part in name.split("/")[:-1] if not parse_split_name(part)) for name in used}
    if len(folders) > 1:
        several = join_names([f"{folder}/" for folder in sorted(folders)])
        raise BadData(f"{printable_name(place)} holds shards in {several}: give the folder of one dataset")
    found, left_out = find_shards([str(place / name) for name in used], is_chosen=False, below=place)
    if deeper := [name for name in names if name.count("/") > depth]:
        reason = "deeper than the shards that are read"
        left_out.append(LeftOut(count=len(deeper), what="shards", reason=reason, examples=tuple(deeper[:3])))
    left_out += left_out_images(listing.images, {}, "beside shards")
    return _read(found, os.fspath(place), left_out, (place, listing), {*names})


def _read(
    found: Mapping[Split | None, Sequence[str]],
    text: str,
    left_out: Sequence[LeftOut],
    around: tuple[Path, FolderListing] | None,
    listed: Collection[str] | None = None,
) -> PlaceImages:
    """Read shards, with the names of classes that lie `around` them; `listed` are those of a folder that is given."""
    said: list[str] = []
    lists: list[str] = []

    def find_names(numbers: Collection[str]) -> Mapping[str, str]:
        if around is None:
            return {}
        names, paths = find_class_names(*around, numbers, (), said)
        lists.extend(paths)
        return names

    splits, more, notes = read_shards(found, printable_name(text), find_names)
    paths = [path for those in found.values() for path in those]
    kind = "Parquet files" if any(path.endswith(".parquet") for path in paths) else "tar shards"
    beside = around[1].left_out({*listed, *lists}) if around and listed is not None else []
    return PlaceImages(
        container=kind,
        splits=tuple(splits),
        left_out=(*more, *left_out, *beside),
        notes=(*_notes_of_missing_shards(paths), *notes, *said),
    )


def _notes_of_missing_shards(paths: Sequence[str]) -> list[str]:
    """Say which files of numbered sets are not there: 00001 of train-00000-of-00002.parquet, 1 of train-{0,2}.tar."""
    there: dict[tuple[str, str, str, str], set[str]] = defaultdict(set)
    for path in paths:
        if path.startswith(REMOTE_PREFIXES):
            continue
        if match := _COUNTED.fullmatch(path) or _NUMBERED.fullmatch(path):
            of, count = (match["of"], match["count"]) if match.re is _COUNTED else ("", "")
            there[match["stem"], of, count, match["rest"]].add(match["number"])
    notes = []
    for (stem, of, count, rest), written in there.items():
        numbers, width = {*map(int, written)}, len(min(written, key=len))
        first = 1 if count and int(count) in numbers else 0 if count else min(numbers)
        last = first + int(count) if count else max(numbers) + 1
        if last - first > _MAX_COUNT:  # keys and times, not counts
            continue
        absent = [f"{stem}{i:0{width}d}{of}{count}{rest}" for i in range(first, last) if i not in numbers]
        if absent and (count or 2 * len(absent) < last - first):  # numbers such as years are of no set
            missing = [path for path in absent if not os.path.exists(path)]  # what was not chosen is there
            names = [path.rpartition("/")[2] for path in missing]
            are = "is" if len(missing) == 1 else "are"
            said = f"{len(missing)} of {last - first} shards {are} not there: {join_names(names, 3)}"
            notes += [said] if missing else []
    return notes
