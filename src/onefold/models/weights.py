"""Weights of any known layout -> a network of ours.

Reading order: `containers` (files -> tensors), `layouts` (other projects' names -> ours), `card` (our own format),
then here: `parse_weights` a file's contents, and `load_into_` them to a network or say exactly why they do not fit.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onefold.errors import BadCheckpoint
from onefold.models import mobileformer, mobilenetv1, mobileone
from onefold.models.card import Card, verified
from onefold.models.catalogue import build, list_models
from onefold.models.layout import Layout
from onefold.models.safe_load import Contents
from onefold.reparam import fuse, unfused_norms

logger = logging.getLogger("onefold")

OURS = Layout(
    title="onefold",
    family="",
    mark=r"stem\.conv(\.0)*\.weight",
    rename=lambda keys: {key: key for key in keys},
    variant=None,
)
LAYOUTS: tuple[Layout, ...] = (OURS, *mobileone.LAYOUTS, *mobilenetv1.LAYOUTS, *mobileformer.LAYOUTS)

HEAD = ("head.fc.weight", "head.fc.bias")
COUNTER = ".num_batches_tracked"  # says nothing in eval mode, and TensorFlow has none
IMAGENET = 1000
# Less than any network here has. A network is made for as many classes and channels as a file's tensors tell: they
# have to be about as large as what is made.
MIN_FEATURES, MIN_STEM = 128, 8
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 3  # keys that a message names


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A file's tensors under our names, in torch's axes, and what is known of them."""

    tensors: dict[str, Tensor]
    layout: Layout
    source: str
    """The file, for messages."""
    strange: tuple[str, ...] = ()
    """Keys that the layout has no place for, in the file's own words."""
    classes: tuple[str, ...] | None = None
    card: Card | None = None
    """Where the file is of our own format."""

    @property
    def num_classes(self) -> int:
        """Rows of the classifier; 0 where there is none."""
        return self.tensors[HEAD[0]].shape[0] if HEAD[0] in self.tensors else 0

    @property
    def in_chans(self) -> int:
        """Channels of the images; 3 where the stem is missing."""
        stems = (t for name, t in self.tensors.items() if _is_stem(name))
        return next((t.shape[1] for t in stems if t.ndim == 4 and t.shape[0] >= MIN_STEM and t.shape[2] > 1), 3)

    @property
    def variant(self) -> str | None:
        """The suffix that a name must have, "" for none; None where the file does not tell."""
        return self.layout.variant if self.card is None else self.card.model.partition(".")[2]


def detect(keys: Collection[str]) -> Layout | None:
    """The layout that these keys are of, or None."""
    return next((layout for layout in LAYOUTS if layout.is_of(keys)), None)


def parse_weights(contents: Contents, path: Path) -> Weights:
    """The contents of a file as weights. Raises BadCheckpoint where they are of no known layout, or damaged."""
    card = verified(contents, path) if "onefold" in contents.metadata else None
    layout = detect(contents.tensors)
    if layout is None:
        known = ", ".join(known.title for known in LAYOUTS)
        raise BadCheckpoint(f"{path} has keys like {_some(contents.tensors)}, of no layout known here ({known})")
    keys = [key for key in contents.tensors if not layout.is_idle(key)]
    names = layout.rename(keys)
    if len(set(names.values())) < len(names):
        raise BadCheckpoint(f"{path} holds the same tensor under two names: save the weights alone")
    tensors = {ours: _turned(contents.tensors[key], layout.order(key)) for key, ours in names.items()}
    weights = Weights(
        tensors=_flat_head(tensors, layout),
        layout=layout,
        source=str(path),
        strange=tuple(key for key in keys if key not in names),
        card=card,
    )
    head = weights.tensors.get(HEAD[0])
    if head is not None and (head.ndim != 2 or head.shape[1] < MIN_FEATURES):
        raise BadCheckpoint(f"{path} has a classifier of shape {tuple(head.shape)}, which no network here has")
    if card is None:
        return replace(weights, classes=_classes(contents.notes, weights))
    _must_be_as_told(weights, card)
    return replace(weights, classes=card.classes)


