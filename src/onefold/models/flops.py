"""What a network costs: its parameters, and its multiply-adds for one image. They are counted, not measured.

Multiply-adds are those of convolutions, Linear layers and matrix products; biases, norms, activations and pooling add
none. The papers count like this, two of them with differences that are fields of their own here:

- MobileOne's Table 9 leaves out the two convolutions of a squeeze-excite unit: take `macs - gate_macs`.
- Mobile-Former's FLOPs count one more for each element that a BatchNorm or a DY-ReLU writes: add `elementwise`.

A multi-branch network costs more than the same network folded, and the caller says which of the two was counted. The
paper's numbers are those of MobileOne folded, and of Mobile-Former with its norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from onefold.models.layers import DynamicReLU, SqueezeExcite


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Exact counts for one image: `gate_macs` is the part of `macs` in squeeze-excite units, `elementwise` is extra."""

    params: int
    macs: int
    gate_macs: int
    elementwise: int


def count_flops(model: nn.Module, size: int | tuple[int, int]) -> ModelCost:
    """Count `model` in eval mode on one image of `size` pixels: a side, or height and width.

    Nothing is computed and the model is not changed: a copy runs on the meta device. The image has as many channels as
    the first convolution takes. Raises ValueError for a model without one.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no convolution, so it cannot take an image to be counted on")
    shapes = {
        id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (*model.parameters(), *model.buffers())
    }
    meta = copy.deepcopy(model, shapes).to("meta").eval()
    written: list[int] = []
    for module in meta.modules():
        if isinstance(module, (_BatchNorm, DynamicReLU)):
            module.register_forward_hook(lambda _module, _inputs, output: written.append(output.numel()))
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.empty(1, first.in_channels, height, width, device="meta", dtype=first.weight.dtype)
    with torch.no_grad(), _CountedFlops(meta) as counted:
        meta(image)
    return ModelCost(
        params=sum(p.numel() for p in model.parameters()),
        macs=counted.flops // 2,  # 2 a multiply-add
        gate_macs=counted.in_gates // 2,
        elementwise=sum(written),
    )


# ------------------------------------------------------------------------- shapes on the meta device
#
# torch works them out by rules in Python, the first of which imports sympy and the compiler, for over a second. Those
# that usual networks need stand here; for what is not here torch's own are called.


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")  # its new_empty and empty_like are such rules


def _elementwise(*args: object, **_: object) -> Tensor:
    tensors = [each for each in args if isinstance(each, Tensor)]
    shape = torch.broadcast_tensors(*tensors)[0].shape
    return _empty(shape, torch.result_type(tensors[0], tensors[-1]))


def _mean(x: Tensor, dims: Sequence[int], keepdim: bool = False, **_: object) -> Tensor:
    reduced = {dim % x.dim() for dim in dims}
    sizes = [1 if dim in reduced else size for dim, size in enumerate(x.shape) if keepdim or dim not in reduced]
    return _empty(sizes, x.dtype)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return _empty(shape, parts[0].dtype)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
    *rest: Any,
) -> Tensor:
    if rest[0]:  # transposed
        out: Tensor = _aten.convolution(x, weight, bias, strides, paddings, dilations, *rest)
        return out
    sizes = zip(x.shape[2:], weight.shape[2:], strides, paddings, dilations, strict=True)
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return _empty([len(x), len(weight), *sides], x.dtype)


_aten: Any = torch.ops.aten
_SHAPES: Mapping[Any, Callable[..., Any]] = {
    **{
        getattr(_aten, name).default: _elementwise
        for name in ("relu", "sigmoid", "hardsigmoid", "hardswish", "hardtanh", "gelu", "silu", "leaky_relu", "maximum")
    },
    **dict.fromkeys([_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor], _elementwise),
    **dict.fromkeys([_aten.relu_.default, _aten.hardtanh_.default, _aten.silu_.default], lambda x, *_: x),
    _aten._native_batch_norm_legit_no_training.default: lambda x, *_: (x, x, x),
    _aten.native_layer_norm.default: lambda x, *_: (x, x, x),
    _aten._softmax.default: lambda x, *_: x,
    _aten.mean.dim: _mean,
    _aten.mm.default: lambda a, b: _empty([len(a), b.shape[1]], a.dtype),
    _aten.addmm.default: lambda bias, a, b, **_: _empty([len(a), b.shape[1]], a.dtype),
    _aten.bmm.default: lambda a, b: _empty([*a.shape[:2], b.shape[2]], a.dtype),
    _aten.cat.default: _cat,
    _aten.convolution.default: _convolution,
}


class _CountedFlops(TorchDispatchMode):
    """Counts by the formulas of torch's FlopCounterMode, which imports the compiler as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.in_gates, self._gates = 0, 0, 0
        for module in model.modules():
            if isinstance(module, SqueezeExcite):
                module.register_forward_pre_hook(lambda *_: self._enter(1))
                module.register_forward_hook(lambda *_: self._enter(-1))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # by torch's own, each call would go through the compiler, which is imported
        return False

    def _enter(self, by: int) -> None:
        self._gates += by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        out = _SHAPES.get(func, func)(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self.flops += flops
            self.in_gates += flops if self._gates else 0
        return out
