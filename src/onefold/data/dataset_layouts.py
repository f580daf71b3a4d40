"""Layouts of datasets: the images that a folder, table, shards or pattern holds, their classes by name, and the splits.

| place | images and classes |
|---|---|
| a folder of class folders; of splits with class folders; of class folders with splits in them | the folders |
| the same inside one folder more (an unpacked archive) | the same |
| a folder with a table, or with one in each split; a table by itself | see tables.py |
| tar shards, Parquet files, patterns of them, URLs; a folder with them | see shard_patterns.py |

Of several in one folder that one counts that says most of the images: labels.csv; then class folders; then other
tables; then shards. A table that contradicts the class folders is refused. What is not used is left out, and said.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from onefold.data.class_difference import ClassDifferenceError
from onefold.data.class_names import find_class_names, hint_of_names, name_numbered_classes
from onefold.data.dataset_info import PlaceImages, Split, SplitImages
from onefold.data.decode import (
    ARCHIVE_SUFFIXES,
    HEIC_SUFFIXES,
    MASK_KIND,
    left_out_kind,
    left_out_reason,
    printable_name,
    read_first_bytes,
)
from onefold.data.folder_roles import (
    FolderRoles,
    NoClassFoldersError,
    assign_images,
    detect_folder_roles,
)
from onefold.data.folders import (
    Folder,
    FolderListing,
    ImageFiles,
    build_folder_tree,
    join_names,
    left_out_images,
    list_folder,
    no_images_message,
)
from onefold.data.group_columns import group_class_folders, group_tables
from onefold.data.image_lists import LIST_SUFFIX
from onefold.data.json_tables import JSON_SUFFIX
from onefold.data.match_table_paths import ImageIndex
from onefold.data.parquet import is_parquet_table
from onefold.data.photo_copies import THUMBNAIL_KIND
from onefold.data.pixel_tables import find_pixel_columns, read_pixel_tables
from onefold.data.remote_files import REMOTE_PREFIXES
from onefold.data.repeated_images import without_copies
from onefold.data.shard_folders import read_shard_folder, read_shard_pattern
from onefold.data.shard_patterns import SHARD_SUFFIXES
from onefold.data.split_lists import divide_by_lists, read_split_lists, unread_lists_note
from onefold.data.splits import parse_split_name
from onefold.data.table_columns import MultiLabelError
from onefold.data.table_layouts import (
    TABLE_DEPTH,
    are_parts,
    choose_tables,
    find_split_tables,
    find_tables,
    left_out_files,
    match_folder_forms,
    prefer_tables,
    read_tabled,
    table_split,
)
from onefold.data.tables import LABEL_TABLE_SUFFIXES as TABLE_SUFFIXES
from onefold.data.tables import LabelTable, read_table
from onefold.errors import BadData
from onefold.file_io import suggest_path

_LISTS = (".json", ".xlsx", ".xls", ".ods", ".txt", ".xml", ".mat")  # may say classes, in forms that are not read


def read_place(place: str | Path) -> PlaceImages:
    """Find the images of a place. Raises BadData where it cannot be used, or can be understood in two ways."""
    text, shown = os.fspath(place), printable_name(place)
    is_pattern = "{split}" in text or text.startswith(REMOTE_PREFIXES)
    path = Path(text)
    is_table = not is_pattern and text.endswith(".parquet") and is_parquet_table(path)
    if is_pattern or (text.endswith(SHARD_SUFFIXES) and not os.path.isdir(text) and not is_table):
        return read_shard_pattern(text)
    if path.suffix.lower() in (*TABLE_SUFFIXES, LIST_SUFFIX, JSON_SUFFIX) and path.is_file():
        if find_pixel_columns(path):
            return read_pixel_tables(path.parent, [path.name], ())
        listing = list_folder(path.parent)
        table = read_table(path.parent, path.name, ImageIndex(path.parent, listing.images))
        return read_tabled(path.parent, listing, [table], [])
    if not os.path.isdir(text):
        if not os.path.exists(text):
            raise BadData(f"{shown} is not there: expected a folder of images, or the word digits{suggest_path(text)}")
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
        return read_shard_folder(place, listing, shards)
    if not listing.images:
        tables = [name for suffix in TABLE_SUFFIXES for name in listing.others.get(suffix, ())]
        if of_pixels := [name for name in tables if find_pixel_columns(place / name)]:
            return read_pixel_tables(place, of_pixels, listing.left_out({*of_pixels}))
        raise no_images_message(place, listing)
    listing, copies, notes = without_copies(place, listing)
    read = _read_listing(place, shown, listing, shards, notes)
    return replace(read, left_out=(*read.left_out, *copies))


def _read_listing(
    place: Path, shown: str, listing: FolderListing, shards: Sequence[str], notes: list[str]
) -> PlaceImages:
    found = find_tables(place, listing, ImageIndex(place, listing.images))
    unread = found.unread
    notes += found.problems
    inner, outer = _tables_in_splits(found.tables, listing, shown, notes)
    problem: BadData | None = None
    arrangement = FolderRoles(folders=())
    tree = build_folder_tree(listing.images, listing.empty)
    try:
        arrangement = _detect(tree, shown, inner)
    except BadData as error:
        problem = error
    more = _find_split_tables(outer, listing) if isinstance(problem, NoClassFoldersError) else {}
    if more:  # such as LOC_val_solution.csv of val/
        said: list[str] = []
        names = {image.rpartition("/")[0].rpartition("/")[2] for image in listing.images}
        named = {
            folder: name_numbered_classes(place, listing, [table], said)[0] if not names & {*table.labels} else table
            for folder, table in more.items()
        }
        named = _in_folders_forms(named, listing)
        try:
            arrangement, problem = _detect(tree, shown, inner | named), None
            inner, outer = (
                inner | named,
                [table for table in outer if table.path not in {t.path for t in named.values()}],
            )
            notes += said
        except ClassDifferenceError as error:
            raise _unnamed_numbers(error, shown, list(named.values())) or error from error
        except BadData:
            pass
    unread_lists = [
        name for suffix in _LISTS for name in listing.others.get(suffix, ()) if name.count("/") <= TABLE_DEPTH
    ]
    if unread_lists:
        sentence = "lie there unread: save which image is of which class as labels.csv"
        unread = [*unread[:2], f"{join_names(unread_lists, 3)} {sentence}"]
    is_plain = not any(folder.split for folder in arrangement.folders)
    is_sure = not is_plain or any(len(folder.classes) > 1 for folder in arrangement.folders)
    tabled = [table for table in outer if not table.path.lower().endswith(LIST_SUFFIX)]
    if found.is_all_refused and found.refused and not tabled and _are_no_classes(arrangement):
        raise found.refused
    if problem is None and is_plain and is_sure:
        class_names = {name for folder in arrangement.folders for name in folder.classes}
        if are_parts(class_names):
            if found.refused and not tabled:
                raise found.refused
            which = join_names(sorted(class_names), 3)
            notes += [] if tabled else [f"{which} are classes here: if they are parts of one dataset, add a labels.csv"]
    if problem is None and is_sure and not outer and all(folder.split != "val" for folder in arrangement.folders):
        given = zip(listing.images, assign_images(listing.images, arrangement), strict=True)
        classes = {image: folder[1] for image, folder in given if folder}
        outer = read_split_lists(place, listing, classes)
    try:
        chosen: Sequence[LabelTable] = choose_tables(tabled or outer, shown, notes)
        chosen = divide_by_lists(place, listing, chosen, notes)
        paths = join_names([table.path for table in chosen])
        if chosen and (preferred := prefer_tables(chosen, listing, arrangement, shown, notes) if is_sure else chosen):
            return read_tabled(place, listing, preferred, notes)
    except BadData as error:
        are_of_splits = len(outer) > 1 and all(parse_split_name(Path(table.path).stem) for table in outer)
        if tabled or problem or not is_sure or are_of_splits:
            raise
        notes.append(f"{join_names([table.path for table in outer], 3)} beside the class folders stay unread: {error}")
    else:
        if more := {f: t for f, t in _find_split_tables(outer, listing).items() if f in arrangement.reasons}:
            arrangement, inner = _detect(tree, shown, inner | more), inner | more  # of a test/ without class folders
        if chosen and not {table.path for table in chosen} & {table.path for table in inner.values()}:
            assigned = zip(listing.images, assign_images(listing.images, arrangement), strict=True)
            if {image for image, given in assigned if given}.isdisjoint(
                file for table in chosen for file in table.files
            ):
                notes.append(f"{paths} is not used: it labels none of the images in class folders")
    if problem is None and (is_sure or not shards):
        return _foldered(place, listing, arrangement, inner, notes if is_sure else [*notes, *unread])
    if shards and (problem is None or isinstance(problem, NoClassFoldersError)):
        return read_shard_folder(place, listing, shards)
    if isinstance(problem, NoClassFoldersError) and isinstance(found.refused, MultiLabelError):
        raise found.refused
    if isinstance(problem, NoClassFoldersError):
        hints = [*found.problems[:2], *unread, *hint_of_names(listing.images)]
        raise NoClassFoldersError("; ".join((str(problem), *hints))) from problem
    assert problem is not None
    raise problem


def _unnamed_numbers(error: ClassDifferenceError, shown: str, tables: Sequence[LabelTable]) -> BadData | None:
    """Give the error of a val whose table numbers the classes that the folders of train name; None where it is none."""
    numbering = [table for table in tables if all(map(str.isdecimal, table.labels))]
    if not numbering or all(map(str.isdecimal, error.classes)):
        return None
    names = join_names(sorted(error.classes), 3)
    seen = f"{join_names([table.path for table in numbering])} numbers its classes, and train names them ({names})"
    return BadData(
        f"{shown}: {seen}: nothing says which is which. Write a classes.txt into {shown}, a line a class as train "
        "calls it, in the order of the numbers"
    )


def _are_no_classes(arrangement: FolderRoles) -> bool:
    """Whether folders are hardly the classes: none, or one, or they differ by numbers alone (patient00017)."""
    names = {name for folder in arrangement.folders for name in folder.classes}
    return len(names) < 2 or (
        not all(name.isdecimal() for name in names) and len({re.sub(r"\d+", "", name) for name in names}) == 1
    )


def _detect(tree: Folder, shown: str, tables: Mapping[str, LabelTable]) -> FolderRoles:
    return detect_folder_roles(tree, shown, {path: frozenset(table.labels) for path, table in tables.items()})


def _tables_in_splits(
    tables: Sequence[LabelTable], listing: FolderListing, shown: str, notes: list[str]
) -> tuple[dict[str, LabelTable], list[LabelTable]]:
    """Divide tables into those of one split's folder, by that folder, and all others."""
    by_folder: dict[str, list[LabelTable]] = defaultdict(list)
    for table in tables:
        folder = table.path.rpartition("/")[0]
        if any(parse_split_name(part) for part in folder.split("/") if part):
            by_folder[folder].append(table)
    chosen = {folder: choose_tables(those, shown, notes) for folder, those in by_folder.items()}
    inner = {f: those[0] for f, those in chosen.items() if len(those) == 1 and not _lists_part(those[0], f, listing)}
    outer = [table for table in tables if table.path.rpartition("/")[0] not in inner]
    for folder, table in [*inner.items()]:  # Final_Test/Images/GT-final_test.csv is of Final_Test
        parts = folder.split("/")
        while not parse_split_name(parts[-1]):
            parts.pop()
        split = "/".join(parts)
        num_below = sum(image.startswith(f"{split}/") for image in listing.images)
        if split not in inner and 2 * len(table.files) > num_below:
            inner[split] = inner.pop(folder)
    return _in_folders_forms(inner, listing), outer


