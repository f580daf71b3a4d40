"""Tables beside images: which of them count, rather than the class folders, and how they divide into splits.

labels.csv counts before class folders, and other tables where they say splits, or where the folders are parts of one
dataset (`images_001`, `batch_2`): then folders say nothing. Numbers of classes that folders name are called as those.
Where two say different classes of an image the one that counts is said, with how many images, or both are refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from onefold.data.class_names import name_numbered_classes, rename_classes
from onefold.data.dataset_info import LeftOut, PlaceImages, Split, SplitImages
from onefold.data.decode import printable_name
from onefold.data.folder_roles import FolderRoles, assign_images
from onefold.data.folders import FolderListing, ImageFiles, join_names, left_out_images
from onefold.data.group_columns import group_tables
from onefold.data.image_lists import LIST_SUFFIX, NUMBERED_IMAGES
from onefold.data.json_tables import JSON_SUFFIX
from onefold.data.match_table_paths import ImageIndex, OtherImagesError
from onefold.data.shard_patterns import SHARD_SUFFIXES
from onefold.data.split_lists import divide_by_lists, refuse_partitions, said_splits, test_beside, unread_lists_note
from onefold.data.splits import parse_split_name, split_into_words, splits_by_folder_name
from onefold.data.table_columns import MultiLabelError, NotATableError, normalize_number
from onefold.data.tables import LABEL_TABLE_SUFFIXES, LabelTable, read_table
from onefold.errors import BadData
from onefold.file_io import normalize_class_name

TABLE_DEPTH = 2
"""The folders above a table, or a list, that is read."""

_SHORT_HEX = re.compile(r"[0-9a-fA-F]{1,3}")
_MAX_TABLES = 50  # files of a folder that are tried as tables
_LABELS = "labels.csv"
_OUTPUT_WORDS = frozenset(
    ("submission", "submissions", "prediction", "predictions", "preds")
)  # written by somebody's network
_PART_WORDS = frozenset(
    (
        "part",
        "batch",
        "chunk",
        "shard",
        "piece",
        "block",
        "section",
        "folder",
        "dir",
        "archive",
        "zip",
        "disk",
        "volume",
    )
) | {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pics", "data", "set", "subset", "jpg"}


@dataclass(frozen=True, kw_only=True)
class FoundTables:
    """The tables of labels of a place; `problems` and `unread` say of other files why they are not used.

    `refused` is the error of a table that names images and cannot be used, one of several classes an image first;
    `is_all_refused` whether tables of several classes an image list most of the images.
    """

    tables: list[LabelTable]
    problems: list[str]
    unread: list[str]
    refused: BadData | None
    is_all_refused: bool = False


def find_tables(place: Path, listing: FolderListing, images: ImageIndex) -> FoundTables:
    """Read the tables of labels in a folder. Raises BadData where a labels.csv cannot be used."""
    names = [name for suffix in LABEL_TABLE_SUFFIXES for name in listing.others.get(suffix, ())]
    outputs = [name for name in names if _OUTPUT_WORDS & {*split_into_words(name.rpartition("/")[2])}]
    names = [name for name in names if name.count("/") <= TABLE_DEPTH and name not in outputs]
    lists = [name for name in listing.others.get(LIST_SUFFIX, ()) if name.count("/") <= TABLE_DEPTH]
    problems: list[str] = []
    unread = [f"{join_names(outputs, 2)}: answers of a network by the name, and no labels"] if outputs else []
    refused: BadData | None = None
    tables: list[LabelTable] = []
    multi_label: set[str] = set()
    values = [name for name in listing.others.get(JSON_SUFFIX, ()) if name.count("/") <= TABLE_DEPTH]
    for name in [
        *sorted(names, key=lambda name: name.count("/"))[:_MAX_TABLES],
        *sorted(lists, key=lambda name: (name.count("/"), not name.lower().endswith(NUMBERED_IMAGES)))[:_MAX_TABLES],
        *sorted(values, key=lambda name: name.count("/"))[:_MAX_TABLES],
    ]:
        if any(name in table.parts for table in tables) or (
            name in values and any(table.path not in values for table in tables)
        ):
            continue
        try:
            tables.append(read_table(place, name, images))
        except BadData as error:
            folder, slash, base = name.rpartition("/")
            is_of_all = all(image.startswith(folder + slash) for image in listing.images)
            if base.lower() == _LABELS and is_of_all and not isinstance(error, OtherImagesError):
                raise
            multi_label |= error.images if isinstance(error, MultiLabelError) else frozenset()
            sentence = f"{printable_name(name)} is not used: {error}"
            if not isinstance(error, NotATableError):
                problems.append(sentence)
                is_first = refused is None or not isinstance(refused, MultiLabelError)
                refused = error if refused is None or (is_first and isinstance(error, MultiLabelError)) else refused
            elif not name.lower().endswith((LIST_SUFFIX, JSON_SUFFIX)):
                unread.append(sentence)
    of_class = [table for table in tables if _is_of_one_class_folder(table)]
    if len(of_class) > 1:
        tables = [table for table in tables if table not in of_class]
    is_all = 2 * len(multi_label) > len(images)
    return FoundTables(tables=tables, problems=problems, unread=unread, refused=refused, is_all_refused=is_all)


def _is_of_one_class_folder(table: LabelTable) -> bool:
    """Whether a table lists one class only, and nothing but images of the folder that it lies in."""
    folder = table.path.rpartition("/")[0]
    is_split = parse_split_name(folder.rpartition("/")[2]) is not None
    return (
        bool(folder)
        and not is_split
        and len({*table.labels}) == 1
        and {file.rpartition("/")[0] for file in table.files} == {folder}
    )


def choose_tables(tables: Sequence[LabelTable], shown: str, notes: list[str]) -> list[LabelTable]:
    """Choose the one table that counts, or one for each split. Raises BadData where that is not plain.

    A table whose column of classes is one by what it holds alone counts where no other has one by its name.
    """
    tables = [table for table in tables if not table.is_guessed] or tables
    if len(tables) < 2:
        return list(tables)
    roles = {table.path: said.split if (said := parse_split_name(Path(table.path).stem)) else None for table in tables}
    named = [table for table in tables if roles[table.path]]
    labels = [table for table in tables if Path(table.path).name.lower() == _LABELS]
    if named and len({roles[table.path] for table in named}) == len(named):
        chosen = named
    elif labels:
        for table in labels[1:]:
            if disagreement := _disagreement(table, labels[:1]):
                raise BadData(
                    f"{shown}: {disagreement}: give --data {shown}/{labels[0].path} for one, or move one away"
                )
        chosen = labels[:1]
    elif all(
        set(zip(t.files, t.labels, strict=True)) == set(zip(tables[0].files, tables[0].labels, strict=True))
        for t in tables
    ):
        return [next((table for table in tables if table.splits), tables[0])]
    else:
        paths = [table.path for table in tables]
        if len(named) > 1 and all({*table.labels} <= {"-1", "0", "1"} for table in named):  # PASCAL VOC's
            raise BadData(
                f"{shown}: {join_names(paths, 3)} say yes or no to one class each (1, -1), so that an image may be of "
                "several (multi-label), which is not supported: write a labels.csv (file,label) with one class an image"
            )
        refuse_partitions([table.path for table in named], shown)
        raise BadData(
            f"{shown} holds several tables of labels, {join_names(paths)}: give --data {shown}/{paths[0]} for one"
        )
    for table in tables:
        if table not in chosen and (disagreement := _disagreement(table, chosen)):
            notes.append(f"{disagreement}: {join_names([table.path for table in chosen])} counts")
    return chosen


def _disagreement(table: LabelTable, others: Sequence[LabelTable]) -> str:
    """Say of how many images a table gives other classes than others do; "" where none, or where names alone differ."""
    known = {file: label for other in others for file, label in zip(other.files, other.labels, strict=True)}
    pairs = [(file, label, known[file]) for file, label in zip(table.files, table.labels, strict=True) if file in known]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    if not differing or _is_renaming({(label, wanted) for _, label, wanted in pairs}):
        return ""
    file, label, wanted = map(printable_name, differing[0])
    return (
        f"{table.path} says another class than {join_names([other.path for other in others])} of {len(differing)} of "
        f"{len(pairs)} images ({file}: {label}, not {wanted})"
    )


def _is_renaming(pairs: Collection[tuple[str, str]]) -> bool:
    """Whether pairs give each class one other name: cat is 0 and dog is 1, but not cat is dog and dog is cat."""
    is_bijection = len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    return is_bijection and {a for a, b in pairs if a != b}.isdisjoint(b for a, b in pairs if a != b)


def are_parts(names: Collection[str]) -> bool:
    """Whether folders are called as parts of one dataset: images_001 and images_002, part1, batch_2, data-03."""
    words = [split_into_words(name) for name in names]
    forms = {tuple(word for word in those if not word.isdecimal()) for those in words}
    has_number = all(any(word.isdecimal() for word in those) for those in words)
    return len(words) > 1 and has_number and len(forms) == 1 and not _PART_WORDS.isdisjoint(next(iter(forms)))


def are_beginnings(images: Sequence[str], arrangement: FolderRoles) -> bool:
    """Whether folders are the first hexadecimal digits of their images' names, as in 0/7/e/07e1.jpg."""
    names = set()
    for image, given in zip(images, assign_images(images, arrangement), strict=True):
        *folders, file = image.split("/")
        digits = list(takewhile(_SHORT_HEX.fullmatch, reversed(folders)))[::-1]
        if given and not (given[1] in digits and file.lower().startswith("".join(digits).lower())):
            return False
        names |= {given[1]} if given else set()
    return len(names) > 1


