"""Images in tar shards and Parquet files, read in place: which files a place names, their images and classes.

| place | split |
|---|---|
| one .tar or .parquet file; a pattern (train-*.tar); braces (train-{000..009}.tar), also as a URL | by seed |
| any of these with {split} in it, which becomes train and val | as they are |
| a folder that holds them; names that start with train, and with val, validation or test | as they are |
| a folder that holds them under other names | by seed |

A tar is read once for its index, which is kept under XDG_CACHE_HOME; images are then read by their offsets. Its layout
is one of two. Class folders: the class of `n01440764/1.jpg` is its first folder, after the folders that all images
share. WebDataset: the members of a sample share their name up to the first dot, and one of them gives its class:
    .cls    a number or a name, as text
    .json   an object with `label`, `cls` or `class`, a number or a name

A Parquet file (the extra `parquet`) is read as Hugging Face's datasets write it. One column holds the image, a struct
of `bytes` and `path` or the bytes alone; another the class, a number or a name. Names of classes that `datasets` wrote
into the schema are taken. A row group is read at once and the last few are kept, so files with row groups of some
megabytes are the quickest to read in random order.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Crop, CropBox
from onefold.data.decode import decode, decode_crop, left_out_as, printable
from onefold.data.folders import join_names
from onefold.data.remote import REMOTE, Blob, BlobReader, LocalFile, digest_bytes, open_blob
from onefold.errors import BadData, MissingExtra, NotWritable
from onefold.storage import write_text

VALIDATION = ("val", "validation", "test")
"""What the validation half of a dataset may be called, the first that is there."""

MAX_CLASSES = 1_000_000

_SHARD_SUFFIXES = (".tar", ".parquet")
_MAX_SHARDS = 100_000


@dataclass(frozen=True, eq=False)
class ShardedImages:
    """Labelled images in files that hold many of them each. A Dataset."""

    files: Sequence[TarImages | ParquetImages]
    labels: Sequence[int]
    classes: tuple[str, ...]
    starts: NDArray[np.int64]  # the number of each file's first image

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        """Give the class index of image i."""
        return self.labels[i]

    def name(self, i: int) -> str:
        """Give the name of image i within its file."""
        file, row = self._locate(i)
        return file.name(row)

    def image(self, i: int, *, min_side: int = 0) -> Image.Image:
        """Decode image i; see `decode`."""
        file, row = self._locate(i)
        return decode(file.read(row), name=file.name(row), min_side=min_side)

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Decode a crop of image i; see `decode_crop`."""
        file, row = self._locate(i)
        return decode_crop(file.read(row), crop_box, name=file.name(row))

    def num_bytes(self, i: int) -> int:
        """Give the stored size of image i, or -1 where it is not known without reading it."""
        file, row = self._locate(i)
        return file.num_bytes(row)

    def digest(self, i: int) -> str:
        """Give a digest of image i, "" where it cannot be read; behind a network, of its tar's identity and name."""
        file, row = self._locate(i)
        if isinstance(file, TarImages) and not isinstance(file.blob, LocalFile):
            return hashlib.sha256(f"{file.blob.identity} {file.name(row)}".encode()).hexdigest()
        try:
            data = file.read(row)
        except BadData:
            return ""
        return digest_bytes(lambda start, count: data[start : start + count], len(data))

    def _locate(self, i: int) -> tuple[TarImages | ParquetImages, int]:
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.files[number], i - int(self.starts[number])


# -------------------------------------------------------------------------------------- finding shards


def find_shards(place: str | Path) -> dict[str, list[str]] | None:
    """List the shards at a place: {"train": ..., "val": ...}, or {"all": ...}; None where it names no shards."""
    text = os.fspath(place)
    if "{split}" in text:
        train = _expand(text.replace("{split}", "train"))
        for name in VALIDATION:
            # What is on the web or in an object store is not listed, so there the first name counts.
            val = [] if text.startswith(REMOTE) and name != VALIDATION[0] else _expand(text.replace("{split}", name))
            if val:
                return {"train": train, "val": val}
        raise BadData(f"{printable(text)}: there is nothing where {{split}} is val, validation or test")
    if text.startswith(REMOTE) or (text.endswith(_SHARD_SUFFIXES) and not os.path.isdir(text)):
        paths = _expand(text)
        if not paths:
            raise BadData(f"{printable(text)} is not there: expected tar shards or Parquet files")
        return {"all": paths}
    return _find_in_folder(Path(text)) if os.path.isdir(text) else None


