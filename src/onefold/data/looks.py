"""Looks: a quick glance at many pictures, enough to tell which are the same, alike, flat, or of another class.

Every picture is decoded small (JPEGs at a fraction of their scale), so a thousand photos take a few seconds.
N = pictures looked at, C = classes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.dataset import Source
from onefold.data.sampler import shuffled
from onefold.errors import BadData

_SIDE = 64  # pictures are decoded no smaller than this
_THUMB = 16
_STATTED = 200_000  # pictures whose stored size is asked for, to find equal ones
_SAME = 2.0  # grey levels that two pictures may differ by, on the mean over a thumb, and count as one
_FEW = 8  # pictures of a class below which its neighbours tell nothing
_SAME_BITS = 4  # and bits of 64 that their gradients' signs may differ in


@dataclass(frozen=True, kw_only=True, eq=False)
class Looks:
    """What was seen. `digests` are of the decoded pixels; `unread` has the sentences about what could not be read."""

    source: Source
    indices: NDArray[np.int64]  # (N,) of the source
    labels: NDArray[np.int64]  # (N,)
    digests: tuple[bytes, ...]
    thumbs: NDArray[np.float32]  # (N, 16, 16, 3), 0 to 255
    signs: NDArray[np.float32]  # (N, 64), the signs of the gradients along rows (dHash): -1 or 1
    unread: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, n: int) -> str:
        """The name of the n-th picture looked at."""
        return self.source.name(int(self.indices[n]))

    @property
    def is_flat(self) -> NDArray[np.bool_]:
        """(N,): whether a picture is of one colour."""
        planes = self.thumbs.reshape(len(self), _THUMB * _THUMB, 3)
        flat: NDArray[np.bool_] = np.ptp(planes, axis=1).max(axis=1, initial=0) <= 4
        return flat


def look(source: Source, most: int, beside: Source | None = None) -> Looks:
    """Look at all pictures, or at `most` of them: those of a size that few others have first, then a fixed sample.

    Equal sizes are looked for within `source` and between it and `beside`, so that a copy is found in any number.
    """
    seen: list[tuple[int, bytes, NDArray[np.float32], NDArray[np.float32]]] = []
    unread: list[str] = []
    for i in _chosen(source, most, beside):
        try:
            seen.append((i, *_glance(source.image(i, at_least=_SIDE))))
        except BadData as error:
            unread.append(str(error))
    indices = np.array([i for i, *_ in seen], dtype=np.int64)
    return Looks(
        source=source,
        indices=indices,
        labels=np.array([source.label(int(i)) for i in indices], dtype=np.int64),
        digests=tuple(digest for _, digest, *_ in seen),
        thumbs=np.array([thumb for *_, thumb, _ in seen], dtype=np.float32).reshape(-1, _THUMB, _THUMB, 3),
        signs=np.array([signs for *_, signs in seen], dtype=np.float32).reshape(-1, 64),
        unread=tuple(unread),
    )


def _chosen(source: Source, most: int, beside: Source | None) -> list[int]:
    count = len(source)
    if count <= most:
        return list(range(count))
    order = shuffled(np.arange(count, dtype=np.int64), count, seed=0, epoch=0).tolist()
    sizes = [source.num_bytes(i) for i in order[:_STATTED]]
    often = Counter(sizes)
    theirs = {beside.num_bytes(i) for i in range(min(len(beside), _STATTED))} if beside else set()
    twins = [(size not in theirs, often[size], i) for i, size in zip(order, sizes, strict=False)]
    twins = sorted((each for each in twins if not each[0] or each[1] > 1), key=lambda each: each[:2])
    return list(dict.fromkeys([i for *_, i in twins[: most // 2]] + order))[:most]


def _glance(image: Image.Image) -> tuple[bytes, NDArray[np.float32], NDArray[np.float32]]:
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.size).encode()).digest()
    thumb = np.asarray(image.resize((_THUMB, _THUMB), Image.Resampling.BOX), dtype=np.float32)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.float32)
    return digest, thumb, np.where(grey[:, 1:] > grey[:, :-1], 1.0, -1.0).astype(np.float32).ravel()


# ------------------------------------------------------------------------------------- pairs of pictures


def same(here: Looks, there: Looks) -> list[tuple[int, int]]:
    """Pairs (n of here, m of there) with equal pixels; each picture of `here` once. Within one, m < n."""
    first: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    if here is not there:
        first = {digest: m for m, digest in reversed(list(enumerate(there.digests)))}
    for n, digest in enumerate(here.digests):
        if digest in first:
            pairs.append((n, first[digest]))
        elif here is there:
            first[digest] = n
    return pairs


def alike(here: Looks, there: Looks) -> list[tuple[int, int]]:
    """Pairs (n of here, m of there) that are nearly the same picture, yet not to the pixel; each of `here` once."""
    if not len(here) or not len(there):
        return []
    flat = there.is_flat
    pairs: list[tuple[int, int]] = []
    for n, bits in enumerate(here.signs @ there.signs.T):
        near = np.flatnonzero((bits >= 64 - 2 * _SAME_BITS) & ~flat)
        apart = np.abs(there.thumbs[near] - here.thumbs[n]).mean(axis=(1, 2, 3))
        if len(near) and apart.min() <= _SAME and here.digests[n] != there.digests[near[apart.argmin()]]:
            pairs.append((n, int(near[apart.argmin()])))
    return pairs


# ---------------------------------------------------------------------------------- nearest neighbours


def nearest(here: Looks, there: Looks) -> NDArray[np.int64]:
    """(N,): of each picture of `here` the nearest other one of `there`, by the distance of 8 x 8 thumbs."""
    ours, theirs = (_features(each) for each in (here, there))
    squares = (theirs**2).sum(axis=1)[None, :] - 2 * ours @ theirs.T
    ids = {digest: m for m, digest in enumerate(there.digests)}
    copies = np.array([ids[digest] for digest in there.digests])
    own = np.array([ids.get(digest, -1) for digest in here.digests])
    squares[own[:, None] == copies[None, :]] = np.inf  # a copy says nothing about its class
    return np.asarray(squares.argmin(axis=1), dtype=np.int64)


def chance(labels: NDArray[np.int64], others: NDArray[np.int64], num_classes: int) -> float:
    """How often a label equals one drawn from `others`."""
    shares = [np.bincount(each, minlength=num_classes) / max(len(each), 1) for each in (labels, others)]
    return float(shares[0] @ shares[1])


def moved_classes(train: Looks, val: Looks, num_classes: int) -> list[tuple[tuple[int, ...], float]]:
    """Classes that have changed places: rings c -> d -> ... of `val` classes whose pictures are those of the next one.

    With each ring, how many nats likelier the pictures are under it. What classes the neighbours of a class's pictures
    are of is a multinomial, estimated on `train` against itself; then classes are exchanged, the two that gain most
    first, as long as `val` becomes likelier.
    """
    within = _table(train.labels, train.labels[nearest(train, train)], num_classes)
    across = _table(val.labels, train.labels[nearest(val, train)], num_classes)
    rates = within + 1.0
    nats = across @ np.log(rates / rates.sum(axis=1, keepdims=True)).T  # [class of val, class of train]
    place, known = np.arange(num_classes), (within.sum(axis=1) >= _FEW) & (across.sum(axis=1) >= _FEW)
    for _ in range(num_classes):
        own = nats[np.arange(num_classes), place]
        taken = nats[:, place]  # [c, d]: c in the place of d
        gain = np.where(known[:, None] & known, taken + taken.T - own[:, None] - own, 0.0)
        c, d = np.unravel_index(gain.argmax(), gain.shape)
        if gain[c, d] <= 1.0:
            break
        place[[c, d]] = place[[d, c]]
    return [(ring, float(sum(nats[c, place[c]] - nats[c, c] for c in ring))) for ring in _rings(place)]


def _rings(place: NDArray[np.int64]) -> list[tuple[int, ...]]:
    rings, seen = [], set()
    for start in range(len(place)):
        ring, c = [], start
        while c not in seen:
            seen.add(c)
            ring.append(c)
            c = int(place[c])
        if len(ring) > 1:
            rings.append(tuple(ring))
    return rings


def _table(labels: NDArray[np.int64], answers: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (labels, answers), 1)
    return counts


def _features(looks: Looks) -> NDArray[np.float32]:
    halves = looks.thumbs.reshape(-1, _THUMB // 2, 2, _THUMB // 2, 2, 3).mean(axis=(2, 4))
    return np.asarray(halves.reshape(len(looks), -1) / 255, dtype=np.float32)
