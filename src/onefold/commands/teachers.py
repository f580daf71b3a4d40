"""Teachers for a distillation: whatever answers with logits, asked in its own preprocessing and for our classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.commands.open import is_artifact, open_network, open_predictor
from onefold.commands.timm import is_foreign, open_published
from onefold.data import Preprocessing
from onefold.errors import BadArgument
from onefold.recipes import Recipe
from onefold.train import Teacher

_log = logging.getLogger("onefold")


@dataclass(frozen=True, kw_only=True)
class Pupil:
    """Who is taught: its classes, its preprocessing, and where it computes."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Master:
    """A teacher as it was opened: logits (B, N) for images in its own preprocessing, and what it calls its classes.

    `fixed_size` is the side of its images where it takes no other.
    """

    title: str
    answer: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] | None = None
    fixed_size: int | None = None


def open_teacher(recipe: Recipe, classes: tuple[str, ...], device: torch.device) -> Teacher | None:
    """Those whom the recipe's plan names, ready to answer to the student's images; None where it names none.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    how = recipe.plan.distill
    if how is None:
        return None
    if not how.teachers:
        raise BadArgument(f"the recipe {recipe.name} needs a teacher: --plan.distill.teacher RUN, weights or timm:NAME")
    pupil = Pupil(classes=classes, preprocessing=recipe.preprocessing, device=device)
    panel = _Panel(tuple(_Interpreter.between(open_master(name, device), pupil) for name in how.teachers))
    _log.info("taught by %s", ", ".join(member.master.title for member in panel.members))
    return panel


def open_master(spec: str, device: torch.device) -> Master:
    """One teacher: `timm:NAME`, `timm:NAME@FILE`, `name@WEIGHTS`, an artifact, a run folder, weights, an id of the hub.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    if is_foreign(spec):
        return _of_timm(spec, device)
    if is_artifact(Path(spec)):
        return _of_artifact(spec)
    name, at, source = spec.rpartition("@")
    network = open_network(source, name=name or None) if at and not Path(spec).exists() else open_network(spec)
    if not network.is_fused:
        network, _ = network.fused()
    card = network.card
    return Master(
        title=spec,
        answer=network.model.to(device).requires_grad_(False),
        preprocessing=network.preprocessing,
        num_classes=card.num_classes,
        classes=card.classes,
    )


# ---------------------------------------------------------------------------------- asking a teacher


@dataclass(frozen=True, eq=False)
class _Panel:
    """Several teachers, asked one after the other. A Teacher."""

    members: tuple[_Interpreter, ...]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        return [member(images) for member in self.members]


@dataclass(frozen=True, eq=False)
class _Interpreter:
    """A teacher and what lies between it and a student: scales of colour, sides of images, the order of classes."""

    master: Master
    gain: Tensor  # (1, C, 1, 1), with shift: from the student's normalised colours to the teacher's
    shift: Tensor
    rows: Tensor | None  # the teacher's logits in the order of the student's classes

    @classmethod
    def between(cls, master: Master, pupil: Pupil) -> _Interpreter:
        """Raises BadArgument where the teacher knows other classes, or reads colours that the student does not see."""
        own, its = pupil.preprocessing, master.preprocessing
        if own.channels == 3 and its.channels == 1:
            raise BadArgument(f"the teacher {master.title} takes gray images, the student has colour: choose another")
        planes = max(own.channels, its.channels)
        mean, std, its_mean, its_std = (
            torch.tensor((values * planes)[:planes] if len(values) == 1 else values, dtype=torch.float64)
            for values in (own.mean, own.std, its.mean, its.std)
        )
        gain, shift = (
            v.float().view(1, -1, 1, 1).to(pupil.device) for v in (std / its_std, (mean - its_mean) / its_std)
        )
        return cls(master, gain, shift, _rows(master, pupil))

    def __call__(self, images: Tensor) -> Tensor:
        """The student's images (B, C, H, W) -> the teacher's logits for the student's classes (B, N)."""
        seen = images.float() * self.gain + self.shift
        size = self.master.fixed_size
        if size is not None and seen.shape[2:] != (size, size):
            seen = F.interpolate(seen, (size, size), mode="bilinear", antialias=True, align_corners=False)
        logits = self.master.answer(seen)
        return logits if self.rows is None else logits[:, self.rows]


def _rows(master: Master, pupil: Pupil) -> Tensor | None:
    if master.classes is not None and set(pupil.classes) <= set(master.classes):
        rows = [master.classes.index(name) for name in pupil.classes]
        return None if rows == list(range(master.num_classes)) else torch.tensor(rows, device=pupil.device)
    if master.classes is None and master.num_classes == len(pupil.classes):
        return None
    known = f"{master.num_classes} classes" if master.classes is None else f"classes like {master.classes[0]!r}"
    raise BadArgument(
        f"the teacher {master.title} tells {known}, the data have {len(pupil.classes)} like {pupil.classes[0]!r}: "
        "fine-tune the teacher on these data first (onefold train --recipe photos:finetune), or name folders as it does"
    )


# ---------------------------------------------------------------------------------- opening teachers


def _of_artifact(spec: str) -> Master:
    """An exported artifact: numpy in, numpy out, on the CPU."""
    session = open_predictor(spec)

    def answer(images: Tensor) -> Tensor:
        logits = session.answer(np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32))
        return torch.from_numpy(np.asarray(logits)).to(images.device)

    return Master(
        title=session.title,
        answer=answer,
        preprocessing=session.preprocessing,
        num_classes=session.num_classes,
        classes=session.classes,
        fixed_size=int(session.facts["input_shape"][1]),
    )


def _of_timm(spec: str, device: torch.device) -> Master:
    """A model of timm by its name, with its own weights, or with those of a file."""
    found = open_published(spec)
    return Master(
        title=spec,
        answer=found.model.to(device).requires_grad_(False),
        preprocessing=found.preprocessing,
        num_classes=found.num_classes,
        classes=found.classes,
        fixed_size=found.fixed_size,
    )
