"""Teachers to distill from: any network that can be opened, adapted to the images and classes of the student."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.commands.class_matching import match_all_classes
from onefold.commands.open_network import open_network
from onefold.commands.predictor import is_timm, open_predictor, parse_timm_spec
from onefold.commands.timm_networks import fixed_image_size, open_pretrained
from onefold.data import Preprocessing
from onefold.errors import BadArgument, BadData
from onefold.recipes import Recipe
from onefold.runtimes.artifact import is_artifact

_log = logging.getLogger("onefold")


@dataclass(frozen=True, kw_only=True)
class Student:
    """What a teacher has to know of the student: its classes, its preprocessing, and its device."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network to distill from: images (B, C, H, W) in its own preprocessing -> logits (B, N), and its classes' names.

    `fixed_image_size` is the side of its images where it takes no other.
    """

    title: str
    network: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] | None = None
    fixed_size: int | None = None


def open_teachers(recipe: Recipe, classes: tuple[str, ...], device: torch.device) -> TeacherEnsemble | None:
    """Open the teachers that the recipe's plan names, adapted to the student; None where the plan does not distill.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    distill = recipe.plan.distill
    if distill is None:
        return None
    if not distill.teachers:
        raise BadArgument(f"the recipe {recipe.name} needs a teacher: --plan.distill.teacher RUN, weights or timm:NAME")
    student = Student(classes=classes, preprocessing=recipe.preprocessing, device=device)
    teachers = [open_teacher(name, device) for name in distill.teachers]
    _log.info("distilling from %s", ", ".join(teacher.title for teacher in teachers))
    return TeacherEnsemble(tuple(TeacherAdapter.between(teacher, student) for teacher in teachers))


def open_teacher(spec: str, device: torch.device) -> Teacher:
    """Open `timm:NAME`, `timm:NAME@FILE`, `name@WEIGHTS`, an artifact, a run folder, weights, an id of the hub.

    Raises BadArgument, BadCheckpoint, MissingExtra.
    """
    if is_timm(spec):
        return _timm_teacher(spec, device)
    if is_artifact(Path(spec)):
        return _artifact_teacher(spec)
    name, at, source = spec.rpartition("@")
    network = open_network(source, name=name or None) if at and not Path(spec).exists() else open_network(spec)
    if not network.is_fused:
        network, _ = network.fused()
    card = network.card
    return Teacher(
        title=spec,
        network=network.model.to(device).requires_grad_(False),
        preprocessing=network.preprocessing,
        num_classes=card.num_classes,
        classes=card.classes,
    )


@dataclass(frozen=True, eq=False)
class TeacherEnsemble:
    """Several teachers, evaluated one after the other. It is the `Teachers` of a training."""

    members: tuple[TeacherAdapter, ...]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Give the logits (B, N) of each teacher for the student's images."""
        return [member(images) for member in self.members]


@dataclass(frozen=True, eq=False)
class TeacherAdapter:
    """A teacher with the conversions from the student's images to its own, and from its classes to the student's."""

    teacher: Teacher
    scale: Tensor  # (1, C, 1, 1), with shift: from the student's normalization to the teacher's
    shift: Tensor
    class_map: Tensor | None  # for each class of the student the teacher's index; None where they are the same

    @classmethod
    def between(cls, teacher: Teacher, student: Student) -> TeacherAdapter:
        """Adapt a teacher; raises BadArgument where it has other classes, or takes gray images and the student RGB."""
        source, target = student.preprocessing, teacher.preprocessing
        if source.channels == 3 and target.channels == 1:
            raise BadArgument(f"the teacher {teacher.title} takes gray images, the student has colour: choose another")
        target.check_takes_photos()
        channels = max(source.channels, target.channels)
        mean, std, target_mean, target_std = (
            torch.tensor((values * channels)[:channels] if len(values) == 1 else values, dtype=torch.float64)
            for values in (source.mean, source.std, target.mean, target.std)
        )
        # (x std + mean - target_mean) / target_std as one multiplication and addition, rounded to float32 once
        scale, shift = (
            value.float().view(1, -1, 1, 1).to(student.device)
            for value in (std / target_std, (mean - target_mean) / target_std)
        )
        return cls(teacher, scale, shift, _class_map(teacher, student))

    def __call__(self, images: Tensor) -> Tensor:
        """Give the teacher's logits (B, N) for the student's classes, for the student's images (B, C, H, W)."""
        inputs = images.float() * self.scale + self.shift
        size = self.teacher.fixed_size
        if size is not None and inputs.shape[2:] != (size, size):
            inputs = F.interpolate(inputs, (size, size), mode="bilinear", antialias=True, align_corners=False)
        logits = self.teacher.network(inputs)
        return logits if self.class_map is None else logits[:, self.class_map]


def _class_map(teacher: Teacher, student: Student) -> Tensor | None:
    hint = (
        "fine-tune the teacher on these data first (onefold train --recipe photos:finetune), or name folders as it does"
    )
    try:
        title = f"the teacher {teacher.title}"
        outputs = match_all_classes(student.classes, teacher.classes, teacher.num_classes, title, hint=hint)
    except BadData as error:
        raise BadArgument(str(error)) from error
    same = outputs == list(range(teacher.num_classes))
    return None if same else torch.tensor(outputs, device=student.device)


def _artifact_teacher(spec: str) -> Teacher:
    """Open an exported artifact, which computes on the CPU from numpy arrays."""
    predictor = open_predictor(spec)

    def network(images: Tensor) -> Tensor:
        logits = predictor.session(np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32))
        return torch.from_numpy(np.asarray(logits)).to(images.device)

    return Teacher(
        title=predictor.title,
        network=network,
        preprocessing=predictor.preprocessing,
        num_classes=predictor.num_classes,
        classes=predictor.classes,
        fixed_size=int(predictor.facts["input_shape"][1]),
    )


def _timm_teacher(spec: str, device: torch.device) -> Teacher:
    """Open a model of timm by its name, with its published weights, or with those of a file."""
    model, card = open_pretrained(spec)
    return Teacher(
        title=spec,
        network=model.to(device).requires_grad_(False),
        preprocessing=Preprocessing.from_dict(card.preprocessing),
        num_classes=card.num_classes,
        classes=card.classes,
        fixed_size=fixed_image_size(parse_timm_spec(spec)[0]),
    )
