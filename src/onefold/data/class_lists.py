"""Lists of classes in a text: the one reader, of a file that `--classes` gives and of one beside the data.

| lines | are read as |
|---|---|
| `0 cat`, `0: cat`, `cat,0`, `cat 0` | names by their numbers, where all lines have another one, and another name |
| `id,name,color` above `0,cat,red` | columns: the names, and their numbers where a column has these |
| `name` above `cat`, `dog`; `# comment`; a count of the lines above them | names in their order |
| `names:` of YAML, its list or mapping | the same |

A text may be readable in several ways, since a first line may name a column or a class. All are given, the likely ones
first; a caller that knows the number of classes takes the first that fits. One that may hold a line too many fits only
where it names exactly as many.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onefold.data.splits import split_into_words
from onefold.data.table_columns import is_class_index_column, is_class_name_column, rank_class_column

_NUMBER_FIRST = re.compile(r"(?P<number>[0-9]{1,7})(?:\s*[:,;\t|=]\s*|[.)]?\s+)(?P<name>\S.*)")
_NUMBER_LAST = re.compile(r"(?P<name>\S|\S.*?\S)(?:\s*[:,;\t|=]\s*|\s+)(?P<number>[0-9]{1,7})")
_YAML_NAMES = re.compile(r"^(?P<indent> *)(?:names|classes|class_names|labels) *:(?P<inline>.*)$", re.MULTILINE)
_YAML_ITEMS = re.compile(r"(?:\n(?: +\S| *- ).*)*")
_YAML_COMMENT = re.compile(r"\s+#.*$", re.MULTILINE)
_NAME_WORDS = frozenset(("name", "names", "classname", "classnames", "labelname", "labelnames"))
_INDEX_WORDS = frozenset(("id", "ids", "index", "idx", "no", "nr", "number", "num", "code", "classid", "labelid"))
_SEPARATORS = ",;\t|"
_UNKNOWN = 9  # the rank of a column that is not called as one of classes


@dataclass(frozen=True)
class ClassList:
    """Names by their numbers, or in their order; `is_exact` where it fits only as many classes as it has names."""

    names: Mapping[int, str] | Sequence[str]
    is_exact: bool = False


def read_class_lists(text: str, *, is_table: bool) -> list[ClassList]:
    """Give what a text may say of classes, the likely first; `is_table` where its suffix is one of tables (.csv)."""
    if found := read_yaml_lists(text):
        return found
    whole = [line.strip() for line in text.split("\n") if line.strip()]
    lines = [line for line in whole if not line.startswith("#")]
    if not lines:
        return []
    if (columns := _divide(lines, is_table)) is not None:
        return [*_columns(columns)]
    is_counted = lines[0].isdecimal() and 0 <= len(lines) - 1 - int(lines[0]) <= 1
    if is_counted:  # how many there are, and perhaps what the columns are called
        lines = lines[1 + (len(lines) - 1 - int(lines[0])) :]
    lines = [line.strip('"') for line in lines]
    found = [*_numbered(lines)]
    if is_counted and (kinds := _with_kinds(lines)):
        found.append(kinds)
    if is_counted:
        found.append(ClassList(lines))
    elif _is_header(lines[0]):
        found += [ClassList(lines[1:]), ClassList(lines, is_exact=True)]
    elif is_table:  # the first line may name the column, in any language
        found += [ClassList(lines, is_exact=True), ClassList(lines[1:], is_exact=True)]
    else:
        found.append(ClassList(lines))
    return [*found, ClassList(whole, is_exact=True)]


def read_yaml_lists(text: str) -> list[ClassList]:
    """Give what is under `names` in a text of YAML; nothing where there is no such key."""
    listed = _parse_yaml_names(text)
    return [] if listed is None else [*_numbered(listed), ClassList(listed)]


def _numbered(lines: Sequence[str]) -> Iterator[ClassList]:
    """Read lines of a number and a name, where all but a first one are such, and have different ones."""
    for form in (_NUMBER_FIRST, _NUMBER_LAST):
        rows = lines if form.fullmatch(lines[0]) else lines[1:]
        found = [match for line in rows if (match := form.fullmatch(line))]
        names = {int(match["number"]): match["name"].strip(" '\",;") for match in found}
        if len(rows) > 1 and len({*names.values()}) == len(names) == len(rows):
            yield ClassList(names)


def _with_kinds(lines: Sequence[str]) -> ClassList | None:
    """Read counted lines of a name and what kind of class it is, by a number: they are numbered from 1 on."""
    pairs = [match for line in lines if (match := _NUMBER_LAST.fullmatch(line))]
    return ClassList(dict(enumerate([match["name"] for match in pairs], 1))) if len(pairs) == len(lines) > 1 else None


def _is_header(cell: str) -> bool:
    return rank_class_column(cell) is not None or bool({*split_into_words(cell)} and _is_called(cell, _NAME_WORDS))


def _is_called(column: str, words: frozenset[str]) -> bool:
    """Whether a column's words are such, perhaps beside words for classes."""
    called = split_into_words(column)
    return any(word in words for word in called) and all(
        word in words or rank_class_column(word) is not None for word in called
    )


