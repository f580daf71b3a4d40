"""What of a network is trained, and how fast: frozen parts, and rates that fall towards the input.

A network's *levels* are its children in order, an `nn.Sequential` counting as one level for each of its own children:
the stem, each stage, the head. That is how fine-tuning speaks of depth, whatever the network is.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from onefold.errors import BadArgument

NORMS = "norms"
"""In `Plan.freeze`: every BatchNorm of the network, its statistics, gain and bias."""


def freeze_(model: nn.Module, names: Sequence[str]) -> None:
    """Take the parameters of the named parts out of the training, in place.

    A name is the path of a module, as `stem` or `stages.0`, or "norms". Raises BadArgument with the nearest names.
    """
    for part in frozen_parts(model, names):
        part.requires_grad_(False)


def train_mode_(model: nn.Module, names: Sequence[str]) -> None:
    """Put `model` in train mode and the frozen parts in eval mode: their norms use, and keep, what they have gathered.

    Dropout in a frozen part is off with it: what is frozen gives one answer.
    """
    model.train()
    for part in frozen_parts(model, names):
        part.eval()


def frozen_parts(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules that the names of `Plan.freeze` stand for. Raises BadArgument."""
    known = dict(model.named_modules())
    parts: list[nn.Module] = []
    for name in names:
        if name == NORMS:
            parts += [module for module in known.values() if isinstance(module, _NormBase)]
        elif name and name in known:
            parts.append(known[name])
        else:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(levels(model))}, {NORMS}"
            raise BadArgument(f"plan.freeze names {name!r}, which this network does not have: {hint}")
    return parts


def levels(model: nn.Module) -> list[str]:
    """The paths of a network's levels, from the input to the head."""
    paths: list[str] = []
    for name, child in model.named_children():
        inside = [f"{name}.{key}" for key, _ in child.named_children()] if isinstance(child, nn.Sequential) else []
        paths += inside or [name]
    return paths


def rate_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """By parameter name: what its learning rate is multiplied with, layer_decay ** (levels above it).

    1 at the last level, layer_decay at the one before; a parameter of the network itself is at the first level.
    Source: discriminative fine-tuning, arXiv 1801.06146, section 3.2, as later papers apply it by block.
    """
    paths = levels(model)
    scales: dict[str, float] = {}
    for name, _ in model.named_parameters():
        at = next((i for i, path in enumerate(paths) if name == path or name.startswith(f"{path}.")), 0)
        scales[name] = layer_decay ** (len(paths) - 1 - at)
    return scales
