"""What a person sees of a training: the data looked at before it, a sheet of its first pictures, who hears of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onefold.data import Preprocessing, Source
from onefold.data.checks import Checked, check_data
from onefold.data.sheet import captions, sheet
from onefold.recipes import Recipe
from onefold.storage import replacing, write_text
from onefold.train import Batches, Progress, listening
from onefold.train.rng import apart

CHECK, SHEET = "check.json", "samples.png"

_PICTURES = 32
_log = logging.getLogger("onefold")

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who is told of a training: `on_progress` after each step, `on_start` once data and network are found sound.

    `log_to` names services (wandb, trackio) beside TensorBoard; with `check` the data are looked at first.
    """

    on_progress: OnProgress | None = None
    on_start: Callable[[Recipe], None] | None = None
    log_to: tuple[str, ...] = ()
    check: bool = True

    def looked_at(self, train: Source, val: Source, size: int) -> Checked | None:
        """What the first look at the data found, warnings said aloud; raises BadData for an error, writes nothing."""
        if not self.check:
            return None
        checked = check_data(train, val, size)
        for finding in checked.findings:
            if not finding.is_error:
                _log.warning("the data: %s", finding.text)
        checked.refuse_errors()
        return checked

    def heard_by(self, out: Path, recipe: Recipe) -> AbstractContextManager[OnProgress]:
        """A block in which what is called with each Progress reaches all who listen."""
        return listening(out, self.log_to, recipe.to_dict(), self.on_progress)


UNWATCHED = Watch()


def keep_check(out: Path, checked: Checked) -> None:
    """Write what was found to the run folder, for the report."""
    write_text(out / CHECK, json.dumps(asdict(checked), indent=1) + "\n")


def draw_sheet(out: Path, batches: Batches, classes: tuple[str, ...], preprocessing: Preprocessing) -> None:
    """Write the first pictures of the first batch, augmented as training sees them, to the run folder."""
    with apart(torch.device("cpu"), 0):
        first = _first(batches.epoch(0))
    if first is None:
        return
    images, labels = (each[:_PICTURES].cpu().numpy() for each in first)
    told = captions(labels, classes)
    with replacing(out / SHEET) as aside:
        sheet(list(zip(images.astype(np.float32), told, strict=True)), preprocessing).save(aside)


def _first(stream: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    with closing(stream) as batches:  # type: ignore[type-var]
        return next(batches, None)
