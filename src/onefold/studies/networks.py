"""The networks of studies: those of the catalogue and of timm by name, and how each is prepared to be measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from onefold.errors import MissingExtra
from onefold.runtimes.reference_logits import Floats, make_reference_images
from onefold.studies.study import Point, Published

if TYPE_CHECKING:
    from torch import nn

    from onefold.models import ModelCost

TIMM = "timm:"
_NUM_IMAGES = 4  # of each kind, whose statistics the norms get
_MAX_SIDE = 224  # of those images


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A point's network in eval mode as it is measured, what it costs, and the digest of its structure."""

    point: Point
    model: nn.Module
    cost: ModelCost
    is_fused: bool
    digest: str


def named_point(name: str, size: int = 224, **given: Any) -> Point:
    """A network of the catalogue, or timm:NAME, as a point; `given` are other fields of it."""
    title = given.pop("title", name.removeprefix(TIMM))
    return Point(name=title, build=partial(build_named, name), shape=(3, size, size), **given)


def build_named(name: str) -> nn.Module:
    """Give a network of the catalogue, or timm:NAME, at random initialization. Raises MissingExtra without timm."""
    if not name.startswith(TIMM):
        from onefold.models import create_model

        return create_model(name)
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision is of another torch
        raise MissingExtra(f"{name} needs timm, and it cannot be imported ({error})", "timm") from error
    model: nn.Module = timm.create_model(name.removeprefix(TIMM))
    return model


def prepare(point: Point) -> Prepared:
    """Build a point's network, the same at each call, with norms that keep its maps in range, and fuse it.

    Raises what building it does: MissingExtra where timm is not there.
    """
    import torch

    from onefold.models import count_flops
    from onefold.models.layers import set_norm_statistics_
    from onefold.reparam import fuse, unfused_norms

    channels, height, width = point.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = point.build().eval()
    set_norm_statistics_(model, torch.from_numpy(_images((channels, min(height, _MAX_SIDE), min(width, _MAX_SIDE)))))
    measured = fuse(model) if point.is_fused else model
    return Prepared(
        point=point,
        model=measured,
        cost=count_flops(measured, (height, width)),
        is_fused=not unfused_norms(measured),
        digest=structure_digest(measured, point.shape),
    )


def _images(shape: tuple[int, int, int]) -> Floats:
    """Half noise, half of the kind that exports compare answers on: unlike the norms' images, a network magnifies."""
    noise = np.random.default_rng(0).standard_normal((_NUM_IMAGES, *shape), dtype=np.float32)
    return np.concatenate([make_reference_images(shape, num_images=_NUM_IMAGES, seed=1), noise])


def structure_digest(model: nn.Module, shape: tuple[int, int, int]) -> str:
    """The digest of what a network computes, but for its weights: its modules, its tensors' shapes, its input's."""
    from torch import nn

    tensors = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    facts = [nn.Module.__repr__(model), tensors, shape]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def published_values(values: Mapping[str, float], title: str) -> Callable[[str], dict[str, Published]]:
    """A function from a name to its published number under `title`; an empty one where there is none."""
    return lambda name: {title: Published(values[name])} if name in values else {}
