"""Expanding: from one convolution back to branches with norms, which fold to it again.

A fused network cannot be un-fused - the branches' own kernels are lost - but it can be given new branches:

    fuse(expand(fused, like)) == fused

Each entry of a kernel is shared equally by the branches that can hold it: the middle of a 3x3 by all, its rim by the
3x3 convolutions, its diagonal by the skip too. Convolutions of one shape would get equal gradients and stay equal, so
random displacements that sum to zero are added to their shares. With N branches a norm's gain is 1 / sqrt(N) and a
convolution's kernel sqrt(N) times its share: then a step of descent moves the folded kernel as far as it would move
the fused one, and the branches' squares sum up to its own, so that weight decay is as strong.

Norms start with mean 0 and variance 1. `recalibrate_norms_` gives them the statistics of real images without changing
the function, so that training starts from the same function in train mode too.

Shapes: O, I channels, G groups, H W height and width of the kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.folding_rules import Chain, Sum, padding
from onefold.reparam.fuse import outermost_trees

_SPREAD = 0.5  # standard deviation of the displacements, relative to the root mean square of the share


@torch.no_grad()
def expand(fused: nn.Module, like: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Copy the training network `like` with parameters that fold to those of `fused`; in the mode of `like`.

    They are computed in float64 and rounded once to the dtype of `like`. What is outside of the trees is copied. Raises
    ValueError where `fused` is not the fused form of `like`, or a tree has other branches than a convolution (or
    none) and a norm.
    """
    model = copy.deepcopy(like)
    trees = dict(outermost_trees(model))
    layers = {name: _layer(fused, name) for name in trees}
    inside = tuple(f"{name}." for name in trees)
    rest = {name: value for name, value in fused.state_dict().items() if not name.startswith(inside)}
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    if {n: v.shape for n, v in rest.items()} != {n: v.shape for n, v in expected.items()}:
        raise ValueError("these are not a network and its fused form: outside of what folds they differ")
    model.load_state_dict(rest, strict=False)
    for name, tree in trees.items():
        _distribute_(name, tree, layers[name], generator)
    return model


@torch.no_grad()
def recalibrate_norms_(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of each norm of `model`, in place, to those of `batches` of images.

    Gains and biases are adapted to them, so that the function in eval mode stays the same. The variance is that of all
    images together, biased, as a norm in train mode divides by. Raises ValueError for a model in train mode, and where
    a norm does not run by itself (see `set_route_`).
    """
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, _BatchNorm) and _is_complete(norm)}
    if any(norm.training for norm in norms.values()):
        raise ValueError("norms are recalibrated in eval mode: call model.eval() first")
    statistics = {name: _Statistics() for name in norms}
    hooks = [norm.register_forward_pre_hook(statistics[name]) for name, norm in norms.items()]
    try:
        for images in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    unused = next((name for name in norms if not statistics[name].count), None)
    if unused is not None:
        raise ValueError(f"norm {unused!r} has got no images: give it some, and evaluate it by the route `per_branch`")
    for name, norm in norms.items():
        _recalibrate_(norm, statistics[name].mean, statistics[name].var)


# ------------------------------------------------------------------ one kernel to several branches


@dataclass(frozen=True)
class _Branch:
    """A convolution or Linear, or none (a skip), the norm after it, and the part of the tree's kernel it covers."""

    conv: nn.Conv2d | nn.Linear | None
    norm: _BatchNorm
    rows: slice
    columns: slice


def _distribute_(name: str, tree: nn.Module, layer: nn.Conv2d | nn.Linear, generator: torch.Generator | None) -> None:
    """Distribute the kernel and the bias of one layer to the branches of a tree, in place."""
    branches = [_branch(name, part, layer) for part in (tree if isinstance(tree, Sum) else [tree])]
    convs = [branch for branch in branches if branch.conv is not None]
    if len(branches) - len(convs) > 1 or not convs:
        raise ValueError(f"{name!r} cannot be expanded: it needs convolutions, and at most one skip")
    kernel = layer.weight.double()  # (O, I/G, H, W)
    kernel = kernel if kernel.dim() == 4 else kernel[..., None, None]
    top, left = padding(layer) if isinstance(layer, nn.Conv2d) else (0, 0)
    i = torch.arange(len(kernel), device=kernel.device)
    diagonal = i, i % kernel.shape[1], top, left  # where the ones of an identity lie
    holders = torch.zeros_like(kernel)
    for branch in convs:
        holders[:, :, branch.rows, branch.columns] += 1
    if len(convs) < len(branches):
        holders[diagonal] += 1
    share, gain = kernel / holders.clamp(min=1), len(branches) ** -0.5
    if bool((kernel[holders == 0] != 0).any()):
        raise ValueError(f"{name!r} cannot be expanded: its kernel is larger than those of its branches")
    shares = [share[:, :, branch.rows, branch.columns] for branch in convs]
    for branch, part, displacement in zip(convs, shares, _displacements(shares, generator), strict=True):
        assert branch.conv is not None
        branch.conv.weight.copy_(((part + displacement) / gain).view_as(branch.conv.weight))
        if branch.conv.bias is not None:
            branch.conv.bias.zero_()
    bias = torch.zeros(len(kernel)).to(kernel) if layer.bias is None else layer.bias.to(kernel)
    for branch in branches:
        norm, gains = branch.norm, share[diagonal] if branch.conv is None else torch.full_like(bias, gain)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)
        norm.weight.copy_(gains * (1.0 + norm.eps) ** 0.5)
        norm.bias.copy_(bias / len(branches))


