"""Progress of a run, and the loggers that follow it: TensorBoard where it is installed, W&B and trackio on request.

log.jsonl is not one of them: it is part of the run, and cut to the step that a resume goes on from. A logger lives
outside of the run, so a resumed run must not log a step twice: TensorBoard is given the step from which its old points
are void; the services get each step at most once, by a state file in the run folder that is written before the call.
Nothing here changes what a training computes, and a logger that fails is dropped with a warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from onefold.errors import BadArgument, MissingExtra
from onefold.file_io import read_json, write_text


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: `step` of `steps` in epoch `epoch` of `epochs`, counted from 1; speeds are this epoch's.

    With `is_evaluation` it follows an evaluation, and not a step: its `metrics` are new, and its `loss` is the mean of
    the epoch. `memory_bytes` is what the process has allocated, on a GPU what torch has reserved there.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_s: float
    eta_s: float
    metrics: Mapping[str, float]  # of the last evaluation; empty before the first
    is_evaluation: bool = False
    memory_bytes: int = 0

    @property
    def global_step(self) -> int:
        """Steps done since the run began, over all epochs and resumes."""
        return (self.epoch - 1) * self.steps + self.step


class Throughput:
    """The speed of the steps of one epoch; NaN before the first."""

    def __init__(self) -> None:
        self._start, self._end = time.monotonic(), math.nan
        self._num_images, self._num_steps = 0, 0

    def add(self, num_images: int) -> None:
        """Count a step of `num_images`."""
        self._end = time.monotonic()
        self._num_images, self._num_steps = self._num_images + num_images, self._num_steps + 1

    @property
    def images_per_s(self) -> float:
        """Images per second, with the loading and without the evaluation."""
        return self._num_images / max(self._end - self._start, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """The mean time of a step, with the loading."""
        return (self._end - self._start) / max(self._num_steps, 1)


def memory_in_use(device: torch.device) -> int:
    """Give the bytes that torch has reserved on a GPU, or this process has in memory; 0 where that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    with suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


_SERVICES = ("wandb", "trackio")
"""The services that `--log-to` names."""

_POINTS_PER_EPOCH = 50
_log = logging.getLogger(__name__)


class Logger(Protocol):
    """Where the values of a run are logged to."""

    name: str

    def log(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Log `values`, name -> number, at step `progress.global_step`."""

    def close(self) -> None:
        """Write what is still in memory."""


def check_services(names: Sequence[str]) -> None:
    """Raise BadArgument for a service that is not known, MissingExtra for one that is not installed."""
    for name in names:
        if name not in _SERVICES:
            raise BadArgument(f"--log-to takes {' and '.join(_SERVICES)}, not {name!r}; TensorBoard needs no option")
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(f"--log-to {name} needs {name}", name)


@contextmanager
def open_loggers(
    out: Path,
    services: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Callable[[Progress], None]]:
    """Give the callback for `Run.on_progress` that calls `on_progress` and logs to TensorBoard and the `services`.

    `config` is the recipe, for the services that show one. Raises as `check_services`.
    """
    check_services(services)
    loggers: list[Logger] = [TensorBoardLogger(out / "tensorboard")] if has_tensorboard() else []
    loggers += [ServiceLogger(name, out, config or {}) for name in services]
    with ExitStack() as stack:
        for logger in loggers:
            stack.callback(_succeeds, logger, logger.close)

        def callback(progress: Progress) -> None:
            if on_progress:
                on_progress(progress)
            values = progress_scalars(progress) if loggers else {}
            for logger in list(loggers) if values else ():
                if not _succeeds(logger, logger.log, progress, values):
                    loggers.remove(logger)

        yield callback


def progress_scalars(progress: Progress) -> dict[str, float]:
    """Give the values to log: all of an evaluation, and of some fifty steps per epoch, chosen by the step alone."""
    if progress.is_evaluation:
        metrics = {f"eval/{name}": value for name, value in progress.metrics.items()}
        return {"epoch": float(progress.epoch), "train/epoch_loss": progress.loss, **metrics}
    if progress.step % max(1, progress.steps // _POINTS_PER_EPOCH):
        return {}
    return {"train/loss": progress.loss, "train/lr": progress.lr, "train/images_per_s": progress.images_per_s}


def has_tensorboard() -> bool:
    """Whether TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def _succeeds(logger: Logger, method: Callable[..., None], *arguments: Any) -> bool:
    """Call a logger's method; a failure there is a warning, since hours of training matter more than its curve."""
    try:
        method(*arguments)
    except Exception as error:
        _log.warning("%s failed and gets no more of this run: %s: %s", logger.name, type(error).__name__, error)
        return False
    return True


class TensorBoardLogger:
    """Scalars in `folder`, which `tensorboard --logdir runs` finds. A Logger."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def log(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Add the points; the first call says from which step on the points from before a resume are void."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=progress.global_step, flush_secs=10)
        for name, value in values.items():
            self._writer.add_scalar(name, value, progress.global_step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()


class ServiceLogger:
    """W&B or trackio, which have the same three calls: init, log, finish. A Logger."""

    def __init__(self, name: str, out: Path, config: Mapping[str, Any]) -> None:
        self.name, self.out, self.config = name, out, config
        self._state_file = out / f"{name}.json"  # the service's id of the run, and the last steps that were logged
        self._run: Any = None
        self._state: dict[str, Any] = {}

    def log(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Log a step, unless it was logged before a resume; the file is written first, so that none is logged twice."""
        if self._run is None:
            self._start()
        key = "evaluation" if progress.is_evaluation else "step"
        if progress.global_step <= self._state.get(key, 0):
            return
        self._state[key] = progress.global_step
        write_text(self._state_file, json.dumps(self._state) + "\n")
        self._run.log(dict(values), step=progress.global_step)

    def close(self) -> None:
        """Let the service finish its run."""
        if self._run is not None:
            self._run.finish()

    def _start(self) -> None:
        try:
            state = read_json(self._state_file)
        except (OSError, ValueError):
            state = None
        is_known = isinstance(state, dict) and isinstance(state.get("id"), str)
        self._state = state if is_known else {"id": uuid.uuid4().hex}
        module = importlib.import_module(self.name)
        options: dict[str, Any] = {"project": "onefold", "config": dict(self.config), "resume": "allow"}
        if self.name == "wandb":
            options |= {"id": self._state["id"], "name": self.out.name, "dir": str(self.out)}
        else:  # trackio resumes by name, so that it has to be unique
            options |= {"name": f"{self.out.name}-{self._state['id'][:6]}"}
        self._run = module.init(**options)
