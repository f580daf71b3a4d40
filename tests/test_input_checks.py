"""What is mistyped - a verb, an option, a path, a name - is told before torch is imported, in the verb's own words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from onefold.cli.main import app
from onefold.commands import input_checks
from onefold.errors import BadCheckpoint, NetworkFailed
from onefold.models import locate_weights
from onefold.recipes import all_recipes, make_recipe

NO_FILE = "there is no file gone.safetensors: give weights as .safetensors, .pth, .npz or .h5"
NO_PLACE = "gone is not there: expected a folder of images, or the word digits"
NO_ARTIFACT = "expected an artifact folder at gone, found nothing there"
FINETUNE = "train --recipe photos:finetune --data photos"

WRONG = [  # what is typed, the exit status, and what stands in the sentence
    ("trian --data photos", 2, "No such command 'trian'"),
    ("train --data photos --epoch 3", 2, "train has no option --epoch: did you mean --epochs?"),
    ("train --data photos --plan.epoch 3", 2, "recipe.plan has no field 'epoch': did you mean 'epochs'?"),
    ("train --data photos --plan.epochs many", 2, "plan.epochs"),
    ("train --recipe photos:finetun --data photos", 2, "there is no recipe 'photos:finetun': did you mean photos:fine"),
    ("train --data gone", 3, NO_PLACE),
    ("train --data photos --val gone", 3, NO_PLACE),
    ("train --data photo", 3, "photo is not there; did you mean photos?"),
    ("train --data fotos", 3, "fotos is not there; did you mean photos?"),
    (f"{FINETUNE} --weights wieghts.npz", 4, "there is no file wieghts.npz; did you mean weights.npz?"),
    ("fuse photos/a.pgn", 4, "there is no photos/a.pgn; did you mean photos/a.png?"),
    ("fuse runs/photos-fintune", 4, "there is no runs/photos-fintune; did you mean runs/photos-finetune?"),
    ("train --data photos --model mobileone_s", 2, "did you mean mobileone_s0 or mobileone_s1 or mobileone_s2?"),
    ("export weights.npz --data photos", 2, "--data is for int8, not fp32: add --precision int8, or leave --data out"),
    ("export weights.npz --per-tensor", 2, "--weight-bits and --per-tensor are of int8, not fp32"),
    ("train --resume Photo", 4, "Photo is not a run: it has no recipe.json; did you mean photos?"),
    ("fuse wieghts.npz", 4, "there is no file wieghts.npz; did you mean weights.npz?"),
    ("fuse photos/b.npz", 4, "there is no file photos/b.npz: give weights as .safetensors, .pth, .npz or .h5"),
    ("deploy foto/a.safetensors --data photos", 4, "there is no file foto/a.safetensors"),
    ("predict weights.npz photo/a.jpg --classes weigths.npz", 3, "cannot read weigths.npz: No such file or directory;"),
    ("report photo", 3, "give folders with runs, results or artifacts; did you mean photos?"),
    ("train --data photos --model mobileone_s9", 2, "there is no model 'mobileone_s9': did you mean mobileone_s4"),
    ("train --data photos --model mobileone_so", 2, "there is no model 'mobileone_so': did you mean mobileone_s0?"),
    (f"{FINETUNE} --weights gone.safetensors", 4, NO_FILE),
    (f"{FINETUNE} --weights runs/gone", 4, "there is no runs/gone: the folder runs holds photos-finetune; for"),
    ("train --recipe photos:distill --data photos --teacher gone.safetensors", 4, NO_FILE),
    ("train --recipe photos:distill --data photos --teacher mobileone_s0@gone.safetensors", 4, NO_FILE),
    ("train --resume gone", 4, "gone is not a run: it has no recipe.json"),
    ("train --resume run --data gone", 4, "run is not a run"),
    ("data gone", 3, NO_PLACE),
    ("models mobilone*", 2, "no model is called like 'mobilone*'"),
    ("eval gone.safetensors", 4, NO_FILE),
    ("eval timm:resnet18@gone.safetensors", 4, NO_FILE),
    ("eval weights.npz --data gone", 3, NO_PLACE),
    ("eval weights.npz --data photos --classes gone.txt", 3, "cannot read gone.txt"),
    ("eval weights.npz --data photos --model mobileone_s9", 2, "there is no model 'mobileone_s9'"),
    ("predict gone.safetensors photos", 4, NO_FILE),
    ("predict photos photos", 4, "photos is a folder without model.safetensors"),
    ("predict empty.npz photos", 4, "empty.npz is empty: get it again"),
    ("fuse gone.safetensors", 4, NO_FILE),
    ("fuse gone.safetensors --tolerence 1", 2, "fuse has no option --tolerence: did you mean --tolerance?"),
    ("export gone.safetensors", 4, NO_FILE),
    ("export weights.npz --to onxx", 2, "there is no runtime 'onxx'; did you mean 'onnx'?"),
    ("export weights.npz --precision int9", 2, "onnx cannot export 'int9'; choose one of: fp32, int8"),
    ("export weights.npz --precision int8 --data gone", 3, NO_PLACE),
    ("deploy gone.safetensors --data photos", 4, NO_FILE),
    ("deploy weights.npz --data gone", 3, NO_PLACE),
    ("deploy weights.npz --data photos --val gone", 3, NO_PLACE),
    ("deploy weights.npz --data photos --to onnx,openvno", 2, "there is no runtime 'openvno'; did you mean 'openvino'"),
    ("bench weights.npz gone.safetensors", 4, NO_FILE),
    ("profile gone", 4, NO_ARTIFACT),
    ("phone gone", 4, NO_ARTIFACT),
    ("report gone", 3, "gone is not a folder"),
    ("advise mobileone_s0 --to onxx", 2, "there is no runtime 'onxx'"),
    ("advise mobileone_s0 --data gone", 3, NO_PLACE),
    ("study brnches", 2, "there is no study 'brnches'"),
    ("limits --threads two", 2, "--threads takes numbers from 1 to 1024 by comma"),
    ("demo --epochs 0", 2, "--epochs"),
    ("info --jsn", 2, "info has no option --jsn"),
]  # fmt: skip

RUN = """
import contextlib, io, json, sys
sys.modules["torch"] = None  # an import of it fails
from onefold.cli import main
for line in sys.stdin:
    stderr = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        status = main(line.split())
    print(json.dumps([status, stderr.getvalue()]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and stderr of each command, all of them run in one process in which torch cannot be imported."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "photos").mkdir()
    (folder / "runs" / "photos-finetune").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "photos" / "a.png")
    (folder / "weights.npz").write_bytes(b"PK")
    (folder / "empty.npz").write_bytes(b"")
    typed = [line for line, _, _ in WRONG]
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=folder, input="\n".join(typed), capture_output=True, text=True, check=True)
    return {line: tuple(json.loads(answer)) for line, answer in zip(typed, done.stdout.splitlines(), strict=True)}


