"""Layouts of datasets: the images that a folder, table, shards or pattern holds, their classes by name, and the splits.

| place | images and classes |
|---|---|
| a folder of class folders; of splits with class folders; of class folders with splits in them | the folders |
| the same inside one folder more (an unpacked archive) | the same |
| a folder with a table, or with one in each split; a table by itself | see tables.py |
| tar shards, Parquet files, patterns of them, URLs; a folder with them | see shards.py |

Of several in one folder that one counts that says most of the images: labels.csv; then class folders; then other
tables; then shards. A table that contradicts the class folders is refused. What is not used is left out, and said.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onefold.data.columns import MultiLabelError, NotATableError
from onefold.data.dataset_info import LeftOut, Split, SplitImages
from onefold.data.decode import (
    ARCHIVE_SUFFIXES,
    left_out_kind,
    left_out_reason,
    printable_name,
    read_first_bytes,
)
from onefold.data.folders import (
    FolderListing,
    ImageFiles,
    build_folder_tree,
    join_names,
    left_out_images,
    list_folder,
    no_images_message,
)
from onefold.data.image_lists import LIST_SUFFIX, NUMBERED_IMAGES
from onefold.data.match_table_paths import ImageIndex
from onefold.data.remote import REMOTE_PREFIXES
from onefold.data.shards import SHARD_SUFFIXES, expand_patterns, expand_split_patterns, find_shards, read_shards
from onefold.data.splits import (
    SPLIT_WORDS,
    FolderRoles,
    NoClassFoldersError,
    assign_images,
    detect_folder_roles,
    parse_split_name,
    split_into_words,
    splits_by_folder_name,
)
from onefold.data.tables import LABEL_TABLE_SUFFIXES as TABLE_SUFFIXES
from onefold.data.tables import LabelTable, find_split_tables, read_split_lists, read_table
from onefold.errors import BadData

_MAX_TABLES, _TABLE_DEPTH = 50, 2  # files of a folder that are tried as tables, and the folders above a table
_LABELS = "labels.csv"
_LISTS = (".json", ".xlsx", ".xls", ".ods", ".txt", ".xml", ".mat")  # may say classes, in forms that are not read


@dataclass(frozen=True, kw_only=True)
class PlaceImages:
    """The images of a place by split; `container` says what they lie in, the rest what was not taken as it is."""

    container: str
    splits: tuple[SplitImages, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()


def read_place(place: str | Path) -> PlaceImages:
    """Find the images of a place. Raises BadData where it cannot be used, or can be understood in two ways."""
    text, shown = os.fspath(place), printable_name(place)
    if "{split}" in text:
        return _sharded(expand_split_patterns(text), text, ())
    if text.startswith(REMOTE_PREFIXES) or (text.endswith(SHARD_SUFFIXES) and not os.path.isdir(text)):
        paths = expand_patterns(text)
        if not paths:
            raise BadData(f"{shown} is not there: expected tar shards or Parquet files")
        found, left_out = find_shards(paths, is_chosen=True)
        return _sharded(found, text, left_out)
    path = Path(text)
    if path.suffix.lower() in (*TABLE_SUFFIXES, LIST_SUFFIX) and path.is_file():
        listing = list_folder(path.parent)
        table = read_table(path.parent, path.name, ImageIndex(path.parent, listing.images))
        return _tabled(path.parent, listing, [table], [])
    if not os.path.isdir(text):
        if not os.path.exists(text):
            raise BadData(f"{shown} is not there: expected a folder of images, or the word digits")
        if path.suffix.lower() in ARCHIVE_SUFFIXES:
            raise BadData(f"{shown} is an archive: unpack it and give the folder")
        kind = left_out_kind(path.name, partial(read_first_bytes, path))
        why = f" ({left_out_reason(kind)})" if kind else ""
        raise BadData(f"{shown} is a file{why}: expected a folder of images, a table, tar shards or Parquet files")
    return _read_folder(path)


def _read_folder(place: Path) -> PlaceImages:
    shown, listing = printable_name(place), list_folder(place)
    shards = [name for suffix in SHARD_SUFFIXES for name in listing.others.get(suffix, ())]
    if not listing.images and shards:
        return _sharded_folder(place, listing, shards)
    if not listing.images:
        raise no_images_message(place, listing)
    tables, problems, several, unread = _tables(place, listing)
    by_folder: dict[str, list[LabelTable]] = defaultdict(list)
    for table in tables:
        folder = table.path.rpartition("/")[0]
        if any(parse_split_name(part) for part in folder.split("/") if part):
            by_folder[folder].append(table)
    chosen_in = {folder: _choose_tables(those, shown) for folder, those in by_folder.items()}
    inner = {folder: those[0] for folder, those in chosen_in.items() if len(those) == 1}
    outer = [table for table in tables if table.path.rpartition("/")[0] not in inner]
    problem: BadData | None = None
    arrangement = FolderRoles(folders=())
    tree = build_folder_tree(listing.images, listing.empty)
    try:
        arrangement = detect_folder_roles(tree, shown, {path: frozenset(t.labels) for path, t in inner.items()})
    except BadData as error:
        problem = error
    more = find_split_tables(outer) if isinstance(problem, NoClassFoldersError) else {}
    if more:  # such as LOC_val_solution.csv of val/
        inner |= more
        outer = [table for table in outer if table not in more.values()]
        try:
            arrangement = detect_folder_roles(tree, shown, {path: frozenset(t.labels) for path, t in inner.items()})
            problem = None
        except BadData:
            inner = {folder: table for folder, table in inner.items() if folder not in more}
            outer += more.values()
    lists, unread_lists = (
        [name for suffix in suffixes for name in listing.others.get(suffix, ()) if name.count("/") <= _TABLE_DEPTH]
        for suffixes in ((LIST_SUFFIX,), _LISTS)
    )
    if unread_lists:
        sentence = "lie there unread: save which image is of which class as labels.csv"
        unread = [*unread[:2], f"{join_names(unread_lists, 3)} {sentence}"]
    is_plain = not any(folder.split for folder in arrangement.folders)
    is_sure = not is_plain or any(len(folder.classes) > 1 for folder in arrangement.folders)
    if problem is None and is_plain and is_sure and not outer:
        given = zip(listing.images, assign_images(listing.images, arrangement), strict=True)
        classes = {image: folder[1] for image, folder in given if folder}
        outer = read_split_lists(place, lists, ImageIndex(place, listing.images), classes)
    tabled = [table for table in outer if not table.path.lower().endswith(LIST_SUFFIX)]
    try:
        chosen = _choose_tables(tabled or outer, shown)
        if chosen and (not is_sure or _prefers_tables(chosen, listing, arrangement, shown, problems)):
            return _tabled(place, listing, chosen, problems)
    except BadData as error:
        if tabled or problem or not is_sure:
            raise
        problems.append(
            f"{join_names([table.path for table in outer], 3)} beside the class folders stay unread: {error}"
        )
    if problem is None and (is_sure or not shards):
        problems += [] if is_sure else unread
        return _foldered(place, listing, arrangement, inner, problems)
    if shards and (problem is None or isinstance(problem, NoClassFoldersError)):
        return _sharded_folder(place, listing, shards)
    if isinstance(problem, NoClassFoldersError) and several:
        raise several
    if isinstance(problem, NoClassFoldersError):
        raise NoClassFoldersError("; ".join((str(problem), *problems[:2], *unread))) from problem
    assert problem is not None
    raise problem


# ----------------------------------------------------------------------------------------- class folders


def _foldered(
    place: Path, listing: FolderListing, arrangement: FolderRoles, tables: dict[str, LabelTable], notes: Sequence[str]
) -> PlaceImages:
    """Give the images of class folders; of split folders that have a table, those that it lists."""
    assigned = assign_images(listing.images, arrangement)
    by_split: dict[Split | None, list[int]] = defaultdict(list)
    for i, folder in enumerate(arrangement.folders):
        by_split[folder.split].append(i)
    splits, empty = [], []
    tables = {f.root: tables[f.root] for f in arrangement.folders if f.root in tables and not f.classes}
    for where, table in tables.items():
        _check_folders(table, where, printable_name(place))
    listed = {file for table in tables.values() for file in table.files}
    for split, numbers in by_split.items():
        folders = [arrangement.folders[i] for i in numbers]
        those = [f for f in folders if f.root in tables and not f.classes]
        if those and len(those) < len(folders):
            shown = " and ".join(folder.shown for folder in folders)
            where = printable_name(place)
            raise BadData(f"{where}: {shown} are both {split}, one by a table and one by folders: use one")
        if those:
            splits += [
                _table_split(place, tables[f.root], split, f.shown, range(len(tables[f.root].files))) for f in those
            ]
            continue
        members = [(a[1], image) for image, a in zip(listing.images, assigned, strict=True) if a and a[0] in numbers]
        members.sort(key=lambda member: member[0])  # stable: by class, then as they are listed
        root = folders[0].root if len(folders) == 1 else os.path.commonpath([f.root or "." for f in folders])
        shown = " and ".join(folder.shown for folder in folders) or "all images"
        labels = [label for label, _ in members]
        names = [image[len(root) + 1 :] if root and root != "." else image for _, image in members]
        splits.append(_files(place / root, names, labels, split, shown))
        unfilled = [name for folder in folders for name in folder.classes if name not in set(labels)]
        if unfilled and split in ("train", None):
            where = printable_name(place / root)
            raise BadData(f"class folders without images in {where}: {join_names(unfilled)}; fill or remove them")
        empty += unfilled
    unlabelled = {file for table in tables.values() for file in table.unlabelled} - listed
    rest = [image for image, a in zip(listing.images, assigned, strict=True) if a is None and image not in listed]
    rest = [image for image in rest if image not in unlabelled]
    kinds = [*(["class folders"] if any(f.classes for f in arrangement.folders) else [])]
    if set(by_split) == {None}:
        texts = [name for suffix in (".txt", ".json") for name in listing.others.get(suffix, ())]
        notes = [*notes, *_unread_lists_note(texts)]
    kinds += sorted({table.path.rpartition("/")[2] for table in tables.values()})
    return PlaceImages(
        container=" and ".join(kinds),
        splits=tuple(splits),
        left_out=(
            *left_out_images(rest, arrangement.reasons, "in no class folder"),
            *left_out_images(sorted(unlabelled), {}, "without a class or a split in their table"),
            *_files_left_out(listing, tables.values()),
        ),
        notes=(*arrangement.notes, *notes, *(note for table in tables.values() for note in table.notes)),
    )


def _unread_lists_note(names: Iterable[str]) -> list[str]:
    """Say which of these texts are called as if they said splits."""
    stems = {name: os.path.splitext(name)[0].rpartition("/")[2] for name in names}
    lists = [name for name, stem in stems.items() if not {*SPLIT_WORDS}.isdisjoint(split_into_words(stem))]
    sentence = "(lists that may say splits) stay unread: write splits into a table or folders"
    return [f"{join_names(lists, 3)} {sentence}"] if lists else []


def _check_folders(table: LabelTable, split: str, shown: str) -> None:
    """Raise BadData where a split's own table says other classes than the folders that its images lie in."""
    classes = set(table.labels)
    for file, label in zip(table.files, table.labels, strict=True):
        folder = file[len(split) :].strip("/").partition("/")[0]
        if folder in classes and folder != label:
            raise BadData(
                f"{shown}: {table.path} says other classes than the folders ({label} of {file}): move the table away "
                "for the folders, or put the images together for the table"
            )


