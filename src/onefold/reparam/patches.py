"""A batch as the source of statistics for any stencil: what the algebra's rules ask in training.

Shapes: G groups, K = I/G * H * W values a patch, N patches, O outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from onefold.reparam.stencil import Pair, Stencil

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
