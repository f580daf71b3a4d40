"""Batches out of shards that are read as they are needed, from a disk, a web server or an object store.

A batch of logical worker v is a function of (seed, step, v): see blocks.py. A resume at any step fetches the blocks of
the current window again and nothing before them. Blocks are fetched by a few threads, a window ahead of the one in use.
Every image's bytes are checked against the CRC-32 of the index; a block that cannot be had whole after all tries stops
the run, or with `on_bad` "skip" its images are left out, each noted in `bad` and in the log.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onefold.data.blocks import BlockOrder
from onefold.data.curriculum import Progressive
from onefold.data.decode import decode, decode_crop
from onefold.data.fetching import Block, Windows
from onefold.data.loader import Transform
from onefold.data.manifest import Manifest
from onefold.data.preprocessing import Preprocessing
from onefold.data.sampler import generator
from onefold.data.transforms import Augment
from onefold.errors import BadArgument, BadData

_AHEAD = 2  # batches being made while one is used
_LOG = logging.getLogger("onefold.data")

_Made = tuple[NDArray[np.int64], list[Future[tuple[NDArray[np.float32], int]]]]


@dataclass(frozen=True, eq=False)
class Stream:
    """The batches of logical worker `rank` of `world`: images float32 (B, C, H, W), labels int64 (B,). Endless passes.

    `batch_size` counts the images of all logical workers together. An epoch is as many steps as whole batches fit into
    the data; the stream itself goes on over the epochs' borders, so that every image comes once a pass.
    """

    manifest: Manifest
    transform: Preprocessing | Transform | Progressive
    _: KW_ONLY
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    block: int = 64
    window: int = 8
    num_workers: int = 2
    on_bad: Literal["error", "skip"] = "error"
    max_bad: int = 1000
    bad: dict[str, str] = field(default_factory=dict, repr=False)  # image -> why; may be shared

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world or not 0 <= self.rank < self.world:
            given = f"rank {self.rank} of {self.world}, batch size {self.batch_size}"
            raise BadArgument(f"{given}: expected a batch size that the logical workers divide")
        if self.num_workers < 1 or self.on_bad not in ("error", "skip"):
            raise BadArgument(f"num_workers is {self.num_workers} and on_bad {self.on_bad!r}: 1 or more, error or skip")
        if self.manifest.num_samples < self.batch_size:
            raise BadData(f"{self.manifest.num_samples} images do not fill one batch of {self.batch_size}")

    @property
    def order(self) -> BlockOrder:
        """Which sample comes when."""
        return BlockOrder(
            num_samples=self.manifest.num_samples,
            block=self.block,
            workers=self.world,
            window=self.window,
            seed=self.seed,
        )

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.manifest.num_samples // self.batch_size

    def fingerprint(self) -> str:
        """SHA-256 of what tells these images and this order from others."""
        return f"{self.manifest.fingerprint()} {self.block} {self.window}"

    def describe(self) -> dict[str, Any]:
        """What JSON can hold, for logs."""
        told: Mapping[str, Any] = {"images": self.manifest.num_samples, "classes": len(self.manifest.classes)}
        own = {name: getattr(self, name) for name in ("batch_size", "seed", "world", "block", "window", "on_bad")}
        return {**told, **own, "steps": len(self), "transform": dict(self.transform.to_dict())}

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch n (from 0) from step `start` on: the same, to the bit, as without a start."""
        if n < 0 or not 0 <= start <= len(self):
            raise BadArgument(f"epoch {n} from step {start}: expected 0 or more, and a step of 0 to {len(self)}")
        return self._epoch(n, start)

    def samples(self, n: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(pass, sample) of what this logical worker has at a step of epoch n."""
        share = self.batch_size // self.world
        return self.order.at(self.rank, (n * len(self) + step) * share, share)

    def _epoch(self, n: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        under_way: deque[_Made] = deque()
        with (
            ThreadPoolExecutor(self.num_workers, "onefold-stream") as pool,
            Windows(self.manifest, self.num_workers) as at,
        ):
            try:
                for step in range(start, len(self)):
                    under_way.append(self._begun(n, step, at, pool))
                    if len(under_way) > _AHEAD:
                        yield self._gathered(under_way.popleft())
                while under_way:
                    yield self._gathered(under_way.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _begun(self, n: int, step: int, windows: Windows, pool: ThreadPoolExecutor) -> _Made:
        """The images of a step, on their way."""
        share = self.batch_size // self.world
        first = (n * len(self) + step) * share
        blocks = windows.around(self.order, self.rank, first, first + share)
        passes, samples = self.samples(n, step)
        each = zip(passes.tolist(), samples.tolist(), strict=True)
        return samples, [pool.submit(self._sample, n, e, i, blocks[i // self.block]) for e, i in each]

    def _sample(self, n: int, e: int, i: int, block: Future[Block]) -> tuple[NDArray[np.float32], int]:
        got = block.result()[i % self.block]
        if isinstance(got, BadData):
            raise got
        data, label = got
        transform = self.transform.at_epoch(n) if isinstance(self.transform, Progressive) else self.transform
        name = f"image {i}"
        if isinstance(transform, Preprocessing):
            return transform(decode(data, name=name)), label
        rng = generator(self.seed, e, i)
        crop = transform.window(rng) if isinstance(transform, Augment) else None
        if isinstance(transform, Augment) and crop is not None:
            return transform.after_crop(decode_crop(data, crop, name=name), rng), label
        return transform(decode(data, name=name, at_least=transform.at_least), rng), label

    def _gathered(self, made: _Made) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for i, future in zip(made[0].tolist(), made[1], strict=True):
            try:
                image, label = future.result()
            except BadData as error:
                self._note(i, error)
                continue
            images.append(image)
            labels.append(label)
        if not images:
            raise BadData(f"every image of a batch is bad, {len(self.bad)} so far: {list(self.bad.values())[-1:]}")
        return torch.from_numpy(np.stack(images)), torch.tensor(labels, dtype=torch.int64)

    def _note(self, i: int, error: BadData) -> None:
        if self.on_bad == "error":
            raise error
        if str(i) not in self.bad:
            self.bad[str(i)] = str(error)
            _LOG.warning("left out image %d, %d so far (the limit is %d): %s", i, len(self.bad), self.max_bad, error)
        if len(self.bad) > self.max_bad:
            raise BadData(f"more than {self.max_bad} of {self.manifest.num_samples} images are bad, the last: {error}")
