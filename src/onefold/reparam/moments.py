"""A training unit as one convolution, forward and backward: the mathematics of the `moments` route.

With m the mean and S the covariance of the input patches over the batch, the branch W has the mean W m and the
variances v = diag(W S W^T) before its norm. So its gain g = gamma / sqrt(v + eps) is known, and the unit is

    y = act(K (x - m) + sum of the branches' beta),        K = sum over branches of diag(g) W.

Backward, with G the gradient through the activation, s its sum over places and A = sum over places of G (x - m)^T:

    d gamma = d g / sqrt(v + eps)     d beta = s            d g = diag(A W^T)       d v = -g (v + eps)^-1 / 2 * d g
    d W     = diag(g) A + 2 diag(d v) W S                   d S = sum over branches of W^T diag(d v) W
    d x     = K^T G + 2/N dS (x - m) - K^T s / N            (patch by patch)

Four passes touch the batch - the moments, the convolution, A, and d x -; a back end does them (see `kernels`).
The rest is algebra on matrices as large as a kernel (`algebra`). Only x, y, K and those are kept for the backward.

Shapes: B branches with a convolution; see `unit` for the others.

`merged_kernel` stops at the kernel, for those who change it before they convolve: with K m taken off the bias b,
A = dK - db m^T and s = db give the same gradients, and d x = 2/N dS (x - m) - K^T db / N. `Patches` gives the
algebra's rules the statistics of a batch for trees that are no unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam import algebra
from onefold.reparam.kernels import cpu_algebra as compiled
from onefold.reparam.kernels import passes_for
from onefold.reparam.kernels.backend import Act, Moments
from onefold.reparam.linear import fold, padding, width
from onefold.reparam.stencil import Pair, Stencil
from onefold.reparam.unit import Unit, read


@dataclass(frozen=True)
class _Call:
    """What is not a tensor of a unit's evaluation."""

    unit: Unit
    act: Act
    dtype: torch.dtype


