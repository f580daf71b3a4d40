"""Shards for streaming: a manifest of all shards, and beside each shard an index of its images.

    manifest.json       classes, and of each shard its name, its number of images and the SHA-256 of its index
    <shard>.index       little-endian records: offset int64, size int32, class int32, CRC-32 uint32 of the image's bytes

The manifest takes about 100 bytes a shard and is read whole; an index takes 20 bytes an image and is read, and checked
against the manifest, when its shard is. Shards are plain tars, so everything else reads them too.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onefold.data.patience import Patience
from onefold.data.remote import open_blob
from onefold.data.shards import TarFile, open_packed
from onefold.errors import BadArgument, BadData
from onefold.storage import replacing, write_text

RECORD = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc", "<u4")])
FORMAT = "onefold shards 1"
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The shards under one place (a folder or a URL), in the order that numbers their images."""

    place: str
    classes: tuple[str, ...]
    names: Sequence[str]
    counts: NDArray[np.int64]
    digests: Sequence[str]
    patience: Patience

    @property
    def num_samples(self) -> int:
        """Images in all shards."""
        return int(self.ends[-1])

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The number of images up to the end of each shard."""
        return np.cumsum(self.counts)

    def fingerprint(self) -> str:
        """SHA-256 over classes, names, counts and indexes, which hold the CRC of every image."""
        told = [self.classes, list(self.names), self.counts.tolist(), list(self.digests)]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def shards_of(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """(shard, first, last) of the images first..last-1, counted from each shard's first."""
        parts = []
        shard = int(np.searchsorted(self.ends, first, side="right"))
        while first < last:
            start = int(self.ends[shard] - self.counts[shard])
            stop = min(last, int(self.ends[shard]))
            parts.append((shard, first - start, stop - start))
            first, shard = stop, shard + 1
        return parts

    def index(self, shard: int) -> NDArray[Any]:
        """The records of a shard. Raises BadData where its index cannot be read or is not the one it should be."""
        blob = open_blob(f"{self.place}/{self.names[shard]}.index", self.patience)
        for _ in range(self.patience.tries):  # what was damaged on its way comes whole the next time
            data = blob.read(0, int(self.counts[shard]) * RECORD.itemsize)
            if hashlib.sha256(data).hexdigest() == self.digests[shard]:
                return np.frombuffer(data, RECORD)
        raise BadData(f"{blob.name} is damaged or of another version: its SHA-256 is not the manifest's")


def read_manifest(place: str, patience: Patience | None = None) -> Manifest:
    """The manifest of a folder or URL. Raises BadData where it is not there or cannot be."""
    place, patience = place.rstrip("/").removesuffix("/manifest.json"), patience or Patience()
    blob = open_blob(f"{place}/manifest.json", patience)
    size = blob.num_bytes
    if size > _MAX_BYTES:
        raise BadData(f"{blob.name} has {size} bytes: that is no manifest")
    try:
        told = json.loads(blob.read(0, size))
        shards = told["shards"]
        names, digests = [str(s["name"]) for s in shards], [str(s["index_sha256"]) for s in shards]
        counts = np.array([s["images"] for s in shards], np.int64)
        classes = tuple(map(str, told["classes"]))
        sound = told["format"] == FORMAT and len(counts) and counts.min() > 0 and len(classes)
    except BadData:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadData(f"{blob.name} is no manifest of shards: {error!r}") from error
    if not sound or any("/" in name or name.startswith(".") for name in names):
        raise BadData(f"{blob.name} is no manifest of shards: expected the format {FORMAT!r}, classes and shards")
    return Manifest(place=place, classes=classes, names=names, counts=counts, digests=digests, patience=patience)


def write_manifest(folder: Path) -> Path:
    """Read the tars of a folder once, and write their indexes and the manifest beside them."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    if not tars:
        raise BadArgument(f"{folder} holds no .tar to stream")
    packed, shards = open_packed({"all": tars}, "train"), []
    for number, (path, file) in enumerate(zip(map(Path, tars), packed.files, strict=True)):
        assert isinstance(file, TarFile)
        records = np.empty(len(file), RECORD)
        for row in range(len(file)):
            member = file.member(row)
            label = packed.labels[int(packed.starts[number]) + row]
            records[row] = (member.offset, member.size, label, zlib.crc32(file.read(row)))
        data = records.tobytes()
        with replacing(path.with_name(f"{path.name}.index")) as aside:
            aside.write_bytes(data)
        entry = {"name": path.name, "images": len(file), "index_sha256": hashlib.sha256(data).hexdigest()}
        shards.append(entry)
    told = {"format": FORMAT, "classes": packed.classes, "shards": shards}
    write_text(folder / "manifest.json", json.dumps(told, indent=0))
    return folder / "manifest.json"
