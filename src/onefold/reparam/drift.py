"""`drift`, how far the answers of two networks differ, and how much of that their own rounding explains.

Fused weights are rounded to the network's dtype, and a network whose last layer cancels large numbers magnifies that as
it magnifies every rounding of its own: by an honest fuse its answer in float32 may change by 1e-4 on one thread and by
more on two. So what decides is the drift computed in float64, and its bound is ROUNDINGS times the distance between the
network's answer in its own dtype and its own answer in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.dataflow import ExampleInput, copy_without_hooks, output_tensors, run_copy

_ROUNDINGS = 16.0
"""How many times its own rounding a network's answer may change by fusing; what is right changes it about once."""

EPS32 = torch.finfo(torch.float32).eps


@torch.no_grad()
def drift(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Measure how far the outputs of two models for `x` differ: norm of the difference over norm of a's output.

    Of models with several outputs it is the largest; infinite where an output is not finite. Raises ValueError where
    a model is in train mode (its output would depend on the batch) or the shapes of the outputs differ.
    """
    for model in (a, b):
        if any(part.training for part in model.modules() if isinstance(part, _BatchNorm)):
            raise ValueError("drift compares models in eval mode: call model.eval() first")
    return _distance(a(x), b(x))


def _distance(a: object, b: object) -> float:
    """The largest relative difference of two outputs' tensors; see `drift`."""
    first, second = list(output_tensors(a)), list(output_tensors(b))
    if [y.shape for y in first] != [z.shape for z in second]:
        raise ValueError("drift compares outputs of the same shapes, and those of these two models differ")
    worst = 0.0
    for y, z in zip(first, second, strict=True):
        if y.is_complex():
            y, z = torch.view_as_real(y), torch.view_as_real(z)
        size, gap = y.double().norm().item(), (y.double() - z.double()).norm().item()
        relative = gap / size if size > 0 else gap
        # max() would drop a NaN: outputs that are not finite would pass as equal.
        worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


def float64_drift(
    a: nn.Module, b: nn.Module, args: ExampleInput, *, rounded: object = None, bare: nn.Module | None = None
) -> tuple[float, float]:
    """The drift of two networks computed in float64, and the largest that their dtype's rounding explains.

    That is ROUNDINGS times the distance from a's answer in its own dtype (`rounded`, or computed here) to its answer
    in float64, and no less than eight units of the dtype. Neither depends on the number of threads beyond rounding.
    `bare` is a copy of a that may be changed.
    """
    device = "cpu" if any(p.device.type == "mps" for p in a.parameters()) else None  # MPS has no float64
    wide = tuple(t.double().to(device) if isinstance(t, Tensor) and t.is_floating_point() else t for t in args)
    least = 8 * rounding_unit(a)
    with torch.no_grad():
        try:
            exact = run_copy((bare or copy_without_hooks(a)).to(device, torch.float64), wide)
        except Exception:  # it makes tensors of another dtype itself: then its own dtype has to do
            rounded = run_copy(copy_without_hooks(a), args) if rounded is None else rounded
            return _distance(rounded, run_copy(copy_without_hooks(b), args)), 8 * least
        found = _distance(exact, run_copy(copy_without_hooks(b, torch.float64).to(device), wide))
        if found <= least:
            return found, least
        return found, max(
            least, _ROUNDINGS * _distance(exact, run_copy(copy_without_hooks(a), args) if rounded is None else rounded)
        )


def rounding_unit(model: nn.Module) -> float:
    """The rounding unit of a network's least exact weights."""
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return max((torch.finfo(kind).eps for kind in kinds), default=EPS32)


def fused_layer_error(expected: Tensor, found: Tensor, unit: float) -> str | None:
    """Why what a fused layer gives, in float64, is not what was expected on each channel; None where it is."""
    if found.shape != expected.shape:
        return f"its fused layer gives {tuple(found.shape)}, not {tuple(expected.shape)}"
    if found.is_meta:
        return None
    flat = [y.transpose(0, 1).flatten(1) for y in (expected, found)]
    gap, size = (flat[0] - flat[1]).norm(dim=1), flat[0].norm(dim=1)
    if not bool((gap <= max(16 * unit, 1e-12) * size + 1e-30).all()):
        worst = float((gap / size.clamp_min(1e-30)).max())
        return f"its fused layer would be wrong by {worst:.1g}: not finite, or too coarse for its dtype"
    return None
