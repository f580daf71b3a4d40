"""A unit's algebra between its passes over the batch: from moments to one kernel, and back to all gradients.

This is the version in torch, for any device and dtype; `kernels.cpu_moments_algebra` does the same in compiled code.
The formulas are in `moments`.

Shapes: B branches with a convolution, M with the skip; G groups, K values a patch; see `branches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onefold.reparam.branches import Unit
from onefold.reparam.folding_rules import update_running_stats_
from onefold.reparam.kernels.base import Moments

_MAX_FLOAT64 = 2**24  # multiplications up to which float32 units are folded in float64: it is cheap there


class FoldedUnit(NamedTuple):
    """What the backward needs: rows and rows S, both (G, B, O/G, K); of the norms (M, O), the skip last."""

    rows: Tensor
    rows_cov: Tensor
    inv_std: Tensor  # 1 / sqrt(v + eps)
    gain: Tensor
    kernel: Tensor  # (G, O/G, K)
    mean: Tensor  # (G, K)


class FoldGradients(NamedTuple):
    """The gradients of the weights and of the norms' gains, d S (G, K, K), and kernel^T s (G, K)."""

    weights: list[Tensor]
    gamma: list[Tensor]
    quad: Tensor
    pull: Tensor


def fold(unit: Unit, moments: Moments, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[FoldedUnit, Tensor]:
    """Fold a unit on a batch of these moments: kernel and bias (O,). Moves the norms' running statistics."""
    mean, covariance, count = moments
    per_conv = [unit.kernel_rows(w.detach(), conv) for w, conv in zip(weights, unit.convs, strict=True)]
    rows = torch.stack(per_conv, 1).to(_dtype(unit, dtype, mean.dtype))
    rows_cov = (rows.flatten(1, 2) @ covariance.to(rows.dtype)).view_as(rows)
    var = _by_branch((rows_cov * rows).sum(-1, dtype=mean.dtype))
    centre = _by_branch((rows.flatten(1, 2).to(mean.dtype) @ mean[..., None]).view(rows.shape[:3]))
    group, row, value = unit.skip_indices(mean.device)
    if unit.skip is not None:
        var = torch.cat([var, covariance[group, value, value][None]])
        centre = torch.cat([centre, mean[group, value][None]])
    var = var.clamp_min(0)  # rounding may leave less for a channel that is constant
    norms = [branch.norm for branch in unit.ordered_branches]
    inv_std = (var + mean.new_tensor([norm.eps for norm in norms])[:, None]).rsqrt()
    gain = torch.stack(
        [i if n.weight is None else n.weight.detach().to(i) * i for n, i in zip(norms, inv_std, strict=True)]
    )
    kernel = (_by_row(gain, rows) * rows).sum(1)
    if unit.skip is not None:
        kernel[group, row, value] += gain[-1].to(kernel.dtype)
    bias = mean.new_zeros(unit.channels[1])
    for branch, m, v in zip(unit.ordered_branches, centre, var * (count / (count - 1)), strict=True):
        shift = None if branch.conv is None else branch.conv.bias
        update_running_stats_(branch.norm, m if shift is None else m + shift.detach().to(m), v)
        if branch.norm.bias is not None:
            bias = bias + branch.norm.bias.detach()
    return FoldedUnit(rows, rows_cov, inv_std, gain, kernel, mean), bias


def fold_backward(unit: Unit, folded: FoldedUnit, products: Tensor, total: Tensor) -> FoldGradients:
    """Give the gradients of `fold`, from A (G, O/G, K) and the sums of the gradient s (O,)."""
    rows, rows_cov, inv_std, gain, kernel, _ = folded
    products, wide = products.to(rows.dtype), gain.dtype
    group, row, value = unit.skip_indices(total.device)
    d_gain = _by_branch((products[:, None] * rows).sum(-1, dtype=wide))
    if unit.skip is not None:
        d_gain = torch.cat([d_gain, products[group, row, value].to(wide)[None]])
    d_var = -0.5 * d_gain * gain * inv_std.square()
    weighted = _by_row(d_var, rows) * rows
    d_rows = _by_row(gain, rows) * products[:, None] + 2 * _by_row(d_var, rows) * rows_cov
    quad = weighted.flatten(1, 2).mT @ rows.flatten(1, 2)
    if unit.skip is not None:
        quad[group, value, value] += d_var[-1].to(quad.dtype)
    pull = (kernel.mT.to(wide) @ total.to(wide).view(len(kernel), -1, 1)).squeeze(-1)
    weights = [unit.from_kernel_rows(d, conv) for d, conv in zip(d_rows.unbind(1), unit.convs, strict=True)]
    return FoldGradients(weights, list(d_gain * inv_std), quad, pull)


def _by_branch(values: Tensor) -> Tensor:
    """(G, B, O/G) to (B, O)."""
    return values.transpose(0, 1).flatten(1)


def _by_row(values: Tensor, rows: Tensor) -> Tensor:
    """The first B of (M, O), shaped to scale rows (G, B, O/G, K)."""
    groups, num, outputs, _ = rows.shape
    return values[:num].view(num, groups, outputs, 1).transpose(0, 1).to(rows.dtype)


def _dtype(unit: Unit, dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """The dtype to fold in: float64 wherever that is cheap, else float32, which is as accurate as the inputs."""
    size = unit.geometry.kernel_size[0] * unit.geometry.kernel_size[1] * unit.channels[0] // unit.geometry.groups
    small = len(unit.convs) * unit.channels[1] * size * size <= _MAX_FLOAT64
    return wide if dtype == torch.float64 or small else torch.float32
