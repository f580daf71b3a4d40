"""The verbs in Python: they give what the command line prints, take what a notebook has, and are imported when used."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import onefold
from onefold.accuracy_intervals import wilson_interval
from onefold.cli import main
from onefold.cli.main import app
from onefold.errors import BadArgument, BadData
from onefold.runtimes.artifact import read_manifest

VERBS = ("train", "predict", "evaluate", "fuse", "export", "bench")
CLASSES = ("blue", "green", "red")
OPTIONS = {"model": "mobilenetv1_025", "img_size": 32, "epochs": 1, "batch_size": 8, "threads": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise around three colours, ten images a class."""
    folder = tmp_path_factory.mktemp("python") / "photos"
    rng = np.random.default_rng(0)
    for name, colour in zip(CLASSES, ((40, 40, 200), (40, 200, 40), (200, 40, 40)), strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.clip(rng.normal(colour, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path) -> onefold.Run:
    return onefold.train(photos, out=photos.parent / "runs/first", **OPTIONS)


@pytest.fixture(scope="module")
def fused(run: onefold.Run):
    return run.fuse()


@pytest.fixture(scope="module")
def artifact(fused, photos: Path):
    return fused.export("onnx", out=photos.parent / "artifacts")


# ------------------------------------------------------------------------------------------- the road


def test_an_artifact_needs_no_torch(artifact, photos: Path):
    picture = sorted((photos / CLASSES[0]).iterdir())[0]
    code = (
        "import sys; sys.modules['torch'] = None  # an import of it fails\n"
        "import onefold, onefold.commands.bench\n"
        "print(*onefold.predict(*sys.argv[1:]).names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact.folder), str(picture)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == artifact(picture).names


def test_a_run_tells_its_history_its_best_epoch_and_its_data(run: onefold.Run):
    assert [each["epoch"] for each in run.history] == [1]
    assert run.best.top1 == run.history[0]["top1"]
    assert run.best.weights.is_file()
    assert run.best.count == 6
    assert run.data.classes == CLASSES
    assert {split.name: split.num_images for split in run.data.splits} == {"train": 24, "val": 6}
    assert any("24 images are few to train from scratch with" in remark for remark in run.remarks)
    assert len(repr(run).splitlines()) <= 4
    page = run._repr_html_()
    assert page.count("<svg") == 2
    assert "--series-0:" in page


def test_a_training_that_gained_nothing_says_so(run: onefold.Run, monkeypatch: pytest.MonkeyPatch):
    last = run.history[0]
    for before, said in ((last["top1"], True), (last["top1"] - 1, False)):
        history = [{**last, "epoch": 0, "top1": before}, last]
        monkeypatch.setattr(onefold.Run, "history", property(lambda _, history=history: history))
        found = [remark for remark in run.remarks if "training gained nothing" in remark]
        assert len(found) == said
        assert all(f"before the first step it was {before:.2f} % too" in remark for remark in found)


def test_every_kind_of_image_is_predicted_alike(run: onefold.Run, photos: Path):
    path = photos / "red/0.png"
    image = Image.open(path)
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    rgba = image.convert("RGBA")
    kinds = [path, str(path), image, pixels, pixels.transpose(2, 0, 1), tensor, tensor[None], rgba, pixels[None]]
    found = run.predict(kinds)
    assert len(found) == len(kinds) - 1  # of one path named twice one
    assert found.probabilities.shape == (8, 3)
    assert np.allclose(found.probabilities, found.probabilities[0])
    assert np.allclose(found.probabilities.sum(1), 1, atol=1e-6)
    assert [each.name for each in found][:2] == [str(path), "image 2"]
    assert found.names == [found.classes[int(found.probabilities[0].argmax())]] * 8
    one = run.predict(image)
    assert np.array_equal(one.probabilities[0], found.probabilities[0])


def test_a_turned_photo_is_upright_and_a_normalized_input_is_taken_as_it_is(run: onefold.Run, photos: Path, tmp_path):
    image = Image.open(photos / "blue/1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    model, card = onefold.load_model(run)
    prepared = onefold.data.Preprocessing.from_dict(card.preprocessing)(image.convert("RGB"))
    answers = run.predict([image, turned, prepared, torch.from_numpy(prepared)]).probabilities
    assert np.allclose(answers, answers[0], atol=1e-6)
    with torch.inference_mode():
        assert np.allclose(model(torch.from_numpy(prepared)[None]).softmax(1).numpy(), answers[0], atol=1e-5)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((40, 40, 3), np.float32), "expected a picture of uint8"),
        (np.zeros((3, 16, 16), np.float32), "or a normalized input of floats (3, 32, 32)"),
        (np.zeros((5, 5, 5), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 5, 3), np.uint8), "an array of shape (0, 5, 3)"),
        (np.zeros(7, np.uint8), "an array of shape (7,)"),
        (np.zeros((40, 40, 3), np.int64), "int64 (40, 40, 3)"),
        (7, "not int"),
    ],
)
def test_what_is_no_image_is_refused_with_what_was_seen(run: onefold.Run, image: object, says: str):
    with pytest.raises(BadArgument) as error:
        run.predict([image])
    assert says in str(error.value)