def load_into_(model: nn.Module, weights: Weights, name: str) -> nn.Module:
    """Put weights into `model`, a training network called `name`, and return the network that holds them.

    That is `model` itself; or, for weights that are fused, the fused network, since no training network can be had
    from them. A classifier for other classes, or none, keeps its fresh values, and a stem for other channels takes
    sums or repetitions of the file's (as timm does); both are logged. Raises BadCheckpoint.
    """
    _same_variant(weights, name)
    tensors = _other_classes(weights, model)
    tensors = _other_channels(tensors, model)
    target = _fused(model) if _is_fused(tensors) and unfused_norms(model) else model
    _must_match(replace(weights, tensors=tensors), target, name)
    target.load_state_dict(tensors, strict=False)  # what may miss is told by _must_match
    return target


def guess_model(tensors: Mapping[str, Tensor], family: str = "") -> str | None:
    """The name, without variant, of the network whose convolutions these tensors are most like; None where it is none.

    Half of the convolutions have to be there, in their places and shapes.
    """
    ours, best, share = _convolutions(tensors), None, 0.5
    with torch.random.fork_rng(devices=[]):  # fresh networks draw numbers, and nobody asked for them
        for name in list_models(f"*{family}*"):
            if "." in name or share == 1:
                continue
            theirs = _convolutions(build(name).state_dict())
            found = len(ours.items() & theirs.items()) / max(len(ours), len(theirs), 1)
            best, share = (name, found) if found > share else (best, share)
    return best


# ----------------------------------------------------------------------- what a file's tensors become


