"""labels.csv: which image is of which class, for a folder that has no class folders.

The first line names the columns. `file` is needed (relative to the folder, or to its subfolder `images`), and one of
    label   the name of a class: the classes are the different names, sorted
    index   the number of a class, as a network counts them; the names then are the column `label`, or the numbers
Other columns are ignored. Comma, semicolon or tab; UTF-8, and bytes that are not are kept as they are.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onefold.data.decode import printable
from onefold.data.folders import Files, listed
from onefold.errors import BadData

MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class _Row:
    line: int
    file: str
    label: str | None
    index: str | None


def labels_csv(table: Path) -> Files:
    """The images that `table` lists, with their classes. Raises BadData naming the line or the files at fault."""
    rows = list(_rows(table))
    if not rows:
        raise BadData(f"{printable(table)} lists no images")
    names = _present(table, rows)
    if rows[0].index is None:
        classes = sorted({row.label or "" for row in rows})
        number = {name: i for i, name in enumerate(classes)}
        return Files(table.parent, names, [number[row.label or ""] for row in rows], tuple(classes))
    labels = [_index(table, row) for row in rows]
    return Files(table.parent, names, labels, _names_of(table, rows, labels))


def _rows(table: Path) -> Iterator[_Row]:
    try:
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            header = lines.readline()
            separator = max(",;\t", key=header.count)
            columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
            if "file" not in columns or not {"label", "index"} & set(columns):
                wanted = "expected the columns file,label or file,index"
                raise BadData(f"{printable(table)}: {wanted}; its first line is {printable(header.strip()[:80])!r}")
            reader = csv.reader(lines, delimiter=separator)
            for cells in reader:
                if cells:
                    yield _row(table, reader.line_num + 1, dict(zip(columns, cells, strict=False)))
    except (OSError, csv.Error) as error:
        raise BadData(f"cannot read {printable(table)}: {error}") from error


def _row(table: Path, line: int, cells: dict[str, str]) -> _Row:
    row = _Row(line, cells.get("file", "").strip(), _stripped(cells, "label"), _stripped(cells, "index"))
    if not row.file or not (row.label or row.index):
        raise BadData(f"{printable(table)}, line {line}: expected a file and its class")
    return row


def _stripped(cells: dict[str, str], column: str) -> str | None:
    return cells[column].strip() if column in cells else None


def _present(table: Path, rows: list[_Row]) -> list[str]:
    """The files' names relative to the table's folder; BadData if some are not there or listed twice."""
    names: list[str] = []
    missing: list[str] = []
    lines: dict[str, int] = {}
    for row in rows:
        name = next((n for n in (row.file, f"images/{row.file}") if os.path.lexists(table.parent / n)), None)
        if name is None:
            missing.append(row.file)
            continue
        first = lines.setdefault(name, row.line)
        if first != row.line:
            raise BadData(f"{printable(table)} lists {printable(row.file)} twice, in lines {first} and {row.line}")
        names.append(name)
    if missing:
        raise BadData(f"{printable(table)} lists {len(missing)} files that are not there: {listed(missing)}")
    return names


def _index(table: Path, row: _Row) -> int:
    text = row.index or ""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < MAX_CLASSES):
        place = f"{printable(table)}, line {row.line}"
        raise BadData(f"{place}: the index is {printable(text)!r}, expected a number from 0 to {MAX_CLASSES - 1}")
    return int(text)


def _names_of(table: Path, rows: list[_Row], labels: list[int]) -> tuple[str, ...]:
    names = [str(i) for i in range(max(labels) + 1)]
    if rows[0].label is None:
        return tuple(names)
    given: dict[int, str] = {}
    for row, index in zip(rows, labels, strict=True):
        name = given.setdefault(index, row.label or "")
        if name != row.label:
            both = f"{printable(name)!r} and {printable(row.label or '')!r}"
            raise BadData(f"{printable(table)}, line {row.line}: index {index} is called both {both}")
    return tuple(given.get(i, name) for i, name in enumerate(names))
