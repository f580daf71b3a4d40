"""Exams: what to score a network on - labelled images, a run's own validation, ImageNet's harder sisters."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onefold.commands.open import RECIPE, Floats, Predictor, validation_images
from onefold.data import Batches, Source
from onefold.data.folders import class_folders
from onefold.data.imagenet import (
    ALEXNET_ERRORS,
    corruptions,
    mean_corruption_error,
    read_real_labels,
    real_labels,
    set_of,
    wordnet_ids,
)
from onefold.errors import BadData
from onefold.storage import write_text
from onefold.train import Accuracy, accuracy
from onefold.train.evaluate import together


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Named parts to score on; `run` is the folder that the answers are kept in, where they are those of its recipe."""

    title: str
    folder: Path
    parts: Mapping[str, Source]
    run: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How a part went; `more` has what only this kind of data has, in percent."""

    data: str
    score: Accuracy
    more: Mapping[str, float] = field(default_factory=dict)


def open_exam(source: str | Path, data: str | None) -> Exam:
    """What `data` asks for: a set of images, or one of ImageNet-C's folders; without it the run's own validation."""
    folder = Path(data or source)
    if data is not None and folder.is_dir():
        parts = {
            f"{name} {level}": class_folders(path)
            for name, levels in corruptions(folder).items()
            for level, path in levels.items()
        }
        if parts:
            return Exam(title=data, folder=folder, parts=parts)
    images, label = validation_images(source, data)
    is_own = data is None and (Path(source) / RECIPE).is_file()
    return Exam(title=label, folder=folder, parts={label: images}, run=Path(source) if is_own else None)


def examine(predictor: Predictor, exam: Exam, *, batch_size: int = 32) -> list[Scored]:
    """Score every part; of several the first entry sums them up. A run's answers are kept in its folder."""
    scored = [_scored(predictor, exam, name, batch_size) for name in exam.parts]
    if exam.run:
        (images,) = exam.parts.values()
        keep_predictions(exam.run, predictor, images, scored[0].score, exam.title)
    return [_summed(exam, scored), *scored] if len(scored) > 1 else scored


def _scored(predictor: Predictor, exam: Exam, name: str, batch_size: int) -> Scored:
    source = exam.parts[name]
    kind = set_of(exam.folder, source.classes) if predictor.num_classes == 1000 else None
    if kind in ("ImageNet-A", "ImageNet-R"):
        score = evaluate(_among(predictor, source), source, batch_size=batch_size)
        return Scored(data=f"{name} ({kind}, among its 200 classes)", score=score)
    score = evaluate(predictor, source, batch_size=batch_size)
    labels = real_labels(exam.folder) if kind == "ImageNet" else None
    if labels is None:
        return Scored(data=f"{name} ({kind})" if kind and len(exam.parts) == 1 else name, score=score)
    real = read_real_labels(labels, [source.name(i) for i in range(len(source))])
    right = [answer in given for answer, given in zip(score.judged.answers.tolist(), real, strict=True) if given]
    return Scored(data=name, score=score, more={"ReaL top-1 %": 100 * float(np.mean(right)), "ReaL images": len(right)})


def _among(predictor: Predictor, source: Source) -> Predictor:
    """The predictor, choosing among the classes of the source alone."""
    chosen = np.array(class_indices(predictor, source))
    return replace(predictor, answer=_Columns(predictor, chosen), classes=source.classes, num_classes=len(chosen))


@dataclass(frozen=True, eq=False)
class _Columns:
    predictor: Predictor
    chosen: np.ndarray[tuple[int], np.dtype[np.int64]]

    def __call__(self, images: Floats) -> Floats:
        return self.predictor.answer(images)[:, self.chosen]

    def close(self) -> None:
        """The predictor closes what answers."""


