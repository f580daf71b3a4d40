"""Rounding weights to integers: to the nearest, or by GPTQ, which compensates for each weight's error in later ones.

With S the covariance of a layer's input patches, the squared error of its output is the sum over output channels of
e S e^T, where e is a row's rounding error. Weights are rounded one after another, and each error changes the best
values of the remaining ones (by the Cholesky factor of S^-1). The bias compensates for the mean, so S is centred.

Source: Frantar et al., arXiv 2210.17323 (GPTQ), here for grouped convolutions. Shapes: G groups, K = I/G * H * W.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.quantize.graph import Layer, map_over_batches

_DAMPING = 0.01
_RIDGE = 1.0
_MAX_PATCHES = 60_000
_MAX_GROUPED_PATCHES = 16_000  # of a depthwise layer, whose covariances have 9 rows
_MIN_IMAGES = 16
_BLOCK = 64


def round_to_nearest(weight: Tensor, scales: Tensor, qmax: int) -> Tensor:
    """Round `weight` (O, K) / `scales` (O,) to the nearest integers in -qmax..qmax, kept as float."""
    return torch.round(weight / scales[:, None]).clamp(-qmax, qmax)


def gptq_round(weight: Tensor, scales: Tensor, qmax: int, covariance: Tensor) -> Tensor:
    """Round `weight` (O, K) / `scales` (O,) to integers that suit inputs of this covariance (G, K, K)."""
    groups, width = covariance.shape[:2]
    inverse_root = _inverse_root(covariance)
    rows = weight.double().unflatten(0, (groups, -1)).clone()  # (G, O/G, K)
    steps = scales.double().unflatten(0, (groups, -1)).numpy()  # (G, O/G)
    q = torch.empty_like(rows)
    # In blocks: within one each error is applied at once, to later blocks all of its errors in one product. A block is
    # of numpy, and has its columns first: a step is of few values, and torch takes longest to begin an operation.
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block = np.ascontiguousarray(np.moveaxis(rows[..., start:stop].numpy(), -1, 0))  # (k, G, O/G)
        root = np.ascontiguousarray(np.moveaxis(inverse_root[:, start:stop, start:stop].numpy(), 0, -1))  # (k, k, G)
        errors, rounded = np.empty_like(block), np.empty_like(block)
        for k, column in enumerate(block):
            np.divide(column, steps, out=rounded[k])
            np.clip(np.rint(rounded[k]), -qmax, qmax, out=rounded[k])
            errors[k] = (column - rounded[k] * steps) / root[k, k, :, None]
            block[k:] -= root[k, k:, :, None] * errors[k]
        q[..., start:stop] = torch.from_numpy(np.moveaxis(rounded, 0, -1))
        done = torch.from_numpy(np.ascontiguousarray(np.moveaxis(errors, 0, -1)))
        rows[..., stop:] -= done @ inverse_root[:, start:stop, stop:]
    return q.flatten(0, 1).float()


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a layer's input patches, centred, float64.

    `covariance` (G, K, K) is that of the quantized model's patches, `cross` (G, K, K) that of the float model's patches
    with them: the mean of float x quantized^T.
    """

    covariance: Tensor
    cross: Tensor

    def correct_weight(self, weight: Tensor) -> Tensor:
        """Change `weight` (O, K) so that on quantized inputs it gives what it gave on float inputs.

        It is a ridge regression towards `weight`: directions in which the inputs hardly vary stay as they are.
        """
        groups = len(self.covariance)
        rows = weight.double().unflatten(0, (groups, -1))
        residual = rows @ (self.cross - self.covariance)  # (G, O/G, K)
        step = torch.linalg.solve(_damped(self.covariance, _RIDGE), residual.mT).mT
        return (rows + step).flatten(0, 1).to(weight.dtype)


