"""Checkpoint: everything that a run needs to go on as if it had never stopped.

The order of a resume, which `loop.train` follows:

1. Lock the run folder, so that no other process writes to it, and repair what a killed process left half-done.
2. Read `last/` and check every file's size and SHA-256; where it is damaged take `previous/`, with a warning.
   With neither, refuse. Nothing in a checkpoint is code: tensors are safetensors, the rest is JSON.
3. Compare the plan, the data's fingerprint and the steps per epoch with those of the run, and refuse with the
   differences: a resumed run is the same run.
4. Put back the weights, the averaged weights, the optimizer's tensors (by parameter name) and the loss scale.
   Rates are not stored: they are functions of the plan and the step.
5. Cut the log back to the length it had, so that no epoch stands in it twice.
6. Start the batches at the epoch and the step.
7. Restore the random states last, after everything that might have drawn random numbers.

runs/<name>/
    .lock       locked by the process that writes here, which .pid names
    log.jsonl   one JSON object per line
    last/       the checkpoint that a resume goes on from  } sealed: every file's size and SHA-256
    previous/   the one before it                          } are in manifest.json, and are checked
    best/       the weights to use                         } at every load
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from onefold.checksums import copy_sealed_folder, read_sealed_folder, sealed_safetensors, write_sealed_folder
from onefold.errors import BadArgument, BadCheckpoint, NotWritable, RunBusy
from onefold.file_io import parse_json, read_plain_file
from onefold.train.hyperparameters import Plan
from onefold.train.rng_state import RandomState

# -------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of one run are."""

    path: Path

    @property
    def last(self) -> Path:
        """The checkpoint that a resume takes."""
        return self.path / "last"

    @property
    def previous(self) -> Path:
        """The checkpoint before it, which is taken where `last` is damaged."""
        return self.path / "previous"

    @property
    def best(self) -> Path:
        """The weights of the best epoch."""
        return self.path / "best"

    @property
    def log(self) -> Path:
        """One JSON object per line."""
        return self.path / "log.jsonl"

    @property
    def has_run(self) -> bool:
        """Whether a checkpoint, damaged or not, is here."""
        return self.last.exists() or self.previous.exists()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """A block in which no other process writes here; what a killed one left half-done is repaired first.

        The kernel releases the lock when the process ends, however it ends; that the file exists means nothing.
        Raises RunBusy naming the process that has the lock, NotWritable where nothing can be written.
        """
        lock, holder = FileLock(self.path / ".lock", timeout=0, thread_local=False), self.path / ".pid"
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                named = ""
                with suppress(OSError):
                    named = read_plain_file(holder).decode("utf-8", "replace")[:200].strip()
                raise RunBusy(
                    f"{self.path} is in use by {named or 'another process'}: wait for it or choose another folder"
                ) from error
        try:
            for path in (holder, self.log):  # a pipe would be waited for
                if os.path.lexists(path) and not path.is_file():
                    raise NotWritable(f"cannot write {path}: it is not a plain file; remove it")
            with _writing(self.path):
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
                self._repair()
            yield
        finally:
            lock.release()

    def append_log(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log, on the disk when this returns; NaN and infinities, which JSON has not, become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        line = json.dumps(finite, allow_nan=False)
        with _writing(self.log), self.log.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def log_bytes(self) -> int:
        """The length of the log."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_sha256(self, length: int) -> str:
        """The SHA-256 of the log's first `length` bytes."""
        content = self.log.read_bytes() if self.log.exists() else b""
        return hashlib.sha256(content[:length]).hexdigest()

    def truncate_log(self, length: int) -> None:
        """Remove from the log what was added after it had `length` bytes."""
        if self.log_bytes() > length:
            with _writing(self.log):
                os.truncate(self.log, length)

    def _repair(self) -> None:
        """Undo what a process that was killed within `replacing` has left: a folder that was being replaced."""
        for part in (self.last, self.previous, self.best):
            for old in sorted(self.path.glob(f".{part.name}.*.old")):
                if part.exists():
                    shutil.rmtree(old)
                else:
                    old.rename(part)
            for new in self.path.glob(f".{part.name}.*.new"):
                shutil.rmtree(new)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A block whose OSError is NotWritable about `path`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise NotWritable(f"cannot write {path}: {why}; make room or choose another folder") from error


_log = logging.getLogger(__name__)

WEIGHTS_FILE, _AVERAGE, _STATE, PROGRESS_FILE = (
    "model.safetensors",
    "ema.safetensors",
    "state.safetensors",
    "progress.json",
)


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is: `step` of `steps_per_epoch` optimizer steps done in epoch `epoch`, both counted from 0.

    step == steps_per_epoch says that the epoch's evaluation is what comes next.
    """

    epoch: int
    step: int
    steps_per_epoch: int

    @property
    def global_step(self) -> int:
        """Optimizer steps done since the run began."""
        return self.epoch * self.steps_per_epoch + self.step


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The complete state of a run between two optimizer steps, on the CPU.

    `metrics` are those of the last evaluation, `best` those of the best with its "epoch" (empty before the first).
    `loss_sum` and `num_images` are the epoch's so far; `made_with` says what else the last bits depend on. Of the log
    it has the length and the SHA-256, and `settings` are the caller's own: what else must be as it was at a resume.
    """

    plan: Plan
    data: str
    position: Position
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]  # empty without averaging
    optimizer: Mapping[str, Tensor]  # <parameter>/<slot>
    scaler: Mapping[str, Any]
    randomness: RandomState
    metrics: Mapping[str, float]
    best: Mapping[str, float]
    loss_sum: float
    num_images: int
    log_bytes: int
    made_with: Mapping[str, Any]
    log_sha256: str = ""  # of older checkpoints nothing is known
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the run has done all of its epochs."""
        return self.position.epoch >= self.plan.epochs

    def digest(self) -> str:
        """Give the SHA-256 over name, type, shape and bytes of all weights, averages and optimizer tensors, by name."""
        sums = hashlib.sha256()
        for part in (self.weights, self.average, self.optimizer):
            for name, value in sorted(part.items()):
                sums.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                sums.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sums.hexdigest()

    def save(self, folder: RunFolder, metadata: Mapping[str, str]) -> None:
        """Make this the folder's `last/`, and what was `last/` its `previous/`.

        Raises NotWritable where there is no room; one of the two then is what `last/` was.
        """
        try:
            copy_sealed_folder(folder.last, folder.previous)
            write_sealed_folder(folder.last, self._contents(metadata))
        except NotWritable as error:
            kept = "; the checkpoint before it is kept: resume when there is room" if folder.has_run else ""
            raise NotWritable(f"{error}{kept}") from error

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read the newest undamaged checkpoint of the run folder `path`; raises BadCheckpoint where there is none."""
        folder, faults = RunFolder(path), []
        for sealed in (folder.last, folder.previous):
            if not sealed.exists():
                continue
            try:
                return cls._from_contents(read_sealed_folder(sealed), sealed)
            except BadCheckpoint as error:
                faults.append(str(error))
                _log.warning("%s; looking for the checkpoint before it", error)
        if faults:
            raise BadCheckpoint(f"no undamaged checkpoint in {path}: {'; '.join(faults)}")
        raise BadCheckpoint(f"there is no checkpoint in {path}: start the run without resume, or name its folder")

    def _contents(self, metadata: Mapping[str, str]) -> dict[str, bytes]:
        state = {f"optimizer/{name}": value for name, value in self.optimizer.items()}
        state |= {f"randomness/{name}": value for name, value in self.randomness.tensors.items()}
        progress = {
            "plan": self.plan.to_dict(),
            "data": self.data,
            "position": asdict(self.position),
            "scaler": dict(self.scaler),
            "randomness": self.randomness.numbers,
            "metrics": dict(self.metrics),
            "best": dict(self.best),
            "loss_sum": self.loss_sum,
            "num_images": self.num_images,
            "log_bytes": self.log_bytes,
            "made_with": dict(self.made_with),
            "log_sha256": self.log_sha256,
            "settings": dict(self.settings),
        }
        weights = {WEIGHTS_FILE: self.weights, **({_AVERAGE: self.average} if self.average else {})}
        contents = {name: _weights_file(tensors, metadata) for name, tensors in weights.items()}
        contents[_STATE] = save_tensors(state)
        contents[PROGRESS_FILE] = json.dumps(progress, indent=1).encode()
        return contents

    @classmethod
    def _from_contents(cls, contents: Mapping[str, bytes], folder: Path) -> Checkpoint:
        try:
            progress = parse_json(contents[PROGRESS_FILE])
            state = load_tensors(contents[_STATE])
            randomness = RandomState(tensors=_without_prefix(state, "randomness/"), numbers=progress.pop("randomness"))
            return cls(
                weights=load_tensors(contents[WEIGHTS_FILE]),
                average=load_tensors(contents[_AVERAGE]) if _AVERAGE in contents else {},
                optimizer=_without_prefix(state, "optimizer/"),
                randomness=randomness,
                plan=Plan.from_dict(progress.pop("plan")),
                position=Position(**progress.pop("position")),
                **progress,
            )
        except (SafetensorError, BadArgument, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{folder} is undamaged, but this version cannot read it: {error}") from error


def save_best(
    folder: RunFolder, weights: Mapping[str, Tensor], metrics: Mapping[str, float], metadata: Mapping[str, str]
) -> None:
    """Make `weights`, under `metadata`, the folder's `best/model.safetensors`, with its metrics beside it."""
    table = json.dumps(dict(metrics), indent=1).encode()
    write_sealed_folder(folder.best, {WEIGHTS_FILE: _weights_file(weights, metadata), "metrics.json": table})


def _weights_file(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Give the file of weights that other verbs open; it can be checked without the manifest of its folder too."""
    return sealed_safetensors(save_tensors(dict(weights), dict(metadata)))


def load_for_resume(folder: RunFolder) -> Checkpoint:
    """Do as `Checkpoint.load`, in the process that has the lock: a damaged `last/` is replaced by `previous/`.

    Otherwise the next save would make the damaged one the only other checkpoint.
    """
    checkpoint = Checkpoint.load(folder.path)
    try:
        read_sealed_folder(folder.last)
    except BadCheckpoint:
        copy_sealed_folder(folder.previous, folder.last)
    return checkpoint


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


class BackgroundWriter:
    """A block in which jobs are done one after another by a thread; it ends when the last one has.

    So steps go on while a checkpoint is serialized, hashed, and written. At most one job is under way: `submit` waits
    for the one before. After one that failed no other is done; `raise_error` raises its error, and so does the end of
    the block where nothing else is being raised.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether `raise_error` would raise."""
        return self._error is not None

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done, once the one before it is."""
        self.wait()
        if not self.has_failed:
            self._thread = threading.Thread(target=self._run, args=(job,), name="onefold-writer")
            self._thread.start()

    def wait(self) -> None:
        """Wait until the last job has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def raise_error(self) -> None:
        """Raise the error of the job that failed, if one did."""
        if self._error is not None:
            raise self._error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.wait()
        if error is None:
            self.raise_error()
