"""Plan: everything that decides what a training computes, as one frozen value.

Two runs with equal plans on equal data, from equal weights, on one thread, end in equal bits. What does not change
the result (the folder, a callback) is not here; see `loop.RunOptions`. No paper's number is a default: recipes state
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from onefold.config import Duration, Epochs, Range, Steps, check_fields, from_dict, to_dict
from onefold.errors import BadArgument

_LearningRate = Annotated[float, Range(0.0, 1000.0)]
_Fraction = Annotated[float, Range(0.0, 1.0)]
_Epsilon = Annotated[float, Range(0.0, 1.0)]

ParameterKind = Literal["norm", "bias", "vector", "depthwise"]

_NO_WARMUP = Steps(0)

CHANGEABLE_ON_RESUME = ("workers", "checkpoint_every")
"""The fields that change no result, and so may differ between a run and its resume."""


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent; the weight decay is added to the gradient."""

    lr: _LearningRate
    momentum: _Fraction = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "plan.optimizer")
        if self.nesterov and not self.momentum:
            raise BadArgument("plan.optimizer.nesterov needs a plan.optimizer.momentum above 0, not 0")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101): a step shrinks a weight by lr * decay."""

    lr: _LearningRate
    betas: tuple[_Fraction, _Fraction] = (0.9, 0.999)
    eps: _Epsilon = 1e-8

    def __post_init__(self) -> None:
        check_fields(self, "plan.optimizer")


@dataclass(frozen=True, kw_only=True)
class RMSprop:
    """RMSprop as torch computes it: eps is added after the root; the weight decay is added to the gradient."""

    lr: _LearningRate
    alpha: _Fraction = 0.99
    eps: _Epsilon = 1e-8
    momentum: _Fraction = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "plan.optimizer")


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From the optimizer's lr to `final` on half a cosine, after a linear warm-up that starts at `warmup_from`."""

    final: _LearningRate = 0.0
    warmup: Duration = _NO_WARMUP
    warmup_from: _LearningRate = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "plan.schedule")


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """The optimizer's lr times `factor` after every `every`, as a step function."""

    factor: _Fraction
    every: Duration

    def __post_init__(self) -> None:
        check_fields(self, "plan.schedule")
        if not self.every.count:
            raise BadArgument(f"plan.schedule.every must be longer than nothing, not {self.every}")


@dataclass(frozen=True, kw_only=True)
class WeightDecay:
    """The coefficient of weight decay, and which parameters do not decay.

    With a `final`, the coefficient goes from `start` to it on half a cosine over the whole run, warm-up included
    (MobileOne, arXiv 2206.04040: wd(t) = final + (start - final) / 2 * (1 + cos(pi t / T))).
    `skip` names what does not decay: "norm" all parameters of normalization layers, "bias" biases of other layers,
    "vector" all of one dimension or none, "depthwise" kernels with one input channel per group. () decays all.
    """

    start: _LearningRate = 0.0
    final: _LearningRate | None = None
    skip: tuple[ParameterKind, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "plan.weight_decay")


