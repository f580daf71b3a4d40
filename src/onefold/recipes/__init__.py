"""Recipes: the only place that names a network, a dataset and a plan together.

One function a run, in a file a family; each gives one complete frozen value. `find_recipe("mobileone:s0")` is
`recipes.mobileone.s0()`. Variants call another recipe and change fields.
"""

from __future__ import annotations

import difflib
import inspect
from importlib import import_module

from onefold.errors import BadArgument
from onefold.recipes.recipe import Data as Data
from onefold.recipes.recipe import Expected as Expected
from onefold.recipes.recipe import Recipe as Recipe
from onefold.recipes.recipe import at_epochs as at_epochs
from onefold.recipes.recipe import at_size as at_size
from onefold.recipes.recipe import override as override

FAMILIES = ("digits", "photos", "mobileone", "mobilenetv1")


def recipes() -> list[Recipe]:
    """Every recipe, family by family."""
    found = []
    for family in FAMILIES:
        module = import_module(f"onefold.recipes.{family}")
        for name, make in vars(module).items():
            if inspect.isfunction(make) and make.__module__ == module.__name__ and not name.startswith("_"):
                found.append(make())
    return found


def find_recipe(name: str) -> Recipe:
    """The recipe called family:name. Raises BadArgument with the nearest names."""
    known = {recipe.name: recipe for recipe in recipes()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise BadArgument(f"there is no recipe {name!r}: {hint}")
