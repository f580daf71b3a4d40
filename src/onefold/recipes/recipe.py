"""Recipe: a whole training as one frozen value, and what to change in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from onefold.data import (
    Augment,
    CentreCrop,
    HorizontalFlip,
    Preprocessing,
    RandomAffine,
    RandomResizedCrop,
    RandomShift,
    Resize,
)
from onefold.errors import BadArgument
from onefold.train import Cosine, Epochs, Plan
from onefold.train.values import Within, check, from_dict, to_dict

Step = RandomResizedCrop | HorizontalFlip | RandomAffine | RandomShift | Resize | CentreCrop


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on: "digits" or a folder, and how it is split where it is not split already."""

    spec: str = ""
    seed: Annotated[int, Within(0, 2**32 - 1)] = 0
    val_fraction: Annotated[float, Within(0.0, 1.0)] = 0.2

    def __post_init__(self) -> None:
        check(self, "data")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a run of the recipe should reach: top-1 in percent, who says so, and what it costs."""

    top1: Annotated[float, Within(0.0, 100.0)]
    source: str
    cost: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete training: which network, on what, how. `steps` augment; `preprocessing` is the network's for ever.

    `weights` is what to start from: a file, a run folder or an id of the hub; None starts from scratch, and then
    `start` says how: "plain", as the papers do, or from the "skips" (see `mobileone.start_from_skips_`).
    """

    name: str
    model: str
    data: Data
    steps: tuple[Step, ...]
    preprocessing: Preprocessing
    plan: Plan
    weights: str | None = None
    start: Literal["plain", "skips"] = "plain"
    expect: Expected | None = None

    def __post_init__(self) -> None:
        check(self, "recipe")

    @property
    def augment(self) -> Augment:
        """What training does to each image."""
        return Augment(steps=self.steps, preprocessing=self.preprocessing)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as recipe.json holds them; `from_dict` is the exact inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(to_dict(self)))
        return plain

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote. Raises BadArgument for an unknown, missing or impossible field."""
        return from_dict(cls, given, "recipe")


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
            raise BadArgument(f"the recipe has no {path!r}: `onefold train --recipe {recipe.name}` prints its fields")
        place[field] = _value(text)
    return Recipe.from_dict(plain)


def at_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe on images of another size, in pixels: its preprocessing and every step that has one."""
    sized = (RandomResizedCrop, Resize, CentreCrop)
    steps = tuple(replace(step, size=size) if isinstance(step, sized) else step for step in recipe.steps)
    return replace(recipe, steps=steps, preprocessing=replace(recipe.preprocessing, size=size))


def at_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with another length; a warm-up counted in epochs stays the same share of it."""
    plan = recipe.plan
    schedule = plan.schedule
    if isinstance(schedule, Cosine) and isinstance(schedule.warmup, Epochs) and epochs > 0:
        schedule = replace(schedule, warmup=Epochs(schedule.warmup.count * epochs / plan.epochs))
    return replace(recipe, plan=replace(plan, epochs=epochs, schedule=schedule))


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
