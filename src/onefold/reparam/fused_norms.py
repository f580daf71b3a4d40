"""The `mixed` route: each convolution by itself, then all norms, their sum and the activation in one pass.

It reads the maps once for the statistics and once for the output, and twice in the backward, whatever the number of
branches. Where a unit has one wide convolution, this is cheaper than the moments of that convolution's input.

Shapes: M maps (the branches' outputs, and the input where there is a skip), each (B, O, H', W'); tables (M, O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onefold.reparam.branches import Branch, check_batch_size
from onefold.reparam.folding_rules import update_running_stats_
from onefold.reparam.kernels import cpu
from onefold.reparam.kernels.base import ClampMax, load_kernels


@dataclass(frozen=True)
class _Call:
    """What is not a tensor of an evaluation."""

    branches: tuple[Branch, ...]
    act: ClampMax


def supports(branches: Sequence[Branch], x: Tensor) -> bool:
    """Whether the kernels take these: float32 on a CPU, norms that do not share statistics between processes."""
    known = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    synchronized = any(isinstance(branch.norm, nn.SyncBatchNorm) for branch in branches)
    return known and not synchronized and len(branches) <= cpu.MAX_MAPS and load_kernels() is not None


def normalize_and_sum(branches: Sequence[Branch], x: Tensor, act: ClampMax) -> Tensor:
    """act of the branches' sum, with batch statistics; (B, I, H, W) to (B, O, H', W'). Updates the norms' buffers.

    The convolutions may be of any form that gives maps of one size.
    """
    maps, norms = _maps(branches, x), [branch.norm for branch in branches]
    affine = [p for norm in norms if norm.weight is not None for p in (norm.weight, norm.bias)]
    y: Tensor = _Mix.apply(  # type: ignore[no-untyped-call]
        _Call(tuple(branches), act), *maps, *affine
    )
    return y


def _maps(branches: Sequence[Branch], x: Tensor) -> list[Tensor]:
    """The inputs of the branches' norms: pointwise convolutions pass the batch on, and the skip takes it last."""
    maps: dict[int, Tensor] = {}
    for number, (conv, _) in sorted(enumerate(branches), key=lambda pair: pair[1].conv is None):
        if conv is None:
            maps[number] = x
        elif conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding in (0, (0, 0)):
            y, x = cpu.PointwiseConv.apply(x, conv.weight)  # type: ignore[no-untyped-call]
            maps[number] = y if conv.bias is None else y + conv.bias.view(-1, 1, 1)
        else:
            maps[number] = conv(x)
    return [maps[number] for number in range(len(maps))]


class _Mix(torch.autograd.Function):
    """One node of the autograd graph a unit, behind its convolutions."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        norms = [branch.norm for branch in call.branches]
        maps, parameters = tensors[: len(norms)], tensors[len(norms) :]
        count = maps[0].numel() // maps[0].shape[1]
        check_batch_size(count, maps[0])
        moments = [cpu.channel_moments(m) for m in maps]
        mean, var = (torch.stack([pair[i] for pair in moments]) for i in (0, 1))
        inv_std = (var + mean.new_tensor([norm.eps for norm in norms])[:, None]).rsqrt()
        gain = torch.stack(
            [i if n.weight is None else n.weight.detach() * i for n, i in zip(norms, inv_std, strict=True)]
        )
        bias = (gain * (mean.float() - mean)).sum(
            0
        )  # corrects the rounding of the means, which `normalize_and_sum` takes in float32
        for norm, m, v in zip(norms, mean, var, strict=True):
            update_running_stats_(norm, m, v * (count / (count - 1)))
            if norm.bias is not None:
                bias = bias + norm.bias.detach()
        y = cpu.normalized_sum(maps, mean, gain, bias, call.act)
        ctx.call, ctx.count = call, count
        ctx.save_for_backward(y if call.act is not None else None, mean, inv_std, gain, *maps, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        norms = [branch.norm for branch in call.branches]
        y, mean, inv_std, gain, *rest = ctx.saved_tensors
        maps, parameters = rest[: len(norms)], rest[len(norms) :]
        y = grad if y is None else y
        *d_gains, total = cpu.normalized_sum_backward_sums(grad, y, maps, mean, call.act)
        d_gain = torch.stack(d_gains)
        # BatchNorm's gradient: the mean of grad', and its part along the map, are subtracted.
        slope, constant = -gain * inv_std.square() * d_gain / ctx.count, -gain * total / ctx.count
        grads = cpu.normalized_sum_backward(grad, y, maps, mean, gain, slope, constant, call.act)
        affine = [
            g for n, s, i in zip(norms, d_gain, inv_std, strict=True) if n.weight is not None for g in (s * i, total)
        ]
        return (None, *grads, *(g.to(p.dtype) for g, p in zip(affine, parameters, strict=True)))
