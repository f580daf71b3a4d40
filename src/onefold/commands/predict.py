"""Predictions of a network for a user's photos, or for images in memory."""

from __future__ import annotations

import csv
import html
import io
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from onefold.commands.predictor import Floats, Predictor, Source, open_source, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.data import Dataset, ImageFiles, Preprocessing, find_images
from onefold.data.decode import UNUSUAL_ALPHA, UNUSUAL_ALPHA_NOTE, decode_image
from onefold.data.folders import join_names
from onefold.data.image_inputs import iter_images, prepare_image
from onefold.data.value_range import describe_range_mismatch
from onefold.errors import BadArgument, BadCheckpoint, BadData, NotWritable
from onefold.file_io import unused_path, write_text
from onefold.report.format import format_count

_log = logging.getLogger("onefold")
_progress = logging.getLogger("onefold.progress")

_UNSURE = "unsure"
"""The folder that `sort_into` makes for photos whose likeliest class is below the least confidence."""

_SHOWN = 10  # rows of a table that `repr` shows
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f<>:"/\\|?*]|^\.+$|[. ]+$')  # of folders, on any system
_TOP = 5  # classes that a prediction lists
_MAX_ALPHA = 20  # images whose fourth channel is looked at
_NO_ALPHA = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".gif")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The likeliest classes of one image as (index, name, softmax probability), or why the image could not be read.

    `path` is None for an image in memory; `name` is the path, or which of the images it was. `probabilities` (N,) are
    of all classes, None where the image could not be read. `is_unsure` is whether the likeliest class is less probable
    than was asked for, `is_brief` whether its text leaves out classes of 0.0 %.
    """

    name: str
    path: Path | None = None
    best: tuple[tuple[int, str, float], ...] = ()
    problem: str | None = None
    is_unsure: bool = False
    is_brief: bool = field(default=True, repr=False, compare=False)
    probabilities: Floats | None = field(default=None, repr=False, compare=False)

    @property
    def label(self) -> str | None:
        """The likeliest class; None where that is unsure, or the image could not be read."""
        return None if self.problem is not None or self.is_unsure else self.best[0][1]

    def __str__(self) -> str:
        """The likeliest classes, or why the image could not be read; those of 0.0 % only where they were asked for."""
        if self.problem is not None:
            return f"unread: {self.problem}"
        shown = [
            f"{name} {100 * share:.1f} %"
            for k, (_, name, share) in enumerate(self.best)
            if not k or share >= 5e-4 or not self.is_brief
        ]
        return f"{_printable_name(self.name)}: {f'{_UNSURE}: ' if self.is_unsure else ''}{', '.join(shown)}"

    def to_dict(self) -> dict[str, Any]:
        """Give plain values: file, predictions, problem, as `onefold predict --json` prints them."""
        best = [{"index": index, "class": name, "probability": share} for index, name, share in self.best]
        unsure = {"unsure": True} if self.is_unsure else {}
        return {"file": _printable_name(self.name), "predictions": best, "problem": self.problem, **unsure}


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Sequence[Prediction]):
    """The predictions for several images, in their order; `classes` are the network's.

    `names` has the likeliest class of each (None: unsure or unread), `probabilities` (B, N) float32 the softmax of all
    classes, NaN where an image could not be read. `not_there` says which paths were skipped, and why.
    """

    found: tuple[Prediction, ...]
    classes: tuple[str, ...]
    not_there: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> Predictions: ...
    def __getitem__(self, index: int | slice) -> Prediction | Predictions:
        if isinstance(index, slice):
            return Predictions(self.found[index], self.classes)
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    @property
    def names(self) -> list[str | None]:
        """The likeliest class of each image; None where it is unsure or could not be read."""
        return [each.label for each in self.found]

    @property
    def probabilities(self) -> Floats:
        """The softmax of all classes, (B, N) float32; NaN where an image could not be read."""
        blank = np.full(len(self.classes), np.nan, dtype=np.float32)
        rows = [blank if each.probabilities is None else each.probabilities for each in self.found]
        return np.stack(rows) if rows else np.empty((0, len(self.classes)), dtype=np.float32)

    def counts(self) -> dict[str, int]:
        """How many images are of which class, the most frequent first; the unsure and the unread at the end."""
        labels = Counter(each.label for each in self.found if each.label is not None)
        rest = {
            _UNSURE: sum(each.is_unsure for each in self.found),
            "unread": sum(each.problem is not None for each in self.found),
        }
        return {**dict(labels.most_common()), **{name: count for name, count in rest.items() if count}}

    def to_csv(self, path: Source | None = None) -> str:
        """Give a table as CSV: file, class and probability, the next classes with theirs, what is wrong with a file.

        With a `path` it is written there too. Raises NotWritable.
        """
        most = max((len(each.best) for each in self.found), default=1)
        more = [column for k in range(2, most + 1) for column in (f"class_{k}", f"probability_{k}")]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["file", "class", "probability", *more, "problem"])
        for each in self.found:
            cells: list[object] = [cell for _, name, share in each.best for cell in (name, f"{share:.6f}")]
            problem = each.problem or (_UNSURE if each.is_unsure else "")
            table.writerow([_printable_name(each.name), *cells, *[""] * (2 * max(most, 1) - len(cells)), problem])
        if path is not None:
            write_text(Path(path), text.getvalue())
        return text.getvalue()

    def write(self, out: Source) -> Path:
        """Write the table to a file: .csv, or .jsonl with one JSON object an image. Raises BadArgument, NotWritable."""
        path = check_table_path(out)
        lines = (json.dumps(each.to_dict(), allow_nan=False) + "\n" for each in self.found)
        write_text(path, self.to_csv() if path.suffix.lower() == ".csv" else "".join(lines))
        return path

    def sort_into(self, folder: Source) -> Path:
        """Copy each photo to `folder`/<class>/, the unsure to `folder`/unsure; the folder must be new or empty.

        Photos stay where they are, and of equal names one gets a number. Images in memory and unread files are left
        out. Raises BadArgument, NotWritable.
        """
        place = check_empty_folder(folder)
        folders: dict[str | None, str] = {None: _UNSURE}
        for each in self.found:
            if each.path is None or each.problem is not None:
                continue
            if each.label not in folders:
                folders[each.label] = _folder_name(str(each.label), folders.values())
            inner = place / folders[each.label]
            try:
                inner.mkdir(parents=True, exist_ok=True)
                shutil.copy2(each.path, unused_path(inner / each.path.name))
            except OSError as error:
                raise NotWritable(f"cannot copy {each.path} to {inner}: {error.strerror or error}") from error
        return place

    def __repr__(self) -> str:
        lines = [str(each) for each in self.found[:_SHOWN]]
        rest = len(self.found) - len(lines)
        of = format_count(len(self.classes), "class", "classes")
        head = f"Predictions: {format_count(len(self.found), 'image')}, {of}"
        return "\n".join([head, *lines, *([f"... and {rest} more"] if rest else [])])

    def _repr_html_(self) -> str:
        rows = [f"<tr><td>{html.escape(part)}</td></tr>" for part in map(str, self.found[:_SHOWN])]
        rest = len(self.found) - len(rows)
        more = f"<p>... and {rest} more</p>" if rest else ""
        return f"<table>{''.join(rows)}</table>{more}"


@suggest_argument_names
def predict(
    source: Source | Predictor,
    images: object,
    *,
    model: str | None = None,
    use_ema: bool | None = None,
    classes: Source | None = None,
    img_size: int | None = None,
    top: int | None = None,
    min_confidence: float = 0.0,
    batch_size: int = 32,
    threads: int = 2,
    on_prediction: Callable[[Prediction], None] | None = None,
) -> Predictions:
    """Predict the classes of photos: paths, folders, PIL images, arrays, tensors, or a list of them.

    `source` is a run folder, a file of weights, an id of the hub, timm:NAME, or an artifact. Pictures are uint8: PIL,
    arrays (H, W, 3) or tensors (3, H, W); floats (3, S, S) are taken as normalized inputs. `model` names the network
    where the weights do not; `use_ema` chooses EMA or plain weights where a checkpoint has both; `classes` is a
    file with their names; `img_size` the side in pixels; `top` how many classes each prediction lists (5); below
    `min_confidence` (0 to 1) the class is unsure. `on_prediction` is called with each as it comes.

    Files that cannot be read, and paths that are not there, are named and skipped. Raises BadData where none is
    left, BadArgument, BadCheckpoint.

        found = onefold.predict("runs/photos-finetune", ["cat.jpg", "holiday/"])
        found.names, found.probabilities
    """
    if (top is not None and top < 1) or batch_size < 1 or not 0 <= min_confidence <= 1:
        raise BadArgument(
            f"top and batch_size must be 1 or more and min_confidence from 0 to 1, not {top}, {batch_size} and "
            f"{min_confidence}"
        )
    given, not_there = _find(images)
    with (
        show_progress(),
        open_source(
            source, model=model, use_ema=use_ema, classes=classes, img_size=img_size, threads=threads
        ) as predictor,
    ):
        found = []
        for each in _predict(predictor, given, top, min_confidence, batch_size):
            found.append(each)
            if on_prediction is not None:
                on_prediction(each)
        names = tuple(predictor.class_name(index) for index in range(predictor.num_classes))
    unread = sum(each.problem is not None for each in found)
    if unread == len(found):
        raise BadData(f"{unread} of {len(found)} images could not be read: {found[0].problem}")
    if unread:
        _log.warning("%d of %d images could not be read and are left out: they are named above", unread, len(found))
    if not_there:
        _log.warning("%s skipped: %s", format_count(len(not_there), "path"), "; ".join(not_there))
    return Predictions(tuple(found), names, tuple(not_there))


def _find(images: object) -> tuple[list[object], list[str]]:
    """Give each image once, paths in place of folders; and of each path that cannot be followed, why."""
    given: list[object] = []
    not_there: list[str] = []
    seen: set[Path] = set()
    for item in iter_images(images):
        if not isinstance(item, str | Path):
            given.append(item)
            continue
        try:
            paths = [path for path in find_images([item]) if path not in seen]
        except BadData as error:
            not_there.append(str(error))
            continue
        seen.update(paths)
        given.extend(paths)
    if not given:
        raise BadData("; ".join(not_there) or "there is no image: give photos, or folders of photos")
    return given, not_there


def _predict(
    predictor: Predictor, images: Sequence[object], top: int | None, min_confidence: float, batch_size: int
) -> Iterator[Prediction]:
    """Give predictions in the order of `images`; one that cannot be read has a `problem`, and the others go on."""
    if not predictor.num_classes:
        raise BadCheckpoint(
            f"{predictor.title} has no last layer: its outputs are features and no classes; fit one to photos of yours "
            "first (onefold train --recipe photos:probe)"
        )
    if predictor.num_classes == 1:
        _log.info("%s has one output, whose share of the softmax is 100 %% for any photo", predictor.title)
    names = [str(path) for path in images if isinstance(path, Path)]
    if names:
        warn_unusual_images(ImageFiles(Path(), names, [0] * len(names), ("photos",)), predictor.preprocessing)
    numbered = enumerate(images)
    first = True
    while part := list(islice(numbered, batch_size)):
        _progress.debug("predicting images", extra={"done": part[0][0], "total": len(images)})
        read = [_preprocess(image, predictor.preprocessing) for _, image in part]
        inputs = [image for image in read if not isinstance(image, str)]
        if inputs and first:
            predictor.warn_if_wrong_model(np.stack(inputs))
            first = False
        logits = iter(predictor.session(np.stack(inputs)) if inputs else ())
        for (number, image), prepared in zip(part, read, strict=True):
            path = image if isinstance(image, Path) else None
            name = f"image {number + 1}" if path is None else str(path)
            if isinstance(prepared, str):
                yield Prediction(name=name, path=path, problem=prepared)
                continue
            probabilities = _softmax(next(logits))
            order = np.argsort(-probabilities, kind="stable")[: _TOP if top is None else top]
            yield Prediction(
                name=name,
                path=path,
                best=tuple((int(i), predictor.class_name(int(i)), float(probabilities[i])) for i in order),
                is_brief=top is None,
                is_unsure=bool(probabilities[order[0]] < min_confidence),
                probabilities=probabilities.astype(np.float32),
            )
    _progress.debug("images are predicted", extra={"done": 1, "total": 1})


def warn_unusual_images(images: Dataset, preprocessing: Preprocessing) -> None:
    """Log a warning where images have samples that the network's value range makes nearly uniform, or an odd alpha.

    Of many images some are looked at, spread evenly.
    """
    sentence = describe_range_mismatch(images, preprocessing.value_range)
    if sentence:
        _log.warning("%s", sentence)
    step = max(1, -(-len(images) // _MAX_ALPHA))
    looked_at = [i for i in range(0, len(images), step) if not images.name(i).lower().endswith(_NO_ALPHA)]
    odd: list[str] = []
    for i in looked_at:
        with suppress(BadData):  # named where it is used
            odd += (
                [images.name(i)] if UNUSUAL_ALPHA in images.image(i, value_range=preprocessing.value_range).info else []
            )
    if odd:
        text = "%d of %d images looked at have %s: %s"
        _log.warning(text, len(odd), len(looked_at), UNUSUAL_ALPHA_NOTE, join_names(odd, 3))


def _preprocess(image: object, preprocessing: Preprocessing) -> Floats | str:
    try:
        if isinstance(image, Path):
            return preprocessing(decode_image(image, value_range=preprocessing.value_range))
        return prepare_image(image, preprocessing)
    except BadData as error:
        return str(error)


def _softmax(logits: Floats) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    wide = logits.astype(np.float64)
    probabilities = np.exp(wide - wide.max())
    return probabilities / probabilities.sum()


# ------------------------------------------------------------------------- tables and sorted folders


def check_table_path(out: Source) -> Path:
    """Give the path of a table to write. Raises BadArgument for another suffix than .csv and .jsonl."""
    path = Path(out)
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise BadArgument(f"predictions are written as .csv or .jsonl, not {path.name!r}: give answers.csv")
    return path


def check_empty_folder(folder: Source) -> Path:
    """Give the folder to sort photos into. Raises BadArgument where it holds something."""
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise BadArgument(
            f"{place} is not empty: photos are sorted into a new folder (--sort-into {unused_path(place)})"
        )
    return place


def _printable_name(name: str) -> str:
    """Give a path as text that any file can hold: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def _folder_name(label: str, taken: Collection[str]) -> str:
    """Give a class as the name of a folder inside the one it is made in, whatever characters the class has."""
    name = _NOT_IN_NAMES.sub("_", label)[:100] or "_"
    others = {other.casefold() for other in taken}
    return next(n for k in count(1) if (n := name if k == 1 else f"{name}-{k}").casefold() not in others)
