"""A training unit as one convolution, forward and backward: the mathematics of the `moments` route.

With m the mean and S the covariance of the input patches over the batch, the branch W has the mean W m and the
variances v = diag(W S W^T) before its norm. So its gain g = gamma / sqrt(v + eps) is known, and the unit is

    y = act(K (x - m) + sum of the branches' beta),        K = sum over branches of diag(g) W.

Backward, with G the gradient through the activation, s its sum over places and A = sum over places of G (x - m)^T:

    d gamma = d g / sqrt(v + eps)     d beta = s            d g = diag(A W^T)       d v = -g (v + eps)^-1 / 2 * d g
    d W     = diag(g) A + 2 diag(d v) W S                   d S = sum over branches of W^T diag(d v) W
    d x     = K^T G + 2/N dS (x - m) - K^T s / N            (patch by patch)

Four passes touch the batch - the moments, the convolution, A, and d x -; a back end does them (see `kernels`).
The rest is algebra on matrices as large as a kernel (`moments_algebra`). Only x, y, K and those are kept
for the backward.

`merged_kernel` gives the kernel alone, for those who change it before they convolve. With K m taken off the bias b,
A = dK - db m^T and s = db give the same gradients, and d x = 2/N dS (x - m) - K^T db / N.

Shapes: B branches with a convolution; see `branches` for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam import moments_algebra
from onefold.reparam.branches import Unit, as_unit, check_batch_size
from onefold.reparam.folding_rules import fold, input_channels, padding
from onefold.reparam.kernels import ReferenceBackend, select_backend
from onefold.reparam.kernels import cpu_moments_algebra as compiled
from onefold.reparam.kernels.base import ClampMax, Geometry, Moments
from onefold.reparam.stencil import Stencil


@dataclass(frozen=True)
class _Call:
    """What is not a tensor of a unit's evaluation."""

    unit: Unit
    act: ClampMax
    dtype: torch.dtype


