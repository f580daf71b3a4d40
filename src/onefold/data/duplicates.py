"""Thumbnails of a dataset's pictures, and the copies among them: equal to the pixel, or changed.

A changed copy is a picture that was saved again, resized, made brighter or grey, mirrored, turned (by quarters, or by
up to about ten degrees) or cropped (to about 80 % of its sides), or several of these. It is found in two steps. Grey
thumbnails, freed of gradients over the whole picture, are correlated with each other under a few dozen mirrorings,
rotations and crops, by matrix products alone. The best two of each picture are then aligned: the affine map that makes
the one most like the other is found by Gauss-Newton steps, and how well they agree after it, in shapes and in finer
detail, decides.

Coordinates are -1 to 1 over a thumbnail, to the right and downwards. K = pairs, N = pictures.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.dataset import Dataset
from onefold.data.decode import UNUSUAL_ALPHA
from onefold.data.preprocessing import ValueRange
from onefold.data.sampler import shuffled_indices
from onefold.errors import BadData

_Floats = NDArray[np.float32]
_progress = logging.getLogger("onefold.progress")

# ---------------------------------------------------------------------------------------------- thumbnails

_SIDE = 32  # of the grey thumbnails in which copies are sought
_DECODED_SIDE = 64  # pictures are decoded no smaller than this
THUMBNAIL_SIDE = 16
_MAX_FILE_SIZES = 200_000  # pictures whose file size is read, to find equal ones
_TINY_SIDE = 32  # a picture with a shorter side has too little detail to be found again changed,
_MAX_DIFFERENCE = 2.0  # so its near duplicates must be within so many levels of 255, mean over a thumbnail


@dataclass(frozen=True, kw_only=True, eq=False)
class ThumbnailStats:
    """Thumbnails and hashes of a dataset's pictures; `unread` has the sentences about those that cannot be read."""

    dataset: Dataset
    indices: NDArray[np.int64]  # (N,) of the dataset
    labels: NDArray[np.int64]  # (N,)
    digests: tuple[bytes, ...]  # of the decoded pixels
    thumbs: NDArray[np.float32]  # (N, 16, 16, 3), 0 to 255
    greys: NDArray[np.float32]  # (N, 32, 32), 0 to 255
    is_tiny: NDArray[np.bool_]  # (N,): whether the shorter side is below 32 pixels
    has_odd_alpha: NDArray[np.bool_]  # (N,): see `decode.UNUSUAL_ALPHA`
    unread: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, n: int) -> str:
        """Give the name of the n-th picture."""
        return self.dataset.name(int(self.indices[n]))

    @property
    def is_flat(self) -> NDArray[np.bool_]:
        """(N,): whether a picture is of one colour."""
        planes = self.thumbs.reshape(len(self), THUMBNAIL_SIDE * THUMBNAIL_SIDE, 3)
        flat: NDArray[np.bool_] = np.ptp(planes, axis=1).max(axis=1, initial=0) <= 4
        return flat


def thumbnail_stats(
    dataset: Dataset, most: int, other: Dataset | None = None, value_range: ValueRange | None = None
) -> ThumbnailStats:
    """Compute the statistics of all pictures, or of `most`: those with equal file sizes first, then a sample.

    Equal sizes are sought within `dataset` and between it and `other`, so that a copy is found however many images
    there are. Every picture is decoded small (JPEGs at a reduced scale), so a thousand photos take a few seconds.
    """
    rows: list[tuple[int, bytes, tuple[bool, bool], NDArray[np.float32], NDArray[np.float32]]] = []
    unread: list[str] = []
    for number, i in enumerate(selected := _select(dataset, most, other)):
        try:
            image = dataset.image(i, min_side=_DECODED_SIDE, value_range=value_range)
        except BadData as error:
            unread.append(str(error))
            continue
        digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.size).encode()).digest()
        thumb = np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX), dtype=np.float32)
        grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32)
        rows.append((i, digest, (min(image.size) < _TINY_SIDE, UNUSUAL_ALPHA in image.info), thumb, grey))
        _progress.debug("looking at photos", extra={"done": number + 1, "total": len(selected), "part": True})
    side = THUMBNAIL_SIDE
    return ThumbnailStats(
        dataset=dataset,
        indices=np.array([i for i, *_ in rows], dtype=np.int64),
        labels=np.array([dataset.label(i) for i, *_ in rows], dtype=np.int64),
        digests=tuple(digest for _, digest, *_ in rows),
        thumbs=np.array([thumb for *_, thumb, _ in rows], dtype=np.float32).reshape(-1, side, side, 3),
        greys=np.array([grey for *_, grey in rows], dtype=np.float32).reshape(-1, _SIDE, _SIDE),
        is_tiny=np.array([is_tiny for _, _, (is_tiny, _), *_ in rows], dtype=np.bool_),
        has_odd_alpha=np.array([is_odd for _, _, (_, is_odd), *_ in rows], dtype=np.bool_),
        unread=tuple(unread),
    )


