"""What a run starts from: the network, at random initialization or from weights, and the teachers to distill from.

Weights are taken as they are, or expanded to branches again; their head is kept, reset, or fitted to the images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onefold.commands.class_matching import all_outputs, match_classes
from onefold.commands.open_network import NameCheck, Network, open_network, open_predictor, weights_file
from onefold.commands.timm_networks import is_timm, open_pretrained
from onefold.data import Dataset, ImageLoader, Preprocessing, ProgressiveAugment
from onefold.data.dataset import Subset
from onefold.data.loader import Transform
from onefold.data.sampler import shuffled
from onefold.errors import BadArgument, BadCheckpoint, BadData, NetworkFailed
from onefold.models import CATALOGUE, Classifier, create_model, resolve
from onefold.models.hub import Card, load_model, read_card, weights_card
from onefold.models.layers import set_dropout_
from onefold.models.mobileone import zero_init_branches_
from onefold.recipes import Recipe, at_size
from onefold.reparam import expand, folded, fuse, recalibrate_norms_, set_route_, unfused_norms
from onefold.runtimes.artifact import is_artifact
from onefold.train import NORMS, RunFolder, fit_linear_probe, frozen_modules, seed_everything
from onefold.train.checkpoint import WEIGHTS

_log = logging.getLogger("onefold")

PROBE_IMAGES = 20_000
"""The most images that a head is fitted to; more change it little, and their features are all kept in memory."""
NORM_IMAGES = 256
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
        chosen = shuffled(np.arange(count, dtype=np.int64), total, seed=seed, epoch=0)
        return replace(self, source=Subset(self.source, sorted(chosen.tolist())))

    def batches(
        self, transform: Preprocessing | Transform | ProgressiveAugment, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give images (B, C, H, W), channels last, and labels (B,) of all of them once, on the device."""
        batches = ImageLoader(self.source, transform, batch_size=self.batch_size, seed=seed, on_bad="skip")
        for images, labels in batches.epoch(0):
            yield images.to(self.device).contiguous(memory_format=torch.channels_last), labels.to(self.device)


def initialized_from(recipe: Recipe, stated: Collection[str], *, is_shown: bool = False) -> Recipe:
    """Give the recipe with the preprocessing of the weights that it starts from, and log what that changes.

    A recipe that needs weights and names none takes the released ones of its model, where there are some.
    `stated` are the recipe's fields that the user set, such as "preprocessing.mean": those stay as they are. Weights
    that cannot be read leave the recipe as it is. Raises BadArgument where their preprocessing cannot be, and unless
    the recipe `is_shown` only NetworkFailed.
    """
    released = CATALOGUE[resolve(recipe.model)].weights
    if recipe.weights is None and needs_weights(recipe) and released:
        _log.info("starts from %s of the Hugging Face hub; --weights gives others", released)
        recipe = replace(recipe, weights=released)
    if recipe.weights is None:
        return recipe
    try:
        card = weights_card(weights_file(recipe.weights), name=recipe.model)
    except (BadCheckpoint, BadArgument, NetworkFailed) as error:
        if isinstance(error, NetworkFailed) and not is_shown:
            raise  # the hub is asked once, before the data are read
        return recipe  # a training says so when it starts from them, and --show shows the recipe's
    keep = {name.removeprefix("preprocessing.") for name in stated if name.startswith("preprocessing.")}
    given = dict(card.preprocessing)
    channels = card.in_chans if card.in_chans in (1, 3) else recipe.preprocessing.channels
    taken = {**given, "channels": channels}
    taken = {key: value for key, value in taken.items() if key not in keep}
    if keep & {"mean", "std", "channels"}:
        taken.pop("channels", None)  # as many as the user's own mean and deviation say
    before = recipe.preprocessing.to_dict()
    if "size" in taken:
        recipe = at_size(recipe, taken.pop("size"))
    settings = recipe.preprocessing.to_dict() | taken
    for key in ("mean", "std"):  # weights may say how many channels they take, and no more
        values = settings[key]
        if len(values) != settings["channels"] and key not in keep:
            settings[key] = (sum(values) / len(values),) * settings["channels"]
    recipe = replace(recipe, preprocessing=Preprocessing.from_dict(settings))
    after = recipe.preprocessing.to_dict()
    changed = [f"{key} {_text(after[key])}, not {_text(before[key])}" for key in after if after[key] != before[key]]
    if changed:
        _log.info("preprocessing is that of the weights %s: %s", recipe.weights, "; ".join(changed))
    return recipe