def _files(root: Path, names: Sequence[str], labels: Sequence[str], split: Split | None, source: str) -> SplitImages:
    return SplitImages(
        split=split,
        source=source,
        labels=labels,
        open=lambda numbers, classes: ImageFiles(root, names, numbers, classes),
    )


def _files_left_out(listing: FolderListing, tables: Iterable[LabelTable]) -> list[LeftOut]:
    reasons = dict.fromkeys(
        SHARD_SUFFIXES, "beside images in folders, which count: give --data with its path to read it"
    )
    reasons |= dict.fromkeys(TABLE_SUFFIXES, "no table of labels, or not the one that counts")
    return listing.left_out({path for table in tables for path in (table.path, *table.parts)}, reasons)


# ------------------------------------------------------------------------------------------------ tables


def _tables(
    place: Path, listing: FolderListing
) -> tuple[list[LabelTable], list[str], MultiLabelError | None, list[str]]:
    """Read the tables of labels in a folder; gives them, why others cannot be used, and the error of a multi-label one.

    The last are the errors of files that are no tables of labels. Raises BadData where a labels.csv cannot be used.
    """
    names = [name for suffix in TABLE_SUFFIXES for name in listing.others.get(suffix, ())]
    names = [name for name in names if name.count("/") <= _TABLE_DEPTH and "submission" not in name.lower()]
    lists = [name for name in listing.others.get(LIST_SUFFIX, ()) if name.count("/") <= _TABLE_DEPTH]
    images, problems, unread, several = ImageIndex(place, listing.images), [], [], None
    tables: list[LabelTable] = []
    for name in [
        *sorted(names, key=lambda name: name.count("/"))[:_MAX_TABLES],
        *sorted(lists, key=lambda name: (name.count("/"), not name.lower().endswith(NUMBERED_IMAGES)))[:_MAX_TABLES],
    ]:
        if any(name in table.parts for table in tables):
            continue
        try:
            tables.append(read_table(place, name, images))
        except BadData as error:
            if name.rpartition("/")[2].lower() == _LABELS:
                raise
            several = error if isinstance(error, MultiLabelError) else several
            if not isinstance(error, NotATableError):
                problems.append(f"{printable_name(name)} is not used: {error}")
            elif not name.lower().endswith(LIST_SUFFIX):
                unread.append(f"{printable_name(name)} is not used: {error}")
    return tables, problems, several, unread


