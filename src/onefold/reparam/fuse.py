"""Fusing a network: one layer in place of every linear tree, and the proof that nothing else changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.foreign import fold_norms_, fuse_blocks_
from onefold.reparam.linear import Chain, Sum, one_layer

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


class UnfoldedWarning(UserWarning):
    """Something that looks foldable could not be folded; the message lists it."""


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every outermost `Sum` and `Chain` is one convolution (or Linear).

    Blocks of other projects that offer `reparameterize()`, `switch_to_deploy()` or `fuse()` are fused in the copy
    by their own method, and norms that directly follow a convolution are folded into it. `model` is untouched.
    Dtype, device, hooks on the fused layers and training flags are kept; a layer used twice stays one layer; the
    fused parameters can be trained where the originals could. What could not be folded is named in an
    `UnfoldedWarning` (see `leftovers`).

    Raises ValueError for a model in train mode, for a parameter that a folded tree shares with something else,
    and for a hook inside a folded tree.
    """
    training = next((name for name, norm in _norms(model) if norm.training), None)
    if training is not None:
        raise ValueError(f"norm {training!r} is in train mode, where it has no fixed answer: call model.eval() first")
    trees = dict(outermost(model))
    _refuse_shared(model, trees)
    _refuse_inner_hooks(trees)
    memo: dict[int, object] = {id(tree): _stand_in(tree) for tree in trees.values()}
    fused = copy.deepcopy(model, memo)
    if next(_norms(fused), None) is not None:
        fused = fuse_blocks_(fused)
        fold_norms_(fused)
    if left := leftovers(fused):
        warnings.warn(f"could not fold {len(left)}: {', '.join(left)}", UnfoldedWarning, stacklevel=2)
    return fused


def leftovers(model: nn.Module) -> list[str]:
    """Names of the norms over a batch that a network still has: empty if it is fused through and through."""
    return [name for name, _ in _norms(model)]


@torch.no_grad()
def drift(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """How far two models' answers to `x` lie apart: the norm of the difference over the norm of a's answer.

    Models that answer with several tensors are compared on all of them, and the worst counts. Raises ValueError
    where a model is in train mode (its answer would depend on the batch) or the answers have other shapes.
    """
    for model in (a, b):
        if any(norm.training for _, norm in _norms(model)):
            raise ValueError("drift compares models in eval mode: call model.eval() first")
    first, second = list(_tensors(a(x))), list(_tensors(b(x)))
    if [y.shape for y in first] != [z.shape for z in second]:
        raise ValueError("drift compares answers of the same shapes, and these two models give others")
    return max((_distance(y.double(), z.double()) for y, z in zip(first, second, strict=True)), default=0.0)


def _distance(y: Tensor, z: Tensor) -> float:
    size = y.norm().item()
    gap = (y - z).norm().item()
    return gap / size if size > 0 else gap


def _tensors(answer: object) -> Iterator[Tensor]:
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, Mapping):
        for value in answer.values():
            yield from _tensors(value)
    elif isinstance(answer, Sequence) and not isinstance(answer, str):
        for value in answer:
            yield from _tensors(value)


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))


def outermost(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The linear trees of a network that are not inside another one."""
    if isinstance(module, (Chain, Sum)):
        yield name, module
        return
    for key, child in module.named_children():
        yield from outermost(child, f"{name}.{key}" if name else key)


def _stand_in(tree: nn.Module) -> nn.Module:
    layer = one_layer(tree)
    for name in (*_HOOKS, *_HOOK_FLAGS):
        setattr(layer, name, copy.copy(getattr(tree, name)))
    return layer


def _refuse_shared(model: nn.Module, trees: Mapping[str, nn.Module]) -> None:
    """A parameter tied between a tree and something else would come apart in folding."""
    owners: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    within = {id(part): name for name, tree in trees.items() for part in tree.modules()}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owner = within.get(id(module), "")  # everything outside the trees is copied together, and stays tied
            owners.setdefault(id(parameter), set()).add(owner)
            names.setdefault(id(parameter), f"{path}.{key}" if path else key)
    for key_id, holders in owners.items():
        if len(holders) > 1:
            where = " and ".join(repr(h) if h else "the rest of the network" for h in sorted(holders))
            raise ValueError(f"parameter {names[key_id]!r} is shared between {where}: folding would untie it")


def _refuse_inner_hooks(trees: Mapping[str, nn.Module]) -> None:
    for name, tree in trees.items():
        for path, part in tree.named_modules():
            if path and any(getattr(part, kind) for kind in _HOOKS):
                raise ValueError(f"layer {path!r} inside {name or 'the model'!r} has a hook, and would be folded away")
