"""Checkpoints: whole or refused, at every kill, every flipped bit and every full disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import training_kit
from onefold import file_io
from onefold.checksums import read_sealed_folder, write_sealed_folder
from onefold.errors import BadCheckpoint, NotWritable, RunBusy, Stopped
from onefold.train import Checkpoint, RunFolder, Steps
from onefold.train.checkpoint import load_for_resume, save_best
from training_kit import PLAN, fresh

PARTS = ("model.safetensors", "ema.safetensors", "state.safetensors", "progress.json", "manifest.json")


class Killed(BaseException):
    """What stands for a kill inside of one process."""


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """Checkpoints of successive steps of one run."""
    seen, save = [], Checkpoint.save

    def note(self: Checkpoint, *where: Any) -> None:
        save(self, *where)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", note)
        fresh(tmp_path_factory.mktemp("states") / "run", replace(PLAN, epochs=1, checkpoint_every=Steps(1)))
    return seen[1:5]


@pytest.fixture
def folder(tmp_path: Path, states: list[Checkpoint]) -> RunFolder:
    """A run folder with two checkpoints in it: `previous` of states[0], `last` of states[1]."""
    folder = RunFolder(tmp_path / "run")
    for state in states[:2]:
        state.save(folder, {"model": "blob"})
    return folder


def same(a: Checkpoint, b: Checkpoint) -> bool:
    ours, theirs = (
        (c.plan, c.data, c.position, c.scaler, c.metrics, c.best, c.loss_sum, c.num_images, c.log_bytes, c.made_with)
        for c in (a, b)
    )
    draws = a.randomness.tensors.items()
    drawn = a.randomness.numbers == b.randomness.numbers and all(v.equal(b.randomness.tensors[n]) for n, v in draws)
    return a.digest() == b.digest() and ours == theirs and drawn


def test_a_checkpoint_comes_back_as_it_was(folder: RunFolder, states: list[Checkpoint]) -> None:
    assert same(Checkpoint.load(folder.path), states[1])
    assert not same(states[0], states[1])
    assert sorted(p.name for p in folder.last.iterdir()) == sorted(PARTS)
    assert sorted(p.name for p in folder.path.iterdir()) == ["last", "previous"]  # nothing is left beside them


def test_the_manifest_says_what_sha256sum_says(folder: RunFolder) -> None:
    listed = json.loads((folder.last / "manifest.json").read_text())["files"]
    assert sorted(listed) == sorted(PARTS[:-1])
    for name, entry in listed.items():
        content = (folder.last / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# ---------------------------------------------------------------------------------------- damage


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def damages(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """Bits flipped, ends cut off, bytes added, a page of zeros."""
    yield from (flipped(content, rng.randrange(8 * len(content))) for _ in range(30))
    yield from (content[: rng.randrange(len(content))] for _ in range(8))
    yield content + b"\0"
    at = rng.randrange(len(content) // 2)
    yield content[:at] + bytes(len(content[at : at + 4096])) + content[at + 4096 :]


@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_last_gives_way_to_the_previous(
    folder: RunFolder, states: list[Checkpoint], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    whole = (folder.last / name).read_bytes()
    for damaged in damages(whole, random.Random(name)):
        if damaged == whole:
            continue
        caplog.clear()
        (folder.last / name).write_bytes(damaged)
        assert same(Checkpoint.load(folder.path), states[0])
        assert f"{folder.last}/" in caplog.text
        assert "damaged" in caplog.text
    (folder.last / name).unlink()
    assert same(Checkpoint.load(folder.path), states[0])
    (folder.previous / name).write_bytes(flipped(whole, 77))
    with pytest.raises(BadCheckpoint, match="no undamaged checkpoint in") as error:
        Checkpoint.load(folder.path)
    assert error.value.exit_status == 4


def test_no_bit_of_a_sealed_folder_is_free(tmp_path: Path) -> None:
    write_sealed_folder(tmp_path / "x", {"a": b"some", "b": b""})
    assert read_sealed_folder(tmp_path / "x") == {"a": b"some", "b": b""}
    for name in ("a", "manifest.json"):
        whole = (tmp_path / "x" / name).read_bytes()
        for bit in range(8 * len(whole)):
            (tmp_path / "x" / name).write_bytes(flipped(whole, bit))
            with pytest.raises(BadCheckpoint):
                read_sealed_folder(tmp_path / "x")
        (tmp_path / "x" / name).write_bytes(whole)
    read_sealed_folder(tmp_path / "x")


def test_a_resume_from_the_previous_one_ends_in_the_same_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = fresh(tmp_path / "whole")
    with pytest.raises(Stopped):
        fresh(tmp_path / "run", on_progress=lambda p: os.kill(os.getpid(), signal.SIGTERM) if p.step == 5 else None)
    run = RunFolder(tmp_path / "run")
    (run.last / "state.safetensors").write_bytes(b"")
    assert fresh(run.path, resume=True).digest() == whole.digest()
    assert "looking for the checkpoint before it" in caplog.text


def test_a_damaged_last_never_takes_the_place_of_the_good_one(folder: RunFolder, states: list[Checkpoint]) -> None:
    (folder.last / "progress.json").write_bytes(b"{}")
    assert same(load_for_resume(folder), states[0])
    assert same(Checkpoint._from_contents(read_sealed_folder(folder.last), folder.last), states[0])
    assert same(Checkpoint._from_contents(read_sealed_folder(folder.previous), folder.previous), states[0])


# ------------------------------------------------------------------------------ hostile, but whole


def reseal(place: Path, name: str, content: bytes) -> None:
    write_sealed_folder(place, {**read_sealed_folder(place), name: content})


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("progress.json", b"[]"),
        ("progress.json", b"{}"),
        ("progress.json", b'{"plan": {"epochs": "many"}}'),
        ("progress.json", b"\xff\xfe"),
        ("model.safetensors", pickle.dumps(Bomb())),
        ("state.safetensors", b"\xff" * 8 + b"{}"),
        ("ema.safetensors", b""),
    ],
)
def test_what_is_whole_but_no_checkpoint_is_refused(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.chdir(folder.path.parent)
    for place in (folder.last, folder.previous):
        reseal(place, name, content)
    with pytest.raises(BadCheckpoint, match="but this version cannot read it"):
        Checkpoint.load(folder.path)
    assert not Path("executed").exists()


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    write_sealed_folder(tmp_path / "x", {"a": b""})
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    for name in ("../secret", str(tmp_path / "secret"), ".."):
        manifest = json.dumps({"format": 1, "files": {name: entry}}, indent=1) + "\n"
        (tmp_path / "x" / "manifest.json").write_text(manifest)
        with pytest.raises(BadCheckpoint):
            read_sealed_folder(tmp_path / "x")


# ------------------------------------------------------------------- killed between any two calls


@contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A block in which the `call`-th change of the disk, and every one after it, does not happen."""
    count = [0]
    names = ("mkdir", "link", "replace", "rename", "unlink", "rmdir", "fsync", "truncate", "open")

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > call:
                raise Killed
            return real(*args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, guarded(getattr(os, name)))
        patch.setattr(Path, "write_bytes", guarded(Path.write_bytes))
        patch.setattr(Path, "write_text", guarded(Path.write_text))
        patch.setattr(file_io, "_remove", guarded(file_io._remove))
        yield count