@pytest.mark.parametrize(("typed", "status", "sentence"), WRONG)
def test_what_is_mistyped_costs_no_import_of_torch(
    answers: dict[str, tuple[int, str]], typed: str, status: int, sentence: str
):
    found, said = answers[typed]
    assert (found, said.count("error: "), said.count("\n")) == (status, 1, 1), said
    assert sentence in said


def test_every_verb_is_asked():
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert verbs == {line.split()[0] for line, _, _ in WRONG} - {"trian"}


def test_what_lies_here_comes_before_what_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = list[str]()

    def download(repo_id: str, name: str) -> Path:
        asked.append(repo_id)
        raise NetworkFailed("no network")

    monkeypatch.setattr(locate_weights, "_download", download)
    with pytest.raises(BadCheckpoint, match="there is no file"):
        input_checks.check_inputs("owner/name", str(tmp_path / "gone.npz"))
    assert asked == []
    with pytest.raises(NetworkFailed):
        input_checks.check_inputs("owner/name")
    assert asked == ["owner/name"]


def test_a_recipe_that_is_shown_needs_no_photos_and_no_weights():
    names = ("val", "model", "start", "head", "teacher", "batch_size", "lr", "seed", "resume", "img_size", "epochs")
    options = {**dict.fromkeys(names), "int8": False, "scale_to_batch": None, "log_to": "", "weights": "gone.npz"}
    options |= {"recipe": "photos:finetune", "data": "gone"}
    input_checks.check_training_inputs(options, {}, is_shown=True)
    with pytest.raises(ValueError, match="gone is not there"):
        input_checks.check_training_inputs(options, {}, is_shown=False)
    assert make_recipe("photos:finetune", {}) in all_recipes()
