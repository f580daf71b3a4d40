"""Routes: ways to evaluate the same Chain or Sum in training. The law: the same value, gradients and buffers as
`per_branch`.

per_branch every layer by itself: the reference (beside `Sum`)
moments    one convolution, exactly: the batch's statistics are known from the moments of its patches (`moments.py`)
mixed      every convolution by itself; all norms, their sum and the activation in one pass (`mixed.py`)
folded     one convolution, made at each call of parameters and running statistics: where the norms are frozen
quickest   whichever of them costs least for this unit and batch, by count; what training uses
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.branches import Unit, as_clamp, as_unit, has_hooks
from onefold.reparam.fused_norms import mix
from onefold.reparam.fused_norms import supports as mix_supports
from onefold.reparam.kernels.base import Act
from onefold.reparam.linear import Chain, Route, Sum, fold, input_channels, per_branch
from onefold.reparam.moments import Patches, convolve
from onefold.reparam.route_cost import costs
from onefold.reparam.stencil import Stencil

_Function = TypeVar("_Function", bound=Callable[..., object])
_opaque: Callable[[_Function], _Function] = torch.compiler.disable  # torch.compile breaks its graph at a unit

__all__ = ["Route", "evaluate", "folded", "mixed", "moments", "per_branch", "quickest", "set_route_"]


@_opaque
def moments(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """One convolution in all, in training mode too, and exactly; (B, I, H, W) to (B, O, H', W').

    Units - parallel convolutions with their norms, and a skip - are one node of the autograd graph; any other tree of
    linear layers folds by the algebra's rules, on a stencil that knows the batch.
    Raises ValueError where a norm would see one value a channel, as BatchNorm does.
    """
    unit = as_unit(tree) if x.dim() == 4 else None
    return _then(act, _by_rules(tree, x)) if unit is None else _with(act, unit, x, convolve)


@_opaque
def mixed(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """Every convolution by itself, then all norms, their sum and the activation in one pass.

    `per_branch` where there are no kernels for that: on other devices and dtypes, and for trees that are not units.
    """
    unit = as_unit(tree) if x.dim() == 4 else None
    return per_branch(tree, x, act) if unit is None or not mix_supports(unit, x) else _with(act, unit, x, mix)


@_opaque
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


@_opaque
def quickest(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """The route that costs least for this unit and batch, by count (see `count`); outside training `per_branch`."""
    unit = as_unit(tree) if tree.training and x.dim() == 4 and torch.is_grad_enabled() else None
    y = None if unit is None else evaluate(unit, x, act)
    return per_branch(tree, x, act) if y is None else y


@_opaque
def evaluate(unit: Unit, x: Tensor, act: nn.Module | None) -> Tensor | None:
    """act(unit(x)) by `moments` or `mixed`, whichever costs less; None where evaluating each layer costs least."""
    by_moments, by_mixing, by_branch = costs(unit, x)
    if by_branch < min(by_moments, by_mixing):
        return None
    return _with(act, unit, x, convolve if by_moments <= by_mixing else mix)


def set_route_(model: nn.Module, route: Route) -> nn.Module:
    """Evaluate every outermost Chain and Sum of `model` by `route` from now on, in place; gives the model back."""
    if isinstance(model, (Chain, Sum)):
        model.route = route
        return model
    for child in model.children():
        set_route_(child, route)
    return model


def _with(act: nn.Module | None, unit: Unit, x: Tensor, route: Callable[[Unit, Tensor, Act], Tensor]) -> Tensor:
    """act(unit(x)), the activation within the route if it is one that routes know."""
    included, clamp = as_clamp(act)
    return _then(None if included else act, route(unit, x, clamp if included else None))


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
        total = fold(tree, Stencil(one.weight, one.bias, one.groups, source=Patches(wide)))
    kernel, bias = total.weight.to(x.dtype), total.bias.to(x.dtype)
    y = F.conv2d(images, kernel, bias, total.stride, total.padding, total.dilation, total.groups)
    return y if x.dim() == 4 else y.flatten(1)
