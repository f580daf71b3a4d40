"""The names of classes that tables or folders number: in a file beside them, or as the images' own files are called.

| file | a line, or a value of JSON, has |
|---|---|
| categories_places365.txt, label_map.csv | a name and its number, in any order; a `/a/` before it is cut off |
| classes.txt, synsets.txt | a name: of 0 on, or of 1 on where the tables number so |
| list_category_cloth.txt | a name of 1 on, after a first line with their count |
| data.yaml (Ultralytics) | an array or an object under `names` |
| label_num_to_disease_map.json | an object of names by number or numbers by name, an array of names |

A file counts where it is called so and names every number of the tables, or of folders that are called by numbers.
Where several name them differently none does. Without one the images' names count for tables, where they end in numbers
and what is before is one word a class: `beagle_34.jpg`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from onefold.data.class_lists import ClassList, read_class_lists, read_yaml_lists
from onefold.data.decode import SUFFIXES
from onefold.data.folders import FolderListing, join_names
from onefold.data.image_lists import LIST_SUFFIX
from onefold.data.json_tables import JSON_SUFFIX
from onefold.data.splits import parse_split_name
from onefold.data.tables import LabelTable
from onefold.errors import BadData
from onefold.file_io import normalize_class_name, parse_json, read_text

_CALLED = re.compile(r"class|label|categor|names?$|synset|disease|species|breed|map", re.IGNORECASE)
_LIST = re.compile(r"(obj[._])?(class(es)?|labels?|categor(y|ies))([ _-]?names?)?|names|synsets", re.IGNORECASE)
_YAML = re.compile(r"(?:.*/)?(?:data|dataset)\.ya?ml", re.IGNORECASE)  # Ultralytics'
_TABLE_SUFFIXES = (".csv", ".tsv")
_NAME_SUFFIXES = (LIST_SUFFIX, *_TABLE_SUFFIXES, JSON_SUFFIX, ".names", ".yaml", ".yml")
_MAX_BYTES = 1 << 22
_MAX_FILES, _MAX_DEPTH = 50, 2
_INITIAL = re.compile(r"/?[a-z]/")
_FIRST_WORD = re.compile(r"([^\W\d_]\w*?)[._ -]*\(?\d+\)?\.\w+$")
_MAX_MOVED = 5  # classes that a command to type names
_STEM = re.compile(r"(?P<word>.*[^\W\d_])[\W_]*\d+")


def name_numbered_classes(
    place: Path, listing: FolderListing, tables: Sequence[LabelTable], notes: list[str]
) -> Sequence[LabelTable]:
    """Give tables that number their classes with the names for these, or as they are where nothing says them."""
    numbers = {label for table in tables for label in table.labels}
    if not numbers or not all(map(str.isdecimal, numbers)):
        return tables
    used = {path for table in tables for path in (table.path, *table.parts)}
    names, paths = find_class_names(place, listing, numbers, used, notes)
    if not names and not paths and (names := _names_by_stem(tables)):
        notes.append(f"the images' names name the classes: {_said(names)}")
    return [_rename_numbers(table, names, paths) for table in tables] if names else tables


def find_class_names(
    place: Path, listing: FolderListing, numbers: Collection[str], used: Collection[str], notes: list[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Give the names of numbers that files of a place say, and these files; no names where several differ."""
    by_value = {int(number): number for number in numbers}
    names: dict[str, dict[str, str]] = {}
    for path in _candidates(place, listing, used):
        lists = _read_names(place / path)
        if found := next(filter(None, (_match_numbers(each, sorted(by_value)) for each in lists)), None):
            names[path] = {by_value[int(number)]: name for number, name in found.items()}
        elif read := [each for each in lists if isinstance(each.names, Sequence)][:1]:
            count = len(read[0].names)
            if len(numbers) <= len({*read[0].names}) == count:
                shown = join_names(sorted(numbers, key=int), 3)
                notes.append(f"{path} may name the classes: it cannot be told which of its {count} names is {shown}")
            elif _LIST.fullmatch(os.path.splitext(path.rpartition("/")[2])[0]) and count > 1:
                shown = join_names(sorted(numbers, key=int), 3)
                notes.append(f"{path} is not used: it has {count} names, and the classes are {shown}")
    if not names:
        return {}, ()
    first = next(iter(names.values()))
    if any(found != first for found in names.values()):
        notes.append(f"{join_names([*names], 3)} name the classes differently: they stay numbers")
        return {}, tuple(names)
    notes.append(f"{next(iter(names))} names the classes: {_said(first)}")
    return first, tuple(names)


def _said(names: Mapping[str, str]) -> str:
    return join_names([f"{number} is {names[number]}" for number in sorted(names, key=int)], 3)


def rename_classes(table: LabelTable, names: Mapping[str, str]) -> LabelTable:
    """Give a table with other names for its classes; those without one stay as they are."""
    numbered = None if table.numbered is None else tuple(names.get(name, name) for name in table.numbered)
    return replace(table, labels=tuple(names.get(label, label) for label in table.labels), numbered=numbered)


