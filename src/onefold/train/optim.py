"""The optimizer of a Plan: learning-rate and decay schedules, parameter groups, frozen modules, averaged weights (EMA).

A network's *levels* are its children with parameters in order, an `nn.Sequential` or `nn.ModuleList` counting as one
level for each of its own such children: the stem, each stage, the head. Layer-wise learning rates and freezing count
depth in them, whatever the network is.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from onefold.errors import BadArgument, BadCheckpoint
from onefold.train.hyperparameters import SGD, AdamW, Ema, Exponential, ParameterKind, Plan

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

# ------------------------------------------------------------- schedules, as closed forms of the step
#
# Nothing of a schedule is stored: a resumed run computes the same rates from the same step.


def learning_rate(plan: Plan, step: int, steps_per_epoch: int) -> float:
    """Give the learning rate of optimizer step `step`, counted from 0 over the whole run.

    Cosine with W warm-up steps of T: warmup_from + (lr - warmup_from) * t / W for t < W, and then
    final + (lr - final) / 2 * (1 + cos(pi * (t - W) / (T - W))).
    """
    peak, schedule = plan.optimizer.lr, plan.schedule
    if isinstance(schedule, Exponential):
        every = max(1, schedule.every.steps(steps_per_epoch))
        return float(peak * schedule.factor ** (step // every))
    total, warmup = plan.epochs * steps_per_epoch, schedule.warmup.steps(steps_per_epoch)
    if warmup > total:
        raise BadArgument(f"plan.schedule.warmup must be within the run's {total} steps, not {schedule.warmup}")
    if step < warmup:
        return schedule.warmup_from + (peak - schedule.warmup_from) * step / warmup
    return _half_cosine(peak, schedule.final, (step - warmup) / max(1, total - warmup))


def weight_decay(plan: Plan, step: int, steps_per_epoch: int) -> float:
    """Give the coefficient of weight decay at optimizer step `step`, counted from 0 over the whole run."""
    decay = plan.weight_decay
    if decay.final is None:
        return decay.start
    return _half_cosine(decay.start, decay.final, step / (plan.epochs * steps_per_epoch))


def ema_decay(ema: Ema, step: int) -> float:
    """Give the decay of the average at optimizer step `step`, counted from 0 over the whole run."""
    return min(ema.decay, (1 + step) / (10 + step)) if ema.warmup else ema.decay


def _half_cosine(start: float, final: float, fraction: float) -> float:
    return final + (start - final) / 2 * (1 + math.cos(math.pi * fraction))


# ------------------------------------------------------------------------ groups and the optimizer


def decay_groups(model: nn.Module, skip: tuple[ParameterKind, ...]) -> dict[str, list[str]]:
    """Give the names of the trainable parameters that decay and of those that do not: {"decay": ..., "skip": ...}."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: dict[str, list[str]] = {"decay": [], "skip": []}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            if path in trainable:
                skipped = _kinds(module, name, parameter) & set(skip)
                groups["skip" if skipped else "decay"].append(path)
    return groups


def _kinds(module: nn.Module, name: str, parameter: Tensor) -> set[str]:
    kinds = {"vector"} if parameter.ndim <= 1 else set()
    if isinstance(module, _NORMS):
        kinds.add("norm")
    elif name == "bias" or name.endswith("_bias"):
        kinds.add("bias")
    elif isinstance(module, _ConvNd) and module.groups == module.in_channels > 1:
        kinds.add("depthwise")
    return kinds


def create_optimizer(model: nn.Module, plan: Plan) -> Optimizer:
    """Give the plan's optimizer over the trainable parameters of `model`, grouped by decay and scale of the rate."""
    named = dict(model.named_parameters())
    scales = layer_lr_scales(model, plan.layer_decay)
    parts: dict[tuple[bool, float], list[Tensor]] = {}
    for kind, names in decay_groups(model, plan.weight_decay.skip).items():
        for name in names:
            parts.setdefault((kind == "decay", scales[name]), []).append(named[name])
    groups = [{"params": params, "decays": decays, "scale": scale} for (decays, scale), params in parts.items()]
    if not groups:
        raise BadArgument("the model has no parameter to train: does plan.freeze name all of it?")
    rule = plan.optimizer
    if isinstance(rule, SGD):
        return torch.optim.SGD(groups, lr=rule.lr, momentum=rule.momentum, nesterov=rule.nesterov)
    if isinstance(rule, AdamW):
        return torch.optim.AdamW(groups, lr=rule.lr, betas=rule.betas, eps=rule.eps, weight_decay=0.0)
    return torch.optim.RMSprop(groups, lr=rule.lr, alpha=rule.alpha, eps=rule.eps, momentum=rule.momentum)


