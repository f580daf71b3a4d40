"""The four passes on a GPU for pointwise units, in Triton.

A pointwise unit is a matrix product: its patches are the rows of the map, one a place. In channels_last all places of
the batch are one such matrix (the fast case); else each image is a matrix, transposed.

Shapes: B batch, I and O input and output channels, N places of the batch.
"""

from __future__ import annotations

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
    gram_block_size,
    jit,
    matmul_add,
    matmul_block_size,
    memory_format_of,
    num_reduction_parts,
    tensor,
    tl,
)


@jit
def _tile(
    x: tensor, tile: tensor, c: tensor, places: tensor, channels: tensor, block_n: constexpr, channels_last: constexpr
) -> tensor:
    """Where the values of block_n places lie (block_n, channels), and which there are."""
    tiles = tl.cdiv(places, block_n)  # of an image
    image = tile // tiles
    first = (tile - image * tiles) * block_n
    n = tl.arange(0, block_n)
    across = channels if channels_last else 1
    apart = 1 if channels_last else places
    start = x + image.to(tl.int64) * (channels * places) + first.to(tl.int64) * across
    return start + (n[:, None] * across + c[None, :] * apart), (first + n < places)[:, None] & (c < channels)[None, :]


@jit
def _block(matrix: tensor, row: tensor, column: tensor, rows: tensor, columns: tensor) -> tensor:
    """A block of a matrix in memory order, zero outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row[:, None] * columns + column[None, :], mask=inside, other=0.0)


@jit
def _gradient(
    grad: tensor, y: tensor, act_max: tensor, clamp: constexpr, tile: tensor, o: tensor,
    places: tensor, outputs: tensor, block_n: constexpr, channels_last: constexpr,
) -> tensor:  # fmt: skip
    """What the clamp lets through of the gradient at block_n places (block_n, outputs)."""
    pointer, inside = _tile(grad, tile, o, places, outputs, block_n, channels_last)
    value = tl.load(pointer, mask=inside, other=0.0)
    if clamp:
        pointer, inside = _tile(y, tile, o, places, outputs, block_n, channels_last)
        value = clamp_grad(value, tl.load(pointer, mask=inside, other=0.0), act_max)
    return value


@jit
def _centred(
    x: tensor, shifts: tensor, tile: tensor, c: tensor,
    places: tensor, channels: tensor, block_n: constexpr, channels_last: constexpr,
) -> tensor:  # fmt: skip
    """x less the shift at block_n places (block_n, channels), in its own dtype; zero outside."""
    pointer, inside = _tile(x, tile, c, places, channels, block_n, channels_last)
    shift = tl.load(shifts + c, mask=c < channels, other=0.0)
    value = tl.load(pointer, mask=inside, other=0.0).to(tl.float32) - shift[None, :]
    return tl.where(inside, value, 0.0).to(x.dtype.element_ty)


@jit
def _moments_kernel(
    x: tensor, shifts: tensor, second: tensor, first: tensor, tiles: tensor,
    places: tensor, channels: tensor, channels_last: constexpr,
    block_n: constexpr, block_a: constexpr, block_b: constexpr,
) -> None:  # fmt: skip
    """Products of two blocks of channels over this program's places; the lower triangle is left as it is."""
    if tl.program_id(0) > tl.program_id(1):
        return
    a = tl.program_id(0) * block_a + tl.arange(0, block_a)
    b = tl.program_id(1) * block_b + tl.arange(0, block_b)
    total = tl.zeros((block_a, block_b), tl.float32)
    sums = tl.zeros((block_b,), tl.float32)
    for tile in range(tl.program_id(2), tiles, tl.num_programs(2)):
        left = _centred(x, shifts, tile, a, places, channels, block_n, channels_last)
        right = _centred(x, shifts, tile, b, places, channels, block_n, channels_last)
        total = matmul_add(tl.trans(left), right, total)
        sums += tl.sum(right.to(tl.float32), 0)
    inside = (a < channels)[:, None] & (b < channels)[None, :]
    row = tl.program_id(2) * channels
    tl.store(second + (row + a[:, None]) * channels + b[None, :], total, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(first + row + b, sums, mask=b < channels)


@jit
def _convolve_kernel(
    x: tensor, kernel: tensor, offset: tensor, y: tensor, act_max: tensor, clamp: constexpr, outputs: tensor,
    places: tensor, channels: tensor, channels_last: constexpr,
    block_n: constexpr, block_k: constexpr, block_b: constexpr,
) -> None:  # fmt: skip
    """Rows of x times the kernel (O, I); programs with the same rows are neighbours."""
    across = tl.cdiv(outputs, block_b)
    tile = tl.program_id(0) // across
    o = (tl.program_id(0) - tile * across) * block_b + tl.arange(0, block_b)
    total = tl.zeros((block_n, block_b), tl.float32)
    for start in range(0, channels, block_k):
        k = start + tl.arange(0, block_k)
        pointer, inside = _tile(x, tile, k, places, channels, block_n, channels_last)
        weight = _block(kernel, o, k, outputs, channels)
        total = matmul_add(tl.load(pointer, mask=inside, other=0.0), tl.trans(weight), total)
    total += tl.load(offset + o, mask=o < outputs, other=0.0)[None, :]
    if clamp:
        total = clamp_activation(total, act_max)
    pointer, inside = _tile(y, tile, o, places, outputs, block_n, channels_last)
    tl.store(pointer, total.to(y.dtype.element_ty), mask=inside)


@jit
def _kernel_grad_kernel(
    x: tensor, shifts: tensor, centred: constexpr, grad: tensor, y: tensor, products: tensor, sums: tensor,
    act_max: tensor, clamp: constexpr, outputs: tensor, tiles: tensor,
    places: tensor, channels: tensor, channels_last: constexpr,
    block_n: constexpr, block_a: constexpr, block_b: constexpr,
) -> None:  # fmt: skip
    """Products of the gradient and x over this program's places."""
    o = tl.program_id(0) * block_a + tl.arange(0, block_a)
    c = tl.program_id(1) * block_b + tl.arange(0, block_b)
    total = tl.zeros((block_a, block_b), tl.float32)
    bias = tl.zeros((block_a,), tl.float32)
    for tile in range(tl.program_id(2), tiles, tl.num_programs(2)):
        value = _gradient(grad, y, act_max, clamp, tile, o, places, outputs, block_n, channels_last)
        if centred:
            right = _centred(x, shifts, tile, c, places, channels, block_n, channels_last)
        else:
            pointer, inside = _tile(x, tile, c, places, channels, block_n, channels_last)
            right = tl.load(pointer, mask=inside, other=0.0)
        total = matmul_add(tl.trans(value.to(right.dtype)), right, total)
        bias += tl.sum(value.to(tl.float32), 0)
    row = tl.program_id(2) * outputs
    inside = (o < outputs)[:, None] & (c < channels)[None, :]
    tl.store(products + (row + o[:, None]) * channels + c[None, :], total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sums + row + o, bias, mask=o < outputs)


@jit
def _input_grad_kernel(
    x: tensor, grad: tensor, y: tensor, kernel: tensor, quad: tensor, scale: tensor, offset: tensor, dx: tensor,
    act_max: tensor, clamp: constexpr, outputs: tensor,
    places: tensor, channels: tensor, channels_last: constexpr,
    block_n: constexpr, block_k: constexpr, block_b: constexpr,
) -> None:  # fmt: skip
    """Rows of x times quad^T, and rows of the gradient times the kernel (O, I)."""
    across = tl.cdiv(channels, block_b)
    tile = tl.program_id(0) // across
    c = (tl.program_id(0) - tile * across) * block_b + tl.arange(0, block_b)
    total = tl.zeros((block_n, block_b), tl.float32)
    for start in range(0, channels, block_k):
        k = start + tl.arange(0, block_k)
        pointer, inside = _tile(x, tile, k, places, channels, block_n, channels_last)
        weight = _block(quad, c, k, channels, channels)
        total = matmul_add(tl.load(pointer, mask=inside, other=0.0), tl.trans(weight), total)
    total = total * tl.load(scale)
    for start in range(0, outputs, block_k):
        o = start + tl.arange(0, block_k)
        value = _gradient(grad, y, act_max, clamp, tile, o, places, outputs, block_n, channels_last)
        weight = _block(kernel, o, c, outputs, channels)
        total = matmul_add(value.to(weight.dtype), weight, total)
    total += tl.load(offset + c, mask=c < channels, other=0.0)[None, :]
    pointer, inside = _tile(dx, tile, c, places, channels, block_n, channels_last)
    tl.store(pointer, total.to(dx.dtype.element_ty), mask=inside)


class TritonPointwise:
    """The passes of units that mix the channels of a place. The mean is taken off the products, not off each value."""

    def moments(self, x: Tensor, geometry: Geometry) -> Moments:
        """Mean and covariance of the rows; those of a half-precision x are of its differences from the pilot."""
        x = x.contiguous(memory_format=memory_format_of(x))
        channels, sizes, block = x.shape[1], _sizes(x), gram_block_size(x, x.shape[1], x.shape[1])
        tiles, across, shift = _num_tiles(x, block), -(-channels // block["block_a"]), approximate_mean(x)
        parts = num_reduction_parts(tiles, across**2)
        second, first = shift.new_empty(parts, channels, channels), shift.new_empty(parts, channels)
        with torch.cuda.device_of(x):
            _moments_kernel[across, across, parts](x, shift, second, first, tiles, **sizes, **block)
        count = x.numel() // channels
        mean = first.sum(0, dtype=torch.float64) / count
        upper = second.sum(0, dtype=torch.float64) / count
        covariance = upper.triu() + upper.triu(1).mT - mean[:, None] * mean
        return Moments((mean + shift)[None], covariance[None], count)

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> Tensor:
        """act(bias + kernel (row - mean)): (B, O, H, W)."""
        x = x.contiguous(memory_format=memory_format_of(x))
        weight, (act_max, clamp) = kernel[0].to(x.dtype).contiguous(), clamp_limits(act)
        offset = (bias.double() - weight.double() @ mean[0].double()).float()
        outputs, sizes = len(weight), _sizes(x)
        block = matmul_block_size(x, sizes["places"], outputs)
        shape = (x.shape[0], outputs, *x.shape[2:])
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
        grid = (_num_tiles(x, block) * -(-outputs // block["block_b"]),)
        with torch.cuda.device_of(x):
            _convolve_kernel[grid](x, weight, offset, y, act_max, clamp, outputs, **sizes, **block)
        return y

    def kernel_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> tuple[Tensor, Tensor]:
        """Sum over places of grad' (row - mean)^T (1, O, I), and of grad' (O,), in float64."""
        x, grad, y = (m.contiguous(memory_format=memory_format_of(x)) for m in (x, grad, y))
        (outputs, channels), (act_max, clamp) = (grad.shape[1], x.shape[1]), clamp_limits(act)
        block = gram_block_size(x, outputs, channels)
        tiles, down, across = _num_tiles(x, block), -(-outputs // block["block_a"]), -(-channels // block["block_b"])
        parts = num_reduction_parts(tiles, down * across)
        centred = x.dtype == torch.float32  # half-precision values multiply exactly, their differences would not
        shift = mean[0].float() if centred else mean.new_zeros(channels, dtype=torch.float32)
        products, sums = shift.new_empty(parts, outputs, channels), shift.new_empty(parts, outputs)
        with torch.cuda.device_of(x):
            _kernel_grad_kernel[down, across, parts](
                x, shift, centred, grad, y, products, sums, act_max, clamp, outputs, tiles, **_sizes(x), **block
            )
        total, bias = products.sum(0, dtype=torch.float64), sums.sum(0, dtype=torch.float64)
        return (total - bias[:, None] * (mean[0].double() - shift))[None], bias

    def input_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, kernel: Tensor, mean: Tensor, quad: Tensor, shift: Tensor,
        geometry: Geometry, act: ClampMax,
    ) -> Tensor:  # fmt: skip
        """The rows' gradient kernel^T grad' + quad (row - mean) + shift, in the shape of x."""
        x, grad, y = (m.contiguous(memory_format=memory_format_of(x)) for m in (x, grad, y))
        (outputs, channels), (act_max, clamp) = (grad.shape[1], x.shape[1]), clamp_limits(act)
        scale = quad.abs().amax().clamp_min(1e-30).float()  # a batch's quad may be below float16's least
        weight, square = kernel[0].to(x.dtype).contiguous(), (quad[0] / scale).to(x.dtype).contiguous()
        offset = (shift[0].double() - scale.double() * (square.double() @ mean[0].double())).float()
        sizes, dx = _sizes(x), torch.empty_like(x, memory_format=memory_format_of(x))
        block = matmul_block_size(x, sizes["places"], channels)
        grid = (_num_tiles(x, block) * -(-channels // block["block_b"]),)
        with torch.cuda.device_of(x):
            _input_grad_kernel[grid](
                x, grad, y, weight, square, scale, offset, dx, act_max, clamp, outputs, **sizes, **block
            )
        return dx


def _sizes(x: Tensor) -> LaunchOptions:
    """How the map lies: the places of an image, and in channels_last all images are one."""
    last = memory_format_of(x) == torch.channels_last
    places = x.shape[2] * x.shape[3] * (x.shape[0] if last else 1)
    return {"places": places, "channels": x.shape[1], "channels_last": last}


def _num_tiles(x: Tensor, block: LaunchOptions) -> int:
    """Blocks of places in the batch."""
    places = _sizes(x)["places"]
    return -(-places // block["block_n"]) * (x.numel() // (x.shape[1] * places))
