"""ONNX, run by ONNX Runtime on the CPU: one model.onnx that holds its weights.

From 1.29 on, ONNX Runtime reports its use to its makers from the moment it is imported: a device id in the user's
cache, and what it knows of each model. Imported here it does not, unless the user has set ORT_DISABLE_TELEMETRY to 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from onefold.errors import BadArtifact
from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.profile import WARMUP, Calls, Layer, medians
from onefold.runtimes.qdq import images_in_fours_, restate_
from onefold.runtimes.reference import Floats
from onefold.runtimes.vendor import quiet, require

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 20

FILES = ("model.onnx",)
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
PRECISIONS = ("fp32", "int8")
REFUSES: Mapping[str, str] = {}
DETAILS: Mapping[str, object] = {"opset": OPSET, "input": "images", "output": "logits"}
READS_GRIDS = True
OBSTACLE = None

_FATAL_ONLY = 4
# It would put the kernel of a layer that was kept in floating point on one coarse grid, unasked.
_NOT_ASKED_FOR = ["WeightBiasQuantization"]


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Convert the network and write it with its name, classes and preprocessing inside."""
    _onnxruntime()
    write(program, folder / "model.onnx", about=about, precision=precision)


def write(program: ExportedProgram, path: Path, *, about: About, precision: str) -> None:
    """Convert the network and write it: what every runtime that reads ONNX is given."""
    model = convert(program, precision=precision)
    if precision == "int8":
        images_in_fours_(model)
    onnx = require("onnx", extra="onnx")
    model.graph.name = about.model
    onnx.helper.set_model_props(model, metadata(about))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def convert(program: ExportedProgram, *, precision: str) -> Any:
    """The network as ONNX's ModelProto, one of 8 bits with its quantization in QDQ form."""
    require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    import torch

    with quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    if converted is None:
        raise RuntimeError("the converter of PyTorch gave nothing")
    model = converted.model_proto
    _forget_where(model.graph)
    if precision == "int8":
        restate_(model)
    return model


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network, optimized by ONNX Runtime for this CPU."""
    return _Onnx(_session(content, _options(precision, threads)))


def profile(content: Mapping[str, bytes], calls: Calls, *, precision: str) -> Sequence[Layer]:
    """The times that ONNX Runtime writes of each operation, in whole microseconds."""
    with TemporaryDirectory() as place:
        options = _options(precision, calls.threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(place) / "profile")
        session = _session(content, options)
        engine = _Onnx(session)
        for _ in range(WARMUP + calls.count):
            engine(calls.images)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        engine.close()
    found: dict[str, list[Layer]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, kind = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            found.setdefault(name, []).append(Layer(name=name, kind=kind, ns=1e3 * event["dur"]))
    return medians(list(zip(*(times[WARMUP:] for times in found.values()), strict=True)))


def _session(content: Mapping[str, bytes], options: Any) -> Any:
    """A session for a network that holds all its weights itself."""
    refuse_other_files(content["model.onnx"])
    return _onnxruntime().InferenceSession(
        content["model.onnx"],
        options,
        providers=["CPUExecutionProvider"],
        enable_fallback=0,
        disabled_optimizers=_NOT_ASKED_FOR,
    )


def _options(precision: str, threads: int) -> Any:
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    # Threads that spin after the answer would slow whoever is measured next to this one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if precision == "int8" and _sums_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")  # kernels that are exact, and slower
    return options


@cache
def _sums_saturate() -> bool:
    """Whether sums of two 8-bit products saturate at 16 bits here, as on x86 without VNNI: a product tells."""
    onnx, runtime = require("onnx", extra="onnx"), _onnxruntime()
    tensor, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    rows, columns = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    product = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["rows", "columns"], ["sums"])],
        "product",
        [tensor("rows", kinds.UINT8, rows.shape)],
        [tensor("sums", kinds.INT32, (4, 16))],
        [onnx.numpy_helper.from_array(columns, "columns")],
    )
    model = onnx.helper.make_model(product, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"rows": rows})
    return bool((sums != rows.astype(np.int32) @ columns.astype(np.int32)).any())


def refuse_other_files(model: bytes) -> None:
    """Raise BadArtifact where a network reads weights from files beside it, whose bytes nobody has checked."""
    onnx = require("onnx", extra="onnx")
    message_type = require("google.protobuf.message", extra="onnx").Message
    read = onnx.load_model_from_string(model)
    if any(tensor.data_location or tensor.external_data for tensor in _tensors(read, message_type)):
        raise BadArtifact("model.onnx reads weights from other files, which is refused; export the model again")


def metadata(about: About) -> dict[str, str]:
    """What a file that holds plain texts can say of its network, by name."""
    found = {"model": about.model, "preprocessing": json.dumps(dict(about.preprocessing)), "fused": str(about.fused)}
    if about.classes is not None:
        found["classes"] = json.dumps(about.classes)
    return found | {k: v for k, v in (("licence", about.licence), ("source", about.source)) if v is not None}


class _Onnx:
    """A session of ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    @property
    def threads(self) -> int:
        return int(self._session.get_session_options().intra_op_num_threads)

    def __call__(self, images: Floats) -> Floats:
        (logits,) = self._session.run(None, {self._input: images})
        return logits

    def close(self) -> None:
        del self._session


def _onnxruntime() -> ModuleType:
    """The package, its telemetry switched off; the variable counts only when set before the first import."""
    if os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1") == "0":
        return require("onnxruntime", extra="onnx")
    runtime = require("onnxruntime", extra="onnx")
    runtime.disable_telemetry_events()
    return runtime


def _forget_where(graph: Any) -> None:
    """Drop the exporter's notes of the source code that each operation came from: they name folders of this machine."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _tensors(message: Any, message_type: Any) -> Iterator[Any]:
    """Every tensor anywhere in an ONNX message: initializers, attributes, sparse ones, inner graphs, functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for inner in [value] if isinstance(value, message_type) else value:
                yield from _tensors(inner, message_type)
