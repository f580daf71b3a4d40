"""A training unit as a list: parallel branches, each a convolution and its norm, or a norm alone (a skip).

`read` finds that form in a Chain or a Sum; other projects' blocks are put into it by `accelerate`. The branches'
kernels are written on one patch, the union of what they read, so that a unit is rows on a patch.

Shapes: G groups, O/G outputs a group, K = I/G * taps values a patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.kernels.backend import Act, Geometry, Pair
from onefold.reparam.linear import Chain, Sum, is_linear, padding


class Branch(NamedTuple):
    """A convolution, or none, and the norm after it."""

    conv: nn.Conv2d | None
    norm: _BatchNorm


@dataclass(frozen=True)
class Unit:
    """Branches whose norms all use the batch's statistics, and the patch that they read together."""

    branches: tuple[Branch, ...]
    channels: Pair
    geometry: Geometry

    @property
    def skip(self) -> Branch | None:
        """The branch without a convolution."""
        return next((branch for branch in self.branches if branch.conv is None), None)

    @property
    def convs(self) -> list[nn.Conv2d]:
        """The others' convolutions, in order."""
        return [branch.conv for branch in self.branches if branch.conv is not None]

    @property
    def ordered(self) -> list[Branch]:
        """The branches with a convolution, then the skip: the order of rows in the algebra."""
        return sorted(self.branches, key=lambda branch: branch.conv is None)

    def window(self, conv: nn.Conv2d) -> tuple[slice, slice]:
        """Where a branch's taps lie on the unit's."""
        tall, wide = (
            slice(r - p, r - p + k)
            for r, p, k in zip(self.geometry.reach, padding(conv), conv.kernel_size, strict=True)
        )
        return tall, wide

    def rows(self, weight: Tensor, conv: nn.Conv2d) -> Tensor:
        """A branch's kernel (O, I/G, h, w) on the unit's patch: (G, O/G, K)."""
        if conv.kernel_size != self.geometry.taps:
            whole = weight.new_zeros(*weight.shape[:2], *self.geometry.taps)
            tall, wide = self.window(conv)
            whole[:, :, tall, wide] = weight
            weight = whole
        return weight.flatten(1).unflatten(0, (self.geometry.groups, -1))

    def unrows(self, rows: Tensor, conv: nn.Conv2d) -> Tensor:
        """The transpose of `rows`."""
        whole = rows.flatten(0, 1).unflatten(1, (-1, *self.geometry.taps))
        tall, wide = self.window(conv)
        return whole[:, :, tall, wide]

    def diagonal(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where the identity's ones stand among rows: group, output in the group and patch value, each (I,)."""
        i = torch.arange(self.channels[0], device=device)
        per_group = self.channels[0] // self.geometry.groups
        (tall, wide), (above, beside) = self.geometry.taps, self.geometry.reach
        return i // per_group, i % per_group, i % per_group * (tall * wide) + above * wide + beside


def read(tree: nn.Module) -> Unit | None:
    """The unit that a Chain or Sum is; None if it has another form, or a norm that does not use batch statistics."""
    found = [_branch(part) for part in (tree if isinstance(tree, Sum) else [tree])]
    branches = [branch for branch in found if branch is not None]
    return unit_of(branches) if len(branches) == len(found) else None


def unit_of(branches: Sequence[Branch]) -> Unit | None:
    """The unit of these branches; None where one pads, dilates, strides or normalises in another way."""
    convs = [branch.conv for branch in branches if branch.conv is not None]
    if not convs or not all(_uses_batch(branch.norm) for branch in branches) or len(branches) - len(convs) > 1:
        return None
    first = convs[0]
    if not all(_is_plain(conv) and _alike(conv, first) for conv in convs):
        return None
    geometry = _union(convs)
    ahead = {tuple(k - 1 - 2 * p for k, p in zip(c.kernel_size, padding(c), strict=True)) for c in convs}
    if len(convs) < len(branches):  # a skip reads one pixel and keeps the map's size
        ahead.add((0, 0))
        if first.in_channels != first.out_channels or geometry.stride != (1, 1):
            return None
    return Unit(tuple(branches), (first.in_channels, first.out_channels), geometry) if len(ahead) == 1 else None


def ceiling(act: nn.Module | None) -> tuple[bool, Act]:
    """Whether a unit can do this activation itself, and the clamp that it is."""
    if act is None or type(act) is nn.Identity:
        return True, None
    if hooked([act]):
        return False, None
    if type(act) is nn.ReLU:
        return True, float("inf")
    if isinstance(act, nn.Hardtanh) and type(act) in (nn.Hardtanh, nn.ReLU6) and act.min_val == 0:
        return True, float(act.max_val)
    return False, None


def _branch(part: nn.Module) -> Branch | None:
    layers = list(part) if isinstance(part, Chain) else [part]
    norm = layers[-1]
    if hooked([part, *layers]) or not isinstance(norm, _BatchNorm) or len(layers) > 2:
        return None
    if len(layers) == 1:
        return Branch(None, norm)
    return Branch(layers[0], norm) if isinstance(layers[0], nn.Conv2d) else None


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether someone listens inside: then every layer must run by itself."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def _uses_batch(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and conv.dilation == (1, 1) and is_linear(conv)


def _alike(conv: nn.Conv2d, first: nn.Conv2d) -> bool:
    def key(c: nn.Conv2d) -> tuple[object, ...]:
        return c.in_channels, c.out_channels, c.groups, c.stride, c.weight.dtype, c.weight.device

    return key(conv) == key(first)


def _union(convs: Sequence[nn.Conv2d]) -> Geometry:
    """The patch that holds all kernels."""
    reach = tuple(max(padding(c)[axis] for c in convs) for axis in (0, 1))
    ahead = tuple(max(c.kernel_size[axis] - padding(c)[axis] for c in convs) for axis in (0, 1))
    taps = (reach[0] + ahead[0], reach[1] + ahead[1])
    stride = convs[0].stride
    return Geometry(convs[0].groups, taps, (int(stride[0]), int(stride[-1])), (reach[0], reach[1]))