def _displacements(shares: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Random displacements for kernels, in proportion to their shares; those of one shape sum to zero."""
    displacements = [torch.zeros_like(share) for share in shares]
    for shape in {share.shape for share in shares}:
        same = [i for i, share in enumerate(shares) if share.shape == shape]
        if len(same) > 1:
            size = shares[same[0]].square().mean((1, 2, 3), keepdim=True).sqrt() * _SPREAD
            noise = torch.randn(len(same), *shape, generator=generator, dtype=torch.float64).to(size)
            for i, displacement in zip(same, (noise - noise.mean(0)) * size, strict=True):
                displacements[i] = displacement
    return displacements


def _branch(name: str, part: nn.Module, layer: nn.Conv2d | nn.Linear) -> _Branch:
    ops = list(part) if isinstance(part, Chain) else [part]
    conv: nn.Module | None = ops[0] if len(ops) == 2 else None
    norm = ops[-1]
    if len(ops) > 2 or not isinstance(norm, _BatchNorm) or not _is_complete(norm):
        raise ValueError(f"{name!r} cannot be expanded: a branch ends in a norm with gains and running statistics")
    if conv is not None and not isinstance(conv, (nn.Conv2d, nn.Linear)):
        raise ValueError(f"{name!r} cannot be expanded: a branch is a convolution, or none, and a norm, not {conv}")
    if not isinstance(conv, nn.Conv2d):
        return _Branch(conv, norm, slice(None), slice(None))
    if not isinstance(layer, nn.Conv2d) or (conv.groups, conv.stride) != (layer.groups, layer.stride):
        raise ValueError(f"{name!r} is {layer}, which is not the fused form of a branch like {conv}")
    rows, columns = (
        slice(whole - own, whole - own + size)
        for whole, own, size in zip(padding(layer), padding(conv), conv.kernel_size, strict=True)
    )
    return _Branch(conv, norm, rows, columns)


def _layer(fused: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    try:
        layer = fused.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        actual = "nothing" if layer is None else type(layer).__name__
        raise ValueError(f"expected one convolution at {name!r}, as a fused network has, and there is {actual}")
    return layer


# ------------------------------------------------------------------------------ statistics of norms


class _Statistics:
    """Mean and variance for each channel of all inputs of a norm, float64 (C,)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.var = torch.zeros(())

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Merge the statistics of a batch (B, C, ...) into those so far (Chan et al., 1979)."""
        x = inputs[0].detach().transpose(0, 1).flatten(1).double()
        var, mean = torch.var_mean(x, 1, correction=0)
        part = x.shape[1] / (self.count + x.shape[1])
        gap = mean - self.mean
        self.var = self.var + (var - self.var) * part + gap.square() * (part * (1 - part))
        self.mean = self.mean + gap * part
        self.count += x.shape[1]


def _is_complete(norm: _BatchNorm) -> bool:
    """Whether a norm has gains, biases and running statistics."""
    return norm.affine and norm.running_mean is not None and norm.running_var is not None


def _recalibrate_(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Set a norm's running statistics, and its gains and biases so that its function stays the same."""
    gain, shift = _affine(norm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.weight.copy_(gain * (norm.running_var.double() + norm.eps).sqrt())
    rounded, _ = _affine(norm)  # the bias compensates what rounding the gain to the norm's dtype changes
    norm.bias.copy_(shift + rounded * norm.running_mean.double())


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The gain and shift that a norm in eval mode is, float64 (C,)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - gain * norm.running_mean.double()
