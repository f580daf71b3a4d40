"""train(model, batches, plan, run): the training loop, from the first seed to the last checkpoint."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from onefold.errors import BadArgument, BadCheckpoint, BadData, NotWritable, Stopped
from onefold.train.checkpoint import BackgroundWriter, Checkpoint, RunFolder, load_for_resume, save_best
from onefold.train.distributed import Interrupted, World
from onefold.train.hyperparameters import Plan
from onefold.train.loggers import Progress, Throughput, memory_in_use
from onefold.train.logical_workers import Batch, Batches, local_workers
from onefold.train.rng_state import forked_rng, seed_everything
from onefold.train.step import Teachers, TrainState, clone_tensors
from onefold.train.stop_signals import StopSignals

_log = logging.getLogger(__name__)
_progress = logging.getLogger("onefold.progress")

_EVALUATION = 2**31  # stands for the step in the seed of an epoch's evaluation; no epoch has that many steps


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The surroundings of a training, which do not change what it computes.

    `evaluate` is given a copy of the averaged network, in eval mode, after each epoch, and gives its metrics; "top1"
    decides which epoch is best, of equal ones the last. It is called on every process, and must not communicate. Where
    each evaluates its own share of the images, `combine` makes the metrics of what all have given, by rank; without it
    those of the first process count. With `evaluate_start` it is called before the first step too. `metadata` goes
    into the header of the weights' file. With `resume` the run in `out` goes on. `teachers` gives the logits of the
    networks that `plan.distill` names. `settings` are kept with each checkpoint, as they are.
    """

    out: Path
    evaluate: Callable[[nn.Module], Any]
    combine: Callable[[Sequence[Any]], Mapping[str, float]] | None = None
    world: World = field(default_factory=World)
    metadata: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False
    on_progress: Callable[[Progress], None] | None = None
    teachers: Teachers | None = None
    evaluate_start: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def train(model: nn.Module, batches: Batches, plan: Plan, run: RunOptions) -> Checkpoint:
    """Train `model`, in place, as `plan` says, and return the run's last checkpoint.

    The run folder then holds `best/model.safetensors` (averaged weights), `last/` and `log.jsonl`. A run that is
    resumed ends in the bits of one that was not stopped: in one process, or in any number that divides the logical
    workers where plan.reduce is "exact" (see `logical_workers`). `checkpoint` lists the order of a resume.

    Raises BadArgument where `out` holds a run and resume is false, BadCheckpoint where there is none to resume or it
    is of another plan, data or model, RunBusy, NotWritable, NonFiniteLoss (before the weights take it in), LostWorker,
    and Stopped after a SIGTERM, SIGINT or SIGHUP, once the state is saved.
    """
    with ExitStack() as lock, BackgroundWriter() as writer, StopSignals() as signals:
        with run.world.raise_together():  # the others go on once the folder is locked and repaired
            if run.world.is_main:
                if run.resume and not run.out.exists():
                    Checkpoint.load(run.out)  # raises; taking the lock would make the folder first
                lock.enter_context(RunFolder(run.out).lock())

        # ---- The start: a state that follows from the plan, or the one that was saved
        seed_everything(plan.seed, *([run.world.rank] if run.world.rank else []))
        trainer = _Trainer(model, batches, plan, run, (writer, signals))
        trainer.resume() if run.resume else trainer.start()
        if run.evaluate_start:
            trainer.evaluate_start()

        # ---- The epochs: their steps and a checkpoint, then an evaluation and a checkpoint
        while not trainer.saved.is_complete:
            trainer.train_epoch()
            trainer.finish_epoch()
        trainer.flush()
        return trainer.saved


