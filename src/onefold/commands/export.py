"""fused -> artifacts/<runtime>-<precision>/, for int8 calibrated on the user's own photos before."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import nn

from onefold import runtimes
from onefold.commands.bench import bench
from onefold.commands.evaluate import evaluate
from onefold.commands.held_out import photos_to_calibrate, records_of, to_card, validation_images
from onefold.commands.load import Saved, Source, chosen_weights
from onefold.commands.open_network import Floats, Network, open_network
from onefold.commands.predict import Predictions, predict, say_mismatch
from onefold.data import Dataset, Preprocessing, Subset
from onefold.data.fingerprint import TrainedOn, keys_of
from onefold.errors import BadArgument, BadCheckpoint, BadData, GateFailed
from onefold.models import CATALOGUE, cost, resolve
from onefold.models.hub import Card
from onefold.quantize import MINMAX, Method, QuantizationParams, Quantized, quantize
from onefold.quantize.method_search import search, skip_sensitive_layers
from onefold.reparam import unfused_norms
from onefold.runtimes import RUNTIMES, ModelInfo, find_runtime
from onefold.runtimes import export as export_to
from onefold.runtimes.onnx import opset_details

_log = logging.getLogger("onefold")

_FEWEST_TO_SEARCH = 8
_AGREEMENT_PHOTOS = 64  # at most, on which the int8 network is compared with the float one
_FEWEST_SAME = 0.8  # of its answers, below which calibration counts as failed
_FLAT = 0.02  # standard deviation of a prepared photo's channels, below which it is of one colour


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What an int8 network is made with: photos (a folder at any depth, shards, "digits"), how many, and how.

    `photos` are those of `data` to choose from; None leaves that to `photos_to_calibrate`. With `search` the method is
    only where a search by measured answers begins; `skip_layers`, those that cost most, stay in floating point.
    """

    data: str
    photos: Dataset | None = None
    count: int = 200
    method: Method = field(default_factory=Method)
    search: bool = False
    skip_layers: int = 0


