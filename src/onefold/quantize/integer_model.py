"""The int8 model in integer arithmetic, as a device computes it, so that its outputs are the device's to the bit.

The graph with quantize and dequantize operations, run in float32, rounds its sums; where a sum then lies near the
middle between two steps, it is rounded to the other side, and forty layers later half of all values differ. Here a
layer's sums are exact, and each is scaled once, in float32, and rounded to nearest, ties to even: what ONNX Runtime and
XNNPACK (so LiteRT and ExecuTorch) do.

    sums = conv(q - zero_point, w) + b               m = scale_in * scale_w / scale_out
    q_out = clamp(round(sums * m) + zero_point_out)

Integers are kept in float32, which represents them exactly up to 2^24; a layer that could exceed that is added up in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from onefold.quantize.graph import (
    CLAMP_OPS,
    CONV_OPS,
    LINEAR_OPS,
    PASSTHROUGH_OPS,
    POOL_OPS,
    clamp_bounds,
    get_parameter,
    zero_padding_input,
)
from onefold.quantize.qparams import QMAX, QMIN

_ops = torch.ops.quantized_decomposed
_EXACT_IN_FLOAT32 = 2**24


class IntegerModel(nn.Module):
    """What a graph of `insert_qdq_` computes on a device: images (B, C, H, W) to logits (B, N), float32 in and out.

    Operations that are neither a quantized layer nor a global pooling stay in float32, as they do in the graph.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.network = graph
        self._float64_layers = frozenset(node.name for node in graph.graph.nodes if _needs_float64(graph, node))
        self.training = False

    def train(self, mode: bool = True) -> IntegerModel:
        """Do nothing: integer arithmetic has no modes."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        logits: Tensor = _IntegerInterpreter(self.network, self._float64_layers).run(images)
        return logits


@dataclass(frozen=True)
class _QuantizedActivation:
    """An activation: the integers q - zero_point of any shape, and their scale."""

    q: Tensor
    scale: float


@dataclass(frozen=True)
class _QuantizedWeight:
    """The integers (O, ...) of a weight, and their scales (O,)."""

    q: Tensor
    scales: Tensor


@dataclass(frozen=True)
class _Accumulator:
    """Exact integer sums, their scale - per channel (O,) or one - and the clamp that is applied to their values."""

    sums: Tensor
    scale: Tensor | float
    low: float = -math.inf
    high: float = math.inf

    @property
    def value(self) -> Tensor:
        return self._scaled(self.scale).clamp(self.low, self.high)

    def requantize(self, scale: float, zero_point: int) -> Tensor:
        """Round to the integers of another scale and zero point; the clamp becomes one of integers."""
        low = QMIN if self.low == -math.inf else _clamp(round(self.low / scale) + zero_point)
        high = QMAX if self.high == math.inf else _clamp(round(self.high / scale) + zero_point)
        multiplier = self.scale / scale if isinstance(self.scale, Tensor) else _to_float32(self.scale / scale)
        return (torch.round(self._scaled(multiplier)) + zero_point).clamp(low, high)

    def _scaled(self, factor: Tensor | float) -> Tensor:
        if isinstance(factor, Tensor):
            factor = factor.view(1, -1, *[1] * (self.sums.dim() - 2))
        return self.sums * factor


class _IntegerInterpreter(Interpreter):
    """Runs the graph with values that are tensors or one of the classes above."""

    def __init__(self, graph: GraphModule, float64_layers: frozenset[str]) -> None:
        super().__init__(graph)
        self._float64_layers = float64_layers
        self._node = next(iter(graph.graph.nodes))

    def run_node(self, n: Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0]
        if target is _ops.dequantize_per_channel.default:
            return _QuantizedWeight(first.float(), args[1])
        if target is _ops.dequantize_per_tensor.default:
            return _QuantizedActivation(first - args[2], args[1])
        if isinstance(first, _QuantizedActivation):
            if target in (*CONV_OPS, *LINEAR_OPS) and isinstance(args[1], _QuantizedWeight):
                return self._layer(target, first, args[1], args[2:])
            if target in POOL_OPS and (mean := _global_mean(target, first, args[1:])) is not None:
                return mean
            if target in PASSTHROUGH_OPS or zero_padding_input(self._node) is not None:
                return _QuantizedActivation(target(first.q, *args[1:]), first.scale)
        if isinstance(first, _Accumulator):
            if target in CLAMP_OPS:
                low, high = clamp_bounds(target, args[1:])
                return replace(first, low=max(first.low, low), high=min(first.high, high))
            if target is _ops.quantize_per_tensor.default:
                return first.requantize(args[1], args[2])
        if target is _ops.quantize_per_tensor.default:
            return (torch.round(_to_float(first) * (1 / args[1])) + args[2]).clamp(QMIN, QMAX)
        return super().call_function(target, map_aggregate(args, _to_float), map_aggregate(kwargs, _to_float))

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (logits,) = args[0] if isinstance(args[0], (tuple, list)) else args
        return _to_float(logits)

    def _layer(
        self, target: Any, x: _QuantizedActivation, weight: _QuantizedWeight, rest: tuple[Any, ...]
    ) -> _Accumulator:
        bias, *geometry = rest
        scale = weight.scales * x.scale
        # The bias is stored in float; its quotient is the integer that was chosen, but for rounding errors.
        q_bias = torch.round(bias.double() / scale.double())
        if self._node.name in self._float64_layers:
            sums = _exact_sums(target, x.q, weight.q, geometry)
            sums = (sums + q_bias.view(1, -1, *[1] * (sums.dim() - 2))).float()
        else:
            sums = target(x.q, weight.q, q_bias.float(), *geometry)
        return _Accumulator(sums, scale)


def _exact_sums(target: Any, x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Compute the sums of a layer without its bias, in float64, where they may exceed what float32 represents exactly.

    PyTorch's convolutions in float64 take up to fifty times as long as in float32, most of all those of groups. So the
    activations are split in two, x = 16 * high + low: the sums of each are so small that float32 is exact, but in
    layers of ten thousand inputs.
    """
    if 16 * float(weight.flatten(1).abs().sum(1).max()) >= _EXACT_IN_FLOAT32:
        return target(x.double(), weight.double(), None, *geometry)
    high = torch.floor(x / 16)
    sums = target(high, weight, None, *geometry).double().mul_(16)
    return sums.add_(target(x - 16 * high, weight, None, *geometry))


