"""Routes: ways to evaluate the same `Sum` in training. The law: the same value, gradients and buffers as `each`.

`moments` is one convolution, exactly. With m the mean and S the covariance of the input patches over the batch, a
branch with kernel W has, before its norm, the mean W m and the variance diag(W S W^T). So every batch statistic is
known before anything is convolved, and the whole sum folds - by the same rules as in eval mode - into one kernel.

Shapes: B batch, I input channels, G groups, K = I/G * H * W values a patch, N patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onefold.reparam.linear import Route, Sum, each, fold, width
from onefold.reparam.stencil import Pair, Stencil

__all__ = ["Route", "each", "moments", "set_route_"]

_Geometry = tuple[int, Pair, Pair, Pair, Pair]


def moments(branches: Sum, x: Tensor) -> Tensor:
    """One convolution in all, in training mode too, and exactly; (B, I, H, W) to (B, O, H', W').

    The statistics and the kernel are made in float64 (float32 on a device that lacks it): summed in float32, the
    moments of some thousand values lose a digit against BatchNorm's own statistics. The convolution itself runs
    in the dtype of `x`, or that of the autocast region around it. Any tree of linear layers will do.
    Raises ValueError where a norm would see one value a channel, as BatchNorm does.
    """
    channels = width(branches)
    if channels is None:
        return each(branches, x)
    images = x if x.dim() == 4 else x[..., None, None]
    with torch.autocast(x.device.type, enabled=False):
        wide = images.to(torch.float32 if x.device.type == "mps" else torch.float64)
        one = Stencil.diagonal(wide.new_ones(channels))
        total = fold(branches, Stencil(one.weight, one.bias, one.groups, source=_Patches(wide)))
    kernel, bias = total.weight.to(x.dtype), total.bias.to(x.dtype)
    y = F.conv2d(images, kernel, bias, total.stride, total.reach, total.dilation, total.groups)
    return y if x.dim() == 4 else y.flatten(1)


def set_route_(model: nn.Module, route: Route) -> nn.Module:
    """Evaluate every Sum of `model` by `route` from now on, in place; gives the model back."""
    for module in model.modules():
        if isinstance(module, Sum):
            module.route = route
    return model


class _Patches:
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
