"""Bytes at an offset of a file: on this disk, behind http(s), or in an object store (the extra `cloud`: obstore).

Over http(s), files are read by range requests (RFC 9110, section 14) over connections that are kept open. What failed
once over a network is asked for again after a pause that doubles; what fails for good is BadData and names the place.
Plain http(s) needs no extra. obstore reads it too, but a body that is cut short or late is an error there like any
other, its errors quote the whole URL, and a signed URL's query is a secret: so it is used for object stores only.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import http.client
import io
import os
import random
import ssl
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from onefold.data.decode import printable_name
from onefold.errors import BadData, MissingExtra

_T = TypeVar("_T")

OBJECT_STORE_PREFIXES = ("s3://", "gs://", "az://")
REMOTE_PREFIXES = ("http://", "https://", *OBJECT_STORE_PREFIXES)

_WHOLE_BYTES, _PART_BYTES = 1 << 20, 64 << 10  # what is read of a file for its digest
_MAX_IDLE = 16  # open connections that are kept for each server
_PERMANENT = frozenset((400, 401, 403, 404, 405, 410, 416))  # the same request would fail again
_PERMANENT_ERRORS = ("NotFoundError", "FileNotFoundError", "PermissionDeniedError", "UnauthenticatedError")  # obstore's


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a read over a network is tried, how long a try may take, and the first pause, in seconds."""

    tries: int = 5
    timeout_s: float = 20.0
    pause_s: float = 0.2


def _retry(attempt: Callable[[], _T], name: str, policy: RetryPolicy) -> _T:
    """Call `attempt` until it succeeds, at most `policy.tries` times; BadData is final and passes through.

    Raises BadData with `name`, the last reason and the number of tries.
    """
    for number in range(policy.tries):
        try:
            return attempt()
        except BadData:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error
        except Exception as error:  # obstore's errors have no common root but Exception
            reason = OSError(str(error).splitlines()[0] if str(error) else type(error).__name__)
        if number + 1 < policy.tries:  # the random factor keeps many readers of one server from coming back together
            time.sleep(policy.pause_s * 2**number * random.uniform(0.5, 1.5))
    shown = printable_name(str(reason) or type(reason).__name__)
    raise BadData(f"cannot read {name}: {shown} ({policy.tries} tries)") from reason


class Blob(Protocol):
    """A file that can be read at any offset."""

    @property
    def name(self) -> str:
        """Where it lies, for messages."""

    @property
    def identity(self) -> str:
        """A text that changes when its content does: the key of caches."""

    @property
    def num_bytes(self) -> int:
        """Its size. Raises BadData where it cannot be had."""

    def read(self, start: int, count: int) -> bytes:
        """Read exactly `count` bytes from `start` on. Raises BadData where they cannot be had."""


def open_blob(place: str | os.PathLike[str], policy: RetryPolicy | None = None) -> Blob:
    """Give the file at a path or URL; nothing is read yet."""
    text = os.fspath(place)
    if text.startswith(OBJECT_STORE_PREFIXES):
        return StoredObject(text, policy or RetryPolicy())
    return HttpFile(text, policy or RetryPolicy()) if text.startswith(REMOTE_PREFIXES) else LocalFile(Path(text))


