"""Evaluate a network or an artifact: on labelled images, a run's validation images, or ImageNet and its variants.

Predictions for a run's validation images are written to predictions.jsonl in its folder, for the report.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from onefold.checksums import lines_have_checksum, sealed_lines
from onefold.commands.bench import save_accuracy
from onefold.commands.class_matching import match_all_classes
from onefold.commands.held_out_images import (
    count_trained_images,
    describe_seen_images,
    evaluation_sets,
    records_from_dict,
    training_records,
)
from onefold.commands.optional_dependencies import extras_for_sources, require_extras
from onefold.commands.predict import warn_unusual_images
from onefold.commands.predictor import Floats, Predictor, Source, open_source, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.data import Dataset, ImageLoader, Subset
from onefold.data.dataset_info import SPLITS, Split
from onefold.data.duplicates import thumbnail_stats
from onefold.data.fingerprint import TrainedCopies, find_trained_copies
from onefold.data.folders import read_class_folders
from onefold.data.imagenet_variants import (
    ALEXNET_ERRORS,
    corruption_folders,
    find_real_labels,
    imagenet_variant,
    mean_corruption_error,
    read_real_labels,
)
from onefold.data.preprocessing import ValueRange
from onefold.errors import BadArgument, BadData, NotWritable, OnefoldError
from onefold.file_io import parse_json, read_plain_file, write_text
from onefold.recipes import RECIPE_FILE
from onefold.train import Accuracy, compute_accuracy
from onefold.train.evaluate import merge_accuracies

_log = logging.getLogger("onefold")
_progress = logging.getLogger("onefold.progress")


@dataclass(frozen=True, kw_only=True)
class EvalSuite:
    """Named sets of labelled images to evaluate on; `run` is the run folder whose own validation images come first.

    Sets that are `corruptions` of one are summed up. `source` is what is evaluated.
    """

    title: str
    folder: Path
    sets: Mapping[str, Dataset]
    run: Path | None = None
    corruptions: bool = False
    source: str | Path = ""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The accuracy on one set of a suite; `extra` has the metrics that only this kind of data has, in percent.

    `images` are those that were scored, without the `unreadable` ones. So many of them were `trained_on`, and so many
    calibrated the int8 model; None where that is not known. `copies` of trained ones are known by their pixels, and so
    are `calibration_copies`, of those that calibrated.
    """

    data: str
    score: Accuracy
    images: Dataset
    unreadable: int = 0
    trained_on: int | None = None
    calibrated_on: int | None = None
    copies: TrainedCopies | None = None
    calibration_copies: TrainedCopies | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as `onefold eval --json` prints them; what is not finite is None."""
        score = self.score
        plain: dict[str, Any] = {"data": self.data, "count": score.count, **score.metrics()}
        plain |= {"top1_interval": list(score.interval), **self.extra, "trained_on": self.trained_on}
        plain |= {"unreadable": self.unreadable} if self.unreadable else {}
        plain |= {"calibrated_on": self.calibrated_on} if self.calibrated_on else {}
        plain |= {"copies_of_trained": self.copies.found} if self.copies else {}
        plain |= {"copies_of_calibration": self.calibration_copies.found} if self.calibration_copies else {}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    def __str__(self) -> str:
        """One line for a person, with what the network has seen of the images before."""
        score, (low, high) = self.score, self.score.interval
        counted = f" of {score.count + self.unreadable}, as the others cannot be read" if self.unreadable else ""
        seen = describe_seen_images(
            score.count,
            {"were trained on": self.trained_on, "calibrated it": self.calibrated_on},
            {"trained ones": self.copies, "ones that calibrated it": self.calibration_copies},
        )
        rates = f"top-1 {score.top1:.2f} % (95 % interval {low:.1f} to {high:.1f}), top-5 {score.top5:.2f} %"
        line = f"{self.data}: {rates}, loss {score.loss:.4f}, ECE {score.ece:.2f} %, {score.count} images{counted}"
        return f"{line}, {seen}" if seen else line


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Sequence[EvalResult]):
    """The accuracy of one network on each set of images; `subject` names the network.

    `top1` (percent) and its 95 % `interval` (Wilson's) are those of the first set: of several the sum of all, where
    they are the corruptions of one, else val before test. `not_written` are the errors of what could not be kept.
    """

    subject: str
    found: tuple[EvalResult, ...]
    not_written: tuple[BadData | NotWritable, ...] = ()

    @overload
    def __getitem__(self, index: int) -> EvalResult: ...
    @overload
    def __getitem__(self, index: slice) -> Scores: ...
    def __getitem__(self, index: int | slice) -> EvalResult | Scores:
        return Scores(self.subject, self.found[index]) if isinstance(index, slice) else self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return self.found[0].score.top1

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `top1`, in percent."""
        return self.found[0].score.interval

    def __repr__(self) -> str:
        lines = [f"{self.subject} on {each}" for each in self.found]
        extra = [f"  {name} {value:.2f}" for each in self.found for name, value in each.extra.items()]
        return "\n".join([*lines, *extra])

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td>{html.escape(each.data)}</td><td>{each.score.top1:.2f}</td>"
            f"<td>{each.score.interval[0]:.1f} to {each.score.interval[1]:.1f}</td><td>{each.score.top5:.2f}</td>"
            f"<td>{each.score.loss:.4f}</td><td>{each.score.ece:.2f}</td><td>{each.score.count}</td></tr>"
            for each in self.found
        ]
        head = "".join(f"<th>{c}</th>" for c in ("", "top-1 %", "95 %", "top-5 %", "loss", "ECE %", "images"))
        return f"<p>{html.escape(self.subject)}</p><table><tr>{head}</tr>{''.join(rows)}</table>"