def prefer_tables(
    tables: Sequence[LabelTable], listing: FolderListing, arrangement: FolderRoles, shown: str, notes: list[str]
) -> Sequence[LabelTable] | None:
    """Give the tables where they count rather than the class folders beside them, classes called as the folders.

    Raises BadData where they contradict each other.
    """
    is_split = any(folder.split for folder in arrangement.folders)
    is_labels = not is_split and any(
        Path(name).name.lower() == _LABELS for name in (tables[0].path, *tables[0].parts[:1])
    )
    folders = dict(zip(listing.images, assign_images(listing.images, arrangement), strict=True))
    paths = join_names([*dict.fromkeys(path for table in tables for path in (*table.parts[:1], table.path))])
    if named := _name_numbers(tables, {file: given[1] for file, given in folders.items() if given}, paths, notes):
        tables = named
    rows = [(file, label) for table in tables for file, label in zip(table.files, table.labels, strict=True)]
    given_rows = [(file, given[1], label) for file, label in rows if (given := folders.get(file))]
    pairs = Counter((folder, label) for _, folder, label in given_rows)
    differing = [row for row in given_rows if row[1] != row[2]]
    seen = "".join(
        f"({label} of {file}; {len(differing)} of {len(given_rows)} images)" for file, _, label in differing[:1]
    )
    says_splits = len(tables) > 1 or any(table.splits for table in tables)
    labelled, listed = {file for file, given in folders.items() if given}, {file for file, _ in rows}
    splits = {file: arrangement.folders[given[0]].split for file, given in folders.items() if given}
    moved = [(file, said, splits[file]) for file, said in said_splits(tables) if splits.get(file) not in (None, said)]
    is_finer = "val" not in splits.values() and bool(moved) and all(each[1:] == ("val", "train") for each in moved)
    covers = labelled < listed if is_split and not is_finer else labelled <= listed  # also a test/ without folders
    class_names = {name for folder in arrangement.folders for name in folder.classes}
    if not is_split and are_parts(class_names) and 2 * len(given_rows) >= len(labelled):
        return tables
    if differing and are_beginnings(listing.images, arrangement):
        return tables
    if is_labels:
        if differing and not _is_renaming(pairs):
            notes.append(f"{paths} says other classes than the folders {seen}: {paths} counts")
        return tables
    if not pairs:
        return None
    is_preferred = says_splits and covers and (not differing or _is_renaming(pairs))
    if is_finer and not differing and (tested := test_beside(tables, arrangement, folders)):
        return [*tables, tested]
    if moved and not (is_finer and is_preferred):
        file, said, split = moved[0]
        which = f"({said}, not {split}, of {file}; {len(moved)} of {len(given_rows)} images)"
        path = tables[0].path
        advice = "" if path.lower().endswith(LIST_SUFFIX) else f": give --data {shown}/{path} for the table"
        other = "and counts" if is_preferred else f"which count{advice}"
        notes.append(f"{paths} says other splits than the folders {which}, {other}")
    if not differing:
        if says_splits and covers:
            return tables
        if says_splits and not is_split:
            missing = len(labelled - listed)
            notes.append(
                f"{paths}: the splits are not used, since {missing} images in class folders are in none of them"
            )
        if not named:
            notes.append(f"{paths} says the same classes as the folders, which count")
        return None
    if _is_renaming(pairs):
        folder, label = min(pairs)
        if says_splits and covers:
            notes.append(f"the classes are called as in {paths} ({label}), not as their folders ({folder})")
            return tables
        notes.append(f"the classes are called as their folders ({folder}), not as in {paths} ({label})")
        return None
    is_mostly_same = 2 * len(differing) < len(given_rows)
    if len({"".join(c for c in name if not c.isdigit()) for name in class_names} - {""}) == 1 and not is_mostly_same:
        return tables  # parts of one archive, whatever they are called
    inner = {image: given[1] for image, given in folders.items() if given}
    direct = {name for image, name in inner.items() if normalize_class_name(image.split("/")[-2]) == name}
    if says_splits and labelled <= listed and (deep := sorted(class_names - direct)):
        notes.append(f"{join_names(deep, 3)} hold folders alone and are no classes: {paths} counts {seen}")
        return tables
    names_of = {folder: {label for f, label in pairs if f == folder} for folder in class_names}
    if says_splits and labelled <= listed and all(len(those) == 1 for those in names_of.values()):
        notes.append(f"{paths} puts the {len(class_names)} folders into other classes {seen}, and counts")
        return tables
    if all(table.is_guessed for table in tables):
        notes.append(f"{paths} says something else of the images than the folders {seen}, which count")
        return None
    raise BadData(
        f"{shown}: {paths} says other classes than the folders {seen}: give --data {shown}/{tables[0].path} for the "
        "table, or move the table away for the folders"
    )


