"""What a run starts from: a fresh network, or weights - fused, expanded again, with a head fitted to the photos."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onefold.commands.open import weights_file
from onefold.data import Batches, Preprocessing, Progressive, Source, Transform
from onefold.data.dataset import Subset
from onefold.data.sampler import shuffled
from onefold.errors import BadArgument
from onefold.models import Classifier, create_model
from onefold.models.mobileone import start_from_skips_
from onefold.models.parts import set_dropout_
from onefold.recipes import Recipe
from onefold.reparam import expand, folded, fuse, leftovers, restate_norms_, set_route_
from onefold.train import NORMS, RunFolder, fit_linear, frozen_parts, seed_everything
from onefold.train.checkpoint import WEIGHTS

_log = logging.getLogger("onefold")

PROBE_IMAGES = 20_000
"""Photos that a head is fitted to at most; more of them change it little, and their features fill the memory."""
STATE_IMAGES = 256
"""Photos whose statistics the norms of an expanded network begin with."""


@dataclass(frozen=True, kw_only=True)
class Photos:
    """The training images, where to compute on them, and how many at once."""

    source: Source
    device: torch.device
    batch_size: int = 32

    def some(self, count: int, seed: int) -> Photos:
        """At most `count` of them, chosen by the seed."""
        total = len(self.source)
        if total <= count:
            return self
        chosen = shuffled(np.arange(count, dtype=np.int64), total, seed=seed, epoch=0)
        part = Subset(self.source, sorted(chosen.tolist()))
        return Photos(source=part, device=self.device, batch_size=self.batch_size)

    def batches(self, transform: Preprocessing | Transform | Progressive, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them once, on the device."""
        batches = Batches(self.source, transform, batch_size=self.batch_size, seed=seed, on_bad="skip")
        for images, labels in batches.epoch(0):
            shaped = images.to(self.device).contiguous(memory_format=torch.channels_last)
            yield shaped, labels.to(self.device)


def start_network(recipe: Recipe, photos: Photos) -> nn.Module:
    """The network that a run of the recipe starts from, in train mode."""
    num_classes = len(photos.source.classes)
    channels, seed = recipe.preprocessing.channels, recipe.plan.seed
    weights = None if recipe.weights is None else weights_file(recipe.weights)
    if weights is None and (recipe.start == "expanded" or recipe.head != "kept"):
        raise BadArgument(f"the recipe {recipe.name} starts from weights: give --weights FILE, a run or a hub id")
    seed_everything(seed)
    fresh = create_model(recipe.model, num_classes=num_classes, in_chans=channels)
    if weights is None:
        if recipe.start == "skips":
            start_from_skips_(fresh)
        return _as_told(fresh, recipe)
    model = create_model(recipe.model, num_classes=num_classes, in_chans=channels, weights=weights)
    if recipe.head != "kept":
        _renew_head_(model, recipe, photos)
    if recipe.start == "expanded" and not leftovers(model):
        model = _expanded(model, fresh, recipe, photos)
    return _as_told(model, recipe)


def resumed_network(recipe: Recipe, num_classes: int, out: Path) -> nn.Module:
    """A network of the form that the run in `out` trains; its values come from the checkpoint."""
    seed_everything(recipe.plan.seed)
    model = create_model(recipe.model, num_classes=num_classes, in_chans=recipe.preprocessing.channels)
    return _as_told(fuse(model.eval()) if _trains_fused(out) else model, recipe)


def quicken_frozen_(model: nn.Module, freeze: tuple[str, ...]) -> None:
    """Evaluate what `Plan.freeze` takes out of the training as the folded convolutions that it is for good."""
    for part in frozen_parts(model, freeze):
        set_route_(part, folded)
    if NORMS in freeze:
        set_route_(model, folded)


# ----------------------------------------------------------------------------------------- the parts


def _as_told(model: nn.Module, recipe: Recipe) -> nn.Module:
    """In train mode, with the recipe's dropout."""
    if recipe.dropout is not None:
        set_dropout_(model, recipe.dropout)
    return model.train()


def _renew_head_(model: nn.Module, recipe: Recipe, photos: Photos) -> None:
    """A fresh last layer; and with "probe" the one that fits the photos best, the features being as they are."""
    assert isinstance(model, Classifier)
    model.reset_classifier(len(photos.source.classes))
    if recipe.head != "probe":
        return
    chosen = photos.some(PROBE_IMAGES, recipe.plan.seed)
    features, labels = _features(model, chosen, recipe)
    weight, bias = fit_linear(features, labels, len(photos.source.classes))
    right = (features @ weight.T + bias).argmax(1).eq(labels).float().mean().item()
    fc = model.get_classifier()
    assert isinstance(fc, nn.Linear)
    with torch.no_grad():
        fc.weight.copy_(weight)
        fc.bias.copy_(bias)
    _log.info("the head was fitted to %d photos, of which it tells %.1f %% right", len(labels), 100 * right)


@torch.no_grad()
def _features(model: Classifier, photos: Photos, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """What the last layer sees of each photo (M, D), and the labels (M,)."""
    network = fuse(model.eval()) if leftovers(model) else model.eval()
    assert isinstance(network, Classifier)
    network = network.to(photos.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen = [
        (network.forward_head(network.forward_features(images), pre_logits=True).cpu(), labels.cpu())
        for images, labels in photos.batches(recipe.preprocessing, recipe.plan.seed)
    ]
    network.to("cpu")
    return torch.cat([features for features, _ in seen]), torch.cat([labels for _, labels in seen])


def _expanded(fused: nn.Module, like: nn.Module, recipe: Recipe, photos: Photos) -> nn.Module:
    """The training network that folds to the fused one, its norms stated for photos as training will see them."""
    generator = torch.Generator().manual_seed(recipe.plan.seed)
    try:
        model = expand(fused, like, generator).eval()
    except ValueError as error:
        raise BadArgument(f"{recipe.model} cannot be expanded ({error}): choose --start plain") from error
    some = photos.some(STATE_IMAGES, recipe.plan.seed)
    model.to(photos.device)
    restate_norms_(model, (images for images, _ in some.batches(recipe.transform, recipe.plan.seed)))
    _log.info("fused weights were given branches and norms again, stated for %d photos", len(some.source))
    return model.to("cpu")


def _trains_fused(out: Path) -> bool:
    """Whether the weights in a run's checkpoint are those of a fused network; a look at their names, not a check."""
    for folder in (RunFolder(out).last, RunFolder(out).previous):
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                return not any(name.endswith("running_var") for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            continue
    return False
