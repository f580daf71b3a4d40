"""A training unit: parallel branches, each a convolution and its norm, or a norm alone (a skip connection).

`as_unit` gives the unit that a Chain or a Sum is; `accelerate` makes units of other projects' blocks. The branches'
kernels are written on one patch, the union of what they read: then a unit is a matrix of rows on that patch.

Shapes: G groups, O/G outputs a group, K = I/G * H * W values a patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.folding_rules import Chain, Sum, is_linear, padding
from onefold.reparam.kernels.base import ClampMax, Geometry, Pair


class Branch(NamedTuple):
    """A convolution, or none, and the norm after it."""

    conv: nn.Conv2d | None
    norm: _BatchNorm


@dataclass(frozen=True)
class Unit:
    """Branches whose norms all use the batch's statistics, and the patch that they read together.

    Channels are those of input and output.
    """

    branches: tuple[Branch, ...]
    channels: Pair
    geometry: Geometry

    @cached_property
    def skip(self) -> Branch | None:
        """The branch without a convolution."""
        return next((branch for branch in self.branches if branch.conv is None), None)

    @cached_property
    def convs(self) -> list[nn.Conv2d]:
        """The convolutions of the other branches, in order."""
        return [branch.conv for branch in self.branches if branch.conv is not None]

    @cached_property
    def ordered_branches(self) -> list[Branch]:
        """The branches with a convolution, then the skip: the order of rows in the algebra."""
        return sorted(self.branches, key=lambda branch: branch.conv is None)

    def kernel_slices(self, conv: nn.Conv2d) -> tuple[slice, slice]:
        """Rows and columns of the unit's kernel that a branch's smaller kernel covers."""
        rows, columns = (
            slice(whole - own, whole - own + size)
            for whole, own, size in zip(self.geometry.padding, padding(conv), conv.kernel_size, strict=True)
        )
        return rows, columns

    def kernel_rows(self, weight: Tensor, conv: nn.Conv2d) -> Tensor:
        """A branch's kernel (O, I/G, h, w) on the unit's patch: (G, O/G, K)."""
        if conv.kernel_size != self.geometry.kernel_size:
            padded = weight.new_zeros(*weight.shape[:2], *self.geometry.kernel_size)
            rows, columns = self.kernel_slices(conv)
            padded[:, :, rows, columns] = weight
            weight = padded
        return weight.flatten(1).unflatten(0, (self.geometry.groups, -1))

    def from_kernel_rows(self, rows: Tensor, conv: nn.Conv2d) -> Tensor:
        """The transpose of `rows`: (G, O/G, K) to (O, I/G, h, w)."""
        down, across = self.kernel_slices(conv)
        return rows.flatten(0, 1).unflatten(1, (-1, *self.geometry.kernel_size))[:, :, down, across]

    def skip_indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the identity's ones among rows: group, output in the group and patch value, each (I,)."""
        i = torch.arange(self.channels[0], device=device)
        per_group = self.channels[0] // self.geometry.groups
        (height, width), (top, left) = self.geometry.kernel_size, self.geometry.padding
        return i // per_group, i % per_group, i % per_group * (height * width) + top * width + left


def as_unit(tree: nn.Module) -> Unit | None:
    """The unit that a Chain or Sum is; None if it has another form, or a norm that does not use batch statistics."""
    branches: list[Branch] = []
    for part in tree if isinstance(tree, Sum) else [tree]:
        layers = list(part) if isinstance(part, Chain) else [part]
        *convs, norm = layers
        if has_hooks([part, *layers]) or not isinstance(norm, _BatchNorm) or len(convs) > 1:
            return None
        conv = convs[0] if convs else None
        if conv is not None and not isinstance(conv, nn.Conv2d):
            return None
        branches.append(Branch(conv, norm))
    return make_unit(branches)


def make_unit(branches: Sequence[Branch]) -> Unit | None:
    """The unit of these branches; None where they differ in more than kernel size, or cannot be one convolution."""
    convs = [branch.conv for branch in branches if branch.conv is not None]
    if not use_batch_statistics(branches) or len(branches) - len(convs) > 1:
        return None
    geometry = common_geometry(convs, has_skip=len(convs) < len(branches))
    channels = (convs[0].in_channels, convs[0].out_channels) if convs else (0, 0)
    return None if geometry is None else Unit(tuple(branches), channels, geometry)


def use_batch_statistics(branches: Iterable[Branch]) -> bool:
    """Whether all norms use the batch's statistics."""
    return all(norm.training or norm.running_mean is None for _, norm in branches)


def common_geometry(convs: Sequence[nn.Conv2d], *, has_skip: bool) -> Geometry | None:
    """The patch of the one convolution that convolutions of one input, and a skip, add up to; None where there is none.

    They may differ in kernel size and padding alone, and maps have to have one size.
    """
    if not convs:
        return None
    first = convs[0]
    if not all(conv.padding_mode == "zeros" and conv.dilation == (1, 1) and is_linear(conv) for conv in convs):
        return None
    if len({(c.in_channels, c.out_channels, c.groups, c.stride, c.weight.dtype, c.weight.device) for c in convs}) > 1:
        return None
    geometry = _union(convs)
    # Maps have one size if kernels reach equally far past their padding.
    ahead = {tuple(k - 1 - 2 * p for k, p in zip(c.kernel_size, padding(c), strict=True)) for c in convs}
    if has_skip:  # it reads one pixel and keeps channels and size
        ahead.add((0, 0))
        if first.in_channels != first.out_channels or geometry.stride != (1, 1):
            return None
    return geometry if len(ahead) == 1 else None


def activation_clamp(act: nn.Module | None) -> tuple[bool, ClampMax]:
    """Whether a back end can compute this activation, and the clamp that it is."""
    if act is None or type(act) is nn.Identity:
        return True, None
    if has_hooks([act]):
        return False, None
    if type(act) is nn.ReLU:
        return True, float("inf")
    if isinstance(act, nn.Hardtanh) and type(act) in (nn.Hardtanh, nn.ReLU6) and act.min_val == 0:
        return True, float(act.max_val)
    return False, None


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether a module has hooks: then every layer must run by itself, so that they are called."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def check_batch_size(count: int, x: Tensor) -> None:
    """Raise ValueError where a norm in train mode would see one value a channel, as BatchNorm does."""
    if count < 2:
        shape = tuple(x.shape)
        raise ValueError(f"a norm in train mode needs more than one value a channel, got an input of {shape}")


def _union(convs: Sequence[nn.Conv2d]) -> Geometry:
    """The geometry of the smallest patch that holds all kernels."""
    top, left = (max(padding(c)[axis] for c in convs) for axis in (0, 1))
    bottom, right = (max(c.kernel_size[axis] - padding(c)[axis] for c in convs) for axis in (0, 1))
    stride = convs[0].stride
    return Geometry(convs[0].groups, (top + bottom, left + right), (int(stride[0]), int(stride[-1])), (top, left))
