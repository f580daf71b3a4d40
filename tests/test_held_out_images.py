"""What a run was trained on is known to it: to evaluation, deployment, calibration, and to a run that goes on."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onefold.accuracy_intervals import drop_interval
from onefold.bench import Procedure
from onefold.checksums import read_sealed_json, write_sealed_json
from onefold.cli import main
from onefold.commands.bench import save_accuracy, saved_accuracy
from onefold.commands.calibration_cache import CalibrationOptions, calibrated_network
from onefold.commands.deploy_photos import deployment_photos
from onefold.commands.deploy_results import DeployOptions
from onefold.commands.evaluate import evaluate_suite, open_suite
from onefold.commands.export import ExportOptions, check_int8_agreement, export_to_runtimes
from onefold.commands.fuse import fuse
from onefold.commands.held_out_images import (
    DATA_FILE,
    IMAGES_FILE,
    TrainingRecords,
    calibration_photos,
    evaluation_sets,
    find_run_data,
    open_data,
    open_unlabelled_photos,
    read_run_data,
    records_from_dict,
    records_to_dict,
    split_photos,
    training_records,
    update_run_data_location,
    write_run_data,
)
from onefold.commands.open_network import open_network
from onefold.commands.predictor import open_predictor
from onefold.commands.saved_recipe import read_recipe
from onefold.commands.train import resume_run, start_run
from onefold.data import open_dataset, read_dataset
from onefold.data.dataset import Dataset
from onefold.data.fingerprint import TrainedOn, image_keys
from onefold.errors import BadArgument, BadCheckpoint, BadData
from onefold.models import create_model
from onefold.models.load_model import Card, read_card, save_weights
from onefold.quantize import MINMAX_METHOD, QuantizationMethod
from onefold.recipes import find_recipe
from onefold.recipes.recipe import override, with_image_size
from onefold.report import ACCURACY_FILE

NAME = "mobilenetv1_025"
SPLIT = {"seed": 1, "val_fraction": 0.25}


def paint(root: Path, count: int = 12, first: int = 0) -> Path:
    for c, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            noise = np.random.default_rng(100 * c + i).integers(0, 60, (32, 32, 3))
            Image.fromarray((noise + 150 * c).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, and a run of a fitted head on three quarters of them, made with a relative path."""
    home = tmp_path_factory.mktemp("home")
    paint(home / "photos")
    torch.manual_seed(0)
    model = create_model(NAME, num_classes=2).eval()
    save_weights(model, home / "blank.safetensors", Card(model=NAME, num_classes=2))
    changes = {"data.seed": "1", "data.val_fraction": "0.25", "model": NAME, "weights": str(home / "blank.safetensors")}
    before = Path.cwd()
    os.chdir(home)
    try:
        recipe = with_image_size(override(find_recipe("photos:probe"), {**changes, "data.spec": "photos"}), 32)
        start_run(recipe, Path("run"), check=False)
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def scratch(home: Path, tmp_path: Path) -> Path:
    for name in ("photos", "run"):
        shutil.copytree(home / name, tmp_path / name)
    return tmp_path


def names_of(dataset: Dataset) -> set[str]:
    return {dataset.name(i) for i in range(len(dataset))}


def held_out_of(home: Path) -> set[str]:
    return names_of(open_dataset(home / "photos", "val", seed=1, val_fraction=0.25))


def records(home: Path) -> TrainingRecords:
    found = training_records(home / "run", open_network(home / "run").card.trained_on)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------- evaluation


def test_a_run_is_evaluated_on_what_it_held_out_whatever_the_folder_is_called(home: Path, scratch: Path) -> None:
    own = evaluation_sets(home / "run", None, records(home))
    (scratch / "photos").rename(scratch / "elsewhere")
    for place in (home / "photos", scratch / "elsewhere"):
        for source in (home / "run", fused_file(home, scratch)):
            with open_predictor(source) as predictor:
                suite = open_suite(source, str(place), predictor)
                (result,) = evaluate_suite(predictor, suite)
            assert names_of(result.images) == held_out_of(home) == names_of(next(iter(own.values())))
            assert result.trained_on == 0
            assert "6 images that were not trained on, 18 that were are left out" in result.data