def open_shards(places: dict[str, list[str]], split: str) -> ShardedImages:
    """Open one split, with the classes of all. Raises BadData where the splits have different classes."""
    splits = {name: _open_files(paths) for name, paths in places.items()}
    files = splits.get(split, splits.get("all"))
    if files is None:
        raise BadData(f"there are no shards to {'train' if split == 'train' else 'validate'} with")
    classes, index = _classes(splits)
    labels = [index[label] for file in files for label in file.labels]
    starts = np.array([0, *accumulate(len(file) for file in files)][:-1], np.int64)
    return ShardedImages(files=files, labels=labels, classes=classes, starts=starts)


def _find_in_folder(folder: Path) -> dict[str, list[str]] | None:
    for inner in (folder, folder / "data"):  # Hugging Face's datasets lie in data/
        try:
            names = sorted(
                name for name in os.listdir(inner) if name.endswith(_SHARD_SUFFIXES) and not name.startswith(".")
            )
        except OSError:
            continue
        if names:
            break
    else:
        return None
    paths = {name: str(inner / name) for name in names}
    train = [path for name, path in paths.items() if name.startswith("train")]
    val = next(filter(None, ([p for n, p in paths.items() if n.startswith(start)] for start in VALIDATION)), None)
    return {"train": train, "val": val} if train and val else {"all": train or val or list(paths.values())}


def _expand(text: str) -> list[str]:
    """Expand braces and patterns; of files on this disk only those that are there."""
    names, braces = [text], re.compile(r"\{(\d+)\.\.(\d+)\}")
    while match := braces.search(names[0]):
        first, last = match.groups()
        if int(last) - int(first) >= _MAX_SHARDS:
            raise BadData(f"{printable(text)} stands for more than {_MAX_SHARDS} files")
        numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
        names = [braces.sub(number, name, count=1) for name in names for number in numbers]
    if text.startswith(REMOTE):
        return names
    return [
        path
        for name in names
        for path in sorted(glob.glob(name) if glob.has_magic(name) else [name])
        if os.path.exists(path)
    ]


def _open_files(places: Sequence[str]) -> list[TarImages | ParquetImages]:
    parquet = [place for place in places if place.endswith(".parquet")]
    if parquet and len(parquet) < len(places):
        raise BadData(f"there are tars and Parquet files side by side: {join_names(list(places))}; give one kind")
    if parquet:
        return [ParquetImages(Path(place)) for place in places]
    blobs = [open_blob(place) for place in places]
    indexes = [read_tar_index(blob) for blob in blobs]
    prefix = _shared_folders([member.name for index in indexes for member in index if member.label is None])
    return [TarImages(blob, index, prefix) for blob, index in zip(blobs, indexes, strict=True)]


def _shared_folders(names: Sequence[str]) -> str:
    """Give the folders that all names start with, as "a/b/"; at least one folder of each name, its class, is left."""
    if not names:
        return ""
    depth = min(name.count("/") for name in names) - 1
    # What the first and the last in order share, all between them share.
    both = zip(min(names).split("/")[: max(0, depth)], max(names).split("/"), strict=False)
    return "".join(f"{a}/" for a, _ in takewhile(lambda pair: pair[0] == pair[1], both))