def _summed(exam: Exam, scored: Sequence[Scored]) -> Scored:
    """All corruptions together: mean error over severities, then over corruptions; mCE where it is defined."""
    errors: dict[str, list[float]] = {}
    for each in scored:
        errors.setdefault(each.data.rpartition(" ")[0], []).append(100 - each.score.top1)
    means = {name: float(np.mean(levels)) for name, levels in errors.items()}
    counted = {name: error for name, error in means.items() if name in ALEXNET_ERRORS} or means
    more = {"mean error %": float(np.mean(list(counted.values())))}
    whole = all(len(errors[name]) == 5 for name in counted)
    mce = mean_corruption_error(means) if whole else None
    if mce is not None:
        more["mCE % (over AlexNet's errors)"] = mce
    more |= {f"{name} error %": error for name, error in means.items()}
    return Scored(data=exam.title, score=together([each.score for each in scored]), more=more)


def evaluate(predictor: Predictor, source: Source, *, batch_size: int = 32) -> Accuracy:
    """Top-1, top-5, loss and per-class accuracy on a labelled source, its classes matched to the network's by name."""
    index = torch.tensor(class_indices(predictor, source))
    batches = Batches(source, predictor.preprocessing, batch_size=batch_size, shuffle=False)
    return accuracy(predictor.answer, ((images, index[labels]) for images, labels in batches.epoch(0)))


def class_indices(predictor: Predictor, source: Source) -> list[int]:
    """For each class of the source the network's index of it. Raises BadData where the two cannot be the same."""
    theirs, ours = source.classes, predictor.classes
    ids = wordnet_ids() if predictor.num_classes == 1000 else ()
    if set(theirs) <= set(ids) and (ours is None or not set(theirs) <= set(ours)):
        return [ids.index(name) for name in theirs]
    by_number = theirs == tuple(map(str, range(len(theirs))))
    fits = len(theirs) <= predictor.num_classes if by_number else len(theirs) == predictor.num_classes
    if (ours is None or by_number) and fits:
        return list(range(len(theirs)))
    if ours is None or by_number:
        raise BadData(
            f"the data have {len(theirs)} classes and {predictor.title} tells {predictor.num_classes} apart: "
            "give data of its classes, or the names of its classes with --classes"
        )
    index = {name: i for i, name in enumerate(ours)}
    strange = [name for name in theirs if name not in index]
    if strange:
        shown = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        raise BadData(f"the data have classes that {predictor.title} does not know: {shown}")
    return [index[name] for name in theirs]


PREDICTIONS = "predictions.jsonl"

_PICTURES, _SIDE = 24, 96


def keep_predictions(run: Path, predictor: Predictor, images: Source, score: Accuracy, data: str) -> None:
    """Write the answers to the run folder."""
    lines = (json.dumps(line, allow_nan=False) for line in _lines(predictor, images, score, data))
    write_text(run / PREDICTIONS, "\n".join(lines) + "\n")


def _lines(predictor: Predictor, images: Source, score: Accuracy, data: str) -> Iterator[dict[str, Any]]:
    names = [predictor.class_name(c) for c in range(predictor.num_classes)]
    told = {name: value for name, value in score.metrics().items() if np.isfinite(value)}
    yield {"kind": "predictions", "data": data, "classes": names, "count": score.count, **told}
    judged = score.judged
    wrong = np.flatnonzero((judged.answers != judged.labels) & (judged.answers >= 0))
    worst = set(wrong[np.argsort(-judged.losses[wrong], kind="stable")][:_PICTURES].tolist())
    for i, (label, answer, rank, loss, share) in enumerate(zip(*(each.tolist() for each in judged), strict=True)):
        line = {"name": images.name(i), "label": label, "answer": answer, "rank": rank}
        if answer >= 0:
            line |= {"confidence": round(share, 6), "own": round(float(np.exp(-loss)), 6)}
        yield {**line, "picture": _picture(predictor, images, i)} if i in worst else line


def _picture(predictor: Predictor, images: Source, i: int) -> str | None:
    try:
        seen = predictor.preprocessing.crop(images.image(i))
    except BadData:
        return None
    scale = max(1, _SIDE // seen.width) if seen.width < _SIDE else _SIDE / seen.width
    small = seen.resize((round(seen.width * scale), round(seen.height * scale)))
    written = io.BytesIO()
    small.convert("RGB").save(written, "JPEG", quality=80)
    return base64.b64encode(written.getvalue()).decode("ascii")