def _choose_tables(tables: Sequence[LabelTable], shown: str) -> list[LabelTable]:
    """Choose the one table that counts, or one for each split. Raises BadData where that is not plain."""
    if len(tables) < 2:
        return list(tables)
    roles = {table.path: said.split if (said := parse_split_name(Path(table.path).stem)) else None for table in tables}
    named = [table for table in tables if roles[table.path]]
    if named and len({roles[table.path] for table in named}) == len(named):
        return named
    if labels := [table for table in tables if Path(table.path).name.lower() == _LABELS]:
        return labels[:1]
    if all(
        set(zip(t.files, t.labels, strict=True)) == set(zip(tables[0].files, tables[0].labels, strict=True))
        for t in tables
    ):
        return [next((table for table in tables if table.splits), tables[0])]
    paths = [table.path for table in tables]
    several = join_names(paths)
    raise BadData(f"{shown} holds several tables of labels, {several}: give --data {shown}/{paths[0]} for one")


def _prefers_tables(
    tables: Sequence[LabelTable], listing: FolderListing, arrangement: FolderRoles, shown: str, notes: list[str]
) -> bool:
    """Whether tables count rather than the class folders beside them. Raises BadData where they contradict."""
    is_split = any(folder.split for folder in arrangement.folders)
    if not is_split and Path(tables[0].path).name.lower() == _LABELS:
        return True
    folders = dict(zip(listing.images, assign_images(listing.images, arrangement), strict=True))
    rows = [(file, label) for table in tables for file, label in zip(table.files, table.labels, strict=True)]
    pairs = {(given[1], label) for file, label in rows if (given := folders.get(file))}
    paths = join_names([table.path for table in tables])
    says_splits = len(tables) > 1 or any(table.splits for table in tables)
    labelled, listed = {file for file, given in folders.items() if given}, {file for file, _ in rows}
    covers = labelled < listed if is_split else labelled <= listed  # labels of a test/ without class folders
    if all(a == b for a, b in pairs):
        if says_splits and covers:
            return True
        if says_splits and not is_split:
            missing = len(labelled - listed)
            notes.append(
                f"{paths}: the splits are not used, since {missing} images in class folders are in none of them"
            )
        notes.append(f"{paths} says the same classes as the folders, which count")
        return False
    if len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}):
        folder, label = min(pairs)
        if says_splits and covers:
            notes.append(f"the classes are called as in {paths} ({label}), not as their folders ({folder})")
            return True
        notes.append(f"the classes are called as their folders ({folder}), not as in {paths} ({label})")
        return False
    if (
        len({"".join(c for c in name if not c.isdigit()) for f in arrangement.folders for name in f.classes} - {""})
        == 1
    ):
        return True  # parts of one archive: images_part_1, images_part_2
    (folder, label) = min((a, b) for a, b in pairs if a != b)
    raise BadData(
        f"{shown}: {paths} says other classes than the folders ({label} of an image in {folder}/): give --data "
        f"{shown}/{tables[0].path} for the table, or move the table away for the folders"
    )