def _turned(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    return tensor.permute(order) if order is not None and tensor.ndim == len(order) else tensor


def _flat_head(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A classifier that is a 1x1 convolution becomes a matrix, and one with a background loses it: row 0 of 1001."""
    out = dict(tensors)
    for name in HEAD:
        if name in out and out[name].ndim == 4 and out[name].shape[2:] == (1, 1):
            out[name] = out[name].flatten(1)
        if name in out and layout.background and out[name].shape[:1] == (IMAGENET + 1,):
            out[name] = out[name][1:]
    return out


def _classes(notes: Mapping[str, object], weights: Weights) -> tuple[str, ...] | None:
    """The classes' names, where a trainer wrote them beside the weights: one for each row of the classifier."""
    meta = notes.get("meta")
    places = [notes, meta if isinstance(meta, Mapping) else {}]
    dataset = places[1].get("dataset_meta")
    places.append(dataset if isinstance(dataset, Mapping) else {})
    for place in places:
        for word in ("classes", "CLASSES", "class_names", "label_names"):
            names = place.get(word)
            if isinstance(names, (list, tuple)) and len(names) == weights.num_classes and _all_text(names):
                return tuple(names)
    return None


def _all_text(names: Iterable[object]) -> bool:
    return all(isinstance(name, str) for name in names)


def _must_be_as_told(weights: Weights, card: Card) -> None:
    """A card and its tensors agree. Raises BadCheckpoint."""
    told = (card.num_classes, card.in_chans, card.fused)
    found = (weights.num_classes, weights.in_chans, _is_fused(weights.tensors))
    if told != found:
        raise BadCheckpoint(
            f"{weights.source} contradicts itself: by its card its classes, channels and fusedness are {told}, "
            f"by its tensors {found}; write it again with save_weights"
        )


# --------------------------------------------------------------------------------- making them fit


def _same_variant(weights: Weights, name: str) -> None:
    base, _, variant = name.partition(".")
    needed = weights.variant
    if needed is not None and base.startswith(weights.layout.family) and needed != variant:
        right = f"{base}.{needed}" if needed else base
        raise BadCheckpoint(
            f"{weights.source} holds {weights.layout.title} weights, made for other padding, activation or epsilon "
            f"than those of {name}: type {right!r} in its place"
        )


def _other_classes(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """The tensors without a classifier that is for other classes than the model's."""
    wanted = next((len(tensor) for name, tensor in model.state_dict().items() if name == HEAD[0]), 0)
    if wanted == weights.num_classes:
        return weights.tensors
    text = "%s: its classifier is for %d classes and the model's for %d: the model's keeps its fresh values"
    logger.info(text, weights.source, weights.num_classes, wanted)
    if weights.num_classes == 0:
        return weights.tensors  # half a classifier, if there is one, is for _must_match to refuse
    return {name: tensor for name, tensor in weights.tensors.items() if name not in HEAD}


def _other_channels(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors with a stem for as many channels as the model's: RGB summed for one, else repeated and scaled."""
    wanted = next((t.shape[1] for name, t in model.state_dict().items() if _is_stem(name)), 0)
    out = dict(tensors)
    for name, tensor in tensors.items():
        if not _is_stem(name) or tensor.ndim != 4 or tensor.shape[1] in (wanted, 0):
            continue
        there = tensor.shape[1]
        logger.info("the stem is for %d channels, and was made one for %d", there, wanted)
        again = tensor.repeat(1, -(-wanted // there), 1, 1)[:, :wanted] * (there / wanted)
        out[name] = tensor.sum(1, keepdim=True) if wanted == 1 else again
    return out


def _is_stem(name: str) -> bool:
    return re.fullmatch(r"stem\.conv(\.\d+)*\.weight", name) is not None


def _is_fused(tensors: Mapping[str, Tensor]) -> bool:
    return not any(name.endswith("running_var") for name in tensors)


def _fused(model: nn.Module) -> nn.Module:
    """The fused form of a network, in the mode that the network is in."""
    training = model.training
    fused = fuse(model.eval())
    model.train(training)
    return fused.train(training)


# ----------------------------------------------------------------------------------- what is wrong


def _must_match(weights: Weights, model: nn.Module, name: str) -> None:
    """Every key in its place, shape and kind. Raises BadCheckpoint that tells which are not, and what would fit."""
    wanted, there = model.state_dict(), weights.tensors
    fresh = set() if any(key in there for key in HEAD) else set(HEAD)
    missing = [key for key in wanted if key not in there and key not in fresh and not key.endswith(COUNTER)]
    strange = [*weights.strange, *(key for key in there if key not in wanted)]
    shared = [key for key in wanted if key in there]
    bent = [key for key in shared if wanted[key].shape != there[key].shape]
    faults = [f"{len(missing)} tensors are missing ({_some(missing)})"] if missing else []
    faults += [f"{len(strange)} are strange ({_some(strange)})"] if strange else []
    if bent:
        shapes = f"{bent[0]} is {tuple(there[bent[0]].shape)} and must be {tuple(wanted[bent[0]].shape)}"
        faults.append(f"{len(bent)} have another shape ({shapes})")
    if faults:
        found = f"{weights.source} ({weights.layout.title} layout) does not fit {name}"
        raise BadCheckpoint(f"{found}: {'; '.join(faults)}.{_advice(weights, name)}")
    _must_be_sound({key: there[key] for key in shared}, weights.source)


def _advice(weights: Weights, name: str) -> str:
    right = guess_model(weights.tensors, weights.layout.family)
    if right is None:
        return ""
    variant = name.partition(".")[2] if weights.variant is None else weights.variant
    full = f"{right}.{variant}" if variant else right
    if full == name:
        return f" It is like {full}, but not whole: get the file again"
    return f" It seems to be {full}: type that name in its place"


def _must_be_sound(tensors: Mapping[str, Tensor], source: str) -> None:
    """Floats are finite and variances not negative. Raises BadCheckpoint."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            if not name.endswith(COUNTER):
                raise BadCheckpoint(f"{source}: {name} is {tensor.dtype}, and weights are floats: save it unquantized")
        elif not bool(torch.isfinite(tensor).all()) or (name.endswith("running_var") and bool((tensor < 0).any())):
            raise BadCheckpoint(
                f"{source}: {name} holds values that no training leaves behind: it is damaged or diverged"
            )


def _convolutions(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of convolutions but for the stem's, by the place that each has when fused (its first branch's)."""
    found = {re.sub(r"(\.0)+\.weight$", ".weight", name): tuple(t.shape) for name, t in tensors.items() if t.ndim == 4}
    return {
        name: shape for name, shape in found.items() if re.fullmatch(r".*[a-z]\d?\.weight", name) and not _is_stem(name)
    }


def _some(keys: Iterable[str]) -> str:
    """The first few of some keys, for a message."""
    shown = [key if len(key) <= 60 else f"{key[:57]}..." for key in keys]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
