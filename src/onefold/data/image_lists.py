"""Lists of images in plain text (.txt), whose columns have no names.

| list | a line has |
|---|---|
| images and classes, as Caffe and MMPretrain have them | an image, a tab or a blank, its class; perhaps a box |
| train.txt, val.txt ... of images that lie in class folders | an image |
| images.txt of CUB-200 and NABirds | a key, an image |
| beside it: image_class_labels.txt | the key, the number of its class (without this list the class is its folder) |
| beside it: classes.txt | the number of a class, its name |
| beside it: train_test_split.txt | the key, 1 for train and 0 for test, or a word for a split |

Names of images and of classes may hold blanks (`0004 Cessna 172`): where a line is divided is told by the images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onefold.data.decode import SUFFIXES, printable_name
from onefold.data.match_table_paths import ImageIndex
from onefold.data.splits import parse_split_name
from onefold.data.table_columns import FLAG_WORDS, MultiLabelError, NotATableError, rank_image_column
from onefold.errors import BadData
from onefold.file_io import read_lines, read_text

LIST_SUFFIX = ".txt"
"""Of files that may be a list of images."""
NUMBERED_IMAGES = "images.txt"
"""The name of a list that gives each image a key, by which the lists beside it speak of it."""

_CLASS_LIST, _NAME_LIST, _SPLIT_LIST = "image_class_labels.txt", "classes.txt", "train_test_split.txt"
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_NUMBERS = re.compile(r"[-0-9.,:]+(\s+[-0-9.,:]+)+")  # a box or several classes, and no name of a class
_NAMES = re.compile(r"(class(es)?|labels?|names|synsets?|categories)([_-]?(names?|list|map))?\.txt", re.IGNORECASE)
_NUM_TRIED = 100  # lines that show whether a file lists images
_LONGEST = 1000  # characters of a line with an image and a class of several words
_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """A table as it stands in a file: the names of its columns, its rows, and the line of each.

    `parts` are other files, relative to the place, that it was put together from.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[int]
    parts: tuple[str, ...] = ()


def read_image_list(file: Path, path: str, images: ImageIndex, notes: list[str]) -> TableRows:
    """Read a list of images and classes, or of numbered images; `path` is that of the file below the place.

    Raises NotATableError where its first lines are otherwise or name no image that is there, BadData where a later
    line is.
    """
    rows: list[list[str]] = []
    num_boxes = 0
    texts = read_text(file, notes).split("\n")
    lines = [number for number, line in enumerate(texts, 1) if line.strip()]
    texts = [line.strip() for line in texts if line.strip()]
    while texts[:1] and texts[0].startswith("#") and not images.num_matches(path, texts[0].split()[:1]):
        del texts[0], lines[0]  # a comment
    header: list[str] = []
    if texts[:1] and texts[0].isdecimal() and 0 < int(texts[0]) - len(texts) + 3 < 3:  # how many lines follow
        del texts[0], lines[0]
        if not images.num_matches(path, texts[0].split()[:1]):
            header = texts[0].split()
            del texts[0], lines[0]
    if by_number := _classes_by_first_number(path, texts, images):
        notes.append(f"{path}: the first of the numbers in a line is the class: it tells the others")
        return TableRows(columns=["file", "label"], rows=by_number, lines=lines)
    is_numbered = file.name.lower() == NUMBERED_IMAGES and any(
        images.num_matches(path, line.split(None, 1)[1:]) for line in texts[:1]
    )
    divided = [line.split(None, 1) for line in texts] if is_numbered else _divide(path, texts, lines, images)
    for number, line, cells in zip(lines, texts, divided, strict=True):
        if len(cells) == 6 and not cells[1].isdecimal() and all(map(_NUMBER.fullmatch, cells[2:])):
            cells, num_boxes = cells[:2], num_boxes + 1
        if len(cells) != 2:
            kind = BadData if images.num_matches(path, [row[0] for row in rows[:_NUM_TRIED]]) else NotATableError
            raise kind(f"{path}, line {number}: {printable_name(line[:_SHOWN])!r}: expected an image and its class")
        rows.append(cells)
    if is_numbered:
        return _join_numbered(file, path, rows, lines, notes)
    if not images.num_matches(path, [row[0] for row in rows[:_NUM_TRIED]]):
        raise NotATableError(f"{path}: expected images that are there, and their classes")
    numberings = [[str(i + k) for i in range(len(rows))] for k in (0, 1)]
    is_name_list = [cells[0] for cells in rows] in numberings and len({cells[1] for cells in rows}) == len(rows)
    if is_name_list and not _NAMES.fullmatch(file.name):  # a list of all images, and of nothing else, is one of images
        found = [images.find(path, cells[0]) for cells in rows]
        is_name_list = [len(those) for those in found] != [1] * len(images)
    if several := [i for i, cells in enumerate(rows) if _NUMBERS.fullmatch(cells[1])]:
        line = f"{path}, line {lines[several[0]]}"
        one = " and ".join(rows[several[0]][1].split()[:3])
        is_vector = {value for cells in rows for value in cells[1].split()} <= {"0", "1", "-1"}
        if len(several) < len(rows) or (is_vector and any(cells[1].split().count("1") > 1 for cells in rows)):
            raise MultiLabelError(line, f"{printable_name(rows[several[0]][0])} is of {one}")
        raise NotATableError(f"{line}: expected an image and its class, one word or number")
    said = parse_split_name(file.stem)
    is_held_out = said is not None and said.split != "train"  # perhaps of one image a class
    if is_name_list and _NAMES.fullmatch(file.name):
        raise NotATableError(f"{path} numbers names: expected an image and its class")
    if len(rows) > 2 and (is_name_list or ([cells[1] for cells in rows] in numberings and not is_held_out)):
        raise NotATableError(f"{path} numbers its lines: expected an image and its class")
    if num_boxes:
        notes.append(f"{path}: of {num_boxes} lines with a class and a box, the class is used")
    is_header = _is_header(path, rows, images)
    columns = rows[0] if is_header else header if len(header) == 2 else ["file", "label"]
    return TableRows(columns=columns, rows=rows[is_header:], lines=lines[is_header:])


