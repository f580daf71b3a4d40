"""timm's networks, opened as ours are: to train, to teach, and to be fused, exported and measured.

    timm:NAME         random initialization, the same at each call: for latencies, which do not depend on the weights
    timm:NAME@FILE    the weights of a file

A training takes timm:NAME as its model, and weights from a file, a run or the hub (`load_timm`). Randomly initialized
networks have no accuracy, and everything made of them says so. Where they are opened for latencies their norms are
recalibrated on synthetic images: as timm initializes them, the logits of some networks are near 1e14 and those of
others do not depend on the image, so that the parity of an artifact would prove nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onefold.commands.predictor import TIMM_PREFIX, is_timm, parse_timm_spec
from onefold.data import Preprocessing
from onefold.data.folders import join_names
from onefold.errors import BadArgument, BadCheckpoint, MissingExtra, NetworkFailed
from onefold.models.checkpoint_metadata import (
    adapt_preprocessing_to_channels,
    find_class_names,
    find_licence,
    find_preprocessing,
)
from onefold.models.layers import set_norm_statistics_
from onefold.models.load_weights import BOOKKEEPING_NOTE, adapt_first_conv, find_bookkeeping
from onefold.models.locate_weights import locate_weights
from onefold.models.safe_load import CheckpointContents, read_tensors
from onefold.models.weights_file import (
    Card,
    is_onefold_file,
    preprocessing_from_config,
    tell_crop_mode,
    verify_checksums,
    write_weights,
)
from onefold.reparam import fuse
from onefold.runtimes.reference_logits import make_reference_images

_log = logging.getLogger("onefold")
_NUM_IMAGES = 8
_HEADER = 1 << 20  # bytes at the start of a file of ours in which its card stands


def open_timm(spec: str) -> tuple[nn.Module, Card]:
    """Open `timm:NAME` or `timm:NAME@FILE`, in eval mode, with its card.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    model_name, file = parse_timm_spec(spec)
    if file is not None:
        return load_timm(model_name, file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        card = timm_card(model_name)
        model = create_timm(model_name, num_classes=card.num_classes, in_chans=card.in_chans).eval()
        init_norm_statistics_(model, Preprocessing.from_dict(card.preprocessing))
    return model, card


def open_pretrained(spec: str) -> tuple[nn.Module, Card]:
    """Open `timm:NAME` with the weights that timm publishes on the hub, or `timm:NAME@FILE`, in eval mode.

    Raises as `open_timm`, and NetworkFailed where the hub cannot be reached.
    """
    model_name, file = parse_timm_spec(spec)
    if file is not None:
        return load_timm(model_name, file)
    name = model_name.removeprefix(TIMM_PREFIX)
    timm = _timm(model_name)
    try:
        model: nn.Module = timm.create_model(name, pretrained=True).eval()
    except (RuntimeError, ValueError) as error:
        raise _no_weights(spec, name, error) from error
    except Exception as error:  # the network raises errors of whatever package timm downloads with
        raise NetworkFailed(
            f"the weights of {spec} cannot be downloaded ({type(error).__name__}: {_brief(error)}): check the network "
            f"and HF_HUB_OFFLINE, or give them as timm:{name}@FILE"
        ) from error
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    names = config.get("label_names")
    tell_crop_mode(config.get("crop_mode"))
    num_classes = int(getattr(model, "num_classes", 0))
    card = replace(
        timm_card(model_name),
        num_classes=num_classes,
        classes=tuple(names) if names and len(names) == num_classes else None,
        untrained=False,
        licence=str(config.get("license") or ""),
        source=f"timm {timm.__version__}",
    )
    return model, card


# ----------------------------------------------------------------------------- for a training


def create_timm(model_name: str, *, num_classes: int, in_chans: int, dropout: float | None = None) -> nn.Module:
    """Create timm:NAME at timm's own random initialization, in train mode; `dropout` is that before the last layer.

    Raises BadArgument, MissingExtra.
    """
    timm, name = _timm(model_name), model_name.removeprefix(TIMM_PREFIX)
    options = {} if dropout is None else {"drop_rate": dropout}
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _not_made(name, error) from error
    return model


def load_timm(
    model_name: str, source: str | Path, *, in_chans: int | None = None, dropout: float | None = None
) -> tuple[nn.Module, Card]:
    """Load timm:NAME, in eval mode, with weights from a file or an id of the hub, and give its card.

    It has as many classes as the weights' last layer, none where they have no such layer, and is fused where they are.
    For other `in_chans` than the weights' the first convolution takes sums or repetitions, as timm does. Raises
    BadCheckpoint, BadArgument, MissingExtra, NetworkFailed.
    """
    card, tensors = _read_timm(model_name, source, quiet=False)
    channels = card.in_chans if in_chans is None else in_chans
    model = create_timm(model_name, num_classes=card.num_classes, in_chans=channels, dropout=dropout)
    if channels != card.in_chans:
        tensors = _with_channels(model_name, tensors, channels)
    try:
        model = fuse(model.eval()) if card.fused else model.eval()
        if beside := find_bookkeeping(tensors, model.state_dict()):
            _log.info(BOOKKEEPING_NOTE, source, join_names(beside, 3))
        model.load_state_dict({key: tensor for key, tensor in tensors.items() if key not in beside})
    except RuntimeError as error:
        differs = _differences(tensors, model.state_dict()) or _brief(error)
        if card.fused:
            raise BadCheckpoint(
                f"{source} does not fit {card.model} of timm {_timm(model_name).__version__} ({differs}): it is "
                f"{card.source}; fuse the network again"
            ) from error
        raise BadCheckpoint(
            f"{source} does not fit {model_name} of timm {_timm(model_name).__version__} ({differs}): it is of another "
            "model, or of another timm"
        ) from error
    return model, card


def read_timm_card(model_name: str, source: str | Path) -> Card:
    """Give the card that `load_timm` would give, without making the network. Raises as `load_timm` does."""
    return _read_timm(model_name, source, quiet=True)[0]


def timm_card(model_name: str) -> Card:
    """Give the card of timm:NAME at random initialization: its classes, and how images are prepared for it.

    Raises BadArgument, MissingExtra.
    """
    timm = _timm(model_name)
    preprocessing = _preprocessing(model_name)
    return Card(
        model=model_name,
        num_classes=int(_config(model_name).num_classes),
        in_chans=preprocessing.channels,
        preprocessing=preprocessing.to_dict(),
        untrained=True,
        licence="Apache-2.0 (timm's code; random weights)",
        source=f"timm {timm.__version__}, random weights: accuracy unknown",
    )


def pretrained_hub_id(model_name: str) -> str:
    """Give the id on the Hugging Face hub of the weights that timm publishes for a network; empty where it has none.

    Raises BadArgument, MissingExtra.
    """
    return str(_config(model_name).hf_hub_id or "")


def fixed_image_size(model_name: str) -> int | None:
    """Give the side of the images of a network that takes no other; None where it takes any."""
    config = _config(model_name)
    return int(config.input_size[1]) if config.fixed_input_size else None


def last_layers(model: nn.Module) -> list[nn.Linear]:
    """Give the linear layers that make logits in a network of timm: two in distilled ones, whose mean is the answer.

    Raises BadArgument where the last layer is of another kind.
    """
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    given = config.get("classifier") or ()
    layers = [model.get_submodule(name) for name in ((given,) if isinstance(given, str) else given)]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linear or len(linear) < len(layers):
        raise BadArgument(
            f"the last layer of {type(model).__name__} is no Linear, to which images could be fitted: --head fresh "
            "begins with a random one"
        )
    return linear


def _read_timm(model_name: str, source: str | Path, *, quiet: bool) -> tuple[Card, dict[str, Tensor]]:
    """The card and the tensors of weights for timm:NAME."""
    name, config = model_name.removeprefix(TIMM_PREFIX), _config(model_name)
    last, first = (
        (names,) if isinstance(names, str) else tuple(names or ())  # distilled networks have two classifiers
        for names in (config.classifier, config.first_conv)
    )
    file = locate_weights(source)

    def fits(keys: Any) -> bool:
        return any(f"{part}.weight" in keys for part in last)

    own = _own_contents(file.path)
    if own is not None:
        card = verify_checksums(own, file.path, quiet=quiet)
        if _base(card.model) != _base(model_name):
            hint = f"--model {card.model}" if is_timm(card.model) else f"it is no network of timm: --model {card.model}"
            raise BadCheckpoint(f"{source} holds weights of {card.model}, not of {model_name}: give {hint}")
        return card, own.tensors
    contents = read_tensors(file.path, fits=fits, select=file.select, quiet=quiet)
    tensors = contents.tensors
    heads = {len(tensors[f"{part}.weight"]) for part in last if f"{part}.weight" in tensors}
    if not heads and any(f"{part}.weight" in tensors for part in first):
        heads = {0}  # features alone, whose names are compared with the network's when they are loaded
    if len(heads) != 1:
        missing = " or ".join(f"{part}.weight" for part in last)
        found = f"classifiers of {' and '.join(map(str, sorted(heads)))} classes" if heads else f"no {missing}"
        raise BadCheckpoint(f"{file.path} has {found}, the last layer of timm's {name}: it is of another model")
    num_classes = heads.pop()
    stems = [tensors[f"{part}.weight"] for part in first if f"{part}.weight" in tensors]
    channels = next((int(stem.shape[1]) for stem in stems if stem.dim() == 4), 3)
    preprocessing = _preprocessing(model_name, channels, quiet=quiet).to_dict()
    stated = preprocessing_from_config(file.config, preprocessing)
    beside = {**contents.metadata, **contents.extras}
    stated = stated or preprocessing_from_config(find_preprocessing(beside), preprocessing)
    if not stated and not quiet:
        tell_crop_mode(config.crop_mode)
    preprocessing |= adapt_preprocessing_to_channels({**preprocessing, **stated}, channels)
    labels = config.label_names
    classes = tuple(labels) if labels and len(labels) == num_classes else None
    card = Card(
        model=model_name,
        num_classes=num_classes,
        in_chans=channels,
        classes=classes or _class_names(contents, file.config, num_classes, str(source), quiet),
        preprocessing=preprocessing,
        # without a tag the license is unknown
        licence=file.licence or find_licence(beside) or (str(config.license or "") if "." in name else ""),
        source=f"timm {_timm(model_name).__version__}, from {source}",
    )
    others = [name for name in contents.outside if not name.startswith(tuple(f"{part}." for part in last))]
    if not quiet and (losses := [name for name in others if tensors[name].ndim > 0]):
        _log.info("%s: %d tensors beside the network are left out (%s)", source, len(losses), ", ".join(losses[:3]))
    return card, {name: tensor for name, tensor in tensors.items() if name not in others}


def _class_names(
    contents: CheckpointContents, config: Mapping[str, Any], num_classes: int, source: str, quiet: bool
) -> tuple[str, ...] | None:
    remarks: list[str] = []
    classes = find_class_names({**contents.metadata, **contents.extras, **config}, num_classes, remarks)
    for remark in () if quiet else remarks:
        _log.info("%s: %s", source, remark)
    return classes


def _with_channels(model_name: str, tensors: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The tensors with a first convolution for images of so many channels."""
    first = _config(model_name).first_conv or ()
    names = {f"{part}.weight" for part in ((first,) if isinstance(first, str) else first)}
    _log.info("the first convolution of %s is made one for %d channels, as timm does", model_name, channels)
    adapted = {name: adapt_first_conv(tensors[name], channels) for name in names if name in tensors}
    return {**tensors, **adapted}


@torch.no_grad()
def init_norm_statistics_(model: nn.Module, preprocessing: Preprocessing) -> None:
    """Set the running statistics of every BatchNorm to those of synthetic images; in eval mode afterwards.

    Half are noise, as `Network.random_images`, and half of the kind that an artifact's reference output is made of:
    on images unlike those of their statistics, the logits of some networks are so large that rounding shows.
    """
    shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
    images = torch.from_numpy(make_reference_images(shape, num_images=_NUM_IMAGES, seed=1))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    set_norm_statistics_(model, torch.cat([images, noise]))


# ------------------------------------------------------------------------ in our file format


def save_timm(model: nn.Module, path: Path, card: Card) -> None:
    """Write a fused network of timm to a file of our own format, for `load_stored_timm`. Raises NotWritable."""
    write_weights(model, path, card)


def load_stored_timm(path: Path) -> tuple[nn.Module, Card] | None:
    """Read a network of timm, in eval mode, from a file of our own format; None where the file holds something else.

    Raises BadCheckpoint where the file is damaged or of another timm, MissingExtra.
    """
    model_name = stored_timm_name(path)
    return None if model_name is None else load_timm(model_name, path)


def stored_timm_name(path: str | Path) -> str | None:
    """Give the timm:NAME of a file of our own format, such as a run's best weights; None where it is another file."""
    path = Path(path)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if TIMM_PREFIX.encode() not in file.read(_HEADER):
            return None
    contents = _own_contents(path)
    card = None if contents is None else verify_checksums(contents, path, quiet=True)
    return None if card is None or not is_timm(card.model) else card.model


def _own_contents(path: Path) -> CheckpointContents | None:
    """The contents of a file of our own format; None of any other. Raises BadCheckpoint where it cannot be read."""
    with path.open("rb") if path.is_file() else nullcontext() as file:
        if file is None or b'"onefold"' not in file.read(_HEADER):
            return None
    contents = read_tensors(path, quiet=True)
    return contents if is_onefold_file(contents.metadata) else None


# -------------------------------------------------------------------------------- the package


def check_timm_model(model_name: str) -> None:
    """Raise MissingExtra where timm cannot be imported, BadArgument where it has no such network."""
    _timm(model_name)


def _timm(model_name: str) -> Any:
    name = model_name.removeprefix(TIMM_PREFIX)
    try:
        import timm
    except RuntimeError as error:
        raise MissingExtra(
            f"{model_name} needs timm, and the torchvision that timm imports was built for another torch ({error}): "
            "install the two from one place, as pytorch.org says"
        ) from error
    except ImportError as error:
        raise MissingExtra(f"{model_name} needs timm, and it cannot be imported ({error})", "timm") from error
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = timm.list_models(f"*{base[:8]}*")[:3] if base else []
        raise BadArgument(f"timm has no model {name!r}" + (f": did you mean {' or '.join(near)}?" if near else ""))
    return timm


def _config(model_name: str) -> Any:
    """timm's pretrained configuration of a network, of the tag that its name has or of the default one."""
    timm, name = _timm(model_name), model_name.removeprefix(TIMM_PREFIX)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise _not_made(name, error) from error
    if config is None:
        raise BadArgument(f"timm does not say how images are prepared for {name!r}: choose another network")
    return config


def _not_made(name: str, error: Exception) -> BadArgument:
    return BadArgument(f"timm does not make {name!r} ({_brief(error)}): give a name of timm.list_models()")


def _base(model_name: str) -> str:
    return model_name.removeprefix(TIMM_PREFIX).partition(".")[0]


def _preprocessing(model_name: str, in_chans: int | None = None, *, quiet: bool = False) -> Preprocessing:
    """How images are prepared for a network, by its pretrained configuration. Raises BadArgument."""
    config, name = _config(model_name), model_name.removeprefix(TIMM_PREFIX)
    channels, height, width = config.input_size
    if height != width or channels not in (1, 3):
        raise BadArgument(f"timm's {name} takes images of {channels}x{height}x{width}: only square ones are known here")
    mean, std = tuple(config.mean), tuple(config.std)
    if in_chans not in (None, channels) and not quiet:  # its configuration is that of the colour network
        has = "one channel" if in_chans == 1 else f"{in_chans} channels"
        _log.info("%s has %s: its mean and std are the averages of the colour network's", name, has)
    stated = {
        "size": int(height),
        "crop_pct": float(config.crop_pct or 0.875),
        "mean": mean,
        "std": std,
        "interpolation": config.interpolation or "bilinear",
    }
    return Preprocessing.from_dict(adapt_preprocessing_to_channels(stated, channels if in_chans is None else in_chans))


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What of a file's tensors is not as a network has them: of each kind the first, and how many there are."""
    parts = []
    for names, what in (
        ([name for name in expected if name not in tensors], "missing"),
        ([name for name in tensors if name not in expected], "not its own"),
    ):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts += [f"{names[0]}{more} {'are' if more else 'is'} {what}"] if names else []
    others = [name for name, tensor in expected.items() if name in tensors and tensors[name].shape != tensor.shape]
    if others:
        shape, wanted = ("x".join(map(str, given[others[0]].shape)) for given in (tensors, expected))
        more = f", and {len(others) - 1} more have other shapes" if len(others) > 1 else ""
        parts.append(f"{others[0]} is {shape}, and not {wanted}{more}")
    return "; ".join(parts)


def _no_weights(spec: str, name: str, error: Exception) -> BadCheckpoint:
    return BadCheckpoint(f"the weights of {spec} cannot be had ({_brief(error)}): give them as timm:{name}@FILE")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
