"""Recipes: the only place that names a network, a dataset and a plan together.

One function a run, in a file a family; each gives one complete frozen value. `find_recipe("mobileone:s0")` is
`recipes.mobileone.s0()`. Variants call another recipe and change fields.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from importlib import import_module

from onefold.errors import BadArgument
from onefold.recipes.recipe import RECIPE_FILE as RECIPE_FILE
from onefold.recipes.recipe import Data as Data
from onefold.recipes.recipe import Expected as Expected
from onefold.recipes.recipe import Recipe as Recipe
from onefold.recipes.recipe import override as override
from onefold.recipes.recipe import read_recipe_file as read_recipe_file
from onefold.recipes.recipe import scale_to_batch_size as scale_to_batch_size
from onefold.recipes.recipe import with_epochs as with_epochs
from onefold.recipes.recipe import with_image_size as with_image_size

_FIELD_OF_OPTION = {
    "val": "data.val",
    "model": "model",
    "weights": "weights",
    "start": "start",
    "head": "head",
    "teacher": "plan.distill.teacher",
    "batch_size": "plan.batch_size",
    "lr": "plan.optimizer.lr",
    "seed": "plan.seed",
}
FAMILIES = ("digits", "photos", "mobileone", "mobileformer", "mobilenetv1")


def all_recipes() -> list[Recipe]:
    """Every recipe, family by family."""
    return [make() for make in _makers()]


def find_recipe(name: str, size: int | None = None) -> Recipe:
    """The recipe called family:name, on images of `size` pixels where that is given (see `with_image_size`).

    Raises BadArgument with the nearest names.
    """
    known = {make().name: make for make in _makers()}
    if name in known:
        make = known[name]
        if size is None:
            return make()
        if "size" in inspect.signature(make).parameters:  # a family that knows what to expect there
            return make(size=size)
        return with_image_size(make(), size)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise BadArgument(f"there is no recipe {name!r}: {hint}")


def make_recipe(
    name: str,
    changes: Mapping[str, str],
    *,
    size: int | None = None,
    epochs: int | None = None,
    scale_to_batch: int | None = None,
) -> Recipe:
    """The recipe called `name` as a command line wants it: another size, length or batch, and then single fields.

    Raises BadArgument, naming the field, where it cannot be.
    """
    recipe = find_recipe(name, size)
    recipe = recipe if epochs is None else with_epochs(recipe, epochs)
    if scale_to_batch is not None:
        if "plan.batch_size" in changes:
            raise BadArgument("--batch-size sets the batch size alone, --scale-to-batch lr and EMA too: give one")
        recipe = scale_to_batch_size(recipe, batch_size=scale_to_batch)
    return override(recipe, changes)


def option_changes(options: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, str]:
    """The fields of a recipe that `train`'s options set, by name, and `changes` of any others, for `override`.

    An option that is None leaves its field as it is, and one that is of no field is left out.
    """
    given = {field: options[name] for name, field in _FIELD_OF_OPTION.items() if options[name] is not None}
    texts = {field: str(value) for field, value in given.items()}
    texts |= {"int8": "{}"} if options["int8"] else {}
    return texts | {field: v if isinstance(v, str) else json.dumps(v) for field, v in changes.items()}


def _makers() -> list[Callable[..., Recipe]]:
    """The functions of the families: those that their files show."""
    modules = [import_module(f"onefold.recipes.{family}") for family in FAMILIES]
    return [
        make
        for module in modules
        for name, make in vars(module).items()
        if inspect.isfunction(make) and make.__module__ == module.__name__ and not name.startswith("_")
    ]
