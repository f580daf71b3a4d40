"""Tables of pixels: pictures as numbers in CSV files, one a row, as FER2013 and MNIST are passed on.

| columns | have |
|---|---|
| `pixels` | the numbers of a picture, with blanks between |
| `pixel0`, `pixel1` ...; `1x1`, `1x2` ... | a number each |
| label, emotion and the other names of columns of classes | the class |
| Usage and the other names of columns of splits; else the table's own name (mnist_train.csv) | the split |

Pictures are square, grey or of red, green and blue for each pixel; a number is 0 to 255. They are read where a place
has no images.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Crop, CropBox
from onefold.data.dataset_info import LeftOut, PlaceImages, Split, SplitImages
from onefold.data.decode import printable_name
from onefold.data.folders import join_names
from onefold.data.preprocessing import ValueRange
from onefold.data.repeated_images import find_copied_files
from onefold.data.splits import parse_split_name
from onefold.data.table_columns import (
    is_class_index_column,
    is_missing,
    is_split_column,
    normalize_numbers,
    rank_class_column,
    read_split_column,
)
from onefold.errors import BadData
from onefold.file_io import normalize_class_name

_PIXELS = re.compile(r"pixels?_?\d*|\d{1,4}x\d{1,4}", re.IGNORECASE)
_MIN_PIXELS = 15  # columns, unless one is called pixels
_HEAD_BYTES = 1 << 18
_MAX_BYTES = 1 << 31


@dataclass(frozen=True, eq=False)
class PixelImages:
    """Pictures of a table, uint8 (N, side, side) or (N, side, side, 3); `rows` are their numbers in it. A Dataset."""

    table: str
    pixels: NDArray[np.uint8]
    rows: Sequence[int]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def label(self, i: int) -> int:
        """Give the class index of image i."""
        return self.labels[i]

    def name(self, i: int) -> str:
        """Give the table's name and the row."""
        return f"{self.table}/{self.rows[i]:07d}"

    def image(self, i: int, *, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
        """Give image i, RGB, at its own size."""
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def raw_samples(self, i: int) -> None:
        """Give None: pixels have 8 bits."""

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Give a crop of image i."""
        return crop_box.crop_image(self.image(i))

    def num_bytes(self, i: int) -> int:
        """Give the number of values of a picture, the same for each."""
        return int(self.pixels[i].nbytes)

    def digest(self, i: int) -> str:
        """Give a digest of the pixels of image i."""
        return hashlib.sha256(self.pixels[i].tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _PixelTable:
    """A table as it was read: pixels (N, side, side) or (N, side, side, 3), and the class and split of each row."""

    name: str
    pixels: NDArray[np.uint8]
    labels: Sequence[str]
    splits: Sequence[Split | None] | None


def find_pixel_columns(file: Path) -> list[str]:
    """Give the columns of a table that hold pixels; none where it is of other things."""
    if file.suffix.lower() not in (".csv", ".tsv"):
        return []
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD_BYTES).decode("utf-8", "replace").split("\n")[0]
    except OSError:
        return []
    columns = [column.strip().strip('"') for column in re.split("[,;\t]", head)]
    pixels = [column for column in columns if _PIXELS.fullmatch(column)]
    return pixels if len(pixels) > _MIN_PIXELS or "pixels" in (pixel.lower() for pixel in pixels) else []


def read_pixel_tables(place: Path, names: Sequence[str], left_out: Sequence[LeftOut]) -> PlaceImages:
    """Read tables of pixels, one, or one a split. Raises BadData where they cannot be used."""
    shown = printable_name(place)
    copies = {Path(copy).relative_to(place).as_posix() for copy in find_copied_files([str(place / n) for n in names])}
    tables = [_read(place / name, name) for name in names if name not in copies]
    missing = [LeftOut(count=1, what="table", reason="a copy of another", examples=(name,)) for name in sorted(copies)]
    parts: list[tuple[Split | None, _PixelTable, list[int]]] = []
    for table in tables:
        said = parse_split_name(Path(table.name).stem)
        rows: dict[Split | None, list[int]] = defaultdict(list)
        for i, label in enumerate(table.labels):
            split = table.splits[i] if table.splits else said.split if said else None
            if not is_missing(label) and (split or not table.splits):
                rows[split].append(i)
        if unlabelled := len(table.labels) - sum(map(len, rows.values())):
            what = f"pictures of {table.name}"
            missing.append(LeftOut(count=unlabelled, what=what, reason="without a class or a split"))
        parts += [(split, table, those) for split, those in rows.items()]
    if len({split for split, *_ in parts}) < len(parts):
        raise BadData(
            f"{shown} holds several tables of pixels, {join_names([table.name for table in tables])}: give "
            f"--data {shown}/{tables[0].name} for one"
        )
    if not parts:
        raise BadData(f"{shown}: {join_names([table.name for table in tables])} says no class of any picture")
    sizes = sorted({f"{table.pixels.shape[1]} x {table.pixels.shape[2]}" for table in tables})
    return PlaceImages(
        container=f"tables of {join_names(sizes)} pixels",
        splits=tuple(_split_images(split, table, rows) for split, table, rows in parts),
        left_out=(*missing, *left_out),
    )


def _split_images(split: Split | None, table: _PixelTable, rows: Sequence[int]) -> SplitImages:
    def open_images(numbers: Sequence[int], classes: tuple[str, ...]) -> PixelImages:
        return PixelImages(table.name, table.pixels[rows], rows, numbers, classes)

    labels = [normalize_class_name(label) for label in normalize_numbers([table.labels[i] for i in rows])]
    source = f"{table.name} ({split})" if table.splits else table.name
    return SplitImages(split=split, source=source, labels=labels, open=open_images)


def _read(file: Path, name: str) -> _PixelTable:
    """Read a table of pixels. Raises BadData where a row is otherwise than the first, or no square."""
    shown = printable_name(file)
    pictures: list[bytes] = []
    others: list[list[str]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            separator = max(",;\t", key=opened.readline().count)
            opened.seek(0)
            reader = csv.reader(opened, delimiter=separator)
            columns = [column.strip() for column in next(reader)]
            pixels = [i for i, column in enumerate(columns) if _PIXELS.fullmatch(column)]
            rest = [i for i in range(len(columns)) if i not in {*pixels}]
            for row in filter(None, reader):
                if len(row) != len(columns):
                    raise BadData(f"{shown}, line {reader.line_num}: {len(row)} values, and {len(columns)} columns")
                numbers = row[pixels[0]].split() if len(pixels) == 1 else [row[i] for i in pixels]
                try:
                    pictures.append(bytes(map(int, numbers)))
                except ValueError as error:
                    raise BadData(f"{shown}, line {reader.line_num}: expected pixels of 0 to 255: {error}") from error
                if len(pictures[-1]) != len(pictures[0]):
                    seen = f"{len(pictures[-1])} pixels, and the first picture has {len(pictures[0])}"
                    raise BadData(f"{shown}, line {reader.line_num}: {seen}")
                if len(pictures) * len(pictures[0]) > _MAX_BYTES:
                    raise BadData(f"{shown} holds more than {_MAX_BYTES >> 30} GiB of pixels: save them as PNG")
                others.append([row[i].strip() for i in rest])
    except (OSError, UnicodeError, csv.Error, StopIteration) as error:
        raise BadData(f"cannot read {shown}: {error}") from error
    size = len(pictures[0]) if pictures else 0
    side = isqrt(size) if isqrt(size) ** 2 == size else isqrt(size // 3)
    if side < 2 or size not in (side * side, 3 * side * side):
        raise BadData(f"{shown}: {size} pixels a row are no square picture, grey or of three colours")
    array = np.frombuffer(b"".join(pictures), np.uint8).reshape(len(pictures), side, side, -1)
    cells = {columns[i]: [row[k] for row in others] for k, i in enumerate(rest)}
    named = [column for column in cells if rank_class_column(column) is not None or is_class_index_column(column)]
    named.sort(key=lambda column: 99 if (rank := rank_class_column(column)) is None else rank)
    called = [column for column in cells if is_split_column(column)]
    splits = [found for column in called if (found := read_split_column(column, cells[column], name, []))]
    return _PixelTable(
        name=name,
        pixels=array[..., 0] if array.shape[-1] == 1 else array,
        labels=cells[named[0]] if named else [""] * len(array),
        splits=splits[0] if splits else None,
    )
