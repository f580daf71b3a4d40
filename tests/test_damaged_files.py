"""Faults: files that are damaged or hostile, disks that are full. Nothing is lost, and nothing is run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as save_tensors

from onefold import create_model
from onefold.checksums import (
    lines_have_checksum,
    read_sealed_folder,
    read_sealed_json,
    sealed_lines,
    write_sealed_folder,
    write_sealed_json,
)
from onefold.cli import main
from onefold.commands.held_out_images import read_run_data
from onefold.commands.predictor import open_predictor
from onefold.commands.saved_recipe import read_recipe
from onefold.errors import BadCheckpoint, NotWritable, Stopped
from onefold.file_io import parse_json
from onefold.models.load_model import load_model
from onefold.models.weights_file import Card, save_weights
from onefold.recipes import all_recipes
from onefold.report.load_results import load_report_inputs
from onefold.train import Checkpoint, Progress, RunFolder, Steps
from onefold.train.checkpoint import BackgroundWriter
from training_kit import PLAN, fresh

NAME = "mobilenetv1_0.25"


# ----------------------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole run, small."""
    folder = RunFolder(tmp_path_factory.mktemp("faults") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        fresh(folder.path, replace(PLAN, epochs=1))
    return folder


def foreign(rng: random.Random, whole: dict[str, bytes], name: str) -> bytes:
    """A file that belongs elsewhere: noise, a picture, another part of this very checkpoint, an archive, a text."""
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), (rng.randrange(256), 7, 7)).save(picture, "PNG")
    others = [content for part, content in whole.items() if part != name]
    header = rng.randbytes(rng.randrange(1, 400))
    kinds = [
        rng.randbytes(rng.randrange(5000)),
        picture.getvalue(),
        rng.choice(others),
        pickle.dumps({"weight": [rng.random()]}),
        json.dumps({"files": {}, "format": 1, "x": rng.random()}).encode(),
        save_tensors({"weight": torch.full((3,), rng.random())}),
        struct.pack("<Q", len(header)) + header,
        b"<!DOCTYPE html>" + rng.randbytes(20),
    ]
    return kinds[rng.randrange(len(kinds))]


def damage(rng: random.Random, whole: dict[str, bytes]) -> tuple[str, str, bytes]:
    """What was done, to which file, and what is there now: never what was."""
    name = rng.choice(sorted(whole))
    content = whole[name]
    kind = rng.choice(["bit", "bit", "bit", "truncated", "longer", "zeros", "two bits", "swapped", "foreign"])
    damaged = bytearray(content)
    if kind in ("bit", "two bits"):
        for _ in range(2 if kind == "two bits" else 1):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del damaged[rng.randrange(len(damaged)) :]
    elif kind == "longer":
        damaged += rng.randbytes(rng.randrange(1, 100))
    elif kind == "zeros":
        at = rng.randrange(len(damaged))
        damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
    elif kind == "swapped":
        a, b = rng.randrange(len(damaged)), rng.randrange(len(damaged))
        damaged[a], damaged[b] = damaged[b], damaged[a]
    else:
        damaged = bytearray(foreign(rng, whole, name))
    return (kind, name, bytes(damaged)) if damaged != content else damage(rng, whole)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damaged_checkpoint_is_taken_for_a_whole_one(run: RunFolder, tmp_path: Path, count: int) -> None:
    folder, rng, kinds = RunFolder(tmp_path / "run"), random.Random(count), Counter[str]()
    shutil.copytree(run.last, folder.last)
    whole = {path.name: path.read_bytes() for path in folder.last.iterdir()}
    assert Checkpoint.load(folder.path).is_complete
    for _ in range(count):
        kind, name, content = damage(rng, whole)
        (folder.last / name).write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"no undamaged checkpoint in .* damaged") as error:
            Checkpoint.load(folder.path)
        assert "\n" not in str(error.value), (kind, name)
        (folder.last / name).write_bytes(whole[name])
        kinds[kind] += 1
    assert Checkpoint.load(folder.path).is_complete
    print(f"{count} damaged checkpoints refused: {dict(kinds)}")


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_no_damaged_weights_are_taken_for_whole_ones(tmp_path: Path, count: int) -> None:
    """A file of weights that stands alone, with nothing beside it that could vouch for it."""
    path, rng = tmp_path / "weights.safetensors", random.Random(count)
    model = create_model(NAME, num_classes=3)
    save_weights(model, path, Card(model=NAME, num_classes=3, preprocessing={"size": 32}))
    whole = path.read_bytes()
    for _ in range(count):
        kind, _, content = damage(rng, {path.name: whole, "another": whole[:999]})
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint) as error:
            load_model(path)
        assert "\n" not in str(error.value), kind


