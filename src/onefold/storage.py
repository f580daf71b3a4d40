"""Writing so that nothing is ever half-written: aside, fsync, rename.

`replacing(path)` gives a fresh name beside `path`; what is written there takes the place of `path` in one
step when the block ends without an error, and is removed when it does not. It serves files and folders alike.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onefold.errors import NotWritable

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` (same suffix) to write a file or a folder to; it becomes `path` when the block succeeds.

    What a killed process left half-written for the same `path` is removed. Raises NotWritable where the disk is full or
    the place cannot be written; `path` then is what it was before.
    """
    path = Path(os.path.abspath(path))
    aside = path.with_name(f".{path.stem}.{os.getpid()}.new{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        _remove_abandoned(path)
        yield aside
        _sync(aside)
        _swap(aside, path)
        _sync_entry(path.parent)
    except OSError as error:
        if isinstance(error, NotWritable) or not _is_about(error, path):
            raise
        raise NotWritable(_why(error, path)) from error
    finally:
        with suppress(OSError):  # a read-only disk refuses this too, even where there is nothing to remove
            _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Put `text` (UTF-8) in the place of `path`, whole or not at all; a folder there is refused, not replaced."""
    if path.is_dir():
        raise NotWritable(f"cannot write {path}: it is a folder; give the name of a file")
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that no longer run on this machine left beside `path`, half-written."""
    if os.name != "posix":  # elsewhere os.kill(pid, 0) does not ask whether a process runs
        return
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.([0-9]+)\.new{re.escape(path.suffix)}")
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match is None:
            continue
        try:
            os.kill(int(match[1]), 0)
        except (ProcessLookupError, OverflowError):
            _remove(entry)
        except PermissionError:
            continue  # it runs, as another user


def _is_about(error: OSError, path: Path) -> bool:
    """Whether the error came from writing here, rather than from something the block read elsewhere."""
    named = error.filename
    return named is None or str(named).startswith(str(path.parent)) or str(path).startswith(str(named))


def _why(error: OSError, path: Path) -> str:
    if error.errno in _NO_SPACE:
        free = shutil.disk_usage(path.parent).free >> 20
        return f"no space to write {path}: {free} MiB are free there; make room or choose another folder"
    return f"cannot write {path}: {error.strerror or error}; choose a folder you can write to"


def _swap(aside: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(aside, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    _remove(old)
    os.rename(path, old)
    os.rename(aside, path)
    _remove(old)


def _sync(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "nothing was written", str(path))
    if path.is_dir():
        for child in path.iterdir():
            _sync(child)
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
