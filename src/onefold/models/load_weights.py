"""Weights of any known layout into a network of ours.

`parse_weights` renames the tensors that `safe_load` read from a file, by the layouts of the families' files;
`copy_weights_` puts them into a network, or raises an error that says which of them do not fit and what would.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onefold.errors import BadCheckpoint
from onefold.models import mobileformer, mobilenetv1, mobileone
from onefold.models.catalogue import build_model, list_models
from onefold.models.checkpoint_metadata import NUM_IMAGENET_CLASSES, find_class_names
from onefold.models.key_mapping import KeyLayout
from onefold.models.safe_load import CheckpointContents, read_tensors
from onefold.models.weights_file import Card, is_onefold_file, verify_checksums
from onefold.reparam import unfused_norms
from onefold.reparam.folding_rules import fused_layer
from onefold.reparam.fuse import outermost_trees

_log = logging.getLogger("onefold")

_OURS = KeyLayout(
    title="onefold",
    family="",
    signature=r"stem\.conv(\.0)*\.weight",
    rename=lambda keys: {key: key for key in keys if key.partition(".")[0] in ("stem", "stages", "head")},
    variant=None,
)
LAYOUTS: tuple[KeyLayout, ...] = (_OURS, *mobileone.LAYOUTS, *mobilenetv1.LAYOUTS, *mobileformer.LAYOUTS)

CLASSIFIER_KEYS = ("head.fc.weight", "head.fc.bias")
_COUNTER = ".num_batches_tracked"  # not used in eval mode, and TensorFlow has none
# A network is made for as many classes and channels as the shapes of a file's tensors say. With fewer features or stem
# channels than any network here has, a small file could ask for a classifier of any size.
_MIN_FEATURES, _MIN_STEM = 128, 8
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_SHOWN = 3  # keys in an error message


@dataclass(frozen=True, kw_only=True)
class MappedWeights:
    """A file's tensors by our names, with torch's order of axes, and what is known of them."""

    tensors: dict[str, Tensor]
    layout: KeyLayout
    source: str
    """The file, for error messages."""
    unexpected: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors that the layout does not know, by the file's keys."""
    origin: str = ""
    """Which of the file's state dicts they are, where it has several."""
    classes: tuple[str, ...] | None = None
    card: Card | None = None
    """The card of a file of our own format."""
    extras: Mapping[str, object] = field(default_factory=dict)
    """The values beside the tensors in the file."""

    @property
    def num_classes(self) -> int:
        """Number of classes, by the rows of the classifier; 0 where there is none."""
        return self.tensors[CLASSIFIER_KEYS[0]].shape[0] if CLASSIFIER_KEYS[0] in self.tensors else 0

    @property
    def in_chans(self) -> int:
        """Number of channels of the images; 3 where the stem is missing."""
        stems = (t for name, t in self.tensors.items() if _is_stem(name))
        return next((t.shape[1] for t in stems if t.ndim == 4 and t.shape[0] >= _MIN_STEM and t.shape[2] > 1), 3)

    @property
    def is_fused(self) -> bool:
        """Whether it has no norms with statistics."""
        return _is_fused(self.tensors)

    @property
    def variant(self) -> str | None:
        """The suffix that the model's name must have, "" for none; None where the file does not show it."""
        return self.layout.variant if self.card is None else self.card.model.partition(".")[2]


def detect_layout(keys: Collection[str]) -> KeyLayout | None:
    """The layout that these keys are of, or None."""
    return next((layout for layout in LAYOUTS if layout.matches(keys)), None)


def read_weights(path: Path, *, select: str = "", quiet: bool = False) -> MappedWeights:
    """Read the weights of a file (see `safe_load.read_tensors`). Raises BadCheckpoint."""
    contents = read_tensors(path, fits=lambda keys: detect_layout(keys) is not None, select=select, quiet=quiet)
    return parse_weights(contents, path, quiet=quiet)


