"""TrainState: a network in training with all that an optimizer step changes, the losses, and the step itself.

It computes; it reads and writes no file. Shapes: B images, K classes.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from onefold.errors import BadArgument, BadCheckpoint, NonFiniteLoss
from onefold.train.checkpoint import Checkpoint, Position
from onefold.train.distributed import World, lost_worker_errors, no_sync
from onefold.train.gradient_reduction import create_reducer
from onefold.train.hyperparameters import Distill, Plan
from onefold.train.logical_workers import Batch, local_workers
from onefold.train.optim import (
    ModelEma,
    create_optimizer,
    freeze_,
    learning_rate,
    load_optimizer_tensors_,
    optimizer_tensors,
    set_lr_and_decay_,
    train_mode_,
    weight_decay,
)
from onefold.train.rng_state import RandomState, seed_everything

_log = logging.getLogger(__name__)

# Keys of random streams beside the steps of an epoch, by which loading is seeded; no epoch has that many steps.
_FORWARD, _BETWEEN_STEPS = 2**31 + 1, 2**31 + 2

# ------------------------------------------------------------------------------------------ losses


def cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Give the mean over B of -sum_k t_k log softmax(logits)_k, in nats, in float32 or the wider type of the logits.

    `labels` are classes (B) int64, or class probabilities (B, K) that sum to 1, as mixup makes them; t is the label
    as probabilities, times 1 - smoothing, plus smoothing / K (Szegedy et al., arXiv 1512.00567, section 7).

    Raises BadArgument where the labels do not fit the logits.
    """
    count, num_classes = logits.shape
    if labels.shape not in ((count,), (count, num_classes)):
        shapes = f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}"
        raise BadArgument(f"{shapes}: expected ({count},) classes, or ({count}, {num_classes}) probabilities")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels.to(wide.dtype) if labels.ndim == 2 else labels, label_smoothing=smoothing)


class Teachers(Protocol):
    """The networks that a student learns from, with their weights."""

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Give the logits (B, K) of each teacher for the student's images, on their device, without a gradient."""
        ...


def distillation_loss(distill: Distill, logits: Tensor, teacher_logits: Sequence[Tensor]) -> Tensor:
    """Give the teachers' part of the loss, a scalar: the mean over the images of logits (B, K).

    Its gradient with respect to the logits, soft and for one teacher, is T / B (q_T - p_T), where q is the student's
    distribution, p the teacher's and T the temperature: zero where the two agree.
    """
    # A hard target is the class that the teachers find likeliest at temperature 1.
    t = 1.0 if distill.targets == "hard" else distill.temperature
    target = torch.stack([F.softmax(answer.detach().float() / t, 1) for answer in teacher_logits]).mean(0)
    if distill.targets == "hard":
        return F.cross_entropy(logits.float(), target.argmax(1))
    return F.kl_div(F.log_softmax(logits.float() / t, 1), target, reduction="batchmean") * t**2


# ------------------------------------------------------------------------------------------- state


