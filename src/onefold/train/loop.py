"""train(model, batches, plan, run): the story of a training, from the first seed to the last checkpoint."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from onefold.errors import BadArgument, BadCheckpoint, BadData, NotWritable, Stopped
from onefold.train.checkpoint import Checkpoint, RunFolder, Writer, restore_last, save_best
from onefold.train.distributed import Interrupted, StopSignals, World
from onefold.train.loggers import Pace, Progress, memory_in_use
from onefold.train.logical_workers import Batch, Batches, own_workers
from onefold.train.plan import Plan
from onefold.train.rng import apart, seed_everything
from onefold.train.step import State, Teacher, snapshot

_log = logging.getLogger(__name__)

_EVALUATION = 2**31  # the place of an epoch's evaluation among its steps, for the seed it runs under


@dataclass(frozen=True, kw_only=True)
class Run:
    """The surroundings of a training, which do not change what it computes.

    `evaluate` is given a copy of the averaged network, in eval mode, after each epoch; its "top1" decides which epoch
    is best; with `judge_start`, before the first step too. `metadata` goes into the weights' header. With `resume` the
    run in `out` goes on. `teacher` answers for those whom `plan.distill` names.
    """

    out: Path
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    world: World = field(default_factory=World)
    metadata: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False
    on_progress: Callable[[Progress], None] | None = None
    teacher: Teacher | None = None
    judge_start: bool = False


def train(model: nn.Module, batches: Batches, plan: Plan, run: Run) -> Checkpoint:
    """Train `model`, in place, as `plan` says, and return the run's last checkpoint.

    The run folder then holds `best/model.safetensors` (averaged weights), `last/` and `log.jsonl`. A run that is
    resumed ends in the bits of one that was not stopped: in one process, or in any number that divides the logical
    workers where plan.reduce is "exact" (see `logical`). `checkpoint` lists the order.

    Raises BadArgument where `out` holds a run and resume is false, BadCheckpoint where there is none to resume or it
    is of another plan, data or model, RunBusy, NotWritable, NonFiniteLoss (before the weights take it in), LostWorker,
    and Stopped after a SIGTERM or SIGINT, once the state is saved.
    """
    if run.resume and run.world.is_first and not run.out.exists():
        Checkpoint.load(run.out)  # says that there is none, before a folder is made
    folder = RunFolder(run.out).held() if run.world.is_first else nullcontext()
    with folder, Writer() as writer, StopSignals() as signals:
        run.world.wait()

        # ---- The beginning: a state that follows from the plan, or the one that was saved
        seed_everything(plan.seed, *([run.world.rank] if run.world.rank else []))
        training = _Training(model, batches, plan, run, (writer, signals))
        training.resume() if run.resume else training.begin()
        if run.judge_start:
            training.judge_start()

        # ---- The epochs: their steps, then an evaluation, then a checkpoint
        while not training.saved.is_complete:
            training.fit()
            training.judge()
        training.settle()
        return training.saved


class _Training:
    """A state, the folder it is kept in, and those who want to hear of it."""

    saved: Checkpoint  # the last one; there is one from `begin` or `resume` on

    def __init__(
        self, model: nn.Module, batches: Batches, plan: Plan, run: Run, outside: tuple[Writer, StopSignals]
    ) -> None:
        if len(batches) < 1:
            raise BadData("there is no batch to train on: are there fewer images than plan.batch_size?")
        if (plan.distill is None) != (run.teacher is None):
            raise BadArgument("plan.distill and a teacher go together: give Run(teacher=...) where the plan distills")
        self.batches, self.plan, self.run = batches, plan, run
        self.writer, self.signals = outside
        self.data = batches.fingerprint()
        self.folder, self.world = RunFolder(run.out), run.world
        self.workers = own_workers(plan, run.world)
        self.num_batches = len(batches) // len(self.workers)  # of one logical worker
        steps = math.ceil(self.num_batches / plan.accumulate)
        self.state = State(model, plan, run.world, steps_per_epoch=steps, teacher=run.teacher)
        self.pace = Pace()

    # ---------------------------------------------------------------------------- begin or resume

    def begin(self) -> None:
        """Start a new run. Its first checkpoint is of step 0: it shows that there is room before hours are spent."""
        if self.world.is_first and self.folder.has_run:
            raise BadArgument(f"{self.run.out} already holds a run: resume it, or choose another folder")
        if self.world.is_first:
            self.folder.cut_log(0)
        self._tell("start", plan=self.plan.to_dict(), data=self.data, **self._made_with())
        self._save()
        self.settle()

    def resume(self) -> None:
        """Go on from the checkpoint, in the order that `checkpoint` lists."""
        saved = restore_last(self.folder) if self.world.is_first else None
        self.saved = self.world.share(saved)  # type: ignore[assignment]
        self._pin_threads(self.saved.made_with.get("threads", ""))
        self._must_be_of_this_run(self.saved)
        self.state.restore_(self.saved)
        if self.saved.is_complete:
            _log.info("%s is complete: all %d epochs are done", self.run.out, self.plan.epochs)
            return
        at = self.saved.position
        if self.world.is_first:
            self.folder.cut_log(self.saved.log_bytes)
        self._tell("resume", epoch=at.epoch + 1, step=at.total, **self._made_with())
        if self.world.is_first:
            self.saved.randomness.restore(self.world.device)
        else:
            seed_everything(self.plan.seed, self.world.rank, at.total)

    def _must_be_of_this_run(self, saved: Checkpoint) -> None:
        steps = self.state.position.steps_per_epoch
        changed = [f"plan.{difference}" for difference in saved.plan.differences(self.plan)]
        if saved.data != self.data:
            changed.append(f"data: {saved.data} -> {self.data}")
        if saved.position.steps_per_epoch != steps:
            changed.append(f"steps an epoch: {saved.position.steps_per_epoch} -> {steps}")
        if changed:
            raise BadCheckpoint(f"{self.run.out} is another run; choose another folder. Changed: {'; '.join(changed)}")
        free = "processes" if self.plan.reduce == "exact" else None
        for key, value in self._made_with().items():
            if key != free and saved.made_with.get(key) != value:
                before = saved.made_with.get(key)
                _log.warning("%s: was %s, is %s: the last bits will not be those of one run", key, before, value)

    # ---------------------------------------------------------------------------------- the steps

    def fit(self) -> None:
        """The steps of this epoch that are still to do."""
        self.state.train_mode_()
        self.pace = Pace()
        for pieces in self._steps():
            loss = self.state.step(pieces)
            self.pace.add(sum(len(labels) for _, labels in pieces) * self.world.size)
            self._report(loss)
            if self._is_due():
                self._save()
            self._heed()

    def _steps(self) -> Iterator[list[Batch]]:
        """The batches of one step at a time, loaded under random states of their own."""
        at, accumulate, world = self.state.position, self.plan.accumulate, self.world
        if at.step == at.steps_per_epoch:
            return
        batches = iter(self.batches.epoch(at.epoch, at.step * accumulate * len(self.workers)))
        for step in range(at.step, at.steps_per_epoch):
            pieces: list[Batch] = []
            for worker in self.workers:
                with apart(world.device, self.plan.seed, worker, at.epoch, step):
                    pieces += islice(batches, min(accumulate, self.num_batches - step * accumulate))
            count = sum(len(labels) for _, labels in pieces) * world.size
            if not count:
                raise BadData(f"epoch {at.epoch + 1} ended at step {step} of {at.steps_per_epoch}: images are missing")
            if count > self.plan.batch_size:
                raise BadArgument(f"plan.batch_size is {self.plan.batch_size}, but the batches give {count} a step")
            yield pieces

    def _is_due(self) -> bool:
        """Whether the plan wants a checkpoint here; at the end of an epoch there is one after the evaluation."""
        at, every = self.state.position, self.plan.checkpoint_every
        if every is None or at.step == at.steps_per_epoch:
            return False
        return at.total % max(1, every.steps(at.steps_per_epoch)) == 0

    # ------------------------------------------------------- the evaluation, the checkpoint, the end

    def judge_start(self) -> None:
        """Evaluate what the run starts from, as its first candidate for the best, before the first step."""
        if self.state.position.total or self.state.metrics:
            return
        weights = self._judged(epoch=0)
        self._tell("judged", epoch=0, step=0, **self.state.metrics)
        self._save(weights)

    def _judged(self, epoch: int) -> dict[str, Tensor]:
        """Evaluate; the weights to keep where they are the best so far, else nothing."""
        state, at = self.state, self.state.position
        state.weights_must_be_finite()
        state.metrics = self.world.share(self._evaluate())
        if not state.metrics:  # the first process was asked to stop in the middle
            self._stop()
        best = state.metrics["top1"] > state.best.get("top1", -math.inf)  # of equals the first one stays
        if best:
            state.best = {**state.metrics, "epoch": epoch, "step": at.total}
        return snapshot(state.deliverable.state_dict()) if best and self.world.is_first else {}

    def judge(self) -> None:
        """Evaluate the epoch, keep its weights if they are the best, and save."""
        state, at = self.state, self.state.position
        weights = self._judged(epoch=at.epoch + 1)
        loss, (lr, decay) = state.loss_sum / state.num_images, state.rates(at.total - 1)
        own = {"epoch": at.epoch + 1, "step": at.total, "loss": loss, "lr": lr, "weight_decay": decay}
        own["images_per_s"] = self.pace.images_per_s
        measured = {f"eval_{name}" if name in own else name: value for name, value in state.metrics.items()}
        self._tell("epoch", **own, **measured)
        self._report(loss, is_evaluation=True)
        state.end_epoch()
        self._save(weights)
        self._heed()

    def _evaluate(self) -> dict[str, float]:
        if not self.world.is_first:
            return {}
        try:
            with (
                apart(self.world.device, self.plan.seed, 0, self.state.position.epoch, _EVALUATION),
                self.signals.interrupting(),
            ):
                given = self.run.evaluate(copy.deepcopy(self.state.deliverable).eval())
        except Interrupted:
            return {}
        metrics = {str(name): float(value) for name, value in given.items()}
        if "top1" not in metrics:
            raise BadArgument(
                f"evaluate must give 'top1', by which the best epoch is chosen; it gave {sorted(metrics)}"
            )
        return metrics

    def _save(self, best: Mapping[str, Tensor] | None = None) -> None:
        """Have the state, as it is now, written as the last checkpoint, after the `best` weights if there are any."""
        self.saved = saved = self.state.capture(self.data, self.folder.log_bytes(), self._made_with())
        folder, metadata = self.folder, self.run.metadata

        def write() -> None:
            if best:
                save_best(folder, best, saved.best, metadata)
            saved.save(folder, metadata)

        if self.world.is_first:
            self.writer.submit(write)

    def _heed(self) -> None:
        """Between two steps: end where a signal asked for it, or the last checkpoint could not be written."""
        heard = self.world.most(2 if self.writer.has_failed else 1 if self.signals.asked else 0)
        if heard == 2:
            self.settle()
        if heard == 1 and not self.saved.is_complete:
            self._stop()

    def settle(self) -> None:
        """Wait until the last checkpoint is on the disk; raises on every process where it could not be written."""
        self.writer.wait()
        if self.world.most(self.writer.has_failed):
            self.writer.check()  # the process that writes knows why
            raise NotWritable("the first process could not save: its message says why")

    def _stop(self) -> NoReturn:
        at = self.state.position
        if self.saved.position != at:
            self._save()
        self.settle()
        raise Stopped(
            f"stopped by {self.signals.asked or 'a signal'} at epoch {at.epoch + 1}, step {at.step} of "
            f"{at.steps_per_epoch}; everything is saved in {self.folder.last}: resume to go on"
        )

    def _pin_threads(self, before: str) -> None:
        """As many threads as the run was begun with, where its bits are promised: sums are split among them."""
        if self.plan.reduce == "exact" and before.isdecimal() and int(before) != torch.get_num_threads():
            _log.info("%s threads, as when the run was begun", before)
            torch.set_num_threads(int(before))

    # --------------------------------------------------------------------------------- to be heard

    def _made_with(self) -> dict[str, str]:
        made_with = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        made_with |= {"device": self.world.device.type, "processes": self.world.size}
        return {key: str(value) for key, value in made_with.items()}

    def _tell(self, kind: str, **numbers: Any) -> None:
        if self.world.is_first:
            self.folder.append({"kind": kind, **numbers})

    def _report(self, loss: float, *, is_evaluation: bool = False) -> None:
        if not self.run.on_progress or not self.world.is_first:
            return
        at, total = self.state.position, self.plan.epochs * self.state.position.steps_per_epoch
        progress = Progress(
            epoch=at.epoch + 1,
            epochs=self.plan.epochs,
            step=at.step,
            steps=at.steps_per_epoch,
            loss=loss,
            lr=self.state.rates(at.total - 1)[0],
            images_per_s=self.pace.images_per_s,
            eta_s=self.pace.seconds_per_step * (total - at.total),
            metrics=self.state.metrics,
            is_evaluation=is_evaluation,
            memory_bytes=memory_in_use(self.world.device),
        )
        self.run.on_progress(progress)
