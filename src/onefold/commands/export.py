"""fused -> artifacts/<runtime>-<precision>/, for int8 calibrated on the user's own photos before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from onefold.commands.open import TOLERANCE, Floats, Network, open_network
from onefold.commands.predict import say_mismatch
from onefold.data import Dataset, Preprocessing, find_images, open_dataset
from onefold.data.folders import ImageFiles
from onefold.errors import BadArgument, BadData, GateFailed
from onefold.models import cost
from onefold.quantize import MINMAX, Method, QuantizationParams, Quantized, quantize
from onefold.quantize.method_search import search, skip_sensitive_layers
from onefold.runtimes import Artifact, ModelInfo
from onefold.runtimes import export as export_to

_log = logging.getLogger("onefold")

_FEWEST_TO_SEARCH = 8
_HELD_OUT = 0.2  # of photos in class folders without a split: kept for scoring


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What an 8-bit network is made with: photos (a folder at any depth, shards, "digits"), how many, and how.

    With `search` the method is only where a search by measured answers begins; `keep` layers, those that cost most,
    stay in floating point.
    """

    data: str
    count: int = 200
    method: Method = field(default_factory=Method)
    search: bool = False
    skip_layers: int = 0


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export to: runtimes by name, one precision, the side of the images in pixels (None: the card's).

    int8 needs `calibration`, unless the weights were trained as a network of 8 bits; no other precision takes it.
    """

    runtimes: Sequence[str]
    precision: str = "fp32"
    size: int | None = None
    fused: bool = True
    tolerance: float = TOLERANCE
    calibration: Calibration | None = None


def export(source: str | Path, out: Path, order: ExportOptions, *, name: str | None = None) -> list[Artifact]:
    """One verified artifact a runtime, in `out`/<runtime>-<precision>; weights are fused first unless told not to.

    Raises GateFailed where a runtime's answer is not PyTorch's, once the artifacts of the other runtimes are written.
    """
    network = open_network(source, name=name)
    if order.fused and not network.is_fused:
        network, _ = network.fused(order.tolerance)
    network = network.with_size(order.size)
    made = _quantized(network, order)
    suffix = "" if network.is_fused else "-unfused"
    artifacts, failures = [], []
    for runtime in order.runtimes:
        folder = out / f"{runtime}-{order.precision}{suffix}"
        try:
            artifacts.append(export_made(network, made, folder, runtime, order.precision))
        except GateFailed as error:
            failures.append(str(error))
    if failures:
        written = ", ".join(str(artifact.folder) for artifact in artifacts)
        raise GateFailed("; ".join(failures) + (f"; these are written: {written}" if written else ""))
    return artifacts


def export_made(network: Network, made: Quantized | None, folder: Path, runtime: str, precision: str) -> Artifact:
    """One verified artifact of a network, or of the one of 8 bits that was `made` of it."""
    size = network.preprocessing.size
    return export_to(
        network.model if made is None else made,
        (network.card.in_chans, size, size),
        folder,
        runtime=runtime,
        info=model_info(network, network.title, made),
        precision=precision,
    )


def _cost(network: Network) -> dict[str, int]:
    """What the exported network computes for one image, for whoever holds its latency against the machine's limits."""
    counted = cost(network.model, network.preprocessing.size)
    return {"params": counted.params, "macs": counted.macs}


def model_info(network: Network, source: str | Path, made: Quantized | None = None) -> ModelInfo:
    """What an artifact's manifest says of a network, and of how it was quantized."""
    card = network.card
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
            **({} if made is None else told(made)),
            **({"untrained": True} if card.untrained else {}),
        },
    )


def _quantized(network: Network, order: ExportOptions) -> Quantized | None:
    """The network of 8 bits, where that is what is asked for. BadArgument where photos are missing or too many."""
    photos, wanted = order.calibration is not None, order.precision == "int8"
    if (photos and not wanted) or (wanted and not photos and network.card.int8 is None):
        raise BadArgument("int8 is calibrated on photos of the kind it will see: give --data with --precision int8")
    return quantized(network, order.calibration) if wanted else None


# ---------------------------------------------------------------------------------- int8 networks


def quantized(network: Network, order: Calibration | None, say: Callable[[str], None] | None = None) -> Quantized:
    """The network of 8 bits: calibrated, or without an order as it was trained.

    Raises BadData where there are too few photos, BadArgument where it is not fused, or was not trained so.
    """
    if order is None:
        return _as_trained(network)
    if not network.is_fused:
        raise BadArgument(f"{network.title} is not fused: an 8-bit network is made of the folded one")
    images, method = _images(order, network.preprocessing), order.method
    if order.skip_layers:
        method = skip_sensitive_layers(network.model, images, method, order.skip_layers)
    if order.search and len(images) >= _FEWEST_TO_SEARCH:
        return search(network.model, images, method, say or (lambda _: None))
    return quantize(network.model, images, method)


def told(made: Quantized) -> dict[str, object]:
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


def _as_trained(network: Network) -> Quantized:
    whole = network.int8_model()
    params = QuantizationParams.from_dict(network.card.int8 or {})
    method = replace(MINMAX, weights=params.weights, weight_qmax=params.weight_qmax, skip_layers=params.skip_layers)
    return Quantized(model=whole, method=method, layers=(), images=0)


def _images(order: Calibration, preprocessing: Preprocessing) -> torch.Tensor:
    """The photos (B, C, H, W), chosen evenly; what cannot be read is left out and named."""
    if order.count < 2:
        raise BadArgument(f"expected 2 photos or more to calibrate with, not {order.count}")
    source = _photos(order.data)
    say_mismatch(source, preprocessing)
    chosen, photos = _spread(len(source), order.count), list[Floats]()
    for number, index in enumerate(chosen):
        try:
            photos.append(preprocessing(source.image(index, value_range=preprocessing.value_range)))
        except BadData as error:
            left_out = number + 1 - len(photos)
            _log.warning("left out of calibration, %d of %d photos so far: %s", left_out, len(chosen), error)
    if len(photos) < 2:
        raise BadData(f"{order.data} has {len(photos)} photos that can be read: calibration needs 2, better 200")
    return torch.from_numpy(np.stack(photos))


def _photos(data: str) -> Dataset:
    """The training part where the photos have classes, else all of them."""
    try:
        return open_dataset(data, "train", seed=0, val_fraction=_HELD_OUT)
    except BadData:
        return unlabelled(data)


def held_out(data: str) -> Dataset:
    """The labelled photos that calibration does not see. Raises BadData where there are none."""
    return open_dataset(data, "val", seed=0, val_fraction=_HELD_OUT)


def unlabelled(data: str) -> Dataset:
    """All photos of a folder at any depth, as if of one class. Raises BadData where there are none."""
    names = [str(path.relative_to(data)) for path in find_images([data])]
    return ImageFiles(root=Path(data), names=names, labels=[0] * len(names), classes=("photos",))


def _spread(length: int, count: int) -> list[int]:
    """`count` of the indices below `length`, evenly; all where there are fewer."""
    return [i * length // count for i in range(count)] if length > count else list(range(length))