def test_nothing_to_predict_is_an_error_and_one_missing_path_is_not(run: onefold.Run, photos: Path, tmp_path: Path):
    found = run.predict([photos / "red", tmp_path / "nowhere.jpg"])
    assert len(found) == 10
    assert "nowhere.jpg is not there" in found.not_there[0]
    for nothing in ([], tmp_path / "nowhere.jpg"):
        with pytest.raises(BadData):
            run.predict(nothing)


def test_predictions_are_a_table_and_their_repr_is_short(run: onefold.Run, photos: Path, tmp_path: Path):
    found = run.predict(photos, min_confidence=1.0)
    assert found.counts() == {"unsure": 30}
    assert found.names == [None] * 30
    assert len(repr(found).splitlines()) == 12
    assert repr(found).endswith("... and 20 more")
    assert found[:2].to_csv().count("\n") == 3
    assert "<table>" in found._repr_html_()
    assert " 0.0 %" not in repr(run.predict(photos))
    for count in (1, 2):  # as many as were asked for, whatever their shares
        assert str(run.predict(photos, top=count)[0]).count("%") == count
    sorted_into = found[:3].sort_into(tmp_path / "sorted")
    assert len(list((sorted_into / "unsure").iterdir())) == 3


def test_hostile_class_names_stay_inside_the_folder(run: onefold.Run, photos: Path, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("../../up\nunsure\n..\n")
    found = onefold.predict(run, photos, classes=names)
    found.sort_into(tmp_path / "into" / "here")
    assert {path.name for path in (tmp_path / "into").iterdir()} == {"here"}
    assert sum(path.is_file() for path in (tmp_path / "into/here").rglob("*")) == 30
    assert all(path.is_dir() for path in (tmp_path / "into/here").iterdir())


def test_scores_have_wilsons_interval(run: onefold.Run, tmp_path: Path):
    scores = run.evaluate(results=tmp_path)
    assert scores.top1 == run.best.top1
    assert scores.interval == wilson_interval(round(scores.top1 * 6 / 100), 6)
    assert f"95 % interval {scores.interval[0]:.1f} to {scores.interval[1]:.1f}" in repr(scores)
    assert "<table>" in scores._repr_html_()


def test_wilsons_interval_is_the_published_one():
    """Brown, Cai and DasGupta (2001) and R's prop.test without continuity correction."""
    assert wilson_interval(0, 10) == pytest.approx((0.0, 27.753), abs=2e-3)
    assert wilson_interval(10, 10) == pytest.approx((72.247, 100.0), abs=2e-3)
    assert wilson_interval(81, 263) == pytest.approx((25.53, 36.62), abs=1e-2)


def test_an_artifact_is_called_on_photos_and_measured(artifact, run: onefold.Run, photos: Path, tmp_path, monkeypatch):
    unknown = onefold.bench.Roofline(limits=(), features=())
    monkeypatch.setattr("onefold.commands.bench.load_or_measure_roofline", lambda *_, **__: unknown)
    path = photos / "green/3.png"
    assert np.allclose(artifact(path).probabilities, run.predict(path).probabilities, atol=1e-5)
    assert artifact(path).names == run.predict(path).names
    measured = artifact.bench(samples=20, warmup=0.0, no_cold=True, results=tmp_path)
    (name,) = measured.measurements
    assert name in repr(measured)
    assert measured.path.is_file()
    assert repr(artifact).startswith("Artifact(mobilenetv1_025 onnx fp32, 3 x 32 x 32 -> 3")


def test_an_artifact_knows_the_network_that_its_run_has_predictions_of(artifact, run: onefold.Run):
    """The report gives an artifact that was not evaluated the score of its network."""
    head = json.loads((run.folder / "predictions.jsonl").read_text().splitlines()[0])
    assert read_manifest(artifact.folder).details["network"] == head["sha256"]


def test_a_session_takes_pictures_and_lists(artifact, photos: Path):
    image = Image.open(photos / "green/3.png")
    with onefold.load(artifact) as session:
        logits = session([image, np.asarray(image)])
        assert logits.shape == (2, 3)
        assert np.array_equal(logits[0], logits[1])
        assert np.array_equal(session(image)[0], logits[0])


def test_load_model_takes_what_the_command_line_takes(run: onefold.Run, fused, artifact):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = onefold.load_model(fused)[0](x)
        for source in (run, str(run.folder), fused.path, artifact, artifact.folder):
            model, card = onefold.load_model(source)
            assert isinstance(model, nn.Module)
            assert card.classes == CLASSES
            assert torch.allclose(model(x), expected, atol=1e-4)


def test_a_run_that_is_not_at_its_end_is_said(
    run: onefold.Run, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Its best weights so far were fused and predicted with, without a word."""
    stopped = tmp_path / "stopped"
    shutil.copytree(run.folder, stopped)
    onefold.fuse(stopped, tmp_path / "fused.safetensors")
    assert "stopped" not in caplog.text
    recipe = json.loads((stopped / "recipe.json").read_text())
    recipe["plan"]["epochs"] = 30
    (stopped / "recipe.json").write_text(json.dumps(recipe))
    for use in (
        lambda: onefold.fuse(stopped, tmp_path / "fused.safetensors"),
        lambda: onefold.predict(stopped, photos / "red"),
    ):
        caplog.clear()
        use()
        said = f"{stopped}: epoch 1 of 30: stopped, or not finished yet; the best weights so far are taken"
        assert caplog.text.count(said) == 1


def test_a_module_is_fused_and_exported(tmp_path: Path):
    model = onefold.create_model("mobilenetv1_025", num_classes=4).eval()
    assert isinstance(onefold.fuse(model), nn.Module)
    assert isinstance(onefold.fuse(model, example=torch.randn(1, 3, 32, 32)), nn.Module)
    [made] = onefold.export(model, ["onnx"], model="mobilenetv1_025", img_size=32, out=tmp_path)
    assert (made.fused, made.model, made.num_classes) == (True, "mobilenetv1_025", 4)
    with pytest.raises(BadArgument, match="train mode"):
        onefold.export(model.train(), out=tmp_path)


def test_an_int8_network_is_made_in_memory_and_exported(fused, photos: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    int8 = onefold.quantize(fused, photos, calibrate=10)
    assert int8.model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert "calibrated on 10 images" in repr(int8)
    artifact = int8.export("onnx", out=tmp_path)
    assert (artifact.precision, artifact.folder) == ("int8", tmp_path / "onnx-int8")
    assert artifact(photos / "red/0.png").names == onefold.predict(artifact, [photos / "red/0.png"]).names


def test_a_report_is_written_of_folders(run: onefold.Run, tmp_path: Path):
    page = onefold.report(run.folder, out=tmp_path / "page.html")
    assert Path(page).read_text().startswith("<!")
    assert "1 run" in repr(page)


def test_a_report_says_what_lies_beside_it(run: onefold.Run, artifact, tmp_path: Path, caplog):
    with caplog.at_level("INFO"):
        onefold.report(run.folder.parent, out=tmp_path / "page.html")
    assert f"not in the report, as they were not given: {artifact.folder.parent.as_posix()}/" in caplog.text
    caplog.clear()
    onefold.report(run.folder.parents[1], out=tmp_path / "page.html")
    assert "not in the report" not in caplog.text


def test_a_script_hears_of_progress_now_and_then(capsys, monkeypatch):
    from onefold.commands import progress_bars

    monkeypatch.setattr(progress_bars, "_FIRST_S", 0.0)
    with progress_bars.show_progress():
        progress_bars._logger.debug("calibrating", extra={"done": 1, "total": 5})
    assert capsys.readouterr().err == "calibrating (2 of 5): 0 s\n"


# ------------------------------------------------------------------------------------------- the face


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("give --data FOLDER, with train/", "give data=FOLDER, with train/"),
        ("or --max-drop 5.", "or max_drop=5."),
        ("fit one: --head probe", "fit one: head='probe'"),
        ("train with --no-check", "train with no_check=True"),
        ("--plan.distill.teacher RUN, weights", 'changes={"plan.distill.teacher": RUN}, weights'),
        ("by `onefold train --resume runs/c`", "by `onefold train --resume runs/c`"),
        ("for 8 bits (onefold train --int8), win", "for 8 bits (onefold train --int8), win"),
        ("a -- b, x--y", "a -- b, x--y"),
    ],
)
def test_an_error_has_arguments_in_python_and_flags_on_the_command_line(flags: str, arguments: str, monkeypatch):
    assert str(BadArgument(flags)) == arguments
    monkeypatch.setattr(onefold.OnefoldError, "on_command_line", True)
    assert str(BadArgument(flags)) == flags


def test_an_argument_that_a_verb_does_not_have_is_one_that_was_meant():
    with pytest.raises(TypeError, match=r"train\(\) has no argument 'image_size': did you mean 'img_size'\?"):
        onefold.train("photos", image_size=64)
    with pytest.raises(TypeError, match=r"predict\(\) has no argument 'zzz': it has source, images, "):
        onefold.predict("run", "cat.jpg", zzz=1)


def test_help_of_a_verb_that_is_a_package_has_its_parameters():
    import pydoc

    assert "    img_size: 'int | None' = None," in pydoc.plain(pydoc.render_doc(onefold.train))


def test_what_is_no_picture_yet_is_told_what_to_give():
    from onefold.data import Preprocessing
    from onefold.data.image_inputs import prepare_image

    preprocessing = Preprocessing(size=32)
    for image, remedy in (
        (torch.rand(3, 40, 48), r"give \(x \* 255\)\.round\(\)\.to\(torch\.uint8\)"),
        (torch.rand(3, 40, 48) * 255, r"give x\.round\(\)\.to\(torch\.uint8\)"),
        (np.zeros((40, 48, 3), np.int64), r"give x\.astype\(np\.uint8\)"),
    ):
        with pytest.raises(BadArgument, match=remedy):
            prepare_image(image, preprocessing)


@pytest.mark.parametrize("verb", [*VERBS, "deploy"])
def test_a_verb_has_the_options_and_defaults_of_the_command_line(verb: str):
    """All but what is about printing, processes, and showing recipes."""
    printing = {"as_json", "list_recipes", "show", "processes", "max_restarts", "context", "source", "sources"}
    command = next(c for c in app.registered_commands if c.callback.__name__ == verb).callback
    theirs = {k: p.default for k, p in inspect.signature(command).parameters.items() if k not in printing}
    ours = {k: p.default for k, p in inspect.signature(getattr(onefold, verb)).parameters.items()}
    written = {"out", "sort_into", "images"} if verb == "predict" else {"log_to", "pin", "plant"}
    assert set(theirs) - set(ours) - written <= {"out"}
    for name in set(theirs) & set(ours) - written - {"out", "results", "to"}:
        default = theirs[name]
        assert ours[name] in (default, None if default is inspect.Parameter.empty else default, inspect.Parameter.empty)


def test_a_package_and_its_verb_share_a_name():
    import onefold.train.loop as loop
    from onefold.train import Plan

    assert onefold.train.loop is loop
    assert onefold.train.Plan is Plan
    for package in (onefold.train, onefold.bench, onefold.quantize, onefold.report):
        assert callable(package)
        assert "Raises" in inspect.getdoc(package)
        assert inspect.signature(package).parameters.keys() & {"out", "results", "data"}


@pytest.mark.parametrize("name", [*VERBS, "deploy", "quantize", "report", "load", "load_model"])
def test_help_says_errors_and_an_example(name: str):
    text = inspect.getdoc(getattr(onefold, name))
    assert "Raises" in text
    assert "onefold." in text


def test_the_verbs_are_called_before_anything_is_imported():
    """`onefold.train` is callable whether its package was imported first or not; the import alone brings no torch."""
    code = (
        "import sys, onefold; assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "from onefold.train import Plan\n"
        "assert callable(onefold.train) and callable(onefold.report) and callable(onefold.bench)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_networks_repr_has_a_line_a_stage():
    model = onefold.create_model("mobileone_s0")
    assert len(repr(model).splitlines()) == 8
    assert "5,293,272 parameters" in repr(model)
    assert len(nn.Module.__repr__(model).splitlines()) > 500


def test_pretrained_is_a_sentence():
    with pytest.raises(BadArgument, match=r"weights='timm/mobileone_s0.apple_in1k', of the Hugging Face hub"):
        onefold.create_model("mobileone_s0", pretrained=True)


def test_a_recipe_that_needs_weights_takes_the_released_ones(photos: Path, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    arguments = ["train", "--recipe", "photos:finetune", "--data", str(photos), "-b", "8"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 10  # which cannot be fetched here
    error = capsys.readouterr().err
    assert "starts from timm/mobileone_s0.apple_in1k of the Hugging Face hub" in error
