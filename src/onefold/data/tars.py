"""Tars of images: their index, kept under XDG_CACHE_HOME, and the images read in place by their offsets.

The layout of a tar is one of three. Class folders: as on a disk (see splits.py). A tar a class, of files without
folders, whose name is the class (ImageNet's n01440764.tar). WebDataset: the members of a sample
share their name up to the first dot, and one of them gives its class, and perhaps its split:
    .cls    a number or a name, as text
    .json   an object with `label` or another name that a table's column may have (see tables.py); one without any is
            metadata that is not read
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from onefold.checksums import read_sealed_text, write_sealed_text
from onefold.data.dataset_info import LeftOut, Split
from onefold.data.decode import MASK_KIND, left_out_kind, left_out_reason, printable_name
from onefold.data.folder_roles import NoClassFoldersError, assign_images, detect_folder_roles, read_single_split
from onefold.data.folders import (
    Folder,
    build_folder_tree,
    find_masks_in_folders,
    is_hidden,
    join_names,
    left_out_images,
)
from onefold.data.photo_copies import THUMBNAIL_KIND, called_as_groups, find_masks, find_thumbnails
from onefold.data.remote_files import Blob, BlobReader
from onefold.data.repeated_images import Files, leave_out_copies
from onefold.data.splits import parse_split_name, split_into_words, splits_by_folder_name
from onefold.data.table_columns import (
    MultiLabelError,
    cell_text,
    is_class_index_column,
    is_class_name_column,
    is_missing,
    is_split_column,
    missing_words_of_classes,
    normalize_number,
    rank_class_column,
    split_word,
)
from onefold.errors import BadData, NotWritable
from onefold.file_io import cache_folder, normalize_class_name, normalize_name, parse_json

_log = logging.getLogger("onefold")
_READ_BYTES = 4 << 20  # read at once while a tar's headers are read
_CLASS_SUFFIXES = (".cls", ".json")
SAMPLE = "sample"
"""The column, so to speak, that tells images of one sample: 1.left.jpg and 1.right.jpg."""
_MAX_CLASS_BYTES = _MAX_HEADER_BYTES = 1 << 20
_INDEX_VERSION = 6
_TABLES = frozenset((".csv", ".tsv", ".jsonl", ".parquet", ".xlsx"))
_WORDNET_ID = re.compile(r"n\d{8}")
_DATA_WORDS = frozenset(
    ("data", "dataset", "image", "images", "img", "imgs", "photo", "photos", "picture", "pictures")
) | {
    *("shard", "part", "extra", "all", "archive", "files", "backup", "old", "new", "more", "unlabeled", "unlabelled")
}  # of tars that are no class


@dataclass(frozen=True, slots=True)  # there are as many as images
class TarMember:
    """An image in a tar: its name, where its bytes are, and what members beside it give: class, split, things.

    `things` has of what the image is by the columns that say it (patient), and its sample where that has several.
    """

    name: str
    offset: int
    size: int
    label: int | str | None = None
    split: Split | None = None
    things: Mapping[str, str] | None = None


@dataclass(frozen=True)
class TarIndex:
    """The images of a tar in its order, and how many other members there are of each kind."""

    members: list[TarMember]
    others: Mapping[str, int]


class TarImages:
    """The images of one tar; `prefix` are the folders that all images share, `folder` is what stands for them."""

    classes: tuple[str, ...] | None = None  # a tar does not name its classes in their order

    def __init__(
        self, blob: Blob, members: Sequence[TarMember], labels: Sequence[int | str], prefix: str, folder: str = ""
    ) -> None:
        self.blob, self._members, self._prefix, self._folder = blob, members, prefix, folder
        self.labels: list[int | str | None] = list(labels)

    def __len__(self) -> int:
        return len(self._members)

    def select(self, rows: Sequence[int]) -> TarImages:
        """Give some of the images."""
        labels = [label for row in rows if (label := self.labels[row]) is not None]
        return TarImages(self.blob, [self._members[row] for row in rows], labels, self._prefix, self._folder)

    def name(self, i: int) -> str:
        """Give the image's name in the tar, without the shared folders, in NFC."""
        name = normalize_name(self._members[i].name.removeprefix(self._prefix))
        return f"{self._folder}/{name}" if self._folder else name

    def things(self, i: int) -> Mapping[str, str]:
        """Give of what image i is, by column; see `TarMember`."""
        return self._members[i].things or {}

    def called(self, i: int) -> str:
        """Give the name by which copies and versions of one photo are known."""
        return self.name(i)

    def read(self, i: int) -> bytes:
        """Read the bytes of image i. Raises BadData where they cannot be read."""
        return self.blob.read(self._members[i].offset, self._members[i].size)

    def num_bytes(self, i: int) -> int:
        """Give the size of image i."""
        return self._members[i].size