@suggest_argument_names
def evaluate(
    source: Source | Predictor,
    data: Source | None = None,
    *,
    split: str | None = None,
    model: str | None = None,
    use_ema: bool | None = None,
    classes: Source | None = None,
    img_size: int | None = None,
    batch_size: int = 32,
    threads: int = 2,
    results: Source | None = "results",
) -> Scores:
    """Evaluate a network or an artifact on labelled images: top-1 with its interval, top-5, loss, calibration error.

    `source` is a run folder, a file of weights, an id of the hub, timm:NAME, or an artifact; `data` a place with
    labelled images, or "digits". Without it a run is evaluated on the val and the test of its own data, and the
    predictions for val are kept for the report. Of a place with val or test those are used, or the one `split`; of one
    without, all images but those that the network was trained on. The top-1 is kept in the folder `results` for
    `bench` and `report` (None: nowhere). Rates are in percent. `model`, `use_ema`, `classes`, `img_size` are as in
    `predict`.

    Raises BadData where no image can be used or classes do not match, BadArgument, BadCheckpoint. Where predictions or
    the top-1 cannot be written, the scores are given all the same: a warning is logged, `not_written` has the errors.

        scores = onefold.evaluate("runs/photos-finetune", "other/")
        scores.top1, scores.interval
    """
    only = next((name for name in SPLITS if name == split), None)
    if split is not None and only is None:
        raise BadArgument(f"--split is {split!r}, expected one of {', '.join(SPLITS)}")
    require_extras(extras_for_sources(source, data))
    with (
        show_progress(),
        open_source(
            source, model=model, use_ema=use_ema, classes=classes, img_size=img_size, threads=threads
        ) as predictor,
    ):
        place = "" if isinstance(source, Predictor) else source
        suite = open_suite(os.fspath(place), None if data is None else os.fspath(data), predictor, only)
        found = evaluate_suite(predictor, suite, batch_size=batch_size)
        first = found[0]
        not_written: list[BadData | NotWritable] = []
        try:
            if suite.run:
                write_predictions(suite.run, predictor, first.images, first.score, suite.title)
        except NotWritable as error:
            not_written.append(error)
        try:
            if results is not None:
                seen = (first.trained_on or 0) + (first.copies.found if first.copies else 0)
                score, folder = first.score, Path(results)
                save_accuracy(predictor, first.data, score.top1, folder, count=score.count, trained_on=seen)
        except (BadData, NotWritable) as error:  # BadData: what is there is damaged
            not_written.append(error)
        for each in () if OnefoldError.on_command_line else not_written:  # a command ends with them, after the scores
            _log.warning("the scores are not kept: %s", each)
        if first.trained_on is None and not suite.corruptions:
            _log.info("what the network was trained on is not recorded: these images may be among it")
        elif first.copies is None and not suite.corruptions and suite.run is None:
            _log.info("images it was trained on are known by their files only: copies saved again are not seen")
        return Scores(predictor.title, tuple(found), tuple(not_written))


def open_suite(
    source: str | Path, data: str | None, predictor: Predictor | None = None, split: Split | None = None
) -> EvalSuite:
    """Open the labelled images of `data`, or the sets of ImageNet-C; without it a run's val, and its test.

    Of data without a split those are left out that the predictor was trained on. With `split` the images are its own.
    """
    folder = Path(data or source)
    if data is not None and folder.is_dir() and split is None:
        sets: dict[str, Dataset] = {
            f"{name} {level}": read_class_folders(path)
            for name, levels in corruption_folders(folder).items()
            for level, path in levels.items()
        }
        if sets:
            return EvalSuite(title=data, folder=folder, sets=sets, corruptions=True)
    records = None if predictor is None else training_records(source, predictor.trained_on)
    sets = evaluation_sets(source, data, records, split)
    is_own = data is None and (Path(source) / RECIPE_FILE).is_file()
    run = Path(source) if is_own and split in (None, "val") else None  # whose predictions are for the report
    return EvalSuite(title=next(iter(sets)), folder=folder, sets=sets, run=run, source=source)