def digest_bytes(read: Callable[[int, int], bytes], num_bytes: int) -> str:
    """Give a SHA-256 in hex of what `read(start, count)` gives; of more than 1 MiB, of its size and of three parts.

    The parts are 64 KiB at the start, in the middle and at the end: a picture of that size is compressed, and where it
    changes, all that comes after does. One that is not compressed can change unseen elsewhere.
    """
    if num_bytes <= _WHOLE_BYTES:
        return hashlib.sha256(read(0, num_bytes)).hexdigest()
    total = hashlib.sha256(f"{num_bytes}\n".encode())
    for start in (0, (num_bytes - _PART_BYTES) // 2, num_bytes - _PART_BYTES):
        total.update(read(start, _PART_BYTES))
    return total.hexdigest()


def open_plain_file(path: str, flags: int) -> int:
    """Open a file as `os.open` does, without a wait where it is a pipe. Raises OSError for all but plain files."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a plain file", path)
    return handle


@dataclass(frozen=True)
class LocalFile:
    """A file on this disk. A Blob."""

    path: Path

    @property
    def name(self) -> str:
        """The path, printable."""
        return printable_name(self.path)

    @property
    def identity(self) -> str:
        """Path, size, the times that are set and that are not, the file's number, and a digest of parts of it.

        Size and time of writing alone are the same after `touch -r`, or where a file is replaced by `cp -p`.
        """
        status = self._status()
        facts = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        return f"{self.path.absolute()} {facts} {digest_bytes(self.read, status.st_size)}"

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return self._status().st_size

    def read(self, start: int, count: int) -> bytes:
        """Read bytes of the file, which is opened anew each time: it may have gone or been replaced."""
        try:
            with open(self.path, "rb", buffering=0, opener=open_plain_file) as file:
                file.seek(start)
                data = file.read(count)
        except OSError as error:
            raise BadData(f"cannot read {self.name}: {error.strerror or error}") from error
        if len(data) != count:
            raise BadData(f"{self.name} is truncated: it ends before byte {start + count}")
        return data

    def _status(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:
            raise BadData(f"cannot read {self.name}: {error.strerror or error}") from error


@dataclass(frozen=True)
class HttpFile:
    """A file behind http or https. A Blob."""

    url: str
    policy: RetryPolicy

    @property
    def name(self) -> str:
        """The URL without its query, which may be a secret."""
        return printable_name(self.url.split("?")[0])

    @property
    def identity(self) -> str:
        """The URL, the size, and the server's mark of this version (ETag, or else Last-Modified)."""
        return f"{self.url} {self.num_bytes} {self._size_and_version[1]}"

    @property
    def num_bytes(self) -> int:
        """The size, as the server gives it."""
        return self._size_and_version[0]

    def read(self, start: int, count: int) -> bytes:
        """Read bytes of the file; a short, refused or broken answer is asked for again."""
        return _retry(lambda: self._request(start, count)[0], self.name, self.policy) if count else b""

    @cached_property
    def _size_and_version(self) -> tuple[int, str]:  # of one byte's answer: not every server answers HEAD
        return _retry(lambda: self._request(0, 1)[1:], self.name, self.policy)

    def _request(self, start: int, count: int) -> tuple[bytes, int, str]:
        """Send one request: the bytes, the size of the whole file, its version."""
        parts = urlsplit(self.url)
        connection = HTTP_CONNECTIONS.take(parts.scheme, parts.netloc, self.policy.timeout_s)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request("GET", target, headers={"Range": f"bytes={start}-{start + count - 1}"})
            with connection.getresponse() as response:
                size = self._checked_size(response, start)
                data = _body(response, count, self.policy.timeout_s)
                version = response.getheader("ETag") or response.getheader("Last-Modified") or ""
        except BaseException:
            connection.close()  # what is left of the answer must not be taken for the next
            raise
        HTTP_CONNECTIONS.put(parts.scheme, parts.netloc, connection)
        return data, size, version

    def _checked_size(self, response: http.client.HTTPResponse, start: int) -> int:
        """Give the file's size. BadData for an answer that would be the same again, OSError for one that may not."""
        status = f"{response.status} {response.reason}"
        if response.status == 200:
            raise BadData(f"{self.name}: the server gives no parts of files (it ignores Range)")
        if response.status in _PERMANENT:
            raise BadData(f"{self.name}: the server answers {status}")
        if response.status != 206:
            raise OSError(f"the server answers {status}")
        content_range = response.getheader("Content-Range") or ""
        size = content_range.rpartition("/")[2]
        if not content_range.startswith(f"bytes {start}-") or not size.isdigit():
            raise OSError(f"the server answers for {printable_name(content_range)!r}")
        return int(size)


def _body(response: http.client.HTTPResponse, count: int, limit_s: float) -> bytes:
    """Read a body of exactly `count` bytes. The time limit is for all of it: a server that drips cannot stretch it."""
    until, parts, left = time.monotonic() + limit_s, [], count
    while left:
        part = response.read1(min(left, 1 << 20))
        if not part:
            raise OSError(f"the answer ends {left} bytes early")
        if time.monotonic() > until:
            raise TimeoutError(f"{count} bytes took more than {limit_s:g} s")
        parts.append(part)
        left -= len(part)
    if response.read1(1):
        raise OSError(f"the answer is longer than the {count} bytes asked for")
    return b"".join(parts)


class _Connections:
    """Idle open connections, a few for each server. They are of this process: a fork must not share them."""

    def __init__(self) -> None:
        self._lock, self._process = Lock(), os.getpid()
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}

    def take(self, scheme: str, server: str, timeout_s: float) -> http.client.HTTPConnection:
        """Give an idle connection to a server, or a new one, which opens when it is first used."""
        with self._lock:
            if self._process != os.getpid():
                self._idle, self._process = {}, os.getpid()
            if idle := self._idle.get((scheme, server)):
                return idle.pop()
        if scheme == "https":
            return http.client.HTTPSConnection(server, timeout=timeout_s, context=ssl.create_default_context())
        return http.client.HTTPConnection(server, timeout=timeout_s)

    def put(self, scheme: str, server: str, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last answer was read to its end."""
        with self._lock:
            idle = self._idle.setdefault((scheme, server), [])
            if len(idle) < _MAX_IDLE:
                return idle.append(connection)
        return connection.close()

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for idle in self._idle.values():
                while idle:
                    idle.pop().close()


HTTP_CONNECTIONS = _Connections()
atexit.register(HTTP_CONNECTIONS.close)


@dataclass(frozen=True)
class StoredObject:
    """An object in S3, Google Cloud Storage or Azure, with credentials from the environment. A Blob."""

    url: str
    policy: RetryPolicy

    @property
    def name(self) -> str:
        """The URL."""
        return printable_name(self.url)

    @property
    def identity(self) -> str:
        """The URL, the size, and the store's mark of this version (ETag)."""
        return f"{self.url} {self.num_bytes} {self._head.get('e_tag') or ''}"

    @property
    def num_bytes(self) -> int:
        """The size of the object."""
        return int(self._head["size"])

    def read(self, start: int, count: int) -> bytes:
        """Read bytes of the object."""

        def part(store: Any, key: str) -> bytes:
            data = bytes(store.get_range(key, start=start, length=count))
            if len(data) != count:
                raise OSError(f"{len(data)} bytes came of {count}")
            return data

        return self._request(part) if count else b""

    @cached_property
    def _head(self) -> dict[str, Any]:
        head: dict[str, Any] = self._request(lambda store, key: store.head(key))
        return head

    @cached_property
    def _store(self) -> tuple[Any, str]:  # and the key in it; obstore's stores have no common type
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise MissingExtra(f"{self.name} needs obstore", "cloud") from error
        scheme, _, rest = self.url.partition("://")
        bucket, _, key = rest.partition("/")
        return from_url(f"{scheme}://{bucket}"), key

    def _request(self, call: Callable[[Any, str], _T]) -> _T:
        """Call with the store and the key, again after errors that may pass."""
        store, key = self._store

        def attempt() -> _T:
            try:
                return call(store, key)
            except Exception as error:
                if type(error).__name__ in _PERMANENT_ERRORS:
                    raise BadData(f"cannot read {self.name}: {printable_name(str(error).splitlines()[0])}") from error
                raise

        return _retry(attempt, self.name, self.policy)


class BlobReader(io.RawIOBase):
    """A blob as a file to read and seek in, as tarfile wants one."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob, self._at, self._size = blob, 0, blob.num_bytes

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place in the file."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read what is left, up to the buffer's size."""
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._blob.read(self._at, count)
        self._at += count
        return count