def tars_by_split(
    blobs: Sequence[Blob],
    indexes: Sequence[TarIndex],
    split: Split | None,
    shown: str,
    left_out: list[LeftOut],
    notes: list[str],
) -> dict[Split | None, list[TarImages]]:
    """Divide the images of tars by what their samples say, or by the folders inside, and give each its class."""
    names = [member.name for index in indexes for member in index.members]
    if len({*names}) == len(names) and not any(member.label for index in indexes for member in index.members):
        indexes, names = _without_copies(blobs, indexes, left_out, notes)
    labels = [member.label for index in indexes for member in index.members]
    if not names:
        raise BadData(f"{join_names([blob.name for blob in blobs], 3)} holds no images")
    splits: list[Split | None]
    rows_of: dict[Split | None, list[TarImages]] = defaultdict(list)
    if any(label is not None for label in labels):
        missing = [name for name, label in zip(names, labels, strict=True) if label is None]
        if 2 * len(missing) >= len(names) and split != "test":
            raise BadData(
                f"{shown}: {len(missing)} of {len(names)} images have no .cls or .json beside them, the first: "
                f"{printable_name(missing[0])}"
            )
        if missing:
            what = f"images of {split}" if split else "images"
            reason = "no .cls or .json beside them"
            left_out.append(LeftOut(count=len(missing), what=what, reason=reason, examples=tuple(missing[:3])))
        stated = [member.split for index in indexes for member in index.members]
        unsaid = sum(said is None and label is not None for said, label in zip(stated, labels, strict=True))
        if split is None and unsaid and any(stated):
            raise BadData(f"{shown}: {unsaid} of {len(stated)} samples say no split, the others do")
        _check_splits(blobs, split, {said for said in stated if said}, shown)
        by_folders = splits_by_folder_name(names) or []
        splits = [split or said for said in stated] if any(stated) else [*by_folders] or [split] * len(names)
        if split is not None:
            splits = [split] * len(names)
        prefixes = dict.fromkeys(set(splits), "")
        classes: list[int | str] = ["" if label is None else label for label in labels]
        texts = {label for label in labels if isinstance(label, str)}
        nothing = {text for text in texts if is_missing(text)} - missing_words_of_classes(texts)
        kept = [label is not None and label not in nothing for label in labels]
        if num_nothing := sum(label in nothing for label in labels):
            reason = f"no class ({join_names(sorted(map(repr, nothing)), 3)})"
            left_out.append(LeftOut(count=num_nothing, what="images", reason=reason))
    elif _are_in_no_folder(names) and (tar_classes := _classes_by_tar(blobs, indexes)):
        which = join_names([os.path.basename(blob.name) for blob in blobs], 3)
        notes.append(f"each tar is a class, since there are no class folders in them: {which}")
        for blob, index, name in zip(blobs, indexes, tar_classes, strict=True):
            rows_of[split].append(TarImages(blob, index.members, [name] * len(index.members), "", name))
        return rows_of
    else:
        tree = _without_shared_folders(build_folder_tree(names))
        try:
            arranged = detect_folder_roles(tree, shown, {}) if split is None else read_single_split(tree, shown, split)
        except NoClassFoldersError as error:
            if split == "test":
                left_out.append(LeftOut(count=len(names), what="images of test", reason="no labels to score by"))
                return {}
            raise _unlabelled(blobs, indexes) from error
        if split:
            _check_splits(blobs, split, set(splits_by_folder_name(names) or ()), shown)
        assigned = assign_images(names, arranged)
        kept = [each is not None for each in assigned]
        splits = [arranged.folders[each[0]].split if each else None for each in assigned]
        classes = [each[1] if each else "" for each in assigned]
        roots: dict[Split | None, list[str]] = defaultdict(list)
        for folder in arranged.folders:
            roots[folder.split].append(f"{folder.root}/" if folder.root else "")
        prefixes = {part: those[0] if len(those) == 1 else "" for part, those in roots.items()}
        rest = [name for name, is_kept in zip(names, kept, strict=True) if not is_kept]
        left_out += left_out_images(rest, arranged.reasons, "in no class folder")
        notes += arranged.notes
    start = 0
    for blob, index in zip(blobs, indexes, strict=True):
        rows = range(start, start + len(index.members))
        start += len(index.members)
        for part in dict.fromkeys(splits[row] for row in rows if kept[row]):
            those = [row for row in rows if kept[row] and splits[row] == part]
            members = [index.members[row - rows.start] for row in those]
            rows_of[part].append(TarImages(blob, members, [classes[row] for row in those], prefixes[part]))
    return rows_of