class TrainState:
    """Weights, averaged weights, optimizer, loss scale, position and sums of one run."""

    def __init__(
        self, model: nn.Module, plan: Plan, world: World, steps_per_epoch: int, teachers: Teachers | None = None
    ) -> None:
        self.plan, self.world, self.teachers = plan, world, teachers
        self.model = model.to(world.device)
        freeze_(self.model, plan.freeze)
        if plan.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.workers = local_workers(plan, world)
        self.reducer = create_reducer(self.model, plan, world)
        self.network = world.wrap_ddp(self.model) if plan.reduce == "fast" else self.model
        self.optimizer = create_optimizer(self.model, plan)
        self.ema = ModelEma(self.model, plan.ema) if plan.ema else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=plan.amp == "fp16")
        self.position = Position(epoch=0, step=0, steps_per_epoch=steps_per_epoch)
        self.loss_sum, self.num_images = 0.0, 0
        self.amp = _amp_on(world.device) if plan.amp == "auto" else plan.amp
        self.flagged = False
        self._lone_norms: dict[tuple[int, ...], list[str]] = {}  # shape of an image -> see `_lone_image`
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}

    @property
    def eval_model(self) -> nn.Module:
        """The network to evaluate and to keep: the averaged one, where the plan averages."""
        return self.ema.module if self.ema else self.model

    def lr_and_decay(self, step: int) -> tuple[float, float]:
        """Give the learning rate and weight decay of optimizer step `step`, counted from 0 over the whole run."""
        steps_per_epoch = self.position.steps_per_epoch
        return learning_rate(self.plan, step, steps_per_epoch), weight_decay(self.plan, step, steps_per_epoch)

    def train_mode_(self) -> None:
        """Put the network in train mode, but for what the plan freezes."""
        train_mode_(self.model, self.plan.freeze)

    # -------------------------------------------------------------------------------------- a step

    def step(self, micro_batches: list[Batch], flag: Callable[[], bool] = lambda: False) -> float:
        """Take one optimizer step on the images of all `micro_batches`, and give their mean loss.

        `flagged` is then whether `flag` was true on any process, which travels with the sums of the step. Without any
        image, since none could be read, the weights stay as they are, and the loss is NaN. Raises
        NonFiniteLoss, with the weights as they were, where the loss or its gradient is not finite.
        """
        set_lr_and_decay_(self.optimizer, *self.lr_and_decay(self.position.global_step))
        if self.reducer:
            loss, count, self.flagged = self._backward_workers(micro_batches, flag)
        else:
            (loss, count), self.flagged = self._backward(micro_batches), flag()
        if count:
            self._apply_gradient()
            if self.ema:
                self.ema.update_(self.model, self.position.global_step)
        at = self.position
        self.position = Position(epoch=at.epoch, step=at.step + 1, steps_per_epoch=at.steps_per_epoch)
        if not count:
            self.optimizer.zero_grad(set_to_none=True)
            return math.nan
        self.loss_sum, self.num_images = self.loss_sum + loss * count, self.num_images + count
        return loss

    def _backward(self, micro_batches: list[Batch]) -> tuple[float, int]:
        """Accumulate the gradient of all micro-batches; gives the mean loss and the number of images."""
        count, shares = sum(len(labels) for _, labels in micro_batches), list[Tensor]()
        for images, labels in micro_batches:
            if not len(labels):
                continue
            # weighted by its images, since an unreadable one may be missing from a micro-batch
            share = self._loss(images, labels) * (len(labels) / count)
            shares.append(share.detach())
            self.scaler.scale(share).backward()
        # read when all has been given to the device: a GPU would wait for the host before each backward
        loss = sum(torch.stack(shares).tolist(), 0.0) if shares else 0.0
        self._check_finite("loss", loss)
        return loss, count

    def _backward_workers(self, micro_batches: list[Batch], flag: Callable[[], bool]) -> tuple[float, int, bool]:
        """Do the same for one logical worker after another, and with the other processes (see `logical_workers`)."""
        assert self.reducer is not None
        self.reducer.begin_step()
        per_worker = len(micro_batches) // len(self.workers)
        for i, worker in enumerate(self.workers):
            # Dropout of a worker must not depend on which workers the same process has computed before it.
            seed_everything(self.plan.seed, _FORWARD, self.position.global_step, worker)
            loss, count = torch.zeros((), dtype=torch.float64, device=self.world.device), 0
            for j, (images, labels) in enumerate(micro_batches[i * per_worker : (i + 1) * per_worker]):
                is_last = (i + 1, j + 1) == (len(self.workers), per_worker)
                # DistributedDataParallel adds over processes within backward: once, with the last micro-batch. A
                # process that is lost shows as an error of this computation, among those of the model itself.
                with nullcontext() if is_last else no_sync(self.network), lost_worker_errors(in_model=True):
                    mean = self._loss(images, labels) if len(labels) else self._loss_of_none(images)
                    # by the planned batch: how many images there really are is known when all workers are done
                    weight = len(labels) * self.reducer.weight / self.plan.batch_size
                    self.scaler.scale(mean * weight).backward()
                loss, count = loss + mean.detach().double() * len(labels), count + len(labels)
            self.reducer.add_worker(loss, count)
        mean_loss, total, flagged = self.reducer.finish_step(flag())
        self._check_finite("loss", mean_loss)
        return mean_loss, total, flagged

    def _loss_of_none(self, images: Tensor) -> Tensor:
        """Give 0 for a batch without images, with a gradient of 0 for each parameter, which all processes wait for."""
        self.model.eval()  # so that no norm takes the black image for one of the data
        black = torch.zeros(1, *images.shape[1:], device=self.world.device)
        loss = 0.0 * self.network(black).float().sum()
        self.train_mode_()
        return loss

    @contextmanager
    def _lone_image(self, images: Tensor) -> Iterator[None]:
        """A block in which norms that would see one value a channel use, and keep, their running statistics.

        They are the norms of maps of one pixel, where a batch has one image: its own statistics would leave nothing of
        it, and torch refuses. A run of nothing but such batches would learn no statistics, and diverge.
        """
        names: list[str] = []
        if len(images) == 1:
            shape = tuple(images.shape[1:])
            if shape not in self._lone_norms:
                self._lone_norms[shape] = norms_with_single_value(self.model, images)
                if self._lone_norms[shape]:
                    _log.warning(
                        "a batch has one image, of which %d norms see one value a channel (the first is %s): there "
                        "they use their running statistics",
                        len(self._lone_norms[shape]),
                        self._lone_norms[shape][0],
                    )
            names = self._lone_norms[shape]
        norms = [norm for name in names if (norm := self.model.get_submodule(name)).training]
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for norm in norms:
                norm.train()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        device, amp, distill = self.world.device, self.amp, self.plan.distill
        layout = torch.channels_last if self.plan.channels_last else torch.preserve_format
        images = images.to(device, non_blocking=True, memory_format=layout)
        half = torch.float16 if amp == "fp16" else torch.bfloat16
        with self._lone_image(images), torch.autocast(device.type, dtype=half, enabled=amp != "off"):
            logits = self.network(images)
        labels = labels.to(device, non_blocking=True)
        loss = cross_entropy(logits, labels, smoothing=self.plan.label_smoothing)
        if distill is None or self.teachers is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teachers(images)
        return (1 - distill.weight) * loss + distill.weight * distillation_loss(distill, logits, teacher_logits)

    def _apply_gradient(self) -> None:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if self.amp != "fp16":  # there an overflow is expected: the scaler skips the step and halves its scale
            self._check_finite("gradient", norm.item())
        if self.plan.clip_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.plan.clip_grad_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def end_epoch(self) -> None:
        """Go to the first step of the next epoch."""
        self.position = Position(epoch=self.position.epoch + 1, step=0, steps_per_epoch=self.position.steps_per_epoch)
        self.loss_sum, self.num_images = 0.0, 0

    # ------------------------------------------------------------------------- only finite values

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            self._raise_non_finite(f"the {name} is {value}")

    def check_weights_finite(self) -> None:
        """Raise NonFiniteLoss if the last update, or a running statistic, has overflowed."""
        for module in (self.model, self.eval_model):
            for name, value in module.state_dict().items():
                if value.is_floating_point() and not value.isfinite().all():
                    self._raise_non_finite(f"{name} is not finite")

    def _raise_non_finite(self, fault: str) -> NoReturn:
        at, (lr, _) = self.position, self.lr_and_decay(self.position.global_step)
        raise NonFiniteLoss(
            f"{fault} at epoch {at.epoch + 1}, step {at.step + 1} of {at.steps_per_epoch}, lr {lr:g}: lower "
            f"plan.optimizer.lr, or look at the images of that batch; the last checkpoint is from before"
        )

    # ---------------------------------------------------------------------- to a checkpoint and back

    def to_checkpoint(self, data: str, log_bytes: int, made_with: Mapping[str, str]) -> Checkpoint:
        """Give the state as a checkpoint; raises NonFiniteLoss rather than keep a weight that is not finite."""
        self.check_weights_finite()
        if self.reducer:  # each worker is seeded before its forward: what is saved must not depend on the last one
            seed_everything(self.plan.seed, _BETWEEN_STEPS, self.position.global_step)
        return Checkpoint(
            plan=self.plan,
            data=data,
            position=self.position,
            weights=clone_tensors(self.model.state_dict()),
            average=clone_tensors(self.ema.module.state_dict()) if self.ema else {},
            optimizer=clone_tensors(optimizer_tensors(self.model, self.optimizer)),
            scaler=self.scaler.state_dict(),
            randomness=RandomState.capture(self.world.device),
            metrics=self.metrics,
            best=self.best,
            loss_sum=self.loss_sum,
            num_images=self.num_images,
            log_bytes=log_bytes,
            made_with=made_with,
        )

    def load_checkpoint_(self, saved: Checkpoint) -> None:
        """Become the state that was saved, except for the random states; raises BadCheckpoint for another model's."""
        load_weights_(self.model, saved.weights)
        if self.ema:
            load_weights_(self.ema.module, saved.average)
        load_optimizer_tensors_(self.model, self.optimizer, saved.optimizer)
        self.scaler.load_state_dict(dict(saved.scaler))
        self.position, self.loss_sum, self.num_images = saved.position, saved.loss_sum, saved.num_images
        self.metrics, self.best = dict(saved.metrics), dict(saved.best)


