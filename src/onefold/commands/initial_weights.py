"""What a run starts from: the network, ours or timm's, at random initialization or from weights.

Weights are taken as they are, or expanded to branches again; their head is kept, reset, or fitted to the images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from onefold.commands.class_matching import match_classes
from onefold.commands.open_network import ModelNameCheck, Network
from onefold.commands.predictor import is_timm, parse_timm_spec, resolve_weights_file
from onefold.commands.timm_networks import (
    check_timm_model,
    create_timm,
    fixed_image_size,
    last_layers,
    load_timm,
    pretrained_hub_id,
    read_timm_card,
    stored_timm_name,
    timm_card,
)
from onefold.data import Dataset, ImageLoader, Preprocessing, ProgressiveAugment
from onefold.data.dataset import Subset
from onefold.data.loader import Transform
from onefold.data.sampler import shuffled_indices
from onefold.errors import BadArgument, BadCheckpoint, NetworkFailed
from onefold.models import CATALOGUE, Classifier, create_model, resolve_name
from onefold.models.layers import set_dropout_
from onefold.models.load_model import Card, load_model, read_card, read_weights_card
from onefold.models.mobileone import zero_init_branches_
from onefold.recipes import Recipe, with_image_size
from onefold.reparam import expand, folded, fuse, recalibrate_norms_, set_route_, unfused_norms
from onefold.train import NORM_LAYERS, RunFolder, fit_linear_probe, frozen_modules, seed_everything
from onefold.train.checkpoint import WEIGHTS_FILE

_log = logging.getLogger("onefold")
_progress = logging.getLogger("onefold.progress")

_PROBE_IMAGES = 20_000
"""The most images that a head is fitted to; more change it little, and their features are all kept in memory."""
_NORM_IMAGES = 256
"""The images whose statistics the norms of an expanded network start with."""


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """The training images, the device to compute on, and the batch size."""

    source: Dataset
    device: torch.device
    batch_size: int = 32

    def subset(self, count: int, seed: int) -> TrainingImages:
        """Give at most `count` of them, chosen by the seed."""
        total = len(self.source)
        if total <= count:
            return self
        chosen = shuffled_indices(np.arange(count, dtype=np.int64), total, seed=seed, epoch=0)
        return replace(self, source=Subset(self.source, sorted(chosen.tolist())))

    def batches(
        self, transform: Preprocessing | Transform | ProgressiveAugment, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give images (B, C, H, W), channels last, and labels (B,) of all of them once, on the device."""
        batches = ImageLoader(self.source, transform, batch_size=self.batch_size, seed=seed, on_bad="skip")
        for images, labels in batches.epoch(0):
            yield images.to(self.device).contiguous(memory_format=torch.channels_last), labels.to(self.device)


