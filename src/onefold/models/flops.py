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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from onefold.models.layers import DynamicReLU, SqueezeExcite


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Exact counts for one image: `gate_macs` is the part of `macs` in squeeze-excite units, `elementwise` is extra."""

    params: int
    macs: int
    gate_macs: int
    elementwise: int


def cost(model: nn.Module, size: int | tuple[int, int]) -> Cost:
    """Count `model` in eval mode on one image of `size` pixels: a side, or height and width.

    Nothing is computed and the model is not changed: a copy runs on the meta device. The image has as many channels as
    the first convolution takes. Raises ValueError for a model without one.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no convolution, so it cannot take an image to be counted on")
    meta = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    written: list[int] = []
    for module in meta.modules():
        if isinstance(module, (_BatchNorm, DynamicReLU)):
            module.register_forward_hook(lambda _module, _inputs, output: written.append(output.numel()))
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.empty(1, first.in_channels, height, width, device="meta", dtype=first.weight.dtype)
    with torch.no_grad(), _CountedFlops(meta) as counted:
        meta(image)
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        macs=counted.flops // 2,  # 2 a multiply-add
        gate_macs=counted.in_gates // 2,
        elementwise=sum(written),
    )


class _CountedFlops(TorchDispatchMode):
    """Counts by the formulas of torch's FlopCounterMode, which imports the compiler, for over a second."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.in_gates, self._gates = 0, 0, 0
        for module in model.modules():
            if isinstance(module, SqueezeExcite):
                module.register_forward_pre_hook(lambda *_: self._enter(1))
                module.register_forward_hook(lambda *_: self._enter(-1))

    def _enter(self, by: int) -> None:
        self._gates += by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self.flops += flops
            self.in_gates += flops if self._gates else 0
        return out