def needs_weights(recipe: Recipe) -> bool:
    """Whether a recipe cannot start from random weights."""
    return recipe.start == "expanded" or recipe.head != "kept"


def provenance(recipe: Recipe, run: Path | None) -> tuple[str, str]:
    """Give the licence and the source of a training's weights, which those that it starts from have a part in.

    `run` is the folder of a run that goes on: its first weights may be gone, and its best ones know both.
    """
    trained = f"trained on {Path(recipe.data.spec).name}"
    if recipe.weights is None:
        return "", trained
    best = None if run is None else RunFolder(run).best / WEIGHTS
    if best is not None and best.is_file():
        card = read_card(best)
        return card.licence, card.source
    try:
        card = weights_card(weights_file(recipe.weights), name=recipe.model)
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
    weights = None if recipe.weights is None else weights_file(recipe.weights)
    if weights is None and needs_weights(recipe):
        raise BadArgument(f"the recipe {recipe.name} starts from weights: give --weights FILE, a run or a hub id")
    seed_everything(seed)
    fresh = create_model(recipe.model, num_classes=num_classes, in_chans=channels)
    if weights is None:
        if recipe.start == "skips":
            zero_init_branches_(fresh)
        return _with_dropout(fresh, recipe)
    if recipe.head == "kept":
        model, card = load_model(weights, name=recipe.model, in_chans=channels)
        _move_head_(model, card, images.source.classes)
    else:
        model = create_model(recipe.model, num_classes=num_classes, in_chans=channels, weights=weights)
        card = weights_card(weights, name=recipe.model)
        _reset_head_(model, recipe, images)
    _tell_differences(card, recipe)
    check = NameCheck.of(Network(model=model.eval(), card=card, title=str(weights)), weights, recipe.model)
    if check is not None:
        batch, _ = next(images.subset(8, seed).batches(recipe.preprocessing, seed))
        doubt = check(batch.cpu().contiguous().numpy())
        if doubt:
            _log.warning("%s", doubt)
    if recipe.start == "expanded" and not unfused_norms(model):
        model = _expand(model, fresh, recipe, images)
    return _with_dropout(model, recipe)


def resumed_network(recipe: Recipe, num_classes: int, out: Path) -> nn.Module:
    """Give a network of the form that the run in `out` trains; its values come from the checkpoint later."""
    seed_everything(recipe.plan.seed)
    model = create_model(recipe.model, num_classes=num_classes, in_chans=recipe.preprocessing.channels)
    return _with_dropout(fuse(model.eval()) if _is_fused_checkpoint(out) else model, recipe)


def fold_frozen_(model: nn.Module, freeze: tuple[str, ...]) -> None:
    """Compute the modules that `Plan.freeze` names by their folded convolution, since nothing in them changes."""
    for module in frozen_modules(model, freeze):
        set_route_(module, folded)
    if NORMS in freeze:
        set_route_(model, folded)


