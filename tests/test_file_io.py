"""Writing aside: whatever goes wrong, what was there before is there after."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onefold.errors import BadData, NotWritable
from onefold.file_io import (
    atomic_replace,
    file_lock,
    normalize_name,
    read_lines,
    read_plain_file,
    read_text,
    suggest_path,
    write_text,
)


def test_a_path_of_nearly_the_same_name_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any of its folders; what is there all the way is suggested, and nothing else."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/photos-finetune/best", "runs/digits-s0", "Holiday Photos"):
        (tmp_path / folder).mkdir(parents=True)
    for given, meant in (
        ("runs/photo-finetune", "runs/photos-finetune"),
        ("run/photo-finetune/bset", "runs/photos-finetune/best"),
        (tmp_path / "runs" / "digit-s0", tmp_path / "runs" / "digits-s0"),
        ("holiday photos", "Holiday Photos"),
        ("runs/photos-finetune/last", ""),
        ("runs/photos-finetune", ""),
        ("cats", ""),
        ("x\0y", ""),
    ):
        assert suggest_path(given) == (f"; did you mean {meant}?" if meant else "")


def test_a_file_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path):
    write_text(tmp_path / "deep" / "a.txt", "hello")
    assert (tmp_path / "deep" / "a.txt").read_text() == "hello"
    assert os.listdir(tmp_path / "deep") == ["a.txt"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path):
    for content in ("old", "new"):
        with atomic_replace(tmp_path / "f") as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert os.listdir(tmp_path) == ["f"]
    assert os.listdir(tmp_path / "f") == ["new"]


@pytest.mark.parametrize("folder", [True, False])
def test_an_error_in_the_block_changes_nothing(tmp_path: Path, folder: bool):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_replace(tmp_path / "a") as aside:
        (aside.mkdir() if folder else aside.write_text("half"))
        raise RuntimeError("halfway")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "no space to write .*: [0-9]+ MiB are free"),
        (errno.EDQUOT, "your quota there is used up"),
        (errno.EFBIG, "its disk takes no file of that size"),
        (errno.EACCES, "cannot write"),
    ],
)
def test_a_full_or_forbidden_disk_is_told_and_the_old_file_stands(tmp_path: Path, code: int, says: str):
    write_text(tmp_path / "a", "old")
    with pytest.raises(NotWritable, match=says), atomic_replace(tmp_path / "a") as aside:
        raise OSError(code, os.strerror(code), str(aside))
    assert (tmp_path / "a").read_text() == "old"


def test_a_text_never_takes_the_place_of_a_folder(tmp_path: Path):
    write_text(tmp_path / "a" / "b", "kept")
    with pytest.raises(NotWritable, match="it is a folder"):
        write_text(tmp_path / "a", "x")
    assert (tmp_path / "a" / "b").read_text() == "kept"


def test_a_place_below_a_file_is_told(tmp_path: Path):
    write_text(tmp_path / "a", "a file")
    with pytest.raises(NotWritable, match="choose a folder"):
        write_text(tmp_path / "a" / "b" / "c.txt", "x")


def test_errors_of_reading_elsewhere_are_not_blamed_on_the_place(tmp_path: Path):
    with pytest.raises(FileNotFoundError), atomic_replace(tmp_path / "a") as aside:
        aside.write_text(Path("/nowhere/at/all").read_text())


def test_data_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(handle: int) -> None:
        order.append("fsync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noting_replace(a: object, b: object) -> None:
        order.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    write_text(tmp_path / "a.txt", "x")
    assert order[0].startswith("fsync .a.")
    assert order[1:] == ["rename", f"fsync {tmp_path.name}"]


def test_what_a_killed_process_left_is_removed_and_a_running_ones_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getppid()):
        (tmp_path / f".deploy.{pid}.new").mkdir()
        (tmp_path / f".deploy.{pid}.new" / "half").write_text("x")
    (tmp_path / f".other.{ended.pid}.new").mkdir()
    with atomic_replace(tmp_path / "deploy") as aside:
        aside.mkdir()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"deploy", f".deploy.{os.getppid()}.new", f".other.{ended.pid}.new"}


@pytest.mark.parametrize("text", ["cat\ndog\n", "cat\r\ndog\r\n\r\n", "\ncat \ndog\t", "  cat\r\r dog"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_users_text_is_read_as_any_editor_saves_it(tmp_path: Path, text: str, encoding: str):
    (tmp_path / "names.txt").write_bytes(text.encode(encoding))
    assert read_lines(tmp_path / "names.txt") == ["cat", "dog"]


def test_a_users_text_keeps_what_is_no_utf8_and_must_be_a_file(tmp_path: Path):
    (tmp_path / "latin").write_bytes(b"caf\xe9\r\n\xe7a")
    notes: list[str] = []
    assert read_text(tmp_path / "latin", notes) == "caf\u00e9\n\u00e7a"
    assert len(notes) == 1
    assert "latin is not UTF-8: it is read as Windows-1252 ('caf\u00e9')" in notes[0]
    for name, normal in ((b"caf\xe9", "caf\u00e9"), (b"e\xcc\x81", "\u00e9"), (b"\x80\x81", "\u20ac\x81"), (b"a", "a")):
        assert normalize_name(os.fsdecode(name)) == normal
    write_text(tmp_path / "names", "\udce9")
    assert (tmp_path / "names").read_bytes() == b"\\udce9"
    assert normalize_name("\ud800\udc41") == "\ufffd\ufffd"
    (tmp_path / "accents").write_text("\ufeffcafé\x85naïve\n", encoding="utf-16-le")  # U+0085 ends no line
    assert read_lines(tmp_path / "accents") == ["café\x85naïve"]
    (tmp_path / "binary").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)))
    with pytest.raises(BadData, match="is not text"):
        read_text(tmp_path / "binary")
    os.mkfifo(tmp_path / "pipe")
    for place, sentence in (
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),
        (tmp_path / "no", "cannot read"),
    ):
        with pytest.raises(BadData, match=sentence):
            read_text(place)


def test_what_is_no_plain_file_is_not_read(tmp_path: Path):
    """A pipe would be waited for, and a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "zero")
    (tmp_path / "plain").write_bytes(b"12345")
    assert read_plain_file(tmp_path / "plain", 5) == b"12345"
    for name, sentence in (
        ("pipe", "plain file"),
        ("zero", "plain file"),
        (".", "plain file"),
        ("plain", "read at the"),
    ):
        with pytest.raises(OSError, match=sentence):
            read_plain_file(tmp_path / name, 4)


