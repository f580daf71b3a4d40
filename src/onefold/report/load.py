"""What a report is made from: run folders, results files and artifact folders, read with patience.

Whatever is missing or damaged becomes a note, one sentence for the page, and never an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onefold.bench import Comparison, Measurement, read_all
from onefold.errors import BadData
from onefold.report.html import plain
from onefold.report.predictions import Predictions, read_predictions

_ABSURD = 1e15  # also leaves out what is infinite or no number


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training: its epochs as its log tells them, in order, and what its recipe promised. Accuracies in percent."""

    name: str
    epochs: tuple[Mapping[str, Any], ...] = ()
    start: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    expected_top1: float | None = None
    expected_source: str | None = None
    predictions: Predictions | None = None
    findings: tuple[str, ...] = ()

    def curve(self, key: str) -> tuple[tuple[float, float], ...]:
        """(epoch, value) wherever the log has a finite number under `key`."""
        points = ((number(line, "epoch"), number(line, key)) for line in self.epochs)
        return tuple((epoch, value) for epoch, value in points if epoch is not None and value is not None)

    def last(self, key: str) -> float | None:
        """The last value in the log."""
        return self.curve(key)[-1][1] if self.curve(key) else None

    @property
    def best(self) -> tuple[float, float] | None:
        """(epoch, top-1) of the best epoch: the first of equals, as a training keeps it."""
        return max(self.curve("top1"), key=lambda point: (point[1], -point[0]), default=None)


@dataclass(frozen=True, kw_only=True)
class Export:
    """An artifact, as its manifest tells it; None where it does not. `top1` in percent."""

    folder: str
    manifest: Mapping[str, Any]
    num_bytes: int | None = None

    def text(self, key: str) -> str:
        """The value under `key` as text; empty where there is none."""
        value = self.manifest.get(key)
        return "" if value is None else plain(value)

    @property
    def fused(self) -> bool | None:
        """Whether it was folded; None where the manifest does not say."""
        fused = self.manifest.get("fused")
        return fused if isinstance(fused, bool) else None

    @property
    def hashes(self) -> frozenset[str]:
        """Every SHA-256 that the manifest names, its own among them."""
        own, files = self.manifest.get("sha256"), self.manifest.get("files")
        found = [own] if isinstance(own, str) else list(own.values()) if isinstance(own, Mapping) else []
        listed = files.values() if isinstance(files, Mapping) else ()
        return frozenset(map(str, (*found, *(each.get("sha256") for each in listed if isinstance(each, Mapping)))))

    @property
    def top1(self) -> float | None:
        """The accuracy of this very artifact, where somebody measured it and wrote it into the manifest."""
        details = self.manifest.get("details")
        inner = details if isinstance(details, Mapping) else {}
        return next((found for place in (self.manifest, inner) if (found := number(place, "top1")) is not None), None)

    @property
    def num_classes(self) -> int | None:
        """How many classes it tells apart."""
        classes, count = self.manifest.get("classes"), number(self.manifest, "num_classes")
        return len(classes) if isinstance(classes, list) else None if count is None else int(count)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything there is to report, and `notes` about what there was not."""

    runs: tuple[Run, ...]
    exports: tuple[Export, ...]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    sources: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def all_measurements(self) -> tuple[Measurement, ...]:
        """Those measured alone and those measured in comparisons."""
        within = (each for comparison in self.comparisons for each in comparison.measurements.values())
        return (*self.measurements, *within)

    def top1_of(self, subject: Mapping[str, Any]) -> float | None:
        """The accuracy of what was measured, in percent: its own, or that of the artifact with its SHA-256."""
        own = number(subject, "top1")
        if own is not None:
            return own
        digest = subject.get("sha256")
        same = (export.top1 for export in self.exports if digest and str(digest) in export.hashes)
        return next((top1 for top1 in same if top1 is not None), None)

    def top1_of_export(self, export: Export) -> float | None:
        """The accuracy of an artifact, in percent: its own, or that of a measurement of the same bytes."""
        if export.top1 is not None:
            return export.top1
        subjects = (each.subject for each in self.all_measurements)
        same = (number(subject, "top1") for subject in subjects if str(subject.get("sha256")) in export.hashes)
        return next((top1 for top1 in same if top1 is not None), None)


def gather(runs: Sequence[Path], results: Sequence[Path], artifacts: Sequence[Path]) -> Inputs:
    """Read it all."""
    notes: list[str] = []
    measurements: list[Measurement] = []
    comparisons: list[Comparison] = []
    for path in results:
        try:
            found = read_all(path)
        except BadData as error:
            notes.append(f"The results {plain(path.name)} could not be used: {_without_folder(str(error), path)}")
            continue
        notes += found.notes if found.measurements or found.comparisons else [f"{plain(path.name)} holds no results."]
        measurements += found.measurements
        comparisons += found.comparisons
    return Inputs(
        runs=tuple(_read_run(path, notes) for path in runs),
        exports=tuple(export for path in artifacts if (export := _read_export(path, notes)) is not None),
        measurements=tuple(measurements),
        comparisons=tuple(comparisons),
        sources=tuple(plain(path.name) for path in results),
        notes=tuple(notes),
    )


def number(values: Mapping[str, Any], key: str) -> float | None:
    """The number under `key`; None where there is none, or none that any figure here could have."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _ABSURD else None


