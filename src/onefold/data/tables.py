"""Tables of labels: which image is of which class, in a CSV or JSON Lines file beside the images.

| column | names that it may have |
|---|---|
| the image | file, filename, path, filepath; image, img, photo, picture; id, key; name; several (image_id); id_code |
| its class | label; class, cls; category; target; breed, species, variety, disease, diagnosis, dx, tag; class_name |
| the number of its class | index, or a name for the class with id, index, idx, no, number or code (class_id) |
| its split | split, subset, set, dataset, partition, phase, usage, fold, where its values are words for splits |
| whether it is of a split | is_valid, is_train, is_test, test, val ...: true or false, yes or no, 1 or 0 |
| one column a class | of 0 and 1, a single 1 in each line |

Case, blanks and underscores do not count. Of several columns for the image that one counts by which images are found.
A cell names an image by its path relative to the table, by the end of its path in any folder, or so without its suffix.
Values are separated by commas, semicolons, tabs or bars, or as a first line of Excel says (`sep=;`). A table without
a line of names has an image and its class, and so has a list (.txt). An image has one class:
where images have several, the table is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onefold.data.dataset_info import Split
from onefold.data.decode import printable_name
from onefold.data.folders import join_names
from onefold.data.json_tables import JSON_LINES_SUFFIXES
from onefold.data.match_table_paths import ImageIndex
from onefold.data.one_hot_columns import read_one_hot, without_class_columns
from onefold.data.photo_copies import called_as_groups
from onefold.data.splits import split_into_words
from onefold.data.table_columns import (
    BOOLEAN_WORDS,
    NONE_WORD,
    MultiLabelError,
    NotATableError,
    ends_with_class_word,
    find_class_separator,
    holds_splits,
    is_box_column,
    is_class_index_column,
    is_missing,
    is_split_column,
    missing_words_of_classes,
    normalize_number,
    normalize_numbers,
    only_other_column,
    parse_list_cells,
    rank_class_column,
    rank_image_column,
    read_split_columns,
    refuse_measurements,
)
from onefold.data.table_rows import read_rows
from onefold.errors import BadData
from onefold.file_io import normalize_class_name

MAX_CLASSES = 1_000_000

LABEL_TABLE_SUFFIXES = (".csv", ".tsv", *JSON_LINES_SUFFIXES, ".parquet")
"""Of files that may be a table of labels."""

_PREDICTION = re.compile(r"(\S+)(( +-?[0-9.]+){4}( +\S+( +-?[0-9.]+){4})*)")  # a class and a box, and more of them
_PREDICTED = frozenset(("probability", "prob", "probabilities", "probs"))  # columns of what a network says
_NUM_TRIED = 100  # rows that show which column names the images
_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Which image is of which class: `files` relative to the place; `lines` says where each stands in the table.

    `numbered` are the names of the classes by their numbers, where the table numbers them; `splits` has the split of
    each image where a column says it. `notes` says what was not used; `unlabelled` are images that are listed without a
    class or a split, `parts` other files that belong to the table. `is_guessed` is whether its column of classes is
    one by what it holds alone. `things` are the columns that may say of what each photo is (a lesion, a patient), ""
    where they say nothing; `groups` are the cells of the one that does, `group_column`, for all tables of a place.
    """

    path: str
    files: tuple[str, ...]
    labels: tuple[str, ...]
    numbered: tuple[str, ...] | None
    splits: tuple[Split, ...] | None
    notes: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    is_guessed: bool = False
    things: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: tuple[str, ...] | None = None
    group_column: str = ""


# ----------------------------------------------------------------------------------------------- reading


