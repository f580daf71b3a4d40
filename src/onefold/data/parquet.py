"""Images in Parquet files, as Hugging Face's datasets keep them (the extra `parquet`).

One column holds the image: a struct of `bytes` and `path`, or the bytes alone. Another holds the class: a number, or a
name. Names of classes that `datasets` wrote into the schema are taken. A row group is read at once and the last few are
kept, so files with row groups of some megabytes are the quickest to read in random order.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

from onefold.data.decode import printable
from onefold.errors import BadData, MissingExtra

_IMAGES = ("image", "img", "jpg", "png", "webp", "picture")
_LABELS = ("label", "labels", "class", "cls", "fine_label")
_KEPT_BYTES = 512 << 20  # of row groups, all files together


class ParquetFile:
    """The images of one Parquet file: their names, their classes, and their bytes when asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtra(f'{printable(path)} needs pyarrow: pip install "onefold[parquet]"') from error
        try:
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
            self._image = self._column(schema.names, _IMAGES, "an image")
            self._label = self._column(schema.names, _LABELS, "a class")
            self.classes = _class_names(schema, self._label)
            self.labels: list[int | str] = self._file.read([self._label]).column(0).to_pylist()
        except BadData:
            raise
        except Exception as error:  # pyarrow's errors have no common root but Exception
            raise BadData(f"cannot read {printable(path)}: {_line(error)}") from error
        if bad := [label for label in self.labels if isinstance(label, bool) or not isinstance(label, int | str)]:
            raise BadData(f"{printable(path)}: the column {self._label} holds {bad[0]!r}: expected a number or a name")
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self._where = [(group, row) for group, count in enumerate(counts) for row in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """The file and the row."""
        return f"{self.path.name}/{i:07d}"

    def read(self, i: int) -> bytes:
        """The bytes of image i as stored. Raises BadData where there are none."""
        group, row = self._where[i]
        with self._lock:  # pyarrow reads one row group of a file at a time; decoding goes on meanwhile
            if group not in self._kept:
                self._kept[group] = self._row_group(group)
                while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            data = self._kept[group][row]
        if data is None:
            raise BadData(f"{printable(self.name(i))} holds no bytes, only a path: expected embedded images")
        return data

    def num_bytes(self, i: int) -> int:
        """-1: sizes are not known without reading all images."""
        return -1

    def _row_group(self, group: int) -> list[bytes | None]:
        try:
            rows: list[Any] = self._file.read_row_group(group, [self._image]).column(0).to_pylist()
        except Exception as error:
            raise BadData(f"cannot read rows of {printable(self.path)}: {_line(error)}") from error
        values = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
        return [value if isinstance(value, bytes) else None for value in values]

    def _column(self, names: list[str], known: tuple[str, ...], what: str) -> str:
        found = next((name for name in known if name in names), None)
        if found is None:
            wanted = ", ".join(known)
            raise BadData(f"{printable(self.path)} has the columns {', '.join(names)}: expected {what} in {wanted}")
        return found


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """What `datasets` wrote: {"info": {"features": {column: {"names": [...]}}}}."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = told["names"] if "names" in told else told["feature"]["names"]
        return tuple(map(str, names))
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


def _size(rows: list[bytes | None]) -> int:
    return sum(len(row) for row in rows if row is not None)


def _line(error: Exception) -> str:
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
