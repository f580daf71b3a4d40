"""What the routes of a training step cost for a unit and a batch, by count: multiply-adds, and floats moved.

A float moved between a core and the memory takes as long as MOVE multiply-adds, from the rates of both on a core with
AVX2; the other constants are estimates. They need not be near: where two routes cost about the same, either will do.
`benchmarks/train_step.py --units` times the routes of single units, to hold against the choice.

Shapes: per place of the output; I and O channels, G groups, K values a patch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from onefold.reparam.branches import Unit
from onefold.reparam.fused_norms import supports
from onefold.reparam.kernels import Reference, passes_for

MOVE = 17.0
LAG = 0.3  # depthwise: products by lag, of those by pairs of taps
SLOW_DEPTHWISE = 3.0  # torch's depthwise convolution, forward and backward, against its arithmetic
SLOW_NORM = 8.0  # floats moved by a norm and the sum, a branch and value, that `mixed` saves
PLAIN = 4.0  # the reference back end against the kernels


class Costs(NamedTuple):
    """Multiply-adds a place of the output, or their time in floats moved; infinite where a route cannot go."""

    moments: float
    mixed: float
    per_branch: float


def costs(unit: Unit, x: Tensor) -> Costs:
    """Of the three routes, forward and backward."""
    per_branch = _branches(unit, x) + MOVE * SLOW_NORM * unit.channels[1] * len(unit.branches)
    return Costs(_moments(unit, x), _branches(unit, x) if supports(unit, x) else float("inf"), per_branch)


def _moments(unit: Unit, x: Tensor) -> float:
    """Convolution, its two gradients, the moments and theirs; the algebra on kernels, shared by all places."""
    (c_in, c_out), geometry = unit.channels, unit.geometry
    size = geometry.kernel_size[0] * geometry.kernel_size[1] * c_in // geometry.groups
    depthwise = c_in == geometry.groups
    square = geometry.groups * size * size
    products = 3 * c_out * size + 1.5 * square * (LAG if depthwise and geometry.stride == (1, 1) else 1)
    algebra = 2 * len(unit.convs) * c_out * size * size / _places(unit, x)
    moved = MOVE * 5 * (c_in * geometry.stride[0] * geometry.stride[1] + c_out)
    plain = isinstance(passes_for(x, geometry, c_out), Reference)
    return (products + moved) * (PLAIN if plain else 1) + algebra


def _branches(unit: Unit, x: Tensor) -> float:
    """Every branch's convolution and its gradients, and what `mixed` moves."""
    (c_in, c_out), geometry = unit.channels, unit.geometry
    c_in_places = c_in * geometry.stride[0] * geometry.stride[1]
    total = MOVE * 5 * c_out  # the output and its gradient
    for branch in unit.branches:
        if branch.conv is None:
            total += MOVE * 8 * c_in_places
            continue
        slow = SLOW_DEPTHWISE if geometry.groups == c_in > 1 else 1.0
        total += 3 * slow * branch.conv.weight.numel() + MOVE * (8 * c_out + 3 * c_in_places)
    return total + MOVE * 3 * c_in_places * (len(unit.branches) - 1)  # adding up the input's gradients


def _places(unit: Unit, x: Tensor) -> int:
    (down, across), (b, _, h, w) = unit.geometry.stride, x.shape
    return max(1, b * (h // down) * (w // across))
