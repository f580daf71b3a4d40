"""Fingerprints of datasets: by what their images are known again when a run goes on, and when it is evaluated.

An image is known by its content wherever that can be read: its name and place may change, and its size and dates may be
those of another. Of more than `MAX_CONTENTS` images reading all would take hours: they are known by name and size, and
the fingerprint has the contents of that many, evenly spaced.

`TrainedOn` is what a file of weights or an artifact carries: enough to tell whether an image was trained on, without
the images, and without their names, which are private. Content does not tell an image that was saved again or resized:
for that it has keys of the pixels, of up to `_MAX_PIXELS` images, which say nearly surely and not more.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onefold.data.dataset import Dataset
from onefold.data.duplicates import distinctive_perceptual_hashes, match_perceptual_hashes, perceptual_hashes
from onefold.data.preprocessing import ValueRange
from onefold.errors import BadArgument, BadCheckpoint
from onefold.file_io import read_plain_file, write_text

MAX_CONTENTS = 20_000
"""The most images of a dataset whose contents are read for its fingerprint, and the most keys of a `TrainedOn`."""

_MAX_PIXELS = 5_000
"""The most images whose pixels are read for their keys."""

KeyKind = Literal["content", "name"]

_READERS = 8  # threads: a file server answers several at once
_KEY_BYTES = 6
_MAX_LIST_BYTES = 4 << 30


def evenly_spaced(count: int, most: int) -> Sequence[int]:
    """Give `most` of the numbers below `count`, evenly spaced; all where there are fewer."""
    return range(count) if count <= most else [i * count // most for i in range(most)]


def dataset_fingerprint(dataset: Dataset) -> str:
    """Compute two SHA-256 in hex, joined by "-": over classes, names, labels and sizes, and over contents.

    A resumed run checks that they are the same; the first alone is what older versions computed.
    """
    facts, contents = hashlib.sha256(repr(dataset.classes).encode()), hashlib.sha256()
    for i in range(len(dataset)):
        facts.update(f"{dataset.name(i)!r} {dataset.label(i)} {dataset.num_bytes(i)}\n".encode())
    for digest in _digests(dataset, evenly_spaced(len(dataset), MAX_CONTENTS)):
        contents.update(f"{digest}\n".encode())
    return f"{facts.hexdigest()}-{contents.hexdigest()}"


def image_keys(dataset: Dataset, by: KeyKind) -> list[str]:
    """Give for each image 24 hex digits that are the same wherever it lies: of its content, or of its name and size.

    An image that cannot be read has the key "".
    """
    if by == "content":
        return [digest[:24] for digest in _digests(dataset, range(len(dataset)))]
    facts = (f"{dataset.name(i)} {dataset.num_bytes(i)}" for i in range(len(dataset)))
    return [hashlib.sha256(fact.encode("utf-8", "surrogateescape")).hexdigest()[:24] for fact in facts]


def _digests(dataset: Dataset, numbers: Sequence[int]) -> Iterable[str]:
    with ThreadPoolExecutor(_READERS, thread_name_prefix="onefold-digest") as pool:
        yield from pool.map(dataset.digest, numbers, chunksize=64)


# ------------------------------------------------------------------------- what weights were trained on


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """Which images something was trained on, or calibrated on: their keys, sorted, shortened to 48 bits.

    There are at most `MAX_CONTENTS` keys, the smallest ones: of `images` more than that, an image whose key is larger
    than all of them is not known. `seed` and `val_fraction` are those of the split. `pixels` are keys of the pixels of
    up to `_MAX_PIXELS` images (see `perceptual_hashes`), none of older records and of images that are too much alike.
    """

    images: int
    by: KeyKind
    keys: NDArray[np.uint64]
    seed: int = 0
    val_fraction: float = 0.0
    pixels: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), np.uint64))

    @classmethod
    def from_keys(cls, keys: Iterable[str], by: KeyKind, *, seed: int = 0, val_fraction: float = 0.0) -> TrainedOn:
        """Make one of the keys of images, as `image_keys` gives them."""
        numbers = np.array(sorted(_number(key) for key in keys if key), np.uint64)
        return cls(
            images=len(numbers), by=by, keys=numbers[:MAX_CONTENTS], seed=int(seed), val_fraction=float(val_fraction)
        )

    def with_pixels(self, dataset: Dataset, value_range: ValueRange | None = None) -> TrainedOn:
        """Give the record with keys of the images' pixels, of `_MAX_PIXELS` evenly spaced where they are more."""
        keys = perceptual_hashes(dataset, evenly_spaced(len(dataset), _MAX_PIXELS), value_range)
        return replace(self, pixels=distinctive_perceptual_hashes(keys))

    @property
    def is_complete(self) -> bool:
        """Whether each image that was trained on is known."""
        return len(self.keys) == self.images

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self.keys.tolist())

    def contains(self, key: str) -> bool | None:
        """Whether the image of a key was trained on; None where that is not known. One that cannot be read: not."""
        if not key:
            return False
        number = _number(key)
        if number in self._known:
            return True
        return False if self.is_complete or number <= int(self.keys[-1]) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a card and a manifest hold them; `from_dict` is the inverse."""
        packed = b"".join(key.to_bytes(_KEY_BYTES, "big") for key in self.keys.tolist())
        text = base64.b64encode(packed).decode("ascii")
        split = {"seed": self.seed, "val_fraction": self.val_fraction}
        pixels = base64.b64encode(self.pixels.tobytes()).decode("ascii")
        return {"images": self.images, "by": self.by, **split, "keys": text, **({"pixels": pixels} if pixels else {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainedOn:
        """Read what `to_dict` wrote; raises BadArgument for anything else."""
        try:
            images, by, seed, share = (values[name] for name in ("images", "by", "seed", "val_fraction"))
            packed = base64.b64decode(values["keys"].encode("ascii"), validate=True)
            numbers = [int.from_bytes(packed[i : i + _KEY_BYTES], "big") for i in range(0, len(packed), _KEY_BYTES)]
            pixels = np.frombuffer(base64.b64decode(values.get("pixels", "").encode("ascii"), validate=True), np.uint64)
            is_sound = (
                type(images) is int
                and type(seed) is int
                and by in get_args(KeyKind)
                and isinstance(share, int | float)
                and 0 <= share <= 1
                and len(packed) == _KEY_BYTES * min(images, MAX_CONTENTS)
                and numbers == sorted(numbers)
                and len(pixels) % 2 == 0
                and len(pixels) <= 2 * _MAX_PIXELS
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadArgument(f"what the weights were trained on cannot be read: {error!r}") from error
        if not is_sound:
            raise BadArgument("what the weights were trained on cannot be read: it is not as it was written")
        return cls(
            images=images,
            by=by,
            keys=np.array(numbers, np.uint64),
            seed=seed,
            val_fraction=float(share),
            pixels=pixels.reshape(-1, 2),
        )


def _number(key: str) -> int:
    return int(key[: 2 * _KEY_BYTES], 16)


def find_trained_images(records: Sequence[TrainedOn], dataset: Dataset) -> list[bool | None]:
    """Say of each image whether any of the records has it: whether it was trained on; None where it is not known."""
    found: list[bool | None] = [False] * len(dataset)
    keys = {by: image_keys(dataset, by) for by in {record.by for record in records}}
    for record in records:
        for i, key in enumerate(keys[record.by]):
            has = record.contains(key)
            if has or (has is None and found[i] is False):
                found[i] = has
    return found


@dataclass(frozen=True, kw_only=True)
class TrainedCopies:
    """Which of the images that were `looked_at` are, by their pixels, copies of those of records: `numbers`.

    Content, which is looked at before, does not tell them.
    """

    numbers: tuple[int, ...]
    looked_at: int

    @property
    def found(self) -> int:
        """How many there are."""
        return len(self.numbers)


def find_trained_copies(
    records: Sequence[TrainedOn], dataset: Dataset, value_range: ValueRange | None = None
) -> TrainedCopies | None:
    """Look for copies of the images of records, saved again or resized; None where no record has keys for it.

    Of more than `_MAX_PIXELS` images so many are looked at, evenly spaced.
    """
    pixels = [record.pixels for record in records if len(record.pixels)]
    if not pixels:
        return None
    seen = find_trained_images(records, dataset)
    numbers = [i for i in evenly_spaced(len(dataset), _MAX_PIXELS) if seen[i] is not True]
    found = match_perceptual_hashes(perceptual_hashes(dataset, numbers, value_range), np.concatenate(pixels))
    return TrainedCopies(numbers=tuple(numbers[i] for i in np.flatnonzero(found)), looked_at=len(numbers))


# ------------------------------------------------------------------------------ the images of a run


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of a run: of each split the names, the classes' names, and the keys. In the run folder as CSV."""

    by: KeyKind
    splits: Mapping[str, Sequence[tuple[str, str, str]]]  # split -> (name, class, key)

    @classmethod
    def from_splits(cls, splits: Mapping[str, Dataset]) -> ImageList:
        """List the images of each split; all by content where none of them is too large for that."""
        by: KeyKind = "content" if max(map(len, splits.values())) <= MAX_CONTENTS else "name"
        return cls(by=by, splits={split: _rows(dataset, by) for split, dataset in splits.items()})

    def keys(self, split: str) -> list[str]:
        """Give the keys of a split's images, in its order."""
        return [key for _, _, key in self.splits.get(split, ())]

    def difference(self, split: str, dataset: Dataset) -> str:
        """Say in one sentence what is other in `dataset` than in the list of that split; "" where it is the same."""
        before = {name: (label, key) for name, label, key in self.splits.get(split, ())}
        now = {name: (label, key) for name, label, key in _rows(dataset, self.by)}
        kinds = {
            "gone": [name for name in before if name not in now],
            "new": [name for name in now if name not in before],
            "of another class": [name for name in now if name in before and now[name][0] != before[name][0]],
            "of other content": [name for name in now if name in before and now[name][1] != before[name][1]],
        }
        parts = [f"{len(names)} {kind} ({names[0]!a})" for kind, names in kinds.items() if names]
        return f"of {len(before)} {split} images {', '.join(parts)}" if parts else ""

    def write(self, path: Path) -> None:
        """Write the list: split, name, class, and the key under a heading that says of what it is."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("split", "name", "class", f"sha256 of {self.by}"))
        for split, images in self.splits.items():
            rows.writerows((split, *image) for image in images)
        write_text(path, text.getvalue())

    @classmethod
    def read(cls, path: Path) -> ImageList | None:
        """Read the list of a run; None where it has none, as older runs. Raises BadCheckpoint where it is damaged."""
        try:
            heading, *rows = csv.reader(io.StringIO(read_plain_file(path, _MAX_LIST_BYTES).decode("utf-8"), newline=""))
            by = heading[3].removeprefix("sha256 of ")
            if by not in get_args(KeyKind) or any(len(row) != 4 for row in rows):
                raise ValueError("its columns are not split, name, class and SHA-256")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, IndexError, csv.Error) as error:
            raise BadCheckpoint(f"{path} cannot be read: {error}") from error
        splits: dict[str, list[tuple[str, str, str]]] = {}
        for split, name, label, key in rows:
            splits.setdefault(split, []).append((name, label, key))
        return cls(by="content" if by == "content" else "name", splits=splits)


def _rows(dataset: Dataset, by: KeyKind) -> list[tuple[str, str, str]]:
    names = [dataset.name(i) for i in range(len(dataset))]
    classes = [dataset.classes[dataset.label(i)] for i in range(len(dataset))]
    return list(zip(names, classes, image_keys(dataset, by), strict=True))
