"""The recipe of a run, as long as it is the one that the run began with, and whether its batches can be trained on.

Each checkpoint keeps the recipe, and the SHA-256 of those files of the run folder that are written once. So an edit
between stop and resume, or damage, is refused, field by field: a run is computed by one recipe from its first step on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onefold.checksums import read_sealed_folder
from onefold.errors import BadArgument, BadCheckpoint, BadData
from onefold.file_io import parse_json, read_plain_file
from onefold.recipes import RECIPE_FILE, Recipe, read_recipe_file
from onefold.report.format import format_count
from onefold.train import RunFolder
from onefold.train.checkpoint import PROGRESS_FILE
from onefold.train.hyperparameters import CHANGEABLE_ON_RESUME
from onefold.train.optim import frozen_modules
from onefold.train.step import norms_with_single_value

_log = logging.getLogger("onefold")


def recipe_metadata(
    recipe: Recipe, out: Path, written_once: tuple[str, ...], routes: Mapping[str, str] | None
) -> dict[str, Any]:
    """Give what the checkpoints of a run keep: its recipe, checksums of files of its folder, and its measured routes.

    The first two are what `read_recipe` compares, the last what `routes_of_run` gives.
    """
    files = (out / name for name in written_once)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    return {"recipe": recipe.to_dict(), "sha256": sums, **({} if routes is None else {"routes": dict(routes)})}


def routes_of_run(out: Path) -> dict[str, str] | None:
    """Give the measured routes that a run began with, by the path of a part; None where it measured none."""
    routes = _sealed_settings(out).get("routes")
    return {str(path): str(name) for path, name in routes.items()} if isinstance(routes, dict) else None


def read_recipe(out: Path) -> Recipe:
    """Read the recipe of a run folder. Raises BadCheckpoint where there is none, or not the one that it began with."""
    recipe = read_recipe_file(out)
    _check_settings(out, recipe)
    return recipe


def describe_unfinished_run(run: Path) -> str:
    """Say how many epochs of a run are done where it is not at its end; "" where it is, or where nothing tells."""
    try:
        lines = read_plain_file(run / "log.jsonl").decode("utf-8").splitlines()
        logged = [parse_json(line) for line in lines if line.strip()]
        done = max((int(each["epoch"]) for each in logged if each.get("kind") == "epoch"), default=0)
        epochs = read_recipe_file(run).plan.epochs
    except (BadCheckpoint, OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    if done >= epochs:
        return ""
    return (
        f"{run}: epoch {done} of {epochs}: stopped, or not finished yet; the best weights so far are taken "
        f"(onefold train --resume {run} goes on)"
    )


def _check_settings(out: Path, recipe: Recipe) -> None:
    """Raise BadCheckpoint where a run's recipe or another file that it depends on is not as its checkpoint says."""
    settings = _sealed_settings(out)
    for name, sha256 in settings.get("sha256", {}).items():
        file = out / Path(name).name
        if not file.is_file():
            _log.warning("%s is gone: what the training wrote there cannot be checked", file)
        elif hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise BadCheckpoint(f"{file} is not as the training wrote it: put it back, or start a run of its own")
    if "recipe" not in settings:
        return
    free = tuple(f"plan.{name}: " for name in CHANGEABLE_ON_RESUME)
    edited = [each for each in _differences(settings["recipe"], recipe.to_dict()) if not each.startswith(free)]
    if edited:
        raise BadCheckpoint(
            f"{out / RECIPE_FILE} was edited after the run began: {'; '.join(edited)}. Put it back, or start a run of "
            "its own with what you want (onefold train --recipe ... --out ...)"
        )


def _sealed_settings(out: Path) -> Mapping[str, Any]:
    """Give what the newest undamaged checkpoint of a run says that it was started with; empty where none says it."""
    folder = RunFolder(out)
    for sealed in (folder.last, folder.previous):
        with suppress(BadCheckpoint, ValueError, KeyError, AttributeError):
            return dict(parse_json(read_sealed_folder(sealed, only=[PROGRESS_FILE])[PROGRESS_FILE]).get("settings", {}))
    return {}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], under: str = "") -> list[str]:
    """Say `field: before -> after` for each field that two settings share and in which they differ."""
    out: list[str] = []
    for name in before.keys() & after.keys():  # a field that one version lacks is no edit
        a, b = before[name], after[name]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differences(a, b, f"{under}{name}.")
        elif a != b:
            out.append(f"{under}{name}: {_shown(a)} -> {_shown(b)}")
    return sorted(out)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_batch_size(num_train: int, num_val: int, recipe: Recipe) -> None:
    """Raise BadData where the images to train on are fewer than a batch."""
    plan = recipe.plan
    needed = plan.images_per_batch() * plan.logical_workers
    if plan.epochs and 0 < num_train < needed:
        hints = [f"--batch-size {num_train}"] if num_train > 1 else []
        hints += ["far more are needed for a network that is of use"] if num_train < 20 else []
        raise BadData(
            f"{format_count(num_train + num_val, 'photo')}, {num_val} for validation, leave {num_train} to train on, "
            f"and a batch has {needed}: {'; '.join(hints)}"
        )


def check_norms_see_several_values(model: nn.Module, recipe: Recipe) -> None:
    """Raise BadArgument where every batch has one image and norms see one value a channel of it: it would diverge."""
    plan = recipe.plan
    if not plan.epochs or plan.images_per_batch() > 1:
        return
    frozen = {id(norm) for part in frozen_modules(model, plan.freeze) for norm in part.modules()}
    stages = recipe.curriculum.stages if recipe.curriculum else ()
    size = min([recipe.preprocessing.size, *(stage.size for stage in stages)])
    image = torch.zeros(1, recipe.preprocessing.channels, size, size)
    lone = [name for name in norms_with_single_value(model, image) if id(model.get_submodule(name)) not in frozen]
    if lone:
        enough = 2 * plan.batch_size // plan.images_per_batch()
        divided = "" if plan.batch_size == 1 else f", which {plan.batch_size // plan.images_per_batch()} share,"
        raise BadArgument(
            f"plan.batch_size is {plan.batch_size}{divided} and at {size} pixels {len(lone)} norms of {recipe.model} "
            f"see one value a channel of one image, which they cannot normalize: give two or more each (-b {enough})"
        )
