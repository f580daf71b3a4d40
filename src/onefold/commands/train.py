"""recipe -> runs/<name>/: open the data of a recipe, initialize its network, and train it."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from onefold.checksums import write_sealed_json
from onefold.commands.held_out_images import (
    IMAGES_FILE,
    TrainingRecords,
    check_run_data,
    find_run_data,
    make_training_record,
    open_data,
    records_to_dict,
    run_training_records,
    training_records,
    update_run_data_location,
    write_run_data,
)
from onefold.commands.initial_weights import (
    TrainingImages,
    create_network_to_resume,
    fold_frozen_,
    init_network,
    initial_weights_card,
    licence_and_source,
    with_preprocessing_of_weights,
)
from onefold.commands.input_checks import check_recipe_inputs
from onefold.commands.predictor import Source, is_timm, select_ema_weights, suggest_argument_names
from onefold.commands.progress_bars import training_bar
from onefold.commands.run import BestEpoch, Run, new_run_folder
from onefold.commands.saved_recipe import (
    check_batch_size,
    check_norms_see_several_values,
    read_recipe,
    recipe_metadata,
)
from onefold.commands.teachers import open_teachers
from onefold.commands.timm_networks import check_timm_model
from onefold.commands.training_routes import choose_routes_
from onefold.commands.validation_loop import Evaluator, write_best_predictions
from onefold.data import CachedDataset, Dataset, DatasetInfo, ImageLoader, MixupLoader, Preprocessing
from onefold.data.dataset_checks import DataCheck, check_data, class_name_captions, contact_sheet
from onefold.data.dataset_info import SPLITS
from onefold.data.value_range import measure_value_range
from onefold.errors import BadArgument, BadCheckpoint
from onefold.file_io import atomic_replace, read_json, write_text
from onefold.models import resolve_name
from onefold.models.load_model import Card
from onefold.quantize import ModelQParams, QuantizationMethod, calibrate_qat, prepare_qat_
from onefold.recipes import RECIPE_FILE, Recipe, make_recipe, option_changes
from onefold.reparam import unfused_norms
from onefold.train import (
    Batches,
    Progress,
    RunFolder,
    World,
    init_world,
    is_restarted,
    local_workers,
    loop,
    open_loggers,
    worker_batches,
)
from onefold.train.distributed import check_run_folder
from onefold.train.loggers import check_services
from onefold.train.rng_state import forked_rng
from onefold.train.stop_signals import stop_at_once

_CHECK, _SAMPLES, _QPARAMS = "check.json", "samples.png", "int8.json"
"""Files of a run folder: the data check, the first augmented images, the quantization parameters of an int8 run."""

_NUM_SAMPLES = 32
_log = logging.getLogger("onefold")
_progress = logging.getLogger("onefold.progress")


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What is called during a training: `on_data` and `on_start` before the first step, `on_progress` after each.

    `on_recipe` gets the complete recipe before anything is read.
    """

    on_recipe: Callable[[Recipe], None] | None = None
    on_start: Callable[[Recipe], None] | None = None
    on_data: Callable[[DatasetInfo], None] | None = None
    on_progress: Callable[[Progress], None] | None = None


_NO_CALLBACKS = Callbacks()


