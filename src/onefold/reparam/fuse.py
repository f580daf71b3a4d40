"""Fusing a network: a copy with one layer in place of every linear tree; and `drift`, how far two networks differ.

Networks of other projects are fused too. Many of them give each block a method that folds it, called
`reparameterize`, `switch_to_deploy` or `fuse`: `_fuse_blocks_` calls it wherever it is found, on the root too. Then
`_fold_norms_` traces the forward pass, finds every convolution whose output only a norm reads, and folds that norm by
the algebra's own rules. Both work in place, on the copy that `fuse` made.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from onefold.reparam.folding_rules import Chain, Sum, fold, fused_layer
from onefold.reparam.stencil import Stencil

_FUSING_METHODS = ("reparameterize", "switch_to_deploy", "fuse")
_log = logging.getLogger("onefold")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


class UnfoldedWarning(UserWarning):
    """Norms could not be folded; the message lists them."""


def fuse(model: nn.Module) -> nn.Module:
    """Copy `model` with one convolution (or Linear) in place of every outermost `Sum` and `Chain`.

    Blocks of other projects that have a method `reparameterize()`, `switch_to_deploy()` or `fuse()` are fused in the
    copy by it, and norms that directly follow a convolution are folded into it. `model` and the random number
    generators are left as they are. Dtype, device, hooks on the fused layers and training flags are kept; a layer used
    twice stays one layer; the fused parameters can be trained where the originals could. Norms that could not be
    folded are listed in an `UnfoldedWarning` (see `unfused_norms`).

    Raises ValueError for a model in train mode, for a parameter that a folded tree shares with something else,
    and for a hook inside a folded tree.
    """
    in_training = next((name for name, norm in _norms(model) if norm.training), None)
    if in_training is not None:
        raise ValueError(f"norm {in_training!r} is in train mode and depends on the batch: call model.eval() first")
    trees = dict(outermost_trees(model))
    _refuse_shared(model, trees)
    _refuse_inner_hooks(trees)
    # deepcopy finds the fused layers in its memo, as if it had copied the trees to them already.
    memo: dict[int, object] = {}
    for tree in trees.values():
        layer = memo[id(tree)] = fused_layer(tree)
        for attribute in (*_HOOKS, *_HOOK_FLAGS):
            setattr(layer, attribute, copy.copy(getattr(tree, attribute)))
    fused = copy.deepcopy(model, memo)
    if next(_norms(fused), None) is not None:
        # Other projects make the fused layers with random initialization before they fill them.
        devices = {p.device.index for p in fused.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(devices)):
            fused = _fuse_blocks_(fused)
        _fold_norms_(fused)
    if norms := unfused_norms(fused):
        warnings.warn(f"could not fold {len(norms)}: {', '.join(norms)}", UnfoldedWarning, stacklevel=2)
    return fused


def unfused_norms(model: nn.Module) -> list[str]:
    """List the names of the BatchNorms that a network still has: none if it is entirely fused."""
    return [name for name, _ in _norms(model)]


@torch.no_grad()
def drift(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Measure how far the outputs of two models for `x` differ: norm of the difference over norm of a's output.

    Of models with several outputs it is the largest; infinite where an output is not finite. Raises ValueError where
    a model is in train mode (its output would depend on the batch) or the shapes of the outputs differ.
    """
    for model in (a, b):
        if any(norm.training for _, norm in _norms(model)):
            raise ValueError("drift compares models in eval mode: call model.eval() first")
    first, second = list(_tensors(a(x))), list(_tensors(b(x)))
    if [y.shape for y in first] != [z.shape for z in second]:
        raise ValueError("drift compares outputs of the same shapes, and those of these two models differ")
    worst = 0.0
    for y, z in zip(first, second, strict=True):
        size, gap = y.double().norm().item(), (y.double() - z.double()).norm().item()
        distance = gap / size if size > 0 else gap
        # max() would drop a NaN: outputs that are not finite would pass as equal.
        worst = max(worst, math.inf if math.isnan(distance) else distance)
    return worst


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors in a model's output, which may be nested in mappings and sequences."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from _tensors(value)


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))


def outermost_trees(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The names and modules of a network's Chains and Sums that are not inside another one."""
    if isinstance(module, (Chain, Sum)):
        yield name, module
        return
    for key, child in module.named_children():
        yield from outermost_trees(child, f"{name}.{key}" if name else key)


def _refuse_shared(model: nn.Module, trees: Mapping[str, nn.Module]) -> None:
    """Raise ValueError for a parameter that a tree shares with something else: folding would untie them."""
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
    """Call the fusing method of every block that has one, outermost first; give the module that `module` became."""
    method = next((name for name in _FUSING_METHODS if _has_method(module, name)), None)
    if method is not None:
        like = next(module.parameters(), torch.empty(0))
        trainable = any(p.requires_grad for p in module.parameters())
        old = (*module.parameters(), *module.modules())  # kept alive, so that no new object gets the id of an old one
        before = {id(part) for part in old}
        mode = module.training
        try:
            result = getattr(module, method)()
        except Exception as error:  # another project's code may raise anything
            _log.warning("%s() of %s failed and the block is left unfused: %s", method, name or "the model", error)
        else:
            module = result if isinstance(result, nn.Module) else module
            module.to(device=like.device, dtype=like.dtype)  # some of them make float32 of any dtype
            for parameter in module.parameters():
                if id(parameter) not in before:  # and many detach the new kernel, which freezes it
                    parameter.requires_grad_(trainable)
            for part in module.modules():
                if id(part) not in before:  # a new module is in train mode
                    part.training = mode
    for key, child in list(module.named_children()):
        fused = _fuse_blocks_(child, f"{name}.{key}" if name else key)
        if fused is not child:
            setattr(module, key, fused)
    return module


def _fold_norms_(model: nn.Module) -> None:
    """Fold each norm into the convolution or Linear before it, wherever nothing else reads that layer's output."""
    for layer_name, norm_name in _layers_with_norms(model, ""):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        rest = _remainder(norm)
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


def _layers_with_norms(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """The names of each layer and of the norm that alone reads its output.

    A block that cannot be traced, for control flow that depends on data, is searched part by part.
    """
    if not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # data-dependent control flow and the like: try its parts
        for key, child in module.named_children():
            yield from _layers_with_norms(child, f"{prefix}{key}.")
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = str(before.target), str(node.target)
        if isinstance(module.get_submodule(norm), _BatchNorm) and calls[layer] == calls[norm] == 1:
            yield f"{prefix}{layer}", f"{prefix}{norm}"


def _remainder(norm: nn.Module) -> nn.Module | None:
    """What a norm computes after normalizing; None for a norm that cannot be folded.

    Some projects' norms hold an activation as a child; that this is all they add is checked on random numbers.
    """
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None:
        return None
    if type(norm).forward is _BatchNorm.forward:
        return nn.Identity().eval()
    rest = nn.Sequential(*norm.children()) if list(norm.children()) else nn.Identity()
    rest.eval()
    stencil = _as_stencil(norm)
    z = torch.randn(4, norm.num_features, 3, 3, generator=torch.Generator().manual_seed(0)).to(norm.running_mean)
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
    layer.weight = nn.Parameter(scaled.to(weight), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter((bias * gain + shift).to(weight), requires_grad=weight.requires_grad)


def _has_method(module: nn.Module, name: str) -> bool:
    """Whether the module has a method of this name that can be called without arguments."""
    method = getattr(type(module), name, None)
    if not callable(method):
        return False
    needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty and p.kind in (0, 1)]
    return len(needed) == 1  # self
