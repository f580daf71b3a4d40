"""HTML that cannot be broken into: text is escaped unless it was made here.

A name can hold anything - tags, newlines, bytes that are no UTF-8 (surrogates). `plain` makes it one printable line,
and `element` escapes every child that is not already `Markup`.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LONGEST = 160
# Characters that turn the direction of the text after them.
_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_VOID = frozenset({"meta", "br", "hr", "img"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def plain(value: object, longest: int = _LONGEST) -> str:
    """The value as one line of printable text: what cannot be shown becomes U+FFFD, long text is cut in its middle."""
    text = " ".join("".join(map(_printable, str(value))).split())
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def element(name: str, *children: str | None, attributes: Mapping[str, str] | None = None) -> Markup:
    """`<name ...>children</name>`; None among the children is left out."""
    given = "".join(f' {key}="{_escaped(value)}"' for key, value in (attributes or {}).items())
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: str | None, between: str = "") -> Markup:
    """The children one after the other, escaped where they are not Markup."""
    return Markup(between.join(_escaped(child) for child in children if child is not None))


def classed(name: str, kind: str, *children: str | None) -> Markup:
    """An element with a CSS class."""
    return element(name, *children, attributes={"class": kind})


def paragraph(*sentences: str | None) -> Markup:
    """Sentences as one paragraph; nothing at all where there are none."""
    said = [sentence for sentence in sentences if sentence]
    return element("p", joined(*said, between=" ")) if said else Markup("")


def bullets(items: Sequence[str], kind: str = "plain") -> Markup:
    """A list; nothing at all where it is empty."""
    if not items:
        return Markup("")
    return classed("ul", kind, *(element("li", item) for item in items))


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers stand to the right."""

    title: str
    is_number: bool = False


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Markup:
    """A table with a caption; on a narrow screen each row becomes a card, so each cell carries its column's title.

    The roles are written out because a browser forgets them where CSS changes how a table is laid out.
    """
    heads = [
        element("th", column.title, attributes={"scope": "col", "role": "columnheader", **_numeric(column)})
        for column in columns
    ]
    body = [element("tr", *_cells(columns, row), attributes={"role": "row"}) for row in rows]
    inner = (
        element("caption", caption),
        element("thead", element("tr", *heads, attributes={"role": "row"}), attributes={"role": "rowgroup"}),
        element("tbody", *body, attributes={"role": "rowgroup"}),
    )
    return classed("div", "scroll", element("table", *inner, attributes={"role": "table"}))


def facts(caption: str, pairs: Sequence[tuple[str, str]]) -> Markup:
    """A table of two columns: a name and what it is."""
    rows = [
        element(
            "tr",
            element("th", name, attributes={"scope": "row", "role": "rowheader"}),
            element("td", value, attributes={"role": "cell"}),
            attributes={"role": "row"},
        )
        for name, value in pairs
        if value
    ]
    inner = element("table", element("caption", caption), element("tbody", *rows), attributes={"class": "facts"})
    return classed("div", "scroll", inner)


def _cells(columns: Sequence[Column], row: Sequence[str]) -> list[Markup]:
    first, *rest = zip(columns, row, strict=True)
    head = {"scope": "row", "role": "rowheader", "data-label": first[0].title}
    cells = [element("th", first[1], attributes=head)]
    for column, value in rest:
        label = {"role": "cell", "data-label": column.title, **_numeric(column)}
        cells.append(element("td", value, attributes=label))
    return cells


def _numeric(column: Column) -> dict[str, str]:
    return {"class": "number"} if column.is_number else {}


def _escaped(child: str) -> str:
    return child if isinstance(child, Markup) else html.escape("".join(map(_printable, child)))


def _printable(character: str) -> str:
    kind = unicodedata.category(character)
    if kind in ("Cc", "Zl", "Zp"):  # controls and line ends
        return " "
    if kind == "Cs" or unicodedata.bidirectional(character) in _TURNING:
        return "\ufffd"
    return character