def _name_numbers(
    tables: Sequence[LabelTable], folders: Mapping[str, str], paths: str, notes: list[str]
) -> list[LabelTable]:
    """Give the tables with the folders' names for their numbers; none where they have names, or not one for each."""
    rows = [
        (folders[f], label)
        for table in tables
        for f, label in zip(table.files, table.labels, strict=True)
        if f in folders
    ]
    pairs = set(rows)
    numbers = {label for table in tables for label in table.labels}
    is_numbered = all(map(str.isdecimal, numbers)) and not all(name.isdecimal() for name, _ in pairs)
    if not pairs or not is_numbered or not _is_renaming(pairs) or numbers != {label for _, label in pairs}:
        return []
    names = {label: name for name, label in pairs}
    said = [f"{number} is {names[number]}" for number in sorted(names, key=int)]
    notes.append(f"{paths} numbers the classes that the folders name: {join_names(said, 3)}")
    return [rename_classes(table, names) for table in tables]


def match_folder_forms(table: LabelTable, folder_names: Collection[str]) -> LabelTable:
    """Give a table with its classes as the class folders write them: 00007 for 7, field-wild for Field/Wild."""

    def form(name: str) -> str:
        return normalize_number(name) or re.sub(r"[\W_]+", " ", name.casefold()).strip()

    forms: dict[str, set[str]] = defaultdict(set)
    for name in folder_names:
        forms[form(name)].add(name)
    names = {label: forms.get(form(label), set()) for label in table.labels}
    found = {label: next(iter(those)) for label, those in names.items() if len(those) == 1}
    is_told = len(found) == len(names) == len({*found.values()}) and not names.keys() <= {*folder_names}
    return rename_classes(table, found) if is_told else table


