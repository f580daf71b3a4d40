"""A stencil: what an affine, translation-invariant map does to images, as plain data.

Stencils add (parallel branches) and compose (layers in series). Everything else in this room - folding a
network, evaluating a training-mode sum as one convolution - is these two operations.

Shapes: O output channels, I input channels, G groups, H W taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

Pair = tuple[int, int]


class Source(Protocol):
    """The batch that a stencil stands on, when one is known: in training, norms ask it for their statistics."""

    def statistics(self, stencil: Stencil) -> tuple[Tensor, Tensor, int]:
        """Mean (O,) and biased variance (O,) of the stencil's output over the batch, and the count of values."""


@dataclass(frozen=True, eq=False)
class Stencil:
    """y[o, p] = bias[o] + sum over i, t of weight[o, i, t] * x[i, stride * p + dilation * t - reach]."""

    weight: Tensor  # (O, I/G, H, W)
    bias: Tensor  # (O,)
    groups: int = 1
    stride: Pair = (1, 1)
    reach: Pair = (0, 0)  # how far taps stand before the anchor: the padding this stencil needs
    dilation: Pair = (1, 1)
    source: Source | None = None

    @classmethod
    def diagonal(cls, gain: Tensor, bias: Tensor | None = None) -> Stencil:
        """One gain (and bias) a channel, both (C,): a norm in eval mode, a layer scale, the identity."""
        bias = torch.zeros_like(gain) if bias is None else bias
        return cls(gain.reshape(-1, 1, 1, 1), bias, groups=gain.numel())

    @property
    def channels(self) -> Pair:
        """(I, O)."""
        return self.weight.shape[1] * self.groups, self.weight.shape[0]

    @property
    def taps(self) -> Pair:
        """(H, W)."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def after(self) -> Pair:
        """How far taps stand past the anchor; negative where padding outruns the taps."""
        return _pairwise(lambda k, d, r: (k - 1) * d - r, self.taps, self.dilation, self.reach)

    @property
    def grid(self) -> tuple[Pair, Pair, Pair]:
        """Two stencils put their outputs on the same grid if these agree."""
        return self.channels, self.stride, _pairwise(lambda r, a: r - a, self.reach, self.after)

    @property
    def is_diagonal(self) -> bool:
        """One gain a channel and nothing else."""
        lone = self.weight.shape[1:] == (1, 1, 1) and self.groups == len(self.weight)
        return lone and self.stride == (1, 1) and self.reach == (0, 0)

    def __add__(self, other: Stencil) -> Stencil:
        """Parallel: kernels add over the union of their offsets."""
        if self.grid != other.grid:
            mine, its = (_describe(s) for s in (self, other))
            raise ValueError(f"branches of a Sum must give maps of one shape: one gives {mine}, another {its}")
        groups = math.gcd(self.groups, other.groups)
        reach = _pairwise(max, self.reach, other.reach)
        after = _pairwise(max, self.after, other.after)
        lattice = _pairwise(_common_lattice, self._steps, other._steps, self.reach, other.reach)
        a, b = (s.regroup(groups)._spread(lattice)._widen(reach, after) for s in (self, other))
        return replace(a, weight=a.weight + b.weight, bias=a.bias + b.bias)

    def then(self, other: Stencil) -> Stencil:
        """Series: offsets add, so kernels convolve and strides multiply.

        Exact everywhere if `other` has no reach; if it has, exact up to a border of that reach (see `Chain`).
        """
        if self.channels[1] != other.channels[0]:
            raise ValueError(f"a layer gives {self.channels[1]} channels, the next takes {other.channels[0]}")
        if other.is_diagonal:  # scales rows
            weight, bias = self.weight * other.weight, self.bias * other.weight.flatten()
            return replace(self, weight=weight, bias=bias + other.bias)
        reach = _pairwise(lambda a, s, b: a + s * b, self.reach, self.stride, other.reach)
        stride = _pairwise(lambda a, b: a * b, self.stride, other.stride)
        if self.is_diagonal:  # scales columns
            weight, bias, groups, dilation = *_scale_columns(self, other), other.groups, other.dilation
        else:
            weight, bias, groups, dilation = _convolve(self, other)
        return Stencil(weight, bias + other.bias, groups, stride, reach, dilation, self.source)

    def regroup(self, groups: int) -> Stencil:
        """The same map written with fewer groups: zeros where groups did not meet."""
        if groups == self.groups:
            return self
        merge = self.groups // groups
        src = self.weight.unflatten(0, (groups, merge, -1))  # (g, m, o, i, H, W)
        eye = torch.eye(merge, dtype=src.dtype, device=src.device)
        weight = torch.einsum("gmoihw,mn->gmonihw", src, eye).flatten(0, 2).flatten(1, 2)
        return replace(self, weight=weight, groups=groups)

    def conv(self, dtype: torch.dtype) -> nn.Conv2d:
        """The one convolution, with bias, that does what this stencil says; its parameters can be trained."""
        c_in, c_out = self.channels
        if min(self.reach) < 0:
            raise ValueError(f"no convolution has a negative padding, as this stencil's reach {self.reach} asks")
        conv = skip_init(
            nn.Conv2d,
            *(c_in, c_out, self.taps, self.stride, self.reach, self.dilation, self.groups),
            device=self.weight.device,
            dtype=dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            conv.bias.copy_(self.bias)
        assert isinstance(conv, nn.Conv2d)
        return conv

    def linear(self, dtype: torch.dtype) -> nn.Linear:
        """The one Linear layer that does what this one-tap stencil says to vectors."""
        dense = self.regroup(1)
        linear = skip_init(nn.Linear, *dense.channels, device=self.weight.device, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(dense.weight.flatten(1))
            linear.bias.copy_(dense.bias)
        assert isinstance(linear, nn.Linear)
        return linear

    @property
    def _steps(self) -> Pair:
        """The spacing of taps; 0 where there is but one tap, which lies on every lattice."""
        return _pairwise(lambda k, d: d if k > 1 else 0, self.taps, self.dilation)

    def _spread(self, lattice: Pair) -> Stencil:
        """The same map with its taps written on a finer lattice."""
        if all(d in (0, new) for d, new in zip(self._steps, lattice, strict=True)):
            return replace(self, dilation=lattice)
        ratio = _pairwise(lambda d, new: max(d, new) // new, self._steps, lattice)
        return replace(self, weight=_space_out(self.weight, ratio), dilation=lattice)

    def _widen(self, reach: Pair, after: Pair) -> Stencil:
        """The same map on a wider window (zeros at the rim)."""
        (top, left), (bottom, right) = (
            _pairwise(lambda new, old, d: (new - old) // d, wide, now, self.dilation)
            for wide, now in ((reach, self.reach), (after, self.after))
        )
        return replace(self, weight=F.pad(self.weight, (left, right, top, bottom)), reach=reach)


def _scale_columns(gain: Stencil, other: Stencil) -> tuple[Tensor, Tensor]:
    """Kernel and bias (without other's own) of `other after gain`, gain a diagonal stencil."""
    w = other.weight.unflatten(0, (other.groups, -1))  # (g, o, i, H, W)
    weight = (w * gain.weight.view(other.groups, 1, -1, 1, 1)).flatten(0, 1)
    bias = (w.sum((3, 4)) @ gain.bias.view(other.groups, -1, 1)).flatten()
    return weight, bias


def _convolve(a: Stencil, b: Stencil) -> tuple[Tensor, Tensor, int, Pair]:
    """Kernel, bias (without b's own), groups and dilation of `b after a`."""
    groups = math.gcd(a.groups, b.groups)
    strides = _pairwise(lambda d, s: d * s, b._steps, a.stride)  # b's taps stand a's stride apart
    lattice = _pairwise(lambda p, q: math.gcd(p, q) or 1, a._steps, strides)
    a = a.regroup(groups)._spread(lattice)
    b = b.regroup(groups)
    spread = _space_out(b.weight, _pairwise(lambda d, new: max(d, new) // new, strides, lattice))
    mid = b.weight.shape[1]
    images = spread.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # (o, g*mid, h, w)
    taps = a.weight.unflatten(0, (groups, mid)).transpose(1, 2).flip(3, 4).flatten(0, 1)  # (g*i, mid, ah, aw)
    rim = _pairwise(lambda k: k - 1, a.taps)
    kernel = F.conv2d(images, taps, padding=rim, groups=groups)  # (o, g*i, ., .)
    weight = kernel.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    bias = (b.weight.sum((2, 3)).unflatten(0, (groups, -1)) @ a.bias.view(groups, mid, 1)).flatten()
    return weight, bias, groups, lattice


def _space_out(weight: Tensor, ratio: Pair) -> Tensor:
    """Taps moved apart, zeros between them."""
    if ratio == (1, 1):
        return weight
    h, w = ((k - 1) * r + 1 for k, r in zip(weight.shape[2:], ratio, strict=True))
    spread = weight.new_zeros(*weight.shape[:2], h, w)
    spread[..., :: ratio[0], :: ratio[1]] = weight
    return spread


def _common_lattice(a: int, b: int, reach_a: int, reach_b: int) -> int:
    """The coarsest spacing on which the taps of both stencils lie."""
    return math.gcd(a, b, reach_a - reach_b) or 1


def _pairwise(rule: object, *pairs: Sequence[int]) -> Pair:
    """`rule` applied to the heights, then to the widths."""
    assert callable(rule)
    first, second = (rule(*values) for values in zip(*pairs, strict=True))
    return first, second


def _describe(s: Stencil) -> str:
    size = "x".join(map(str, s.taps))
    return f"{s.channels[1]} channels by a {size} kernel of stride {s.stride} and padding {s.reach}"
