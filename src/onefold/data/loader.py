"""Batches: seeded, sharded by rank, resumable to the step.

B = images of this rank in a batch, C = channels, H = W = size.

What a batch holds is a function of (seed, epoch, step) and of the files alone: the order is a keyed permutation, the
augmentation of a sample draws from a stream keyed by (seed, epoch, sample), and the state to resume from is the number
of steps done. Workers are threads: Pillow lets go of the interpreter while it decodes and resizes, and numpy while it
looks up; they share the source, its cache and the list of bad images, and can neither be orphaned nor fill /dev/shm.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from onefold.data.curriculum import Progressive
from onefold.data.dataset import Source, fingerprint
from onefold.data.preprocessing import Preprocessing
from onefold.data.sampler import generator, shuffled
from onefold.data.transforms import Augment
from onefold.errors import BadArgument, BadData

_AHEAD = 2  # batches being made while one is used
_LOG = logging.getLogger("onefold.data")


class Transform(Protocol):
    """What makes a picture into an array: `Augment`, or anything that draws from `rng` alone."""

    @property
    def at_least(self) -> int:
        """How small a picture may be decoded; 0: not at all."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.float32]:
        """float32 (C, H, W), the same shape for every picture."""

    def to_dict(self) -> Mapping[str, Any]:
        """What JSON can hold, for logs."""


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a source: images float32 (B, C, H, W) and labels int64 (B).

    `batch_size` counts the images of all ranks together, so the same run on another `world` sees the same batches.
    With `shuffle` (training) each epoch has its own order and an incomplete last batch is dropped; without, the order
    is the source's and every image comes exactly once over the ranks. A bad image raises (`on_bad` "error"), or is left
    out of its batch and noted once in `bad` and in the log ("skip"), until there are more than `max_bad` of them.
    """

    source: Source
    transform: Preprocessing | Transform | Progressive
    _: KW_ONLY
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    rank: int = 0
    world: int = 1
    num_workers: int = 0
    on_bad: Literal["error", "skip"] = "error"
    max_bad: int | None = None  # None: one in a hundred, or ten
    bad: dict[str, str] = field(default_factory=dict, repr=False)  # name -> why, in the order of meeting; may be shared

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise BadArgument(f"rank is {self.rank} of {self.world}, expected 0 to one less than the number of ranks")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise BadArgument(f"the batch size is {self.batch_size}, expected a multiple of the {self.world} ranks")
        if self.num_workers < 0 or self.on_bad not in ("error", "skip"):
            raise BadArgument(f"num_workers is {self.num_workers} and on_bad {self.on_bad!r}: 0 or more, error or skip")
        if self.shuffle and len(self.source) < self.batch_size:
            count = len(self.source)
            raise BadData(f"{count} images do not fill one batch of {self.batch_size}: choose a smaller batch size")

    def __len__(self) -> int:
        """Steps of an epoch, for this rank."""
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole if self.shuffle or rest <= self.rank else whole + 1

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch n (from 0) from step `start` on: the same, to the bit, as without a start."""
        if n < 0 or not 0 <= start <= len(self):
            raise BadArgument(f"epoch {n} from step {start}: expected 0 or more, and a step of 0 to {len(self)}")
        return self._epoch(n, start)

    def fingerprint(self) -> str:
        """SHA-256 of the source's classes, names, labels and sizes: a resume checks that it is the same."""
        return fingerprint(self.source)

    def describe(self) -> dict[str, Any]:
        """What JSON can hold, for logs."""
        return {
            "images": len(self.source),
            "classes": len(self.source.classes),
            "batch_size": self.batch_size,
            "steps": len(self),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world": self.world,
            "num_workers": self.num_workers,
            "on_bad": self.on_bad,
            "transform": dict(self.transform.to_dict()),
        }

    def samples(self, n: int, step: int) -> NDArray[np.int64]:
        """Which samples this rank has at a step of epoch n."""
        last = min((step + 1) * self.batch_size, len(self.source))
        places = np.arange(step * self.batch_size, last, dtype=np.int64)[self.rank :: self.world]
        return shuffled(places, len(self.source), seed=self.seed, epoch=n) if self.shuffle else places

    def _epoch(self, n: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        shares = (self.samples(n, step) for step in range(start, len(self)))
        with closing(self._threaded(n, shares) if self.num_workers else self._inline(n, shares)) as stream:
            for samples, made in stream:
                batch = self._batch(samples, made)
                if batch is not None:
                    yield batch

    def _inline(self, n: int, shares: Iterable[NDArray[np.int64]]) -> Generator[_Made, None, None]:
        return ((samples, self._make(n, samples)) for samples in shares)

    def _threaded(self, n: int, shares: Iterable[NDArray[np.int64]]) -> Generator[_Made, None, None]:
        """Each batch made by all threads, a few batches ahead of the one in use."""
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="onefold-data")
        under_way: deque[tuple[NDArray[np.int64], list[Future[list[_Sample]]]]] = deque()
        try:
            for samples in shares:
                parts = np.array_split(samples, self.num_workers)
                under_way.append((samples, [pool.submit(self._make, n, part) for part in parts]))
                if len(under_way) > _AHEAD:
                    yield _gathered(*under_way.popleft())
            while under_way:
                yield _gathered(*under_way.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, n: int, samples: NDArray[np.int64]) -> list[_Sample]:
        made: list[_Sample] = []
        for i in samples.tolist():
            try:
                made.append(self._sample(n, i))
            except BadData as error:
                made.append(error)
        return made

    def _sample(self, n: int, i: int) -> NDArray[np.float32]:
        transform = self.transform.at_epoch(n) if isinstance(self.transform, Progressive) else self.transform
        if isinstance(transform, Preprocessing):
            return transform(self.source.image(i))
        rng = generator(self.seed, n, i)
        window = transform.window(rng) if isinstance(transform, Augment) else None
        if isinstance(transform, Augment) and window is not None:
            return transform.after_crop(self.source.crop(i, window), rng)
        return transform(self.source.image(i, at_least=transform.at_least), rng)

    def _batch(self, samples: NDArray[np.int64], made: list[_Sample]) -> tuple[Tensor, Tensor] | None:
        """The batch of what could be made; nothing where nothing could, which in training is an error."""
        images: list[NDArray[np.float32]] = []
        labels: list[int] = []
        for i, sample in zip(samples.tolist(), made, strict=True):
            if isinstance(sample, BadData):
                self._note(i, sample)
                continue
            images.append(sample)
            labels.append(self.source.label(i))
        if images:
            return torch.from_numpy(np.stack(images)), torch.tensor(labels, dtype=torch.int64)
        if self.shuffle:
            raise BadData(f"every image of a batch is bad, {len(self.bad)} so far: {list(self.bad.values())[-1]}")
        return None

    def _note(self, i: int, error: BadData) -> None:
        if self.on_bad == "error":
            raise error
        name = self.source.name(i)
        if name in self.bad:
            return
        self.bad[name] = str(error)
        limit = max(10, len(self.source) // 100) if self.max_bad is None else self.max_bad
        if len(self.bad) > limit:
            raise BadData(f"more than {limit} of {len(self.source)} images are bad, the last: {error}")
        _LOG.warning("left out, %d so far (the limit is %d): %s", len(self.bad), limit, error)


_Sample = NDArray[np.float32] | BadData
_Made = tuple[NDArray[np.int64], list[_Sample]]


def _gathered(samples: NDArray[np.int64], parts: list[Future[list[_Sample]]]) -> _Made:
    return samples, [sample for part in parts for sample in part.result()]