# --------------------------------------------------------------------------------------------- columns


def _divide(lines: Sequence[str], is_table: bool) -> list[list[str]] | None:
    """Divide lines into cells, the same number each; None where they have one, or differ and are of no table."""
    separator = max(_SEPARATORS, key=lines[0].count)
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator, skipinitialspace=True)]
    except csv.Error:
        return None
    width = len(rows[0])
    if width < 2 or not all(len(row) >= width and not any(row[width:]) for row in rows):
        return None
    return rows if is_table or _has_numbers(rows) or _is_header(rows[0][0]) else None


def _has_numbers(rows: Sequence[Sequence[str]]) -> bool:
    return any(all(row[i].isdecimal() for row in rows[1:]) for i in range(len(rows[0])))


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[ClassList]:
    """Read columns, below a line of their names or without one; nothing where it cannot be told which has the names."""
    for body, titles in ((rows[1:], rows[0]), (rows, [""] * len(rows[0]))):
        if not body:
            continue
        cells = [[row[i] for row in body] for i in range(len(rows[0]))]
        numbers = [i for i, column in enumerate(cells) if all(map(str.isdecimal, column))]
        texts = [i for i in range(len(cells)) if not all(_is_number(cell) for cell in cells[i])]
        is_titled = any(not titles[i].isdecimal() for i in numbers) or any(map(_is_header, titles))
        if titles is rows[0] and not is_titled:
            continue
        ranks = sorted((_rank(titles[i]), i) for i in texts)
        if not ranks or (len(ranks) > 1 and ranks[0][0] == ranks[1][0] == _UNKNOWN):
            return
        names = [cell.strip("'\" ") for cell in cells[ranks[0][1]]]
        counted = [i for i in numbers if len({*map(int, cells[i])}) == len(body)]
        called = [i for i in counted if _is_called(titles[i], _INDEX_WORDS) or is_class_index_column(titles[i])]
        called = called or [i for i in counted if rank_class_column(titles[i]) is not None]
        plain = [i for i in counted if sorted(map(int, cells[i])) in ([*range(len(body))], [*range(1, len(body) + 1)])]
        if chosen := called or plain:
            yield ClassList(dict(zip(map(int, cells[chosen[0]]), names, strict=True)))
        elif ranks[0][0] < _UNKNOWN:
            yield ClassList(names)
        return


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", cell))


def _rank(column: str) -> int:
    """Give how surely a column names classes, 0 the most."""
    if is_class_name_column(column) or _is_called(column, _NAME_WORDS):
        return 0
    if rank_class_column(column) is not None:
        return 1
    return 2 if _NAME_WORDS & {*split_into_words(column)} else _UNKNOWN


def _parse_yaml_names(text: str) -> list[str] | None:
    """Give the entries under `names` (or `classes`, `labels`) in a text of YAML; None where there is no such key."""
    text = _YAML_COMMENT.sub("", text)
    key = _YAML_NAMES.search(text)
    if key is None:
        return None
    inline = key["inline"].strip()
    if inline[:1] in ("[", "{"):
        parts = text[key.start("inline") :].strip()[1:].partition("]" if inline[0] == "[" else "}")[0].split(",")
    else:
        items = _YAML_ITEMS.match(text, key.end())
        parts = items[0].split("\n") if items else []
    return [name for part in parts if (name := part.strip().removeprefix("- ").strip(" '\""))] or None
