"""timm's networks on our main road: folded, kept, exported, and told apart from networks that were trained."""

from __future__ import annotations

import argparse
import builtins
import copy
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import shaken
from onefold.cli import main
from onefold.commands.calibration_cache import CalibrationOptions, calibrated_network
from onefold.commands.deploy_gates import ArtifactResult, accuracy_gate
from onefold.commands.export import ExportOptions, check_int8_agreement, export_artifact, export_to_runtimes
from onefold.commands.fuse import fuse as fuse_stage
from onefold.commands.open_network import Network, make_predictor, open_network
from onefold.commands.predictor import open_predictor
from onefold.commands.timm_networks import load_timm, open_pretrained
from onefold.errors import BadArgument, BadCheckpoint, BadData, GateFailed, MissingExtra, NetworkFailed
from onefold.models.load_model import Card
from onefold.quantize import QuantizationMethod, quantize
from onefold.reparam import UnfoldedWarning, drift, fuse, unfused_norms
from onefold.runtimes import ModelInfo, exporter
from onefold.runtimes import export as export_to
from onefold.runtimes.onnx import opset_details
from onefold.runtimes.reference_logits import make_reference_images

_import = builtins.__import__
SMALL = "repvgg_a0"
COMPETITORS = (
    *(f"mobileone_s{size}" for size in range(5)),
    *("mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_b0", "fastvit_t8", "repvgg_a0", "mobilevit_s"),
)


@pytest.mark.parametrize("name", COMPETITORS)
def test_every_competitor_folds_through_and_through(timm, seeded, name):
    """With statistics that give each norm work to do: a norm that were left out would show."""
    network = shaken(timm.create_model(name))
    folded = fuse(network)
    size = network.pretrained_cfg["input_size"][-1]
    assert unfused_norms(folded) == []
    assert not any(part.training for part in folded.modules())
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in network.parameters())
    assert drift(network, folded, torch.randn(1, 3, size, size)) < 1e-5


def test_a_network_of_timm_is_opened_like_ours(timm):
    network = open_network("timm:mobilenetv3_large_100")
    card = network.card
    assert (card.model, card.num_classes, card.untrained) == ("timm:mobilenetv3_large_100", 1000, True)
    assert "accuracy unknown" in card.source
    assert f"timm {timm.__version__}" in card.source
    assert card.licence.startswith("Apache-2.0")
    told = network.preprocessing
    assert (told.size, told.crop_pct, told.interpolation) == (224, 0.875, "bicubic")
    assert told.mean == (0.485, 0.456, 0.406)
    state = torch.random.get_rng_state()
    again = open_network("timm:mobilenetv3_large_100")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert drift(network.model, again.model, network.random_images()) == 0.0


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_drawn_weights_give_answers_that_depend_on_the_image(timm, name):
    """As timm draws them they are near 1e14, or the same for every image: a proof by such an answer would be none."""
    network = open_network(f"timm:{name}")
    with torch.inference_mode():
        logits = network.model(torch.from_numpy(make_reference_images((3, *network.random_images().shape[2:]))))
    assert 1e-3 < logits.abs().max() < 1e3
    assert (logits[0] - logits[1]).norm() > 0.01 * logits.norm()


