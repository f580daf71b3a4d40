"""runs, results and artifacts -> report.html: finding them by what they contain, below the places that are given."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onefold.errors import BadData
from onefold.file_io import suggest_path
from onefold.report import ACCURACY_FILE, GATES_FILE, write_report
from onefold.report.format import format_count, join_words, one_line, parse_json_object
from onefold.report.study_results import STUDY_SUFFIX
from onefold.runtimes.artifact import is_artifact

_log = logging.getLogger("onefold")
_Reason = tuple[str, str]  # why a folder was not searched, in the singular and in the plural

_MAX_DEPTH = 8
_MAX_FOLDERS = 20_000
_HEAD_BYTES = 1 << 20  # of a file of JSON lines, read to learn what it holds
_MEASUREMENT = re.compile(rb'^\s*\{"kind": ?"(measurement|comparison)"', re.MULTILINE)  # as bench writes it
_TRAINING_LOG = re.compile(rb'^\s*\{"kind": ?"(start|epoch)"', re.MULTILINE)  # as train writes it
_OURS = re.compile(rb'"samples_ns":|"checksum": ?"[0-9a-f]{64}"')  # in a line of bench whose start is damaged
_OF_A_RUN = ("log.jsonl", "predictions.jsonl")  # which the report reads with the run

_HIDDEN = "hidden folder", "hidden folders"
_LINK = "link to a folder", "links to folders"
_UNREADABLE = "folder that cannot be read", "folders that cannot be read"
_TOO_DEEP = f"folder more than {_MAX_DEPTH} levels down", f"folders more than {_MAX_DEPTH} levels down"
_TOO_MANY = f"folder after the first {_MAX_FOLDERS:,}", f"folders after the first {_MAX_FOLDERS:,}"


@dataclass(frozen=True)
class _Found:
    """What lies below some places, and how many folders were not searched, by reason."""

    runs: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    artifacts: list[Path] = field(default_factory=list)
    gates: list[Path] = field(default_factory=list)
    accuracies: list[Path] = field(default_factory=list)
    studies: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)  # they may have been results
    skipped: Counter[_Reason] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Counts of what was found and of what was not searched, as one line."""
        counts = ((self.runs, "run"), (self.results, "results file"), (self.artifacts, "artifact"))
        found = join_words([format_count(len(paths), noun) for paths, noun in counts])
        found += f"; {format_count(len(self.studies), 'study', 'studies')}" if self.studies else ""
        if self.accuracies and not (self.runs or self.results or self.artifacts or self.studies):
            found = format_count(len(self.accuracies), "file of accuracies", "files of accuracies")
        return "; ".join([found + _not_searched(self.skipped, "; "), *self.damaged_notes])

    @property
    def damaged_notes(self) -> list[str]:
        """A sentence for each file that may have been results."""
        return [
            f"{one_line(path.name)} is left out: it has no line as `onefold bench` writes them" for path in self.damaged
        ]


@dataclass(frozen=True, kw_only=True)
class Report(os.PathLike[str]):
    """The page that was written, and what it is of."""

    page: Path
    found: _Found

    def __fspath__(self) -> str:
        return str(self.page)

    def __str__(self) -> str:
        return f"wrote {self.page} of {self.found}"

    def __repr__(self) -> str:
        return f"Report({str(self.page)!r}, of {self.found})"


def report(*folders: str | os.PathLike[str], out: str | os.PathLike[str] = "report.html") -> Report:
    """Write one self-contained HTML page of all runs, results and artifacts in the folders and below them.

    Without a folder it is the current one. Raises BadData where there is nothing, MissingExtra without matplotlib,
    NotWritable.

        onefold.report(".", out="report.html")
    """
    page, places = Path(out), [Path(folder) for folder in folders or (".",)]
    found = write_report_page(places, page)
    beside = [
        path.as_posix() + "/"
        for name in ("artifacts", "results", "runs")
        for path in dict.fromkeys(place.parent / name for place in places)
        if path.is_dir() and not any(os.path.samefile(path, place) or place in path.parents for place in places)
    ]
    if beside and not (found.runs and found.artifacts and found.results):
        _log.info("not in the report, as they were not given: %s", join_words(beside))
    return Report(page=page, found=found)


