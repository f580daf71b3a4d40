"""A network of 8 bits in ONNX's form: QuantizeLinear and DequantizeLinear around every layer (QDQ).

PyTorch's converter writes the grids as they stand in the program: int8 activations and weights, float biases. The
kernels of ONNX Runtime and OpenVINO for x86 want activations without sign, and biases as the whole numbers they add up:
the same numbers, written another way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onefold.runtimes.vendor import require

if TYPE_CHECKING:
    Array = npt.NDArray[Any]

_LAYERS = ("Conv", "Gemm")


def restate_(model: Any) -> None:
    """Rewrite a converted ModelProto in place: activations uint8, biases int32 on the grid of their sums."""
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and graph.is_per_tensor(node):
            graph.without_sign(node)
        elif node.op_type == "DequantizeLinear":
            graph.own_parts(node)
    for node in list(model.graph.node):
        if node.op_type in _LAYERS and len(node.input) == 3:
            graph.whole_bias(node)
    graph.prune()
    del model.graph.value_info[:]  # types that no longer hold


def images_in_fours_(model: Any) -> None:
    """Add channels of zeros to the images of a restated ModelProto, in place, until four divide their number.

    ONNX Runtime has quick kernels for four channels and its multiples only: without them MobileOne-S0's first layer
    takes a fifth of the whole network's time. The answers are the same.
    """
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        if node.op_type == "Conv" and not any(each.name == "group" and each.i > 1 for each in node.attribute):
            graph.pad_to_fours(node)
    graph.prune()


class _Graph:
    """The graph and its constants by name."""

    def __init__(self, graph: Any) -> None:
        self._helper = require("onnx.numpy_helper", extra="onnx")
        self._onnx = require("onnx", extra="onnx")
        self._graph = graph
        self._constants: dict[str, Array] = {t.name: self._helper.to_array(t) for t in graph.initializer}
        self._makers = {output: node for node in graph.node for output in node.output}

    def is_per_tensor(self, node: Any) -> bool:
        """Whether it has one scale, and int8 on its whole side."""
        zero = self._constants.get(node.input[2]) if len(node.input) > 2 else None
        return zero is not None and zero.ndim == 0 and zero.dtype == np.int8

    def without_sign(self, node: Any) -> None:
        """Count from 0 instead of from -128."""
        zero = np.uint8(int(self._constants[node.input[2]]) + 128)
        name = f"zero_{int(zero)}"
        if name not in self._constants:
            self._add(name, np.array(zero))
        node.input[2] = name

    def own_parts(self, node: Any) -> None:
        """A kernel and zeros of its own: ONNX Runtime turns them to uint8 one by one, and trips over shared ones.

        Equal kernels come as one constant that several layers read.
        """
        for place, part in ((0, "whole"), (2, "zeros")):
            name = f"{node.output[0]}_{part}"
            self._add(name, self._constants[node.input[place]])
            node.input[place] = name

    def whole_bias(self, node: Any) -> None:
        """A float bias of a layer whose input and weight are dequantized, as int32 with the product of their scales."""
        inputs = [self._makers.get(name) for name in node.input[:2]]
        bias = self._constants.get(node.input[2])
        if bias is None or any(maker is None or maker.op_type != "DequantizeLinear" for maker in inputs):
            return
        scale_in, scale_weight = (self._constants[maker.input[1]] for maker in inputs if maker is not None)
        scales = (scale_in.astype(np.float64) * scale_weight).astype(np.float32)
        whole = np.round(bias / (scale_in.astype(np.float64) * scale_weight)).astype(np.int32)
        name = node.input[2]
        self._add(f"{name}_int32", whole)
        self._add(f"{name}_scale", np.broadcast_to(scales, whole.shape).copy())
        self._add(f"{name}_zero", np.zeros(whole.shape, np.int32))
        parts = [f"{name}_int32", f"{name}_scale", f"{name}_zero"]
        dequantized = self._onnx.helper.make_node("DequantizeLinear", parts, [f"{name}_value"], axis=0)
        self._graph.node.insert(0, dequantized)
        node.input[2] = f"{name}_value"

    def pad_to_fours(self, conv: Any) -> None:
        """Channels of zeros beside the images that this convolution alone reads, and in its kernel."""
        value, kernel = (self._makers.get(name) for name in conv.input[:2])
        given = None if value is None else self._makers.get(value.input[0])
        if value is None or kernel is None or given is None or given.input[0] in self._makers:
            return  # it reads no images, or not on a grid
        if sum(value.output[0] in node.input for node in self._graph.node) > 1:
            return
        weight = self._constants[kernel.input[0]]
        more = -weight.shape[1] % 4
        if not more:
            return
        self._add(f"{kernel.input[0]}_in_fours", np.pad(weight, ((0, 0), (0, more), (0, 0), (0, 0))))
        kernel.input[0] += "_in_fours"
        widths, name = f"{conv.name}_more_channels", f"{conv.name}_images_in_fours"
        self._add(widths, np.array([0, 0, 0, 0, 0, more, 0, 0]))
        padded = self._onnx.helper.make_node("Pad", [given.output[0], widths, given.input[2]], [name], f"{name}_pad")
        self._graph.node.insert(list(self._graph.node).index(value), padded)
        value.input[0] = name

    def prune(self) -> None:
        """Drop the constants that nothing reads any more."""
        read = {name for node in self._graph.node for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _add(self, name: str, value: Array) -> None:
        self._constants[name] = value
        self._graph.initializer.append(self._helper.from_array(value, name))
