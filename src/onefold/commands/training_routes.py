"""The routes by which a run trains: measured on this machine once, kept for its next runs, and kept with the run.

Measurements are of a processor, its threads, the version of torch and of our code, in `routes/` of the cache folder
(see `storage.cache_folder`), one sealed file each: two runs on one machine take the same routes, and so end in the same
bits. A run keeps the routes that it began with in its checkpoints, and goes on with them, wherever that is. Where
several processes train together the first one measures for all.

`Plan.route` says whether to measure at all: "quickest" chooses by a count of operations, the same on every machine;
"per_branch" is plain torch. Nothing is measured on a GPU, in int8 training, for short runs, where maps are small,
and where the count leaves no doubt, as of MobileOne-S0 and S1.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.bench import Machine
from onefold.checksums import read_sealed_json, write_sealed_json
from onefold.commands.predictor import TIMM_PREFIX, is_timm
from onefold.commands.saved_recipe import routes_of_run
from onefold.errors import NotWritable
from onefold.file_io import cache_folder, file_lock
from onefold.recipes import Recipe
from onefold.reparam import accelerate, per_branch, set_route_
from onefold.reparam.accelerate import set_measured_routes_
from onefold.reparam.kernels.base import load_kernels
from onefold.reparam.measured_routes import PLAIN, is_clear_by_count, measure_routes
from onefold.train.optim import freeze_, train_mode_

_log = logging.getLogger("onefold")
LONG_RUN_PIXELS = 1_000_000_000
"""Pixels of all images of all epochs from which routes are measured: some ten minutes of MobileOne-S0 on two cores. In
a shorter run the measuring would take longer than it gains.
"""
_BY_COUNT_ALONE = f"{TIMM_PREFIX}mobileone"  # of timm's networks those that gain on every processor that was tried


def choose_routes_(
    model: nn.Module, recipe: Recipe, device: torch.device, run: Path | None, *, num_images: int
) -> dict[str, str] | None:
    """Have a network train by the routes of its recipe, in place; gives the measured ones by the path of a part.

    An epoch has `num_images`. A run that goes on, in the folder `run`, takes those that it began with, and measures
    nothing. Gives None where there are none, and the count decides. What it does is logged.
    """
    if recipe.plan.route == "per_branch":
        set_route_(model, per_branch)
        return None
    kept = None if run is None else routes_of_run(run)
    is_long = recipe.plan.epochs * num_images * recipe.preprocessing.size**2 >= LONG_RUN_PIXELS
    measures = run is None and recipe.plan.route == "measured" and device.type == "cpu" and is_long
    if recipe.int8 is not None or (kept is None and not measures):
        if recipe.int8 is None and recipe.model.startswith(_BY_COUNT_ALONE):
            accelerate(model.train())
            _log.info("%s trains by the quickest routes: %s", recipe.model, model.acceleration)
        return None
    if is_timm(recipe.model) and any(isinstance(module, _BatchNorm) for module in model.modules()):
        accelerate(model.train())
    choices = _measured(model, recipe) if kept is None else kept
    unknown = set_measured_routes_(model, choices)
    if unknown:
        _log.warning(
            "%d parts of %s cannot take the routes that the run began with (the first is %s): they train as they are, "
            "and the last bits will not be those of one run",
            len(unknown),
            recipe.model,
            unknown[0],
        )
    if choices:
        where = "measured on this machine" if kept is None else "that the run began with"
        _log.info("%s trains by routes %s: %s", recipe.model, where, _counted(choices))
    return choices


def _counted(choices: Mapping[str, str]) -> str:
    """How many parts take which route, in words: `12 parts by moments, 3 by mixed, 20 as torch has them`."""
    names = Counter(choices.values())
    by = [f"{count} by {name}" for name, count in sorted(names.items()) if name != PLAIN]
    left = [f"{names[PLAIN]} as plain torch, which is as fast or faster there"] if names[PLAIN] else []
    return ", ".join([*by, *left])


def _measured(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """The fastest routes here, from what was measured before and what is measured now, which is kept."""
    path, choices = _path(), None
    try:
        with file_lock(path):  # what another run measures meanwhile is what this one takes
            known = _read(path)
            before, started = len(known), time.perf_counter()
            choices = _measure(model, recipe, known)
            if len(known) > before:
                seconds = time.perf_counter() - started
                _log.info("measured %d kinds of layers in %.1f s, kept in %s", len(known) - before, seconds, path)
                write_sealed_json(path, {"machine": _machine(), "routes": known})
    except NotWritable as error:
        _log.warning("the measured routes are not kept, another run may take others: %s", error)
    return _measure(model, recipe, {}) if choices is None else choices


def _measure(model: nn.Module, recipe: Recipe, known: dict[str, str]) -> dict[str, str]:
    """Measure a copy of the network as the recipe will have it trained: frozen parts, memory format, autocast."""
    plan, preprocessing, trained = recipe.plan, recipe.preprocessing, copy.deepcopy(model)
    freeze_(trained, plan.freeze)
    train_mode_(trained, plan.freeze)
    layout = torch.channels_last if plan.channels_last else torch.contiguous_format
    image = torch.zeros(1, preprocessing.channels, preprocessing.size, preprocessing.size)
    images = image.contiguous(memory_format=layout).expand(plan.images_per_batch(), -1, -1, -1)
    half = torch.float16 if plan.amp == "fp16" else torch.bfloat16
    with torch.autocast("cpu", dtype=half, enabled=plan.amp in ("bf16", "fp16")):
        trained = trained.to(memory_format=layout)  # type: ignore[call-overload]
        if is_clear_by_count(copy.deepcopy(trained), images):
            return {}
        return measure_routes(trained, images, known, on_measure=_say_that_it_measures)


def _say_that_it_measures() -> None:
    _log.info("measuring which routes train fastest on this processor, some seconds, once")


def _read(path: Path) -> dict[str, str]:
    try:
        return {str(key): str(name) for key, name in read_sealed_json(path)["routes"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        _log.warning("%s cannot be used (%s): the routes are measured again", path, error)
        return {}


def _path() -> Path:
    key = hashlib.sha256(json.dumps(_machine(), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "routes" / f"{key}.json"


def _machine() -> dict[str, object]:
    """What the times depend on, beside the layers."""
    machine = Machine.detect(packages=("onefold", "torch"))
    return {
        "chip": machine.chip,
        "architecture": machine.architecture,
        "features": list(machine.features),
        "threads": torch.get_num_threads(),
        "versions": dict(machine.versions),
        "code": _code(),
        "compiled": load_kernels() is not None,
    }


@cache
def _code() -> str:
    """The digest of the routes and kernels: another version may be faster or slower."""
    total = hashlib.sha256()
    folder = Path(__file__).parents[1] / "reparam"
    for path in sorted(path for pattern in ("*.py", "*.cpp", "*.h") for path in folder.rglob(pattern)):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]