def _tabled(place: Path, listing: FolderListing, tables: Sequence[LabelTable], notes: Sequence[str]) -> PlaceImages:
    splits = [split for table in tables for split in _splits_of(place, table)]
    listed = {file for table in tables for file in table.files}
    paths = [table.path for table in tables]
    unlabelled = {file for table in tables for file in table.unlabelled} - listed
    rest = [image for image in listing.images if image not in listed and image not in unlabelled]
    reasons = {}
    for folder in {image.rpartition("/")[0] for image in rest}:
        said = parse_split_name(folder.rpartition("/")[2])
        if said and said.split == "test" and not any(file.startswith(f"{folder}/") for file in listed):
            reasons[folder] = "no labels to score by"
    used = {path for table in tables for path in (table.path, *table.parts)}
    texts = [name for name in listing.others.get(LIST_SUFFIX, ()) if name not in used]
    return PlaceImages(
        container=join_names(paths),
        splits=tuple(splits),
        left_out=(
            *left_out_images(rest, reasons, f"not listed in {join_names(paths)}"),
            *left_out_images(sorted(unlabelled), {}, f"without a class or a split in {join_names(paths)}"),
            *_files_left_out(listing, tables),
        ),
        notes=(*notes, *_unread_lists_note(texts), *(note for table in tables for note in table.notes)),
    )


