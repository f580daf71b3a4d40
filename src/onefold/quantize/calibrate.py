"""Calibration: one pass over the network, with batches of images, that quantizes every activation, weight and bias.

The graph is evaluated node by node, twice side by side: in floating point, and with everything quantized so far. So a
weight is rounded for the inputs that its layer will really get, and a bias can compensate for earlier errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from onefold.errors import BadArgument
from onefold.quantize.cross_layer_equalization import (
    equalizable_pairs,
    nearest_power_of_two,
    rescale_pair_,
    shorten_scale_mantissa,
    shorten_scale_mantissas,
)
from onefold.quantize.gptq import gptq_round, input_moments, round_to_nearest
from onefold.quantize.graph import (
    Layer,
    compute_node,
    find_layers,
    free_used_inputs,
    get_parameter,
    map_over_batches,
    parallel_batches,
    quantized_activations,
    zero_padding_input,
)
from onefold.quantize.qparams import (
    LayerError,
    ModelQParams,
    QParams,
    QuantizationMethod,
    choose_qparams,
    weight_scales,
)

_progress = logging.getLogger("onefold.progress")

_MAX_BIAS = 2.0**30


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer's integer weight `q` (shaped as the weight), its scales (O,), and its bias (O,) in float."""

    q: Tensor
    scales: Tensor
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in float, after rounding."""
        return self.q * self.scales.view(-1, *[1] * (self.q.dim() - 1))


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """All that makes a network an int8 model: activations by node, layers, and the error of each layer."""

    activations: Mapping[Node, QParams]
    layers: Mapping[Layer, QuantizedLayer]
    reports: tuple[LayerError, ...]


@torch.no_grad()
def calibrate(graph: GraphModule, batches: Sequence[Tensor], method: QuantizationMethod) -> CalibrationResult:
    """Quantize a graph by batches (B, C, H, W); with `method.power_of_two_scales` the graph is first rescaled in place.

    Raises BadArgument where `method.skip_layers` names a layer that does not exist.
    """
    with parallel_batches():
        calibrator = _Calibrator(graph, batches, method)
        for number, node in enumerate(graph.graph.nodes):
            counted = {"done": number, "total": len(graph.graph.nodes), "unit": "operation "}
            _progress.debug("calibrating", extra={**counted, "part": True})
            if node.op != "output":
                calibrator.evaluate(node)
        _progress.debug("calibrated", extra={"done": 1, "total": 1})
    return CalibrationResult(calibrator.activations, calibrator.quantized, tuple(calibrator.reports))


class _Calibrator:
    """The state of a calibration: the float and quantized values, by batch, that later nodes still read."""

    def __init__(self, graph: GraphModule, batches: Sequence[Tensor], method: QuantizationMethod) -> None:
        self._graph, self._batches, self._method = graph, batches, method
        all_layers = find_layers(graph)
        pairs = equalizable_pairs(all_layers) if method.power_of_two_scales else []
        self._pairs = {first.node: (first, second) for first, second in pairs}
        self._rescaled = frozenset(first.output for first, _ in pairs)
        names = {layer.name for layer in all_layers}
        if unknown := set(method.skip_layers) - names:
            raise BadArgument(
                f"there is no layer {sorted(unknown)[0]!r} to skip; the layers are {', '.join(sorted(names))}"
            )
        to_quantize = [layer for layer in all_layers if layer.name not in method.skip_layers]
        self._layers = {layer.node: layer for layer in to_quantize}
        self._activations = set(quantized_activations(to_quantize))
        self._outputs = {layer.output: layer for layer in all_layers}
        self._float: dict[Node, list[object]] = {}
        self._quantized: dict[Node, list[object]] = {}
        self.activations: dict[Node, QParams] = {}
        self.quantized: dict[Layer, QuantizedLayer] = {}
        self.reports: list[LayerError] = []

    def evaluate(self, node: Node) -> None:
        """Compute a node's float and quantized values; quantize it where it is a layer or a quantized activation."""
        self._float[node] = compute_node(self._graph, node, self._float, self._batches)
        if node in self._pairs:
            self._rescale(*self._pairs[node])
        if node in self._layers:
            self._quantize_layer(self._layers[node])
        else:
            self._quantized[node] = compute_node(self._graph, node, self._quantized, self._batches)
        if node in self._activations:
            self._quantize_activation(node)
        if node in self._outputs:
            self._report(self._outputs[node])
        free_used_inputs(node, self._quantized, self._float)

    def _rescale(self, first: Layer, second: Layer) -> None:
        """Rescale the activation between two layers so that its best scale is a power of two (see equalization)."""
        sums = self._float[first.node]
        values = sums
        if first.output is not first.node:
            values = compute_node(self._graph, first.output, {**self._float, first.node: sums}, self._batches)
        scale = choose_qparams([x for x in values if isinstance(x, Tensor)], self._method.range_method).scale
        factor = scale / nearest_power_of_two(scale)
        rescale_pair_(self._graph, first, second, factor)
        self._float[first.node] = map_over_batches(lambda x: x.div_(factor), sums)
        for node in (*first.node.args, *second.node.args):  # the attributes are new tensors now
            if isinstance(node, Node) and node.op == "get_attr" and node in self._float:
                self._float[node] = self._quantized[node] = compute_node(self._graph, node, {}, self._batches)

    def _quantize_layer(self, layer: Layer) -> None:
        """Quantize a layer, and compute its quantized values."""
        method, weight = self._method, get_parameter(self._graph, layer.weight)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else get_parameter(self._graph, layer.bias)
        moments = None
        if method.correct_weights or method.rounding == "gptq":
            exact = self._inputs(self._float, layer.node) if method.correct_weights else None
            moments = input_moments(layer, self._inputs(self._quantized, layer.node), exact, weight)
        flat = moments.correct_weight(weight.flatten(1)) if moments and method.correct_weights else weight.flatten(1)
        per_tensor = method.weights == "tensor"
        scales = weight_scales(flat, qmax=method.weight_qmax, per_tensor=per_tensor, clip=method.clip_weights)

        def round_weight(scales: Tensor) -> Tensor:
            if moments and method.rounding == "gptq":
                return gptq_round(flat, scales, method.weight_qmax, moments.covariance)
            return round_to_nearest(flat, scales, method.weight_qmax)

        input_scale = self.activations[layer.source].scale
        scales = shorten_scale_mantissas(scales, input_scale) if method.power_of_two_scales else scales
        result = _round_layer(weight, bias, scales, input_scale, round_weight)
        inputs, no_bias = self._inputs(self._quantized, layer.node), torch.zeros_like(bias)
        rounded, kernel = list(self._float[layer.node]), result.weight
        sums = map_over_batches(lambda x: _run(layer, x, kernel, no_bias), inputs)
        if method.correct_bias:
            errors = map_over_batches(_total_difference, rounded, sums)
            error = sum(errors[1:], errors[0]) / sum(len(x) for x in sums)  # of the sums without a bias
            result = _with_bias(result, error, input_scale)
        shape = (-1, *[1] * (sums[0].dim() - 2))
        self._quantized[layer.node] = map_over_batches(lambda x: x.add_(result.bias.view(shape)), sums)
        self.quantized[layer] = result

    def _inputs(self, values: Mapping[Node, list[object]], node: Node) -> list[Tensor]:
        source = node.args[0]
        assert isinstance(source, Node)
        return [x for x in values[source] if isinstance(x, Tensor)]

    def _quantize_activation(self, node: Node) -> None:
        chunks = [x for x in self._quantized[node] if isinstance(x, Tensor)]
        unpadded = zero_padding_input(node)
        if unpadded in self.activations:
            # Padding adds only zeros, which every quantization represents: it keeps its input's parameters.
            qparams = self.activations[unpadded]
        else:
            qparams = choose_qparams(chunks, self._method.range_method)
            if node in self._rescaled:
                qparams = QParams(nearest_power_of_two(qparams.scale), qparams.zero_point)
            elif self._method.power_of_two_scales:
                qparams = shorten_scale_mantissa(qparams)
        self.activations[node] = qparams
        self._quantized[node] = map_over_batches(qparams.fake_quantize, chunks)

    def _report(self, layer: Layer) -> None:
        is_quantized = layer in self.quantized
        weight = get_parameter(self._graph, layer.weight)
        rounded = self.quantized[layer].weight if is_quantized else weight
        powers = map_over_batches(_powers, self._float[layer.output], self._quantized[layer.output])
        signal, noise = (sum(column) for column in zip(*powers, strict=True))
        weight_noise = float(((weight - rounded) ** 2).sum())
        self.reports.append(
            LayerError(
                name=layer.name,
                output_db=_decibels(signal, noise),
                weight_db=_decibels(float((weight**2).sum()), weight_noise),
                quantized=is_quantized,
            )
        )