def _is_header(path: str, rows: Sequence[Sequence[str]], images: ImageIndex) -> bool:
    """Whether the first line names columns: by a word for images, or since it alone is no image, and of no class."""
    name, label = rows[0]
    if "." in name or images.num_matches(path, [name]):
        return False
    others = rows[1 : _NUM_TRIED + 1]
    is_alone = len(others) > 1 and images.num_matches(path, [cells[0] for cells in others]) == len(others)
    is_alone = is_alone and len({cells[1] for cells in rows[1:]}) < len(rows) - 1
    return rank_image_column(name) is not None or (is_alone and all(cells[1] != label for cells in rows[1:]))


def _classes_by_first_number(path: str, texts: Sequence[str], images: ImageIndex) -> list[list[str]]:
    """Give images and the first of the numbers after each, where that tells all others (a breed its species).

    Nothing where it does not: a box's first number is of few boxes, that end alike; nor in vectors of 0 and 1.
    """
    words = [line.split() for line in texts]
    values = {value for those in words for value in those[1:]}
    if {len(those) for those in words} not in ({3}, {4}, {5}) or not all(map(str.isdecimal, values)):
        return []
    firsts = {those[1] for those in words}
    is_told = len({tuple(those[1:]) for those in words}) == len(firsts)
    is_few = len(firsts) > 1 and 2 * len(firsts) <= len(words)
    tried = [those[0] for those in words[:_NUM_TRIED]]
    if not (is_told and is_few) or values <= {"0", "1"} or 2 * images.num_matches(path, tried) < len(tried):
        return []
    return [those[:2] for those in words]


