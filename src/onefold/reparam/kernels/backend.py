"""What a back end does: the four passes over the batch that the `moments` route needs, as one protocol.

Everything else of the route is algebra on small matrices, and lives in `routes`.

Shapes: B batch, I and O input and output channels, G groups, K = I/G * taps values a patch, N patches (places of the
output over the batch). A kernel is (G, O/G, K), a mean (G, K), a covariance (G, K, K).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

Pair = tuple[int, int]
Act = float | None  # none; or a clamp from 0 to this: infinity is ReLU, 6 is ReLU6


@dataclass(frozen=True)
class Geometry:
    """Where a unit reads: groups, taps, stride, and the zeros around the image."""

    groups: int
    taps: Pair
    stride: Pair
    reach: Pair


class Moments(NamedTuple):
    """Mean (G, K) and biased covariance (G, K, K) of the patches, and how many there were."""

    mean: Tensor
    covariance: Tensor
    num: int


class Passes(Protocol):
    """A back end."""

    def moments(self, x: Tensor, geometry: Geometry) -> Moments:
        """Mean and covariance of the patches of x."""

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor, mean: Tensor, geometry: Geometry, act: Act) -> Tensor:
        """act(bias + kernel (patch - mean)): (B, O, H', W')."""

    def kernel_grad(
        self, grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, geometry: Geometry, act: Act
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
        act: Act,
    ) -> Tensor:
        """The patches' gradient kernel^T grad' + quad (patch - mean) + shift, added up into the shape of x.

        quad is symmetric.
        """
