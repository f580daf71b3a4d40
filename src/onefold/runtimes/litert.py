"""LiteRT (once TensorFlow Lite) on the CPU: one model.tflite, which takes one image at a time, channels last.

A network of 8 bits takes and gives the whole numbers of its first and last grid; the grids are in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.pixels import put_as_they_are, put_on_grid
from onefold.runtimes.reference import Floats
from onefold.runtimes.vendor import mute, quiet, require

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

FILES = ("model.tflite",)
PACKAGES = ("torch", "litert-torch", "ai-edge-litert")
PRECISIONS = ("fp32", "int8")
REFUSES: Mapping[str, str] = {}
DETAILS: Mapping[str, object] = {"layout": "NHWC", "images_per_call": 1}
READS_GRIDS = True
OBSTACLE = None


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Convert the network, its first layer reading channels last, and write it."""
    converter = require("litert_torch", extra="litert")
    import torch

    with quiet(), mute():
        network: Any = program.module(check_guards=False)
        if precision == "int8":
            _requantize_kernels_(network)
        (images,), _ = program.example_inputs
        converted = converter.convert(
            converter.to_channel_last_io(network, args=[0]),
            (torch.zeros_like(images[:1]).permute(0, 2, 3, 1).contiguous(),),
            quant_config=_whole_numbers() if precision == "int8" else None,
        )
        converted.export(str(folder / "model.tflite"))


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network, laid out for this CPU."""
    runtime = require("ai_edge_litert.interpreter", extra="litert")
    with quiet(), mute():
        interpreter = runtime.Interpreter(model_content=content["model.tflite"], num_threads=threads)
        interpreter.allocate_tensors()
    return _LiteRt(interpreter, threads)


class _LiteRt:
    """An interpreter; it has one place for its images and its answer, so calls take turns.

    It does not tell its number of threads: `threads` is what it was given.
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
        self._take_in(image)
        self._interpreter.invoke()
        return _dequantized(self._interpreter.get_tensor(self._output["index"]), self._output)

    def _take_in(self, image: Floats) -> None:
        """Put an image into the network's own memory, which must not be held while the network runs."""
        place = self._interpreter.tensor(self._input["index"])()
        if self._input["dtype"] is np.float32:
            put_as_they_are(image, place)
        else:
            put_on_grid(image, place, *self._input["quantization"])


def _dequantized(values: npt.NDArray[Any], tensor: Mapping[str, Any]) -> Floats:
    """What a tensor of the network stands for."""
    scale, zero = tensor["quantization"]
    if tensor["dtype"] is np.float32:
        return values
    return (values.astype(np.float32) - np.float32(zero)) * np.float32(scale)


def _requantize_kernels_(network: GraphModule) -> None:
    """Put in the place of each int8 kernel what it stands for, followed by its quantization: the same whole numbers.

    The converter folds a quantization of constants, and takes no constant that is whole already.
    """
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operations

    ops = torch.ops.quantized_decomposed
    graph = network.graph
    for node in graph.find_nodes(op="call_function", target=ops.dequantize_per_channel.default):
        whole, scales, zeros = (attrgetter(part.target)(network) for part in node.args[:3])
        name = f"kernel_{node.name}"
        network.register_buffer(name, ops.dequantize_per_channel(whole, scales, zeros, *node.args[3:]))
        with graph.inserting_before(node):
            kernel = graph.get_attr(name)
            again = graph.call_function(ops.quantize_per_channel.default, (kernel, *node.args[1:]))
        node.update_arg(0, again)
    graph.eliminate_dead_code()
    network.recompile()


def _whole_numbers() -> Any:
    """The converter's wish to compute in whole numbers; the grids are those of the network."""
    grids = require("litert_torch.quantize.pt2e_quantizer", extra="litert")
    config = require("litert_torch.quantize.quant_config", extra="litert")
    return config.QuantConfig(
        pt2e_quantizer=grids.PT2EQuantizer().set_global(grids.get_symmetric_quantization_config())
    )
