"""Run: a training that was written to a folder, with its history, its best epoch, and the verbs as methods."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from onefold.accuracy_intervals import wilson_interval
from onefold.commands.bench import bench
from onefold.commands.evaluate import evaluate
from onefold.commands.export import export
from onefold.commands.fuse import FusedWeights, fuse
from onefold.commands.held_out_images import DATA_FILE, read_run_data
from onefold.commands.predict import predict
from onefold.commands.predictor import SavedResult, Source
from onefold.commands.saved_recipe import read_recipe
from onefold.data import DatasetInfo
from onefold.data.dataset_info import Split
from onefold.errors import BadCheckpoint, MissingExtra, OnefoldError, options_as_arguments
from onefold.file_io import parse_json, read_plain_file, unused_path
from onefold.recipes import Recipe
from onefold.report.figures import Curve, draw_curves
from onefold.report.format import format_count
from onefold.report.load_results import load_report_inputs
from onefold.report.predictions import Predictions
from onefold.train import RunFolder

_log = logging.getLogger("onefold")

_FEW = 100  # images a class, below which weights of ImageNet are the better start
_GOOD = 90.0  # percent: with few images, but as good as this, nothing is said
_COLOURS = (
    "--ink:#1f2328;--muted:#59636e;--grid:#d0d7de;--surface:#fff;--alarm:#cf222e;"
    "--series-0:#0969da;--series-1:#bc4c00;max-width:640px"
)


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The best epoch of a training: its weights, and their accuracy on `count` images. `top1` in percent.

    Epoch 0 is the network that the run started from.
    """

    weights: Path
    top1: float
    epoch: int
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `top1` (Wilson's), in percent; 0 to 100 where no image is known."""
        return wilson_interval(round(self.top1 * self.count / 100), self.count)


@dataclass(frozen=True, repr=False)
class Run(SavedResult):
    """A training in its folder; the verbs are methods: `predict`, `evaluate`, `fuse`, `export`, `bench`.

    run = onefold.train("photos/")
    run.best.top1, run.history[-1]["loss"], run.data.classes
    """

    folder: Path

    predict = predict
    evaluate = evaluate
    export = export
    bench = bench

    def __fspath__(self) -> str:
        return str(self.folder)

    def fuse(self, out: Source | None = None, *, tolerance: float | None = None) -> FusedWeights:
        """Fuse the best weights, into fused.safetensors in the run's folder, or `out`: see `onefold.fuse`."""
        return fuse(self, self.folder / "fused.safetensors" if out is None else out, tolerance=tolerance)

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged of each epoch, in order: epoch, step, loss, lr, top1 and top5 (percent), val_loss, ...

        A run that started from weights begins with epoch 0, its evaluation before the first step.
        """
        try:
            lines = read_plain_file(self.folder / "log.jsonl").decode("utf-8").splitlines()
            logged = [parse_json(line) for line in lines]
        except (OSError, ValueError) as error:
            raise BadCheckpoint(f"{self.folder / 'log.jsonl'} cannot be read: {error}") from error
        by_epoch = {each["epoch"]: each for each in logged if each.get("kind") in ("evaluation", "epoch")}
        return [{k: v for k, v in by_epoch[at].items() if k != "kind"} for at in sorted(by_epoch)]

    @property
    def best(self) -> BestEpoch:
        """The best epoch, whose weights the verbs take. Raises BadCheckpoint where no epoch has ended yet."""
        top1, epoch = max(((each["top1"], each["epoch"]) for each in self.history), default=(None, 0))
        if top1 is None:
            raise BadCheckpoint(f"{self.folder} is a run without best weights yet: let it finish an epoch")
        count = self._num_images("val") if self._predictions is None else self._predictions.num_images
        weights = RunFolder(self.folder).best / "model.safetensors"
        return BestEpoch(weights=weights, top1=float(top1), epoch=int(epoch), count=count)

    @property
    def data(self) -> DatasetInfo:
        """What was found in the data: classes, splits, and what was left out."""
        try:
            return DatasetInfo.from_dict(read_run_data(self.folder)["dataset"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{self.folder / DATA_FILE} cannot be read: {error}") from error

    @property
    def recipe(self) -> Recipe:
        """The complete recipe."""
        return read_recipe(self.folder)

    def _num_images(self, split: Split) -> int:
        """How many images a split has; 0 where a run of an older onefold did not keep it."""
        if not (self.folder / DATA_FILE).is_file():
            return 0
        found = self.data.split(split)
        return 0 if found is None else found.num_images

    @cached_property
    def _predictions(self) -> Predictions | None:
        found = load_report_inputs([self.folder], [], [])
        for note in found.notes:
            _log.warning("%s", note)
        return found.runs[0].predictions

    @property
    def remarks(self) -> list[str]:
        """What one must know of the accuracy, a sentence each: at chance, one class only, too few images, got worse."""
        found, best, recipe = self._predictions, self.best, self.recipe
        remarks = []
        if found is not None and found.num_images:
            label, most = found.images_per_class.most_common(1)[0]
            answers = {answer for _, answer in found.pairs}
            share = 100 * most / found.num_images
            if len(answers) == 1 and len(found.images_per_class) > 1:
                remarks.append(
                    f"every image of val is predicted as {found.name(next(iter(answers)))!r}: nothing was learned"
                )
            elif best.interval[0] <= share:
                remarks.append(
                    f"this is no better than chance: always answering {found.name(label)!r} is right on {share:.1f} %, "
                    f"and the 95 % interval begins at {best.interval[0]:.1f} %"
                )
        num_train = self._num_images("train")
        if num_train and num_train < _FEW * len(self.data.classes) and recipe.weights is None and best.top1 < _GOOD:
            remarks.append(
                f"{num_train} images are few to train from scratch with: start from weights (--recipe photos:finetune)"
            )
        history = self.history
        if best.epoch == 0 and len(history) > 1:
            remarks.append(
                "no epoch was better than the weights it started from, which stay the best: try a lower rate (--lr)"
            )
        elif history[0]["epoch"] == 0 and best.epoch > 0 and best.top1 <= history[0]["top1"]:
            remarks.append(
                f"training gained nothing: before the first step it was {history[0]['top1']:.2f} % too; try more "
                "epochs, or another rate (--lr)"
            )
        elif history[-1]["top1"] < best.interval[0]:
            remarks.append(
                f"it got worse after epoch {best.epoch}, down to {history[-1]['top1']:.1f} %: try fewer epochs, or "
                "a lower rate (--lr)"
            )
        return remarks if OnefoldError.on_command_line else [options_as_arguments(remark) for remark in remarks]

    def __repr__(self) -> str:
        best, (low, high) = self.best, self.best.interval
        lines = [
            f"Run({str(self.folder)!r}): {self.recipe.model}, best top-1 {best.top1:.2f} % (95 % interval {low:.1f} to "
            f"{high:.1f}) on {format_count(best.count, 'image')}, epoch {best.epoch} of {self.recipe.plan.epochs}"
        ]
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(line)}</p>" for line in repr(self).splitlines()]
        for key, title, columns, unit in (
            ("top1", "Top-1 accuracy", {"validation": "top1"}, "top-1, %"),
            ("loss", "Loss", {"training": "loss", "validation": "val_loss"}, "loss, nats"),
        ):
            lines = [Curve(label, _points(self.history, column)) for label, column in columns.items()]
            try:
                drawing = draw_curves(re.sub(r"\W", "-", f"{self.folder.name}-{key}"), title, lines, unit)
            except MissingExtra as error:
                parts.append(f"<p>{html.escape(str(error))}</p>")
                break
            parts.append(f"<figure>{drawing.svg or ''}<figcaption>{html.escape(drawing.caption)}</figcaption></figure>")
        return f'<div style="{_COLOURS}">{"".join(parts)}</div>'


def new_run_folder(recipe: Recipe) -> Path:
    """Give a run folder in runs/ that is not there yet, and say so where the first of that name is."""
    first = Path("runs") / recipe.name.replace(":", "-")
    if "RANK" in os.environ:  # each process has to choose the same
        return first
    folder = unused_path(first)
    if folder != first:
        _log.info("%s is there already: this run is written to %s", first, folder)
    return folder


def _points(history: list[dict[str, Any]], column: str) -> tuple[tuple[float, float], ...]:
    """The (epoch, value) of a column, where it was logged."""
    rows: list[Mapping[str, Any]] = [each for each in history if isinstance(each.get(column), int | float)]
    return tuple((float(each["epoch"]), float(each[column])) for each in rows)
