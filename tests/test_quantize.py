"""Quantization: laws of parameters, equalization and rounding; the int8 model against integer arithmetic."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from available_runtimes import INSTALLED, RUNNABLE
from conftest import shaken
from onefold.cli import main
from onefold.commands.open_network import open_network
from onefold.data import find_images, open_dataset
from onefold.data.decode import decode_image
from onefold.errors import BadArgument
from onefold.models import create_model
from onefold.models.load_model import Card, save_weights
from onefold.quantize import MINMAX_METHOD, QuantizationMethod, integer_model, quantize
from onefold.quantize.calibrate import calibrate
from onefold.quantize.convert import calibration_state_dict, from_calibration_state_dict
from onefold.quantize.cross_layer_equalization import (
    equalizable_pairs,
    equalize_,
    rescale_pair_,
    shorten_scale_mantissas,
)
from onefold.quantize.gptq import gptq_round, round_to_nearest
from onefold.quantize.graph import find_layers, get_parameter, trace
from onefold.quantize.qparams import QParams, choose_qparams, weight_scales
from onefold.reparam import fuse
from onefold.runtimes import ModelInfo, export, import_runtime, load
from onefold.runtimes import onnx as onnx_runtime
from onefold.runtimes import openvino as openvino_runtime

RANGE_METHODS = ("minmax", "percentile", "mse", "entropy")


class Small(nn.Module):
    """A dense, a depthwise and a pointwise layer, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.depthwise, self.pointwise):
            x = F.relu(layer(x))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def small(seeded: int) -> nn.Module:
    return Small().eval()


@pytest.fixture
def images(seeded: int) -> Tensor:
    return torch.randn(6, 3, 16, 16)


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def noise(true: Tensor, found: Tensor) -> float:
    return float((true - found).norm() / true.norm())


# ------------------------------------------------------------------------------------------ grids


@given(low=st.floats(-100, 100), width=st.floats(1e-3, 200))
def test_parameters_represent_zero_and_their_range(low: float, width: float) -> None:
    qparams = QParams.from_range(low, low + width)
    x = torch.linspace(low, low + width, 101)
    snapped = qparams.fake_quantize(x)
    assert float(qparams.fake_quantize(torch.zeros(1))) == 0
    assert torch.allclose(qparams.fake_quantize(snapped), snapped, rtol=0, atol=1e-5 * qparams.scale)
    assert float((snapped - x).abs().max()) <= qparams.scale * 0.501 + 1e-5


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.0, 1.0), (0.485, 0.229), (0.456, 0.224)])
def test_no_pixel_lies_half_way_between_two_steps(mean: float, std: float) -> None:
    """Runtimes divide by a scale or multiply by its inverse: where a tie decides, one pixel has two values."""
    pixels = (torch.arange(256, dtype=torch.float32) / 255 - mean) / std
    qparams = QParams.from_range(float(pixels.min()), float(pixels.max()))
    scale = torch.tensor(qparams.scale)
    assert torch.equal(torch.round(pixels / scale), torch.round(pixels * (1 / scale)))
    assert float((torch.frac(pixels.double() / qparams.scale).abs() - 0.5).abs().min()) > 1e-4


def test_each_way_to_choose_a_range_does_what_it_says() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).abs()
    values[0] = 20.0
    grids = {ranges: choose_qparams([values[:100_000], values[100_000:]], ranges) for ranges in RANGE_METHODS}
    errors = {
        ranges: float(((qparams.fake_quantize(values) - values) ** 2).mean()) for ranges, qparams in grids.items()
    }
    assert all(qparams.low == 0 for qparams in grids.values())
    assert grids["minmax"].high == pytest.approx(20, rel=1e-6)
    assert float((values > grids["percentile"].high).double().mean()) == pytest.approx(1e-4, rel=0.5)
    assert 2 < grids["entropy"].high < 10
    assert errors["mse"] <= min(errors.values()) * 1.05
    assert errors["mse"] < errors["minmax"]


@pytest.mark.parametrize("ranges", RANGE_METHODS)
def test_a_constant_tensor_has_parameters(ranges: str) -> None:
    assert float(choose_qparams([torch.full((9,), 3.0)], ranges).fake_quantize(torch.tensor(3.0))) == pytest.approx(
        3.0, rel=0.01
    )
    assert choose_qparams([torch.zeros(9)], ranges).scale > 0


