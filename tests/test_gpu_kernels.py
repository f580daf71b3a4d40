"""The GPU passes against the reference in float64: on a CUDA device if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from onefold.reparam.kernels import triton_base  # noqa: E402
from onefold.reparam.kernels.base import Backend, ClampMax, Geometry  # noqa: E402
from onefold.reparam.kernels.reference import ReferenceBackend  # noqa: E402
from onefold.reparam.kernels.triton_base import POINTWISE, supports  # noqa: E402
from onefold.reparam.kernels.triton_depthwise import TritonDepthwise  # noqa: E402
from onefold.reparam.kernels.triton_pointwise import TritonPointwise  # noqa: E402

INF = float("inf")
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value
FORMATS = [torch.channels_last, torch.contiguous_format]


def depth(channels: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> Geometry:
    around = kernel // 2 if padding is None else padding
    return Geometry(channels, (kernel, kernel), (stride, stride), (around, around))


def gpu(geometry: Geometry) -> Backend:
    """The passes of a kind of unit, as `select_backend` chooses them for a batch on a GPU."""
    return TritonPointwise() if geometry == POINTWISE else TritonDepthwise()


# shape of the input, outputs, geometry; the sizes are no multiples of a block, and small: the interpreter is slow
CASES = {
    "point": ((3, 20, 5, 7), 37, POINTWISE),
    "point, blocks": ((2, 70, 5, 7), 66, POINTWISE),
    "point, more blocks": ((1, 130, 3, 3), 132, POINTWISE),
    "point, 1x1 map": ((9, 24, 1, 1), 12, POINTWISE),
    "point, one channel": ((2, 1, 6, 5), 1, POINTWISE),
    "depth": ((2, 5, 7, 9), 5, depth(5)),
    "depth, blocks": ((1, 66, 3, 6), 66, depth(66)),
    "depth, stride 2": ((2, 3, 8, 7), 3, depth(3, stride=2)),
    "depth, 1x1 map": ((6, 17, 1, 1), 17, depth(17)),
    "depth, 2x3 map": ((4, 5, 2, 3), 5, depth(5)),
    "depth, 1x1 kernel": ((2, 18, 5, 6), 18, depth(18, 1)),
    "depth, 1x1 kernel, stride 2": ((2, 18, 5, 6), 18, depth(18, 1, 2)),
    "depth, 5x5": ((1, 2, 6, 7), 2, depth(2, 5)),
    "depth, nothing around": ((2, 4, 5, 7), 4, depth(4, padding=0)),
    "depth, much around, stride 3": ((2, 4, 7, 8), 4, depth(4, stride=3, padding=3)),
    "depth, 3x1 kernel": ((2, 5, 8, 6), 5, Geometry(5, (3, 1), (1, 2), (1, 0))),
    "depth, 7x1 kernel, stride 2": ((1, 3, 12, 4), 3, Geometry(3, (7, 1), (2, 2), (3, 0))),
    "depth, two outputs a channel": ((2, 3, 7, 5), 6, depth(3)),
}
LAST, FIRST = FORMATS
GRID = [
    *((name, torch.float32, LAST, INF) for name in CASES if name != "point, more blocks"),
    *((name, torch.float32, FIRST, INF) for name in ("point", "point, 1x1 map", "depth, stride 2")),
    *(("point", dtype, FIRST, INF) for dtype in (torch.bfloat16, torch.float16)),
    *((name, torch.bfloat16, LAST, INF) for name in ("point, more blocks", "depth, stride 2")),
    *((name, torch.float16, LAST, 6.0) for name in ("point", "depth")),
    *((name, torch.float32, LAST, act) for name in ("point", "depth") for act in (None, 6.0)),
]


def named(value: Any) -> str:
    return {LAST: "last", FIRST: "first"}.get(value, str(value).removeprefix("torch."))


EVERY = pytest.mark.parametrize(("name", "dtype", "where", "act"), GRID, ids=named)
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


class Batch:
    """Inputs of all four passes, in `dtype` and `where`, and the same values in float64."""

    def __init__(self, name: str, dtype: torch.dtype, where: torch.memory_format, act: ClampMax) -> None:
        torch.manual_seed(len(name))
        shape, outputs, self.geometry = CASES[name]
        groups, taps = self.geometry.groups, self.geometry.kernel_size[0] * self.geometry.kernel_size[1]
        size = shape[1] // groups * taps
        offset = 3 * torch.randn(shape[1], 1, 1)  # means of some spreads, unlike in each channel
        self.x = (torch.randn(shape) + offset).to(dtype).to(DEVICE, memory_format=where)
        self.kernel = (torch.randn(groups, outputs // groups, size) / size**0.5).to(dtype).double().to(DEVICE)
        self.bias = torch.randn(outputs).double().to(DEVICE) + 1
        self.quad = torch.randn(groups, size, size).double().to(DEVICE) / size
        self.shift = torch.randn(groups, size).double().to(DEVICE)
        self.mean = ReferenceBackend().moments(self.x, self.geometry).mean
        exact = ReferenceBackend().convolve(self.x.double(), self.kernel, self.bias, self.mean, self.geometry, act)
        self.y = exact.to(dtype).contiguous(memory_format=where)
        self.grad = torch.randn(self.y.shape).to(DEVICE, dtype).contiguous(memory_format=where)
        self.act, self.dtype = act, dtype


def away(ours: Tensor, exact: Tensor) -> float:
    """The largest difference, in the largest value."""
    assert ours.shape == exact.shape
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def as_given(ours: Tensor, x: Tensor) -> None:
    assert ours.dtype == x.dtype
    for where in FORMATS:
        assert ours.is_contiguous(memory_format=where) or not x.is_contiguous(memory_format=where)


@pytest.mark.parametrize(("name", "dtype", "where"), sorted({case[:3] for case in GRID}, key=str), ids=named)
def test_moments(name: str, dtype: torch.dtype, where: torch.memory_format) -> None:
    batch = Batch(name, dtype, where, None)
    assert supports(batch.x, batch.geometry)
    ours, exact = (
        gpu(batch.geometry).moments(batch.x, batch.geometry),
        ReferenceBackend().moments(batch.x, batch.geometry),
    )
    assert ours.num == exact.num
    assert ours.mean.dtype == ours.covariance.dtype == torch.float64
    assert away(ours.mean, exact.mean) < CLOSE[dtype] / 10
    assert away(ours.covariance, exact.covariance) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", ["point", "depth"])
def test_moments_of_values_far_from_zero(name: str, dtype: torch.dtype) -> None:
    batch = Batch(name, dtype, LAST, None)
    x = (100 + torch.randn_like(batch.x.float())).to(dtype)
    geometry = batch.geometry if name == "point" else depth(x.shape[1], padding=0)  # zeros around are far from 100
    ours, exact = gpu(geometry).moments(x, geometry), ReferenceBackend().moments(x, geometry)
    assert away(ours.mean, exact.mean) < 1e-6
    assert away(ours.covariance, exact.covariance) < 1e-5  # in half precision as well: such differences are exact


@EVERY
def test_convolve(name: str, dtype: torch.dtype, where: torch.memory_format, act: ClampMax) -> None:
    batch = Batch(name, dtype, where, act)
    rest = (batch.kernel, batch.bias, batch.mean, batch.geometry, act)
    ours, exact = gpu(batch.geometry).convolve(batch.x, *rest), ReferenceBackend().convolve(batch.x.double(), *rest)
    as_given(ours, batch.x)
    assert away(ours, exact) < CLOSE[dtype] / 2


def test_convolve_keeps_a_nan() -> None:
    batch = Batch("point", torch.float32, LAST, 6.0)
    batch.x[0, 0, 0, 0] = float("nan")
    rest = (batch.kernel, batch.bias, batch.mean, batch.geometry, 6.0)
    places = gpu(batch.geometry).convolve(batch.x, *rest).isnan().sum((0, 1))
    assert places[0, 0] == batch.kernel.shape[1]
    assert places.sum() == places[0, 0]


@EVERY
def test_kernel_grad(name: str, dtype: torch.dtype, where: torch.memory_format, act: ClampMax) -> None:
    batch = Batch(name, dtype, where, act)
    rest = (batch.grad, batch.y, batch.x, batch.mean, batch.geometry, act)
    ours, exact = gpu(batch.geometry).kernel_grad(*rest), ReferenceBackend().kernel_grad(*rest)
    assert away(ours[0], exact[0]) < 1e-5  # in half precision as well: the products are exact
    assert away(ours[1], exact[1]) < 1e-5


@EVERY
def test_input_grad(name: str, dtype: torch.dtype, where: torch.memory_format, act: ClampMax) -> None:
    batch = Batch(name, dtype, where, act)
    rest: Any = (batch.kernel, batch.mean, batch.quad, batch.shift, batch.geometry, act)
    ours = gpu(batch.geometry).input_grad(batch.grad, batch.y, batch.x, *rest)
    exact = ReferenceBackend().input_grad(batch.grad.double(), batch.y, batch.x.double(), *rest)
    as_given(ours, batch.x)
    assert away(ours, exact) < CLOSE[dtype]


def test_the_quadratic_term_of_float16_keeps_its_digits() -> None:
    batch = Batch("point", torch.float16, LAST, None)
    # below float16's least value, but x is large: alone in the gradient, so that an error is seen
    mean, quad, shift = batch.mean - 3e4, batch.quad * 1e-8, 0 * batch.shift
    rest: Any = (batch.kernel, mean, quad, shift, batch.geometry, None)
    ours = gpu(batch.geometry).input_grad(torch.zeros_like(batch.grad), batch.y, batch.x, *rest)
    exact = ReferenceBackend().input_grad(torch.zeros_like(batch.grad).double(), batch.y, batch.x.double(), *rest)
    assert away(ours, exact) < CLOSE[torch.float16]


@pytest.mark.parametrize("name", ["point", "depth"])
def test_gradients_of_another_layout(name: str) -> None:
    batch = Batch(name, torch.float32, LAST, INF)
    grad = torch.ones((), device=DEVICE).expand(batch.y.shape)  # as `sum` gives it
    rest: Any = (batch.y.contiguous(), batch.x)
    quads: Any = (batch.kernel, batch.mean, batch.quad, batch.shift, batch.geometry, INF)
    exact = ReferenceBackend().input_grad(grad.double(), batch.y, batch.x.double(), *quads)
    assert away(gpu(batch.geometry).input_grad(grad, *rest, *quads), exact) < 1e-5
    ours = gpu(batch.geometry).kernel_grad(grad, *rest, batch.mean, batch.geometry, INF)
    assert away(ours[0], ReferenceBackend().kernel_grad(grad, *rest, batch.mean, batch.geometry, INF)[0]) < 1e-5


def test_a_slice_of_a_map_is_read_where_it_lies() -> None:
    batch = Batch("depth", torch.float32, LAST, None)
    x = torch.cat([batch.x, batch.x], 1)[:, : batch.x.shape[1]]
    ours, exact = gpu(batch.geometry).moments(x, batch.geometry), ReferenceBackend().moments(batch.x, batch.geometry)
    assert away(ours.covariance, exact.covariance) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["point", "depth"])
def test_a_program_sums_many_blocks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(name, dtype, LAST, INF)
    sums: Any = (batch.grad, batch.y, batch.x, batch.mean, batch.geometry, INF)
    monkeypatch.setattr(triton_base, "_PROGRAMS", 1)
    ours, exact = (
        gpu(batch.geometry).moments(batch.x, batch.geometry),
        ReferenceBackend().moments(batch.x, batch.geometry),
    )
    assert away(ours.covariance, exact.covariance) < CLOSE[dtype]
    assert away(gpu(batch.geometry).kernel_grad(*sums)[0], ReferenceBackend().kernel_grad(*sums)[0]) < 1e-5


def test_the_same_bits_twice() -> None:
    for name in ("point", "depth"):
        batch = Batch(name, torch.bfloat16, LAST, None)
        once, again = (gpu(batch.geometry).moments(batch.x, batch.geometry).covariance for _ in range(2))
        assert torch.equal(once, again)


def test_what_is_not_supported() -> None:
    x = torch.zeros(2, 4, 5, 5, device=DEVICE)
    assert not supports(x.double(), POINTWISE)
    assert not supports(x[:0], POINTWISE)
    assert not supports(x[0], POINTWISE)
    assert not supports(x, Geometry(1, (1, 1), (2, 2), (0, 0)))
    assert not supports(x, Geometry(1, (1, 1), (1, 1), (1, 1)))
    assert not supports(x, Geometry(1, (3, 3), (1, 1), (1, 1)))
    assert not supports(x, Geometry(2, (3, 3), (1, 1), (1, 1)))
    assert not supports(x, depth(4, 9))
