"""predictions.jsonl: every answer to a run's validation images, with pictures of the worst, for the report.

The first line says what was asked; then a line an image: name, label and answer as class indices, the answer's and the
label's softmax shares, the label's rank. The lines of the worst mistakes have a `picture` too: what the network saw,
as JPEG in base64.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onefold.commands.open import Predictor
from onefold.data import Source
from onefold.errors import BadData
from onefold.storage import write_text
from onefold.train import Accuracy

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
