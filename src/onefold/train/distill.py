"""Distillation: a network learns from what teachers answer to the very images that it sees.

Shapes: B images, N classes. z are the student's logits, p a teacher's distribution over the classes, T a temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.config import Range, check


class Teacher(Protocol):
    """Teachers with their weights, ready to answer."""

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Images as the student sees them -> the logits (B, N) of each teacher, on the images' device, no gradient."""
        ...


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Learn from teachers: which ones, which targets their answers make, and how much these weigh.

    `teacher` is what to ask, one or several: a run folder, weights, an exported artifact, `name@weights`, `timm:name`.
    Several make one by the mean of their distributions. With targets "soft" the loss is T^2 KL(p_T || q_T), the
    distributions being softmax(logits / T) (arXiv 1503.02531); with "hard" it is the cross-entropy on the class that
    the teacher finds likeliest (arXiv 2012.12877, section 4). The whole loss is `weight` times that and 1 - `weight`
    times the one on the labels: weight 1, soft, several teachers is MEAL V2 (arXiv 2009.08453).
    """

    teacher: str | tuple[str, ...] = ()
    targets: Literal["soft", "hard"]
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0
    weight: Annotated[float, Range(0.0, 1.0)]

    def __post_init__(self) -> None:
        check(self, "plan.distill")

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers, one or several; empty where the user has still to name one."""
        given = (self.teacher,) if isinstance(self.teacher, str) else self.teacher
        return tuple(name for name in given if name)


def distill_loss(how: Distill, logits: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """The teachers' part of the loss, a scalar: the mean over the images of logits (B, N).

    Its gradient of z, soft and for one teacher, is T / B (q_T - p_T): zero where student and teacher agree.
    """
    if how.targets == "hard":
        likeliest = _mean_distribution(answers, 1.0).argmax(1)
        return F.cross_entropy(logits.float(), likeliest)
    t = how.temperature
    target = _mean_distribution(answers, t)
    return F.kl_div(F.log_softmax(logits.float() / t, 1), target, reduction="batchmean") * t**2


def _mean_distribution(answers: Sequence[Tensor], temperature: float) -> Tensor:
    return torch.stack([F.softmax(answer.detach().float() / temperature, 1) for answer in answers]).mean(0)
