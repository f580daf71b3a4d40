"""What the Triton kernels share: which units they take, block sizes, memory formats, and arithmetic.

All sums are in float32 within a program; over programs they are partials, added up in float64. So there are no atomics,
and the same input gives the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from onefold.reparam.kernels.base import ClampMax, Geometry

if TYPE_CHECKING:  # triton has no types, and is not on every machine
    tl: Any
    constexpr: TypeAlias = Any
    tensor: TypeAlias = Any

    def jit(kernel: Callable[..., Any]) -> Any:
        """Compile a kernel when it is first launched."""
else:
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr, tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
POINTWISE = Geometry(1, (1, 1), (1, 1), (0, 0))  # every place is read by itself, all channels together
_PROGRAMS = 512  # that share a sum over the batch: some waves of a large GPU, and partials of a few megabytes
LaunchOptions = dict[str, Any]  # what a kernel takes by name
_WIDEN = tl.constexpr(_INTERPRETED)


def supports(x: Tensor, geometry: Geometry) -> bool:
    """Whether these passes can take x: a float batch on a CUDA device (any, in the interpreter), of a known unit."""
    if x.dim() != 4 or x.numel() == 0 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if not (x.is_cuda or _INTERPRETED):
        return False
    return geometry == POINTWISE or (geometry.groups == x.shape[1] and max(geometry.kernel_size) <= 7)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format that a pass on x works in, and answers in."""
    last = x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def approximate_mean(x: Tensor) -> Tensor:
    """About the mean of each channel (C,), from the first places: E[xx] - E[x]E[x] of what is left cancels little.

    It is a value of x's dtype: where the mean is large for the spread, the differences then are so too, and exact.
    """
    images = -(-1024 // (x.shape[2] * x.shape[3]))
    return x[:images].mean((0, 2, 3), dtype=torch.float32).to(x.dtype).float()


def clamp_limits(act: ClampMax) -> tuple[float, bool]:
    """The upper bound of the clamp, and whether there is a clamp."""
    return (0.0, False) if act is None else (float(act), True)


def feature_map_block_size(x: Tensor, places: int) -> LaunchOptions:
    """The block of a program that makes a depthwise map: 1024 values, along the memory."""
    block_c = min(64, _power_of_2(x.shape[1])) if memory_format_of(x) == torch.channels_last else 1
    return {"block_c": block_c, "block_p": min(1024 // block_c, _power_of_2(places)), "num_warps": 4, "num_stages": 1}


def patch_block_size(x: Tensor, geometry: Geometry) -> LaunchOptions:
    """The block of a program that sums patches: 8192 values, which is what the registers hold.

    One step at a time: Triton 3.2 cannot load three-dimensional blocks ahead.
    """
    last = memory_format_of(x) == torch.channels_last
    block_t = max(16, _power_of_2(geometry.kernel_size[0] * geometry.kernel_size[1] + 1))
    block_c = min(_power_of_2(x.shape[1]), max(1, 8192 // block_t**2 // (1 if last else 8)))
    block_p = 8192 // (block_t * block_c)
    return {"block_t": block_t, "block_c": block_c, "block_p": block_p, "num_warps": 4 if last else 8, "num_stages": 1}


def matmul_block_size(x: Tensor, places: int, columns: int) -> LaunchOptions:
    """The block of a program that multiplies the rows of a map by a matrix of so many columns."""
    block_n, block_b = (_side(x, size) for size in (places, columns))
    return {"block_n": block_n, "block_k": 32, "block_b": block_b, **_staged(block_n * block_b, 3)}


def gram_block_size(x: Tensor, rows: int, columns: int) -> LaunchOptions:
    """The block of a program that sums products of two maps over their places."""
    block_a, block_b = (_side(x, size) for size in (rows, columns))
    block_n = 32 if x.dtype == torch.float32 else 64
    return {"block_n": block_n, "block_a": block_a, "block_b": block_b, **_staged(block_a * block_b, 2)}


def num_reduction_parts(tiles: int, across: int) -> int:
    """In how many parts to sum over the batch, for `_PROGRAMS` in all."""
    return min(tiles, max(1, _PROGRAMS // across))


def launch_grid(sizes: LaunchOptions, block: LaunchOptions) -> tuple[int, int]:
    """Programs along the places and along the channels."""
    return -(-sizes["places"] // block["block_p"]), -(-sizes["channels"] // block["block_c"])


def reduction_grid(sizes: LaunchOptions, block: LaunchOptions) -> tuple[int, int]:
    """Programs along the channels, and as many parts of the places as make enough of them."""
    parts, across = launch_grid(sizes, block)
    return across, num_reduction_parts(parts, across)


def _side(x: Tensor, size: int) -> int:
    """The side of a block of products; without tensor cores the registers hold less."""
    return min(64 if x.dtype == torch.float32 else 128, max(16, _power_of_2(size)))


def _staged(sums: int, num_stages: int) -> LaunchOptions:
    """Threads for 64 sums each at the most, and how many steps ahead to load: what 99 KiB of shared memory hold."""
    return {"num_warps": 8 if sums > 8192 else 4, "num_stages": num_stages}


def _power_of_2(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


@jit
def decode_position(p: tensor, rows: tensor, columns: tensor) -> tensor:
    """Image, row and column of place p."""
    area = rows * columns
    image = p // area
    rest = p - image * area
    row = rest // columns
    return image, row, rest - row * columns


@jit
def element_offset(
    image: tensor, i: tensor, j: tensor, c: tensor,
    channels: tensor, height: tensor, width: tensor, channels_last: constexpr,
) -> tensor:  # fmt: skip
    """Where channel c of a pixel lies; in 64 bits, since a batch may pass 2^31 values."""
    start = image.to(tl.int64) * (channels * height * width)
    across = channels if channels_last else 1
    apart = 1 if channels_last else height * width
    return start + ((i * width + j) * across + c * apart)


@jit
def load_pixels(
    x: tensor, real: tensor, image: tensor, i: tensor, j: tensor, c: tensor,
    channels: tensor, height: tensor, width: tensor, channels_last: constexpr,
) -> tensor:  # fmt: skip
    """Channel c of a pixel in float32, zero outside the image."""
    inside = real & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    pixel = x + element_offset(image, i, j, c, channels, height, width, channels_last)
    return tl.load(pixel, mask=inside, other=0.0).to(tl.float32)


@jit
def load_patches(
    x: tensor, shift: tensor, image: tensor, row: tensor, column: tensor, c: tensor, t: tensor, real: tensor,
    channels: tensor, height: tensor, width: tensor,
    kernel_h: constexpr, kernel_w: constexpr, stride_h: constexpr, stride_w: constexpr,
    pad_h: constexpr, pad_w: constexpr, channels_last: constexpr,
) -> tensor:  # fmt: skip
    """Patches less the shift (C, T, N) in float32; the row after the last tap is ones, and the rest zeros."""
    i = row * stride_h + t // kernel_w - pad_h
    j = column * stride_w + t % kernel_w - pad_w
    tap = real & (t < kernel_h * kernel_w)
    value = load_pixels(x, tap, image, i, j, c, channels, height, width, channels_last)
    return tl.where(real & (t == kernel_h * kernel_w), 1.0, tl.where(tap, value - shift, 0.0))


@jit
def clamp_activation(y: tensor, act_max: tensor) -> tensor:
    """The clamp from 0 to act_max; a NaN stays one, as in torch."""
    y = tl.where(y < 0, 0.0, y)
    return tl.where(y > act_max, act_max, y)


@jit
def clamp_grad(grad: tensor, y: tensor, act_max: tensor) -> tensor:
    """The gradient where the clamp let the value through."""
    y = y.to(tl.float32)
    return tl.where((y > 0) & (y < act_max), grad, 0.0)


@jit
def matmul_add(a: tensor, b: tensor, total: tensor) -> tensor:
    """Matrix product a b added to total, in float32."""
    if _WIDEN:  # the interpreter keeps bfloat16 as bare bits, and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
