"""What a study found, as plain data: tables, figures, and what the paper says beside what was measured.

`onefold study` writes it beside the raw samples, as <machine>-<study>.study.json; the report shows it as a section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from onefold.checksums import read_sealed_json, write_sealed_json
from onefold.errors import BadData

STUDY_SUFFIX = ".study.json"


@dataclass(frozen=True, kw_only=True)
class FigurePoint:
    """A point of a figure, with the interval of its y; `label` names it, in a dot plot it names the row."""

    y: float
    x: float | None = None
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class FigureSeries:
    """Points of one kind: those of a runtime, or the paper's."""

    label: str
    points: tuple[FigurePoint, ...]


@dataclass(frozen=True, kw_only=True)
class StudyFigure:
    """A figure as data. `dots`: a row a label, y on the horizontal axis; `lines`: y over x; `scatter`: points."""

    kind: Literal["dots", "lines", "scatter"]
    title: str
    x_label: str
    y_label: str
    series: tuple[FigureSeries, ...]


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """A table as text; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """One claim of the paper, what was measured `where` (a runtime and precision), and whether they agree.

    `verdict` is a few words: agrees, does not agree, not decided.
    """

    where: str
    paper: str
    here: str
    verdict: str

    def __str__(self) -> str:
        """The three as one line."""
        return f"{self.where}: the paper: {self.paper}; here: {self.here}; {self.verdict}"


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A study's outcome on one machine: `conditions` say how it was measured, `notes` what is missing."""

    name: str
    question: str
    source: str
    date: str
    machine: str
    conditions: str
    tables: tuple[StudyTable, ...]
    figures: tuple[StudyFigure, ...]
    conclusions: tuple[Conclusion, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": "study", **asdict(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> StudyResult:
        """The inverse of `to_dict`. Raises KeyError or TypeError for anything else."""
        return cls(
            **{name: str(plain[name]) for name in ("name", "question", "source", "date", "machine", "conditions")},
            tables=tuple(_table(each) for each in plain["tables"]),
            figures=tuple(_figure(each) for each in plain["figures"]),
            conclusions=tuple(Conclusion(**each) for each in plain["conclusions"]),
            notes=tuple(map(str, plain["notes"])),
        )


def write_study(path: Path, result: StudyResult) -> None:
    """Write a study's outcome with its checksum."""
    write_sealed_json(path, result.to_dict())


def read_study(path: Path) -> StudyResult:
    """Read what `write_study` wrote. Raises BadData where it is damaged, or something else."""
    try:
        return StudyResult.from_dict(read_sealed_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(f"{path} is damaged, or no result of a study ({error}): run the study again") from error


def _table(plain: Mapping[str, Any]) -> StudyTable:
    rows: Sequence[Sequence[Any]] = plain["rows"]
    columns = tuple(map(str, plain["columns"]))
    if any(len(row) != len(columns) for row in rows):
        raise ValueError("a row of a table has another number of cells than the table has columns")
    return StudyTable(caption=str(plain["caption"]), columns=columns, rows=tuple(tuple(map(str, row)) for row in rows))


def _figure(plain: Mapping[str, Any]) -> StudyFigure:
    if plain["kind"] not in ("dots", "lines", "scatter"):
        raise ValueError(f"{plain['kind']!r} is no kind of figure")
    series = tuple(
        FigureSeries(label=str(each["label"]), points=tuple(FigurePoint(**point) for point in each["points"]))
        for each in plain["series"]
    )
    return StudyFigure(**{**plain, "series": series})