def forward_by_moments(unit: Unit, x: Tensor, act: ClampMax) -> Tensor:
    """act(unit(x)) with batch statistics, by their moments; (B, I, H, W) to (B, O, H', W'). Moves the norms' buffers.

    Raises ValueError where a norm would see one value a channel, as BatchNorm does.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    # The batch's mean removes a bias before a norm, which shows in the norm's running mean alone: its gradient is 0.
    conv_biases = [conv.bias for conv in unit.convs if conv.bias is not None]
    y: Tensor = _Convolve.apply(  # type: ignore[no-untyped-call]
        _Call(unit, act, dtype), x, *(conv.weight for conv in unit.convs), *_affine(unit), *conv_biases
    )
    return y


class _Convolve(torch.autograd.Function):
    """A batch and a unit's parameters to the unit's output: one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *parameters: Tensor) -> Tensor:
        unit, geometry = call.unit, call.unit.geometry
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(call.dtype)
            passes = select_backend(x, geometry, unit.channels[1])
            moments = _synchronized(unit, passes.moments(x, geometry))
            check_batch_size(moments.num, x)
            weights, ctx.compiled = parameters[: len(unit.convs)], compiled.supports(passes, unit)
            folded, bias = (compiled if ctx.compiled else moments_algebra).fold(unit, moments, weights, x.dtype)
            y = passes.convolve(x, folded.kernel, bias, moments.mean, geometry, call.act)
        ctx.call, ctx.count = call, moments.num
        # Without an activation the backward does not read y.
        ctx.save_for_backward(x, y if call.act is not None else None, *folded, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, geometry, act = ctx.call.unit, ctx.call.unit.geometry, ctx.call.act
        x, y, *rest = ctx.saved_tensors
        folded, parameters = moments_algebra.FoldedUnit(*rest[:6]), rest[6:]
        passes = select_backend(x, geometry, unit.channels[1])
        y = grad if y is None else y
        with torch.autocast(x.device.type, enabled=False):
            products, total = passes.kernel_grad(grad, y, x, folded.mean, geometry, act)
            d = (compiled if ctx.compiled else moments_algebra).fold_backward(unit, folded, products, total)
            grads = _parameter_grads(unit, d, total, parameters)
            if not ctx.needs_input_grad[1]:
                return (None, None, *grads)
            quad, pull = _reduced(unit, d.quad, d.pull)
            quad, shift = quad * (2 / ctx.count), pull / -ctx.count
            dx = passes.input_grad(grad, y, x, folded.kernel, folded.mean, quad, shift, geometry, act)
        return (None, dx, *grads)


def _affine(unit: Unit) -> list[Tensor]:
    """The gains and biases of a unit's norms, in the order of its rows."""
    norms = [branch.norm for branch in unit.ordered_branches if branch.norm.weight is not None]
    return [parameter for norm in norms for parameter in (norm.weight, norm.bias)]


def _parameter_grads(
    unit: Unit, d: moments_algebra.FoldGradients, total: Tensor, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of the convolutions' weights, of `_affine`, and zeros for what comes after."""
    learned = [
        gamma for branch, gamma in zip(unit.ordered_branches, d.gamma, strict=True) if branch.norm.weight is not None
    ]
    affine = [grad for gamma in learned for grad in (gamma, total)]
    grads = [grad.to(p.dtype) for grad, p in zip([*d.weights, *affine], parameters, strict=False)]
    return grads + [torch.zeros_like(p) for p in parameters[len(grads) :]]


# ------------------------------------------------------------------------ norms that share statistics


def _sync_group(unit: Unit) -> tuple[bool, Any]:
    """Whether this unit's norms share their statistics between processes, and in which group."""
    norms = [branch.norm for branch in unit.branches if isinstance(branch.norm, nn.SyncBatchNorm)]
    alone = not norms or not (dist.is_available() and dist.is_initialized())
    group = norms[0].process_group if norms else None
    return (False, None) if alone or dist.get_world_size(group) == 1 else (True, group)


def _synchronized(unit: Unit, moments: Moments) -> Moments:
    """The moments of all processes' patches: sums of n m, of n (S + m m^T) and of n, in one exchange."""
    shared, group = _sync_group(unit)
    if not shared:
        return moments
    mean, covariance, count = moments
    second = covariance + mean[..., None] * mean[:, None]
    sums = torch.cat([(count * mean).flatten(), (count * second).flatten(), mean.new_tensor([count])])
    dist.all_reduce(sums, group=group)
    total = int(sums[-1].item())
    mean = (sums[: mean.numel()] / total).view_as(mean)
    second = (sums[mean.numel() : -1] / total).view_as(second)
    return Moments(mean, second - mean[..., None] * mean[:, None], total)


def _reduced(unit: Unit, quad: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """d S and d m, summed over the processes that share them."""
    shared, group = _sync_group(unit)
    if shared:
        sums = torch.cat([quad.to(shift).flatten(), shift.flatten()])
        dist.all_reduce(sums, group=group)
        quad, shift = sums[: quad.numel()].view_as(quad).to(quad), sums[quad.numel() :].view_as(shift)
    return quad, shift


# ------------------------------------------------------------------------------ the kernel alone


def merged_kernel(tree: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel (O, I/G, H, W) and bias (O,) of a Chain or Sum that reads x (B, I, H, W), or (B, I) for Linear layers.

    They are those of the convolution that `fuse` puts in its place, the norms in train mode on the batch's statistics,
    which move their running ones. Gradients flow to the tree's parameters and through the statistics to x.
    """
    images = x if x.dim() == 4 else x[..., None, None]
    on_batch = any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in tree.modules())
    unit = as_unit(tree) if on_batch else None
    if unit is not None:
        merged: tuple[Tensor, Tensor] = _Kernel.apply(  # type: ignore[no-untyped-call]
            unit, images, *(conv.weight for conv in unit.convs), *_affine(unit)
        )
        return merged
    channels = input_channels(tree)
    assert channels is not None
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    one = Stencil.diagonal(torch.ones(channels, dtype=wide, device=x.device))
    source = BatchPatches(images.to(wide)) if on_batch else None
    stencil = fold(tree, Stencil(one.weight, one.bias, one.groups, source=source))
    return stencil.weight.to(x.dtype), stencil.bias.to(x.dtype)


class _Kernel(torch.autograd.Function):
    """A batch and a unit's parameters to its kernel and bias."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        moments = select_backend(x, unit.geometry, unit.channels[1]).moments(x, unit.geometry)
        check_batch_size(moments.num, x)
        folded, beta = moments_algebra.fold(unit, moments, parameters[: len(unit.convs)], x.dtype)
        ctx.unit, ctx.count = unit, moments.num
        ctx.save_for_backward(x, *folded, *parameters)
        response = folded.kernel.to(beta.dtype) @ moments.mean.to(beta.dtype)[..., None]  # K m
        kernel = folded.kernel.flatten(0, 1).unflatten(1, (-1, *unit.geometry.kernel_size))
        return kernel.to(x.dtype), (beta - response.flatten()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_kernel: Tensor, d_bias: Tensor) -> tuple[Tensor | None, ...]:
        unit, geometry = ctx.unit, ctx.unit.geometry
        x, *rest = ctx.saved_tensors
        folded, parameters = moments_algebra.FoldedUnit(*rest[:6]), rest[6:]
        wide = folded.gain.dtype
        total, products = d_bias.to(wide), d_kernel.flatten(1).unflatten(0, (geometry.groups, -1)).to(wide)
        products = products - total.view(len(products), -1, 1) * folded.mean.to(wide)[:, None]
        d = moments_algebra.fold_backward(unit, folded, products, total)
        grads = _parameter_grads(unit, d, total, parameters)
        if not ctx.needs_input_grad[1]:
            return (None, None, *grads)
        # No gradient comes through an output: the pass that gives d x gets zeros in its shape.
        conv, layout = unit.convs[0], torch.channels_last
        ahead = [k - 1 - 2 * p for k, p in zip(conv.kernel_size, padding(conv), strict=True)]
        size = [(n - 1 - a) // s + 1 for n, a, s in zip(x.shape[2:], ahead, geometry.stride, strict=True)]
        layout = layout if x.is_contiguous(memory_format=layout) else torch.contiguous_format
        zeros = x.new_zeros(len(x), unit.channels[1], *size).contiguous(memory_format=layout)
        quad, shift = d.quad * (2 / ctx.count), d.pull / -ctx.count
        passes = select_backend(x, geometry, unit.channels[1])
        dx = passes.input_grad(zeros, zeros, x, folded.kernel, folded.mean, quad, shift, geometry, None)
        return (None, dx, *grads)


# ------------------------------------------------------------------ statistics for trees of any form


class BatchPatches:
    """A batch as the source of statistics for stencils: what the algebra's rules ask for in training.

    The moments of each kind of patch - of one kernel size, stride, padding, dilation and number of groups - are
    computed once. Gradients flow through them to the images.
    """

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self._moments: dict[Geometry, Moments] = {}

    def statistics(self, stencil: Stencil) -> tuple[Tensor, Tensor, int]:
        """Mean (O,), biased variance (O,) and count of the stencil's output, by its rows against the moments."""
        kind = Geometry(stencil.groups, stencil.kernel_size, stencil.stride, stencil.padding, stencil.dilation)
        if kind not in self._moments:
            self._moments[kind] = ReferenceBackend().moments(self._images, kind)
        mean, covariance, count = self._moments[kind]
        check_batch_size(count, self._images)
        rows = stencil.weight.flatten(1).unflatten(0, (stencil.groups, -1))  # (G, O/G, K)
        centre = (rows @ mean[..., None]).flatten()
        return centre + stencil.bias, ((rows @ covariance) * rows).sum(-1).flatten(), count
