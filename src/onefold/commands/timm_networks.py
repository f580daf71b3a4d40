"""timm's networks, opened as ours are: to distill from, and to be fused, exported and measured beside them.

    timm:NAME         random initialization, the same at each call: for latencies, which do not depend on the weights
    timm:NAME@FILE    the weights of a file

Randomly initialized networks have no accuracy, and everything made of them says so. Their norms are recalibrated on
synthetic images: as timm initializes them, the logits of some networks are near 1e14 and those of others do not depend
on the image, so that the parity of an artifact would prove nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.data import Preprocessing
from onefold.errors import BadArgument, BadCheckpoint, MissingExtra, NetworkFailed
from onefold.models.safe_load import read
from onefold.models.weights_file import Card, verify, write_weights
from onefold.reparam import fuse
from onefold.runtimes.reference_logits import make_images

PREFIX = "timm:"
_log = logging.getLogger("onefold")
_NUM_IMAGES = 8
_HEADER = 1 << 20  # bytes at the start of a file of ours in which its card stands


@dataclass(frozen=True, kw_only=True)
class TimmModel:
    """A network of timm in eval mode, its preprocessing, its license and the version of timm.

    `fixed_size` is the side of its images where it takes no other.
    """

    model: nn.Module
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    num_classes: int
    fixed_size: int | None
    licence: str
    version: str

    def card(self, file: Path | None) -> Card:
        """Give its card; `file` is where its weights are from, None where they are at random initialization."""
        untrained = file is None
        return Card(
            model=PREFIX + self.name,
            num_classes=self.num_classes,
            in_chans=self.preprocessing.channels,
            classes=None if untrained else self.classes,
            preprocessing=self.preprocessing.to_dict(),
            untrained=untrained,
            licence="Apache-2.0 (timm's code; random weights)" if untrained else self.licence,
            source=f"timm {self.version}, {'random weights: accuracy unknown' if untrained else f'from {file}'}",
        )


def is_timm(source: str | Path) -> bool:
    """Whether a source names a network of timm."""
    return str(source).startswith(PREFIX)


def open_timm(spec: str) -> tuple[nn.Module, Card]:
    """Open `timm:NAME` or `timm:NAME@FILE`, in eval mode, with its card.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    name, file = _split(spec)
    if file is not None:
        timm_model = _from_file(spec, name, file)
        return timm_model.model, timm_model.card(file)
    timm = _timm(spec, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            timm_model = _timm_model(timm, name, timm.create_model(name, pretrained=False))
        except (RuntimeError, ValueError) as error:
            raise BadArgument(
                f"timm does not make {name!r} ({_brief(error)}): give a name of timm.list_models()"
            ) from error
        init_norm_statistics_(timm_model.model, timm_model.preprocessing)
    return timm_model.model, timm_model.card(None)


def open_pretrained(spec: str) -> TimmModel:
    """Open `timm:NAME` with the weights that timm publishes on the hub, or `timm:NAME@FILE`.

    Raises as `open_timm`, and NetworkFailed where the hub cannot be reached.
    """
    name, file = _split(spec)
    if file is not None:
        return _from_file(spec, name, file)
    timm = _timm(spec, name)
    try:
        return _timm_model(timm, name, timm.create_model(name, pretrained=True))
    except (RuntimeError, ValueError) as error:
        raise _no_weights(spec, name, error) from error
    except Exception as error:  # the network raises errors of whatever package timm downloads with
        raise NetworkFailed(
            f"the weights of {spec} cannot be downloaded ({type(error).__name__}: {_brief(error)}): check the network "
            f"and HF_HUB_OFFLINE, or give them as timm:{name}@FILE"
        ) from error


def _from_file(spec: str, name: str, file: Path) -> TimmModel:
    """Open the network with as many classes as the last layer in the file has."""
    timm = _timm(spec, name)
    tensors = read(file).tensors
    last, first = (
        (names,) if isinstance(names, str) else tuple(names)  # distilled networks have two classifiers
        for names in (timm.get_pretrained_cfg_value(name, key) or () for key in ("classifier", "first_conv"))
    )
    heads = {len(tensors[f"{part}.weight"]) for part in last if f"{part}.weight" in tensors}
    if len(heads) != 1:
        missing = " or ".join(f"{part}.weight" for part in last)
        found = f"classifiers of {' and '.join(map(str, sorted(heads)))} classes" if heads else f"no {missing}"
        raise BadCheckpoint(f"{file} has {found}, the last layer of timm's {name}: it is of another model")
    stems = [tensors[f"{part}.weight"] for part in first if f"{part}.weight" in tensors]
    channels = next((int(stem.shape[1]) for stem in stems if stem.dim() == 4), 3)
    if channels not in (1, 3):
        raise BadCheckpoint(f"{file} takes images of {channels} channels: only grey and colour ones are known here")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=heads.pop(), in_chans=channels)
        model.load_state_dict(dict(tensors))
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_weights(spec, name, error) from error
    return _timm_model(timm, name, model, channels)


