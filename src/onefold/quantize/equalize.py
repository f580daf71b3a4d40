"""Cross-layer equalization: the ranges of a layer's channels made alike, the network's answer unchanged.

Between two layers joined by a ReLU, channel c may be divided by s[c] in the first and multiplied by it in the second,
since relu(x / s) = relu(x) / s. A fused MobileOne is a chain of such pairs, broken only at its gates. A clamp from
above (ReLU6) lets a scale through for a channel that stays below it: on the images given, one that does not is left as
it is, and the others may grow until they reach it. Two ways to choose s:

"weights"      s = sqrt(r1 / r2) with r1, r2 the largest weights of channel c in the first and the second: for kernels
               with one scale a tensor. Source: Nagel et al., arXiv 1906.04721, section 4.1.
"activations"  s = a^(1/2) / r2^(1/2) with a the channel's peak on the images (Xiao et al., arXiv 2211.10438), for
               kernels with a scale a row: those of the first layer take any s for nothing. Where the second is
               depthwise its kernels do so too, and s = a: all channels then fill the one grid that they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from onefold.quantize.graph import CLAMPS, Layer, bounds_of, layers, padded, parameter, put

_ROUNDS = 30
_MOST = 1e4
_RARE = 1e-4  # the share of a channel's values that may lie at the clamp


@torch.no_grad()
def equalize_(
    graph: GraphModule, batches: Sequence[Tensor], by: Literal["none", "weights", "activations"] | None = "weights"
) -> int:
    """Equalize every pair of layers that can be, in place, by batches (B, C, H, W); the number of pairs."""
    if by in ("none", None):
        return 0
    pairs = [pair for pair in pairwise(layers(graph)) if joined(*pair)]
    seen = _Seen(graph, {first.output: _cap(first) for first, _ in pairs})
    for batch in batches:
        seen.run(batch)
    if by == "activations":
        for first, second in pairs:
            _divide(graph, first, second, _by_peak(graph, second, seen.peak[first.output]), _ends(first, seen))
        return len(pairs)
    ends = {first: _ends(first, seen) for first, _ in pairs}
    for _ in range(_ROUNDS):
        changed = [_divide(graph, *pair, _by_weights(graph, *pair), ends[pair[0]]) for pair in pairs]
        if not any(changed):
            break
    return len(pairs)


def _ends(layer: Layer, seen: _Seen) -> list[Tensor]:
    """The least and the greatest number (C,) that the channels of a layer may still be divided by."""
    peak = seen.peak[layer.output]
    reached = seen.at_cap[layer.output] > _RARE * seen.count[layer.output]
    ceiling = _cap(layer)
    least = (
        (peak / peak.max().clamp(min=1e-30)).clamp(1 / _MOST, 1)
        if ceiling == math.inf
        else (peak / ceiling).clamp(min=1 / _MOST)
    )
    return [torch.where(reached, 1.0, least), torch.where(reached, 1.0, _MOST)]


class _Seen(Interpreter):
    """What came before clamps while the graph ran: per channel the peak, and how many values reached the clamp."""

    def __init__(self, graph: GraphModule, caps: dict[Node, float]) -> None:
        super().__init__(graph)
        self._caps = caps
        self.peak: dict[Node, Tensor] = {}
        self.at_cap: dict[Node, Tensor] = {}
        self.count = dict.fromkeys(caps, 0)

    def run_node(self, n: Node) -> Any:
        """The node's value, looked at."""
        value = super().run_node(n)
        if n in self._caps:
            channels = value.transpose(0, 1).flatten(1)
            reached = (channels >= self._caps[n]).sum(1)
            peak = channels.abs().amax(1)
            self.peak[n] = torch.maximum(self.peak[n], peak) if n in self.peak else peak
            self.at_cap[n] = self.at_cap[n] + reached if n in self.at_cap else reached
            self.count[n] += channels.shape[1]
        return value


def _cap(layer: Layer) -> float:
    """The greatest value that a layer's clamp lets through."""
    if layer.output is layer.node:
        return math.inf
    return bounds_of(layer.output.target, layer.output.args[1:])[1]


def joined(first: Layer, second: Layer) -> bool:
    """Whether the second alone reads the first, through a clamp from 0 or nothing or a mean over the map."""
    node = first.output
    if node.target in CLAMPS and bounds_of(node.target, node.args[1:])[0] not in (0.0, -math.inf):
        return False
    while len(node.users) == 1:
        (after,) = node.users
        if after is second.node:
            return True
        if not _is_linear(after):
            return False
        node = after
    return False


def _is_linear(node: Node) -> bool:
    """A mean, zeros around or a change of shape, for which scaled channels stay scaled."""
    name = str(node.target)
    return padded(node) is not None or name.startswith(("aten.mean.", "aten.dropout.", "aten.adaptive_avg_pool2d."))


def _by_weights(graph: GraphModule, first: Layer, second: Layer) -> Tensor:
    """What to divide the channels (C,) by so that the largest weights on either side are alike."""
    out = parameter(graph, first.weight).flatten(1).abs().amax(1)
    into = _by_input(parameter(graph, second.weight), second).abs().amax(1)
    live = (out > 0) & (into > 0)
    return torch.where(live, (out / into.clamp(min=1e-30)).sqrt(), torch.ones_like(out))


def _by_peak(graph: GraphModule, second: Layer, peak: Tensor) -> Tensor:
    """What to divide the channels (C,) by so that they fill one grid, the second layer's rows left with their bits."""
    alike = (peak / peak.max().clamp(min=1e-30)).clamp(min=1 / _MOST)
    if second.groups == len(peak):
        return alike
    into = _by_input(parameter(graph, second.weight), second).abs().amax(1)
    s = (alike / into.clamp(min=1e-12)).sqrt()
    return s / s.max()


def _divide(graph: GraphModule, first: Layer, second: Layer, s: Tensor, ends: list[Tensor]) -> bool:
    """Divide channels by s (C,) as far as their ends allow; whether anything changed by over a hundredth."""
    one, two = parameter(graph, first.weight), parameter(graph, second.weight)
    s = torch.minimum(torch.maximum(s, ends[0]), ends[1])
    ends[:] = [end / s for end in ends]
    put(graph, first.weight, one / s.view(-1, *[1] * (one.dim() - 1)))
    if first.bias is not None:
        put(graph, first.bias, parameter(graph, first.bias) / s)
    put(graph, second.weight, scaled_inputs(two, second, s))
    return bool(((s - 1).abs() > 0.01).any())


def _by_input(weight: Tensor, layer: Layer) -> Tensor:
    """A weight as (I, all that reads this channel)."""
    if layer.groups == 1:
        return weight.transpose(0, 1).flatten(1)
    grouped = weight.unflatten(0, (layer.groups, -1))  # (G, O/G, I/G, H, W)
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def scaled_inputs(weight: Tensor, layer: Layer, s: Tensor) -> Tensor:
    """The weight with its input channels multiplied by s (I,)."""
    if layer.groups == 1:
        return weight * s.view(1, -1, *[1] * (weight.dim() - 2))
    by_group = s.view(layer.groups, 1, -1, 1, 1)
    return (weight.unflatten(0, (layer.groups, -1)) * by_group).flatten(0, 1)