HOLDER = """
import sys
from pathlib import Path
from onefold.file_io import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_that_another_process_holds_is_waited_for_with_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The other one may be stopped (Ctrl-Z): it is said that there is one, and it is not waited for without end."""
    monkeypatch.setattr("onefold.file_io._LOCK_SAID_S", 0.05)
    path, command = tmp_path / "a.json", [sys.executable, "-c", HOLDER]
    with subprocess.Popen([*command, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr("onefold.file_io._LOCK_LIMIT_S", 0.1)
        held = r"another process has held .*\.a\.json\.lock for 0 s; end that"
        with pytest.raises(NotWritable, match=held), file_lock(path):
            raise AssertionError("two hold the lock")
        assert "waiting for another process, which holds" in caplog.text
        monkeypatch.setattr("onefold.file_io._LOCK_LIMIT_S", 60)
        holder.stdin.write("\n")
        holder.stdin.flush()
        with file_lock(path):
            pass
    (tmp_path / ".folder.lock").mkdir()
    with pytest.raises(NotWritable, match="cannot write"), file_lock(tmp_path / "folder"):
        pass


ON_ANOTHER_SYSTEM = """
import errno, json, os, stat, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
sync = os.fsync
def fsync(handle):
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EACCES, "Permission denied")  # as Windows says of a folder
    sync(handle)
os.fsync = fsync
from onefold.cli import main
for line in sys.stdin:
    print("status", main(json.loads(line)), flush=True)
"""


def test_the_verbs_without_what_only_linux_has(tmp_path: Path):
    """Locks, limits, forks, affinity and the fsync of a folder: macOS and Windows lack one or the other."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for split, count in (("train", 4), ("val", 1)):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "d" / split / name / f"{i}.png")
    verbs = [
        "models mobilenetv1_025",
        "train --recipe photos:scratch --model mobilenetv1_025 --img-size 32 --epochs 1 -b 4 --data d --out run",
        "predict run d/val --json",
        "fuse run --out fused.safetensors",
        "report . --out report.html",
    ]
    lines = "".join(json.dumps(verb.split()) + "\n" for verb in verbs)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_ANOTHER_SYSTEM],
        **{"cwd": tmp_path, "input": lines, "capture_output": True, "text": True, "check": False},
    )
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status ")]
    assert dict(zip(verbs, statuses, strict=True)) == dict.fromkeys(verbs, 0), done.stderr
