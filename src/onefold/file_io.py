"""Writing so that nothing is ever half-written (aside, fsync, rename), and reading text as people's editors save it.

`atomic_replace(path)` gives a fresh name beside `path`; what is written there takes the place of `path` in one
step when the block ends without an error, and is removed when it does not. It serves files and folders alike.
`read_text` is for every text that a user gives: labels, names of classes, metadata. `parse_json` is for all JSON.
`normalize_name` is for every name of a file, `normalize_class_name` for every name of a class, so that whatever is
written with it is text.
"""

from __future__ import annotations

import codecs
import difflib
import errno
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onefold.errors import BadData, NotWritable

_log = logging.getLogger("onefold")

_MOST_ENTRIES = 10_000  # of a folder, among which one of nearly the same name is looked for
_MAX_TEXT_BYTES, _MAX_JSON_BYTES = 256 << 20, 64 << 20
_SURROGATES = re.compile("[\ud800-\udfff]")
_MAX_DEPTH, _TOO_DEEP = 100, "it is nested too deep"
_BYTE_ORDER_MARKS = (  # UTF-32's first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
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


def unused_path(path: Path) -> Path:
    """Give `path`, or where something is there the first of NAME-2, NAME-3, ... that is free."""
    names = (path if k == 1 else path.with_name(f"{path.stem}-{k}{path.suffix}") for k in count(1))
    return next(name for name in names if not os.path.lexists(name))


def write_text(path: Path, text: str) -> None:
    """Put `text` (UTF-8) in the place of `path`, whole or not at all; a folder there is refused, not replaced."""
    if path.is_dir():
        raise NotWritable(f"cannot write {path}: it is a folder; give the name of a file")
    with atomic_replace(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def normalize_name(name: str) -> str:
    """Give a name in Unicode's NFC, bytes that are not UTF-8 (lone surrogates in Python) as Windows-1252 has them.

    The bytes that Windows-1252 has no character for are those of Latin-1; other lone surrogates become U+FFFD.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", _SURROGATES.sub(_windows_1252, name))


def normalize_class_name(name: str) -> str:
    """Give the name of a class as `normalize_name` does, each run of blanks of any kind one blank, none at its ends.

    A blank at the end of a folder's name cannot be seen. A name of nothing else stays as it is.
    """
    return " ".join(normalize_name(name).split()) or normalize_name(name)


def _windows_1252(match: re.Match[str]) -> str:
    code = ord(match[0]) - 0xDC00
    if not 0x80 <= code <= 0xFF:
        return "\ufffd"
    try:
        return bytes([code]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(code)


def suggest_path(path: str | os.PathLike[str]) -> str:
    """Give the end of an error about a path that is not there: `; did you mean runs/photos?`, "" where nothing is near.

    What is there under a name that is spelled nearly so is meant, in any of the path's folders.
    """
    given, found = Path(path), Path()
    try:
        for part in given.parts:
            if os.path.lexists(found / part):
                found /= part
                continue
            with os.scandir(found) as entries:
                names = {name.casefold(): name for entry in islice(entries, _MOST_ENTRIES) if (name := entry.name)}
            near = difflib.get_close_matches(part.casefold(), names, n=1, cutoff=0.7)
            if not near:
                return ""
            found /= names[near[0]]
    except (OSError, ValueError):
        return ""
    shown = os.fspath(found).encode("utf-8", "backslashreplace").decode()
    return f"; did you mean {shown}?" if found != given else ""


def read_text(path: Path, notes: list[str] | None = None) -> str:
    """Read a text that a user gives: UTF-8, UTF-16 or UTF-32 with or without a byte order mark, lines ending in "\\n".

    Bytes that are not UTF-8 are read as Windows-1252, with a note that says so. Raises BadData where there is no
    regular file that can be read, or one of more than 256 MiB.
    """
    shown = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadData(f"{shown} is not a file: expected a text file")
        if status.st_size > _MAX_TEXT_BYTES:
            raise BadData(f"{shown} has {status.st_size >> 20} MiB: a text may have {_MAX_TEXT_BYTES >> 20}")
        data = path.read_bytes()
    except OSError as error:
        raise BadData(f"cannot read {shown}: {error.strerror or error}{suggest_path(path)}") from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if encoding is None:  # text of two bytes a character without a mark: every other of the first bytes is 0
        zeros = [data[:512][start::2].count(0) for start in (0, 1)]
        wide = max(zeros) > len(data[:512]) // 4 and not min(zeros)
        encoding = "utf-8" if not wide else "utf-16-be" if zeros[0] else "utf-16-le"
    text = data.decode(encoding, "surrogateescape" if encoding == "utf-8" else "replace").removeprefix("\ufeff")
    if first := _SURROGATES.search(text):
        line = text[text.rfind("\n", 0, first.start()) + 1 :].partition("\n")[0].strip()[:60]
        shown_line = _SURROGATES.sub(_windows_1252, line)
        text = _SURROGATES.sub(_windows_1252, text)
        if notes is not None:
            notes.append(
                f"{shown} is not UTF-8: it is read as Windows-1252 ({shown_line!r}); if not so, save it as UTF-8"
            )
    if "\0" in text:
        raise BadData(f"cannot read {shown}: it is not text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text that a user gives, without blanks at their ends and without empty lines."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Give the value of a JSON text as `json.loads` does, nested at most a hundred deep. Raises ValueError."""
    try:
        value = json.loads(text, **options)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def read_plain_file(path: Path, limit: int = _MAX_TEXT_BYTES) -> bytes:
    """Read a file of which a name in a folder is all that is known.

    Raises OSError where it is a pipe, which would be waited for, a device, which may have no end, a folder or a socket,
    and where it has more than `limit` bytes.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"it has {status.st_size >> 20} MiB, {limit >> 20} are read at the most", str(path))
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Read a JSON file of at most 64 MiB. Raises OSError, and ValueError where it is no such file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > _MAX_JSON_BYTES:
        raise ValueError(f"it has {status.st_size >> 20} MiB, {_MAX_JSON_BYTES >> 20} are read at the most")
    data = path.read_bytes()  # with a byte order mark, or in UTF-16, as some editors save it
    return parse_json(data.decode(json.detect_encoding(data)))


def cache_folder() -> Path:
    """Give the folder for what can be made again: $XDG_CACHE_HOME/onefold, or ~/.cache/onefold.

    Without a home (a container under a user that it does not know) it is one in the system's temporary folder, for
    this user alone. Raises OSError where that belongs to somebody else.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "onefold"
    home = os.environ.get("HOME") or os.path.expanduser("~")
    if os.path.isabs(home) and os.access(home, os.W_OK):
        return Path(home) / ".cache" / "onefold"
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = Path(tempfile.gettempdir()) / f"onefold-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if os.name == "posix" and (status.st_uid != user or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode)):
        raise PermissionError(errno.EACCES, "it belongs to somebody else, or others may write to it", str(folder))
    return folder


_LOCK_SAID_S, _LOCK_LIMIT_S = 5.0, 300.0  # compiling, the longest that is done under one, has the same limit


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """A block that no other process is in for the same `path`: to read it, and to write what follows from that.

    The lock is a file beside it, and is released when the process ends, however it ends. One that is stopped (Ctrl-Z)
    holds it all the same: a wait is said, and has a limit. Raises NotWritable.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_LOCK_SAID_S)
        except Timeout:
            _log.warning("waiting for another process, which holds %s", lock.lock_file)
            lock.acquire(timeout=_LOCK_LIMIT_S)
    except Timeout as error:
        raise NotWritable(
            f"cannot write {path}: another process has held {lock.lock_file} for {_LOCK_LIMIT_S:.0f} s; end that "
            "process, which may be stopped, and try again"
        ) from error
    except OSError as error:
        raise NotWritable(_why(error, path)) from error
    try:
        yield
    finally:
        lock.release()


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
    if error.errno == errno.EFBIG:
        limit = _file_size_limit()
        why = "its disk takes no file of that size: choose another folder"
        if limit is not None:
            why = (
                f"no file may be larger than {limit >> 10} KiB here (ulimit -f): raise that limit (ulimit -f unlimited)"
            )
        return f"cannot write {path}: {why}"
    if error.errno == errno.EDQUOT:
        return f"no space to write {path}: your quota there is used up; make room or choose another folder"
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(path.parent).free >> 20
        return f"no space to write {path}: {free} MiB are free there; make room or choose another folder"
    return f"cannot write {path}: {error.strerror or error}; choose a folder you can write to"


def _file_size_limit() -> int | None:
    """Give the most bytes that this process may write to a file; None where nothing limits them, or nothing tells."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


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


_NO_FOLDER_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def _sync_entry(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk; not every system and disk can do that for a folder."""
    try:
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_FOLDER_SYNC:
            raise


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