def _classes(splits: dict[str, list[TarImages | ParquetImages]]) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Give the names of the classes, and the class index of each label that occurs."""
    labels = {split: {label for file in files for label in file.labels} for split, files in splits.items()}
    union = set().union(*labels.values())
    numbers, names = {x for x in union if isinstance(x, int)}, {x for x in union if isinstance(x, str)}
    if numbers and names:
        raise BadData(f"some classes are numbers ({min(numbers)}), others names ({printable(min(names))}): use one")
    if names:
        for split, present in labels.items():
            if missing := sorted(names - {x for x in present if isinstance(x, str)}):
                raise BadData(f"the classes differ; none in {split} of: {join_names(missing)}")
        classes = tuple(sorted(names))
        return classes, {name: i for i, name in enumerate(classes)}
    schema_names = next((file.classes for files in splits.values() for file in files if file.classes), None)
    limit = MAX_CLASSES if schema_names is None else len(schema_names)
    if min(numbers, default=0) < 0 or max(numbers, default=-1) >= limit:
        raise BadData(f"the classes are numbered {min(numbers)} to {max(numbers)}: expected 0 to {limit - 1}")
    return schema_names or tuple(map(str, range(max(numbers, default=-1) + 1))), {i: i for i in numbers}


# ------------------------------------------------------------------------------------------------ tars

_READ_BYTES = 4 << 20  # read at once while a tar's headers are read
_CLASS_SUFFIXES = (".cls", ".json")
_JSON_KEYS = ("label", "cls", "class")
_MAX_CLASS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)  # there are as many as images
class TarMember:
    """An image in a tar: its name, where its bytes are, and its class if a member beside it gives one."""

    name: str
    offset: int
    size: int
    label: int | str | None = None


class TarImages:
    """The images of one tar; `prefix` are the folders that all images of a dataset share."""

    classes: tuple[str, ...] | None = None  # a tar does not name its classes in their order

    def __init__(self, blob: Blob, members: Sequence[TarMember], prefix: str) -> None:
        self.blob, self._members, self._prefix = blob, members, prefix
        self.labels: list[int | str] = [self._class(member) for member in members]

    def __len__(self) -> int:
        return len(self._members)

    def name(self, i: int) -> str:
        """Give the image's name in the tar, without the shared folders."""
        return self._members[i].name[len(self._prefix) :]

    def read(self, i: int) -> bytes:
        """Read the bytes of image i. Raises BadData where they cannot be read."""
        return self.blob.read(self._members[i].offset, self._members[i].size)

    def num_bytes(self, i: int) -> int:
        """Give the size of image i."""
        return self._members[i].size

    def _class(self, member: TarMember) -> int | str:
        if member.label is not None:
            return member.label
        folder, slash, _ = member.name[len(self._prefix) :].partition("/")
        if not slash:
            where = f"{self.blob.name}: {printable(member.name)}"
            raise BadData(f"{where} is in no class folder and has no .cls or .json beside it")
        return folder


