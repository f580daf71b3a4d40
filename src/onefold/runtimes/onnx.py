"""ONNX, run by ONNX Runtime on the CPU: one model.onnx that holds its weights.

int8 models are in QDQ form, with QuantizeLinear and DequantizeLinear around every layer. PyTorch's converter writes the
quantization parameters as they are in the program: int8 activations and weights, float biases. The kernels of ONNX
Runtime and OpenVINO for x86 want uint8 activations and int32 biases; `_to_x86_qdq_` writes the same numbers that way.

From 1.29 on, ONNX Runtime reports its use to its makers as soon as it is imported: a device id in the user's cache, and
what it knows of each model. Here it does not, unless the user has set ORT_DISABLE_TELEMETRY to 0.
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
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from onefold.errors import BadArgument, BadArtifact
from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine, import_vendor_package, suppress_output
from onefold.runtimes.layer_times import WARMUP_CALLS, LayerTime, ProfileRequest, median_layer_times
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    Array = npt.NDArray[Any]

OPSET, _IR_VERSION = 20, 10

# The IR version of an opset's files, and the first ONNX Runtime that reads both: the table of its documentation.
_OLDEST = {
    **{15: (8, "1.10"), 16: (8, "1.11"), 17: (8, "1.12"), 18: (8, "1.14")},
    **{19: (9, "1.15"), 20: (9, "1.17")},
}

FILES = ("model.onnx",)
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
PRECISIONS = ("fp32", "int8")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {}
MANIFEST_DETAILS: Mapping[str, object] = {
    **{"opset": OPSET, "ir_version": _IR_VERSION, "needs": "ONNX Runtime >= 1.18"},
    **{"input": "images", "output": "logits"},
}
ACCEPTS_QDQ = True
unavailable_reason = None

_LOG_FATAL_ONLY = 4
# This optimizer would quantize the weights of layers that were left in floating point.
_DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network and write it with its name, classes and preprocessing inside."""
    _onnxruntime()
    path = folder / "model.onnx"
    write_onnx(program, path, info=info, precision=precision)
    opset = info.details.get("opset", OPSET)
    if isinstance(opset, int) and opset != OPSET:
        onnx = import_vendor_package("onnx", extra="onnx")
        try:
            older = onnx.version_converter.convert_version(onnx.load_model_from_string(path.read_bytes()), opset)
        except RuntimeError as error:  # an operation that the older opset lacks, as Gelu before 20
            what = str(error).rpartition(": ")[2]
            raise BadArgument(f"this network cannot be written in opset {opset} ({what}): give a higher one") from error
        older.ir_version = info.details["ir_version"]
        if opset < 18:
            _axes_to_attributes_(older)
        onnx.checker.check_model(older)
        path.write_bytes(older.SerializeToString())


def _axes_to_attributes_(model: Any) -> None:
    """Write the axes of ReduceMean, ReduceMax, ... as attributes, as before opset 18; onnx's converter leaves them."""
    onnx = import_vendor_package("onnx", extra="onnx")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            kept = [each for each in node.attribute if each.name != "noop_with_empty_axes"]
            if len(node.input) == 2:
                kept.append(onnx.helper.make_attribute("axes", constants[node.input.pop()].tolist()))
            del node.attribute[:]
            node.attribute.extend(kept)


def opset_details(opset: int) -> dict[str, object]:
    """What a manifest says of a file in this opset, which `export` then writes. Raises BadArgument."""
    if opset not in _OLDEST:
        raise BadArgument(f"expected an ONNX opset from {min(_OLDEST)} to {max(_OLDEST)}, not {opset}")
    if opset == OPSET:
        return {}
    ir_version, oldest = _OLDEST[opset]
    return {"opset": opset, "ir_version": ir_version, "needs": f"ONNX Runtime >= {oldest}"}


