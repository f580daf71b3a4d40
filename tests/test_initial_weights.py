"""What a run starts from, through the main road: fused weights as they are, expanded, with a fitted head; teachers."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from conftest import shaken
from onefold.cli import main
from onefold.commands import initial_weights
from onefold.commands.export import ExportOptions, export_to_runtimes
from onefold.commands.initial_weights import _tell_differences, licence_and_source, with_preprocessing_of_weights
from onefold.commands.open_network import ModelNameCheck, Network, make_predictor, open_network
from onefold.commands.teachers import Student, TeacherAdapter, TeacherEnsemble, open_teacher, open_teachers
from onefold.commands.train import Callbacks, resume_run, start_run
from onefold.data import Preprocessing
from onefold.errors import BadArgument, MissingExtra, NonFiniteLoss
from onefold.models import create_model
from onefold.models.load_model import Card, load_model, read_card, save_weights
from onefold.recipes import Recipe, find_recipe, override, with_epochs
from onefold.reparam import fuse, unfused_norms
from onefold.train import Checkpoint, Distill, fit_linear_probe
from training_kit import StoppedError, stop_at

NAME, SIZE = "mobilenetv1_025", 32
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (210, 50, 40)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured noise, eight images to train on and four to validate on of each."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def weights(path: Path, *, fused: bool, num_classes: int = 7, name: str = NAME, seed: int = 0) -> Path:
    """A file of weights in our own format."""
    torch.manual_seed(seed)
    model = shaken(create_model(name, num_classes=num_classes))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    model = fuse(model.eval()) if fused else model.eval()
    card = Card(
        model=name,
        num_classes=num_classes,
        in_chans=3,
        classes=tuple(sorted(COLOURS)) if num_classes == len(COLOURS) else None,
        preprocessing=Preprocessing(size=SIZE).to_dict(),
        fused=fused,
    )
    save_weights(model, path, card)
    return path


def recipe(photos: Path, source: Path, name: str = "photos:finetune", **changes: str) -> Recipe:
    """A recipe shrunk to one epoch of small images."""
    small = find_recipe(name, SIZE)
    small = small if name == "photos:probe" else with_epochs(small, 1)
    given = {"data.spec": str(photos), "weights": str(source), "model": NAME, "plan.batch_size": "6"}
    return override(small, {**given, "plan.workers": "0", "start": "plain", **changes})


# ------------------------------------------------------------------------------------ where it begins


@pytest.mark.parametrize("fused", [True, False])
def test_a_probe_is_fitted_scored_and_kept_without_a_step(fused, photos, tmp_path, caplog):
    caplog.set_level("INFO", "onefold")
    source = weights(tmp_path / "w.safetensors", fused=fused)
    done = start_run(recipe(photos, source, "photos:probe"), tmp_path / "run")
    assert done.epoch == 0
    assert done.top1 >= 50.0  # of three classes, by features that know nothing
    assert "a new last layer, for 3 classes, replaces its own for 7" in caplog.text
    assert "fitted to 24 images" in caplog.text
    model, card = load_model(done.weights)
    assert (card.num_classes, card.classes, card.fused) == (3, ("blue", "green", "red"), fused)
    before, _ = load_model(source)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]) or name.startswith("head.")
    assert resume_run(tmp_path / "run").top1 == done.top1
    assert "train without branches" not in caplog.text  # nothing trains


def test_an_expanded_run_starts_from_the_fused_function_and_trains_branches(photos, tmp_path, caplog):
    caplog.set_level("INFO", "onefold")
    source = weights(tmp_path / "w.safetensors", fused=True, num_classes=3)
    losses = []
    for start in ("plain", "expanded"):
        run = tmp_path / start
        start_run(recipe(photos, source, start=start, head="kept"), run)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses += [line["val_loss"] for line in lines if line["kind"] == "evaluation"]
        names = Checkpoint.load(run).weights
        assert any(name.endswith("running_var") for name in names) == (start == "expanded")
        assert caplog.text.count("train without branches and norms; --start expanded restores both") == 1
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("start", ["plain", "expanded"])
def test_a_run_from_fused_weights_resumes_to_the_bit_though_the_weights_are_gone(start, photos, tmp_path):
    source = weights(tmp_path / "w.safetensors", fused=True)
    told = recipe(photos, source, start=start, **{"plan.epochs": "2"})
    whole = start_run(told, tmp_path / "whole")

    with pytest.raises(StoppedError):
        start_run(told, tmp_path / "cut", callbacks=Callbacks(on_progress=stop_at(2, 2)), check=False)
    source.unlink()
    resumed = resume_run(tmp_path / "cut")
    assert resumed.top1 == whole.top1
    assert Checkpoint.load(tmp_path / "cut").digest() == Checkpoint.load(tmp_path / "whole").digest()
    assert unfused_norms(load_model(resumed.weights)[0]) == [] or start == "expanded"


def test_frozen_stages_stay_as_the_weights_had_them(photos, tmp_path):
    source = weights(tmp_path / "w.safetensors", fused=False)
    told = recipe(photos, source, **{"plan.freeze": '["stem", "stages.0", "stages.1"]', "plan.optimizer.lr": "0.001"})
    start_run(told, tmp_path / "run")
    before, after = load_model(source)[0].state_dict(), Checkpoint.load(tmp_path / "run").weights
    for name, value in before.items():
        if not name.startswith("head."):
            frozen = name.startswith(("stem.", "stages.0.", "stages.1."))
            assert torch.equal(value, after[name]) == frozen, name


def test_a_network_that_diverged_is_not_told_in_the_words_of_the_fusing_gate():
    """Whether a training diverges in one step depends on the processor; that its logits are not finite does not."""
    model = create_model(NAME, num_classes=2).eval()
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("inf"))
    network = Network(model=model, card=Card(model=NAME, num_classes=2), title="x")
    for tolerance in (math.inf, 1e-4):
        with pytest.raises(NonFiniteLoss, match=r"not finite.*training has diverged.*lower plan\.optimizer\.lr"):
            network.fused(tolerance=tolerance)


def test_what_needs_weights_says_so(photos, tmp_path):
    told = recipe(photos, Path("x"), **{"weights": "none"})
    with pytest.raises(BadArgument, match="starts from weights: give weights="):
        start_run(told, tmp_path / "run")
    with pytest.raises(BadArgument, match="where head= is not probe"):
        recipe(photos, Path("x"), "photos:probe", head="kept")


def test_a_fitted_layer_is_where_the_gradient_vanishes():
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 0.1, 1, 0])
    labels = torch.arange(60) % 3
    weight, bias = fit_linear_probe(features, labels, 3)
    std, mean = torch.std_mean(features, 0, correction=0)
    x = ((features - mean) / std)[:, :4].double()
    w = (weight * std)[:, :4].double().requires_grad_()
    b = (bias + weight @ mean).double().requires_grad_()
    (F.cross_entropy(x @ w.T + b, labels) + 1e-3 * w.square().sum()).backward()
    assert max(float(g.abs().max()) for g in (w.grad, b.grad)) < 1e-5
    assert weight[:, 4].abs().max() == 0  # what never varies tells nothing


# ---------------------------------------------------------------------- what belongs to the weights


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for gray images of 96 px and a mean of a half, under a licence."""
    path = tmp_path_factory.mktemp("half") / "half.safetensors"
    own = Preprocessing(size=96, crop_pct=1.0, mean=(0.5,), std=(0.25,), interpolation="bicubic", channels=1)
    card = Card(
        model=NAME, num_classes=3, in_chans=1, preprocessing=own.to_dict(), licence="apple-amlr", source="somebody's"
    )
    save_weights(create_model(NAME, num_classes=3, in_chans=1).eval(), path, card)
    return path


