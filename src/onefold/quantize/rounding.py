"""Rounding a kernel to its grid, by what its inputs are: the errors of one weight made good by those not yet rounded.

With S the covariance of a layer's input patches, the squared error of its answer is the sum over outputs of
e S e^T, where e is a row's rounding error. Rounded one after another, each weight's error moves the best values of
the rest (the Cholesky factor of S^-1 says by how much). The bias takes up the mean, so S is centred; it is the same
matrix that the `moments` route of training folds norms with.

Source: Frantar et al., arXiv 2210.17323 (GPTQ), here for grouped convolutions. Shapes: G groups, K = I/G * H * W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.quantize.graph import Layer

_DAMP = 0.01
_DRAWN = 1.0
_MOST_PATCHES = 60_000


def nearest(kernel: Tensor, scales: Tensor, limit: int) -> Tensor:
    """The whole numbers nearest to `kernel` (O, K) / `scales` (O,), float."""
    return torch.round(kernel / scales[:, None]).clamp(-limit, limit)


def by_moments(kernel: Tensor, scales: Tensor, limit: int, covariance: Tensor) -> Tensor:
    """Whole numbers (O, K) for `kernel` that keep the answer to inputs of this covariance (G, K, K)."""
    groups, width = covariance.shape[:2]
    inverse_root = _inverse_root(covariance)
    rows = kernel.double().unflatten(0, (groups, -1)).clone()  # (G, O/G, K)
    steps = scales.double().unflatten(0, (groups, -1))  # (G, O/G)
    whole = torch.empty_like(rows)
    for start in range(0, width, 64):
        stop = min(start + 64, width)
        errors = torch.empty_like(rows[..., start:stop])
        for k in range(start, stop):
            whole[..., k] = torch.round(rows[..., k] / steps).clamp(-limit, limit)
            error = (rows[..., k] - whole[..., k] * steps) / inverse_root[:, k, k, None]
            rows[..., k:stop] -= error[..., None] * inverse_root[:, None, k, k:stop]
            errors[..., k - start] = error
        rows[..., stop:] -= errors @ inverse_root[:, start:stop, stop:]
    return whole.flatten(0, 1).float()


@dataclass(frozen=True)
class Moments:
    """Of the patches that a layer reads, float64: their covariance (G, K, K), and that of the true ones with them.

    The true patches are those of the network in floating point: `cross` is the mean of true x given^T.
    """

    covariance: Tensor
    cross: Tensor

    def restored(self, kernel: Tensor) -> Tensor:
        """The kernel (O, K) that, on the given patches, comes nearest to what `kernel` answers to the true ones.

        Least squares, drawn towards `kernel` where the patches say little.
        """
        groups = len(self.covariance)
        rows = kernel.double().unflatten(0, (groups, -1))
        lost = rows @ (self.cross - self.covariance)  # (G, O/G, K)
        step = torch.linalg.solve(_lifted(self.covariance, _DRAWN), lost.mT).mT
        return (rows + step).flatten(0, 1).to(kernel.dtype)


def moments_of(layer: Layer, given: Sequence[Tensor], true: Sequence[Tensor], weight: Tensor) -> Moments:
    """The moments of the patches that a layer reads, from evenly chosen ones."""
    each = max(1, _MOST_PATCHES // len(given))
    pilot = _patches(layer, given[0], weight, each).mean(-1, keepdim=True)
    squares, products = (pilot @ pilot.mT * 0).double(), (pilot @ pilot.mT * 0).double()
    means, count = [(pilot * 0).double(), (pilot * 0).double()], 0
    for x, y in zip(given, true, strict=True):
        a, b = (_patches(layer, chunk, weight, each) - pilot for chunk in (x, y))
        squares += (a @ a.mT).double()
        products += (b @ a.mT).double()
        means = [mean + part.sum(-1, keepdim=True).double() for mean, part in zip(means, (a, b), strict=True)]
        count += a.shape[-1]
    a_mean, b_mean = (mean / count for mean in means)
    return Moments(squares / count - a_mean @ a_mean.mT, products / count - b_mean @ a_mean.mT)


def _patches(layer: Layer, x: Tensor, weight: Tensor, most: int) -> Tensor:
    """Patches of one batch (G, K, N), N near `most` where there are more."""
    if not layer.is_conv:
        return x.flatten(1).T[None]
    args = layer.node.args
    stride, padding, dilation = (_pair(args, at, default) for at, default in ((3, 1), (4, 0), (5, 1)))
    taps = weight.shape[-2:]
    if tuple(taps) == (1, 1):
        columns = x[:, :, :: stride[0], :: stride[1]].transpose(0, 1).flatten(1)
        columns = columns[:, :: max(1, columns.shape[1] // most)]
        return columns.unflatten(0, (layer.groups, -1))
    positions = x.shape[2] * x.shape[3] // (stride[0] * stride[1])
    images = x[: max(1, -(-most // positions))]
    columns = F.unfold(images, tuple(taps), dilation, padding, stride)  # (B, I*H*W, L)
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)


def _pair(args: tuple[object, ...], at: int, default: int) -> tuple[int, int]:
    """Stride, padding or dilation as two numbers, from where conv2d has it."""
    value = args[at] if len(args) > at else default
    if isinstance(value, int):
        return value, value
    assert isinstance(value, (list, tuple))
    return int(value[0]), int(value[-1])


def _inverse_root(covariance: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, the diagonal lifted so that there is one."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_lifted(covariance, _DAMP)))
    return torch.linalg.cholesky(inverse, upper=True)


def _lifted(covariance: Tensor, share: float) -> Tensor:
    """The covariance with a share of its mean diagonal added to its diagonal."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    lift = (share * diagonal.mean(-1)).clamp(min=1e-12)
    return covariance + torch.diag_embed(lift[:, None].expand_as(diagonal))
