"""What a back end is: the four passes over the batch that the `moments` route needs, as a protocol.

Everything else of the route is algebra on small matrices (`reparam.moments_algebra`).

Shapes: B batch, I and O input and output channels, G groups, K = I/G * H * W values a patch, N patches (places of the
output over the batch). A kernel is (G, O/G, K), a mean (G, K), a covariance (G, K, K).

`load_kernels` gives the compiled kernels of the CPU back end.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

from torch import Tensor

from onefold.cpp_extension import is_native_disabled, load_library

Pair = tuple[int, int]
ClampMax = float | None  # none; or a clamp from 0 to this: infinity is ReLU, 6 is ReLU6


@dataclass(frozen=True)
class Geometry:
    """What a unit reads: groups, kernel size, stride, and the zeros around the image."""

    groups: int
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair = (1, 1)  # only `ReferenceBackend` takes another


class Moments(NamedTuple):
    """Mean (G, K) and biased covariance (G, K, K) of the patches, and how many there were."""

    mean: Tensor
    covariance: Tensor
    num: int


class Backend(Protocol):
    """The four passes. In `grad'` the activation is applied: grad where its clamp let y through, else 0."""

    def moments(self, x: Tensor, geometry: Geometry) -> Moments:
        """Mean and covariance of the patches of x."""

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> Tensor:
        """act(bias + kernel (patch - mean)): (B, O, H', W')."""

    def kernel_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, geometry: Geometry, act: ClampMax
    ) -> tuple[Tensor, Tensor]:
        """Sum over places of grad' (patch - mean)^T (G, O/G, K), and of grad' (O,)."""

    def input_grad(
        self,
        grad: Tensor,
        y: Tensor,
        x: Tensor,
        kernel: Tensor,
        mean: Tensor,
        quad: Tensor,
        shift: Tensor,
        geometry: Geometry,
        act: ClampMax,
    ) -> Tensor:
        """The patches' gradient kernel^T grad' + quad (patch - mean) + shift, added up into the shape of x.

        quad is symmetric.
        """


# -------------------------------------------------------------------------------- compiled kernels


def load_kernels() -> ctypes.CDLL | None:
    """The kernels as a loaded library (see `cpp_extension`); None, with one warning, where they cannot be compiled."""
    return None if is_native_disabled("ONEFOLD_KERNELS") else _library()


@cache
def _library() -> ctypes.CDLL | None:
    return load_library("kernels")