def test_a_recipe_takes_the_preprocessing_of_its_weights_and_says_so(half, caplog):
    caplog.set_level("INFO", "onefold")
    told = override(find_recipe("photos:finetune"), {"weights": str(half), "model": NAME})
    taken = with_preprocessing_of_weights(told, ())
    assert taken.preprocessing == Preprocessing(
        size=96, crop_pct=1.0, mean=(0.5,), std=(0.25,), interpolation="bicubic", channels=1
    )
    assert taken.steps[0].size == 96
    assert "size 96, not 224; crop_pct 1, not 0.875; mean 0.5, not 0.485 0.456 0.406" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "32"),
        ("crop_pct", "0.9"),
        ("interpolation", "bilinear"),
        ("mean", "[0.1, 0.2, 0.3]"),
        ("std", "[0.1, 0.2, 0.3]"),
        ("channels", "3"),
    ],
)
def test_what_the_user_states_stays(field, value, half):
    told = override(
        find_recipe("photos:finetune"), {"weights": str(half), "model": NAME, f"preprocessing.{field}": value}
    )
    taken = with_preprocessing_of_weights(told, [f"preprocessing.{field}"]).preprocessing
    assert getattr(taken, field) == getattr(told.preprocessing, field)
    assert taken.channels == (3 if field in ("mean", "std", "channels") else 1)
    assert len(taken.mean) == len(taken.std) == taken.channels