def find_split_tables(tables: Sequence[LabelTable]) -> dict[str, LabelTable]:
    """Give the tables that label the images of one val or test folder, by that folder."""
    found: dict[str, list[LabelTable]] = defaultdict(list)
    for table in tables:
        folders = {file.rpartition("/")[0] for file in table.files}
        parts = folders.pop().split("/") if len(folders) == 1 else []
        named = [i for i, part in enumerate(parts) if (said := parse_split_name(part)) and said.split != "train"]
        if named:
            found["/".join(parts[: named[-1] + 1])].append(table)
    return {folder: those[0] for folder, those in found.items() if len(those) == 1}


# --------------------------------------------------------------------------------------- splits of tables


def read_tabled(place: Path, listing: FolderListing, tables: Sequence[LabelTable], notes: Sequence[str]) -> PlaceImages:
    """Give the images that tables list; lists may say the splits of a table that says none (train_val_list.txt)."""
    notes = [*notes]
    tables = group_tables(place, listing, divide_by_lists(place, listing, tables, notes))
    tables = name_numbered_classes(place, listing, tables, notes)
    splits = [split for table in tables for split in _splits_of(place, table)]
    listed = {file for table in tables for file in table.files}
    paths = join_names(list(dict.fromkeys(path for table in tables for path in (*table.parts[:1], table.path))))
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
        container=paths,
        splits=tuple(splits),
        left_out=(
            *left_out_images(rest, reasons, f"not listed in {paths}"),
            *left_out_images(sorted(unlabelled), {}, f"without a class or a split in {paths}"),
            *left_out_files(listing, tables),
        ),
        notes=(*notes, *unread_lists_note(texts), *(note for table in tables for note in table.notes)),
    )


