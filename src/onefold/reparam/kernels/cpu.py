"""The four passes on a CPU, by the compiled kernels: pointwise, depthwise of any stride, and small dense units.

The kernels work on float32 images in channels_last order, 3 x 3 depthwise ones on bfloat16 too, which they compute in
float32; other memory formats and half types are converted. They subtract a centre in float32, near the mean; its
rounding error is corrected here, in float64.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.dlpack import from_dlpack

from onefold.reparam.kernels.base import ClampMax, Geometry, Moments, load_kernels

_SMALLEST_MAP = 1 << 18  # floats: the C library's own memory does for less
MAX_MAPS = 8  # in a call of `normalized_sum`
_KERNEL_SIZES = (1, 3, 5, 7)  # of depthwise kernels
_MAX_PATCH = 64  # values of a patch up to which a dense unit (a stem) is computed on written-out patches
_PILOT_ROWS = 256  # whose mean is the first estimate of the mean
_WIDE = 192  # channels from which a library's product gains more than it loses by adding in a pass of its own
_DOMINANT = 16.0  # mean^2 / variance from which uncentred moments are computed again, centred


def supports(x: Tensor, geometry: Geometry) -> bool:
    """Whether these kernels take this unit, and could be compiled."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    known = is_pointwise(geometry) or _is_depthwise(x, geometry) or _is_small(x, geometry)
    return known and load_kernels() is not None


class CppBackend:
    """The compiled kernels. An instance is for one unit and batch, forward or backward; see `supports` for which."""

    def __init__(self) -> None:
        self._patches: Tensor | None = None  # of a small dense unit: two passes in a row use them

    def moments(self, x: Tensor, geometry: Geometry) -> Moments:
        """Mean and covariance of the patches, in float64."""
        if _is_depthwise(x, geometry):
            return _depthwise_moments(x, geometry)
        rows = self._rows(x, geometry)
        n, c = rows.shape
        centre = rows[:_PILOT_ROWS].mean(0)
        total, products = _double(c), _double(c, c)
        call_kernel("pointwise_moments", rows, n, c, centre, total, products)
        return moments_from_sums(centre.double()[None], total[None], products[None], n)

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> Tensor:
        """act(bias + kernel (patch - mean)): (B, O, H', W')."""
        centre = _centre(x, mean, geometry)
        offset = bias.double() - (kernel.double() @ (mean - centre)[..., None]).flatten()
        weight, offset, top = _float(kernel), _float(offset), clamp_bound(act)
        dtype = _map_dtype(x, geometry)
        y = empty_map(x.shape[0], *_places(x, geometry), len(offset), dtype=dtype)
        if _is_depthwise(x, geometry):
            image, (shape, size), middle = _image(x, dtype), _shape(x, geometry), _float(centre[:, 0])
            call_kernel("depthwise_convolve", image, _low(dtype), shape, size, middle, weight, offset, top, y)
        else:
            rows = self._rows(x, geometry)
            call_kernel("pointwise_convolve", rows, *rows.shape, _float(centre), weight, offset, len(offset), top, 0, y)
        return y.permute(0, 3, 1, 2).to(x.dtype)

    def kernel_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> tuple[Tensor, Tensor]:
        """Sum over places of grad' (patch - mean)^T (G, O/G, K), and of grad' (O,), in float64."""
        centre, out = _centre(x, mean, geometry), grad.shape[1]
        dtype, top = _map_dtype(x, geometry), clamp_bound(act)
        g, after = _image(grad, dtype), _image(y, dtype)
        products, total = _double(geometry.groups, out // geometry.groups, mean.shape[1]), _double(out)
        if _is_depthwise(x, geometry):
            image, (shape, size), middle = _image(x, dtype), _shape(x, geometry), _float(centre[:, 0])
            sums = (products, total)
            call_kernel("depthwise_kernel_grad", g, after, image, _low(dtype), shape, size, middle, top, *sums)
        else:
            rows = self._rows(x, geometry)
            call_kernel("pointwise_kernel_grad", g, after, rows, *rows.shape, out, _float(centre), top, products, total)
        return products - total.view(geometry.groups, -1, 1) * (mean - centre)[:, None], total

    def input_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, kernel: Tensor, mean: Tensor, quad: Tensor, shift: Tensor,
        geometry: Geometry, act: ClampMax,
    ) -> Tensor:  # fmt: skip
        """The patches' gradient kernel^T grad' + quad (patch - mean) + shift, added up into the shape of x."""
        centre = _centre(x, mean, geometry)
        dtype, top, weight, square = _map_dtype(x, geometry), clamp_bound(act), _float(kernel), _float(quad)
        g, after = _image(grad, dtype), _image(y, dtype)
        if _is_depthwise(x, geometry):
            shape, size = _shape(x, geometry)
            image, middle, offset = _image(x, dtype), _float(centre[:, 0]), _float(mean - centre)
            dx = empty_map(*image.shape, dtype=dtype)
            tables = (middle, weight, square, offset, _float(shift))
            call_kernel("depthwise_input_grad", g, after, image, _low(dtype), shape, size, *tables, top, dx)
            return dx.permute(0, 3, 1, 2).to(x.dtype)
        rows = self._rows(x, geometry)
        dx = empty_map(*rows.shape)
        constant = _float(shift.double() - (quad.double() @ (mean - centre)[..., None]).squeeze(-1))
        sizes = (*rows.shape, grad.shape[1])
        call_kernel("pointwise_input_grad", g, after, rows, *sizes, weight, _float(centre), square, constant, top, dx)
        return _unrows(dx, x, geometry).to(x.dtype)

    def _rows(self, x: Tensor, geometry: Geometry) -> Tensor:
        """(N, K): the patches, dense."""
        if is_pointwise(geometry):
            return _image(x).flatten(0, 2)
        if self._patches is None:
            (height, width), (shape, size) = _places(x, geometry), _shape(x, geometry)
            self._patches = empty_map(x.shape[0] * height * width, x.shape[1] * size * size)
            call_kernel("write_patches", _image(x), shape, size, self._patches)
        return self._patches


