"""Linear layers: `Chain` and `Sum`, which put them in series and in parallel, and the folding rule of each kind.

    forward pass:  a module is applied to images       x  ->  module(x)
    folding:       a module is applied to stencils     s  ->  fold(module, s)

A new linear layer is added by registering a rule for `fold` beside its class; nothing else is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce, singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.stencil import Pair, Stencil


@singledispatch
def fold(op: nn.Module, onto: Stencil) -> Stencil:
    """Give the stencil of `op` after `onto`.

    Raises TypeError if `op` is not linear, ValueError if it is but cannot fold as it stands (a norm in train
    mode, a convolution that pads with something else than zeros).
    """
    raise TypeError(f"{type(op).__name__} is not linear: it has no folding rule")


def is_linear(op: nn.Module) -> bool:
    """Whether `op` has a folding rule of its own, or inherits one together with the forward pass it describes.

    A subclass that overrides `forward` computes something else than its parent's rule says: it is not linear.
    """
    for kind in type(op).__mro__:
        if kind in fold.registry:
            return issubclass(kind, nn.Module) and type(op).forward is kind.forward
    return False


class Chain(nn.Sequential):
    """Linear layers in series. Only the first may pad: then folding is exact up to the image's border.

    `route` is how it is evaluated, as a Sum's is: a chain is a sum of one branch.

    Raises TypeError for a layer that is not linear, ValueError for one that pads and is not the first.
    """

    def __init__(self, *ops: nn.Module) -> None:
        super().__init__(*ops)
        _check_linear(self)
        for op in ops[1:]:
            if _has_padding(op):
                raise ValueError(f"only the first layer of a Chain may pad, but {op} does: pad the first instead")
        self.route: Route = per_branch

    def forward(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        """(B, I, H, W) to (B, O, H', W'), then `act` if there is one."""
        return self.route(self, x, act)

    def fuse(self) -> nn.Module:
        """Give the one layer that this chain folds to; other projects' fusing tools call a method of this name."""
        return fused_layer(self)


class Sum(nn.ModuleList):
    """Linear layers in parallel, their outputs added. `route` is the way to evaluate that (see `routes`).

    Raises TypeError for a branch that is not linear.
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__(branches)
        if not branches:
            raise ValueError("a Sum needs at least one branch")
        _check_linear(self)
        self.route: Route = per_branch

    def forward(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        """(B, I, H, W) to (B, O, H', W'), then `act` if there is one."""
        return self.route(self, x, act)

    def fuse(self) -> nn.Module:
        """Give the one layer that this sum folds to; other projects' fusing tools call a method of this name."""
        return fused_layer(self)