def test_scales_reach_the_limit_in_each_row_and_searching_never_costs() -> None:
    kernel = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 5)[:, None]
    for search in (False, True):
        scales = weight_scales(kernel, qmax=127, per_tensor=False, clip=search)
        assert (round_to_nearest(kernel, scales, 127).abs().amax(1) == 127).all()
    plain = weight_scales(kernel, qmax=127, per_tensor=False, clip=False)
    errors = [((round_to_nearest(kernel, s, 127) * s[:, None] - kernel) ** 2).sum(1) for s in (scales, plain)]
    assert (errors[0] <= errors[1]).all()
    assert len(set(weight_scales(kernel, qmax=127, per_tensor=True, clip=False).tolist())) == 1


@pytest.mark.parametrize(
    ("target", "inputs", "weight", "geometry"),
    [
        (torch.ops.aten.conv2d.default, (2, 512, 5, 5), (8, 512, 3, 3), ([2, 2], [1, 1])),
        (torch.ops.aten.conv2d.default, (2, 12, 5, 5), (12, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 12)),
        (torch.ops.aten.linear.default, (3, 4096), (5, 4096), ()),
        (torch.ops.aten.linear.default, (3, 9000), (5, 9000), ()),
    ],
)
def test_large_sums_of_integers_are_exact(target: Any, inputs: Any, weight: Any, geometry: Any) -> None:
    """Against 64-bit integers, with the largest products there are; the last is too wide to be split."""
    draw = torch.Generator().manual_seed(0)
    x, q = torch.randint(-255, 256, inputs, generator=draw), torch.randint(-127, 128, weight, generator=draw)
    x[0], q[0] = -255, 127
    if target is torch.ops.aten.linear.default:
        true = x @ q.T
    else:
        stride, padding, _, groups = (*geometry, [1, 1], 1)[:4]
        columns = F.unfold(x.double(), weight[2:], 1, padding, stride).long().unflatten(1, (groups, -1))
        rows = q.flatten(1).unflatten(0, (groups, -1))
        true = torch.einsum("gok,bgkl->bgol", rows, columns).flatten(1, 2)
    found = integer_model._exact_sums(target, x.float(), q.float(), geometry)
    assert torch.equal(found.long().reshape(true.shape), true)


# ----------------------------------------------------------------------------------- equalization


def test_equalizing_changes_ranges_and_not_the_answer(images: Tensor) -> None:
    model = shaken(create_model("mobileone_s0", num_classes=7)).double()
    fused = fuse(model.eval())
    graph = trace(fused, images.double())
    before = answer(graph, images.double())
    assert equalize_(graph, [images.double()]) == len(find_layers(graph)) - 1  # a chain, the head too
    assert noise(before, answer(graph, images.double())) < 1e-12


def test_equalizing_stops_at_gates(images: Tensor) -> None:
    fused = fuse(shaken(create_model("mobileone_s4", num_classes=7)).eval()).double()
    graph = trace(fused, images.double())
    before = answer(graph, images.double())
    assert 0 < equalize_(graph, [images.double()]) < len(find_layers(graph)) - 1
    assert noise(before, answer(graph, images.double())) < 1e-12


# --------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(("groups", "width"), [(1, 70), (6, 9)])
def test_rounding_by_moments_is_to_the_nearest_for_white_inputs_and_better_for_others(groups: int, width: int) -> None:
    draw = torch.Generator().manual_seed(3)
    kernel = torch.randn(groups * 4, width, generator=draw)
    scales = weight_scales(kernel, qmax=7, per_tensor=False, clip=False)
    white = torch.eye(width, dtype=torch.float64).expand(groups, -1, -1)
    assert torch.equal(gptq_round(kernel, scales, 7, white), round_to_nearest(kernel, scales, 7))
    x = torch.randn(groups, width, 3, generator=draw, dtype=torch.float64)
    covariance = x @ x.mT + 0.01 * white
    errors = []
    for whole in (gptq_round(kernel, scales, 7, covariance), round_to_nearest(kernel, scales, 7)):
        off = (whole * scales[:, None] - kernel).double().unflatten(0, (groups, -1))
        errors.append(float(((off @ covariance) * off).sum()))
    assert errors[0] < 0.5 * errors[1]


# ----------------------------------------------------------------------------------------- powers


def test_rescaling_a_pair_of_layers_keeps_the_answer(images: Tensor) -> None:
    for name in ("mobileone_s0", "mobilenetv1_025", "mobileone_s4"):
        fused = fuse(shaken(create_model(name, num_classes=7)).eval()).double()
        graph = trace(fused, images.double())
        before = answer(graph, images.double())
        pairs = equalizable_pairs(find_layers(graph))
        assert len(pairs) > 10
        for number, pair in enumerate(pairs):
            rescale_pair_(graph, *pair, 1.0 + 0.1 * number)
        assert noise(before, answer(graph, images.double())) < 1e-9  # random gates make much of rounding


