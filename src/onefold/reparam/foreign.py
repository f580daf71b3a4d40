"""Networks that were not written in the algebra: fused by their own verbs, and by following their data.

Many projects glue a folding method into each block and call it `reparameterize`, `switch_to_deploy` or `fuse`.
`fuse_blocks_` calls them wherever they stand, the root included. `fold_norms_` then finds every convolution whose
output only a norm reads, by tracing the forward pass, and folds that norm by the algebra's own rules.
Both work in place, on the copy that `fuse` made.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from onefold.reparam.linear import fold
from onefold.reparam.stencil import Stencil

VERBS = ("reparameterize", "switch_to_deploy", "fuse")
_log = logging.getLogger("onefold")


def fuse_blocks_(module: nn.Module, name: str = "") -> nn.Module:
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
        fused = fuse_blocks_(child, f"{name}.{key}" if name else key)
        if fused is not child:
            setattr(module, key, fused)
    return module


def fold_norms_(model: nn.Module) -> None:
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
