"""LiteRT (formerly TensorFlow Lite) on the CPU: one model.tflite, which takes one image per call, channels last.

An int8 model takes and returns int8; the scales and zero points are in the file. Images come channel by channel, as
PyTorch has them, and are converted to channels last at every call. Where an int8 network takes a millisecond numpy is
slow at that, so it is compiled when first needed (nchw_to_nhwc.cpp); both ways give the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onefold.cpp_extension import is_native_disabled, load_library
from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine, import_vendor_package, suppress_native_output, suppress_output
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

FILES = ("model.tflite",)
PACKAGES = ("torch", "litert-torch", "ai-edge-litert")
PRECISIONS = ("fp32", "int8")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {}
MANIFEST_DETAILS: Mapping[str, object] = {"layout": "NHWC", "images_per_call": 1}
ACCEPTS_QDQ = True
unavailable_reason = None

_QMIN, _QMAX = -128, 127
_MAX_COMPILED_CHANNELS = 4  # MAX_CHANNELS in nchw_to_nhwc.cpp


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network, its first layer reading channels last, and write it."""
    converter = import_vendor_package("litert_torch", extra="litert")
    import torch

    with suppress_output(), suppress_native_output():
        network: Any = program.module(check_guards=False)
        quant_config = None
        if precision == "int8":
            _quantize_constant_weights_(network)
            # The quantizer only makes the converter emit integer layers; the parameters are those of the network.
            quantizer = import_vendor_package("litert_torch.quantize.pt2e_quantizer", extra="litert")
            config = import_vendor_package("litert_torch.quantize.quant_config", extra="litert")
            quant_config = config.QuantConfig(
                pt2e_quantizer=quantizer.PT2EQuantizer().set_global(quantizer.get_symmetric_quantization_config())
            )
        (images,), _ = program.example_inputs
        converted = converter.convert(
            converter.to_channel_last_io(network, args=[0]),
            (torch.zeros_like(images[:1]).permute(0, 2, 3, 1).contiguous(),),
            quant_config=quant_config,
        )
        converted.export(str(folder / "model.tflite"))


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Load the network; the interpreter arranges its weights for this CPU."""
    runtime = import_vendor_package("ai_edge_litert.interpreter", extra="litert")
    with suppress_output(), suppress_native_output():
        interpreter = runtime.Interpreter(model_content=content["model.tflite"], num_threads=threads)
        interpreter.allocate_tensors()
    return _LiteRt(interpreter, threads)


class _LiteRt:
    """An interpreter with one buffer for its image and one for its logits, so calls are serialized.

    LiteRT does not report its number of threads: `threads` is what was requested.
    """

    def __init__(self, interpreter: Any, threads: int) -> None:
        self._interpreter, self.threads, self._lock = interpreter, threads, Lock()
        (self._input,), (self._output,) = interpreter.get_input_details(), interpreter.get_output_details()

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            return np.concatenate([self._answer(images[i : i + 1]) for i in range(len(images))])

    def close(self) -> None:
        del self._interpreter

    def _answer(self, image: Floats) -> Floats:
        self._set_input(image)
        self._interpreter.invoke()
        logits = self._interpreter.get_tensor(self._output["index"])
        if self._output["dtype"] is np.float32:
            return logits
        scale, zero_point = self._output["quantization"]
        return (logits.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)

    def _set_input(self, image: Floats) -> None:
        """Write an image into the interpreter's own buffer.

        The view of that buffer is local to this function: LiteRT does not run while one is alive.
        """
        buffer = self._interpreter.tensor(self._input["index"])()
        if self._input["dtype"] is np.float32:
            copy_channels_last(image, buffer)
        else:
            quantize_channels_last(image, buffer, *self._input["quantization"])


def _quantize_constant_weights_(network: GraphModule) -> None:
    """Replace each int8 weight by its float values, followed by their quantization: the same integers again.

    The converter folds the quantization of a constant, but does not take constants that are int8 already.
    """
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operations

    ops = torch.ops.quantized_decomposed
    graph = network.graph
    for node in graph.find_nodes(op="call_function", target=ops.dequantize_per_channel.default):
        weight, scales, zero_points = (attrgetter(part.target)(network) for part in node.args[:3])
        name = f"kernel_{node.name}"
        network.register_buffer(name, ops.dequantize_per_channel(weight, scales, zero_points, *node.args[3:]))
        with graph.inserting_before(node):
            weight_node = graph.get_attr(name)
            quantized = graph.call_function(ops.quantize_per_channel.default, (weight_node, *node.args[1:]))
        node.update_arg(0, quantized)
    graph.eliminate_dead_code()
    network.recompile()


# ------------------------------------------------------------------------------------- channels last


def copy_channels_last(images: Floats, out: Floats) -> None:
    """Copy images (B, C, H, W) float32, contiguous, to `out` (B, H, W, C)."""
    library = load_native_library()
    if library is not None and images.shape[1] <= _MAX_COMPILED_CHANNELS:
        library.copy_channels_last(*_arguments(images, out))
    else:
        _transpose(images, out)


def quantize_channels_last(images: Floats, out: npt.NDArray[np.int8], scale: float, zero_point: int) -> None:
    """Quantize images (B, C, H, W) to `out` (B, H, W, C): round(images / scale) + zero_point, clamped to int8."""
    inverse, offset = np.float32(1 / scale), np.float32(zero_point)
    library = load_native_library()
    if library is not None and images.shape[1] <= _MAX_COMPILED_CHANNELS:
        library.quantize_channels_last(*_arguments(images, out), ctypes.c_float(inverse), ctypes.c_float(offset))
        return
    values = np.multiply(images, inverse)
    np.rint(values, out=values)
    values += offset
    _transpose(np.clip(values, _QMIN, _QMAX, out=values), out)


def _transpose(images: Floats, out: npt.NDArray[Any]) -> None:
    # Channel by channel, which numpy does faster than one transposed copy.
    for channel in range(images.shape[1]):
        out[..., channel] = images[:, channel]


def _arguments(images: Floats, out: npt.NDArray[Any]) -> tuple[object, ...]:
    batch, channels, height, width = images.shape
    addresses = (ctypes.c_void_p(images.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    return (*addresses, *map(ctypes.c_int64, (batch, channels, height * width)))


def load_native_library() -> ctypes.CDLL | None:
    """Load nchw_to_nhwc.cpp; None without a compiler, or with ONEFOLD_KERNELS=plain in the environment."""
    return None if is_native_disabled("ONEFOLD_KERNELS") else _library()


@cache
def _library() -> ctypes.CDLL | None:
    library = load_library("nchw_to_nhwc")
    if library is not None:
        library.copy_channels_last.restype = library.quantize_channels_last.restype = None
    return library
