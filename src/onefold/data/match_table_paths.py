"""Finding the images that a table lists: by their paths, the ends of them, names without a suffix, and numbers.

A cell names an image by its path relative to the table, by the end of its path in any folder, or so without its suffix;
else a whole number names the image that is called by that number in any form (1 and 1.0 are 0001.jpg). Of several
images those count whose folders are most like the cell's, then those of the split that the table's name says.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from onefold.data.decode import SUFFIXES, printable_name
from onefold.data.folders import join_names
from onefold.data.splits import parse_split_name, split_into_words, splits_by_folder_name
from onefold.data.table_columns import normalize_number
from onefold.errors import BadData
from onefold.file_io import normalize_name

_CONVERTED = (".dcm", ".dicom", ".heic", ".heif", ".nef", ".cr2", ".dng", ".arw", ".svg", ".psd")  # to images
_FOREIGN = re.compile(r"/|\\\\|[A-Za-z]:[\\/]|(?P<scheme>[a-z][a-z0-9+.-]+://)")  # how absolute paths and URLs begin

_SIDES = frozenset(("a", "b", "left", "right", "l", "r", "first", "second", "one", "two", "query", "reference"))
_NUM_TRIED = 100  # rows that show whether another column names images


class OtherImagesError(BadData):
    """A table of images that are all not there."""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _join(folder: str, name: str) -> str:
    """Join a folder and a name below it, without "." and ".." between."""
    if "/" in name:
        return os.path.normpath(os.path.join(folder, name))
    return f"{folder}/{name}" if folder and name not in ("", ".", "..") else name


def _are_called_as_pair(one: str, other: str) -> bool:
    """Whether columns are called alike but for a number, a letter or a side: img1 and img2, left and right."""
    words = [split_into_words(name) for name in (one, other)]
    sides = [[word for word in those if word in _SIDES or word.isdecimal()] for those in words]
    rest = [[word for word in those if word not in side] for those, side in zip(words, sides, strict=True)]
    return rest[0] == rest[1] and sides[0] != sides[1] and any(sides)


class ImageIndex:
    """The images of a place, found by what a table calls them."""

    def __init__(self, place: Path, images: Iterable[str]) -> None:
        self._place = place
        self._paths = {normalize_name(path): path for path in images}
        self._files: dict[str, set[str]] = {}
        self._known: dict[tuple[str, str], list[str]] = {}  # what cells mean: each is asked for several times

    def __len__(self) -> int:
        return len(self._paths)

    def _is_file(self, path: str) -> bool:
        """Whether there is a file at a path below the place, an image or not; each folder is listed once."""
        folder, _, name = path.rpartition("/")
        if folder not in self._files:
            try:
                with os.scandir(self._place / folder) as entries:
                    self._files[folder] = {entry.name for entry in entries if not _is_folder(entry)}
            except (OSError, ValueError):  # ValueError: a null byte, as lists in a cell have between their values
                self._files[folder] = set()
        return name in self._files[folder]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Give the images with a file's name, with its name without the suffix, and with either in lower case."""
        found: dict[str, list[str]] = defaultdict(list)
        for path in self._paths:
            name = path.rpartition("/")[2]
            stem = os.path.splitext(name)[0]
            for key in dict.fromkeys((name, stem, "\0" + name.casefold(), "\0" + stem.casefold())):
                found[key].append(path)
        return found

    @cached_property
    def _by_number(self) -> dict[int, list[str]]:
        """Give the images whose names are integers but for the suffix."""
        found: dict[int, list[str]] = defaultdict(list)
        for path in self._paths:
            stem = os.path.splitext(path.rpartition("/")[2])[0]
            if (number := normalize_number(stem)) is not None:
                found[int(number)].append(path)
        return found

    def num_matches(self, table: str, cells: Sequence[str]) -> int:
        """Count the cells that name an image."""
        return sum(bool(cell) and bool(self.find(table, cell)) for cell in cells)

    def find(self, table: str, cell: str) -> list[str]:
        """Give the images that a cell of a table may mean: by its path, or else by its number (1, 1.0 for 0001.jpg)."""
        found = self._candidates(table, cell) if cell else []
        number = normalize_number(cell)
        return found or ([] if number is None else [self._paths[path] for path in self._by_number.get(int(number), ())])

    def find_all(
        self,
        table: str,
        cells: Sequence[str],
        lines: Sequence[int],
        shown: str,
        notes: list[str],
        splits: Sequence[str | None] = (),
    ) -> list[str]:
        """Give the image of each cell, relative to the place; "" where it is not there, with a note.

        Of images of one name in train/ and test/ the split of its line tells which.

        Raises BadData where a cell may be two images, and where no more than half of the images are there: then the
        place is probably another than that of the table.
        """
        found, missing, by_number = [], [], []
        for i, (line, cell) in enumerate(zip(lines, cells, strict=True)):
            if not cell:
                raise BadData(f"{shown}, line {line}: expected a file and its class")
            candidates = self.find(table, cell)
            if candidates and normalize_number(cell) is not None and not self._candidates(table, cell):
                by_number.append(f"{cell} is {candidates[0]}")
            if len(candidates) > 1 and splits:
                said = splits_by_folder_name(candidates) or ()
                of_split = [path for path, split in zip(candidates, said, strict=False) if split == splits[i]]
                candidates = of_split if len(of_split) == 1 else candidates
            if len(candidates) > 1:
                raise BadData(
                    f"{shown}, line {line}: {printable_name(cell)} may be {join_names(candidates, 3)}: write the "
                    "folder too"
                )
            found.append(candidates[0] if candidates else "")
            missing += [] if candidates else [cell]
        if 2 * len(missing) >= max(len(cells), 1) and missing:
            kind = BadData if any(found) else OtherImagesError
            raise kind(f"{shown} lists {len(missing)} files that are not there: {join_names(missing)}")
        if by_number:
            notes.append(f"{shown}: {len(by_number)} images are found by their numbers: {join_names(by_number, 2)}")
        if missing:
            notes.append(
                f"{shown}: {len(missing)} of the {len(cells)} files that it lists are not there, and not used: "
                f"{join_names(missing, 3)}"
            )
        return found

    def check_other_columns(
        self, table: str, column: str, others: Mapping[str, Sequence[str]], cells: Sequence[str], notes: list[str]
    ) -> None:
        """Say which other columns name images, too: other ones than the column that counts does.

        Raises BadData where the two are called as a pair: img1 and img2, left and right.
        """
        for name, values in others.items():
            is_pair = _are_called_as_pair(column, name)
            both = [*zip(cells[:_NUM_TRIED], values[:_NUM_TRIED], strict=True)]
            named = [(a, b) for a, b in both if b and a != b and (is_pair or normalize_number(b) is None)]
            num_images = sum(bool(found := self.find(table, b)) and found != self.find(table, a) for a, b in named)
            if 2 * num_images <= len(both):
                continue
            if is_pair:
                raise BadData(
                    f"{table}: the columns {column} and {name} both name images, so that a line is a pair: write one "
                    "image and its class in each line, or call the column that does not count otherwise"
                )
            notes.append(f"{table}: the images are the column {column}, not {name}")

    def without_foreign_folder(self, table: str, cells: Sequence[str], notes: list[str]) -> Sequence[str]:
        """Give the names alone of files of one folder of another machine, or behind one URL, with a note.

        Such a folder tells no image from another. Cells of which one is found as it is, or whose folder says a split,
        stay as they are.
        """
        parts = [(_FOREIGN.match(cell), cell.replace("\\", "/").rpartition("/")) for cell in cells]
        folders = {folder for _, (folder, *_) in parts}
        if len(folders) > 1 or not all(foreign for foreign, _ in parts) or self.num_matches(table, cells):
            return cells
        if any(map(parse_split_name, (folder := folders.pop()).split("/"))):
            return cells
        names = [name.partition("?")[0] if foreign and foreign["scheme"] else name for foreign, (*_, name) in parts]
        if not self.num_matches(table, names):
            return cells
        notes.append(f"{table}: the folder {folder} of its images is not here: they are found by their names")
        return names

    def with_other_suffix(self, table: str, cells: Sequence[str], notes: list[str]) -> Sequence[str]:
        """Give the names without their suffix where so, and only so, images are there (1.jpg is 1.png), with a note."""
        named = [cell for cell in cells if os.path.splitext(cell)[1].lower() in (*SUFFIXES, *_CONVERTED)]
        if not named or 2 * len(named) < len(cells) or self.num_matches(table, cells):
            return cells
        stems = [os.path.splitext(cell)[0] for cell in cells]
        there = [(cell, found[0]) for cell, stem in zip(cells, stems, strict=True) if (found := self.find(table, stem))]
        if 2 * len(there) <= len(cells):
            return cells
        cell, image = there[0]
        notes.append(f"{table}: images are found with another suffix than it says: {cell} is {image}")
        return stems

    def _candidates(self, table: str, cell: str) -> list[str]:
        """Give the images that a cell may mean: those whose paths end most like it, and lie nearest to the table."""
        if (table, cell) not in self._known:
            self._known[table, cell] = self._find_candidates(table, cell)
        return self._known[table, cell]

    def _find_candidates(self, table: str, cell: str) -> list[str]:
        folder = table.rpartition("/")[0]
        name = normalize_name(cell.replace("\\", "/"))
        while name.startswith("./"):
            name = name[2:]
        for inner in (folder, f"{folder}/images" if folder else "images"):
            path = _join(inner, name)
            if path in self._paths:
                return [self._paths[path]]
            path = _join(inner, cell)
            if self._is_file(path):
                return [path]
        parts = PurePosixPath(name).parts if "/" in name else (name,) * bool(name)
        if not parts:
            return []
        last = parts[-1]
        those = self._by_name.get(last) or self._by_name.get("\0" + last.casefold(), [])
        scores = [self._same_folders(path, parts) for path in those]
        if len(parts) > 1 and not max(scores, default=0):  # a file of that name, but in another folder
            those = [path for path in those if path.rpartition("/")[0] == folder]
        if len(those) > 1:  # the more folders are the same, the better
            those = [path for path in those if self._same_folders(path, parts) == max(scores)]
        if len(those) > 1:  # train.csv means train/1.png rather than test/1.png
            said = parse_split_name(PurePosixPath(table).stem)
            near = [
                path
                for path in those
                if said
                and any((s := parse_split_name(part)) and s.split == said.split for part in path.split("/")[:-1])
            ]
            those = near or [path for path in those if path.rpartition("/")[0] == folder] or those
        return [self._paths[path] for path in those]

    def _same_folders(self, path: str, parts: Sequence[str]) -> int:
        """Count the folders, from the file upwards, in which a path and the parts of a cell agree."""
        count = 0
        for a, b in zip(reversed((self._place.name, *path.split("/")[:-1])), reversed(parts[:-1]), strict=False):
            if a != b:
                break
            count += 1
        return count