def write_onnx(program: ExportedProgram, path: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network and write it, for every runtime that reads ONNX."""
    model = convert_to_onnx(program, precision=precision)
    if precision == "int8":
        pad_input_channels_(model)
    onnx = import_vendor_package("onnx", extra="onnx")
    model.graph.name = info.model
    onnx.helper.set_model_props(model, model_metadata(info))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


# What `convert_to_onnx` made of its last program: the runtimes that read ONNX are asked for one network in turn.
_converted: WeakKeyDictionary[ExportedProgram, tuple[str, bytes]] = WeakKeyDictionary()


def convert_to_onnx(program: ExportedProgram, *, precision: str) -> Any:
    """Convert the network to ONNX's ModelProto; an int8 one in the QDQ form of the x86 kernels.

    A program is converted once, for all runtimes that read ONNX; each gets a ModelProto of its own.
    """
    onnx = import_vendor_package("onnx", extra="onnx")
    import_vendor_package("onnxscript", extra="onnx")
    converted_as, content = _converted.get(program, ("", b""))
    if converted_as != precision:
        content = _convert(program, precision=precision).SerializeToString()
        _converted.clear()  # one at a time is kept
        _converted[program] = precision, content
    return onnx.load_model_from_string(content)


def _convert(program: ExportedProgram, *, precision: str) -> Any:
    import torch

    with suppress_output():
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
        raise RuntimeError("PyTorch's converter returned nothing")
    model = converted.model_proto
    # The exporter notes the source line of each operation, which would name folders of this machine.
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    if precision == "int8":
        _to_x86_qdq_(model)
    return model


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Load the network; ONNX Runtime optimizes it for this CPU."""
    return _Onnx(_session(content, _options(precision, threads)))


def profile(content: Mapping[str, bytes], request: ProfileRequest, *, precision: str) -> Sequence[LayerTime]:
    """Collect the times that ONNX Runtime logs of each operation, in whole microseconds."""
    with TemporaryDirectory() as temporary:
        options = _options(precision, request.threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(temporary) / "profile")
        session = _session(content, options)
        engine = _Onnx(session)
        for _ in range(WARMUP_CALLS + request.calls):
            engine(request.images)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        engine.close()
    samples: dict[str, list[LayerTime]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, kind = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            samples.setdefault(name, []).append(LayerTime(name=name, kind=kind, ns=1e3 * event["dur"]))
    return median_layer_times(list(zip(*(times[WARMUP_CALLS:] for times in samples.values()), strict=True)))


def _session(content: Mapping[str, bytes], options: Any) -> Any:
    """Open a session, once it is certain that the network reads no other files."""
    refuse_external_data(content["model.onnx"])
    return _onnxruntime().InferenceSession(
        content["model.onnx"],
        options,
        providers=["CPUExecutionProvider"],
        enable_fallback=0,
        disabled_optimizers=_DISABLED_OPTIMIZERS,
    )


def _options(precision: str, threads: int) -> Any:
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _LOG_FATAL_ONLY
    # Threads that spin after a call would slow what is measured right after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if precision == "int8" and _sums_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")  # exact, slower kernels
    return options


@cache
def _sums_saturate() -> bool:
    """Whether sums of two 8-bit products saturate at 16 bits here, as on x86 without VNNI.

    It is measured: one product of matrices with the largest values is compared with the exact one.
    """
    onnx, runtime = import_vendor_package("onnx", extra="onnx"), _onnxruntime()
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


def refuse_external_data(model: bytes) -> None:
    """Raise BadArtifact where a network reads weights from files beside it, whose bytes were not verified."""
    onnx = import_vendor_package("onnx", extra="onnx")
    message_type = import_vendor_package("google.protobuf.message", extra="onnx").Message
    read = onnx.load_model_from_string(model)
    if any(tensor.data_location or tensor.external_data for tensor in _tensors(read, message_type)):
        raise BadArtifact("model.onnx reads weights from other files, which is refused; export the model again")


def model_metadata(info: ModelInfo) -> dict[str, str]:
    """Write what is known of a model as text by name, for files that hold such metadata."""
    metadata = {"model": info.model, "preprocessing": json.dumps(dict(info.preprocessing)), "fused": str(info.fused)}
    if info.classes is not None:
        metadata["classes"] = json.dumps(info.classes)
    return metadata | {k: v for k, v in (("licence", info.licence), ("source", info.source)) if v is not None}


class _Onnx:
    """A session of ONNX Runtime; it may be called from several threads."""

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
    """Import the package with its telemetry off; the variable has an effect only before the first import."""
    if os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1") == "0":
        return import_vendor_package("onnxruntime", extra="onnx")
    runtime = import_vendor_package("onnxruntime", extra="onnx")
    runtime.disable_telemetry_events()
    return runtime


def _tensors(message: Any, message_type: Any) -> Iterator[Any]:
    """Find every tensor anywhere in an ONNX message: initializers, attributes, sparse ones, subgraphs, functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for inner in [value] if isinstance(value, message_type) else value:
                yield from _tensors(inner, message_type)


# ------------------------------------------------------------------------- QDQ form of the x86 kernels


def _to_x86_qdq_(model: Any) -> None:
    """Rewrite a converted ModelProto in place: activations uint8, biases int32 with the scales of their sums."""
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and graph.is_per_tensor(node):
            graph.make_unsigned(node)
        elif node.op_type == "DequantizeLinear":
            graph.unshare_constants(node)
    for node in list(model.graph.node):
        if node.op_type in ("Conv", "Gemm") and len(node.input) == 3:
            graph.quantize_bias(node)
    graph.prune()
    del model.graph.value_info[:]  # the types that the exporter noted no longer hold


def pad_input_channels_(model: Any) -> None:
    """Pad the images of an int8 ModelProto with channels of zeros to a multiple of four, in place.

    ONNX Runtime has fast kernels for multiples of four channels only: without them MobileOne-S0's first layer takes a
    fifth of the whole network's time. The logits are the same.
    """
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        if node.op_type == "Conv" and not any(a.name == "group" and a.i > 1 for a in node.attribute):
            graph.pad_input_channels(node)
    graph.prune()


class _Graph:
    """An ONNX graph with its constants and the producers of its values by name.

    The names given to new constants are part of the exported file: another name is another file.
    """

    def __init__(self, graph: Any) -> None:
        self._numpy_helper = import_vendor_package("onnx.numpy_helper", extra="onnx")
        self._onnx = import_vendor_package("onnx", extra="onnx")
        self._graph = graph
        self._constants: dict[str, Array] = {t.name: self._numpy_helper.to_array(t) for t in graph.initializer}
        self._producers = {output: node for node in graph.node for output in node.output}

    def is_per_tensor(self, node: Any) -> bool:
        """Whether a (de)quantize operation has one scale and an int8 zero point."""
        zero_point = self._constants.get(node.input[2]) if len(node.input) > 2 else None
        return zero_point is not None and zero_point.ndim == 0 and zero_point.dtype == np.int8

    def make_unsigned(self, node: Any) -> None:
        """Replace an int8 zero point by the uint8 one of the same real values, which is larger by 128."""
        zero_point = np.uint8(int(self._constants[node.input[2]]) + 128)
        name = f"zero_{int(zero_point)}"
        if name not in self._constants:
            self._add(name, np.array(zero_point))
        node.input[2] = name

    def unshare_constants(self, node: Any) -> None:
        """Give a dequantize operation its own copy of weights and zero points.

        Equal weights are one constant that several layers read; ONNX Runtime converts them to uint8 layer by layer, and
        fails on a constant that it has already converted.
        """
        for position, suffix in ((0, "whole"), (2, "zeros")):
            name = f"{node.output[0]}_{suffix}"
            self._add(name, self._constants[node.input[position]])
            node.input[position] = name

    def quantize_bias(self, node: Any) -> None:
        """Write the float bias of a layer as int32, with the product of its input's and its weight's scales."""
        inputs = [self._producers.get(name) for name in node.input[:2]]
        bias = self._constants.get(node.input[2])
        if bias is None or any(producer is None or producer.op_type != "DequantizeLinear" for producer in inputs):
            return
        input_scale, weight_scale = (self._constants[producer.input[1]] for producer in inputs if producer is not None)
        # In float64, so that the quotient below is the integer that the calibration chose.
        scale = input_scale.astype(np.float64) * weight_scale
        bias_int32 = np.round(bias / scale).astype(np.int32)
        name = node.input[2]
        self._add(f"{name}_int32", bias_int32)
        self._add(f"{name}_scale", np.broadcast_to(scale.astype(np.float32), bias_int32.shape).copy())
        self._add(f"{name}_zero", np.zeros(bias_int32.shape, np.int32))
        parts = [f"{name}_int32", f"{name}_scale", f"{name}_zero"]
        dequantize = self._onnx.helper.make_node("DequantizeLinear", parts, [f"{name}_value"], axis=0)
        self._graph.node.insert(0, dequantize)
        node.input[2] = f"{name}_value"

    def pad_input_channels(self, conv: Any) -> None:
        """Pad the images that this convolution alone reads, and its weight, with channels of zeros."""
        dequantize, kernel = (self._producers.get(name) for name in conv.input[:2])
        quantize = None if dequantize is None else self._producers.get(dequantize.input[0])
        if dequantize is None or kernel is None or quantize is None or quantize.input[0] in self._producers:
            return  # it does not read the images, or reads them unquantized
        if sum(dequantize.output[0] in node.input for node in self._graph.node) > 1:
            return
        weight = self._constants[kernel.input[0]]
        missing = -weight.shape[1] % 4
        if not missing:
            return
        self._add(f"{kernel.input[0]}_in_fours", np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0))))
        kernel.input[0] += "_in_fours"
        widths, name = f"{conv.name}_more_channels", f"{conv.name}_images_in_fours"
        self._add(widths, np.array([0, 0, 0, 0, 0, missing, 0, 0]))
        # Padded with the zero point, which stands for 0.
        pad = self._onnx.helper.make_node("Pad", [quantize.output[0], widths, quantize.input[2]], [name], f"{name}_pad")
        self._graph.node.insert(list(self._graph.node).index(dequantize), pad)
        dequantize.input[0] = name

    def prune(self) -> None:
        """Remove the constants that are no longer read."""
        used = {name for node in self._graph.node for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _add(self, name: str, value: Array) -> None:
        self._constants[name] = value
        self._graph.initializer.append(self._numpy_helper.from_array(value, name))
