"""Folding norms into the convolution or Linear before them, in networks of other projects.

A norm is folded where it alone reads the layer's output, on a run and in the trace (see `dataflow`), where nothing else
reads either's weights or hooks into them, and where the folded layer is the two of them, in float64 on drawn input. A
layer with a forward of its own may be folded only where its answer is what torch's function gives of its own weight and
bias: one that pads its input is, one that standardizes its weight or scales its output is not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from onefold.reparam.dataflow import (
    ExampleInput,
    NetworkTrace,
    ObservedRun,
    callable_roots,
    copy_without_hooks,
    has_hooks,
    observe_run,
    trace,
    varied_inputs,
)
from onefold.reparam.drift import fused_layer_error, rounding_unit
from onefold.reparam.folding_rules import fold
from onefold.reparam.stencil import Stencil

_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_CALLS = ("forward", "_conv_forward", "__call__", "_call_impl")
_FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward}


def foldable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that norms may be folded into, and the norms, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear, _BatchNorm))}


def fold_norms_(
    model: nn.Module,
    example: ExampleInput | None,
    skip: Mapping[str, str],
    runs: Mapping[str, ObservedRun | None] | None = None,
) -> tuple[list[str], dict[str, str], bool]:
    """Fold, in place, each norm that may be; the names of those, why each other one was left, by name, and a flag.

    It is whether a part of the network has a forward that could not be traced.

    `runs` are runs of the same network on which its `foldable_layers` were watched; without them it is run here.
    """
    units = foldable_layers(model)
    if runs is None:
        runs = {prefix: observe_run(root, prefix, units, (), example) for prefix, root in callable_roots(model)}
    flows = [_Flow(trace(root, prefix), runs[prefix], prefix) for prefix, root in callable_roots(model)]
    parents: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for key, child in parent._modules.items():
            parents[id(child)].append((parent, key))
    owners = Counter(
        id(p) for m in model.modules() for p in (*m._parameters.values(), *m._buffers.values()) if p is not None
    )
    folded, left = [], {}
    for name, norm in [(n, m) for n, m in units.items() if isinstance(m, _BatchNorm)]:
        if name in skip:
            continue
        flow = max((f for f in flows if name.startswith(f.prefix)), key=lambda f: len(f.prefix))
        layer_name, why = flow.layer_of(name, norm, units)
        if why is None:
            layer = units[layer_name]
            why = _why_not({layer_name: layer, name: norm}, flow, owners) or _fold_(layer, norm, parents[id(norm)])
        if why is None:
            folded.append(name)
        else:
            left[name] = why
    return folded, left, any(flow.traced.blind for flow in flows)


class _Flow:
    """The trace and the run of one root, and what both say."""

    def __init__(self, traced: NetworkTrace, seen: ObservedRun | None, prefix: str) -> None:
        self.traced, self.seen, self.prefix = traced, seen, prefix

    def layer_of(self, name: str, norm: nn.Module, units: Mapping[str, nn.Module]) -> tuple[str, str | None]:
        """The layer whose output this norm alone reads, or why there is none that it may be folded into."""
        traced, seen = self.traced, self.seen
        layer_name = traced.feeds.get(name, "")
        layer = units.get(layer_name)
        if norm.training:
            return layer_name, "in train mode"
        if not isinstance(layer, (_ConvNd, nn.Linear)) or isinstance(layer, _ConvTransposeNd):
            return layer_name, "no convolution or Linear stands directly before it"
        if traced.blind and seen is None:
            part = repr(traced.blind[0]) if traced.blind[0] else "the model"
            why = f"the forward of {part} cannot be traced, nor run on drawn images: give some, fuse(model, images)"
            return layer_name, why
        if traced.calls[name] != 1 or (seen is not None and seen.calls[name] > 1):
            return layer_name, "used twice"
        if traced.calls[layer_name] != 1 or (seen is not None and seen.calls[layer_name] > 1):
            return layer_name, f"{layer_name} is used twice"
        if layer_name in traced.shared_output or (seen is not None and layer_name in seen.shared_output):
            return layer_name, f"the output of {layer_name} is also read elsewhere"
        if seen is not None and seen.calls[name]:
            fed_by, dims = seen.norm_inputs.get(name, ("", 0))
            if fed_by != layer_name:
                return layer_name, f"on a run it does not take the output of {layer_name} as it is"
            if dims != (2 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2):
                return layer_name, f"it norms another axis than the channels of {layer_name}"
        elif isinstance(layer, nn.Linear) and layer_name not in traced.flat:
            return layer_name, f"it is not known which axis of {layer_name}'s output it norms: give images to run on"
        return layer_name, None

    def reads_weights_of(self, name: str, module: nn.Module) -> bool:
        """Whether somebody reads a weight of this layer outside of its own forward."""
        ids = {id(t) for t in (*module.parameters(), *module.buffers())}
        return bool(ids & self.traced.read) or (self.seen is not None and name in self.seen.read_elsewhere)


def _why_not(pair: Mapping[str, nn.Module], flow: _Flow, owners: Mapping[int, int]) -> str | None:
    """Why a layer and its norm, by name, may not be folded, by what others see of the two."""
    for name, module in pair.items():
        if has_hooks(module):
            return f"{name} has a hook"
        if parametrize.is_parametrized(module):
            return f"a weight of {name} is parametrized"
        if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters()):
            return f"{name} has no shape yet: call the model once"
        if any(owners[id(t)] > 1 for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            return f"a weight of {name} is shared with another part of the network"
        if flow.reads_weights_of(name, module):
            return f"a weight of {name} is read by another part of the network"
    name, layer = next(iter(pair.items()))
    if not isinstance(layer._parameters.get("weight"), nn.Parameter) or "bias" not in layer._parameters:
        return f"the weight of {name} is computed at each call"
    return None


def _fold_(layer: nn.Module, norm: nn.Module, places: Sequence[tuple[nn.Module, str]]) -> str | None:
    """Fold the norm into the layer, in place, once it is proved; else why not. `places` are all that hold the norm."""
    assert isinstance(norm, _BatchNorm)
    assert isinstance(layer, (_ConvNd, nn.Linear))
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    rest = _remainder(norm)
    if rest is None:
        return f"{type(norm).__name__} has a forward of its own"
    stencil = _as_stencil(norm)
    gain, shift = stencil.weight.flatten(), stencil.bias
    weight: Tensor = layer.weight
    if len(gain) != len(weight):
        return "it has another number of channels than the layer before it"
    bias = torch.zeros_like(gain) if layer.bias is None else layer.bias.detach().double().to(gain.device)
    scaled = weight.detach().double().to(gain.device) * gain.view(-1, *[1] * (weight.dim() - 1))
    fused = scaled.to(weight), (bias * gain + shift).to(weight)
    if why := _wrong_fold(layer, stencil, *fused):
        return why
    layer.weight, layer.bias = (nn.Parameter(t, requires_grad=weight.requires_grad) for t in fused)
    for parent, key in places:
        parent._modules[key] = rest
    return None


def _wrong_fold(layer: _ConvNd | nn.Linear, norm: Stencil, weight: Tensor, bias: Tensor) -> str | None:
    """Why the fused layer is not the layer and its norm, on drawn input in float64; None where it is."""
    like = layer.weight
    on_cpu = like.device.type == "mps"  # which has no float64
    wide = copy_without_hooks(layer, torch.float64)
    if on_cpu:
        wide = wide.cpu()
    if isinstance(layer, nn.Linear):
        num_inputs, sides = layer.in_features, []
    else:
        num_inputs = layer.in_channels
        sides = [(k - 1) * d + 5 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    drawn = list(varied_inputs(next(wide.parameters()), num_inputs, sides))
    if type(layer).forward in _FORWARDS and _is_called_as_torchs(layer):
        del drawn[1:]  # torch's own forward decides nothing by its input
    elif not all(_has_own_weight(wide, x) for x in drawn) or not _has_own_weight(layer, drawn[0].to(like)):
        return f"{type(layer).__name__} has a forward of its own"
    channels = (-1, *[1] * len(sides))
    gain, shift = (t.to(drawn[0].device).view(channels) for t in (norm.weight.flatten(), norm.bias))
    expected = [wide(x) * gain + shift for x in drawn]
    wide.weight, wide.bias = (nn.Parameter(t.to(drawn[0])) for t in (weight, bias))
    errors = (fused_layer_error(y, wide(x), rounding_unit(layer)) for x, y in zip(drawn, expected, strict=True))
    return next(filter(None, errors), None)


def _is_called_as_torchs(module: nn.Module) -> bool:
    """Whether the methods by which torch calls a layer are torch's, and not of its class or of itself."""
    of_class = [getattr(type(module), name, None) for name in _CALLS]
    return not any(name in vars(module) for name in _CALLS) and all(
        method is None or str(getattr(method, "__module__", "")).startswith("torch.") for method in of_class
    )


