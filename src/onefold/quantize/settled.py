"""A network of 8 bits as its weights and a few numbers: the grid of every point, and a rule for the kernels.

Where the kernels are the nearest on a grid that follows from themselves, nothing else need be kept: `Grids` fits into
a card beside the weights, and `ship` makes the network of 8 bits of both, the same bits wherever it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from onefold.errors import BadArgument
from onefold.quantize.calibrate import Calibration, Kernel, settle
from onefold.quantize.convert import build_
from onefold.quantize.graph import Layer, layers, padded, parameter, points, trace
from onefold.quantize.integer import WholeNumbers
from onefold.quantize.method import Method
from onefold.quantize.powers import short
from onefold.quantize.qparams import HIGHEST, LOWEST, Grid, weight_scales
from onefold.quantize.rounding import nearest


@dataclass(frozen=True, kw_only=True)
class Grids:
    """The grids of a network's points by their names (see `names_of`), and what its kernels are put on.

    `weights` have a scale a "channel" or a "tensor", whole numbers up to `limit`; `keep` names layers left in float.
    """

    points: Mapping[str, Grid]
    weights: Literal["channel", "tensor"] = "channel"
    limit: int = 127
    keep: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the exact inverse."""
        return {**asdict(self), "points": {name: [g.scale, g.zero] for name, g in self.points.items()}}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Grids:
        """The grids that `to_dict` wrote. Raises BadArgument where they are none."""
        try:
            points = {str(name): _grid(*pair) for name, pair in plain["points"].items()}
            weights, limit = plain["weights"], plain["limit"]
            keep = tuple(str(name) for name in plain["keep"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadArgument(f"the grids of this network cannot be read ({error!r}): calibrate it again") from error
        if weights not in ("channel", "tensor") or limit not in (63, 127):
            raise BadArgument(f"expected grids a channel or a tensor up to 63 or 127, came {weights!r}, {limit!r}")
        return cls(points=points, weights=weights, limit=limit, keep=keep)

    def kernel(self, weight: Tensor, bias: Tensor, input_scale: float) -> Kernel:
        """A kernel (O, ...) and bias (O,) on their grids: the largest weight of each row, or of all, is `limit`."""
        flat = weight.flatten(1)
        scales = weight_scales(flat, limit=self.limit, per_tensor=self.weights == "tensor", search=False)
        scales = short(scales, input_scale)
        return settle(weight, bias, scales, input_scale, lambda s: nearest(flat, s, self.limit))


def grids_of(found: Calibration, method: Method) -> Grids:
    """The grids of a calibrated network, by name."""
    names = names_of([*found.kernels])
    known = {names[node]: grid for node, grid in found.grids.items()}
    return Grids(points=known, weights=method.weights, limit=method.limit, keep=method.keep)


def names_of(taken: list[Layer]) -> dict[Node, str]:
    """A name for each point of these layers: what the first of them reads or gives there."""
    named: dict[Node, str] = {}
    for layer in taken:
        if (before := padded(layer.source)) is not None:
            named.setdefault(before, f"{layer.name}:before")
        named.setdefault(layer.source, f"{layer.name}:in")
        named.setdefault(layer.output, f"{layer.name}:out")
    return {node: named[node] for node in points(taken)}


@torch.no_grad()
def ship(fused: nn.Module, grids: Grids, shape: tuple[int, int, int]) -> WholeNumbers:
    """The network of 8 bits that a fused network in eval mode is on these grids; `shape` (C, H, W) of its images.

    Raises BadArgument where the grids are another network's.
    """
    graph = trace(fused, torch.zeros(2, *shape))
    taken = [layer for layer in layers(graph) if layer.name not in grids.keep]
    names = names_of(taken)
    if set(names.values()) != set(grids.points):
        strange = sorted(set(names.values()) ^ set(grids.points))[0]
        raise BadArgument(f"the grids are those of another network: {strange} is not in both; calibrate this one")
    on = {node: grids.points[name] for node, name in names.items()}
    kernels = {}
    for layer in taken:
        weight = parameter(graph, layer.weight)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else parameter(graph, layer.bias)
        kernels[layer] = grids.kernel(weight, bias, on[layer.source].scale)
    return WholeNumbers(build_(graph, Calibration(on, kernels, ())))


def _grid(scale: Any, zero: Any) -> Grid:
    if type(scale) is not float or not 0 < scale < 1e30 or type(zero) is not int or not LOWEST <= zero <= HIGHEST:
        raise ValueError(f"{scale!r:.40}, {zero!r:.40} is no grid")
    return Grid(scale, zero)
