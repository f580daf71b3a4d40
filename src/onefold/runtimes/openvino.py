"""OpenVINO on the CPU: model.xml is the network, model.bin its weights.

The package of OpenVINO reports its use to its makers (openvino-telemetry) from the moment it is imported, unless the
user has declined. Imported here, that package is out of its sight, and it falls back to its own silent stand-in.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any

from onefold.errors import BadArtifact
from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.onnx import convert
from onefold.runtimes.profile import WARMUP, Calls, Layer, medians
from onefold.runtimes.reference import Floats
from onefold.runtimes.vendor import quiet, require

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.xml", "model.bin")
PACKAGES = ("torch", "openvino")
PRECISIONS = ("fp32", "int8")
REFUSES: Mapping[str, str] = {}
DETAILS: Mapping[str, object] = {}
READS_GRIDS = True
OBSTACLE = None

_TELEMETRY = "openvino_telemetry"
_HINTS = {"fp32": "f32", "int8": "f32"}


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Convert the network, straight from PyTorch's graph or, one of 8 bits, from its QDQ form, and write it."""
    vino = _openvino()
    with quiet():
        if precision == "int8":
            model = vino.Core().read_model(convert(program, precision=precision).SerializeToString())
        else:
            model = vino.convert_model(program)
        model.reshape([-1, *_input_shape(program)])
        model.set_rt_info(about.model, "model")
        # Left to itself it would store the weights in 16 bits.
        vino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network, compiled for this CPU, made to answer one request as fast as it can."""
    return _OpenVino(_compiled(content, {**_options(precision), "INFERENCE_NUM_THREADS": threads}))


def profile(content: Mapping[str, bytes], calls: Calls, *, precision: str) -> Sequence[Layer]:
    """The times that OpenVINO's CPU plugin takes of each of its primitives, in whole microseconds."""
    options = {**_options(precision), "INFERENCE_NUM_THREADS": calls.threads, "PERF_COUNT": True}
    request = _compiled(content, options).create_infer_request()
    runs = []
    for _ in range(WARMUP + calls.count):
        request.infer([calls.images], share_inputs=True)
        runs.append([_layer(info) for info in request.profiling_info if _is_run(info.exec_type)])
    return medians(runs[WARMUP:])


def _is_run(exec_type: str) -> bool:
    """Whether a layer is computed; the status would say so, but takes one of less than a microsecond for not run."""
    return not exec_type.startswith(("undef", "unknown"))


def _layer(info: Any) -> Layer:
    kind = f"{info.node_type} ({info.exec_type})"
    return Layer(name=info.node_name, kind=kind, ns=1e9 * info.real_time.total_seconds())


def _compiled(content: Mapping[str, bytes], options: Mapping[str, object]) -> Any:
    vino = _openvino()
    # It would take any format it knows here, also one that reads further files.
    if not content["model.xml"].startswith(b"<?xml"):
        raise BadArtifact("model.xml is not a network of OpenVINO; export the model again")
    core = vino.Core()
    model = core.read_model(model=content["model.xml"], weights=content["model.bin"])
    return core.compile_model(model, "CPU", dict(options))


def _options(precision: str) -> dict[str, object]:
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[precision]}


class _OpenVino:
    """A compiled network; it has one place for an answer in the making, so calls take turns."""

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


def _input_shape(program: ExportedProgram) -> list[int]:
    (images,), _ = program.example_inputs
    return list(images.shape[1:])


def _openvino() -> ModuleType:
    """The package, imported with its telemetry out of sight; MissingExtra where it is not installed."""
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:
        return require("openvino", extra="openvino")
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # None is how Python marks a module that cannot be imported
    try:
        return require("openvino", extra="openvino")
    finally:
        del sys.modules[_TELEMETRY]
