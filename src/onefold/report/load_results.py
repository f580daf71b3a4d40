"""Reading what a report is made from: run folders, result files and artifact folders.

A file that is missing or damaged becomes a note, one sentence for the page, and never an error: a report of what is
left is worth more than none.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onefold.bench import Comparison, Measurement, read_all
from onefold.checksums import CHECKSUM, NO_CHECKSUM, has_checksum, lines_have_checksum, unseal
from onefold.errors import BadArtifact, BadCheckpoint, BadData
from onefold.report.format import one_line
from onefold.runtimes.artifact import Artifact, read_manifest
from onefold.storage import parse_json

GATES = "gates.json"  # what each gate of a deployment found, beside its measurements
ACCURACY = "accuracy.json"  # top-1 of what was evaluated, by its SHA-256; written before or after it was measured
BINS = 15  # of the reliability diagram, as in the calibration error of train.evaluate

_LARGEST_NUMBER = 1e15  # no figure here can be larger; the comparison also leaves out infinities and NaN
_MAX_CLASSES, _MAX_BYTES = 100_000, 256 << 20
_MAX_SENTENCES = 20  # on the data of a run
_MAX_PICTURE_BYTES = 100_000
_JPEG_START = b"\xff\xd8\xff"


@dataclass(frozen=True, kw_only=True)
class Misclassified:
    """A wrongly classified image: class indices, softmax probabilities, and the picture as JPEG in base64.

    `alike` names other misclassified images that are nearly the same.
    """

    name: str
    label: int
    predicted: int
    confidence: float
    label_probability: float
    jpeg: str
    alike: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """A network's predictions on labelled images, counted.

    `pairs[label, predicted]` counts images; a predicted class of -1 stands for logits that were not finite. `top5` and
    `ece` (expected calibration error) are in percent, as `train.evaluate` computed them. `bins` holds, for each of
    `BINS` equal intervals of confidence, the number of images, how many of them are right, and the sum of confidences.
    `answers` has (label, predicted) by the name of the image, and is empty where names are not unique; `network` is the
    digest of what predicted.
    """

    data: str
    classes: tuple[str, ...]
    pairs: Mapping[tuple[int, int], int]
    top5: float | None
    ece: float | None
    bins: tuple[tuple[int, int, float], ...]
    misclassified: tuple[Misclassified, ...]
    answers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    network: str | None = None

    @property
    def num_images(self) -> int:
        """How many images were predicted."""
        return sum(self.pairs.values())

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * sum(count for (a, b), count in self.pairs.items() if a == b) / self.num_images

    @property
    def images_per_class(self) -> Counter[int]:
        """The number of images of each class that has any."""
        counts: Counter[int] = Counter()
        for (label, _), count in self.pairs.items():
            counts[label] += count
        return counts

    @property
    def confusions(self) -> list[tuple[int, int, int]]:
        """(label, predicted, images) of all wrong pairs, the most frequent first."""
        wrong = [(a, b, count) for (a, b), count in self.pairs.items() if a != b]
        return sorted(wrong, key=lambda entry: (-entry[2], entry[0], entry[1]))

    def name(self, index: int) -> str:
        """Return the name of a class."""
        return self.classes[index] if 0 <= index < len(self.classes) else "not finite"


@dataclass(frozen=True, kw_only=True)
class Run:
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
        points = ((number(line, "epoch"), number(line, key)) for line in self.epochs)
        return tuple((epoch, value) for epoch, value in points if epoch is not None and value is not None)

    def last(self, key: str) -> float | None:
        """Return the last value under `key`; None where there is none."""
        curve = self.curve(key)
        return curve[-1][1] if curve else None

    @property
    def num_epochs(self) -> int:
        """How many epochs of training are done: the evaluation before the first is none."""
        return sum((number(line, "epoch") or 0) >= 1 for line in self.epochs)

    @property
    def best(self) -> tuple[float, float] | None:
        """(epoch, top-1) of the best epoch: the last of equals, which is the one that training keeps."""
        return max(self.curve("top1"), key=lambda point: (point[1], point[0]), default=None)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything there is to report; `sources` names the result files, `notes` says what could not be used.

    `failed_gates` has a sentence for each gate of a deployment that an artifact failed, `accuracies` the top-1 in
    percent of what was evaluated, by its SHA-256.
    """

    runs: tuple[Run, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    sources: tuple[str, ...] = ()
    failed_gates: tuple[str, ...] = ()
    accuracies: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def all_measurements(self) -> tuple[Measurement, ...]:
        """Those measured alone and those measured in comparisons."""
        compared = (m for comparison in self.comparisons for m in comparison.measurements.values())
        return (*self.measurements, *compared)

    def top1_of(self, subject: Mapping[str, Any]) -> float | None:
        """Return the accuracy of a measured subject in percent: its own, that of the artifact with its SHA-256, or the
        one that was evaluated."""
        own = number(subject, "top1")
        if own is not None:
            return own
        digest = subject.get("sha256")
        same = (a for a in self.artifacts if digest in {stored.sha256 for stored in a.files.values()})
        known = next((top1 for a in same if (top1 := number(a.details, "top1")) is not None), None)
        return self.accuracies.get(str(digest)) if known is None else known

    def network_score(self, artifact: Artifact) -> Predictions | None:
        """Return the predictions, for a run's validation images, of the network that an artifact was exported from."""
        found = (run.predictions for run in self.runs if run.predictions is not None)
        network = artifact.details.get("network")
        return next((each for each in found if each.network is not None and each.network == network), None)

    def top1_of_artifact(self, artifact: Artifact) -> float | None:
        """Return the accuracy of an artifact in percent: its manifest's, or that of a measurement of the same bytes."""
        own = number(artifact.details, "top1")
        if own is not None:
            return own
        digests = {stored.sha256 for stored in artifact.files.values()}
        same = (m.subject for m in self.all_measurements if m.subject.get("sha256") in digests)
        known = next((top1 for subject in same if (top1 := number(subject, "top1")) is not None), None)
        return next((self.accuracies[d] for d in digests if d in self.accuracies), None) if known is None else known


def load_inputs(
    runs: Sequence[Path],
    results: Sequence[Path],
    artifacts: Sequence[Path],
    gates: Sequence[Path] = (),
    accuracies: Sequence[Path] = (),
) -> Inputs:
    """Read all of it; what cannot be read becomes a note."""
    notes: list[str] = []
    measurements: list[Measurement] = []
    comparisons: list[Comparison] = []
    for path in results:
        try:
            read = read_all(path)
        except BadData as error:
            notes.append(f"The results {one_line(path.name)} could not be used: {_without_folder(error, path)}")
            continue
        notes += read.notes if read.measurements or read.comparisons else [f"{one_line(path.name)} holds no results."]
        measurements += read.measurements
        comparisons += read.comparisons
    manifests = []
    for path in artifacts:
        try:
            manifests.append(read_manifest(path))
        except BadArtifact as error:
            notes.append(f"The artifact {one_line(path.name)} could not be used: {_without_folder(error, path)}")
    return Inputs(
        runs=tuple(_read_run(path, notes) for path in runs),
        artifacts=tuple(manifests),
        measurements=tuple(measurements),
        comparisons=tuple(comparisons),
        sources=tuple(one_line(path.name) for path in results),
        failed_gates=tuple(sentence for path in gates for sentence in _read_failed_gates(path, notes)),
        accuracies={digest: top1 for path in accuracies for digest, top1 in _read_accuracies(path, notes)},
        notes=tuple(notes),
    )


def number(values: Mapping[str, Any], key: str) -> float | None:
    """Return the number under `key`; None where there is none, or one that is not finite or absurdly large."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST_NUMBER else None


# ---- runs ------------------------------------------------------------------------------------------------------------


def _read_run(folder: Path, notes: list[str]) -> Run:
    name = one_line(folder.name)
    lines = _read_log(folder / "log.jsonl", name, notes)
    # A resumed run writes an epoch again: the later line holds.
    kinds = ("evaluation", "epoch")
    epochs = {at: line for line in lines if line.get("kind") in kinds and (at := number(line, "epoch")) is not None}
    if lines and not epochs:
        notes.append(f"The run {name} has not finished an epoch yet.")
    recipe = _parse(_read_text(folder / "recipe.json") or "")
    notes += _differences_from_checkpoint(folder, name, recipe, lines)
    expect = recipe.get("expect")
    expected: Mapping[str, Any] = expect if isinstance(expect, Mapping) else {}
    check = _read_json(folder / "check.json", notes, f" of {name}").get("findings")
    findings = (entry.get("text") for entry in check if isinstance(entry, Mapping)) if isinstance(check, list) else ()
    return Run(
        name=name,
        epochs=tuple(epochs[at] for at in sorted(epochs)),
        recipe=one_line(recipe["name"]) if isinstance(recipe.get("name"), str) else None,
        expected_top1=number(expected, "top1"),
        expected_source=one_line(expected["source"]) if expected.get("source") else None,
        predictions=_read_predictions(folder / "predictions.jsonl", name, notes),
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
        saved = _parse(unseal(folder / "last", only=["progress.json"])["progress.json"].decode())
        with (folder / "log.jsonl").open("rb") as file:
            log = file.read(int(saved["log_bytes"])) if saved.get("log_sha256") else b""
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
    parsed = [_parse(line) for line in text.split("\n") if line.strip()]
    damaged = sum(not line for line in parsed)
    if damaged or not parsed:
        notes.append(f"{damaged} lines of the log of {run} are damaged." if parsed else f"The log of {run} is empty.")
    return [line for line in parsed if line]


def _read_predictions(path: Path, run: str, notes: list[str]) -> Predictions | None:
    text = _read_text(path)
    if text is None:
        return None
    head, *lines = [_parse(line) for line in text.splitlines()] or [{}]
    classes = head.get("classes")
    if head.get("kind") != "predictions" or not isinstance(classes, list) or not 0 < len(classes) <= _MAX_CLASSES:
        notes.append(f"The predictions of {run} could not be used: their first line does not say what they are.")
        return None
    try:
        if not lines_have_checksum(text):
            notes.append(f"The predictions of {run} have {NO_CHECKSUM}.")
    except ValueError as error:
        notes.append(f"The predictions of {run} are damaged and left out ({error}): evaluate the run again.")
        return None
    valid = [line for line in lines if _is_prediction(line, len(classes))]
    if len(valid) < len(lines):
        notes.append(f"{len(lines) - len(valid)} lines of the predictions of {run} are damaged.")
    if not valid:
        return None
    answers = {str(line.get("name")): (line["label"], line["answer"]) for line in valid}
    return Predictions(
        data=one_line(head.get("data", "")),
        classes=tuple(one_line(name, 60) for name in classes),
        pairs=Counter((line["label"], line["answer"]) for line in valid),
        top5=number(head, "top5"),
        ece=number(head, "ece"),
        bins=_bins(valid),
        misclassified=tuple(image for line in valid if (image := _misclassified(line)) is not None),
        answers=answers if len(answers) == len(valid) else {},
        network=head["sha256"] if isinstance(head.get("sha256"), str) else None,
    )


def _is_prediction(line: Mapping[str, Any], num_classes: int) -> bool:
    label, predicted = line.get("label"), line.get("answer")
    if type(label) is not int or type(predicted) is not int:
        return False
    return 0 <= label < num_classes and -1 <= predicted < num_classes


def _bins(lines: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, int, float], ...]:
    counts, right, sums = [0] * BINS, [0] * BINS, [0.0] * BINS
    for line in lines:
        confidence = _probability(line.get("confidence"))
        if confidence is not None and line["answer"] >= 0:
            index = max(0, math.ceil(confidence * BINS) - 1)  # the right end of an interval belongs to it
            counts[index] += 1
            right[index] += line["label"] == line["answer"]
            sums[index] += confidence
    return tuple(zip(counts, right, sums, strict=True))


def _misclassified(line: Mapping[str, Any]) -> Misclassified | None:
    jpeg, confidence = _jpeg(line.get("picture")), _probability(line.get("confidence"))
    alike = line.get("alike")
    if jpeg is None or confidence is None or line["answer"] < 0:
        return None
    return Misclassified(
        name=one_line(line.get("name", ""), 80),
        label=line["label"],
        predicted=line["answer"],
        confidence=confidence,
        label_probability=_probability(line.get("own")) or 0.0,
        jpeg=jpeg,
        alike=tuple(one_line(name, 80) for name in alike[:20]) if isinstance(alike, list) else (),
    )


def _jpeg(value: object) -> str | None:
    """Return base64 of a small JPEG, encoded anew so that nothing else can stand in the page; None for all else."""
    if not isinstance(value, str) or len(value) > 2 * _MAX_PICTURE_BYTES:
        return None
    try:
        data = base64.b64decode(value.encode("ascii"), validate=True)
    except ValueError:
        return None
    is_small_jpeg = data.startswith(_JPEG_START) and len(data) <= _MAX_PICTURE_BYTES
    return base64.b64encode(data).decode("ascii") if is_small_jpeg else None


def _probability(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else None  # type: ignore[arg-type, operator]


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_accuracies(path: Path, notes: list[str]) -> Iterator[tuple[str, float]]:
    entries = _read_json(path, notes)
    mappings = {key: entry for key, entry in entries.items() if isinstance(entry, Mapping)}
    known = {key: (top1, entry) for key, entry in mappings.items() if (top1 := number(entry, "top1")) is not None}
    if len(known) < len(entries):
        notes.append(f"{one_line(path.name)} cannot be read, or not all of it: evaluate again.")
    for digest, (top1, entry) in known.items():
        if trained_on := number(entry, "top1_trained_on"):
            of = f"{top1:.4g} % on {one_line(entry.get('top1_on'))}"
            notes.append(f"The accuracy {of} flatters: {trained_on:.0f} of these images were trained on.")
        yield digest, top1


def _read_failed_gates(path: Path, notes: list[str]) -> list[str]:
    gates, own = (values := _read_json(path, notes)).get("gates"), values.get("notes")
    notes += [one_line(note, 400) for note in own if isinstance(note, str)] if isinstance(own, list) else []
    if not isinstance(gates, list):
        notes.append(f"{one_line(path.name)} cannot be read: it is not known whether the gates of a deployment passed.")
        return []
    return [one_line(g.get("sentence"), 400) for g in gates if isinstance(g, Mapping) and g.get("passed") is not True]


def _read_json(path: Path, notes: list[str], of: str = "") -> Mapping[str, Any]:
    """Return the JSON object in a file without its checksum; an empty one where it has none, is damaged, or no file."""
    text = _read_text(path)
    if text is None and not path.exists():
        return {}
    values = _parse(text or "")
    try:
        if not values:
            raise ValueError("it is not a JSON object that holds anything")
        if not has_checksum(values):
            notes.append(f"{one_line(path.name)}{of} has {NO_CHECKSUM}.")
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


def _parse(text: str) -> Mapping[str, Any]:
    """Return the JSON object in `text`; an empty one for anything else."""
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, Mapping) else {}


def _without_folder(error: Exception, path: Path) -> str:
    """Return the error's text with names of files only: a page is published, and its author's folders are private."""
    return one_line(str(error).replace(str(path), path.name), 400)