def _check_splits(blobs: Sequence[Blob], split: Split | None, inside: set[Split], shown: str) -> None:
    """Raise BadData where what is inside a tar is of other splits than its name says."""
    if split and (others := sorted(inside - {split})):
        which = join_names([os.path.basename(blob.name) for blob in blobs], 3)
        raise BadData(
            f"{shown}: {which} is {split} by its name, and {' and '.join(others)} by what it holds: rename it, or give "
            "it by itself for what it holds"
        )


def _are_in_no_folder(names: Sequence[str]) -> bool:
    """Whether images are in no folder, or all in one that is called as what it holds: images/."""
    folders = {name.rpartition("/")[0] for name in names}
    return len(folders) == 1 and _DATA_WORDS.issuperset(split_into_words(folders.pop()))


def _classes_by_tar(blobs: Sequence[Blob], indexes: Sequence[TarIndex]) -> list[str] | None:
    """Give the class that each tar is by its name (cat.tar, n01440764.tar); None where they are called as parts."""
    stems = [normalize_class_name(os.path.splitext(os.path.basename(blob.name))[0]) for blob in blobs]
    words = [split_into_words(stem) for stem in stems]
    plain = [[w for w in those if not w.isdecimal() and (len(w) > 1 or not w.isascii())] for those in words]
    forms = {*map(tuple, plain)}  # part_a and part_1 are called part
    are_ids = all(map(_WORDNET_ID.fullmatch, stems))
    is_called = len(forms) == len(stems) and not any(_DATA_WORDS.issuperset(form) for form in forms)
    if len({*stems}) < 2 or not (are_ids or is_called) or any(map(parse_split_name, stems)):
        return None
    return stems if len({*stems}) == len(stems) and all(index.members for index in indexes) else None


def _unlabelled(blobs: Sequence[Blob], indexes: Sequence[TarIndex]) -> BadData:
    """Give the error of images without a class, with what to do about it."""
    blob, index = next((blob, index) for blob, index in zip(blobs, indexes, strict=True) if index.members)
    flat = next((member.name for member in index.members if "/" not in member.name), index.members[0].name)
    if tables := sorted(_TABLES & index.others.keys()):
        todo = f"tables inside a tar ({tables[0]}) are not read: unpack it and give the folder"
    elif ".txt" in index.others:
        todo = "where the .txt beside it is the class, call it .cls; a sentence on the image is none"
    else:
        todo = "write its class into a .cls beside it, or unpack the tar and put the images into a folder a class"
    return BadData(
        f"{blob.name}: {printable_name(flat)} is in no class folder and has no .cls or .json beside it: {todo}"
    )


