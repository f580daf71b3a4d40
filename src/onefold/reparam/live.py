"""The one kernel that a tree is at this moment, with gradients: for those who change it before they convolve.

In training the norms' statistics are those of the batch, known from the moments of its patches (see `moments`); frozen
norms fold with their running ones. A unit's own pass does the convolution as well; here only the kernel is made.

With K the kernel, m the mean and S the covariance of the patches, and b = sum of the branches' beta - K m the bias,

    A = dK - db m^T and s = db give the branches' gradients and dS as in `moments`, and
    d x = 2/N dS (x - m) - K^T db / N        (patch by patch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam import algebra
from onefold.reparam.kernels import passes_for
from onefold.reparam.linear import fold, padding, width
from onefold.reparam.patches import Patches
from onefold.reparam.stencil import Stencil
from onefold.reparam.unit import Unit, read


def kernel_of(tree: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
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
    affine = [p for each in unit.ordered if each.norm.weight is not None for p in (each.norm.weight, each.norm.bias)]
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
        passes, size = passes_for(x, geometry, unit.channels[1]), _size_of(x, unit)
        nothing = x.new_zeros(size).contiguous(memory_format=_layout(x))
        quad, shift = d.quad * (2 / ctx.count), d.pull / -ctx.count
        dx = passes.input_grad(nothing, nothing, x, folded.kernel, folded.mean, quad, shift, geometry, None)
        return (None, dx, *grads)


def _size_of(x: Tensor, unit: Unit) -> tuple[int, int, int, int]:
    """The shape of the unit's output."""
    geometry = unit.geometry
    conv = unit.convs[0]
    ahead = [k - 1 - 2 * p for k, p in zip(conv.kernel_size, padding(conv), strict=True)]
    rows, columns = ((n - 1 - a) // s + 1 for n, a, s in zip(x.shape[2:], ahead, geometry.stride, strict=True))
    return x.shape[0], unit.channels[1], rows, columns


def _layout(x: Tensor) -> torch.memory_format:
    plain = torch.contiguous_format
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else plain
