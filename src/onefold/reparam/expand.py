"""Expanding: the way back from one convolution to branches with norms, which fold to it again.

A fused network cannot be un-fused - what each branch was is lost - but it can be given branches anew:

    fuse(expand(fused, like)) == fused

Each entry of a kernel is shared equally by the branches that can hold it: the middle tap of a 3x3 by all, its rim by
the 3x3 convolutions, its diagonal by the skip too. Convolutions of one shape would stay equal for ever, so each is
moved off its share at random, and together they are moved by nothing. With N branches a norm's gain is 1 / sqrt(N)
and a convolution's kernel sqrt(N) times its share: then a step of descent moves the folded kernel as far as it would
move the fused one, and the branches' squares sum up to its own, so that weight decay weighs the same.

Norms begin with mean 0 and variance 1. `recalibrate_norms_` gives them the statistics that images really have there,
without a change of the function: so the network in train mode starts from the same function.

Shapes: O, I channels, G groups, H W taps of the one kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.fuse import outermost
from onefold.reparam.linear import Chain, Sum, padding

_SPREAD = 0.5  # how far a convolution is moved off its share, in sizes of the share


@torch.no_grad()
def expand(fused: nn.Module, like: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """A copy of the training network `like` whose parameters fold to those of `fused`; in the mode of `like`.

    Made in float64 and rounded once to the dtype of `like`. What is outside of the trees is copied. Raises ValueError
    where `fused` is not the fused form of `like`, or a tree is not branches of a convolution (or none) and a norm.
    """
    model = copy.deepcopy(like)
    trees = dict(outermost(model))
    layers = {name: _layer(fused, name) for name in trees}
    inside = tuple(f"{name}." for name in trees)
    rest = {name: value for name, value in fused.state_dict().items() if not name.startswith(inside)}
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    if {n: v.shape for n, v in rest.items()} != {n: v.shape for n, v in kept.items()}:
        raise ValueError("these are not a network and its fused form: outside of what folds they differ")
    model.load_state_dict(rest, strict=False)
    for name, tree in trees.items():
        _share_(name, tree, layers[name], generator)
    return model


@torch.no_grad()
def recalibrate_norms_(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give each norm of `model`, in eval mode, the statistics that `batches` of images have there, in place.

    Gains and biases follow, so that the function stays: only what a running statistic is written with changes.
    The variance is that of all images together, biased, as a norm in train mode divides by. Raises ValueError for a
    model in train mode, and where a norm does not run by itself (see `set_route_`).
    """
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, _BatchNorm) and _can_restate(norm)}
    if any(norm.training for norm in norms.values()):
        raise ValueError("norms are restated in eval mode, where the function is fixed: call model.eval() first")
    seen = {name: _Seen() for name in norms}
    hooks = [norm.register_forward_pre_hook(seen[name]) for name, norm in norms.items()]
    try:
        for images in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    idle = next((name for name, statistics in seen.items() if not statistics.count), None)
    if idle is not None:
        raise ValueError(f"norm {idle!r} has seen nothing: give it images, and evaluate it by the route `per_branch`")
    for name, norm in norms.items():
        _restate_(norm, seen[name].mean, seen[name].var)


# -------------------------------------------------------------------------------------------- sharing


@dataclass(frozen=True)
class _Branch:
    """A convolution or Linear, or none (a skip), the norm after it, and where its taps lie on the tree's."""

    conv: nn.Conv2d | nn.Linear | None
    norm: _BatchNorm
    window: tuple[slice, slice]


def _share_(name: str, tree: nn.Module, layer: nn.Conv2d | nn.Linear, generator: torch.Generator | None) -> None:
    """Put the kernel and the bias of the one layer into the tree's branches."""
    branches = [_branch(name, part, layer) for part in (tree if isinstance(tree, Sum) else [tree])]
    convs = [branch for branch in branches if branch.conv is not None]
    if len(branches) - len(convs) > 1 or not convs:
        raise ValueError(f"{name!r} cannot be expanded: it needs convolutions, and at most one skip")
    kernel, diagonal = _kernel(layer), _diagonal(layer)
    holders = torch.zeros_like(kernel)
    for branch in convs:
        holders[:, :, branch.window[0], branch.window[1]] += 1
    if len(convs) < len(branches):
        holders[diagonal] += 1
    share, gain = kernel / holders.clamp(min=1), len(branches) ** -0.5
    if bool((kernel[holders == 0] != 0).any()):
        raise ValueError(f"{name!r} cannot be expanded: its kernel has taps that no branch has")
    moves = _moves([share[:, :, b.window[0], b.window[1]] for b in convs], generator)
    for branch, move in zip(convs, moves, strict=True):
        assert branch.conv is not None
        weight = (share[:, :, branch.window[0], branch.window[1]] + move) / gain
        branch.conv.weight.copy_(weight.view_as(branch.conv.weight))
        if branch.conv.bias is not None:
            branch.conv.bias.zero_()
    bias = torch.zeros(len(kernel)).to(kernel) if layer.bias is None else layer.bias.to(kernel)
    for branch in branches:
        gains = share[diagonal] if branch.conv is None else torch.full_like(bias, gain)
        _begin_(branch.norm, gains, bias / len(branches))