def test_a_save_killed_between_any_two_calls_leaves_a_whole_checkpoint(
    tmp_path: Path, states: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the kill there is the old state or the new, and the next save works; nothing is left over."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    found, before = set(), RunFolder(tmp_path / "before")
    for state in states[:2]:
        state.save(before, {})
        save_best(before, state.average, {"top1": 1.0}, {})
    for call in range(1000):
        folder = RunFolder(shutil.copytree(before.path, tmp_path / str(call)))
        with killed_at(call, monkeypatch) as count:
            try:
                states[2].save(folder, {})
                save_best(folder, states[2].average, {"top1": 2.0}, {})
            except Killed:
                pass
        read = Checkpoint.load(folder.path).position.step
        found.add(read)
        assert read in (states[1].position.step, states[2].position.step)
        with folder.lock():
            assert same(load_for_resume(folder), next(s for s in states if s.position.step == read))
            assert json.loads(read_sealed_folder(folder.best)["metrics.json"])["top1"] in (1.0, 2.0)
            states[3].save(folder, {})
        assert same(Checkpoint.load(folder.path), states[3])
        assert sorted(p.name for p in folder.path.iterdir()) == [".lock", ".pid", "best", "last", "previous"]
        if count[0] <= call:
            break
    assert call > 30
    assert found == {states[1].position.step, states[2].position.step}


# ------------------------------------------------------------------------------------- full disks


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """A block in which no file may grow past that: a write then fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint(folder: RunFolder, states: list[Checkpoint]) -> None:
    sizes = sorted((folder.last / name).stat().st_size for name in PARTS)
    for limit in (0, 1, *(size - 1 for size in sizes)):
        with file_size_limit(limit), pytest.raises(NotWritable, match=r"cannot write .*last: no file may") as error:
            states[2].save(folder, {})
        assert error.value.exit_status == 5
        assert same(Checkpoint.load(folder.path), states[1])
        assert sorted(p.name for p in folder.path.iterdir()) == ["last", "previous"]
    with file_size_limit(sizes[-1]):
        states[2].save(folder, {})
    assert same(Checkpoint.load(folder.path), states[2])


def test_a_training_on_a_full_disk_ends_before_its_first_step(tmp_path: Path) -> None:
    told: list[object] = []
    with (
        file_size_limit(4000),
        pytest.raises(NotWritable, match=r"no file may be larger than 3 KiB here \(ulimit -f\)"),
    ):
        fresh(tmp_path / "run", on_progress=told.append)
    assert not told
    with file_size_limit(100), pytest.raises(NotWritable, match=r"cannot write .*log\.jsonl"):
        fresh(tmp_path / "run")
    fresh(tmp_path / "run")  # and what is left there is in nobody's way


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotWritable, match=r"cannot write .*choose another folder"):
            fresh(place)
    if os.geteuid():
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(NotWritable, match="cannot write"):
            fresh(tmp_path / "shut" / "run")


# ------------------------------------------------------------------------------ other processes


def test_a_busy_folder_names_its_process_and_a_dead_one_frees_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from onefold.train import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match=f"in use by process {holder.pid} on ") as error:
            fresh(tmp_path / "run")
        assert error.value.exit_status == 6
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path / "run").lock():
            assert (tmp_path / "run" / ".pid").read_text().startswith(f"process {os.getpid()} on ")


def run_and_kill(out: Path, lives: int, rng: random.Random) -> str:
    """Start, kill -9 somewhere behind one of the first steps, go on, and so often; returns the digest of the end."""
    program = [sys.executable, training_kit.__file__, str(out)]
    for _ in range(lives):
        how = "resume" if (out / "last").exists() else "begin"
        with subprocess.Popen([*program, how, "endless"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(rng.randint(1, 5)):
                if process.stdout.readline() == "last\n":
                    break
            time.sleep(rng.random() * 0.02)
            process.kill()
            process.wait()
            assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
    last = subprocess.run([*program, "resume"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return last.split("digest ")[1].strip()


def log_without_the_clock(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines if line["kind"] == "epoch"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("lives", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_at_any_time(tmp_path: Path, lives: int) -> None:
    whole = fresh(tmp_path / "whole")
    assert run_and_kill(tmp_path / "run", lives, random.Random(lives)) == whole.digest()
    assert log_without_the_clock(tmp_path / "run") == log_without_the_clock(tmp_path / "whole")
