"""The report of fixed files (tests/data/report) says, heading by heading and cell by cell, what its golden text says.

Only the words count: neither tags nor styles nor the drawings. `python tests/test_report_golden.py` writes it anew.
"""

from __future__ import annotations

import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from onefold.cli import main

DATA, GOLDEN = Path(__file__).parent / "data" / "report", Path(__file__).parent / "golden" / "report.txt"
PREFIX = {"h1": "# ", "h2": "## ", "h3": "### ", "caption": "table: "}
CELLS = ("th", "td")
INLINE = {"a", "abbr", "b", "code", "em", "i", "small", "span", "strong", "sub", "sup", "time"}
VOID = {"br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
HIDDEN = {"style", "script", "head"}  # and what is drawn, but for its title and description


class Lines(HTMLParser):
    """The text of a page: a line a block, `|` before each cell of a row, `#` before headings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._open: list[str] = []
        self._text = ""
        self.feed(page)
        self.close()
        self._flush()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in CELLS:
            self._text += " | "
        elif tag not in INLINE:
            self._flush()
            self._text = PREFIX.get(tag, "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag not in INLINE and tag not in CELLS:
            self._flush()

    def handle_data(self, data: str) -> None:
        drawn = "svg" in self._open and not {"title", "desc"} & set(self._open)
        if not drawn and not HIDDEN & set(self._open):
            self._text += data

    def _flush(self) -> None:
        if text := " ".join(self._text.split()):
            self.lines.append(text)
        self._text = ""


def report_text() -> str:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        assert main(["report", str(DATA), "--out", str(page)]) == 0
        return "\n".join(Lines(page.read_text(encoding="utf-8")).lines) + "\n"


def test_the_page_says_what_its_golden_text_says() -> None:
    pytest.importorskip("matplotlib")
    assert report_text() == GOLDEN.read_text(encoding="utf-8"), "if wanted: python tests/test_report_golden.py"


def test_a_changed_word_number_or_cell_is_found() -> None:
    text = Lines("<h2>a <b>b</b></h2><table><tr><th>c<td>1.0<tr><td>d<td>2.0</table><svg><text>x</text></svg>").lines
    assert text == ["## a b", "| c | 1.0", "| d | 2.0"]


if __name__ == "__main__":
    GOLDEN.write_text(report_text(), encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}\n")