def _moves(shares: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Random displacements for kernels, as large as a part of their shares; those of one shape sum to zero."""
    moves = [torch.zeros_like(share) for share in shares]
    for shape in {share.shape for share in shares}:
        same = [i for i, share in enumerate(shares) if share.shape == shape]
        if len(same) > 1:
            size = shares[same[0]].square().mean((1, 2, 3), keepdim=True).sqrt() * _SPREAD
            noise = torch.randn(len(same), *shape, generator=generator, dtype=torch.float64).to(size)
            for i, move in zip(same, (noise - noise.mean(0)) * size, strict=True):
                moves[i] = move
    return moves


def _begin_(norm: _BatchNorm, gain: Tensor, bias: Tensor) -> None:
    """Make a norm, in eval mode, gain * x + bias, with mean 0 and variance 1."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)
    norm.weight.copy_(gain * (1.0 + norm.eps) ** 0.5)
    norm.bias.copy_(bias)


def _branch(name: str, part: nn.Module, layer: nn.Conv2d | nn.Linear) -> _Branch:
    ops = list(part) if isinstance(part, Chain) else [part]
    conv: nn.Module | None = ops[0] if len(ops) == 2 else None
    norm = ops[-1]
    if len(ops) > 2 or not isinstance(norm, _BatchNorm) or not _can_restate(norm):
        raise ValueError(f"{name!r} cannot be expanded: a branch ends in a norm with gains and running statistics")
    if conv is not None and not isinstance(conv, (nn.Conv2d, nn.Linear)):
        raise ValueError(f"{name!r} cannot be expanded: a branch is a convolution, or none, and a norm, not {conv}")
    if not isinstance(conv, nn.Conv2d):
        return _Branch(conv, norm, (slice(None), slice(None)))
    if not isinstance(layer, nn.Conv2d) or (conv.groups, conv.stride) != (layer.groups, layer.stride):
        raise ValueError(f"{name!r} is {layer}, which is not the fused form of a branch like {conv}")
    tall, wide = (
        slice(whole - own, whole - own + size)
        for whole, own, size in zip(padding(layer), padding(conv), conv.kernel_size, strict=True)
    )
    return _Branch(conv, norm, (tall, wide))


def _layer(fused: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    try:
        layer = fused.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        found = "nothing" if layer is None else type(layer).__name__
        raise ValueError(f"expected one convolution at {name!r}, as a fused network has, and there is {found}")
    return layer


def _kernel(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """(O, I/G, H, W) float64."""
    weight = layer.weight.double()
    return weight if weight.dim() == 4 else weight[..., None, None]


def _diagonal(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor, int, int]:
    """Where an identity's ones stand in the kernel."""
    kernel = _kernel(layer)
    above, beside = padding(layer) if isinstance(layer, nn.Conv2d) else (0, 0)
    i = torch.arange(len(kernel), device=kernel.device)
    return i, i % kernel.shape[1], above, beside


# ------------------------------------------------------------------------------------------ restating


class _Seen:
    """The mean and variance a channel of all that went into a norm, float64 (C,)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.var = torch.zeros(())

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take a batch in: (B, C, ...)."""
        x = inputs[0].detach().transpose(0, 1).flatten(1).double()
        var, mean = torch.var_mean(x, 1, correction=0)
        part = x.shape[1] / (self.count + x.shape[1])
        gap = mean - self.mean
        self.var = self.var + (var - self.var) * part + gap.square() * (part * (1 - part))
        self.mean = self.mean + gap * part
        self.count += x.shape[1]


def _can_restate(norm: _BatchNorm) -> bool:
    return norm.affine and norm.running_mean is not None and norm.running_var is not None


def _restate_(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    gain, shift = _affine(norm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.weight.copy_(gain * (norm.running_var.double() + norm.eps).sqrt())
    rounded, _ = _affine(norm)
    norm.bias.copy_(shift + rounded * norm.running_mean.double())


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Gain and shift of a norm in eval mode, float64 (C,)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - gain * norm.running_mean.double()