def convolve(unit: Unit, x: Tensor, act: Act) -> Tensor:
    """act(unit(x)) with batch statistics, by their moments; (B, I, H, W) to (B, O, H', W'). Moves the norms' buffers.

    Raises ValueError where a norm would see one value a channel, as BatchNorm does.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    affine = [
        p for branch in unit.ordered if branch.norm.weight is not None for p in (branch.norm.weight, branch.norm.bias)
    ]
    idle = [conv.bias for conv in unit.convs if conv.bias is not None]
    y: Tensor = _Moments.apply(  # type: ignore[no-untyped-call]
        _Call(unit, act, dtype), x, *(conv.weight for conv in unit.convs), *affine, *idle
    )
    return y


class _Moments(torch.autograd.Function):
    """One node of the autograd graph a unit."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *parameters: Tensor) -> Tensor:
        unit, geometry = call.unit, call.unit.geometry
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(call.dtype)
            passes = passes_for(x, geometry, unit.channels[1])
            moments = _synchronized(unit, passes.moments(x, geometry))
            if moments.num < 2:
                shape = tuple(x.shape)
                raise ValueError(f"a norm in train mode needs more than one value a channel, got an input of {shape}")
            weights, ctx.compiled = parameters[: len(unit.convs)], compiled.supports(passes, unit)
            fold = compiled.fold if ctx.compiled else algebra.fold
            folded, bias = fold(unit, moments, weights, x.dtype)
            y = passes.convolve(x, folded.kernel, bias, moments.mean, geometry, call.act)
        ctx.call, ctx.count = call, moments.num
        ctx.save_for_backward(x, y if call.act is not None else None, *folded, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, geometry, act = ctx.call.unit, ctx.call.unit.geometry, ctx.call.act
        x, y, *rest = ctx.saved_tensors
        folded, parameters = algebra.Folded(*rest[:6]), rest[6:]
        passes = passes_for(x, geometry, unit.channels[1])
        y = grad if y is None else y
        with torch.autocast(x.device.type, enabled=False):
            products, total = passes.kernel_grad(grad, y, x, folded.mean, geometry, act)
            unfold = compiled.unfold if ctx.compiled else algebra.unfold
            d = unfold(unit, folded, products, total)
            affine = [
                g
                for branch, of in zip(unit.ordered, d.gamma, strict=True)
                if branch.norm.weight is not None
                for g in (of, total)
            ]
            grads = [g.to(p.dtype) for g, p in zip([*d.weights, *affine], parameters, strict=False)]
            grads += [torch.zeros_like(p) for p in parameters[len(grads) :]]  # a bias before a norm does nothing
            if not ctx.needs_input_grad[1]:
                return (None, None, *grads)
            quad, pull = _reduced(unit, d.quad, d.pull)
            quad, shift = quad * (2 / ctx.count), pull / -ctx.count
            dx = passes.input_grad(grad, y, x, folded.kernel, folded.mean, quad, shift, geometry, act)
        return (None, dx, *grads)


def _group_of(unit: Unit) -> tuple[bool, Any]:
    """Whether this unit's norms share their statistics between processes, and in which group."""
    norms = [branch.norm for branch in unit.branches if isinstance(branch.norm, nn.SyncBatchNorm)]
    alone = not norms or not (dist.is_available() and dist.is_initialized())
    group = norms[0].process_group if norms else None
    return (False, None) if alone or dist.get_world_size(group) == 1 else (True, group)


def _synchronized(unit: Unit, moments: Moments) -> Moments:
    """The moments of all processes' patches: two small sums."""
    shared, group = _group_of(unit)
    if not shared:
        return moments
    mean, covariance, count = moments
    second = covariance + mean[..., None] * mean[:, None]
    box = torch.cat([(count * mean).flatten(), (count * second).flatten(), mean.new_tensor([count])])
    dist.all_reduce(box, group=group)
    total = int(box[-1].item())
    mean = (box[: mean.numel()] / total).view_as(mean)
    second = (box[mean.numel() : -1] / total).view_as(second)
    return Moments(mean, second - mean[..., None] * mean[:, None], total)


def _reduced(unit: Unit, quad: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """d S and d m, summed over the processes that share them."""
    shared, group = _group_of(unit)
    if shared:
        box = torch.cat([quad.to(shift).flatten(), shift.flatten()])
        dist.all_reduce(box, group=group)
        quad, shift = box[: quad.numel()].view_as(quad).to(quad), box[quad.numel() :].view_as(shift)
    return quad, shift


# ------------------------------------------------------------------------------ the kernel alone


def merged_kernel(tree: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel (O, I/G, H, W) and bias (O,) of a Chain or Sum that reads x (B, I, H, W), or (B, I) for Linear layers.

    They are those of the convolution that `fuse` puts in its place, the norms in train mode on the batch's statistics,
    which move their running ones. Gradients flow to the tree's parameters and through the statistics to x.
    """
    images = x if x.dim() == 4 else x[..., None, None]
    on_batch = any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in tree.modules())
    unit = read(tree) if on_batch else None
    if unit is not None:
        return _of_unit(unit, images)
    channels = width(tree)
    assert channels is not None
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    one = Stencil.diagonal(torch.ones(channels, dtype=wide, device=x.device))
    source = Patches(images.to(wide)) if on_batch else None
    total = fold(tree, Stencil(one.weight, one.bias, one.groups, source=source))
    return total.weight.to(x.dtype), total.bias.to(x.dtype)


def _of_unit(unit: Unit, x: Tensor) -> tuple[Tensor, Tensor]:
    affine = [p for b in unit.ordered if b.norm.weight is not None for p in (b.norm.weight, b.norm.bias)]
    weights = [conv.weight for conv in unit.convs]
    found: tuple[Tensor, Tensor] = _Kernel.apply(unit, x, *weights, *affine)  # type: ignore[no-untyped-call]
    return found


class _Kernel(torch.autograd.Function):
    """A batch and a unit's parameters to its kernel and bias."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        moments = passes_for(x, unit.geometry, unit.channels[1]).moments(x, unit.geometry)
        if moments.num < 2:
            shape = tuple(x.shape)
            raise ValueError(f"a norm in train mode needs more than one value a channel, got an input of {shape}")
        folded, beta = algebra.fold(unit, moments, parameters[: len(unit.convs)], x.dtype)
        ctx.unit, ctx.count = unit, moments.num
        ctx.save_for_backward(x, *folded, *parameters)
        centre = folded.kernel.to(beta.dtype) @ moments.mean.to(beta.dtype)[..., None]
        kernel = folded.kernel.flatten(0, 1).unflatten(1, (-1, *unit.geometry.taps))
        return kernel.to(x.dtype), (beta - centre.flatten()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_kernel: Tensor, d_bias: Tensor) -> tuple[Tensor | None, ...]:
        unit, geometry = ctx.unit, ctx.unit.geometry
        x, *rest = ctx.saved_tensors
        folded, parameters = algebra.Folded(*rest[:6]), rest[6:]
        wide = folded.gain.dtype
        total, products = d_bias.to(wide), d_kernel.flatten(1).unflatten(0, (geometry.groups, -1)).to(wide)
        products = products - total.view(len(products), -1, 1) * folded.mean.to(wide)[:, None]
        d = algebra.unfold(unit, folded, products, total)
        affine = [
            g
            for branch, of in zip(unit.ordered, d.gamma, strict=True)
            if branch.norm.weight is not None
            for g in (of, total)
        ]
        grads = [g.to(p.dtype) for g, p in zip([*d.weights, *affine], parameters, strict=True)]
        if not ctx.needs_input_grad[1]:
            return (None, None, *grads)
        passes, size = passes_for(x, geometry, unit.channels[1]), _output_shape(x, unit)
        nothing = x.new_zeros(size).contiguous(memory_format=_memory_format(x))
        quad, shift = d.quad * (2 / ctx.count), d.pull / -ctx.count
        dx = passes.input_grad(nothing, nothing, x, folded.kernel, folded.mean, quad, shift, geometry, None)
        return (None, dx, *grads)


def _output_shape(x: Tensor, unit: Unit) -> tuple[int, int, int, int]:
    """The shape of the unit's output."""
    geometry = unit.geometry
    conv = unit.convs[0]
    ahead = [k - 1 - 2 * p for k, p in zip(conv.kernel_size, padding(conv), strict=True)]
    rows, columns = ((n - 1 - a) // s + 1 for n, a, s in zip(x.shape[2:], ahead, geometry.stride, strict=True))
    return x.shape[0], unit.channels[1], rows, columns


def _memory_format(x: Tensor) -> torch.memory_format:
    plain = torch.contiguous_format
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else plain


# ------------------------------------------------------------------ statistics for trees of any form

_Geometry = tuple[int, Pair, Pair, Pair, Pair]


class Patches:
    """The batch as patches: the mean and covariance of each kind of patch, made once and kept."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self._known: dict[_Geometry, tuple[Tensor, Tensor, int]] = {}

    def statistics(self, stencil: Stencil) -> tuple[Tensor, Tensor, int]:
        """Mean (O,), biased variance (O,) and count of the stencil's output, by its rows against the moments."""
        key = (stencil.groups, stencil.stride, stencil.reach, stencil.dilation, stencil.taps)
        if key not in self._known:
            self._known[key] = self._moments(stencil)
        mean, covariance, count = self._known[key]
        rows = stencil.weight.flatten(1).unflatten(0, (stencil.groups, -1))  # (G, O/G, K)
        return (rows @ mean).flatten() + stencil.bias, ((rows @ covariance) * rows).sum(-1).flatten(), count

    def _moments(self, like: Stencil) -> tuple[Tensor, Tensor, int]:
        """Mean (G, K, 1), covariance (G, K, K) and count of the patches that a stencil of this shape reads."""
        patches = self._patches(like)
        count = patches.shape[-1]
        if count < 2:
            shape = tuple(self._images.shape)
            raise ValueError(f"a norm in train mode needs more than one value a channel, got an input of {shape}")
        mean = patches.mean(-1, keepdim=True)
        centred = patches - mean
        return mean, centred @ centred.mT / count, count

    def _patches(self, like: Stencil) -> Tensor:
        """(G, K, N)."""
        x = self._images
        if like.taps == (1, 1):
            rim = like.reach
            x = F.pad(x, (rim[1], rim[1], rim[0], rim[0])) if any(rim) else x
            x = x[:, :, :: like.stride[0], :: like.stride[1]]
            grouped = x.transpose(0, 1).flatten(1)  # (I, N)
            return grouped.unflatten(0, (like.groups, -1))
        columns = F.unfold(x, like.taps, like.dilation, like.reach, like.stride)  # (B, I*H*W, L)
        return columns.unflatten(1, (like.groups, -1)).permute(1, 2, 0, 3).flatten(2)
