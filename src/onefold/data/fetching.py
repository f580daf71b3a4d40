"""Fetching the blocks of a stream: whole, checked against their CRC-32, a window ahead of the one in use."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from onefold.data.blocks import BlockOrder
from onefold.data.manifest import Manifest
from onefold.data.patience import Patience
from onefold.data.remote import Blob, open_blob
from onefold.errors import BadData

_INDEXES = 64  # shards whose records are kept
_GAP_BYTES = 1 << 16  # what lies between two images is read along, up to this, rather than asked for apart

Image = tuple[bytes, int]  # as stored; its class
Block = Sequence[Image | BadData]


class Windows:
    """The blocks of the windows in use and of the next one, fetched once each. A context: it ends its threads."""

    def __init__(self, manifest: Manifest, num_threads: int) -> None:
        self._manifest = manifest
        self._index = lru_cache(_INDEXES)(manifest.index)
        self._pool = ThreadPoolExecutor(num_threads, "onefold-fetch")
        self._held: dict[int, dict[int, Future[Block]]] = {}  # window -> block -> its images

    def __enter__(self) -> Windows:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def around(self, order: BlockOrder, v: int, first: int, last: int) -> dict[int, Future[Block]]:
        """The blocks of worker v's slots first..last-1, and of their windows; the next window is begun."""
        size = order.window * order.block
        here = range(first // size, (last - 1) // size + 1)
        for window in [*here, here[-1] + 1]:
            if window not in self._held:
                blocks = order.window_of(v, window * size)[1]
                self._held[window] = {
                    block: self._pool.submit(self._fetch, block, order.block) for block in blocks.tolist()
                }
        for window in [window for window in self._held if window < here[0]]:
            del self._held[window]
        return {block: got for window in here for block, got in self._held[window].items()}

    def _fetch(self, block: int, size: int) -> Block:
        images: list[Image | BadData] = []
        last = min((block + 1) * size, self._manifest.num_samples)
        for shard, first, stop in self._manifest.shards_of(block * size, last):
            blob = open_blob(f"{self._manifest.place}/{self._manifest.names[shard]}", self._manifest.patience)
            try:
                images += read_records(blob, self._index(shard)[first:stop], self._manifest.patience)
            except BadData as error:
                images += [error] * (stop - first)
        return images


def read_records(blob: Blob, records: NDArray[Any], patience: Patience) -> list[Image | BadData]:
    """The images of an index's records; those whose bytes are not the index's after all tries as BadData."""
    found: dict[int, bytes] = {}
    wanted = list(range(len(records)))
    reason = f"{blob.name}: the bytes of an image are not those that were indexed (CRC-32)"
    for number in range(patience.tries):
        if number:
            time.sleep(patience.pause_s * 2 ** (number - 1) * random.uniform(0.5, 1.5))
        for group in _together(records, wanted):
            start = int(records["offset"][group[0]])
            end = int(records["offset"][group[-1]]) + int(records["size"][group[-1]])
            data = memoryview(blob.read(start, end - start))
            for i in group:
                begin = int(records["offset"][i]) - start
                image = bytes(data[begin : begin + int(records["size"][i])])
                if zlib.crc32(image) == int(records["crc"][i]):
                    found[i] = image
        wanted = [i for i in wanted if i not in found]
        if not wanted:
            break
    labels = records["label"].tolist()
    return [(found[i], labels[i]) if i in found else BadData(reason) for i in range(len(records))]


def _together(records: NDArray[Any], wanted: Sequence[int]) -> list[list[int]]:
    """Which records are read by one request: neighbours, in the order of their offsets."""
    groups: list[list[int]] = []
    for i in sorted(wanted, key=lambda i: int(records["offset"][i])):
        before = groups[-1][-1] if groups else None
        if before is not None:
            gap = int(records["offset"][i]) - int(records["offset"][before]) - int(records["size"][before])
            if 0 <= gap <= _GAP_BYTES:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups
