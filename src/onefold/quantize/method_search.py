"""Choosing how to quantize a network by measurement: the best options for these images, and the most sensitive layers.

`quantize_with_search` changes one option after another and keeps a change where the logits for images that were not
calibrated on come closer to the float network's. `skip_sensitive_layers` leaves those layers in floating point that
cost most (mixed precision). Sensitivity is the change of the logits, because a layer's own noise says little of what
later layers make of it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from onefold.errors import BadArgument
from onefold.progress_steps import Steps
from onefold.quantize.calibrate import CalibrationResult, QuantizedLayer, calibrate
from onefold.quantize.convert import BATCH_SIZE, QuantizedModel, quantize, quantize_equalized_
from onefold.quantize.cross_layer_equalization import equalize_
from onefold.quantize.graph import find_layers, trace
from onefold.quantize.qparams import QParams, QuantizationMethod

_OPTIONS: dict[str, tuple[Any, ...]] = {  # in the order in which they are decided
    "equalize": ("activations", "weights", "none"),
    "range_method": ("mse", "minmax", "percentile"),
    "correct_weights": (True, False),
}
MAX_IMAGES = 128  # to compare methods on; the best one is calibrated on all images
NUM_CANDIDATES = 6  # of a search from one of the values of each option


def quantize_with_search(
    model: nn.Module,
    images: Tensor,
    start: QuantizationMethod,
    report: Callable[[str], None],
    allows: Callable[[str, float], bool] = lambda what, seconds: True,
) -> QuantizedModel:
    """Quantize with the best method found from `start`, calibrated on all images (B, C, H, W), B >= 8.

    `report` is called with a sentence for each method that was tried, `allows` before each but the first, with what
    comes next and how many seconds it takes with the calibration after it; where it says no, the search ends.
    """
    traced, total = trace(model, images[:2]), _count_candidates(start)
    compared = -(-len(images) // _step(images))
    last = 0.5 + 0.5 * len(images) / (0.75 * compared)  # of the time that a candidate takes; half of that is its images
    tries = [(f"trying candidate {number} of {total}", 1.0) for number in range(1, total + 1)]
    steps = Steps([*tries, ("calibrating by the best candidate", last)], numbered=False)
    method, number, tried = _search(model, traced, images, start, report, allows, steps)
    report(f"chosen: candidate {number}  {method.title}, of {tried} tried the one with the smallest error")
    steps.begin(total)
    made = quantize(model, images, method, traced)
    steps.end()
    return made


def _step(images: Tensor) -> int:
    """Of how many images one is compared on."""
    return -(-len(images) // MAX_IMAGES)


def _count_candidates(start: QuantizationMethod) -> int:
    """Count the methods that a search tries: `start`, and for each option the values that are not its own."""
    return 1 + sum(value != getattr(start, option) for option, values in _OPTIONS.items() for value in values)


def _search(
    model: nn.Module,
    traced: GraphModule,
    images: Tensor,
    start: QuantizationMethod,
    report: Callable[[str], None],
    allows: Callable[[str, float], bool],
    steps: Steps,
) -> tuple[QuantizationMethod, int, int]:
    """Find the best method from `start`, compared on some of the images; its number, from 1, and that of all tried."""
    subset = images[:: _step(images)]
    is_test = torch.arange(len(subset)) % 4 == 3
    expected, batches = _logits(model, subset[is_test]), subset[~is_test].split(BATCH_SIZE)
    total = _count_candidates(start)
    equalized: dict[str | None, GraphModule] = {}  # most methods differ in what comes after it

    def relative_noise(method: QuantizationMethod) -> float:
        steps.begin(len(tried))
        if method.equalize not in equalized:
            equalized[method.equalize] = _copied(traced)
            equalize_(equalized[method.equalize], batches, method.equalize)
        model_int8 = quantize_equalized_(_copied(equalized[method.equalize]), batches, method).model
        logits = _logits(model_int8, subset[is_test])
        # Relative to what of the logits depends on the image.
        noise = float((logits - expected).norm() / (expected - expected.mean(0)).norm())
        title, share = f"candidate {len(tried) + 1} of {total}  {method.title}", f"{100 * noise:.1f} %"
        report(f"{title}: {share} relative error of the logits on {len(expected)} held-out photos")
        return noise

    tried: dict[QuantizationMethod, float] = {}
    began = time.monotonic()
    best, tried[start] = start, relative_noise(start)
    seconds = (time.monotonic() - began) * (1 + len(images) / len(subset))
    for option, values in _OPTIONS.items():
        for value in values:
            method = replace(best, **{option: value})
            if method not in tried:
                if not allows(f"{total - len(tried)} of {total} methods of calibration", seconds):
                    return best, [*tried].index(best) + 1, len(tried)
                tried[method] = relative_noise(method)
            best = min(best, method, key=tried.__getitem__)
    return best, [*tried].index(best) + 1, len(tried)


@torch.no_grad()
def skip_sensitive_layers(
    model: nn.Module, images: Tensor, method: QuantizationMethod, count: int
) -> QuantizationMethod:
    """Add the `count` layers that put most noise into the logits to the method's `skip_layers`.

    Raises BadArgument where no layer would be left to quantize.
    """
    batches = images.split(BATCH_SIZE)
    graph = trace(model, images[:2])
    equalize_(graph, batches, method.equalize)
    calibration = calibrate(graph, batches, method)
    noise = layer_sensitivity(graph, calibration, batches[:4])
    if count >= len(noise):
        raise BadArgument(f"the network has {len(noise)} layers, and {count} of them were to be left in 32 bits")
    worst = sorted(noise, key=noise.__getitem__, reverse=True)[:count]
    return replace(method, skip_layers=(*method.skip_layers, *worst))


@torch.no_grad()
def layer_sensitivity(
    graph: GraphModule, calibration: CalibrationResult, batches: Sequence[Tensor]
) -> dict[str, float]:
    """Quantize each layer alone, weight and output, and measure by name the noise in the logits over their power."""

    def logits(activations: Mapping[Node, QParams], quantized: Mapping[Node, QuantizedLayer]) -> Tensor:
        return torch.cat([_PartlyQuantized(graph, activations, quantized).run(batch) for batch in batches])

    expected = logits({}, {})
    power = float(((expected - expected.mean(0)) ** 2).sum())
    noise = {}
    for layer in find_layers(graph):
        if layer in calibration.layers:
            activations = {
                node: calibration.activations[node] for node in (layer.output,) if node in calibration.activations
            }
            actual = logits(activations, {layer.node: calibration.layers[layer]})
            noise[layer.name] = float(((actual - expected) ** 2).sum()) / power
    return noise


class _PartlyQuantized(Interpreter):
    """Runs the graph in floating point, except for the given activations and layers."""

    def __init__(
        self, graph: GraphModule, activations: Mapping[Node, QParams], quantized: Mapping[Node, QuantizedLayer]
    ) -> None:
        super().__init__(graph)
        self._activations, self._quantized = activations, quantized

    def run_node(self, n: Node) -> Any:
        """Compute the node's value."""
        if n in self._quantized:
            layer = self._quantized[n]
            (x, *_), _ = self.fetch_args_kwargs_from_env(n)
            assert callable(n.target)
            value = n.target(x, layer.weight, layer.bias, *n.args[3:])
        else:
            value = super().run_node(n)
        return self._activations[n].fake_quantize(value) if n in self._activations else value


def _copied(graph: GraphModule) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying a traced graph warns of torch's own deprecations
        return copy.deepcopy(graph)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(BATCH_SIZE)])
