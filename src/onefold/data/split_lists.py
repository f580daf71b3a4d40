"""Lists that say splits alone: which images are of train, val and test, whose classes folders or a table say.

| list | a line has |
|---|---|
| train.txt, val.txt ..., two or more | an image |
| list_eval_partition.txt, splits.csv: a table or list called by a word for splits | an image, its split |

Lists of several partitions (Training_01.txt to Training_10.txt) are refused: only the user knows which one is
meant.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onefold.data.dataset_info import Split
from onefold.data.decode import printable_name
from onefold.data.folder_roles import FolderRoles
from onefold.data.folders import FolderListing, join_names
from onefold.data.image_lists import LIST_SUFFIX
from onefold.data.match_table_paths import ImageIndex
from onefold.data.splits import SPLIT_WORDS, parse_split_name, split_into_words
from onefold.data.table_columns import is_split_column, read_split_column
from onefold.data.table_rows import read_rows
from onefold.data.tables import LabelTable
from onefold.errors import BadData
from onefold.file_io import read_lines

_PARTITION_SUFFIXES = (LIST_SUFFIX, ".csv", ".tsv")
_PARTITION_WORDS = frozenset(("partition", "partitions", "split", "splits", "fold", "folds", "subset", "subsets"))
_MAX_DEPTH = 2
_MAX_PARTITIONS = 10  # files that are tried
_NUM_TRIED = 100


def read_split_lists(
    place: Path, listing: FolderListing, classes: Mapping[str, str], used: Sequence[str] = ()
) -> list[LabelTable]:
    """Read the lists that say splits of images of `classes` (in class folders, or of a table), two or more, or one.

    A list of which half or more name no such image is none. Raises BadData where they are several partitions.
    """
    images = ImageIndex(place, listing.images)
    names = [
        name
        for suffix in _PARTITION_SUFFIXES
        for name in listing.others.get(suffix, ())
        if name.count("/") <= _MAX_DEPTH and name not in used
    ]
    found = []
    for name in names:
        if not name.lower().endswith(LIST_SUFFIX) or not parse_split_name(Path(name).stem):
            continue
        try:
            listed = [images.find(name, line) for line in read_lines(place / name)]
        except BadData:  # no text: said where it was tried as a table
            continue
        files = tuple(those[0] for those in listed if len(those) == 1 and those[0] in classes)
        if 2 * len(files) > len(listed):
            lost = len(listed) - len(files)
            notes = (f"{name}: {lost} of its {len(listed)} lines name no image that is in a class folder",)
            labels = tuple(classes[file] for file in files)
            found.append(
                LabelTable(path=name, files=files, labels=labels, numbered=None, splits=None, notes=notes * bool(lost))
            )
    if len(found) > 1:
        refuse_partitions([table.path for table in found], printable_name(place))
        return found
    called = [name for name in names if _PARTITION_WORDS & {*split_into_words(Path(name).stem)}]
    read = (_read_partition(place, name, images, classes) for name in called[:_MAX_PARTITIONS])
    return [table for table in read if table][:1]


def read_columns(place: Path, name: str, images: ImageIndex) -> tuple[str, dict[str, list[str]]] | None:
    """Give the column of a table that names images, and the cells of all columns; None where none does."""
    try:
        read = read_rows(place / name, name, images, [])
    except BadData:
        return None
    cells = {column: [row[i] if i < len(row) else "" for row in read.rows] for i, column in enumerate(read.columns)}
    counts = {column: images.num_matches(name, column_cells[:_NUM_TRIED]) for column, column_cells in cells.items()}
    file_column = max(counts, key=lambda column: counts[column], default="")
    return (file_column, cells) if counts.get(file_column) else None


def _read_partition(place: Path, name: str, images: ImageIndex, classes: Mapping[str, str]) -> LabelTable | None:
    """Read a table of images and splits; None where it is none, or lists hardly any image of `classes`."""
    read = read_columns(place, name, images)
    if read is None:
        return None
    file_column, columns = read
    named = [column for column in columns if column != file_column and all(map(parse_split_name, columns[column]))]
    named.sort(key=lambda column: not is_split_column(column))
    if not named:
        return None
    splits = read_split_column(named[0], columns[named[0]], name, []) or ()
    rows = [
        (those[0], split)
        for cell, split in zip(columns[file_column], splits, strict=True)
        if split and len(those := images.find(name, cell)) == 1 and those[0] in classes
    ]
    unique = dict(rows)
    if 2 * len(rows) <= len(splits) or len(unique) < len(rows):
        return None
    return LabelTable(
        path=name,
        files=tuple(unique),
        labels=tuple(classes[file] for file in unique),
        numbered=None,
        splits=tuple(unique.values()),
        notes=(),
    )


def divide_by_lists(
    place: Path, listing: FolderListing, tables: Sequence[LabelTable], notes: list[str]
) -> Sequence[LabelTable]:
    """Give one table that says no splits as the lists beside it divide it, where they have all of its images."""
    if len(tables) != 1 or tables[0].splits or parse_split_name(Path(tables[0].path).stem):
        return tables
    table = tables[0]
    classes = dict(zip(table.files, table.labels, strict=True))
    divided = read_split_lists(place, listing, classes, (table.path, *table.parts))
    if missing := len(classes.keys() - {file for each in divided for file in each.files}):
        if divided:
            paths = join_names([each.path for each in divided])
            notes.append(f"{paths}: the splits are not used, since {missing} images are in none of them")
        return tables
    notes += table.notes
    parts = (table.path, *table.parts)
    rows = {file: i for i, file in enumerate(table.files)}
    return [
        replace(
            each,
            numbered=table.numbered,
            parts=parts,
            unlabelled=table.unlabelled,
            is_guessed=table.is_guessed,
            things={name: tuple(column[rows[file]] for file in each.files) for name, column in table.things.items()},
        )
        for each in divided
    ]


def refuse_partitions(paths: Sequence[str], shown: str) -> None:
    """Raise BadData where files say the same splits several times: train1.txt and test1.txt, train2.txt and test2.txt.

    Nothing is raised where each split is said once.
    """
    partitions: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for path in sorted(paths):
        if said := parse_split_name(Path(path).stem):
            partitions[path.rpartition("/")[0] + "/" + said.stem, said.number].setdefault(said.split, path)
    first = next(iter(partitions.values()), {})
    if len(partitions) < 2 or len({split for one in partitions.values() for split in one}) == len(paths):
        return
    others = next(one for one in partitions.values() if one is not first)
    split = next((split for split in first if split in others), "")
    if split:
        raise BadData(
            f"{shown} holds {len(partitions)} sets of splits: {first[split]} and {others[split]} may each be {split}: "
            f"keep the files of one ({join_names(list(first.values()))}), and move the others away"
        )


def unread_lists_note(names: Iterable[str]) -> list[str]:
    """Say which of these texts are called as if they said splits."""
    stems = {name: os.path.splitext(name)[0].rpartition("/")[2] for name in names}
    words = {*SPLIT_WORDS, "split", "splits", "partition", "partitions"}
    lists = [name for name, stem in stems.items() if not words.isdisjoint(split_into_words(stem))]
    sentence = "(lists that may say splits) stay unread: write splits into a table or folders"
    return [f"{join_names(lists, 3)} {sentence}"] if lists else []


def test_beside(
    tables: Sequence[LabelTable], arrangement: FolderRoles, folders: Mapping[str, tuple[int, str] | None]
) -> LabelTable | None:
    """Give the images of test/ as a table of their own, where tables divide all of train/, and list none of these."""
    split = {file: arrangement.folders[given[0]].split for file, given in folders.items() if given}
    listed = {file for table in tables for file in table.files}
    said = {*(said for _, said in said_splits(tables)), *(split.get(file) for file in listed)}
    test = {file: given[1] for file, given in folders.items() if given and split[file] == "test"}
    roots = [folder.root for folder in arrangement.folders if folder.split == "test"]
    if not (len(roots) == 1 and parse_split_name(Path(roots[0]).stem)) or not {*split} - {*test} <= listed:
        return None
    files, labels = tuple(test), tuple(test.values())
    table = LabelTable(path=roots[0], files=files, labels=labels, numbered=None, splits=None, notes=())
    return None if "test" in said else table


def said_splits(tables: Sequence[LabelTable]) -> Iterator[tuple[str, Split]]:
    """Give the images of tables that say splits, by a column or by the table's name, with these."""
    for table in tables:
        said = parse_split_name(Path(table.path).stem)
        for i, file in enumerate(table.files if table.splits or said else ()):
            split = table.splits[i] if table.splits else said.split if said else None
            if split:
                yield file, split
