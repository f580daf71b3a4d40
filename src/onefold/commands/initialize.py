"""What a run starts from: a fresh network, or weights - fused, expanded again, with a head fitted to the photos."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onefold.commands.open import is_artifact, open_network, open_predictor, weights_file
from onefold.commands.timm import is_foreign, open_published
from onefold.data import Batches, Preprocessing, Progressive, Source, Transform
from onefold.data.dataset import Subset
from onefold.data.sampler import shuffled
from onefold.errors import BadArgument
from onefold.models import Classifier, create_model
from onefold.models.mobileone import zero_init_branches_
from onefold.models.parts import set_dropout_
from onefold.recipes import Recipe
from onefold.reparam import expand, folded, fuse, recalibrate_norms_, set_route_, unfused_norms
from onefold.train import NORMS, RunFolder, Teacher, fit_linear, frozen_parts, seed_everything
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
            zero_init_branches_(fresh)
        return _as_told(fresh, recipe)
    model = create_model(recipe.model, num_classes=num_classes, in_chans=channels, weights=weights)
    if recipe.head != "kept":
        _renew_head_(model, recipe, photos)
    if recipe.start == "expanded" and not unfused_norms(model):
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
    network = fuse(model.eval()) if unfused_norms(model) else model.eval()
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
    recalibrate_norms_(model, (images for images, _ in some.batches(recipe.transform, recipe.plan.seed)))
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


_log = logging.getLogger("onefold")


@dataclass(frozen=True, kw_only=True)
class Pupil:
    """Who is taught: its classes, its preprocessing, and where it computes."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Master:
    """A teacher as it was opened: logits (B, N) for images in its own preprocessing, and what it calls its classes.

    `fixed_size` is the side of its images where it takes no other.
    """

    title: str
    answer: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] | None = None
    fixed_size: int | None = None


def open_teacher(recipe: Recipe, classes: tuple[str, ...], device: torch.device) -> Teacher | None:
    """Those whom the recipe's plan names, ready to answer to the student's images; None where it names none.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    how = recipe.plan.distill
    if how is None:
        return None
    if not how.teachers:
        raise BadArgument(f"the recipe {recipe.name} needs a teacher: --plan.distill.teacher RUN, weights or timm:NAME")
    pupil = Pupil(classes=classes, preprocessing=recipe.preprocessing, device=device)
    panel = _Panel(tuple(_Interpreter.between(open_master(name, device), pupil) for name in how.teachers))
    _log.info("taught by %s", ", ".join(member.master.title for member in panel.members))
    return panel


def open_master(spec: str, device: torch.device) -> Master:
    """One teacher: `timm:NAME`, `timm:NAME@FILE`, `name@WEIGHTS`, an artifact, a run folder, weights, an id of the hub.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    if is_foreign(spec):
        return _of_timm(spec, device)
    if is_artifact(Path(spec)):
        return _of_artifact(spec)
    name, at, source = spec.rpartition("@")
    network = open_network(source, name=name or None) if at and not Path(spec).exists() else open_network(spec)
    if not network.is_fused:
        network, _ = network.fused()
    card = network.card
    return Master(
        title=spec,
        answer=network.model.to(device).requires_grad_(False),
        preprocessing=network.preprocessing,
        num_classes=card.num_classes,
        classes=card.classes,
    )


# ---------------------------------------------------------------------------------- asking a teacher


@dataclass(frozen=True, eq=False)
class _Panel:
    """Several teachers, asked one after the other. A Teacher."""

    members: tuple[_Interpreter, ...]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        return [member(images) for member in self.members]


@dataclass(frozen=True, eq=False)
class _Interpreter:
    """A teacher and what lies between it and a student: scales of colour, sides of images, the order of classes."""

    master: Master
    gain: Tensor  # (1, C, 1, 1), with shift: from the student's normalised colours to the teacher's
    shift: Tensor
    rows: Tensor | None  # the teacher's logits in the order of the student's classes

    @classmethod
    def between(cls, master: Master, pupil: Pupil) -> _Interpreter:
        """Raises BadArgument where the teacher knows other classes, or reads colours that the student does not see."""
        own, its = pupil.preprocessing, master.preprocessing
        if own.channels == 3 and its.channels == 1:
            raise BadArgument(f"the teacher {master.title} takes gray images, the student has colour: choose another")
        planes = max(own.channels, its.channels)
        mean, std, its_mean, its_std = (
            torch.tensor((values * planes)[:planes] if len(values) == 1 else values, dtype=torch.float64)
            for values in (own.mean, own.std, its.mean, its.std)
        )
        gain, shift = (
            v.float().view(1, -1, 1, 1).to(pupil.device) for v in (std / its_std, (mean - its_mean) / its_std)
        )
        return cls(master, gain, shift, _rows(master, pupil))

    def __call__(self, images: Tensor) -> Tensor:
        """The student's images (B, C, H, W) -> the teacher's logits for the student's classes (B, N)."""
        seen = images.float() * self.gain + self.shift
        size = self.master.fixed_size
        if size is not None and seen.shape[2:] != (size, size):
            seen = F.interpolate(seen, (size, size), mode="bilinear", antialias=True, align_corners=False)
        logits = self.master.answer(seen)
        return logits if self.rows is None else logits[:, self.rows]


def _rows(master: Master, pupil: Pupil) -> Tensor | None:
    if master.classes is not None and set(pupil.classes) <= set(master.classes):
        rows = [master.classes.index(name) for name in pupil.classes]
        return None if rows == list(range(master.num_classes)) else torch.tensor(rows, device=pupil.device)
    if master.classes is None and master.num_classes == len(pupil.classes):
        return None
    known = f"{master.num_classes} classes" if master.classes is None else f"classes like {master.classes[0]!r}"
    raise BadArgument(
        f"the teacher {master.title} tells {known}, the data have {len(pupil.classes)} like {pupil.classes[0]!r}: "
        "fine-tune the teacher on these data first (onefold train --recipe photos:finetune), or name folders as it does"
    )


# ---------------------------------------------------------------------------------- opening teachers


def _of_artifact(spec: str) -> Master:
    """An exported artifact: numpy in, numpy out, on the CPU."""
    session = open_predictor(spec)

    def answer(images: Tensor) -> Tensor:
        logits = session.answer(np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32))
        return torch.from_numpy(np.asarray(logits)).to(images.device)

    return Master(
        title=session.title,
        answer=answer,
        preprocessing=session.preprocessing,
        num_classes=session.num_classes,
        classes=session.classes,
        fixed_size=int(session.facts["input_shape"][1]),
    )


def _of_timm(spec: str, device: torch.device) -> Master:
    """A model of timm by its name, with its own weights, or with those of a file."""
    found = open_published(spec)
    return Master(
        title=spec,
        answer=found.model.to(device).requires_grad_(False),
        preprocessing=found.preprocessing,
        num_classes=found.num_classes,
        classes=found.classes,
        fixed_size=found.fixed_size,
    )
