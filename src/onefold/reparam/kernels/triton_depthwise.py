"""The four passes on a GPU for depthwise units, in Triton: kernels of any size, stride and padding.

A program works on a block of channels at a block of places; what it reads more than once comes from the cache.

Shapes: B batch, C channels, M outputs a channel, O = C M, T entries of a kernel (taps), N places of the output over
the batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from onefold.reparam.kernels.base import ClampMax, Geometry, Moments
from onefold.reparam.kernels.triton_base import (
    LaunchOptions,
    approximate_mean,
    clamp_activation,
    clamp_grad,
    clamp_limits,
    constexpr,
    decode_position,
    element_offset,
    feature_map_block_size,
    jit,
    launch_grid,
    load_patches,
    load_pixels,
    matmul_add,
    memory_format_of,
    patch_block_size,
    reduction_grid,
    tensor,
    tl,
)


@jit
def _moments_kernel(
    x: tensor, shifts: tensor, partial: tensor, by_tap: constexpr,
    places: tensor, channels: tensor, height: tensor, width: tensor, rows: tensor, columns: tensor,
    kernel_h: constexpr, kernel_w: constexpr, stride_h: constexpr, stride_w: constexpr,
    pad_h: constexpr, pad_w: constexpr, channels_last: constexpr, block_t: constexpr,
    block_p: constexpr, block_c: constexpr,
) -> None:  # fmt: skip
    """Products of the patches' taps and a one, (block_c, block_t, block_t), over this program's places."""
    c = (tl.program_id(0) * block_c + tl.arange(0, block_c))[:, None, None]
    t = tl.arange(0, block_t)[None, :, None]
    shift = tl.load(shifts + c, mask=c < channels, other=0.0)
    one = tl.zeros((1, 1, 1), tl.int32) + tl.program_id(2)
    total = tl.zeros((block_c, block_t, block_p if by_tap else block_t), tl.float32)
    for first in range(tl.program_id(1) * block_p, places, tl.num_programs(1) * block_p):
        p = (first + tl.arange(0, block_p))[None, None, :]
        real = (p < places) & (c < channels)
        image, row, column = decode_position(p, rows, columns)
        block = load_patches(
            x, shift, image, row, column, c, t, real, channels, height, width,
            kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, channels_last,
        )  # fmt: skip
        if by_tap:
            total += block * load_patches(
                x, shift, image, row, column, c, one, real, channels, height, width,
                kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, channels_last,
            )  # fmt: skip
        else:
            block = block.to(x.dtype.element_ty)
            total = matmul_add(block, tl.permute(block, (0, 2, 1)), total)
    to = partial + ((tl.program_id(1) * channels + c) * block_t + t) * block_t
    if by_tap:
        tl.store(to + one, tl.sum(total, 2, keep_dims=True), mask=c < channels)
    else:
        tl.store(to + tl.arange(0, block_t)[None, None, :], total, mask=c < channels)


@jit
def _convolve_kernel(
    x: tensor, kernel: tensor, offset: tensor, y: tensor, act_max: tensor, clamp: constexpr, times: constexpr,
    places: tensor, channels: tensor, height: tensor, width: tensor, rows: tensor, columns: tensor,
    kernel_h: constexpr, kernel_w: constexpr, stride_h: constexpr, stride_w: constexpr,
    pad_h: constexpr, pad_w: constexpr, channels_last: constexpr,
    block_p: constexpr, block_c: constexpr,
) -> None:  # fmt: skip
    """The convolution at block_p places, one of the `times` outputs of each channel."""
    p = (tl.program_id(0) * block_p + tl.arange(0, block_p))[:, None]
    c = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    o = c if times == 1 else c * times + tl.program_id(2)  # a known 0: whole vectors are read
    real = (p < places) & (c < channels)
    image, row, column = decode_position(p, rows, columns)
    total = tl.zeros((block_p, block_c), tl.float32) + tl.load(offset + o, mask=c < channels, other=0.0)
    for ti in range(kernel_h):
        for tj in tl.static_range(kernel_w):
            i, j = row * stride_h + (ti - pad_h), column * stride_w + (tj - pad_w)
            weight = tl.load(kernel + (ti * kernel_w + tj) * channels * times + o, mask=c < channels, other=0.0)
            total += weight * load_pixels(x, real, image, i, j, c, channels, height, width, channels_last)
    if clamp:
        total = clamp_activation(total, act_max)
    to = element_offset(image, row, column, o, channels * times, rows, columns, channels_last)
    tl.store(y + to, total.to(y.dtype.element_ty), mask=real)


@jit
def _kernel_grad_kernel(
    x: tensor, shifts: tensor, grad: tensor, y: tensor, partial: tensor,
    act_max: tensor, clamp: constexpr, times: constexpr,
    places: tensor, channels: tensor, height: tensor, width: tensor, rows: tensor, columns: tensor,
    kernel_h: constexpr, kernel_w: constexpr, stride_h: constexpr, stride_w: constexpr,
    pad_h: constexpr, pad_w: constexpr, channels_last: constexpr, block_t: constexpr,
    block_p: constexpr, block_c: constexpr,
) -> None:  # fmt: skip
    """The gradient's products with the patches and a one, (block_c, block_t), over this program's places."""
    c = (tl.program_id(0) * block_c + tl.arange(0, block_c))[:, None, None]
    t = tl.arange(0, block_t)[None, :, None]
    o = c if times == 1 else c * times + tl.program_id(2)  # a known 0: whole vectors are read
    shift = tl.load(shifts + c, mask=c < channels, other=0.0)
    total = tl.zeros((block_c, block_t, block_p), tl.float32)
    for first in range(tl.program_id(1) * block_p, places, tl.num_programs(1) * block_p):
        p = (first + tl.arange(0, block_p))[None, None, :]
        real = (p < places) & (c < channels)
        image, row, column = decode_position(p, rows, columns)
        block = load_patches(
            x, shift, image, row, column, c, t, real, channels, height, width,
            kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, channels_last,
        )  # fmt: skip
        value = load_pixels(grad, real, image, row, column, o, channels * times, rows, columns, channels_last)
        if clamp:
            kept = load_pixels(y, real, image, row, column, o, channels * times, rows, columns, channels_last)
            value = clamp_grad(value, kept, act_max)
        total += block * value
    to = ((tl.program_id(1) * times + tl.program_id(2)) * channels + c) * block_t + t
    tl.store(partial + to, tl.sum(total, 2, keep_dims=True), mask=c < channels)


@jit
def _kind(row: tensor, size: tensor, low: tensor, kinds: tensor, stride: constexpr) -> tensor:
    """The kind of a row, as `_readers` numbers them."""
    middle = tl.where(row < size - (kinds - low - stride), low + (row - low) % stride, row - (size - kinds))
    return tl.where(row < low, row, middle)


@jit
def _input_grad_kernel(
    x: tensor, grad: tensor, y: tensor, kernel: tensor, table: tensor, dx: tensor,
    act_max: tensor, clamp: constexpr, times: constexpr,
    low_h: tensor, kinds_h: tensor, low_w: tensor, kinds_w: tensor,
    places: tensor, channels: tensor, height: tensor, width: tensor, rows: tensor, columns: tensor,
    kernel_h: constexpr, kernel_w: constexpr, stride_h: constexpr, stride_w: constexpr,
    pad_h: constexpr, pad_w: constexpr, channels_last: constexpr,
    block_p: constexpr, block_c: constexpr,
) -> None:  # fmt: skip
    """The gradient at block_p pixels: what is around, by `_table`; and the gradient of the places that read them."""
    p = (tl.program_id(0) * block_p + tl.arange(0, block_p))[:, None]
    c = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    real = (p < places) & (c < channels)
    image, i, j = decode_position(p, height, width)
    lags: constexpr = (2 * kernel_h - 1) * (2 * kernel_w - 1)
    kind = _kind(i, height, low_h, kinds_h, stride_h) * kinds_w + _kind(j, width, low_w, kinds_w, stride_w)
    entry = table + kind * (lags + 1) * channels + c
    total = tl.load(entry + lags * channels, mask=real, other=0.0)
    for di in range(2 * kernel_h - 1):  # not unrolled: all loads of all rows at once do not fit the registers
        for dj in tl.static_range(2 * kernel_w - 1):
            row, column = i + (di - (kernel_h - 1)), j + (dj - (kernel_w - 1))
            value = load_pixels(x, real, image, row, column, c, channels, height, width, channels_last)
            lag = di * (2 * kernel_w - 1) + dj
            total += value * tl.load(entry + lag * channels, mask=real, other=0.0)
    for ti in range(kernel_h):
        for tj in tl.static_range(kernel_w):
            u, v = i + (pad_h - ti), j + (pad_w - tj)
            reads = real & (u >= 0) & (v >= 0) & (u % stride_h == 0) & (v % stride_w == 0)
            row, column = u // stride_h, v // stride_w
            for m in tl.static_range(times):
                o = c * times + m
                value = load_pixels(grad, reads, image, row, column, o, channels * times, rows, columns, channels_last)
                if clamp:
                    kept = load_pixels(y, reads, image, row, column, o, channels * times, rows, columns, channels_last)
                    value = clamp_grad(value, kept, act_max)
                weight = tl.load(kernel + (ti * kernel_w + tj) * channels * times + o, mask=c < channels, other=0.0)
                total += value * weight
    tl.store(
        dx + element_offset(image, i, j, c, channels, height, width, channels_last),
        total.to(dx.dtype.element_ty),
        mask=real,
    )


class TritonDepthwise:
    """The passes of units with one kernel, or some, for each channel."""

    def moments(self, x: Tensor, geometry: Geometry) -> Moments:
        """Mean and covariance of the patches; those of a half-precision x are of its differences from the pilot."""
        x = x.contiguous(memory_format=memory_format_of(x))
        shift, sizes, block = approximate_mean(x), _sizes(x, geometry), patch_block_size(x, geometry)
        taps = geometry.kernel_size[0] * geometry.kernel_size[1]
        by_tap = x.dtype == torch.float32  # a program a tap: there are no tensor cores for all pairs at once
        grid = (*reduction_grid(sizes, block), taps if by_tap else 1)
        partial = shift.new_empty(grid[1], x.shape[1], block["block_t"], block["block_t"])
        with torch.cuda.device_of(x):
            _moments_kernel[grid](x, shift, partial, by_tap, **sizes, **block)
        total = partial.sum(0, dtype=torch.float64)[:, : taps + 1, :taps] / sizes["places"]
        mean, second = total[:, taps], total[:, :taps]
        return Moments(mean + shift[:, None], second - mean[:, :, None] * mean[:, None], sizes["places"])

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> Tensor:
        """act(bias + kernel (patch - mean)): (B, O, H', W'); the kernel stays in float32."""
        x = x.contiguous(memory_format=memory_format_of(x))
        sizes, times, (act_max, clamp) = _sizes(x, geometry), kernel.shape[1], clamp_limits(act)
        block = feature_map_block_size(x, sizes["places"])
        kernel, weight = kernel.double(), _by_tap(kernel)
        offset = bias - (kernel @ mean.to(kernel)[..., None]).flatten()
        shape = (x.shape[0], x.shape[1] * times, sizes["rows"], sizes["columns"])
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
        grid = (*launch_grid(sizes, block), times)
        with torch.cuda.device_of(x):
            _convolve_kernel[grid](x, weight, offset.float(), y, act_max, clamp, times, **sizes, **block)
        return y

    def kernel_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> tuple[Tensor, Tensor]:
        """Sum over places of grad' (patch - mean)^T (C, M, T), and of grad' (O,), in float64."""
        x, grad, y = (m.contiguous(memory_format=memory_format_of(x)) for m in (x, grad, y))
        sizes, block, (act_max, clamp) = _sizes(x, geometry), patch_block_size(x, geometry), clamp_limits(act)
        times = grad.shape[1] // x.shape[1]
        shift = mean.mean(1).float()
        grid = (*reduction_grid(sizes, block), times)
        partial = shift.new_empty(grid[1], times, x.shape[1], block["block_t"])
        with torch.cuda.device_of(x):
            _kernel_grad_kernel[grid](x, shift, grad, y, partial, act_max, clamp, times, **sizes, **block)
        total = partial.sum(0, dtype=torch.float64).transpose(0, 1)
        taps = mean.shape[1]
        sums = total[..., taps]
        rest = mean.double() - shift.double()[:, None]
        return total[..., :taps] - sums[..., None] * rest[:, None], sums.flatten()

    def input_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, kernel: Tensor, mean: Tensor, quad: Tensor, shift: Tensor,
        geometry: Geometry, act: ClampMax,
    ) -> Tensor:  # fmt: skip
        """The patches' gradient kernel^T grad' + quad (patch - mean) + shift, gathered by the pixels."""
        x, grad, y = (m.contiguous(memory_format=memory_format_of(x)) for m in (x, grad, y))
        sizes, times, (act_max, clamp) = _sizes(x, geometry), kernel.shape[1], clamp_limits(act)
        high, wide = (
            _readers(size, out, *along, x.device)
            for size, out, *along in zip(
                x.shape[2:], grad.shape[2:], geometry.kernel_size, geometry.stride, geometry.padding, strict=True
            )
        )
        constant = shift.double() - (quad.double() @ mean.double()[..., None]).squeeze(-1)
        table = _table(quad.double(), constant, high, wide)
        sizes["places"] = x.shape[0] * x.shape[2] * x.shape[3]
        block = feature_map_block_size(x, sizes["places"])
        dx = torch.empty_like(x, memory_format=memory_format_of(x))
        kinds = (high.low, len(high.reads), wide.low, len(wide.reads))
        with torch.cuda.device_of(x):
            _input_grad_kernel[launch_grid(sizes, block)](
                x, grad, y, _by_tap(kernel), table, dx, act_max, clamp, times, *kinds, **sizes, **block
            )
        return dx


class _Readers(NamedTuple):
    """Which taps read a row (or a column), for each kind of row.

    The first `low` rows are a kind each, then come `stride` kinds in turn, and the last rows are a kind each again.
    """

    low: int
    reads: Tensor  # (kinds, taps): 1 where the tap reads such a row from a place of the output
    lagged: Tensor  # (kinds, taps, taps, lags): the same, where the second tap lies at the lag from the first


@lru_cache(maxsize=256)
def _readers(size: int, out: int, taps: int, stride: int, padding: int, device: torch.device) -> _Readers:
    """The kinds of `size` rows that `out` places read."""
    low = max(0, taps - 1 - padding)
    kinds = low + stride + max(0, size - 1 + padding - (out - 1) * stride)
    if kinds >= size:
        low = kinds = size
    rows = torch.arange(kinds, device=device)
    rows = torch.where(rows < low + stride, rows, rows + size - kinds)
    tap, lag = torch.arange(taps, device=device), torch.arange(1 - taps, taps, device=device)
    start = rows[:, None] + padding - tap
    reads = ((start >= 0) & (start % stride == 0) & (start < out * stride)).double()
    apart = (tap - tap[:, None])[..., None] == lag
    return _Readers(low, reads, reads[:, :, None, None] * apart)


def _table(quad: Tensor, constant: Tensor, high: _Readers, wide: _Readers) -> Tensor:
    """What a pixel gets from each pixel around it, and the constant: (kinds, kinds, lags + 1, C) in float32.

    The tap t of a place p reads the pixel q, the tap t' the pixel q + t' - t: so quad is a correlation, whose
    coefficients are sums of quad[t, t'] over the pairs at one lag, of the taps t that read q at all.
    """
    taps = (high.reads.shape[1], wide.reads.shape[1])
    quad = quad.unflatten(2, taps).unflatten(1, taps)
    table = torch.einsum("aipd,cijpq->adcjq", high.lagged, quad)
    table = torch.einsum("bjqe,adcjq->abdec", wide.lagged, table).flatten(2, 3)
    rest = torch.einsum("ai,bj,cij->abc", high.reads, wide.reads, constant.unflatten(1, taps))
    return torch.cat([table, rest[:, :, None]], 2).float()


def _by_tap(kernel: Tensor) -> Tensor:
    """(C, M, T) to (T, O) in float32."""
    return kernel.flatten(0, 1).t().float().contiguous()


def _sizes(x: Tensor, geometry: Geometry) -> LaunchOptions:
    """The sizes that the kernels take, by name."""
    (height, width), kernel, stride, pad = x.shape[2:], geometry.kernel_size, geometry.stride, geometry.padding
    rows = (height + 2 * pad[0] - kernel[0]) // stride[0] + 1
    columns = (width + 2 * pad[1] - kernel[1]) // stride[1] + 1
    return {
        "places": x.shape[0] * rows * columns, "channels": x.shape[1],
        "height": height, "width": width, "rows": rows, "columns": columns,
        "kernel_h": kernel[0], "kernel_w": kernel[1], "stride_h": stride[0], "stride_w": stride[1],
        "pad_h": pad[0], "pad_w": pad[1], "channels_last": memory_format_of(x) == torch.channels_last,
    }  # fmt: skip
