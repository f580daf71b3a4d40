"""Other projects' training blocks on our routes: one line before their training loop, the same numbers, faster.

A block is recognised by its class's name and the names of its parts; its parameters, buffers and state_dict stay as
they are. Whatever a block does besides (a gate, stochastic depth, an odd padding) it goes on doing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.linear import Chain, Sum
from onefold.reparam.routes import evaluate, quickest, set_route_
from onefold.reparam.unit import Branch, Unit, hooked, unit_of


@dataclass(frozen=True)
class Form:
    """A block's class name, the names of its branches (a list's counts as several), its gate and its activation."""

    name: str
    branches: tuple[str, ...]
    gate: str
    act: str


FORMS = (
    Form("MobileOneBlock", ("identity", "conv_scale", "conv_kxk"), "attn", "act"),  # timm byobnet
    Form("MobileOneBlock", ("identity", "conv_scale", "conv_kxk"), "se", "act"),  # timm fastvit
    Form("MobileOneBlock", ("rbr_skip", "rbr_scale", "rbr_conv"), "se", "activation"),  # Apple ml-mobileone
    Form("RepVggBlock", ("identity", "conv_1x1", "conv_kxk"), "attn", "act"),  # timm byobnet
    Form("RepVGGBlock", ("rbr_identity", "rbr_1x1", "rbr_dense"), "se", "nonlinearity"),  # DingXiaoH RepVGG
    Form("ReparamLargeKernelConv", ("large_conv", "small_conv"), "se", "act"),  # timm fastvit
)


def accelerate(model: nn.Module) -> nn.Module:
    """Train the re-parameterizable blocks of `model` by the quickest exact route, in place; gives the model back.

    Known are timm's MobileOne, RepVGG and FastViT blocks, Apple's and DingXiaoH's originals, and ours. Only training
    changes, and only its speed: values, gradients and running statistics stay within rounding, parameters and
    state_dict untouched. `del block.forward` puts a block back. Raises ValueError if no block is known.
    """
    found = False
    for module in model.modules():
        form = next((form for form in FORMS if _has(module, form)), None)
        if form is not None:
            module.forward = partial(_forward, module, form)
            found = True
    if any(isinstance(module, (Chain, Sum)) for module in model.modules()):
        set_route_(model, quickest)
        found = True
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block that accelerate knows: {', '.join({f.name for f in FORMS})}"
        )
    return model


def _forward(block: nn.Module, form: Form, x: Tensor) -> Tensor:
    """What the block's class does, by a route where one pays."""
    unit = _unit(block, form) if block.training and torch.is_grad_enabled() and x.dim() == 4 else None
    if unit is not None:
        gate, act = getattr(block, form.gate), getattr(block, form.act)
        whole = isinstance(gate, nn.Identity)
        y = evaluate(unit, x, act if whole else None)
        if y is not None:
            return y if whole else act(gate(y))
    return type(block).forward(block, x)


def _unit(block: nn.Module, form: Form) -> Unit | None:
    drop = getattr(block, "drop_path", None)
    if hooked(block.modules()) or not isinstance(drop, (nn.Identity, type(None))):
        return None
    branches = [branch for name in form.branches for branch in _branches(getattr(block, name, None))]
    known = [branch for branch in branches if branch is not None]
    return unit_of(known) if known and len(known) == len(branches) else None


def _branches(part: object) -> Iterator[Branch | None]:
    """The branches that an attribute of a block holds; None for one of an unknown form."""
    if isinstance(part, nn.ModuleList):
        for child in part:
            yield from _branches(child)
    elif isinstance(part, _BatchNorm):
        yield Branch(None, part) if _is_bare(part) else None
    elif isinstance(part, nn.Module) and not isinstance(part, nn.Identity):
        conv, norm = getattr(part, "conv", None), getattr(part, "bn", None)
        rest = [child for child in part.children() if child is not conv and child is not norm]
        bare = all(isinstance(child, nn.Identity) for child in rest)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm) and _is_bare(norm) and bare:
            yield Branch(conv, norm)
        else:
            yield None


def _is_bare(norm: _BatchNorm) -> bool:
    """Whether a norm carries nothing along (some projects' hold their activation)."""
    return all(isinstance(child, nn.Identity) for child in norm.children())


def _has(module: nn.Module, form: Form) -> bool:
    parts = (*form.branches[:1], form.gate, form.act)
    return type(module).__name__ == form.name and all(hasattr(module, part) for part in parts)
