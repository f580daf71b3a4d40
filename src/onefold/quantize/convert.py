"""The network of 8 bits: the graph with quantize and dequantize operations at its points and on its kernels.

The operations are those in which PyTorch hands quantized networks to other runtimes (`quantized_decomposed`): every
value between them is float and lies on a grid, so PyTorch simulates what the device computes in whole numbers, and each
converter finds the grids in the graph.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers the operations
from torch import nn
from torch.fx import GraphModule, Node

from onefold.quantize.calibrate import Calibration, Kernel
from onefold.quantize.graph import CLAMPS, Layer, aten, bounds_of, put
from onefold.quantize.qparams import HIGHEST, LOWEST, Grid

_ops = torch.ops.quantized_decomposed
_LARGEST = 127


def build_(graph: GraphModule, calibration: Calibration) -> GraphModule:
    """Turn the graph into the network of 8 bits, in place; gives it back."""
    for layer, kernel in calibration.kernels.items():
        _store(graph, layer, kernel)
    for node, grid in calibration.grids.items():
        _drop_ceiling(node, grid)
        _put_on_grid(graph, node, grid)
    graph.graph.lint()
    graph.recompile()
    return graph


def _store(graph: GraphModule, layer: Layer, kernel: Kernel) -> None:
    """The kernel as int8 with its scales, dequantized where it is read; the bias on its grid."""
    holder = graph.get_submodule(layer.name)
    holder.register_buffer("weight_int8", kernel.whole.to(torch.int8))
    holder.register_buffer("weight_scale", kernel.scales.float())
    holder.register_buffer("weight_zero", torch.zeros(len(kernel.scales), dtype=torch.int64))
    old = layer.node.args[1]
    assert isinstance(old, Node)
    nodes = graph.graph
    with nodes.inserting_before(layer.node):
        parts = [nodes.get_attr(f"{layer.name}.{name}") for name in ("weight_int8", "weight_scale", "weight_zero")]
        weight = nodes.call_function(_ops.dequantize_per_channel.default, (*parts, 0, -_LARGEST, _LARGEST, torch.int8))
        if layer.bias is None:
            holder.bias = nn.Parameter(kernel.bias, requires_grad=False)
            bias = nodes.get_attr(f"{layer.name}.bias")
            layer.node.args = (layer.node.args[0], weight, bias, *layer.node.args[3:])
        else:
            put(graph, layer.bias, kernel.bias)
            layer.node.update_arg(1, weight)
    if not old.users:
        nodes.erase_node(old)
        del holder.weight


def _drop_ceiling(node: Node, grid: Grid) -> None:
    """Make a ReLU of a clamp from above that the grid's own end does, which every runtime has within its layers."""
    if node.target in CLAMPS:
        low, high = bounds_of(node.target, node.args[1:])
        if low == 0.0 and grid.high <= high * (1 + 1e-5):
            node.target, node.args = aten.relu.default, node.args[:1]


def _put_on_grid(graph: GraphModule, node: Node, grid: Grid) -> None:
    nodes = graph.graph
    readers = list(node.users)
    with nodes.inserting_after(node):
        facts = (grid.scale, grid.zero, LOWEST, HIGHEST, torch.int8)
        stored = nodes.call_function(_ops.quantize_per_tensor.default, (node, *facts))
    with nodes.inserting_after(stored):
        value = nodes.call_function(_ops.dequantize_per_tensor.default, (stored, *facts))
    for reader in readers:
        reader.replace_input_with(node, value)
