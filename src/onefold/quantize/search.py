"""How to quantize this network for these photos: by measured answers, not by taste.

One thing is changed after another, and kept where the answers to photos that were not calibrated on come nearer to the
float network's. `spared` then leaves in floating point the layers that cost most (mixed precision).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from onefold.errors import BadArgument
from onefold.quantize.calibrate import calibrate
from onefold.quantize.equalize import equalize_
from onefold.quantize.graph import trace
from onefold.quantize.method import Method
from onefold.quantize.quantize import BATCH, Quantized, quantize
from onefold.quantize.sensitivity import damage

_TRIED: tuple[Callable[[Method], Method], ...] = (
    lambda method: replace(method, equalize="activations"),
    lambda method: replace(method, equalize="weights"),
    lambda method: replace(method, equalize="none"),
    lambda method: replace(method, ranges="mse"),
    lambda method: replace(method, ranges="minmax"),
    lambda method: replace(method, ranges="percentile"),
    lambda method: replace(method, restore=not method.restore),
)
_ENOUGH = 128  # images to compare methods on; the chosen one is calibrated on all


def choose(model: nn.Module, images: Tensor, start: Method, tell: Callable[[str], None]) -> Quantized:
    """The network of 8 bits by the best method found from `start`, calibrated on all images (B, C, H, W), B >= 8.

    `tell` hears a sentence of each method that was tried.
    """
    few = images[:: -(-len(images) // _ENOUGH)]
    judged = torch.arange(len(few)) % 4 == 3
    true = _answers(model, few[judged])

    def noise(method: Method) -> float:
        found = _answers(quantize(model, few[~judged], method).model, few[judged])
        share = float((found - true).norm() / (true - true.mean(0)).norm())
        tell(f"{method.title}: {100 * share:.1f} % noise in the answers to {len(true)} other photos")
        return share

    best, known = start, {start: noise(start)}
    for varied in _TRIED:
        method = varied(best)
        if method not in known:
            known[method] = noise(method)
        best = min(best, method, key=known.__getitem__)
    return quantize(model, images, best)


@torch.no_grad()
def spared(model: nn.Module, images: Tensor, method: Method, count: int) -> Method:
    """The method, with the `count` layers kept in floating point that would put most noise into the answers.

    Raises BadArgument where none would be left in 8 bits.
    """
    graph, batches = trace(model, images[:2]), images.split(BATCH)
    equalize_(graph, batches, method.equalize)
    costs = damage(graph, calibrate(graph, batches, method), batches[:4])
    if count >= len(costs):
        raise BadArgument(f"the network has {len(costs)} layers, and {count} of them were to be left in 32 bits")
    worst = sorted(costs, key=costs.__getitem__, reverse=True)[:count]
    return replace(method, keep=(*method.keep, *worst))


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(BATCH)])
