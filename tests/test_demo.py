"""The main path, end to end, as `make demo` runs it - with one epoch, since it is the road that is tested."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from onefold.cli import main
from onefold.commands import demo
from onefold.commands.deploy_gates import accuracy_gate
from onefold.commands.train import BestEpoch, Callbacks
from onefold.data import Preprocessing, open_dataset
from onefold.errors import GateFailed
from onefold.recipes import Recipe, find_recipe
from onefold.runtimes import load, open_artifact

pytestmark = pytest.mark.timeout(1200)  # a minute where nothing else runs; on a busy machine the whole path takes many


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--out", str(out), "--epochs", "1", "--seed", "1"]) == 0
    return out


def test_everything_is_there(made: Path):
    for name in ("runs/digits-s0/best/model.safetensors", "fused.safetensors", "report.html"):
        assert (made / name).exists(), name
    for name in ("onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-int8", "README.md", "MODEL_CARD.md"):
        assert (made / "artifacts" / name).exists(), name


def test_the_artifact_can_be_used_by_who_has_nothing_but_the_folder(made: Path):
    artifact = open_artifact(made / "artifacts" / "onnx-fp32")
    assert artifact.fused
    assert artifact.classes == tuple("0123456789")
    assert artifact.parity.top1_agreement == 1.0
    with load(artifact) as session:
        assert session(np.zeros((3, 3, 32, 32), dtype=np.float32)).shape == (3, 10)


def test_fused_and_unfused_were_timed_side_by_side(made: Path):
    (ledger,) = (made / "results").glob("*.jsonl")
    (line,) = [json.loads(line) for line in ledger.read_text().splitlines()]
    fused = [m["subject"]["fused"] for m in line["measurements"].values()]
    assert fused == [False, True, True]
    assert len({len(m["samples_ns"]) for m in line["measurements"].values()}) == 1


def test_int8_logits_are_the_same_in_both_runtimes(made: Path):
    """Steps that are powers of two leave nothing to round differently; fp32 shows that the comparison can fail."""
    digits, logits = open_dataset("digits", "val", seed=0, val_fraction=0.2), {}
    for name in ("onnx-int8", "openvino-int8", "onnx-fp32"):
        with load(made / "artifacts" / name) as session:
            prepare = Preprocessing.from_dict(session.artifact.preprocessing)
            logits[name] = session(np.stack([prepare(digits.image(i)) for i in range(64)]))
    same = [(logits["onnx-int8"] == logits[name]).all(1).mean() for name in ("openvino-int8", "onnx-fp32")]
    assert same[0] >= 0.9
    assert same[1] <= 0.1


def test_a_failed_gate_loses_nothing_and_the_report_says_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """int8 is made to fail by a bound that nothing can keep; the training is the one of the other tests."""
    order = demo.deploy_options(full=False)
    monkeypatch.setattr(
        demo, "deploy_options", lambda *, full: replace(order, runtimes=("onnx",), precisions=("int8",))
    )
    monkeypatch.setattr(
        "onefold.commands.deploy.accuracy_gate", lambda verdict, *_, **more: accuracy_gate(verdict, -101.0, **more)
    )
    monkeypatch.setattr(demo, "start_run", _trained_already(made))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--epochs", "1", "--seed", "7"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "1 of 1 artifacts failed their gate: onnx-int8 lost" in line
    page = (out / "report.html").read_text()
    assert "A gate FAILED: onnx-int8 lost" in page
    assert "UNFUSED" in page  # the comparison that comes after the gate
    assert open_artifact(out / "artifacts" / "onnx-int8").fused


def test_where_fusing_fails_there_is_a_report_of_the_training(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> NoReturn:
        raise GateFailed("the fused network's answer is off")

    monkeypatch.setattr(demo, "start_run", _trained_already(made))
    monkeypatch.setattr(demo, "fuse", refuse)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--epochs", "1"]) == 1
    assert "the fused network's answer is off" in capsys.readouterr().err
    page = (out / "report.html").read_text()
    assert "A gate FAILED: the fused network" in page
    assert "digits-s0" in page


def _trained_already(made: Path) -> Callable[..., BestEpoch]:
    def copied(recipe: Recipe, run: Path, *, callbacks: Callbacks) -> BestEpoch:
        shutil.copytree(made / "runs" / "digits-s0", run)
        return BestEpoch(weights=run / "best", top1=10.0, epoch=1, count=359)

    return copied


def test_the_seed_goes_into_the_plan(made: Path):
    assert json.loads((made / "runs" / "digits-s0" / "recipe.json").read_text())["plan"]["seed"] == 1
    assert demo.demo_recipe(5).plan == replace(find_recipe("digits:s0").plan, seed=5)


def test_the_page_says_what_happened(made: Path):
    page = (made / "report.html").read_text()
    for word in ("mobileone_s0", "digits-s0", "UNFUSED", "drift", "Accuracy against latency", "int8", "openvino"):
        assert word in page
