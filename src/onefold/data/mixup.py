"""Mixup and CutMix: the pictures of a batch are blended with or pasted into each other, and so are their labels.

B = images of a batch (of one logical worker), C = channels, K = classes. Each picture is mixed with the one at the
opposite place of its batch, whose order is random already. There is one draw per batch, from a generator keyed by
(seed, epoch, step, worker), so that a resumed run mixes as the uninterrupted one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onefold.errors import BadArgument

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Blends (mixup, arXiv 1710.09412) or pastes (CutMix, arXiv 1905.04899) the pictures of a batch.

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha), from which the share of the one picture is drawn; 0 is
    off. If both are on, CutMix is taken with probability `switch`. With probability 1 - p a batch stays as it is.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    p: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or not self.mixup + self.cutmix > 0:
            raise BadArgument(f"mixup is {self.mixup} and cutmix {self.cutmix}, expected one above 0, none below")
        if not 0 <= self.p <= 1 or not 0 <= self.switch <= 1:
            raise BadArgument(f"p is {self.p} and switch {self.switch}, expected probabilities from 0 to 1")

    def __call__(
        self, images: Tensor, labels: Tensor, num_classes: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mix images (B, C, H, W) float; labels (B) int64 become class shares (B, K) float32 that sum to 1."""
        import torch  # a recipe is read without it
        import torch.nn.functional as F

        one_hot = F.one_hot(labels, num_classes).float()
        if rng.random() >= self.p:
            return images, one_hot
        if self.cutmix and (not self.mixup or rng.random() < self.switch):
            images, share = self._cutmix(images, rng)
        else:
            share = float(rng.beta(self.mixup, self.mixup))
            images = images.flip(0).lerp_(images, share)
        return images, torch.lerp(one_hot.flip(0), one_hot, share)

    def _cutmix(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
        """Paste a rectangle of the opposite picture into each, and give the share of its own area that each keeps."""
        height, width = images.shape[-2:]
        side = float(np.sqrt(1 - rng.beta(self.cutmix, self.cutmix)))
        rows = _span(height, side, rng)
        columns = _span(width, side, rng)
        pasted = images.clone()
        pasted[..., rows, columns] = images[..., rows, columns].flip(0)
        covered = (rows.stop - rows.start) * (columns.stop - columns.start)
        return pasted, 1 - covered / (height * width)


def _span(length: int, share: float, rng: np.random.Generator) -> slice:
    """Give `share` of a side around a random middle, as much of it as lies inside the picture."""
    span, middle = int(length * share), int(rng.integers(length))
    return slice(max(0, middle - span // 2), min(length, middle + (span + 1) // 2))
