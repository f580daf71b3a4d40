"""A unit's algebra between its passes over the batch: from moments to one kernel, and back to all gradients.

In torch, for any device and dtype; `kernels.algebra` is the same in one call. The formulas are in `moments`.

Shapes: B branches with a convolution, M with the skip; G groups, K values a patch; see `unit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onefold.reparam.kernels.backend import Moments
from onefold.reparam.linear import track_
from onefold.reparam.unit import Unit

WIDE = 2**24  # multiplications from which float32 inputs are folded in float32


class Folded(NamedTuple):
    """What the backward needs: rows and rows S, each (G, B, O/G, K); of the norms (M, O), the skip last."""

    rows: Tensor
    spread: Tensor
    inverse: Tensor  # 1 / sqrt(v + eps)
    gain: Tensor
    kernel: Tensor  # (G, O/G, K)
    mean: Tensor  # (G, K)


class Gradients(NamedTuple):
    """Of the weights, of the norms' gains, d S (G, K, K), and kernel^T s (G, K)."""

    weights: list[Tensor]
    gamma: list[Tensor]
    quad: Tensor
    pull: Tensor


def fold(unit: Unit, moments: Moments, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Folded, Tensor]:
    """The one kernel and bias (O,) of a unit on a batch of these moments; moves the norms' running statistics."""
    mean, covariance, count = moments
    written = [unit.rows(w.detach(), conv) for w, conv in zip(weights, unit.convs, strict=True)]
    rows = torch.stack(written, 1).to(_dtype(unit, dtype, mean.dtype))
    spread = (rows.flatten(1, 2) @ covariance.to(rows.dtype)).view_as(rows)
    var = _by_branch((spread * rows).sum(-1, dtype=mean.dtype))
    centre = _by_branch((rows.flatten(1, 2).to(mean.dtype) @ mean[..., None]).view(rows.shape[:3]))
    group, row, value = unit.diagonal(mean.device)
    if unit.skip is not None:
        var = torch.cat([var, covariance[group, value, value][None]])
        centre = torch.cat([centre, mean[group, value][None]])
    var = var.clamp_min(0)  # of a dead channel rounding may leave less
    norms = [branch.norm for branch in unit.ordered]
    inverse = (var + mean.new_tensor([norm.eps for norm in norms])[:, None]).rsqrt()
    gain = torch.stack(
        [i if n.weight is None else n.weight.detach().to(i) * i for n, i in zip(norms, inverse, strict=True)]
    )
    kernel = (_by_row(gain, rows) * rows).sum(1)
    if unit.skip is not None:
        kernel[group, row, value] += gain[-1].to(kernel.dtype)
    bias = mean.new_zeros(unit.channels[1])
    for branch, m, v in zip(unit.ordered, centre, var * (count / (count - 1)), strict=True):
        shift = None if branch.conv is None else branch.conv.bias
        track_(branch.norm, m if shift is None else m + shift.detach().to(m), v)
        if branch.norm.bias is not None:
            bias = bias + branch.norm.bias.detach()
    return Folded(rows, spread, inverse, gain, kernel, mean), bias


def unfold(unit: Unit, folded: Folded, products: Tensor, total: Tensor) -> Gradients:
    """The transpose of `fold`, from A (G, O/G, K) and the sums of the gradient s (O,)."""
    rows, spread, inverse, gain, kernel, _ = folded
    products, wide = products.to(rows.dtype), gain.dtype
    group, row, value = unit.diagonal(total.device)
    slope = _by_branch((products[:, None] * rows).sum(-1, dtype=wide))  # d gain
    if unit.skip is not None:
        slope = torch.cat([slope, products[group, row, value].to(wide)[None]])
    d_var = -0.5 * slope * gain * inverse.square()
    weighted = _by_row(d_var, rows) * rows
    d_rows = _by_row(gain, rows) * products[:, None] + 2 * _by_row(d_var, rows) * spread
    quad = weighted.flatten(1, 2).mT @ rows.flatten(1, 2)
    if unit.skip is not None:
        quad[group, value, value] += d_var[-1].to(quad.dtype)
    pull = (kernel.mT.to(wide) @ total.to(wide).view(len(kernel), -1, 1)).squeeze(-1)
    weights = [unit.unrows(d, conv) for d, conv in zip(d_rows.unbind(1), unit.convs, strict=True)]
    return Gradients(weights, list(slope * inverse), quad, pull)


def _by_branch(values: Tensor) -> Tensor:
    """(G, B, O/G) to (B, O)."""
    return values.transpose(0, 1).flatten(1)


def _by_row(values: Tensor, rows: Tensor) -> Tensor:
    """The first B of (M, O) as factors of rows (G, B, O/G, K)."""
    groups, num, outputs, _ = rows.shape
    return values[:num].view(num, groups, outputs, 1).transpose(0, 1).to(rows.dtype)


def _dtype(unit: Unit, dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """float64 wherever that is cheap; large matrices of a float32 unit in float32, as accurate as their inputs."""
    size = unit.geometry.taps[0] * unit.geometry.taps[1] * unit.channels[0] // unit.geometry.groups
    few = len(unit.convs) * unit.channels[1] * size * size <= WIDE
    return wide if dtype == torch.float64 or few else torch.float32
