"""fused -> artifacts/<runtime>-<precision>/, for int8 calibrated on the user's own photos before."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import overload

import torch
from torch import nn

from onefold import runtimes
from onefold.accuracy_intervals import wilson_interval
from onefold.commands.bench import bench
from onefold.commands.calibration_cache import (
    CalibrationOptions,
    Int8Network,
    calibrated_network,
    load_calibration_images,
    quantization_details,
)
from onefold.commands.deploy_steps import export_steps
from onefold.commands.evaluate import evaluate
from onefold.commands.held_out_images import (
    calibration_photos,
    count_trained_images,
    records_to_dict,
    training_records,
    validation_images,
)
from onefold.commands.input_checks import check_int8_options
from onefold.commands.open_network import Network, open_network
from onefold.commands.optional_dependencies import extras_for_sources, require_extras
from onefold.commands.predict import Predictions, predict
from onefold.commands.predictor import SavedResult, Source, select_ema_weights, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.data import Preprocessing, Subset
from onefold.data.fingerprint import evenly_spaced, find_trained_copies
from onefold.errors import BadArgument, BadCheckpoint, BadData, GateFailed
from onefold.models import CATALOGUE, count_flops, resolve_name
from onefold.models.checkpoint_metadata import adapt_preprocessing_to_channels
from onefold.models.load_model import Card
from onefold.quantize import QuantizationMethod
from onefold.reparam import unfused_norms
from onefold.report.format import plain_size
from onefold.runtimes import RUNTIMES, ModelInfo, import_runtime
from onefold.runtimes.exporter import TracedModel
from onefold.runtimes.onnx import opset_details

_log = logging.getLogger("onefold")

_AGREEMENT_PHOTOS = 64  # at most, on which the int8 network is compared with the float one
_FEWEST_SAME = 80  # per cent of its answers, below which calibration counts as failed


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export to: runtimes by name, one precision, the side of the images in pixels (None: the card's).

    int8 needs `calibration` on photos, unless the weights were trained for int8; no other precision takes any.
    `opset` is that of ONNX files, for an older ONNX Runtime.
    """

    runtimes: Sequence[str]
    precision: str = "fp32"
    size: int | None = None
    fused: bool = True
    tolerance: float | None = None
    calibration: CalibrationOptions | None = None
    opset: int | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Artifact(runtimes.Artifact, SavedResult):
    """An exported model on disk: what its manifest tells, and the verbs as methods.

    `artifact(images)` gives Predictions, as `predict` does; `evaluate` and `bench` are as the functions of that name.
    """

    predict = predict
    evaluate = evaluate
    bench = bench

    @classmethod
    def from_exported(cls, artifact: runtimes.Artifact) -> Artifact:
        """Give an artifact with the verbs."""
        return cls(**{each.name: getattr(artifact, each.name) for each in fields(runtimes.Artifact)})

    def __call__(self, images: object) -> Predictions:
        """Predict the classes of paths, folders, PIL images, arrays, tensors, or a list of them."""
        return predict(self, images)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.input_shape))
        size = plain_size(self.num_bytes)
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
@suggest_argument_names
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

    Raises GateFailed where the runtime's answer is not PyTorch's, or the int8 network's is too rarely the float
    network's (see `check_int8_agreement`), BadArgument, BadData, MissingExtra.

        artifact = onefold.export("runs/photos-finetune", "onnx", precision="int8", data="photos/")
        artifact("cat.jpg").names
    """
    names = [to] if isinstance(to, str) else list(to)
    if not names:
        raise BadArgument(f"there is no runtime to export to: give one or more of {', '.join(RUNTIMES)}")
    method = QuantizationMethod(weights="tensor" if per_tensor else "channel", weight_qmax=2 ** (weight_bits - 1) - 1)
    order = ExportOptions(
        runtimes=names,
        precision=precision,
        size=img_size,
        fused=not no_fuse,
        calibration=CalibrationOptions(data="" if data is None else os.fspath(data), count=calibrate, method=method),
        opset=opset,
    )
    network = (
        network_from_module(source, model) if isinstance(source, nn.Module) else select_ema_weights(source, use_ema)
    )
    with show_progress():
        made = [Artifact.from_exported(each) for each in export_to_runtimes(network, Path(out), order, name=model)]
    return made[0] if isinstance(to, str) else made


def network_from_module(module: nn.Module, name: str | None) -> Network:
    """Give a module, in eval mode, as a network; by its `name` the catalogue says how images are prepared for it.

    Raises BadArgument where it is in train mode.
    """
    if module.training:
        raise BadArgument("the model is in train mode, where its logits depend on the batch; call model.eval() first")
    preprocessing = dict(CATALOGUE[resolve_name(name)].input) if name is not None else Preprocessing().to_dict()
    in_chans = next((int(m.in_channels) for m in module.modules() if isinstance(m, nn.Conv2d)), 3)
    if name is None:
        _log.info("a module does not say how images are prepared: taken as ImageNet's, 224 pixels (model=NAME says it)")
    preprocessing = adapt_preprocessing_to_channels(preprocessing, in_chans)
    size = preprocessing["size"]
    with torch.inference_mode():
        logits = module(torch.zeros(1, in_chans, size, size, device=next(module.parameters()).device))
    title = name or type(module).__name__
    card = Card(
        model=resolve_name(name) if name is not None else title,
        num_classes=logits.shape[-1],
        in_chans=in_chans,
        preprocessing=preprocessing,
        fused=not unfused_norms(module),
        source="a module in memory",
    )
    return Network(model=module, card=card, title=title)


def export_to_runtimes(
    source: str | Path | Network, out: Path, order: ExportOptions, *, name: str | None = None
) -> list[runtimes.Artifact]:
    """One verified artifact a runtime, in `out`/<runtime>-<precision>; weights are fused first unless told not to.

    Raises GateFailed where a runtime's answer is not PyTorch's, once the artifacts of the other runtimes are written;
    as `check_int8_agreement` does, before any is.
    """
    details = {} if order.opset is None else opset_details(order.opset)
    if order.opset is not None and set(order.runtimes) != {"onnx"}:
        raise BadArgument("--opset is of ONNX files: give it with --to onnx alone")
    for runtime in order.runtimes:
        import_runtime(runtime)  # a wrong name is refused before minutes of calibration
    given = order.calibration or CalibrationOptions()
    check_int8_options(order.precision, data=given.data, other_method=given.method != QuantizationMethod())
    data = None if order.calibration is None else order.calibration.data
    require_extras([*order.runtimes, *extras_for_sources(source, data)])
    network = source if isinstance(source, Network) else open_network(source, name=name)
    if order.fused and not network.is_fused:
        network, drift = network.fused(order.tolerance)
        _log.info("%s is not fused: fused for the export, drift %.1e", network.title, drift)
    network = network.with_size(order.size)
    checked = order.precision == "int8" and order.calibration is not None and bool(order.calibration.data)
    steps = export_steps(order.runtimes, order.calibration if checked else None, _cost(network)["macs"])
    if checked:
        steps.begin(0)
    made = _quantized(network, order)
    if made is not None and order.calibration is not None and checked:
        steps.begin(1)
        details |= check_int8_agreement(network, made, order.calibration)
    suffix, traced = "" if network.is_fused else "-unfused", trace(network, made)
    artifacts, failures = [], []
    for number, runtime in enumerate(order.runtimes):
        steps.begin(number + 2 * checked)
        folder = out / f"{runtime}-{order.precision}{suffix}"
        try:
            artifacts.append(export_artifact(network, made, folder, runtime, order.precision, details, traced))
        except GateFailed as error:
            failures.append(str(error))
    steps.end()
    if failures:
        written = ", ".join(str(artifact.folder) for artifact in artifacts)
        raise GateFailed("; ".join(failures) + (f"; these are written: {written}" if written else ""))
    return artifacts


def export_artifact(
    network: Network,
    made: Int8Network | None,
    folder: Path,
    runtime: str,
    precision: str,
    details: Mapping[str, object] | None = None,
    traced: TracedModel | None = None,
) -> runtimes.Artifact:
    """One verified artifact of a network, or of the int8 network that was `made` of it; `details` for its manifest.

    `traced` is what `trace` gave for the same two, to export to several runtimes in less time.
    """
    info = model_info(network, network.title, made)
    info = replace(info, details={**info.details, **(details or {})})
    return (traced or trace(network, made)).export(folder, runtime=runtime, info=info, precision=precision)


def trace(network: Network, made: Int8Network | None) -> TracedModel:
    """What all artifacts of a network, or of the int8 network that was made of it, have in common."""
    shape = (network.card.in_chans, network.preprocessing.size, network.preprocessing.size)
    return TracedModel(network.model if made is None else made.made, shape)


def _cost(network: Network) -> dict[str, int]:
    """What the exported network computes for one image, to compare its latency with the limits of a machine."""
    counted = count_flops(network.model, network.preprocessing.size)
    return {"params": counted.params, "macs": counted.macs}


def model_info(network: Network, source: str | Path, made: Int8Network | None = None) -> ModelInfo:
    """What an artifact's manifest says of a network, and of how it was quantized."""
    card = network.card
    records = training_records(network.title, card.trained_on)
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
            "network": network.digest,
            **({} if made is None else quantization_details(made.made)),
            **({} if records is None else {"trained_on": records_to_dict(records)}),
            **({} if calibrated_on is None else {"calibrated_on": records_to_dict([calibrated_on])}),
            **({"untrained": True} if card.untrained else {}),
            **({} if card.num_classes else {"features": True}),
            **({"left_norms": network.left_norms} if network.left_norms else {}),
        },
    )