def _global_mean(target: Any, x: _QuantizedActivation, args: tuple[Any, ...]) -> _Accumulator | None:
    """Compute the mean over the map as integer sums; None for a pooling to more than one value."""
    is_global = target is torch.ops.aten.adaptive_avg_pool2d.default and set(args[0]) == {1}
    if target is torch.ops.aten.mean.dim:
        dims, keep = args[0], len(args) > 1 and args[1]
    elif is_global:
        dims, keep = (2, 3), True
    else:
        return None
    count = 1
    for dim in dims:
        count *= x.q.shape[dim]
    return _Accumulator(x.q.double().sum(dims, keep).float(), _to_float32(x.scale / count))


def _needs_float64(graph: GraphModule, node: Node) -> bool:
    """Whether the sums of a layer could exceed the integers that float32 represents exactly."""
    if node.op != "call_function" or node.target not in (*CONV_OPS, *LINEAR_OPS):
        return False
    weight, bias, source = node.args[1], node.args[2] if len(node.args) > 2 else None, node.args[0]
    if not isinstance(weight, Node) or weight.target is not _ops.dequantize_per_channel.default:
        return False
    q, scales = (get_parameter(graph, str(part.target)).double() for part in weight.args[:2] if isinstance(part, Node))
    while isinstance(source, Node) and source.target in PASSTHROUGH_OPS:
        source = source.args[0]
    assert isinstance(bias, Node)
    assert isinstance(source, Node)
    scale, zero_point = source.args[1:3]
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    low, high = q.flatten(1) * (QMIN - zero_point), q.flatten(1) * (QMAX - zero_point)
    bound = torch.maximum(torch.maximum(low, high).sum(1), -torch.minimum(low, high).sum(1))
    bound += (get_parameter(graph, str(bias.target)).double() / (scales * scale)).abs()
    return bool(bound.max() >= _EXACT_IN_FLOAT32)


def _to_float(value: Any) -> Any:
    """Convert a quantized value to a float32 tensor; anything else is returned as it is."""
    if isinstance(value, _QuantizedActivation):
        return value.q * value.scale
    if isinstance(value, _QuantizedWeight):
        return value.q * value.scales.view(-1, *[1] * (value.q.dim() - 1))
    return value.value if isinstance(value, _Accumulator) else value


def _clamp(q: int) -> int:
    return min(max(q, QMIN), QMAX)


def _to_float32(number: float) -> float:
    """Round to float32: a device computes quotients of scales in that precision."""
    return float(np.float32(number))