def _select(dataset: Dataset, most: int, other: Dataset | None) -> list[int]:
    if (count := len(dataset)) <= most:
        return list(range(count))
    order = shuffled_indices(np.arange(count, dtype=np.int64), count, seed=0, epoch=0).tolist()
    sizes = [dataset.num_bytes(i) for i in order[:_MAX_FILE_SIZES]]
    frequency = Counter(sizes)
    other_sizes = {other.num_bytes(i) for i in range(min(len(other), _MAX_FILE_SIZES))} if other else set()
    # Half of the places are for possible copies: first those of a size that `other` has too, then the rarest sizes.
    twins = [(size not in other_sizes, frequency[size], i) for i, size in zip(order, sizes, strict=False)]
    twins = sorted((twin for twin in twins if not twin[0] or twin[1] > 1), key=lambda twin: twin[:2])
    return list(dict.fromkeys([i for *_, i in twins[: most // 2]] + order))[:most]


def exact_duplicates(these: ThumbnailStats, those: ThumbnailStats) -> list[tuple[int, int]]:
    """Find pairs (n of these, m of those) with equal pixels, each picture of these once; within one dataset m < n."""
    first: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    if these is not those:
        first = {digest: m for m, digest in reversed(list(enumerate(those.digests)))}
    for n, digest in enumerate(these.digests):
        if digest in first:
            pairs.append((n, first[digest]))
        elif these is those:
            first[digest] = n
    return pairs


# ------------------------------------------------------------------------------------------- keys of pixels

_KEY_BITS = 128
_KEY_FREQUENCIES = [(u, v) for s in range(1, 16) for u in range(s + 1) for v in [s - u]][:_KEY_BITS]
_KEY_DISTANCE = 16  # bits in which copies may differ; pictures that have nothing in common differ in 64, give or take 6
_KEY_READERS = 8  # threads
_NEAR = 32  # bits; of photos one in a hundred has another so near, of pictures all built alike most have, and many
_MAX_NEAR, _MAX_NEAR_PAIRS = 0.2, 0.02  # the shares of pictures and of pairs that may be so near


def perceptual_hashes(
    dataset: Dataset, numbers: Sequence[int], value_range: ValueRange | None = None
) -> NDArray[np.uint64]:
    """Give (N, 2) a key of each picture's pixels, nearly the same where it was saved again, resized or made brighter.

    It holds the signs of the lowest frequencies of the grey thumbnail. It is 0 where the picture cannot be read, is of
    one colour, or has a side below 32 pixels.
    """

    def grey(i: int) -> _Floats:
        try:
            image = dataset.image(i, min_side=_DECODED_SIDE, value_range=value_range)
        except BadData:
            return np.zeros((_SIDE, _SIDE), np.float32)
        small = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32)
        return small if min(image.size) >= _TINY_SIDE and np.ptp(small) > 4 else np.zeros_like(small)

    with ThreadPoolExecutor(_KEY_READERS, thread_name_prefix="onefold-pixels") as pool:
        greys = np.array(list(pool.map(grey, numbers)), np.float32).reshape(-1, _SIDE, _SIDE)
    steps = np.pi * (np.arange(_SIDE) + 0.5) / _SIDE
    waves = np.cos(np.arange(16)[:, None] * steps).astype(np.float32)  # the cosine transform's, (16, side)
    spectrum = waves @ greys @ waves.T
    rows, columns = zip(*_KEY_FREQUENCIES, strict=True)
    bits = spectrum[:, rows, columns] > 0
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64).reshape(-1, 2)


def match_perceptual_hashes(keys: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say of each key (N, 2) whether a known one (M, 2) is of the same picture, which may have been saved again."""
    return _distances(keys, known)[0] <= _KEY_DISTANCE


def distinctive_perceptual_hashes(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Give the keys that are not 0, each once, or none where too many are near to those of other pictures.

    In X-rays, frames of one video and other pictures that are all built alike, a key does not tell a copy from another
    picture. The nearest other key of photos (ImageNet's) differs in 45 bits, and in no case in less than 35.
    """
    keys = np.unique(keys[keys.any(axis=1)], axis=0)
    least, num_near = _distances(keys, keys, is_same=True)
    is_near = (least > _KEY_DISTANCE) & (least <= _NEAR)  # what is nearer may be a copy within the set
    is_alike = is_near.sum() > _MAX_NEAR * len(keys) or num_near.sum() > _MAX_NEAR_PAIRS * len(keys) ** 2
    return keys[:0] if is_alike else keys


def _distances(
    keys: NDArray[np.uint64], known: NDArray[np.uint64], *, is_same: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give (N,) in how many bits each key differs from the nearest known one, and how many are within `_NEAR` bits.

    Of one set the key itself does not count.
    """
    signs, known_signs = (
        2
        * np.unpackbits(np.ascontiguousarray(each).view(np.uint8).reshape(-1, _KEY_BITS // 8), axis=1).astype(
            np.float32
        )
        - 1
        for each in (keys, known)
    )
    least, num_near = np.full(len(keys), _KEY_BITS, np.int64), np.zeros(len(keys), np.int64)
    for start in range(0, len(keys) if len(known) else 0, 1024):
        part = slice(start, start + 1024)
        distance = np.rint((_KEY_BITS - signs[part] @ known_signs.T) / 2)
        if is_same:
            distance[np.arange(len(distance)), start + np.arange(len(distance))] = _KEY_BITS
        least[part], num_near[part] = distance.min(axis=1), (distance <= _NEAR).sum(axis=1)
    least[~keys.any(axis=1)] = _KEY_BITS
    return least, num_near


# -------------------------------------------------------------------------------------------- changed copies

_POOL = 2  # thumbnails are compared at 1 / _POOL of their side, and aligned at the whole of it
_MIN_COARSE = 0.5  # correlation from which on a pair is aligned
_MAX_CANDIDATES = 2  # of each picture
_MIN_ALIGNED = 0.5  # correlation after the first steps, with less detail, from which on further ones are made
_MIN_SIMILARITY = 0.8  # of copies, aligned
_MIN_DETAIL = 0.62  # the same, of detail below three pixels: shapes alone may agree by chance
_NUM_STEPS = 5
_MAX_STEP = 0.15
_CHUNK = 64  # pairs that are aligned at once: their arrays fit into a processor's cache
_MIN_OVERLAP = 0.45  # of the area
_MAX_ZOOM, _MAX_STRETCH = 2.5, 1.25  # of an alignment: areas to each other, and its two singular values


def near_duplicates(these: ThumbnailStats, those: ThumbnailStats) -> list[tuple[int, int]]:
    """Find pairs (n of these, m of those) where one is a changed copy of the other, each of these once.

    Of 100 photos in either role, among 300 others, it finds all that were saved again, resized, mirrored, flipped,
    turned by quarters or by 2 degrees, grey, darker or brighter, of another contrast, or cropped to 90 % of their sides
    in the middle; 97 % turned by 5 degrees, 95 % by 8, 88 % by 10; 92 % cropped to 80 % in the middle, 83 % in a
    corner. The thresholds were chosen on photos of Imagenette. Of 3 million pairs with photos of other sources, three
    different ones were taken for copies (equal frames around other pictures), and one true copy was found: so a pair is
    something to look at, not an error.
    """
    large, others = (np.flatnonzero(~(stats.is_tiny | stats.is_flat)) for stats in (these, those))
    found = [(int(large[n]), int(others[m])) for n, m in _copies(these.greys[large], those.greys[others])]
    tiny = np.flatnonzero(those.is_tiny & ~those.is_flat)
    pooled, others_pooled = (
        stats.thumbs.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4, 5)).reshape(-1, 16) for stats in (these, those)
    )
    for n in np.flatnonzero(these.is_tiny & ~these.is_flat).tolist() if len(tiny) else ():
        # averages are no further apart than what they are averages of
        close = tiny[np.abs(others_pooled[tiny] - pooled[n]).mean(axis=1) <= _MAX_DIFFERENCE]
        away = np.abs(those.thumbs[close] - these.thumbs[n]).mean(axis=(1, 2, 3))
        if away.min(initial=np.inf) <= _MAX_DIFFERENCE:
            found.append((n, int(close[away.argmin()])))
    return sorted((n, m) for n, m in found if these.digests[n] != those.digests[m])


def _similarity_map(
    *, mirror: bool = False, degrees: float = 0, zoom: float = 1, shift: tuple[float, float] = (0, 0)
) -> _Floats:
    """Give the map (2, 3) of coordinates that mirrors, turns, crops to `zoom` of the sides, and moves the crop."""
    cosine, sine = zoom * np.cos(np.deg2rad(degrees)), zoom * np.sin(np.deg2rad(degrees))
    sign = -1 if mirror else 1
    return np.array([[sign * cosine, -sine, shift[0]], [sign * sine, cosine, shift[1]]], np.float32)


_SHIFTS = [(x, y) for x in (-0.13, 0.13) for y in (-0.13, 0.13)]
_CROPS = [_similarity_map(zoom=0.85, shift=shift) for shift in ((0, 0), *_SHIFTS)]
_WHOLE = [_similarity_map(mirror=mirror, degrees=degrees) for mirror in (False, True) for degrees in (-9, 0, 9)]
_PARTS = [
    *(_similarity_map(mirror=mirror, degrees=degrees, zoom=0.85) for mirror in (False, True) for degrees in (-9, 0, 9)),
    *(_similarity_map(mirror=mirror, degrees=degrees) for mirror in (False, True) for degrees in (90, 180, 270)),
    *(_similarity_map(mirror=mirror, zoom=0.85, shift=shift) for mirror in (False, True) for shift in _SHIFTS),
]
# What is tried: every change of these against those as they are, and those cropped against whole ones of these.
_TRIALS = [(mine, _similarity_map()) for mine in (*_WHOLE, *_PARTS)] + [(m, crop) for crop in _CROPS for m in _WHOLE]

_AXIS = (np.arange(_SIDE, dtype=np.float32) + 0.5) / _SIDE * 2 - 1
_X, _Y = (axis.ravel() for axis in np.meshgrid(_AXIS, _AXIS))
_GRID = np.stack([_X, _Y, np.ones_like(_X)])  # (3, pixels)
# The middle counts: turned copies have empty corners.
_COARSE_WEIGHT = np.clip(6 * (1 - np.hypot(_X, _Y)), 0, 1).astype(np.float32)
_FINE_WEIGHT = np.clip(6 * (1.15 - np.hypot(_X, _Y)), 0, 1).astype(np.float32)
# The directions of a step: zoom, rotation, shifts, and - less freely - stretch and shear.
_DIRECTIONS = np.array(
    [
        [1, 0, 0, 0, 1, 0],
        [0, -1, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, -1, 0],
        [0, 1, 0, 1, 0, 0],
    ],
    np.float32,
)
_DAMPING = 0.02 * np.diag(np.array([1, 1, 1, 1, 8, 8], np.float32))


def _copies(these: _Floats, those: _Floats) -> list[tuple[int, int]]:
    """Find pairs (n, m) of grey thumbnails (N, side, side) that are aligned copies, for each n the best m."""
    if not len(these) or not len(those):
        return []
    n, m, maps = _candidates(_band(these, 3, 11), _band(those, 3, 11))
    best: dict[int, tuple[float, int]] = {}
    for start in range(0, len(n), _CHUNK):
        part = slice(start, start + _CHUNK)
        similarity = _similarity(these[n[part]], those[m[part]], maps[part]).tolist()
        for i, j, alike in zip(n[part].tolist(), m[part].tolist(), similarity, strict=True):
            if alike >= _MIN_SIMILARITY:
                best[i] = max(best.get(i, (0.0, 0)), (alike, j))
    return [(i, j) for i, (_, j) in best.items()]


def _similarity(images: _Floats, targets: _Floats, maps: _Floats) -> _Floats:
    """Give (K,) how well images agree with their targets once they are aligned; 0 where they cannot be copies."""
    similarity = np.zeros(len(images), np.float32)
    maps = _aligned(_band(images, 5, 15), _band(targets, 5, 15), maps)
    kept = np.flatnonzero(_agreement(_band(images, 3, 11), _band(targets, 3, 11), maps)[0] >= _MIN_ALIGNED)
    if not len(kept):
        return similarity
    images, targets, maps = images[kept], targets[kept], maps[kept]
    fine, fine_targets = _band(images, 3, 11), _band(targets, 3, 11)
    maps = _aligned(fine, fine_targets, maps)
    alike, overlap = _agreement(fine, fine_targets, maps)
    detail, _ = _agreement(images - _blurred(images, 3), targets - _blurred(targets, 3), maps)
    stretch = np.linalg.svd(maps[:, :, :2], compute_uv=False).reshape(-1, 2)
    area = stretch.prod(axis=1)
    plausible = (overlap >= _MIN_OVERLAP) & (detail >= _MIN_DETAIL) & (stretch[:, 0] <= _MAX_STRETCH * stretch[:, 1])
    plausible &= (area <= _MAX_ZOOM) & (area >= 1 / _MAX_ZOOM)
    similarity[kept[plausible]] = alike[plausible]
    return similarity


def _candidates(these: _Floats, those: _Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], _Floats]:
    """Give n (K,), m (K,) and maps (K, 2, 3) from coordinates of m to those of n: the pairs that are most alike."""
    best = np.full((len(these), len(those)), -1, np.float32)
    which = np.zeros(best.shape, np.int16)
    features: dict[tuple[int, bytes], _Floats] = {}
    for number, (mine, theirs) in enumerate(_TRIALS):
        for images, change in ((these, mine), (those, theirs)):
            key = id(images), change.tobytes()
            if key not in features:
                features[key] = _standardised(images.reshape(len(images), -1) @ _coarse_operator(change).T)
        alike = features[id(these), mine.tobytes()] @ features[id(those), theirs.tobytes()].T
        which[alike > best] = number
        np.maximum(best, alike, out=best)
    most = min(_MAX_CANDIDATES, len(those))
    columns = np.argpartition(-best, most - 1, axis=1)[:, :most]
    n, column = np.nonzero(np.take_along_axis(best, columns, axis=1) >= _MIN_COARSE)
    m = columns[n, column]
    trials = [_TRIALS[number] for number in which[n, m].tolist()]
    maps = [_square(mine) @ np.linalg.inv(_square(theirs)) for mine, theirs in trials]
    return n, m, np.array(maps, np.float32).reshape(-1, 3, 3)[:, :2]


def _square(affine: _Floats) -> _Floats:
    return np.vstack([affine, np.array([[0, 0, 1]], np.float32)])


def _coarse_operator(affine: _Floats) -> _Floats:
    """Give the matrix (features, pixels) that samples through a map, pools, weights and removes the mean."""
    at, fraction = _floor(_place(affine[None]))
    x, y = fraction[0]
    places = [at[0] + step for step in (0, 1, _SIDE, _SIDE + 1)]
    parts = [(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y]
    rows = np.arange(_SIDE) // _POOL
    pooled = (rows[:, None] * (_SIDE // _POOL) + rows).ravel()
    operator = np.zeros(((_SIDE // _POOL) ** 2, _SIDE * _SIDE), np.float32)
    for place, part in zip(places, parts, strict=True):
        np.add.at(operator, (pooled, place), part * _COARSE_WEIGHT)
    operator = operator[operator.any(axis=1)]
    return operator - operator.mean(axis=0)


def _standardised(features: _Floats) -> _Floats:
    return np.asarray(features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-3), np.float32)


def _aligned(images: _Floats, targets: _Floats, maps: _Floats) -> _Floats:
    """Improve maps (K, 2, 3) by Gauss-Newton steps, so that images (K, side, side) through them fit the targets."""
    wanted = targets.reshape(len(targets), -1)
    for _ in range(_NUM_STEPS):
        seen, inside, along_x, along_y = _sampled(images, maps)
        a, b = _centred(seen, inside), _centred(wanted, inside)
        gain = np.clip((a * b).sum(1, keepdims=True) / np.maximum((a * a).sum(1, keepdims=True), 1e-3), 0.2, 5)
        slope_x, slope_y = (gain * inside * slope * (_SIDE / 2) for slope in (along_x, along_y))
        jacobian = np.concatenate([slope_x[:, None] * _GRID, slope_y[:, None] * _GRID], axis=1)
        jacobian = _DIRECTIONS @ jacobian  # (K, 6, pixels)
        normal = jacobian @ jacobian.swapaxes(1, 2)
        scale = np.maximum(np.trace(normal, axis1=1, axis2=2) / 6, 1e-3)
        right = jacobian @ (b - gain * a)[..., None]
        step = np.linalg.solve(normal + scale[:, None, None] * _DAMPING, right)[..., 0] @ _DIRECTIONS
        maps = maps + np.clip(step, -_MAX_STEP, _MAX_STEP).reshape(-1, 2, 3).astype(np.float32)
    return maps


def _agreement(images: _Floats, targets: _Floats, maps: _Floats) -> tuple[_Floats, _Floats]:
    """Give (K,) the correlation of images seen through maps with their targets, and the share of the area in common."""
    seen, inside, *_ = _sampled(images, maps)
    weight = inside * _FINE_WEIGHT
    a, b = _centred(seen, weight), _centred(targets.reshape(len(targets), -1), weight)
    lengths = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return (a * b).sum(1) / np.maximum(lengths, 1e-3), inside.mean(1, dtype=np.float32)


def _centred(values: _Floats, weight: _Floats) -> _Floats:
    """Give values (K, pixels) less their weighted mean, times the square root of the weight."""
    mean = (values * weight).sum(1, keepdims=True) / np.maximum(weight.sum(1, keepdims=True), 1e-3)
    return np.asarray((values - mean) * np.sqrt(weight), np.float32)


def _sampled(images: _Floats, maps: _Floats) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Sample images (K, side, side) through maps, bilinearly: values (K, pixels), 1 where inside, slopes in x and y."""
    place = _place(maps)
    inside = np.asarray(((place >= -0.5) & (place <= _SIDE - 0.5)).all(axis=1), np.float32)
    at, fraction = _floor(place)
    flat = images.reshape(len(images), -1)
    upper_left, upper_right, lower_left, lower_right = (
        np.take_along_axis(flat, at + step, axis=1) for step in (0, 1, _SIDE, _SIDE + 1)
    )
    x, y = fraction[:, 0], fraction[:, 1]
    upper, lower = upper_left + x * (upper_right - upper_left), lower_left + x * (lower_right - lower_left)
    slope_x = (1 - y) * (upper_right - upper_left) + y * (lower_right - lower_left)
    return upper + y * (lower - upper), inside, slope_x, lower - upper


def _place(maps: _Floats) -> _Floats:
    """Give (K, 2, pixels) where each pixel of a thumbnail lies under a map, in pixels."""
    return np.asarray((maps @ _GRID + 1) * (_SIDE / 2) - 0.5, np.float32)


def _floor(place: _Floats) -> tuple[NDArray[np.int64], _Floats]:
    """Give (K, pixels) the number of the pixel to the upper left, and (K, 2, pixels) the distance from it."""
    clipped = np.clip(place, 0, _SIDE - 1.001)
    whole = clipped.astype(np.int64)
    return whole[:, 1] * _SIDE + whole[:, 0], clipped - whole.astype(np.float32)


def _band(images: _Floats, fine: int, coarse: int) -> _Floats:
    """Give images (K, side, side) without detail below `fine` pixels and without what is wider than `coarse`."""
    return _blurred(images, fine) - _blurred(images, coarse)


def _blurred(images: _Floats, width: int) -> _Floats:
    """Average over `width` pixels (an odd number) twice, along both axes, the edges repeated."""
    for axis in (1, 2, 1, 2):
        padding = [(0, 0)] * 3
        padding[axis] = (width // 2, width // 2)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(images, padding, mode="edge"), width, axis=axis)
        images = windows.mean(axis=-1, dtype=np.float32)
    return images
