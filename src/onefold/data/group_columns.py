"""Of what each photo is (a lesion, a patient), where a table says it: its own column, or that of a table beside it.

Photos of one thing are on one side of a val that is cut out, and it is said where given splits share some. One column
counts for all tables of a place together, since a patient may have one photo in each split. A table beside class
folders, or beside tables without such a column, says it where it lists half of their images or more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from onefold.data.dataset_info import SplitImages
from onefold.data.folders import FolderListing
from onefold.data.match_table_paths import ImageIndex
from onefold.data.photo_copies import called_as_groups, find_group_column, may_hold_groups
from onefold.data.split_lists import read_columns
from onefold.data.splits import split_into_words
from onefold.data.table_columns import is_missing
from onefold.data.tables import LABEL_TABLE_SUFFIXES, LabelTable

_MAX_DEPTH = 2
_MAX_TRIED = 10  # tables
_HEAD_BYTES = 1 << 12


def group_tables(place: Path, listing: FolderListing, tables: Sequence[LabelTable]) -> Sequence[LabelTable]:
    """Give tables with of what each photo is, by a column of theirs, or else by a table beside them."""
    labels = [label for table in tables for label in table.labels]
    called = {" ".join(split_into_words(name)): name for table in tables for name in table.things}
    things = [{" ".join(split_into_words(name)): column for name, column in t.things.items()} for t in tables]
    columns = {
        name: [cell for t, of in zip(tables, things, strict=True) for cell in of.get(words, ("",) * len(t.files))]
        for words, name in called.items()
    }
    column, note = find_group_column(columns, labels), ""
    parts: list[str] = []
    groups = columns[column] if column else []
    if not column:
        files = [file for table in tables for file in table.files]
        column, groups, note, parts = _groups_beside(place, listing, files, labels, {table.path for table in tables})
    if not column:
        return tables
    found, start = [], 0
    for i, table in enumerate(tables):
        own = tuple(groups[start : start + len(table.files)])
        start += len(table.files)
        notes = (*table.notes, note) if note and i == 0 else table.notes
        found.append(replace(table, groups=own, group_column=column, notes=notes, parts=(*table.parts, *parts)))
    return found


def group_class_folders(
    place: Path,
    listing: FolderListing,
    splits: Sequence[SplitImages],
    images: Sequence[Sequence[str]],
    notes: list[str],
) -> tuple[list[SplitImages], list[str]]:
    """Give splits of class folders with of what each photo is, where a table beside them says it, and this table.

    `images` are the files of each split.
    """
    labels = [label for split in splits for label in split.labels]
    files = [file for those in images for file in those]
    column, groups, note, paths = _groups_beside(place, listing, files, labels, ())
    if not column:
        return [*splits], []
    notes.append(note)
    found, start = [], 0
    for split, those in zip(splits, images, strict=True):
        found.append(replace(split, groups=groups[start : start + len(those)], group_column=column))
        start += len(those)
    return found, paths


def _groups_beside(
    place: Path, listing: FolderListing, files: Sequence[str], labels: Sequence[str], used: Collection[str]
) -> tuple[str | None, list[str], str, list[str]]:
    """Find a table that says of what each of these files is: its column, the thing of each, a note, its path."""
    names = [name for suffix in LABEL_TABLE_SUFFIXES for name in listing.others.get(suffix, ()) if name not in used]
    names = [name for name in names if name.count("/") <= _MAX_DEPTH and _may_hold_groups(place / name)][:_MAX_TRIED]
    images = ImageIndex(place, listing.images) if names else None
    for name in names if images else ():
        if images is None or (read := read_columns(place, name, images)) is None:
            continue
        file_column, columns = read
        called = [column for column in called_as_groups(columns) if column != file_column]
        found = [images.find(name, cell) for cell in columns[file_column]] if called else []
        rows = {those[0]: i for i, those in enumerate(found) if len(those) == 1}
        num_listed = sum(file in rows for file in files)
        if 2 * num_listed < len(files):
            continue
        cells = {
            column: [
                "" if (i := rows.get(file)) is None or is_missing(columns[column][i]) else columns[column][i]
                for file in files
            ]
            for column in called
        }
        if column := find_group_column(cells, labels):
            which = "each image" if num_listed == len(files) else f"{num_listed} of the {len(files)} images"
            return column, cells[column], f"{name} says the {column} of {which}", [name]
    return None, [], "", []


def _may_hold_groups(file: Path) -> bool:
    """Whether the beginning of a table may name a column of things: most tables need not be read again."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(_HEAD_BYTES)
    except OSError:
        return False
    return may_hold_groups(head.replace(b"\0", b"").decode("latin-1"))