# ----------------------------------------------------------------------- the rest of a run folder


@pytest.fixture
def run_of_recipe(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run whose checkpoint knows its recipe and one more file, and the recipe."""
    out, recipe = tmp_path / "run", all_recipes()[0].to_dict()
    out.mkdir()
    (out / "recipe.json").write_text(json.dumps(recipe))
    (out / "int8.json").write_text("{}")
    sha256 = {"int8.json": hashlib.sha256(b"{}").hexdigest()}
    fresh(out, replace(PLAN, epochs=1), settings={"recipe": recipe, "sha256": sha256})
    return out, recipe


def test_a_recipe_that_was_edited_is_told_field_by_field(
    run_of_recipe: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = run_of_recipe
    assert read_recipe(out).to_dict() == recipe
    recipe["plan"] |= {"workers": 7}  # changes no result
    (out / "recipe.json").write_text(json.dumps(recipe, indent=4))
    read_recipe(out)
    recipe["plan"] |= {"label_smoothing": 0.3}
    recipe |= {"mixing": {"mixup": 0.8, "cutmix": 0.0}, "dropout": 0.25}
    (out / "recipe.json").write_text(json.dumps(recipe))
    assert main(["train", "--resume", str(out)]) == 4
    said = capsys.readouterr().err
    for field in ("dropout: ", " -> 0.25; ", "mixing: null -> {", "plan.label_smoothing: ", " -> 0.3. Put it back"):
        assert field in said
    assert "workers" not in said


def test_a_file_that_a_resume_depends_on_is_checked(run_of_recipe: tuple[Path, dict[str, Any]]) -> None:
    out, _ = run_of_recipe
    (out / "int8.json").write_text("{ }")
    with pytest.raises(BadCheckpoint, match=r"int8\.json is not as the training wrote it"):
        read_recipe(out)


def test_a_log_that_was_changed_is_said_at_the_resume_and_in_the_report(
    run_of_recipe: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    out, recipe = run_of_recipe
    assert load_report_inputs([out], [], []).notes == ()
    log = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(log.replace('"loss": ', '"loss": 1', 1))
    assert "The log of run was changed" in load_report_inputs([out], [], []).notes[0]
    fresh(out, replace(PLAN, epochs=1), resume=True, settings={"recipe": recipe})
    assert "log.jsonl is not as the training wrote it" in caplog.text
    (out / "recipe.json").write_text(json.dumps(recipe | {"dropout": 0.25}))
    assert "recipe.json of run is not the one" in load_report_inputs([out], [], []).notes[-1]


def flipped(text: str) -> Iterator[str]:
    """A text with a bit of one of its characters flipped, another one each time."""
    for at in range(len(text)):
        yield text[:at] + chr(ord(text[at]) ^ (1 << at % 7)) + text[at + 1 :]


def test_a_flipped_bit_of_sealed_json_changes_nothing_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, values = tmp_path / "data.json", {"a": (1, 2.5, 1e-30), "b": {"11": "ü\udcff", "2": None, "c": True}}
    write_sealed_json(path, values)
    whole, plain = path.read_text(), json.loads(json.dumps(values))
    assert read_sealed_json(path) == plain
    path.write_text(json.dumps(json.loads(whole), indent=7))  # another layout is no damage
    assert read_sealed_json(path) == plain
    assert caplog.text == ""
    refused = 0
    for n, text in enumerate(flipped(whole)):
        path = tmp_path / f"{n}.json"  # that one has no checksum is said once
        path.write_text(text)
        try:
            assert read_sealed_json(path) == plain or f"{path} has no checksum" in caplog.text
        except ValueError:
            refused += 1
    assert refused > len(whole) / 2


def test_json_lines_that_lack_one_or_have_another_are_damaged() -> None:
    whole = sealed_lines({"kind": "predictions"}, [{"name": "a", "label": 0}, {"name": "b", "label": 1}])
    head, first, second = whole.splitlines(keepends=True)
    assert lines_have_checksum(whole)
    assert not lines_have_checksum('{"kind": "predictions"}\n' + first)
    for damaged in (head, head + first, head + second + first, head + first + first, whole + "\n", head[2:] + first):
        with pytest.raises(ValueError, match=r"checksum|Extra data|Expecting"):
            lines_have_checksum(damaged)
    for text in flipped(head):
        if '"checksum"' in text and '"lines_sha256"' in text:
            with pytest.raises(ValueError, match=r"checksum|JSON|:"):
                lines_have_checksum(text + first + second)


def test_what_a_run_keeps_of_its_data_is_checked(
    run_of_recipe: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out, _ = run_of_recipe
    dataset = {"splits": [{"name": "val", "num_images": 7, "source": "val/"}], "classes": ["a"]}
    for name, values in (("data.json", {"dataset": dataset}), ("check.json", {"findings": [{"text": "3 are black"}]})):
        write_sealed_json(out / name, values)
    (out / "predictions.jsonl").write_text(
        sealed_lines({"kind": "predictions", "classes": ["a"]}, [{"label": 0, "answer": 0, "confidence": 0.5}])
    )
    found = load_report_inputs([out], [], [])
    assert (found.notes, found.runs[0].data_findings, len(found.runs[0].dataset)) == ((), ("3 are black",), 1)
    assert found.runs[0].predictions is not None
    for name, was, now in (("data", " 7", " 8"), ("check", "3 are", "4 are"), ("predictions", "0.5", "0.9")):
        (path,) = out.glob(f"{name}.json*")
        path.write_text(path.read_text().replace(was, now))
    assert main(["train", "--resume", str(out)]) == 4
    assert "data.json cannot be read: its checksum is not that of what it holds" in capsys.readouterr().err
    found = load_report_inputs([out], [], [])
    assert sum("damaged and left out" in note for note in found.notes) == 3
    assert (found.runs[0].dataset, found.runs[0].data_findings, found.runs[0].predictions) == ((), (), None)
    (out / "data.json").write_text(json.dumps({"dataset": dataset}))  # as of an older version
    assert read_run_data(out) == {"dataset": dataset}
    assert "data.json has no checksum" in caplog.text
    assert "data.json of run has no checksum" in "".join(load_report_inputs([out], [], []).notes)


@pytest.mark.parametrize("opening", ['{"a": ' * 100_000, "[" * 3000 + "1" + "]" * 3000])
def test_json_without_an_end_is_a_sentence_wherever_it_is_read(
    opening: str, tmp_path: Path, run_of_recipe: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run_of_recipe
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    for name in ("recipe.json", "data.json", "config.json", "manifest.json", "accuracy.json", "labels.jsonl"):
        (tmp_path / name).write_text(opening)
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(opening)
    for name in ("recipe.json", "int8.json", "data.json"):
        shutil.copy(tmp_path / "data.json", out / name)
        assert main(["train", "--resume", str(out)]) == 4
    assert main(["predict", str(tmp_path), str(tmp_path / "x.png")]) == 4
    assert main(["train", "--data", str(tmp_path / "labels.jsonl"), "--out", str(tmp_path / "new")]) in (2, 3)
    (tmp_path / "results.jsonl").write_text(opening)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) in (0, 3)
    assert capsys.readouterr().err.count("internal") == 0


# ----------------------------------------------------------------------------- hostile checkpoints


class Call:
    """Unpickled, it is a call."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.made = (call, args)

    def __reduce__(self) -> Any:
        return self.made


def text_opcodes(module: str, name: str, argument: str) -> bytes:
    """Protocol 0, written by hand: c<module> <name>, one text, a tuple, REDUCE."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickles that make `marker` if they are run, by as many ways of naming a call as there are opcodes for it."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    calls = {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(marker), "w"),
        "mkdir": Call(os.mkdir, str(marker)),
        "nested": Call(list, [Call(tuple, [Call(os.system, touch)])]),
        "import": Call(getattr, Call(__import__, "os"), "system"),
        "torch.load": Call(torch.load, str(marker)),
        "hub": Call(torch.hub.load, "owner/name", "model"),
        "bytearray": Call(bytearray, 10**11),
        "jit": Call(torch.jit.load, str(marker)),
        "numpy.load": Call(np.load, str(marker), None, True),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "path": Call(Path.touch, Path(str(marker))),
    }
    found = {
        f"{name}, protocol {p}": pickle.dumps({"x": call}, protocol=p) for name, call in calls.items() for p in (2,)
    }
    found |= {f"{name}, protocol 4": pickle.dumps(call, protocol=4) for name, call in calls.items()}
    found["GLOBAL by hand"] = text_opcodes("posix", "system", touch)
    found["INST"] = f"(V{touch}\niposix\nsystem\n.".encode()
    found["OBJ"] = b"\x80\x02(cposix\nsystem\nV" + touch.encode() + b"\no."
    found["STACK_GLOBAL"] = b"\x80\x04\x8c\x05posix\x8c\x06system\x93(V" + touch.encode() + b"\ntR."
    found["behind a benign name"] = (
        b"\x80\x02ccollections\nOrderedDict\n(tR0cposix\nsystem\n(V" + touch.encode() + b"\ntR."
    )
    found["extension registry"] = b"\x80\x02\x82\x01(V" + touch.encode() + b"\ntR."
    return found


def legacy(pickled: bytes) -> bytes:
    """The layout of torch.save before it was a zip: magic number, protocol, machine, object, keys."""
    magic = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(magic) + pickled + pickle.dumps([], protocol=2)


def zip_of(entries: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return made.getvalue()


def torch_zip(pickled: bytes, **more: bytes) -> bytes:
    entries = {"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/version": b"3\n"}
    return zip_of({**entries, **{f"archive/{name}": content for name, content in more.items()}})


def legacy_tar(pickled: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(pickled)
            archive.addfile(entry, io.BytesIO(pickled))
    return made.getvalue()


def npz_of(pickled: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return zip_of({"a.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickled})


def scripted(marker: Path) -> bytes:
    """A TorchScript archive: a program, whose loading other loaders call harmless."""
    made = io.BytesIO()
    code = zip_of({})
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("m/code/__torch__.py", f"import os\nos.system('touch {marker}')\n")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/data.pkl", b"\x80\x02c__torch__\nM\n)\x81}b.")
        archive.writestr("m/version", b"3\n")
        archive.writestr("m/extra", code)
    return made.getvalue()


def safetensors_of(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def forged() -> dict[str, bytes]:
    """Files that run nothing, and ask for what they have no right to: memory, other places, an overlap."""

    def entry(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, Any]:
        return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}

    zeros = zip_of({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    return {
        "safetensors: overlap": safetensors_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        "safetensors: hole": safetensors_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
        "safetensors: past the end": safetensors_of({"a": entry([99], 0, 396)}, bytes(8)),
        "safetensors: header of an exabyte": safetensors_of({}, length=1 << 60),
        "safetensors: header longer than the file": safetensors_of({"a": entry([1], 0, 4)}, bytes(4), length=9999),
        "safetensors: negative": safetensors_of({"a": entry([1], 0, -4)}, bytes(4)),
        "safetensors: shape that overflows": safetensors_of({"a": entry([1 << 62, 1 << 62], 0, 4)}, bytes(4)),
        "safetensors: deep": safetensors_of(b'{"a":' * 9000),
        "safetensors: twice": safetensors_of(b'{"a":1,"a":2}'),
        "safetensors: unknown kind": safetensors_of({"a": entry([1], 0, 4, "PICKLE")}, bytes(4)),
        "zip bomb": zeros,
        "zip bomb of .npy": zip_of({"a.npy": bytes(64 << 20)}, zipfile.ZIP_DEFLATED),
        "zip that climbs": zip_of({"../../../etc/data.pkl": b"\x80\x02}."}),
        "zip with two pickles": zip_of({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}),
        "checkpoint of distributed torch": zip_of({".metadata": pickle.dumps(Call(os.system, "true"))}),
        "memo that is not there": b"\x80\x02h\x07.",
        "pickle without an end": b"\x80\x02}q\x00",
        "deep pickle": b"\x80\x02" + b"(" * 100_000 + b".",
    }


def hostile(marker: Path) -> dict[str, bytes]:
    """All of them, in all the containers that a loader might open."""
    found = forged()
    ran = payloads(marker)
    for name, pickled in ran.items():
        found[f"pickle: {name}"] = pickled
    for name in list(ran)[::3]:
        found[f"torch.save: {name}"] = torch_zip(ran[name])
        found[f"old torch.save: {name}"] = legacy(ran[name])
        found[f"npz: {name}"] = npz_of(ran[name])
    found["tar: os.system"] = legacy_tar(ran["os.system, protocol 2"])
    found["TorchScript"] = scripted(marker)
    return found


@pytest.fixture
def stage(tmp_path: Path, run: RunFolder) -> dict[str, Callable[[Path], object]]:
    """Every public way to a checkpoint, each a call that is given a file."""
    picture = tmp_path / "photo.png"
    Image.new("RGB", (16, 16)).save(picture)
    sealed = {path.name: path.read_bytes() for path in run.last.iterdir()}

    def resume(part: str, path: Path) -> None:
        """Somebody has sealed it as their checkpoint, with a manifest that is right."""
        folder = RunFolder(tmp_path / "theirs")
        write_sealed_folder(
            folder.last, {**{n: c for n, c in sealed.items() if n != "manifest.json"}, part: path.read_bytes()}
        )
        fresh(folder.path, replace(PLAN, epochs=1), resume=True)

    def predict(path: Path) -> None:
        if (status := main(["predict", str(path), str(picture)])) != 4:
            raise AssertionError(f"predict ended with {status}")
        raise BadCheckpoint("as it should")

    return {
        "load_model": load_model,
        "create_model": lambda path: create_model(NAME, num_classes=3, weights=path),
        "open_predictor": open_predictor,
        "predict": predict,
        "resume of weights": lambda path: resume("model.safetensors", path),
        "resume of state": lambda path: resume("state.safetensors", path),
        "resume of progress": lambda path: resume("progress.json", path),
    }


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_hostile_is_run_by_any_way_in(
    tmp_path: Path, stage: dict[str, Callable[[Path], object]], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    marker = tmp_path / "ran"
    corpus = hostile(marker)
    assert len(corpus) >= 60
    (tmp_path / "live").write_bytes(payloads(marker)["os.system, protocol 2"])
    pickle.loads((tmp_path / "live").read_bytes())  # a careless reader runs it
    assert marker.exists()
    marker.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, hard))  # a bomb is an error here, and not the end of the machine
    try:
        for kind, content in list(corpus.items())[::every]:
            path = tmp_path / "weights.pth"
            path.write_bytes(content)
            for way, load in stage.items():
                with pytest.raises(BadCheckpoint) as error:
                    load(path)
                assert "\n" not in str(error.value), (kind, way)
                assert not marker.exists(), (kind, way)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    print(f"{len(corpus) // every} hostile files by {len(stage)} ways in: nothing was run, all refused")


# ------------------------------------------------------------- full disks, in the background


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """A block in which no file may grow past that: a write then fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_during_a_run_is_told_at_the_next_step_and_costs_nothing_old(tmp_path: Path) -> None:
    """The run stops with the checkpoint before standing; with room again it goes on to the bits of one in peace."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    told: list[int] = []

    def fill_up(progress: Progress) -> None:
        told.append(progress.step)
        if progress.step == 3 and progress.epoch == 2:
            while Checkpoint.load(tmp_path / "run").position.global_step < 8:  # step 2's is still on its way
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    try:
        with pytest.raises(
            NotWritable, match=r"cannot write .*last: no file may be larger than 1 KiB here .*before it is kept"
        ) as error:
            fresh(tmp_path / "run", on_progress=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.exit_status == 5
    assert len(told) <= 2 * 7  # step 4 of epoch 2 could not be saved: the next save knows at the latest
    assert Checkpoint.load(tmp_path / "run").position.global_step == 8
    done = fresh(tmp_path / "run", resume=True)
    assert done.digest() == fresh(tmp_path / "whole").digest()


def test_a_step_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on while a checkpoint is being written; the run ends when it is."""
    save, let_go, under_way = Checkpoint.save, threading.Event(), []

    def held_up(self: Checkpoint, *where: Any) -> None:
        if self.position.global_step == 2:
            under_way.append(self.position.global_step)
            assert let_go.wait(30)
        save(self, *where)

    def look(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (1, 4):
            assert under_way == [2]  # being written since two steps
            assert Checkpoint.load(tmp_path / "run").position.global_step == 0
            let_go.set()

    monkeypatch.setattr(Checkpoint, "save", held_up)
    plan = replace(PLAN, checkpoint_every=Steps(2))
    fresh(tmp_path / "run", plan, on_progress=look)
    assert let_go.is_set()
    assert Checkpoint.load(tmp_path / "run").is_complete


def test_what_is_written_is_the_state_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that lasts through later steps is not touched by them."""
    digests: dict[int, str] = {}
    save = Checkpoint.save

    def slowly(self: Checkpoint, *where: Any) -> None:
        before = self.digest()
        threading.Event().wait(0.03)
        assert self.digest() == before
        digests[self.position.global_step] = before
        save(self, *where)

    monkeypatch.setattr(Checkpoint, "save", slowly)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    fresh(tmp_path / "run", replace(PLAN, epochs=2, checkpoint_every=Steps(3)))
    assert sorted(digests) == [0, 3, 6, 9, 12]
    with pytest.raises(Stopped):

        def stop(progress: Progress) -> None:
            if (progress.epoch, progress.step) == (2, 3):
                os.kill(os.getpid(), 15)

        fresh(tmp_path / "again", replace(PLAN, epochs=2, checkpoint_every=None), on_progress=stop)
    assert Checkpoint.load(tmp_path / "again").digest() == digests[9]


def test_the_writer_does_one_job_at_a_time_and_none_after_a_failure() -> None:
    done: list[int] = []
    with pytest.raises(NotWritable, match="full"), BackgroundWriter() as writer:
        writer.submit(lambda: done.append(1))
        writer.submit(lambda: done.append(2))

        def fail() -> None:
            raise NotWritable("full")

        writer.submit(fail)
        writer.submit(lambda: done.append(3))
        writer.wait()
        assert writer.has_failed
    assert done == [1, 2]
    with pytest.raises(KeyError, match="ours"), BackgroundWriter() as writer:  # the first error is the one to hear of
        writer.submit(fail)
        raise KeyError("ours")


@pytest.mark.slow
def test_a_small_disk(tmp_path: Path) -> None:
    """A file system of a few pages, of our own: each save meets its end somewhere else."""
    if os.system("unshare -Urm true 2>/dev/null"):
        pytest.skip("needs user namespaces to mount a small disk")
    code = (
        "import sys; sys.path[:0] = [sys.argv[2]]\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from onefold.cli import exit_status\n"
        "from training_kit import fresh\n"
        "sys.exit(exit_status.run_command(lambda: bool(fresh(Path(sys.argv[1]) / 'run')) * 0))\n"
    )
    statuses = {}
    for pages in (8, 14, 17, 19, 40):
        disk = tmp_path / str(pages)
        disk.mkdir()
        inner = f'mount -t tmpfs -o size={4096 * pages} tmpfs {disk} && exec "$@"'
        command = ["unshare", "-Urm", "sh", "-c", inner, "sh", sys.executable, "-W", "ignore", "-c", code, str(disk)]
        done = subprocess.run([*command, str(Path(__file__).parent)], capture_output=True, text=True, check=False)
        statuses[pages] = done.returncode
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0 or "no space to write" in done.stderr, done.stderr
    print(f"exit status by pages of disk: {statuses}")
    assert statuses[8] == 5
    assert statuses[40] == 0


def test_a_manifest_is_checked_at_every_load(run: RunFolder) -> None:
    assert set(read_sealed_folder(run.last)) == {
        "model.safetensors",
        "ema.safetensors",
        "state.safetensors",
        "progress.json",
    }