def _depthwise_moments(x: Tensor, geometry: Geometry) -> Moments:
    """The moments of depthwise patches: uncentred first, which is cheaper; again around the mean where it dominates."""
    dtype, (shape, size) = _map_dtype(x, geometry), _shape(x, geometry)
    image = _image(x, dtype)
    c, k, n = x.shape[1], size * size, x.shape[0] * math.prod(_places(x, geometry))
    centre = torch.zeros(c)
    for centred in (0, 1):
        total, products = _double(c, k), _double(c, k, k)
        call_kernel("depthwise_moments", image, _low(dtype), shape, size, centre, centred, total, products)
        moments = moments_from_sums(centre.double()[:, None], total, products, n)
        middle = moments.mean[:, k // 2]
        if not mean_dominates(middle, moments.covariance[:, k // 2, k // 2]):
            break
        centre = _float(middle)
    return moments


def mean_dominates(mean: Tensor, variance: Tensor) -> bool:
    """Whether the mean of some channel, both (C,), is so large that squares around zero would lose its variance."""
    return bool((mean.square() > _DOMINANT * variance).logical_and(mean != 0).any())


def moments_from_sums(centre: Tensor, total: Tensor, products: Tensor, n: int) -> Moments:
    """Moments from sums over n patches, both around a centre."""
    off = total / n
    return Moments(centre + off, products.div_(n).baddbmm_(off[:, :, None], off[:, None], alpha=-1), n)


class PointwiseConv(torch.autograd.Function):
    """A pointwise convolution (B, I, H, W) x (O, I, 1, 1) -> (B, O, H, W), and its input as a second output.

    Another user of the input takes the second output instead: then both gradients are added in one pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution, and x."""
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return _product(x, weight.detach().flatten(1)), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, other: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of input, from both outputs, and weight."""
        x, weight = ctx.saved_tensors
        if grad is None:
            return other, None
        products = _image(grad).flatten(0, 2).T @ _image(x).flatten(0, 2)
        dx = _product(grad, weight.flatten(1).T, other) if ctx.needs_input_grad[0] else None
        return dx, products.to(weight.dtype).view_as(weight)


def _product(x: Tensor, weight: Tensor, addend: Tensor | None = None) -> Tensor:
    """weight (O, I) times each pixel of (B, I, H, W), plus `addend`: (B, O, H, W).

    It is the library's product, which is quicker than ours; where there is something to add, of wide maps only.
    """
    (b, c, h, w), out = x.shape, len(weight)
    rows, y = _image(x).view(-1, c), empty_map(b * h * w, out)
    if addend is None:
        torch.mm(rows, _float(weight).T, out=y)
    elif c >= _WIDE:
        torch.addmm(_image(addend).view(-1, out), rows, _float(weight).T, out=y)
    else:
        more, zeros = _image(addend), torch.zeros(max(c, out))
        call_kernel(
            "pointwise_convolve", rows, *rows.shape, zeros, _float(weight), zeros, out, -1.0, more.data_ptr(), y
        )
    return y.view(b, h, w, out).permute(0, 3, 1, 2)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (B, C, H, W), in float64."""
    rows = _image(x).flatten(0, 2)
    n, c = rows.shape
    centre, total, squares = rows[:_PILOT_ROWS].mean(0), _double(c), _double(c)
    call_kernel("column_moments", rows, n, c, centre, total, squares)
    off = total / n
    return centre + off, (squares / n - off.square()).clamp_min_(0)


def normalized_sum(maps: Sequence[Tensor], mean: Tensor, gain: Tensor, bias: Tensor, act: ClampMax) -> Tensor:
    """act(bias + sum over maps of gain (map - mean)); maps (B, C, H, W), mean and gain (M, C), bias (C,)."""
    images = [_image(m) for m in maps]
    out = empty_map(*images[0].shape)
    c = out.shape[-1]
    tables = (_float(mean), _float(gain), _float(bias))
    call_kernel("mix", data_pointers(images), len(maps), out.numel() // c, c, *tables, clamp_bound(act), out)
    return out.permute(0, 3, 1, 2)


def normalized_sum_backward_sums(
    grad: Tensor, y: Tensor, maps: Sequence[Tensor], mean: Tensor, act: ClampMax
) -> Tensor:
    """Sums over places of grad' (map - mean) for each map, then of grad': (M + 1, C), in float64."""
    images, g, after = [_image(m) for m in maps], _image(grad), _image(y)
    c = g.shape[-1]
    sums = _double(len(maps) + 1, c)
    call_kernel(
        "mix_sums", g, after, data_pointers(images), len(maps), g.numel() // c, c, _float(mean), clamp_bound(act), sums
    )
    return sums


def normalized_sum_backward(
    grad: Tensor,
    y: Tensor,
    maps: Sequence[Tensor],
    mean: Tensor,
    gain: Tensor,
    slope: Tensor,
    constant: Tensor,
    act: ClampMax,
) -> list[Tensor]:
    """gain grad' + slope (map - mean) + constant, for each map; tables (M, C)."""
    images, g, after = [_image(m) for m in maps], _image(grad), _image(y)
    grads = [empty_map(*g.shape) for _ in maps]
    tables = [_float(table) for table in (mean, gain, slope, constant)]
    c = g.shape[-1]
    call_kernel(
        "mix_back",
        g,
        after,
        data_pointers(images),
        len(maps),
        g.numel() // c,
        c,
        *tables,
        clamp_bound(act),
        data_pointers(grads),
    )
    return [d.permute(0, 3, 1, 2) for d in grads]


def data_pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """An array of the addresses of tensors, 0 for None."""
    return (ctypes.c_void_p * len(tensors))(*(0 if t is None else t.data_ptr() for t in tensors))


def is_pointwise(geometry: Geometry) -> bool:
    """Whether each place reads one pixel, in one group."""
    return geometry == Geometry(1, (1, 1), (1, 1), (0, 0))


def _is_depthwise(x: Tensor, geometry: Geometry) -> bool:
    size, padding = geometry.kernel_size[0], geometry.padding[0]
    return _is_square(geometry) and geometry.groups == x.shape[1] > 1 and size in _KERNEL_SIZES and padding < size


def _is_square(geometry: Geometry) -> bool:
    return all(pair[0] == pair[1] for pair in (geometry.kernel_size, geometry.stride, geometry.padding))


def _is_small(x: Tensor, geometry: Geometry) -> bool:
    return (
        _is_square(geometry)
        and geometry.groups == 1
        and x.shape[1] * geometry.kernel_size[0] * geometry.kernel_size[1] <= _MAX_PATCH
    )


def _map_dtype(x: Tensor, geometry: Geometry) -> torch.dtype:
    """What a unit's maps are for the kernels: bfloat16 for 3 x 3 depthwise ones that come so, else float32."""
    low = x.dtype is torch.bfloat16 and _is_depthwise(x, geometry) and geometry.kernel_size[0] == 3
    return torch.bfloat16 if low else torch.float32


def _low(dtype: torch.dtype) -> int:
    return int(dtype is torch.bfloat16)


def _image(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, C, H, W) to a contiguous (B, H, W, C) of this type; what is channels_last and of it is not copied."""
    return x.detach().permute(0, 2, 3, 1).to(dtype).contiguous()


def _unrows(rows: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The transpose of `_rows`."""
    b, _, h, w = x.shape
    if is_pointwise(geometry):
        return rows.view(b, h, w, -1).permute(0, 3, 1, 2)
    columns = rows.view(b, -1, rows.shape[1]).transpose(1, 2)
    return F.fold(columns, (h, w), geometry.kernel_size, 1, geometry.padding, geometry.stride)


def _places(x: Tensor, geometry: Geometry) -> tuple[int, int]:
    """The size of the output (H', W')."""
    height, width = (
        (n + 2 * r - k) // s + 1
        for n, r, k, s in zip(x.shape[2:], geometry.padding, geometry.kernel_size, geometry.stride, strict=True)
    )
    return height, width


def _centre(x: Tensor, mean: Tensor, geometry: Geometry) -> Tensor:
    """The float32 centre that the kernels subtract, as float64 (G, K): of a depthwise patch one value a channel."""
    if _is_depthwise(x, geometry):
        return mean[:, mean.shape[1] // 2].float().double()[:, None].expand_as(mean)
    return mean.float().double()


def _shape(x: Tensor, geometry: Geometry) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    """Sizes of the image, stride and padding as the kernels take them, and the kernel size."""
    b, c, h, w = x.shape
    return (ctypes.c_int64 * 6)(b, h, w, c, geometry.stride[0], geometry.padding[0]), geometry.kernel_size[0]


def clamp_bound(act: ClampMax) -> float:
    """The upper bound of the activation as the kernels take it: negative where there is none."""
    return -1.0 if act is None else act


def _float(values: Tensor) -> Tensor:
    return values.detach().to(torch.float32).contiguous()


def _double(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float64)


def call_kernel(name: str, *arguments: Tensor | int | float | ctypes.Array[Any]) -> None:
    """Run a kernel on all of torch's threads: tensors and arrays go by address, int as int64, float as float32."""
    kernel = _kernel(name, tuple(map(type, arguments)))
    kernel(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


@cache
def _kernel(name: str, kinds: tuple[type, ...]) -> Callable[..., None]:
    """A kernel with the types of its arguments set."""
    kernels = load_kernels()
    assert kernels is not None
    kernel = kernels[name]  # indexing gives a new object, so that types of one call do not change another
    numbers: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_float}
    kernel.argtypes = [*(numbers.get(kind, ctypes.c_void_p) for kind in kinds), ctypes.c_int]
    kernel.restype = None
    return kernel


# -------------------------------------------- memory for maps: kept when one is freed, for the next of its size


def empty_map(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of any content, float32 or bfloat16. Needs the compiled library, without which no map is written."""
    count = math.prod(shape)
    if dtype is torch.bfloat16:
        return empty_map((count + 1) // 2).view(dtype)[:count].view(*shape)
    if count < _SMALLEST_MAP:
        return torch.empty(*shape)
    make, capsule = _makers()
    address = make(count)
    if not address:
        raise MemoryError(f"no memory for a map of {count} floats")
    y: Tensor = from_dlpack(capsule(address, b"dltensor", None))
    return y.view(*shape)


@cache
def _makers() -> tuple[Callable[[int], int], Callable[[int, bytes, None], object]]:
    """The library's allocator, and python's maker of capsules."""
    kernels = load_kernels()
    assert kernels is not None
    make = kernels["new_map"]
    make.argtypes, make.restype = [ctypes.c_int64], ctypes.c_void_p
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return make, prototype(("PyCapsule_New", ctypes.pythonapi))


def release_cached_memory() -> None:
    """Give the memory that waits for a next map back to the system; maps in use stay."""
    kernels = load_kernels()
    if kernels is not None:
        kernels["drop_maps"]()