def _splits_of(place: Path, table: LabelTable) -> list[SplitImages]:
    """Divide a table: by its column, by its name (train.csv), by the folders of its images, or not at all."""
    rows: dict[Split | None, list[int]] = defaultdict(list)
    name = Path(table.path).name
    if table.splits is not None:
        for i, split in enumerate(table.splits):
            rows[split].append(i)
        return [_table_split(place, table, s, f"{name} (its column says {s})", rows[s]) for s in rows]
    if said := parse_split_name(Path(table.path).stem):
        return [_table_split(place, table, said.split, name, range(len(table.files)))]
    if by_folder := splits_by_folder_name(table.files):
        for i, split in enumerate(by_folder):
            rows[split].append(i)
        return [_table_split(place, table, split, f"{name} ({split}: by folders)", rows[split]) for split in rows]
    return [_table_split(place, table, None, name, range(len(table.files)))]


def _table_split(place: Path, table: LabelTable, split: Split | None, source: str, rows: Sequence[int]) -> SplitImages:
    """Give some rows of a table; the names are relative to the table's folder."""
    folder = table.path.rpartition("/")[0]
    names = [os.path.relpath(table.files[i], folder or ".").replace(os.sep, "/") for i in rows]
    labels = [table.labels[i] for i in rows]
    root = place / folder
    return SplitImages(
        split=split,
        source=source,
        labels=labels,
        numbered=table.numbered,
        open=lambda numbers, classes: ImageFiles(root, names, numbers, classes),
    )


# ------------------------------------------------------------------------------------------------ shards


def _sharded_folder(place: Path, listing: FolderListing, names: Sequence[str]) -> PlaceImages:
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
    images = left_out_images(listing.images, {}, "beside shards")
    return _sharded(found, os.fspath(place), (*left_out, *images, *listing.left_out(set(names))))


def _sharded(found: Mapping[Split | None, Sequence[str]], shown: str, left_out: Sequence[LeftOut]) -> PlaceImages:
    splits, more, notes = read_shards(found, printable_name(shown))
    kind = (
        "Parquet files"
        if any(path.endswith(".parquet") for paths in found.values() for path in paths)
        else "tar shards"
    )
    return PlaceImages(container=kind, splits=tuple(splits), left_out=(*more, *left_out), notes=tuple(notes))
