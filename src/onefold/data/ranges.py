"""A file behind http or https, read by range requests (RFC 9110, section 14) over connections that are kept open."""

from __future__ import annotations

import atexit
import http.client
import os
import ssl
import time
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from urllib.parse import urlsplit

from onefold.data.decode import printable
from onefold.data.patience import Patience, insisted
from onefold.errors import BadData

_MOST_IDLE = 16
_FINAL = frozenset((400, 401, 403, 404, 405, 410, 416))  # the same request would fail again


@dataclass(frozen=True)
class HttpFile:
    """A file behind http or https, read by range requests over connections that are kept. A Blob."""

    url: str
    patience: Patience

    @property
    def name(self) -> str:
        """The URL, without what follows a question mark: that may be a secret."""
        return printable(self.url.split("?")[0])

    @property
    def identity(self) -> str:
        """The URL, the size, and the server's mark of this version."""
        return f"{self.url} {self.num_bytes} {self._first[1]}"

    @property
    def num_bytes(self) -> int:
        """The size, as the server says it."""
        return self._first[0]

    def read(self, start: int, count: int) -> bytes:
        """Bytes of the file; a short, refused or broken answer is asked for again."""
        if count == 0:
            return b""
        return insisted(lambda: self._once(start, count)[0], self.name, self.patience)

    @cached_property
    def _first(self) -> tuple[int, str]:
        return insisted(lambda: self._once(0, 1)[1:], self.name, self.patience)

    def _once(self, start: int, count: int) -> tuple[bytes, int, str]:
        """One request: the bytes, the size of the whole file, its mark."""
        parts = urlsplit(self.url)
        connection = IDLE.take(parts.scheme, parts.netloc, self.patience.timeout_s)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request("GET", target, headers={"Range": f"bytes={start}-{start + count - 1}"})
            with connection.getresponse() as answer:
                self._check(answer, start)
                data = _read(answer, count, self.patience.timeout_s)
                size = int((answer.getheader("Content-Range") or "").rpartition("/")[2])
                mark = answer.getheader("ETag") or answer.getheader("Last-Modified") or ""
        except BaseException:
            connection.close()  # what is left of the answer must not be taken for the next
            raise
        IDLE.put(parts.scheme, parts.netloc, connection)
        return data, size, mark

    def _check(self, answer: http.client.HTTPResponse, start: int) -> None:
        """BadData for an answer that would be the same again, OSError for one that may not."""
        if answer.status == 200:
            raise BadData(f"{self.name}: the server gives no parts of files (it ignores Range)")
        if answer.status in _FINAL:
            raise BadData(f"{self.name}: the server answers {answer.status} {answer.reason}")
        if answer.status != 206:
            raise OSError(f"the server answers {answer.status} {answer.reason}")
        told = answer.getheader("Content-Range") or ""
        if not told.startswith(f"bytes {start}-") or not told.rpartition("/")[2].isdigit():
            raise OSError(f"the server answers for {printable(told)!r}")


def _read(answer: http.client.HTTPResponse, count: int, limit_s: float) -> bytes:
    """The body, of a length that must be `count`, within a time that a drip-feeding server cannot stretch."""
    until, parts, left = time.monotonic() + limit_s, [], count
    while left:
        part = answer.read1(min(left, 1 << 20))
        if not part:
            raise OSError(f"the answer ends {left} bytes early")
        if time.monotonic() > until:
            raise TimeoutError(f"{count} bytes took more than {limit_s:g} s")
        parts.append(part)
        left -= len(part)
    if answer.read1(1):
        raise OSError(f"the answer is longer than the {count} bytes asked for")
    return b"".join(parts)


class _Idle:
    """Open connections that nobody is using, a few for each server; of this process, for a fork must not share them."""

    def __init__(self) -> None:
        self._lock, self._process = Lock(), os.getpid()
        self._held: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}

    def take(self, scheme: str, server: str, timeout_s: float) -> http.client.HTTPConnection:
        """A connection to a server, which opens by itself when it is first used."""
        with self._lock:
            if self._process != os.getpid():
                self._held, self._process = {}, os.getpid()
            if held := self._held.get((scheme, server)):
                return held.pop()
        if scheme == "https":
            return http.client.HTTPSConnection(server, timeout=timeout_s, context=ssl.create_default_context())
        return http.client.HTTPConnection(server, timeout=timeout_s)

    def put(self, scheme: str, server: str, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last answer was read to its end."""
        with self._lock:
            held = self._held.setdefault((scheme, server), [])
            if len(held) < _MOST_IDLE:
                return held.append(connection)
        return connection.close()

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for held in self._held.values():
                while held:
                    held.pop().close()


IDLE = _Idle()
atexit.register(IDLE.close)