def _rename_numbers(table: LabelTable, names: Mapping[str, str], parts: tuple[str, ...]) -> LabelTable:
    present = sorted({*table.labels}, key=int)
    named = rename_classes(table, names)
    return replace(named, numbered=tuple(names[number] for number in present), parts=(*table.parts, *parts))


def _candidates(place: Path, listing: FolderListing, used: Collection[str]) -> list[str]:
    """List the files that may name classes, by what they are called."""
    found = [
        path
        for suffix in _NAME_SUFFIXES
        for path in listing.others.get(suffix, ())
        if path.count("/") <= _MAX_DEPTH and path not in used
    ]
    if parse_split_name(place.name):  # flowers/valid, named as flowers is
        with suppress(OSError):
            around = sorted(path for path in place.absolute().parent.iterdir() if path.suffix.lower() in _NAME_SUFFIXES)
            found += [f"../{path.name}" for path in around if path.is_file()]
    found = [p for p in found if _CALLED.search(os.path.splitext(p.rpartition("/")[2])[0]) or _YAML.fullmatch(p)]
    return [path for path in found[:_MAX_FILES] if (place / path).stat().st_size <= _MAX_BYTES]


def _read_names(file: Path) -> list[ClassList]:
    """Read what a file may say of classes, the likely first; nothing where it has other things."""
    try:
        if file.suffix.lower() == JSON_SUFFIX:
            names = _read_json_names(parse_json(read_text(file)))
            return [ClassList(names)] if names else []
        if file.suffix.lower() in (".yaml", ".yml"):
            return read_yaml_lists(read_text(file))
        return read_class_lists(read_text(file), is_table=file.suffix.lower() in _TABLE_SUFFIXES)
    except (BadData, ValueError, OSError):
        return []


def _read_json_names(value: object) -> dict[int, str] | list[str]:
    if isinstance(value, dict) and len(value) == 1 and isinstance(inner := next(iter(value.values())), dict | list):
        value = inner
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    if not isinstance(value, dict):
        return []
    if all(key.isdecimal() and isinstance(name, str) for key, name in value.items()):
        return {int(key): name for key, name in value.items()}
    if all(isinstance(number, int) and not isinstance(number, bool) for number in value.values()):
        return {number: key for key, number in value.items()}
    return []


def _match_numbers(given: ClassList, numbers: Sequence[int]) -> dict[str, str]:
    """Give the name of each number, where all have one of their own that is no number and no image; else nothing.

    A list without numbers begins at 0 where one of the tables' is 0, or at 1 where the last of them is its length.
    """
    names = given.names
    if not isinstance(names, Mapping):
        num_needed = len(names) if given.is_exact else numbers[-1] + 1
        is_from_zero = numbers[0] == 0 and num_needed == numbers[-1] + 1 <= len(names)
        is_from_one = numbers[0] > 0 and numbers[-1] == len(names)
        if len({*names}) < len(names) or not (is_from_zero or is_from_one):
            return {}
        names = dict(enumerate(names, int(is_from_one)))
    if not names.keys() >= {*numbers}:
        return {}
    if all(map(_INITIAL.match, names.values())):
        names = {number: _INITIAL.sub("", name, count=1) for number, name in names.items()}
    found = {str(number): normalize_class_name(names[number]) for number in numbers}
    is_named = all(name and not name.isdecimal() for name in found.values())
    is_image = any(os.path.splitext(name)[1].lower() in SUFFIXES for name in found.values())
    return found if is_named and not is_image and len({*found.values()}) == len(found) else {}


def _names_by_stem(tables: Sequence[LabelTable]) -> dict[str, str]:
    """Give the word that the files of each class begin with, where each class has one, and no other has it."""
    pairs: set[tuple[str, str]] = set()
    num_images = 0
    for table in tables:
        for file, label in zip(table.files, table.labels, strict=True):
            match = _STEM.fullmatch(os.path.splitext(file.rpartition("/")[2])[0])
            if not match:
                return {}
            pairs.add((label, normalize_class_name(match["word"])))
            num_images += 1
    names = dict(pairs)
    is_told = len(pairs) == len(names) == len({*names.values()}) and len(names) > 1
    return names if is_told and 2 * len(names) <= num_images else {}


def hint_of_names(images: Sequence[str]) -> list[str]:
    """Say which classes the files' names may say, as cat.0.jpg and dog.0.jpg do; nothing where they say none."""
    words = [_FIRST_WORD.match(image.rpartition("/")[2]) for image in images]
    names = Counter(word[1] for word in words if word)
    num_called = sum(count for count in names.values() if count > 1)
    if 2 * num_called <= len(images) or len(names) < 2 or any(map(parse_split_name, names)):
        return []
    called = f"its files are called as classes ({join_names(sorted(names), 3)}): a labels.csv can say so"
    folders = {image.rpartition("/")[0] for image, word in zip(images, words, strict=True) if word}
    plain = [name for name in names if re.fullmatch(r"\w+", name)]
    if len(plain) < len(names) or len(names) > _MAX_MOVED or len(folders) > 1:
        return [called]
    moves = f"for c in {' '.join(sorted(names))}; do mkdir $c; mv $c[^a-zA-Z]* $c; done"
    where = folders.pop()
    return [f"{called}, or, typed in {f'{where}/' if where else 'it'}, {moves}"]
