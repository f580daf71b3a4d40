"""Batches of images: seeded, divided among ranks, resumable at any step; and a cache of decoded images.

B = images of this rank in a batch, C = channels, H = W = size.

What a batch holds is a function of (seed, epoch, step) and of the files alone: the order is a keyed permutation, the
augmentation of a sample draws from a stream keyed by (seed, epoch, sample), and the state to resume from is the number
of steps done. Workers are threads: Pillow releases the interpreter lock while it decodes and resizes, and numpy while
it looks up. They share the dataset, its cache and the list of bad images, and there are no processes to be orphaned and
no shared memory to fill up.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from onefold.data.augmentation import Augment
from onefold.data.crop import Crop, CropBox
from onefold.data.curriculum import ProgressiveAugment
from onefold.data.dataset import Dataset
from onefold.data.fingerprint import dataset_fingerprint
from onefold.data.mixup import Mixing
from onefold.data.preprocessing import Preprocessing, ValueRange
from onefold.data.sampler import batch_generator, sample_generator, shuffled_indices
from onefold.errors import BadArgument, BadData

_PREFETCH = 2  # batches that are made while one is used
_MAX_NAMED = 100  # bad images that the log names
_LOG = logging.getLogger("onefold.data")


class Transform(Protocol):
    """Makes an array of a picture: `Augment`, or anything that draws from `rng` alone."""

    @property
    def min_decode_side(self) -> int:
        """The shortest side at which a picture may be decoded; 0: full size."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.float32]:
        """Give float32 (C, H, W), the same shape for every picture."""


_Sample = NDArray[np.float32] | BadData
_Samples = tuple[NDArray[np.int64], list[_Sample]]  # their numbers, and what was made of each


