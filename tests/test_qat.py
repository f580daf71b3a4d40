"""Quantization-aware training: what is trained is what is converted, to the bit; the merged kernels that it rounds."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import shaken
from onefold.cli import main
from onefold.errors import BadArgument
from onefold.models import create_model
from onefold.models.mobileone import make_branches
from onefold.quantize import ModelQParams, QuantizationMethod, calibrate_qat, prepare_qat_, remove_qat_
from onefold.quantize.convert import convert
from onefold.quantize.qparams import QParams
from onefold.reparam import Chain, fuse
from onefold.reparam.moments import merged_kernel
from onefold.runtimes import load

SHAPE = (3, 32, 32)
FAMILIES = (
    "mobileone_s0",
    "mobilenetv1_025",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobileone_s4", "mobileformer_26m")),
)


def lively(*args: int) -> nn.Module:
    """A unit whose norms all do something."""
    unit = make_branches(*args).train()
    for norm in unit.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return unit


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def trained(name: str, x: Tensor, steps: int = 3) -> tuple[nn.Module, ModelQParams]:
    """A network of this name, its norms calibrated on these images, after some steps of QAT, in eval mode."""
    model = create_model(name, num_classes=5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # the running statistics are those of the last batch
    with torch.no_grad():
        model(x)
    params = calibrate_qat(model, [x], QuantizationMethod(clip_weights=False, rounding="nearest", correct_bias=False))
    prepare_qat_(model, params, SHAPE).train()
    rule = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
        rule.step()
        rule.zero_grad()
    return model.eval(), params


# ------------------------------------------------------------------------------- the live kernel

UNITS = [(8, 8, 3, 1, 8, 3), (8, 8, 3, 2, 8, 2), (8, 12, 1, 1, 1, 2), (8, 8, 1, 1, 1, 2), (3, 8, 3, 2, 1, 1)]


@pytest.mark.parametrize("args", UNITS)
def test_the_kernel_of_a_unit_in_training_gives_its_values_gradients_and_buffers(args, seeded) -> None:
    unit = lively(*args).double()
    reference = copy.deepcopy(unit)
    x = torch.randn(4, args[0], 9, 8, dtype=torch.float64) + 0.3
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    kernel, bias = merged_kernel(unit, ours)
    y = F.conv2d(ours, kernel, bias, args[3], args[2] // 2, 1, args[4])
    expected = reference(theirs)
    weights = torch.randn_like(expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(y.detach(), expected.detach()), (ours.grad, theirs.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(unit.parameters(), reference.parameters(), strict=True)]
    pairs += [(a.double(), b.double()) for a, b in zip(unit.buffers(), reference.buffers(), strict=True)]
    assert max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs) < 1e-10


def test_the_kernel_of_frozen_norms_is_the_one_that_fusing_gives(seeded) -> None:
    unit = shaken(lively(8, 8, 3, 1, 8, 3))
    kernel, bias = merged_kernel(unit, torch.zeros(1, 8, 4, 4))
    fused = unit.fuse()
    assert torch.equal(kernel, fused.weight)
    assert torch.equal(bias, fused.bias)


def test_trees_that_are_not_units_have_kernels_too(seeded) -> None:
    tree = Chain(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)).double().train()
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    kernel, bias = merged_kernel(copy.deepcopy(tree), x)
    assert torch.allclose(F.conv2d(x, kernel, bias, padding=1), tree(x), rtol=0, atol=1e-10)


def test_one_value_a_channel_is_refused_as_a_norm_refuses_it() -> None:
    with pytest.raises(ValueError, match="more than one value"):
        merged_kernel(lively(8, 8, 1, 1, 1, 2), torch.randn(1, 8, 1, 1))


# -------------------------------------------------------------------------------- trained = converted


@pytest.mark.parametrize("name", FAMILIES)
def test_the_converted_model_is_the_trained_one_to_the_bit(name: str, seeded: int) -> None:
    """The network in training, in eval mode, against the fused one rounded by `convert`: the same bits of float32."""
    x = torch.randn(6, *SHAPE)
    model, params = trained(name, x)
    reread = ModelQParams.from_dict(json.loads(json.dumps(params.to_dict())))
    converted = convert(fuse(remove_qat_(copy.deepcopy(model))), reread, SHAPE)
    fresh = torch.randn(4, *SHAPE)
    assert torch.equal(answer(model, fresh), answer(converted.network, fresh))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_learns_and_names_stay(name: str, seeded: int) -> None:
    x = torch.randn(6, *SHAPE)
    plain = create_model(name, num_classes=5)
    names = [key for key, _ in plain.named_parameters()], list(plain.state_dict())
    model, _ = trained(name, x, steps=0)
    assert ([key for key, _ in model.named_parameters()], list(model.state_dict())) == names
    model.train()
    model(x).square().sum().backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


def test_gradients_pass_through_rounding_and_stop_where_values_are_clipped(seeded) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x = torch.randn(6, *SHAPE)
    params = calibrate_qat(model.eval(), [x], QuantizationMethod(equalize="none", range_method="minmax"))
    plain = copy.deepcopy(model)
    prepare_qat_(model, params, SHAPE)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    model(ours)[:, 0].sum().backward()
    plain(theirs)[:, 0].sum().backward()
    assert float(F.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), 0)) > 0.98
    far = (100 * x).requires_grad_()
    model(far)[:, 0].sum().backward()
    first = params.activations["0:in"]
    clipped = (far < first.low - first.scale) | (far > first.high + first.scale)
    assert clipped.any()
    assert (far.grad[clipped] == 0).all()


def test_a_copy_and_an_average_are_quantized_too(seeded) -> None:
    model, _ = trained("mobilenetv1_025", torch.randn(6, *SHAPE), steps=0)
    twin, x = copy.deepcopy(model), torch.randn(2, *SHAPE)
    assert torch.equal(answer(twin, x), answer(model, x))
    remove_qat_(twin)
    assert not torch.equal(answer(twin, x), answer(model, x))


def test_training_in_int8_wins_back_what_rounding_lost(seeded) -> None:
    """One scale a tensor and channels that differ by a thousand: rounded after training nothing is left of it."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        model[0].weight *= torch.logspace(-2, 1, 8)[:, None, None, None]
        model[2].weight /= torch.logspace(-2, 1, 8)[:, None, None, None]
    x = torch.randn(64, 3, 12, 12)
    target = answer(model, x)
    method = QuantizationMethod(
        equalize="none", weights="tensor", clip_weights=False, rounding="nearest", correct_bias=False
    )
    params = calibrate_qat(model, [x], method)
    prepare_qat_(model, params, (3, 12, 12)).train()

    def loss() -> Tensor:
        return ((model(x) - target) ** 2).mean() / target.var()

    before, rule = float(loss().detach()), torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        rule.zero_grad()
        loss().backward()
        rule.step()
    assert float(loss().detach()) < 0.5 * before


