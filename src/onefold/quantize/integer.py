"""The network of 8 bits computed as a device computes it: on whole numbers, so that answers are the same to the bit.

The graph with quantize and dequantize operations, run as it stands in float32, rounds its sums; where a sum then lies
near the middle between two steps, it falls to the other side, and forty layers later half of all values differ. Here a
layer's sums are exact, and each is scaled once, in float32, to the nearest step, ties to even: what ONNX Runtime and
XNNPACK (so LiteRT and ExecuTorch) do.

    q - zero whole numbers of an activation      sums = conv(q - zero, w) + b      m = scale_in * scale_w / scale_out
    next q = clamp(round(sums * m) + zero)

Whole numbers are kept in float32, which holds them exactly up to 2^24; a layer that could go beyond adds in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from onefold.quantize.graph import CLAMPS, CONVS, LINEARS, POOLS, SAME, bounds_of, padded, parameter
from onefold.quantize.qparams import HIGHEST, LOWEST

_ops = torch.ops.quantized_decomposed
_EXACT = 2**24


class WholeNumbers(nn.Module):
    """What a graph of `build_` computes on a device: images (B, C, H, W) to logits (B, N), float32 in and out.

    What is neither a layer nor a pooling between two grids stays in float32, as it does in the graph.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.network = graph
        self._wide = frozenset(node.name for node in graph.graph.nodes if _is_wide(graph, node))
        self.training = False

    def train(self, mode: bool = True) -> WholeNumbers:
        """Nothing: whole numbers have no modes."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        answer: Tensor = _Run(self.network, self._wide).run(images)
        return answer


@dataclass(frozen=True)
class _Stored:
    """An activation on its grid: whole numbers q - zero, any shape."""

    whole: Tensor
    scale: float


@dataclass(frozen=True)
class _Kernel:
    """A kernel (O, ...) of whole numbers, and its scales (O,)."""

    whole: Tensor
    scales: Tensor


@dataclass(frozen=True)
class _Sums:
    """Exact sums, what one is worth - each channel's (O,), or all - and the clamp that their values pass."""

    whole: Tensor
    step: Tensor | float
    low: float = -math.inf
    high: float = math.inf

    @property
    def value(self) -> Tensor:
        return self._times(self.step).clamp(self.low, self.high)

    def on_grid(self, scale: float, zero: int) -> Tensor:
        """The nearest q of a grid; a clamp of values is one of steps, since rounding keeps order."""
        ends = [LOWEST if end == -math.inf else HIGHEST if end == math.inf else _clamped(round(end / scale) + zero)
                for end in (self.low, self.high)]  # fmt: skip
        step = self.step / scale if isinstance(self.step, Tensor) else _single(self.step / scale)
        return (torch.round(self._times(step)) + zero).clamp(*ends)

    def _times(self, step: Tensor | float) -> Tensor:
        return self.whole * (step.view(1, -1, *[1] * (self.whole.dim() - 2)) if isinstance(step, Tensor) else step)


class _Run(Interpreter):
    """One walk through the graph, in which a value is a tensor, or one of the kinds above."""

    def __init__(self, graph: GraphModule, wide: frozenset[str]) -> None:
        super().__init__(graph)
        self._wide = wide
        self._node = next(iter(graph.graph.nodes))

    def run_node(self, n: Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0]
        if target is _ops.dequantize_per_channel.default:
            return _Kernel(first.float(), args[1])
        if target is _ops.dequantize_per_tensor.default:
            return _Stored(first - args[2], args[1])
        if isinstance(first, _Stored):
            if target in (*CONVS, *LINEARS) and isinstance(args[1], _Kernel):
                return self._layer(target, first, args[1], args[2:])
            if target in POOLS and (sums := _pooled(target, first, args[1:])) is not None:
                return sums
            if target in SAME or padded(self._node) is not None:
                return _Stored(target(first.whole, *args[1:]), first.scale)
        if isinstance(first, _Sums):
            if target in CLAMPS:
                low, high = bounds_of(target, args[1:])
                return replace(first, low=max(first.low, low), high=min(first.high, high))
            if target is _ops.quantize_per_tensor.default:
                return first.on_grid(args[1], args[2])
        if target is _ops.quantize_per_tensor.default:
            return (torch.round(_value(first) * (1 / args[1])) + args[2]).clamp(LOWEST, HIGHEST)
        return super().call_function(target, map_aggregate(args, _value), map_aggregate(kwargs, _value))

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (answer,) = args[0] if isinstance(args[0], (tuple, list)) else args
        return _value(answer)

    def _layer(self, target: Any, x: _Stored, kernel: _Kernel, rest: tuple[Any, ...]) -> _Sums:
        bias, *geometry = rest
        step = kernel.scales * x.scale
        whole = torch.round(bias.double() / step.double())
        if self._node.name in self._wide:
            sums = target(x.whole.double(), kernel.whole.double(), whole, *geometry).float()
        else:
            sums = target(x.whole, kernel.whole, whole.float(), *geometry)
        return _Sums(sums, step)


def _pooled(target: Any, x: _Stored, args: tuple[Any, ...]) -> _Sums | None:
    """The mean over the map as sums; None for a pooling to more than one value."""
    over_all = target is torch.ops.aten.adaptive_avg_pool2d.default and set(args[0]) == {1}
    if target is torch.ops.aten.mean.dim:
        dims, keep = args[0], len(args) > 1 and args[1]
    elif over_all:
        dims, keep = (2, 3), True
    else:
        return None
    count = 1
    for dim in dims:
        count *= x.whole.shape[dim]
    return _Sums(x.whole.double().sum(dims, keep).float(), _single(x.scale / count))


def _is_wide(graph: GraphModule, node: Node) -> bool:
    """Whether the sums of a layer could leave the whole numbers that float32 holds."""
    if node.op != "call_function" or node.target not in (*CONVS, *LINEARS):
        return False
    kernel, bias, source = node.args[1], node.args[2] if len(node.args) > 2 else None, node.args[0]
    if not isinstance(kernel, Node) or kernel.target is not _ops.dequantize_per_channel.default:
        return False
    whole, scales = (parameter(graph, str(part.target)).double() for part in kernel.args[:2] if isinstance(part, Node))
    while isinstance(source, Node) and source.target in SAME:
        source = source.args[0]
    assert isinstance(bias, Node)
    assert isinstance(source, Node)
    scale, zero = source.args[1:3]
    assert isinstance(scale, float)
    assert isinstance(zero, int)
    low, high = whole.flatten(1) * (LOWEST - zero), whole.flatten(1) * (HIGHEST - zero)
    most = torch.maximum(torch.maximum(low, high).sum(1), -torch.minimum(low, high).sum(1))
    most += (parameter(graph, str(bias.target)).double() / (scales * scale)).abs()
    return bool(most.max() >= _EXACT)


def _value(found: Any) -> Any:
    """What stands for a number, as a tensor of float32."""
    if isinstance(found, _Stored):
        return found.whole * found.scale
    if isinstance(found, _Kernel):
        return found.whole * found.scales.view(-1, *[1] * (found.whole.dim() - 1))
    return found.value if isinstance(found, _Sums) else found


def _clamped(q: int) -> int:
    return min(max(q, LOWEST), HIGHEST)


def _single(number: float) -> float:
    """The nearest number of float32: a quotient of two of them, so rounded, is what a device has."""
    return float(np.float32(number))