def _read_run(path: Path, notes: list[str]) -> Run:
    name = plain(path.name)
    lines = _lines(path / "log.jsonl", name, notes)
    epochs = {at: line for line in lines if line.get("kind") == "epoch" and (at := number(line, "epoch")) is not None}
    if lines and not epochs:
        notes.append(f"The run {name} has not finished an epoch yet.")
    recipe = _object(path / "recipe.json")
    expect = recipe.get("expect")
    expected: Mapping[str, Any] = expect if isinstance(expect, Mapping) else {}
    return Run(
        name=name,
        epochs=tuple(epochs[at] for at in sorted(epochs)),
        start=next((line for line in lines if line.get("kind") == "start"), {}),
        recipe=plain(recipe["name"]) if isinstance(recipe.get("name"), str) else None,
        expected_top1=number(expected, "top1"),
        expected_source=plain(expected["source"]) if expected.get("source") else None,
        predictions=read_predictions(path / "predictions.jsonl", name, notes),
        findings=_findings(_object(path / "check.json")),
    )


def _findings(check: Mapping[str, Any]) -> tuple[str, ...]:
    found = check.get("findings")
    texts = (each.get("text") for each in found if isinstance(each, Mapping)) if isinstance(found, list) else ()
    return tuple(plain(text, 400) for text in texts if isinstance(text, str))


def _lines(path: Path, name: str, notes: list[str]) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"The run {name} has no log: log.jsonl is missing or cannot be read.")
        return []
    parsed = [_parsed(line) for line in text.split("\n") if line.strip()]
    lost = sum(not line for line in parsed)
    if lost or not parsed:
        notes.append(
            f"The log of {name} is empty." if not parsed else f"{lost} lines of the log of {name} are damaged."
        )
    return [line for line in parsed if line]


def _read_export(path: Path, notes: list[str]) -> Export | None:
    name = plain(path.name)
    manifest = _object(path / "manifest.json")
    if not manifest:
        notes.append(f"The artifact {name} has no manifest.json that can be read.")
        return None
    return Export(folder=name, manifest=manifest, num_bytes=_num_bytes(path, manifest))


def _num_bytes(path: Path, manifest: Mapping[str, Any]) -> int | None:
    """The size of all that a user needs to run the model: every file but the proof."""
    files = manifest.get("files")
    listed = files.items() if isinstance(files, Mapping) else ()
    entries = [each for name, each in listed if isinstance(each, Mapping) and name != "reference.npz"]
    sizes = [size for each in entries if (size := number(each, "num_bytes")) is not None]
    if not sizes:
        sizes = [float(file.stat().st_size) for file in sorted(path.glob("model.*")) if file.is_file()]
    return int(sum(sizes)) if sizes else None


def _object(path: Path) -> Mapping[str, Any]:
    try:
        return _parsed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, Mapping) else {}


def _without_folder(text: str, path: Path) -> str:
    """A page is published: it names files, not the folders of whoever wrote it."""
    return plain(text.replace(str(path), path.name), 400)