@suggest_argument_names
def train(
    data: Source | None = None,
    *,
    recipe: str = "photos:scratch",
    val: Source | None = None,
    model: str | None = None,
    weights: Source | None = None,
    use_ema: bool | None = None,
    start: str | None = None,
    head: str | None = None,
    teacher: Source | None = None,
    out: Source | None = None,
    resume: Source | None = None,
    img_size: int | None = None,
    epochs: int | None = None,
    int8: bool = False,
    batch_size: int | None = None,
    scale_to_batch: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    log_to: str | Sequence[str] = (),
    no_check: bool = False,
    quiet: bool = False,
    changes: Mapping[str, object] | None = None,
    callbacks: Callbacks | None = None,
) -> Run:
    """Train a network by a recipe, and give the run: its folder, history, best epoch, and the verbs as methods.

    `data` is a folder of photos, one folder a class, or "digits", or any place that `onefold data` understands; `val`
    another one to validate on. `model` takes the place of the recipe's network, and may be one of timm, timm:NAME, with
    its own preprocessing; `weights`, a file, a run or an id of the hub, are what it starts from: a recipe that needs
    some takes the released ones of its model. `out` is the run folder, by default a new one in runs/; `resume` a run to
    go on with, and then only `data` and `val`, where its photos have moved, `threads`, `device` and `log_to` are given
    with it. `img_size` is in pixels, `lr` the rate of the whole batch; `changes` sets any other field of the recipe,
    such as {"plan.clip_grad_norm": 1.0}. `threads` are of torch, all cores by default; `device` is auto, cpu or cuda.
    `quiet` shows no progress.

    Raises BadData for photos that cannot be used, BadArgument, BadCheckpoint, RunBusy, NonFiniteLoss, Stopped.

        run = onefold.train("photos/", model="mobileone_s0", recipe="photos:finetune")
        run.best.top1, run.predict("cat.jpg").names
    """
    services = [name.strip() for name in log_to.split(",") if name.strip()] if isinstance(log_to, str) else list(log_to)
    options = {"val": val, "model": model, "start": start, "head": head, "teacher": teacher, "seed": seed, "lr": lr}
    options |= {"weights": None if weights is None else select_ema_weights(weights, use_ema)}
    texts = option_changes({**options, "int8": int8, "batch_size": batch_size}, changes or {})
    place = None if data is None else os.fspath(data)
    with ExitStack() as stack:
        if threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        if callbacks is None:
            callbacks = _NO_CALLBACKS if quiet else Callbacks(on_progress=stack.enter_context(training_bar()))
        if resume is not None:
            moved_val = texts.pop("data.val", None)
            if texts or [given for given in (out, img_size, epochs, scale_to_batch) if given is not None]:
                raise BadArgument(
                    "--resume goes on with the run's own recipe: give nothing else with it, except --data and --val "
                    "where its photos have moved"
                )
            folder = Path(resume)
            resume_run(folder, data=place, val=moved_val, callbacks=callbacks, log_to=services, device=device)
        else:
            texts |= {} if place is None else {"data.spec": place}
            chosen = make_recipe(recipe, texts, size=img_size, epochs=epochs, scale_to_batch=scale_to_batch)
            if callbacks.on_recipe is None:  # a recipe that is only shown needs nothing
                check_recipe_inputs(chosen, services)  # said before the hub is asked for a card
            is_shown = callbacks.on_recipe is not None or os.environ.get("RANK", "0") != "0"
            given = {*texts, *(["preprocessing.size"] if img_size is not None else [])}
            chosen = with_preprocessing_of_weights(chosen, given, is_shown=is_shown)
            folder = new_run_folder(chosen) if out is None else Path(out)
            if callbacks.on_recipe is not None:
                callbacks.on_recipe(chosen)
            start_run(chosen, folder, callbacks=callbacks, log_to=services, check=not no_check, device=device)
    return Run(folder)


def start_run(
    recipe: Recipe,
    out: Path,
    *,
    callbacks: Callbacks = _NO_CALLBACKS,
    log_to: Sequence[str] = (),
    check: bool = True,
    device: str = "auto",
) -> BestEpoch:
    """Train from the start into the run folder `out`, which must not hold a run.

    `log_to` names services (wandb, trackio) beside TensorBoard; `check` is whether the data are checked first.
    """
    check_services(log_to)

    def plan_run() -> tuple[Recipe, bool]:
        if not recipe.data.spec:
            raise BadArgument(
                f"the recipe {recipe.name} needs data: --data FOLDER, with train/ and val/ or class folders"
            )
        if RunFolder(out).has_run and is_restarted():
            return read_recipe(out), True
        if RunFolder(out).has_run:
            open_data(recipe.data)  # data that are not there are the first thing to say
            raise BadArgument(f"{out} already holds a run: `onefold train --resume {out}`, or choose another --out")
        check = check_timm_model if is_timm(recipe.model) else resolve_name
        check(recipe.model)  # an unknown name is an error before the data are read
        return recipe, False

    return _run(plan_run, out, callbacks, log_to, check, device)


def resume_run(
    out: Path,
    *,
    data: str | None = None,
    val: str | None = None,
    callbacks: Callbacks = _NO_CALLBACKS,
    log_to: Sequence[str] = (),
    device: str = "auto",
) -> BestEpoch:
    """Go on with the run in `out`, by the recipe that is saved in it; its data are not checked again.

    `data` is where its images are now, if they have moved, and `val` where those are that it is validated on. Raises
    BadCheckpoint where they are not the same ones.
    """
    check_services(log_to)
    return _run(lambda: (read_recipe(out), True), out, callbacks, log_to, False, device, (data, val))


