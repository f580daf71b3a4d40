"""Quantization-aware training (QAT): a network that trains as the int8 model it will become.

A unit in training is one convolution at any moment, its norms with batch statistics or frozen (`merged_kernel`). That
kernel and its bias are rounded, and so are the quantized activations; gradients pass through the rounding unchanged,
and through a clamp where the value was inside (the straight-through estimator, arXiv 1308.3432; folding before rounding
as in arXiv 1712.05877, section 3.2). What `convert` makes of the weights afterwards is this network: the same integers
with the same scales.

The network keeps its parameters, names and modes; its class is exchanged for a subclass with another forward, as
torch's parametrizations do. A wrapper module would rename every tensor in every checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from onefold.quantize.calibrate import CalibrationResult, calibrate, quantize_layer
from onefold.quantize.convert import activation_names, extract_qparams
from onefold.quantize.cross_layer_equalization import equalize_
from onefold.quantize.graph import CONV_OPS, LINEAR_OPS, Layer, clamp_bounds, find_layers, get_parameter, trace
from onefold.quantize.qparams import QMAX, QMIN, ModelQParams, QParams, QuantizationMethod
from onefold.reparam import Chain, Sum, fuse, unfused_norms
from onefold.reparam.moments import merged_kernel

_DROPOUT = torch.ops.aten.dropout.default


def calibrate_qat(model: nn.Module, batches: Sequence[Tensor], method: QuantizationMethod) -> ModelQParams:
    """Choose the parameters that QAT of a training or fused network starts with, by batches (B, C, H, W).

    A fused network is changed in place to what post-training quantization makes of it - channels equalized, weights
    rounded, biases corrected - and QAT goes on from there.
    """
    was_training = model.training
    model.eval()
    fused = fuse(model) if unfused_norms(model) else model
    graph = trace(fused, batches[0][:2])
    if fused is model:
        equalize_(graph, batches, method.equalize)
    # Power-of-two scales rescale channels and clamps, and neither training branches nor a ReLU6 can follow that.
    if fused is not model or _has_upper_clamp(graph):
        method = replace(method, power_of_two_scales=False)
    calibration = calibrate(graph, batches, method)
    if fused is model:
        _copy_weights_(model, graph, calibration)
    model.train(was_training)
    return extract_qparams(calibration, method)


@torch.no_grad()
def _copy_weights_(model: nn.Module, graph: GraphModule, calibration: CalibrationResult) -> None:
    """Copy the calibrated weights and biases into a fused network."""
    parameters = dict(model.named_parameters())
    for layer in find_layers(graph):
        quantized = calibration.layers.get(layer)
        parameters[layer.weight].copy_(get_parameter(graph, layer.weight) if quantized is None else quantized.weight)
        if layer.bias is not None:
            parameters[layer.bias].copy_(get_parameter(graph, layer.bias) if quantized is None else quantized.bias)


def _has_upper_clamp(graph: GraphModule) -> bool:
    clamps = [layer.output for layer in find_layers(graph) if layer.output is not layer.node]
    return any(clamp_bounds(node.target, node.args[1:])[1] < math.inf for node in clamps)


def prepare_qat_(model: nn.Module, params: ModelQParams, shape: tuple[int, int, int]) -> nn.Module:
    """Make a network compute as the int8 model with these parameters from now on, in place; returns it.

    `shape` (C, H, W) is that of an image. State, names and modes of the network stay.
    """
    was_training = model.training
    model.eval()
    fused = fuse(model) if unfused_norms(model) else copy.deepcopy(model)
    structure = _FusedStructure.of(trace(fused, torch.zeros(2, *shape)), params)
    model.train(was_training)
    cls = type(model)
    model.__class__ = type(f"QAT{cls.__name__}", (_QATModel, cls), {"structure": structure})
    return model


def remove_qat_(model: nn.Module) -> nn.Module:
    """Make a network compute in floating point again, in place; returns it."""
    if isinstance(model, _QATModel):
        model.__class__ = type(model).__mro__[2]
    return model


class _QATModel(nn.Module):
    """The base class that `prepare_qat_` puts before a network's own class."""

    structure: _FusedStructure

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, N) of images (B, C, H, W) with fake quantization."""
        logits: Tensor = _FakeQuantInterpreter(self, self.structure).run(images)
        return logits


@dataclass(frozen=True, eq=False)
class _FusedStructure:
    """The graph of the fused network, whose weights are not used, its quantized layers and activations."""

    graph: GraphModule
    layers: Mapping[Node, Layer]
    activations: Mapping[Node, QParams]
    params: ModelQParams

    @classmethod
    def of(cls, graph: GraphModule, params: ModelQParams) -> _FusedStructure:
        quantized = [layer for layer in find_layers(graph) if layer.name not in params.skip_layers]
        activations = {node: params.activations[name] for node, name in activation_names(quantized).items()}
        return cls(graph, {layer.node: layer for layer in quantized}, activations, params)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FusedStructure:
        return self  # never changed: copies of a network, such as its average, share it


@dataclass(frozen=True, eq=False)
class _Unmerged:
    """A weight or bias that has to be merged from this training unit."""

    unit: nn.Module


class _FakeQuantInterpreter(Interpreter):
    """Runs the fused network's graph with the weights that the training network has now."""

    def __init__(self, model: nn.Module, structure: _FusedStructure) -> None:
        super().__init__(structure.graph)
        self._model, self._structure = model, structure

    def run_node(self, n: Node) -> Any:
        """Compute the node's value, fake-quantized where it is a quantized activation."""
        value = self._layer(n) if n.target in (*CONV_OPS, *LINEAR_OPS) else super().run_node(n)
        activations = self._structure.activations
        return _FakeQuantize.apply(value, activations[n]) if n in activations else value  # type: ignore[no-untyped-call]

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Get the network's own parameter, or the training unit that it has to be merged from."""
        value: Any = self._model
        for name in str(target).split("."):
            value = getattr(value, name)
            if isinstance(value, (Chain, Sum)):
                return _Unmerged(value)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run any other operation; dropout follows the network's mode, which the traced graph does not know."""
        if target is _DROPOUT:
            return torch.dropout(args[0], args[1], self._model.training)
        return super().call_function(target, args, kwargs)

    def _layer(self, node: Node) -> Tensor:
        args, _ = self.fetch_args_kwargs_from_env(node)
        x, weight, *rest = args
        if isinstance(weight, _Unmerged):
            kernel, bias = merged_kernel(weight.unit, x)
            weight, bias = (kernel if node.target in CONV_OPS else kernel.flatten(1)), bias
        else:
            bias = rest[0] if rest and rest[0] is not None else weight.new_zeros(len(weight))
        layer = self._structure.layers.get(node)
        if layer is not None:
            input_scale = self._structure.activations[layer.source].scale
            rounded = quantize_layer(self._structure.params, weight.detach(), bias.detach(), input_scale)
            weight = _StraightThrough.apply(weight, rounded.weight)  # type: ignore[no-untyped-call]
            bias = _StraightThrough.apply(bias, rounded.bias)  # type: ignore[no-untyped-call]
        assert callable(node.target)
        output: Tensor = node.target(x, weight, bias, *rest[1:])
        return output


class _StraightThrough(torch.autograd.Function):
    """Returns `other`; its gradient is passed to `value`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return other.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _FakeQuantize(torch.autograd.Function):
    """Rounds to the nearest representable values; the gradient passes where the value was in the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qparams: QParams) -> Tensor:
        q = torch.round(x * (1.0 / qparams.scale)) + qparams.zero_point
        ctx.save_for_backward((q >= QMIN) & (q <= QMAX))
        return (q.clamp_(QMIN, QMAX) - qparams.zero_point) * qparams.scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None