class Scale(nn.Module):
    """One learned gain for each channel (layer scale, arXiv 2103.17239)."""

    def __init__(self, channels: int, init: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return x * self.weight.view(-1, 1, 1)


Route = Callable[[nn.Module, Tensor, nn.Module | None], Tensor]  # a Chain or Sum, its input, an activation or None


def per_branch(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """The reference route: evaluate every layer by itself, then the sum, then the activation."""
    if isinstance(tree, Sum):
        y = reduce(torch.add, (branch(x) for branch in tree))
    else:
        y = reduce(lambda value, layer: layer(value), tree.children(), x)
    return y if act is None else act(y)


def conv_act(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(layer(x)), computed together where `layer` is a Chain or Sum whose route can."""
    y: Tensor = layer(x, act) if isinstance(layer, (Chain, Sum)) else act(layer(x))
    return y


# ---------------------------------------------------------------------------------------- the rules


@fold.register
def _(op: nn.Conv2d, onto: Stencil) -> Stencil:
    if op.padding_mode != "zeros":
        raise ValueError(f"only zero-padded convolutions fold, and {op} pads by {op.padding_mode!r}")
    bias = op.weight.new_zeros(op.out_channels) if op.bias is None else op.bias
    layer = Stencil(
        weight=_as(op.weight, onto),
        bias=_as(bias, onto),
        groups=op.groups,
        stride=_pair(op.stride),
        padding=padding(op),
        dilation=_pair(op.dilation),
    )
    return onto.then(layer)


@fold.register
def _(op: nn.Linear, onto: Stencil) -> Stencil:
    bias = op.weight.new_zeros(op.out_features) if op.bias is None else op.bias
    return onto.then(Stencil(_as(op.weight, onto)[..., None, None], _as(bias, onto)))


@fold.register
def _(op: _BatchNorm, onto: Stencil) -> Stencil:
    mean, var = _statistics(op, onto)
    gain = (var + op.eps).rsqrt()
    if op.weight is not None:
        gain = gain * _as(op.weight, onto)
    shift = -mean * gain
    if op.bias is not None:
        shift = shift + _as(op.bias, onto)
    return onto.then(Stencil.diagonal(gain, shift))


@fold.register
def _(op: nn.SyncBatchNorm, onto: Stencil) -> Stencil:
    if op.training:
        raise ValueError("a SyncBatchNorm folds only with its running statistics: call model.eval() first")
    rule = fold.dispatch(_BatchNorm)
    return rule(op, onto)


@fold.register
def _(op: nn.AvgPool2d, onto: Stencil) -> Stencil:
    if op.ceil_mode or (padding(op) != (0, 0) and not op.count_include_pad):
        raise ValueError(f"{op} divides by another number at the border than inside: it does not fold")
    channels, size = onto.channels[1], _pair(op.kernel_size)
    weight = onto.weight.new_full((channels, 1, *size), 1 / (op.divisor_override or math.prod(size)))
    return onto.then(Stencil(weight, onto.weight.new_zeros(channels), channels, _pair(op.stride), padding(op)))


@fold.register
def _(op: Scale, onto: Stencil) -> Stencil:
    return onto.then(Stencil.diagonal(_as(op.weight, onto)))


@fold.register
def _(op: nn.Identity, onto: Stencil) -> Stencil:
    return onto


@fold.register
def _(op: Chain, onto: Stencil) -> Stencil:
    for number, layer in enumerate(op):
        folded = fold(layer, onto)
        if number and folded.padding != onto.padding:  # `_has_padding` does not know layers of other packages
            raise ValueError(f"only the first layer of a Chain may pad, but {layer} does: pad the first instead")
        onto = folded
    return onto


@fold.register
def _(op: Sum, onto: Stencil) -> Stencil:
    return reduce(Stencil.__add__, (fold(branch, onto) for branch in op))


def _statistics(norm: _BatchNorm, onto: Stencil) -> tuple[Tensor, Tensor]:
    """The mean and variance that `norm` divides by: its running ones or, in train mode on a source, the batch's."""
    if not norm.training and norm.running_mean is not None and norm.running_var is not None:
        return _as(norm.running_mean, onto), _as(norm.running_var, onto)
    if onto.source is None:
        if norm.training:
            raise ValueError("a BatchNorm folds only with its running statistics: call model.eval() first")
        raise ValueError("a BatchNorm without running statistics (track_running_stats=False) cannot fold")
    mean, var, count = onto.source.statistics(onto)
    update_running_stats_(norm, mean.detach(), var.detach() * (count / (count - 1)))
    return mean, var


@torch.no_grad()
def update_running_stats_(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics towards the batch's (variance unbiased), as the norm's own forward does.

    A norm in eval mode, or one that keeps no running statistics, is left as it is.
    """
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    factor = exponential_average_factor_(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), factor)


def exponential_average_factor_(norm: _BatchNorm) -> float:
    """Count this batch and give BatchNorm's exponential average factor: 1/n where momentum is None."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.momentum is not None:
        return norm.momentum
    return 0.0 if norm.num_batches_tracked is None else 1 / int(norm.num_batches_tracked)


# ------------------------------------------------------------------------------ properties of layers


def fused_layer(tree: nn.Module) -> nn.Conv2d | nn.Linear:
    """Fold a linear tree, in float64, to the one convolution (or Linear, in a tree of those) that it is.

    It has the tree's dtype, device and training flag, and can be trained where any part of the tree could.
    """
    like = next(tree.parameters(), None)
    channels = input_channels(tree)
    if like is None or channels is None:
        raise ValueError(f"cannot tell how many channels {type(tree).__name__} takes: it has no convolution or norm")
    with torch.no_grad():
        device = "cpu" if like.device.type == "mps" else like.device  # MPS has no float64
        one = Stencil.diagonal(torch.ones(channels, dtype=torch.float64, device=device))
        stencil = fold(tree, one)
        flat = any(isinstance(op, nn.Linear) for op in tree.modules())
        layer = stencil.linear(like.dtype) if flat else stencil.conv(like.dtype)
    layer.requires_grad_(any(p.requires_grad for p in tree.parameters()))
    return layer.to(like.device).train(tree.training)


def input_channels(op: nn.Module) -> int | None:
    """Input channels of a linear layer; None where any number will do."""
    if isinstance(op, nn.Conv2d):
        return op.in_channels
    if isinstance(op, nn.Linear):
        return op.in_features
    if isinstance(op, _BatchNorm):
        return op.num_features
    if isinstance(op, Scale):
        return op.weight.numel()
    return next((num for child in op.children() if (num := input_channels(child)) is not None), None)


def _has_padding(op: nn.Module) -> bool:
    """Whether a layer pads its input."""
    if isinstance(op, Chain):
        return any(_has_padding(layer) for layer in list(op)[:1])
    if isinstance(op, Sum):
        return any(_has_padding(branch) for branch in op)
    return isinstance(op, (nn.Conv2d, nn.AvgPool2d)) and padding(op) != (0, 0)


def padding(op: nn.Conv2d | nn.AvgPool2d) -> Pair:
    """Rows and columns of zeros added on each side. Raises ValueError where the two sides differ."""
    if op.padding == "valid":
        return 0, 0
    if op.padding == "same":
        assert isinstance(op, nn.Conv2d)
        extent = [(k - 1) * d for k, d in zip(op.kernel_size, op.dilation, strict=True)]
        if any(e % 2 for e in extent):
            raise ValueError(f"{op} pads one side more than the other: only symmetric padding folds")
        return extent[0] // 2, extent[1] // 2
    assert not isinstance(op.padding, str)
    return _pair(op.padding)


def _check_linear(parent: nn.Module) -> None:
    for op in parent.children():
        if not is_linear(op):
            raise TypeError(f"{type(op).__name__} is not linear: it cannot stand in a {type(parent).__name__}")


def _as(value: Tensor, onto: Stencil) -> Tensor:
    return value.to(device=onto.weight.device, dtype=onto.weight.dtype)


def _pair(v: int | tuple[int, ...]) -> Pair:
    return (v[0], v[1] if len(v) > 1 else v[0]) if isinstance(v, tuple) else (v, v)
