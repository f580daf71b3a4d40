"""The four passes over the batch in plain torch, for any geometry, dtype and device: the other back ends agree with it.

A unit's output at a place is an affine map of the patch that it reads there; `im2col` writes them out, and every
pass is a matrix product with them. Shapes: see `kernels`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.reparam.kernels.base import ClampMax, Geometry, Moments


class ReferenceBackend:
    """The back end in plain torch."""

    def moments(self, x: Tensor, geometry: Geometry) -> Moments:
        """Mean and covariance of the patches, in float64 (float32 on a device that lacks it)."""
        rows = im2col(x, geometry).to(_wide(x))
        mean = rows.mean(-1)
        centred = rows - mean[..., None]
        return Moments(mean, centred @ centred.mT / rows.shape[-1], rows.shape[-1])

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> Tensor:
        """act(bias + kernel (patch - mean)): (B, O, H', W')."""
        offset = bias.view(geometry.groups, -1) - (kernel @ mean[..., None].to(kernel)).squeeze(-1)
        weight = kernel.flatten(0, 1).unflatten(1, (-1, *geometry.kernel_size)).to(x.dtype)
        place = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        y = F.conv2d(x, weight, offset.flatten().to(x.dtype), *place)
        return y if act is None else y.clamp_(0.0, act)

    def kernel_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> tuple[Tensor, Tensor]:
        """Sum over places of grad' (patch - mean)^T (G, O/G, K), and of grad' (O,): grad where act let through."""
        wide = _wide(x)
        rows = im2col(x, geometry).to(wide) - mean[..., None].to(wide)
        grads = _by_group(_through(grad, y, act), geometry).to(wide)
        return grads @ rows.mT, grads.sum(-1).flatten()

    def input_grad(
        self,
        grad: Tensor,
        y: Tensor,
        x: Tensor,
        kernel: Tensor,
        mean: Tensor,
        quad: Tensor,
        shift: Tensor,
        geometry: Geometry,
        act: ClampMax,
    ) -> Tensor:
        """The patches' gradient kernel^T grad' + quad (patch - mean) + shift, added up into the shape of x."""
        wide = _wide(x)
        rows = im2col(x, geometry).to(wide) - mean[..., None].to(wide)
        grads = _by_group(_through(grad, y, act), geometry).to(wide)
        back = kernel.mT.to(wide) @ grads + quad.to(wide) @ rows + shift[..., None].to(wide)
        return col2im(back, x, geometry).to(x.dtype)


def im2col(x: Tensor, geometry: Geometry) -> Tensor:
    """(B, I, H, W) to (G, K, N): what the kernel reads at each of the N places, zeros outside the image."""
    if geometry.kernel_size == (1, 1) and geometry.padding == (0, 0):
        rows = x[:, :, :: geometry.stride[0], :: geometry.stride[1]].transpose(0, 1).flatten(1)
        return rows.unflatten(0, (geometry.groups, -1))
    columns = F.unfold(x, geometry.kernel_size, geometry.dilation, geometry.padding, geometry.stride)  # (B, I*H*W, L)
    return columns.unflatten(1, (geometry.groups, -1)).permute(1, 2, 0, 3).flatten(2)


def col2im(rows: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
    """The transpose of `im2col`: (G, K, N) to (B, I, H, W), adding where patches overlap."""
    columns = rows.unflatten(2, (like.shape[0], -1)).flatten(0, 1).transpose(0, 1)  # (B, I*H*W, L)
    size = (like.shape[2], like.shape[3])
    return F.fold(columns, size, geometry.kernel_size, geometry.dilation, geometry.padding, geometry.stride)


def _through(grad: Tensor, y: Tensor, act: ClampMax) -> Tensor:
    """The gradient where the clamp let the value through, else 0."""
    return grad if act is None else grad * ((y > 0) & (y < act))


def _by_group(maps: Tensor, geometry: Geometry) -> Tensor:
    """(B, O, H', W') to (G, O/G, N)."""
    return maps.transpose(0, 1).flatten(1).unflatten(0, (geometry.groups, -1))


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over the batch: float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
