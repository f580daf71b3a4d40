"""Linear trees in networks of other projects: layers in series and in parallel, held where they stand, as plain data.

They are what `Chain` and `Sum` are in our networks. A tree is evaluated in training by the routes where it is a unit -
parallel convolutions, each with its norm -, and else as one convolution by the moments of its input (`_Merge`), folded
by the rules of the algebra: a norm after a sum of norms, layer scales, a difference, a skip without a norm.

Shapes: G groups, O/G outputs a group, K = I/G * H * W values a patch; see `branches` and `moments`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam import routes
from onefold.reparam.branches import Branch, check_batch_size, common_geometry, make_unit, use_batch_statistics
from onefold.reparam.folding_rules import fold
from onefold.reparam.fused_norms import normalize_and_sum
from onefold.reparam.fused_norms import supports as mix_supports
from onefold.reparam.kernels import select_backend
from onefold.reparam.kernels.base import ClampMax, Geometry
from onefold.reparam.stencil import Stencil


@dataclass(frozen=True, eq=False)
class InputNode:
    """What the tree is applied to."""


@dataclass(frozen=True, eq=False)
class LayerNode:
    """A convolution of the input, or a norm of a tree."""

    module: nn.Module
    of: Expression


@dataclass(frozen=True, eq=False)
class ScaleNode:
    """A tree times one gain a channel, or times a number."""

    gain: Tensor | float
    of: Expression


@dataclass(frozen=True, eq=False)
class SumNode:
    """Trees of the same input, added."""

    terms: tuple[Expression, ...]


Expression = InputNode | LayerNode | ScaleNode | SumNode


@dataclass(frozen=True, eq=False)
class LinearTree:
    """A linear tree, and the modules after it: `tail` is what its last norm's own forward computes besides."""

    expression: Expression
    tail: tuple[nn.Module, ...] = ()
    act: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The tree in training, with what comes after it, by the way that costs least: (B, I, H, W) to its output."""
        return _evaluate(self, x)


def tree_layers(expression: Expression) -> Iterator[nn.Module]:
    """The convolutions and norms of a tree."""
    if isinstance(expression, LayerNode):
        yield from tree_layers(expression.of)
        yield expression.module
    elif isinstance(expression, ScaleNode):
        yield from tree_layers(expression.of)
    elif isinstance(expression, SumNode):
        for term in expression.terms:
            yield from tree_layers(term)


def as_branches(expression: Expression) -> tuple[list[Branch], int] | None:
    """The parallel convolutions and norms that a tree is, and how many skips without a norm; None for other trees."""
    branches, skips = [], 0
    for term in expression.terms if isinstance(expression, SumNode) else (expression,):
        if isinstance(term, InputNode):
            skips += 1
        elif not isinstance(term, LayerNode) or not isinstance(term.module, _BatchNorm):
            return None
        elif isinstance(term.of, InputNode):
            branches.append(Branch(None, term.module))
        elif (
            isinstance(term.of, LayerNode)
            and isinstance(term.of.module, nn.Conv2d)
            and isinstance(term.of.of, InputNode)
        ):
            branches.append(Branch(term.of.module, term.module))
        else:
            return None
    return branches, skips


def merged_geometry(expression: Expression) -> Geometry | None:
    """The patch of the one convolution that a tree is; None where it is none, or its kernels differ in form."""
    layers = list(tree_layers(expression))
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    if any(isinstance(layer, nn.SyncBatchNorm) for layer in layers):
        return None
    return common_geometry(convs, has_skip=_has_skip(expression))


def _has_skip(expression: Expression) -> bool:
    """Whether the tree reads its input without a convolution somewhere."""
    if isinstance(expression, SumNode):
        return any(_has_skip(term) for term in expression.terms)
    if isinstance(expression, LayerNode) and isinstance(expression.module, nn.Conv2d):
        return False
    return isinstance(expression, InputNode) or _has_skip(expression.of)


# ----------------------------------------------------------------------------------- evaluation


_SMALLEST_MAPS = 4 << 20
"""Values of input and output together from which a convolution with its norm gains by a route: smaller maps stay in
the caches between layers, where the library's own are as fast or faster. An estimate, on one core."""


@routes.graph_break
def _evaluate(tree: LinearTree, x: Tensor) -> Tensor:
    after = [*tree.tail, *([] if tree.act is None else [tree.act])]
    first = after[0] if after else None
    small = _is_small(tree.expression, x)
    y = None if small else _by_unit(tree.expression, x, first)
    if y is None and not small and _merging_costs(tree.expression, x) < float("inf"):
        y = routes.apply_with_activation(first, partial(_merge, tree.expression, x))
    if y is None:  # the last norm's own forward computes the tail
        y, first, after = _per_layer(tree.expression, x), None, [None, *after[len(tree.tail) :]]  # type: ignore[list-item]
    for module in after[1:]:
        y = module(y)
    return y


