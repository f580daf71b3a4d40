"""The main path, end to end, as `make demo` runs it - with one epoch, since it is the road that is tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onefold.cli import main
from onefold.runtimes import load, open_artifact


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--out", str(out), "--epochs", "1"]) == 0
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


def test_the_eight_bit_network_is_the_same_in_both_runtimes(made: Path):
    x = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    answers = []
    for name in ("onnx-int8", "openvino-int8"):
        with load(made / "artifacts" / name) as session:
            answers.append(session(x))
    assert np.abs(answers[0] - answers[1]).max() <= 0.1 * np.abs(answers[0]).max()


def test_the_page_says_what_happened(made: Path):
    page = (made / "report.html").read_text()
    for word in ("mobileone_s0", "digits-s0", "UNFUSED", "drift", "Accuracy against latency", "int8", "openvino"):
        assert word in page
