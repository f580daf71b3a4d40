"""Rescaling channels between layers, which leaves the network's function unchanged: equalization, power-of-two scales.

**Cross-layer equalization.** Between two layers joined by a ReLU, channel c may be divided by s[c] in the first and
multiplied by it in the second, since relu(x / s) = relu(x) / s. A fused MobileOne is a chain of such pairs, interrupted
only by its gates. A clamp from above (ReLU6) permits this for a channel that stays below it: a channel that reaches the
clamp on the calibration images is left as it is, and the others may grow until they reach it. Two ways to choose s:

"weights"      s = sqrt(r1 / r2) with r1, r2 the largest weights of channel c in the first and the second layer: for
               per-tensor scales. Source: Nagel et al., arXiv 1906.04721, section 4.1.
"activations"  s = a^(1/2) / r2^(1/2) with a the channel's largest activation (Xiao et al., arXiv 2211.10438), for
               per-channel scales, which make the first layer indifferent to s. A depthwise second layer is indifferent
               too, and then s = a: every channel uses the full range of the activation that they share.

**Power-of-two scales.** Runtimes scale a layer's sums each in their own order - by one factor, or channel by channel,
then the bias, then by the next scale - and round in between. Where a sum lies near the middle between two steps they
disagree, and forty layers later so do some of the logits. With activation scales that are powers of two, and weight
scales of few binary digits, all these products are exact in float32, so the order does not matter. The scales of the
images and of means, and sums beyond 2^18, may still be rounded. It costs no accuracy, because the scale of a value
between two layers is a convention: if the best scale is c 2^k, the first layer's weight and bias are divided by c and
the second's weight multiplied by it, as above, and the scale is 2^k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from onefold.quantize.graph import (
    CLAMP_OPS,
    Layer,
    aten,
    clamp_bounds,
    find_layers,
    get_parameter,
    map_over_batches,
    parallel_batches,
    set_parameter,
    zero_padding_input,
)
from onefold.quantize.qparams import QParams

_MAX_ITERATIONS = 30
_MAX_FACTOR = 1e4
_MAX_CLAMPED = 1e-4  # the share of a channel's values that may lie at the clamp
_WEIGHT_DIGITS = 6  # of a weight's scale: with sums below 2^18, products have the 24 binary digits of float32
_INPUT_DIGITS = 4  # of the images' scale, and of the weight scales that are multiplied with it


@torch.no_grad()
def equalize_(
    graph: GraphModule, batches: Sequence[Tensor], by: Literal["none", "weights", "activations"] | None = "weights"
) -> int:
    """Equalize all pairs of layers in place, by batches (B, C, H, W); returns the number of pairs."""
    if by in ("none", None):
        return 0
    pairs = equalizable_pairs(find_layers(graph))
    statistics = _ClampStatistics({first.output: _clamp_max(first) for first, _ in pairs})
    with parallel_batches():
        for each in map_over_batches(lambda batch: _Watched(graph, statistics.clamps).watch(batch), batches):
            statistics.add(each)
    if by == "activations":
        for first, second in pairs:
            s = _factors_by_activations(graph, second, statistics.peak[first.output])
            _divide(graph, first, second, s, _factor_bounds(first, statistics))
        return len(pairs)
    bounds = {first: _factor_bounds(first, statistics) for first, _ in pairs}
    # A layer is in two pairs, so equalizing one disturbs the other: repeat until nothing changes.
    for _ in range(_MAX_ITERATIONS):
        changed = [_divide(graph, *pair, _factors_by_weights(graph, *pair), bounds[pair[0]]) for pair in pairs]
        if not any(changed):
            break
    return len(pairs)


def _factor_bounds(layer: Layer, statistics: _ClampStatistics) -> list[Tensor]:
    """Compute the smallest and largest factors (C,) that a layer's channels may be divided by."""
    peak = statistics.peak[layer.output]
    reached = statistics.num_clamped[layer.output] > _MAX_CLAMPED * statistics.count[layer.output]
    clamp_max = _clamp_max(layer)
    least = (
        (peak / peak.max().clamp(min=1e-30)).clamp(1 / _MAX_FACTOR, 1)
        if clamp_max == math.inf
        else (peak / clamp_max).clamp(min=1 / _MAX_FACTOR)
    )
    return [torch.where(reached, 1.0, least), torch.where(reached, 1.0, _MAX_FACTOR)]