def with_preprocessing_of_weights(recipe: Recipe, stated: Collection[str], *, is_shown: bool = False) -> Recipe:
    """Give the recipe with the preprocessing of the weights that it starts from, and log what that changes.

    A recipe that needs weights and names none takes the released ones of its model, where there are some. A network of
    timm brings its own preprocessing, and timm:NAME@FILE its weights.
    `stated` are the recipe's fields that the user set, such as "preprocessing.mean": those stay as they are. Weights
    that cannot be read leave the recipe as it is. Raises BadArgument where their preprocessing cannot be, and unless
    the recipe `is_shown` only NetworkFailed.
    """
    if is_timm(recipe.model):
        recipe = _of_timm(recipe)
        released = pretrained_hub_id(recipe.model) if _needs_weights(recipe) else ""
    else:
        _refuse_timm(recipe)
        released = CATALOGUE[resolve_name(recipe.model)].weights
    if recipe.weights is None and _needs_weights(recipe) and released:
        _log.info("starts from %s of the Hugging Face hub; --weights gives others", released)
        recipe = replace(recipe, weights=released)
    if recipe.weights is None and not is_timm(recipe.model):
        return recipe
    try:
        card = timm_card(recipe.model) if recipe.weights is None else initial_weights_card(recipe)
    except (BadCheckpoint, BadArgument, NetworkFailed) as error:
        if isinstance(error, NetworkFailed) and not is_shown:
            raise  # the hub is asked once, before the data are read
        return recipe  # a training says so when it starts from them, and --show shows the recipe's
    keep = {name.removeprefix("preprocessing.") for name in stated if name.startswith("preprocessing.")}
    given = dict(card.preprocessing)
    channels = card.in_chans
    if channels not in (1, 3):  # photos have no others: the stem is made one for those of the recipe
        channels = recipe.preprocessing.channels
        given = {key: value for key, value in given.items() if key not in ("mean", "std")}
    taken = {**given, "channels": channels}
    taken = {key: value for key, value in taken.items() if key not in keep}
    if keep & {"mean", "std", "channels"}:
        taken.pop("channels", None)  # as many as the user's own mean and deviation say
    before = recipe.preprocessing.to_dict()
    if "size" in taken:
        recipe = with_image_size(recipe, taken.pop("size"))
    settings = recipe.preprocessing.to_dict() | taken
    for key in ("mean", "std"):  # weights may say how many channels they take, and no more
        values = settings[key]
        if len(values) != settings["channels"] and key not in keep:
            settings[key] = (sum(values) / len(values),) * settings["channels"]
    recipe = replace(recipe, preprocessing=Preprocessing.from_dict(settings))
    after = recipe.preprocessing.to_dict()
    changed = [f"{key} {_text(after[key])}, not {_text(before[key])}" for key in after if after[key] != before[key]]
    if changed:
        entry = None if is_timm(recipe.model) else CATALOGUE[resolve_name(recipe.model)].input
        alike = entry is not None and all(given.get(key) == entry[key] for key in ("size", "crop_pct", "interpolation"))
        # What weights do not state is taken from the catalogue, and not theirs.
        of = recipe.model if recipe.weights is None or alike else f"the weights {recipe.weights}"
        _log.info("preprocessing is that of %s: %s", of, "; ".join(changed))
    if is_timm(recipe.model):
        only, stages = fixed_image_size(recipe.model), recipe.curriculum.stages if recipe.curriculum else ()
        others = {recipe.preprocessing.size, *(stage.size for stage in stages)} - {only}
        if only is not None and others:
            raise BadArgument(
                f"{recipe.model} takes images of {only} pixels alone, not of {min(others)}: leave --img-size out"
                + (", and give --curriculum none" if stages else "")
            )
    return recipe


def _of_timm(recipe: Recipe) -> Recipe:
    """The recipe of a network of timm without what is of our networks alone: the file in its name, `freeze` of none."""
    model_name, file = parse_timm_spec(recipe.model)
    check_timm_model(model_name)
    if file is not None and recipe.weights is not None:
        raise BadArgument(f"{recipe.model} names weights, and --weights {recipe.weights} others: give one of them")
    plan = recipe.plan if recipe.plan.epochs else replace(recipe.plan, freeze=())  # without a step nothing is trained
    return replace(recipe, model=model_name, weights=recipe.weights if file is None else str(file), plan=plan)


def initial_weights_card(recipe: Recipe) -> Card:
    """Give the card of the weights that a recipe starts from. Raises BadCheckpoint, BadArgument, NetworkFailed."""
    assert recipe.weights is not None
    file = resolve_weights_file(recipe.weights)
    if is_timm(recipe.model):
        return read_timm_card(recipe.model, file)
    return read_weights_card(file, name=recipe.model)


def _refuse_timm(recipe: Recipe) -> None:
    """Raise BadArgument where a network of ours is to start from a run or a file of ours that holds one of timm."""
    stored = None
    with suppress(BadCheckpoint, BadArgument):  # what else is wrong with them is said where they are read
        stored = None if recipe.weights is None else stored_timm_name(resolve_weights_file(recipe.weights))
    if stored is not None:
        raise BadArgument(f"{recipe.weights} holds weights of {stored}, not of {recipe.model}: give --model {stored}")