@torch.no_grad()
def init_norm_statistics_(model: nn.Module, preprocessing: Preprocessing) -> None:
    """Set the running statistics of every BatchNorm to those of synthetic images; in eval mode afterwards.

    Half are noise, as `Network.random_images`, and half of the kind that an artifact's reference output is made of:
    on images unlike those of their statistics, the logits of some networks are so large that rounding shows.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # one batch is the whole statistic
        norm.train()
    shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
    images = torch.from_numpy(make_images(shape, num_images=_NUM_IMAGES, seed=1))
    model(torch.cat([images, torch.randn(images.shape, generator=torch.Generator().manual_seed(1))]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


# ------------------------------------------------------------------------ in our file format


def save_timm(model: nn.Module, path: Path, card: Card) -> None:
    """Write a fused network of timm to a file of our own format, for `load_stored_timm`. Raises NotWritable."""
    write_weights(model, path, card)


def load_stored_timm(path: Path) -> tuple[nn.Module, Card] | None:
    """Read a network of timm, in eval mode, from a file of our own format; None where the file holds something else.

    Raises BadCheckpoint where the file is damaged or of another timm, MissingExtra.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if PREFIX.encode() not in file.read(_HEADER):
            return None
    contents = read(path)
    if f'"model": "{PREFIX}' not in contents.metadata.get("card", ""):
        return None
    card = verify(contents, path)
    name = card.model.removeprefix(PREFIX)
    timm = _timm(card.model, name)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=card.num_classes, in_chans=card.in_chans)
    try:
        model = fuse(model.eval()) if card.fused else model.eval()
        model.load_state_dict(contents.tensors)
    except RuntimeError as error:
        raise BadCheckpoint(
            f"{path} does not fit {card.model} of timm {timm.__version__} ({_brief(error)}): it is {card.source}; "
            "fuse the network again"
        ) from error
    return model, card


# -------------------------------------------------------------------------------- the package


def _split(spec: str) -> tuple[str, Path | None]:
    name, at, file = spec.removeprefix(PREFIX).partition("@")
    if at and not file:
        raise BadArgument(f"{spec} has no file after its @: give timm:{name}@FILE, or timm:{name} for random weights")
    return name, Path(file) if at else None


def _timm(spec: str, name: str) -> Any:
    """Import timm. Raises MissingExtra where it cannot be, BadArgument where it has no such model."""
    try:
        import timm
    except RuntimeError as error:
        raise MissingExtra(
            f"{spec} needs timm, and the torchvision that timm imports was built for another torch ({error}): install "
            "the two from one place, as pytorch.org says"
        ) from error
    except ImportError as error:
        raise MissingExtra(
            f"{spec} needs timm, and it cannot be imported ({error}): pip install 'onefold[timm]'"
        ) from error
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = timm.list_models(f"*{base[:8]}*")[:3] if base else []
        raise BadArgument(f"timm has no model {name!r}" + (f": did you mean {' or '.join(near)}?" if near else ""))
    return timm


def _timm_model(timm: Any, name: str, model: Any, in_chans: int | None = None) -> TimmModel:
    config: Mapping[str, Any] = model.pretrained_cfg
    channels, height, width = config["input_size"]
    if height != width or channels not in (1, 3):
        raise BadArgument(f"timm's {name} takes images of {channels}x{height}x{width}: only square ones are known here")
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if in_chans == 1 and channels == 3:  # its configuration is that of the colour network
        channels, mean, std = 1, (sum(mean) / len(mean),), (sum(std) / len(std),)
        _log.info("%s has one channel: its mean and std are the averages of the colour network's", name)
    names = config.get("label_names")
    preprocessing = Preprocessing(
        size=int(height),
        crop_pct=float(config.get("crop_pct") or 0.875),
        mean=mean,
        std=std,
        interpolation=config.get("interpolation") or "bilinear",
        channels=1 if channels == 1 else 3,
    )
    return TimmModel(
        model=model.eval(),
        name=name,
        preprocessing=preprocessing,
        classes=tuple(names) if names and len(names) == model.num_classes else None,
        num_classes=int(model.num_classes),
        fixed_size=int(height) if config.get("fixed_input_size") else None,
        licence=str(config.get("license") or "") if "." in name else "",  # without a tag the license is unknown
        version=str(timm.__version__),
    )


def _no_weights(spec: str, name: str, error: Exception) -> BadCheckpoint:
    return BadCheckpoint(f"the weights of {spec} cannot be had ({_brief(error)}): give them as timm:{name}@FILE")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
