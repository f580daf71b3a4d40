"""The predictions of a run on its validation images: counted, in bins of confidence, and those that are wrong."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onefold.checksums import NO_CHECKSUM_NOTE, lines_have_checksum
from onefold.report.format import finite_number, one_line, parse_json_object

NUM_BINS = 15  # of the reliability diagram, as in the calibration error of train.evaluate

_MAX_CLASSES = 100_000
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
    `NUM_BINS` equal intervals of confidence, the number of images, how many of them are right, and the sum of
    confidences. `answers` has (label, predicted) by the name of the image, and is empty where names are not unique;
    `network` is the digest of what predicted.
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


def parse_predictions(text: str, run: str, notes: list[str]) -> Predictions | None:
    """Return what a predictions.jsonl of `run` holds; None, and a note, where it is damaged or is none."""
    head, *lines = [parse_json_object(line) for line in text.splitlines()] or [{}]
    classes = head.get("classes")
    if head.get("kind") != "predictions" or not isinstance(classes, list) or not 0 < len(classes) <= _MAX_CLASSES:
        notes.append(f"The predictions of {run} could not be used: their first line does not say what they are.")
        return None
    try:
        if not lines_have_checksum(text):
            notes.append(f"The predictions of {run} have {NO_CHECKSUM_NOTE}.")
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
        top5=finite_number(head, "top5"),
        ece=finite_number(head, "ece"),
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
    counts, right, sums = [0] * NUM_BINS, [0] * NUM_BINS, [0.0] * NUM_BINS
    for line in lines:
        confidence = _probability(line.get("confidence"))
        if confidence is not None and line["answer"] >= 0:
            index = max(0, math.ceil(confidence * NUM_BINS) - 1)  # the right end of an interval belongs to it
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