@dataclass(frozen=True, kw_only=True)
class Ema:
    """An exponential moving average of the weights; with `warmup`, the decay starts low: (1 + t) / (10 + t)."""

    decay: _Fraction
    warmup: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "plan.ema")


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Knowledge distillation: the teachers, the targets made of their logits, and the weight of that loss.

    `teacher` names one or several: a run folder, weights, an exported artifact, `name@weights`, `timm:name`. Of
    several the mean of their distributions is the target. With targets "soft" the loss is T^2 KL(p_T || q_T), the
    distributions being softmax(logits / T) (arXiv 1503.02531); with "hard" it is the cross-entropy on the class that
    the teacher finds likeliest (arXiv 2012.12877, section 4). The whole loss is `weight` times that and 1 - `weight`
    times the one on the labels: weight 1, soft, several teachers is MEAL V2 (arXiv 2009.08453).
    """

    teacher: str | tuple[str, ...] = ()
    targets: Literal["soft", "hard"]
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0
    weight: Annotated[float, Range(0.0, 1.0)]

    def __post_init__(self) -> None:
        check_fields(self, "plan.distill")

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers, one or several; empty where the user has still to name one."""
        names = (self.teacher,) if isinstance(self.teacher, str) else self.teacher
        return tuple(name for name in names if name)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training computes.

    `batch_size` counts the images of one optimizer step, over all processes and all `accumulate` micro-batches.
    `clip_grad_norm` is the greatest allowed l2 norm of the whole gradient. `amp` is automatic mixed precision: "auto"
    is bf16 on a GPU that computes in it, and off elsewhere. `checkpoint_every` adds checkpoints to
    the one at the end of each epoch. `freeze` names the modules that are not trained (see `optim.freeze_`);
    the learning rate is multiplied with `layer_decay` at each level from the head towards the input. A step is shared
    by `logical_workers`, at any number of processes, and `reduce` says how their gradients are added (see the module
    of that name). `route` is how linear layers are evaluated, to the same numbers within rounding: as was "measured" to
    be fastest on this machine, the "quickest" by count, or "per_branch", plain torch. Raises BadArgument naming the
    field, what is allowed and what came.
    """

    epochs: Annotated[int, Range(0, 1_000_000)]
    batch_size: Annotated[int, Range(1, 10_000_000)]
    optimizer: SGD | AdamW | RMSprop
    schedule: Cosine | Exponential = Cosine()
    weight_decay: WeightDecay = WeightDecay()
    label_smoothing: _Fraction = 0.0
    distill: Distill | None = None
    freeze: tuple[str, ...] = ()
    layer_decay: _Fraction = 1.0
    ema: Ema | None = None
    clip_grad_norm: Annotated[float, Range(1e-12, 1e12)] | None = None
    amp: Literal["off", "auto", "bf16", "fp16"] = "off"
    channels_last: bool = False
    route: Literal["measured", "quickest", "per_branch"] = "measured"
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    accumulate: Annotated[int, Range(1, 1_000_000)] = 1
    logical_workers: Annotated[int, Range(1, 1_000_000)] = 1
    reduce: Literal["fast", "exact"] = "fast"
    workers: Annotated[int, Range(0, 1024)] = 0
    checkpoint_every: Duration | None = None

    def __post_init__(self) -> None:
        check_fields(self, "plan")
        if self.batch_size % self.accumulate:
            raise BadArgument(
                f"plan.accumulate must divide plan.batch_size, but {self.accumulate} does not divide {self.batch_size}"
            )
        if self.reduce == "exact" and self.logical_workers & (self.logical_workers - 1):
            raise BadArgument(
                "plan.logical_workers must be a power of two where plan.reduce is 'exact' (gradients are added in a "
                f"binary tree), not {self.logical_workers}"
            )
        if isinstance(self.schedule, Cosine):
            warmup = self.schedule.warmup
            if isinstance(warmup, Epochs) and warmup.count > self.epochs:
                raise BadArgument(f"plan.schedule.warmup must be within plan.epochs ({self.epochs}), not {warmup}")
        if self.checkpoint_every is not None and not self.checkpoint_every.count:
            raise BadArgument(f"plan.checkpoint_every must be longer than nothing or none, not {self.checkpoint_every}")

    def images_per_batch(self) -> int:
        """Give the size of one batch as a logical worker loads it; raises BadArgument where it is not an integer."""
        size, rest = divmod(self.batch_size, self.accumulate * self.logical_workers)
        if rest:
            raise BadArgument(
                f"plan.batch_size {self.batch_size} is not a multiple of {self.accumulate} micro-batches for each of "
                f"{self.logical_workers} logical workers: choose a multiple of {self.accumulate * self.logical_workers}"
            )
        return size

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as JSON holds them; `from_dict` is the exact inverse."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Read the plan that `to_dict` wrote; raises BadArgument for an unknown, missing or impossible field."""
        return from_dict(cls, values, "plan")

    def differences(self, other: Plan) -> list[str]:
        """Say `field: before -> after` for each field in which two plans would compute something else."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return [f"{name}: {a} -> {b}" for name, (a, b) in pairs.items() if a != b and name not in CHANGEABLE_ON_RESUME]
