"""The classes of shards, by name: each file's numbers by the names that its own schema gives them.

| the labels are | the classes are |
|---|---|
| names | these |
| numbers, and the schema of each file names them | these names, also where files have them in different orders |
| numbers, and the schemas of some files | the same names, where these agree; else refused |
| numbers without names | as a list of classes beside the shards says (see class_names.py), else the numbers |
| numbers in some files, names in others | names, where the numbers have some; else refused |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from onefold.data.dataset_info import Split
from onefold.data.decode import printable_name
from onefold.data.folders import join_names
from onefold.data.parquet import ParquetImages
from onefold.data.photo_copies import find_group_column
from onefold.data.splits import split_into_words
from onefold.data.table_columns import (
    MultiLabelError,
    find_class_separator,
    is_missing,
    missing_words_of_classes,
    normalize_numbers,
    refuse_measurements,
)
from onefold.data.tables import MAX_CLASSES
from onefold.data.tars import SAMPLE, TarImages
from onefold.errors import BadData
from onefold.file_io import normalize_class_name

ShardFile = TarImages | ParquetImages
FindNames = Callable[[Collection[str]], Mapping[str, str]]
"""Gives names for numbers of classes, where something beside the shards says them."""


def forget_missing_words_(files: Sequence[ShardFile]) -> None:
    """Take labels that say nothing, such as None, for no class, unless that is one of two classes."""
    texts = {label for file in files for label in file.labels if isinstance(label, str)}
    missing = {text for text in texts if is_missing(text)} - missing_words_of_classes(texts)
    for file in files:
        if not missing.isdisjoint(label for label in file.labels if isinstance(label, str)):
            file.labels[:] = [None if label in missing else label for label in file.labels]


def name_classes(
    files: Mapping[Split | None, Sequence[ShardFile]], shown: str, find_names: FindNames, notes: list[str]
) -> tuple[dict[Split | None, list[str]], dict[Split | None, tuple[str, ...] | None]]:
    """Give each image's class by name, by split, and for each split the names in the order of their numbers, or None.

    Raises BadData where a number has no name in its file's schema, or where it cannot be told which name a number has.
    """
    every = [file for those in files.values() for file in those if len(file)]
    if any(label is None for file in every for label in file.labels):
        raise BadData("no image but those of test has a class: all are -1 or nothing")
    texts = sorted({label for file in every for label in file.labels if isinstance(label, str)})
    if separator := find_class_separator(texts):
        both = next(name for name in texts if separator in name)
        raise MultiLabelError(shown, f"{printable_name(both)} is of one image")
    refuse_measurements(f"{shown}: the class", texts)
    forms = dict(zip(texts, normalize_numbers(texts), strict=True))
    named = {split: [file for file in those if file.classes and _has_numbers(file)] for split, those in files.items()}
    bare = [file for file in every if not file.classes and _has_numbers(file)]
    _check_numbers(every, shown)
    schemas = dict.fromkeys(tuple(_schema_names(file)) for those in named.values() for file in those)
    lent: Sequence[str] = ()
    if bare and schemas:
        lent = _lend_names(bare, [file for those in named.values() for file in those], len(schemas), shown, notes)
    numbers = {label for file in bare for label in file.labels if isinstance(label, int)}
    words = {forms[text] for text in texts}
    are_words_numbers = bool(words) and all(word.isascii() and word.isdecimal() for word in words)
    if bare and are_words_numbers:  # 1 in one file, "1" or "01" in another
        forms = {text: str(int(form)) for text, form in forms.items()}
        words = {*forms.values()}
    given: Mapping[str, str] = {}
    if not schemas and (bare or are_words_numbers):
        given = find_names({*map(str, numbers), *(words if are_words_numbers else ())})
    if bare and words and not lent and not given and not are_words_numbers:
        raise _mixed(bare[0], every, shown)

    def name(file: ShardFile, label: int | str | None) -> str:
        if isinstance(label, int):
            own = _schema_names(file) or lent
            return own[label] if own else given.get(str(label), str(label))
        text = forms[str(label)]
        return normalize_class_name(given.get(text, text))

    labels = {split: [name(f, label) for f in those for label in f.labels] for split, those in files.items()}
    orders: dict[Split | None, tuple[str, ...] | None] = {}
    for split, those in files.items():
        order = tuple(dict.fromkeys(each for file in named[split] for each in _schema_names(file)))
        if order and {*labels[split]} <= {*order}:
            orders[split] = order
        elif not schemas and (not words or (given and are_words_numbers)):
            present = {str(label) if isinstance(label, int) else forms[str(label)] for f in those for label in f.labels}
            orders[split] = tuple(given.get(number, number) for number in sorted(present, key=int))
        elif lent and {*labels[split]} <= {*lent}:
            orders[split] = tuple(lent)
        else:
            orders[split] = None
        if len({tuple(_schema_names(file)) for file in named[split]}) > 1:
            which = join_names([_file_name(file) for file in named[split]], 3)
            notes.append(f"the schemas of {which} number the classes differently: the names of each count")
    for schema in schemas:
        if (
            double := sorted({each for each in schema if schema.count(each) > 1})
            if len({*schema}) < len(schema)
            else []
        ):
            notes.append(f"a schema calls several numbers {join_names(double, 3)}: they are one class")
    notes += _notes_of_unused_names(labels, orders)
    return labels, orders


def _has_numbers(file: ShardFile) -> bool:
    return any(isinstance(label, int) for label in file.labels)


def _schema_names(file: ShardFile) -> list[str]:
    """Give the names that a file's schema has for its numbers; in their own forms where some would be alike."""
    names = list(file.classes or ())
    normalized = [*map(normalize_class_name, names)]
    return normalized if len({*normalized}) == len({*names}) else names


