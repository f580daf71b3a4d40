"""Deploying: one folder with artifacts, scores, latencies and a README, and a gate on accuracy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import onefold
from onefold.accuracy_intervals import drop_interval, photos_to_decide
from onefold.bench import Procedure
from onefold.cli import main
from onefold.commands import calibration_cache
from onefold.commands.calibration_cache import CalibrationOptions, TimeBudget
from onefold.commands.deploy import _kept_artifacts, _unfinished, build_deployment
from onefold.commands.deploy_gates import (
    ArtifactResult,
    Gate,
    accuracy_gate,
    describe_held_out,
    gates_error,
    too_few_photos_note,
    write_gates,
)
from onefold.commands.deploy_results import QUICK_NOTE, DeployOptions, DeployResult, warn_constant_predictions
from onefold.commands.held_out_images import DeploymentPhotos
from onefold.commands.open_network import open_network
from onefold.errors import BadArgument, BadData, GateFailed, GateUndecided
from onefold.models import create_model
from onefold.models.load_model import Card, save_weights
from onefold.reparam import fuse
from onefold.runtimes import onnx, open_artifact, openvino
from onefold.runtimes.base import RuntimeEngine
from onefold.runtimes.reference_logits import Floats

PREPROCESSING = {"size": 32, "crop_pct": 1.0, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "channels": 3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that knows the digits somewhat: its last layer is fitted, the rest as drawn."""
    from onefold.commands.held_out_images import validation_images
    from onefold.train import fit_linear_probe

    torch.manual_seed(0)
    model = create_model("mobilenetv1_025", num_classes=10)
    card = Card(model="mobilenetv1_025", num_classes=10, fused=True, preprocessing=PREPROCESSING,
                classes=tuple(map(str, range(10))), licence="Apache-2.0")  # fmt: skip
    digits, _ = validation_images("", "digits")
    from onefold.data import Preprocessing

    prepare = Preprocessing.from_dict(PREPROCESSING)
    x = torch.stack([torch.from_numpy(prepare(digits.image(i))) for i in range(len(digits))])
    y = torch.tensor([digits.label(i) for i in range(len(digits))])
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        model(x)
        fused = fuse(model.eval())
        features = fused.forward_head(fused.forward_features(x), pre_logits=True)
        weight, bias = fit_linear_probe(features, y, 10)
        fused.head.fc.weight.copy_(weight)
        fused.head.fc.bias.copy_(bias)
    path = tmp_path_factory.mktemp("weights") / "fused.safetensors"
    save_weights(fused, path, card)
    return path


@pytest.fixture(scope="module")
def deployed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployed") / "deploy"
    order = ["deploy", str(weights), "--data", "digits", "--to", "onnx,openvino", "--int8", "--samples", "20"]
    assert main([*order, "--out", str(out), "--max-drop", "100", "--calibrate", "32"]) == 0
    return out


def test_the_folder_holds_everything_and_names_no_place_it_was_made_in(deployed: Path) -> None:
    names = {path.name for path in deployed.iterdir()}
    artifacts = {f"{runtime}-{precision}" for runtime in ("onnx", "openvino") for precision in ("fp32", "int8")}
    assert names == artifacts | {"README.md", "MODEL_CARD.md", "report.html", "results"}
    for text in (deployed / "README.md", deployed / "MODEL_CARD.md", deployed / "report.html"):
        assert str(deployed.parent) not in text.read_text()
    for name in artifacts:
        assert open_artifact(deployed / name).fused
    assert not [path for path in deployed.parent.iterdir() if path != deployed]


