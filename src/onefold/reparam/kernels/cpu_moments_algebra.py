"""A unit's algebra by the compiled kernels: what `reparam.moments_algebra` does in torch, in one call each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.branches import Unit
from onefold.reparam.folding_rules import exponential_average_factor_
from onefold.reparam.kernels.base import Backend, Moments
from onefold.reparam.kernels.cpu import CppBackend, call_kernel, data_pointers
from onefold.reparam.moments_algebra import FoldedUnit, FoldGradients


def supports(passes: Backend, unit: Unit) -> bool:
    """Whether all of a unit's parameters and buffers are as the kernels take them."""
    if not isinstance(passes, CppBackend):
        return False
    norms = [branch.norm for branch in unit.ordered_branches]
    tensors = [t for norm in norms for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    tensors += [t for conv in unit.convs for t in (conv.weight, conv.bias)]
    return all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)


def fold(unit: Unit, moments: Moments, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[FoldedUnit, Tensor]:
    """Fold a unit on a batch of these moments: kernel and bias (O,). Moves the norms' running statistics."""
    del dtype  # the compiled code chooses itself
    num, (_, out), k = len(weights), unit.channels, moments.mean.shape[1]
    rows, rows_cov = torch.empty(2, num, out, k)
    inv_std, gain = torch.empty(2, len(unit.branches), out, dtype=torch.float64)
    kernel, bias = (
        torch.empty(unit.geometry.groups, out // unit.geometry.groups, k),
        torch.empty(out, dtype=torch.float64),
    )
    norms = [branch.norm for branch in unit.ordered_branches]
    tracked = [norm.training and norm.running_mean is not None for norm in norms]
    call_kernel(
        "fold_unit", *_shape(unit), data_pointers([w.detach() for w in weights]), moments.mean.contiguous(),
        moments.covariance.contiguous(), moments.num, data_pointers([norm.weight for norm in norms]),
        data_pointers([norm.bias for norm in norms]), _doubles([norm.eps for norm in norms]),
        data_pointers([norm.running_mean if t else None for norm, t in zip(norms, tracked, strict=True)]),
        data_pointers([norm.running_var if t else None for norm, t in zip(norms, tracked, strict=True)]),
        _doubles([exponential_average_factor_(norm) if t else 0.0 for norm, t in zip(norms, tracked, strict=True)]),
        rows, rows_cov, inv_std, gain, kernel, bias,
    )  # fmt: skip
    _add_biases(unit, norms)
    return FoldedUnit(rows, rows_cov, inv_std, gain, kernel, moments.mean), bias


def fold_backward(unit: Unit, folded: FoldedUnit, products: Tensor, total: Tensor) -> FoldGradients:
    """Give the gradients of `fold`, from A (G, O/G, K) and the sums of the gradient s (O,)."""
    d_weights = [torch.empty(conv.weight.shape) for conv in unit.convs]
    d_gamma = [torch.empty(unit.channels[1]) for _ in unit.branches]
    groups, k = folded.mean.shape
    quad, pull = torch.empty(groups, k, k, dtype=torch.float64), torch.empty(groups, k, dtype=torch.float64)
    call_kernel(
        "unfold_unit", *_shape(unit), folded.rows, folded.rows_cov, folded.inv_std, folded.gain, folded.kernel,
        products.contiguous(), total, data_pointers(d_weights), data_pointers(d_gamma), quad, pull,
    )  # fmt: skip
    return FoldGradients(d_weights, d_gamma, quad, pull)


def _shape(unit: Unit) -> tuple[Any, Any]:
    """The unit's sizes, and where the branches' kernels lie on its own, as the compiled kernels take them."""
    geometry, (c_in, c_out) = unit.geometry, unit.channels
    sizes = (
        geometry.groups,
        c_out // geometry.groups,
        c_in // geometry.groups,
        *geometry.kernel_size,
        *geometry.padding,
    )
    slices = [
        value
        for conv in unit.convs
        for down, right in [unit.kernel_slices(conv)]
        for value in (*conv.kernel_size, down.start, right.start)
    ]
    numbers = (*sizes, len(unit.convs), int(unit.skip is not None))
    return (ctypes.c_int64 * 9)(*numbers), (ctypes.c_int64 * len(slices))(*slices)


def _doubles(values: Sequence[float]) -> Any:
    return (ctypes.c_double * len(values))(*values)


def _add_biases(unit: Unit, norms: Sequence[_BatchNorm]) -> None:
    """Add convolutions' biases to the running means; before a norm they change nothing else."""
    for conv, norm in zip(unit.convs, norms, strict=False):
        if conv.bias is not None and norm.training and norm.running_mean is not None:
            factor = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum  # type: ignore[arg-type]
            norm.running_mean.add_(conv.bias.detach(), alpha=factor)
