"""Real weights on real photos, through the command line: the predictions that other people's code recorded.

The weights are Apple's MobileOne-S0 and Google's and others' MobileNetV1; `reference_top1.csv` holds the class that
each gave for each photo. See the shared data's own README for where they are from.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from onefold.cli import main

# column of reference_top1.csv -> (file, name to type, image size)
MODELS = {
    "mobileone_s0": ("mobileone_s0_in1k_fused.npz", "mobileone_s0", 224),
    "mnv1_100_224": ("mobilenetv1_100_224_in1k_tfquant_folded.npz", "mobilenetv1_100.tf", 224),
    "mnv1_050_160": ("mobilenetv1_050_160_in1k_tfquant_folded.npz", "mobilenetv1_050.tf", 160),
    "mnv1_025_224_tf": ("mobilenetv1_025_224_in1k_tf_unfused.npz", "mobilenetv1_025.tf", 224),
    "mnv1_025_224_pt_leaky": ("mobilenetv1_025_224_in1k_pytorch_leaky_unfused.npz", "mobilenetv1_025.leaky", 224),
}
RUNTIMES = ("onnx", "openvino")


def reference(shared: Path, column: str) -> dict[str, int]:
    with (shared / "weights" / "reference_top1.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["set"] == "imagenet-sample"]
    return {row["file"]: int(row[column]) for row in rows}


def source_for(shared: Path, column: str, runtime: str, folder: Path) -> list[str]:
    """The words that name a network on a command line: weights for torch, else an artifact exported now."""
    file, name, size = MODELS[column]
    weights = str(shared / "weights" / file)
    if runtime == "torch":
        return [weights, "--model", name, "--img-size", str(size)]
    typed = ["export", weights, "--model", name, "--img-size", str(size), "--to", runtime, "--out", str(folder)]
    assert main(typed) == 0
    return [str(folder / f"{runtime}-fp32")]


def agreement(shared: Path, column: str, source: list[str], photos: list[Path], capsys) -> float:
    capsys.readouterr()
    assert main(["predict", *source[:1], *map(str, photos), *source[1:], "--json", "--top", "1"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = reference(shared, column)
    same = [a["predictions"][0]["index"] == expected[Path(a["file"]).name] for a in answers]
    return sum(same) / len(same)


@pytest.mark.slow
def test_mobileone_s0_on_a_hundred_photos(shared_data: Path, capsys, tmp_path: Path):
    photos = sorted((shared_data / "imagenet-sample" / "images").glob("*.jpg"))[::10]
    for runtime in ("torch", "onnx"):
        source = source_for(shared_data, "mobileone_s0", runtime, tmp_path)
        assert agreement(shared_data, "mobileone_s0", source, photos, capsys) >= 0.99


@pytest.mark.parametrize(
    ("column", "typed", "said"),
    [
        ("mnv1_025_224_tf", "mobilenetv1_025", "under --model mobilenetv1_025.tf"),
        ("mnv1_025_224_tf", "mobilenetv1_025.tf", None),
        ("mnv1_025_224_pt_leaky", "mobilenetv1_025.tf", "under --model mobilenetv1_025.leaky"),
        ("mnv1_025_224_pt_leaky", "mobilenetv1_025.leaky", None),
    ],
)
def test_a_name_that_does_not_fit_its_weights_is_seen(
    column: str, typed: str, said: str | None, shared_data: Path, capsys
) -> None:
    photos = sorted((shared_data / "imagenet-sample" / "images").glob("*.jpg"))[::250]
    weights = str(shared_data / "weights" / MODELS[column][0])
    assert main(["predict", weights, *map(str, photos), "--model", typed]) == 0
    err = capsys.readouterr().err
    assert "does not tell its padding, activation and epsilon" in err  # fused weights can be told no more than that
    assert ("does not seem to be" in err) == (said is not None)
    assert said is None or said in err


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", *RUNTIMES])
@pytest.mark.parametrize("column", MODELS)
def test_every_recorded_prediction(column: str, runtime: str, shared_data: Path, capsys, tmp_path: Path):
    source = source_for(shared_data, column, runtime, tmp_path)
    share = agreement(shared_data, column, source, [shared_data / "imagenet-sample" / "images"], capsys)
    print(f"{column} {runtime}: {100 * share:.1f} % of the recorded predictions")
    assert share >= 0.995


@pytest.mark.slow
def test_mobileone_s0_scores_what_was_measured(shared_data: Path, capsys, tmp_path: Path):
    source = source_for(shared_data, "mobileone_s0", "torch", tmp_path)
    photos = ["--data", str(shared_data / "imagenet-sample"), "--json", "--results", str(tmp_path)]
    capsys.readouterr()
    assert main(["eval", *source, *photos]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["count"] == 1000
    assert score["top1"] == pytest.approx(81.2, abs=0.4)
    assert score["top5"] == pytest.approx(94.9, abs=0.4)
