"""The law of routes: in training each gives a Sum the value, gradients and buffers that `per_branch` gives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onefold.reparam import Chain, Scale, Sum, moments, per_branch, set_route_

BOUND = 1e-10  # float64; absolute against values of order one, relative above
bn, conv = nn.BatchNorm2d, nn.Conv2d


def conv_norm(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1, **norm: object) -> Chain:
    return Chain(conv(c_in, c_out, size, stride, size // 2, groups=groups, bias=False), bn(c_out, **norm))


def unit(c_in: int, c_out: int, size: int, stride: int, groups: int, k: int) -> Sum:
    """A MobileOne unit (paper, figure 3), as its training graph has it."""
    branches: list[nn.Module] = [conv_norm(c_in, c_out, size, stride, groups) for _ in range(k)]
    if size > 1:
        branches.append(conv_norm(c_in, c_out, 1, stride, groups))
    if c_in == c_out and stride == 1:
        branches.append(bn(c_in))
    return Sum(*branches)


def gap(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        assert a is b
        return 0.0
    return ((a.double() - b.double()).abs().max() / max(1.0, a.double().abs().max().item())).item()


def worst(make: Callable[[], Sum], x: Tensor, steps: int = 2) -> float:
    """The largest gap of outputs, input gradients, parameter gradients and buffers over some training steps."""
    reference = make().double()
    for norm in reference.modules():
        if isinstance(norm, bn) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    other = copy.deepcopy(reference)
    other.route = moments
    gaps = []
    for _ in range(steps):
        ys, xs = [], []
        for sums in (reference, other):
            leaf = x.clone().requires_grad_()
            y = sums(leaf)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
            ys.append(y)
            xs.append(leaf)
        gaps += [gap(*ys), gap(xs[0].grad, xs[1].grad)]
        gaps += [gap(p.grad, q.grad) for p, q in zip(reference.parameters(), other.parameters(), strict=True)]
        gaps += [gap(p, q) for p, q in zip(reference.buffers(), other.buffers(), strict=True)]
        x = x * 1.1 + 0.1
    return max(gaps)


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu() + 0.1


# every distinct (c_in, c_out, kernel, stride, groups == c_in, k) of MobileOne S0 ... S4 (paper, table 7)
WIDTHS = {
    "s0": (4, (48, 48, 128, 256, 1024)),
    "s1": (1, (64, 96, 192, 512, 1280)),
    "s2": (1, (64, 96, 256, 640, 2048)),
    "s3": (1, (64, 128, 320, 768, 2048)),
    "s4": (1, (64, 192, 448, 896, 2048)),
}


def units_of(variant: str) -> list[tuple[int, int, int, int, int, int]]:
    k, widths = WIDTHS[variant]
    shapes = [(3, widths[0], 3, 2, 1, 1)]
    for c_in, c_out in itertools.pairwise(widths):
        shapes += [(c_in, c_in, 3, 2, c_in, k), (c_in, c_out, 1, 1, 1, k)]
        shapes += [(c_out, c_out, 3, 1, c_out, k), (c_out, c_out, 1, 1, 1, k)]
    return shapes[:-2]  # the last stage has one block


@pytest.mark.parametrize("variant", WIDTHS)
def test_every_unit_shape_of_mobileone(variant, seeded):
    for shape in units_of(variant):
        size = 5 if shape[1] < 1000 else 3
        assert worst(lambda s=shape: unit(*s), batch(2, shape[0], size, size), steps=1) <= BOUND, shape


@given(
    c=st.sampled_from([2, 3, 6]),
    widen=st.integers(1, 2),
    size=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    depthwise=st.booleans(),
    k=st.integers(1, 5),
    images=st.tuples(st.integers(1, 4), st.integers(2, 7), st.integers(2, 7)),
)
@settings(max_examples=60, deadline=None)
def test_units_of_any_geometry(c, widen, size, stride, depthwise, k, images):
    count, height, width = images
    shape = (c, c * widen, size, stride, c if depthwise else 1, k)
    if count * ((height - 1) // stride + 1) * ((width - 1) // stride + 1) < 2:
        for route in (per_branch, moments):
            with pytest.raises(ValueError, match=r"more than (1|one) value"):
                route(unit(*shape).double(), batch(count, c, height, width))
    else:
        torch.manual_seed(0)
        assert worst(lambda: unit(*shape), batch(count, c, height, width)) <= BOUND


OTHER = {
    "acnet": lambda: Sum(
        conv_norm(4, 4, 3),
        Chain(conv(4, 4, (1, 3), padding=(0, 1)), bn(4)),
        Chain(conv(4, 4, (3, 1), padding=(1, 0)), bn(4)),
    ),
    "norms within a chain": lambda: Sum(
        Chain(conv(4, 6, 1, padding=1, bias=False), bn(6), conv(6, 5, 3), bn(5)),
        Chain(conv(4, 5, 1, padding=1, bias=False), bn(5), nn.AvgPool2d(3, 1), bn(5)),
    ),
    "a norm after a sum": lambda: Sum(nn.Identity(), Chain(Sum(conv_norm(4, 4, 3), bn(4)), bn(4), Scale(4, 0.3))),
    "a branch without a norm": lambda: Sum(conv(4, 4, 3, padding=1), conv_norm(4, 4, 1)),
    "cumulative statistics": lambda: Sum(conv_norm(4, 4, 3, momentum=None), bn(4, momentum=None)),
    "no running statistics": lambda: Sum(conv_norm(4, 4, 3, track_running_stats=False), bn(4)),
    "no affine part": lambda: Sum(conv_norm(4, 4, 3, affine=False), bn(4, affine=False)),
    "groups of several widths": lambda: Sum(conv_norm(4, 8, 3, 1, 2), conv_norm(4, 8, 1, 1, 4), conv_norm(4, 8, 1)),
    "dilated": lambda: Sum(Chain(conv(4, 4, 3, padding=2, dilation=2), bn(4)), conv_norm(4, 4, 3)),
}


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER.keys())
def test_any_tree_of_linear_layers(make, seeded):
    assert worst(make, batch(3, 4, 6, 7), steps=3) <= BOUND


def test_a_frozen_norm_keeps_its_statistics(seeded):
    def make() -> Sum:
        torch.manual_seed(0)
        sums = unit(4, 4, 3, 1, 4, 2)
        sums[0][1].eval()
        return sums

    assert worst(make, batch(2, 4, 5, 5)) <= BOUND


def test_eval_mode_agrees_too(seeded):
    sums = unit(4, 4, 3, 1, 4, 2).double().eval()
    x = batch(2, 4, 5, 5)
    assert gap(per_branch(sums, x), moments(sums, x)) <= BOUND


def test_linear_layers(seeded):
    def make() -> Sum:
        torch.manual_seed(0)
        return Sum(Chain(nn.Linear(5, 7), nn.BatchNorm1d(7)), nn.Linear(5, 7))

    assert worst(make, batch(6, 5)) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_the_error_is_that_of_each(dtype, seeded):
    """Against the float64 truth; 1.5x for two roundings of the same size."""
    x = batch(8, 16, 14, 14)
    sums = unit(16, 16, 3, 1, 16, 4).double()
    truth = per_branch(copy.deepcopy(sums), x)
    low = copy.deepcopy(sums).to(dtype)
    errors = [
        (route(copy.deepcopy(low), x.to(dtype)).double() - truth).norm().item() for route in (per_branch, moments)
    ]
    assert errors[1] <= 1.5 * errors[0]


def test_under_autocast_statistics_stay_in_float32(seeded):
    sums = set_route_(unit(8, 8, 3, 1, 8, 2), moments)
    x = batch(4, 8, 9, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = sums(x)
    assert y.dtype == torch.bfloat16
    assert sums[0][1].running_mean.dtype == torch.float32
    exact = per_branch(copy.deepcopy(sums), x)
    assert ((y.float() - exact).norm() / exact.norm()).item() < 2e-2


def test_set_route_reaches_every_sum_and_checkpoints_do_not_change(seeded):
    model = nn.Sequential(unit(4, 4, 3, 1, 4, 2), nn.ReLU(), nn.Sequential(unit(4, 6, 1, 1, 1, 2)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert set_route_(model, moments) is model
    assert [m.route for m in model.modules() if isinstance(m, Sum)] == [moments, moments]
    assert model.state_dict().keys() == before.keys()
    assert copy.deepcopy(model)[0].route is moments
