"""The four passes on a CPU, by the compiled kernels: pointwise, depthwise of any stride, and small dense units.

The kernels work on float32 images in channels_last order; other layouts and half types are converted. They take a
centre in float32, near the mean; what rounding leaves between the two is put right here, in float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from onefold.reparam.kernels.backend import Act, Geometry, Moments, library
from onefold.reparam.kernels.memory import new_map

MAPS = 8  # in a `mix`
SIZES = (1, 3, 5, 7)  # of depthwise kernels
SMALL = 64  # values a patch: a dense unit up to this (a stem) is done on written-out patches
PILOT = 256  # rows whose mean is the first guess of the mean
DOMINANT = 16.0  # mean^2 / variance from which a depthwise unit's moments are made again, centred


def supports(x: Tensor, geometry: Geometry) -> bool:
    """Whether these kernels do this unit, and are there."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    known = _is_pointwise(geometry) or _is_depthwise(x, geometry) or _is_small(x, geometry)
    return known and library() is not None


class Compiled:
    """The compiled kernels; see `supports`. One instance serves one unit and batch, forward or backward."""

    def __init__(self) -> None:
        self._patches: Tensor | None = None  # of a small dense unit, which two passes in a row need

    def moments(self, x: Tensor, geometry: Geometry) -> Moments:
        """Mean and covariance of the patches, in float64."""
        if _is_depthwise(x, geometry):
            return _depthwise_moments(x, geometry)
        rows = self._rows(x, geometry)
        n, c = rows.shape
        centre = rows[:PILOT].mean(0)
        total, products = _double(c), _double(c, c)
        call("pointwise_moments", rows, n, c, centre, total, products)
        return _centred(centre.double()[None], total[None], products[None], n)

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor, mean: Tensor, geometry: Geometry, act: Act) -> Tensor:
        """act(bias + kernel (patch - mean)): (B, O, H', W')."""
        centre = _centre(x, mean, geometry)
        offset = bias.double() - (kernel.double() @ (mean - centre)[..., None]).flatten()
        weight, offset, top = _float(kernel), _float(offset), _top(act)
        size = _places(x, geometry)
        y = new_map(x.shape[0], *size, len(offset))
        if _is_depthwise(x, geometry):
            shape, taps = _shape(x, geometry)
            call("depthwise_convolve", _image(x), shape, taps, _float(centre[:, 0]), weight, offset, top, y)
        else:
            rows = self._rows(x, geometry)
            call("pointwise_convolve", rows, *rows.shape, _float(centre), weight, offset, len(offset), top, 0, y)
        return y.permute(0, 3, 1, 2).to(x.dtype)

    def kernel_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, geometry: Geometry, act: Act
    ) -> tuple[Tensor, Tensor]:
        """Sum over places of grad' (patch - mean)^T (G, O/G, K), and of grad' (O,), in float64."""
        centre, out = _centre(x, mean, geometry), grad.shape[1]
        g, after, top = _image(grad), _image(y), _top(act)
        products, total = _double(geometry.groups, out // geometry.groups, mean.shape[1]), _double(out)
        if _is_depthwise(x, geometry):
            shape, taps = _shape(x, geometry)
            call("depthwise_kernel_grad", g, after, _image(x), shape, taps, _float(centre[:, 0]), top, products, total)
        else:
            rows = self._rows(x, geometry)
            call("pointwise_kernel_grad", g, after, rows, *rows.shape, out, _float(centre), top, products, total)
        return products - total.view(geometry.groups, -1, 1) * (mean - centre)[:, None], total

    def input_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, kernel: Tensor, mean: Tensor, quad: Tensor, shift: Tensor,
        geometry: Geometry, act: Act,
    ) -> Tensor:  # fmt: skip
        """The patches' gradient kernel^T grad' + quad (patch - mean) + shift, added up into the shape of x."""
        centre = _centre(x, mean, geometry)
        g, after, top, weight, square = _image(grad), _image(y), _top(act), _float(kernel), _float(quad)
        if _is_depthwise(x, geometry):
            shape, taps = _shape(x, geometry)
            image, middle, offset = _image(x), _float(centre[:, 0]), _float(mean - centre)
            dx = new_map(*image.shape)
            tables = (middle, weight, square, offset, _float(shift))
            call("depthwise_input_grad", g, after, image, shape, taps, *tables, top, dx)
            return dx.permute(0, 3, 1, 2).to(x.dtype)
        rows = self._rows(x, geometry)
        dx, constant = (
            new_map(*rows.shape),
            _float(shift.double() - (quad.double() @ (mean - centre)[..., None]).squeeze(-1)),
        )
        sizes = (*rows.shape, grad.shape[1])
        call("pointwise_input_grad", g, after, rows, *sizes, weight, _float(centre), square, constant, top, dx)
        return _unrows(dx, x, geometry).to(x.dtype)

    def _rows(self, x: Tensor, geometry: Geometry) -> Tensor:
        """(N, K): the patches, dense."""
        if _is_pointwise(geometry):
            return _image(x).flatten(0, 2)
        if self._patches is None:
            (tall, wide), (shape, taps) = _places(x, geometry), _shape(x, geometry)
            self._patches = new_map(x.shape[0] * tall * wide, x.shape[1] * taps * taps)
            call("write_patches", _image(x), shape, taps, self._patches)
        return self._patches