def read_table(place: Path, path: str, images: ImageIndex) -> LabelTable:
    """Read a table below `place`.

    Raises NotATable where its columns are not those of a table of labels, BadData (naming the line) where it is one
    that cannot be used.
    """
    shown = printable_name(place / path)
    notes: list[str] = []
    read = read_rows(place / path, path, images, notes)
    columns, rows, lines = read.columns, read.rows, read.lines
    expected = "expected the columns file,label or file,index"
    if columns and not rows:
        raise NotATableError(f"{shown} lists no images")
    _check_names(shown, columns, rows)
    cells = {name: [row[i] if i < len(row) else "" for row in rows] for i, name in enumerate(columns)}
    for name in cells:  # PredictionString of ImageNet's own tables: n01440764 10 20 30 40
        if split_into_words(name) == ["prediction", "string"] and all(map(_PREDICTION.fullmatch, cells[name])):
            cells = {**cells, "label": [_classes_of_boxes(cell) for cell in cells[name]]}
            notes.append(f"{shown}: of the boxes in the column {name} the class is used")
            break
    file_columns = sorted(
        (name for name in cells if rank_image_column(name) is not None), key=lambda name: rank_image_column(name) or 0
    )
    class_columns = [name for name in cells if rank_class_column(name) is not None and not is_box_column(name, cells)]
    class_columns.sort(key=lambda name: rank_class_column(name) or 0)
    number_columns = [name for name in cells if is_class_index_column(name)]
    split_columns = [name for name in cells if is_split_column(name)]
    if not any(images.num_matches(path, cells[name][:_NUM_TRIED]) for name in file_columns):
        file_columns = _columns_of_images(cells, path, images) or file_columns
    if not file_columns:
        raise NotATableError(
            f"{shown}: {expected}; its first line is {printable_name(','.join(columns)[:_SHOWN])!r}: rename its columns"
        )
    for row, line in zip(rows, lines, strict=True):
        if any(row[len(columns) :]):
            raise BadData(
                f"{shown}, line {line} has {len(row)} values, and the first line names {len(columns)} columns: put "
                "texts that hold the separator in quotes"
            )
    file_column = max(file_columns, key=lambda name: images.num_matches(path, cells[name][:_NUM_TRIED]))
    cells[file_column] = [*images.without_foreign_folder(path, cells[file_column], notes)]
    class_columns = [name for name in class_columns if name != file_column]
    number_columns = [name for name in number_columns if name != file_column]
    for name in class_columns if len(class_columns) > 1 else ():  # tags that are train and test, beside labels
        if holds_splits(cells[name], 1):
            class_columns.remove(name)
            split_columns.append(name)
            break
    others = [name for name in cells if name not in (file_column, *class_columns, *number_columns)]
    split_columns = split_columns or [name for name in others if holds_splits(cells[name], 2)][:1]
    for name in others:
        if split_into_words(name)[-1:] in (["folder"], ["dir"], ["directory"], ["subfolder"]):
            joined = [f"{folder}/{file}" for folder, file in zip(cells[name], cells[file_column], strict=True)]
            tried = joined[:_NUM_TRIED]
            if images.num_matches(path, tried) == len(tried) and tried:
                cells[file_column] = joined
                break
    cells[file_column] = [*images.with_other_suffix(path, cells[file_column], notes)]
    images.check_other_columns(path, file_column, {name: cells[name] for name in others}, cells[file_column], notes)
    only = "" if class_columns or number_columns else only_other_column(cells, file_column)
    if only:
        is_numbered = all(normalize_number(cell) is not None or is_missing(cell) for cell in cells[only])
        (number_columns if is_numbered else class_columns).append(only)
        notes.append(f"{shown}: the images are the column {file_column}, the classes the column {only}")
    if not class_columns and not number_columns:
        class_columns = [name for name in cells if ends_with_class_word(name) and name != file_column]
        if all(cell.lower() in BOOLEAN_WORDS for name in class_columns for cell in cells[name]):
            class_columns = []  # of one class each
    if any(not all(map(is_missing, cells[name])) for name in (*class_columns, *number_columns)):
        class_columns, number_columns = (
            [name for name in names if not all(map(is_missing, cells[name]))]
            for names in (class_columns, number_columns)
        )
    if not class_columns and not number_columns:
        rest = [name for name in cells if name not in (*file_columns, *split_columns)]
        split_columns = without_class_columns(cells, rest, split_columns)
    label_column = _label_column(shown, cells, class_columns)
    is_one_hot = label_column is None and not number_columns
    if is_one_hot:
        rest = [name for name in cells if name not in (*split_columns, *file_columns)]
        try:
            label_column, labels = read_one_hot(shown, cells, rest, lines, expected, notes)
        except MultiLabelError as error:
            there = (images.find(path, cell) for cell in cells[file_column])
            error.images = frozenset(those[0] for those in there if len(those) == 1)
            raise
        cells[label_column] = labels
    splits = read_split_columns({name: cells[name] for name in split_columns}, shown, notes)
    said = [name for name in (label_column, *number_columns) if name]
    words = _missing_words_of_classes(cells, label_column, number_columns, label_column == only)
    if is_one_hot:  # what is called none has a column of its own
        words = frozenset({*labels} - {""})
    elif words and label_column:
        which = f"is a class of the column {label_column}: leave its cells empty if it is none"
        notes.append(f"{shown}: {join_names(sorted(words))} {which}")
    kept_rows, unlabelled = _labelled_rows(cells, said, splits, words)
    if not kept_rows:
        raise BadData(f"{shown} labels no image: {join_names([*said, *split_columns])} say nothing in any line")
    without: list[str] = []
    if unlabelled:
        seen = sorted({repr(v) for n in said for i in unlabelled if is_missing(v := cells[n][i]) or v[:2] == "-1"})
        why = f" ({join_names(said)}: {join_names(seen, 3)})" if seen else f" (no split in {join_names(split_columns)})"
        notes.append(f"{shown}: {len(unlabelled)} of {len(lines)} lines say nothing of their image{why}: left out")
        without = [
            candidates[0] for i in unlabelled if len(candidates := images.find(path, cells[file_column][i])) == 1
        ]
    found = images.find_all(
        path,
        [cells[file_column][i] for i in kept_rows],
        [lines[i] for i in kept_rows],
        shown,
        notes,
        [splits[i] for i in kept_rows] if splits else (),
    )
    rows_there = [i for i, file in zip(kept_rows, found, strict=True) if file]
    for name in said:
        if lost := {cells[name][i] for i in kept_rows} - {cells[name][i] for i in rows_there}:
            notes.append(f"{shown}: of {join_names(sorted(lost), 3)} no image is there")
            break
    files = [file for file in found if file]
    cells = {name: [column[i] for i in rows_there] for name, column in cells.items()}
    lines = [lines[i] for i in rows_there]
    splits = None if splits is None else tuple(splits[i] for i in rows_there)
    numbering = label_column if not number_columns else None if label_column else number_columns[0]
    if numbering and not is_one_hot and None not in map(normalize_number, cells[numbering]):
        same = _partition(cells[numbering])  # Label 0, ClassName AnnualCrop: a number and its name
        names = [n for n in file_columns if n != file_column and len({*cells[n]}) < len(cells[n])]  # of no single image
        for name in (*class_columns, *names):
            if _partition(cells[name]) == same and not any(map(str.isdecimal, cells[name])):
                label_column, number_columns = name, [numbering]
                class_columns = [name]
                break
    number_column = _number_column(cells, number_columns, cells[label_column] if label_column else None, notes)
    if is_one_hot:
        labels, numbered = [normalize_class_name(name) for name in cells[label_column or ""]], None
    else:
        labels = _labels(shown, label_column, cells[label_column], lines, notes) if label_column else []
        numbered = None
        if number_column is not None:
            numbers = [_number(shown, lines[i], text) for i, text in enumerate(normalize_numbers(cells[number_column]))]
            names_by_number = _names_by_number(shown, lines, numbers, labels)
            numbered = tuple(names_by_number[number] for number in sorted(names_by_number))
            labels = [names_by_number[number] for number in numbers]
    kept = _once(shown, files, labels, splits, lines, notes)
    unused = [name for name in class_columns if name != label_column]
    if label_column in class_columns:
        same = _partition(cells[label_column or ""])
        unused += [
            n for n in cells if ends_with_class_word(n) and n not in class_columns and _partition(cells[n]) != same
        ]
    if unused and label_column:
        notes.append(f"{path}: the classes are the column {label_column}, not {join_names(unused)}")
    used_columns = [file_column, label_column, *number_columns, *split_columns]
    things = [name for name in called_as_groups(cells) if name not in used_columns]
    return LabelTable(
        path=path,
        files=tuple(files[i] for i in kept),
        labels=tuple(labels[i] for i in kept),
        numbered=numbered,
        splits=None if splits is None else tuple(split for i in kept if (split := splits[i])),
        notes=tuple(notes),
        unlabelled=tuple(sorted({*without} - {*files})),
        parts=read.parts,
        is_guessed=bool(only),
        things={name: tuple("" if is_missing(cell := cells[name][i]) else cell for i in kept) for name in things},
    )