def input_moments(
    layer: Layer, quantized: Sequence[Tensor], exact: Sequence[Tensor] | None, weight: Tensor
) -> InputMoments:
    """Compute the moments of a layer's inputs, given as quantized and float batches, from a subset of patches.

    Without `exact` the cross moments, which only correcting weights needs, are those of the quantized inputs.
    """
    picked = _picked_images(layer, quantized)
    limit = max(1, _MAX_PATCHES // len(quantized))
    # Centred on the first batch's mean already while they are summed, which keeps digits.
    pilot = _patches(layer, quantized[0][picked[0] or slice(1)], weight, limit).mean(-1, keepdim=True)

    def moments(x: Tensor, y: Tensor | None, images: list[int]) -> tuple[Tensor, ...] | None:
        if not images:
            return None
        some = slice(None) if len(images) == len(x) else images  # a list of them copies
        a = _patches(layer, x[some], weight, limit).sub_(pilot)
        b = a if y is None else _patches(layer, y[some], weight, limit).sub_(pilot)
        sums = (part.sum(-1, keepdim=True) for part in (a, b))
        squares = a @ a.mT
        return (squares, squares if y is None else b @ a.mT, *sums, torch.tensor(a.shape[-1]))

    parts = [part for part in map_over_batches(moments, quantized, exact or [None] * len(quantized), picked) if part]
    columns = [*zip(*parts, strict=True)]
    squares, a_sum, b_sum, count = (_total(columns[i]) for i in (0, 2, 3, 4))
    a_mean, b_mean = a_sum / count, b_sum / count
    covariance = squares / count - a_mean @ a_mean.mT
    if exact is None:
        return InputMoments(covariance, covariance)
    return InputMoments(covariance, _total(columns[1]) / count - b_mean @ a_mean.mT)


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Sum tensors in float64."""
    total = parts[0].double()
    for part in parts[1:]:
        total += part
    return total


def _picked_images(layer: Layer, batches: Sequence[Tensor]) -> list[list[int]]:
    """Pick images of each batch, evenly over all: as many as patches are wanted of a convolution larger than 1x1."""
    counts = [len(batch) for batch in batches]
    if not layer.is_conv:
        return [list(range(count)) for count in counts]
    stride = _pair(layer.node.args, 3, 1)
    positions = max(1, math.prod(batches[0].shape[2:]) // (stride[0] * stride[1]))
    limit, total = _MAX_PATCHES if layer.groups == 1 else _MAX_GROUPED_PATCHES, sum(counts)
    wanted = min(total, max(_MIN_IMAGES, -(-limit // positions)))
    numbers = {i * total // wanted for i in range(wanted)}
    starts = itertools.accumulate(counts, initial=0)
    return [[i for i in range(count) if start + i in numbers] for start, count in zip(starts, counts, strict=False)]


def _patches(layer: Layer, x: Tensor, weight: Tensor, limit: int) -> Tensor:
    """Extract the patches of one batch (G, K, N), in memory of their own; of a 1x1 convolution N near `limit`."""
    if not layer.is_conv:
        return x.flatten(1).T[None].clone()
    args = layer.node.args
    stride, padding, dilation = (_pair(args, at, default) for at, default in ((3, 1), (4, 0), (5, 1)))
    kernel_size = weight.shape[-2:]
    if tuple(kernel_size) == (1, 1):
        columns = x[:, :, :: stride[0], :: stride[1]].transpose(0, 1).flatten(1)
        columns = columns[:, :: max(1, columns.shape[1] // limit)].clone()
        return columns.unflatten(0, (layer.groups, -1))
    taps = _taps(x, (kernel_size[0], kernel_size[1]), stride, padding, dilation)
    return taps.view(layer.groups, -1, taps.shape[3:].numel())


def _taps(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Arrange what each weight of a kernel reads of images (B, I, H, W): (I, kernel height, width, B, H', W').

    It is F.unfold's columns in another order, which that would have to be copied to.
    """
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    batch, channel, *steps = x.stride()
    reaches = [(size - 1) * gap for size, gap in zip(kernel_size, dilation, strict=True)]
    sides = [(side - reach - 1) // by + 1 for side, reach, by in zip(x.shape[2:], reaches, stride, strict=True)]
    across = [step * gap for step, gap in zip(steps, dilation, strict=True)]
    along = [step * by for step, by in zip(steps, stride, strict=True)]
    return x.as_strided((x.shape[1], *kernel_size, len(x), *sides), (channel, *across, batch, *along)).contiguous()


def _pair(args: tuple[object, ...], at: int, default: int) -> tuple[int, int]:
    """Read stride, padding or dilation from conv2d's arguments as two numbers."""
    value = args[at] if len(args) > at else default
    if isinstance(value, int):
        return value, value
    assert isinstance(value, (list, tuple))
    return int(value[0]), int(value[-1])


def _inverse_root(covariance: Tensor) -> Tensor:
    """Compute the upper Cholesky factor of the inverse; the damping makes the covariance positive definite."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(covariance, _DAMPING)))
    return torch.linalg.cholesky(inverse, upper=True)


def _damped(covariance: Tensor, share: float) -> Tensor:
    """Add a share of the mean diagonal to the diagonal."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    damping = (share * diagonal.mean(-1)).clamp(min=1e-12)
    return covariance + torch.diag_embed(damping[:, None].expand_as(diagonal))
