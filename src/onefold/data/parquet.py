"""Parquet files of images (the extra `parquet`), as Hugging Face's datasets write them.

One column holds the images, a struct of `bytes` and `path` or the bytes alone; another the classes, numbers or names,
and perhaps others the split and of what each photo is (patient); their names are those of a table's columns (see
tables.py). Names of classes that `datasets` wrote into the schema are taken. A row group is read at once and the last
few are kept, so files with row groups of some megabytes are the quickest to read in random order.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from onefold.data.decode import printable_name
from onefold.data.folders import join_names
from onefold.data.image_lists import TableRows
from onefold.data.photo_copies import called_as_groups
from onefold.data.remote_files import open_plain_file
from onefold.data.table_columns import (
    MultiLabelError,
    NotATableError,
    cell_text,
    ends_with_class_word,
    is_class_index_column,
    is_class_name_column,
    is_missing,
    is_split_column,
    rank_class_column,
    rank_image_column,
)
from onefold.errors import BadData, MissingExtra
from onefold.file_io import normalize_name, parse_json

_CACHE_BYTES = 512 << 20  # of row groups of one file
_MAX_ROW_GROUP_BYTES = 1 << 30  # of images, which are read at once


class ParquetImages:
    """The images of one Parquet file: their names, their classes, and their bytes when asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        self.notes: list[str] = []
        self._row_groups: OrderedDict[int, Any] = OrderedDict()  # Arrow arrays, the least recently used first
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtra(f"{printable_name(path)} needs pyarrow", "parquet") from error
        try:
            os.close(open_plain_file(os.fspath(path), os.O_RDONLY))  # Arrow waits for a pipe, out of reach of signals
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
            self._image, self._label, self.split_column = self._columns(schema)
            self.classes = _class_names(schema, self._label)
            labels: list[Any] = self._file.read([self._label]).column(0).to_pylist()
            splits = self._file.read([self.split_column]).column(0).to_pylist() if self.split_column else []
            used = (self._image, self._label, self.split_column)
            self._things = {
                name: [*map(cell_text, self._file.read([name]).column(0).to_pylist())]
                for name in called_as_groups(dict.fromkeys(schema.names))
                if name not in used
            }
            self._paths = self._read_paths(schema)
        except BadData:
            raise
        except Exception as error:  # pyarrow's errors have no common root but Exception
            raise BadData(f"cannot read {printable_name(path)}: {_first_line(error)}") from error
        self.split_values = [cell_text(value) for value in splits]
        labels = [label[0] if isinstance(label, list) and len(label) == 1 else label for label in labels]
        if several := [label for label in labels if isinstance(label, list) and label]:
            raise MultiLabelError(printable_name(path), f"the column {self._label} holds {several[0]!r} of one image")
        labels = [cell_text(label) if isinstance(label, bool) else label for label in labels]
        labels = [int(label) if isinstance(label, float) and label.is_integer() else label for label in labels]
        if bad := [label for label in labels if not isinstance(label, int | str | None)]:
            raise BadData(
                f"{printable_name(path)}: the column {self._label} holds {bad[0]!r}: expected a number or a name"
            )
        self.labels: list[int | str | None] = [None if label == -1 else label for label in labels]
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self._rows = [(group, row) for group, count in enumerate(counts) for row in range(count)]
        self._numbers: Sequence[int] = range(len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Sequence[int]) -> ParquetImages:
        """Give some of the images; the file and what is kept of it are shared."""
        part = copy.copy(self)
        part.labels, part._rows = [self.labels[row] for row in rows], [self._rows[row] for row in rows]
        part._numbers = [self._numbers[row] for row in rows]
        return part

    def name(self, i: int) -> str:
        """Give the file's name and the row."""
        return f"{normalize_name(self.path.name)}/{self._numbers[i]:07d}"

    def things(self, i: int) -> Mapping[str, str]:
        """Give of what image i is, by the columns that say it: patient, lesion_id."""
        cells = {name: column[self._numbers[i]] for name, column in self._things.items()}
        return {name: cell for name, cell in cells.items() if not is_missing(cell)}

    def called(self, i: int) -> str:
        """Give the name by which copies and versions of one photo are known: what the file was called, or its row."""
        path = self._paths[self._numbers[i]] if self._paths else None
        return normalize_name(path) if isinstance(path, str) and path else self.name(i)

    def read(self, i: int) -> bytes:
        """Read the bytes of image i as stored. Raises BadData where there are none."""
        group, row = self._rows[i]
        with self._lock:  # pyarrow reads one row group of a file at a time; other threads decode meanwhile
            if group not in self._row_groups:
                self._row_groups[group] = self._read_row_group(group)
                while (
                    len(self._row_groups) > 1 and sum(each.nbytes for each in self._row_groups.values()) > _CACHE_BYTES
                ):
                    self._row_groups.popitem(last=False)
            self._row_groups.move_to_end(group)
            value = self._row_groups[group][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise BadData(f"{printable_name(self.name(i))} holds no bytes, only a path: expected embedded images")
        return data

    def num_bytes(self, i: int) -> int:
        """Give -1: sizes are not known without reading all images."""
        return -1

    def _read_row_group(self, group: int) -> Any:
        try:
            facts = self._file.metadata.row_group(group)
            columns = (facts.column(i) for i in range(facts.num_columns))
            size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == self._image)
            if size > _MAX_ROW_GROUP_BYTES:
                raise BadData(
                    f"{printable_name(self.path)} has {size >> 20} MiB of images in a row group of {facts.num_rows} "
                    f"rows, which are read at once; {_MAX_ROW_GROUP_BYTES >> 20} are the most: write it again with "
                    "row_group_size=100"
                )
            return self._file.read_row_group(group, [self._image]).column(0)
        except BadData:
            raise
        except Exception as error:
            raise BadData(f"cannot read rows of {printable_name(self.path)}: {_first_line(error)}") from error

    def _read_paths(self, schema: Any) -> Sequence[Any]:
        """Read what the files were called, beside their bytes; nothing where it is not said."""
        kind = schema.field(self._image).type
        fields = [kind.field(i).name for i in range(kind.num_fields)]
        if "path" not in fields:
            return []
        table = self._file.read([f"{self._image}.path"])
        return [value["path"] if value else None for value in table.column(0).to_pylist()]

    def _columns(self, schema: Any) -> tuple[str, str, str | None]:
        """Find the columns of the image (by what it holds), of its class and of its split (by their names)."""
        import pyarrow.types as kinds

        names = list(dict.fromkeys(schema.names))
        images = [name for name in names if _holds_images(schema.field(name).type)]
        images.sort(
            key=lambda name: 9 if (rank := rank_image_column(name)) is None else abs(rank - 1)
        )  # image before path
        classes = [name for name in names if name not in images]
        ranked = sorted(
            (name for name in classes if rank_class_column(name) is not None), key=lambda n: rank_class_column(n) or 0
        )
        ranked += [name for name in classes if is_class_index_column(name)]
        if ranked and kinds.is_integer(schema.field(ranked[0]).type) and _class_names(schema, ranked[0]) is None:
            ranked.sort(key=lambda n: not is_class_name_column(n) or not kinds.is_string(schema.field(n).type))
        for found, what in ((images, "an image in bytes or a struct with bytes"), (ranked, "a class in label, class")):
            if not found:
                raise BadData(
                    f"{printable_name(self.path)} has the columns {', '.join(names)}: expected {what} or the like"
                )
        called = [name for name in classes if rank_class_column(name) is not None or ends_with_class_word(name)]
        others_of = [ranked[0], *(name for name in called if name != ranked[0])]
        for those, what in ((images, "images"), (others_of if ranked[0] in called else [], "classes")):
            if len(those) > 1:
                others = join_names(those[1:])
                self.notes.append(f"the {what} are the column {those[0]}, not {others}")
        return images[0], ranked[0], next((name for name in classes if is_split_column(name)), None)


