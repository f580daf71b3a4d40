"""Progress: what a run says of itself after every step, for whoever draws it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: `step` of `steps` in epoch `epoch` of `epochs`, counted from 1; speeds are this epoch's."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_s: float
    eta_s: float
    metrics: Mapping[str, float]  # of the last evaluation; empty before the first


class Pace:
    """How fast the steps of one epoch go; NaN before the first."""

    def __init__(self) -> None:
        self._since, self._until = time.monotonic(), math.nan
        self._num_images, self._num_steps = 0, 0

    def add(self, num_images: int) -> None:
        """Another step, of `num_images`, is done."""
        self._until = time.monotonic()
        self._num_images, self._num_steps = self._num_images + num_images, self._num_steps + 1

    @property
    def images_per_s(self) -> float:
        """Images a second, loading included and evaluation not."""
        return self._num_images / max(self._until - self._since, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """The mean time of a step, loading included."""
        return (self._until - self._since) / max(self._num_steps, 1)