def write_report_page(places: Sequence[Path], out: Path) -> _Found:
    """Write the report of every run, result and artifact below `places` to `out`; return what was found.

    Raises BadData where a place does not exist or nothing is found, MissingExtra without matplotlib, NotWritable.
    """
    found = find_inputs(places)
    if not (found.runs or found.results or found.artifacts or found.gates or found.studies or found.accuracies):
        where = join_words([str(place) for place in places])
        raise BadData(
            f"there is no run, result or artifact in {where} or below{_not_searched(found.skipped, ', ')}: give the "
            + "; ".join(["folders that train, bench or export wrote to", *found.damaged_notes])
        )
    # Hidden folders and links are left out on purpose; for the others, the page must say what it may lack.
    lacking = Counter({reason: n for reason, n in found.skipped.items() if reason not in (_HIDDEN, _LINK)})
    notes = [f"The report may lack something{_not_searched(lacking, ': ')}."] if lacking else []
    notes += [f"The report may lack results: {note}." for note in found.damaged_notes]
    write_report(
        out,
        runs=found.runs,
        results=found.results,
        artifacts=found.artifacts,
        gates=found.gates,
        accuracies=found.accuracies,
        studies=found.studies,
        notes=notes,
    )
    return found


def find_inputs(places: Sequence[Path]) -> _Found:
    """Return what the report is made from in `places` and below, each once, in the order of their paths.

    A run is a folder with a training log, or with a recipe and weights, an artifact one with the manifest of an export,
    and results are files of JSON lines with measurements, whatever their names are; gates and accuracies are files of
    these names. A file of JSON lines that has none is damaged. Raises BadData where a place does not exist.
    """
    found, seen = _Found(), set[str]()
    for place in places:
        if place.is_file():
            found.results.append(place)  # named by the user: what is wrong with it is said on the page
            continue
        if not place.is_dir():
            hint = "" if place.exists() else suggest_path(place)
            raise BadData(f"{place} is not a folder: give folders with runs, results or artifacts{hint}")
        pending = [(place, 0)]
        while pending:
            folder, depth = pending.pop()
            if depth > _MAX_DEPTH or len(seen) >= _MAX_FOLDERS:
                found.skipped[_TOO_DEEP if depth > _MAX_DEPTH else _TOO_MANY] += 1
                continue
            if (real := os.path.realpath(folder)) in seen:  # one place may lie in another
                continue
            seen.add(real)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:
                found.skipped[_UNREADABLE] += 1
                continue
            if is_artifact(folder):  # it holds nothing but the files of its manifest
                found.artifacts.append(folder)
                continue
            pending += reversed([(Path(entry.path), depth + 1) for entry in entries if _is_searched(entry, found)])
            files = {entry.name: entry for entry in entries if entry.is_file()}
            log, has_weights = files.get("log.jsonl"), any(e.name in ("best", "last") and e.is_dir() for e in entries)
            has_recipe = "recipe.json" in files
            if (has_weights and has_recipe) or (log and (has_weights or has_recipe or _holds(log, _TRAINING_LOG))):
                found.runs.append(folder)
                files = {name: entry for name, entry in files.items() if name not in _OF_A_RUN}
            if GATES_FILE in files:
                found.gates.append(folder / GATES_FILE)
            if ACCURACY_FILE in files:
                found.accuracies.append(folder / ACCURACY_FILE)
            found.studies.extend(folder / name for name in files if name.endswith(STUDY_SUFFIX))
            for entry in (entry for name, entry in files.items() if name.endswith(".jsonl") and name[0] != "."):
                if _holds(entry, _MEASUREMENT):
                    found.results.append(Path(entry.path))
                elif _holds(entry, _OURS) or not _holds_objects(entry):
                    found.damaged.append(Path(entry.path))
    return found


def _is_searched(entry: os.DirEntry[str], found: _Found) -> bool:
    """Whether the entry is a folder to go on in; counts it where it is one to leave out."""
    if not entry.is_dir():
        return False
    reason = _HIDDEN if entry.name.startswith(".") else _LINK if entry.is_symlink() else None
    if reason:
        found.skipped[reason] += 1
    return reason is None


def _holds(entry: os.DirEntry[str], pattern: re.Pattern[bytes]) -> bool:
    try:
        with open(entry.path, "rb") as file:
            return pattern.search(file.read(_HEAD_BYTES)) is not None
    except OSError:
        return True  # reading the whole of it fails again, with a note on the page


def _holds_objects(entry: os.DirEntry[str]) -> bool:
    """Whether a file has a line with a JSON object, as other people's tables have."""
    try:
        with open(entry.path, encoding="utf-8", errors="replace") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return True
    return any(parse_json_object(line) for line in head.split("\n"))


def _not_searched(skipped: Counter[_Reason], before: str) -> str:
    counts = [format_count(number, *reason) for reason, number in sorted(skipped.items())]
    return f"{before}not searched: {join_words(counts)}" if counts else ""