def _is_small(expression: Expression, x: Tensor) -> bool:
    """Whether a tree is one convolution and its norm on maps that a route makes no quicker."""
    convs = [layer for layer in tree_layers(expression) if isinstance(layer, nn.Conv2d)]
    if len(convs) != 1 or _has_skip(expression):
        return False
    conv = convs[0]
    outputs = x.numel() // conv.in_channels * conv.out_channels // (conv.stride[0] * conv.stride[-1])
    return x.numel() + outputs < _SMALLEST_MAPS


def _per_layer(expression: Expression, x: Tensor) -> Tensor:
    """The value of a tree, layer by layer, but for the units in it: (B, I, H, W) to (B, O, H', W')."""
    if isinstance(expression, InputNode):
        return x
    if isinstance(expression, SumNode):
        return reduce(torch.add, (_part(term, x) for term in expression.terms))
    y = _part(expression.of, x)
    if isinstance(expression, LayerNode):
        value: Tensor = expression.module(y)
        return value
    gain = expression.gain
    return y * (gain if isinstance(gain, float) else gain.view(-1, 1, 1))


def _part(expression: Expression, x: Tensor) -> Tensor:
    """The value of a part of a tree."""
    y = None if isinstance(expression, InputNode) or _is_small(expression, x) else _by_unit(expression, x, None)
    return _per_layer(expression, x) if y is None else y


def _by_unit(expression: Expression, x: Tensor, act: nn.Module | None) -> Tensor | None:
    """The value where the tree is a unit, with skips beside it, and one of the routes costs less than its layers."""
    found = as_branches(expression)
    if found is None or not found[0]:
        return None
    branches, skips = found
    if skips and _merging_costs(expression, x) < float("inf"):
        return None  # one convolution takes the skips too
    unit = make_unit(branches)
    own = None if skips else act
    if unit is not None:
        y = routes.forward_by_cheapest_route(unit, x, own)
    elif use_batch_statistics(branches) and mix_supports(branches, x):
        y = routes.apply_with_activation(own, partial(normalize_and_sum, branches, x))
    else:
        return None
    if y is None or not skips:
        return y
    y = y + (x if skips == 1 else skips * x)
    return y if act is None else act(y)


# ------------------------------------------------------------------------ as one convolution

_SMALL_ALGEBRA = 1e6  # multiply-adds that take as long as the algebra's operations on small matrices, once a batch


def _merging_costs(expression: Expression, x: Tensor) -> float:
    """What one convolution costs a place of the output, less than the layers; infinite where it does not."""
    geometry, found = merged_geometry(expression), as_branches(expression)
    if (
        geometry is None
        or (found is not None and not found[1])
        or not any(isinstance(m, _BatchNorm) for m in tree_layers(expression))
    ):
        return float("inf")
    layers = list(tree_layers(expression))
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    if not any(norm.training or norm.running_mean is None for norm in norms):
        return float("inf")
    merging = routes.moments_cost(geometry, (convs[0].in_channels, convs[0].out_channels), len(convs), x)
    merging += _SMALL_ALGEBRA / routes.num_output_positions(geometry, x)
    by_layer = routes.per_layer_cost(convs, len(norms) + _num_added(expression), x)
    return merging if merging < by_layer else float("inf")


def _num_added(expression: Expression) -> float:
    """The additions and scalings of maps, in passes of a norm: about a third of one each."""
    if isinstance(expression, SumNode):
        return sum(_num_added(term) for term in expression.terms) + (len(expression.terms) - 1) / 3
    if isinstance(expression, ScaleNode):
        return _num_added(expression.of) + 1 / 3
    return _num_added(expression.of) if isinstance(expression, LayerNode) else 0


def _merge(expression: Expression, x: Tensor, act: ClampMax) -> Tensor:
    """act(tree(x)) by one convolution, with the batch's statistics by the moments of x. Moves the norms' buffers.

    Raises ValueError where a norm would see one value a channel, as BatchNorm does.
    """
    geometry = merged_geometry(expression)
    assert geometry is not None
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    call = _Call(expression, geometry, act, dtype)
    y: Tensor = _Merge.apply(call, x, *_parameters(expression))  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True, eq=False)
class _Call:
    """What is not a tensor of an evaluation."""

    expression: Expression
    geometry: Geometry
    act: ClampMax
    dtype: torch.dtype


def _parameters(expression: Expression) -> list[Tensor]:
    """The parameters of a tree, each once."""
    own: dict[int, Tensor] = {}

    def visit(part: Expression) -> None:
        if isinstance(part, SumNode):
            for term in part.terms:
                visit(term)
        elif isinstance(part, ScaleNode | LayerNode):
            tensors = [part.gain] if isinstance(part, ScaleNode) else [part.module.weight, part.module.bias]
            own.update({id(t): t for t in tensors if isinstance(t, Tensor)})
            visit(part.of)

    visit(expression)
    return list(own.values())


