"""Stencil: an affine, translation-invariant map of images - what a convolution with bias computes - as plain data.

Stencils add (parallel branches) and compose (layers in series). Everything else in this package - folding a
network, evaluating a training-mode sum as one convolution - is these two operations.

Shapes: O output channels, I input channels, G groups, H W height and width of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


class StatisticsSource(Protocol):
    """A batch of images that a stencil is applied to: in training, norms take their statistics from it."""

    def statistics(self, stencil: Stencil) -> tuple[Tensor, Tensor, int]:
        """Mean (O,) and biased variance (O,) of the stencil's output over the batch, and the count of values."""


@dataclass(frozen=True, eq=False)
class Stencil:
    """y[o, p] = bias[o] + sum over i, t of weight[o, i, t] * x[i, stride * p + dilation * t - padding].

    Padding is that before the first row and column; `after` is that behind the last ones.
    """

    weight: Tensor  # (O, I/G, H, W)
    bias: Tensor  # (O,)
    groups: int = 1
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    source: StatisticsSource | None = None

    @classmethod
    def diagonal(cls, gain: Tensor, bias: Tensor | None = None) -> Stencil:
        """The stencil of one gain (and bias) a channel, both (C,): a norm in eval mode, a layer scale, the identity."""
        bias = torch.zeros_like(gain) if bias is None else bias
        return cls(gain.reshape(-1, 1, 1, 1), bias, groups=gain.numel())

    @property
    def channels(self) -> Pair:
        """(I, O)."""
        return self.weight.shape[1] * self.groups, self.weight.shape[0]

    @property
    def kernel_size(self) -> Pair:
        """(H, W)."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def after(self) -> Pair:
        """How far the kernel extends behind its anchor (H, W); negative where padding is larger than the kernel."""
        return _pairwise(lambda k, d, r: (k - 1) * d - r, self.kernel_size, self.dilation, self.padding)

    @property
    def grid(self) -> tuple[Pair, Pair, Pair]:
        """What has to agree in two stencils for their outputs to have the same shape and positions."""
        return self.channels, self.stride, _pairwise(lambda r, a: r - a, self.padding, self.after)

    @property
    def is_diagonal(self) -> bool:
        """Whether the stencil is one gain a channel and nothing else."""
        depthwise = self.weight.shape[1:] == (1, 1, 1) and self.groups == len(self.weight)
        return depthwise and self.stride == (1, 1) and self.padding == (0, 0)

    def __add__(self, other: Stencil) -> Stencil:
        """The stencil of both maps in parallel: kernels add over the union of their offsets. Raises ValueError."""
        if self.grid != other.grid:
            first, second = (
                f"{s.channels[1]} channels by a {'x'.join(map(str, s.kernel_size))} kernel of stride {s.stride} "
                f"and padding {s.padding}"
                for s in (self, other)
            )
            raise ValueError(f"branches of a Sum must give maps of one shape: one gives {first}, another {second}")
        groups = math.gcd(self.groups, other.groups)
        padding = _pairwise(max, self.padding, other.padding)
        after = _pairwise(max, self.after, other.after)
        # Where spacing or offset differ, both kernels are written on the coarsest spacing that holds all their entries.
        spacing = _pairwise(
            lambda a, b, p, q: math.gcd(a, b, p - q) or 1, self._spacing, other._spacing, self.padding, other.padding
        )
        a, b = (s.regroup(groups)._spread(spacing).pad_kernel(padding, after) for s in (self, other))
        return replace(a, weight=a.weight + b.weight, bias=a.bias + b.bias)

    def then(self, other: Stencil) -> Stencil:
        """The stencil of `other` after this one: offsets add, so kernels convolve and strides multiply.

        It is exact everywhere if `other` has no padding; if it has, exact up to a border that wide (see `Chain`).
        """
        if self.channels[1] != other.channels[0]:
            raise ValueError(f"a layer gives {self.channels[1]} channels, the next takes {other.channels[0]}")
        if other.is_diagonal:  # scales rows
            weight, bias = self.weight * other.weight, self.bias * other.weight.flatten()
            return replace(self, weight=weight, bias=bias + other.bias)
        padding = _pairwise(lambda a, s, b: a + s * b, self.padding, self.stride, other.padding)
        stride = _pairwise(lambda a, b: a * b, self.stride, other.stride)
        if self.is_diagonal:  # scales columns
            weight, bias, groups, dilation = *_scale_columns(self, other), other.groups, other.dilation
        else:
            weight, bias, groups, dilation = _convolve(self, other)
        return Stencil(weight, bias + other.bias, groups, stride, padding, dilation, self.source)

    def regroup(self, groups: int) -> Stencil:
        """The same map written with fewer groups: zeros between channels of different groups."""
        if groups == self.groups:
            return self
        merge = self.groups // groups
        src = self.weight.unflatten(0, (groups, merge, -1))  # (g, m, o, i, H, W)
        eye = torch.eye(merge, dtype=src.dtype, device=src.device)
        weight = torch.einsum("gmoihw,mn->gmonihw", src, eye).flatten(0, 2).flatten(1, 2)
        return replace(self, weight=weight, groups=groups)

    def conv(self, dtype: torch.dtype) -> nn.Conv2d:
        """The convolution, with bias, that this stencil is; its parameters can be trained. Raises ValueError."""
        c_in, c_out = self.channels
        if min(self.padding) < 0:
            raise ValueError(f"no convolution has a negative padding, as this stencil's {self.padding}")
        shape = c_in, c_out, self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        conv = nn.Conv2d(*shape, device="meta", dtype=dtype)  # without the time of an initialization
        conv.weight, conv.bias = self._parameters(self.weight, dtype)
        return conv

    def linear(self, dtype: torch.dtype) -> nn.Linear:
        """The Linear layer that this stencil, with a 1x1 kernel, is for vectors."""
        dense = self.regroup(1)
        linear = nn.Linear(*dense.channels, device="meta", dtype=dtype)
        linear.weight, linear.bias = self._parameters(dense.weight.flatten(1), dtype)
        return linear

    def _parameters(self, weight: Tensor, dtype: torch.dtype) -> list[nn.Parameter]:
        """A kernel and the bias, rounded to a dtype, as parameters that share no memory with them."""
        rounded = (t.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for t in (weight, self.bias))
        return [nn.Parameter(t) for t in rounded]

    @property
    def _spacing(self) -> Pair:
        """The distance between entries of the kernel; 0 for a single row or column, which fits any spacing."""
        return _pairwise(lambda k, d: d if k > 1 else 0, self.kernel_size, self.dilation)

    def _spread(self, spacing: Pair) -> Stencil:
        """The same map with its kernel written on a finer spacing."""
        ratio = _pairwise(lambda d, new: max(d, new) // new, self._spacing, spacing)
        return replace(self, weight=_insert_zeros(self.weight, ratio), dilation=spacing)

    def pad_kernel(self, padding: Pair, after: Pair) -> Stencil:
        """The same map with a larger kernel, zeros at its rim."""
        (top, left), (bottom, right) = (
            _pairwise(lambda new, old, d: (new - old) // d, wide, now, self.dilation)
            for wide, now in ((padding, self.padding), (after, self.after))
        )
        return replace(self, weight=F.pad(self.weight, (left, right, top, bottom)), padding=padding)


def _scale_columns(gain: Stencil, other: Stencil) -> tuple[Tensor, Tensor]:
    """Kernel and bias (without other's own) of `other` after `gain`, a diagonal stencil."""
    w = other.weight.unflatten(0, (other.groups, -1))  # (g, o, i, H, W)
    weight = (w * gain.weight.view(other.groups, 1, -1, 1, 1)).flatten(0, 1)
    bias = (w.sum((3, 4)) @ gain.bias.view(other.groups, -1, 1)).flatten()
    return weight, bias


def _convolve(a: Stencil, b: Stencil) -> tuple[Tensor, Tensor, int, Pair]:
    """Kernel, bias (without b's own), groups and dilation of `b` after `a`."""
    groups = math.gcd(a.groups, b.groups)
    strides = _pairwise(lambda d, s: d * s, b._spacing, a.stride)  # an entry of b reads a's outputs, a's stride apart
    spacing = _pairwise(lambda p, q: math.gcd(p, q) or 1, a._spacing, strides)
    a = a.regroup(groups)._spread(spacing)
    b = b.regroup(groups)
    spread = _insert_zeros(b.weight, _pairwise(lambda d, new: max(d, new) // new, strides, spacing))
    mid = b.weight.shape[1]
    # The kernel of a series is a full convolution of the two kernels: b's, as images, by a's, flipped.
    images = spread.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # (o, g*mid, h, w)
    flipped = a.weight.unflatten(0, (groups, mid)).transpose(1, 2).flip(3, 4).flatten(0, 1)  # (g*i, mid, ah, aw)
    rim = _pairwise(lambda k: k - 1, a.kernel_size)
    kernel = F.conv2d(images, flipped, padding=rim, groups=groups)  # (o, g*i, ., .)
    weight = kernel.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    bias = (b.weight.sum((2, 3)).unflatten(0, (groups, -1)) @ a.bias.view(groups, mid, 1)).flatten()
    return weight, bias, groups, spacing


def _insert_zeros(weight: Tensor, ratio: Pair) -> Tensor:
    """A kernel with zeros between its entries, which then are `ratio` as far apart."""
    if ratio == (1, 1):
        return weight
    h, w = ((k - 1) * r + 1 for k, r in zip(weight.shape[2:], ratio, strict=True))
    spread = weight.new_zeros(*weight.shape[:2], h, w)
    spread[..., :: ratio[0], :: ratio[1]] = weight
    return spread


def _pairwise(function: Callable[..., int], *pairs: Sequence[int]) -> Pair:
    """`function` of the heights, then of the widths."""
    height, width = (function(*values) for values in zip(*pairs, strict=True))
    return height, width