def evaluate_suite(predictor: Predictor, suite: EvalSuite, *, batch_size: int = 32) -> list[EvalResult]:
    """Evaluate every set; of several the first result is the summary."""
    results = [_evaluate_set(predictor, suite, name, batch_size) for name in suite.sets]
    if suite.corruptions:
        return [_summary(suite, results), *results] if len(results) > 1 else results
    trained, calibrated = (
        training_records(suite.source, predictor.trained_on),
        records_from_dict(predictor.calibrated_on),
    )
    return [
        replace(
            result,
            trained_on=count_trained_images(trained, result.images),
            calibrated_on=count_trained_images(calibrated, result.images),
            copies=find_trained_copies(trained or (), result.images, predictor.preprocessing.value_range),
            calibration_copies=find_trained_copies(
                calibrated or (), result.images, predictor.preprocessing.value_range
            ),
        )
        for result in results
    ]


def _evaluate_set(predictor: Predictor, suite: EvalSuite, name: str, batch_size: int) -> EvalResult:
    source = suite.sets[name]
    kind = imagenet_variant(suite.folder, source.classes) if predictor.num_classes == 1000 else None
    if kind in ("ImageNet-A", "ImageNet-R"):
        result = evaluate_dataset(_restricted_to(predictor, source), source, batch_size=batch_size)
        return replace(result, data=f"{name} ({kind}, among its 200 classes)")
    result = evaluate_dataset(predictor, source, batch_size=batch_size)
    score, images = result.score, result.images
    labels = find_real_labels(suite.folder) if kind == "ImageNet" else None
    if labels is None:
        return replace(result, data=f"{name} ({kind})" if kind and len(suite.sets) == 1 else name)
    real = read_real_labels(labels, [images.name(i) for i in range(len(images))])
    # an image may have several ReaL labels, each of which is right, or none, and then does not count
    predicted = score.predictions.predicted.tolist()
    right = [label in labels_of for label, labels_of in zip(predicted, real, strict=True) if labels_of]
    extra = {"ReaL top-1 %": 100 * float(np.mean(right)), "ReaL images": len(right)}
    return replace(result, data=name, extra=extra)


def _restricted_to(predictor: Predictor, source: Dataset) -> Predictor:
    """Give the predictor restricted to the logits of the source's classes."""
    indices = np.array(class_indices(predictor, source))
    return replace(
        predictor, session=_ClassSubset(predictor, indices), classes=source.classes, num_classes=len(indices)
    )


@dataclass(frozen=True, eq=False)
class _ClassSubset:
    predictor: Predictor
    indices: np.ndarray[tuple[int], np.dtype[np.int64]]

    def __call__(self, images: Floats) -> Floats:
        return self.predictor.session(images)[:, self.indices]

    def close(self) -> None:
        """Do nothing: the predictor is closed by what opened it."""


def _summary(suite: EvalSuite, results: Sequence[EvalResult]) -> EvalResult:
    """Sum up ImageNet-C: the mean error over severities, then over corruptions, and the mCE where it is defined."""
    errors: dict[str, list[float]] = {}
    for result in results:
        errors.setdefault(result.data.rpartition(" ")[0], []).append(100 - result.score.top1)
    means = {name: float(np.mean(levels)) for name, levels in errors.items()}
    counted = {name: error for name, error in means.items() if name in ALEXNET_ERRORS} or means
    extra = {"mean error %": float(np.mean(list(counted.values())))}
    has_all_severities = all(len(errors[name]) == 5 for name in counted)
    mce = mean_corruption_error(means) if has_all_severities else None
    if mce is not None:
        extra["mCE % (over AlexNet's errors)"] = mce
    extra |= {f"{name} error %": error for name, error in means.items()}
    merged = merge_accuracies([result.score for result in results])
    unreadable = sum(result.unreadable for result in results)
    return EvalResult(data=suite.title, score=merged, images=results[0].images, unreadable=unreadable, extra=extra)


def evaluate_dataset(predictor: Predictor, source: Dataset, *, batch_size: int = 32) -> EvalResult:
    """Give the accuracy of a predictor on labelled images, their classes matched to the network's by name.

    Images that cannot be read are left out and named in the log. Raises BadData where none can be read.
    """
    index = torch.tensor(class_indices(predictor, source))
    warn_unusual_images(source, predictor.preprocessing)
    batches = ImageLoader(source, predictor.preprocessing, batch_size=batch_size, on_bad="skip", max_bad=len(source))

    def labelled() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i, (images, labels) in enumerate(batches.epoch(0)):
            _progress.debug("scoring images", extra={"done": i * batch_size, "total": len(source)})
            if i == 0:
                predictor.warn_if_wrong_model(images.numpy())
            yield images, index[labels]
        _progress.debug("images are scored", extra={"done": 1, "total": 1})

    score = compute_accuracy(predictor.session, labelled())
    if not batches.bad:
        return EvalResult(data="", score=score, images=source)
    readable = Subset(source, [i for i in range(len(source)) if source.name(i) not in batches.bad])
    return EvalResult(data="", score=score, images=readable, unreadable=len(source) - len(readable))


