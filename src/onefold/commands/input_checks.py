"""Whether what a command is given is there - sources, photos, runtimes, packages - checked before torch is imported.

A mistyped path would else be told after the seconds that the import takes. Each check raises what the command itself
would raise later, by the same code. What is on this machine comes before what the hub is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onefold.commands.optional_dependencies import extras_for_sources, require_extras
from onefold.commands.predictor import check_source_exists, is_timm
from onefold.data.dataset import check_places_exist
from onefold.errors import BadArgument
from onefold.file_io import read_text
from onefold.models.catalogue import resolve_name
from onefold.models.locate_weights import HUB_ID_PATTERN
from onefold.recipes import Recipe, make_recipe, option_changes, read_recipe_file
from onefold.runtimes.base import check_precision, import_runtime


def check_inputs(
    *sources: str,
    places: Sequence[str | None] = (),
    runtimes: Iterable[str] = (),
    precision: str | None = None,
    extras: Iterable[str] = (),
    model: str | None = None,
    classes: Path | None = None,
) -> None:
    """Raise what a command would raise for sources of networks, places of photos and names that do not exist.

    Runtimes are those to export to, with a `precision` that each must have; `extras` are needed beside theirs. `model`
    is the network's name, and `classes` a file with those of its classes. Raises BadArgument, MissingExtra, BadData,
    BadCheckpoint, NetworkFailed.
    """
    runtimes = list(runtimes)
    for runtime in runtimes:
        import_runtime(runtime) if precision is None else check_precision(runtime, precision)
    require_extras([*runtimes, *extras, *extras_for_sources(*sources, *places)])
    check_places_exist(*places)
    if classes is not None:
        read_text(classes)
    if model is not None and not is_timm(model):
        resolve_name(model)
    for source in sorted(sources, key=lambda each: re.fullmatch(HUB_ID_PATTERN, each) is not None):
        check_source_exists(source)


def check_int8_options(precision: str, *, data: str | None, other_method: bool = False) -> None:
    """Raise BadArgument for what only an int8 artifact needs, photos or a method, where another is to be made."""
    if precision == "int8":
        return
    if data:
        raise BadArgument(f"--data is for int8, not {precision}: add --precision int8, or leave --data out")
    if other_method:
        raise BadArgument(f"--weight-bits and --per-tensor are of int8, not {precision}: give --precision int8")


def check_recipe_inputs(recipe: Recipe, services: Iterable[str]) -> None:
    """Raise MissingExtra for packages that a recipe, or a service to log to, needs; BadData for photos not there."""
    teachers = () if recipe.plan.distill is None else recipe.plan.distill.teachers
    sources = (recipe.data.spec, recipe.data.val, recipe.model, recipe.weights, *teachers)
    require_extras([*services, *extras_for_sources(*sources)])
    check_places_exist(recipe.data.spec, recipe.data.val)


def check_training_inputs(options: Mapping[str, Any], changes: Mapping[str, str], *, is_shown: bool) -> None:
    """Raise what `train` would raise for its `options`, by name, and `changes` of other fields of the recipe.

    Of a recipe that only `is_shown` nothing needs to be there.
    """
    services = [name.strip() for name in options["log_to"].split(",") if name.strip()]
    if options["resume"] is not None:
        read_recipe_file(Path(options["resume"]))
        check_inputs(places=(options["data"], options["val"]), extras=services)
        return
    texts = option_changes(options, changes)
    texts |= {} if options["data"] is None else {"data.spec": options["data"]}
    lengths = {name: options[name] for name in ("epochs", "scale_to_batch")}
    recipe = make_recipe(options["recipe"], texts, size=options["img_size"], **lengths)
    if not is_timm(recipe.model):
        resolve_name(recipe.model)
    if is_shown:
        return
    check_recipe_inputs(recipe, services)
    sources = [] if recipe.weights is None else [recipe.weights]
    check_inputs(*sources)
    for teacher in () if recipe.plan.distill is None else recipe.plan.distill.teachers:
        _check_teacher_exists(teacher)


def _check_teacher_exists(spec: str) -> None:
    """Raise BadCheckpoint where the weights of a teacher are not there: of NAME@WEIGHTS those after the @."""
    name, at, source = spec.rpartition("@")
    check_source_exists(source if at and name and not is_timm(spec) and not Path(spec).exists() else spec)
