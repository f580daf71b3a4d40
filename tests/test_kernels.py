"""The compiled kernels and the routes on them: as exact in float32 as branch by branch, in every corner."""

from __future__ import annotations

import copy
import math
import os
import statistics
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onefold.reparam import mixed, moments, per_branch, quickest
from onefold.reparam.branches import as_unit
from onefold.reparam.kernels import ReferenceBackend, select_backend
from onefold.reparam.kernels.base import Geometry, load_kernels
from onefold.reparam.kernels.cpu import CppBackend, empty_map, release_cached_memory
from onefold.reparam.kernels.cpu_bfloat16 import PointwiseBfloat16Backend
from onefold.reparam.routes import route_costs
from test_routes import unit

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="needs a C++ compiler for the kernels")
INFINITY = float("inf")


def results(sums: nn.Module, x: Tensor, grad: Tensor, route, act: nn.Module | None) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one training step."""
    sums = copy.deepcopy(sums)
    x = x.clone().requires_grad_()
    y = route(sums, x, act)
    y.backward(grad)
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in sums.named_parameters()}
    return found | {name: b for name, b in sums.named_buffers() if b.is_floating_point()}


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def against_truth(sums: nn.Module, x: Tensor, route, act: nn.Module | None = None) -> dict[str, tuple[float, float]]:
    """Relative errors, of `per_branch` and of the route, in float32 against float64."""
    for norm in sums.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    with torch.no_grad():
        grad = torch.randn_like(per_branch(copy.deepcopy(sums), x))
    truth = results(sums.double(), x.double(), grad.double(), per_branch, act)
    sums = sums.float()
    ours, reference = (results(sums, x, grad, r, act) for r in (route, per_branch))
    return {name: (error(reference[name], truth[name]), error(ours[name], truth[name])) for name in truth}


SHAPES = {  # c_in, c_out, kernel, stride, groups, k
    "stem": (3, 48, 3, 2, 1, 1),
    "pointwise": (48, 48, 1, 1, 1, 4),
    "wide pointwise": (128, 256, 1, 1, 1, 4),
    "one branch": (96, 96, 1, 1, 1, 1),
    "depthwise": (48, 48, 3, 1, 48, 4),
    "depthwise, stride 2": (48, 48, 3, 2, 48, 4),
    "depthwise 5x5": (24, 24, 5, 1, 24, 2),
    "depthwise 7x7": (24, 24, 7, 1, 24, 2),
    "depthwise, odd width": (19, 19, 3, 1, 19, 1),
}


def error_ratios(shape, mean: float, route) -> dict[str, float]:
    """By how much a route's errors are larger than those of `per_branch`: geometric means over units and batches.

    Values near float32's own resolution (1e-7) are both noise: of one batch of few channels their ratio is 0.2 to 2.4.
    So there are many batches of those.
    """
    logarithms: dict[str, list[float]] = {}
    for seed in range(8 if shape[4] == 1 and shape[0] >= 48 else 32):
        torch.manual_seed(seed)
        x = torch.randn(8, shape[0], 14, 14).relu() + mean
        for name, (reference, ours) in against_truth(unit(*shape), x, route).items():
            logarithms.setdefault(name, []).append(math.log(max(ours, 6e-8) / max(reference, 6e-8)))
    return {name: math.exp(statistics.fmean(of_name)) for name, of_name in logarithms.items()}


@pytest.mark.parametrize("mean", [0.0, 3.0, 20.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float32_errors_are_those_of_each(shape, mean):
    """At most 1.5x: two roundings of one size."""
    assert {name: ratio for name, ratio in error_ratios(shape, mean, moments).items() if ratio > 1.5} == {}


@pytest.mark.parametrize("shape", [SHAPES["pointwise"], SHAPES["one branch"], SHAPES["depthwise"]])
def test_mixed_is_as_exact_as_each(shape):
    assert {name: ratio for name, ratio in error_ratios(shape, 0.0, mixed).items() if ratio > 1.5} == {}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 2.5), nn.GELU()])
@pytest.mark.parametrize("route", [moments, mixed, quickest])
def test_activations_within_the_unit(route, act, seeded):
    for shape in (SHAPES["pointwise"], SHAPES["depthwise"], SHAPES["one branch"]):
        sums, x = unit(*shape), torch.randn(4, shape[0], 9, 9).relu()
        grad = torch.randn(4, shape[1], 9, 9)
        ours, reference = (results(sums, x, grad, r, act) for r in (route, per_branch))
        assert all(error(ours[k], reference[k].double()) < 2e-5 for k in ours if reference[k].abs().max() > 1e-4)


@given(
    c=st.integers(2, 40),
    size=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    images=st.integers(1, 3),
    top=st.sampled_from([None, 6.0, INFINITY]),
    shift=st.sampled_from([0.0, 8.0]),
)
@settings(max_examples=80, deadline=None)
def test_depthwise_passes_agree_with_the_reference(c, size, stride, height, width, images, top, shift):
    geometry = Geometry(c, (size, size), (stride, stride), (size // 2, size // 2))
    x = torch.randn(images, c, height, width, generator=torch.Generator().manual_seed(c)).relu() + shift
    if isinstance(select_backend(x, geometry, c), CppBackend):
        passes_agree(x, geometry, c, top)


@given(
    c=st.integers(1, 40), out=st.integers(1, 40), pixels=st.integers(1, 300), top=st.sampled_from([None, 6.0, INFINITY])
)
@settings(max_examples=60, deadline=None)
def test_pointwise_passes_agree_with_the_reference(c, out, pixels, top):
    x = torch.randn(1, c, pixels, 1, generator=torch.Generator().manual_seed(pixels)).relu()
    passes_agree(x, Geometry(1, (1, 1), (1, 1), (0, 0)), out, top)


def passes_agree(x: Tensor, geometry: Geometry, out: int, top: float | None) -> None:
    torch.manual_seed(0)
    ours, exact, wide = CppBackend(), ReferenceBackend(), x.double()
    groups, k = geometry.groups, x.shape[1] // geometry.groups * geometry.kernel_size[0] * geometry.kernel_size[1]
    kernel, bias = torch.randn(groups, out // groups, k).double(), torch.randn(out).double()
    quad, shift = torch.randn(groups, k, k).double(), torch.randn(groups, k).double()
    quad = quad + quad.mT
    found, truth = ours.moments(x, geometry), exact.moments(wide, geometry)
    scale = 1 + wide.square().max().item()
    assert (found.mean - truth.mean).abs().max() <= 1e-6 * scale
    assert (found.covariance - truth.covariance).abs().max() <= 1e-6 * scale
    y = ours.convolve(x, kernel, bias, truth.mean, geometry, top)
    other = exact.convolve(wide, kernel, bias, truth.mean, geometry, top)
    near(y, other)
    grad = torch.randn_like(y)
    for a, b in zip(
        ours.kernel_grad(grad, y, x, truth.mean, geometry, top),
        exact.kernel_grad(grad.double(), y.double(), wide, truth.mean, geometry, top),
        strict=True,
    ):
        near(a, b)
    rest = (kernel, truth.mean, quad, shift, geometry, top)
    near(ours.input_grad(grad, y, x, *rest), exact.input_grad(grad.double(), y.double(), wide, *rest))


@pytest.mark.parametrize("stride", [0, 1, 2], ids=["pointwise", "depthwise", "depthwise, stride 2"])
def test_large_maps_hold_what_small_ones_hold(stride, seeded):
    """Maps of a million values or more are stored past the caches; an image alone is below that."""
    geometry = Geometry(32, (3, 3), (stride, stride), (1, 1)) if stride else Geometry(1, (1, 1), (1, 1), (0, 0))
    x = torch.randn(3, 32, 160, 160).contiguous(memory_format=torch.channels_last)
    groups, k = geometry.groups, 9 if stride else 32
    kernel, mean, quad = torch.randn(groups, 32 // groups, k), torch.randn(groups, k), torch.randn(groups, k, k)
    wide = (kernel.double(), mean.double(), (quad + quad.mT).double(), mean.double(), geometry, 6.0)
    both = []
    for images in (x, x[:1]):
        y = CppBackend().convolve(images, wide[0], torch.ones(32).double(), wide[1], geometry, 6.0)
        both.append((y, CppBackend().input_grad(y, y, images, *wide)))
    assert all(torch.equal(large[:1], small) for large, small in zip(*both, strict=True))


def near(a: Tensor, b: Tensor) -> None:
    assert (a.double() - b).abs().max() <= 1e-5 * (1 + b.abs().max())


def test_dead_channels_and_tiny_variances(seeded):
    """Channels that are zero, constant or nearly so, as behind a ReLU: finite, and as `per_branch` has them."""
    for shape in (SHAPES["pointwise"], SHAPES["depthwise"]):
        x = torch.randn(8, shape[0], 8, 8).relu()
        x[:, 0] = 0
        x[:, 1] = 3.0
        x[:, 2] = 5 + 1e-3 * x[:, 2]
        errors = against_truth(unit(*shape), x, moments)
        assert errors["y"][1] <= 1.5 * errors["y"][0]
        found = results(unit(*shape), x, torch.randn(8, shape[1], 8, 8), moments, nn.ReLU())
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("size", [(1, 2, 2), (2, 1, 1), (5, 1, 1), (1, 1, 7)])
def test_one_pixel_maps_and_single_images(size, seeded):
    images, height, width = size
    for shape in (SHAPES["pointwise"], SHAPES["depthwise"]):
        sums, x = unit(*shape), torch.randn(images, shape[0], height, width)
        ours, reference = (
            results(sums.double(), x.double(), torch.ones(images, shape[1], height, width).double(), r, None)
            for r in (moments, per_branch)
        )
        single = results(sums.float(), x, torch.ones(images, shape[1], height, width), moments, None)
        assert all((ours[k] - reference[k]).abs().max() <= 1e-9 * (1 + reference[k].abs().max()) for k in ours)
        assert error(single["y"], reference["y"]) < 1e-3  # two values a channel: normalizing amplifies rounding


def test_the_quickest_route_by_count():
    """`moments` for several branches and for depthwise, `mixed` for one wide convolution, else `per_branch`."""
    x = torch.randn(8, 512, 14, 14)
    cost = {k: route_costs(as_unit(unit(512, 512, 1, 1, 1, k)), x) for k in (1, 4)}
    assert min(cost[1]) == cost[1].mixed
    assert min(cost[4]) == cost[4].moments
    depthwise = route_costs(as_unit(unit(512, 512, 3, 1, 512, 1)), x)
    assert min(depthwise) == depthwise.moments
    assert route_costs(as_unit(unit(512, 512, 1, 1, 1, 1)), x.double()).mixed == INFINITY


def test_without_compiled_code_patches_are_not_written_out(monkeypatch: pytest.MonkeyPatch):
    """The reference takes 3 to 20 times as long as each layer by itself, where it is not the library's products."""
    monkeypatch.setenv("ONEFOLD_KERNELS", "plain")
    for shape, x in (
        ((48, 48, 3, 1, 48, 5), torch.randn(2, 48, 56, 56)),
        ((128, 128, 3, 2, 128, 4), torch.randn(2, 128, 28, 28)),
        ((3, 48, 3, 2, 1, 2), torch.randn(2, 3, 112, 112)),
        ((256, 1024, 1, 1, 1, 4), torch.randn(2, 256, 7, 7)),
    ):
        cost = route_costs(as_unit(unit(*shape)), x)
        assert min(cost) == cost.per_branch