class _ClampStatistics:
    """For each channel of clamped outputs the peak, and how many values reach the clamp."""

    def __init__(self, clamps: dict[Node, float]) -> None:
        self.clamps = clamps
        self.peak: dict[Node, Tensor] = {}
        self.num_clamped: dict[Node, Tensor] = {}
        self.count = dict.fromkeys(clamps, 0)

    def add(self, found: dict[Node, tuple[Tensor, Tensor, int]]) -> None:
        """Add what `_Watched` has found of a batch."""
        for node, (peak, reached, count) in found.items():
            self.peak[node] = torch.maximum(self.peak[node], peak) if node in self.peak else peak
            self.num_clamped[node] = self.num_clamped[node] + reached if node in self.num_clamped else reached
            self.count[node] += count


class _Watched(Interpreter):
    """Runs the graph on a batch, and gives peak, clamped values and values of each channel of clamped outputs."""

    def __init__(self, graph: GraphModule, clamps: dict[Node, float]) -> None:
        super().__init__(graph)
        self._clamps = clamps
        self._found: dict[Node, tuple[Tensor, Tensor, int]] = {}

    def watch(self, batch: Tensor) -> dict[Node, tuple[Tensor, Tensor, int]]:
        """Run one batch."""
        self.run(batch)
        return self._found

    def run_node(self, n: Node) -> Any:
        """Compute the node's value and record it."""
        value = super().run_node(n)
        if n in self._clamps:
            others, clamp = [dim for dim in range(value.dim()) if dim != 1], self._clamps[n]
            low, high = value.amin(others), value.amax(others)
            reached = (value >= clamp).sum(others) if clamp < math.inf else torch.zeros_like(high, dtype=torch.int64)
            self._found[n] = torch.maximum(high, -low), reached, value.numel() // value.shape[1]
        return value


def _clamp_max(layer: Layer) -> float:
    """The upper bound of a layer's clamp; infinite for a ReLU or none."""
    if layer.output is layer.node:
        return math.inf
    return clamp_bounds(layer.output.target, layer.output.args[1:])[1]


def equalizable_pairs(of_layers: list[Layer]) -> list[tuple[Layer, Layer]]:
    """List the pairs of layers between which channels may be rescaled."""
    return [pair for pair in pairwise(of_layers) if _are_joined(*pair)]


def _are_joined(first: Layer, second: Layer) -> bool:
    """Whether the second layer alone reads the first, through operations that commute with positive factors."""
    node = first.output
    if node.target in CLAMP_OPS and clamp_bounds(node.target, node.args[1:])[0] not in (0.0, -math.inf):
        return False
    while len(node.users) == 1:
        (after,) = node.users
        if after is second.node:
            return True
        # A mean, zero padding or a change of shape.
        name = str(after.target)
        if zero_padding_input(after) is None and not name.startswith(
            ("aten.mean.", "aten.dropout.", "aten.adaptive_avg_pool2d.")
        ):
            return False
        node = after
    return False


def _factors_by_weights(graph: GraphModule, first: Layer, second: Layer) -> Tensor:
    """Compute factors (C,) that make the largest weights of both layers equal."""
    out = get_parameter(graph, first.weight).flatten(1).abs().amax(1)
    into = _by_input_channel(get_parameter(graph, second.weight), second).abs().amax(1)
    live = (out > 0) & (into > 0)
    return torch.where(live, (out / into.clamp(min=1e-30)).sqrt(), torch.ones_like(out))


def _factors_by_activations(graph: GraphModule, second: Layer, peak: Tensor) -> Tensor:
    """Compute factors (C,) that equalize the channels' peaks, shared with the second layer unless it is depthwise."""
    relative = (peak / peak.max().clamp(min=1e-30)).clamp(min=1 / _MAX_FACTOR)
    if second.groups == len(peak):
        return relative
    into = _by_input_channel(get_parameter(graph, second.weight), second).abs().amax(1)
    s = (relative / into.clamp(min=1e-12)).sqrt()
    return s / s.max()