def _check_names(shown: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Raise where two columns that say images, classes or splits have one name, or where the rows are predictions."""
    for name, count in Counter(columns).items():
        is_used = rank_class_column(name) is not None or rank_image_column(name) is not None or is_split_column(name)
        values = [tuple(row[i] for i, n in enumerate(columns) if n == name and i < len(row)) for row in rows]
        if count > 1 and is_used and any(len({*each}) > 1 for each in values):
            raise BadData(f"{shown}: {count} columns are called {printable_name(name)}: rename those that do not count")
    if predicted := [name for name in columns if _PREDICTED & {*split_into_words(name)}]:
        raise NotATableError(f"{shown} holds predictions, not labels: it has the column {printable_name(predicted[0])}")


def _columns_of_images(cells: Mapping[str, Sequence[str]], path: str, images: ImageIndex) -> list[str]:
    """Give the columns, whatever they are called, of which half of the cells or more are names of images."""
    found = []
    for name, column in cells.items():
        tried = [cell for cell in column[:_NUM_TRIED] if normalize_number(cell) is None]  # a number may be of anything
        if 2 * len(tried) > min(len(column), _NUM_TRIED) and 2 * images.num_matches(path, tried) >= len(tried):
            found.append(name)
    return found


def _classes_of_boxes(cell: str) -> str:
    """Give the class of `class x y x y class x y x y`; several with bars between them."""
    return "|".join(dict.fromkeys(cell.split()[::5]))


def _missing_words_of_classes(
    cells: Mapping[str, Sequence[str]], label_column: str | None, number_columns: Sequence[str], is_guessed: bool
) -> frozenset[str]:
    """Give the cells of the column of classes that look missing and are a class: None where it is one for sure.

    So where that is one of two, where a column numbers it as it does no other, and in a column that is known by what it
    holds, and not called as one of classes.
    """
    if label_column is None:
        return frozenset()
    column = cells[label_column]
    words = frozenset(cell for cell in column if cell.casefold() == NONE_WORD)
    for name in number_columns:
        rows = [(label in words, normalize_number(number)) for label, number in zip(column, cells[name], strict=True)]
        of_words, of_others = ({number for is_word, number in rows if is_word is side} for side in (True, False))
        if len(of_words) == 1 and None not in of_words and of_words.isdisjoint(of_others):
            return words
    if is_guessed and not ends_with_class_word(label_column):
        return words
    return missing_words_of_classes(column)


def _labelled_rows(
    cells: Mapping[str, Sequence[str]],
    columns: Sequence[str],
    splits: Sequence[Split | None] | None,
    words: Collection[str],
) -> tuple[list[int], list[int]]:
    """Number the rows that say a class (and a split, where there are splits), and those that do not.

    -1 is no class in a column of numbers, unless it is one of two (-1 and 1); `words` look missing and are one.
    """
    is_said = [splits is None or splits[i] is not None for i in range(max(map(len, cells.values()), default=0))]
    for name in columns:
        values = {cell for cell in cells[name] if cell in words or not is_missing(cell)}
        others = values - {"-1", "-1.0"}
        if len(others) > 1 and None not in map(normalize_number, others):
            values = others
        is_said = [said and cell in values for said, cell in zip(is_said, cells[name], strict=True)]
    return [i for i, said in enumerate(is_said) if said], [i for i, said in enumerate(is_said) if not said]


def _labels(shown: str, column: str, cells: Sequence[str], lines: Sequence[int], notes: list[str]) -> list[str]:
    """Give the class of each row by name. Raises BadData where cells name several classes or measure."""
    written, cells = cells, [" ".join(cell.split()) or cell for cell in parse_list_cells(cells)]
    if "" in cells:
        i = cells.index("")
        raise BadData(f"{shown}, line {lines[i]}: {printable_name(written[i])} names no class")
    if broken := [i for i, cell in enumerate(written) if "\n" in cell]:
        said = printable_name(written[broken[0]][:_SHOWN])
        raise BadData(f"{shown}, line {lines[broken[0]]}: the class {said} has several lines: is its quote closed?")
    if separator := find_class_separator(set(cells)):
        i = next(i for i, cell in enumerate(cells) if separator in cell)
        both = " and ".join(printable_name(part.strip()) for part in cells[i].split(separator)[:3])
        raise MultiLabelError(
            f"{shown}, line {lines[i]}", f"the column {printable_name(column)} names {both} of one image"
        )
    refuse_measurements(f"{shown}: the column {printable_name(column)}", cells)
    plain = normalize_numbers(cells)
    numbers = sorted(name for name in {*plain} if name.isdecimal())
    names = sorted(name for name in {*plain} - {*numbers} if len(name) > 1)
    if numbers and names and 2 * len(numbers) < len({*plain}):
        both = f"{join_names(numbers, 3)} beside names ({join_names(names, 2)})"
        notes.append(f"{shown}: the column {printable_name(column)} has the numbers {both}: each is a class of its own")
    if len(set(plain)) < len(set(cells)):
        forms = join_names(sorted({cell for cell in cells if cell not in plain}), 3)
        notes.append(f"{shown}: numbers in several forms are one class each: {forms} are integers too")
    return [normalize_class_name(text) for text in plain]


def _partition(values: Sequence[str]) -> list[int]:
    """Number the values by their first appearance: equal for columns that divide the rows alike."""
    seen: dict[str, int] = {}
    return [seen.setdefault(value, len(seen)) for value in values]


def _label_column(shown: str, cells: Mapping[str, Sequence[str]], candidates: Sequence[str]) -> str | None:
    """Choose the column of classes; BadData where several divide the images in different ways."""
    if not candidates:
        return None
    first = candidates[0]
    if rank_class_column(first) == 0 and sum(rank_class_column(name) == 0 for name in candidates) == 1:
        return first
    if any(_partition(cells[name]) != _partition(cells[first]) for name in candidates[1:]):
        names = " and ".join(map(printable_name, candidates))
        raise BadData(f"{shown}: the columns {names} say different classes: call the one that counts `label`")
    return first


def _number_column(
    cells: Mapping[str, Sequence[str]], candidates: Sequence[str], labels: Sequence[str] | None, notes: list[str]
) -> str | None:
    """Choose the column of numbers; an `index` that numbers the rows, as pandas writes it, is none."""
    for name in candidates:
        values = cells[name]
        if labels and len(set(values)) == len(values) > len(set(labels)):
            notes.append(f"the column {printable_name(name)} numbers the rows, not the classes")
            continue
        return name
    return None


def _number(shown: str, line: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < MAX_CLASSES):
        raise BadData(
            f"{shown}, line {line}: the index is {printable_name(text)!r}, expected a number from 0 to "
            f"{MAX_CLASSES - 1}"
        )
    return int(text)


def _names_by_number(shown: str, lines: Sequence[int], numbers: Sequence[int], labels: Sequence[str]) -> dict[int, str]:
    """Name the classes that images are of, by their labels or else by their numbers: gaps between these are none."""
    names: dict[int, str] = {}
    for line, number, label in zip(lines, numbers, labels or map(str, numbers), strict=True):
        name = names.setdefault(number, label)
        if name != label:
            both = f"{printable_name(name)!r} and {printable_name(label)!r}"
            raise BadData(f"{shown}, line {line}: index {number} is called both {both}")
    return names


def _once(
    shown: str,
    files: Sequence[str],
    labels: Sequence[str],
    splits: Sequence[Split | None] | None,
    lines: Sequence[int],
    notes: list[str],
) -> list[int]:
    """Number the rows that count: of a file listed again with the same class only the first."""
    first: dict[str, int] = {}
    again = [(first[file], i) for i, file in enumerate(files) if first.setdefault(file, i) != i]
    if several := [(j, i) for j, i in again if labels[i] != labels[j]]:
        j, i = several[0]
        both = f"{printable_name(labels[j])} in line {lines[j]} and {printable_name(labels[i])} in line {lines[i]}"
        count = len({j for j, _ in several})
        more = f", and {count - 1} more of {len(first)} images have two classes" if count > 1 else ""
        raise MultiLabelError(shown, f"{printable_name(files[i])} is {both}{more}")
    if again:
        notes.append(f"{shown}: {len(again)} lines list an image again with the same class")
    if splits and (twice := [(j, i) for j, i in again if splits[j] != splits[i]]):
        j, i = twice[0]
        which = f"{printable_name(files[i])} is of {splits[j]} in line {lines[j]}, of {splits[i]} in line {lines[i]}"
        notes.append(f"{shown}: {len(twice)} lines list an image in another split, and the first counts: {which}")
    return sorted(first.values())
