"""What is in a tar of images: read once, then kept under XDG_CACHE_HOME; images are read in place, by their offsets.

Two layouts. Class folders: the class of `n01440764/1.jpg` is its first folder, folders that all images share left out.
WebDataset: the members of a sample share their name up to the first dot, and one of them gives its class:
    .cls    a number or a name, as text
    .json   an object with `label`, `cls` or `class`, a number or a name
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from onefold.data.decode import SUFFIXES, printable
from onefold.data.remote import Blob, BlobFile
from onefold.errors import BadData, NotWritable
from onefold.storage import write_text

BUFFER_BYTES = 4 << 20
_LABELS = (".cls", ".json")
_JSON_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """An image in a tar: its name there, where its bytes are, and its class if a member beside it says so."""

    name: str
    offset: int
    size: int
    label: int | str | None = None


def members(blob: Blob) -> list[Member]:
    """The images of a tar, in its order. Raises BadData where it cannot be read or is no tar."""
    kept = _cache(blob.identity)
    try:
        return [Member(**entry) for entry in json.loads(kept.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        pass  # not there yet, or not whole
    found = _labelled(blob, list(_walk(blob)))
    with suppress(NotWritable):  # then it will be read again
        write_text(kept, json.dumps([asdict(member) for member in found]))
    return found


def _walk(blob: Blob) -> Iterable[tuple[Member, bytes]]:
    """Images, and with their bytes the members that say classes."""
    try:
        with tarfile.open(fileobj=io.BufferedReader(BlobFile(blob), BUFFER_BYTES), mode="r:") as tar:
            for entry in tar:
                name, suffix = entry.name.removeprefix("./"), os.path.splitext(entry.name)[1].lower()
                hidden = any(part.startswith(".") for part in name.split("/"))
                if not entry.isreg() or entry.sparse is not None or hidden:
                    continue
                if suffix in SUFFIXES:
                    yield Member(name, entry.offset_data, entry.size), b""
                elif suffix in _LABELS and entry.size <= _MAX_LABEL_BYTES:
                    content = tar.extractfile(entry)
                    yield Member(name, entry.offset_data, entry.size), content.read() if content else b""
                tar.members = []  # type: ignore[attr-defined]  # it would keep every one
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        if isinstance(error, BadData):
            raise
        raise BadData(f"{blob.name} is no tar that can be read, or damaged: {error}") from error
    size = blob.num_bytes
    if size % 512 or size < 1024:
        raise BadData(f"{blob.name} is truncated: a tar's size is a multiple of 512 bytes, it has {size}")


def _labelled(blob: Blob, walked: list[tuple[Member, bytes]]) -> list[Member]:
    labels = {_key(m.name): _label(blob, m.name, content) for m, content in walked if _is_label(m.name)}
    images = [m for m, _ in walked if not _is_label(m.name)]
    if not images:
        raise BadData(f"{blob.name} holds no images")
    if not labels:
        return images
    missing = [m.name for m in images if _key(m.name) not in labels]
    if missing:
        raise BadData(f"{blob.name}: {len(missing)} images have no .cls or .json, the first: {printable(missing[0])}")
    return [Member(m.name, m.offset, m.size, labels[_key(m.name)]) for m in images]


def _is_label(name: str) -> bool:
    return name.lower().endswith(_LABELS)


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _label(blob: Blob, name: str, content: bytes) -> int | str:
    value: object = content.decode("utf-8", "surrogateescape").strip()
    if name.lower().endswith(".json"):
        try:
            told = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{blob.name}: {printable(name)} is not JSON: {error}") from error
        value = next((told[key] for key in _JSON_KEYS if key in told), None) if isinstance(told, dict) else None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "" or (value == -1):
        wanted = f"a class: a number, a name, or an object with {', '.join(_JSON_KEYS)}"
        raise BadData(f"{blob.name}: expected in {printable(name)} {wanted}")
    return value


def _cache(identity: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onefold" / "tars"
    return home / (hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32] + ".json")