def is_parquet_table(path: Path) -> bool:
    """Whether a Parquet file has cells of plain values alone, as a table of names of images and their classes."""
    try:
        read_parquet_rows(path)
    except NotATableError:
        return False
    return True


def read_parquet_rows(path: Path) -> TableRows:
    """Read a Parquet file that names images and holds none, as Hugging Face's metadata.parquet, as the rows of a table.

    Numbers that `datasets` named in the schema are these names. Raises NotATableError where it is of other things.
    """
    shown = printable_name(path)
    try:
        import pyarrow.parquet as pq
        import pyarrow.types as kinds
    except ImportError as error:
        raise NotATableError(f"{shown} needs pyarrow (pip install 'onefold[parquet]')") from error
    try:
        os.close(open_plain_file(os.fspath(path), os.O_RDONLY))
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        fields = [schema.field(name) for name in dict.fromkeys(schema.names)]
        if any(_holds_images(field.type) for field in fields):
            raise NotATableError(f"{shown} holds images, and names none beside it")
        names = [field.name for field in fields if not kinds.is_nested(field.type) or kinds.is_list(field.type)]
        columns = [file.read([name]).column(0).to_pylist() for name in names]
    except BadData:
        raise
    except Exception as error:  # pyarrow's errors have no common root but Exception
        raise NotATableError(f"cannot read {shown}: {_first_line(error)}") from error
    for i, name in enumerate(names):
        if known := _class_names(schema, name):
            columns[i] = [
                known[cell] if isinstance(cell, int) and 0 <= cell < len(known) else cell for cell in columns[i]
            ]
    rows = [[cell_text(cell) for cell in row] for row in zip(*columns, strict=True)]
    return TableRows(columns=names, rows=rows, lines=range(1, len(rows) + 1))


def _holds_images(kind: Any) -> bool:
    """Whether a column's type is that of images: bytes, or a struct of bytes and a path."""
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Read what `datasets` wrote: {"info": {"features": {column: {"names": [...]}}}}."""
    try:
        feature = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if "names" in feature else feature["feature"]["names"]
        return tuple(map(str, names))
    except (KeyError, ValueError, TypeError):
        return None


def _first_line(error: Exception) -> str:
    return printable_name(str(error).splitlines()[0] if str(error) else type(error).__name__)
