"""Files of version 0.1.0 still open: runs, weights, artifacts, results, recipes (tests/data/v0.1/README.md)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onefold.cli import main
from onefold.recipes import Recipe, all_recipes

DATA = Path(__file__).parent / "data" / "v0.1"
OLD_RECIPES = json.loads((DATA / "recipes.json").read_text(encoding="utf-8"))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked files, in the working directory: the old run names its photos by a relative path."""
    with tarfile.open(DATA / "files.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def assert_predictions(path: Path, out: str, tolerance: float = 1e-3) -> None:
    """The probabilities of every class of every photo are those that 0.1.0 gave."""
    expected, found = read_lines(path.read_text(encoding="utf-8")), read_lines(out)
    assert [line["file"] for line in found] == [line["file"] for line in expected]
    for then, now in zip(expected, found, strict=True):
        before = {each["class"]: each["probability"] for each in then["predictions"]}
        assert {each["class"]: each["probability"] for each in now["predictions"]} == pytest.approx(
            before, abs=tolerance
        ), then["file"]


@pytest.mark.parametrize("source", ["run", "int8-run", "fused.safetensors"])
def test_old_weights_predict_what_they_predicted(source: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--img-size", "32"] if source == "fused.safetensors" else []
    assert main(["predict", source, "photos/val", "--json", "--threads", "1", *size]) == 0
    # int8 answers may move by a step of their last layer where a float sum before it is rounded otherwise
    expected = old / "expected" / f"{source.removesuffix('.safetensors')}-predictions.jsonl"
    assert_predictions(expected, capsys.readouterr().out, tolerance=0.05 if source == "int8-run" else 1e-3)


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-int8"])
def test_an_old_artifact_predicts_what_it_predicted(name: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("onnx"):
        pytest.importorskip("onnxruntime")
    assert main(["predict", f"artifacts/{name}", "photos/val", "--json", "--threads", "1"]) == 0
    tolerance = 0.05 if name.endswith("int8") else 1e-3
    assert_predictions(old / "expected" / f"{name}-predictions.jsonl", capsys.readouterr().out, tolerance)


def test_an_old_artifact_of_the_removed_runtime_is_refused_in_a_sentence(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "artifacts/eager-fp32", "photos/val"]) == 4
    error = capsys.readouterr().err
    assert "the runtime eager was removed and its format is no longer read" in error
    assert "onefold fuse" in error
    assert error.count("\n") == 1


def test_an_old_run_is_resumed_within_an_epoch_and_ends_as_it_would_have(old: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "onefold.cli",
        "train",
        "--resume",
        "run",
    ]  # as a user does, in a process of its own
    # 438 channels of this network have no variance, so rounding decides its gradients (in float32 they are off by more
    # than half, by the kernels and by plain torch alike). The two steps that are left of the second epoch are compared
    # by their losses: with AVX2, AVX-512 and SSE, on Intel and AMD, they differ by at most 6e-4. After three more steps
    # the losses of one code differ by up to 40 % between those, so of the third epoch the schedules are compared.
    arithmetic = {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment = {**os.environ, **arithmetic, "ONEFOLD_KERNELS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logs = [
        read_lines(path.read_text(encoding="utf-8")) for path in (old / "expected/run-log.jsonl", old / "run/log.jsonl")
    ]
    expected, found = ({line["epoch"]: line for line in log if line["kind"] == "epoch"} for log in logs)
    assert expected.keys() == found.keys() == {1, 2, 3}
    for epoch, line in expected.items():
        for key in ("step", "lr", "weight_decay"):
            assert found[epoch][key] == line[key], (epoch, key)
        for key in ("loss", "val_loss"):
            assert math.isfinite(found[epoch][key]), (epoch, key)
            if epoch < 3:
                assert found[epoch][key] == pytest.approx(line[key], rel=1e-3), (epoch, key)


def test_an_old_run_trained_for_int8_is_resumed(old: Path) -> None:
    assert main(["train", "--resume", "int8-run"]) == 0  # complete: it opens, and there is nothing left to do


@pytest.mark.parametrize("source", ["run", "int8-run"])
def test_an_old_run_is_scored_on_its_own_photos(source: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", source, "--json", "--threads", "1"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["count"] == 6
    assert math.isfinite(score["val_loss"])


def test_old_weights_are_fused_and_exported(old: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    assert main(["fuse", "run", "--out", "again.safetensors"]) == 0
    assert main(["export", "again.safetensors", "--img-size", "32", "--out", "new"]) == 0
    assert main(["export", "int8-run", "--precision", "int8", "--out", "new"]) == 0


def test_a_report_is_made_of_old_files(old: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["report", ".", "--out", "report.html"]) == 0
    page = (old / "report.html").read_text(encoding="utf-8")
    for said in ("int8-run", "mobilenetv1_025", "onnx-int8", "eager-fp32", "Intel Xeon", "photos (held out)"):
        assert said in page
    for refused in ("cannot be read", "damaged", "left out"):
        assert refused not in page


@pytest.mark.parametrize("name", OLD_RECIPES)
def test_an_old_recipe_is_the_recipe_of_that_name(name: str) -> None:
    opened = Recipe.from_dict(OLD_RECIPES[name])
    today = {recipe.name: recipe for recipe in all_recipes()}
    opened = replace(opened, expect=today[name].expect)  # what is measured may change, what is trained may not
    if today[name].plan.amp == "auto":  # float32 as before where they have been trained, which is on CPUs
        opened = replace(opened, plan=replace(opened.plan, amp="auto"))
    assert opened == today[name], "if its numbers were changed on purpose, take the recipe out of recipes.json"
