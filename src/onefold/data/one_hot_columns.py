"""One column a class: tables in which the one 1 of a row says the class of its image.

Rows with several are of several classes (multi-label): refused, as are columns of findings and attributes, whose cells
are 1, 0, -1 and blanks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onefold.data.decode import printable_name
from onefold.data.folders import join_names
from onefold.data.splits import SPLIT_WORDS
from onefold.data.table_columns import BOOLEAN_WORDS, FLAG_WORDS, MultiLabelError, NotATableError, is_measured_column
from onefold.errors import BadData

_SHOWN = 80


def read_one_hot(
    shown: str,
    cells: Mapping[str, Sequence[str]],
    names: Sequence[str],
    lines: Sequence[int],
    expected: str,
    notes: list[str],
) -> tuple[str, list[str]]:
    """Read one column a class, 1 where an image is of it: what these columns are called, and the class of each row.

    A row without a 1 has the class "". Raises BadData where half of the rows are so: then the columns say other things.
    """
    columns = list(cells)
    _refuse_findings(shown, {name: cells[name] for name in names}, lines)
    names = [
        name
        for name in names
        if all(cell.lower() in BOOLEAN_WORDS for cell in cells[name]) and not is_measured_column(name)
    ]
    if len(names) < 2:
        raise NotATableError(
            f"{shown}: {expected}; its first line is {printable_name(','.join(columns)[:_SHOWN])!r}: rename its columns"
        )
    ones = [[name for name in names if BOOLEAN_WORDS[cells[name][i].lower()]] for i in range(len(lines))]
    for line, those in zip(lines, ones, strict=True):
        if len(those) > 1:
            raise MultiLabelError(f"{shown}, line {line}", f"1 in the columns {join_names(those, 3)}")
    if 2 * ones.count([]) >= len(ones):
        line = lines[ones.index([])]
        raise BadData(f"{shown}, line {line} has no 1 in any column of a class: expected one class an image")
    if never := [name for name in names if [name] not in ones]:
        notes.append(f"{shown}: no image is of {join_names(never, 3)}")
    return f"columns of 0 and 1, {join_names(names, 3)}", [those[0] if those else "" for those in ones]


def _refuse_findings(shown: str, cells: Mapping[str, Sequence[str]], lines: Sequence[int]) -> None:
    """Raise MultiLabelError for columns of 1, 0, -1 and blanks, of which an image has several: findings, attributes.

    -1 is not sure, or (beside 1 alone) no.
    """
    kinds = {name: {cell.removesuffix(".0") for cell in column} for name, column in cells.items()}
    marks = [name for name, kind in kinds.items() if "1" in kind and kind <= {"", "0", "1", "-1"} and kind & {"", "-1"}]
    for i, line in enumerate(lines):
        ones = [name for name in marks if cells[name][i].removesuffix(".0") == "1"]
        if len(ones) > 1:
            raise MultiLabelError(f"{shown}, line {line}", f"1 in the columns {join_names(ones, 3)}")


def without_class_columns(cells: Mapping[str, Sequence[str]], rest: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Give the split columns but for those that are classes: `train` beside bus and car, one 1 in each line."""
    bare = [name for name in columns if name.casefold() in SPLIT_WORDS]
    flags = [[FLAG_WORDS.get(cell.lower()) for cell in cells[name]] for name in (*rest, *bare)]
    flags = [column for column in flags if None not in column]
    is_class = (
        bool(bare) and len(flags) > len(bare) and all(sum(map(bool, row)) == 1 for row in zip(*flags, strict=True))
    )
    return [name for name in columns if not (is_class and name in bare)]
