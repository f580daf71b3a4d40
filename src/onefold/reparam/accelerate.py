"""`accelerate` trains the blocks of other projects by our routes: the same numbers, faster.

A block is recognized by its class's name and the names of its parts; its parameters, buffers and state_dict stay as
they are. What a block does besides its branches - a gate, an activation - stays with the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.branches import Branch, Unit, has_hooks, make_unit
from onefold.reparam.folding_rules import Chain, Sum
from onefold.reparam.routes import evaluate, quickest, set_route_


@dataclass(frozen=True)
class BlockNames:
    """A block's class name and the attributes that hold its branches (one or a list), its gate and its activation."""

    name: str
    branches: tuple[str, ...]
    gate: str
    act: str


KNOWN_BLOCKS = (
    BlockNames("MobileOneBlock", ("identity", "conv_scale", "conv_kxk"), "attn", "act"),  # timm byobnet
    BlockNames("MobileOneBlock", ("identity", "conv_scale", "conv_kxk"), "se", "act"),  # timm fastvit
    BlockNames("MobileOneBlock", ("rbr_skip", "rbr_scale", "rbr_conv"), "se", "activation"),  # Apple ml-mobileone
    BlockNames("RepVggBlock", ("identity", "conv_1x1", "conv_kxk"), "attn", "act"),  # timm byobnet
    BlockNames("RepVGGBlock", ("rbr_identity", "rbr_1x1", "rbr_dense"), "se", "nonlinearity"),  # DingXiaoH RepVGG
    BlockNames("ReparamLargeKernelConv", ("large_conv", "small_conv"), "se", "act"),  # timm fastvit
)


def accelerate(model: nn.Module) -> nn.Module:
    """Train the re-parameterizable blocks of `model` by the quickest exact route, in place; gives the model back.

    Known are timm's MobileOne, RepVGG and FastViT blocks, Apple's and DingXiaoH's originals, and ours. Only training
    changes, and only its speed: values, gradients and running statistics stay within rounding, parameters and
    state_dict untouched. `del block.forward` puts a block back. Raises ValueError if no block is known.
    """
    known = False
    for module in model.modules():
        names = next((names for names in KNOWN_BLOCKS if _has(module, names)), None)
        if names is not None:
            module.forward = partial(_forward, module, names)
            known = True
    if any(isinstance(module, (Chain, Sum)) for module in model.modules()):
        set_route_(model, quickest)
        known = True
    if not known:
        raise ValueError(
            f"{type(model).__name__} has no block that accelerate knows: {', '.join({f.name for f in KNOWN_BLOCKS})}"
        )
    return model


def _forward(block: nn.Module, names: BlockNames, x: Tensor) -> Tensor:
    """The block's forward pass, with its branches evaluated by a route where one costs less."""
    unit = _unit(block, names) if block.training and torch.is_grad_enabled() and x.dim() == 4 else None
    if unit is not None:
        gate, act = getattr(block, names.gate), getattr(block, names.act)
        ungated = isinstance(gate, nn.Identity)
        y = evaluate(unit, x, act if ungated else None)
        if y is not None:
            return y if ungated else act(gate(y))
    return type(block).forward(block, x)


def _unit(block: nn.Module, names: BlockNames) -> Unit | None:
    """The unit of a block's branches; None where it has hooks, stochastic depth, or branches of another form."""
    drop = getattr(block, "drop_path", None)
    if has_hooks(block.modules()) or not isinstance(drop, (nn.Identity, type(None))):
        return None
    branches = [branch for name in names.branches for branch in _branches(getattr(block, name, None))]
    known = [branch for branch in branches if branch is not None]
    return make_unit(known) if known and len(known) == len(branches) else None


def _branches(part: object) -> Iterator[Branch | None]:
    """The branches that an attribute of a block holds; None in place of one of an unknown form."""
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
    """Whether a norm only normalizes: those of some projects hold an activation too."""
    return all(isinstance(child, nn.Identity) for child in norm.children())


def _has(module: nn.Module, names: BlockNames) -> bool:
    parts = (*names.branches[:1], names.gate, names.act)
    return type(module).__name__ == names.name and all(hasattr(module, part) for part in parts)
