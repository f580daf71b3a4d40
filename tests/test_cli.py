"""The command line, from outside: the main road on a handful of photos, and every mistake with its sentence.

Verbs run in this process, which is quick; what must be seen from outside (the time to the first help, a signal) runs
as a program of its own.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import onefold
from onefold.cli import main
from onefold.cli.main import app

CLASSES = ("cat", "dog", "newt")
TRAIN = ("--model", "mobilenetv1_025", "--img-size", "32", "--epochs", "1", "--batch-size", "8")


def photo(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, a run trained on them, its fused weights and their ONNX artifact: all made by the verbs."""
    home = tmp_path_factory.mktemp("home")
    for c, name in enumerate(CLASSES):
        for i in range(10):
            photo(home / "photos" / name / f"{i}.png", 100 * c + i)
    assert run("train", "--data", home / "photos", *TRAIN, "--out", home / "run") == 0
    assert run("fuse", home / "run", "--out", home / "fused.safetensors") == 0
    assert run("export", home / "fused.safetensors", "--out", home / "artifacts") == 0
    return home


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def scratch(home: Path, tmp_path: Path) -> Path:
    """A fresh folder that holds copies of what `home` has, to be damaged at will."""
    for name in ("run", "artifacts", "photos"):
        shutil.copytree(home / name, tmp_path / name)
    shutil.copy(home / "fused.safetensors", tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------- the main road


def test_the_run_folder_holds_what_was_promised(home: Path):
    recipe = json.loads((home / "run" / "recipe.json").read_text())
    assert recipe["model"] == "mobilenetv1_025"
    assert recipe["plan"]["epochs"] == 1
    lines = [json.loads(line) for line in (home / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["start", "epoch"]
    assert lines[-1]["drift"] < 1e-5  # what is validated is the fused network


def test_predict_says_the_same_from_run_weights_and_artifact(home: Path, capsys):
    said = []
    for source in ("run", "fused.safetensors", "artifacts/onnx-fp32"):
        assert run("predict", home / source, home / "photos" / "cat", "--json", "--top", 3) == 0
        said.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(said[0]) == 10
    assert {p["class"] for line in said[0] for p in line["predictions"]} == set(CLASSES)
    for others in said[1:]:
        for ours, theirs in zip(said[0], others, strict=True):
            assert ours["file"] == theirs["file"]
            assert [p["class"] for p in ours["predictions"]] == [p["class"] for p in theirs["predictions"]]
            shares = [[p["probability"] for p in each["predictions"]] for each in (ours, theirs)]
            assert np.allclose(*shares, atol=1e-5)


def test_eval_of_a_run_is_the_accuracy_that_its_training_logged(home: Path, capsys, tmp_path: Path):
    assert run("eval", home / "run", "--json", "--results", tmp_path) == 0
    score = json.loads(capsys.readouterr().out)
    logged = json.loads((home / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert score["count"] == 6
    assert score["top1"] == pytest.approx(logged["top1"])


@pytest.mark.parametrize("place", ["run/predictions.jsonl", "results/accuracy.json"])
def test_scores_are_printed_where_they_cannot_be_kept(place: str, scratch: Path, capsys, caplog):
    assert run("eval", scratch / "run", "--results", scratch / "results") == 0
    score = capsys.readouterr().out
    (scratch / place).unlink()
    (scratch / place).mkdir()
    assert run("eval", scratch / "run", "--results", scratch / "results") == (5 if place.startswith("run") else 3)
    said = capsys.readouterr()
    assert said.out == score
    assert said.err.count(place) == 1
    assert said.err.splitlines()[-1].startswith("error: ")
    scores = onefold.evaluate(scratch / "run", results=scratch / "results")
    assert repr(scores) == score.rstrip("\n")
    assert place in str(scores.not_written[0])
    assert "the scores are not kept: " in caplog.text


def test_eval_matches_classes_by_name_not_by_position(scratch: Path, capsys):
    shutil.rmtree(scratch / "photos" / "cat")  # dog is now the first folder
    for path in (scratch / "photos").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"!")  # so that none of them was trained on
    assert run("eval", scratch / "run", "--data", scratch / "photos", "--json", "--results", scratch) == 0
    part = json.loads(capsys.readouterr().out)
    assert run("predict", scratch / "run", scratch / "photos", "--json", "--top", 1) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [line["predictions"][0]["class"] == Path(line["file"]).parent.name for line in lines]
    assert part["count"] == len(right) == 20
    assert part["top1"] == pytest.approx(100 * np.mean(right))


def test_bench_and_report(scratch: Path, capsys):
    assert (
        run("eval", scratch / "artifacts/onnx-fp32", "--data", scratch / "photos", "--results", scratch / "results")
        == 0
    )
    bench = ("--samples", 20, "--warmup", 0, "--results", scratch / "results")
    assert run("bench", scratch / "artifacts/onnx-fp32", scratch / "run", "--allow-unfused", *bench) == 0
    said = capsys.readouterr().out
    assert "UNFUSED" in said
    (ledger,) = (scratch / "results").glob("*.jsonl")
    (line,) = ledger.read_text().splitlines()
    subjects = [m["subject"] for m in json.loads(line)["measurements"].values()]
    assert [s["fused"] for s in subjects] == [True, False]
    assert 0 <= subjects[0]["top1"] <= 100
    assert run("report", scratch, "--out", scratch / "report.html") == 0
    page = (scratch / "report.html").read_text()
    assert "UNFUSED" in page
    assert "mobilenetv1_025" in page


def test_a_resumed_run_that_is_complete_changes_nothing(scratch: Path, capsys):
    before = (scratch / "run" / "best" / "model.safetensors").read_bytes()
    assert run("train", "--resume", scratch / "run") == 0
    assert (scratch / "run" / "best" / "model.safetensors").read_bytes() == before


def test_models_prints_the_papers_counts(capsys):
    assert run("models", "mobileone_s0") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mobileone_s0")]
    for number in ("5,293,272", "2,078,504", "1,051,935,232", "275,110,400", "71.4"):
        assert number in line


# ----------------------------------------------------------------------------------------- mistakes


def _class_folders(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            photo(folder / name / f"{i}.png", i)
    return folder


def _write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _flip(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def _pickled(path: Path) -> Path:
    torch.save({"state_dict": {"x": Evil()}}, path)
    return path


class Evil:
    """Would leave a marker if anything unpickled it."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def _split(folder: Path) -> Path:
    _class_folders(folder / "train", {"cat": 2, "dog": 2})
    _class_folders(folder / "val", {"cat": 2, "dgo": 2})
    return folder


def _only_val(folder: Path) -> Path:
    _class_folders(folder / "val", {"cat": 2, "dog": 2})
    return folder


def _overlapping(folder: Path) -> Path:
    """Ten images a class in train/, and two of them in val/ too."""
    for c, name in enumerate(("cat", "dog")):
        for i in range(10):
            photo(folder / "train" / name / f"{i}.png", 100 * c + i)
        for i in range(2):
            photo(folder / "val" / name / f"{i}.png", 100 * c + i)
    return folder


def _grey(folder: Path) -> Path:
    for c, name in enumerate(("cat", "dog")):
        for i in range(10):
            photo(folder / name / f"{i}.png", 0)
            Image.new("RGB", (40 + i, 40 + c), (90, 90, 90)).save(folder / name / f"{i}.png")
    return folder


def _spoilt(folder: Path) -> Path:
    for c, name in enumerate(("cat", "dog")):
        for i in range(10):
            photo(folder / name / f"{i}.png", 100 * c + i)
            if i % 4:
                _write(folder / name / f"{i}.png", b"not a picture")
    return folder


MISTAKES: dict[str, tuple[int, str, Callable[[Path], list[object]]]] = {
    # what is typed
    "unknown verb": (2, "No such command 'trian'", lambda _: ["trian"]),
    "unknown option": (
        2,
        "predict has no option --tpo: did you mean --top?",
        lambda h: ["predict", h / "run", h / "photos", "--tpo", 3],
    ),
    "missing argument": (2, "Missing argument", lambda _: ["predict"]),
    "a number that is none": (
        2,
        "a whole number is expected",
        lambda h: ["predict", h / "run", h / "photos", "--top", "x"],
    ),
    "top of nothing": (2, "--top", lambda h: ["predict", h / "run", h / "photos", "--top", 0]),
    "no model of that name": (2, "'resnet*'", lambda _: ["models", "resnet*"]),
    "impossible resolution": (2, "size must be from 32", lambda _: ["models", "mobileone_s0", "--img-size", 8]),
    # training
    "no data": (2, "needs data: --data FOLDER", lambda _: ["train"]),
    "data not there": (3, "is not there", lambda h: ["train", "--data", h / "nowhere"]),
    "data is a file": (3, "is a file", lambda h: ["train", "--data", photo(h / "a.png", 0)]),
    "data is an archive": (3, "is an archive", lambda h: ["train", "--data", _write(h / "a.zip", b"PK")]),
    "an empty folder": (3, "no images", lambda h: ["train", "--data", (h / "e").mkdir() or h / "e"]),
    "an empty class": (3, "newt", lambda h: ["train", "--data", _class_folders(h / "d", {"cat": 2, "newt": 0})]),
    "one class": (3, "one class only, cat", lambda h: ["train", "--data", _class_folders(h / "d", {"cat": 3})]),
    "classes that differ": (3, "only in val: dgo", lambda h: ["train", "--data", _split(h / "d")]),
    "fewer images than a batch": (
        3,
        "30 photos, 6 for validation, leave 24 to train on, and a batch has 64: --batch-size 24",
        lambda h: ["train", "--data", h / "photos", *TRAIN[:-1], 64, "--out", h / "new"],
    ),
    "unknown recipe": (2, "did you mean mobileone:s0", lambda _: ["train", "--recipe", "mobileone:s00"]),
    "unknown model": (
        2,
        "did you mean mobileone_s",
        lambda h: ["train", "--data", h / "photos", "--model", "mobileone_s9", "--out", h / "new"],
    ),
    "unknown field": (2, "did you mean 'epochs'", lambda h: ["train", "--data", h / "photos", "--plan.epoch", 5]),
    "unknown section": (2, "the recipe has no 'plam.epochs'", lambda _: ["train", "--plam.epochs", 5]),
    "a field without a value": (2, "needs a value", lambda _: ["train", "--plan.epochs"]),
    "a word for a number": (2, "plan.epochs must be a whole number", lambda _: ["train", "--plan.epochs", "five"]),
    "no epochs": (2, "plan.epochs must be a whole number from 1", lambda _: ["train", "--epochs", 0]),
    "a negative rate": (2, "plan.optimizer.lr must be a number from 0", lambda _: ["train", "--lr", "-0.1"]),
    "an infinite rate": (2, "plan.optimizer.lr", lambda _: ["train", "--plan.optimizer.lr", "1e999"]),
    "a loose word": (2, "give it as --data photos", lambda _: ["train", "photos"]),
    "a loose word after another verb": (2, "give it as --data photos", lambda h: ["eval", h / "run", "photos"]),
    "an option of another tool": (2, "did you mean --to?", lambda h: ["export", h / "run", "--format", "onnx"]),
    "int8 by another name": (2, "mean --precision int8?", lambda h: ["export", h / "run", "--quantize", "int8"]),
    "confidence by another name": (2, "mean --min-confidence?", lambda h: ["predict", h / "run", h, "--conf", "0.5"]),
    "a table by another name": (2, "mean --out answers.csv?", lambda h: ["predict", h / "run", h, "--csv"]),
    "a size by another name": (2, "did you mean --img-size?", lambda _: ["train", "--imgsz", 64]),
    "an underscore": (2, "did you mean --img-size?", lambda _: ["train", "--img_size=64"]),
    "workers": (2, "did you mean --plan.workers?", lambda _: ["train", "--workers", 2]),
    "a schedule": (2, "did you mean --plan.schedule.kind?", lambda _: ["train", "--lr-schedule", "cosine"]),
    "an option of nothing": (2, "like --plan.epochs 5", lambda _: ["train", "--zzz"]),
    "a word for a whole number": (2, "'--epochs': a whole number is expected", lambda _: ["train", "--epochs", "abc"]),
    "a size without pixels": (2, "--img-size", lambda h: ["train", "--data", h / "photos", "--img-size", 0]),
    "a run is there already": (
        2,
        "already holds a run",
        lambda h: ["train", "--data", h / "photos", *TRAIN, "--out", h / "run"],
    ),
    "missing data for a taken folder": (
        3,
        "is not there",
        lambda h: ["train", "--data", h / "nowhere", *TRAIN, "--out", h / "run"],
    ),
    "val that is not there": (
        3,
        "nowhere is not there",
        lambda h: ["train", "--data", h / "photos", "--val", h / "nowhere", *TRAIN, "--out", h / "new"],
    ),
    "a device that is none": (
        2,
        "device must be one of",
        lambda h: ["train", "--data", h / "photos", "--device", "tpu", *TRAIN, "--out", h / "new"],
    ),
    "no threads": (2, "--threads", lambda _: ["train", "--threads", 0]),
    "nothing to resume": (4, "is not a run", lambda h: ["train", "--resume", h / "photos"]),
    "resume with a change": (2, "give nothing else", lambda h: ["train", "--resume", h / "run", "--epochs", 3]),
    "a damaged recipe": (
        4,
        "recipe.json cannot be read",
        lambda h: [_write(h / "run" / "recipe.json", "{"), "train", "--resume", h / "run"][1:],
    ),
    "another recipe in the run": (
        4,
        "was edited after the run",
        lambda h: [
            _write(h / "run/recipe.json", (h / "run/recipe.json").read_text().replace('"epochs": 1', '"epochs": 2')),
            *("train", "--resume", h / "run"),
        ][1:],
    ),
    "a place that is a file": (
        5,
        "cannot write",
        lambda h: ["train", "--data", h / "photos", *TRAIN, "--out", photo(h / "a.png", 0) / "run"],
    ),
    # training, once more: what is asked of it
    "a rate that is no number": (
        2,
        "plan.optimizer.lr must be a number",
        lambda _: ["train", "--plan.optimizer.lr", "NaN"],
    ),
    "a rate of NaN, in short": (2, "plan.optimizer.lr must be", lambda _: ["train", "--lr", "nan"]),
    "a batch of none": (2, "plan.batch_size must be a whole number from 1", lambda _: ["train", "--batch-size", 0]),
    "a negative seed": (2, "plan.seed must be a whole number from 0", lambda _: ["train", "--seed", "-1"]),
    "an unknown optimizer": (
        2,
        "plan.optimizer.kind must be one of",
        lambda _: ["train", "--plan.optimizer.kind", "Adamax"],
    ),
    "a duration without a unit": (2, "like '5 epochs'", lambda _: ["train", "--plan.schedule.warmup", "5 weeks"]),
    "a warm-up longer than the run": (
        2,
        "must be within plan.epochs",
        lambda _: ["train", "--plan.schedule.warmup", "1000 epochs"],
    ),
    "accumulation that does not divide": (
        2,
        "must divide plan.batch_size",
        lambda _: ["train", "--plan.accumulate", 7],
    ),
    "an impossible share": (2, "plan.label_smoothing", lambda _: ["train", "--plan.label_smoothing", 1.5]),
    "an average that is no share": (2, "plan.ema", lambda _: ["train", "--plan.ema.decay", 2]),
    "a word for true or false": (
        2,
        "plan.channels_last must be true or false",
        lambda _: ["train", "--plan.channels_last", "maybe"],
    ),
    "half numbers that are unknown": (2, "plan.amp must be one of", lambda _: ["train", "--plan.amp", "fp8"]),
    "a step that the recipe lacks": (2, "the recipe has no 'steps.9.size'", lambda _: ["train", "--steps.9.size", 64]),
    "a share of validation above one": (2, "data.val_fraction", lambda _: ["train", "--data.val_fraction", 2]),
    "nothing left to train on": (
        3,
        "leaves no image for train",
        lambda h: ["train", "--data", h / "photos", *TRAIN, "--data.val_fraction", 1, "--out", h / "new"],
    ),
    "nothing to validate on": (
        3,
        "leaves no image for val",
        lambda h: ["train", "--data", h / "photos", *TRAIN, "--data.val_fraction", 0, "--out", h / "new"],
    ),
    "val without train": (3, "there is nothing to train on", lambda h: ["train", "--data", _only_val(h / "d")]),
    "a size beyond all photos": (2, "--img-size", lambda h: ["train", "--data", h / "photos", "--img-size", 9000]),
    "weights that are not there": (
        4,
        "nothing.safetensors",
        lambda h: ["train", "--data", h / "photos", *TRAIN, "--weights", h / "nothing.safetensors", "--out", h / "new"],
    ),
    "an unknown service": (
        2,
        "not 'tensorbord'",
        lambda h: ["train", "--data", h / "photos", *TRAIN, "--log-to", "tensorbord", "--out", h / "new"],
    ),
    "a service that is not installed": (
        2,
        'pip install "onefold[trackio]"',
        lambda h: ["train", "--data", h / "photos", *TRAIN, "--log-to", "trackio", "--out", h / "new"],
    ),
    "copies in val": (
        3,
        "--no-check",
        lambda h: ["train", "--data", _overlapping(h / "d"), *TRAIN, "--out", h / "new"],
    ),
    "all of one colour": (
        3,
        "of one colour",
        lambda h: ["train", "--data", _grey(h / "d"), *TRAIN, "--out", h / "new"],
    ),
    "one picture under two classes": (
        3,
        "stand under two classes",
        lambda h: ["train", "--data", _class_folders(h / "d", {"cat": 9, "dog": 9}), *TRAIN, "--out", h / "new"],
    ),
    "most photos unreadable": (
        3,
        "cannot be read",
        lambda h: ["train", "--data", _spoilt(h / "d"), *TRAIN, "--out", h / "new"],
    ),
    "resume of a place that is not there": (4, "is not a run", lambda h: ["train", "--resume", h / "nowhere"]),
    "resume under another seed": (2, "give nothing else", lambda h: ["train", "--resume", h / "run", "--seed", 3]),
    "resume of damaged checkpoints": (
        4,
        "damaged",
        lambda h: [[_flip(p) for p in h.glob("run/*/*.safetensors")], "train", "--resume", h / "run"][1:],
    ),
    "resume on other photos": (
        4,
        "was started on other images: of 24 train images 1 new ('cat/new.png')",
        lambda h: [photo(h / "photos/cat/new.png", 999), "train", "--resume", h / "run", "--data", h / "photos"][1:],
    ),
    # evaluation, once more
    "a run without its recipe": (
        2,
        "nothing to evaluate on",
        lambda h: [(h / "run/recipe.json").unlink(), "eval", h / "run"][1:],
    ),
    "too many threads": (2, "--threads", lambda h: ["eval", h / "run", "--threads", 0]),
    "a batch too large": (2, "--batch-size", lambda h: ["eval", h / "run", "--batch-size", 10**6]),
    "data to score on that are not there": (3, "is not there", lambda h: ["eval", h / "run", "--data", h / "nowhere"]),
    "a severity without an image": (
        3,
        "images",
        lambda h: ["eval", h / "run", "--data", [_class_folders(h / "c/fog/1", {"cat": 1, "dog": 0}), h / "c"][1]],
    ),
    "class names that are no text": (
        3,
        "cannot read",
        lambda h: ["eval", h / "run", "--classes", photo(h / "c.png", 1)],
    ),
    # weights
    "weights not there": (4, "nothing.safetensors", lambda h: ["predict", h / "nothing.safetensors", h / "photos"]),
    "empty weights": (4, "empty", lambda h: ["predict", _write(h / "w.pth", b""), h / "photos"]),
    "a web page": (4, "w.safetensors", lambda h: ["predict", _write(h / "w.safetensors", "<html>"), h / "photos"]),
    "a hostile pickle": (4, "w.pth", lambda h: ["predict", _pickled(h / "w.pth"), h / "photos"]),
    "a flipped bit": (4, "damaged", lambda h: ["predict", _flip(h / "fused.safetensors"), h / "photos"]),
    "half of the weights": (
        4,
        "t.safetensors",
        lambda h: [
            "predict",
            _write(h / "t.safetensors", (h / "fused.safetensors").read_bytes()[:5000]),
            h / "photos",
        ],
    ),
    "weights of nothing known": (
        4,
        "no layout known here",
        lambda h: [save_file({"a.b": torch.zeros(3)}, h / "x.safetensors"), "fuse", h / "x.safetensors"][1:],
    ),
    "weights of another model": (
        4,
        "mobilenetv1_025: type that name",
        lambda h: ["predict", h / "fused.safetensors", h / "photos", "--model", "mobilenetv1_050"],
    ),
    "a damaged run": (4, "damaged", lambda h: ["fuse", _flip(h / "run/best/model.safetensors")]),
    # photos
    "photo not there": (3, "nowhere.jpg", lambda h: ["predict", h / "run", h / "nowhere.jpg"]),
    "a table of another kind": (
        2,
        "as .csv or .jsonl",
        lambda h: ["predict", h / "run", h / "photos", "--out", h / "a.xlsx"],
    ),
    "photos sorted into photos": (
        2,
        "is not empty",
        lambda h: ["predict", h / "run", h / "photos", "--sort-into", h / "photos"],
    ),
    "a confidence in percent": (2, "--min-confidence", lambda h: ["predict", h / "run", h, "--min-confidence", 60]),
    "no photos in the folder": (3, "no images", lambda h: ["predict", h / "run", _class_folders(h / "e", {"x": 0})]),
    "a corrupt photo": (3, "1 of 1 images", lambda h: ["predict", h / "run", _write(h / "a.jpg", b"\xff\xd8\xff")]),
    # evaluation
    "nothing to score on": (2, "give --data", lambda h: ["eval", h / "fused.safetensors"]),
    "other classes": (
        3,
        "does not know: 'newts'",
        lambda h: ["eval", h / "run", "--data", _class_folders(h / "d", {"cat": 1, "newts": 1})],
    ),
    "too few class names": (
        3,
        "names 1 classes",
        lambda h: ["predict", h / "run", h / "photos", "--classes", _write(h / "c.txt", "cat\n")],
    ),
    "an artifact at another size": (
        2,
        "export again for 64",
        lambda h: ["predict", h / "artifacts/onnx-fp32", h / "photos", "--img-size", 64],
    ),
    # fusing and exporting
    "a drift above the bound": (1, "differ by", lambda h: ["fuse", h / "run", "--tolerance", 0, "--out", h / "f"]),
    "unknown runtime": (2, "did you mean 'onnx'", lambda h: ["export", h / "run", "--to", "onxx", "--out", h / "n"]),
    "no runtime": (2, "names no runtime", lambda h: ["export", h / "run", "--to", ","]),
    "unknown precision": (
        2,
        "cannot export 'int7'",
        lambda h: ["export", h / "run", "--precision", "int7", "--out", h / "n"],
    ),
    "int8 without photos": (2, "give --data", lambda h: ["export", h / "run", "--precision", "int8", "--out", h / "n"]),
    "photos without int8": (
        2,
        "leave --data out",
        lambda h: ["export", h / "run", "--data", "digits", "--out", h / "n"],
    ),
    "export of an artifact": (2, "the weights that it was made from", lambda h: ["export", h / "artifacts/onnx-fp32"]),
    "something else in the place": (
        2,
        "something else",
        lambda h: [photo(h / "n/onnx-fp32/cat.png", 0), "export", h / "run", "--out", h / "n"][1:],
    ),
    # measuring and reporting
    "an unfused network": (2, "--allow-unfused", lambda h: ["bench", h / "run", "--results", h / "results"]),
    "a tampered artifact": (4, "damaged", lambda h: ["bench", _flip(h / "artifacts/onnx-fp32/model.onnx").parent]),
    "a part of an artifact": (
        4,
        "reference.npz",
        lambda h: [(h / "artifacts/onnx-fp32/reference.npz").unlink(), "bench", h / "artifacts/onnx-fp32"][1:],
    ),
    "no samples": (2, "--samples", lambda h: ["bench", h / "artifacts/onnx-fp32", "--samples", 0]),
    "a report of nowhere": (3, "is not a folder", lambda h: ["report", h / "nowhere"]),
    "a report of nothing": (
        3,
        "no run, result or artifact",
        lambda h: ["report", _class_folders(h / "e", {"x": 0}), "--out", h / "r.html"],
    ),
    "a demo over something": (2, "is not empty", lambda h: ["demo", "--out", h / "photos"]),
}


@pytest.mark.parametrize(("status", "says", "typed"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_sentence_and_its_status(status, says, typed, scratch, capsys, monkeypatch):
    monkeypatch.chdir(scratch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(*typed(scratch)) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert says.lower() in lines[0].lower()
    assert "internal" not in lines[0]
    assert not (scratch / "executed").exists()


def test_a_hub_id_without_a_network_says_what_to_do(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("predict", "timm/no_such_model_here", photo(tmp_path / "a.png", 0)) == 10
    error = capsys.readouterr().err
    assert "HF_HUB_OFFLINE" in error
    assert "give the path" in error


def test_one_corrupt_photo_does_not_stop_the_others(scratch: Path, capsys):
    _write(scratch / "photos" / "cat" / "3.png", b"not a picture")
    assert run("predict", scratch / "run", scratch / "photos" / "cat", "--top", 1) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 9
    assert "3.png" in said.err
    assert "note: 1 of 10 images could not be read" in said.err
    assert run("eval", scratch / "run", "--data", scratch / "photos", "--results", scratch / "results") == 0
    said = capsys.readouterr()
    assert "(7 images that were not trained on, 23 that were are left out)" in said.out
    assert "6 images of 7, as the others cannot be read" in said.out
    assert "3.png is text, not an image" in said.err
    export = ("export", scratch / "fused.safetensors", "--to", "onnx", "--precision", "int8", "--img-size", 32)
    assert run(*export, "--data", scratch / "photos" / "cat", "--out", scratch / "int8") == 0
    assert "left out of calibration, 1 of 10 photos so far" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what is asked of photos


def test_a_mistyped_path_does_not_stop_the_others(home: Path, capsys):
    assert run("predict", home / "run", home / "photos/cat", home / "nowhere.jpg", home / "photos/dog/0.png") == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 11
    assert "note: 1 path skipped: " in said.err
    assert "nowhere.jpg is not there" in said.err


def test_predictions_are_written_as_a_table_and_photos_are_sorted(scratch: Path, capsys):
    _write(scratch / "photos/cat/3.png", b"not a picture")
    table = ("--out", scratch / "a.csv", "--sort-into", scratch / "sorted", "--min-confidence", 0.5, "--top", 2)
    assert run("predict", scratch / "run", scratch / "photos", *table) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "1 unread" in said.err
    rows = list(csv.DictReader((scratch / "a.csv").read_text().splitlines()))
    assert len(rows) == 30
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2", "problem"]
    unread = [row for row in rows if "not an image" in row["problem"]]
    assert [row["file"] for row in unread] == [str(scratch / "photos/cat/3.png")]
    sure = [row for row in rows if row["probability"] and float(row["probability"]) >= 0.5]
    files = [path.relative_to(scratch / "sorted") for path in (scratch / "sorted").rglob("*.png")]
    assert len(files) == 29
    assert sum(path.parts[0] == "unsure" for path in files) == 29 - len(sure)
    assert len(list((scratch / "photos").rglob("*.png"))) == 30  # copied, not moved
    assert run("predict", scratch / "run", scratch / "photos", "--out", scratch / "a.jsonl", "--json") == 0
    lines = [json.loads(line) for line in (scratch / "a.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answers_are_printed_where_the_table_cannot_be_written(home: Path, tmp_path: Path, capsys):
    (tmp_path / "a.csv").mkdir()
    assert run("predict", home / "run", home / "photos/cat", "--out", tmp_path / "a.csv") == 5
    said = capsys.readouterr()
    assert run("predict", home / "run", home / "photos/cat") == 0
    assert said.out == capsys.readouterr().out
    assert said.err.endswith(f"error: cannot write {tmp_path}/a.csv: it is a folder; give the name of a file\n")


def test_fusing_what_is_fused_writes_the_file_with_a_note(home: Path, tmp_path: Path, capsys):
    assert run("fuse", home / "fused.safetensors", "--out", tmp_path / "again.safetensors") == 0
    said = capsys.readouterr()
    assert said.err == f"note: {home / 'fused.safetensors'} is fused already: written as it is\n"
    told, then = said.out.splitlines()
    assert re.fullmatch(rf"{tmp_path}/again.safetensors: parameters [\d,]+, multiply-adds [\d,]+", told)
    assert then == f"next: onefold deploy {tmp_path}/again.safetensors --data PHOTOS --to onnx --int8"
    assert run("fuse", home / "fused.safetensors", "--out", tmp_path / "again.safetensors") == 0
    assert "again.safetensors was there already, and is replaced\n" in capsys.readouterr().err
    assert run("predict", tmp_path / "again.safetensors", home / "photos/cat/0.png") == 0


def test_a_run_has_a_new_folder_each_time_validates_elsewhere_and_is_quiet(scratch: Path, capsys, monkeypatch):
    monkeypatch.chdir(scratch)
    options = ("--data", "photos", "--val", "other", "--threads", 1, "--device", "cpu", "--quiet", *TRAIN)
    for number, name in enumerate(CLASSES[:2]):
        photo(scratch / "other" / name / "0.png", 900 + number)
    for folder in ("runs/photos-scratch", "runs/photos-scratch-2"):
        assert run("train", *options) == 0
        said = capsys.readouterr()
        assert f"weights: {folder}/best/model.safetensors" in said.out
        assert said.out.endswith(f"next: onefold fuse {folder} --out fused.safetensors\n")
        assert "epoch 1/1" not in said.err
        found = json.loads((scratch / folder / "data.json").read_text())["dataset"]["splits"]
        assert {split["name"]: split["num_images"] for split in found} == {"train": 30, "val": 2}
    assert "runs/photos-scratch is there already: this run is written to runs/photos-scratch-2" in said.err
    assert "note: 30 images are few to train from scratch with" in said.out
    (scratch / "other").rename(scratch / "runs/other")
    (scratch / "runs/photos-scratch").rename(scratch / "moved")
    assert run("train", "--resume", "moved") == 3  # val is gone
    assert "other, and are gone: say where they are with --val FOLDER" in capsys.readouterr().err


def test_the_changed_fields_have_a_heading_and_begin_with_what_was_typed(capsys):
    from onefold.cli import display
    from onefold.recipes import make_recipe

    changed = make_recipe(
        "photos:scratch", {"data.spec": "Größe", "model": "mobilenetv1_025", "plan.seed": "3"}, epochs=1
    )
    display.print_changed_fields(changed, ("train", "--data=Größe", "--plan.seed", "3", "--epochs", "1"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "changed from photos:scratch:"
    assert any(re.fullmatch(r'  model "mobilenetv1_025", not "\w+" \(follows\)', line) for line in lines)
    assert lines[1:3] == ["  plan.epochs 1, not 60", "  plan.seed 3, not 0"]
    assert all(line.endswith(" (follows)") for line in lines[3:])
    assert not any("spec" in line for line in lines)  # the lines about the data have it
    assert not any(re.search(r"\d\.\d{4}", line) for line in lines)
    display.print_changed_fields(changed)
    assert 'data.spec "Größe", not ""' in capsys.readouterr().err


def test_three_photos_are_said_to_be_too_few(tmp_path: Path, capsys):
    data = _class_folders(tmp_path / "d", {"cat": 2, "dog": 1})
    assert run("train", "--data", data, *TRAIN, "--no-check", "--out", tmp_path / "r") == 3
    error = capsys.readouterr().err
    assert re.search(
        r"3 photos, \d for validation, leave \d to train on, and a batch has 8: .*far more are needed", error
    )


def test_minus_h_is_help(capsys):
    assert run("eval", "-h") == 0
    assert "Usage:" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- from outside


def test_the_verbs_and_their_options_are_frozen():
    """A change of the command line is a change of everyone's scripts: make it here too, knowingly."""
    import typer

    group = typer.main.get_command(app)
    found = {
        name: sorted(opt for p in verb.params for opt in p.opts if opt.startswith("--"))
        for name, verb in group.commands.items()
    }
    assert found == json.loads((Path(__file__).parent / "golden" / "cli.json").read_text())


def test_help_is_there_for_every_verb(capsys):
    import typer

    for name in typer.main.get_command(app).commands:
        assert run(name, "--help") == 0
        assert "Usage:" in capsys.readouterr().out


def test_the_list_of_verbs_cuts_no_sentence_short(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    listed = capsys.readouterr().out.partition("Commands:")[2].strip().splitlines()
    assert len(listed) == len(app.registered_commands)
    assert [line for line in listed if "..." in line] == []


def test_every_flag_of_every_verb_is_explained_in_its_help(capsys, monkeypatch):
    """Each option and argument has words of its own, and they stand in what `--help` prints."""
    import typer

    monkeypatch.setenv("COLUMNS", "200")
    explained = 0
    for name, verb in typer.main.get_command(app).commands.items():
        assert verb.help, name
        assert run(name, "--help") == 0
        page = " ".join(capsys.readouterr().out.split())
        for parameter in verb.params:
            words = getattr(parameter, "help", None)
            assert words, f"{name}: {parameter.name} is not explained"
            assert " ".join(words.split()) in page, f"{name}: {parameter.name}"
            assert all(option in page for option in parameter.opts if option.startswith("-")), (
                f"{name}: {parameter.opts}"
            )
            explained += 1
    assert explained > 60


def test_what_a_mistake_does_not_write(scratch: Path):
    """Data that are refused leave no run folder behind, and --no-check trains on them all the same."""
    data = _overlapping(scratch / "d")
    assert run("train", "--data", data, *TRAIN, "--out", scratch / "new") == 3
    assert not (scratch / "new").exists()
    assert run("train", "--data", data, *TRAIN, "--out", scratch / "new", "--no-check") == 0
    assert not (scratch / "new/check.json").exists()


def test_a_run_shows_its_pictures_and_keeps_its_answers(home: Path):
    with Image.open(home / "run/samples.png") as sheet:
        assert sheet.width > 8 * 96
    assert json.loads((home / "run/check.json").read_text())["num_train"] == 24
    head, *lines = [json.loads(line) for line in (home / "run/predictions.jsonl").read_text().splitlines()]
    assert head["classes"] == list(CLASSES)
    assert len(lines) == head["count"] == 6
    right = 100 * np.mean([line["label"] == line["answer"] for line in lines])
    assert head["top1"] == pytest.approx(right)
    assert [line["label"] for line in lines] == [CLASSES.index(line["name"].split("/")[0]) for line in lines]


def test_an_artifact_that_cannot_run_here_is_exported_and_says_so(home: Path, tmp_path: Path, capsys):
    """In the list of what was exported, in the report, and where somebody wants to use it."""
    if torch.cuda.is_available():
        pytest.skip("TensorRT may run here")
    assert run("export", home / "fused.safetensors", "--out", tmp_path / "artifacts", "--to", "tensorrt") == 0
    assert "not run where it was exported: the first load where it runs checks its answer" in capsys.readouterr().out
    assert json.loads((tmp_path / "artifacts/tensorrt-fp32/manifest.json").read_text())["parity"] is None
    assert run("report", tmp_path, "--out", tmp_path / "page.html") == 0
    assert "not run where it was exported" in (tmp_path / "page.html").read_text()
    assert run("predict", tmp_path / "artifacts/tensorrt-fp32", photo(tmp_path / "a.png", 0)) == 2
    assert "TensorRT runs on an NVIDIA GPU, and PyTorch finds none on this machine" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_numpy():
    """What makes `onefold --help` quick: a time would depend on the machine, an import does not."""
    names = "{'torch', 'numpy'} & set(sys.modules)"
    code = f"import sys; from onefold.cli import main; main(['export', '--help']); sys.exit(bool({names}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_standard_streams_that_are_closed_or_full(tmp_path: Path) -> None:
    """A file that is opened must not get the number of a closed stream, and what cannot be printed is an error."""
    command = f"{sys.executable} -W ignore -m onefold.cli models mobilenetv1_025"
    cases = {
        f"{command} > /dev/full": 5,
        f"{command} no_such_network 2> /dev/full": 2,
        f"{command} no_such_network 2>&-": 2,
        f"{command} >&- 2>&- <&-": 0,
        f"{command} | true; exit ${{PIPESTATUS[0]}}": 0,
    }
    done = {line: subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path) for line in cases}
    assert {line: each.returncode for line, each in done.items()} == cases
    assert not any("Traceback" in each.stderr or "Exception" in each.stderr for each in done.values())
    said = done[f"{command} > /dev/full"].stderr
    assert said.startswith("error: the system refused to go on: No space left on device; make room where it writes to")
    (tmp_path / "gone").mkdir()
    gone = subprocess.run(
        ["bash", "-c", f"rmdir ../gone; {sys.executable} -m onefold.cli report ."],
        **{"cwd": tmp_path / "gone", "capture_output": True, "text": True, "check": False},
    )
    assert (gone.returncode, gone.stderr) == (2, "error: the current folder was removed: change to another one\n")
    program = (
        "import os, sys\nfrom onefold.cli.exit_status import run_command\n"
        "def command():\n    handle = os.open('kept', os.O_WRONLY | os.O_CREAT)\n    os.write(2, b'a library speaks')\n"
        "    return 100 + (handle > 2)\nsys.exit(run_command(command))"
    )
    (tmp_path / "program.py").write_text(program)
    line = f"{sys.executable} program.py 2>&-"
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, check=False).returncode == 101
    assert (tmp_path / "kept").read_bytes() == b""