def read_tar_index(blob: Blob) -> list[TarMember]:
    """List the images of a tar, in its order. Raises BadData where it cannot be read or is no tar.

    The index is kept under XDG_CACHE_HOME until the tar's identity changes (see `Blob.identity`).
    """
    key = hashlib.sha256(blob.identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = home / "onefold" / "tars" / f"{key}.json"
    try:
        return [TarMember(**entry) for entry in json.loads(cached.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        pass  # not there yet, or damaged
    members = _with_classes(blob, list(_walk_tar(blob)))
    with suppress(NotWritable):  # then the tar is walked again the next time
        write_text(cached, json.dumps([asdict(member) for member in members]))
    return members


def _walk_tar(blob: Blob) -> Iterator[tuple[TarMember, bytes]]:
    """Walk the images, and with their bytes the members that give classes; links, devices, hidden ones are skipped."""
    try:
        with tarfile.open(fileobj=io.BufferedReader(BlobReader(blob), _READ_BYTES), mode="r:") as tar:
            for entry in tar:
                name, suffix = entry.name.removeprefix("./"), os.path.splitext(entry.name)[1].lower()
                hidden = any(part.startswith(".") for part in name.split("/"))
                if not entry.isreg() or entry.sparse is not None or hidden:
                    continue
                if left_out_as(name, partial(blob.read, entry.offset_data, min(16, entry.size))) is None:
                    yield TarMember(name, entry.offset_data, entry.size), b""
                elif suffix in _CLASS_SUFFIXES and entry.size <= _MAX_CLASS_BYTES:
                    content = tar.extractfile(entry)
                    yield TarMember(name, entry.offset_data, entry.size), content.read() if content else b""
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every one
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        if isinstance(error, BadData):
            raise
        raise BadData(f"{blob.name} is no tar that can be read, or damaged: {error}") from error
    size = blob.num_bytes
    if size % 512 or size < 1024:
        raise BadData(f"{blob.name} is truncated: a tar's size is a multiple of 512 bytes, it has {size}")


def _with_classes(blob: Blob, walked: list[tuple[TarMember, bytes]]) -> list[TarMember]:
    """Give the images, each with the class that a member of the same sample gives, where there are any."""
    images = [m for m, _ in walked if not m.name.lower().endswith(_CLASS_SUFFIXES)]
    labels = {
        _sample_key(m.name): _parse_class(blob, m.name, content)
        for m, content in walked
        if m.name.lower().endswith(_CLASS_SUFFIXES)
    }
    if not images:
        raise BadData(f"{blob.name} holds no images")
    if not labels:
        return images
    missing = [m.name for m in images if _sample_key(m.name) not in labels]
    if missing:
        raise BadData(f"{blob.name}: {len(missing)} images have no .cls or .json, the first: {printable(missing[0])}")
    return [TarMember(m.name, m.offset, m.size, labels[_sample_key(m.name)]) for m in images]


def _sample_key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _parse_class(blob: Blob, name: str, content: bytes) -> int | str:
    value: object = content.decode("utf-8", "surrogateescape").strip()
    if name.lower().endswith(".json"):
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{blob.name}: {printable(name)} is not JSON: {error}") from error
        value = next((parsed[key] for key in _JSON_KEYS if key in parsed), None) if isinstance(parsed, dict) else None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "" or value == -1:
        expected = f"a class: a number, a name, or an object with {', '.join(_JSON_KEYS)}"
        raise BadData(f"{blob.name}: expected in {printable(name)} {expected}")
    return value


# --------------------------------------------------------------------------------------------- Parquet

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture")
_CLASS_COLUMNS = ("label", "labels", "class", "cls", "fine_label")
_CACHE_BYTES = 512 << 20  # of row groups of one file


class ParquetImages:
    """The images of one Parquet file: their names, their classes, and their bytes when asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        self._row_groups: OrderedDict[int, list[bytes | None]] = OrderedDict()  # the least recently used first
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtra(f'{printable(path)} needs pyarrow: pip install "onefold[parquet]"') from error
        try:
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
            self._image = self._column(schema.names, _IMAGE_COLUMNS, "an image")
            self._label = self._column(schema.names, _CLASS_COLUMNS, "a class")
            self.classes = _class_names(schema, self._label)
            self.labels: list[int | str] = self._file.read([self._label]).column(0).to_pylist()
        except BadData:
            raise
        except Exception as error:  # pyarrow's errors have no common root but Exception
            raise BadData(f"cannot read {printable(path)}: {_first_line(error)}") from error
        if bad := [label for label in self.labels if isinstance(label, bool) or not isinstance(label, int | str)]:
            raise BadData(f"{printable(path)}: the column {self._label} holds {bad[0]!r}: expected a number or a name")
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self._rows = [(group, row) for group, count in enumerate(counts) for row in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Give the file's name and the row."""
        return f"{self.path.name}/{i:07d}"

    def read(self, i: int) -> bytes:
        """Read the bytes of image i as stored. Raises BadData where there are none."""
        group, row = self._rows[i]
        with self._lock:  # pyarrow reads one row group of a file at a time; other threads decode meanwhile
            if group not in self._row_groups:
                self._row_groups[group] = self._read_row_group(group)
                while len(self._row_groups) > 1 and sum(map(_num_bytes, self._row_groups.values())) > _CACHE_BYTES:
                    self._row_groups.popitem(last=False)
            self._row_groups.move_to_end(group)
            data = self._row_groups[group][row]
        if data is None:
            raise BadData(f"{printable(self.name(i))} holds no bytes, only a path: expected embedded images")
        return data

    def num_bytes(self, i: int) -> int:
        """Give -1: sizes are not known without reading all images."""
        return -1

    def _read_row_group(self, group: int) -> list[bytes | None]:
        try:
            rows: list[Any] = self._file.read_row_group(group, [self._image]).column(0).to_pylist()
        except Exception as error:
            raise BadData(f"cannot read rows of {printable(self.path)}: {_first_line(error)}") from error
        values = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
        return [value if isinstance(value, bytes) else None for value in values]

    def _column(self, names: list[str], known: tuple[str, ...], what: str) -> str:
        column = next((name for name in known if name in names), None)
        if column is None:
            columns = ", ".join(names)
            raise BadData(f"{printable(self.path)} has the columns {columns}: expected {what} in {', '.join(known)}")
        return column


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Read what `datasets` wrote: {"info": {"features": {column: {"names": [...]}}}}."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if "names" in feature else feature["feature"]["names"]
        return tuple(map(str, names))
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


def _num_bytes(rows: list[bytes | None]) -> int:
    return sum(len(row) for row in rows if row is not None)


def _first_line(error: Exception) -> str:
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
