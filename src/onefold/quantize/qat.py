"""Quantization-aware training: a network that trains as the network of 8 bits it will be.

A unit in training is one kernel at any moment, its norms on the batch's statistics or frozen (`reparam.live`). That
kernel is rounded to its grid, the bias to that of the sums, every point's values to theirs; gradients pass through the
rounding as if it were not there, and through a clip where the value was inside (the straight-through estimator, arXiv
1308.3432; folding before rounding as in arXiv 1712.05877, section 3.2). What `ship` makes of the weights afterwards is
this network: the same whole numbers on the same grids.

The network keeps its parameters, names and modes; only its forward is another one, as in torch's parametrizations.
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

from onefold.quantize.calibrate import Calibration, calibrate
from onefold.quantize.equalize import equalize_
from onefold.quantize.graph import CONVS, LINEARS, Layer, bounds_of, layers, parameter, trace
from onefold.quantize.method import Method
from onefold.quantize.qparams import HIGHEST, LOWEST, Grid
from onefold.quantize.settled import Grids, grids_of, names_of
from onefold.reparam import Chain, Sum, fuse, unfused_norms
from onefold.reparam.moments import merged_kernel

_DROPOUT = torch.ops.aten.dropout.default


def calibrated(model: nn.Module, batches: Sequence[Tensor], method: Method) -> Grids:
    """The grids that a training or fused network begins with, by batches (B, C, H, W) as it sees them.

    A fused network becomes, in place, what the method makes of it after training: channels alike, kernels rounded,
    biases corrected. It goes on from there.
    """
    was_training = model.training
    model.eval()
    fused = fuse(model) if unfused_norms(model) else model
    graph = trace(fused, batches[0][:2])
    if fused is model:
        equalize_(graph, batches, method.equalize)
    if fused is not model or _has_ceilings(graph):  # which could not follow to other values
        method = replace(method, powers=False)
    found = calibrate(graph, batches, method)
    if fused is model:
        _take_over_(model, graph, found)
    model.train(was_training)
    return grids_of(found, method)


@torch.no_grad()
def _take_over_(model: nn.Module, graph: GraphModule, found: Calibration) -> None:
    """Give a fused network the kernels and biases that it was found to have on its grids."""
    own = dict(model.named_parameters())
    for layer in layers(graph):
        kernel = found.kernels.get(layer)
        own[layer.weight].copy_(parameter(graph, layer.weight) if kernel is None else kernel.weight)
        if layer.bias is not None:
            own[layer.bias].copy_(parameter(graph, layer.bias) if kernel is None else kernel.bias)


def _has_ceilings(graph: GraphModule) -> bool:
    clamps = [layer.output for layer in layers(graph) if layer.output is not layer.node]
    return any(bounds_of(node.target, node.args[1:])[1] < math.inf for node in clamps)


def make_aware_(model: nn.Module, grids: Grids, shape: tuple[int, int, int]) -> nn.Module:
    """Let a network compute as the network of 8 bits on these grids from now on, in place; gives it back.

    `shape` (C, H, W) is that of an image. State, names and modes of the network stay.
    """
    was_training = model.training
    model.eval()
    fused = fuse(model) if unfused_norms(model) else copy.deepcopy(model)
    form = _Form.of(trace(fused, torch.zeros(2, *shape)), grids)
    model.train(was_training)
    kind = type(model)
    model.__class__ = type(f"Aware{kind.__name__}", (_Aware, kind), {"form": form})
    return model


def is_aware(model: nn.Module) -> bool:
    """Whether a network was given grids by `make_aware_`."""
    return isinstance(model, _Aware)


def plain_(model: nn.Module) -> nn.Module:
    """The network in floating point again, in place; gives it back."""
    if isinstance(model, _Aware):
        model.__class__ = type(model).__mro__[2]
    return model


class _Aware(nn.Module):
    """What `make_aware_` puts before a network's own class."""

    form: _Form

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N), computed on the grids."""
        answer: Tensor = _Walk(self, self.form).run(images)
        return answer


@dataclass(frozen=True, eq=False)
class _Form:
    """The fused network's structure - none of its weights are used -, its layers, and the grids by node."""

    graph: GraphModule
    taken: Mapping[Node, Layer]
    on: Mapping[Node, Grid]
    grids: Grids

    @classmethod
    def of(cls, graph: GraphModule, grids: Grids) -> _Form:
        taken = [layer for layer in layers(graph) if layer.name not in grids.keep]
        on = {node: grids.points[name] for node, name in names_of(taken).items()}
        return cls(graph, {layer.node: layer for layer in taken}, on, grids)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Form:
        return self


@dataclass(frozen=True, eq=False)
class _Part:
    """A weight or bias of the fused network, still to be made: of this tree."""

    tree: nn.Module


class _Walk(Interpreter):
    """The fused network's course, with the kernels that the training network has now."""

    def __init__(self, model: nn.Module, form: _Form) -> None:
        super().__init__(form.graph)
        self._model, self._form = model, form

    def run_node(self, n: Node) -> Any:
        """The node's value, on its grid where it has one."""
        value = self._layer(n) if n.target in (*CONVS, *LINEARS) else super().run_node(n)
        return _snap(value, self._form.on[n]) if n in self._form.on else value

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's own parameter, or the tree that it is folded from."""
        holder: Any = self._model
        for part in str(target).split("."):
            holder = getattr(holder, part)
            if isinstance(holder, (Chain, Sum)):
                return _Part(holder)
        return holder

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any other operation, dropout in the network's mode."""
        if target is _DROPOUT:
            return torch.dropout(args[0], args[1], self._model.training)
        return super().call_function(target, args, kwargs)

    def _layer(self, node: Node) -> Tensor:
        args, _ = self.fetch_args_kwargs_from_env(node)
        x, weight, *rest = args
        if isinstance(weight, _Part):
            kernel, bias = merged_kernel(weight.tree, x)
            weight, bias = (kernel if node.target in CONVS else kernel.flatten(1)), bias
        else:
            bias = rest[0] if rest and rest[0] is not None else weight.new_zeros(len(weight))
        layer = self._form.taken.get(node)
        if layer is not None:
            made = self._form.grids.kernel(weight.detach(), bias.detach(), self._form.on[layer.source].scale)
            weight, bias = _through(weight, made.weight), _through(bias, made.bias)
        assert callable(node.target)
        answer: Tensor = node.target(x, weight, bias, *rest[1:])
        return answer


class _Through(torch.autograd.Function):
    """Another value, the gradient of the one given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return other.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _through(value: Tensor, other: Tensor) -> Tensor:
    found: Tensor = _Through.apply(value, other)  # type: ignore[no-untyped-call]
    return found


def _snap(x: Tensor, grid: Grid) -> Tensor:
    found: Tensor = _Snap.apply(x, grid)  # type: ignore[no-untyped-call]
    return found


class _Snap(torch.autograd.Function):
    """The nearest values on a grid; the gradient of those within its range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        q = torch.round(x * (1.0 / grid.scale)) + grid.zero
        ctx.save_for_backward((q >= LOWEST) & (q <= HIGHEST))
        return (q.clamp_(LOWEST, HIGHEST) - grid.zero) * grid.scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None
