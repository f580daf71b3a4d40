"""Predictions of a network for a user's photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onefold.commands.open import Floats, Predictor
from onefold.data import Preprocessing
from onefold.data.decode import decode
from onefold.errors import BadArgument, BadData


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
        answers = iter(predictor.session(np.stack(inputs)) if inputs else ())
        for path, image in zip(piece, read, strict=True):
            if isinstance(image, str):
                yield Prediction(path=path, problem=image)
            else:
                yield Prediction(path=path, best=_best(predictor, next(answers), top))


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