def _lists_part(table: LabelTable, folder: str, listing: FolderListing) -> bool:
    """Whether a table lists less than half of a split's images, and the others lie in folders as the listed ones do."""
    below = [image for image in listing.images if image.startswith(f"{folder}/")]
    return 2 * len(table.files) < len(below) and all("/" in image[len(folder) + 1 :] for image in below)


def _find_split_tables(tables: Sequence[LabelTable], listing: FolderListing) -> dict[str, LabelTable]:
    return _in_folders_forms(find_split_tables(tables), listing)


def _in_folders_forms(tables: Mapping[str, LabelTable], listing: FolderListing) -> dict[str, LabelTable]:
    """Give tables whose numbers are written as the class folders write theirs."""
    names = {image.rpartition("/")[0].rpartition("/")[2] for image in listing.images}
    return {folder: match_folder_forms(table, names) for folder, table in tables.items()}


# ----------------------------------------------------------------------------------------- class folders


def _foldered(
    place: Path, listing: FolderListing, arrangement: FolderRoles, tables: dict[str, LabelTable], notes: Sequence[str]
) -> PlaceImages:
    """Give the images of class folders; of split folders that have a table, those that it lists."""
    assigned = assign_images(listing.images, arrangement)
    by_split: dict[Split | None, list[int]] = defaultdict(list)
    for i, folder in enumerate(arrangement.folders):
        by_split[folder.split].append(i)
    splits: list[SplitImages] = []
    images_of: list[list[str]] = []
    empty: list[str] = []
    notes = [*notes]
    tables = {f.root: tables[f.root] for f in arrangement.folders if f.root in tables and not f.classes}
    tables = dict(zip(tables, group_tables(place, listing, [*tables.values()]), strict=True))
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
                table_split(place, tables[f.root], split, f.shown, range(len(tables[f.root].files))) for f in those
            ]
            continue
        members = [(a[1], image) for image, a in zip(listing.images, assigned, strict=True) if a and a[0] in numbers]
        members.sort(key=lambda member: member[0])  # stable: by class, then as they are listed
        root = folders[0].root if len(folders) == 1 else os.path.commonpath([f.root or "." for f in folders])
        shown = " and ".join(folder.shown for folder in folders) or "all images"
        labels = [label for label, _ in members]
        images_of.append([image for _, image in members])
        names = [image[len(root) + 1 :] if root and root != "." else image for _, image in members]
        splits.append(_files(place / root, names, labels, split, shown))
        unfilled = [name for folder in folders for name in folder.classes if name not in set(labels)]
        if unfilled and split in ("train", None):
            where = printable_name(place / root)
            raise BadData(f"class folders without images in {where}: {join_names(unfilled)}; fill or remove them")
        empty += unfilled
    paths: list[str] = []
    if not tables:
        splits, names_paths = _name_folders(place, listing, splits, notes)
        splits, paths = group_class_folders(place, listing, splits, images_of, notes)
        paths += names_paths
    notes = [*notes, *_notes_of_bare_folders(listing, arrangement, printable_name(place))]
    reasons = {folder: f"not listed in {table.path}" for folder, table in tables.items()}
    unlabelled = {file for table in tables.values() for file in table.unlabelled} - listed
    rest = [image for image, a in zip(listing.images, assigned, strict=True) if a is None and image not in listed]
    rest = [image for image in rest if image not in unlabelled]
    kinds = [*(["class folders"] if any(f.classes for f in arrangement.folders) else [])]
    if "val" not in by_split:
        texts = [name for suffix in (".txt", ".json", ".mat") for name in listing.others.get(suffix, ())]
        notes = [*notes, *unread_lists_note(texts)]
    kinds += sorted({table.path.rpartition("/")[2] for table in tables.values()})
    return PlaceImages(
        container=" and ".join(kinds),
        splits=tuple(splits),
        left_out=(
            *left_out_images(rest, {**arrangement.reasons, **reasons}, "in no class folder"),
            *left_out_images(sorted(unlabelled), {}, "without a class or a split in their table"),
            *left_out_files(listing, tables.values(), paths),
        ),
        notes=(*arrangement.notes, *notes, *(note for table in tables.values() for note in table.notes)),
    )


