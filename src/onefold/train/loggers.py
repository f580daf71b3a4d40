"""Listeners: who else hears of a run's progress. TensorBoard where it is installed; W&B and trackio when asked for.

log.jsonl is not one of them: it is part of the run, and cut to the step that a resume goes on from. A listener lives
outside of the run, so a resumed run must not tell it twice: TensorBoard is given the step from which its old points
are void; the others are told each step at most once, by a note in the run folder that is written before they are told.
Nothing here changes what a training computes, and a listener that fails is let go with a warning.
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
from onefold.storage import write_text


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: `step` of `steps` in epoch `epoch` of `epochs`, counted from 1; speeds are this epoch's.

    `is_evaluation` tells the one that follows an evaluation from those of the steps: its `metrics` are new, and its
    `loss` is the mean of the epoch. `memory_bytes` is what the process holds, on a GPU what torch holds there.
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
    def total(self) -> int:
        """Steps done since the run began, over all epochs and lives."""
        return (self.epoch - 1) * self.steps + self.step


class Pace:
    """How fast the steps of one epoch go; NaN before the first."""

    def __init__(self) -> None:
        self._since, self._until = time.monotonic(), math.nan
        self._num_images, self._num_steps = 0, 0

    def add(self, num_images: int) -> None:
        """Another step, of `num_images`, is done."""
        self._until = time.monotonic()
        self._num_images, self._num_steps = self._num_images + num_images, self._num_steps + 1

    @property
    def images_per_s(self) -> float:
        """Images a second, loading included and evaluation not."""
        return self._num_images / max(self._until - self._since, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """The mean time of a step, loading included."""
        return (self._until - self._since) / max(self._num_steps, 1)


def memory_in_use(device: torch.device) -> int:
    """Bytes that torch holds on a GPU, or that this process holds in memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    with suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


REMOTE = ("wandb", "trackio")
"""The services that `--log-to` names."""

_POINTS_AN_EPOCH = 50
_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Whoever wants to hear of a run."""

    def hear(self, at: Progress, values: Mapping[str, float]) -> None:
        """Keep `values`, name -> number, which belong to step `at.total`."""

    def close(self) -> None:
        """Write what is still held back."""


def check_names(names: Sequence[str]) -> None:
    """Raise BadArgument for a service that is not known, MissingExtra for one that is not installed."""
    for name in names:
        if name not in REMOTE:
            raise BadArgument(f"--log-to knows {' and '.join(REMOTE)}, not {name!r}; TensorBoard needs no asking")
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(f'--log-to {name} needs {name}: pip install "onefold[{name}]"')


@contextmanager
def listening(
    out: Path,
    names: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Callable[[Progress], None]]:
    """What to give to `Run.on_progress`, so that `on_progress`, TensorBoard and the services `names` hear of it.

    `config` is the recipe, for the services that show one.
    """
    check_names(names)
    heard: list[Listener] = [TensorBoard(out / "tensorboard")] if has_tensorboard() else []
    heard += [Service(name, out, config or {}) for name in names]
    with ExitStack() as stack:
        for listener in heard:
            stack.callback(_kindly, listener, listener.close)

        def tell(at: Progress) -> None:
            if on_progress:
                on_progress(at)
            values = values_of(at) if heard else {}
            for listener in list(heard) if values else ():
                if not _kindly(listener, listener.hear, at, values):
                    heard.remove(listener)

        yield tell


def values_of(at: Progress) -> dict[str, float]:
    """The points of a step, chosen by the step alone so that an epoch has about fifty; of an evaluation, all."""
    if at.is_evaluation:
        return {
            "epoch": float(at.epoch),
            "train/epoch_loss": at.loss,
            **{f"eval/{k}": v for k, v in at.metrics.items()},
        }
    if at.step % max(1, at.steps // _POINTS_AN_EPOCH):
        return {}
    return {"train/loss": at.loss, "train/lr": at.lr, "train/images_per_s": at.images_per_s}


def has_tensorboard() -> bool:
    """Whether TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def _kindly(listener: Listener, verb: Callable[..., None], *given: Any) -> bool:
    """Call a listener's verb; a failure there is a warning, since hours of training matter more than its curve."""
    try:
        verb(*given)
    except Exception as error:
        what = type(listener).__name__.lower() if not isinstance(listener, Service) else listener.name
        _log.warning("%s failed and hears no more of this run: %s: %s", what, type(error).__name__, error)
        return False
    return True


class TensorBoard:
    """Scalars in `folder`, which `tensorboard --logdir runs` finds. A Listener."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def hear(self, at: Progress, values: Mapping[str, float]) -> None:
        """Add the points; the first call says from which step on the points of an earlier life are void."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=at.total, flush_secs=10)
        for name, value in values.items():
            self._writer.add_scalar(name, value, at.total)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()


class Service:
    """W&B or trackio, which have the same three verbs: init, log, finish. A Listener."""

    def __init__(self, name: str, out: Path, config: Mapping[str, Any]) -> None:
        self.name, self.out, self.config = name, out, config
        self._note = out / f"{name}.json"
        self._run: Any = None
        self._told: dict[str, Any] = {}

    def hear(self, at: Progress, values: Mapping[str, float]) -> None:
        """Tell the service, unless an earlier life has; the note comes first, so that nothing is told twice."""
        if self._run is None:
            self._begin()
        key = "evaluation" if at.is_evaluation else "step"
        if at.total <= self._told.get(key, 0):
            return
        self._told[key] = at.total
        write_text(self._note, json.dumps(self._told) + "\n")
        self._run.log(dict(values), step=at.total)

    def close(self) -> None:
        """Let the service finish its run."""
        if self._run is not None:
            self._run.finish()

    def _begin(self) -> None:
        self._told = _read(self._note) or {"id": uuid.uuid4().hex}
        module = importlib.import_module(self.name)
        common: dict[str, Any] = {"project": "onefold", "config": dict(self.config), "resume": "allow"}
        if self.name == "wandb":
            own = {"id": self._told["id"], "name": self.out.name, "dir": str(self.out)}
        else:
            own = {"name": f"{self.out.name}-{self._told['id'][:6]}"}
        self._run = module.init(**common, **own)


def _read(note: Path) -> dict[str, Any]:
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("id"), str) else {}
