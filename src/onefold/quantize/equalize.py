"""Cross-layer equalization: the ranges of a layer's channels made alike, the network's answer unchanged.

Between two layers joined by a ReLU, channel c may be divided by s[c] in the first and multiplied by it in the second,
since relu(x / s) = relu(x) / s. With s = sqrt(r1 / r2), where r1 and r2 are the largest weights of channel c in the
first (its bias among them, or a channel that is nothing but its bias would grow without end) and in the second, both
have the range sqrt(r1 r2). A fused MobileOne is a chain of such pairs, broken only at its gates. A clamp from above
lets no scale through, so layers joined by one are left alone.

Source: Nagel et al., arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from onefold.quantize.graph import Layer, layers, parameter, put

_ROUNDS = 30
_MOST = 1e4


def equalize_(graph: GraphModule) -> int:
    """Equalize every pair of layers that can be, in place; the number of pairs."""
    found = layers(graph)
    pairs = [pair for pair in pairwise(found) if _joined(*pair)]
    for _ in range(_ROUNDS):
        changed = [_equalize(graph, *pair) for pair in pairs]
        if not any(changed):
            break
    return len(pairs)


def _joined(first: Layer, second: Layer) -> bool:
    """Whether the second alone reads the first, through a ReLU or nothing or a mean over the map."""
    node = first.output
    if node is not first.node and "relu.default" not in str(node.target) and "relu_.default" not in str(node.target):
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
    """A mean or a change of shape, for which scaled channels stay scaled."""
    name = str(node.target)
    return name.startswith(("aten.mean.", "aten.dropout.", "aten.adaptive_avg_pool2d."))


def _equalize(graph: GraphModule, first: Layer, second: Layer) -> bool:
    """One step of one pair; whether it changed anything by more than a hundredth."""
    one, two = parameter(graph, first.weight), parameter(graph, second.weight)
    out = one.flatten(1).abs().amax(1)
    if first.bias is not None:  # a channel of nothing but its bias is as large as that
        out = torch.maximum(out, parameter(graph, first.bias).abs())
    into = _by_input(two, second).abs().amax(1)
    live = (out > 0) & (into > 0)
    s = torch.where(live, (out / into.clamp(min=1e-30)).sqrt(), torch.ones_like(out)).clamp(1 / _MOST, _MOST)
    put(graph, first.weight, one / s.view(-1, *[1] * (one.dim() - 1)))
    if first.bias is not None:
        put(graph, first.bias, parameter(graph, first.bias) / s)
    put(graph, second.weight, _scaled(two, second, s))
    return bool(((s - 1).abs() > 0.01).any())


def _by_input(weight: Tensor, layer: Layer) -> Tensor:
    """A weight as (I, all that reads this channel)."""
    if layer.groups == 1:
        return weight.transpose(0, 1).flatten(1)
    grouped = weight.unflatten(0, (layer.groups, -1))  # (G, O/G, I/G, H, W)
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def _scaled(weight: Tensor, layer: Layer, s: Tensor) -> Tensor:
    """The weight with its input channels multiplied by s (I,)."""
    if layer.groups == 1:
        return weight * s.view(1, -1, *[1] * (weight.dim() - 2))
    by_group = s.view(layer.groups, 1, -1, 1, 1)
    return (weight.unflatten(0, (layer.groups, -1)) * by_group).flatten(0, 1)
