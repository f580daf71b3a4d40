"""Routes: ways to evaluate the same Chain or Sum in training. The law: the same value, gradients and buffers as
`per_branch`.

per_branch every layer by itself: the reference (beside `Sum`)
moments    one convolution, exactly: the batch's statistics are known from the moments of its patches (`moments.py`)
mixed      every convolution by itself; all norms, their sum and the activation in one pass (`fused_norms.py`)
folded     one convolution, made at each call of parameters and running statistics: where the norms are frozen
quickest   whichever of them costs least for this unit and batch, by count

`onefold train`, and `accelerate` with a batch, choose among them by timing each on this machine (`measured_routes`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.branches import Unit, activation_clamp, as_unit, has_hooks
from onefold.reparam.folding_rules import Chain, Route, Sum, fold, input_channels, per_branch
from onefold.reparam.fused_norms import normalize_and_sum
from onefold.reparam.fused_norms import supports as mix_supports
from onefold.reparam.kernels import ReferenceBackend, select_backend
from onefold.reparam.kernels.base import ClampMax, Geometry
from onefold.reparam.kernels.cpu import is_pointwise
from onefold.reparam.kernels.cpu_bfloat16 import has_bfloat16
from onefold.reparam.moments import BatchPatches, forward_by_moments
from onefold.reparam.stencil import Stencil

_Function = TypeVar("_Function", bound=Callable[..., object])
__all__ = [
    "Route",
    "folded",
    "forward_by_cheapest_route",
    "mixed",
    "moments",
    "moments_in_training",
    "per_branch",
    "quickest",
    "set_route_",
]


def graph_break(function: _Function) -> _Function:
    """torch.compile breaks its graph at `function`, as at one that `torch.compiler.disable` has wrapped.

    That is asked for at the first call under torch.compile only: it imports the compiler, which takes over a second.
    """
    wrapped: list[_Function] = []

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not wrapped:
            wrapped.append(torch.compiler.disable(function))
        return wrapped[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # not to be traced into
    return cast(_Function, call)


@graph_break
def moments(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """One convolution in all, in training mode too, and exactly; (B, I, H, W) to (B, O, H', W').

    Units - parallel convolutions with their norms, and a skip - are one node of the autograd graph; any other tree of
    linear layers folds by the algebra's rules, on a stencil that knows the batch.
    Raises ValueError where a norm would see one value a channel, as BatchNorm does.
    """
    unit = as_unit(tree) if x.dim() == 4 else None
    return (
        _then(act, _by_rules(tree, x))
        if unit is None
        else apply_with_activation(act, partial(forward_by_moments, unit, x))
    )


@graph_break
def moments_in_training(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """`moments` for a unit in training; `per_branch` outside of it, where its norms are frozen, and for other trees."""
    unit = as_unit(tree) if tree.training and x.dim() == 4 and torch.is_grad_enabled() else None
    return (
        per_branch(tree, x, act) if unit is None else apply_with_activation(act, partial(forward_by_moments, unit, x))
    )


@graph_break
def mixed(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """Every convolution by itself, then all norms, their sum and the activation in one pass.

    `per_branch` where there are no kernels for that: on other devices and dtypes, and for trees that are not units.
    """
    unit = as_unit(tree) if x.dim() == 4 else None
    return per_branch(tree, x, act) if unit is None or not mix_supports(unit.branches, x) else _mixed(unit, x, act)


@graph_break
def folded(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """One convolution, folded where it stands, for trees whose norms are frozen; gradients flow to their kernels.

    `per_branch` where a norm uses the batch's statistics, where someone listens inside, and outside of training.
    """
    frozen = not any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in tree.modules())
    if not frozen or not torch.is_grad_enabled() or x.dim() != 4 or has_hooks(tree.modules()):
        return per_branch(tree, x, act)
    like = next(tree.parameters())
    one = torch.ones(
        input_channels(tree) or 1, dtype=torch.float32 if x.device.type == "mps" else torch.float64, device=x.device
    )
    total = fold(tree, Stencil.diagonal(one))
    kernel, bias = total.weight.to(like.dtype), total.bias.to(like.dtype)
    return _then(act, F.conv2d(x, kernel, bias, total.stride, total.padding, total.dilation, total.groups))


@graph_break
def quickest(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """The route that costs least for unit and batch, by count: see `route_costs`; outside training `per_branch`."""
    unit = as_unit(tree) if tree.training and x.dim() == 4 and torch.is_grad_enabled() else None
    y = None if unit is None else forward_by_cheapest_route(unit, x, act)
    return per_branch(tree, x, act) if y is None else y


@graph_break
def forward_by_cheapest_route(unit: Unit, x: Tensor, act: nn.Module | None) -> Tensor | None:
    """act(unit(x)) by `moments` or `mixed`, whichever costs less; None where evaluating each layer costs least."""
    by_moments, by_mixing, by_branch = route_costs(unit, x)
    if by_branch < min(by_moments, by_mixing):
        return None
    return (
        apply_with_activation(act, partial(forward_by_moments, unit, x))
        if by_moments <= by_mixing
        else _mixed(unit, x, act)
    )


def set_route_(model: nn.Module, route: Route) -> nn.Module:
    """Evaluate every outermost Chain and Sum of `model` by `route` from now on, in place; gives the model back."""
    if isinstance(model, (Chain, Sum)):
        model.route = route
        return model
    for child in model.children():
        set_route_(child, route)
    return model


def _mixed(unit: Unit, x: Tensor, act: nn.Module | None) -> Tensor:
    return apply_with_activation(act, partial(normalize_and_sum, unit.branches, x))


def apply_with_activation(act: nn.Module | None, route: Callable[[ClampMax], Tensor]) -> Tensor:
    """act of what a route computes, the activation within the route if it is one that routes know."""
    included, clamp = activation_clamp(act)
    return _then(None if included else act, route(clamp if included else None))


def _then(act: nn.Module | None, y: Tensor) -> Tensor:
    return y if act is None else act(y)


def _by_rules(tree: nn.Module, x: Tensor) -> Tensor:
    """Any linear tree, folded where it stands.

    The statistics and the kernel are made in float64 (float32 on a device that lacks it); the convolution runs in the
    dtype of `x`, or that of the autocast region around it.
    """
    channels = input_channels(tree)
    if channels is None:
        return per_branch(tree, x)
    images = x if x.dim() == 4 else x[..., None, None]
    with torch.autocast(x.device.type, enabled=False):
        wide = images.to(torch.float32 if x.device.type == "mps" else torch.float64)
        one = Stencil.diagonal(wide.new_ones(channels))
        total = fold(tree, Stencil(one.weight, one.bias, one.groups, source=BatchPatches(wide)))
    kernel, bias = total.weight.to(x.dtype), total.bias.to(x.dtype)
    y = F.conv2d(images, kernel, bias, total.stride, total.padding, total.dilation, total.groups)
    return y if x.dim() == 4 else y.flatten(1)


# ------------------------------------------------------------------------------ costs, by count

# Multiply-adds, and floats moved: a float moved between a core and the memory takes as long as MOVE multiply-adds, from
# the rates of both on a core with AVX2; the other constants are estimates. They need not be near: where two routes cost
# about the same, either will do. `benchmarks/train_step.py --units` times the routes of single units.
# Shapes: per place of the output; I and O channels, G groups, K values a patch.
_MOVE = 17.0
_LAG = 0.3  # depthwise: products by lag, of those by pairs of taps
_SLOW_DEPTHWISE = 3.0  # torch's depthwise convolution, forward and backward, against its arithmetic
_SLOW_NORM = 8.0  # floats moved by a norm and the sum, a branch and value, that `mixed` saves
# The reference back end against the kernels: its pointwise units are the library's products, of others it writes each
# patch out. Timed on MobileOne-S0's units without compiled code, where those take 3 to 20 times as long as per_branch.
_PLAIN_POINTWISE, _PLAIN_PATCHES = 6.0, 150.0
# In bfloat16 on a CPU with instructions for it the library's products take an eighth to a sixth of their float32 time,
# and its passes half as many bytes. Depthwise convolutions gain nothing, by torch or by `moments`, but in bytes.
_LOW_PRODUCTS, _LOW_MOVE = 0.15, 0.5


class RouteCosts(NamedTuple):
    """Multiply-adds a place of the output, or their time in floats moved; infinite where a route cannot go."""

    moments: float
    mixed: float
    per_branch: float


def route_costs(unit: Unit, x: Tensor) -> RouteCosts:
    """Of the three routes, forward and backward."""
    move = _MOVE * (_LOW_MOVE if _in_bfloat16(x) else 1)
    per_branch = _branches(unit, x) + move * _SLOW_NORM * unit.channels[1] * len(unit.branches)
    return RouteCosts(
        _moments(unit, x), _branches(unit, x) if mix_supports(unit.branches, x) else float("inf"), per_branch
    )


def _moments(unit: Unit, x: Tensor) -> float:
    """Convolution, its two gradients, the moments and theirs; the algebra on kernels, shared by all places."""
    return moments_cost(unit.geometry, unit.channels, len(unit.convs), x)


def moments_cost(geometry: Geometry, channels: tuple[int, int], num_convs: int, x: Tensor) -> float:
    """What the `moments` route costs for so many convolutions that are one of this geometry."""
    c_in, c_out = channels
    size = geometry.kernel_size[0] * geometry.kernel_size[1] * c_in // geometry.groups
    depthwise = c_in == geometry.groups
    square = geometry.groups * size * size
    low = _in_bfloat16(x)
    if low and is_pointwise(geometry):  # by the library, the moments twice and both halves (`kernels.cpu_bfloat16`)
        products = _LOW_PRODUCTS * (3 * c_out * size + 3 * square)
    else:
        products = 3 * c_out * size + 1.5 * square * (_LAG if depthwise and geometry.stride == (1, 1) else 1)
    algebra = 2 * num_convs * c_out * size * size / num_output_positions(geometry, x)
    move = _MOVE * (_LOW_MOVE if low and (depthwise or is_pointwise(geometry)) else 1)
    moved = move * 5 * (c_in * geometry.stride[0] * geometry.stride[1] + c_out)
    plain = isinstance(select_backend(x, geometry, c_out), ReferenceBackend)
    slower = (_PLAIN_POINTWISE if is_pointwise(geometry) else _PLAIN_PATCHES) if plain else 1.0
    return (products + moved) * slower + algebra


def per_layer_cost(convs: Sequence[nn.Conv2d], num_norms: float, x: Tensor) -> float:
    """What convolutions of one input cost layer by layer, with so many norms after them: all passes over maps."""
    low, c_out = _in_bfloat16(x), convs[0].out_channels
    move, total = _MOVE * (_LOW_MOVE if low else 1), 0.0
    for conv in convs:
        depthwise = conv.groups == conv.in_channels > 1
        slow = _SLOW_DEPTHWISE if depthwise else _LOW_PRODUCTS if low else 1.0
        total += 3 * slow * conv.weight.numel()
        total += move * 3 * (c_out + conv.in_channels * conv.stride[0] * conv.stride[-1])
    return total + move * _SLOW_NORM * c_out * num_norms


def _branches(unit: Unit, x: Tensor) -> float:
    """Every branch's convolution and its gradients, and what `mixed` moves."""
    (c_in, c_out), geometry = unit.channels, unit.geometry
    c_in_places = c_in * geometry.stride[0] * geometry.stride[1]
    low, depthwise = _in_bfloat16(x), geometry.groups == c_in > 1
    move = _MOVE * (_LOW_MOVE if low else 1)
    slow = _SLOW_DEPTHWISE if depthwise else _LOW_PRODUCTS if low else 1.0
    total = move * 5 * c_out  # the output and its gradient
    for branch in unit.branches:
        if branch.conv is None:
            total += move * 8 * c_in_places
            continue
        total += 3 * slow * branch.conv.weight.numel() + move * (8 * c_out + 3 * c_in_places)
    return total + move * 3 * c_in_places * (len(unit.branches) - 1)  # adding up the input's gradients


def _in_bfloat16(x: Tensor) -> bool:
    """Whether torch would convolve x in bfloat16, by instructions that this processor has."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not has_bfloat16():
        return False
    return torch.get_autocast_dtype("cpu") is torch.bfloat16


def num_output_positions(geometry: Geometry, x: Tensor) -> int:
    """The places of the output over the batch, about."""
    (down, across), (b, _, h, w) = geometry.stride, x.shape
    return max(1, b * (h // down) * (w // across))