def parse_weights(contents: CheckpointContents, path: Path, *, quiet: bool = False) -> MappedWeights:
    """Give the contents of a file as weights. Raises BadCheckpoint where they are of no known layout, or damaged."""
    card = verify_checksums(contents, path, quiet=quiet) if is_onefold_file(contents.metadata) else None
    layout = detect_layout(contents.tensors)
    if layout is None:
        titles = ", ".join(known.title for known in LAYOUTS)
        raise BadCheckpoint(f"{path} has keys like {_first(contents.tensors)}, of no layout known here ({titles})")
    keys = [key for key in contents.tensors if not layout.ignores(key)]
    names = layout.rename(keys)
    left_out = [key for key in keys if key not in names and key in contents.outside]
    keys = [key for key in keys if key not in left_out]
    left_out = [key for key in left_out if contents.tensors[key].ndim > 0]  # a counter is no loss
    if left_out and not quiet:
        text = "%s: %d tensors beside the network are left out (%s)"
        _log.info(text, path, len(left_out), _first(left_out))
    if len(set(names.values())) < len(names):
        raise BadCheckpoint(f"{path} holds the same tensor under two names: save the weights alone")
    tensors = {}
    for key, name in names.items():
        tensor, axes = contents.tensors[key], layout.permutation(key)
        tensors[name] = tensor.permute(axes) if axes is not None and tensor.ndim == len(axes) else tensor
    weights = MappedWeights(
        tensors=_flat_head(tensors, layout),
        layout=layout,
        source=str(path),
        unexpected={key: contents.tensors[key] for key in keys if key not in names},
        card=card,
        origin=contents.weights,
        extras={**contents.metadata, **contents.extras},
    )
    head = weights.tensors.get(CLASSIFIER_KEYS[0])
    if head is not None and (head.ndim != 2 or head.shape[1] < _MIN_FEATURES):
        raise BadCheckpoint(f"{path} has a classifier of shape {tuple(head.shape)}, which no network here has")
    if card is None:
        remarks: list[str] = []
        classes = find_class_names({**contents.metadata, **contents.extras}, weights.num_classes, remarks)
        for remark in () if quiet else remarks:
            _log.info("%s: %s", path, remark)
        return replace(weights, classes=classes)
    stated = (card.num_classes, card.in_chans, card.fused)
    actual = (weights.num_classes, weights.in_chans, _is_fused(weights.tensors))
    if stated != actual:
        raise BadCheckpoint(
            f"{path} contradicts itself: by its card its number of classes, of channels and whether it is fused are "
            f"{stated}, by its tensors {actual}; write it again with save_weights"
        )
    return replace(weights, classes=card.classes)


def copy_weights_(model: nn.Module, weights: MappedWeights, name: str, *, quiet: bool = False) -> nn.Module:
    """Put weights into `model`, a training network called `name`, and return the network that holds them.

    That is `model` itself; or, for weights that are fused, its fused form, since they are not those of a training
    network. A classifier for another number of classes keeps its random initialization, and a stem for other channels
    takes sums or repetitions of the file's (as timm does); both are logged. What a trainer counts beside the weights
    is left out, which is logged unless it is `quiet`. Raises BadCheckpoint.
    """
    base, _, variant = name.partition(".")
    needed = weights.variant
    if needed is not None and base.startswith(weights.layout.family) and needed != variant:
        right = f"{base}.{needed}" if needed else base
        raise BadCheckpoint(
            f"{weights.source} holds {weights.layout.title} weights, made for other padding, activation or epsilon "
            f"than those of {name}: type {right!r} in its place"
        )
    tensors = _adapt_stem(_without_other_classifier(weights, model), model)
    target = model
    if _is_fused(tensors) and unfused_norms(model):
        target = _empty_fused(model)
    beside = _check_match(replace(weights, tensors=tensors), target, name)
    if beside and not quiet:
        _log.info(BOOKKEEPING_NOTE, weights.source, _first(beside))
    target.load_state_dict(tensors, strict=False)  # _check_match has refused everything but what may be missing
    return target


