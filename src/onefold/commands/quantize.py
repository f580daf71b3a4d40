"""weights -> an int8 network in memory: fused, calibrated on the user's photos, ready to be exported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from onefold.commands.calibration_cache import CalibrationOptions, Int8Network, calibrated_network
from onefold.commands.export import Artifact, check_int8_agreement, export_artifact, network_from_module
from onefold.commands.open_network import Network, open_network
from onefold.commands.optional_dependencies import extras_for_sources, require_extras
from onefold.commands.predictor import Source, select_ema_weights, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.quantize import QuantizationMethod


@dataclass(frozen=True, kw_only=True, repr=False)
class QuantizedNetwork:
    """An int8 network and the fused network that it was made of; `export` writes it for a runtime."""

    network: Network
    int8: Int8Network

    @property
    def model(self) -> nn.Module:
        """Prepared images (B, C, H, W) to logits (B, N), in integer arithmetic, as devices compute."""
        return self.int8.made.model

    def export(self, to: str = "onnx", *, out: Source = "artifacts") -> Artifact:
        """Export to a runtime, into `out`/<runtime>-int8. Raises GateFailed where its answer is not the model's."""
        folder = Path(out) / f"{to}-int8"
        with show_progress():
            return Artifact.from_exported(export_artifact(self.network, self.int8, folder, to, "int8"))

    def __repr__(self) -> str:
        made = self.int8.made
        return f"QuantizedNetwork({self.network.title}: {made.method.title}; calibrated on {made.images} images)"


@suggest_argument_names
def quantize(
    source: Source | nn.Module,
    data: Source | None = None,
    *,
    calibrate: int = 200,
    weight_bits: int = 8,
    per_tensor: bool = False,
    skip_layers: int = 0,
    model: str | None = None,
    use_ema: bool | None = None,
    img_size: int | None = None,
) -> QuantizedNetwork:
    """Quantize a network to int8, fused first, calibrated on `calibrate` photos of `data`, a folder or "digits".

    `source` is a run folder, a file of weights, an id of the hub, timm:NAME, or a module in eval mode; weights that
    were trained for int8 keep their ranges, without `data`. `weight_bits` is 8, or 7 for x86 processors without VNNI;
    `per_tensor` takes one scale a weight tensor; so many `skip_layers`, the most sensitive, stay in fp32. `model` names
    the network where the weights do not; `img_size` is the side in pixels.

    Raises BadArgument, BadCheckpoint, BadData where there are too few photos or nothing in them, GateFailed where the
    int8 network gives too few of the float network's answers (80 %, see `commands.export.check_int8_agreement`).

        int8 = onefold.quantize("runs/photos-finetune", "photos/")
        int8.model, int8.export("litert")
    """
    require_extras(extras_for_sources(source, data))
    if isinstance(source, nn.Module):
        network = network_from_module(source, model)
    else:
        network = open_network(select_ema_weights(source, use_ema), name=model)
    with show_progress():
        if not network.is_fused:
            network, _ = network.fused()
        network = network.with_size(img_size)
        method = QuantizationMethod(
            weights="tensor" if per_tensor else "channel", weight_qmax=2 ** (weight_bits - 1) - 1
        )
        place = "" if data is None else os.fspath(data)
        order = CalibrationOptions(data=place, count=calibrate, method=method, skip_layers=skip_layers)
        int8 = calibrated_network(network, order)
        if place:
            check_int8_agreement(network, int8, order)
        return QuantizedNetwork(network=network, int8=int8)