def _numbered_rows(files: Sequence[ShardFile]) -> Iterator[tuple[ShardFile, int, int]]:
    for file in files:
        yield from ((file, i, label) for i, label in enumerate(file.labels) if isinstance(label, int))


def _check_numbers(files: Sequence[ShardFile], shown: str) -> None:
    """Raise BadData for a number that has no name in its file's schema, or that is no number of a class."""
    for file, i, label in _numbered_rows(files):
        limit = len(file.classes or ()) or MAX_CLASSES
        if not 0 <= label < limit:
            names = (
                f"its schema names {limit} classes, 0 to {limit - 1}" if file.classes else f"expected 0 to {limit - 1}"
            )
            raise BadData(f"{shown}: {printable_name(file.name(i))} is of class {label}, and {names}")


def _lend_names(
    bare: Sequence[ShardFile], named: Sequence[ShardFile], num_schemas: int, shown: str, notes: list[str]
) -> Sequence[str]:
    """Give the names that the schemas of other files have for the numbers of those without any."""
    without = join_names(list(dict.fromkeys(_file_name(file) for file in bare)), 3)
    having = join_names(list(dict.fromkeys(_file_name(file) for file in named)), 3)
    if num_schemas > 1:
        raise BadData(
            f"{shown}: {without} numbers the classes without names, and {having} name them in different orders: write "
            "the names of its classes in place of the numbers"
        )
    names = _schema_names(named[0])
    for file, i, label in _numbered_rows(bare):
        if label >= len(names):
            row = printable_name(file.name(i))
            raise BadData(f"{shown}: {row} is of class {label}, and {having} names {len(names)}, 0 to {len(names) - 1}")
    notes.append(f"{without} has no names for its numbers: they are called as in {having}")
    return names


def _file_name(file: ShardFile) -> str:
    return printable_name(file.path.name if isinstance(file, ParquetImages) else file.blob.name.rpartition("/")[2])


def _mixed(numbered: ShardFile, files: Sequence[ShardFile], shown: str) -> BadData:
    """Give the error of shards of which some number the classes that others name, with an image of each."""

    def first(kind: type[int] | type[str]) -> str:
        file, i = next((f, i) for f in files for i, label in enumerate(f.labels) if isinstance(label, kind))
        return f"{_file_name(file)} has {file.labels[i]!r} ({printable_name(file.name(i))})"

    return BadData(
        f"{shown}: some classes are numbers, {first(int)}, and others names, {first(str)}: write one of both in all, "
        "or the names into classes.txt beside the shards, a line a class in the order of the numbers"
    )


def _notes_of_unused_names(
    labels: Mapping[Split | None, Sequence[str]], orders: Mapping[Split | None, tuple[str, ...] | None]
) -> list[str]:
    """Say which classes a schema names and no image is of."""
    present = {label for those in labels.values() for label in those}
    unused = dict.fromkeys(name for order in orders.values() for name in order or () if name not in present)
    return [f"no image is of {join_names([*unused], 3)}, which the schema names"] if unused else []


def group_images(
    files: Mapping[Split | None, Sequence[ShardFile]], labels: Mapping[Split | None, Sequence[str]]
) -> tuple[str, dict[Split | None, list[str]]]:
    """Find the column that says of what each photo is, for all splits together, and give its cells; "" where none does.

    Images of one sample are of one thing where no column says more.
    """
    things = {split: [_things(file, i) for file in those for i in range(len(file))] for split, those in files.items()}
    each_label = [label for split in files for label in labels[split]]
    called = dict.fromkeys(name for those in things.values() for cells in those for name in cells)
    for names in ([name for name in called if name != SAMPLE], [name for name in called if name == SAMPLE]):
        words = {" ".join(split_into_words(name)): name for name in names}
        cells = {split: [_by_words(of) for of in those] for split, those in things.items()}
        columns = {name: [of.get(w, "") for those in cells.values() for of in those] for w, name in words.items()}
        if column := find_group_column(columns, each_label):
            word = " ".join(split_into_words(column))
            return column, {split: [of.get(word, "") for of in those] for split, those in cells.items()}
    return "", {}


def _things(file: ShardFile, i: int) -> Mapping[str, str]:
    things = file.things(i)
    if isinstance(file, TarImages) and SAMPLE in things:  # each tar may number its samples from 0
        return {**things, SAMPLE: f"{file.blob.name}/{things[SAMPLE]}"}
    return things


def _by_words(cells: Mapping[str, str]) -> dict[str, str]:
    return {" ".join(split_into_words(name)): cell for name, cell in cells.items()}
