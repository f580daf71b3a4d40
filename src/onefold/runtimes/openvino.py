"""OpenVINO on the CPU: model.xml is the network, model.bin its weights.

OpenVINO reports its use to its makers (package openvino-telemetry) as soon as it is imported, unless the user has opted
out. Here it is imported with that package hidden, so that it uses its own stub instead.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from onefold.errors import BadArtifact
from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine, import_vendor_package, suppress_output
from onefold.runtimes.layer_times import WARMUP_CALLS, LayerTime, ProfileRequest, median_layer_times
from onefold.runtimes.onnx import convert_to_onnx, refuse_external_data
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.xml", "model.bin")
PACKAGES = ("torch", "openvino")
PRECISIONS = ("fp32", "int8")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {}
MANIFEST_DETAILS: Mapping[str, object] = {}
ACCEPTS_QDQ = True
unavailable_reason = None

_TELEMETRY = "openvino_telemetry"
_HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}  # the last two are tried by the advisor alone


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network, from PyTorch's graph or, for int8, from ONNX in QDQ form, and write it."""
    vino = _openvino()
    with suppress_output():
        if precision == "int8":
            model = vino.Core().read_model(convert_to_onnx(program, precision=precision).SerializeToString())
        else:
            model = vino.convert_model(program)
        (images,), _ = program.example_inputs
        model.reshape([-1, *images.shape[1:]])
        model.set_rt_info(info.model, "model")
        # By default OpenVINO would store the weights in 16 bits.
        vino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Compile the network for this CPU and for the latency of single requests."""
    return _OpenVino(_compiled(content, {**_options(precision), "INFERENCE_NUM_THREADS": threads}))


def profile(content: Mapping[str, bytes], request: ProfileRequest, *, precision: str) -> Sequence[LayerTime]:
    """Collect the times that OpenVINO's CPU plugin measures of each primitive, in whole microseconds."""
    options = {**_options(precision), "INFERENCE_NUM_THREADS": request.threads, "PERF_COUNT": True}
    infer_request = _compiled(content, options).create_infer_request()
    runs = []
    for _ in range(WARMUP_CALLS + request.calls):
        infer_request.infer([request.images], share_inputs=True)
        # The status would say which layers ran, but counts those of less than a microsecond as not run.
        infos = [info for info in infer_request.profiling_info if not info.exec_type.startswith(("undef", "unknown"))]
        runs.append(
            [
                LayerTime(
                    name=info.node_name,
                    kind=f"{info.node_type} ({info.exec_type})",
                    ns=1e9 * info.real_time.total_seconds(),
                )
                for info in infos
            ]
        )
    return median_layer_times(runs[WARMUP_CALLS:])


def convert_onnx(model: bytes) -> dict[str, bytes]:
    """Convert an ONNX file to the files of this runtime. Raises BadArtifact where it reads weights from elsewhere."""
    refuse_external_data(model)
    vino = _openvino()
    with suppress_output(), TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vino.save_model(vino.Core().read_model(model), folder / "model.xml", compress_to_fp16=False)
        return {name: (folder / name).read_bytes() for name in FILES}


@cache
def int8_sums_saturate() -> bool:
    """Whether sums of two int8 products saturate at 16 bits here, as on x86 without VNNI: a convolution tells.

    Where they do, weights of 7 bits (`QuantizationMethod.weight_qmax` of 63) keep every such sum below the limit.
    """
    vino, channels, largest = _openvino(), 64, np.float32(255)
    with suppress_output():
        ops = vino.opset13
        images = ops.parameter([1, channels, 8, 8], np.float32)
        quantized = ops.fake_quantize(images, np.float32(0), largest, np.float32(0), largest, 256)
        kernel = ops.convert(ops.constant(np.full((16, channels, 1, 1), 127, np.int8)), np.float32)
        # A multiplication by the scale is what OpenVINO takes for the mark of an int8 kernel.
        scaled = ops.multiply(kernel, ops.constant(np.float32(1)))
        sums = ops.convolution(quantized, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
        model = vino.Model([ops.result(sums)], [images], "sums")
        compiled = vino.Core().compile_model(model, "CPU", {**_options("int8"), "INFERENCE_NUM_THREADS": 1})
    found = compiled.create_infer_request().infer([np.full((1, channels, 8, 8), largest)])[0]
    return bool((found != channels * 127 * largest).any())


def _compiled(content: Mapping[str, bytes], options: Mapping[str, object]) -> Any:
    vino = _openvino()
    # OpenVINO would accept any format it knows here, even one that reads further files.
    if not content["model.xml"].startswith(b"<?xml"):
        raise BadArtifact("model.xml is not an OpenVINO network; export the model again")
    core = vino.Core()
    model = core.read_model(model=content["model.xml"], weights=content["model.bin"])
    return core.compile_model(model, "CPU", dict(options))


def _options(precision: str) -> dict[str, object]:
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[precision]}


class _OpenVino:
    """A compiled network with one inference request, so calls are serialized."""

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._request, self._lock = compiled, compiled.create_infer_request(), Lock()

    @property
    def threads(self) -> int:
        return int(self._compiled.get_property("INFERENCE_NUM_THREADS"))

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            return self._request.infer([images], share_inputs=True)[0]

    def close(self) -> None:
        del self._request, self._compiled


def _openvino() -> ModuleType:
    """Import the package with its telemetry hidden. Raises MissingExtra where it is not installed."""
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:
        return import_vendor_package("openvino", extra="openvino")
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # None is how Python marks a module that cannot be imported
    try:
        return import_vendor_package("openvino", extra="openvino")
    finally:
        del sys.modules[_TELEMETRY]