def test_scales_between_joined_layers_are_powers_of_two(small: nn.Module, images: Tensor) -> None:
    graph = trace(small, images)
    pairs = equalizable_pairs(find_layers(graph))
    found = calibrate(graph, images.split(4), QuantizationMethod()).activations
    assert pairs
    assert all(math.frexp(found[first.output].scale)[0] == 0.5 for first, _ in pairs)


def test_the_network_does_not_depend_on_the_number_of_threads(small: nn.Module, images: Tensor) -> None:
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(quantize(small, images, QuantizationMethod(correct_weights=True)).graph.state_dict())
        assert torch.get_num_threads() == threads
    assert all(torch.equal(made[0][key], each[key]) for each in made[1:] for key in made[0])


def test_a_calibration_that_is_kept_gives_the_same_network(small: nn.Module, images: Tensor) -> None:
    for method in (
        QuantizationMethod(),
        QuantizationMethod(skip_layers=(find_layers(trace(small, images))[1].name,)),
        MINMAX_METHOD,
    ):
        made = quantize(small, images, method)
        tensors, facts = calibration_state_dict(made)
        again = from_calibration_state_dict(small, tuple(images.shape[1:]), tensors, json.loads(json.dumps(facts)))
        assert (again.method, again.layers, again.images) == (made.method, made.layers, made.images)
        with torch.inference_mode():
            assert torch.equal(again.model(images), made.model(images))
            assert torch.equal(again.graph(images), made.graph(images))
    with pytest.raises(BadArgument, match="another network"):
        from_calibration_state_dict(
            small, tuple(images.shape[1:]), tensors, {**facts, "activations": {"other": [1.0, 0]}}
        )


@given(step=st.floats(1e-6, 1e6))
def test_shortened_scales_are_no_smaller_and_have_few_digits(step: float) -> None:
    for input_step, digits in ((0.25, 6), (0.3, 4)):
        found = float(shorten_scale_mantissas(torch.tensor([step], dtype=torch.float64), input_step))
        assert step * (1 - 1e-6) <= found <= step * (1 + 2.0 ** (1 - digits))
        assert (math.frexp(found)[0] * 2**digits) % 1 == 0


def steps_of(graph: nn.Module) -> list[tuple[float, Tensor, float]]:
    """Of each convolution: the step of its input, those of its kernel, that of what it gives."""
    found = []
    for conv in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        after = next(iter(conv.users))
        after = after if "quantize_per_tensor" in str(after.target) else next(iter(after.users))
        found.append((conv.args[0].args[1], get_parameter(graph, conv.args[1].args[1].target), after.args[1]))
    return found


def orders_agree(given: float, kernel: Tensor, gives: float) -> bool:
    """Whether sums scaled factor by factor, and by one factor made before, are the same float32."""
    sums = torch.arange(-(2**17), 2**17, 5, dtype=torch.float32)[:, None]
    one_by_one = sums * kernel * torch.tensor(given) / torch.tensor(gives)
    return torch.equal(one_by_one, sums * (kernel * torch.tensor(given) / torch.tensor(gives)))


def test_the_order_of_arithmetic_does_not_matter(seeded: int) -> None:
    """Whole numbers scaled once, against the graph with every value and every product in float32: the same bits."""
    chain = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 5, 1), nn.Flatten(),
    ).eval()  # fmt: skip
    x = torch.randn(32, 3, 16, 16)
    exact, plain = (
        quantize(chain, x, QuantizationMethod(power_of_two_scales=power_of_two)) for power_of_two in (True, False)
    )
    assert torch.equal(answer(exact.model, x), answer(exact.graph, x))
    assert [orders_agree(*steps) for steps in steps_of(exact.graph)[1:3]] == [True, True]
    assert [orders_agree(*steps) for steps in steps_of(plain.graph)[1:3]] == [False, False]
    losses = [noise(answer(chain, x), answer(made.model, x)) for made in (exact, plain)]
    assert losses[0] < 1.3 * losses[1]  # and it costs next to nothing


# ------------------------------------------------------------------------------- the whole network