def set_lr_and_decay_(optimizer: Optimizer, lr: float, decay: float) -> None:
    """Set the learning rate and weight decay of one step in the optimizer's groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0


# ------------------------------------------------------------------------- the optimizer's tensors


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Give the optimizer's state as `<parameter>/<slot>` -> tensor.

    By name, and not by torch's index, so that a checkpoint does not depend on the order of the groups; the groups
    are not in it, since they are a function of the model, the plan and the step.
    """
    return {
        f"{name}/{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimizer_tensors_(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back; raises BadCheckpoint for a parameter the model does not have."""
    named = dict(model.named_parameters())
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in named or id(named[name]) not in index:
            raise BadCheckpoint(f"the optimizer's state is for {name!r}, which this model does not train")
        like = named[name]
        # the parameter's strides, so that a channels_last model goes on with channels_last state
        fits = value.shape == like.shape and value.ndim > 0
        state.setdefault(index[id(like)], {})[slot] = torch.empty_like(like).copy_(value) if fits else value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ----------------------------------------------------------------------------- averaged weights (EMA)


class ModelEma:
    """A copy of the model, in eval mode, whose weights are an exponential moving average.

    Floating-point buffers are averaged with the weights: a BatchNorm's running statistics belong to the weights
    under which they were computed, and the average of the statistics is nearer to what the averaged weights produce
    than the latest ones are. Integer buffers (counters) are copied.
    """

    def __init__(self, model: nn.Module, ema: Ema) -> None:
        self.ema = ema
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update_(self, model: nn.Module, step: int) -> None:
        """Move towards the weights of `model` after optimizer step `step`, counted from 0 over the whole run."""
        average, current = self.module.state_dict(), model.state_dict()
        floats = [name for name, value in average.items() if value.is_floating_point()]
        update = get_ema_multi_avg_fn(ema_decay(self.ema, step))
        update([average[name] for name in floats], [current[name] for name in floats], None)
        for name, value in average.items():
            if not value.is_floating_point():
                value.copy_(current[name])


# ---------------------------------------------------------------- frozen modules, layer-wise rates

NORM_LAYERS = "norms"
"""In `Plan.freeze`: every BatchNorm of the network, its statistics, weight and bias."""


def freeze_(model: nn.Module, names: Sequence[str]) -> None:
    """Exclude the parameters of the named modules from training, in place.

    A name is the path of a module, as `stem` or `stages.0`, or "norms". Raises BadArgument with the nearest names.
    """
    for module in frozen_modules(model, names):
        module.requires_grad_(False)


def train_mode_(model: nn.Module, names: Sequence[str]) -> None:
    """Put `model` in train mode and its frozen modules in eval mode.

    Their norms then use, and keep, their running statistics, and their dropout is off: what is frozen is a function
    of its input alone.
    """
    model.train()
    for module in frozen_modules(model, names):
        module.eval()


def frozen_modules(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Give the modules that `Plan.freeze` names. Raises BadArgument for a name that the network does not have."""
    known = dict(model.named_modules())
    modules: list[nn.Module] = []
    for name in names:
        if name == NORM_LAYERS:
            modules += [module for module in known.values() if isinstance(module, _NormBase)]
        elif name and name in known:
            modules.append(known[name])
        else:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"there are {', '.join(layer_levels(model))}, {NORM_LAYERS}"
            )
            raise BadArgument(f"plan.freeze names {name!r}, which this network does not have: {hint}")
    return modules


def layer_levels(model: nn.Module) -> list[str]:
    """Give the paths of a network's levels, from the input to the head."""
    paths: list[str] = []
    for name, child in model.named_children():
        is_series = isinstance(child, (nn.Sequential, nn.ModuleList))
        inside = [f"{name}.{key}" for key, part in child.named_children() if _is_trained(part)] if is_series else []
        paths += inside or ([name] if _is_trained(child) else [])
    return paths


def _is_trained(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def layer_lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Give by parameter name the factor of its learning rate, layer_decay ** (levels above it).

    1 at the last level, layer_decay at the one before; a parameter of the network itself is at the first level.
    Source: discriminative fine-tuning, arXiv 1801.06146, section 3.2, as later papers apply it by block.
    """
    paths = layer_levels(model)
    scales: dict[str, float] = {}
    for name, _ in model.named_parameters():
        at = next((i for i, path in enumerate(paths) if name == path or name.startswith(f"{path}.")), 0)
        scales[name] = layer_decay ** (len(paths) - 1 - at)
    return scales
