"""Tables of labels: which image is of which class, in a CSV or JSON Lines file beside the images.

| column | names that it may have |
|---|---|
| the image | file, filename, path, filepath; image, img, photo, picture; id, key; name; or several (image_id) |
| its class | label; class, cls; category; target; breed, species, variety, disease, diagnosis, dx, tag; class_name |
| the number of its class | index, or a name for the class with id, index, idx, no, number or code (class_id) |
| its split | split, subset, set, dataset, partition, phase, usage, fold, where its values are words for splits |
| whether it is of a split | is_valid, is_train, is_test ...: true or false, 1 or 0 |
| one column a class | of 0 and 1, a single 1 in each line |

Case, blanks and underscores do not count. Of several columns for the image that one counts by which images are found.
A cell names an image by its path relative to the table, by the end of its path in any folder, or so without its suffix.
Values are separated by commas, semicolons, tabs or bars, or as a first line of Excel says (`sep=;`). A table without
a line of names has an image and its class. An image has one class: where images have several, the table is refused.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from onefold.data.columns import (
    FLAGS,
    MultiLabel,
    cell_text,
    class_rank,
    file_rank,
    is_number_column,
    is_split_column,
    plain_numbers,
    read_split_column,
    several_classes,
)
from onefold.data.dataset_info import Split
from onefold.data.decode import printable
from onefold.data.folders import join_names
from onefold.data.splits import split_name
from onefold.errors import BadData
from onefold.storage import parse_json, read_text

MAX_CLASSES = 1_000_000

SUFFIXES = (".csv", ".tsv", ".jsonl")
"""Of files that may be a table of labels."""

_SEPARATORS = ",;\t|"
_EXCEL_SEPARATOR = re.compile(r"\"?sep=(.)\"?[,;\t|]*", re.IGNORECASE)  # a first line that Excel writes and reads
_NUM_TRIED = 100  # rows that show which column names the images
_SHOWN = 80


class NotATable(BadData):
    """A file that does not say which image is of which class."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Which image is of which class: `files` relative to the place; `lines` says where each stands in the table.

    `numbered` are the names of the classes by their numbers, where the table numbers them; `splits` has the split of
    each image where a column says it. `notes` says what was not used.
    """

    path: str
    files: tuple[str, ...]
    labels: tuple[str, ...]
    numbered: tuple[str, ...] | None
    splits: tuple[Split, ...] | None
    notes: tuple[str, ...]


# ----------------------------------------------------------------------------------------------- reading


def read_table(place: Path, path: str, images: ImageIndex) -> Table:
    """Read a table below `place`.

    Raises NotATable where its columns are not those of a table of labels, BadData (naming the line) where it is one
    that cannot be used.
    """
    shown = printable(place / path)
    columns, rows, lines = _read_rows(place / path, path, images)
    expected = "expected the columns file,label or file,index"
    if columns and not rows:
        raise NotATable(f"{shown} lists no images")
    cells = {name: [row[i] if i < len(row) else "" for row in rows] for i, name in enumerate(columns)}
    file_columns = sorted(
        (name for name in cells if file_rank(name) is not None), key=lambda name: file_rank(name) or 0
    )
    class_columns = sorted((n for n in cells if class_rank(n) is not None), key=lambda name: class_rank(name) or 0)
    number_columns = [name for name in cells if is_number_column(name)]
    split_columns = [name for name in cells if is_split_column(name)]
    if not file_columns:
        raise NotATable(f"{shown}: {expected}; its first line is {printable(','.join(columns)[:_SHOWN])!r}")
    file_column = max(file_columns, key=lambda name: images.count(path, cells[name][:_NUM_TRIED]))
    class_columns = [name for name in class_columns if name != file_column]
    number_columns = [name for name in number_columns if name != file_column]
    notes: list[str] = []
    splits = None
    for name in split_columns:
        splits = splits or read_split_column(name, cells[name], shown, notes)
    files = images.find_all(path, cells[file_column], lines, shown)
    label_column = _label_column(shown, cells, class_columns)
    if label_column and not number_columns and all(map(str.isdecimal, cells[label_column])):
        same = _partition(cells[label_column])  # Label 0, ClassName AnnualCrop: a number and its name
        for name in class_columns:
            if _partition(cells[name]) == same and not any(map(str.isdecimal, cells[name])):
                label_column, number_columns = name, [label_column]
                class_columns = [name]
                break
    number_column = _number_column(cells, number_columns, cells.get(label_column or ""), notes)
    if label_column is None and number_column is None:
        rest = [name for name in cells if name not in (*split_columns, *file_columns)]
        labels, numbered = _one_hot(shown, cells, rest, lines, expected, columns)
    else:
        for i, line in enumerate(lines):
            if not cells[file_column][i] or not any(cells[n][i] for n in (label_column, number_column) if n):
                raise BadData(f"{shown}, line {line}: expected a file and its class")
        labels = _labels(shown, label_column, cells[label_column], lines, notes) if label_column else []
        numbered = None
        if number_column is not None:
            numbers = [_number(shown, lines[i], text) for i, text in enumerate(plain_numbers(cells[number_column]))]
            numbered = _names_by_number(shown, lines, numbers, labels)
            labels = [numbered[number] for number in numbers]
    if any("\udc80" <= c <= "\udcff" for label in {*labels} for c in label):
        notes.append(f"{shown} is not UTF-8: names of classes hold bytes that no text has; save it as UTF-8")
    kept = _once(shown, files, labels, lines, notes)
    unused = [name for name in class_columns if name != label_column]
    if unused and label_column:
        notes.append(f"{path}: the classes are the column {label_column}, not {join_names(unused)}")
    return Table(
        path=path,
        files=tuple(files[i] for i in kept),
        labels=tuple(labels[i] for i in kept),
        numbered=numbered,
        splits=None if splits is None else tuple(splits[i] for i in kept),
        notes=tuple(notes),
    )


def _read_rows(file: Path, path: str, images: ImageIndex) -> tuple[list[str], list[list[str]], list[int]]:
    """Give the names of the columns, the rows, and the line of each; rows without any value are none."""
    text, shown = read_text(file), printable(file)
    if file.suffix.lower() == ".jsonl":
        return _json_rows(text, shown)
    text_lines = text.split("\n")
    at, first = next(((i, line) for i, line in enumerate(text_lines) if line.strip()), (0, ""))
    if by_excel := _EXCEL_SEPARATOR.fullmatch(first.strip()):
        text_lines[at] = ""
    separator = by_excel[1] if by_excel else max(_SEPARATORS, key=first.count)
    reader = csv.reader(text_lines, delimiter=separator, skipinitialspace=separator != " ")
    rows, lines, start = [], [], 1
    try:
        for row in reader:
            stripped = [value.strip() for value in row]
            if any(stripped):
                rows.append(stripped)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadData(f"cannot read {shown}: {error}") from error
    if not rows:
        return [], [], []
    if len(rows[0]) == 2 and images.count(path, [rows[0][0]]):
        return ["file", "label"], rows, lines
    return rows[0], rows[1:], lines[1:]


def _json_rows(text: str, shown: str) -> tuple[list[str], list[list[str]], list[int]]:
    records, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                raise NotATable(f"{shown}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise NotATable(f"{shown}, line {number}: expected an object with file_name and label")
            records.append(record)
            lines.append(number)
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[cell_text(record.get(key)) for key in columns] for record in records]
    return columns, rows, lines


def _labels(shown: str, column: str, cells: Sequence[str], lines: Sequence[int], notes: list[str]) -> list[str]:
    """Give the class of each row by name. Raises MultiLabel where cells name several classes."""
    if separator := several_classes(set(cells)):
        i = next(i for i, cell in enumerate(cells) if separator in cell)
        both = " and ".join(printable(part.strip()) for part in cells[i].split(separator)[:3])
        raise MultiLabel(f"{shown}, line {lines[i]}", f"the column {printable(column)} names {both} of one image")
    plain = plain_numbers(cells)
    if len(set(plain)) < len(set(cells)):
        forms = join_names(sorted({cell for cell in cells if cell not in plain}), 3)
        notes.append(f"{shown}: numbers in several forms are one class each: {forms} are whole numbers too")
    return [unicodedata.normalize("NFC", text) for text in plain]


def _partition(values: Sequence[str]) -> list[int]:
    """Number the values by their first appearance: equal for columns that divide the rows alike."""
    seen: dict[str, int] = {}
    return [seen.setdefault(value, len(seen)) for value in values]


def _label_column(shown: str, cells: Mapping[str, Sequence[str]], candidates: Sequence[str]) -> str | None:
    """Choose the column of classes; BadData where several divide the images in different ways."""
    if not candidates:
        return None
    first = candidates[0]
    if class_rank(first) == 0 and sum(class_rank(name) == 0 for name in candidates) == 1:
        return first
    if any(_partition(cells[name]) != _partition(cells[first]) for name in candidates[1:]):
        names = " and ".join(map(printable, candidates))
        raise BadData(f"{shown}: the columns {names} say different classes: call the one that counts `label`")
    return first


def _number_column(
    cells: Mapping[str, Sequence[str]], candidates: Sequence[str], labels: Sequence[str] | None, notes: list[str]
) -> str | None:
    """Choose the column of numbers; an `index` that numbers the rows, as pandas writes it, is none."""
    for name in candidates:
        values = cells[name]
        if labels and len(set(values)) == len(values) > len(set(labels)):
            notes.append(f"the column {printable(name)} numbers the rows, not the classes")
            continue
        return name
    return None


def _number(shown: str, line: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < MAX_CLASSES):
        raise BadData(
            f"{shown}, line {line}: the index is {printable(text)!r}, expected a number from 0 to {MAX_CLASSES - 1}"
        )
    return int(text)


def _names_by_number(
    shown: str, lines: Sequence[int], numbers: Sequence[int], labels: Sequence[str]
) -> tuple[str, ...]:
    """Name the classes by their labels; a class that no image is of, or without labels, by its number."""
    names: dict[int, str] = {}
    for line, number, label in zip(lines, numbers, labels or map(str, numbers), strict=True):
        name = names.setdefault(number, label)
        if name != label:
            both = f"{printable(name)!r} and {printable(label)!r}"
            raise BadData(f"{shown}, line {line}: index {number} is called both {both}")
    return tuple(names.get(number, str(number)) for number in range(max(numbers) + 1))


def _one_hot(
    shown: str,
    cells: Mapping[str, Sequence[str]],
    names: Sequence[str],
    lines: Sequence[int],
    expected: str,
    columns: Sequence[str],
) -> tuple[list[str], None]:
    """Read one column a class, 1 where an image is of it."""
    names = [name for name in names if all(cell.lower() in FLAGS for cell in cells[name])]
    if len(names) < 2:
        raise NotATable(f"{shown}: {expected}; its first line is {printable(','.join(columns)[:_SHOWN])!r}")
    labels = []
    for i, line in enumerate(lines):
        ones = [name for name in names if FLAGS[cells[name][i].lower()]]
        if len(ones) > 1:
            raise MultiLabel(f"{shown}, line {line}", f"1 in the columns {join_names(ones, 3)}")
        if not ones:
            raise BadData(f"{shown}, line {line} has no 1 in any column of a class: expected one class an image")
        labels.append(unicodedata.normalize("NFC", ones[0]))
    return labels, None


def _once(shown: str, files: Sequence[str], labels: Sequence[str], lines: Sequence[int], notes: list[str]) -> list[int]:
    """Number the rows that count: of a file listed again with the same class only the first."""
    first: dict[str, int] = {}
    for i, file in enumerate(files):
        j = first.setdefault(file, i)
        if labels[i] != labels[j]:
            both = f"{printable(labels[j])} in line {lines[j]} and {printable(labels[i])} in line {lines[i]}"
            raise MultiLabel(shown, f"{printable(file)} is {both}")
    if len(first) < len(files):
        notes.append(f"{shown}: {len(files) - len(first)} lines list an image again with the same class")
    return sorted(first.values())


# ------------------------------------------------------------------------------------- finding the images


class ImageIndex:
    """The images of a place, found by what a table calls them."""

    def __init__(self, place: Path, images: Iterable[str]) -> None:
        self._place = place
        self._paths = {unicodedata.normalize("NFC", path): path for path in images}

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

    def count(self, table: str, cells: Sequence[str]) -> int:
        """Count the cells that name an image."""
        return sum(bool(cell) and bool(self._candidates(table, cell)) for cell in cells)

    def find_all(self, table: str, cells: Sequence[str], lines: Sequence[int], shown: str) -> list[str]:
        """Give the image of each cell, relative to the place. BadData where some are not there, or are two."""
        found, missing = [], []
        for line, cell in zip(lines, cells, strict=True):
            if not cell:
                raise BadData(f"{shown}, line {line}: expected a file and its class")
            candidates = self._candidates(table, cell)
            if len(candidates) > 1:
                raise BadData(
                    f"{shown}, line {line}: {printable(cell)} may be {join_names(candidates, 3)}: write the folder too"
                )
            (missing.append(cell) if not candidates else found.append(candidates[0]))
        if missing:
            raise BadData(f"{shown} lists {len(missing)} files that are not there: {join_names(missing)}")
        return found

    def _candidates(self, table: str, cell: str) -> list[str]:
        """Give the images that a cell may mean: those whose paths end most like it, and lie nearest to the table."""
        folder = table.rpartition("/")[0]
        name = unicodedata.normalize("NFC", cell.replace("\\", "/"))
        while name.startswith("./"):
            name = name[2:]
        for inner in ("", "images"):
            path = os.path.normpath(os.path.join(folder, inner, name))
            if path in self._paths:
                return [self._paths[path]]
            if os.path.lexists(self._place / folder / inner / cell) and not os.path.isdir(
                self._place / folder / inner / cell
            ):
                return [os.path.join(folder, inner, cell)]
        parts = PurePosixPath(name).parts
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
            said = split_name(PurePosixPath(table).stem)
            near = [
                path
                for path in those
                if said and any((s := split_name(part)) and s.split == said.split for part in path.split("/")[:-1])
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