@pytest.mark.slow
def test_fused_by_us_kept_exported_and_measured(timm, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fuse", f"timm:{SMALL}", "--out", "f.safetensors"]) == 0
    kept = open_network("f.safetensors")
    assert kept.is_fused
    assert kept.card.untrained
    whole = open_network(f"timm:{SMALL}")
    assert drift(whole.model, kept.model, whole.random_images()) < 1e-5
    for source in (f"timm:{SMALL}", "f.safetensors"):
        capsys.readouterr()
        assert main(["export", source, "--to", "onnx", "--img-size", "64"]) == 0
        assert "random weights: accuracy unknown" in capsys.readouterr().out
        manifest = json.loads((tmp_path / "artifacts/onnx-fp32/manifest.json").read_text())
        assert (manifest["model"], manifest["fused"]) == (f"timm:{SMALL}", True)
        assert manifest["details"]["untrained"] is True
        assert "accuracy unknown" in manifest["source"]
        assert manifest["preprocessing"]["size"] == 64
    bench = ("bench", "artifacts/onnx-fp32", "f.safetensors", "--samples", "16", "--warmup", "0")
    assert main([*bench]) == 0
    assert f"timm:{SMALL} onnx fp32 random weights" in capsys.readouterr().out
    assert main(["bench", f"timm:{SMALL}", "--samples", "2", "--warmup", "0"]) == 2
    assert "is not fused" in capsys.readouterr().err
    assert main(["report", ".", "--out", "r.html"]) == 0
    page = Path("r.html").read_text()
    assert f"timm:{SMALL} onnx fp32 random weights" in page
    assert f"Latency of timm:{SMALL} (random weights)" in page


def test_weights_of_a_file_are_not_called_random(timm, tmp_path):
    torch.manual_seed(0)
    model = shaken(timm.create_model(SMALL, num_classes=5))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    spec = f"timm:{SMALL}@{tmp_path / 'w.pth'}"
    network = open_network(spec)
    assert (network.card.num_classes, network.card.untrained, network.card.licence) == (5, False, "")
    images = network.random_images()
    with torch.no_grad():
        torch.testing.assert_close(network.model(images), model(images))
    with open_predictor(spec) as predictor:
        assert "random" not in predictor.title
    tagged = open_network(f"timm:{SMALL}.rvgg_in1k@{tmp_path / 'w.pth'}")
    assert tagged.card.licence == "mit"
    fuse_stage(spec, tmp_path / "f.safetensors")
    [artifact] = export_to_runtimes(
        tmp_path / "f.safetensors", tmp_path / "a", ExportOptions(runtimes=["onnx"], size=64)
    )
    assert "random" not in artifact.title
    assert artifact.num_classes == 5


def test_a_checkpoint_of_timms_trainer_gives_all_that_belongs_to_its_weights(timm, tmp_path):
    torch.manual_seed(0)
    plain, averaged = (timm.create_model(SMALL, num_classes=2).eval() for _ in range(2))
    wrapped = {f"module.{name}": tensor for name, tensor in plain.state_dict().items()}
    content = {
        "state_dict": {**wrapped, "loss.weight": torch.ones(2)},
        "state_dict_ema": averaged.state_dict(),
        "args": argparse.Namespace(mean=[0.5] * 3, std=[0.25] * 3, crop_pct=0.9, img_size=64),
        "class_to_idx": {"owl": 0, "cat": 1},
    }
    torch.save(content, tmp_path / "last.pth.tar")
    for choice, model in (("", averaged), (":plain", plain)):
        network = open_network(f"timm:{SMALL}@{tmp_path / 'last.pth.tar'}{choice}")
        assert torch.equal(network.model.state_dict()["head.fc.weight"], model.state_dict()["head.fc.weight"])
        preprocessing = network.preprocessing
        assert network.card.classes == ("owl", "cat")
        assert (preprocessing.mean, preprocessing.std, preprocessing.crop_pct) == ((0.5,) * 3, (0.25,) * 3, 0.9)
        assert preprocessing.size == 64


def _misfit(name: str, *more: object) -> object:
    """Imports, but for a torchvision of another build."""
    if name == "timm":
        raise RuntimeError("operator torchvision::nms does not exist")
    return _import(name, *more)


def _no_route(*_: object, **__: object) -> None:
    raise ConnectionError("no route")


def test_what_cannot_be_opened_is_told(timm, tmp_path, monkeypatch):
    with pytest.raises(BadArgument, match="timm has no model 'repvgg_a00': did you mean repvgg_a0"):
        open_network("timm:repvgg_a00")
    with pytest.raises(BadArgument, match="timm has no model ''"):
        open_network("timm:")
    with pytest.raises(BadArgument, match=r"does not make 'repvgg_a0\.nobody'"):
        open_network("timm:repvgg_a0.nobody")
    with pytest.raises(BadArgument, match="has no file after its @"):
        open_network("timm:repvgg_a0@")
    with pytest.raises(BadCheckpoint, match="there is no file"):
        open_network("timm:repvgg_a0@nothing.safetensors")
    torch.save({"head.fc.weight": torch.zeros(5, 1280)}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=r"w\.pth does not fit timm:repvgg_a0 .*stem\S+ and \d+ more are missing"):
        open_network(f"timm:repvgg_a0@{tmp_path / 'w.pth'}")
    torch.save({"fc.weight": torch.zeros(5, 1280)}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=r"has no head\.fc\.weight"):
        open_network(f"timm:repvgg_a0@{tmp_path / 'w.pth'}")
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", _no_route)
        with pytest.raises(NetworkFailed, match=r"cannot be downloaded .*no route.*timm:repvgg_a0@FILE"):
            open_pretrained("timm:repvgg_a0")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.__import__", _misfit)
        with pytest.raises(MissingExtra, match="was built for another torch"):
            open_network("timm:repvgg_a0")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r'needs timm.*pip install "onefold\[timm\]"'):
        open_network("timm:repvgg_a0")