def _fold(expression: Expression, onto: Stencil) -> Stencil:
    """The stencil of a tree after `onto`, by the rules of its layers."""
    if isinstance(expression, InputNode):
        return onto
    if isinstance(expression, LayerNode):
        return fold(expression.module, _fold(expression.of, onto))
    if isinstance(expression, ScaleNode):
        before, gain = _fold(expression.of, onto), expression.gain
        values = before.bias.new_full((before.channels[1],), gain) if isinstance(gain, float) else gain.flatten()
        return before.then(Stencil.diagonal(values.to(before.bias)))
    return reduce(Stencil.__add__, (_fold(term, onto) for term in expression.terms))


@dataclass(frozen=True, eq=False)
class _Moments:
    """The moments of a batch's patches as the source of a stencil's statistics; gradients flow to them."""

    geometry: Geometry
    mean: Tensor
    covariance: Tensor
    num: int

    def statistics(self, stencil: Stencil) -> tuple[Tensor, Tensor, int]:
        """Mean (O,), biased variance (O,) and count of the stencil's output."""
        rows = _rows(stencil, self.geometry)
        centre = (rows @ self.mean[..., None]).flatten() + stencil.bias
        return centre, ((rows @ self.covariance) * rows).sum(-1).flatten(), self.num


def _rows(stencil: Stencil, geometry: Geometry) -> Tensor:
    """A stencil's kernel on the patch of the whole tree: (G, O/G, K)."""
    height, width = (k - 1 - p for k, p in zip(geometry.kernel_size, geometry.padding, strict=True))
    wide = stencil.regroup(geometry.groups).pad_kernel(geometry.padding, (height, width))
    return wide.weight.flatten(1).unflatten(0, (geometry.groups, -1))


class _Merge(torch.autograd.Function):
    """A batch and a tree's parameters to the tree's output: one node of the autograd graph.

    The algebra on small matrices is a graph of its own, from moments and parameters to kernel and offset, in float64.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *parameters: Tensor) -> Tensor:
        geometry = call.geometry
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(call.dtype)
            convs = [layer for layer in tree_layers(call.expression) if isinstance(layer, nn.Conv2d)]
            passes = select_backend(x, geometry, convs[0].out_channels)
            mean, covariance, num = passes.moments(x, geometry)
            check_batch_size(num, x)
            with torch.enable_grad():
                mean, covariance = mean.detach().requires_grad_(), covariance.detach().requires_grad_()
                one = Stencil.diagonal(mean.new_ones(x.shape[1]))
                source = _Moments(geometry, mean, covariance, num)
                total = _fold(call.expression, Stencil(one.weight, one.bias, one.groups, source=source))
                kernel = _rows(total, geometry)
                offset = total.bias + (kernel @ mean[..., None]).flatten()
            y = passes.convolve(x, kernel.detach(), offset.detach(), mean.detach(), geometry, call.act)
        ctx.call, ctx.num, ctx.outputs = call, num, convs[0].out_channels
        ctx.algebra = (kernel, offset, mean, covariance)
        ctx.save_for_backward(x, y if call.act is not None else None, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        geometry, act = ctx.call.geometry, ctx.call.act
        x, y, *parameters = ctx.saved_tensors
        kernel, offset, mean, covariance = ctx.algebra
        passes = select_backend(x, geometry, ctx.outputs)
        y = grad if y is None else y
        with torch.autocast(x.device.type, enabled=False):
            products, total = passes.kernel_grad(grad, y, x, mean.detach(), geometry, act)
            learned = [p for p in parameters if p.requires_grad]
            given = (products.to(kernel.dtype), total.to(kernel.dtype))
            with torch.enable_grad():
                found = torch.autograd.grad(
                    (kernel, offset), (mean, covariance, *learned), given, retain_graph=True, allow_unused=True
                )
            d_mean, d_covariance, *rest = found
            by_parameter = {id(p): g for p, g in zip(learned, rest, strict=True)}
            grads = [by_parameter.get(id(p)) for p in parameters]
            if not ctx.needs_input_grad[1]:
                return (None, None, *grads)
            values = kernel.detach()
            d_mean = torch.zeros_like(mean) if d_mean is None else d_mean
            quad = torch.zeros_like(covariance) if d_covariance is None else d_covariance + d_covariance.mT
            # The convolution takes patches around the mean: so the offset's share of its gradient is taken off again.
            pull = (values.mT @ total.to(values.dtype).view(len(values), -1, 1)).squeeze(-1)
            shift = (d_mean - pull) / ctx.num
            dx = passes.input_grad(grad, y, x, values, mean.detach(), quad / ctx.num, shift, geometry, act)
        return (None, dx, *grads)
