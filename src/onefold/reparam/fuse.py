"""Fusing a network: one layer in place of every linear tree, in a copy, and a check that nothing else changed.

Networks of other projects are fused too. Many projects give each block a method that folds it, called
`reparameterize`, `switch_to_deploy` or `fuse`: `_fuse_blocks_` calls it wherever it stands, the root included. Then
`_fold_norms_` traces the forward pass, finds every convolution whose output only a norm reads, and folds that norm by
the algebra's own rules. Both work in place, on the copy that `fuse` made.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from onefold.reparam.linear import Chain, Sum, fold, one_layer
from onefold.reparam.stencil import Stencil

VERBS = ("reparameterize", "switch_to_deploy", "fuse")
_log = logging.getLogger("onefold")

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
    `UnfoldedWarning` (see `unfused_norms`).

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
        fused = _fuse_blocks_(fused)
        _fold_norms_(fused)
    if left := unfused_norms(fused):
        warnings.warn(f"could not fold {len(left)}: {', '.join(left)}", UnfoldedWarning, stacklevel=2)
    return fused


def unfused_norms(model: nn.Module) -> list[str]:
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


# ------------------------------------------------------------------- networks of other projects


def _fuse_blocks_(module: nn.Module, name: str = "") -> nn.Module:
    """Call the fusing method of every block that has one, outermost first; what stands there afterwards."""
    verb = next((v for v in VERBS if _offers(module, v)), None)
    if verb is not None:
        like = next(module.parameters(), torch.empty(0))
        trainable = any(p.requires_grad for p in module.parameters())
        kept = (*module.parameters(), *module.modules())  # alive, so that nothing new takes the place of one of them
        before = {id(part) for part in kept}
        mode = module.training
        try:
            result = getattr(module, verb)()
        except Exception as error:  # another project's code: whatever it raises, the block stays as it was
            _log.warning("%s() of %s failed and the block is left unfused: %s", verb, name or "the model", error)
        else:
            module = result if isinstance(result, nn.Module) else module
            module.to(device=like.device, dtype=like.dtype)  # some such methods make float32 kernels whatever came
            for parameter in module.parameters():
                if id(parameter) not in before:  # and many leave the new kernel detached, hence frozen
                    parameter.requires_grad_(trainable)
            for part in module.modules():
                if id(part) not in before:  # a fresh module is in train mode, whatever stood there before
                    part.training = mode
    for key, child in list(module.named_children()):
        fused = _fuse_blocks_(child, f"{name}.{key}" if name else key)
        if fused is not child:
            setattr(module, key, fused)
    return module


def _fold_norms_(model: nn.Module) -> None:
    """Fold each norm into the convolution or Linear before it, wherever nothing else reads that layer's output."""
    for layer_name, norm_name in _pairs(model, ""):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        rest = _rest_of(norm)
        if rest is None or not isinstance(layer, (_ConvNd, nn.Linear)) or isinstance(layer, _ConvTransposeNd):
            continue
        assert isinstance(norm, _BatchNorm)
        _absorb_(layer, norm)
        parent, _, key = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), key, rest)


class _Tracer(fx.Tracer):
    """Traces through blocks, down to torch's own layers and whatever is derived from a convolution or a norm."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)) or super().is_leaf_module(m, qualified_name)


def _pairs(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """(layer, norm) names that stand directly in series; blocks that cannot be traced are entered one by one."""
    if not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # data-dependent control flow and the like: try its parts
        for key, child in module.named_children():
            yield from _pairs(child, f"{prefix}{key}.")
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = str(before.target), str(node.target)
        if isinstance(module.get_submodule(norm), _BatchNorm) and calls[layer] == calls[norm] == 1:
            yield f"{prefix}{layer}", f"{prefix}{norm}"


def _rest_of(norm: nn.Module) -> nn.Module | None:
    """What a norm does besides normalising, None where that cannot be told.

    Some projects' norms carry an activation as a child; that this is all they add is checked on random numbers.
    """
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None:
        return None
    rest = nn.Sequential(*norm.children()) if list(norm.children()) else nn.Identity()
    rest.eval()
    if type(norm).forward is _BatchNorm.forward:
        return nn.Identity().eval()
    stencil = _as_stencil(norm)
    z = torch.randn(4, norm.num_features, 3, 3, dtype=norm.running_mean.dtype, device=norm.running_mean.device)
    plain = z * stencil.weight.view(-1, 1, 1).to(z) + stencil.bias.view(-1, 1, 1).to(z)
    with torch.no_grad():
        same = torch.allclose(norm(z), rest(plain), rtol=1e-3, atol=1e-4)
    return rest if same else None


def _as_stencil(norm: _BatchNorm) -> Stencil:
    """The gain and bias of a norm in eval mode, in float64."""
    one = Stencil.diagonal(torch.ones(norm.num_features, dtype=torch.float64))
    with torch.no_grad():
        return fold.dispatch(_BatchNorm)(norm, one)


@torch.no_grad()
def _absorb_(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> None:
    """Scale the layer's rows by the norm's gain, and move its bias."""
    stencil = _as_stencil(norm)
    gain, shift = stencil.weight.flatten(), stencil.bias
    weight: Tensor = layer.weight
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.double().cpu()
    scaled = weight.double().cpu() * gain.view(-1, *[1] * (weight.dim() - 1))
    kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    trains = weight.requires_grad
    layer.weight = nn.Parameter(scaled.to(**kind), requires_grad=trains)
    layer.bias = nn.Parameter((bias * gain + shift).to(**kind), requires_grad=trains)


def _offers(module: nn.Module, verb: str) -> bool:
    """Whether the module has this method and it can be called with nothing."""
    method = getattr(type(module), verb, None)
    if not callable(method):
        return False
    needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty and p.kind in (0, 1)]
    return len(needed) == 1  # self
