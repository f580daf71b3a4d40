"""Bytes at an offset of a file: on this disk, behind http(s), or in an object store (the extra `cloud`)."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from onefold.data.decode import printable
from onefold.data.patience import Patience, insisted
from onefold.data.ranges import HttpFile
from onefold.errors import BadData, MissingExtra

STORES = ("s3://", "gs://", "az://")


class Blob(Protocol):
    """A file that can be read at any offset."""

    @property
    def name(self) -> str:
        """Where it lies, for messages."""

    @property
    def identity(self) -> str:
        """What changes when its content does: for caches."""

    @property
    def num_bytes(self) -> int:
        """Its size. Raises BadData where it cannot be had."""

    def read(self, start: int, count: int) -> bytes:
        """Exactly `count` bytes from `start` on. Raises BadData where they cannot be had."""


def open_blob(place: str | os.PathLike[str], patience: Patience | None = None) -> Blob:
    """The file at a path or URL; nothing is read yet."""
    text = os.fspath(place)
    if text.startswith(("http://", "https://")):
        return HttpFile(text, patience or Patience())
    if text.startswith(STORES):
        return StoredObject(text, patience or Patience())
    return LocalFile(Path(text))


@dataclass(frozen=True)
class LocalFile:
    """A file on this disk. A Blob."""

    path: Path

    @property
    def name(self) -> str:
        """The path, printable."""
        return printable(self.path)

    @property
    def identity(self) -> str:
        """Path, size and time of change."""
        status = self._status()
        return f"{self.path.absolute()} {status.st_size} {status.st_mtime_ns}"

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return self._status().st_size

    def read(self, start: int, count: int) -> bytes:
        """Bytes of the file, which is opened anew: it may have gone or been replaced."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                data = file.read(count)
        except (OSError, ValueError) as error:
            raise BadData(f"cannot read {self.name}: {error}") from error
        if len(data) != count:
            raise BadData(f"{self.name} ends before byte {start + count}: it is truncated")
        return data

    def _status(self) -> os.stat_result:
        try:
            return self.path.stat()
        except (OSError, ValueError) as error:
            raise BadData(f"cannot read {self.name}: {error}") from error


@dataclass(frozen=True)
class StoredObject:
    """An object in S3, GCS or Azure, by obstore; credentials and region come from the environment. A Blob."""

    url: str
    patience: Patience

    @property
    def name(self) -> str:
        """The URL."""
        return printable(self.url)

    @property
    def identity(self) -> str:
        """The URL, the size, and the store's mark of this version."""
        return f"{self.url} {self._head[0]} {self._head[1]}"

    @property
    def num_bytes(self) -> int:
        """The size of the object."""
        return self._head[0]

    def read(self, start: int, count: int) -> bytes:
        """Bytes of the object."""
        if count == 0:
            return b""
        store, key = self._place
        part = partial(store.get_range, key, start=start, length=count)
        return insisted(lambda: _whole(bytes(part()), count), self.name, self.patience)

    @cached_property
    def _head(self) -> tuple[int, str]:
        store, key = self._place
        head = insisted(lambda: store.head(key), self.name, self.patience)
        return head["size"], head.get("e_tag") or ""

    @cached_property
    def _place(self) -> tuple[Any, str]:  # obstore's stores have no common type
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise MissingExtra(f'{self.name} needs obstore: pip install "onefold[cloud]"') from error
        bucket, _, key = self.url.partition("://")[2].partition("/")
        store: Any = from_url(f"{self.url.partition('://')[0]}://{bucket}")
        return store, key


class BlobFile(io.RawIOBase):
    """A blob as a file to read and seek in, for what wants one."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob, self._at, self._size = blob, 0, blob.num_bytes

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """To a place in the file."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """What is left, up to the buffer's size."""
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._blob.read(self._at, count)
        self._at += count
        return count


def _whole(data: bytes, count: int) -> bytes:
    if len(data) != count:
        raise OSError(f"{len(data)} bytes came of {count}")
    return data