def _without_copies(
    blobs: Sequence[Blob], indexes: Sequence[TarIndex], left_out: list[LeftOut], notes: list[str]
) -> tuple[list[TarIndex], list[str]]:
    """Give the indexes without the images of folders that are copies of others, and the names that are left."""
    where = {m.name: (blob, m) for blob, index in zip(blobs, indexes, strict=True) for m in index.members}
    files = Files(
        lambda name: where[name][1].size, lambda name: where[name][0].read(where[name][1].offset, where[name][1].size)
    )
    kept, copies, remarks = leave_out_copies([*where], files)
    left_out += copies
    notes += remarks
    names = set(kept)
    indexes = [replace(index, members=[m for m in index.members if m.name in names]) for index in indexes]
    return indexes, [member.name for index in indexes for member in index.members]


def _without_shared_folders(tree: Folder) -> Folder:
    """Give the folder of the class where a tar has one class only, whose folder is the innermost."""
    inner = tree
    while len(inner.children) == 1 and not inner.num_direct:
        (child,) = inner.children.values()
        if not child.children:
            return tree if any(map(parse_split_name, inner.path.split("/"))) else inner
        inner = child
    return tree


def left_out_members(counts: Sequence[Mapping[str, int]]) -> list[LeftOut]:
    """Say which members of tars are no images."""
    total: Counter[str] = Counter()
    for others in counts:
        total.update(others)
    return [
        LeftOut(count=count, what=f"{kind} members" if kind.startswith(".") else kind, reason=left_out_reason(kind))
        for kind, count in total.most_common()
    ]