def _name_folders(
    place: Path, listing: FolderListing, splits: list[SplitImages], notes: list[str]
) -> tuple[list[SplitImages], tuple[str, ...]]:
    """Give splits of folders that are called by numbers with the names that a file says for these, and this file."""
    numbers = {label for split in splits for label in split.labels}
    if not all(map(str.isdecimal, numbers)) or len({*map(int, numbers)}) < len(numbers):
        return splits, ()
    names, paths = find_class_names(place, listing, numbers, (), notes)
    unused = tuple(f"{printable_name(path)} is not used: " for path in paths)  # as tables, which they are none of
    notes[:] = [note for note in notes if not note.startswith(unused)] if unused else notes
    if not names:
        return splits, ()
    ordered = [names[number] for number in sorted(numbers, key=int)]
    return [
        replace(
            split,
            labels=(labels := [names[label] for label in split.labels]),
            numbered=tuple(name for name in ordered if name in {*labels}),
        )
        for split in splits
    ], paths


def _notes_of_bare_folders(listing: FolderListing, arrangement: FolderRoles, shown: str) -> list[str]:
    """Say which folders beside the classes hold files and no image, so that they are no classes.

    Raises BadData where these are photos that another package reads.
    """
    bare: dict[str, Counter[str]] = defaultdict(Counter)
    for root in {folder.root for folder in arrangement.folders if folder.classes}:
        prefix = f"{root}/" if root else ""
        with_images = {image[len(prefix) :].partition("/")[0] for image in listing.images if image.startswith(prefix)}
        for kind, names in listing.others.items():
            for name in names if kind not in (MASK_KIND, THUMBNAIL_KIND) else ():
                child, slash, _ = name[len(prefix) :].partition("/")
                if name.startswith(prefix) and slash and child not in with_images and not parse_split_name(child):
                    bare[prefix + child][kind] += 1
    for folder, kinds in sorted(bare.items()):
        if photos := sorted(HEIC_SUFFIXES & kinds.keys()):
            which = f"{folder}/ holds {kinds[photos[0]]} {photos[0]} files and no image that is read"
            raise BadData(f"{shown}: {which}: {left_out_reason(photos[0])}; or move the folder away")
    shown = join_names([f"{folder}/" for folder in sorted(bare)], 3)
    return [f"no class of {shown}, where there are files and no image"] if bare else []


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