# ------------------------------------------------------------------------------------- params, kept


def test_parameters_of_another_network_and_damaged_ones_are_refused(seeded) -> None:
    _, params = trained("mobilenetv1_025", torch.randn(6, *SHAPE), steps=0)
    other = fuse(create_model("mobileone_s0", num_classes=5).eval())
    with pytest.raises(BadArgument, match="another network"):
        convert(other, params, SHAPE)
    good = params.to_dict()
    bad = [{}, {**good, "weight_qmax": 5}, {**good, "weights": "row"}, {**good, "activations": {"a": [0.1]}}]
    bad += [
        {**good, "activations": {"a": [-1.0, 0]}},
        {**good, "activations": {"a": [0.1, 300]}},
        {**good, "activations": 3},
    ]
    bad += [{**good, "version": 3}, {**good, "skip_layers": 3}, []]
    for plain in bad:
        with pytest.raises(BadArgument):
            ModelQParams.from_dict(plain)


def test_parameters_of_version_1_are_read() -> None:
    version_1 = {"points": {"stem:in": [0.5, -3]}, "weights": "tensor", "limit": 63, "keep": ["head"]}
    params = ModelQParams.from_dict(version_1)
    assert params == ModelQParams(
        activations={"stem:in": QParams(0.5, -3)}, weights="tensor", weight_qmax=63, skip_layers=("head",)
    )
    assert ModelQParams.from_dict(params.to_dict()) == params


@pytest.mark.slow
def test_a_run_is_trained_resumed_fused_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train digits, train on in int8, stop, resume, fuse, export: the artifact's accuracy is the run's."""
    monkeypatch.chdir(tmp_path)
    common = ["--recipe", "digits:w025", "--plan.workers", "0"]
    assert main(["train", *common, "--epochs", "1", "--out", "runs/float"]) == 0
    options = ["--weights", "runs/float", "--int8", "--lr", "0.01", "--epochs", "1", "--int8.images", "32"]
    assert main(["train", *common, *options, "--out", "runs/int8"]) == 0
    recipe = json.loads(Path("runs/int8/recipe.json").read_text())
    assert {"images": 32, "limit": 127, "weights": "channel"}.items() <= recipe["int8"].items()
    log = [json.loads(line) for line in Path("runs/int8/log.jsonl").read_text().splitlines()]
    best = max(line["top1"] for line in log if "top1" in line)
    capsys.readouterr()
    assert main(["eval", "runs/int8", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["top1"] == pytest.approx(best)
    assert main(["train", "--resume", "runs/int8"]) == 0  # complete: nothing to do, and nothing to complain of
    assert main(["fuse", "runs/int8", "--out", "fused.safetensors"]) == 0
    assert main(["export", "fused.safetensors", "--to", "onnx", "--precision", "int8", "--out", "a"]) == 0
    capsys.readouterr()
    assert main(["eval", "a/onnx-int8", "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(best)
    with load(Path("a/onnx-int8")) as session:
        metadata = session.artifact.details["quantization"]
        assert metadata["method"] == "trained, per channel"
        assert np.isfinite(session(np.zeros((1, *session.artifact.input_shape), np.float32))).all()
    Path("runs/int8/int8.json").write_text("{}")
    assert main(["train", "--resume", "runs/int8"]) == 4