def test_in_bfloat16_products_are_the_librarys(monkeypatch: pytest.MonkeyPatch):
    """With instructions for bfloat16 they are nearly free, by `moments` too; without them nothing changes."""
    x, wide = torch.randn(2, 512, 14, 14), as_unit(unit(512, 512, 1, 1, 1, 1))
    many, depthwise = as_unit(unit(256, 256, 1, 1, 1, 4)), as_unit(unit(48, 48, 3, 2, 48, 4))
    before = [route_costs(wide, x), route_costs(many, x)]
    for has in (True, False):
        monkeypatch.setattr("onefold.reparam.routes.has_bfloat16", lambda has=has: has)
        assert [route_costs(wide, x), route_costs(many, x)] == before
        with torch.autocast("cpu", torch.bfloat16):
            cost = route_costs(wide, x)
            assert (cost.moments < before[0].moments) == (cost.per_branch < before[0].per_branch) == has
            assert min(cost) == cost.per_branch  # one wide convolution: its moments are more than it is
            for each in (
                route_costs(many, torch.randn(32, 256, 14, 14)),
                route_costs(depthwise, torch.randn(2, 48, 112, 112)),
            ):
                assert min(each) == each.moments


@pytest.mark.parametrize("act", [None, 6.0, float("inf")])
@pytest.mark.parametrize("shift", [0.0, 1.0, 50.0])
def test_pointwise_units_in_bfloat16_by_the_library(act: float | None, shift: float):
    """Each pass against the reference in float64 on the same numbers; a mean that dominates costs nothing."""
    generator = torch.Generator().manual_seed(3)
    shape, geometry = (4, 24, 9, 7), Geometry(1, (1, 1), (1, 1), (0, 0))
    x = (torch.randn(shape, generator=generator) + shift).bfloat16()
    kernel = torch.randn(1, 40, 24, generator=generator) / 5
    bias, quad = torch.randn(40, generator=generator), torch.randn(1, 24, 24, generator=generator) / 50
    shift_ = torch.randn(1, 24, generator=generator) / 50
    low, reference, wide = PointwiseBfloat16Backend(), ReferenceBackend(), x.double()
    found, true = low.moments(x, geometry), reference.moments(wide, geometry)
    assert error(found.mean, true.mean) < 1e-6
    assert error(found.covariance, true.covariance) < 1e-4
    mean, eps = true.mean, torch.finfo(torch.bfloat16).eps
    places = (kernel.double(), bias.double(), mean, geometry, act)
    y, exact = low.convolve(x, kernel, bias, mean, geometry, act), reference.convolve(wide, *places)
    assert y.dtype == torch.bfloat16
    assert error(y.double(), exact) < eps * max(1.0, shift / 2)  # what the offset, kernel times mean, is rounded to
    grad = torch.randn(y.shape, generator=generator).bfloat16()
    ours = low.kernel_grad(grad, y, x, mean, geometry, act)
    theirs = reference.kernel_grad(grad.double(), y.double(), wide, mean, geometry, act)
    assert error(ours[0], theirs[0]) < eps * max(1.0, shift)
    assert error(ours[1], theirs[1]) < 1e-5
    square = quad + quad.mT
    dx = low.input_grad(grad, y, x, kernel, mean, square, shift_, geometry, act)
    exact = reference.input_grad(
        grad.double(), y.double(), wide, kernel.double(), mean, square.double(), shift_.double(), geometry, act
    )
    assert error(dx.double(), exact) < 2 * eps * max(1.0, shift / 2)


