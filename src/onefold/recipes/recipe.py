"""Recipe: a whole training as one frozen value, and what to change in one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from onefold.config import Range, check_fields, from_dict, to_dict
from onefold.data import (
    Augment,
    AutoAugment,
    CentreCrop,
    ColorJitter,
    Curriculum,
    HorizontalFlip,
    Mixing,
    Preprocessing,
    ProgressiveAugment,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomResizedCrop,
    RandomShift,
    Resize,
    Stage,
)
from onefold.data.augmentation import with_image_size as steps_at_size
from onefold.errors import BadArgument, BadCheckpoint
from onefold.file_io import parse_json, read_json, suggest_path
from onefold.train import SGD, Cosine, Epochs, Exponential, Plan, Steps

_Sized = RandomResizedCrop | Resize | CentreCrop
Transform = _Sized | HorizontalFlip | RandomAffine | RandomShift | ColorJitter | AutoAugment | RandAugment

RECIPE_FILE = "recipe.json"
"""The recipe of a run, in its folder."""

_GRID = 8  # pixels: to a multiple of it the sizes of a curriculum's stages are rounded


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on: "digits" or a folder, and how it is split where it is not split already.

    `val` is another place, whose images are val: then all of `spec` but its own val is trained on.
    """

    spec: str = ""
    val: str = ""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    val_fraction: Annotated[float, Range(0.0, 1.0)] = 0.2

    def __post_init__(self) -> None:
        check_fields(self, "data")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a run of the recipe should reach: top-1 in percent, who says so, and what it costs."""

    top1: Annotated[float, Range(0.0, 100.0)]
    source: str
    cost: str = ""


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Quantization-aware training: one scale a "channel" or a "tensor" of the weights, which are integers up to `limit`
    (63: 7 bits, for x86 processors without VNNI), and ranges of the activations from so many of the training images.
    """

    weights: Literal["channel", "tensor"] = "channel"
    limit: Literal[63, 127] = 127
    images: Annotated[int, Range(2, 100_000)] = 200


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete training: which network, on what, how. `steps` augment; `preprocessing` is the network's for ever.

    `erase` puts out a part of each normalised image, `mixing` blends the images of a batch, `curriculum` says how size
    and strength of the augmentation grow with the epochs. `dropout` is that before the last layer; None leaves what the
    network was built with. `notes` say how this recipe came from another.

    `weights` is what to start from: a file, a run folder or an id of the hub; None starts from scratch. `start` says
    how: "plain", as the weights are or as the papers begin; from the "skips" (see `mobileone.zero_init_branches_`); or,
    where the weights are fused, "expanded" to branches that fold to them (see `reparam.expand`). `head` is what
    becomes of the weights' last layer: "kept" where it is for as many classes, "fresh", or the linear "probe" that
    fits the photos best.

    With `int8` the network trains, is evaluated and saved as an int8 network.
    """

    name: str
    model: str
    data: Data
    steps: tuple[Transform, ...]
    preprocessing: Preprocessing
    plan: Plan
    erase: RandomErasing | None = None
    mixing: Mixing | None = None
    curriculum: Curriculum | None = None
    dropout: Annotated[float, Range(0.0, 1.0)] | None = None
    weights: str | None = None
    start: Literal["plain", "skips", "expanded"] = "plain"
    head: Literal["kept", "fresh", "probe"] = "kept"
    int8: Int8 | None = None
    expect: Expected | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "recipe")
        if self.plan.epochs < 1 and self.head != "probe":
            raise BadArgument("plan.epochs must be a whole number from 1, not 0, where --head is not probe")
        if self.curriculum is not None:
            self._check_stages(self.curriculum.stages)

    def _check_stages(self, stages: tuple[Stage, ...]) -> None:
        last, size, epochs = stages[-1], self.preprocessing.size, self.plan.epochs
        if last.epoch >= epochs:
            raise BadArgument(
                f"the curriculum's last stage begins at epoch {last.epoch}, but plan.epochs is {epochs}: "
                f"--epochs {epochs} shortens both, --curriculum none leaves it out"
            )
        if last.size != size:
            raise BadArgument(
                f"the curriculum ends at {last.size} px, but preprocessing.size is {size}: --img-size changes both"
            )

    @property
    def augment(self) -> Augment:
        """What training does to each image; with a curriculum, in its end."""
        return Augment(steps=self.steps, preprocessing=self.preprocessing, erase=self.erase)

    @property
    def transform(self) -> Augment | ProgressiveAugment:
        """What training does to each image, from the first epoch to the last."""
        if self.curriculum is None:
            return self.augment
        return ProgressiveAugment(augment=self.augment, curriculum=self.curriculum)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as recipe.json holds them; `from_dict` is the exact inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(to_dict(self)))
        return plain

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote. Raises BadArgument for an unknown, missing or impossible field."""
        return from_dict(cls, given, "recipe")


def read_recipe_file(run: Path) -> Recipe:
    """The recipe that lies in a run folder. Raises BadCheckpoint where there is none, or none that can be read."""
    try:
        return Recipe.from_dict(read_json(run / RECIPE_FILE))
    except FileNotFoundError as error:
        hint = "" if run.exists() else suggest_path(run)
        raise BadCheckpoint(f"{run} is not a run: it has no {RECIPE_FILE}{hint}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{run / RECIPE_FILE} cannot be read: {error}") from error


