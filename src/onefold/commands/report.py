"""results/*.jsonl, runs/, artifacts/ -> report.html: finding what a page can be made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from onefold.commands.open import is_artifact
from onefold.errors import BadData
from onefold.report import write_report

_DEPTH = 3


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of every run, result and artifact in `folders` and up to three folders down."""
    for folder in folders:
        if not folder.is_dir():
            raise BadData(f"{folder} is not a folder: give the one where runs/, results/ or artifacts/ lie")
    places = [place for folder in folders for place in _walk(folder, _DEPTH)]
    write_report(
        out,
        runs=[place for place in places if (place / "log.jsonl").is_file()],
        results=[file for place in places if place.name == "results" for file in sorted(place.glob("*.jsonl"))],
        artifacts=[place for place in places if is_artifact(place)],
    )
    return out


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth:
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
                yield from _walk(inner, depth - 1)
