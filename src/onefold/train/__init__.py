"""Training: a Plan, batches and a network in; a run folder with checkpoints, a log and the best weights out.

What trains is imported when it is first used, and torch with it: a plan, as recipes have it, is plain values.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onefold.config import Epochs as Epochs
from onefold.config import Steps as Steps
from onefold.train.hyperparameters import SGD as SGD
from onefold.train.hyperparameters import AdamW as AdamW
from onefold.train.hyperparameters import Cosine as Cosine
from onefold.train.hyperparameters import Distill as Distill
from onefold.train.hyperparameters import Ema as Ema
from onefold.train.hyperparameters import Exponential as Exponential
from onefold.train.hyperparameters import Plan as Plan
from onefold.train.hyperparameters import RMSprop as RMSprop
from onefold.train.hyperparameters import WeightDecay as WeightDecay

if TYPE_CHECKING:
    from onefold.train.checkpoint import Checkpoint as Checkpoint
    from onefold.train.checkpoint import Position as Position
    from onefold.train.checkpoint import RunFolder as RunFolder
    from onefold.train.distributed import World as World
    from onefold.train.distributed import import_training_modules as import_training_modules
    from onefold.train.distributed import init_world as init_world
    from onefold.train.distributed import is_restarted as is_restarted
    from onefold.train.evaluate import Accuracy as Accuracy
    from onefold.train.evaluate import compute_accuracy as compute_accuracy
    from onefold.train.evaluate import fit_linear_probe as fit_linear_probe
    from onefold.train.loggers import Progress as Progress
    from onefold.train.loggers import open_loggers as open_loggers
    from onefold.train.logical_workers import Batches as Batches
    from onefold.train.logical_workers import local_workers as local_workers
    from onefold.train.logical_workers import worker_batches as worker_batches
    from onefold.train.loop import RunOptions as RunOptions
    from onefold.train.loop import train as train
    from onefold.train.optim import NORM_LAYERS as NORM_LAYERS
    from onefold.train.optim import decay_groups as decay_groups
    from onefold.train.optim import frozen_modules as frozen_modules
    from onefold.train.optim import learning_rate as learning_rate
    from onefold.train.optim import weight_decay as weight_decay
    from onefold.train.rng_state import seed_everything as seed_everything
    from onefold.train.step import Teachers as Teachers
    from onefold.train.step import cross_entropy as cross_entropy

_HOMES = {
    "checkpoint": ("Checkpoint", "Position", "RunFolder"),
    "distributed": ("World", "import_training_modules", "init_world", "is_restarted"),
    "evaluate": ("Accuracy", "compute_accuracy", "fit_linear_probe"),
    "loggers": ("Progress", "open_loggers"),
    "logical_workers": ("Batches", "local_workers", "worker_batches"),
    "loop": ("RunOptions", "train"),
    "optim": ("NORM_LAYERS", "decay_groups", "frozen_modules", "learning_rate", "weight_decay"),
    "rng_state": ("seed_everything",),
    "step": ("Teachers", "cross_entropy"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [  # for `import *`, which asks no __getattr__
    "NORM_LAYERS",
    "SGD",
    "Accuracy",
    "AdamW",
    "Batches",
    "Checkpoint",
    "Cosine",
    "Distill",
    "Ema",
    "Epochs",
    "Exponential",
    "Plan",
    "Position",
    "Progress",
    "RMSprop",
    "RunFolder",
    "RunOptions",
    "Steps",
    "Teachers",
    "WeightDecay",
    "World",
    "compute_accuracy",
    "cross_entropy",
    "decay_groups",
    "fit_linear_probe",
    "frozen_modules",
    "import_training_modules",
    "init_world",
    "is_restarted",
    "learning_rate",
    "local_workers",
    "open_loggers",
    "seed_everything",
    "train",
    "weight_decay",
    "worker_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onefold.train' has no attribute {name!r}")
    return getattr(import_module(f"onefold.train.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
