"""What the GPU passes stand on: Triton itself, the memory layouts, and the arithmetic that every kernel repeats.

All sums are in float32 within a program; over programs they are partials, added up in float64. So there are no atomics,
and the same input gives the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from onefold.reparam.kernels.passes import Act, Geometry

if TYPE_CHECKING:  # triton has no types, and is not on every machine
    tl: Any
    constexpr: TypeAlias = Any

    def jit(kernel: Callable[..., Any]) -> Any:
        """Compile a kernel when it is first launched."""
else:
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
Launch = dict[str, Any]  # what a kernel takes by name
_WIDEN = tl.constexpr(INTERPRETED)


def layout(x: Tensor) -> torch.memory_format:
    """The memory format that a pass on x works in, and answers in."""
    last = x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def pilot(x: Tensor) -> Tensor:
    """About the mean of each channel (C,), from the first places: E[xx] - E[x]E[x] of what is left cancels little.

    It is a value of x's dtype: where the mean is large for the spread, the differences then are so too, and exact.
    """
    images = -(-1024 // (x.shape[2] * x.shape[3]))
    return x[:images].mean((0, 2, 3), dtype=torch.float32).to(x.dtype).float()


def ceiling(act: Act) -> tuple[float, bool]:
    """The clamp's upper end, and whether there is a clamp."""
    return (0.0, False) if act is None else (float(act), True)


def map_block(x: Tensor) -> Launch:
    """The block of a program that makes a depthwise map: 2048 values, along the memory."""
    block_c = min(64, _power_of_2(x.shape[1])) if layout(x) == torch.channels_last else 1
    return {"block_c": block_c, "block_p": 2048 // block_c, "num_warps": 4}


def patch_block(x: Tensor, geometry: Geometry) -> Launch:
    """The block of a program that sums patches: 8192 values at most, so that 128 threads hold them in registers."""
    block_t = max(16, _power_of_2(geometry.taps[0] * geometry.taps[1] + 1))
    block_c = max(1, 8192 // block_t**2 // (1 if layout(x) == torch.channels_last else 8))
    block_c = min(block_c, _power_of_2(x.shape[1]))
    return {"block_t": block_t, "block_c": block_c, "block_p": 8192 // (block_t * block_c), "num_warps": 4}


def product_block(x: Tensor, columns: int) -> Launch:
    """The block of a program that multiplies the rows of a map by a matrix of so many columns."""
    side = 64 if x.dtype == torch.float32 else 128  # without tensor cores the registers hold less
    block_b = min(side, max(16, _power_of_2(columns)))
    return {"block_n": side, "block_k": 32, "block_b": block_b, "num_warps": 4 if side * block_b < 128**2 else 8}


def gram_block(x: Tensor, rows: int, columns: int) -> Launch:
    """The block of a program that sums products of two maps over their places."""
    side = 64 if x.dtype == torch.float32 else 128
    block_a, block_b = (min(side, max(16, _power_of_2(size))) for size in (rows, columns))
    num_warps = 4 if block_a * block_b < 128**2 else 8
    return {"block_n": side // 2, "block_a": block_a, "block_b": block_b, "num_warps": num_warps}


def num_parts(tiles: int, across: int) -> int:
    """In how many parts to sum over the batch: some waves of a large GPU in all, and partials of a few megabytes."""
    return min(tiles, max(1, 512 // across))


def _power_of_2(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


@jit
def place(p: Any, rows: Any, columns: Any) -> Any:
    """Image, row and column of place p."""
    area = rows * columns
    image = p // area
    rest = p - image * area
    row = rest // columns
    return image, row, rest - row * columns


@jit
def at(image: Any, i: Any, j: Any, c: Any, channels: Any, height: Any, width: Any, channels_last: constexpr) -> Any:
    """Where channel c of a pixel lies; in 64 bits, since a batch may pass 2^31 values."""
    start = image.to(tl.int64) * (channels * height * width)
    across = channels if channels_last else 1
    apart = 1 if channels_last else height * width
    return start + ((i * width + j) * across + c * apart)


@jit
def read(
    x: Any, real: Any, image: Any, i: Any, j: Any, c: Any, channels: Any, height: Any, width: Any,
    channels_last: constexpr,
) -> Any:  # fmt: skip
    """Channel c of a pixel in float32, zero outside the image."""
    inside = real & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    pixel = x + at(image, i, j, c, channels, height, width, channels_last)
    return tl.load(pixel, mask=inside, other=0.0).to(tl.float32)


@jit
def activate(y: Any, top: Any) -> Any:
    """The clamp from 0 to top; a NaN stays one, as in torch."""
    y = tl.where(y < 0, 0.0, y)
    return tl.where(y > top, top, y)


@jit
def through(grad: Any, y: Any, top: Any) -> Any:
    """The gradient where the clamp let the value through."""
    y = y.to(tl.float32)
    return tl.where((y > 0) & (y < top), grad, 0.0)


@jit
def multiply(a: Any, b: Any, total: Any) -> Any:
    """Matrix product a b added to total, in float32."""
    if _WIDEN:  # the interpreter keeps bfloat16 as bare bits, and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