def _quantized(network: Network, order: ExportOptions) -> Int8Network | None:
    """The int8 network, where int8 is asked for. BadArgument where photos are missing."""
    given, wanted = order.calibration or CalibrationOptions(), order.precision == "int8"
    if wanted and not given.data and network.card.int8 is None:
        raise BadArgument("int8 is calibrated on photos of the kind it will see: give --data FOLDER with them")
    return calibrated_network(network, order.calibration) if wanted else None


@torch.inference_mode()
def check_int8_agreement(network: Network, made: Int8Network, order: CalibrationOptions) -> dict[str, object]:
    """How often the int8 network answers as the float one, on photos; a warning where that is in fewer than 80 %.

    The photos are those that the run in `network.title` held out, where it is one and they are there: calibrated on
    another kind of photos, a network is right on those alone. Else they are the photos of `order`.

    Raises GateFailed where it is in fewer than 80 % by more than chance explains, that is, where the 95 % interval of
    the share lies below that: calibration has destroyed the network.
    """
    if not network.card.num_classes:
        return {}
    calibrated = () if made.calibrated_on is None else (made.calibrated_on,)
    try:
        photos, title = validation_images(network.title, None)
    except (BadArgument, BadData, BadCheckpoint):
        photos = order.photos or calibration_photos(
            order.data, training_records(network.title, network.card.trained_on)
        )
        title, calibrated = f"{order.data}, which it was calibrated on", ()
    photos = Subset(photos, evenly_spaced(len(photos), _AGREEMENT_PHOTOS))
    copies = find_trained_copies(calibrated, photos, network.preprocessing.value_range)
    if seen := (count_trained_images(calibrated, photos) or 0) + (copies.found if copies else 0):
        title += f", {seen} of which, or copies of them, calibrated it"
    images = load_calibration_images(photos, order, network.preprocessing)
    if network.name_check is not None:
        network.name_check.warn(images.numpy())
    same = int((network.model(images).argmax(1) == made.made.model(images).argmax(1)).sum())
    if 100 * same < _FEWEST_SAME * len(images) and not network.card.untrained:
        how = "trained for 8 bits" if made.calibrated_on is None else f"calibrated on {order.data}"
        found = f"int8 {how} agrees with fp32 on only {same} of {len(images)} photos of {title}"
        _, high = wilson_interval(same, len(images))
        if high < _FEWEST_SAME and made.calibrated_on is not None:
            raise GateFailed(
                f"{found}, at most {high:.0f} % of all, and {_FEWEST_SAME} % are required, so no artifact is written: "
                "calibrate on more photos, of the kind that it will see, or train for 8 bits (onefold train --int8)"
            )
        _log.warning("%s: calibrate on photos of the kind it will see, and score it with `onefold eval`", found)
    return {"answers": f"int8 agrees with fp32 on {same} of {len(images)} photos of {title}"}