class Twins(nn.Module):
    """Two layers with equal kernels: FastViT's mixers are such before they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.one = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.other = copy.deepcopy(self.one)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(self.stem(x).relu())
        return self.head((x + self.other(0.5 * x)).mean((2, 3)))


def test_equal_kernels_of_8_bits_are_taken_by_onnx_runtime(seeded, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    made = quantize(Twins().eval(), torch.randn(16, 3, 32, 32), QuantizationMethod(weight_qmax=63))
    info = ModelInfo(model="twins", fused=True)
    artifact = export_to(made, (3, 32, 32), tmp_path / "a", runtime="onnx", info=info, precision="int8")
    assert artifact.parity.difference < 1e-6


@pytest.mark.parametrize(("name", "channels"), [("repvit_m0_9", 3), ("repvgg_a0", 1), ("repvgg_a0", 4)])
def test_two_classifiers_and_grey_images_are_opened(timm, tmp_path, name, channels):
    model = timm.create_model(name, num_classes=5, in_chans=channels).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    network = open_network(f"timm:{name}@{tmp_path / 'w.pth'}")
    assert (network.card.num_classes, network.card.in_chans) == (5, channels)
    assert len(network.preprocessing.mean) == channels
    images = network.random_images()
    with torch.no_grad():
        assert torch.equal(network.model(images), model(images))


@pytest.mark.parametrize("given", [1, 2, 3, 4])
@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_a_file_of_other_channels_starts_a_network(timm, tmp_path, given, wanted):
    model = timm.create_model("lcnet_035", num_classes=3, in_chans=given)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded, card = load_timm("timm:lcnet_035", tmp_path / "w.pth", in_chans=wanted)
    stem, before = loaded.state_dict()["conv_stem.weight"], model.state_dict()["conv_stem.weight"]
    assert (stem.shape[1], card.num_classes) == (wanted, 3)
    if given == wanted:
        assert torch.equal(stem, before)
    elif wanted == 1:
        torch.testing.assert_close(stem, before.sum(1, keepdim=True))
    else:
        expected = torch.stack([before[:, i % given] for i in range(wanted)], 1) * (given / wanted)
        torch.testing.assert_close(stem, expected)
    if given == 3:  # timm's own rule is for these
        torch.testing.assert_close(stem, timm.models.adapt_input_conv(wanted, before))


@pytest.mark.parametrize("name", ["lcnet_035", "levit_128s"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_without_a_last_layer_is_of_features(timm, tmp_path, name, prefix):
    model = timm.create_model(name, num_classes=0).eval()
    torch.save({f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}, tmp_path / "w.pth")
    loaded, card = load_timm(f"timm:{name}", tmp_path / "w.pth")
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert card.num_classes == 0
    loaded.reset_classifier(4)
    assert loaded.eval()(x).shape == (2, 4)
    with pytest.raises(BadCheckpoint, match=r"does not fit timm:lcnet_050 .*conv_pw\.weight is 24x16x1x1, and not 32x"):
        other = timm.create_model("lcnet_035", num_classes=0)
        torch.save(other.state_dict(), tmp_path / "w.pth")
        load_timm("timm:lcnet_050", tmp_path / "w.pth")


def test_classifiers_that_differ_are_told(timm, tmp_path):
    heads = {"head.linear.weight": torch.zeros(5, 9), "head_dist.linear.weight": torch.zeros(6, 9)}
    torch.save(heads, tmp_path / "d.pth")
    with pytest.raises(BadCheckpoint, match="classifiers of 5 and 6 classes"):
        open_network(f"timm:levit_128s@{tmp_path / 'd.pth'}")


class PreActivated(nn.Module):
    """As DenseNet's layers: the norm stands before its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x).relu()).mean((2, 3)))


def test_a_network_that_cannot_be_folded_through_is_partly_fused(seeded, tmp_path):
    network = Network(model=shaken(PreActivated()), card=Card(model="pre", num_classes=5), title="pre").with_size(32)
    with pytest.warns(UnfoldedWarning, match=r"could not fold 1: norm \(no convolution or Linear"):
        fused, found = network.fused()
    assert (fused.is_fused, fused.left_norms, found) == (True, 1, 0.0)
    with make_predictor(fused) as predictor:
        assert predictor.title.endswith("fp32 partly fused")
    artifact = export_artifact(fused, None, tmp_path / "a", "onnx", "fp32")
    assert (artifact.fused, artifact.details["left_norms"]) == (True, 1)
    assert artifact.title.endswith("partly fused")
    assert "partly fused" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(BadArgument, match="1 norms follow no convolution"):
        calibrated_network(fused, CalibrationOptions(data="digits"))