def _empty_fused(model: nn.Module) -> nn.Module:
    """The fused form of a training network, to be filled: of its values only those that fusing leaves are of use.

    Its trees are folded as they are, which is the shortest way to their layers' shapes; there is nothing to prove.
    """
    trees = copy.deepcopy(model).eval()
    layers: dict[int, object] = {id(tree): fused_layer(tree) for _, tree in outermost_trees(trees)}
    return copy.deepcopy(trees, layers).train(model.training)


def guess_model_name(tensors: Mapping[str, Tensor], family: str = "") -> str | None:
    """Guess the name, without variant, of the network that these tensors are of; None where they are of none.

    It is the one that has most convolutions of the same names and shapes; they must be more than half.
    """
    ours, best, share = _convolutions(tensors), None, 0.5
    with torch.random.fork_rng(devices=[]):  # the random initialization of these networks must not show outside
        for name in list_models(f"*{family}*"):
            if "." in name or share == 1:
                continue
            theirs = _convolutions(build_model(name).state_dict())
            common = len(ours.items() & theirs.items()) / max(len(ours), len(theirs), 1)
            best, share = (name, common) if common > share else (best, share)
    return best


# ---------------------------------------------------------------------------- a file's tensors as ours


def _flat_head(tensors: dict[str, Tensor], layout: KeyLayout) -> dict[str, Tensor]:
    """Make a classifier that is a 1x1 convolution a matrix, and take the background class, row 0 of 1001, off it."""
    out = dict(tensors)
    for name in CLASSIFIER_KEYS:
        if name in out and out[name].ndim == 4 and out[name].shape[2:] == (1, 1):
            out[name] = out[name].flatten(1)
        if name in out and layout.background and out[name].shape[:1] == (NUM_IMAGENET_CLASSES + 1,):
            out[name] = out[name][1:]
    return out


# ------------------------------------------------------------------------ adapting them to a network


def _without_other_classifier(weights: MappedWeights, model: nn.Module) -> dict[str, Tensor]:
    """The tensors without a classifier for another number of classes than the model's."""
    wanted = next((len(tensor) for name, tensor in model.state_dict().items() if name == CLASSIFIER_KEYS[0]), 0)
    if wanted == weights.num_classes:
        return weights.tensors
    _log.info(
        "%s: a new last layer, for %d classes, replaces its own for %d", weights.source, wanted, weights.num_classes
    )
    if weights.num_classes == 0:
        return weights.tensors  # a bias alone is refused by _check_match
    return {name: tensor for name, tensor in weights.tensors.items() if name not in CLASSIFIER_KEYS}