def _total_difference(a: Tensor, b: Tensor) -> Tensor:
    """Sum the means of a - b over the maps (C,), image by image."""
    return (a - b).mean([dim for dim in range(a.dim()) if dim != 1]) * len(a)


def _powers(exact: Tensor, rounded: Tensor) -> tuple[float, float]:
    """Compute the squared norms of the exact values and of the error of the rounded ones."""
    return float(exact.norm().double() ** 2), float((exact - rounded).norm().double() ** 2)


def _run(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    assert callable(layer.node.target)
    output: Tensor = layer.node.target(x, weight, bias, *layer.node.args[3:])
    return output


def quantize_layer(params: ModelQParams, weight: Tensor, bias: Tensor, input_scale: float) -> QuantizedLayer:
    """Quantize a weight (O, ...) and bias (O,) by rounding to nearest, as `params` says."""
    flat = weight.flatten(1)
    per_tensor = params.weights == "tensor"
    scales = weight_scales(flat, qmax=params.weight_qmax, per_tensor=per_tensor, clip=False)
    scales = shorten_scale_mantissas(scales, input_scale)
    return _round_layer(weight, bias, scales, input_scale, lambda s: round_to_nearest(flat, s, params.weight_qmax))


def _round_layer(
    weight: Tensor, bias: Tensor, scales: Tensor, input_scale: float, round_weight: Callable[[Tensor], Tensor]
) -> QuantizedLayer:
    """Quantize a weight (O, ...) and bias (O,) with these scales (O,); `round_weight` gives the integers (O, K)."""
    # A row of tiny weights would have a scale so small that its bias overflows 32 bits: such a scale is enlarged.
    smallest = bias.abs() / (input_scale * _MAX_BIAS)
    scales = torch.where(scales < smallest, shorten_scale_mantissas(smallest, input_scale), scales)
    return _with_bias(QuantizedLayer(round_weight(scales).view_as(weight), scales, bias), bias, input_scale)


def _with_bias(quantized: QuantizedLayer, bias: Tensor, input_scale: float) -> QuantizedLayer:
    """Replace the bias, rounded to the 32-bit integers that runtimes add to the sums."""
    scale = quantized.scales.double() * input_scale
    q_bias = torch.round(bias.double() / scale)
    return QuantizedLayer(quantized.q, quantized.scales, (q_bias * scale).float())


def _decibels(signal: float, noise: float) -> float:
    return float(10 * torch.log10(torch.tensor(max(signal, 1e-30) / max(noise, 1e-30))))