def read_tar_index(blob: Blob) -> TarIndex:
    """List the images of a tar, in its order. Raises BadData where it cannot be read or is no tar.

    The index is kept under XDG_CACHE_HOME until the tar's identity changes (see `Blob.identity`).
    """
    key = hashlib.sha256(f"{_INDEX_VERSION} {blob.identity}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    cached = cache_folder() / "tars" / f"{key}.json"
    try:
        kept = parse_json(read_sealed_text(cached))
        return TarIndex([TarMember(**entry) for entry in kept["members"]], dict(kept["others"]))
    except FileNotFoundError:
        pass  # not there yet
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("the index of %s in the cache is not used, and made anew: %s", blob.name, error)
    others: Counter[str] = Counter()
    members = _with_classes(blob, list(_walk_tar(blob, others)), others)
    index = TarIndex(members, dict(others))
    try:
        write_sealed_text(cached, json.dumps(asdict(index)))
    except NotWritable as error:
        _log.warning("the index of %s is not kept, and made anew the next time: %s", blob.name, error)
    return index


class _HeaderReader(io.BufferedReader):
    """The bytes of a tar for tarfile, which reads a header of any size at once: names and times take few."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file does. Raises tarfile.ReadError for a header of more than a mebibyte."""
        if size is not None and size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a member's header has {size >> 20} MiB")
        return super().read(size)


def _walk_tar(blob: Blob, others: Counter[str]) -> Iterator[tuple[TarMember, bytes]]:
    """Walk the images, and with their bytes the members that give classes; `others` counts what is skipped."""
    try:
        with tarfile.open(fileobj=_HeaderReader(BlobReader(blob), _READ_BYTES), mode="r:") as tar:
            for entry in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every one
                name, suffix = entry.name.removeprefix("./"), os.path.splitext(entry.name)[1].lower()
                if entry.isdir():
                    continue
                if any(map(is_hidden, name.split("/"))):
                    others["hidden files"] += 1
                elif not entry.isreg() or entry.sparse is not None:
                    others["links and devices"] += 1
                elif (kind := left_out_kind(name, partial(blob.read, entry.offset_data, min(16, entry.size)))) is None:
                    yield TarMember(name, entry.offset_data, entry.size), b""
                elif suffix in _CLASS_SUFFIXES and entry.size <= _MAX_CLASS_BYTES:
                    content = tar.extractfile(entry)
                    yield TarMember(name, entry.offset_data, entry.size), content.read() if content else b""
                else:
                    others[kind] += 1
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        if isinstance(error, BadData):
            raise
        raise BadData(f"{blob.name} is no tar that can be read, or damaged: {error}") from error
    size = blob.num_bytes
    if size % 512 or size < 1024:
        raise BadData(f"{blob.name} is truncated: a tar's size is a multiple of 512 bytes, it has {size}")


def _with_classes(blob: Blob, walked: list[tuple[TarMember, bytes]], others: Counter[str]) -> list[TarMember]:
    """Give the images, each with the class and split that members of the same sample give, where there are any."""
    images = [m for m, _ in walked if not m.name.lower().endswith(_CLASS_SUFFIXES)]
    if masks := {*find_masks(names := [m.name for m in images]), *find_masks_in_folders(names)}:
        others[MASK_KIND] += len(masks)
        images = [m for m in images if m.name not in masks]
    if thumbnails := set(find_thumbnails([m.name for m in images])):
        others[THUMBNAIL_KIND] += len(thumbnails)
        images = [m for m in images if m.name not in thumbnails]
    keys = [_sample_key(m.name) for m in images]
    of_images = set(keys)
    labels: dict[str, tuple[str, int | str]] = {}
    splits: dict[str, Split] = {}
    things: dict[str, dict[str, str]] = {key: {SAMPLE: key} for key, count in Counter(keys).items() if count > 1}
    for member, content in walked:
        if member.name.lower().endswith(_CLASS_SUFFIXES):
            key = _sample_key(member.name)
            if key not in of_images:  # a file of boxes or of metadata, beside all images
                others[os.path.splitext(member.name)[1].lower()] += 1
                continue
            label, split, found = _parse_class(blob, member.name, content)
            if found:
                things[key] = {**things.get(key, {}), **found}
            if split:
                splits[key] = split
            if label is None:
                continue
            name, given = labels.setdefault(key, (member.name, label))
            if given != label:
                raise BadData(
                    f"{blob.name}: {join_names(sorted((name, member.name)))} say different classes, "
                    f"{join_names(sorted(map(str, (given, label))))}"
                )
    nothing: tuple[str, None] = ("", None)
    return [
        TarMember(m.name, m.offset, m.size, labels.get(key, nothing)[1], splits.get(key), things.get(key))
        for m, key in zip(images, keys, strict=True)
    ]


def _sample_key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _parse_class(blob: Blob, name: str, content: bytes) -> tuple[int | str | None, Split | None, Mapping[str, str]]:
    """Give the class, the split and the things that a member says; None where a .json is of other things."""
    value: object = content.decode("utf-8", "surrogateescape").strip().removeprefix("\ufeff")
    split, things = None, dict[str, str]()
    if name.lower().endswith(".json"):
        try:
            parsed = parse_json(content)
        except ValueError as error:
            raise BadData(f"{blob.name}: {printable_name(name)} is not JSON: {error}") from error
        record = parsed if isinstance(parsed, dict) else {}
        columns = sorted(
            (key for key in record if rank_class_column(key) is not None), key=lambda key: rank_class_column(key) or 0
        )
        columns += [key for key in record if is_class_index_column(key)]
        if columns and normalize_number(cell_text(record[columns[0]])) is not None:  # label 0, label_name cat
            columns.sort(key=lambda key: not is_class_name_column(key) or not isinstance(record[key], str))
        said = next(
            (parse_split_name(split_word(key, cell_text(record[key]))) for key in record if is_split_column(key)), None
        )
        split = said.split if said else None
        cells = {key: cell_text(record[key]) for key in called_as_groups(record) if key not in columns[:1]}
        things = {key: cell for key, cell in cells.items() if not is_missing(cell)}
        if not columns:
            return None, split, things
        value = record[columns[0]]
        if isinstance(value, list) and len(value) > 1:
            raise MultiLabelError(f"{blob.name}: {printable_name(name)}", f"{columns[0]} holds {value!r:.80}")
        value = cell_text(value) if isinstance(value, list | bool) else value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int | str) or value == "" or value == -1:
        raise BadData(
            f"{blob.name}: expected in {printable_name(name)} a class: a number, a name, or an object with label"
        )
    return value, split, things