def _depthwise_moments(x: Tensor, geometry: Geometry) -> Moments:
    """Uncentred first, which is cheaper; once more around the mean where that dominates."""
    image, (shape, taps) = _image(x), _shape(x, geometry)
    c, k, n = x.shape[1], taps * taps, x.shape[0]
    for size in _places(x, geometry):
        n *= size
    centre, found = torch.zeros(c), None
    for again in (0, 1):
        total, products = _double(c, k), _double(c, k, k)
        call("depthwise_moments", image, shape, taps, centre, again, total, products)
        found = _centred(centre.double()[:, None], total, products, n)
        middle = found.mean[:, k // 2]
        if not (middle.square() > DOMINANT * found.covariance[:, k // 2, k // 2]).logical_and(middle != 0).any():
            break
        centre = _float(middle)
    assert found is not None
    return found


def _centred(centre: Tensor, total: Tensor, products: Tensor, n: int) -> Moments:
    """Moments out of sums around a centre."""
    off = total / n
    return Moments(centre + off, products.div_(n).baddbmm_(off[:, :, None], off[:, None], alpha=-1), n)


class Product(torch.autograd.Function):
    """A pointwise convolution (B, I, H, W) x (O, I, 1, 1) -> (B, O, H, W), and its input once more.

    Who uses the input beside the convolution takes the second output: their gradients are then summed in one pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution, and x."""
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return _product(x, weight.detach().flatten(1)), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, beside: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of both uses."""
        x, weight = ctx.saved_tensors
        if grad is None:
            return beside, None
        products = _image(grad).flatten(0, 2).T @ _image(x).flatten(0, 2)
        dx = _product(grad, weight.flatten(1).T, beside) if ctx.needs_input_grad[0] else None
        return dx, products.to(weight.dtype).view_as(weight)


def _product(x: Tensor, weight: Tensor, more: Tensor | None = None) -> Tensor:
    """weight (O, I) times each pixel of (B, I, H, W), plus `more`: (B, O, H, W)."""
    (b, c, h, w), out = x.shape, len(weight)
    y, zeros = new_map(b, h, w, out), (torch.zeros(c), torch.zeros(out))
    kernel, other = _float(weight), 0 if more is None else (more := _image(more)).data_ptr()
    call("pointwise_convolve", _image(x), b * h * w, c, zeros[0], kernel, zeros[1], out, -1.0, other, y)
    return y.permute(0, 3, 1, 2)


def column_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (B, C, H, W), in float64."""
    rows = _image(x).flatten(0, 2)
    n, c = rows.shape
    centre, total, squares = rows[:PILOT].mean(0), _double(c), _double(c)
    call("column_moments", rows, n, c, centre, total, squares)
    off = total / n
    return centre + off, (squares / n - off.square()).clamp_min_(0)


def mix(maps: Sequence[Tensor], mean: Tensor, gain: Tensor, bias: Tensor, act: Act) -> Tensor:
    """act(bias + sum over maps of gain (map - mean)); maps (B, C, H, W), mean and gain (M, C), bias (C,)."""
    images = [_image(m) for m in maps]
    out = new_map(*images[0].shape)
    c = out.shape[-1]
    tables = (_float(mean), _float(gain), _float(bias))
    call("mix", pointers(images), len(maps), out.numel() // c, c, *tables, _top(act), out)
    return out.permute(0, 3, 1, 2)


def mix_sums(grad: Tensor, y: Tensor, maps: Sequence[Tensor], mean: Tensor, act: Act) -> Tensor:
    """Sums over places of grad' (map - mean) for each map, then of grad': (M + 1, C), in float64."""
    images, g, after = [_image(m) for m in maps], _image(grad), _image(y)
    c = g.shape[-1]
    sums = _double(len(maps) + 1, c)
    call("mix_sums", g, after, pointers(images), len(maps), g.numel() // c, c, _float(mean), _top(act), sums)
    return sums


def mix_back(
    grad: Tensor,
    y: Tensor,
    maps: Sequence[Tensor],
    mean: Tensor,
    gain: Tensor,
    slope: Tensor,
    constant: Tensor,
    act: Act,
) -> list[Tensor]:
    """gain grad' + slope (map - mean) + constant, for each map; tables (M, C)."""
    images, g, after = [_image(m) for m in maps], _image(grad), _image(y)
    grads = [new_map(*g.shape) for _ in maps]
    tables = [_float(table) for table in (mean, gain, slope, constant)]
    c = g.shape[-1]
    call("mix_back", g, after, pointers(images), len(maps), g.numel() // c, c, *tables, _top(act), pointers(grads))
    return [d.permute(0, 3, 1, 2) for d in grads]


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Their addresses, 0 for None."""
    return (ctypes.c_void_p * len(tensors))(*(0 if t is None else t.data_ptr() for t in tensors))


def _is_pointwise(geometry: Geometry) -> bool:
    return geometry == Geometry(1, (1, 1), (1, 1), (0, 0))


def _is_depthwise(x: Tensor, geometry: Geometry) -> bool:
    tall, above = geometry.kernel_size[0], geometry.padding[0]
    return _is_square(geometry) and geometry.groups == x.shape[1] > 1 and tall in SIZES and above < tall


def _is_square(geometry: Geometry) -> bool:
    return all(pair[0] == pair[1] for pair in (geometry.kernel_size, geometry.stride, geometry.padding))


def _is_small(x: Tensor, geometry: Geometry) -> bool:
    return (
        _is_square(geometry)
        and geometry.groups == 1
        and x.shape[1] * geometry.kernel_size[0] * geometry.kernel_size[1] <= SMALL
    )


def _image(x: Tensor) -> Tensor:
    """(B, C, H, W) to a dense (B, H, W, C) in float32; no copy of channels_last float32."""
    return x.detach().permute(0, 2, 3, 1).to(torch.float32).contiguous()


def _unrows(rows: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The transpose of `_rows`."""
    b, _, h, w = x.shape
    if _is_pointwise(geometry):
        return rows.view(b, h, w, -1).permute(0, 3, 1, 2)
    columns = rows.view(b, -1, rows.shape[1]).transpose(1, 2)
    return F.fold(columns, (h, w), geometry.kernel_size, 1, geometry.padding, geometry.stride)


def _places(x: Tensor, geometry: Geometry) -> tuple[int, int]:
    """(H', W')."""
    tall, wide = (
        (n + 2 * r - k) // s + 1
        for n, r, k, s in zip(x.shape[2:], geometry.padding, geometry.kernel_size, geometry.stride, strict=True)
    )
    return tall, wide


def _centre(x: Tensor, mean: Tensor, geometry: Geometry) -> Tensor:
    """The float32 centre that the kernels take off, as float64 (G, K): of a depthwise patch one value a channel."""
    if _is_depthwise(x, geometry):
        return mean[:, mean.shape[1] // 2].float().double()[:, None].expand_as(mean)
    return mean.float().double()


def _shape(x: Tensor, geometry: Geometry) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    b, c, h, w = x.shape
    return (ctypes.c_int64 * 6)(b, h, w, c, geometry.stride[0], geometry.padding[0]), geometry.kernel_size[0]


def _top(act: Act) -> float:
    """The activation's ceiling as the kernels take it."""
    return -1.0 if act is None else act


def _float(values: Tensor) -> Tensor:
    return values.detach().to(torch.float32).contiguous()


def _double(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float64)


def call(name: str, *arguments: Tensor | int | float | ctypes.Array[Any]) -> None:
    """Run a kernel on all of torch's threads: tensors and arrays go by address, int as int64, float as float32."""
    kernel = _kernel(name, tuple(map(type, arguments)))
    kernel(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


@cache
def _kernel(name: str, kinds: tuple[type, ...]) -> Callable[..., None]:
    """A kernel that knows its arguments' types."""
    kernels = library()
    assert kernels is not None
    kernel = kernels[name]  # a function object of its own
    numbers: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_float}
    kernel.argtypes = [*(numbers.get(kind, ctypes.c_void_p) for kind in kinds), ctypes.c_int]
    kernel.restype = None
    return kernel
