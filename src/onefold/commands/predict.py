"""Predictions of a network for a user's photos."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onefold.commands.open_network import Floats, Predictor
from onefold.data import Dataset, ImageFiles, Preprocessing
from onefold.data.decode import decode
from onefold.data.value_range import mismatch
from onefold.errors import BadArgument, BadCheckpoint, BadData

_log = logging.getLogger("onefold")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The likeliest classes of one image as (index, name, softmax probability), or why the image could not be read."""

    path: Path
    best: tuple[tuple[int, str, float], ...] = ()
    problem: str | None = None


def predict(
    predictor: Predictor, images: Sequence[Path], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Give predictions in the order of `images`; one that cannot be read has a `problem`, and the others go on."""
    if top < 1 or batch_size < 1:
        raise BadArgument(f"top and batch_size must be 1 or more, not {top} and {batch_size}")
    if not predictor.num_classes:
        raise BadCheckpoint(
            f"{predictor.title} has no last layer: its outputs are features and no classes; fit one to photos of yours "
            "first (onefold train --recipe photos:probe)"
        )
    if predictor.num_classes == 1:
        _log.info("%s has one output, whose share of the softmax is 100 %% for any photo", predictor.title)
    names = [str(path) for path in images]
    say_mismatch(ImageFiles(Path(), names, [0] * len(names), ("photos",)), predictor.preprocessing)
    for start in range(0, len(images), batch_size):
        paths = images[start : start + batch_size]
        read = [_preprocess(path, predictor.preprocessing) for path in paths]
        inputs = [image for image in read if not isinstance(image, str)]
        if inputs and start == 0:
            predictor.check_name(np.stack(inputs))
        logits = iter(predictor.session(np.stack(inputs)) if inputs else ())
        for path, image in zip(paths, read, strict=True):
            if isinstance(image, str):
                yield Prediction(path=path, problem=image)
            else:
                yield Prediction(path=path, best=_best(predictor, next(logits), top))


def say_mismatch(images: Dataset, preprocessing: Preprocessing) -> None:
    """Log a warning where images have samples that the network's value range makes nearly uniform."""
    sentence = mismatch(images, preprocessing.value_range)
    if sentence:
        _log.warning("%s", sentence)


def _preprocess(path: Path, preprocessing: Preprocessing) -> Floats | str:
    try:
        return preprocessing(decode(path, value_range=preprocessing.value_range))
    except BadData as error:
        return str(error)


def _best(predictor: Predictor, logits: Floats, top: int) -> tuple[tuple[int, str, float], ...]:
    wide = logits.astype(np.float64)
    probabilities = np.exp(wide - wide.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return tuple((int(i), predictor.class_name(int(i)), float(probabilities[i])) for i in order)
