"""The rows of a table as they stand in its file: CSV with any separator, a line of names or none; JSON; or Parquet.

A first line that holds the name of an image is no line of names. Then the columns are known by what they hold: names of
images, words for splits, numbers of the rows, and in the one that is left the classes.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from onefold.data.decode import SUFFIXES, printable_name
from onefold.data.image_lists import LIST_SUFFIX, TableRows, read_image_list
from onefold.data.json_tables import (
    JSON_LINES_SUFFIXES,
    JSON_SUFFIX,
    MAX_JSON_BYTES,
    read_json_lines,
    read_json_table,
)
from onefold.data.match_table_paths import ImageIndex
from onefold.data.parquet import read_parquet_rows
from onefold.data.pixel_tables import find_pixel_columns
from onefold.data.splits import parse_split_name
from onefold.data.table_columns import NotATableError, normalize_number
from onefold.errors import BadData
from onefold.file_io import read_text

_SEPARATORS = ",;\t|"
_EXCEL_SEPARATOR = re.compile(r"\"?sep=(.)\"?[,;\t|]*", re.IGNORECASE)  # a first line that Excel writes and reads
_LIST_HEAD = 1 << 16  # characters of a list that show how it is divided
_SHOWN = 80
_NUM_TRIED = 100  # rows that show which column names the images


def read_rows(file: Path, path: str, images: ImageIndex, notes: list[str]) -> TableRows:
    """Read the rows of a table as they are; rows without any value are none.

    Raises BadData where it cannot be read, NotATableError where it is of other things.
    """
    if pixels := find_pixel_columns(file):
        seen = pixels[0] if len(pixels) == 1 else f"{pixels[0]} and {len(pixels) - 1} more"
        raise NotATableError(f"{printable_name(file)} holds pixels (columns: {seen}), and names no images")
    is_list, shown = file.suffix.lower() == LIST_SUFFIX, printable_name(file)
    if file.suffix.lower() == JSON_SUFFIX and file.stat().st_size > MAX_JSON_BYTES:
        raise NotATableError(f"{shown} is too large to be tried as a table: save it as JSON Lines or CSV")
    if file.suffix.lower() == ".parquet":
        return read_parquet_rows(file)
    text = read_text(file, [] if is_list else notes)
    if is_list and not _is_separated(text):
        return read_image_list(file, path, images, notes)
    if file.suffix.lower() in JSON_LINES_SUFFIXES:
        return read_json_lines(text, shown)
    if file.suffix.lower() == JSON_SUFFIX:
        return read_json_table(text, path, shown, images)
    text_lines = text.split("\n")
    at, first = next(((i, line) for i, line in enumerate(text_lines) if line.strip()), (0, ""))
    if by_excel := _EXCEL_SEPARATOR.fullmatch(first.strip()):
        text_lines[at] = ""
    while first.startswith("#") and not any(separator in first for separator in _SEPARATORS):
        text_lines[at] = ""  # a comment
        at, first = next(((i, line) for i, line in enumerate(text_lines) if line.strip()), (0, ""))
    separator = by_excel[1] if by_excel else max(_SEPARATORS, key=first.count)
    rows, lines = _parse_lines(text_lines, separator, shown, partial(images.num_matches, path))
    if rows and all(len(row) == 1 for row in rows):  # each row as a whole in quotes, as Excel may write a column
        inner = [row[0] for row in rows]
        separator = max(_SEPARATORS, key=inner[0].count)
        if inner[0].count(separator):
            rows, _ = _parse_lines(inner, separator, shown, lambda cells: 0)
    if not rows:
        return TableRows(columns=[], rows=[], lines=[])
    if names := _names_of_columns(rows, path, images):
        return TableRows(columns=names, rows=rows, lines=lines)
    return TableRows(columns=rows[0], rows=rows[1:], lines=lines[1:])


def _parse_lines(
    texts: Sequence[str], separator: str, shown: str, num_images: Callable[[Sequence[str]], int]
) -> tuple[list[list[str]], list[int]]:
    """Give the rows of a CSV text that hold anything, and the line of each.

    `num_images` counts the cells that name images. Raises BadData where a quote that is not closed joins lines: where
    it is the last one, or where a line within it holds other values, one of them an image.
    """
    reader = csv.reader([f"{line}\n" for line in texts], delimiter=separator, skipinitialspace=separator != " ")
    rows, lines, start = [], [], 1
    try:
        for row in reader:
            if reader.line_num > start:
                _check_quotes(texts[start - 1 : reader.line_num], separator, f"{shown}, line {start}", num_images)
            stripped = [value.strip() for value in row]
            if any(stripped):
                rows.append(stripped)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadData(f"cannot read {shown}: {error}") from error
    return rows, lines


def _check_quotes(texts: Sequence[str], separator: str, where: str, num_images: Callable[[Sequence[str]], int]) -> None:
    cells = [[cell.strip(' "') for cell in line.split(separator)] for line in texts[1:]]
    cells = [[cell for cell in line if normalize_number(cell) is None] for line in cells if len(line) > 1]
    if "".join(texts).count('"') % 2 or any(map(num_images, cells)):
        quoted = printable_name(next(line for line in texts if '"' in line).strip()[:_SHOWN])
        raise BadData(
            f"{where}: a quote is not closed, so that {len(texts)} lines are one: {quoted}: close it, or write "
            '"" for a quote within a text'
        )


def _is_separated(text: str) -> bool:
    """Whether lines of a list have an image first and a comma or semicolon after it, as in a table."""
    lines = [line for line in text[:_LIST_HEAD].split("\n") if line.strip()][1:]
    lines = lines[:-1] if len(text) > _LIST_HEAD else lines  # the last may be a part of one
    firsts = [re.split("[,;]", line)[0].strip() for line in lines]
    return len(lines) > 1 and all(
        first != line and os.path.splitext(first)[1].lower() in SUFFIXES
        for first, line in zip(firsts, lines, strict=True)
    )


def _names_of_columns(rows: Sequence[Sequence[str]], path: str, images: ImageIndex) -> list[str]:
    """Name the columns of a table whose first line names none; nothing where it does, or they cannot be told apart."""
    first = rows[0]
    has_suffix = [os.path.splitext(cell)[1].lower() in SUFFIXES for cell in first]
    if len(first) == 2 and (has_suffix[0] or images.num_matches(path, first[:1])):
        return ["file", "label"]
    if not any(has_suffix) or len(first) < 2:
        return []
    tried = [row for row in rows[:_NUM_TRIED] if len(row) == len(first)]
    file = max(range(len(first)), key=lambda i: has_suffix[i] + images.num_matches(path, [row[i] for row in tried]))
    names = {file: "file"}
    for i in range(len(first)):
        column = [row[i] if i < len(row) else "" for row in rows]
        if i != file and all(map(parse_split_name, column)):
            names[i] = "split"
        elif column in ([str(k + n) for k in range(len(rows))] for n in (0, 1)):
            names.setdefault(i, "number of the row")
    rest = [i for i in range(len(first)) if i not in names]
    if len(rest) != 1:
        return []
    names[rest[0]] = "label"
    return [names[i] for i in range(len(first))]