class Cancelling(nn.Module):
    """Its last layer takes the difference of large, nearly equal features: it magnifies every rounding."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.body = shaken(nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(2)))
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            self.body[1].bias.fill_(gain)
            self.head.weight -= self.head.weight.mean(1, keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(2))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_gate_says_the_same_on_one_thread_and_on_two(seeded, threads, monkeypatch):
    honest = Network(model=Cancelling(3e3).eval(), card=Card(model="x", num_classes=2), title="x").with_size(32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                "onefold.commands.open_network._TOLERANCE", 1e-9
            )  # so that rounding has to be told from a wrong fold
            honest.fused()
        wrong = copy.deepcopy(honest.model)
        with torch.no_grad():
            wrong.body[1].bias[0] *= 1.01
        monkeypatch.setattr("onefold.commands.open_network.fuse", lambda model: wrong)
        with pytest.raises(GateFailed, match=r"differ by .* in float64, and .* is allowed"):
            honest.fused()
    finally:
        torch.set_num_threads(before)


def test_an_older_opset_is_written_and_says_what_it_needs(seeded, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    network = Network(model=Twins().eval(), card=Card(model="twins", num_classes=5, fused=True), title="twins")
    details = opset_details(17)
    artifact = export_artifact(network.with_size(32), None, tmp_path / "a", "onnx", "fp32", details)
    model = onnx.load(tmp_path / "a" / "model.onnx")
    assert (model.opset_import[0].version, model.ir_version, artifact.details["opset"]) == (17, 8, 17)
    assert artifact.parity.difference < 1e-5
    assert "| needs | ONNX Runtime >= 1.12 |" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(BadArgument, match="opset from 15 to 20, not 11"):
        opset_details(11)


def test_calibration_that_destroys_the_network_is_told(seeded, tmp_path, caplog):
    for place, value in (("black", None), ("bright", 255)):
        (tmp_path / place).mkdir()
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3)) if value else np.zeros((32, 32, 3))
            Image.fromarray(pixels.astype("uint8")).save(tmp_path / place / f"{i}.png")
    network = Network(model=Twins().eval(), card=Card(model="twins", num_classes=5, fused=True), title="x").with_size(
        32
    )
    with pytest.raises(BadData, match=r"the 4 photos of .*black to calibrate with are of one colour each"):
        calibrated_network(network, CalibrationOptions(data=str(tmp_path / "black")))
    right = CalibrationOptions(data=str(tmp_path / "bright"))
    made = calibrated_network(network, right)
    assert "int8 agrees with fp32 on" in check_int8_agreement(network, made, right)["answers"]
    assert "one colour" not in caplog.text
    broken = dataclasses.replace(made, made=dataclasses.replace(made.made, model=Opposite(network.model)))
    with pytest.raises(GateFailed, match=r"agrees with fp32 on only 0 of 4 photos of .*, at most 49 % of all"):
        check_int8_agreement(network, broken, right)


class Opposite(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.model(x)


@pytest.mark.parametrize("untrained", [True, False])
def test_int8_of_drawn_weights_is_not_judged_by_its_logits(seeded, tmp_path, caplog, monkeypatch, untrained):
    """How far a rounding moves such logits says nothing: it is kept and said. Trained weights have to pass."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    measure = exporter._measure_parity
    monkeypatch.setattr(exporter, "_measure_parity", lambda *a: dataclasses.replace(measure(*a), difference=0.17))
    made = quantize(Twins().eval(), torch.randn(16, 3, 32, 32), QuantizationMethod(weight_qmax=63))
    info = ModelInfo(model="twins", fused=True, details={"untrained": True} if untrained else {})
    call = partial(export_to, made, (3, 32, 32), tmp_path / "a", runtime="onnx", info=info, precision="int8")
    if not untrained:
        with pytest.raises(GateFailed, match=r"differ from PyTorch's by 0\.17 of the largest, 0\.1 is allowed"):
            call()
        return
    artifact = call()
    assert (artifact.parity.difference, artifact.parity.tolerance) == (0.17, 0.17)
    assert "the logits of onnx in int8 differ from PyTorch's by 0.17 of the largest" in caplog.text
    assert "what int8 costs in accuracy cannot be known" in caplog.text
    assert "this is not judged, since the weights are random" in (tmp_path / "a" / "README.md").read_text()
    assert exporter.tolerance_of(artifact) == float("inf")


def test_the_gate_on_accuracy_says_what_drawn_weights_cannot_tell(seeded, tmp_path):
    network = Network(model=Twins().eval(), card=Card(model="twins", num_classes=5, fused=True), title="twins")
    drawn = dataclasses.replace(network, card=dataclasses.replace(network.card, untrained=True)).with_size(32)
    for each, verdict in ((drawn, "undecided"), (network.with_size(32), "failed")):
        artifact = export_artifact(each, None, tmp_path / "a", "onnx", "fp32")
        artifact = dataclasses.replace(artifact, precision="int8")
        scored = ArtifactResult(name="onnx-int8", artifact=artifact, top1=None, changed=40, count=100, lost=40, won=0)
        gate = accuracy_gate(scored, 1.0)
        assert (gate.verdict, gate.holds) == (verdict, verdict == "undecided")
        said = "40 of 100 predictions of onnx-int8 differ from the fp32 network's. Its weights"
        assert (said in gate.sentence) is gate.holds