def class_indices(predictor: Predictor, source: Dataset) -> list[int]:
    """Give the network's index of each class of the source. Raises BadData where the classes cannot be the same."""
    return match_all_classes(source.classes, predictor.classes, predictor.num_classes, predictor.title)


PREDICTIONS = "predictions.jsonl"

_PICTURES, _SIDES = 24, (96, 256)
_NEARLY_SAME = 0.15  # mean difference of two thumbnails, in standard deviations of the first


def write_predictions(run: Path, predictor: Predictor, images: Dataset, score: Accuracy, data: str) -> None:
    """Write one JSON object per line: a header, then the prediction for each image with its rank and probabilities.

    The greatest errors have a `picture` too: what the network saw, as JPEG in base64. Of equal errors on images that
    are nearly the same, as frames of a video are, one has it, and names the others as `alike`.
    """
    head, *lines = _lines(predictor, images, score, data)
    write_text(run / PREDICTIONS, sealed_lines(head, lines))


def predictions_match(path: Path, predictor: Predictor) -> bool:
    """Whether a file of predictions is there, undamaged, and of this very network."""
    try:
        text = read_plain_file(path).decode("utf-8")
        lines_have_checksum(text)
        head = parse_json(text.partition("\n")[0])
    except (OSError, ValueError):
        return False
    return isinstance(head, dict) and head.get("sha256") == predictor.facts["sha256"]


def _lines(predictor: Predictor, images: Dataset, score: Accuracy, data: str) -> Iterator[dict[str, Any]]:
    names = [predictor.class_name(c) for c in range(predictor.num_classes)]
    metrics = {name: value for name, value in score.metrics().items() if np.isfinite(value)}
    of = {"sha256": predictor.facts["sha256"]}
    yield {"kind": "predictions", "data": data, "classes": names, "count": score.count, **of, **metrics}
    values = score.predictions
    misclassified = np.flatnonzero((values.predicted != values.labels) & (values.predicted >= 0))
    worst = misclassified[np.argsort(-values.losses[misclassified], kind="stable")]
    value_range = predictor.preprocessing.value_range
    groups = group_misclassified(images, worst[: 3 * _PICTURES].tolist(), values.predicted, value_range)
    rows = zip(*(column.tolist() for column in values), strict=True)
    for i, (label, predicted, rank, loss, confidence) in enumerate(rows):
        line = {"name": images.name(i), "label": label, "answer": predicted, "rank": rank}
        if predicted >= 0:
            line |= {"confidence": round(confidence, 6), "own": round(float(np.exp(-loss)), 6)}
        if i in groups:
            line["picture"] = _picture(predictor, images, i)
            line |= {"alike": [images.name(other) for other in groups[i]]} if groups[i] else {}
        yield line


def group_misclassified(
    images: Dataset, errors: list[int], predicted: NDArray[np.int64], value_range: ValueRange | None
) -> dict[int, list[int]]:
    """Give the first of the errors, each with the later ones of its label and answer on nearly the same image."""
    found = thumbnail_stats(Subset(images, errors), len(errors), value_range=value_range)
    thumbs = {errors[n]: thumb for n, thumb in zip(found.indices.tolist(), found.thumbs, strict=True)}

    def is_alike(i: int, j: int) -> bool:
        is_same = (images.label(i), predicted[i]) == (images.label(j), predicted[j]) and {i, j} <= thumbs.keys()
        return is_same and bool(np.abs(thumbs[i] - thumbs[j]).mean() <= _NEARLY_SAME * thumbs[i].std())

    groups: dict[int, list[int]] = {}
    for i in errors:
        first = next((j for j in groups if is_alike(j, i)), None)
        if first is not None:
            groups[first].append(i)
        elif len(groups) < _PICTURES:
            groups[i] = []
    return groups


def _picture(predictor: Predictor, images: Dataset, i: int) -> str | None:
    try:
        image = predictor.preprocessing.crop(images.image(i, value_range=predictor.preprocessing.value_range))
    except BadData:
        return None
    least, most = _SIDES
    scale = max(1, least // image.width) if image.width < least else min(1.0, most / image.width)
    small = image.resize((round(image.width * scale), round(image.height * scale)))
    jpeg = io.BytesIO()
    small.convert("RGB").save(jpeg, "JPEG", quality=80)
    return base64.b64encode(jpeg.getvalue()).decode("ascii")