@dataclass(frozen=True, eq=False)
class ImageLoader:
    """Gives batches of a dataset: images float32 (B, C, H, W) and labels int64 (B).

    With `shuffle` (training) `batch_size` counts the images of all ranks together, so the same run on another `world`
    sees the same batches; each epoch has its own order, and an incomplete last batch is dropped. Without (evaluation)
    the order is the dataset's, every image comes exactly once over the ranks, and the batches are dealt to them in
    turn: whole ones, so that what a network says of them does not depend on `world`. With `pin_memory` the images are
    in memory from where a GPU takes them without waiting. A bad image raises (`on_bad` "error"), or is
    left out of its batch and noted once in `bad` and in the log ("skip"), until there are more than `max_bad` of them;
    a batch of bad images alone has, with `shuffle`, B = 0.
    """

    dataset: Dataset
    transform: Preprocessing | Transform | ProgressiveAugment
    _: KW_ONLY
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    rank: int = 0
    world: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    on_bad: Literal["error", "skip"] = "error"
    max_bad: int | None = None  # None: see `max_bad_images`
    bad: dict[str, str] = field(default_factory=dict, repr=False)  # name -> why, in the order of meeting; may be shared

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise BadArgument(f"rank is {self.rank} of {self.world}, expected 0 to one less than the number of ranks")
        if self.batch_size < 1 or (self.shuffle and self.batch_size % self.world):
            raise BadArgument(f"the batch size is {self.batch_size}, expected a multiple of the {self.world} ranks")
        if self.num_workers < 0 or self.on_bad not in ("error", "skip"):
            raise BadArgument(f"num_workers is {self.num_workers} and on_bad {self.on_bad!r}: 0 or more, error or skip")
        if self.shuffle and len(self.dataset) < self.batch_size:
            count = len(self.dataset)
            raise BadData(f"{count} images do not fill one batch of {self.batch_size}: choose a smaller batch size")

    def __len__(self) -> int:
        """Steps of an epoch, for this rank."""
        if self.shuffle:
            return len(self.dataset) // self.batch_size
        return len(range(self.rank, -(-len(self.dataset) // self.batch_size), self.world))

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the batches of epoch n (from 0) from step `start` on: the same, to the bit, as without a start."""
        if n < 0 or not 0 <= start <= len(self):
            raise BadArgument(f"epoch {n} from step {start}: expected 0 or more, and a step of 0 to {len(self)}")
        return self._epoch(n, start)  # a generator of its own, so that a wrong argument raises here and not later

    def fingerprint(self) -> str:
        """Give the dataset's fingerprint: a resume checks that it is the same."""
        return dataset_fingerprint(self.dataset)

    def sample_indices(self, n: int, step: int) -> NDArray[np.int64]:
        """Give the numbers of the samples that this rank has at a step of epoch n."""
        batch = step if self.shuffle else step * self.world + self.rank
        last = min((batch + 1) * self.batch_size, len(self.dataset))
        positions = np.arange(batch * self.batch_size, last, dtype=np.int64)
        if not self.shuffle:
            return positions
        return shuffled_indices(positions[self.rank :: self.world], len(self.dataset), seed=self.seed, epoch=n)

    def _epoch(self, n: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        steps = (self.sample_indices(n, step) for step in range(start, len(self)))
        inline = ((numbers, self._make(n, numbers)) for numbers in steps)
        with closing(self._threaded(n, steps) if self.num_workers else inline) as stream:
            for numbers, samples in stream:
                batch = self._collate(n, numbers, samples)
                if batch is not None:
                    yield batch

    def _threaded(self, n: int, steps: Iterable[NDArray[np.int64]]) -> Generator[_Samples, None, None]:
        """Make each batch by all threads, a few batches ahead of the one in use."""
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="onefold-data")
        pending: deque[tuple[NDArray[np.int64], list[Future[list[_Sample]]]]] = deque()
        try:
            for numbers in steps:
                parts = np.array_split(numbers, self.num_workers)
                pending.append((numbers, [pool.submit(self._make, n, part) for part in parts]))
                if len(pending) > _PREFETCH:
                    yield _wait(*pending.popleft())
            while pending:
                yield _wait(*pending.popleft())
        finally:  # also when the epoch is left early
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, n: int, numbers: NDArray[np.int64]) -> list[_Sample]:
        samples: list[_Sample] = []
        for i in numbers.tolist():
            try:
                samples.append(self._sample(n, i))
            except BadData as error:  # what becomes of it is decided in order, in the thread that collates
                samples.append(error)
        return samples

    def _sample(self, n: int, i: int) -> NDArray[np.float32]:
        transform = self.transform.at_epoch(n) if isinstance(self.transform, ProgressiveAugment) else self.transform
        if isinstance(transform, Preprocessing):
            return transform(self.dataset.image(i, value_range=transform.value_range))
        rng = sample_generator(self.seed, n, i)
        crop_box = transform.crop_box(rng) if isinstance(transform, Augment) else None
        if isinstance(transform, Augment) and crop_box is not None:
            return transform.after_crop(self.dataset.crop(i, crop_box), rng)
        value_range = transform.preprocessing.value_range if isinstance(transform, Augment) else None
        return transform(self.dataset.image(i, min_side=transform.min_decode_side, value_range=value_range), rng)

    def _collate(self, n: int, numbers: NDArray[np.int64], samples: list[_Sample]) -> tuple[Tensor, Tensor] | None:
        """Stack what could be made; where nothing could, no images in training, and otherwise None."""
        images: list[NDArray[np.float32]] = []
        labels: list[int] = []
        for i, sample in zip(numbers.tolist(), samples, strict=True):
            if isinstance(sample, BadData):
                self._note(i, sample)
                continue
            images.append(sample)
            labels.append(self.dataset.label(i))
        if images:
            stacked = torch.empty(len(images), *images[0].shape, pin_memory=self.pin_memory)
            np.stack(images, out=stacked.numpy())
            classes = torch.tensor(labels, dtype=torch.int64)
            return stacked, classes.pin_memory() if self.pin_memory else classes
        # In training a step counts its batches, so that one without images has to come too.
        return (torch.zeros(0, *self._shape(n)), torch.zeros(0, dtype=torch.int64)) if self.shuffle else None

    def _shape(self, n: int) -> tuple[int, int, int]:
        """Give C, H, W of an image in epoch n, as far as the transform says."""
        transform = self.transform.at_epoch(n) if isinstance(self.transform, ProgressiveAugment) else self.transform
        made = transform.preprocessing if isinstance(transform, Augment) else transform
        return (made.channels, made.size, made.size) if isinstance(made, Preprocessing) else (3, 1, 1)

    def _note(self, i: int, error: BadData) -> None:
        if self.on_bad == "error":
            raise error
        name = self.dataset.name(i)
        if name in self.bad:
            return
        self.bad[name] = str(error)
        if len(self.bad) == len(self.dataset):
            raise BadData(f"none of the {len(self.dataset)} images can be read, the last: {error}")
        limit = max_bad_images(len(self.dataset)) if self.max_bad is None else self.max_bad
        if len(self.bad) > limit:
            raise BadData(f"more than {limit} of {len(self.dataset)} images are bad, the last: {error}")
        if len(self.bad) <= _MAX_NAMED:
            last = "; further ones are not named" if len(self.bad) == _MAX_NAMED else ""
            _LOG.warning("left out, %d so far (the limit is %d): %s%s", len(self.bad), limit, error, last)


def max_bad_images(count: int) -> int:
    """Give how many of `count` images may be bad and left out, where nothing else is said."""
    return max(10, count // 100)


def _wait(numbers: NDArray[np.int64], parts: list[Future[list[_Sample]]]) -> _Samples:
    return numbers, [sample for part in parts for sample in part.result()]


# ----------------------------------------------------------------------------------------------- cache

_SMALLEST_BYTES = 4 * 64 * 64  # with less room than this no image is decoded whole to be kept
_MAX_TOO_LARGE = 16  # so many more images that were too large than kept ones, and no further one is tried


class CachedDataset:
    """A dataset whose decoded images stay in memory, the first `limit_mib` of them. A Dataset.

    What it gives is bit for bit what the dataset gives: an image so large that a crop of it might be decoded at a
    reduced scale is left to the dataset.
    """

    def __init__(self, dataset: Dataset, limit_mib: int = 256) -> None:
        self.dataset = dataset
        self._free_bytes = limit_mib << 20
        self._images: dict[tuple[int, int, ValueRange | None], Image.Image] = {}  # what was asked for -> the picture
        self._too_large: set[int] = set()
        self._digests: dict[int, str] = {}
        self._lock = Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the dataset."""
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def label(self, i: int) -> int:
        """Give the class index of image i."""
        return self.dataset.label(i)

    def name(self, i: int) -> str:
        """Give the name of image i."""
        return self.dataset.name(i)

    def image(self, i: int, *, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
        """Give image i, decoded the first time it is asked for; not to be changed in place."""
        cached = self._images.get((i, min_side, value_range))
        if cached is not None:
            return cached
        image = self.dataset.image(i, min_side=min_side, value_range=value_range)
        num_bytes = 4 * image.width * image.height  # Pillow holds RGB in four bytes
        with self._lock:
            if num_bytes <= self._free_bytes:
                self._free_bytes -= num_bytes
                self._images[i, min_side, value_range] = image
        return image

    def raw_samples(self, i: int) -> NDArray[Any] | None:
        """Read the samples of image i where they have more than 8 bits, else None."""
        return self.dataset.raw_samples(i)

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Give a crop of image i, out of the whole image where that is cached."""
        no_use = self._free_bytes < _SMALLEST_BYTES or len(self._too_large) > _MAX_TOO_LARGE + len(self._images)
        if i in self._too_large or (no_use and (i, 0, crop_box.value_range) not in self._images):
            return self.dataset.crop(i, crop_box)
        whole = self.image(i, value_range=crop_box.value_range)
        if min(whole.size) >= 2 * crop_box.size:  # the dataset might decode the crop at half the scale
            self._too_large.add(i)
            return self.dataset.crop(i, crop_box)
        return crop_box.crop_image(whole)

    def num_bytes(self, i: int) -> int:
        """Give the stored size of image i."""
        return self.dataset.num_bytes(i)

    def digest(self, i: int) -> str:
        """Give a digest of image i, read the first time it is asked for."""
        if i not in self._digests:
            self._digests[i] = self.dataset.digest(i)
        return self._digests[i]


class _LabelledBatches(Protocol):
    """Batches of an epoch, as `ImageLoader` gives them."""

    def __len__(self) -> int: ...

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the batches of epoch n from step `start` on."""

    def fingerprint(self) -> str:
        """Give a digest that tells these data from others."""


@dataclass(frozen=True, eq=False)
class MixupLoader:
    """Batches after mixup or CutMix, on `device`: images, and class shares (B, K) in place of labels."""

    batches: _LabelledBatches
    mixing: Mixing
    _: KW_ONLY
    num_classes: int
    seed: int = 0
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        """Steps of an epoch, for this rank."""
        return len(self.batches)

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the batches of epoch n (from 0) from step `start` on: the same, to the bit, as without a start."""
        for step, (images, labels) in enumerate(self.batches.epoch(n, start), start):
            rng = batch_generator(self.seed, n, step, self.rank)
            on_device = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield self.mixing(*on_device, self.num_classes, rng)

    def fingerprint(self) -> str:
        """Give that of the batches: mixing is no part of the data."""
        return self.batches.fingerprint()
