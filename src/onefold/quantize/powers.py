"""Steps that are powers of two, for nothing: then the order of arithmetic hardly matters.

Runtimes scale a layer's sums each in their own order - times one factor, or channel by channel, then the bias, then
over the next step - and round in between. Where a sum lies near the middle between two steps they part, and forty
layers later so do some of the answers. With steps of powers of two, and weights' steps of few binary digits, all these
products are exact in float32. What meets the images or a mean, or sums beyond 2^18, may still round.

It costs nothing: what a value between two layers is worth is a convention. If the best step is c 2^k, the first layer's
kernel and bias are divided by c and the second's kernel multiplied by it, as in `equalize`, and the step is 2^k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from onefold.quantize.equalize import joined, scaled_inputs
from onefold.quantize.graph import CLAMPS, aten, bounds_of, layers, parameter, put
from onefold.quantize.qparams import Grid, Ranges
from onefold.quantize.walk import ranges_of

_DIGITS = 6  # of a weight's step: with sums below 2^18 products have the 24 that float32 holds
_INPUT_DIGITS = 4  # of the images' step, and of the weights' that meet it


@torch.no_grad()
def revalue_(graph: GraphModule, batches: Sequence[Tensor], ranges: Ranges) -> frozenset[Node]:
    """Revalue what passes between two layers so that its best step is a power of two, in place; those points."""
    pairs = [pair for pair in pairwise(layers(graph)) if joined(*pair)]
    best = ranges_of(graph, batches, [first.output for first, _ in pairs], ranges)
    for first, second in pairs:
        step = best[first.output].scale
        factor = step / power_near(step)
        put(graph, first.weight, parameter(graph, first.weight) / factor)
        if first.bias is not None:
            put(graph, first.bias, parameter(graph, first.bias) / factor)
        ones = torch.full_like(parameter(graph, first.weight).flatten(1)[:, 0], factor)
        put(graph, second.weight, scaled_inputs(parameter(graph, second.weight), second, ones))
        _move_ceiling(first.output, factor)
    return frozenset(first.output for first, _ in pairs)


def power_near(step: float) -> float:
    """The power of two that is nearest in proportion."""
    return 2.0 ** round(math.log2(step))


def short(steps: Tensor, input_step: float) -> Tensor:
    """The steps of weights, made longer until they have few binary digits: fewer where the input's has some."""
    is_power = math.frexp(input_step)[0] == 0.5
    return _cut(steps, _DIGITS if is_power else _INPUT_DIGITS)


def short_grid(grid: Grid) -> Grid:
    """The grid with a step of few binary digits: for what no layer gives, such as the images."""
    return Grid(float(_cut(torch.tensor(grid.scale), _INPUT_DIGITS)), grid.zero)


def _cut(steps: Tensor, digits: int) -> Tensor:
    mantissa, exponent = torch.frexp(steps.double())
    return torch.ldexp(torch.ceil(mantissa * 2**digits - 1e-9) / 2**digits, exponent).to(steps.dtype)


def _move_ceiling(node: Node, factor: float) -> None:
    """Let a clamp from above stand where it stood, in the new values."""
    if node.target not in CLAMPS:
        return
    low, high = bounds_of(node.target, node.args[1:])
    if high < math.inf:
        node.target = aten.hardtanh.default
        node.args = (node.args[0], low, high / factor)
