"""timm's networks through a training: weights, preprocessing, heads, cards, resumes, and what is made of a run."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import onefold
from onefold.commands.fuse import fuse
from onefold.commands.open_network import open_network
from onefold.commands.saved_recipe import read_recipe
from onefold.commands.train import Callbacks
from onefold.errors import BadArgument, BadCheckpoint, MissingExtra, Stopped
from onefold.models.load_model import read_card

NAME = "timm:test_byobnet.r160_in1k"
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("timm") / "photos", np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 4)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def trained(photos: Path, out: Path, **changed: Any) -> onefold.Run:
    options: dict[str, Any] = {"model": NAME, "img_size": 32, "epochs": 1, "batch_size": 6, "threads": 1}
    options |= {"quiet": True, "no_check": True, "changes": {"plan.workers": 0, "plan.ema": None}} | changed
    return onefold.train(photos, out=out, **options)


@pytest.fixture(scope="module")
def run(timm, photos: Path) -> onefold.Run:
    return trained(photos, photos.parent / "scratch")


@pytest.fixture(scope="module")
def weights(timm, photos: Path) -> Path:
    """A state dict as timm writes it, of a thousand classes."""
    torch.manual_seed(0)
    path = photos.parent / "w.safetensors"
    save_file(timm.create_model(NAME.removeprefix("timm:")).state_dict(), path)
    return path


@pytest.mark.slow
def test_a_run_has_the_networks_preprocessing_and_is_opened_by_the_verbs(run, photos, tmp_path):
    told = read_recipe(run.folder).preprocessing
    assert (told.size, told.crop_pct, told.interpolation, told.mean) == (32, 0.95, "bicubic", (0.485, 0.456, 0.406))
    card = read_card(run.best.weights)
    assert (card.model, card.classes, card.untrained, card.licence) == (NAME, tuple(COLOURS), False, "")
    assert card.recipe == "photos:scratch"
    assert run.evaluate()[0].score.count == 12
    assert len(run.predict(photos / "val" / "red")) == 4
    model, same = onefold.load_model(run)
    assert same == card
    fused = run.fuse(tmp_path / "f.safetensors")
    again = open_network(fused.path)
    assert again.is_fused
    images = again.random_images()
    with torch.no_grad():
        assert torch.allclose(model(images), again.model(images), atol=1e-4)


@pytest.mark.slow
def test_fine_tuning_from_a_run_begins_with_a_fitted_head(run, photos, tmp_path):
    tuned = trained(photos, tmp_path / "tuned", weights=run, recipe="photos:finetune")
    assert [each["epoch"] for each in tuned.history] == [0, 1]
    assert tuned.history[0]["top1"] == 100.0  # three colours: their features are told apart by a linear layer
    probed = trained(photos, tmp_path / "probed", weights=run, recipe="photos:probe", epochs=None)
    assert probed.best.top1 == 100.0
    assert read_card(tuned.best.weights).source.endswith("(trained on photos)")


def test_weights_of_a_file_bring_licence_and_classes(weights, photos, tmp_path, caplog):
    caplog.set_level("INFO")
    tuned = trained(photos, tmp_path / "a", model=f"{NAME}@{weights}", recipe="photos:finetune", epochs=1)
    recipe, card = read_recipe(tuned.folder), read_card(tuned.best.weights)
    assert (recipe.model, recipe.weights) == (NAME, str(weights))
    assert (card.licence, card.num_classes) == ("apache-2.0", 3)
    assert "w.safetensors (timm" in card.source
    with pytest.raises(BadArgument, match=r"names weights, and weights= .* others: give one"):
        trained(photos, tmp_path / "b", model=f"{NAME}@{weights}", weights=weights)


def test_a_folder_as_the_hub_has_it_says_how_images_are_prepared(weights, photos, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights.read_bytes())
    stated = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "input_size": [3, 32, 32], "license": "cc-by-4.0"}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": stated}))
    tuned = trained(photos, tmp_path / "run", weights=folder, recipe="photos:probe", epochs=None, img_size=None)
    told, card = read_recipe(tuned.folder).preprocessing, read_card(tuned.best.weights)
    assert (told.size, told.mean, told.crop_pct, told.interpolation) == (32, (0.5,) * 3, 0.9, "bicubic")
    assert card.licence == "cc-by-4.0"


def test_the_hubs_weights_are_asked_for_where_a_recipe_needs_some(timm, photos, tmp_path, monkeypatch, weights):
    asked = []

    def download(repo_id: str, name: str) -> Path:
        asked.append((repo_id, name))
        (tmp_path / "config.json").write_text("{}")
        return weights if name == "model.safetensors" else tmp_path / "config.json"

    monkeypatch.setattr("onefold.models.locate_weights._download", download)
    tuned = trained(photos, tmp_path / "run", model="timm:test_byobnet", recipe="photos:probe", epochs=None)
    assert asked[0] == ("timm/test_byobnet.r160_in1k", "model.safetensors")
    assert read_recipe(tuned.folder).weights == "timm/test_byobnet.r160_in1k"


def test_what_cannot_be_trained_is_said_before_any_work(timm, weights, photos, tmp_path, monkeypatch):
    run = tmp_path / "stored.safetensors"
    fuse(f"{NAME}@{weights}", run)
    with pytest.raises(BadArgument, match="timm has no model 'test_byobnett': did you mean test_byobnet"):
        trained(photos, tmp_path / "a", model="timm:test_byobnett")
    with pytest.raises(BadArgument, match=r"holds weights of timm:test_byobnet\S*, not of mobileone_s0: give model="):
        trained(photos, tmp_path / "a", model="mobileone_s0", weights=run)
    with pytest.raises(BadCheckpoint, match=r"holds weights of timm:test_byobnet\S*, not of timm:test_resnet"):
        trained(photos, tmp_path / "a", model="timm:test_resnet", weights=run)
    with pytest.raises(BadArgument, match="takes images of 224 pixels alone, not of 32"):
        trained(photos, tmp_path / "a", model="timm:levit_128s")
    with pytest.raises(BadCheckpoint, match=r"does not fit timm:test_resnet .*fc\.weight is 1000x256, and not 1000x96"):
        trained(photos, tmp_path / "a", model="timm:test_resnet", weights=weights)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r'needs timm.*pip install "onefold\[timm\]"'):
        onefold.train(photos, model=NAME, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(run, photos, tmp_path):
    whole = trained(photos, tmp_path / "whole", epochs=2, changes={"plan.workers": 0, "plan.ema.warmup": True})

    steps = []

    def stop(progress: Any) -> None:
        steps.append(progress)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        trained(
            photos,
            tmp_path / "cut",
            epochs=2,
            changes={"plan.workers": 0, "plan.ema.warmup": True},
            callbacks=Callbacks(on_progress=stop),
        )
    resumed = onefold.train(resume=tmp_path / "cut", threads=1, quiet=True)
    assert resumed.best.weights.read_bytes() == whole.best.weights.read_bytes()
    for name in ("model.safetensors", "ema.safetensors", "state.safetensors"):
        assert (whole.folder / "last" / name).read_bytes() == (resumed.folder / "last" / name).read_bytes()


@pytest.mark.slow
def test_int8_aware_training_is_of_the_folded_network(run, photos, tmp_path, caplog):
    caplog.set_level("INFO")
    made = trained(photos, tmp_path / "int8", weights=run, recipe="photos:int8")
    assert "trains for int8 with its norms folded" in caplog.text
    network = open_network(made)
    assert network.is_fused
    assert network.int8_model() is not None
    assert made.evaluate()[0].score.count == 12


@pytest.mark.slow
def test_a_grey_network_takes_sums_of_the_colours_weights(run, tmp_path):
    digits = onefold.train(
        "digits",
        model=NAME,
        weights=run,
        recipe="photos:probe",
        img_size=32,
        threads=1,
        quiet=True,
        no_check=True,
        out=tmp_path / "digits",
        changes={"plan.workers": 0, "preprocessing.channels": 1, "preprocessing.mean": [0.5], "preprocessing.std": [1]},
    )
    assert digits.best.top1 > 20.0
    assert read_card(digits.best.weights).in_chans == 1


@pytest.mark.parametrize("kind", ["4 channels", "1 channel", "no head"])
def test_a_fine_tuning_starts_from_a_file_of_other_channels_or_without_a_head(timm, photos, tmp_path, kind):
    torch.manual_seed(0)
    options = {"num_classes": 0} if kind == "no head" else {"num_classes": 3, "in_chans": int(kind[0])}
    torch.save(timm.create_model("lcnet_035", **options).state_dict(), tmp_path / "w.pth")
    made = trained(
        photos, tmp_path / "run", recipe="photos:finetune", model="timm:lcnet_035", weights=tmp_path / "w.pth"
    )
    assert made.evaluate()[0].score.count == 12
    card = read_card(made.best.weights)
    assert (card.num_classes, card.in_chans) == (3, 1 if kind == "1 channel" else 3)