def override(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    """The recipe with some fields changed, each named by its path and written as on a command line.

    `{"plan.epochs": "5", "plan.ema": "none", "plan.optimizer.lr": "0.05"}`. A value is read as JSON where it is JSON,
    and as a word otherwise. Raises BadArgument naming the field.
    """
    plain = recipe.to_dict()
    for path, text in changes.items():
        *parents, field = path.split(".")
        place: Any = plain
        for parent in parents:
            if isinstance(place, list):  # steps.0.size
                place = place[int(parent)] if parent.isdecimal() and int(parent) < len(place) else None
            else:
                place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise BadArgument(
                f"the recipe has no {path!r}: `onefold train --recipe {recipe.name} --show` prints its fields"
            )
        place[field] = _value(text)
    return Recipe.from_dict(plain)


def with_image_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe on images of another size, in pixels: its preprocessing, its curriculum and every step with a size.

    At another size the recipe's expected result does not hold: it is left out.
    """
    own = recipe.preprocessing.size
    if size == own:
        return recipe
    curriculum = recipe.curriculum
    if curriculum is not None:
        stages = [replace(s, size=max(_GRID, round(s.size * size / own / _GRID) * _GRID)) for s in curriculum.stages]
        curriculum = Curriculum(stages=(*stages[:-1], replace(stages[-1], size=size)))
    return replace(
        recipe,
        steps=steps_at_size(recipe.steps, size),
        preprocessing=replace(recipe.preprocessing, size=size),
        curriculum=curriculum,
        expect=None,
    )


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with another length; a warm-up counted in epochs and a curriculum stay the same shares of it.

    At another length the recipe's expected result does not hold: it is left out.
    """
    plan = recipe.plan
    if epochs == plan.epochs:
        return recipe
    schedule, curriculum = plan.schedule, recipe.curriculum
    if isinstance(schedule, Cosine) and isinstance(schedule.warmup, Epochs) and plan.epochs > 0 <= epochs:
        schedule = replace(schedule, warmup=Epochs(schedule.warmup.count * epochs / plan.epochs))
    if curriculum is not None and epochs > 0:
        begins = {min(s.epoch * epochs // plan.epochs, epochs - 1): s for s in curriculum.stages}  # later ones win
        curriculum = Curriculum(stages=tuple(replace(stage, epoch=epoch) for epoch, stage in begins.items()))
    plan = replace(plan, epochs=epochs, schedule=schedule)
    return replace(recipe, plan=plan, curriculum=curriculum, expect=None)


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    try:
        return parse_json(text)
    except ValueError:
        return text


_LINEAR = "lr x {factor:.6g}, linear (arXiv 1706.02677)"
_ROOT = "lr x {factor:.6g}, square root (arXiv 2205.10343)"
_POWER = "EMA decay ^ {power:.6g} (arXiv 2307.13813)"


def scale_to_batch_size(recipe: Recipe, *, batch_size: int, devices: int = 1) -> Recipe:
    """The recipe on `devices` devices with `batch_size` images of a step on each, and a note that says what changed.

    The learning rate goes with k under SGD (Goyal et al., 2017) and with the root of k under AdamW and RMSprop
    (Malladi et al., 2022); the EMA's decay becomes its k-th power (Busbridge et al., 2023). All else stays.
    The expected result stays too, as what to compare with: it is not promised at another batch size.

    Raises BadArgument where the plan cannot take the batch size.
    """
    plan, total = recipe.plan, batch_size * devices
    if batch_size < 1 or devices < 1:
        raise BadArgument(f"{batch_size} images on each of {devices} devices: expected 1 or more of both")
    if total == plan.batch_size:
        return recipe
    k = total / plan.batch_size
    rule = _LINEAR if isinstance(plan.optimizer, SGD) else _ROOT
    factor = k if isinstance(plan.optimizer, SGD) else math.sqrt(k)
    changed = replace(
        plan,
        batch_size=total,
        optimizer=replace(plan.optimizer, lr=plan.optimizer.lr * factor),
        schedule=_schedule(plan, factor, k),
        ema=None if plan.ema is None else replace(plan.ema, decay=plan.ema.decay**k),
    )
    rules = [rule.format(factor=factor)] + ([_POWER.format(power=k)] if plan.ema else [])
    note = f"scaled from {plan.batch_size} to {total} images a step: {'; '.join(rules)}"
    return replace(recipe, plan=changed, notes=(*recipe.notes, note))


def _schedule(plan: Plan, factor: float, k: float) -> Cosine | Exponential:
    schedule = plan.schedule
    if isinstance(schedule, Exponential):
        every = schedule.every
        return replace(schedule, every=_fewer(every, k) if isinstance(every, Steps) else every)
    warmup = _fewer(schedule.warmup, k) if isinstance(schedule.warmup, Steps) else schedule.warmup
    return replace(schedule, final=schedule.final * factor, warmup=warmup, warmup_from=schedule.warmup_from * factor)


def _fewer(steps: Steps, k: float) -> Steps:
    return Steps(max(1, round(steps.count / k))) if steps.count else steps