def test_the_simulation_is_integer_arithmetic(small: nn.Module, images: Tensor) -> None:
    """Each layer again with sums of int64 and one rescaling in float32, from what the graph stores: the same bits."""
    made = quantize(small, images, QuantizationMethod(range_method="minmax"))
    steps = [n for n in made.graph.graph.nodes if str(n.target).startswith("quantized_decomposed.quantize_per_t")]
    grids = [(np.float32(n.args[1]), n.args[2]) for n in steps]
    state = {name: value.numpy() for name, value in made.graph.state_dict().items()}
    scale, zero = grids[0]
    q = np.clip(np.rint(images.numpy() * np.float32(1 / scale)) + zero, -128, 127).astype(np.int64)

    def requantized(sums: np.ndarray, step: np.ndarray, qparams: tuple, least: int) -> np.ndarray:
        m = (step / qparams[0]).reshape(-1, *[1] * (sums.ndim - 2))
        return np.clip(np.rint(sums.astype(np.float32) * m) + qparams[1], least, 127).astype(np.int64)

    geometry = {"stem": (2, 1, 1), "depthwise": (1, 1, 8), "pointwise": (1, 0, 1)}
    for (name, (stride, padding, groups)), qparams in zip(geometry.items(), grids[1:4], strict=True):
        step = state[f"{name}.weight_scale"] * scale
        bias = np.rint(state[f"{name}.bias"] / step.astype(np.float64)).astype(np.int64)
        kernel = state[f"{name}.weight_int8"].astype(np.int64)
        x, w, b = (torch.from_numpy(each) for each in (q - zero, kernel, bias))
        sums = F.conv2d(x, w, b, stride, padding, groups=groups).numpy()
        q = requantized(sums, step, qparams, qparams[1])
        scale, zero = qparams
    q = requantized((q - zero).sum((2, 3)), np.array(scale / np.float32(q[0, 0].size)), grids[4], -128)
    scale, zero = grids[4]
    step = state["fc.weight_scale"] * scale
    bias = np.rint(state["fc.bias"] / step.astype(np.float64)).astype(np.int64)
    sums = (q - zero) @ state["fc.weight_int8"].astype(np.int64).T + bias
    logits = (requantized(sums, step, grids[5], -128) - grids[5][1]) * grids[5][0]
    assert np.array_equal(answer(made.model, images).numpy(), logits.astype(np.float32))
    assert (
        noise(answer(made.model, images), answer(made.graph, images)) < 0.05
    )  # float sums, and ties that fall otherwise


