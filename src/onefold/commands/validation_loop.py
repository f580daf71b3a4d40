"""Validation: after each epoch, by all processes of a training together, and of the best network at its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from onefold.commands.evaluate import PREDICTIONS, evaluate_dataset, predictions_match, write_predictions
from onefold.commands.open_network import Network
from onefold.commands.predictor import open_predictor
from onefold.data import Dataset, ImageLoader
from onefold.data.loader import max_bad_images
from onefold.errors import BadData, GateFailed, NonFiniteLoss
from onefold.models.load_model import Card
from onefold.quantize import remove_qat_
from onefold.recipes import Recipe
from onefold.train import World
from onefold.train.evaluate import Predictions, merge_worker_predictions, predict_batches

_log = logging.getLogger("onefold")


@dataclass(frozen=True, kw_only=True)
class PredictionShard:
    """One process's part of a validation: its predictions, a batch each, and the images that it could not read."""

    predictions: list[Predictions]
    unreadable: dict[str, str]
    drift: float


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates what will be deployed: the EMA weights, fused, and on integers where it trains for int8.

    Each process of `world` evaluates every so many-th batch, on its device; `combine` makes one validation of that.
    """

    card: Card
    validation: Dataset
    recipe: Recipe
    world: World = field(default_factory=World)

    def __call__(self, model: nn.Module) -> PredictionShard:
        """Predict this process's share of the validation images."""
        network, drift = Network(model=remove_qat_(model).cpu(), card=self.card, title=self.recipe.name), 0.0
        if not network.is_fused:
            network, drift = network.fused(tolerance=math.inf)  # logged: only what is deployed has to pass the gate
        batches = ImageLoader(
            self.validation,
            self.recipe.preprocessing,
            batch_size=self.recipe.plan.batch_size,
            rank=self.world.rank,
            world=self.world.size,
            num_workers=self.recipe.plan.workers,
            pin_memory=self.world.device.type == "cuda",
            on_bad="skip",
        )
        # integers are computed as a device does, which is on a CPU
        evaluated = network.model.to(self.world.device) if self.card.int8 is None else network.int8_model()
        with closing(batches.epoch(0)) as epoch:  # type: ignore[type-var]
            predictions = predict_batches(evaluated, epoch)
        return PredictionShard(predictions=predictions, unreadable=batches.bad, drift=drift)

    def combine(self, shares: Sequence[PredictionShard]) -> Mapping[str, float]:
        """Give accuracy in percent, loss, calibration error, and the drift of the fused network.

        Raises BadData where more images could not be read than `ImageLoader` leaves out.
        """
        unreadable = dict[str, str]()
        for share in shares:
            unreadable |= share.unreadable
        limit = max_bad_images(len(self.validation))
        if len(unreadable) > limit:
            last = list(unreadable.values())[-1]
            raise BadData(f"more than {limit} of {len(self.validation)} images are bad, the last: {last}")
        if self.world.is_main:  # which has said so of its own
            for name in sorted(unreadable.keys() - shares[0].unreadable.keys()):
                _log.warning("left out of the validation: %s", unreadable[name])
        score = merge_worker_predictions([share.predictions for share in shares], self.card.num_classes)
        return {**score.metrics(), "drift": shares[0].drift}


def write_best_predictions(out: Path, recipe: Recipe, validation: Dataset) -> None:
    """Write the predictions of the best network for each validation image, unless they are there already."""
    try:
        with open_predictor(out, threads=torch.get_num_threads()) as predictor:
            if predictions_match(out / PREDICTIONS, predictor):
                return
            scored = evaluate_dataset(predictor, validation, batch_size=recipe.plan.batch_size)
            write_predictions(out, predictor, scored.images, scored.score, f"{recipe.data.spec} (held out)")
    except (BadData, GateFailed, NonFiniteLoss) as error:
        _log.warning("the predictions for the validation images are not kept for the report: %s", error)
