"""The four passes on a CPU in bfloat16, where it has instructions for that: pointwise units by the library's products.

oneDNN's products in bfloat16 sum in float32 and take an eighth of the time of those in float32 (AMX), but their results
are rounded to bfloat16. The moments cannot bear that: where branches look along directions of small variance, what is
left of it would be rounding. So what the rounding took is computed by a second product, that of the same matrices less
the first one's result. Sums over the rows are the compiled kernels'. All other units are as in `cpu`.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.reparam.kernels import cpu
from onefold.reparam.kernels.base import ClampMax, Geometry, Moments


@cache
def has_bfloat16() -> bool:
    """Whether this processor has instructions for products in bfloat16 (AMX or AVX512-BF16)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def supports(x: Tensor, geometry: Geometry) -> bool:
    """Whether the library's products do a pointwise unit on x; `cpu.supports` is asked first."""
    return x.dtype is torch.bfloat16 and cpu.is_pointwise(geometry) and has_bfloat16()


class PointwiseBfloat16Backend(cpu.CppBackend):
    """The back end; an instance is for one unit and batch, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self._through: Tensor | None = None  # the gradient through the activation: both passes of the backward use it

    def moments(self, x: Tensor, geometry: Geometry) -> Moments:
        """Mean and covariance of the pixels, in float64: uncentred, or in float32 where a mean dominates."""
        rows = _rows(x)
        n, c = rows.shape
        total = torch.empty(1, c, dtype=torch.float64)
        cpu.call_kernel("masked_sums", rows, 0, n, c, -1.0, 0, total)
        first = rows.T @ rows
        rest = torch.addmm(first.neg(), rows.T, rows)
        products = first.double().add_(rest)
        moments = cpu.moments_from_sums(torch.zeros(1, c, dtype=torch.float64), total, products[None], n)
        dominates = cpu.mean_dominates(moments.mean[0], moments.covariance[0].diagonal())
        return super().moments(x, geometry) if dominates else moments

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> Tensor:
        """act(bias + kernel (pixel - mean)): (B, O, H', W')."""
        weight = kernel[0].to(x.dtype)
        # The rounded kernel's, so that its rounding moves no channel's mean.
        offset = (bias.double() - weight.double() @ mean[0].double()).to(x.dtype)
        y = _linear(_rows(x), weight, offset, act)
        return y.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)

    def kernel_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> tuple[Tensor, Tensor]:
        """Sum over places of grad' (pixel - mean)^T (1, O, I), and of grad' (O,), in float64."""
        g, total = _rows(grad), torch.empty(grad.shape[1], dtype=torch.float64)
        self._through = g if act is None else torch.empty_like(g)
        after = 0 if act is None else _rows(y)
        cpu.call_kernel("masked_sums", g, after, *g.shape, cpu.clamp_bound(act), self._through, total)
        products = (self._through.T @ _rows(x)).double()
        return (products - torch.outer(total, mean[0].double()))[None], total

    def input_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, kernel: Tensor, mean: Tensor, quad: Tensor, shift: Tensor,
        geometry: Geometry, act: ClampMax,
    ) -> Tensor:  # fmt: skip
        """The gradient kernel^T grad' + quad (pixel - mean) + shift, in the shape of x."""
        if self._through is None:
            self.kernel_grad(grad, y, x, mean, geometry, act)
        assert self._through is not None
        square = quad[0].to(x.dtype)
        constant = (shift[0].double() - square.double() @ mean[0].double()).to(x.dtype)
        dx = torch.addmm(constant, _rows(x), square).addmm_(self._through, kernel[0].to(x.dtype))
        return dx.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B H W, C) in bfloat16; what is channels_last and bfloat16 is not copied."""
    return x.detach().permute(0, 2, 3, 1).to(torch.bfloat16).contiguous().flatten(0, 2)


def _linear(rows: Tensor, weight: Tensor, offset: Tensor, act: ClampMax) -> Tensor:
    """act(rows weight^T + offset). In one pass where this torch has oneDNN's product with an activation."""
    if act is None:
        return F.linear(rows, weight, offset)
    name, bounds = ("relu", []) if act == float("inf") else ("hardtanh", [0.0, act])
    try:  # what torch's own compiler calls: it is private, and may go
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, offset, name, bounds, "")
    except (AttributeError, RuntimeError):
        y = F.linear(rows, weight, offset).clamp_(0.0, act)
    return y