def _amp_on(device: torch.device) -> str:
    """Give what the plan's amp "auto" is on a device."""
    if device.type != "cuda":
        return "off"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        _log.info("plan.amp auto: this GPU does not compute in bf16, so it trains in float32; fp16 is an option")
        return "off"
    return "bf16"


def norms_with_single_value(model: nn.Module, image: Tensor) -> list[str]:
    """Name the BatchNorms of `model` whose input, for an image (1, C, H, W), has one value a channel."""
    found: list[str] = []
    probe = copy.deepcopy(model).eval()

    def listen(name: str) -> None:
        def heard(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                found.append(name)

        probe.get_submodule(name).register_forward_pre_hook(heard)

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            listen(name)
    with torch.no_grad():
        probe(image.float())
    return found


def clone_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, in the contiguous memory format, sharing nothing with the network or each other."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def load_weights_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` into `model`; raises BadCheckpoint naming what is missing, unexpected, or of another shape."""
    expected = model.state_dict()
    faults = [f"{name} is missing" for name in expected if name not in weights]
    faults += [f"{name} is not the model's" for name in weights if name not in expected]
    for name, value in expected.items():
        if name in weights and value.shape != weights[name].shape:
            faults.append(f"{name} is {tuple(weights[name].shape)}, the model has {tuple(value.shape)}")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise BadCheckpoint(f"the checkpoint is of another model: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(dict(weights))
