"""recipe -> runs/<name>/: a recipe resolved - its data opened, its network built - and trained."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from onefold.commands.evaluate import PREDICTIONS, evaluate, keep_predictions
from onefold.commands.initialize import Photos, open_teacher, quicken_frozen_, resumed_network, start_network
from onefold.commands.open import RECIPE, Network, open_data, open_predictor, read_recipe
from onefold.data import Batches as ImageBatches
from onefold.data import Cached, Mixed, Preprocessing, Source
from onefold.data.checks import Checked, check_data
from onefold.data.sheet import captions, sheet
from onefold.errors import BadArgument, BadCheckpoint, BadData, GateFailed
from onefold.models import resolve
from onefold.models.hub import Card
from onefold.quantize import Grids, Method, calibrated, make_aware_, plain_
from onefold.recipes import Recipe
from onefold.reparam import unfused_norms
from onefold.storage import replacing, write_text
from onefold.train import (
    Batches,
    Progress,
    Run,
    RunFolder,
    World,
    accuracy,
    is_restarted,
    listening,
    of_workers,
    own_workers,
    start_world,
    train,
)
from onefold.train.loggers import check_names
from onefold.train.rng import apart

CHECK, SHEET = "check.json", "samples.png"

_PICTURES = 32
_log = logging.getLogger("onefold")

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who is told of a training: `on_progress` after each step, `on_start` once data and network are found sound.

    `log_to` names services (wandb, trackio) beside TensorBoard; with `check` the data are looked at first.
    """

    on_progress: OnProgress | None = None
    on_start: Callable[[Recipe], None] | None = None
    log_to: tuple[str, ...] = ()
    check: bool = True

    def looked_at(self, train: Source, val: Source, size: int) -> Checked | None:
        """What the first look at the data found, warnings said aloud; raises BadData for an error, writes nothing."""
        if not self.check:
            return None
        checked = check_data(train, val, size)
        for finding in checked.findings:
            if not finding.is_error:
                _log.warning("the data: %s", finding.text)
        checked.refuse_errors()
        return checked

    def heard_by(self, out: Path, recipe: Recipe) -> AbstractContextManager[OnProgress]:
        """A block in which what is called with each Progress reaches all who listen."""
        return listening(out, self.log_to, recipe.to_dict(), self.on_progress)


UNWATCHED = Watch()


def keep_check(out: Path, checked: Checked) -> None:
    """Write what was found to the run folder, for the report."""
    write_text(out / CHECK, json.dumps(asdict(checked), indent=1) + "\n")


def draw_sheet(out: Path, batches: Batches, classes: tuple[str, ...], preprocessing: Preprocessing) -> None:
    """Write the first pictures of the first batch, augmented as training sees them, to the run folder."""
    with apart(torch.device("cpu"), 0):
        first = _first(batches.epoch(0))
    if first is None:
        return
    images, labels = (each[:_PICTURES].cpu().numpy() for each in first)
    told = captions(labels, classes)
    with replacing(out / SHEET) as aside:
        sheet(list(zip(images.astype(np.float32), told, strict=True)), preprocessing).save(aside)


