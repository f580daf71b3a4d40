"""A training unit as one convolution, forward and backward: the mathematics of the `moments` route.

With m the mean and S the covariance of the input patches over the batch, the branch W has the mean W m and the
variances v = diag(W S W^T) before its norm. So its gain g = gamma / sqrt(v + eps) is known, and the unit is

    y = act(K (x - m) + sum of the branches' beta),        K = sum over branches of diag(g) W.

Backward, with G the gradient through the activation, s its sum over places and A = sum over places of G (x - m)^T:

    d gamma = d g / sqrt(v + eps)     d beta = s            d g = diag(A W^T)       d v = -g (v + eps)^-1 / 2 * d g
    d W     = diag(g) A + 2 diag(d v) W S                   d S = sum over branches of W^T diag(d v) W
    d x     = K^T G + 2/N dS (x - m) - K^T s / N            (patch by patch)

Four passes touch the batch - the moments, the convolution, A, and d x -; a back end does them (see `kernels`).
The rest is algebra on matrices as large as a kernel. Only x, y, K and those are kept for the backward.

Shapes: B branches with a convolution; see `unit` for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onefold.reparam.kernels import passes_for
from onefold.reparam.kernels.passes import Act, Geometry, Moments
from onefold.reparam.linear import track_
from onefold.reparam.unit import Unit

WIDE = 2**24  # multiplications of the small algebra above which float32 inputs make it in float32


class _Kept(NamedTuple):
    """What the backward needs of the algebra: (G, B, O/G, K) rows and rows times S; (B, O) of the norms, the skip last."""

    rows: Tensor
    spread: Tensor
    gain: Tensor
    inverse: Tensor
    gamma: Tensor
    kernel: Tensor
    mean: Tensor
    count: int


@dataclass(frozen=True)
class _Call:
    """What is not a tensor of a unit's evaluation."""

    unit: Unit
    act: Act
    dtype: torch.dtype


def convolve(unit: Unit, x: Tensor, act: Act) -> Tensor:
    """act(unit(x)) with batch statistics, by their moments; (B, I, H, W) to (B, O, H', W'). Updates the norms' buffers."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    weights = [branch.conv.weight for branch in unit.convolutions if branch.conv is not None]
    norms = [branch.norm for branch in _ordered(unit)]
    affine = [p for norm in norms if norm.weight is not None for p in (norm.weight, norm.bias)]
    idle = [b.conv.bias for b in unit.convolutions if b.conv is not None and b.conv.bias is not None]
    y: Tensor = _Moments.apply(_Call(unit, act, dtype), x, *weights, *affine, *idle)
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
            kept, bias = _fold(unit, moments, parameters, x.dtype)
            y = passes.convolve(x, kept.kernel, bias, moments.mean, geometry, call.act)
        ctx.call, ctx.count = call, kept.count
        ctx.save_for_backward(x, y if call.act is not None else None, *kept[:-1], *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: _Call = ctx.call
        x, y, *rest = ctx.saved_tensors
        kept, parameters = _Kept(*rest[:7], ctx.count), rest[7:]
        geometry = call.unit.geometry
        passes = passes_for(x, geometry, call.unit.channels[1])
        y = grad if y is None else y
        with torch.autocast(x.device.type, enabled=False):
            rows, total = passes.kernel_grad(grad, y, x, kept.mean, geometry, call.act)
            grads, quad = _unfold(call.unit, kept, rows, total, parameters)
            if not ctx.needs_input_grad[1]:
                return (None, None, *grads)
            shift = -(kept.kernel.mT.double() @ total.double().view(geometry.groups, -1, 1)).squeeze(-1)
            quad, shift = _reduced(call.unit, quad, shift)
            scale = 2 / kept.count
            dx = passes.input_grad(
                grad, y, x, kept.kernel, kept.mean, quad * scale, shift / kept.count, geometry, call.act
            )
        return (None, dx, *grads)


def _fold(unit: Unit, moments: Moments, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[_Kept, Tensor]:
    """The one kernel (G, O/G, K) and bias (O,) of a unit on a batch of these moments; updates the norms' buffers."""
    convs = [branch.conv for branch in unit.convolutions if branch.conv is not None]
    weights = [unit.rows(w.detach(), conv) for w, conv in zip(parameters, convs, strict=False)]
    mean, covariance, count = moments
    wide = _algebra_dtype(unit, len(convs), dtype, mean.dtype)
    rows = torch.stack(weights, 1).to(wide)  # (G, B, O/G, K)
    spread = (rows.flatten(1, 2) @ covariance.to(wide)).view_as(rows)
    var = _by_branch((spread * rows).sum(-1, dtype=mean.dtype))
    centre = _by_branch((rows.flatten(1, 2).to(mean.dtype) @ mean[..., None]).view(rows.shape[:3]))
    group, row, value = unit.diagonal(mean.device)
    if unit.skip is not None:
        var = torch.cat([var, covariance[group, value, value][None]])
        centre = torch.cat([centre, mean[group, value][None]])
    norms = [branch.norm for branch in _ordered(unit)]
    var = var.clamp_min(0)  # of a dead channel rounding may leave less
    inverse = (var + mean.new_tensor([norm.eps for norm in norms])[:, None]).rsqrt()
    gamma = torch.stack([torch.ones_like(i) if n.weight is None else n.weight.detach().to(i) for n, i in zip(norms, inverse)])
    gain = gamma * inverse
    kernel = (_by_row(gain, rows) * rows).sum(1)
    if unit.skip is not None:
        kernel[group, row, value] += gain[-1].to(wide)
    bias = sum((n.bias.detach().to(mean) for n in norms if n.bias is not None), mean.new_zeros(unit.channels[1]))
    _track(unit, centre, var * (count / (count - 1)))
    return _Kept(rows, spread, gain, inverse, gamma, kernel, mean, count), bias


