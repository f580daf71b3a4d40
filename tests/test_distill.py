"""Distillation: the loss against closed forms, the step against one done by hand, and a resume to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onefold.errors import BadArgument
from onefold.train import SGD, Distill, Plan
from onefold.train.step import distillation_loss
from training_kit import NUM_CLASSES, PLAN, StoppedError, fresh, network, stop_at

SOFT = Distill(teacher="somebody", targets="soft", temperature=3.0, weight=0.7)
HARD = Distill(teacher="somebody", targets="hard", weight=0.5)


def logits(seed: int, rows: int = 5) -> Tensor:
    return 3 * torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Fixed:
    """Teachers that are networks, already in eval mode."""

    models: tuple[nn.Module, ...]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        return [model(images) for model in self.models]


def teacher(*seeds: int) -> Fixed:
    return Fixed(tuple(network(seed).eval() for seed in seeds))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_soft_gradient_is_temperature_times_the_difference_of_distributions(temperature):
    student, of_teacher = logits(0).requires_grad_(), logits(1)
    distillation_loss(replace(SOFT, temperature=temperature), student, [of_teacher]).backward()
    exact = [
        torch.exp(z.double() / temperature) / torch.exp(z.double() / temperature).sum(1, keepdim=True)
        for z in (student.detach(), of_teacher)
    ]
    expected = temperature * (exact[0] - exact[1]) / len(student)
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_soft_loss_is_the_divergence():
    student, of_teacher, t = logits(0).double(), logits(1).double(), 3.0
    p, q = (torch.softmax(z / t, 1) for z in (of_teacher, student))
    expected = t**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(SOFT, student, [of_teacher]).double(), expected, rtol=1e-5, atol=0.0)


def test_a_student_that_agrees_with_its_teacher_learns_nothing_from_it():
    student = logits(0).requires_grad_()
    loss = distillation_loss(SOFT, student, [student.detach() + 5.0])  # a distribution does not change with a shift
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert student.grad.abs().max().item() < 1e-6


def test_hard_distillation_is_cross_entropy_on_what_the_teacher_answers():
    student, of_teacher = logits(0), logits(1)
    assert torch.equal(distillation_loss(HARD, student, [of_teacher]), F.cross_entropy(student, of_teacher.argmax(1)))


@pytest.mark.parametrize("how", [SOFT, HARD])
def test_several_teachers_are_the_mean_of_their_distributions(how):
    both = [logits(1), logits(2)]
    mean = torch.stack([torch.softmax(z / how.temperature, 1) for z in both]).mean(0)
    one = how.temperature * mean.log()  # logits of one teacher with that distribution
    torch.testing.assert_close(distillation_loss(how, logits(0), both), distillation_loss(how, logits(0), [one]))


def test_no_gradient_reaches_a_teacher():
    of_teacher = logits(1).requires_grad_()
    distillation_loss(SOFT, logits(0).requires_grad_(), [of_teacher]).backward()
    assert of_teacher.grad is None


def test_weight_0_is_a_training_without_a_teacher_and_weight_1_never_sees_a_label(tmp_path: Path):
    plain = fresh(tmp_path / "plain", replace(PLAN, epochs=1))
    none = fresh(tmp_path / "none", replace(PLAN, epochs=1, distill=replace(SOFT, weight=0.0)), teachers=teacher(5))
    assert all(torch.equal(plain.weights[name], value) for name, value in none.weights.items())

    class Shifted:
        """The same images with every label wrong."""

        def __init__(self) -> None:
            from training_kit import Blobs

            self.right = Blobs()

        def __len__(self) -> int:
            return len(self.right)

        def fingerprint(self) -> str:
            return self.right.fingerprint()

        def epoch(self, n: int, start: int = 0):
            return ((images, (labels + 1) % NUM_CLASSES) for images, labels in self.right.epoch(n, start))

    plan = replace(PLAN, epochs=1, distill=replace(SOFT, weight=1.0))
    right = fresh(tmp_path / "right", plan, teachers=teacher(5))
    wrong = fresh(tmp_path / "wrong", plan, Shifted(), teachers=teacher(5))  # type: ignore[arg-type]
    assert all(torch.equal(right.weights[name], value) for name, value in wrong.weights.items())
    assert any(not torch.equal(plain.weights[name], value) for name, value in right.weights.items())


def test_a_distillation_resumes_to_the_bit(tmp_path: Path):
    plan = replace(PLAN, epochs=2, distill=SOFT)
    whole = fresh(tmp_path / "whole", plan, teachers=teacher(5, 6))

    with pytest.raises(StoppedError):
        fresh(tmp_path / "cut", plan, teachers=teacher(5, 6), on_progress=stop_at(2, 3))
    assert fresh(tmp_path / "cut", plan, teachers=teacher(5, 6), resume=True).digest() == whole.digest()


def test_a_plan_that_distills_needs_a_teacher_and_the_other_way_round(tmp_path: Path):
    with pytest.raises(BadArgument, match="go together"):
        fresh(tmp_path / "a", replace(PLAN, distill=SOFT))
    with pytest.raises(BadArgument, match="go together"):
        fresh(tmp_path / "b", PLAN, teachers=teacher(5))


def test_the_value_goes_to_json_and_back_and_refuses_nonsense():
    plan = Plan(epochs=1, batch_size=1, optimizer=SGD(lr=0.1), distill=replace(SOFT, teacher=("a", "b")))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.distill is not None
    assert plan.distill.teachers == ("a", "b")
    assert Distill(targets="soft", weight=1.0).teachers == ()
    with pytest.raises(BadArgument, match=r"plan\.distill\.weight must be a number from 0 to 1, not 2"):
        replace(SOFT, weight=2.0)
    with pytest.raises(BadArgument, match=r"plan\.distill\.temperature"):
        replace(SOFT, temperature=0.0)
    with pytest.raises(BadArgument, match=r"plan\.distill\.targets must be one of 'soft', 'hard'"):
        replace(SOFT, targets="mild")