def _divide(graph: GraphModule, first: Layer, second: Layer, s: Tensor, bounds: list[Tensor]) -> bool:
    """Divide channels by s (C,) within the bounds, which shrink by it; returns whether a factor was beyond 1 %."""
    one, two = get_parameter(graph, first.weight), get_parameter(graph, second.weight)
    s = torch.minimum(torch.maximum(s, bounds[0]), bounds[1])
    bounds[:] = [bound / s for bound in bounds]
    set_parameter(graph, first.weight, one / s.view(-1, *[1] * (one.dim() - 1)))
    if first.bias is not None:
        set_parameter(graph, first.bias, get_parameter(graph, first.bias) / s)
    set_parameter(graph, second.weight, _scale_input_channels(two, second, s))
    return bool(((s - 1).abs() > 0.01).any())


def _by_input_channel(weight: Tensor, layer: Layer) -> Tensor:
    """Arrange a weight as (I, weights that read this input channel)."""
    if layer.groups == 1:
        return weight.transpose(0, 1).flatten(1)
    grouped = weight.unflatten(0, (layer.groups, -1))  # (G, O/G, I/G, H, W)
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def _scale_input_channels(weight: Tensor, layer: Layer, s: Tensor) -> Tensor:
    """Multiply a weight's input channels by s (I,)."""
    if layer.groups == 1:
        return weight * s.view(1, -1, *[1] * (weight.dim() - 2))
    by_group = s.view(layer.groups, 1, -1, 1, 1)
    return (weight.unflatten(0, (layer.groups, -1)) * by_group).flatten(0, 1)


# -------------------------------------------------------------------------------- power-of-two scales


def rescale_pair_(graph: GraphModule, first: Layer, second: Layer, factor: float) -> None:
    """Divide the activation between two layers by a factor, in place; the network's function stays as it is."""
    set_parameter(graph, first.weight, get_parameter(graph, first.weight) / factor)
    if first.bias is not None:
        set_parameter(graph, first.bias, get_parameter(graph, first.bias) / factor)
    factors = torch.full_like(get_parameter(graph, first.weight).flatten(1)[:, 0], factor)
    set_parameter(graph, second.weight, _scale_input_channels(get_parameter(graph, second.weight), second, factors))
    _rescale_clamp_(first.output, factor)


def nearest_power_of_two(scale: float) -> float:
    """Round to the power of two that is nearest in proportion."""
    return 2.0 ** round(math.log2(scale))


def shorten_scale_mantissas(scales: Tensor, input_scale: float) -> Tensor:
    """Round weight scales up to few binary digits: to fewer where the input's scale is no power of two."""
    is_power_of_two = math.frexp(input_scale)[0] == 0.5
    return _round_up(scales, _WEIGHT_DIGITS if is_power_of_two else _INPUT_DIGITS)


def shorten_scale_mantissa(qparams: QParams) -> QParams:
    """Round an activation's scale up to few binary digits: for those that no layer computes, such as the images."""
    return QParams(float(_round_up(torch.tensor(qparams.scale), _INPUT_DIGITS)), qparams.zero_point)


def _round_up(scales: Tensor, digits: int) -> Tensor:
    mantissa, exponent = torch.frexp(scales.double())
    # The margin keeps a scale that has few digits already, but for a rounding error, from being enlarged.
    return torch.ldexp(torch.ceil(mantissa * 2**digits - 1e-9) / 2**digits, exponent).to(scales.dtype)


def _rescale_clamp_(node: Node, factor: float) -> None:
    """Divide the upper bound of a clamp by the factor, so that it clamps the same values as before."""
    if node.target in CLAMP_OPS:
        low, high = clamp_bounds(node.target, node.args[1:])
        if high < math.inf:
            set_clamp_bounds_(node, low, high / factor)


def set_clamp_bounds_(node: Node, low: float, high: float) -> None:
    """Let a clamp have other bounds, in place."""
    if clamp_bounds(node.target, node.args[1:]) != (low, high):
        node.target = aten.relu.default if (low, high) == (0.0, math.inf) else aten.hardtanh.default
        node.args = node.args[:1] if node.target is aten.relu.default else (node.args[0], low, high)
