"""Reading what a report is made from: run folders, result files and artifact folders.

A file that is missing or damaged becomes a note, one sentence for the page, and never an error: a report of what is
left is worth more than none.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from onefold.bench import Comparison, Measurement, read_results
from onefold.checksums import CHECKSUM, NO_CHECKSUM_NOTE, has_checksum, read_sealed_folder
from onefold.errors import BadArtifact, BadCheckpoint, BadData
from onefold.file_io import read_plain_file
from onefold.report.format import finite_number, one_line, parse_json_object
from onefold.report.predictions import Predictions, parse_predictions
from onefold.report.study_results import StudyResult, read_study
from onefold.runtimes.artifact import Artifact, read_manifest

VERDICTS = ("failed", "undecided", "passed")  # of a gate, the worst first
GATES_FILE = "gates.json"  # what each gate of a deployment found, beside its measurements
ACCURACY_FILE = "accuracy.json"  # top-1 of what was evaluated, by its SHA-256; written before or after it was measured

_MAX_BYTES = 256 << 20
_MAX_SENTENCES = 20  # on the data of a run


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """A training run: the epochs of its log, in order, and the accuracy that its recipe expects (in percent).

    Epoch 0 is the network before the first step, where that was evaluated, as a fitted head is. `data_findings` are
    what the check of the data found, `dataset` what was read: splits, notes, and left out.
    """

    name: str
    epochs: tuple[Mapping[str, Any], ...] = ()
    recipe: str | None = None
    expected_top1: float | None = None
    expected_source: str | None = None
    predictions: Predictions | None = None
    data_findings: tuple[str, ...] = ()
    dataset: tuple[str, ...] = ()

    def curve(self, key: str) -> tuple[tuple[float, float], ...]:
        """Return (epoch, value) wherever the log has a finite number under `key`."""
        points = ((finite_number(line, "epoch"), finite_number(line, key)) for line in self.epochs)
        return tuple((epoch, value) for epoch, value in points if epoch is not None and value is not None)

    def last(self, key: str) -> float | None:
        """Return the last value under `key`; None where there is none."""
        curve = self.curve(key)
        return curve[-1][1] if curve else None

    @property
    def num_epochs(self) -> int:
        """How many epochs of training are done: the evaluation before the first is none."""
        return sum((finite_number(line, "epoch") or 0) >= 1 for line in self.epochs)

    @property
    def best(self) -> tuple[float, float] | None:
        """(epoch, top-1) of the best epoch: the last of equals, which is the one that training keeps."""
        return max(self.curve("top1"), key=lambda point: (point[1], point[0]), default=None)


class Accuracy(NamedTuple):
    """A top-1 in percent, and of how many images it is; None where that is not known. `data` names these."""

    top1: float
    num_images: int | None = None
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What a gate of a deployment found: passed, failed or undecided, and of which artifact's folder.

    `within_bound` is whether an undecided one lost no more than may be lost on the photos that were scored.
    """

    verdict: str
    sentence: str
    folder: Path
    within_bound: bool


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """Everything there is to report; `sources` names the result files, `notes` says what could not be used.

    `gates` are those of deployments, `accuracies` the top-1 of what was evaluated, by its SHA-256;
    `comparison_folders` names, for each comparison, the folder with the results folder that it lies in.
    """

    runs: tuple[RunLog, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    sources: tuple[str, ...] = ()
    gates: tuple[GateResult, ...] = ()
    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    studies: tuple[StudyResult, ...] = ()
    notes: tuple[str, ...] = ()
    comparison_folders: tuple[str, ...] = ()

    @property
    def all_measurements(self) -> tuple[Measurement, ...]:
        """Those measured alone and those measured in comparisons."""
        compared = (m for comparison in self.comparisons for m in comparison.measurements.values())
        return (*self.measurements, *compared)

    def accuracy_of(self, subject: Mapping[str, Any]) -> Accuracy | None:
        """Return the accuracy of a measured subject: its own, that of the artifact with its SHA-256, or the one that
        was evaluated."""
        digest = str(subject.get("sha256"))
        same = (a.details for a in self.artifacts if digest in {stored.sha256 for stored in a.files.values()})
        return next(filter(None, map(_accuracy, (subject, *same))), self.accuracies.get(digest))

    def gate_of(self, subject: Mapping[str, Any]) -> str | None:
        """Return the verdict of a measured subject's gate, None where it had none."""
        digest = subject.get("sha256")
        same = [a for a in self.artifacts if digest in {stored.sha256 for stored in a.files.values()}]
        return _worst(verdict for artifact in same if (verdict := self.gate_of_artifact(artifact)) is not None)

    def gate_of_artifact(self, artifact: Artifact) -> str | None:
        """Return the verdict of an artifact's gate, None where it had none."""
        return _worst(gate.verdict for gate in self.gates if gate.folder == artifact.folder.absolute())

    def float_predictions(self, artifact: Artifact) -> Predictions | None:
        """Return the predictions, for a run's validation images, of the network that an artifact was exported from."""
        found = (run.predictions for run in self.runs if run.predictions is not None)
        network = artifact.details.get("network")
        return next((each for each in found if each.network is not None and each.network == network), None)

    def accuracy_of_artifact(self, artifact: Artifact) -> Accuracy | None:
        """Return the accuracy of an artifact: its manifest's, or that of a measurement of the same bytes."""
        digests = {stored.sha256 for stored in artifact.files.values()}
        same = (m.subject for m in self.all_measurements if m.subject.get("sha256") in digests)
        own = next(filter(None, map(_accuracy, (artifact.details, *same))), None)
        return own or next((self.accuracies[d] for d in digests if d in self.accuracies), None)


def _accuracy(values: Mapping[str, Any]) -> Accuracy | None:
    top1, count = finite_number(values, "top1"), finite_number(values, "top1_count")
    return None if top1 is None else Accuracy(top1, int(count) if count and count >= 1 else None)


def _worst(verdicts: Iterable[str]) -> str | None:
    return min(verdicts, key=VERDICTS.index, default=None)


def load_report_inputs(
    runs: Sequence[Path],
    results: Sequence[Path],
    artifacts: Sequence[Path],
    gates: Sequence[Path] = (),
    accuracies: Sequence[Path] = (),
    studies: Sequence[Path] = (),
) -> ReportInputs:
    """Read all of it; what cannot be read becomes a note. Measurements of a study are shown with the study alone."""
    notes: list[str] = []
    measurements: list[Measurement] = []
    comparisons: list[Comparison] = []
    folders: list[str] = []
    for path in results:
        try:
            read = read_results(path)
        except BadData as error:
            notes.append(f"The results {one_line(path.name)} could not be used: {_without_folder(error, path)}")
            continue
        notes += read.notes if read.measurements or read.comparisons else [f"{one_line(path.name)} holds no results."]
        measurements += read.measurements
        found = [each for each in read.comparisons if "study" not in each.twin.subject]
        comparisons += found
        folders += [one_line(path.absolute().parent.parent.name)] * len(found)
    manifests = []
    for path in artifacts:
        try:
            manifests.append(read_manifest(path))
        except BadArtifact as error:
            notes.append(f"The artifact {one_line(path.name)} could not be used: {_without_folder(error, path)}")
    judged = tuple(gate for path in gates for gate in _read_gates(path, notes))
    notes += _opposite_verdicts(manifests, judged)
    return ReportInputs(
        runs=tuple(_read_run(path, notes) for path in runs),
        artifacts=tuple(manifests),
        measurements=tuple(measurements),
        comparisons=tuple(comparisons),
        sources=tuple(one_line(path.name) for path in results),
        gates=_with_folders(judged),
        studies=tuple(_read_studies(studies, notes)),
        accuracies={digest: found for path in accuracies for digest, found in _read_accuracies(path, notes)},
        notes=tuple(notes),
        comparison_folders=tuple(folders),
    )


# ---- runs ------------------------------------------------------------------------------------------------------------


def _read_run(folder: Path, notes: list[str]) -> RunLog:
    name = one_line(folder.name)
    lines = _read_log(folder / "log.jsonl", name, notes)
    # A resumed run writes an epoch again: the later line holds.
    kinds = ("evaluation", "epoch")
    epochs = {
        at: line for line in lines if line.get("kind") in kinds and (at := finite_number(line, "epoch")) is not None
    }
    if lines and not epochs:
        notes.append(f"The run {name} has not finished an epoch yet.")
    recipe = parse_json_object(_read_text(folder / "recipe.json") or "")
    notes += _differences_from_checkpoint(folder, name, recipe, lines)
    expect = recipe.get("expect")
    expected: Mapping[str, Any] = expect if isinstance(expect, Mapping) else {}
    check = _read_json(folder / "check.json", notes, f" of {name}").get("findings")
    answers = _read_text(folder / "predictions.jsonl")
    findings = (entry.get("text") for entry in check if isinstance(entry, Mapping)) if isinstance(check, list) else ()
    return RunLog(
        name=name,
        epochs=tuple(epochs[at] for at in sorted(epochs)),
        recipe=one_line(recipe["name"]) if isinstance(recipe.get("name"), str) else None,
        expected_top1=finite_number(expected, "top1"),
        expected_source=one_line(expected["source"]) if expected.get("source") else None,
        predictions=None if answers is None else parse_predictions(answers, name, notes),
        data_findings=tuple(one_line(text, 400) for text in findings if isinstance(text, str)),
        dataset=_describe_dataset(_read_json(folder / "data.json", notes, f" of {name}")),
    )


def _differences_from_checkpoint(
    folder: Path, run: str, recipe: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Say what in a run folder is not as its checkpoint has it; nothing of older runs, which keep no checksums."""
    if not (folder / "last").is_dir():
        return []
    try:
        saved = parse_json_object(read_sealed_folder(folder / "last", only=["progress.json"])["progress.json"].decode())
        log = read_plain_file(folder / "log.jsonl", _MAX_BYTES)[: int(saved["log_bytes"])]
    except (BadCheckpoint, OSError, KeyError, ValueError, TypeError):
        return [f"Whether the log and the recipe of {run} are as the training wrote them cannot be checked."]
    notes = []
    wrong = saved.get("log_sha256") and hashlib.sha256(log).hexdigest() != saved["log_sha256"]
    if wrong or any(line.get("log_changed") for line in lines):
        notes.append(f"The log of {run} was changed after the training wrote it: its figures may be anything.")
    settings = saved.get("settings")
    began_with = settings.get("recipe") if isinstance(settings, Mapping) else None
    if began_with is not None and began_with != recipe:
        notes.append(f"The recipe.json of {run} is not the one that it began with.")
    return notes


def _describe_dataset(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what a run read its data as: a sentence for the splits, and one for each note and each thing left out."""
    dataset = data.get("dataset")
    values: Mapping[str, Any] = dataset if isinstance(dataset, Mapping) else {}
    splits, notes, left_out = (
        entries if isinstance(entries := values.get(key), list) else [] for key in ("splits", "notes", "left_out")
    )
    parts = [
        f"{split.get('name')} {split.get('num_images')} images ({split.get('source')})"
        for split in splits
        if isinstance(split, Mapping)
    ]
    classes = values.get("classes")
    if parts and isinstance(classes, list):
        parts[0] = f"{values.get('container')}, {len(classes)} classes {values.get('class_order')}: {parts[0]}"
    sentences = [", ".join(parts), *(note for note in notes if isinstance(note, str))]
    sentences += [
        f"left out: {entry.get('count')} {entry.get('what')}: {entry.get('reason')}"
        for entry in left_out
        if isinstance(entry, Mapping)
    ]
    return tuple(one_line(sentence, 400) for sentence in sentences[:_MAX_SENTENCES] if sentence)


def _read_log(path: Path, run: str, notes: list[str]) -> list[Mapping[str, Any]]:
    text = _read_text(path)
    if text is None:
        notes.append(f"The run {run} has no log: log.jsonl is missing or cannot be read.")
        return []
    parsed = [parse_json_object(line) for line in text.split("\n") if line.strip()]
    damaged = sum(not line for line in parsed)
    if damaged or not parsed:
        notes.append(f"{damaged} lines of the log of {run} are damaged." if parsed else f"The log of {run} is empty.")
    return [line for line in parsed if line]


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_accuracies(path: Path, notes: list[str]) -> Iterator[tuple[str, Accuracy]]:
    entries = _read_json(path, notes)
    mappings = {key: entry for key, entry in entries.items() if isinstance(entry, Mapping)}
    known = {key: (found, entry) for key, entry in mappings.items() if (found := _accuracy(entry)) is not None}
    if len(known) < len(entries):
        notes.append(f"{one_line(path.name)} cannot be read, or not all of it: evaluate again.")
    for digest, (found, entry) in known.items():
        if trained_on := finite_number(entry, "top1_trained_on"):
            of = f"{found.top1:.4g} % on {one_line(entry.get('top1_on'))}"
            notes.append(f"The accuracy {of} is too high: {trained_on:.0f} of these images were trained on.")
        yield digest, found._replace(data=one_line(entry.get("top1_on") or "", 200))


def _read_studies(paths: Sequence[Path], notes: list[str]) -> Iterator[StudyResult]:
    for path in paths:
        try:
            yield read_study(path)
        except BadData as error:
            notes.append(f"The study {one_line(path.name)} could not be used: {_without_folder(error, path)}")


def _read_gates(path: Path, notes: list[str]) -> Iterator[GateResult]:
    """Give the gates of the deployment whose results hold the file; those of older ones passed or did not."""
    gates, own = (values := _read_json(path, notes)).get("gates"), values.get("notes")
    notes += [one_line(note, 400) for note in own if isinstance(note, str)] if isinstance(own, list) else []
    if not isinstance(gates, list):
        notes.append(f"{one_line(path.name)} cannot be read: it is not known whether the gates of a deployment passed.")
        return
    for gate in gates:
        if not isinstance(gate, Mapping):
            continue
        verdict = "passed" if gate.get("passed") is True else gate.get("verdict")
        yield GateResult(
            verdict=verdict if verdict in VERDICTS else "failed",
            sentence=one_line(gate.get("sentence"), 400),
            folder=path.absolute().parent.parent / one_line(gate.get("name")),
            within_bound=gate.get("within_bound") is True,
        )


def _with_folders(gates: Sequence[GateResult]) -> tuple[GateResult, ...]:
    """Name the deployment's folder before the sentence of an artifact that several deployments have one called like."""
    called = Counter(name for name, _ in {(gate.folder.name, gate.folder) for gate in gates})
    return tuple(
        replace(gate, sentence=f"{one_line(gate.folder.parent.name)}: {gate.sentence}")
        if called[gate.folder.name] > 1
        else gate
        for gate in gates
    )


def _opposite_verdicts(artifacts: Sequence[Artifact], gates: Sequence[GateResult]) -> Iterator[str]:
    """Tell of the same model in several deployments with different verdicts: in the latencies the worst one counts."""
    verdicts = {gate.folder: gate.verdict for gate in gates}
    same: dict[str, list[str]] = {}
    seen: dict[str, set[str]] = {}
    for artifact in artifacts:
        folder = artifact.folder.absolute()
        if folder in verdicts:
            digest = " ".join(sorted(s.sha256 for name, s in artifact.files.items() if name.startswith("model.")))
            same.setdefault(digest, []).append(one_line(f"{folder.parent.name}/{folder.name} {verdicts[folder]}"))
            seen.setdefault(digest, set()).add(verdicts[folder])
    for digest, told in same.items():
        if len(seen[digest]) > 1:
            yield f"The same model has several verdicts ({', '.join(told)}): beside its latency stands the worst."


def _read_json(path: Path, notes: list[str], of: str = "") -> Mapping[str, Any]:
    """Return the JSON object in a file without its checksum; an empty one where it has none, is damaged, or no file."""
    text = _read_text(path)
    if text is None and not path.exists():
        return {}
    values = parse_json_object(text or "")
    try:
        if not values:
            raise ValueError("it is not a JSON object that holds anything")
        if not has_checksum(values):
            notes.append(f"{one_line(path.name)}{of} has {NO_CHECKSUM_NOTE}.")
    except ValueError as error:
        notes.append(f"{one_line(path.name)}{of} is damaged and left out: {error}.")
        return {}
    return {key: value for key, value in values.items() if key != CHECKSUM}


def _read_text(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _without_folder(error: Exception, path: Path) -> str:
    """Return the error's text with names of files only: a page is published, and its author's folders are private."""
    return one_line(str(error).replace(str(path), path.name), 400)