class _Trainer:
    """The state of a run, the folder it is saved to, and the callback that follows it."""

    saved: Checkpoint  # the last one; set by `start` and `resume`

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        plan: Plan,
        run: RunOptions,
        services: tuple[BackgroundWriter, StopSignals],
    ) -> None:
        if len(batches) < 1:
            raise BadData("there is no batch to train on: are there fewer images than plan.batch_size?")
        if (plan.distill is None) != (run.teachers is None):
            raise BadArgument("plan.distill and teachers go together: give Run(teachers=...) where the plan distills")
        self.batches, self.plan, self.run = batches, plan, run
        self.writer, self.signals = services
        with run.world.raise_together():
            self.data = batches.fingerprint()
        data_of_first = run.world.broadcast(self.data)
        with run.world.raise_together():
            if self.data != data_of_first:
                raise BadData(f"its images are not those of the first process: {self.data}, not {data_of_first}")
        self.folder, self.world = RunFolder(run.out), run.world
        self.workers = local_workers(plan, run.world)
        self.batches_per_worker = len(batches) // len(self.workers)
        steps = math.ceil(self.batches_per_worker / plan.accumulate)
        self.state = TrainState(model, plan, run.world, steps_per_epoch=steps, teachers=run.teachers)
        self.throughput = Throughput()

    # ---------------------------------------------------------------------------- start or resume

    def start(self) -> None:
        """Start a new run. Its first checkpoint is of step 0: it shows that there is room before hours are spent."""
        with self.world.raise_together():
            if self.world.is_main and self.folder.has_run:
                raise BadArgument(f"{self.run.out} already holds a run: resume it, or choose another folder")
            if self.world.is_main:
                self.folder.truncate_log(0)  # of a run that was killed before its first checkpoint
        self._log_event("start", plan=self.plan.to_dict(), data=self.data, **self._environment())
        self._save()
        self.flush()

    def resume(self) -> None:
        """Go on from the checkpoint, in the order that `checkpoint` lists."""
        # One process reads the disk, so that all of them go on from the same checkpoint.
        self.saved = self.world.run_on_main(lambda: load_for_resume(self.folder))
        threads = self.saved.made_with.get("threads", "")
        if self.plan.reduce == "exact" and threads.isdecimal() and int(threads) != torch.get_num_threads():
            # Sums are split among threads, so another number of them would round differently.
            _log.info("%s threads, as when the run was started", threads)
            torch.set_num_threads(int(threads))
        self._check_same_run(self.saved)
        self.state.load_checkpoint_(self.saved)
        changed: dict[str, bool] = {}
        if self.world.is_main and self.saved.log_sha256 not in ("", self.folder.log_sha256(self.saved.log_bytes)):
            _log.warning(
                "%s is not as the training wrote it: it may say anything of the epochs before", self.folder.log
            )
            changed = {"log_changed": True}
        if self.saved.is_complete:
            _log.info("%s is complete: all %d epochs are done", self.run.out, self.plan.epochs)
            return
        position = self.saved.position
        if self.world.is_main:
            self.folder.truncate_log(self.saved.log_bytes)
        self._log_event("resume", epoch=position.epoch + 1, step=position.global_step, **self._environment(), **changed)
        # Last, since everything above may have drawn random numbers. A checkpoint holds the states of the first
        # process alone, so that it says nothing of their number; the others are seeded anew.
        if self.world.is_main:
            self.saved.randomness.restore(self.world.device)
        else:
            seed_everything(self.plan.seed, self.world.rank, position.global_step)

    def _check_same_run(self, saved: Checkpoint) -> None:
        """Raise BadCheckpoint where plan or data would compute something else; warn where only the last bits may."""
        steps = self.state.position.steps_per_epoch
        changed = [f"plan.{difference}" for difference in saved.plan.differences(self.plan)]
        # the part before the "-" is all that older checkpoints have, and says nothing of the images' contents
        if saved.data != (self.data if "-" in saved.data else self.data.partition("-")[0]):
            changed.append(f"data: {saved.data} -> {self.data}")
        if saved.position.steps_per_epoch != steps:
            changed.append(f"steps per epoch: {saved.position.steps_per_epoch} -> {steps}")
        if changed:
            raise BadCheckpoint(f"{self.run.out} is another run; choose another folder. Changed: {'; '.join(changed)}")
        may_change = "processes" if self.plan.reduce == "exact" else None
        for key, value in self._environment().items():
            before = saved.made_with.get(key)
            if key != may_change and before != value:
                _log.warning("%s: was %s, is %s: the last bits will not be those of one run", key, before, value)

    # ---------------------------------------------------------------------------------- the steps

    def train_epoch(self) -> None:
        """Take the steps of this epoch that are still to do, with a checkpoint wherever the plan wants one."""
        state, every = self.state, 0
        if self.plan.checkpoint_every is not None:
            every = max(1, self.plan.checkpoint_every.steps(state.position.steps_per_epoch))
        state.train_mode_()
        self.throughput = Throughput()
        for micro_batches in self._steps():
            # Whether to stop, or that a checkpoint could not be written, travels with the sums of the step.
            loss = state.step(micro_batches, lambda: bool(self.signals.received) or self.writer.has_failed)
            if not math.isnan(loss):
                self.throughput.add(sum(len(labels) for _, labels in micro_batches) * self.world.size)
                self._report_progress(loss)
            position = state.position
            if every and position.step < position.steps_per_epoch and position.global_step % every == 0:
                self._save()  # the end of an epoch has checkpoints of its own, before and after the evaluation
            if state.flagged or self.world.size == 1:
                self._check_stop()

    def _steps(self) -> Iterator[list[Batch]]:
        """Give the micro-batches of one step at a time: `accumulate` of each logical worker of this process."""
        position, accumulate, world = self.state.position, self.plan.accumulate, self.world
        if position.step == position.steps_per_epoch:
            return
        batches = iter(self.batches.epoch(position.epoch, position.step * accumulate * len(self.workers)))
        for step in range(position.step, position.steps_per_epoch):
            micro_batches: list[Batch] = []
            for worker in self.workers:
                # Augmentation draws from states seeded by worker, epoch and step: what a batch looks like then
                # depends neither on when the run was resumed nor on which process loads it.
                with forked_rng(world.device, self.plan.seed, worker, position.epoch, step):
                    micro_batches += islice(batches, min(accumulate, self.batches_per_worker - step * accumulate))
            count = sum(len(labels) for _, labels in micro_batches) * world.size
            if not micro_batches:
                raise BadData(
                    f"epoch {position.epoch + 1} ended at step {step} of {position.steps_per_epoch}: images are missing"
                )
            if count > self.plan.batch_size:
                raise BadArgument(f"plan.batch_size is {self.plan.batch_size}, but the batches give {count} in a step")
            yield micro_batches

    # ---------------------------------------------------------------- evaluation and checkpoint

    def evaluate_start(self) -> None:
        """Evaluate the network that the run starts from, as the first candidate for the best, before the first step."""
        if self.state.position.global_step or self.state.metrics:
            return  # a resumed run has done so already
        _progress.debug("validating the network before the first step")
        best_weights = self._evaluate(epoch=0)
        self._log_event("evaluation", epoch=0, step=0, **self.state.metrics)
        if self.world.is_main:
            _log.info("before the first step: val top-1 %.2f %%", self.state.metrics["top1"])
        self._save(best_weights)

    def finish_epoch(self) -> None:
        """Save, evaluate the epoch, log it, and save again; its weights become the best where its "top1" is.

        An evaluation may take as long as many steps, and none of them is lost where the process is killed within it.
        """
        state, position = self.state, self.state.position
        if not state.num_images:
            raise BadData(f"not one image of epoch {position.epoch + 1} could be read: why is said above")
        if self.saved.position != position:
            self._save()
        best_weights = self._evaluate(epoch=position.epoch + 1)
        loss, (lr, decay) = state.loss_sum / state.num_images, state.lr_and_decay(position.global_step - 1)
        entry = {"epoch": position.epoch + 1, "step": position.global_step, "loss": loss, "lr": lr}
        entry |= {"weight_decay": decay, "images_per_s": self.throughput.images_per_s}
        metrics = {f"eval_{name}" if name in entry else name: value for name, value in state.metrics.items()}
        self._log_event("epoch", **entry, **metrics)
        self._report_progress(loss, is_evaluation=True)
        state.end_epoch()
        self._save(best_weights)
        self._check_stop()

    def _evaluate(self, epoch: int) -> dict[str, Tensor]:
        """Evaluate on all processes, and share the metrics; gives the weights to keep if they are the best yet."""
        state, position = self.state, self.state.position
        state.check_weights_finite()  # the update of the last step was not followed by a loss that would have shown it
        share: tuple[Any, ...] = ()
        with self.world.raise_together():
            try:
                # The user's evaluation may draw random numbers and must not move those of the training; and it may
                # take long, but has no effects of its own, so that a signal to any process may end it at once.
                with (
                    forked_rng(self.world.device, self.plan.seed, 0, position.epoch, _EVALUATION),
                    self.signals.raise_on_signal(self.world),
                ):
                    share = (self.run.evaluate(copy.deepcopy(state.eval_model).eval()),)
            except Interrupted:
                pass
        shares = self.world.all_gather(share)
        if not all(shares):  # one was interrupted; the evaluation is the first thing after a resume
            self._stop()
        parts = [part for (part,) in shares]
        result: Mapping[str, float] = self.run.combine(parts) if self.run.combine else parts[0]
        state.metrics = {str(name): float(value) for name, value in result.items()}
        if "top1" not in state.metrics:
            raise BadArgument(
                f"evaluate must give 'top1', by which the best epoch is chosen; it gave {sorted(state.metrics)}"
            )
        # Of equals the later one: it has learnt longer, and where nothing was gained, it is not the start that ships.
        is_best = state.metrics["top1"] >= state.best.get("top1", -math.inf)
        if is_best:
            state.best = {**state.metrics, "epoch": epoch, "step": position.global_step}
        return clone_tensors(state.eval_model.state_dict()) if is_best and self.world.is_main else {}

    def _save(self, best_weights: Mapping[str, Tensor] | None = None) -> None:
        """Start to write the state, as it is now, as the last checkpoint, after the best weights if there are any.

        The state is copied here and written in the background. The best weights come first: were the process killed
        between the two, the resumed run would evaluate the same epoch again, and write the same best weights again.
        """
        log_bytes = self.folder.log_bytes()
        saved = self.state.to_checkpoint(self.data, log_bytes, self._environment())
        log_sha256 = self.folder.log_sha256(log_bytes) if self.world.is_main else ""
        self.saved = saved = replace(saved, log_sha256=log_sha256, settings=self.run.settings)
        folder, metadata = self.folder, self.run.metadata

        def write() -> None:
            if best_weights:
                save_best(folder, best_weights, saved.best, metadata)
            saved.save(folder, metadata)

        if self.world.is_main:
            self.writer.submit(write)

    # ------------------------------------------------------------------------------- the end

    def _check_stop(self) -> None:
        """Between two steps: end where a signal asked for it, or where the last checkpoint could not be written.

        All processes come here together, and agree by one integer, so that none waits for one that has ended.
        """
        wanted = self.world.max(2 if self.writer.has_failed else 1 if self.signals.received else 0)
        if wanted == 2:
            self.flush()
        if wanted == 1 and not self.saved.is_complete:
            self._stop()

    def flush(self) -> None:
        """Wait until the last checkpoint is on the disk; raises on every process where it could not be written."""
        self.writer.wait()
        if self.world.max(self.writer.has_failed):
            self.writer.raise_error()  # on the first process, which knows why
            raise NotWritable("the first process could not save: its message says why")

    def _stop(self) -> NoReturn:
        position = self.state.position
        if self.saved.position != position:
            self._save()
        self.flush()
        by = "Ctrl-C" if self.signals.received == "SIGINT" else self.signals.received or "a signal"
        raise Stopped(
            f"stopped by {by} at epoch {position.epoch + 1}, step {position.step} of {position.steps_per_epoch}; "
            f"everything is saved: go on with `onefold train --resume {self.folder.path}`"
        )

    # ---------------------------------------------------------------------------------- log and progress

    def _environment(self) -> dict[str, str]:
        """What else the last bits depend on; a checkpoint keeps it as `made_with`."""
        return {
            "torch": str(torch.__version__),
            "threads": str(torch.get_num_threads()),
            "device": self.world.device.type,
            "processes": str(self.world.size),
        }

    def _log_event(self, kind: str, **values: Any) -> None:
        if self.world.is_main:
            self.folder.append_log({"kind": kind, **values})

    def _report_progress(self, loss: float, *, is_evaluation: bool = False) -> None:
        if not self.run.on_progress or not self.world.is_main:
            return
        position, total = self.state.position, self.plan.epochs * self.state.position.steps_per_epoch
        progress = Progress(
            epoch=position.epoch + 1,
            epochs=self.plan.epochs,
            step=position.step,
            steps=position.steps_per_epoch,
            loss=loss,
            lr=self.state.lr_and_decay(position.global_step - 1)[0],
            images_per_s=self.throughput.images_per_s,
            eta_s=self.throughput.seconds_per_step * (total - position.global_step),
            metrics=self.state.metrics,
            is_evaluation=is_evaluation,
            memory_bytes=memory_in_use(self.world.device),
        )
        self.run.on_progress(progress)
