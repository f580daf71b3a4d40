"""The run folder: held by one process at a time, with sealed folders of tensors and a log in it.

runs/<name>/
    .lock       held by the process that writes here; names it
    log.jsonl   one JSON object a line
    last/       where a resume goes on      } sealed: every file's size and SHA-256
    previous/   the one before it           } stand in manifest.json, and are checked
    best/       the weights to use          } at every load
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onefold.errors import BadCheckpoint, NotWritable, RunBusy
from onefold.storage import replacing

MANIFEST = "manifest.json"
FORMAT = 1

# ---------------------------------------------------------------------------------- sealed folders


def seal(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write `contents` (file name -> bytes) and their manifest to `folder`, all of it or nothing.

    Whoever serializes gives bytes, so that a full disk is an OSError and comes out as NotWritable.
    """
    with replacing(folder) as aside:
        aside.mkdir()
        for name, content in contents.items():
            (aside / name).write_bytes(content)
        (aside / MANIFEST).write_text(_manifest(contents), encoding="utf-8")


def unseal(folder: Path) -> dict[str, bytes]:
    """Every file of a sealed folder, as it was written; raises BadCheckpoint for the least difference."""
    try:
        manifest = _read(folder / MANIFEST, limit=1 << 20)
        promised = json.loads(manifest)
        sizes = {str(name): int(entry["bytes"]) for name, entry in promised["files"].items()}
        if promised["format"] != FORMAT or any(Path(name).name != name for name in sizes):
            raise ValueError(f"it is not of format {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{folder / MANIFEST} is missing or damaged: {error}") from error
    try:
        contents = {name: _read(folder / name, limit=size) for name, size in sizes.items()}
    except OSError as error:
        raise BadCheckpoint(f"{folder} is damaged: {error}") from error
    for name, content in contents.items():
        if len(content) != sizes[name] or _entry(content) != promised["files"][name]:
            raise BadCheckpoint(f"{folder / name} is damaged: its size or SHA-256 is not what {MANIFEST} says")
    if manifest != _manifest(contents).encode():
        raise BadCheckpoint(f"{folder / MANIFEST} is damaged: it is not as it was written")
    return contents


def keep_previous(last: Path, previous: Path) -> None:
    """Make the sealed folder `last` the `previous` one as well: by hard links where the disk has them."""
    if last.is_dir():
        with replacing(previous) as aside:
            shutil.copytree(last, aside, copy_function=_link)


def _manifest(contents: Mapping[str, bytes]) -> str:
    files = {name: _entry(content) for name, content in sorted(contents.items())}
    return json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n"


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a plain file, never many more than `limit` of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, or not a plain file")
    with path.open("rb") as file:
        return file.read(limit + 1)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


# -------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of one run are."""

    path: Path

    @property
    def last(self) -> Path:
        """The checkpoint that a resume takes."""
        return self.path / "last"

    @property
    def previous(self) -> Path:
        """The checkpoint before it, for the day on which `last` is damaged."""
        return self.path / "previous"

    @property
    def best(self) -> Path:
        """The weights of the best epoch."""
        return self.path / "best"

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.path / "log.jsonl"

    @property
    def has_run(self) -> bool:
        """Whether a checkpoint, whole or not, is here."""
        return self.last.exists() or self.previous.exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block in which no other process writes here, with what a killed one left half-done put right.

        The kernel gives the lock back when the process ends, however it ends; the file itself means nothing.
        Raises RunBusy naming the process that holds it, NotWritable where nothing can be written.
        """
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with _writing(self.path):
                _lock(handle, self.path)
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                self._put_right()
            yield
        finally:
            os.close(handle)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log, on the disk when this returns; a number that JSON has not becomes null."""
        line = json.dumps({key: _jsonable(value) for key, value in entry.items()}, allow_nan=False)
        with _writing(self.log), self.log.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def log_bytes(self) -> int:
        """The length of the log."""
        return self.log.stat().st_size if self.log.exists() else 0

    def cut_log(self, length: int) -> None:
        """Take from the log what was added after it had `length` bytes."""
        if self.log_bytes() > length:
            with _writing(self.log):
                os.truncate(self.log, length)

    def _put_right(self) -> None:
        """Undo what a killed process left between two steps of `replacing`."""
        for part in (self.last, self.previous, self.best):
            for old in sorted(self.path.glob(f".{part.name}.*.old")):
                if part.exists():
                    shutil.rmtree(old)
                else:
                    old.rename(part)
            for new in self.path.glob(f".{part.name}.*.new"):
                shutil.rmtree(new)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        raise RunBusy(f"{path} is in use by {holder}: wait for it or choose another folder") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A block whose OSError is NotWritable about `path`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise NotWritable(f"cannot write {path}: {why}; make room or choose another folder") from error


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
