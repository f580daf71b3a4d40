"""The answers of a run, as predictions.jsonl tells them: read with patience, counted once."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onefold.report.html import plain

BINS = 15
_MOST_CLASSES = 100_000
_PICTURE_BYTES = 100_000
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Mistake:
    """A wrong answer with its picture: shares are softmax, `jpeg` is base64."""

    name: str
    label: int
    answer: int
    confidence: float
    own: float
    jpeg: str


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Who was taken for whom: `pairs[label, answer]` counts images, -1 stands for an answer that is not finite.

    `bins` are those of the calibration error: images, right answers and the sum of confidences of each.
    """

    data: str
    classes: tuple[str, ...]
    pairs: Mapping[tuple[int, int], int]
    top5: float | None
    bins: tuple[tuple[int, int, float], ...]
    mistakes: tuple[Mistake, ...]

    @property
    def count(self) -> int:
        """The images."""
        return sum(self.pairs.values())

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * sum(count for (a, b), count in self.pairs.items() if a == b) / self.count

    @property
    def ece(self) -> float | None:
        """The expected calibration error in percent: see `train.evaluate`."""
        total = sum(count for count, _, _ in self.bins)
        return 100 * sum(abs(right - share) for _, right, share in self.bins) / total if total else None

    @property
    def labels(self) -> Counter[int]:
        """How many images each class has."""
        found: Counter[int] = Counter()
        for (label, _), count in self.pairs.items():
            found[label] += count
        return found

    def taken_for(self, label: int) -> list[tuple[int, int]]:
        """(another class, how often) that images of a class were taken for, the most frequent first."""
        wrong = [(b, count) for (a, b), count in self.pairs.items() if a == label and b != label]
        return sorted(wrong, key=lambda each: (-each[1], each[0]))

    def name(self, index: int) -> str:
        """The name of a class."""
        return self.classes[index] if 0 <= index < len(self.classes) else "not finite"


def read_predictions(path: Path, run: str, notes: list[str]) -> Predictions | None:
    """The file's answers; None, with a note where it is damaged, when it has none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    parsed = [_parsed(line) for line in lines]
    head = parsed[0] if parsed else {}
    classes = head.get("classes")
    if head.get("kind") != "predictions" or not isinstance(classes, list) or not 0 < len(classes) <= _MOST_CLASSES:
        notes.append(f"The predictions of {run} could not be used: their first line does not say what they are.")
        return None
    answers = [found for line in parsed[1:] if (found := _answer(line, len(classes))) is not None]
    lost = len(parsed) - 1 - len(answers)
    if lost:
        notes.append(f"{lost} lines of the predictions of {run} are damaged.")
    if not answers:
        return None
    ranks = [rank for line in parsed[1:] if isinstance(rank := line.get("rank"), int)]
    return Predictions(
        data=plain(head.get("data", "")),
        classes=tuple(plain(name, 60) for name in classes),
        pairs=Counter((label, answer) for label, answer, _ in answers),
        top5=100 * sum(rank < 5 for rank in ranks) / len(ranks) if len(ranks) == len(answers) else None,
        bins=_bins(answers),
        mistakes=tuple(m for line in parsed[1:] if (m := _mistake(line, len(classes))) is not None),
    )


def _answer(line: Mapping[str, Any], num_classes: int) -> tuple[int, int, float | None] | None:
    label, answer, share = line.get("label"), line.get("answer"), line.get("confidence")
    if type(label) is not int or type(answer) is not int:
        return None
    if not (0 <= label < num_classes and -1 <= answer < num_classes):
        return None
    return label, answer, _share(share)


def _bins(answers: list[tuple[int, int, float | None]]) -> tuple[tuple[int, int, float], ...]:
    counts, rights, shares = [0] * BINS, [0] * BINS, [0.0] * BINS
    for label, answer, share in answers:
        if share is not None and answer >= 0:
            place = max(0, math.ceil(share * BINS) - 1)  # the right end belongs to a bin
            counts[place] += 1
            rights[place] += label == answer
            shares[place] += share
    return tuple(zip(counts, rights, shares, strict=True))


def _mistake(line: Mapping[str, Any], num_classes: int) -> Mistake | None:
    found, jpeg = _answer(line, num_classes), _jpeg(line.get("picture"))
    if found is None or jpeg is None or found[2] is None or found[1] < 0:
        return None
    own = _share(line.get("own")) or 0.0
    return Mistake(plain(line.get("name", ""), 80), found[0], found[1], found[2], own, jpeg)


def _jpeg(given: object) -> str | None:
    """Base64 of a small JPEG, written anew; None for anything else that may stand there."""
    if not isinstance(given, str) or len(given) > 2 * _PICTURE_BYTES:
        return None
    try:
        inside = base64.b64decode(given.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        return None
    if not inside.startswith(_JPEG) or len(inside) > _PICTURE_BYTES:
        return None
    return base64.b64encode(inside).decode("ascii")


def _share(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        return None
    return float(value)


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, Mapping) else {}