def test_sums_beyond_what_float32_holds_are_exact(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """A row of next to nothing has a bias of many steps; ONNX Runtime adds in 32-bit whole numbers."""
    with torch.no_grad():
        small.pointwise.weight[0] *= 3e-7
        small.pointwise.bias[0] = 1.0
    made = quantize(small, images, QuantizationMethod(equalize="none", correct_bias=False, weight_qmax=63))
    state = made.graph.state_dict()
    steps = [n for n in made.graph.graph.nodes if str(n.target).startswith("quantized_decomposed.quantize_per_t")]
    step = state["pointwise.weight_scale"][0] * steps[2].args[1]
    assert (state["pointwise.bias"][0] / step).abs() > 2**24
    info, x = ModelInfo(model="small", fused=True), torch.randn(64, 3, 16, 16)
    with load(export(made, x[:2].numpy(), tmp_path / "a", runtime="onnx", info=info, precision="int8")) as session:
        assert np.array_equal(session(x.numpy()), answer(made.model, x).numpy())


@pytest.mark.parametrize("name", ["mobileone_s0", "mobilenetv1_025", "mobileformer_26m"])
def test_every_family_survives(name: str, seeded: int) -> None:
    fused = fuse(shaken(create_model(name, num_classes=7)).eval())
    x = torch.randn(6, 3, 64, 64)
    made = quantize(fused, x)
    assert noise(answer(fused, x), answer(made.model, x)) < 0.15
    assert {each.quantized for each in made.layers} == {True}
    assert made.images == 6


def test_collapse_and_its_cure(small: nn.Module, images: Tensor) -> None:
    """Channels whose ranges differ by 10,000 say nothing in float, and everything to one scale a tensor."""
    s = torch.logspace(-2, 2, 8)
    with torch.no_grad():
        small.stem.weight /= s[:, None, None, None]
        small.stem.bias /= s
        small.depthwise.weight *= s[:, None, None, None]
    x = images * torch.linspace(0.2, 4, len(images))[:, None, None, None]  # answers that differ

    def changes(model: nn.Module) -> Tensor:
        """What of the answer the images decide."""
        logits = answer(model, x)
        return logits - logits.mean(0)

    plain = quantize(small, x, QuantizationMethod(**{**vars(MINMAX_METHOD), "weights": "tensor"}))
    cured = quantize(small, x, QuantizationMethod(weights="tensor"))
    assert noise(changes(small), changes(plain.model)) > 0.5
    assert noise(changes(small), changes(cured.model)) < 0.06


def test_a_skipped_layer_stays_in_float(small: nn.Module, images: Tensor) -> None:
    made = quantize(small, images, QuantizationMethod(skip_layers=("depthwise",)))
    assert {each.name: each.quantized for each in made.layers}["depthwise"] is False
    assert "depthwise.weight_int8" not in made.graph.state_dict()
    with pytest.raises(BadArgument, match="no layer 'stemm'"):
        quantize(small, images, QuantizationMethod(skip_layers=("stemm",)))


def test_per_tensor_scales_have_their_equalization() -> None:
    assert (QuantizationMethod().equalize, QuantizationMethod(weights="tensor").equalize) == ("activations", "weights")
    assert QuantizationMethod(weights="tensor", equalize="none").equalize == "none"


def test_the_model_given_is_left_as_it_is(small: nn.Module, images: Tensor) -> None:
    before = {name: value.clone() for name, value in small.state_dict().items()}
    quantize(small, images)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_what_cannot_be_quantized_is_said(small: nn.Module, images: Tensor) -> None:
    with pytest.raises(BadArgument, match=r"call model\.eval\(\)"):
        quantize(Small().train(), images)
    with pytest.raises(BadArgument, match="two images or more"):
        quantize(small, images[:1])
    with pytest.raises(BadArgument, match="no convolution"):
        quantize(nn.Sequential(nn.Flatten(), nn.Tanh()).eval(), images)


# --------------------------------------------------------------------------------------- runtimes


@pytest.mark.parametrize("runtime", [name for name in INSTALLED if "int8" in import_runtime(name).PRECISIONS])
def test_runtimes_compute_the_network_that_was_simulated(
    runtime: str, small: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    """With 7-bit weights, so that it holds on processors whose 16-bit sums saturate."""
    made = quantize(small, images, QuantizationMethod(weight_qmax=63))
    info = ModelInfo(model="small", fused=True, details={"quantization": {"method": made.method.title}})
    x = torch.randn(64, 3, 16, 16)
    artifact = export(made, x[:2].numpy(), tmp_path / "a", runtime=runtime, info=info, precision="int8")
    assert artifact.details["quantization"] == {"method": made.method.title}
    if runtime not in RUNNABLE:
        return
    with load(artifact) as session:
        found = session(x.numpy())
    simulated = answer(made.model, x).numpy()
    step = float(np.diff(np.unique(simulated)).min())
    if runtime == "openvino":  # it scales sums in its own order, which shows behind a mean over the map alone
        assert np.abs(found - simulated).max() <= 1.01 * step
        assert (np.abs(found - simulated) < 0.5 * step).mean() >= 0.97
    else:
        assert np.abs(found - simulated).max() <= 1e-4 * step


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_mobileone_s0_survives(weights: str, shared_data: Path) -> None:
    """Apple's weights, calibrated on 64 photos of Imagenette's training part, on 200 photos of as many classes."""
    network = open_network(shared_data / "weights" / "mobileone_s0_in1k_fused.npz", name="mobileone_s0")
    training = open_dataset(str(shared_data / "imagenette-224-subset"), "train", seed=0, val_fraction=0.2)
    photos = [training.image(i) for i in range(0, len(training), len(training) // 64)]
    made = quantize(
        network.model, torch.stack([torch.from_numpy(network.preprocessing(photo)) for photo in photos]),
        QuantizationMethod(weights=weights),
    )  # fmt: skip
    paths = find_images([shared_data / "imagenet-sample" / "images"])[::5]
    x = torch.stack([torch.from_numpy(network.preprocessing(decode_image(path))) for path in paths])
    same = answer(made.model, x).argmax(1) == answer(network.model, x).argmax(1)
    assert float(same.double().mean()) >= 0.9


def test_onnx_holds_integers(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    made = quantize(small, images)
    info = ModelInfo(model="small", fused=True)
    folder = export(made, images.numpy(), tmp_path / "a", runtime="onnx", info=info, precision="int8").folder
    graph = onnx.load(folder / "model.onnx").graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            stored = [kinds.get(makers[name].input[0]) for name in node.input[1:]]
            assert stored == [onnx.TensorProto.INT8, onnx.TensorProto.INT32]


def test_onnx_pads_images_to_four_channels_for_its_fast_kernels(
    small: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    made = quantize(small, images, QuantizationMethod(weight_qmax=63))
    export(
        made,
        images[:2].numpy(),
        tmp_path / "a",
        runtime="onnx",
        info=ModelInfo(model="small", fused=True),
        precision="int8",
    )
    graph = onnx.load(tmp_path / "a" / "model.onnx").graph
    (pad,) = (node for node in graph.node if node.op_type == "Pad")
    first = next(node for node in graph.node if node.op_type == "Conv")
    makers, constants = ({o: n for n in graph.node for o in n.output}, {t.name: t for t in graph.initializer})
    assert makers[makers[first.input[0]].input[0]] == pad
    whole = onnx.numpy_helper.to_array(constants[makers[first.input[1]].input[0]])
    assert whole.shape[1] == 4
    assert not whole[:, 3].any()
    assert whole[:, :3].any()


@pytest.mark.parametrize("kind", ["grouped", "four", "read twice"])
def test_images_that_need_no_fourth_channel_or_cannot_have_one_are_left(kind: str, seeded: int, tmp_path: Path) -> None:
    channels = 4 if kind == "four" else 3

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            groups = 3 if kind == "grouped" else 1
            self.stem, self.other = (nn.Conv2d(channels, 6, 3, 2, 1, groups=groups) for _ in range(2))
            self.last = nn.Conv2d(6, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.stem(x))
            return self.last(y + F.relu(self.other(x)) if kind == "read twice" else y).mean((2, 3))

    x = torch.randn(16, channels, 12, 12)
    made = quantize(Other().eval(), x, QuantizationMethod(weight_qmax=63))
    info = ModelInfo(model="other", fused=True)
    folder = export(made, x[:2].numpy(), tmp_path / "a", runtime="onnx", info=info, precision="int8").folder
    assert not [node for node in onnx.load(folder / "model.onnx").graph.node if node.op_type == "Pad"]
    with load(folder) as session:
        assert np.allclose(session(x.numpy()), answer(made.model, x).numpy(), atol=1e-6)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only on x86 do 8-bit sums saturate")
def test_whether_sums_saturate_is_found_out() -> None:
    """The processor's own list of what it can do knows too."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii").partition("flags")[2].split("\n")[0].split()
    except OSError:
        pytest.skip("this system has no /proc/cpuinfo")
    expected = not {"avx512_vnni", "avx_vnni"} & set(flags)
    assert onnx_runtime._sums_saturate() == expected
    assert openvino_runtime.int8_sums_saturate() == expected


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only on x86 do 8-bit sums saturate")
def test_sums_of_openvino_saturate_without_vnni() -> None:
    """oneDNN can be kept to AVX2, which has no sums of 8-bit products in 32 bits."""
    pytest.importorskip("openvino")
    program = "from onefold.runtimes.openvino import int8_sums_saturate; print(int8_sums_saturate())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], seeded: int) -> None:
    weights = tmp_path / "fused.safetensors"
    model = fuse(shaken(create_model("mobileone_s0", num_classes=10, in_chans=1)).eval())
    preprocessing = {"size": 32, "crop_pct": 1.0, "mean": [0.5], "std": [0.5], "channels": 1}
    facts = {"model": "mobileone_s0", "num_classes": 10, "in_chans": 1, "fused": True}
    save_weights(model, weights, Card(**facts, preprocessing=preprocessing))
    order = ["export", str(weights), "--out", str(tmp_path / "artifacts"), "--to", "onnx", "--precision", "int8"]
    assert main(order) == 2
    assert "give --data" in capsys.readouterr().err
    assert main([*order, "--data", "digits", "--calibrate", "24"]) == 0
    manifest = json.loads((tmp_path / "artifacts" / "onnx-int8" / "manifest.json").read_text())
    told = manifest["details"]["quantization"]
    assert told["calibrated_on"] == 24
    assert len(told["layers"]) == 44
    assert main([*order, "--data", str(tmp_path / "nowhere")]) == 3


@pytest.mark.parametrize("way", ["activations", "weights"])
def test_a_dead_layer_is_no_trouble(way: str, small: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        small.depthwise.weight.zero_()
        small.depthwise.bias.fill_(-1.0)
    made = quantize(small, images, QuantizationMethod(equalize=way))
    assert torch.isfinite(answer(made.model, images)).all()