def _splits_of(place: Path, table: LabelTable) -> list[SplitImages]:
    """Divide a table: by its column, by its name (train.csv), by the folders of its images, or not at all."""
    rows: dict[Split | None, list[int]] = defaultdict(list)
    name = Path(table.path).name
    if table.splits is not None:
        for i, split in enumerate(table.splits):
            rows[split].append(i)
        return [table_split(place, table, s, f"{name} (its column says {s})", rows[s]) for s in rows]
    if said := parse_split_name(Path(table.path).stem):
        return [table_split(place, table, said.split, name, range(len(table.files)))]
    if by_folder := splits_by_folder_name(table.files):
        for i, split in enumerate(by_folder):
            rows[split].append(i)
        return [table_split(place, table, split, f"{name} ({split}: by folders)", rows[split]) for split in rows]
    return [table_split(place, table, None, name, range(len(table.files)))]


def table_split(place: Path, table: LabelTable, split: Split | None, source: str, rows: Sequence[int]) -> SplitImages:
    """Give some rows of a table; the names are relative to the table's folder."""
    folder = table.path.rpartition("/")[0]
    names = [os.path.relpath(table.files[i], folder or ".").replace(os.sep, "/") for i in rows]
    labels = [table.labels[i] for i in rows]
    present = {*labels}  # a number that only another split has is none of this one's
    root = place / folder
    return SplitImages(
        split=split,
        source=source,
        labels=labels,
        numbered=None if table.numbered is None else tuple(name for name in table.numbered if name in present),
        groups=None if table.groups is None else [table.groups[i] for i in rows],
        group_column=table.group_column,
        open=lambda numbers, classes: ImageFiles(root, names, numbers, classes),
    )


def left_out_files(listing: FolderListing, tables: Collection[LabelTable], used: Collection[str] = ()) -> list[LeftOut]:
    """Say which files are left out beside the images, the tables that count and other files that are used."""
    reasons = dict.fromkeys(
        SHARD_SUFFIXES, "beside images in folders, which count: give --data with its path to read it"
    )
    tabled = [suffix for suffix in (*LABEL_TABLE_SUFFIXES, JSON_SUFFIX) if suffix not in SHARD_SUFFIXES]
    reasons |= dict.fromkeys(tabled, "no table of labels, or not the one that counts")
    read = {path for table in tables for path in (table.path, *table.parts, *table.files)}  # files: masks too
    return listing.left_out({*used, *read}, reasons)
