"""Progress: what a run says of itself after every step, for whoever draws it or keeps it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: `step` of `steps` in epoch `epoch` of `epochs`, counted from 1; speeds are this epoch's.

    `is_evaluation` tells the one that follows an evaluation from those of the steps: its `metrics` are new, and its
    `loss` is the mean of the epoch. `memory_bytes` is what the process holds, on a GPU what torch holds there.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_s: float
    eta_s: float
    metrics: Mapping[str, float]  # of the last evaluation; empty before the first
    is_evaluation: bool = False
    memory_bytes: int = 0

    @property
    def total(self) -> int:
        """Steps done since the run began, over all epochs and lives."""
        return (self.epoch - 1) * self.steps + self.step


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


def memory_in_use(device: torch.device) -> int:
    """Bytes that torch holds on a GPU, or that this process holds in memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    with suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
