"""One walk through the network, image batches in hand: every grid, kernel and bias is chosen where it is met.

The network is run node by node, twice side by side: as it is, and with all that was quantized so far. So a layer is
rounded for the inputs that it will really get, and its bias makes good what was lost before it.

    F values of the network in floating point    Q those with everything before quantized    both a list of batches
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from onefold.errors import BadArgument
from onefold.quantize.graph import Layer, layers, padded, parameter, points
from onefold.quantize.method import LayerReport, Method
from onefold.quantize.powers import power_near, revalue_, short, short_grid
from onefold.quantize.qparams import Grid, choose, weight_scales
from onefold.quantize.rounding import by_moments, moments_of, nearest
from onefold.quantize.walk import valued

_LARGEST_BIAS = 2.0**30


@dataclass(frozen=True, eq=False)
class Kernel:
    """A layer's kernel as whole numbers (shaped as its weight) with a scale an output (O,), and its bias (O,)."""

    whole: Tensor
    scales: Tensor
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        """The kernel in float, on its grid."""
        return self.whole * self.scales.view(-1, *[1] * (self.whole.dim() - 1))


@dataclass(frozen=True, eq=False)
class Calibration:
    """All that a network needs to be one of 8 bits: grids by point, kernels by layer, and what each layer lost."""

    grids: Mapping[Node, Grid]
    kernels: Mapping[Layer, Kernel]
    reports: tuple[LayerReport, ...]


@torch.no_grad()
def calibrate(graph: GraphModule, batches: Sequence[Tensor], method: Method) -> Calibration:
    """Choose every grid and kernel for these batches (B, C, H, W); with `method.powers` the graph is revalued first."""
    powers = revalue_(graph, batches, method.ranges) if method.powers else frozenset()
    walk = _Walk(graph, batches, method, powers)
    for node in graph.graph.nodes:
        if node.op != "output":
            walk.step(node)
    return Calibration(walk.grids, walk.kernels, tuple(walk.reports))