def test_what_is_stated_otherwise_than_in_the_card_is_said(half, caplog):
    caplog.set_level("INFO", "onefold")
    told = override(
        find_recipe("photos:finetune"), {"weights": str(half), "model": NAME, "preprocessing.interpolation": "nearest"}
    )
    _tell_differences(read_card(half), with_preprocessing_of_weights(told, ["preprocessing.interpolation"]))
    assert "were made for other preprocessing: interpolation bicubic, not nearest" in caplog.text
    caplog.clear()
    network = open_network(half)
    assert network.with_size(96) is network.with_size(None) is network
    assert caplog.text.count("--img-size") == 0
    assert network.with_size(64).preprocessing.size == 64
    assert "its images are 64 pixels here (--img-size), and 96 by its card" in caplog.text


def test_foreign_weights_bring_what_the_catalogue_says_of_them(tmp_path):
    name = "mobilenetv1_025.timm"
    torch.save(create_model(name, num_classes=3).state_dict(), tmp_path / "w.pth")
    told = override(find_recipe("photos:finetune"), {"weights": str(tmp_path / "w.pth"), "model": name})
    taken = with_preprocessing_of_weights(told, ()).preprocessing
    assert (taken.mean, taken.interpolation) == ((0.5, 0.5, 0.5), "bicubic")
    gone = override(told, {"weights": str(tmp_path / "gone.pth")})
    assert with_preprocessing_of_weights(gone, ()) == gone


def test_licence_and_source_go_into_the_run_and_stay_when_it_goes_on(half, tmp_path, photos, caplog):
    told = override(find_recipe("photos:finetune"), {"weights": str(half), "data.spec": str(photos), "model": NAME})
    expected = ("apple-amlr", f"trained on {photos.name}, from half.safetensors (somebody's)")
    assert licence_and_source(told, None) == expected
    card = Card(model=NAME, num_classes=3, licence=expected[0], source=expected[1])
    save_weights(create_model(NAME, num_classes=3).eval(), tmp_path / "best" / "model.safetensors", card)
    gone = override(told, {"weights": str(tmp_path / "gone.safetensors")})
    assert licence_and_source(gone, tmp_path) == expected
    caplog.set_level("INFO", "onefold")
    assert licence_and_source(gone, tmp_path / "empty")[0] == ""
    assert "their licence is not known" in caplog.text


# ------------------------------------------------------------------------------------------- teachers


def student(size: int = SIZE) -> Student:
    own = Preprocessing(size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Student(classes=tuple(sorted(COLOURS)), preprocessing=own, device=torch.device("cpu"))


def test_a_teacher_sees_the_pictures_in_its_own_colours_and_answers_in_our_order(tmp_path):
    source = weights(tmp_path / "w.safetensors", fused=True, num_classes=3)
    teacher = open_teacher(str(source), torch.device("cpu"))
    turned = replace(teacher, classes=("red", "blue", "green"))
    pixels = torch.rand(2, 3, SIZE, SIZE)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.preprocessing.mean, teacher.preprocessing.std))
    with torch.no_grad():
        expected = load_model(source)[0]((pixels - mean) / std)
        got = TeacherEnsemble((TeacherAdapter.between(turned, student()),))((pixels - 0.5) / 0.5)
    torch.testing.assert_close(got[0], expected[:, [1, 2, 0]], rtol=1e-4, atol=1e-4)


