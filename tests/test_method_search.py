"""Choosing how to quantize by measurement: the search over methods, and the most sensitive layers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onefold.quantize import MINMAX_METHOD, QuantizationMethod, quantize
from onefold.quantize.calibrate import calibrate
from onefold.quantize.graph import trace
from onefold.quantize.method_search import layer_sensitivity, quantize_with_search, skip_sensitive_layers
from onefold.runtimes import ModelInfo, export, load


class Uneven(nn.Module):
    """Channels of very different size, and one layer that int8 hurts most."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)
        with torch.no_grad():
            self.stem.weight *= torch.logspace(-2, 1, 8)[:, None, None, None]
            self.middle.weight /= torch.logspace(-2, 1, 8)[None, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(F.relu(self.stem(x))))).mean((2, 3))


def test_the_chosen_method_is_at_least_as_good_as_where_it_began(seeded: int) -> None:
    model, x, reported = Uneven().eval(), torch.randn(32, 3, 12, 12), []
    start = QuantizationMethod(**{**vars(MINMAX_METHOD), "weights": "tensor"})
    made = quantize_with_search(model, x, start, reported.append)
    fresh = torch.randn(64, 3, 12, 12)
    with torch.inference_mode():
        noise = [float((q.model(fresh) - model(fresh)).norm()) for q in (made, quantize(model, x, start))]
    assert noise[0] < 0.7 * noise[1]
    assert made.method.weights == "tensor"
    assert made.images == 32
    *tried, chosen = reported
    assert [line.split("  ")[0] for line in tried] == [f"candidate {n} of 6" for n in range(1, 7)]
    assert all("8 held-out photos" in line for line in tried)
    errors = [float(re.search(r"([\d.]+) % relative", line)[1]) for line in tried]  # type: ignore[index]
    number = int(re.match(r"chosen: candidate (\d)  ", chosen)[1])  # type: ignore[index]
    assert errors[number - 1] == min(errors)
    assert f"  {made.method.title}, of 6 tried" in chosen
    assert f"  {made.method.title}: " in tried[number - 1]


def test_a_search_ends_where_there_is_no_time_for_the_next_method(seeded: int) -> None:
    """The first is always tried; each other asks, with how much is left and how long the rest takes."""
    model, x, reported, asked = Uneven().eval(), torch.randn(16, 3, 12, 12), [], []

    def allows(what: str, seconds: float) -> bool:
        asked.append((what, seconds))
        return len(asked) < 3

    quantize_with_search(model, x, MINMAX_METHOD, reported.append, allows)
    assert [what for what, _ in asked] == [f"{left} of 6 methods of calibration" for left in (5, 4, 3)]
    assert len(reported) == 4
    assert "of 3 tried" in reported[-1]
    assert all(seconds > 0 for _, seconds in asked)


def test_the_most_sensitive_layers_are_skipped(seeded: int) -> None:
    model, x = Uneven().eval(), torch.randn(16, 3, 12, 12)
    method = QuantizationMethod(**{**vars(MINMAX_METHOD), "weights": "tensor"})
    graph = trace(model, x[:2])
    noise_by_layer = layer_sensitivity(graph, calibrate(graph, [x], method), [x])
    assert set(noise_by_layer) == {"stem", "middle", "last"}
    skipping = skip_sensitive_layers(model, x, method, 1)
    assert skipping.skip_layers == (max(noise_by_layer, key=noise_by_layer.__getitem__),)
    with torch.inference_mode():
        noise = [float((quantize(model, x, m).model(x) - model(x)).norm()) for m in (skipping, method)]
    assert noise[0] < noise[1]


def test_a_skipped_layer_runs_in_floating_point_on_a_device(seeded: int, tmp_path: Path) -> None:
    model, x = Uneven().eval(), torch.randn(16, 3, 12, 12)
    made = quantize(model, x, QuantizationMethod(skip_layers=("middle",)))
    info = ModelInfo(model="uneven", fused=True)
    with load(export(made, x[:2].numpy(), tmp_path / "a", runtime="onnx", info=info, precision="int8")) as session:
        found = session(x.numpy())
    with torch.inference_mode():
        expected = made.model(x).numpy()
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
