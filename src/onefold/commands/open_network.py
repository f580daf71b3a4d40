"""Open the torch network that a user names: of a run folder, a file of weights, an id of the hub, timm:NAME."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from onefold.commands.predictor import Floats, Predictor, is_timm, resolve_weights_file, untrained_facts
from onefold.commands.saved_recipe import describe_unfinished_run
from onefold.commands.timm_networks import load_stored_timm, load_timm, open_timm
from onefold.data import Preprocessing
from onefold.data.preprocessing import IMAGENET_PREPROCESSING
from onefold.errors import BadArgument, GateFailed, NonFiniteLoss
from onefold.models import count_flops
from onefold.models.checkpoint_metadata import adapt_preprocessing_to_channels
from onefold.models.load_model import Card, load_model, matching_model_names
from onefold.models.weights_file import tensors_sha256
from onefold.progress_steps import show_step
from onefold.quantize import IntegerModel, ModelQParams
from onefold.quantize.convert import convert
from onefold.reparam import drift, fuse, unfused_norms
from onefold.reparam.drift import float64_drift

_log = logging.getLogger("onefold")

_TOLERANCE = 1e-4
"""The drift in float32 that passes at once: rounding gives 1e-6 to 1e-5 in most networks, a wrong fold 1e-2. What is
more is computed in float64, where 16 times the network's own rounding may pass: see `Network.fused`."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A torch network in eval mode and its card; `title` is the path or name that the user gave.

    `name_check` is there where the weights do not tell whether they are of the network that the user named.
    """

    model: nn.Module
    card: Card
    title: str
    name_check: ModelNameCheck | None = None

    @property
    def is_fused(self) -> bool:
        """Whether there is nothing left to fold in it; norms that no layer takes may be left, see `left_norms`."""
        return self.card.fused or not unfused_norms(self.model)

    @property
    def left_norms(self) -> int:
        """How many norms fusing has left, as those before their convolution in DenseNet; 0 of one not fused yet."""
        return len(unfused_norms(self.model)) if self.card.fused else 0

    @property
    def preprocessing(self) -> Preprocessing:
        """How its images are prepared."""
        stated = {**IMAGENET_PREPROCESSING.to_dict(), **self.card.preprocessing}
        return Preprocessing.from_dict(adapt_preprocessing_to_channels(stated, self.card.in_chans))

    @property
    def digest(self) -> str:
        """The digest of all that its answers depend on: of one network at two sizes, none is the other."""
        precision = "int8" if self.is_fused and self.card.int8 is not None else "fp32"
        facts = [tensors_sha256(self.model.state_dict()), precision, self.preprocessing.to_dict(), self.card.int8]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def fused(self, tolerance: float | None = None) -> tuple[Network, float]:
        """Give the fused network and its drift.

        A drift above `tolerance` (TOLERANCE) in float32 is computed again in float64, and there it may be as large as
        the network's own rounding explains, `float64_drift`'s bound, unless a tolerance was given: a network that
        magnifies rounding passed on one thread and failed on two.

        Raises GateFailed where the drift is more than that, NonFiniteLoss where the network itself computes no
        finite logits: then its training has diverged, and fusing is not to blame.
        """
        with show_step("fusing"):
            fused, images = fuse(self.model), self.random_images()
            distance = drift(self.model, fused, images)
        if not math.isfinite(distance):
            with torch.inference_mode():
                if not self.model(images).isfinite().all():
                    raise NonFiniteLoss(
                        f"{self.title}: the network's logits are not finite, so its training has diverged: "
                        "train again with a lower plan.optimizer.lr"
                    )
        if not distance <= (_TOLERANCE if tolerance is None else tolerance):
            rounded, (distance, allowed) = distance, float64_drift(self.model, fused, (images,))
            allowed = max(_TOLERANCE, allowed) if tolerance is None else tolerance
            if not distance <= allowed:
                raise GateFailed(
                    f"{self.title}: the fused network's logits differ by {distance:.2g} in float64, and {allowed:.2g} "
                    "is allowed; are the norms' running statistics those of trained weights?"
                )
            _log.info(
                "%s: fused, its logits differ by %.2g in float32, which is this network's own rounding: by %.2g in "
                "float64, and %.2g is allowed",
                *(self.title, rounded, distance, allowed),
            )
        facts = {**self.card.to_dict(), "fused": True, "drift": distance}
        return replace(self, model=fused, card=Card(**facts)), distance

    def int8_model(self) -> IntegerModel:
        """Give the int8 model that fused weights were trained as. Raises BadArgument where they were not."""
        if self.card.int8 is None or not self.is_fused:
            why = "was not trained for int8" if self.card.int8 is None else "is not fused"
            raise BadArgument(f"{self.title} {why}: give photos to calibrate it with (--data)")
        size = self.preprocessing.size
        return convert(self.model, ModelQParams.from_dict(self.card.int8), (self.card.in_chans, size, size))

    def with_size(self, size: int | None) -> Network:
        """Give the network with a preprocessing to images of another size, which is logged; None leaves it."""
        if size is None or size == self.preprocessing.size:
            return self
        text = "%s: its images are %d pixels here (--img-size), and %d by its card, for which its accuracy holds"
        _log.info(text, self.title, size, self.preprocessing.size)
        resized = Preprocessing.from_dict({**self.preprocessing.to_dict(), "size": size})
        return replace(self, card=replace(self.card, preprocessing=resized.to_dict()))

    def random_images(self, count: int = 2) -> torch.Tensor:
        """Give images of normal noise (count, C, H, W) of the size it is used on, the same at each call."""
        size = self.preprocessing.size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, self.card.in_chans, size, size, generator=generator)


@dataclass(frozen=True, kw_only=True)
class ModelNameCheck:
    """Whether weights are those of the network that the user named, by the statistics that its norms have stored.

    Tensors alone do not tell padding, activation and epsilon. Under the wrong ones the maps on photos have another mean
    and variance than in training: those of Google's MobileNetV1 of width 0.25 differ by 0.30 on four photos under its
    own name and by 1.14 under the paper's, on sixteen photos by 0.14 and 1.28.
    """

    network: Network
    source: str | Path
    others: tuple[str, ...]

    @classmethod
    def from_network(cls, network: Network, source: str | Path, name: str | None) -> ModelNameCheck | None:
        """Give the check; None where the weights tell what they are, or have no norms any more."""
        if name is None or is_timm(source) or is_timm(name) or network.is_fused:
            return None
        others = tuple(
            other for other in matching_model_names(resolve_weights_file(source), name) if other != network.card.model
        )
        return cls(network=network, source=source, others=others) if others else None

    def __call__(self, images: Floats) -> str | None:
        """Give a sentence where photos (B, C, H, W), prepared for the network, do not show that its name fits.

        So where another name fits clearly better, and where neither does: then nothing tells which one is right.
        """
        own, card = torch.from_numpy(np.ascontiguousarray(images[:_CHECKED])), self.network.card
        ours, distances = self.network.preprocessing, {card.model: _norm_distance(self.network.model, own)}
        for other in self.others:
            model, its = load_model(resolve_weights_file(self.source), name=other, in_chans=ours.channels, quiet=True)
            theirs = Preprocessing.from_dict(its.preprocessing)
            mean, std, its_mean, its_std = (
                torch.tensor(values).view(1, -1, 1, 1) for values in (ours.mean, ours.std, theirs.mean, theirs.std)
            )
            distances[other] = _norm_distance(model, (own * std + mean - its_mean) / its_std)
        best, distance = min(distances.values()), distances[card.model]
        nearest = min(value for name, value in distances.items() if name != card.model)
        if not distance > _SAME or distance * _CLEARLY <= nearest:  # so that NaN says nothing
            return None
        if not (best <= _FITS and distance > _CLEARLY * best):
            others = " or ".join(name for name in distances if name != card.model)
            return (
                f"whether {self.source} is {card.model}, or {others}, {_UNDECIDED} at {ours.size} "
                f"pixels: their maps differ from the statistics stored in its norms by {distance:.2f} and {nearest:.2f}"
            )
        better = [name for name, value in distances.items() if value <= 1.1 * best]
        return (
            f"{self.source} does not seem to be {card.model}: on these photos its maps differ from the statistics "
            f"stored in its norms by {distance:.2f}, and by {best:.2f} under --model {' or '.join(better)}"
        )

    def warn(self, images: Floats) -> None:
        """Log a warning where another name fits clearly better; that nothing tells it was said when they were read."""
        if (doubt := self(images)) and _UNDECIDED not in doubt:
            _log.warning("%s", doubt)


_UNDECIDED = "cannot be told from these photos"
_CHECKED = 8  # photos that a check looks at
_CLEARLY, _FITS = 1.3, 1.0  # how many times nearer another name has to be, and how near
_SAME = 0.01  # a distance that leaves no doubt of a name, whatever the others' are


def _norm_distance(model: nn.Module, images: torch.Tensor) -> float:
    """Give how far the maps on images are from the statistics of the norms that they enter; 0 where they are the same.

    It is the mean over the norms of two medians over channels: of the difference of means, in deviations, and of the
    logarithm of the ratio of variances.
    """
    distances: list[float] = []

    def compare(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.running_mean is None or norm.running_var is None:
            return
        var, mean = torch.var_mean(args[0], (0, 2, 3), correction=0)
        stored = norm.running_var + norm.eps
        shift = (mean - norm.running_mean).abs() / stored.sqrt()
        distances.append(float(shift.median() + ((var + norm.eps) / stored).log().abs().median()))

    hooks = [m.register_forward_pre_hook(compare) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return float(np.mean(distances)) if distances else 0.0


def open_network(source: str | Path, *, name: str | None = None) -> Network:
    """Open the torch network of a run (its best weights), a file of weights, an id of the hub, or `timm:NAME`.

    With `name` timm:NAME a file or an id of the hub holds weights of that network of timm.
    """
    with show_step("opening the network"):
        return _opened_network(source, name)


def _opened_network(source: str | Path, name: str | None) -> Network:
    if is_timm(source):
        model, card = open_timm(str(source))
        return Network(model=model, card=card, title=str(source))
    file = resolve_weights_file(source)
    if file != source and (unfinished := describe_unfinished_run(Path(file).parent.parent)):
        _log.warning("%s", unfinished)
    if name is not None and is_timm(name):
        model, card = load_timm(name, file)
    else:
        model, card = load_stored_timm(Path(file)) or load_model(file, name=name)
    if not card.num_classes:
        _log.info("%s has no last layer: its outputs are features and no classes", source)
    network = Network(model=model.eval(), card=card, title=str(source))
    return replace(network, name_check=ModelNameCheck.from_network(network, source, name))


def make_predictor(network: Network, *, threads: int = 1) -> Predictor:
    """Give a predictor of a torch network; one that was trained for int8, and is fused, computes as that."""
    card, size = network.card, network.preprocessing.size
    is_int8 = network.is_fused and card.int8 is not None
    flops = count_flops(network.model, size)
    precision = "int8" if is_int8 else "fp32"
    facts = {
        "model": card.model,
        "runtime": "PyTorch",
        "precision": precision,
        "fused": network.is_fused,
        "drift": card.drift,
        "input_shape": (card.in_chans, size, size),
        "params": flops.params,
        "macs": flops.macs,
        "sha256": network.digest,
        "source": Path(network.title).name,
        **untrained_facts(card.untrained),
        **({"left_norms": network.left_norms} if network.left_norms else {}),
    }
    return Predictor(
        session=_TorchSession(network.int8_model() if is_int8 else network.model, threads),
        classes=card.classes,
        num_classes=card.num_classes,
        preprocessing=network.preprocessing,
        facts=facts,
        trained_on=card.trained_on,
        name_check=network.name_check,
    )


@dataclass(frozen=True, eq=False)
class _TorchSession:
    """A torch network from numpy to numpy; torch's number of threads is the process's, so it is set at each call."""

    model: nn.Module
    threads: int

    def __call__(self, images: Floats) -> Floats:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            logits: Floats = self.model(torch.from_numpy(images)).numpy()
        return logits

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
