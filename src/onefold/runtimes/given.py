"""What is handed to `export`, checked: the model and its other form, the images, and what only the giver knows."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from onefold.errors import BadArgument
from onefold.runtimes import reference as proof
from onefold.runtimes.artifact import About
from onefold.runtimes.base import EightBit, Runtime
from onefold.runtimes.reference import Floats
from onefold.runtimes.vendor import first_line, quiet

if TYPE_CHECKING:
    from torch import Tensor, nn

Example: TypeAlias = "Floats | Tensor | tuple[int, int, int]"


def check_about(about: About, num_classes: int) -> None:
    """Refuse what a manifest cannot hold, or what does not fit the model."""
    if not (isinstance(about.model, str) and about.model) or type(about.fused) is not bool:
        raise BadArgument(
            f"expected the name of a model and whether it is fused, came {about.model!r}, {about.fused!r}"
        )
    if about.classes is not None and len(about.classes) != num_classes:
        raise BadArgument(f"the model gives {num_classes} logits, but {len(about.classes)} classes were named")
    if not all(isinstance(text, str) for text in (*(about.classes or ()), about.licence or "", about.source or "")):
        raise BadArgument("expected text for every class, for the licence and for the source")
    if about.drift is not None and not (math.isfinite(about.drift) and about.drift >= 0):
        raise BadArgument(f"expected a drift of 0 or more, came {about.drift}")
    try:
        json.dumps([dict(about.preprocessing), dict(about.details)], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadArgument(f"preprocessing and details must be plain mappings that JSON can hold: {error}") from error


def forms(model: nn.Module | EightBit, kind: Runtime) -> tuple[nn.Module, nn.Module]:
    """The network whose answers are the proof, and the same in the form that the runtime reads."""
    from torch import nn

    if isinstance(model, nn.Module):
        network = _frozen(model)
        return network, network
    network = _frozen(model.model)
    return network, _frozen(model.graph) if kind.READS_GRIDS else network


def _frozen(model: nn.Module) -> nn.Module:
    """A copy of the model on the CPU in float32, so that nothing here can change the giver's."""
    import torch

    if any(module.training for module in model.modules()):
        raise BadArgument("the model is in train mode, where its answer depends on the batch; call model.eval() first")
    with quiet():  # torch's own copying of a traced graph warns of its own deprecations
        return copy.deepcopy(model).to("cpu", torch.float32)


def images_of(example: Example) -> Floats:
    """At least two images: the example, with its mirror image where it is only one."""
    if isinstance(example, tuple):
        if len(example) != 3 or not all(type(size) is int and size > 0 for size in example):
            raise BadArgument(f"expected a shape of three sizes (channels, height, width), came {example!r}")
        return proof.make_images(example)
    images = example if isinstance(example, np.ndarray) else example.detach().cpu().numpy()
    if images.dtype != np.float32 or images.ndim != 4 or len(images) == 0 or not np.isfinite(images).all():
        raise BadArgument(f"expected finite float32 images (B, C, H, W), came {images.dtype} of shape {images.shape}")
    return np.ascontiguousarray(images if len(images) > 1 else np.concatenate([images, images[..., ::-1]]))


def tensor(images: Floats) -> Tensor:
    """A copy of the images (B, C, H, W) for PyTorch."""
    import torch

    return torch.from_numpy(images.copy())


def answer_of(network: nn.Module, images: Floats) -> Floats:
    """PyTorch's logits (B, classes), once it has given them twice. Raises BadArgument where they cannot be a proof."""
    import torch

    x = tensor(images)
    try:
        with torch.inference_mode():
            first, second = network(x), network(x)
    except Exception as error:
        raise BadArgument(f"the model does not take images of shape {images.shape}: {first_line(error)}") from error
    if not isinstance(first, torch.Tensor) or first.ndim != 2 or len(first) != len(images):
        came = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        raise BadArgument(f"expected a model that answers with one tensor (B, classes), came {came}")
    if not torch.isfinite(first).all() or not first.any():
        raise BadArgument("the model's logits are not finite, or all zero: they would prove nothing")
    if not torch.equal(first, second) or not np.array_equal(x.numpy(), images):
        raise BadArgument("the model gives two answers to the same images, or changes them; that cannot be exported")
    return first.numpy().copy()