def _unfold(
    unit: Unit, kept: _Kept, rows: Tensor, total: Tensor, parameters: list[Tensor]
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the parameters, in their order, and d S, from A (G, O/G, K) and s (O,): the transpose of `_fold`."""
    wide, rows = kept.rows.dtype, rows.to(kept.rows.dtype)
    group, row, value = unit.diagonal(total.device)
    slope = _by_branch((rows[:, None] * kept.rows).sum(-1, dtype=kept.gain.dtype))  # d g
    if unit.skip is not None:
        slope = torch.cat([slope, rows[group, row, value][None]])
    d_var = -0.5 * slope * kept.gain * kept.inverse.square()
    weighted = _by_row(d_var, kept.rows) * kept.rows
    d_rows = _by_row(kept.gain, kept.rows) * rows[:, None] + 2 * _by_row(d_var, kept.rows) * kept.spread
    quad = weighted.flatten(1, 2).mT @ kept.rows.flatten(1, 2)
    if unit.skip is not None:
        quad[group, value, value] += d_var[-1].to(wide)
    convs = [branch.conv for branch in unit.convolutions if branch.conv is not None]
    grads: list[Tensor | None] = [unit.unrows(d, conv) for d, conv in zip(d_rows.unbind(1), convs, strict=True)]
    for norm, of_gain, inverse in zip([b.norm for b in _ordered(unit)], slope, kept.inverse, strict=True):
        if norm.weight is not None:
            grads += [of_gain * inverse, total]
    grads += [torch.zeros_like(p) for p in parameters[len(grads) :]]  # a bias before a norm does nothing
    return [g.to(p.dtype) for g, p in zip(grads, parameters, strict=True) if g is not None], quad


def _by_branch(values: Tensor) -> Tensor:
    """(G, B, O/G) to (B, O)."""
    return values.transpose(0, 1).flatten(1)


def _by_row(values: Tensor, rows: Tensor) -> Tensor:
    """The first B of (B, O) as factors of rows (G, B, O/G, K)."""
    groups, num, each, _ = rows.shape
    return values[:num].view(num, groups, each, 1).transpose(0, 1).to(rows.dtype)


def _ordered(unit: Unit) -> list[Any]:
    """The branches with a convolution, then the skip: the order of rows in the algebra."""
    return [*unit.convolutions, *([unit.skip] if unit.skip is not None else [])]


def _algebra_dtype(unit: Unit, num: int, dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """float64 wherever that is cheap; large matrices of a float32 unit in float32, as accurate as their inputs."""
    size = unit.geometry.taps[0] * unit.geometry.taps[1] * unit.channels[0] // unit.geometry.groups
    return wide if dtype == torch.float64 or num * unit.channels[1] * size * size <= WIDE else torch.float32


@torch.no_grad()
def _track(unit: Unit, mean: Tensor, var: Tensor) -> None:
    """Move the norms' running statistics towards the batch's, (B, O) each, the variance unbiased."""
    for branch, m, v in zip(_ordered(unit), mean, var, strict=True):
        bias = None if branch.conv is None else branch.conv.bias
        track_(branch.norm, m if bias is None else m + bias.to(m), v)


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