def fused_file(home: Path, folder: Path) -> Path:
    path = folder / "fused.safetensors"
    if not path.exists():
        fuse(home / "run", path)
    return path


def test_a_score_on_what_was_trained_on_says_so_in_its_line_and_its_row(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "train_only"
    for name in names_of(open_dataset(home / "photos", "train", seed=1, val_fraction=0.25)):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(home / "photos" / name, train / name)
    words = ["eval", str(home / "run"), "--data", str(train), "--results", str(tmp_path)]
    assert main(words) == 0
    assert "18 images, 18 of them were trained on: the score is optimistic" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_on"] == 18
    (noted,) = read_sealed_json(tmp_path / ACCURACY_FILE).values()
    assert noted["top1_trained_on"] == 18
    paint(tmp_path / "new", first=50)
    assert main(["eval", str(home / "run"), "--data", str(tmp_path / "new"), "--results", str(tmp_path), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["count"], row["trained_on"]) == (24, 0)


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_deployment_says_in_each_place_that_it_scores_what_was_trained_on(
    is_copied: bool, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = names_of(open_dataset(home / "photos", "train", seed=1, val_fraction=0.25))
    if is_copied:
        saved_again(names, home / "photos", tmp_path / "train")
    for name in () if is_copied else names:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(home / "photos" / name, tmp_path / "train" / name)
    words = ["deploy", str(home / "run"), "--data", str(home / "photos"), "--val", str(tmp_path / "train")]
    assert main([*words, "--quick", "--max-drop", "100", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    how = "are by their pixels copies of trained ones (saved again, resized)" if is_copied else "were trained on"
    seen = f"18 of them {how}: the score is optimistic"
    lines = [line for line in (said.out + said.err).splitlines() if seen in line]
    assert [line.split()[:2] for line in lines] == [["to", "score"], ["scored", "torch-fp32"], ["scored", "onnx-fp32"]]
    assert "held out" not in said.out + said.err
    assert "held-out" not in "".join(lines)
    sentence = f"of 18 photos that are scored {seen}"
    assert read_sealed_json(tmp_path / "out/results/gates.json")["notes"][-1] == sentence
    for page in ("README.md", "report.html"):
        assert sentence[3:] in (tmp_path / "out" / page).read_text()
    assert f"top1 ({seen})" in (tmp_path / "out/MODEL_CARD.md").read_text()
    (noted,) = read_sealed_json(tmp_path / "out/results" / ACCURACY_FILE).values()
    assert noted["top1_trained_on"] == 18


def test_copies_of_trained_photos_that_were_saved_again_are_known_by_their_pixels(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In another format, of another quality, resized: no file is the same any more."""
    again = tmp_path / "again"
    for i, name in enumerate(sorted(names_of(open_dataset(home / "photos", "train", seed=1, val_fraction=0.25)))):
        path = (again / name).with_suffix((".bmp", ".jpg", ".webp")[i % 3])
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(home / "photos" / name) as image:
            (image.resize((64, 64)) if i % 2 else image).save(path, quality=80)
    paint(again, count=2, first=70)
    for source in (home / "run", fused_file(home, tmp_path)):
        words = ["eval", str(source), "--data", str(again), "--results", str(tmp_path), "--img-size", "32"]
        assert main(words) == 0
        said = capsys.readouterr()
        assert "22 images, 18 of them are by their pixels copies of trained ones (saved again, resized)" in said.out
        assert "known by their files only" not in said.err
        assert main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["copies_of_trained"] == 18
    assert {entry["top1_trained_on"] for entry in read_sealed_json(tmp_path / ACCURACY_FILE).values()} == {18}
    deployed = deployment_photos(open_network(home / "run"), deployment(again, val=str(again)), calibrates=False)
    assert "22 photos, 0 of them trained on, 18 more by their pixels copies of trained ones" in deployed.title


def test_a_split_of_the_place_counts_and_test_is_scored_beside_val(home: Path, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        paint(tmp_path / split, count=3, first=10 * number)
    sets = evaluation_sets("x", str(tmp_path), records(home))
    assert [title.rpartition(" ")[2] for title in sets] == ["(val)", "(test)"]
    assert [sorted(names_of(images))[0] for images in sets.values()] == ["cat/10.png", "cat/20.png"]


def test_an_older_run_is_known_by_its_recipe_and_strange_weights_by_nothing(home: Path, scratch: Path) -> None:
    for name in (DATA_FILE, IMAGES_FILE):
        (scratch / "run" / name).unlink()
    for name in ("last", "previous"):  # those of older runs keep no recipe
        shutil.rmtree(scratch / "run" / name)
    recipe = read_recipe(scratch / "run")
    plain = recipe.to_dict()
    plain["data"]["spec"] = str(scratch / "photos")
    (scratch / "run/recipe.json").write_text(json.dumps(plain))
    found = training_records(scratch / "run", None)
    assert found is not None
    assert found[0].to_dict() == records(home)[0].to_dict()
    assert training_records(home / "blank.safetensors", None) is None
    assert training_records("x", {"records": [{"images": 1}]}) is None
    images = next(iter(evaluation_sets("x", str(home / "photos"), None).values()))
    assert len(images) == 24


def test_weights_that_start_from_weights_know_both(home: Path) -> None:
    first = records(home)
    other = TrainedOn.from_keys(["0" * 24], "content")
    both = records_from_dict(json.loads(json.dumps(records_to_dict([*first, other, *first]))))
    assert both is not None
    assert [record.images for record in both] == [18, 1]
    card = read_card(home / "run/best/model.safetensors")
    assert card.trained_on == json.loads((home / "run" / DATA_FILE).read_text())["trained_on"]


# ------------------------------------------------------------------------------ a run whose photos moved


def test_a_run_is_used_from_anywhere_and_moved_with_its_photos(
    home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scratch / "run")
    assert resume_run(Path()).epoch == 0
    shutil.move(scratch / "photos", scratch / "run/moved")
    monkeypatch.chdir(scratch)
    write_sealed_json(scratch / "run" / DATA_FILE, read_run_data(scratch / "run") | {"place": "/nowhere/photos"})
    assert main(["eval", "run"]) == 3
    assert "the photos of run were in /nowhere/photos, and are gone" in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--data", "run/moved"]) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 6
    assert main(["train", "--resume", "run", "--data", "run/moved", "--epochs", "3"]) == 2


def test_a_run_goes_on_where_the_photos_that_it_is_validated_on_have_moved(tmp_path: Path) -> None:
    run, places = tmp_path / "run", {"data.spec": str(tmp_path / "a"), "data.val": str(tmp_path / "b")}
    paint(tmp_path / "a", 3), paint(tmp_path / "b", 2, first=50)
    recipe = override(find_recipe("photos:probe"), places)
    run.mkdir()
    splits = open_data(recipe.data)
    write_run_data(run, splits.info, splits.datasets, (), recipe.data.val)
    for name in "ab":
        (tmp_path / name).rename(tmp_path / f"{name}2")
    a, b = str(tmp_path / "a2"), str(tmp_path / "b2")
    with pytest.raises(BadData, match=r"/a and .*/b, and are gone: say where they are with data=FOLDER and val="):
        find_run_data(run, recipe)
    with pytest.raises(BadData, match=r"were in .*/b, and are gone: say where they are with val=FOLDER when"):
        find_run_data(run, recipe, a)
    assert len(find_run_data(run, recipe, a, b).open().datasets["val"]) == 4
    update_run_data_location(run, a, None)
    update_run_data_location(run, None, b)
    assert (find_run_data(run, recipe).found.spec, find_run_data(run, recipe).found.val) == (a, b)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, held: (p / held).write_bytes((p / held).read_bytes() + b"!"), "1 of other content"),
        (lambda p, held: (p / held).unlink(), "1 gone"),
        (lambda p, held: paint(p, count=1, first=90), "2 new"),
        (lambda p, held: (p / held).rename(p / "dog/moved.png"), "gone"),
    ],
)
def test_a_resume_notices_other_validation_images(
    change: Callable[[Path, str], Any], says: str, home: Path, scratch: Path
) -> None:
    change(scratch / "photos", min(held_out_of(home)))
    with pytest.raises(BadCheckpoint, match=f"was started on other images: .*{says}"):
        resume_run(scratch / "run")


def test_an_evaluation_says_that_validation_images_are_others(
    home: Path, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (scratch / "photos" / min(held_out_of(home))).unlink()
    evaluation_sets(scratch / "run", None, None)
    assert "these are not the images that" in caplog.text


def test_a_class_that_came_after_a_run_is_left_out_of_its_evaluation(
    home: Path, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (images,) = evaluation_sets(scratch / "run", None, None).values()
    (scratch / "photos" / "ant").mkdir()
    shutil.copy(scratch / "photos" / min(held_out_of(home)), scratch / "photos" / "ant" / "new.png")
    (same,) = evaluation_sets(scratch / "run", None, None).values()
    assert (names_of(same), same.classes) == (names_of(images), images.classes)
    assert "left out 1 image of all images: of classes that the run does not have (ant)" in caplog.text


# --------------------------------------------------------------------------- deployment and calibration


@pytest.mark.parametrize("count", [4, 200])
def test_calibration_takes_what_was_trained_on_and_scores_take_the_rest(count: int, home: Path) -> None:
    place, known = str(home / "photos"), records(home)
    photos = split_photos(place, known)
    assert names_of(photos.scored) == held_out_of(home)
    assert not names_of(photos.calibration) & names_of(photos.scored)
    assert names_of(calibration_photos(place, known)) == names_of(photos.calibration)
    order = CalibrationOptions(
        data=place, count=count, method=QuantizationMethod(clip_weights=False, correct_weights=False)
    )
    made = calibrated_network(open_network(home / "run").fused()[0], order)
    assert made.calibrated_on is not None
    assert made.calibrated_on.images == made.made.images == min(count, 18)
    with open_predictor(home / "run") as predictor:
        seen = replace(predictor, calibrated_on=records_to_dict([made.calibrated_on]))
        (result,) = evaluate_suite(seen, open_suite(home / "run", None, seen))
    assert result.calibrated_on == 0


def test_how_a_place_is_read_is_said_where_it_is_scored(
    home: Path, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onefold")
    place = scratch / "photos"
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*.png"))
    rows = [f"{name},{Path(name).parent}" for name in names]
    (place / "labels.csv").write_text("\n".join(["file,label", *rows[:-1], "gone/1.png,gone"]))
    for read in (lambda: evaluation_sets("", str(place), None), lambda: split_photos(str(place), None)):
        caplog.clear()
        read()
        assert "1 of the 24 files that it lists are not there, and not used: gone/1.png" in caplog.text
        assert "left out 1 image in" in caplog.text
        assert len(caplog.messages) == 1
    (place / "labels.csv").unlink()
    caplog.clear()
    evaluation_sets("", str(place), None)
    assert caplog.messages == []


def test_a_place_that_was_trained_on_entirely_is_not_called_held_out(home: Path, scratch: Path) -> None:
    place = scratch / "photos"
    for name in held_out_of(home):
        (place / name).unlink()
    assert split_photos(str(place), records(home)).title.endswith("(a part of it, all of which was trained on)")


def test_without_a_record_a_fifth_is_held_out_and_copies_of_it_do_not_calibrate(home: Path, scratch: Path) -> None:
    place = scratch / "photos"
    scored = split_photos(str(place), None).scored
    assert names_of(scored) == names_of(open_dataset(place, "val", seed=0, val_fraction=0.2))
    for name in names_of(scored):
        shutil.copy(place / name, place / f"{name[:-4]}-copy.png")
    photos = split_photos(str(place), None)
    assert not set(image_keys(photos.calibration, "content")) & set(image_keys(photos.scored, "content"))


@pytest.mark.parametrize("layout", ["val", "test", "one a class"])
def test_photos_without_train_calibrate_and_score(layout: str, tmp_path: Path) -> None:
    if layout == "one a class":
        place = tmp_path / "photos"
        for path in paint(tmp_path / "x", 5).rglob("*.png"):
            (folder := place / f"{path.parent.name}{path.stem}").mkdir(parents=True)
            path.rename(folder / path.name)
    else:
        place = paint(tmp_path / layout, 5).parent
    photos = split_photos(str(place), None)
    assert (len(photos.calibration), len(photos.scored), photos.labelled) == (8, 2, True)
    assert not names_of(photos.calibration) & names_of(photos.scored)
    assert "the rest calibrates" in photos.title
    assert len(calibration_photos(str(place), None)) == 8
    assert len(split_photos(str(place), None, calibrates=False).scored) == 10


def test_one_photo_is_too_few_to_calibrate_and_score(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "photos/cat/0.png", tmp_path / "0.png")
    photos = split_photos(str(tmp_path), None)
    order = CalibrationOptions(data=str(tmp_path), photos=photos.calibration)
    with pytest.raises(BadData, match="has no photos to calibrate with that can be read and are not to be scored"):
        calibrated_network(open_network(home / "run").fused()[0], order)


def deployment(place: Path, **more: Any) -> DeployOptions:
    given = {"runtimes": ["onnx"], "precisions": ["int8"], "calibration": CalibrationOptions(data=str(place)), **more}
    return DeployOptions(**given, procedure=Procedure(samples=16))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: (p / "labels.csv").write_text("name,class\nx,y\n"),
        lambda p: paint(p / "ape").rename(p / "ape2") and shutil.move(p / "ape2/cat", p / "ape"),
    ],
)
def test_labels_that_are_partly_unknown_do_not_turn_the_gate_off(spoil: Callable[[Path], Any], scratch: Path) -> None:
    spoil(scratch / "photos")
    try:
        photos = deployment_photos(open_network(scratch / "run"), deployment(scratch / "photos"), calibrates=True)
    except BadData:
        return
    assert photos.labelled


def test_photos_without_labels_are_divided_and_the_title_says_why(home: Path, tmp_path: Path) -> None:
    flat, dated = tmp_path / "flat", tmp_path / "dated"
    shutil.copytree(home / "photos/cat", flat)
    shutil.copytree(home / "photos/cat", dated / "2023")
    shutil.copytree(home / "photos/dog", dated / "2024")
    network = open_network(home / "run")
    for place in (flat, dated):
        photos = deployment_photos(network, deployment(place), calibrates=True)
        assert not photos.labelled
        assert "not labelled" in photos.title
        assert not names_of(photos.calibration) & names_of(photos.scored)
        everything = deployment_photos(network, deployment(place), calibrates=False).scored
        assert len(everything) == len(photos.scored) + len(photos.calibration)


def test_photos_that_are_given_to_score_on_do_not_calibrate(home: Path) -> None:
    photos = deployment_photos(
        open_network(home / "run"), deployment(home / "photos", val=str(home / "photos")), calibrates=True
    )
    assert not set(image_keys(photos.calibration, "content")) & set(image_keys(photos.scored, "content"))
    assert "6 photos, 0 of them trained on" in photos.title


def saved_again(names: Iterable[str], root: Path, to: Path) -> None:
    """JPEG, resized: by their contents other files."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(root / name) as image:
            image.resize((64, 64)).save((to / name).with_suffix(".jpg"), quality=90)


def test_copies_of_photos_to_score_on_do_not_calibrate_and_artifacts_know_them(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "more", count=10, first=40)
    some = sorted(names_of(open_dataset(tmp_path / "more", "train", seed=0, val_fraction=0.0)))
    network = open_network(home / "run")
    saved_again(some[::4], tmp_path / "more", tmp_path / "val")
    paint(tmp_path / "val", count=3, first=90)
    photos = deployment_photos(network, deployment(tmp_path / "more", val=str(tmp_path / "val")), calibrates=True)
    kept = names_of(photos.calibration)
    assert not kept & set(some[::4])
    assert len(kept) == 16 - len(names_of(calibration_photos(str(tmp_path / "more"), None)).intersection(some[::4]))
    assert (
        "photos to calibrate with are by their pixels copies of those, and left out): 11 photos, 0 of" in photos.title
    )
    saved_again(some, tmp_path / "more", tmp_path / "all")
    photos = deployment_photos(network, deployment(tmp_path / "more", val=str(tmp_path / "all")), calibrates=True)
    assert len(photos.calibration) == 16  # there are no others
    assert "16 of 16 photos to calibrate with are by their pixels copies of those: optimistic for int8" in photos.title

    assert main(["export", str(home / "run"), "--precision", "int8", "--data", str(tmp_path / "more"),
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    capsys.readouterr()
    words = ["eval", str(tmp_path / "onnx-int8"), "--data", str(tmp_path / "all"), "--results", str(tmp_path)]
    assert main(words) == 0
    copies = "20 images, 16 of them are by their pixels copies of ones that calibrated it (saved again, resized)"
    assert copies in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["copies_of_calibration"] == 16


def test_an_int8_network_that_was_calibrated_on_what_its_run_held_out_says_so(home: Path, tmp_path: Path) -> None:
    network, _ = open_network(home / "run").fused()
    saved_again(held_out_of(home), home / "photos", tmp_path)
    for place, seen in ((tmp_path, 6), (home / "photos", 0)):
        order = CalibrationOptions(
            data=str(place), photos=open_unlabelled_photos(str(place)) if seen else None, method=MINMAX_METHOD
        )
        said = check_int8_agreement(network, calibrated_network(network, order), order)["answers"]
        assert ("6 of which, or copies of them, calibrated it" in str(said)) is bool(seen)


def test_the_interval_of_a_drop() -> None:
    """By hand: 10 lost, 4 won of 98: (6 / 100 +- 1.96 sqrt(15 / 100 - 0.0036) / 10)."""
    low, high = drop_interval(10, 4, 98)
    assert (low, high) == pytest.approx((6 - 7.499, 6 + 7.499), abs=2e-3)
    assert drop_interval(0, 0, 7) == pytest.approx((-21.78, 21.78), abs=0.01)  # seven photos show nothing
    assert drop_interval(1, 0, 1)[1] <= 100


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        (QuantizationMethod(), False),
        (QuantizationMethod(weight_qmax=63), True),
        (QuantizationMethod(weights="tensor"), True),
    ],
)
def test_weights_trained_for_8_bits_keep_their_own(
    method: QuantizationMethod, refused: bool, home: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    fused = open_network(home / "run").fused()[0]
    inputs = torch.rand(2, 3, 32, 32)
    from onefold.quantize import calibrate_qat

    params = calibrate_qat(fused.model, [inputs], QuantizationMethod(clip_weights=False))
    trained = replace(fused, card=replace(fused.card, int8=params.to_dict()))
    order = CalibrationOptions(data=str(home / "photos"), method=method)
    if refused:
        for given in (order, replace(order, data="")):  # an option counts without photos too
            with pytest.raises(BadArgument, match="was trained for 8 bits"):
                calibrated_network(trained, given)
            with pytest.raises(BadArgument, match="of int8, not fp32"):
                export_to_runtimes(
                    fused, home / "a", ExportOptions(runtimes=["onnx"], calibration=replace(given, data=""))
                )
        return
    assert calibrated_network(trained, replace(order, data="")).made.images == 0
    assert "keeps its own" not in caplog.text
    with pytest.raises(BadArgument, match="was not trained for int8: give photos"):
        calibrated_network(fused, replace(order, data=""))
    made = calibrated_network(trained, order)
    assert (made.made.images, made.calibrated_on) == (0, None)
    assert "keeps its own" in caplog.text


# ------------------------------------------------------------------------------------------------ results


def test_results_go_by_the_weights_not_by_the_names_of_files(home: Path, scratch: Path) -> None:
    def facts(source: Path, **size: int) -> Any:
        with open_predictor(source, **size) as predictor:
            return predictor.facts

    same, other = facts(home / "run"), scratch / "elsewhere" / "run"
    torch.manual_seed(5)
    save_weights(
        create_model(NAME, num_classes=2).eval(), other.with_suffix(".safetensors"), Card(model=NAME, num_classes=2)
    )
    assert facts(scratch / "run")["sha256"] == same["sha256"]
    assert len({same["sha256"], facts(home / "run", size=64)["sha256"]}) == 2
    assert facts(other.with_suffix(".safetensors"), size=32)["sha256"] != same["sha256"]


def _note(home: Path, number: int) -> None:
    named = SimpleNamespace(facts={"sha256": str(number)})
    for _ in range(5):
        save_accuracy(named, "x", float(number), home)  # type: ignore[arg-type]


def test_two_writers_of_accuracies_lose_none(tmp_path: Path) -> None:
    started = [multiprocessing.get_context("fork").Process(target=_note, args=(tmp_path, n)) for n in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert sorted(json.loads((tmp_path / ACCURACY_FILE).read_text())) == ["0", "1", "2", "3", "checksum"]
    assert saved_accuracy({"sha256": "2"}, tmp_path)["top1"] == 2.0
    for damaged in ((tmp_path / ACCURACY_FILE).read_text().replace("2.0", "92.0"), "{"):
        (tmp_path / ACCURACY_FILE).write_text(damaged)
        with pytest.raises(BadData, match="is damaged"):
            _note(tmp_path, 1)


def test_a_run_of_batches_of_one_image_is_refused_where_norms_cannot_normalize(home: Path, tmp_path: Path) -> None:
    changes = {"data.spec": str(home / "photos"), "model": NAME, "plan.epochs": "9", "plan.batch_size": "1"}
    recipe = override(find_recipe("photos:scratch"), {**changes, "start": "plain", "curriculum": "none"})
    with pytest.raises(BadArgument, match=r"see one value a channel of one image.*\(-b 2\)"):
        start_run(with_image_size(recipe, 32), tmp_path / "run", check=False)
    assert not (tmp_path / "run/recipe.json").exists()
    halves = override(recipe, {"plan.batch_size": "2", "plan.accumulate": "2"})
    with pytest.raises(BadArgument, match=r"which 2 share.* give two or more each \(-b 4\)"):
        start_run(with_image_size(halves, 32), tmp_path / "run", check=False)
    workers = override(recipe, {"plan.batch_size": "8", "plan.logical_workers": "8"})
    with pytest.raises(BadArgument, match=r"which 8 share.* give two or more each \(-b 16\)"):
        start_run(with_image_size(workers, 32), tmp_path / "run", check=False)


def test_the_run_keeps_what_its_dataset_is(home: Path) -> None:
    kept = json.loads((home / "run" / DATA_FILE).read_text())["dataset"]
    now = read_dataset(home / "photos", seed=1, val_fraction=0.25).info.to_dict()
    assert kept["splits"][0]["images_per_class"] == list(now["splits"][0]["images_per_class"])
    assert kept["classes"] == ["cat", "dog"]
    assert [split["num_images"] for split in kept["splits"]] == [18, 6]
