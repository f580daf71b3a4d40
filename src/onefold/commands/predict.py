"""What a network says: of a user's photos (`predict`), and how often it is right (`evaluate`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onefold.commands.open import Floats, Predictor
from onefold.data import Batches, Preprocessing, Source, decode
from onefold.data.imagenet import wordnet_ids
from onefold.errors import BadArgument, BadData
from onefold.train import Accuracy, accuracy


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was seen in one image: the likeliest classes with their softmax probabilities, or why it was not read."""

    path: Path
    best: tuple[tuple[int, str, float], ...] = ()
    problem: str | None = None


def predict(
    predictor: Predictor, images: Sequence[Path], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Predictions in the order of `images`; one that cannot be read is told and passed over."""
    if top < 1 or batch_size < 1:
        raise BadArgument(f"top and batch_size must be 1 or more, not {top} and {batch_size}")
    for start in range(0, len(images), batch_size):
        piece = images[start : start + batch_size]
        read = [_prepared(path, predictor.preprocessing) for path in piece]
        inputs = [image for image in read if not isinstance(image, str)]
        answers = iter(predictor.answer(np.stack(inputs)) if inputs else ())
        for path, image in zip(piece, read, strict=True):
            if isinstance(image, str):
                yield Prediction(path=path, problem=image)
            else:
                yield Prediction(path=path, best=_best(predictor, next(answers), top))


def evaluate(predictor: Predictor, source: Source, *, batch_size: int = 32) -> Accuracy:
    """Top-1, top-5, loss and per-class accuracy on a labelled source, its classes matched to the network's by name."""
    index = torch.tensor(class_indices(predictor, source))
    batches = Batches(source, predictor.preprocessing, batch_size=batch_size, shuffle=False)
    return accuracy(predictor.answer, ((images, index[labels]) for images, labels in batches.epoch(0)))


def _prepared(path: Path, preprocessing: Preprocessing) -> Floats | str:
    try:
        return preprocessing(decode(path))
    except BadData as error:
        return str(error)


def _best(predictor: Predictor, logits: Floats, top: int) -> tuple[tuple[int, str, float], ...]:
    wide = logits.astype(np.float64)
    shares = np.exp(wide - wide.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")[:top]
    return tuple((int(i), predictor.class_name(int(i)), float(shares[i])) for i in order)


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
