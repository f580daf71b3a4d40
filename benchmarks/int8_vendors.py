"""Each vendor's own quantization of our float artifact, as its documentation shows it: what int8_accuracy.py compares.

Static, post-training, per channel, ranges as each tool has them by default; per tensor where one setting asks for it.
A vendor is given the artifact that our `export` wrote, or PyTorch's network where it starts from that, and photos; it
gives the bytes that the runtime's own half of onefold loads. Nothing is measured here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from onefold.runtimes.base import import_vendor_package, suppress_native_output, suppress_output


@dataclass(frozen=True, kw_only=True)
class Given:
    """The folded network, our float artifact of it, photos (B, C, H, W) as it sees them, and "channel" or "tensor"."""

    network: nn.Module
    artifact: Path
    photos: NDArray[np.float32]
    weights: str


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """A tool: what to call it, the packages whose versions matter, and what it makes: the files of the runtime."""

    title: str
    packages: tuple[str, ...]
    make: Callable[[Given], Mapping[str, bytes]]


class _Photos:
    """The photos one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(self, name: str, photos: NDArray[np.float32]) -> None:
        self._name, self._each = name, iter(photos)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        photo = next(self._each, None)
        return None if photo is None else {self._name: photo[None]}


def by_onnxruntime(given: Given) -> Mapping[str, bytes]:
    """`quantize_static` after `quant_pre_process`: QDQ, extremes, int8 activations and weights."""
    tools = import_vendor_package("onnxruntime.quantization", extra="onnx")
    prepare = import_vendor_package("onnxruntime.quantization.shape_inference", extra="onnx").quant_pre_process
    with TemporaryDirectory() as place, suppress_output():
        ready, out = Path(place) / "ready.onnx", Path(place) / "model.onnx"
        prepare(str(given.artifact / "model.onnx"), str(ready))
        tools.quantize_static(
            str(ready),
            str(out),
            _Photos("images", given.photos),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=given.weights == "channel",
        )
        return {"model.onnx": out.read_bytes()}


def by_nncf(given: Given) -> Mapping[str, bytes]:
    """`nncf.quantize` with its default preset: symmetric activations, biases corrected."""
    vino, nncf = import_vendor_package("openvino", extra="openvino"), _nncf()
    settings = import_vendor_package("nncf.quantization.advanced_parameters", extra="openvino")
    advanced = None
    if given.weights == "tensor":
        per_tensor = settings.QuantizationParameters(per_channel=False)
        advanced = settings.AdvancedQuantizationParameters(weights_quantization_params=per_tensor)
    with TemporaryDirectory() as place, suppress_output():
        model = vino.Core().read_model(given.artifact / "model.xml")
        photos = nncf.Dataset(list(given.photos), lambda photo: photo[None])
        made = nncf.quantize(model, photos, subset_size=len(given.photos), advanced_parameters=advanced)
        vino.save_model(made, Path(place) / "model.xml", compress_to_fp16=False)
        return {name: (Path(place) / name).read_bytes() for name in ("model.xml", "model.bin")}


def by_pt2e(given: Given) -> Mapping[str, bytes]:
    """PT2E with XNNPACKQuantizer: `prepare_pt2e`, the photos, `convert_pt2e`, lowered to XNNPACK."""
    import torch

    grids = import_vendor_package("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", extra="executorch")
    partition = import_vendor_package("executorch.backends.xnnpack.partition.xnnpack_partitioner", extra="executorch")
    pt2e = import_vendor_package("torchao.quantization.pt2e.quantize_pt2e", extra="executorch")
    lowering = import_vendor_package("executorch.exir", extra="executorch")
    config = grids.get_symmetric_quantization_config(is_per_channel=given.weights == "channel")
    first = (torch.from_numpy(given.photos[:1]),)
    with torch.no_grad(), suppress_output():
        traced = torch.export.export(given.network, first).module()
        prepared = pt2e.prepare_pt2e(traced, grids.XNNPACKQuantizer().set_global(config))
        for photo in given.photos:
            prepared(torch.from_numpy(photo[None]))
        made = torch.export.export(pt2e.convert_pt2e(prepared), first)
        lowered = lowering.to_edge_transform_and_lower(made, partitioner=[partition.XnnpackPartitioner()])
        return {"model.pte": bytes(lowered.to_executorch().buffer)}


def by_ai_edge(given: Given) -> Mapping[str, bytes]:
    """AI Edge Quantizer, static 8-bit weights and activations, extremes; what goes in and out stays float."""
    tool = import_vendor_package("ai_edge_quantizer.quantizer", extra="litert")
    types = import_vendor_package("ai_edge_quantizer.qtyping", extra="litert")
    runtime = import_vendor_package("ai_edge_litert.interpreter", extra="litert")
    model = given.artifact / "model.tflite"
    with TemporaryDirectory() as place, suppress_output(), suppress_native_output():
        signatures = runtime.Interpreter(model_path=str(model)).get_signature_list()
        ((signature, ends),) = signatures.items()
        (name,) = ends["inputs"]
        quantizer = tool.Quantizer(str(model))
        granularity = "CHANNELWISE" if given.weights == "channel" else "TENSORWISE"
        quantizer.add_static_config(
            ".*", types.TFLOperationName.ALL_SUPPORTED, 8, 8, types.QuantGranularity[granularity]
        )
        found = quantizer.calibrate({signature: _channels_last(name, given.photos)}, num_threads=1)
        out = Path(place) / "model.tflite"
        quantizer.quantize(found).export_model(str(out))
        return {"model.tflite": out.read_bytes()}


def _channels_last(name: str, photos: NDArray[np.float32]) -> list[dict[str, NDArray[np.float32]]]:
    return [{name: np.ascontiguousarray(photo[None].transpose(0, 2, 3, 1))} for photo in photos]


def _nncf() -> Any:
    """The package, which would report its use, with the package that reports out of its sight."""
    known = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return import_vendor_package("nncf", extra="openvino")
    finally:
        del sys.modules["openvino_telemetry"]
        if known is not None:
            sys.modules["openvino_telemetry"] = known


VENDORS: dict[str, Vendor] = {
    "onnx": Vendor(
        title="onnxruntime.quantization.quantize_static: QDQ, MinMax, int8 activations, after quant_pre_process",
        packages=("onnxruntime", "onnx"),
        make=by_onnxruntime,
    ),
    "openvino": Vendor(
        title="nncf.quantize: its default preset, which corrects biases too",
        packages=("nncf", "openvino"),
        make=by_nncf,
    ),
    "executorch": Vendor(
        title="PT2E with XNNPACKQuantizer: get_symmetric_quantization_config, its histogram observer",
        packages=("executorch", "torchao", "torch"),
        make=by_pt2e,
    ),
    "litert": Vendor(
        title="ai-edge-quantizer: static, 8-bit weights and activations, min_max_uniform_quantize",
        packages=("ai-edge-quantizer", "ai-edge-litert", "litert-torch"),
        make=by_ai_edge,
    ),
}
