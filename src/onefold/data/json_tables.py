"""The rows of a table in JSON: JSON Lines, or one value, as annotation tools and clouds write them.

| file | what a row is |
|---|---|
| JSON Lines; an array of objects (Label Studio's JSON and JSON-MIN), alone in an object (FiftyOne's) | an object |
| an object with `labels`, of images and the numbers of their classes, and `classes` (FiftyOne's) | an image |
| an object whose keys are images and whose values are classes | an image |

What lies within an object is a column called by both names: `classificationAnnotation.displayName` in the files of
Vertex AI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onefold.data.image_lists import TableRows
from onefold.data.match_table_paths import ImageIndex
from onefold.data.table_columns import NotATableError, cell_text
from onefold.file_io import parse_json

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".manifest")
"""Of files of JSON Lines; AWS writes .manifest."""
JSON_SUFFIX = ".json"
"""Of files that may be a table in one value of JSON."""
MAX_JSON_BYTES = 1 << 26
"""Of a larger file it is not tried whether it is a table: boxes of large datasets have such."""

_MAX_DEPTH = 6  # objects within each other that are looked into
_NO_LABELS = frozenset(("predictions", "prediction", "drafts"))  # what a network says, or was never confirmed
_PLAIN = "data."  # what Label Studio keeps of an image, beside what people say of it
_NUM_TRIED = 100


def read_json_lines(text: str, shown: str) -> TableRows:
    """Read the objects of JSON Lines. Raises NotATableError where a line is none."""
    records, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                raise NotATableError(f"{shown}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise NotATableError(f"{shown}, line {number}: expected an object with file_name and label")
            records.append(record)
            lines.append(number)
    return _rows(records, lines)


def read_json_table(text: str, path: str, shown: str, images: ImageIndex) -> TableRows:
    """Read a table in one value of JSON; of its rows the "lines" are their numbers from 1.

    Raises NotATableError where it is of other things.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        raise NotATableError(f"{shown} is not JSON: {error}") from error
    if isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
        return _rows(value, range(1, len(value) + 1))
    rows = [inner for inner in value.values() if isinstance(inner, list) and inner] if isinstance(value, dict) else []
    if len(rows) == 1 and all(isinstance(record, dict) for record in rows[0]):
        return _rows(rows[0], range(1, len(rows[0]) + 1))
    labels, names = value, None
    if isinstance(value, dict) and isinstance(value.get("labels"), dict):
        labels, names = value["labels"], value.get("classes")
    if not isinstance(labels, dict) or not all(isinstance(label, str | int | None) for label in labels.values()):
        raise NotATableError(f"{shown}: expected objects with an image and its class")
    if not images.num_matches(path, [*labels][:_NUM_TRIED]):
        raise NotATableError(f"{shown}: expected images that are there, and their classes")
    cells = [[image, _class_text(label, names), cell_text(label)] for image, label in labels.items()]
    columns = ["file", "label", "class_id"][: 2 if names is None else 3]
    return TableRows(columns=columns, rows=[row[: len(columns)] for row in cells], lines=range(1, len(cells) + 1))


def _class_text(label: object, names: object) -> str:
    """Give the class that a number stands for in a list of names, or the label as it is."""
    if isinstance(names, list) and isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return cell_text(names[label])
    return cell_text(label)


def _rows(records: Sequence[Mapping[str, Any]], lines: Sequence[int]) -> TableRows:
    flat = [_flatten(record) for record in records]
    columns = list(dict.fromkeys(key for record in flat for key in record))
    called = {key: key.removeprefix(_PLAIN) if key.removeprefix(_PLAIN) not in columns else key for key in columns}
    rows = [[cell_text(record.get(key)) for key in columns] for record in flat]
    return TableRows(columns=[called[key] for key in columns], rows=rows, lines=lines)


def _flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values of an object and of those within it; of several in a list all that differ."""
    found: dict[str, dict[str, Any]] = {}  # values by how they are written
    for key, value in _leaves(record, "", 0):
        values = found.setdefault(key, {})
        if value is record.get(key) and isinstance(value, list):  # as it is: perhaps thousands of numbers
            continue
        for each in value if isinstance(value, list) else [value]:
            values.setdefault(cell_text(each), each)
    plain = {key: value for key, value in record.items() if isinstance(value, list) and key in found}
    return {
        key: plain.get(key, next(iter(values.values())) if len(values) == 1 else [*values.values()])
        for key, values in found.items()
    }


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth < _MAX_DEPTH:
        for key, inner in value.items():
            if key not in _NO_LABELS:
                yield from _leaves(inner, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list) and value and any(isinstance(inner, Mapping) for inner in value):
        for inner in value:
            yield from _leaves(inner, path, depth + 1)
    else:
        yield path, value