class _LastCall(TorchFunctionMode):
    """Keeps what a convolution's function gave of this layer's own weight and bias."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.given = layer, None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FUNCTIONS:
            more = kwargs or {}
            weight = args[1] if len(args) > 1 else more.get("weight")
            bias = args[2] if len(args) > 2 else more.get("bias")
            self.given = result if weight is self.layer.weight and bias is self.layer.bias else None
        return result


def _has_own_weight(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer's answer is what torch's function gives of its own weight and bias."""
    try:
        with _LastCall(layer) as last:
            return layer(x) is last.given
    except Exception:  # a forward of its own may raise anything on drawn input
        return False


def _remainder(norm: _BatchNorm) -> nn.Module | None:
    """What a norm computes after normalizing; None for one that does something else than torch's.

    Some projects' norms hold an activation as a child; that this is all they add is checked on random numbers, small
    and large ones, and in batches of several sizes.
    """
    if type(norm).forward is _BatchNorm.forward and _is_called_as_torchs(norm):
        return nn.Identity().eval()
    rest = nn.Sequential(*norm.children()) if list(norm.children()) else nn.Identity()
    rest.eval()
    device = "cpu" if norm.running_mean is not None and norm.running_mean.device.type == "mps" else None
    wide, after = copy_without_hooks(norm, torch.float64).to(device), copy_without_hooks(rest, torch.float64).to(device)
    stencil = _as_stencil(norm)
    sides = {nn.BatchNorm1d: (), nn.BatchNorm3d: (3, 3, 3)}
    shape = next((side for kind, side in sides.items() if isinstance(norm, kind)), (3, 3))
    narrow, unit = copy_without_hooks(norm), rounding_unit(norm)
    for z in varied_inputs(stencil.bias, int(norm.num_features), shape):
        plain = z * stencil.weight.view(-1, *[1] * len(shape)) + stencil.bias.view(-1, *[1] * len(shape))
        try:
            expected, found, rounded = after(plain), wide(z), narrow(z.to(norm.running_mean))
        except Exception:  # another project's code may raise anything
            return None
        if z.is_meta:
            continue
        size = float(max(plain.abs().max(), z.abs().max(), stencil.bias.abs().max()))
        same = torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * size)
        if not same or not torch.allclose(rounded.to(expected), expected, rtol=64 * unit, atol=64 * unit * size):
            return None
    return rest


def _as_stencil(norm: _BatchNorm) -> Stencil:
    """The gain and bias of a norm in eval mode, in float64."""
    like = norm.running_mean
    device = "cpu" if like is None or like.device.type == "mps" else like.device
    one = Stencil.diagonal(torch.ones(norm.num_features, dtype=torch.float64, device=device))
    with torch.no_grad():
        return fold.dispatch(_BatchNorm)(norm, one)