@dataclass(frozen=True, kw_only=True)
class Int8Network:
    """An int8 network, and on which photos it was calibrated; None where its scales were trained."""

    made: Quantized
    calibrated_on: TrainedOn | None = None


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export to: runtimes by name, one precision, the side of the images in pixels (None: the card's).

    int8 needs `calibration`, unless the weights were trained for int8; no other precision takes it.
    `opset` is that of ONNX files, for an older ONNX Runtime.
    """

    runtimes: Sequence[str]
    precision: str = "fp32"
    size: int | None = None
    fused: bool = True
    tolerance: float | None = None
    calibration: Calibration | None = None
    opset: int | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Artifact(runtimes.Artifact, Saved):
    """An exported model on disk: what its manifest tells, and the verbs as methods.

    `artifact(images)` gives Predictions, as `predict` does; `evaluate` and `bench` are as the functions of that name.
    """

    predict = predict
    evaluate = evaluate
    bench = bench

    @classmethod
    def of(cls, artifact: runtimes.Artifact) -> Artifact:
        """Give an artifact with the verbs."""
        return cls(**{each.name: getattr(artifact, each.name) for each in fields(runtimes.Artifact)})

    def __call__(self, images: object) -> Predictions:
        """Predict the classes of paths, folders, PIL images, arrays, tensors, or a list of them."""
        return predict(self, images)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.input_shape))
        size = f"{self.num_bytes / 2**20:.1f} MiB"
        return f"Artifact({self.title}, {shape} -> {self.num_classes}, {size}, {str(self.folder)!r})"


@overload
def export(
    source: Source | nn.Module,
    to: str = "onnx",
    *,
    out: Source = "artifacts",
    precision: str = "fp32",
    data: Source | None = None,
    calibrate: int = 200,
    weight_bits: int = 8,
    per_tensor: bool = False,
    model: str | None = None,
    use_ema: bool | None = None,
    img_size: int | None = None,
    no_fuse: bool = False,
    opset: int | None = None,
) -> Artifact: ...
@overload
def export(
    source: Source | nn.Module,
    to: list[str] | tuple[str, ...],
    *,
    out: Source = "artifacts",
    precision: str = "fp32",
    data: Source | None = None,
    calibrate: int = 200,
    weight_bits: int = 8,
    per_tensor: bool = False,
    model: str | None = None,
    use_ema: bool | None = None,
    img_size: int | None = None,
    no_fuse: bool = False,
    opset: int | None = None,
) -> list[Artifact]: ...
def export(
    source: Source | nn.Module,
    to: str | list[str] | tuple[str, ...] = "onnx",
    *,
    out: Source = "artifacts",
    precision: str = "fp32",
    data: Source | None = None,
    calibrate: int = 200,
    weight_bits: int = 8,
    per_tensor: bool = False,
    model: str | None = None,
    use_ema: bool | None = None,
    img_size: int | None = None,
    no_fuse: bool = False,
    opset: int | None = None,
) -> Artifact | list[Artifact]:
    """Export a network to a runtime, fused, with its classes, its preprocessing and a reference output inside.

    `source` is a run folder, a file of weights, an id of the hub, timm:NAME, or a module in eval mode. Of one runtime
    (onnx, openvino, executorch, litert, ncnn, coreml, mnn, tensorrt, web) it gives the artifact, of a list of them a
    list; each lies in `out`/<runtime>-<precision>. The precision is fp32, fp16, bf16 or int8, which is calibrated on
    `calibrate` photos of `data`, a folder or "digits". `weight_bits` is 8, or 7 for x86 processors
    without VNNI; `per_tensor` takes one scale a weight tensor. `model` names the network where the weights do not, and
    says how images are prepared for a module; `img_size` is the side in pixels; `opset` that of ONNX files.

    Raises GateFailed where the runtime's answer is not PyTorch's, BadArgument, BadData, MissingExtra.

        artifact = onefold.export("runs/photos-finetune", "onnx", precision="int8", data="photos/")
        artifact("cat.jpg").names
    """
    names = [to] if isinstance(to, str) else list(to)
    if not names:
        raise BadArgument(f"there is no runtime to export to: give one or more of {', '.join(RUNTIMES)}")
    method = Method(weights="tensor" if per_tensor else "channel", weight_qmax=2 ** (weight_bits - 1) - 1)
    order = ExportOptions(
        runtimes=names,
        precision=precision,
        size=img_size,
        fused=not no_fuse,
        calibration=None if data is None else Calibration(data=os.fspath(data), count=calibrate, method=method),
        opset=opset,
    )
    network = network_of(source, model) if isinstance(source, nn.Module) else chosen_weights(source, use_ema)
    made = [Artifact.of(each) for each in export_network(network, Path(out), order, name=model)]
    return made[0] if isinstance(to, str) else made


def network_of(module: nn.Module, name: str | None) -> Network:
    """Give a module, in eval mode, as a network; by its `name` the catalogue says how images are prepared for it.

    Raises BadArgument where it is in train mode.
    """
    if module.training:
        raise BadArgument("the model is in train mode, where its logits depend on the batch; call model.eval() first")
    preprocessing = dict(CATALOGUE[resolve(name)].input) if name is not None else Preprocessing().to_dict()
    in_chans = next((int(m.in_channels) for m in module.modules() if isinstance(m, nn.Conv2d)), 3)
    if name is None:
        _log.info("a module does not say how images are prepared: taken as ImageNet's, 224 pixels (model=NAME says it)")
    if in_chans != 3:
        grey = {key: (sum(preprocessing[key]) / 3,) * in_chans for key in ("mean", "std")}
        preprocessing |= {**grey, "channels": in_chans}
    size = preprocessing["size"]
    with torch.inference_mode():
        logits = module(torch.zeros(1, in_chans, size, size, device=next(module.parameters()).device))
    title = name or type(module).__name__
    card = Card(
        model=resolve(name) if name is not None else title,
        num_classes=logits.shape[-1],
        in_chans=in_chans,
        preprocessing=preprocessing,
        fused=not unfused_norms(module),
        source="a module in memory",
    )
    return Network(model=module, card=card, title=title)


def export_network(
    source: str | Path | Network, out: Path, order: ExportOptions, *, name: str | None = None
) -> list[runtimes.Artifact]:
    """One verified artifact a runtime, in `out`/<runtime>-<precision>; weights are fused first unless told not to.

    Raises GateFailed where a runtime's answer is not PyTorch's, once the artifacts of the other runtimes are written.
    """
    details = {} if order.opset is None else opset_details(order.opset)
    if order.opset is not None and set(order.runtimes) != {"onnx"}:
        raise BadArgument("--opset is of ONNX files: give it with --to onnx alone")
    for runtime in order.runtimes:
        find_runtime(runtime)  # a wrong name is refused before minutes of calibration
    network = source if isinstance(source, Network) else open_network(source, name=name)
    if order.fused and not network.is_fused:
        network, _ = network.fused(order.tolerance)
    network = network.with_size(order.size)
    made = _quantized(network, order)
    if made is not None and order.calibration is not None:
        details |= _agreement(network, made, order.calibration)
    suffix = "" if network.is_fused else "-unfused"
    artifacts, failures = [], []
    for runtime in order.runtimes:
        folder = out / f"{runtime}-{order.precision}{suffix}"
        try:
            artifacts.append(export_made(network, made, folder, runtime, order.precision, details))
        except GateFailed as error:
            failures.append(str(error))
    if failures:
        written = ", ".join(str(artifact.folder) for artifact in artifacts)
        raise GateFailed("; ".join(failures) + (f"; these are written: {written}" if written else ""))
    return artifacts


def export_made(
    network: Network,
    made: Int8Network | None,
    folder: Path,
    runtime: str,
    precision: str,
    details: Mapping[str, object] | None = None,
) -> runtimes.Artifact:
    """One verified artifact of a network, or of the int8 network that was `made` of it; `details` for its manifest."""
    size, info = network.preprocessing.size, model_info(network, network.title, made)
    return export_to(
        network.model if made is None else made.made,
        (network.card.in_chans, size, size),
        folder,
        runtime=runtime,
        info=replace(info, details={**info.details, **(details or {})}),
        precision=precision,
    )


def _cost(network: Network) -> dict[str, int]:
    """What the exported network computes for one image, to compare its latency with the limits of a machine."""
    counted = cost(network.model, network.preprocessing.size)
    return {"params": counted.params, "macs": counted.macs}


def model_info(network: Network, source: str | Path, made: Int8Network | None = None) -> ModelInfo:
    """What an artifact's manifest says of a network, and of how it was quantized."""
    card = network.card
    records = records_of(network.title, card.trained_on)
    calibrated_on = None if made is None else made.calibrated_on
    return ModelInfo(
        model=card.model,
        fused=network.is_fused,
        drift=card.drift,
        classes=card.classes,
        preprocessing=network.preprocessing.to_dict(),
        licence=card.licence or None,
        source=card.source or str(source),
        details={
            "cost": _cost(network),
            **({} if made is None else quantization_details(made.made)),
            **({} if records is None else {"trained_on": to_card(records)}),
            **({} if calibrated_on is None else {"calibrated_on": to_card([calibrated_on])}),
            **({"untrained": True} if card.untrained else {}),
            **({} if card.num_classes else {"features": True}),
            **({"left_norms": network.left_norms} if network.left_norms else {}),
        },
    )


def _quantized(network: Network, order: ExportOptions) -> Int8Network | None:
    """The int8 network, where int8 is asked for. BadArgument where photos are missing or too many."""
    photos, wanted = order.calibration is not None, order.precision == "int8"
    if (photos and not wanted) or (wanted and not photos and network.card.int8 is None):
        raise BadArgument("int8 is calibrated on photos of the kind it will see: give --data with --precision int8")
    return quantized(network, order.calibration) if wanted else None


@torch.inference_mode()
def _agreement(network: Network, made: Int8Network, order: Calibration) -> dict[str, object]:
    """How often the int8 network answers as the float one, on photos; a warning where it does so too rarely.

    The photos are those that the run in `network.title` held out, where it is one and they are there: calibrated on
    black photos, or on another kind, a network is right on those alone. Else they are the photos of `order`.
    """
    if not network.card.num_classes:
        return {}
    try:
        photos, title = validation_images(network.title, None)
    except (BadArgument, BadData, BadCheckpoint):
        photos = order.photos or photos_to_calibrate(order.data, records_of(network.title, network.card.trained_on))
        title = f"{order.data}, which it was calibrated on"
    images = _images(Subset(photos, _spread(len(photos), _AGREEMENT_PHOTOS)), order, network.preprocessing)
    same = int((network.model(images).argmax(1) == made.made.model(images).argmax(1)).sum())
    varied = images.flatten(2).std(2).amax(1) > _FLAT  # within a channel; images have a deviation near 1
    if not bool(varied.any()):
        _log.warning("the photos of %s are of one colour each: what was calibrated on them is not to be trusted", title)
    if same < _FEWEST_SAME * len(images):
        _log.warning(
            "int8 calibrated on %s gives only %d of %d of the float network's answers on %s: calibrate on photos "
            "of the kind it will see, and score it with `onefold eval`",
            *(order.data, same, len(images), title),
        )
    return {"answers": f"{same} of {len(images)} are the float network's, on {title}"}


# ---------------------------------------------------------------------------------- int8 networks


def quantized(network: Network, order: Calibration | None, say: Callable[[str], None] | None = None) -> Int8Network:
    """The int8 network: with the scales it was trained with, where it was trained for int8, and else calibrated.

    Raises BadData where there are too few photos; BadArgument where it is not fused, where it was not trained so and
    there is no order, and where it was, and the order asks for something else.
    """
    if order is None or network.card.int8 is not None:
        return Int8Network(made=_as_trained(network, order))
    if not network.is_fused:
        raise BadArgument(f"{network.title} is not fused: an 8-bit network is made of the folded one")
    if network.left_norms:
        raise BadArgument(
            f"{network.title} is partly fused, {network.left_norms} norms follow no convolution: int8 is made of "
            "networks without norms; export it in fp32"
        )
    source = order.photos or photos_to_calibrate(order.data, records_of(network.title, network.card.trained_on))
    if order.count < 2:
        raise BadArgument(f"expected 2 photos or more to calibrate with, not {order.count}")
    source = Subset(source, _spread(len(source), order.count))
    images, method = _images(source, order, network.preprocessing), order.method
    if order.skip_layers:
        method = skip_sensitive_layers(network.model, images, method, order.skip_layers)
    if order.search and len(images) >= _FEWEST_TO_SEARCH:
        made = search(network.model, images, method, say or (lambda _: None))
    else:
        made = quantize(network.model, images, method)
    return Int8Network(made=made, calibrated_on=TrainedOn.of(keys_of(source, "content"), "content"))


def quantization_details(made: Quantized) -> dict[str, object]:
    """What an artifact's manifest says of its quantization; the noise of each layer in decibels."""
    layers = {
        each.name: {"output_db": round(each.output_db, 2), "weight_db": round(each.weight_db, 2)}
        for each in made.layers
        if each.quantized
    }
    return {
        "quantization": {
            "method": made.method.title if made.images else f"trained, per {made.method.weights}",
            "activations": "int8, asymmetric, per tensor",
            "weights": f"int8, symmetric, per {made.method.weights}, up to {made.method.weight_qmax}",
            "calibrated_on": made.images,
            "layers": layers,
        }
    }


def _as_trained(network: Network, order: Calibration | None) -> Quantized:
    """The int8 network with the scales it was trained with: options that contradict them are refused."""
    params = QuantizationParams.from_dict(network.card.int8 or {})
    if order is not None:
        method = order.method
        other = method.weights == "tensor" != params.weights or method.weight_qmax < params.weight_qmax
        if other or order.skip_layers:
            raise BadArgument(
                f"{network.title} was trained for 8 bits, weights per {params.weights} up to {params.weight_qmax}, "
                "and another network would lose what it has learnt: leave out --weight-bits, --per-tensor and "
                "--skip-layers, or train for them (onefold train --int8 --int8.limit 63, --int8.weights tensor)"
            )
        _log.warning("%s was trained for 8 bits and keeps its own: %s is not calibrated on", network.title, order.data)
    method = replace(MINMAX, weights=params.weights, weight_qmax=params.weight_qmax, skip_layers=params.skip_layers)
    return Quantized(model=network.int8_model(), method=method, layers=(), images=0)


def _images(source: Dataset, order: Calibration, preprocessing: Preprocessing) -> torch.Tensor:
    """The photos (B, C, H, W); what cannot be read is left out and named."""
    say_mismatch(source, preprocessing)
    photos: list[Floats] = []
    for index in range(len(source)):
        try:
            photos.append(preprocessing(source.image(index, value_range=preprocessing.value_range)))
        except BadData as error:
            left_out = index + 1 - len(photos)
            _log.warning("left out of calibration, %d of %d photos so far: %s", left_out, len(source), error)
    if len(photos) < 2:
        raise BadData(f"{order.data} has {len(photos)} photos that can be read: calibration needs 2, better 200")
    return torch.from_numpy(np.stack(photos))


def _spread(length: int, count: int) -> list[int]:
    """`count` of the indices below `length`, evenly; all where there are fewer."""
    return [i * length // count for i in range(count)] if length > count else list(range(length))