def _divide(path: str, texts: Sequence[str], lines: Sequence[int], images: ImageIndex) -> list[list[str]]:
    """Divide lines into an image and its class, at tabs, else at the blank that follows the name of the image.

    That is the longest beginning that is an image that is there; what ends in the suffix of an image goes before what
    does not. Lines without such a suffix are divided alike where one way finds the images of all: the last word is the
    class, or the first the image. An image that is not there is told so too.

    Raises NotATableError where the first lines are otherwise, BadData where an image is not there and the other lines
    do not tell where its name ends.
    """
    cells = [[cell.strip() for cell in line.split("\t")] for line in texts]
    ways: dict[int, list[list[str]]] = {}  # of lines without the suffix of an image
    there: dict[int, list[list[str]]] = {}
    num_found = 0
    for i, line in enumerate(texts):
        if len(cells[i]) == 1:
            cells[i] = line.rsplit(None, 1)
        if len(cells[i]) == 2 and "\t" not in line and len(cells[i][0].split(None, 1)) > 1 and len(line) <= _LONGEST:
            pairs = [[line[: gap.start()], line[gap.end() :]] for gap in re.finditer(r"\s+", line)]
            suffixed = [pair for pair in pairs if os.path.splitext(pair[0])[1].lower() in SUFFIXES]
            pairs = [pair for pair in pairs if not _NUMBERS.fullmatch(pair[1])]
            found = [pair for pair in suffixed or pairs if images.find(path, pair[0])]
            num_found += (_NUM_TRIED if found[-1] == pairs[-1] else 1) if found else 0
            if suffixed:
                cells[i] = (found or suffixed)[-1]
            else:
                ways[i] = pairs
                if found:
                    there[i] = found
        elif i < _NUM_TRIED:  # one image suffices where the last word is the class; prose may begin with one too
            num_found += _NUM_TRIED * images.num_matches(path, cells[i][:1])
        if i + 1 == min(_NUM_TRIED, len(texts)) and 2 * num_found < i + 1:
            raise NotATableError(f"{path}: expected images that are there, and their classes")
    is_last = all(there[i][-1] == ways[i][-1] for i in there)
    is_first = all(there[i][0] == ways[i][0] for i in there)
    for i, pairs in ways.items():
        if is_last or is_first:
            cells[i] = pairs[-1 if is_last else 0]
        elif i in there:
            cells[i] = there[i][-1]
        else:
            raise BadData(
                f"{path}, line {lines[i]}: {printable_name(texts[i][:_SHOWN])!r}: its image is not there, so that it "
                "cannot be told which words are its class: put a tab between the image and the class"
            )
    return cells


def _join_numbered(
    file: Path, path: str, pairs: Sequence[Sequence[str]], lines: Sequence[int], notes: list[str]
) -> TableRows:
    """Put together the list of numbered images, and what the lists beside it say of their keys."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise BadData(f"{path} gives one key to several images")
    columns: dict[str, list[str]] = {"file": [image for _, image in pairs]}
    parts = []
    classes, names, splits = (_read_pairs(file.with_name(name)) for name in (_CLASS_LIST, _NAME_LIST, _SPLIT_LIST))
    if classes:
        numbers = columns["class_id"] = [classes.get(key, "") for key, _ in pairs]
        parts.append(_CLASS_LIST)
        unnamed = {*numbers} - {*names, ""}
        if unnamed and names:
            notes.append(f"{path}: {_NAME_LIST} has no name for class {min(unnamed)}: the classes are numbers")
        elif names:
            columns["label"] = [names.get(number, "") for number in numbers]
            parts.append(_NAME_LIST)
            if len({*numbers} - {""}) < len(names):  # of NABirds' tree of classes those that have images
                del columns["class_id"]
    else:
        columns["label"] = [image.rpartition("/")[0].rpartition("/")[2] for _, image in pairs]
    if splits:
        is_flag = {value.lower() for value in splits.values()} <= FLAG_WORDS.keys()
        columns["is_train" if is_flag else "split"] = [splits.get(key, "") for key, _ in pairs]
        parts.append(_SPLIT_LIST)
    folder = path.rpartition("/")[0]
    return TableRows(
        columns=list(columns),
        rows=list(zip(*columns.values(), strict=True)),
        lines=lines,
        parts=tuple(f"{folder}/{name}" if folder else name for name in parts),
    )


def _read_pairs(file: Path) -> Mapping[str, str]:
    """Read lines of a key and a value; none where there is no such file. Raises BadData where a line is otherwise."""
    pairs = [line.split(None, 1) for line in read_lines(file)] if file.is_file() else []
    if bad := [pair for pair in pairs if len(pair) < 2]:
        raise BadData(f"{printable_name(file)}: {printable_name(bad[0][0])!r}: expected a key and a value in each line")
    return {pair[0]: pair[1] for pair in pairs}