def _adapt_stem(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors with a stem for the model's number of channels: summed for one, else repeated and scaled."""
    wanted = next((t.shape[1] for name, t in model.state_dict().items() if _is_stem(name)), 0)
    out = dict(tensors)
    for name, tensor in tensors.items():
        if not _is_stem(name) or tensor.ndim != 4 or tensor.shape[1] in (wanted, 0):
            continue
        channels = tensor.shape[1]
        _log.info("the stem is for %d channels, and was made one for %d", channels, wanted)
        out[name] = adapt_first_conv(tensor, wanted)
    return out


def adapt_first_conv(weight: Tensor, channels: int) -> Tensor:
    """Give the weight of a first convolution for so many channels: summed for one, else repeated and scaled."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    given = weight.shape[1]
    return weight.repeat(1, -(-channels // given), 1, 1)[:, :channels] * (given / channels)


def _is_stem(name: str) -> bool:
    return re.fullmatch(r"stem\.conv(\.\d+)*\.weight", name) is not None


def _is_fused(tensors: Mapping[str, Tensor]) -> bool:
    return not any(name.endswith("running_var") for name in tensors)


# ------------------------------------------------------------------------------------------- checks


BOOKKEEPING_NOTE = "%s: numbers beside the weights are left out, nothing of the network is missing (%s)"
_LAYER_TENSORS = {"weight", "bias", "running_mean", "running_var"}  # of most layers, whether this network has them


def find_bookkeeping(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Give the names of what counts or notes beside a network's `expected` tensors, such as an epoch or thop's buffers.

    It has at most one element, and a name that no layer's tensors have. Where something of the network is missing
    there is none, for it may be that under another name.
    """
    if any(key not in tensors and not key.endswith(_COUNTER) for key in expected):
        return []
    known = _LAYER_TENSORS | {key.rpartition(".")[2] for key in expected}
    beside = [key for key, tensor in tensors.items() if key not in expected and tensor.numel() <= 1]
    return [key for key in beside if key.rpartition(".")[2] not in known]


def _check_match(weights: MappedWeights, model: nn.Module, name: str) -> list[str]:
    """Give the names of the file's bookkeeping, which is no part of the model.

    Raises BadCheckpoint where keys, shapes or values are not those of the model, and says what would fit.
    """
    expected, tensors = model.state_dict(), weights.tensors
    optional = set() if any(key in tensors for key in CLASSIFIER_KEYS) else set(CLASSIFIER_KEYS)
    missing = [key for key in expected if key not in tensors and key not in optional and not key.endswith(_COUNTER)]
    found = {**weights.unexpected, **tensors}
    beside = find_bookkeeping(found, {key: t for key, t in expected.items() if key not in optional})
    unexpected = [key for key in found if (key in weights.unexpected or key not in expected) and key not in beside]
    common = [key for key in expected if key in tensors]
    reshaped = [key for key in common if expected[key].shape != tensors[key].shape]
    errors = [f"{len(missing)} tensors are missing ({_first(missing)})"] if missing else []
    errors += [f"{len(unexpected)} are unexpected ({_first(unexpected)})"] if unexpected else []
    if reshaped:
        key = reshaped[0]
        shapes = f"{key} is {tuple(tensors[key].shape)} and must be {tuple(expected[key].shape)}"
        errors.append(f"{len(reshaped)} have another shape ({shapes})")
    if errors:
        file = f"{weights.source} ({weights.layout.title} layout)"
        raise BadCheckpoint(f"{file} does not fit {name}: {'; '.join(errors)}.{_advice(weights, name, bool(missing))}")
    for key in common:
        _check_values(key, tensors[key], weights.source)
    if not any(bool(tensors[key].any()) for key in common if tensors[key].ndim > 1):
        raise BadCheckpoint(f"{weights.source}: all weights are 0: it was written before anything was put into it")
    return beside


def _advice(weights: MappedWeights, name: str, is_incomplete: bool) -> str:
    """A sentence on the model that the weights seem to be of; empty where none is like them."""
    base = guess_model_name(weights.tensors, weights.layout.family)
    if base is None:
        return ""
    variant = name.partition(".")[2] if weights.variant is None else weights.variant
    full = f"{base}.{variant}" if variant else base
    if full == name:
        return f" It is like {full}, but incomplete: get the file again" if is_incomplete else ""
    return f" It seems to be {full}: type that name in its place"


def _check_values(name: str, tensor: Tensor, source: str) -> None:
    """Raise BadCheckpoint where floats are not finite, variances are negative, or weights are not floats."""
    if tensor.dtype not in _FLOATS:
        if not name.endswith(_COUNTER):
            raise BadCheckpoint(f"{source}: {name} is {tensor.dtype}, and weights are floats: save it unquantized")
    elif not bool(torch.isfinite(tensor).all()) or (name.endswith("running_var") and bool((tensor < 0).any())):
        raise BadCheckpoint(f"{source}: {name} holds values that no training leaves behind: it is damaged or diverged")


def _convolutions(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of convolutions but for the stem's, by their names in the fused network (a unit's first branch)."""
    shapes = {re.sub(r"(\.0)+\.weight$", ".weight", name): tuple(t.shape) for name, t in tensors.items() if t.ndim == 4}
    first_branch = re.compile(r".*[a-z]\d?\.weight")
    return {name: shape for name, shape in shapes.items() if first_branch.fullmatch(name) and not _is_stem(name)}


def _first(keys: Iterable[str]) -> str:
    """The first few of some keys, for an error message."""
    shown = [key if len(key) <= 60 else f"{key[:57]}..." for key in keys]
    return ", ".join(shown[:_MAX_SHOWN]) + (", ..." if len(shown) > _MAX_SHOWN else "")
