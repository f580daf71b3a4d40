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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onefold.reparam import algebra
from onefold.reparam.kernels import cpu_algebra as compiled
from onefold.reparam.kernels import passes_for
from onefold.reparam.kernels.backend import Act, Moments
from onefold.reparam.unit import Unit


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
