"""Checkpoint: everything that a run needs to go on as if it had never stopped.

The order of a resume, which `loop.train` follows:

1. Hold the run folder, so that nobody else writes to it, and put right what a killed process left half-done.
2. Read `last/` and check every file's size and SHA-256; where it is damaged take `previous/`, with a warning.
   With neither, refuse. Nothing in a checkpoint is code: tensors are safetensors, the rest is JSON.
3. Compare the plan, the data's fingerprint and the steps an epoch has with those of the run, and refuse
   with the differences: a resumed run is the same run.
4. Put back the weights, the averaged weights, the optimizer's tensors (by parameter name) and the loss scale.
   Rates are not stored: they are functions of the plan and the step.
5. Cut the log back to the length it had, so that no epoch stands in it twice.
6. Start the batches at the epoch and the step.
7. Put back the random states last, after everything that might have drawn from them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from onefold.errors import BadArgument, BadCheckpoint, NotWritable
from onefold.train.folder import RunFolder, keep_previous, seal, unseal
from onefold.train.plan import Plan
from onefold.train.rng import RandomState

_log = logging.getLogger(__name__)

WEIGHTS, AVERAGE, STATE, PROGRESS = "model.safetensors", "ema.safetensors", "state.safetensors", "progress.json"


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is: `step` of `steps_per_epoch` optimizer steps done in epoch `epoch`, both counted from 0.

    step == steps_per_epoch says that the epoch's evaluation is what comes next.
    """

    epoch: int
    step: int
    steps_per_epoch: int

    @property
    def total(self) -> int:
        """Optimizer steps done since the run began."""
        return self.epoch * self.steps_per_epoch + self.step


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The complete state of a run between two optimizer steps, on the CPU.

    `metrics` are those of the last evaluation, `best` those of the best with its "epoch" (empty before the first).
    `loss_sum` and `num_images` are the epoch's so far; `made_with` says what else the last bits depend on.
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

    @property
    def is_complete(self) -> bool:
        """Whether the run has done all of its epochs."""
        return self.position.epoch >= self.plan.epochs

    def digest(self) -> str:
        """SHA-256 over name, type, shape and bytes of every weight, average and optimizer tensor, sorted by name."""
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
            keep_previous(folder.last, folder.previous)
            seal(folder.last, self._contents(metadata))
        except NotWritable as error:
            stands = "; the checkpoint before it stands: resume when there is room" if folder.has_run else ""
            raise NotWritable(f"{error}{stands}") from error

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """The newest whole checkpoint of the run folder `path`; raises BadCheckpoint where there is none."""
        folder, faults = RunFolder(path), []
        for place in (folder.last, folder.previous):
            if not place.exists():
                continue
            try:
                return cls._from(unseal(place), place)
            except BadCheckpoint as error:
                faults.append(str(error))
                _log.warning("%s; looking for the checkpoint before it", error)
        if faults:
            raise BadCheckpoint(f"no whole checkpoint in {path}: {'; '.join(faults)}")
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
        }
        contents = {WEIGHTS: save_tensors(dict(self.weights), dict(metadata)), STATE: save_tensors(state)}
        if self.average:
            contents[AVERAGE] = save_tensors(dict(self.average), dict(metadata))
        contents[PROGRESS] = json.dumps(progress, indent=1).encode()
        return contents

    @classmethod
    def _from(cls, contents: Mapping[str, bytes], place: Path) -> Checkpoint:
        try:
            progress = json.loads(contents[PROGRESS])
            state = load_tensors(contents[STATE])
            randomness = RandomState(tensors=_under(state, "randomness/"), numbers=progress.pop("randomness"))
            return cls(
                weights=load_tensors(contents[WEIGHTS]),
                average=load_tensors(contents[AVERAGE]) if AVERAGE in contents else {},
                optimizer=_under(state, "optimizer/"),
                randomness=randomness,
                plan=Plan.from_dict(progress.pop("plan")),
                position=Position(**progress.pop("position")),
                **progress,
            )
        except (SafetensorError, BadArgument, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{place} is whole, but not a checkpoint this version can read: {error}") from error


def save_best(
    folder: RunFolder, weights: Mapping[str, Tensor], metrics: Mapping[str, float], metadata: Mapping[str, str]
) -> None:
    """Make `weights`, under `metadata`, the folder's `best/model.safetensors`, with its metrics beside it."""
    table = json.dumps(dict(metrics), indent=1).encode()
    seal(folder.best, {WEIGHTS: save_tensors(dict(weights), dict(metadata)), "metrics.json": table})


def restore_last(folder: RunFolder) -> Checkpoint:
    """`Checkpoint.load`, for the process that holds the folder: a damaged `last/` is replaced by `previous/`."""
    checkpoint = Checkpoint.load(folder.path)
    try:
        unseal(folder.last)
    except BadCheckpoint:
        keep_previous(folder.previous, folder.last)
    return checkpoint


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
