"""`onefold advise`: what it opens, what it prints and writes, and what it refuses. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
import onefold
from onefold.advisor import OnnxGraph, Variant
from onefold.cli import main
from onefold.commands.advise import AdviseOptions, advise_on_source, open_subject
from onefold.errors import BadArgument, BadArtifact, BadData
from onnx_networks import Network, fake_bench


class Unfused(nn.Module):
    """Two branches with norms, which fuse to one convolution, and a SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = nn.functional.silu(self.norms[0](self.a(x)) + self.norms[1](self.b(x)))
        return self.head(maps.mean((2, 3)))


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return Unfused()


def by_operations(variant: Variant) -> int:
    return 50_000 * len(variant.graph().nodes) // variant.threads


def options(source: str, **facts: object) -> AdviseOptions:
    return AdviseOptions(**{"source": source, "runtimes": ["onnx"], "img_size": 32, **facts})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An .onnx file with a norm after a convolution of 37 channels."""
    network = Network()
    network.head(network.op("Relu", network.norm(network.conv("images", 3, 37), 37)), 37)
    path = tmp_path / "net.onnx"
    path.write_bytes(network.content())
    return path


def test_a_function_of_a_module_is_advised_on_in_all_its_forms():
    rules = ["fuse", "fold", "int8", "hard-activations", "relu", "resolution"]
    order = options(f"{__name__}:make_network", rules=rules, img_size=64)
    (advice,) = advise_on_source(order, None, fake_bench(by_operations))
    tried = {trial.remedy.rule.name: trial for trial in advice.trials}
    assert {"int8", "hard-activations", "relu", "resolution"} <= set(tried)
    assert tried["fold"].is_confirmed or tried["fuse"].is_confirmed
    assert [n.op_type for n in advice.case.graph.nodes].count("Conv") == 1
    assert tried["int8"].problem is None
    assert tried["resolution"].timing.answers.difference is None  # images of another size cannot be compared
    assert tried["relu"].is_confirmed
    assert "onefold advise" in tried["relu"].remedy.command


@pytest.mark.slow
def test_a_network_of_ours_by_its_name_is_found_unfused():
    order = options("mobileone_s0", rules=["fuse"])
    (advice,) = advise_on_source(order, None, fake_bench(by_operations))
    (trial,) = advice.trials
    assert trial.problem is None
    assert "not fused" in trial.remedy.finding
    assert trial.timing.answers.difference < 1e-4


def test_norms_that_the_export_folds_are_no_finding():
    (advice,) = advise_on_source(options("mobilenetv1_025", rules=["fuse"]), None, fake_bench(by_operations))
    assert not advice.trials


def test_the_command_writes_a_network_that_answers_the_same(file: Path, capsys: pytest.CaptureFixture[str]):
    out = file.parent / "advised.onnx"
    assert main(["advise", str(file), "--apply", "fold,channels", "--out", str(out)]) == 0
    assert "fold, channels" in capsys.readouterr().out
    graph = OnnxGraph(out.read_bytes())
    assert [node.op_type for node in graph.nodes] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    import onnxruntime

    images = np.random.default_rng(0).standard_normal((2, 3, 12, 12), dtype=np.float32)
    ours, theirs = (onnxruntime.InferenceSession(p).run(None, {"images": images})[0] for p in (file, out))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()


def test_the_command_prints_findings_and_counts_the_rest(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    bench = fake_bench(by_operations)
    monkeypatch.setattr("onefold.commands.advise.TrialBench", lambda **_: bench)
    monkeypatch.setattr("onefold.commands.advise.load_or_measure_roofline", lambda *_: None)
    assert main(["advise", str(file), "--only", "fold,channels,batch"]) == 0
    text = capsys.readouterr().out
    for words in ("1. ", "evidence", "change", "predicted", "measured", "answers    stay", "command    onefold advise"):
        assert words in text
    assert "tried and not confirmed, 1: channels" in text
    assert "all that helped and leaves the answers (fold, batch)" in text
    assert main(["advise", str(file), "--only", "fold", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["findings"][0]["rule"] == "fold"
    assert found["findings"][0]["ratio"] == pytest.approx(5 / 6, rel=0.01)


def test_a_file_is_quantized_by_the_runtime_s_own_tool(file: Path):
    order = options(str(file), img_size=None, rules=["fold", "int8"])
    (advice,) = advise_on_source(order, None, fake_bench(lambda each: 400_000 if each.precision == "fp32" else 100_000))
    (found,) = advice.findings
    assert found.remedy.rule.name == "int8"
    assert 0 < found.timing.answers.difference < 0.1
    assert found.remedy.command.startswith(f"onefold advise {file} --to onnx --apply int8")


def test_int8_of_a_network_with_branches_is_compared_with_the_fused_one():
    order = options(f"{__name__}:make_network", rules=["fuse", "int8"])

    def cost(each: Variant) -> int:
        return 100_000 if each.precision == "fp32" else 90_000  # fusing gains nothing, so it is not where int8 starts

    (advice,) = advise_on_source(order, None, fake_bench(cost))
    (found,) = advice.findings
    arguments = 'to="onnx", precision="int8", data="PHOTOS"'
    assert found.remedy.command == f"onefold.export({__name__}.make_network(), {arguments})"
    assert "BatchNormalization" not in [node.op_type for node in found.remedy.against.graph().nodes]
    assert found.timing.ratio.value == pytest.approx(0.9, rel=0.01)
    assert any("compared with it" in remark for remark in advice.remarks)


def test_the_rules_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["advise", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in ("fuse", "fold", "channels", "fp32-islands"))


def test_what_cannot_be_advised_on_is_refused(file: Path, capsys: pytest.CaptureFixture[str]):
    refused = [
        (["advise"], "nothing to advise on"),
        (["advise", str(file), "--apply", "fold"], "--apply and --out belong together"),
        (["advise", str(file), "--to", "ncnn"], "the advisor tries onnx and openvino"),
        (["advise", str(file), "--only", "unroll"], "no rule 'unroll'"),
        (["advise", str(file.parent / "other.onnx")], "cannot be read"),
        (["advise", str(file), "--apply", "gates", "--out", str(file.parent / "o.onnx")], "changes nothing"),
        (["advise", "nowhere:network"], "cannot be imported"),
    ]
    for words, says in refused:
        assert main([*words, *(["--results", str(file.parent)] if len(words) > 1 else [])]) == 2, words
        assert says in capsys.readouterr().err


def test_files_that_are_no_network_of_images_are_refused(tmp_path: Path, file: Path):
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(BadData, match="no ONNX file"):
        open_subject(options(str(tmp_path / "text.onnx")))
    with pytest.raises(BadArgument, match="12 x 12, which is fixed in it"):
        open_subject(options(str(file), img_size=64))
    graph = OnnxGraph(file.read_bytes())
    tensor = graph.model.graph.initializer[0]
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="weights.bin")
    (tmp_path / "outside.onnx").write_bytes(graph.model.SerializeToString())
    with pytest.raises((BadArtifact, BadData)):
        open_subject(options(str(tmp_path / "outside.onnx"), img_size=None))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Noise in folders of four classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(4):
        (tmp_path / f"photos/{label}").mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"photos/{label}/{i}.png")
    return tmp_path / "photos"


def test_a_file_is_calibrated_on_photos_where_they_are_given(file: Path, photos: Path):
    with_photos, drawn = (open_subject(options(str(file), img_size=None, data=d)) for d in (str(photos), None))
    made = [subject.forms.int8(subject.content) for subject in (with_photos, drawn)]
    kinds = [[node.op_type for node in OnnxGraph(content).nodes] for content in made]
    assert kinds[0] == kinds[1]
    assert "QuantizeLinear" in kinds[0]
    assert made[0] != made[1]  # other ranges


def test_photos_tell_what_a_change_costs(photos: Path):
    order = options(f"{__name__}:make_network", rules=["relu"], data=str(photos))
    bench = fake_bench(by_operations)
    subject = open_subject(order)
    from dataclasses import replace

    from onefold.commands.advise import _PhotoScorer

    (advice,) = advise_on_source(order, None, replace(bench, score=_PhotoScorer(subject, str(photos))))
    (trial,) = advice.trials
    assert trial.timing.answers.photos == 24
    assert "on 24 photos" in trial.timing.answers.describe()


def test_advise_is_a_verb_in_python():
    with pytest.raises(TypeError, match="did you mean 'img_size'"):
        onefold.advise("mobilenetv1_025", imgsize=32)
    with pytest.raises(BadArgument, match="16 samples or more"):
        onefold.advise("mobilenetv1_025", samples=10)
    with pytest.raises(BadArgument, match="no rule"):
        onefold.advise("mobilenetv1_025", only=["nothing"], results=None)