def test_without_a_compiler_training_goes_on(tmp_path):
    """One warning, plain torch, the same numbers; and none is asked for where the environment says so."""
    code = (
        "import torch, warnings; from onefold import create_model\n"
        "model = create_model('mobilenetv1_025', num_classes=3)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); model(torch.randn(2, 3, 32, 32)).sum().backward()\n"
        "print(len([w for w in seen if 'cannot be compiled' in str(w.message)]))"
    )
    for extra, warned in (({"CXX": "no-such-compiler"}, "1"), ({"ONEFOLD_KERNELS": "plain"}, "0")):
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **extra}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == warned


def test_maps_reuse_memory():
    if load_kernels() is None:
        pytest.skip("no compiler")
    release_cached_memory()
    first = empty_map(64, 64, 128)
    place = first.data_ptr()
    first.fill_(1.0)
    view = first[3:]
    del first
    second = empty_map(64, 64, 128)
    assert second.data_ptr() != place  # a view keeps its memory
    assert bool((view == 1).all())
    del view
    again = empty_map(32, 128, 128)  # as many values
    assert again.data_ptr() == place
    del again
    release_cached_memory()


def test_maps_hold_no_more_memory_than_was_in_use():
    """In a process of its own: how much of what is freed the C library keeps depends on what it gave out before."""
    if load_kernels() is None:
        pytest.skip("no compiler")
    code = """
    from pathlib import Path
    from onefold.reparam.kernels.cpu import empty_map
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0
    empty_map(1024).fill_(0.0)  # what the first use of all takes
    page, before = 2 << 20, resident()
    maps = [empty_map(n * page // 4).fill_(0.0) for n in range(1, 9)]
    del maps
    for n in range(9, 20):  # sizes that nothing waiting fits: what waits goes first
        empty_map(n * page // 4).fill_(0.0)
    print((resident() - before) / page)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40
