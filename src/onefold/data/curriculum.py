"""Progressive learning: the size of the images and the strength of their augmentation as functions of the epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from onefold.data.augmentation import Augment, with_image_size
from onefold.data.autoaugment import AutoAugment, RandAugment
from onefold.errors import BadArgument


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From epoch `epoch` on (the first is 0): images of `size` pixels, policies at `strength`, 0 to 1."""

    epoch: int
    size: int
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.epoch < 0 or not 1 <= self.size <= 8192 or not 0 <= self.strength <= 1:
            values = f"epoch {self.epoch}, size {self.size}, strength {self.strength}"
            raise BadArgument(f"a stage of {values}: expected 0 or more, 1 to 8192 pixels, and a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Stages in the order of their epochs, the first at epoch 0 (progressive learning: arXiv 2104.00298, section 4)."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        epochs = [stage.epoch for stage in self.stages]
        if not epochs or epochs[0] != 0 or any(a >= b for a, b in pairwise(epochs)):
            raise BadArgument(f"the stages begin at epochs {epochs}, expected 0 first and then later ones, each once")

    def stage_at(self, epoch: int) -> Stage:
        """Give the stage of an epoch, counted from 0."""
        return [stage for stage in self.stages if stage.epoch <= epoch][-1]


@dataclass(frozen=True, kw_only=True)
class ProgressiveAugment:
    """An augmentation whose size and strength follow a curriculum."""

    augment: Augment
    curriculum: Curriculum

    def at_epoch(self, n: int) -> Augment:
        """Give the augmentation of epoch n, from 0. Strengths multiply those that the policies have."""
        stage = self.curriculum.stage_at(n)
        steps = tuple(
            replace(step, strength=step.strength * stage.strength)
            if isinstance(step, AutoAugment | RandAugment)
            else step
            for step in with_image_size(self.augment.steps, stage.size)
        )
        preprocessing = replace(self.augment.preprocessing, size=stage.size)
        return replace(self.augment, steps=steps, preprocessing=preprocessing)