def _run(
    plan_run: Callable[[], tuple[Recipe, bool]],
    out: Path,
    callbacks: Callbacks,
    log_to: Sequence[str],
    check: bool,
    device: str,
    moved: tuple[str | None, str | None] = (None, None),
) -> BestEpoch:
    """Train by the recipe that `plan_run` gives, with whether the run goes on; its data, and its val, may have `moved`.

    The run folder and the weights need to be on the machine of the first process alone, which sends what they say.
    """
    with stop_at_once(), init_world(device) as world:
        hosts = world.all_gather(socket.gethostname() if RunFolder(out).has_run else None)
        world.run_on_main(lambda: check_run_folder(out, hosts))
        recipe, resume = world.run_on_main(plan_run)
        run_data = world.run_on_main(lambda: find_run_data(out, recipe, *moved) if resume else None)
        _progress.debug("reading the photos")
        with world.raise_together():
            splits = run_data.open() if run_data else open_data(recipe.data)
            training, validation = (CachedDataset(splits.open(split)) for split in SPLITS[:2])
            if world.is_main and not resume and callbacks.on_data:  # before anything that takes long
                callbacks.on_data(splits.info)

        def checked_recipe() -> Recipe:
            if resume:
                check_run_data(out, {"train": training, "val": validation})
                return recipe
            measured = None if recipe.preprocessing.value_range else measure_value_range(training)
            if measured is None or measured.is_full_range:
                return recipe
            _log.warning("the data: %s", measured.sentence)
            return replace(recipe, preprocessing=replace(recipe.preprocessing, value_range=measured.value_range))

        recipe = world.run_on_main(checked_recipe)
        if not resume and world.size > 1 and recipe.plan.logical_workers == 1:
            # A recipe that does not say how many logical workers gets as many as the processes it is started in.
            recipe = replace(recipe, plan=replace(recipe.plan, logical_workers=world.size))
        with world.raise_together():
            check_batch_size(len(training), len(validation), recipe)
            batches = _batches(training, recipe, world)

        # ---- The check of the data, whose errors are said before a network is made, which may take long
        def check_once() -> DataCheck | None:
            checked = _check(training, validation, recipe.preprocessing) if check and not resume else None
            if callbacks.on_start and not resume:
                callbacks.on_start(recipe)
            return checked

        _progress.debug("checking the photos" if check else "reading the photos")
        checked = world.run_on_main(check_once)

        # ---- The network: initialized as the recipe says, or of the form that the checkpoint has
        _progress.debug("initializing %s", recipe.model)
        start = world.run_on_main(lambda: _start(recipe, training, world.device, out if resume else None))
        model, card, params = start.model, start.card, start.params
        if params is not None:
            size = recipe.preprocessing.size
            prepare_qat_(model, params, (recipe.preprocessing.channels, size, size))
        check_norms_see_several_values(model, recipe)
        with world.raise_together():
            teachers = open_teachers(recipe, training.classes, world.device)

        # ---- What is written once: the recipe, what the check found, a sheet of samples
        def write_once() -> None:
            if resume:
                if moved != (None, None):
                    update_run_data_location(out, *moved)
                return
            write_text(out / RECIPE_FILE, json.dumps(recipe.to_dict(), indent=2) + "\n")
            images_of = {"train": training, "val": validation}
            write_run_data(out, splits.info, images_of, start.records or (), recipe.data.val)
            if checked:
                write_sealed_json(out / _CHECK, asdict(checked))
            _draw_samples(out, batches, training.classes, recipe.preprocessing)
            if params is not None:
                write_text(out / _QPARAMS, json.dumps(params.to_dict(), indent=1) + "\n")

        _progress.debug("writing the run folder")
        world.run_on_main(write_once)
        _progress.debug("preparing the first step")
        evaluator = Evaluator(card=card, validation=validation, recipe=recipe, world=world)
        run = loop.RunOptions(
            out=out,
            evaluate=evaluator,
            combine=evaluator.combine,
            world=world,
            metadata=card.to_metadata(),
            settings=recipe_metadata(recipe, out, (IMAGES_FILE, _QPARAMS), start.routes) if world.is_main else {},
            resume=resume,
            teachers=teachers,
            evaluate_start=recipe.weights is not None,
        )
        if world.is_main:
            with open_loggers(out, log_to, recipe.to_dict(), callbacks.on_progress) as on_progress:
                best = loop.train(model, batches, recipe.plan, replace(run, on_progress=on_progress)).best
        else:
            best = loop.train(model, batches, recipe.plan, run).best
    with stop_at_once():
        if world.is_main:
            write_best_predictions(out, recipe, validation)
    return BestEpoch(
        weights=RunFolder(out).best / "model.safetensors",
        top1=float(best["top1"]),
        epoch=int(best["epoch"]),
        count=len(validation),
    )


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What all processes take from the first one: `records` of the images trained on, and measured `routes`."""

    model: nn.Module
    card: Card
    params: ModelQParams | None
    records: TrainingRecords | None
    routes: Mapping[str, str] | None


def _start(recipe: Recipe, training: Dataset, device: torch.device, run: Path | None) -> _Start:
    """Build the network, and its card, of a new run or one in the folder `run`. BadArgument, BadCheckpoint, BadData."""
    images = TrainingImages(source=training, device=device, batch_size=min(len(training), 32))
    model = create_network_to_resume(recipe, len(training.classes), run) if run else init_network(recipe, images)
    fold_frozen_(model, recipe.plan.freeze)
    params = None if recipe.int8 is None else _qparams(recipe, images, model, run)
    licence, source = licence_and_source(recipe, run)
    records = run_training_records(run) if run else (make_training_record(training, recipe),)
    if not run and recipe.weights is not None:  # what these were trained on, as far as that is recorded
        records = (*(training_records(recipe.weights, initial_weights_card(recipe).trained_on) or ()), *(records or ()))
    card = Card(
        model=recipe.model,
        num_classes=len(training.classes),
        in_chans=recipe.preprocessing.channels,
        classes=training.classes,
        preprocessing=recipe.preprocessing.to_dict(),
        fused=not unfused_norms(model),
        recipe=recipe.name,
        int8=None if params is None else params.to_dict(),
        licence=licence,
        source=source,
        trained_on=None if records is None else records_to_dict(records),
    )
    routes = choose_routes_(model.cpu(), recipe, device, run, num_images=len(training))
    return _Start(model=model, card=card, params=params, records=records, routes=routes)


def _batches(source: Dataset, recipe: Recipe, world: World) -> Batches:
    plan, unreadable = recipe.plan, dict[str, str]()
    num_workers = -(-plan.workers // len(local_workers(plan, world)))  # loader threads, for each logical worker here

    def batches_of(worker: int) -> Batches:
        batches = ImageLoader(
            source,
            recipe.transform,
            # a run without epochs takes no batch, and so needs no images to fill one
            batch_size=plan.images_per_batch() * plan.logical_workers if plan.epochs else plan.logical_workers,
            seed=plan.seed,
            shuffle=True,
            rank=worker,
            world=plan.logical_workers,
            num_workers=num_workers,
            pin_memory=world.device.type == "cuda",
            on_bad="skip",
            bad=unreadable,
        )
        if recipe.mixing is None:
            return batches
        num_classes = len(source.classes)
        return MixupLoader(
            batches, recipe.mixing, num_classes=num_classes, seed=plan.seed, rank=worker, device=world.device
        )

    return worker_batches(batches_of, plan, world)


def _qparams(recipe: Recipe, images: TrainingImages, model: nn.Module, run: Path | None) -> ModelQParams:
    """The quantization parameters that an int8 network trains with: calibrated, or those that the run started with."""
    if run is not None:
        try:
            return ModelQParams.from_dict(read_json(run / _QPARAMS))
        except (OSError, ValueError, BadArgument) as error:
            raise BadCheckpoint(f"{run / _QPARAMS} cannot be read ({error}): the run needs it to go on") from error
    int8 = recipe.int8
    assert int8 is not None
    subset = images.subset(int8.images, recipe.plan.seed)
    inputs = [batch.contiguous() for batch, _ in subset.batches(recipe.preprocessing, recipe.plan.seed)]
    # Biases are corrected, since these are images of the very data that the network is for.
    method = QuantizationMethod(weights=int8.weights, weight_qmax=int8.limit, clip_weights=False, correct_weights=True)
    return calibrate_qat(model.to(images.device), inputs, method)


def _check(training: Dataset, validation: Dataset, preprocessing: Preprocessing) -> DataCheck:
    """Check the data and log the warnings; raises BadData for an error."""
    checked = check_data(training, validation, preprocessing.size, preprocessing.value_range)
    for finding in checked.findings:
        if not finding.is_error:
            _log.warning("the data: %s", finding.text)
    checked.raise_for_errors()
    return checked


def _draw_samples(out: Path, batches: Batches, classes: tuple[str, ...], preprocessing: Preprocessing) -> None:
    """Write the first images of the first batch, augmented as training sees them, to the run folder."""
    # The loader's threads end with `closing`, and the random states are those of a run that draws no samples.
    with forked_rng(torch.device("cpu"), 0), closing(batches.epoch(0)) as epoch:  # type: ignore[type-var]
        first = next(epoch, None)
    if first is None or not len(first[1]):
        return
    images, labels = (values[:_NUM_SAMPLES].cpu().numpy() for values in first)
    captioned = list(zip(images.astype(np.float32), class_name_captions(labels, classes), strict=True))
    with atomic_replace(out / _SAMPLES) as aside:
        contact_sheet(captioned, preprocessing).save(aside)