def _with_dropout(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Give the network in train mode, with the recipe's dropout."""
    if recipe.dropout is not None:
        set_dropout_(model, recipe.dropout)
    return model.train()


def _move_head_(model: nn.Module, card: Card, classes: tuple[str, ...]) -> None:
    """Give the network, whose classes are the card's, a last layer for these classes: each has the row of its name."""
    assert isinstance(model, Classifier)
    if card.classes is None and card.num_classes != len(classes):
        _log.info("the weights do not name %d classes: the last layer for %d is random", card.num_classes, len(classes))
        model.reset_classifier(len(classes))
        return
    hint = "fit a new last layer: --head probe"
    rows = match_classes(classes, card.classes, card.num_classes, f"the weights' network {card.model}", hint=hint)
    if rows == list(range(card.num_classes)):
        return
    old = model.get_classifier()
    assert isinstance(old, nn.Linear)
    model.reset_classifier(len(classes))
    new = model.get_classifier()
    assert isinstance(new, nn.Linear)
    kept = [(i, row) for i, row in enumerate(rows) if row is not None]
    with torch.no_grad():
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
    assert isinstance(model, Classifier)
    model.reset_classifier(len(images.source.classes))
    if recipe.head != "probe":
        return
    features, labels = _features(model, images.subset(PROBE_IMAGES, recipe.plan.seed), recipe)
    weight, bias = fit_linear_probe(features, labels, len(images.source.classes))
    top1 = 100 * (features @ weight.T + bias).argmax(1).eq(labels).float().mean().item()
    fc = model.get_classifier()
    assert isinstance(fc, nn.Linear)
    with torch.no_grad():
        fc.weight.copy_(weight)
        fc.bias.copy_(bias)
    _log.info("the last layer was fitted to %d images, with a top-1 of %.1f %% on them", len(labels), top1)


@torch.no_grad()
def _features(model: Classifier, images: TrainingImages, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Give the inputs of the last layer (M, D) for all images, and the labels (M,)."""
    network = fuse(model.eval()) if unfused_norms(model) else model.eval()
    assert isinstance(network, Classifier)
    network = network.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    features, labels = [], []
    for batch, classes in images.batches(recipe.preprocessing, recipe.plan.seed):
        features.append(network.forward_head(network.forward_features(batch), pre_logits=True).cpu())
        labels.append(classes.cpu())
    network.to("cpu")
    return torch.cat(features), torch.cat(labels)


def _expand(fused: nn.Module, like: nn.Module, recipe: Recipe, images: TrainingImages) -> nn.Module:
    """Give a network with branches that folds to the fused one, its norms restated for augmented training images."""
    generator = torch.Generator().manual_seed(recipe.plan.seed)
    try:
        model = expand(fused, like, generator).eval()
    except ValueError as error:
        raise BadArgument(f"{recipe.model} cannot be expanded ({error}): choose --start plain") from error
    subset = images.subset(NORM_IMAGES, recipe.plan.seed)
    model.to(images.device)
    recalibrate_norms_(model, (batch for batch, _ in subset.batches(recipe.transform, recipe.plan.seed)))
    _log.info("fused weights were expanded to branches and norms, restated for %d images", len(subset.source))
    return model.to("cpu")


def _is_fused_checkpoint(out: Path) -> bool:
    """Whether the weights in a run's checkpoint are of a fused network, by their names."""
    for folder in (RunFolder(out).last, RunFolder(out).previous):
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                return not any(name.endswith("running_var") for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            continue
    return False


# -------------------------------------------------------------------------------------- teachers


@dataclass(frozen=True, kw_only=True)
class Student:
    """What a teacher has to know of the student: its classes, its preprocessing, and its device."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network to distill from: images (B, C, H, W) in its own preprocessing -> logits (B, N), and its classes' names.

    `fixed_size` is the side of its images where it takes no other.
    """

    title: str
    network: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] | None = None
    fixed_size: int | None = None


def open_teachers(recipe: Recipe, classes: tuple[str, ...], device: torch.device) -> TeacherEnsemble | None:
    """Open the teachers that the recipe's plan names, adapted to the student; None where the plan does not distill.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    distill = recipe.plan.distill
    if distill is None:
        return None
    if not distill.teachers:
        raise BadArgument(f"the recipe {recipe.name} needs a teacher: --plan.distill.teacher RUN, weights or timm:NAME")
    student = Student(classes=classes, preprocessing=recipe.preprocessing, device=device)
    teachers = [open_teacher(name, device) for name in distill.teachers]
    _log.info("distilling from %s", ", ".join(teacher.title for teacher in teachers))
    return TeacherEnsemble(tuple(TeacherAdapter.between(teacher, student) for teacher in teachers))


def open_teacher(spec: str, device: torch.device) -> Teacher:
    """Open `timm:NAME`, `timm:NAME@FILE`, `name@WEIGHTS`, an artifact, a run folder, weights, an id of the hub.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    if is_timm(spec):
        return _timm_teacher(spec, device)
    if is_artifact(Path(spec)):
        return _artifact_teacher(spec)
    name, at, source = spec.rpartition("@")
    network = open_network(source, name=name or None) if at and not Path(spec).exists() else open_network(spec)
    if not network.is_fused:
        network, _ = network.fused()
    card = network.card
    return Teacher(
        title=spec,
        network=network.model.to(device).requires_grad_(False),
        preprocessing=network.preprocessing,
        num_classes=card.num_classes,
        classes=card.classes,
    )


@dataclass(frozen=True, eq=False)
class TeacherEnsemble:
    """Several teachers, evaluated one after the other. It is the `Teachers` of a training."""

    members: tuple[TeacherAdapter, ...]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Give the logits (B, N) of each teacher for the student's images."""
        return [member(images) for member in self.members]


@dataclass(frozen=True, eq=False)
class TeacherAdapter:
    """A teacher with the conversions from the student's images to its own, and from its classes to the student's."""

    teacher: Teacher
    scale: Tensor  # (1, C, 1, 1), with shift: from the student's normalization to the teacher's
    shift: Tensor
    class_map: Tensor | None  # for each class of the student the teacher's index; None where they are the same

    @classmethod
    def between(cls, teacher: Teacher, student: Student) -> TeacherAdapter:
        """Adapt a teacher; raises BadArgument where it has other classes, or takes gray images and the student RGB."""
        source, target = student.preprocessing, teacher.preprocessing
        if source.channels == 3 and target.channels == 1:
            raise BadArgument(f"the teacher {teacher.title} takes gray images, the student has colour: choose another")
        channels = max(source.channels, target.channels)
        mean, std, target_mean, target_std = (
            torch.tensor((values * channels)[:channels] if len(values) == 1 else values, dtype=torch.float64)
            for values in (source.mean, source.std, target.mean, target.std)
        )
        # (x std + mean - target_mean) / target_std as one multiplication and addition, rounded to float32 once
        scale, shift = (
            value.float().view(1, -1, 1, 1).to(student.device)
            for value in (std / target_std, (mean - target_mean) / target_std)
        )
        return cls(teacher, scale, shift, _class_map(teacher, student))

    def __call__(self, images: Tensor) -> Tensor:
        """Give the teacher's logits (B, N) for the student's classes, for the student's images (B, C, H, W)."""
        inputs = images.float() * self.scale + self.shift
        size = self.teacher.fixed_size
        if size is not None and inputs.shape[2:] != (size, size):
            inputs = F.interpolate(inputs, (size, size), mode="bilinear", antialias=True, align_corners=False)
        logits = self.teacher.network(inputs)
        return logits if self.class_map is None else logits[:, self.class_map]


def _class_map(teacher: Teacher, student: Student) -> Tensor | None:
    hint = (
        "fine-tune the teacher on these data first (onefold train --recipe photos:finetune), or name folders as it does"
    )
    try:
        title = f"the teacher {teacher.title}"
        outputs = all_outputs(student.classes, teacher.classes, teacher.num_classes, title, hint=hint)
    except BadData as error:
        raise BadArgument(str(error)) from error
    same = outputs == list(range(teacher.num_classes))
    return None if same else torch.tensor(outputs, device=student.device)


def _artifact_teacher(spec: str) -> Teacher:
    """Open an exported artifact, which computes on the CPU from numpy arrays."""
    predictor = open_predictor(spec)

    def network(images: Tensor) -> Tensor:
        logits = predictor.session(np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32))
        return torch.from_numpy(np.asarray(logits)).to(images.device)

    return Teacher(
        title=predictor.title,
        network=network,
        preprocessing=predictor.preprocessing,
        num_classes=predictor.num_classes,
        classes=predictor.classes,
        fixed_size=int(predictor.facts["input_shape"][1]),
    )


def _timm_teacher(spec: str, device: torch.device) -> Teacher:
    """Open a model of timm by its name, with its published weights, or with those of a file."""
    timm_model = open_pretrained(spec)
    return Teacher(
        title=spec,
        network=timm_model.model.to(device).requires_grad_(False),
        preprocessing=timm_model.preprocessing,
        num_classes=timm_model.num_classes,
        classes=timm_model.classes,
        fixed_size=timm_model.fixed_size,
    )
