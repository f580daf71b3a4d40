"""Mixup and CutMix: pictures of a batch blended or pasted into each other, and their labels with them.

B = images of a batch (of one logical worker), C = channels, K = classes. Each picture meets the one at the opposite
place of its batch: the order of a batch is random already. One draw a batch, keyed by (seed, epoch, step, worker), so
that a batch is mixed alike wherever, and however late, it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.data.sampler import batch_generator
from onefold.errors import BadArgument


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Blending (mixup, arXiv 1710.09412) or pasting (CutMix, arXiv 1905.04899) of the pictures of a batch.

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha), from which the share of the one picture is drawn; 0 is
    off. Of two that are on, CutMix is taken with chance `switch`. With chance 1 - p a batch stays as it is.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    p: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or not self.mixup + self.cutmix > 0:
            raise BadArgument(f"mixup is {self.mixup} and cutmix {self.cutmix}, expected one above 0, none below")
        if not 0 <= self.p <= 1 or not 0 <= self.switch <= 1:
            raise BadArgument(f"p is {self.p} and switch {self.switch}, expected chances from 0 to 1")

    def __call__(
        self, images: Tensor, labels: Tensor, num_classes: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float and labels (B) int64 -> mixed images, and shares (B, K) float32 that sum to 1."""
        own = F.one_hot(labels, num_classes).float()
        if rng.random() >= self.p:
            return images, own
        if self.cutmix and (not self.mixup or rng.random() < self.switch):
            images, share = self._pasted(images, rng)
        else:
            share = float(rng.beta(self.mixup, self.mixup))
            images = images.flip(0).lerp_(images, share)
        return images, torch.lerp(own.flip(0), own, share)

    def _pasted(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
        """The images with a rectangle of their opposites, and the share of its own that each has kept."""
        height, width = images.shape[-2:]
        side = float(np.sqrt(1 - rng.beta(self.cutmix, self.cutmix)))
        rows = _span(height, side, rng)
        columns = _span(width, side, rng)
        pasted = images.clone()
        pasted[..., rows, columns] = images[..., rows, columns].flip(0)
        covered = (rows.stop - rows.start) * (columns.stop - columns.start)
        return pasted, 1 - covered / (height * width)


def _span(length: int, share: float, rng: np.random.Generator) -> slice:
    """`share` of a side around a random middle, as much of it as lies inside."""
    reach, middle = int(length * share), int(rng.integers(length))
    return slice(max(0, middle - reach // 2), min(length, middle + (reach + 1) // 2))


class Batched(Protocol):
    """Batches of an epoch, as `Batches` has them."""

    def __len__(self) -> int: ...

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch n from `start` on."""

    def fingerprint(self) -> str:
        """What tells these data from others."""

    def describe(self) -> dict[str, Any]:
        """What JSON can hold, for logs."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """Batches after mixing, on the device where they are wanted: images, and shares (B, K) in place of labels."""

    batches: Batched
    mixing: Mixing
    _: KW_ONLY
    num_classes: int
    seed: int = 0
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        """Steps of an epoch, for this rank."""
        return len(self.batches)

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch n (from 0) from step `start` on: the same, to the bit, as without a start."""
        for step, (images, labels) in enumerate(self.batches.epoch(n, start), start):
            rng = batch_generator(self.seed, n, step, self.rank)
            there = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield self.mixing(*there, self.num_classes, rng)

    def fingerprint(self) -> str:
        """That of the batches: mixing is no part of the data."""
        return self.batches.fingerprint()

    def describe(self) -> dict[str, Any]:
        """What JSON can hold, for logs."""
        return {**self.batches.describe(), "mixing": vars(self.mixing)}
