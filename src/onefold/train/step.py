"""State: a network in training, with all that a step changes. It computes; it reads and writes no file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from onefold.errors import BadArgument, BadCheckpoint, NonFiniteLoss
from onefold.train.checkpoint import Checkpoint, Position
from onefold.train.distributed import World, talking, without_sync
from onefold.train.logical_workers import Batch, make_reducer, own_workers
from onefold.train.optim import (
    WeightAverage,
    freeze_,
    learning_rate,
    load_optimizer_,
    make_optimizer,
    optimizer_tensors,
    set_rates_,
    train_mode_,
    weight_decay,
)
from onefold.train.plan import Distill, Plan
from onefold.train.rng import RandomState, seed_everything


def cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """The mean over B of -sum_k t_k log softmax(logits)_k, in nats, in float32.

    `labels` are classes (B) int64, or shares (B, K) that sum to 1, as mixing makes them; t is the label as shares,
    times 1 - smoothing, plus smoothing / K (Szegedy et al., arXiv 1512.00567, section 7).

    Raises BadArgument where the labels do not fit the logits.
    """
    count, num_classes = logits.shape
    if labels.shape not in ((count,), (count, num_classes)):
        came = f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}"
        raise BadArgument(f"{came}: expected ({count},) classes, or ({count}, {num_classes}) shares")
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


_FORWARD, _BETWEEN = 2**31 + 1, 2**31 + 2  # places of random numbers, apart from those of loading


class Teacher(Protocol):
    """Teachers with their weights, ready to answer."""

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Images as the student sees them -> the logits (B, N) of each teacher, on the images' device, no gradient."""
        ...


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