class _Walk:
    """Where the walk is: the values that later nodes still read."""

    def __init__(self, graph: GraphModule, batches: Sequence[Tensor], method: Method, powers: frozenset[Node]) -> None:
        self._graph, self._batches, self._method, self._powers = graph, batches, method, powers
        found = layers(graph)
        known = {layer.name for layer in found}
        if unknown := set(method.keep) - known:
            raise BadArgument(
                f"there is no layer {sorted(unknown)[0]!r} to keep; the layers are {', '.join(sorted(known))}"
            )
        taken = [layer for layer in found if layer.name not in method.keep]
        self._layers = {layer.node: layer for layer in found}
        self._taken = {layer.node for layer in taken}
        self._points = set(points(taken))
        self._ends = {layer.output: layer for layer in found}
        self._float: dict[Node, list[object]] = {}
        self._quant: dict[Node, list[object]] = {}
        self.grids: dict[Node, Grid] = {}
        self.kernels: dict[Layer, Kernel] = {}
        self.reports: list[LayerReport] = []

    def step(self, node: Node) -> None:
        """Give a node its values, both ways."""
        self._float[node] = valued(self._graph, node, self._float, self._batches)
        self._quant[node] = self._quantized(node)
        if node in self._points:
            self._snap(node)
        if node in self._ends:
            self._report(self._ends[node])
        for before in node.all_input_nodes:
            if all(user in self._quant for user in before.users):
                del self._float[before], self._quant[before]

    def _quantized(self, node: Node) -> list[object]:
        if node not in self._taken:
            return valued(self._graph, node, self._quant, self._batches)
        layer = self._layers[node]
        kernel = self._kernel(layer)
        self.kernels[layer] = kernel
        return [_run(layer, x, kernel.weight, kernel.bias) for x in self._tensors(self._quant, layer.node)]

    def _kernel(self, layer: Layer) -> Kernel:
        method, weight = self._method, parameter(self._graph, layer.weight)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else parameter(self._graph, layer.bias)
        moments = None
        if method.restore or method.rounding == "moments":
            given, true = (self._tensors(values, layer.node) for values in (self._quant, self._float))
            moments = moments_of(layer, given, true, weight)
        flat = moments.restored(weight.flatten(1)) if moments and method.restore else weight.flatten(1)
        scales = weight_scales(flat, limit=method.limit, per_tensor=method.weights == "tensor", search=method.search)

        def rounded(scales: Tensor) -> Tensor:
            if moments and method.rounding == "moments":
                return by_moments(flat, scales, method.limit, moments.covariance)
            return nearest(flat, scales, method.limit)

        input_scale = self.grids[layer.source].scale
        scales = short(scales, input_scale) if method.powers else scales
        kernel = settle(weight, bias, scales, input_scale, rounded)
        if method.correct:
            kernel = _with_bias(kernel, bias + self._shift(layer, kernel), input_scale)
        return kernel

    def _shift(self, layer: Layer, kernel: Kernel) -> Tensor:
        """How much the mean of each output (O,) has fallen."""
        lost: Tensor | float = 0.0
        full = self._tensors(self._float, layer.node)
        weight = parameter(self._graph, layer.weight)
        bias = torch.zeros_like(kernel.bias) if layer.bias is None else parameter(self._graph, layer.bias)
        for true, x in zip(full, self._tensors(self._quant, layer.node), strict=True):
            gap = _run(layer, true, weight, bias) - _run(layer, x, kernel.weight, kernel.bias)
            lost = lost + gap.transpose(0, 1).flatten(1).mean(1)
        assert isinstance(lost, Tensor)
        return lost / len(full)

    def _tensors(self, values: Mapping[Node, list[object]], node: Node) -> list[Tensor]:
        source = node.args[0]
        assert isinstance(source, Node)
        return [x for x in values[source] if isinstance(x, Tensor)]

    def _snap(self, node: Node) -> None:
        chunks = [x for x in self._quant[node] if isinstance(x, Tensor)]
        before = padded(node)
        grid = self.grids[before] if before in self.grids else self._chosen(node, chunks)
        self.grids[node] = grid
        self._quant[node] = [grid.snap(x) for x in chunks]

    def _chosen(self, node: Node, chunks: Sequence[Tensor]) -> Grid:
        """The best grid; with a power of two as its step where that costs nothing."""
        grid = choose(chunks, self._method.ranges)
        if node in self._powers:
            return Grid(power_near(grid.scale), grid.zero)
        return short_grid(grid) if self._method.powers else grid

    def _report(self, layer: Layer) -> None:
        taken = layer in self.kernels
        weight = parameter(self._graph, layer.weight)
        on_grid = self.kernels[layer].weight if taken else weight
        pairs = zip(self._float[layer.output], self._quant[layer.output], strict=True)
        found = [(float((f**2).sum()), float(((f - q) ** 2).sum())) for f, q in pairs]  # type: ignore[operator]
        signal, noise = (sum(each) for each in zip(*found, strict=True))
        weight_noise = float(((weight - on_grid) ** 2).sum())
        self.reports.append(
            LayerReport(
                name=layer.name,
                output_db=_decibels(signal, noise),
                weight_db=_decibels(float((weight**2).sum()), weight_noise),
                quantized=taken,
            )
        )


def _run(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    assert callable(layer.node.target)
    answer: Tensor = layer.node.target(x, weight, bias, *layer.node.args[3:])
    return answer


def settle(
    weight: Tensor, bias: Tensor, scales: Tensor, input_scale: float, rounded: Callable[[Tensor], Tensor]
) -> Kernel:
    """A kernel (O, ...) and bias (O,) on grids of these scales (O,), whole numbers (O, K) chosen by `rounded`.

    A row of next to nothing would have steps so fine that its bias overflows 32 bits: it gets coarser ones.
    """
    least = bias.abs() / (input_scale * _LARGEST_BIAS)
    scales = torch.where(scales < least, short(least, input_scale), scales)
    return _with_bias(Kernel(rounded(scales).view_as(weight), scales, bias), bias, input_scale)


def _with_bias(kernel: Kernel, bias: Tensor, input_scale: float) -> Kernel:
    """The kernel with this bias on the grid of its sums, as the 32-bit whole numbers that runtimes add."""
    step = kernel.scales.double() * input_scale
    whole = torch.round(bias.double() / step)
    return Kernel(kernel.whole, kernel.scales, (whole * step).float())


def _decibels(signal: float, noise: float) -> float:
    return float(10 * torch.log10(torch.tensor(max(signal, 1e-30) / max(noise, 1e-30))))