def _needs_weights(recipe: Recipe) -> bool:
    """Whether a recipe cannot start from random weights."""
    return recipe.start == "expanded" or recipe.head != "kept"


def licence_and_source(recipe: Recipe, run: Path | None) -> tuple[str, str]:
    """Give the licence and the source of a training's weights, which those that it starts from have a part in.

    `run` is the folder of a run that goes on: its first weights may be gone, and its best ones know both.
    """
    trained = f"trained on {Path(recipe.data.spec).name}"
    if recipe.weights is None:
        return "", trained
    best = None if run is None else RunFolder(run).best / WEIGHTS_FILE
    if best is not None and best.is_file():
        card = read_card(best)
        return card.licence, card.source
    try:
        card = initial_weights_card(recipe)
    except BadCheckpoint:
        if run is None:
            raise
        _log.info("the weights %s, from which the run began, are gone: their licence is not known", recipe.weights)
        return "", f"{trained}, from {Path(recipe.weights).name}"
    origin = f" ({card.source})" if card.source not in ("", recipe.weights) else ""
    return card.licence, f"{trained}, from {Path(recipe.weights).name}{origin}"


def _tell_differences(card: Card, recipe: Recipe) -> None:
    """Log where a recipe prepares images otherwise than the weights that it starts from were made for."""
    ours = {key: _text(value) for key, value in recipe.preprocessing.to_dict().items()}
    made = {key: _text(value) for key, value in {"channels": card.in_chans, **card.preprocessing}.items()}
    differ = [f"{key} {made[key]}, not {ours[key]}" for key in ours if key in made and made[key] != ours[key]]
    if differ:
        _log.info("the weights %s were made for other preprocessing: %s", recipe.weights, "; ".join(differ))


def _text(value: object) -> str:
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    return " ".join(f"{number:.4g}" if isinstance(number, float) else str(number) for number in numbers)


def init_network(recipe: Recipe, images: TrainingImages) -> nn.Module:
    """Give the network that a run of the recipe starts from, in train mode. Raises BadArgument, BadCheckpoint."""
    num_classes = len(images.source.classes)
    channels, seed = recipe.preprocessing.channels, recipe.plan.seed
    weights = None if recipe.weights is None else resolve_weights_file(recipe.weights)
    if weights is None and _needs_weights(recipe):
        raise BadArgument(f"the recipe {recipe.name} starts from weights: give --weights FILE, a run or a hub id")
    seed_everything(seed)
    fresh = _fresh_network(recipe, num_classes)
    if weights is None:
        if recipe.start == "skips":
            zero_init_branches_(fresh)
        return _ready(_folded_for_int8(fresh, recipe), recipe)
    if recipe.head == "kept" or is_timm(recipe.model):
        model, card = _load(recipe, weights)
    else:
        model = create_model(recipe.model, num_classes=num_classes, in_chans=channels, weights=weights)
        card = initial_weights_card(recipe)
    if recipe.head == "kept":
        _move_head_(model, card, images.source.classes)
    else:
        _reset_head_(model, recipe, images)
    _tell_differences(card, recipe)
    own = replace(card, in_chans=channels, preprocessing=recipe.preprocessing.to_dict())
    check = ModelNameCheck.from_network(
        Network(model=model.eval(), card=own, title=str(weights)), weights, recipe.model
    )
    if check is not None:
        batch, _ = next(images.subset(8, seed).batches(recipe.preprocessing, seed))
        doubt = check(batch.cpu().contiguous().numpy())
        if doubt:
            _log.warning("%s", doubt)
    is_fused = not unfused_norms(model)
    if is_fused and recipe.start == "expanded":
        model = _expand(model, fresh, recipe, images)
    elif is_fused and recipe.plan.epochs and not (is_timm(recipe.model) or recipe.int8 or recipe.plan.freeze):
        _log.info("these weights are fused: they train without branches and norms; --start expanded restores both")
    return _ready(_folded_for_int8(model, recipe), recipe)


