"""fused -> a network of 8 bits, calibrated on the user's own photos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from onefold.data import Preprocessing, decode, find_images, open_source
from onefold.errors import BadArgument, BadData
from onefold.quantize import Method, Quantized, quantize
from onefold.stages.network import Floats, Network


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What an 8-bit network is made with: photos (a folder at any depth, shards, "digits"), how many, and how."""

    data: str
    count: int = 200
    method: Method = field(default_factory=Method)


def quantized(network: Network, order: Calibration) -> Quantized:
    """The network of 8 bits. Raises BadData where there are too few photos, BadArgument where it is not fused."""
    if not network.is_fused:
        raise BadArgument(f"{network.title} is not fused: an 8-bit network is made of the folded one")
    return quantize(network.model, _images(order, network.preprocessing), order.method)


def told(made: Quantized) -> dict[str, object]:
    """What an artifact's manifest says of its quantization; the noise of each layer in decibels."""
    layers = {
        each.name: {"output_db": round(each.output_db, 2), "weight_db": round(each.weight_db, 2)}
        for each in made.layers
        if each.quantized
    }
    return {
        "quantization": {
            "method": made.method.title,
            "activations": "int8, asymmetric, one grid a tensor",
            "weights": f"int8, symmetric, one scale a {made.method.weights}, up to {made.method.limit}",
            "calibrated_on": made.images,
            "layers": layers,
        }
    }


def _images(order: Calibration, preprocessing: Preprocessing) -> torch.Tensor:
    """The photos (B, C, H, W), chosen evenly; what cannot be read is passed over."""
    if order.count < 2:
        raise BadArgument(f"expected 2 photos or more to calibrate with, not {order.count}")
    read = list(_read(order, preprocessing))
    if len(read) < 2:
        raise BadData(f"{order.data} has {len(read)} photos that can be read: calibration needs 2, better 200")
    return torch.from_numpy(np.stack(read))


def _read(order: Calibration, preprocessing: Preprocessing) -> Iterator[Floats]:
    count, read = _photos(order.data)
    for index in _spread(count, order.count):
        try:
            yield preprocessing(read(index))
        except BadData:
            continue


def _photos(data: str) -> tuple[int, Callable[[int], Image.Image]]:
    """How many there are, and how to read one."""
    if Path(data).is_dir():
        paths = find_images([data])
        return len(paths), lambda i: decode(paths[i])
    source = open_source(data, "train", seed=0, val_fraction=0.2)
    return len(source), source.image


def _spread(length: int, count: int) -> list[int]:
    """`count` of the indices below `length`, evenly; all where there are fewer."""
    return [i * length // count for i in range(count)] if length > count else list(range(length))