def test_an_exported_artifact_teaches_as_the_network_does_at_its_own_size(tmp_path):
    source = weights(tmp_path / "w.safetensors", fused=True, num_classes=3)
    [artifact] = export_to_runtimes(str(source), tmp_path / "a", ExportOptions(runtimes=["onnx"]))
    teachers = [open_teacher(str(s), torch.device("cpu")) for s in (source, artifact.folder)]
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        one, other = (TeacherAdapter.between(teacher, student())(images) for teacher in teachers)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert TeacherAdapter.between(teachers[1], student())(torch.randn(3, 3, 48, 48)).shape == (3, 3)


def test_a_run_learns_from_a_network_and_resumes(photos, tmp_path):
    teacher = weights(tmp_path / "t.safetensors", fused=False, num_classes=3, seed=4)
    told = recipe(photos, Path("x"), "photos:distill", **{"weights": "none", "plan.distill.teacher": str(teacher)})
    done = start_run(told, tmp_path / "run")
    assert resume_run(tmp_path / "run").top1 == done.top1
    assert told.plan.distill == Distill(teacher=str(teacher), targets="soft", temperature=1.0, weight=1.0)


def test_teachers_that_cannot_teach_are_told(photos, tmp_path, monkeypatch):
    other = weights(tmp_path / "w.safetensors", fused=True)
    told = recipe(photos, Path("x"), "photos:distill", **{"weights": "none"})
    here = torch.device("cpu")
    with pytest.raises(BadArgument, match=r"needs a teacher: changes=.\"plan\.distill\.teacher\""):
        open_teachers(told, student().classes, here)
    with pytest.raises(
        BadArgument, match=r"data have 3 classes and the teacher .* has 7, without names: fine-tune the teacher"
    ):
        TeacherAdapter.between(open_teacher(str(other), here), student())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r'pip install "onefold\[timm\]"'):
        open_teacher("timm:resnet18", here)