def create_network_to_resume(recipe: Recipe, num_classes: int, out: Path) -> nn.Module:
    """Give a network of the form that the run in `out` trains; its values come from the checkpoint later."""
    seed_everything(recipe.plan.seed)
    model = _fresh_network(recipe, num_classes)
    return _ready(fuse(model.eval()) if _is_fused_checkpoint(out) else model, recipe)


def _fresh_network(recipe: Recipe, num_classes: int) -> nn.Module:
    channels = recipe.preprocessing.channels
    if is_timm(recipe.model):
        return create_timm(recipe.model, num_classes=num_classes, in_chans=channels, dropout=recipe.dropout)
    return create_model(recipe.model, num_classes=num_classes, in_chans=channels)


def _load(recipe: Recipe, weights: str | Path) -> tuple[nn.Module, Card]:
    channels = recipe.preprocessing.channels
    if is_timm(recipe.model):
        return load_timm(recipe.model, weights, in_chans=channels, dropout=recipe.dropout)
    return load_model(weights, name=recipe.model, in_chans=channels)


def fold_frozen_(model: nn.Module, freeze: tuple[str, ...]) -> None:
    """Compute the modules that `Plan.freeze` names by their folded convolution, since nothing in them changes."""
    for module in frozen_modules(model, freeze):
        set_route_(module, folded)
    if NORM_LAYERS in freeze:
        set_route_(model, folded)