def test_the_table_says_what_the_artifacts_do(deployed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(
        r"^\| (\S+-\S+) \| yes(?:: its logits are PyTorch's, [\de.-]+)? "
        r"\| ([\d.]+) \([\d.]+ to [\d.]+\) \| (-?[\d.]+) \(\S+ to \S+\) \| (\d+) of (\d+) \|",
        (deployed / "README.md").read_text(),
        re.M,
    )
    scores = {name: (float(top1), float(lost), int(changed)) for name, top1, lost, changed, _ in rows}
    assert set(scores) == {"onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-int8"}
    assert scores["onnx-fp32"][1:] == (0.0, 0)
    capsys.readouterr()
    assert main(["eval", str(deployed / "onnx-int8"), "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(scores["onnx-int8"][0], abs=0.01)


def test_measurements_carry_the_accuracy_and_the_method(deployed: Path) -> None:
    (ledger,) = (deployed / "results").glob("*-linux.jsonl")
    (line,) = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert {m["subject"]["top1"] for m in line["measurements"].values()} - {None}
    manifest = json.loads((deployed / "onnx-int8" / "manifest.json").read_text())
    assert manifest["details"]["quantization"]["calibrated_on"] == 32
    assert manifest["details"]["cost"]["macs"] > 0


@pytest.mark.slow
def test_the_gate_fails_with_1_and_leaves_the_folder_that_says_why(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deploy"
    order = ["deploy", str(weights), "--data", "digits", "--to", "onnx", "--int8", "--samples", "20", "--per-tensor"]
    assert main([*order, "--out", str(out), "--max-drop", "0", "--calibrate", "2", "--weight-bits", "7"]) == 1
    said = capsys.readouterr()
    assert "FAILED    onnx-int8" in said.out
    last = said.err.splitlines()[-1]  # below lines of progress
    assert re.fullmatch(r"error: 1 of 2 artifacts failed their gate: onnx-int8 lost .*, and 0 may be lost; .*", last)
    assert "Not to be shipped: onnx-int8" in (out / "README.md").read_text()
    assert "A gate FAILED: onnx-int8 lost" in (out / "report.html").read_text()
    assert main([*order, "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def result(lost: int, won: int, count: int, *, name: str = "onnx-int8", precision: str = "int8") -> ArtifactResult:
    artifact = SimpleNamespace(precision=precision, details={}, parity=None)
    return ArtifactResult(
        name=name,
        artifact=artifact,  # type: ignore[arg-type]
        top1=50.0,
        changed=lost + won,
        count=count,
        lost=lost,
        won=won,
    )


@pytest.mark.parametrize(
    ("lost", "won", "count", "max_drop", "verdict", "status"),
    [
        (2, 0, 48, 1.0, "undecided", 11),  # 4.17 points, -2.7 to 10.7
        (1, 0, 48, 1.0, "undecided", 0),  # one photo of few
        (0, 0, 48, 1.0, "undecided", 0),
        (1, 0, 9, 1.0, "undecided", 11),  # of so few, one is more than may be lost
        (4, 3, 63, 1.0, "undecided", 0),
        (9, 0, 63, 1.0, "failed", 1),
        (0, 0, 193, 1.0, "undecided", 0),
        (0, 0, 194, 1.0, "passed", 0),
        (2, 0, 100, 1.0, "undecided", 11),
        (1, 0, 100, 1.0, "undecided", 0),
        (60, 0, 200, 1.0, "failed", 1),
        (2, 0, 48, 11.0, "passed", 0),
        (1, 0, 20, 0.0, "failed", 1),  # none may be lost, of these photos
        (0, 0, 20, 0.0, "passed", 0),
    ],
)
def test_a_loss_whose_interval_holds_the_bound_is_undecided(
    lost: int, won: int, count: int, max_drop: float, verdict: str, status: int, tmp_path: Path
) -> None:
    gate = accuracy_gate(result(lost, won, count), max_drop)
    assert gate.verdict == verdict
    error = gates_error([gate], tmp_path)
    assert (0 if error is None else error.exit_status) == status
    assert isinstance(error, GateFailed) is bool(status)  # whoever catches that catches both
    assert (f"this cannot be told by {count} photos" in gate.sentence) is (verdict == "undecided")
    assert ("for 8 bits" in str(error)) is (verdict == "failed")  # int8 is blamed where it is shown
    write_gates([gate], tmp_path)
    (saved,) = json.loads((tmp_path / "gates.json").read_text())["gates"]
    assert (saved["verdict"], saved["passed"]) == (verdict, verdict == "passed")


def test_how_many_photos_would_tell_is_said() -> None:
    assert accuracy_gate(result(2, 0, 48), 1.0).sentence == (
        "onnx-int8 lost 4.17 points of top-1 (95 % interval -2.7 to 10.7, 48 photos), and 1 may be lost: this cannot "
        "be told by 48 photos, of which 2 became wrong and none right; if it goes on so about 177 photos tell "
        "(--val FOLDER)"
    )
    one = accuracy_gate(result(1, 0, 48), 1.0).sentence
    assert "48 photos (1 photo is 2.08 points, and one may be lost), of which 1 became wrong and none right; if" in one
    assert one.endswith(" photos tell (--val FOLDER, or --max-drop 8 if so much may be lost)")
    assert accuracy_gate(result(1, 0, 48), 8.0).passed  # as it says
    none = accuracy_gate(result(0, 0, 48), 1.0).sentence
    assert "of which none became wrong or right; if it goes on so about 194 photos tell" in none
    unlabelled = accuracy_gate(replace(result(2, 0, 48), top1=None), 1.0).sentence
    assert "of which 2 changed; if" in unlabelled
    quick = accuracy_gate(replace(result(2, 0, 128), num_held_out=300), 1.0)
    assert "photos tell (without --quick 300 are scored, or --max-drop" in quick.sentence
    assert "many more photos would tell" in accuracy_gate(result(1, 0, 100), 1.0).sentence
    for lost, won, count in ((2, 0, 48), (1, 0, 60), (0, 0, 48), (30, 2, 400)):
        number = photos_to_decide(lost, won, count, 1.0)
        assert number is not None
        sides = [
            [bound > 1.0 for bound in drop_interval(lost * n / count, won * n / count, n)] for n in (number - 1, number)
        ]
        assert [len(set(each)) for each in sides] == [2, 1]
    assert photos_to_decide(1, 0, 100, 1.0) is None  # on the bound, no number tells


def test_in_python_what_is_undecided_is_said_too(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: by `say` where there is one, else by a warning."""
    gate = accuracy_gate(result(1, 0, 48), 1.0)
    done = DeployResult(folder=tmp_path, network=None, verdicts=(), gates=(gate,), top1=None, data="")  # type: ignore[arg-type]
    monkeypatch.setattr("onefold.commands.deploy.build_deployment", lambda *_, **__: done)
    onefold.deploy(weights, "digits", say=[].append)
    assert not caplog.text
    assert onefold.deploy(weights, "digits").undecided == [gate]
    assert "undecided: onnx-int8 lost 2.08 points of top-1" in caplog.text
    assert "about 718 photos tell (val=FOLDER, or max_drop=8 if so much may be lost)" in caplog.text


def test_an_artifact_of_32_bits_with_all_answers_passes_on_any_photos() -> None:
    exact = result(0, 0, 12, precision="fp32")
    exact = replace(
        exact, artifact=SimpleNamespace(precision="fp32", details={}, parity=SimpleNamespace(difference=6e-7))
    )  # type: ignore[arg-type]
    gate = accuracy_gate(exact, 1.0)
    assert gate.passed
    assert gate.sentence.endswith("and 1 may be lost: its logits are PyTorch's, 6.0e-07")
    assert accuracy_gate(result(1, 0, 12, precision="fp32"), 1.0).verdict == "undecided"


def test_an_artifact_of_8_bits_with_all_logits_to_the_bit_passes_on_any_photos() -> None:
    exact = replace(result(0, 0, 36), same_logits=True)
    assert accuracy_gate(exact, 1.0).passed
    assert accuracy_gate(result(0, 0, 36), 1.0).verdict == "undecided"
    assert accuracy_gate(replace(exact, artifact=SimpleNamespace(precision="int8", details={"untrained": True})), 1.0
                         ).verdict == "undecided"  # fmt: skip


def test_before_the_work_it_is_said_what_the_photos_can_tell() -> None:
    assert describe_held_out(48, 48) == "48 photos are scored; one of them is 2.08 points of top-1"
    assert describe_held_out(128, 240).startswith("128 of 240 photos are scored, evenly; one of them is 0.78 points")
    note = too_few_photos_note(48, 1.0)
    assert note == (
        "48 photos cannot tell a loss of 1 point from none: that takes at least 194, if no prediction changes, and "
        "several times as many if some do; give more held-out photos with --val FOLDER, or a larger --max-drop: at "
        "least 4, by the same rule"
    )
    assert "without --quick 240 are scored, or a larger" in too_few_photos_note(128, 1.0, 240)
    assert "that takes more than a million, if" in too_few_photos_note(48, 1e-5)
    assert too_few_photos_note(2, 1.0).endswith("with --val FOLDER")  # nobody lets 49 points be lost
    for count, max_drop in ((48, 4.0), (194, 1.0), (20, 0.0), (5, 100.0)):
        assert too_few_photos_note(count, max_drop) == ""


def test_what_failed_and_what_is_undecided_are_told_apart(tmp_path: Path) -> None:
    gates = [accuracy_gate(result(9, 0, 63, name="a-int8"), 1.0), accuracy_gate(result(3, 0, 63, name="b-int8"), 1.0)]
    error = gates_error([*gates, accuracy_gate(result(0, 0, 63, name="c-int8"), 1.0)], tmp_path)
    assert type(error) is GateFailed
    assert str(error).startswith("1 of 3 artifacts failed their gate, of 1 it cannot be told: a-int8 lost 14.29 points")
    assert "c-int8" not in str(error)


def test_the_fastest_of_those_that_passed_is_recommended(tmp_path: Path) -> None:
    def timed_result(name: str, ms: float | None) -> ArtifactResult:
        timed = None if ms is None else SimpleNamespace(median_ns=1e6 * ms)
        counts = {"changed": 0, "count": 100, "lost": 0, "won": 0}
        return ArtifactResult(name=name, artifact=None, top1=None, measurement=timed, **counts)  # type: ignore[arg-type]

    results = [timed_result("a", 2.0), timed_result("b", 1.0), timed_result("c", 0.5), timed_result("d", None)]
    failed = Gate(name="c", kind="accuracy", verdict="failed", sentence="c lost much")
    done = DeployResult(folder=tmp_path, network=None, verdicts=tuple(results), gates=(failed,), top1=None, data="")  # type: ignore[arg-type]
    assert "those that keep their accuracy: b, 1.00 ms; a 2.00 times as long." in done.recommendation
    assert "recommended" in replace(done, verdicts=tuple(results[2:])).recommendation
    undecided = replace(done, gates=(replace(failed, verdict="undecided", remedy="194 tell"),)).recommendation
    assert (
        "those that keep their accuracy: b, 1.00 ms; a 2.00 times as long. c takes 0.50 times as long and lost "
        "0.00 % (-1.9 to 1.9); whether it keeps its accuracy cannot be told by 100 photos: 194 tell." in undecided
    )
    none_passed = replace(done, verdicts=tuple(results[2:]), gates=(replace(failed, verdict="undecided"),))
    assert none_passed.recommendation.startswith(
        "Whether an artifact keeps its accuracy cannot be told by 100 photos: c"
    )


def test_what_is_the_same_of_all_gates_is_said_once() -> None:
    names = ("onnx-int8", "openvino-int8")
    error = gates_error([accuracy_gate(result(2, 0, 48, name=name), 1.0) for name in names], Path("deploy"))
    assert type(error) is GateUndecided
    assert str(error).startswith("whether 2 of 2 artifacts keep their accuracy cannot be told: onnx-int8 lost 4.17")
    assert str(error).count("this cannot be told by 48 photos") == 1
    assert all(f"{name} lost 4.17 points of top-1" in str(error) for name in names)


class Altered:
    """An engine whose logits are changed by `change`, which is given the images and the logits."""

    def __init__(self, engine: RuntimeEngine, change: Callable[[Floats, Floats], Floats]) -> None:
        self._engine, self._change, self.threads = engine, change, engine.threads

    def __call__(self, images: Floats) -> Floats:
        return self._change(images, self._engine(images))

    def close(self) -> None:
        self._engine.close()


def altered(
    monkeypatch: pytest.MonkeyPatch, runtime: ModuleType, precision: str, change: Callable[[Floats, Floats], Floats]
) -> None:
    """Let a runtime answer something else in one precision."""
    true = runtime.load

    def load_altered(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
        engine = true(content, precision=precision, threads=threads)
        return Altered(engine, change) if precision == wrong else engine

    wrong = precision
    monkeypatch.setattr(runtime, "load", load_altered)


@pytest.mark.slow
def test_a_runtime_that_answers_something_else_leaves_no_artifact_and_loses_no_other(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    altered(monkeypatch, openvino, "fp32", lambda images, logits: logits + np.abs(logits).max())
    out, order = tmp_path / "deploy", ["--data", "digits", "--to", "openvino,onnx", "--samples", "20"]
    assert main(["deploy", str(weights), *order, "--out", str(out)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]  # below lines of progress
    assert line.startswith(
        "error: 1 of 2 artifacts failed their gate: openvino-fp32: the logits of openvino differ from"
    )
    assert not (out / "openvino-fp32").exists()
    assert open_artifact(out / "onnx-fp32").parity.top1_agreement == 1.0
    for name in ("README.md", "report.html"):
        assert "the logits of openvino differ from PyTorch" in (out / name).read_text()
    gates = json.loads((out / "results" / "gates.json").read_text())["gates"]
    assert {gate["name"]: (gate["kind"], gate["passed"]) for gate in gates} == {
        "openvino-fp32": ("parity", False),
        "onnx-fp32": ("accuracy", True),
    }


@pytest.mark.slow
def test_where_no_runtime_answers_as_it_should_the_folder_says_so(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered(monkeypatch, onnx, "fp32", lambda images, logits: -logits)
    out = tmp_path / "deploy"
    assert main(["deploy", str(weights), "--data", "digits", "--to", "onnx", "--out", str(out)]) == 1
    assert {path.name for path in out.iterdir()} == {"README.md", "MODEL_CARD.md", "report.html", "results"}
    assert "A gate FAILED: onnx-fp32" in (out / "report.html").read_text()


def test_one_answer_of_32_bits_that_differs_fails_where_none_may(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of the proof are answered rightly, so that only scoring can find it."""

    def change(images: Floats, logits: Floats) -> Floats:
        return logits if len(images) <= 3 else np.concatenate([-logits[:1], logits[1:]])

    altered(monkeypatch, onnx, "fp32", change)
    order = DeployOptions(
        runtimes=["onnx"],
        precisions=["fp32"],
        calibration=CalibrationOptions(data="digits"),
        max_drop=100.0,
        exact_fp32=True,
        timed=False,
    )
    done = build_deployment(weights, tmp_path / "deploy", order, say=lambda line: None)
    (gate,) = done.failed
    assert (gate.name, gate.kind) == ("onnx-fp32", "parity")
    assert re.match(
        r"12 of \d+ predictions of onnx-fp32 differ from the network's", gate.sentence
    )  # the first of each batch
    assert accuracy_gate(done.verdicts[0], order.max_drop).passed


def test_export_writes_the_other_runtimes_before_a_parity_gate_fails(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    altered(monkeypatch, openvino, "fp32", lambda images, logits: -logits)
    out = tmp_path / "artifacts"
    assert main(["export", str(weights), "--to", "openvino,onnx", "--out", str(out)]) == 1
    assert "these are written" in capsys.readouterr().err
    assert open_artifact(out / "onnx-fp32").fused
    assert not (out / "openvino-fp32").exists()


@pytest.mark.slow
def test_the_costliest_layers_can_be_left_in_32_bits(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deploy"
    order = ["deploy", str(weights), "--data", "digits", "--to", "onnx", "--int8", "--samples", "16", "--out", str(out)]
    assert main([*order, "--max-drop", "100", "--calibrate", "16", "--skip-layers", "2"]) == 0
    metadata = json.loads((out / "onnx-int8" / "manifest.json").read_text())["details"]["quantization"]
    assert metadata["method"].endswith("2 layers in fp32")
    assert len(metadata["layers"]) == 28 - 2  # a stem, 13 pairs and the head
    assert main([*order[:-1], str(tmp_path / "other"), "--calibrate", "16", "--skip-layers", "28"]) == 2
    assert "28 layers, and 28 of them were to be left in 32 bits" in capsys.readouterr().err


def test_photos_without_labels_are_compared_with_the_float_network(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(photos / f"{number}.png")
    order = ["deploy", str(weights), "--data", str(photos), "--to", "onnx", "--out", str(tmp_path / "deploy")]
    assert main([*order, "--samples", "16", "--quick"]) == 0
    said = capsys.readouterr()
    assert "0 of 12 predictions differ from PyTorch fp32" in said.out
    assert "held out  12 photos are scored; one of them is 8.33 % of the predictions" in said.out
    assert "note: 12 photos cannot tell a loss of 1 point from none" in said.err
    assert "not labelled" in (tmp_path / "deploy" / "README.md").read_text()


class Labels(list[int]):
    """As much of a dataset as labels are."""

    def label(self, i: int) -> int:
        return self[i]


def test_one_answer_to_all_photos_is_said(caplog: pytest.LogCaptureFixture) -> None:
    named = SimpleNamespace(class_name="class {}".format)
    for labels, answers, labelled, said in (
        ([0, 1], [3, 3], True, True),
        ([0, 0], [3, 3], True, False),  # they are of one class
        ([0, 1], [3, 2], True, False),
        ([0, 0], [3, 3], False, True),
        ([0], [3], False, False),
    ):
        scored = Labels(labels)
        photos = DeploymentPhotos(calibration=scored, scored=scored, title="", labelled=labelled)  # type: ignore[arg-type]
        found = warn_constant_predictions(np.array(answers), photos, named)  # type: ignore[arg-type]
        assert found == ("; each is predicted as 'class 3', so that equal predictions show little" if said else "")
    assert caplog.text.count("has not learned to tell them apart") == 2


def test_mistakes_are_said_before_anything_is_done(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ["deploy", str(weights), "--data", "digits", "--out", str(tmp_path / "deploy")]
    assert main([*start, "--to", "onyx"]) == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err
    assert main([*start, "--to", ","]) == 2
    with pytest.raises(BadArgument, match="max_drop is nan, expected 0 or more points"):
        onefold.deploy(weights, "digits", out=tmp_path / "deploy", max_drop=float("nan"))
    assert main([*start, "--weight-bits", "7"]) == 2
    assert "are of int8: give --int8 too" in capsys.readouterr().err
    monkeypatch.setattr("onefold.commands.optional_dependencies._is_installed", lambda package: package != "ncnn")
    assert main([*start, "--to", "ncnn"]) == 2
    assert 'pip install "onefold[ncnn]"' in capsys.readouterr().err
    assert not (tmp_path / "deploy").exists()


@pytest.mark.parametrize("kind", ["all of them", "unreadable"])
def test_photos_that_leave_none_to_calibrate_or_to_score_are_refused_before_the_work(
    kind: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onefold.commands.deploy.export_artifact", lambda *_: pytest.fail("it began"))
    draw = np.random.default_rng(0)
    for name in ("1", "2"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
        (tmp_path / "bad" / name).mkdir(parents=True)
        for number in range(3):
            pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/train" / name / f"{number}.png")
            (tmp_path / "bad" / name / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    data, val = tmp_path / "data", tmp_path / ("bad" if kind == "unreadable" else "data/train")
    order = ["deploy", str(weights), "--data", str(data), "--val", str(val), "--out", str(tmp_path / "deploy")]
    assert main([*order, *(["--int8"] if kind == "all of them" else [])]) == BadData.exit_status
    error = capsys.readouterr().err.splitlines()[-1]
    if kind == "unreadable":
        assert "none of 6 photos to score on can be read: " in error
    else:
        assert f"has no photos to calibrate int8 with that are not in {val} too: give more with --data" in error
    assert not list(tmp_path.glob("deploy*"))


@pytest.mark.parametrize(("kind", "said"), [("black", "of one colour each"), ("same", "all the same")])
def test_photos_that_calibrate_nothing_are_refused(
    kind: str, said: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Black ones with a speck of noise, and one photo under six names: no artifact is made of either."""
    photos, draw = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(6):
        seed = np.random.default_rng(0) if kind == "same" else draw
        pixels = seed.integers(0, 3 if kind == "black" else 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    order = ["export", str(weights), "--to", "onnx", "--precision", "int8", "--data", str(photos)]
    assert main([*order, "--out", str(tmp_path / "artifacts")]) == BadData.exit_status
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the 6 photos of {photos} to calibrate with are {said}" in error
    assert error.endswith("calibrate on photos of the kind that the network will see")
    assert not (tmp_path / "artifacts").exists()


def test_photos_of_which_half_are_of_one_colour_are_said(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.randn(6, 3, 8, 8)
    calibration_cache._refuse_empty(images, "photos")
    assert not caplog.text
    images[:3] = torch.linspace(-1, 1, 3)[:, None, None, None]
    calibration_cache._refuse_empty(images, "photos")
    assert "3 of the 6 photos of photos to calibrate with are of one colour each, and calibrate nothing" in caplog.text


# ---- less of everything, and minutes


def test_a_deployment_without_time_makes_one_artifact_and_names_the_rest(weights: Path, tmp_path: Path) -> None:
    """It is quick as well, which the folder says too."""
    order = DeployOptions(
        runtimes=["onnx"],
        precisions=["fp32", "int8"],
        calibration=CalibrationOptions(data="digits", search=True),
        quick=True,
        minutes=1e-6,
    )
    said = list[str]()
    done = build_deployment(weights, tmp_path / "deploy", order, say=said.append)
    assert [path.name for path in sorted(done.folder.iterdir()) if path.is_dir()] == ["onnx-fp32", "results"]
    parts = "onnx-int8, the score of onnx-fp32 and the timing"
    left_out = f"left out, for lack of time in the 1e-06 minutes that were given: {parts}"
    assert done.notes == (QUICK_NOTE, left_out)
    assert done.verdicts == ()
    assert done.data.endswith("; 128 of them scored, evenly")
    assert any(
        re.match(r"held out  128 of \d+ photos are scored, evenly; one of them is 0\.78 points", x) for x in said
    )
    assert any(re.match(r"scored    torch-fp32 .*; 128 of \d+ held-out photos$", line) for line in said)
    assert done.failure is None
    assert {QUICK_NOTE, left_out} <= set(said)
    readme = (done.folder / "README.md").read_text()
    assert f"**{QUICK_NOTE.capitalize()}.**" in readme
    assert "**Left out, for lack of time" in readme
    assert "| onnx-fp32 | not scored |" in readme
    page = (done.folder / "report.html").read_text()
    assert QUICK_NOTE in page
    assert left_out in page


def test_a_quick_deployment_takes_no_more_than_was_asked_for() -> None:
    digits = CalibrationOptions(data="digits", search=True)
    order = DeployOptions(runtimes=["onnx"], precisions=["int8"], calibration=digits, quick=True)
    short = order.with_quick_limits()
    assert (short.calibration.count, short.calibration.search, short.procedure.samples) == (64, False, 50)
    procedure = Procedure(samples=16, warmup_seconds=0.1)
    fewer = replace(order, calibration=CalibrationOptions(data="digits", count=8), procedure=procedure)
    assert fewer.with_quick_limits() == fewer
    assert replace(order, quick=False).with_quick_limits() == replace(order, quick=False)


def test_minutes_that_are_none_are_refused(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deploy"
    assert main(["deploy", str(weights), "--data", "digits", "--out", str(out), "--minutes", "0"]) == 2
    assert "minutes must be more than 0, not 0" in capsys.readouterr().err
    assert not out.exists()


def test_a_calibration_that_was_cut_short_is_not_kept(weights: Path) -> None:
    network, order = open_network(weights), CalibrationOptions(data="digits", count=8, search=True)
    before, budget = set(calibration_cache.calibration_cache().iterdir()), TimeBudget(1e-6)
    calibration_cache.calibrated_network(network, order, budget=budget)
    assert budget.left_out == ["5 of 6 methods of calibration"]
    assert set(calibration_cache.calibration_cache().iterdir()) == before
    assert TimeBudget().allows("anything", 1e9)


# ---- a deployment that was stopped


def test_what_was_finished_is_kept_for_the_same_deployment_only(weights: Path, tmp_path: Path) -> None:
    """A stop leaves whole artifacts; another key takes them away; nothing made yet leaves nothing."""
    out, made, said = tmp_path / "deploy", tmp_path / "made", list[str]()
    artifact = onefold.export(weights, "onnx", out=made).folder
    with pytest.raises(KeyboardInterrupt), _unfinished(out, "a", said.append) as folder:
        shutil.copytree(artifact, folder / "onnx-fp32")
        (folder / "openvino-fp32").mkdir()  # half of one
        raise KeyboardInterrupt
    wanted = [("onnx", "fp32"), ("openvino", "fp32")]
    with pytest.raises(KeyboardInterrupt), _unfinished(out, "a", said.append) as folder:
        assert set(_kept_artifacts(folder, wanted, said.append)) == {"onnx-fp32"}
        assert not (folder / "openvino-fp32").exists()
        raise KeyboardInterrupt
    assert said == [f"kept      {'onnx-fp32':20} from the deployment that was stopped"]
    with pytest.raises(KeyboardInterrupt), _unfinished(out, "b", said.append) as folder:
        assert _kept_artifacts(folder, wanted, said.append) == {}
        raise KeyboardInterrupt
    assert said[1:] == ["removed   deploy.unfinished: it was left by a deployment of other weights, photos or options"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_a_folder_of_somebody_elses_is_not_touched(tmp_path: Path) -> None:
    """It only has the name of an unfinished deployment."""
    own = tmp_path / "deploy.unfinished" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(BadArgument, match="no deployment left it"), _unfinished(tmp_path / "deploy", "a", print):
        pass
    assert own.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["deploy.unfinished"]