def test_a_timm_model_teaches_with_the_weights_of_a_file(timm, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "r.pth")
    teacher = open_teacher(f"timm:resnet18@{tmp_path / 'r.pth'}", torch.device("cpu"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(images), model(images))
    assert (teacher.num_classes, teacher.preprocessing.mean) == (3, (0.485, 0.456, 0.406))
    with pytest.raises(BadArgument, match="timm has no model"):
        open_teacher("timm:resnet1800", torch.device("cpu"))


# ----------------------------------------------------------------------------- names that do not fit


def test_norms_tell_which_of_the_names_weights_are_of(tmp_path):
    """Weights whose norms have the statistics of some photos under one name are told from the others by them."""
    torch.manual_seed(0)
    photos = 0.5 + 0.25 * torch.randn(8, 3, 64, 64)
    model = shaken(create_model("mobilenetv1_025.tf", num_classes=3))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
            nn.init.normal_(norm.weight, 3.0)  # maps that reach beyond the 6 of ReLU6
    with torch.no_grad():
        model.train()((photos - 0.5) / 0.5)
    torch.save(model.eval().state_dict(), tmp_path / "w.pth")
    own = {name: open_network(tmp_path / "w.pth", name=name) for name in ("mobilenetv1_025", "mobilenetv1_025.tf")}
    fused = {name: network.fused()[0] for name, network in own.items()}  # whose norms are gone, but not the check
    checks = {name: make_predictor(network).name_check for name, network in fused.items()}
    seen = {name: network.preprocessing for name, network in own.items()}
    said = {
        name: check(
            (
                (photos - torch.tensor(seen[name].mean).view(3, 1, 1)) / torch.tensor(seen[name].std).view(3, 1, 1)
            ).numpy()
        )
        for name, check in checks.items()
        if check is not None
    }
    assert said["mobilenetv1_025.tf"] is None
    assert "does not seem to be mobilenetv1_025:" in said["mobilenetv1_025"]
    assert said["mobilenetv1_025"].endswith("under --model mobilenetv1_025.tf")
    source = weights(tmp_path / "own.safetensors", fused=False, num_classes=3)
    assert ModelNameCheck.from_network(open_network(source), source, NAME) is None  # its card says what it is


@pytest.mark.parametrize(
    ("own", "other", "is_said"),
    [
        (0.0, 0.0, None),
        (0.004, 0.001, None),
        (0.5, 0.0, "under --model mobilenetv1_025."),
        (float("nan"), 0.1, None),
        (0.5, 0.7, None),
        (0.5, 0.5, "whether .* is mobilenetv1_025, or mobilenetv1_025.*cannot be told from these photos at"),
        (0.5, 0.45, "norms by 0.50 and 0.45"),
        (3.0, 1.5, "cannot be told from these photos"),
    ],
)
def test_distances_tell_a_name_or_that_they_do_not(own, other, is_said, tmp_path, monkeypatch):
    torch.save(create_model("mobilenetv1_025", num_classes=3).state_dict(), tmp_path / "w.pth")
    network = open_network(tmp_path / "w.pth", name="mobilenetv1_025")
    assert network.name_check is not None
    monkeypatch.setattr(
        "onefold.commands.open_network._norm_distance", lambda model, _: own if model is network.model else other
    )
    said = network.name_check(np.zeros((1, 3, 32, 32), np.float32))
    assert said is None if is_said is None else re.search(is_said, said)


def test_plain_weights_are_told_of_in_one_line(tmp_path, photos, capsys):
    torch.save(create_model("mobilenetv1_025", num_classes=3).state_dict(), tmp_path / "w.pth")
    photo = str(photos / "val" / "red" / "0.png")
    assert main(["predict", str(tmp_path / "w.pth"), photo, "--model", "mobilenetv1_025"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: {tmp_path / 'w.pth'} does not tell its padding, activation and epsilon or how images are prepared: as "
        "mobilenetv1_025 (224 pixels, mean 0.485 0.456 0.406); if that is wrong: --model mobilenetv1_025.tf, .timm, "
        ".leaky"
    ]


def test_a_network_without_a_last_layer_predicts_nothing(tmp_path, photos, capsys):
    torch.save(create_model(NAME, num_classes=0).state_dict(), tmp_path / "b.pth")
    photo = str(photos / "val" / "red" / "0.png")
    assert main(["predict", str(tmp_path / "b.pth"), photo, "--model", NAME, "--img-size", "32"]) == 4
    assert "has no last layer" in capsys.readouterr().err
    [artifact] = export_to_runtimes(
        str(tmp_path / "b.pth"), tmp_path / "a", ExportOptions(runtimes=["onnx"], size=32), name=NAME
    )
    assert main(["predict", str(artifact.folder), photo]) == 4
    assert main(["eval", str(artifact.folder), "--data", str(photos)]) == 3


def test_a_strided_pointwise_convolution_of_few_channels_is_computed_on_the_pixels_that_it_reads() -> None:
    """Where torch's own weight gradient writes outside its memory in channels_last: the same answer and gradients."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 1, stride=2).double()
    assert initial_weights._crashes_in_channels_last(conv)
    assert not initial_weights._crashes_in_channels_last(torch.nn.Conv2d(64, 8, 1, stride=2))
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = torch.autograd.grad(conv(images.contiguous()).square().sum(), conv.parameters())
    names = list(conv.state_dict())
    conv.__class__ = initial_weights._StridedPointwise
    found = torch.autograd.grad(conv(images).square().sum(), conv.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert list(conv.state_dict()) == names
    assert isinstance(conv, torch.nn.Conv2d)


def test_preprocessing_that_weights_do_not_state_is_not_called_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the catalogue's: of a file without a word on it the crop was called that of the weights."""
    model = create_model("mobileone_s1", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    save_weights(
        model.eval(),
        tmp_path / "own.safetensors",
        Card(model="mobileone_s1", num_classes=3, preprocessing=Preprocessing(size=64, crop_pct=0.8).to_dict()),
    )
    caplog.set_level("INFO", "onefold")
    for name, of in (("plain.pth", "mobileone_s1:"), ("own.safetensors", f"the weights {tmp_path}/own.safetensors:")):
        caplog.clear()
        changes = {"model": "mobileone_s1", "weights": str(tmp_path / name)}
        with_preprocessing_of_weights(override(find_recipe("photos:finetune"), changes), ())
        assert f"preprocessing is that of {of} " in caplog.text