def _ready(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Give the network in train mode, with the recipe's dropout, which a network of timm is made with."""
    if not is_timm(recipe.model):
        if recipe.dropout is not None:
            set_dropout_(model, recipe.dropout)
        return model.train()
    for module in model.modules():
        if type(module) is nn.Conv2d and _crashes_in_channels_last(module):
            module.__class__ = _StridedPointwise
    return model.train()


def _crashes_in_channels_last(conv: nn.Conv2d) -> bool:
    """Whether torch 2.13's weight gradient of this layer writes outside its memory on some processors."""
    is_strided = max(conv.stride) > 1 and not any(conv.padding) and conv.groups == 1
    return conv.kernel_size == (1, 1) and is_strided and conv.in_channels < 8


class _StridedPointwise(nn.Conv2d):
    """A 1x1 convolution with a stride, computed on the pixels that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        """Give what nn.Conv2d gives: (B, I, H, W) -> (B, O, H', W')."""
        is_last = x.is_contiguous(memory_format=torch.channels_last)
        read = x[:, :, :: self.stride[0], :: self.stride[1]]
        read = read.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
        return functional.conv2d(read, self.weight, self.bias)


def _folded_for_int8(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Fold the norms of a network of timm that trains for int8: only our units train as one layer with their norms."""
    if recipe.int8 is None or not is_timm(recipe.model) or not unfused_norms(model):
        return model
    _log.info("%s trains for int8 with its norms folded into its convolutions", recipe.model)
    return fuse(model.eval())


def _last_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that make logits; two in distilled networks of timm. Raises BadArgument."""
    if not isinstance(model, Classifier):
        return last_layers(model)
    layer = model.get_classifier()
    assert isinstance(layer, nn.Linear)
    return [layer]


def _reset_classifier_(model: nn.Module, num_classes: int) -> None:
    """Put a random last layer for so many classes in place of the network's own."""
    reset: Callable[[int], None] = model.reset_classifier  # type: ignore[assignment]  # ours have it, and timm's all
    reset(num_classes)


def _move_head_(model: nn.Module, card: Card, classes: tuple[str, ...]) -> None:
    """Give the network, whose classes are the card's, a last layer for these classes: each has the row of its name."""
    if card.classes is None and card.num_classes != len(classes):
        _log.info("the weights do not name %d classes: the last layer for %d is random", card.num_classes, len(classes))
        _reset_classifier_(model, len(classes))
        return
    hint = "fit a new last layer: --head probe"
    rows = match_classes(classes, card.classes, card.num_classes, f"the weights' network {card.model}", hint=hint)
    if rows == list(range(card.num_classes)):
        return
    before = _last_layers(model)
    _reset_classifier_(model, len(classes))
    kept = [(i, row) for i, row in enumerate(rows) if row is not None]
    with torch.no_grad():
        for old, new in zip(before, _last_layers(model), strict=True):
            for i, row in kept:
                new.weight[i], new.bias[i] = old.weight[row], old.bias[row]
    fresh = [name for name, row in zip(classes, rows, strict=True) if row is None]
    dropped = card.num_classes - len(kept)
    _log.info(
        "the weights' last layer: %d rows go to the classes of their names%s%s",
        len(kept),
        f"; {len(fresh)} classes that it does not know begin at random ({', '.join(fresh[:3])})" if fresh else "",
        f"; {dropped} of its own are left out" if dropped else "",
    )


def _reset_head_(model: nn.Module, recipe: Recipe, images: TrainingImages) -> None:
    """Reset the last layer to random values, or with "probe" to the linear probe of the images' features."""
    _reset_classifier_(model, len(images.source.classes))
    if recipe.head != "probe":
        return
    last = _last_layers(model)
    per_layer, labels = _features(model, last, images.subset(_PROBE_IMAGES, recipe.plan.seed), recipe)
    for fc, features in zip(last, per_layer, strict=True):
        weight, bias = fit_linear_probe(features, labels, len(images.source.classes))
        top1 = 100 * (features @ weight.T + bias).argmax(1).eq(labels).float().mean().item()
        with torch.no_grad():
            fc.weight.copy_(weight)
            fc.bias.copy_(bias)
        _log.info("the last layer was fitted to %d images, with a top-1 of %.1f %% on them", len(labels), top1)


@torch.no_grad()
def _features(
    model: nn.Module, last: Sequence[nn.Linear], images: TrainingImages, recipe: Recipe
) -> tuple[list[Tensor], Tensor]:
    """Give the inputs (M, D) of each of the last layers for all images, and the labels (M,)."""
    # ours are fused for speed; fusing a network of timm may fold something into its last layer
    is_ours = isinstance(model, Classifier)
    network = fuse(model.eval()) if is_ours and unfused_norms(model) else model.eval()
    network = network.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    features: list[list[Tensor]] = [[] for _ in last]
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].cpu()))
        for layer, seen in zip(_last_layers(network), features, strict=True)
    ]
    labels = []
    total = -(-len(images.source) // images.batch_size)
    try:
        for number, (batch, classes) in enumerate(images.batches(recipe.preprocessing, recipe.plan.seed)):
            _progress.debug("fitting the last layer", extra={"done": number, "total": total})
            network(batch)
            labels.append(classes.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    network.to("cpu")
    return [torch.cat(seen) for seen in features], torch.cat(labels)


def _expand(fused: nn.Module, like: nn.Module, recipe: Recipe, images: TrainingImages) -> nn.Module:
    """Give a network with branches that folds to the fused one, its norms restated for augmented training images."""
    generator = torch.Generator().manual_seed(recipe.plan.seed)
    try:
        model = expand(fused, like, generator).eval()
    except ValueError as error:
        raise BadArgument(f"{recipe.model} cannot be expanded ({error}): choose --start plain") from error
    subset = images.subset(_NORM_IMAGES, recipe.plan.seed)
    model.to(images.device)
    recalibrate_norms_(model, (batch for batch, _ in subset.batches(recipe.transform, recipe.plan.seed)))
    _log.info("fused weights were expanded to branches and norms, restated for %d images", len(subset.source))
    return model.to("cpu")


def _is_fused_checkpoint(out: Path) -> bool:
    """Whether the weights in a run's checkpoint are of a fused network, by their names."""
    for folder in (RunFolder(out).last, RunFolder(out).previous):
        try:
            if not (folder / WEIGHTS_FILE).is_file():  # a pipe would be waited for
                continue
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                return not any(name.endswith("running_var") for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            continue
    return False