def _first(stream: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    with closing(stream) as batches:  # type: ignore[type-var]
        return next(batches, None)


GRIDS = "int8.json"

_log = logging.getLogger("onefold")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a training: the best weights, when they were reached and how they score. `top1` in percent."""

    weights: Path
    top1: float
    epoch: int
    count: int


def start_run(
    recipe: Recipe,
    out: Path,
    *,
    watch: Watch = UNWATCHED,
) -> Outcome:
    """Train from the beginning into the run folder `out`, which must not hold a run; `watch` says who sees it."""
    check_names(watch.log_to)
    if not recipe.data.spec:
        raise BadArgument(f"the recipe {recipe.name} needs data: --data FOLDER, with train/ and val/ or class folders")
    if RunFolder(out).has_run:
        if is_restarted():
            return resume_run(out, watch=watch)
        raise BadArgument(f"{out} already holds a run: `onefold train --resume {out}`, or choose another --out")
    return _run(recipe, out, watch)


def resume_run(out: Path, *, watch: Watch = UNWATCHED) -> Outcome:
    """Go on with the run in `out`, by the recipe that lies in it; its data are not looked at again."""
    check_names(watch.log_to)
    return _run(read_recipe(out), out, replace(watch, on_start=None, check=False))


def _run(recipe: Recipe, out: Path, watch: Watch) -> Outcome:
    resolve(recipe.model)  # a wrong name is told before the data are looked at
    training, held_out = (Cached(open_data(recipe.data, split)) for split in ("train", "val"))
    with start_world() as world:
        resume = world.share(RunFolder(out).has_run)
        if not resume:
            recipe = _for_processes(recipe, world)
        batches = _batches(training, recipe, world)
        photos = Photos(source=training, device=world.device, batch_size=min(len(training), 32))
        model = resumed_network(recipe, len(training.classes), out) if resume else start_network(recipe, photos)
        quicken_frozen_(model, recipe.plan.freeze)
        grids = None if recipe.int8 is None else _grids(recipe, photos, model, out if resume else None)
        card = _card(recipe, training.classes, fused=not unfused_norms(model), grids=grids)
        if grids is not None:
            make_aware_(model, grids, _shape(recipe))
        teacher = open_teacher(recipe, training.classes, world.device)
        if not resume and world.is_first:
            _begin(recipe, out, watch, (training, held_out), batches)
            if grids is not None:
                write_text(out / GRIDS, json.dumps(grids.to_dict(), indent=1) + "\n")
        quiet = watch if world.is_first else UNWATCHED
        run = Run(
            out=out,
            evaluate=_Judge(card=card, held_out=held_out, recipe=recipe),
            world=world,
            metadata=card.to_metadata(),
            resume=resume,
            teacher=teacher,
            judge_start=recipe.weights is not None,
        )
        with quiet.heard_by(out, recipe) as heard:
            best = train(model, batches, recipe.plan, replace(run, on_progress=heard)).best
    if world.is_first:
        _keep_answers(out, recipe, held_out)
    return Outcome(
        weights=RunFolder(out).best / "model.safetensors",
        top1=float(best["top1"]),
        epoch=int(best["epoch"]),
        count=len(held_out),
    )


def _keep_answers(out: Path, recipe: Recipe, held_out: Source) -> None:
    """Write what the best network answers to each validation image, unless that is there already."""
    kept, best = out / PREDICTIONS, RunFolder(out).best
    if kept.is_file() and kept.stat().st_mtime >= best.stat().st_mtime:
        return
    try:
        with open_predictor(out, threads=torch.get_num_threads()) as predictor:
            score = evaluate(predictor, held_out, batch_size=recipe.plan.batch_size)
            keep_predictions(out, predictor, held_out, score, f"{recipe.data.spec} (held out)")
    except (BadData, GateFailed) as error:
        _log.warning("the answers to the validation images are not kept for the report: %s", error)


def _for_processes(recipe: Recipe, world: World) -> Recipe:
    """The recipe of a new run in these processes: as many logical workers, where it does not say how many."""
    if world.size == 1 or recipe.plan.logical_workers > 1:
        return recipe
    return replace(recipe, plan=replace(recipe.plan, logical_workers=world.size))


def _begin(recipe: Recipe, out: Path, watch: Watch, data: tuple[Source, Source], batches: Batches) -> None:
    """Look at the data, say what is about to be done, and write what does not change in a run."""
    checked = watch.looked_at(*data, recipe.preprocessing.size)
    if watch.on_start:
        watch.on_start(recipe)
    write_text(out / RECIPE, json.dumps(recipe.to_dict(), indent=2) + "\n")
    if checked:
        keep_check(out, checked)
    draw_sheet(out, batches, data[0].classes, recipe.preprocessing)


def _batches(source: Source, recipe: Recipe, world: World) -> Batches:
    plan, bad = recipe.plan, dict[str, str]()
    share = len(own_workers(plan, world))

    def of_worker(v: int) -> Batches:
        batches = ImageBatches(
            source,
            recipe.transform,
            batch_size=plan.images_per_batch() * plan.logical_workers,
            seed=plan.seed,
            shuffle=True,
            rank=v,
            world=plan.logical_workers,
            num_workers=-(-plan.workers // share),
            on_bad="skip",
            bad=bad,
        )
        if recipe.mixing is None:
            return batches
        num_classes = len(source.classes)
        return Mixed(batches, recipe.mixing, num_classes=num_classes, seed=plan.seed, rank=v, device=world.device)

    return of_workers(of_worker, plan, world)


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Scores what will be shipped: the averaged network, fused."""

    card: Card
    held_out: Source
    recipe: Recipe

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        network, drift = Network(model=plain_(model).cpu(), card=self.card, title=self.recipe.name), 0.0
        if not network.is_fused:
            network, drift = network.fused(tolerance=math.inf)  # told in the log: an epoch is not the end
        batches = ImageBatches(
            self.held_out, self.recipe.preprocessing, batch_size=self.recipe.plan.batch_size, on_bad="skip"
        )
        answers = network.model if self.card.int8 is None else network.eight_bit()
        return {**accuracy(answers, batches.epoch(0)).metrics(), "drift": drift}


def _grids(recipe: Recipe, photos: Photos, model: nn.Module, run: Path | None) -> Grids:
    """The grids that a network of 8 bits trains on: chosen on training images, or those that a run began with."""
    if run is not None:
        try:
            return Grids.from_dict(json.loads((run / GRIDS).read_text(encoding="utf-8")))
        except (OSError, ValueError, BadArgument) as error:
            raise BadCheckpoint(f"{run / GRIDS} cannot be read ({error}): the run cannot go on without it") from error
    told = recipe.int8
    assert told is not None
    some = photos.some(told.images, recipe.plan.seed)
    seen = [images.contiguous() for images, _ in some.batches(recipe.preprocessing, recipe.plan.seed)]
    # Restored, since these are the photos that it is for.
    method = Method(weights=told.weights, limit=told.limit, search=False, restore=True)
    return calibrated(model.to(photos.device), seen, method)


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    size = recipe.preprocessing.size
    return recipe.preprocessing.channels, size, size


def _card(recipe: Recipe, classes: tuple[str, ...], *, fused: bool, grids: Grids | None) -> Card:
    return Card(
        model=recipe.model,
        num_classes=len(classes),
        in_chans=recipe.preprocessing.channels,
        classes=classes,
        preprocessing=recipe.preprocessing.to_dict(),
        fused=fused,
        recipe=recipe.name,
        int8=None if grids is None else grids.to_dict(),
        source=f"trained on {Path(recipe.data.spec).name}",
    )