class State:
    """Weights, averaged weights, optimizer, loss scale, position and sums of one run."""

    def __init__(
        self, model: nn.Module, plan: Plan, world: World, steps_per_epoch: int, teacher: Teacher | None = None
    ) -> None:
        self.plan, self.world, self.teacher = plan, world, teacher
        self.model = model.to(world.device)
        freeze_(self.model, plan.freeze)
        if plan.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.workers = own_workers(plan, world)
        self.reducer = make_reducer(self.model, plan, world)
        self.network = world.wrap(self.model) if plan.reduce == "fast" else self.model
        self.optimizer = make_optimizer(self.model, plan)
        self.average = WeightAverage(self.model, plan.ema) if plan.ema else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=plan.amp == "fp16")
        self.position = Position(epoch=0, step=0, steps_per_epoch=steps_per_epoch)
        self.loss_sum, self.num_images = 0.0, 0
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}

    @property
    def deliverable(self) -> nn.Module:
        """The network to evaluate and to keep: the averaged one, where the plan averages."""
        return self.average.module if self.average else self.model

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rate and weight decay of optimizer step `step`, counted from 0 over the whole run."""
        steps_per_epoch = self.position.steps_per_epoch
        return learning_rate(self.plan, step, steps_per_epoch), weight_decay(self.plan, step, steps_per_epoch)

    def train_mode_(self) -> None:
        """Ready to step: in train mode, but for what the plan freezes."""
        train_mode_(self.model, self.plan.freeze)

    # -------------------------------------------------------------------------------------- a step

    def step(self, pieces: list[Batch]) -> float:
        """One optimizer step on the images of all `pieces`; returns their mean loss.

        Raises NonFiniteLoss, with the weights as they were, where the loss or its gradient is not finite.
        """
        set_rates_(self.optimizer, *self.rates(self.position.total))
        loss, count = self._together(pieces) if self.reducer else self._alone(pieces)
        self._apply_gradient()
        if self.average:
            self.average.update_(self.model, self.position.total)
        self._count(loss, count)
        return loss

    def _alone(self, pieces: list[Batch]) -> tuple[float, int]:
        """Backward of all pieces; the mean loss and the number of images."""
        count, loss = sum(len(labels) for _, labels in pieces), 0.0
        for images, labels in pieces:
            share = self._loss(images, labels) * (len(labels) / count)
            loss += share.item()
            self._must_be_finite("loss", loss)
            self.scaler.scale(share).backward()
        return loss, count

    def _together(self, pieces: list[Batch]) -> tuple[float, int]:
        """The same, of the pieces of one logical worker after another, with the other processes (see `logical`)."""
        assert self.reducer is not None
        self.reducer.begin()
        share, at = len(pieces) // len(self.workers), self.position.total
        for i, worker in enumerate(self.workers):
            seed_everything(self.plan.seed, _FORWARD, at, worker)
            loss, count = 0.0, 0
            for j, (images, labels) in enumerate(pieces[i * share : (i + 1) * share]):
                is_last = (i + 1, j + 1) == (len(self.workers), share)
                with nullcontext() if is_last else without_sync(self.network), self._talking():
                    mean = self._loss(images, labels)
                    weight = len(labels) * self.reducer.weight / self.plan.batch_size
                    self.scaler.scale(mean * weight).backward()
                loss, count = loss + mean.item() * len(labels), count + len(labels)
            self.reducer.take(loss, count)
        loss, count = self.reducer.finish()
        self._must_be_finite("loss", loss)
        return loss, count

    def _talking(self) -> AbstractContextManager[None]:
        return talking() if self.world.size > 1 else nullcontext()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        device, amp = self.world.device, self.plan.amp
        layout = torch.channels_last if self.plan.channels_last else torch.preserve_format
        images = images.to(device, non_blocking=True, memory_format=layout)
        half = torch.float16 if amp == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype=half, enabled=amp != "off"):
            logits = self.network(images)
        labels = labels.to(device, non_blocking=True)
        loss = cross_entropy(logits, labels, smoothing=self.plan.label_smoothing)
        return self._taught(loss, images, logits)

    def _taught(self, loss: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """The loss, with the teachers' part where the plan distills."""
        how = self.plan.distill
        if how is None or self.teacher is None:
            return loss
        with torch.no_grad():
            answers = self.teacher(images)
        return (1 - how.weight) * loss + how.weight * distill_loss(how, logits, answers)

    def _apply_gradient(self) -> None:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if self.plan.amp != "fp16":  # there an overflow is awaited: the scaler leaves the step out and halves its scale
            self._must_be_finite("gradient", norm.item())
        if self.plan.clip_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.plan.clip_grad_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _count(self, loss: float, num_images: int) -> None:
        at = self.position
        self.position = Position(epoch=at.epoch, step=at.step + 1, steps_per_epoch=at.steps_per_epoch)
        self.loss_sum, self.num_images = self.loss_sum + loss * num_images, self.num_images + num_images

    def end_epoch(self) -> None:
        """Go to the first step of the next epoch."""
        at = self.position
        self.position = Position(epoch=at.epoch + 1, step=0, steps_per_epoch=at.steps_per_epoch)
        self.loss_sum, self.num_images = 0.0, 0

    # ------------------------------------------------------------------------- finite, or not at all

    def _must_be_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self._refuse(f"the {what} is {value}")

    def weights_must_be_finite(self) -> None:
        """Raise NonFiniteLoss if the last update, or a running statistic, has overflowed."""
        for part in (self.model, self.deliverable):
            for name, value in part.state_dict().items():
                if value.is_floating_point() and not value.isfinite().all():
                    self._refuse(f"{name} is not finite")

    def _refuse(self, what: str) -> NoReturn:
        at, (lr, _) = self.position, self.rates(self.position.total)
        raise NonFiniteLoss(
            f"{what} at epoch {at.epoch + 1}, step {at.step + 1} of {at.steps_per_epoch}, lr {lr:g}: lower "
            f"plan.optimizer.lr, or look at the images of that batch; the last checkpoint is from before"
        )

    # ---------------------------------------------------------------------- to a checkpoint and back

    def capture(self, data: str, log_bytes: int, made_with: Mapping[str, str]) -> Checkpoint:
        """The state as a checkpoint; raises NonFiniteLoss rather than keep a weight that is not finite."""
        self.weights_must_be_finite()
        if self.reducer:  # each worker is seeded before its forward: what is kept must not depend on who was last
            seed_everything(self.plan.seed, _BETWEEN, self.position.total)
        return Checkpoint(
            plan=self.plan,
            data=data,
            position=self.position,
            weights=snapshot(self.model.state_dict()),
            average=snapshot(self.average.module.state_dict()) if self.average else {},
            optimizer=snapshot(optimizer_tensors(self.model, self.optimizer)),
            scaler=self.scaler.state_dict(),
            randomness=RandomState.take(self.world.device),
            metrics=self.metrics,
            best=self.best,
            loss_sum=self.loss_sum,
            num_images=self.num_images,
            log_bytes=log_bytes,
            made_with=made_with,
        )

    def restore_(self, saved: Checkpoint) -> None:
        """Become the state that was captured, but for the random states; raises BadCheckpoint for another model's."""
        load_weights_(self.model, saved.weights)
        if self.average:
            load_weights_(self.average.module, saved.average)
        load_optimizer_(self.model, self.optimizer, saved.optimizer)
        self.scaler.load_state_dict(dict(saved.scaler))
        self.position, self.loss_sum, self.num_images = saved.position, saved.loss_sum, saved.num_images
        self.metrics, self.best = dict(saved.metrics), dict(saved.best)


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in the plain memory order, sharing nothing with the network or each other."""
    plain = torch.contiguous_format
    return {
        name: value.detach().to("cpu", copy=True).contiguous(memory_format=plain) for name, value in tensors.items()
    }


def load_weights_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` into `model`; raises BadCheckpoint naming what is missing, too many, or of another shape."""
    ours = model.state_dict()
    faults = [f"{name} is missing" for name in ours if name not in weights]
    faults += [f"{name} is not the model's" for name in weights if name not in ours]
    for name in ours:
        if name in weights and ours[name].shape != weights[name].shape:
            faults.append(f"{name} is {tuple(weights[name].shape)}, the model has {tuple(ours[name].shape)}")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise BadCheckpoint(f"the checkpoint is of another model: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(dict(weights))
