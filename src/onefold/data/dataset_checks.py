"""Checks of a dataset before hours are spent on training: what is surely wrong, and what is worth a second look.

Errors, on which no training starts unless asked to:
    classes with other names or numbers in val than in train; one class only; a class without images
    one picture under two classes, in 1 of 100 or more; classes that have changed places between train and val
    pictures of train that are in val too, 1 of 100 or more
    pictures that are all the same, or of which half or more are of one colour or unreadable
Warnings:
    fewer of any of these; a class that val lacks; names that differ in case or spacing only
    20 times as many images in one class as in another; labels that say nothing about the pictures
    pictures of val nearly the same as one of train; pictures much smaller than the network's input

Names, counts and sizes are those of all images. Of up to `_MAX_TRAIN` and `_MAX_VAL` pictures thumbnails are made,
which takes seconds: of pictures with equal file sizes first (they may be copies), then of a fixed sample.

`contact_sheet` draws pictures as the network sees them, each with its class, for a person to check.
N = pictures with a thumbnail, C = classes; in `contact_sheet` C = channels.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from onefold.data.dataset import Dataset
from onefold.data.decode import UNUSUAL_ALPHA_NOTE, printable_name
from onefold.data.duplicates import THUMBNAIL_SIDE, ThumbnailStats, exact_duplicates, near_duplicates, thumbnail_stats
from onefold.data.folders import join_names
from onefold.data.preprocessing import Preprocessing, ValueRange
from onefold.errors import BadData

_MAX_TRAIN, _MAX_VAL = 2000, 1000

_ERROR_SHARE = 0.01  # the share of images from which on a fault is an error
_MAX_IMBALANCE = 20
_NUM_SIZED = 100  # pictures whose size is measured
_SMALL_INPUT = 64  # a network with an input no larger than this needs no large photos
_MIN_NATS = 30.0  # of log likelihood that exchanged classes must gain to be an error; sound data gain less than 10
_MIN_PICTURES = 200  # for the labels of nearest neighbours to tell anything


@dataclass(frozen=True)
class Finding:
    """One sentence about the data, with names. On an error no training should start."""

    text: str
    is_error: bool = False


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """The findings, errors first, and how many pictures were examined."""

    findings: tuple[Finding, ...]
    num_train: int
    num_val: int

    def raise_for_errors(self) -> None:
        """Raise BadData with the first error and the number of the others."""
        errors = [finding.text for finding in self.findings if finding.is_error]
        if errors:
            more = f"; and {len(errors) - 1} more of the kind" if len(errors) > 1 else ""
            raise BadData(f"{errors[0]}{more} (if that is meant, train with --no-check)")


def check_data(train: Dataset, val: Dataset, size: int, value_range: ValueRange | None = None) -> DataCheck:
    """Check the data of a training whose network takes `size` x `size` pixels, decoded with `value_range`."""
    findings = list(_check_classes(train, val))
    num_train = num_val = 0
    if not any(finding.is_error for finding in findings):
        stats = (
            thumbnail_stats(train, _MAX_TRAIN, other=val, value_range=value_range),
            thumbnail_stats(val, _MAX_VAL, other=train, value_range=value_range),
        )
        num_train, num_val = (len(side) + len(side.unread) for side in stats)
        findings += [*_check_pictures(*stats), *_check_size(train, size, value_range)]
        if len(stats[0]) and len(stats[1]):
            findings += [*_check_duplicates(*stats), *_check_labels(*stats)]
    findings.sort(key=lambda finding: not finding.is_error)
    return DataCheck(findings=tuple(findings), num_train=num_train, num_val=num_val)


# --------------------------------------------------------------------------------------- names and counts


def _check_classes(train: Dataset, val: Dataset) -> Iterator[Finding]:
    if train.classes != val.classes:
        yield Finding(_difference(train.classes, val.classes), is_error=True)
        return
    counts, val_counts = (Counter(side.label(i) for i in range(len(side))) for side in (train, val))
    missing = [name for c, name in enumerate(train.classes) if not counts[c]]
    if len(counts) < 2:
        yield Finding(f"there is one class only, {join_names([train.classes[c] for c in counts])}", is_error=True)
    elif missing:
        yield Finding(f"these classes have no image to train on: {join_names(missing)}", is_error=True)
    unseen = [name for c, name in enumerate(train.classes) if counts[c] and not val_counts[c]]
    if unseen:
        yield Finding(
            f"these classes have no image to validate on, so their accuracy will not be seen: {join_names(unseen)}"
        )
    similar: dict[str, list[str]] = defaultdict(list)
    for name in train.classes:
        similar[_simplified(name)].append(name)
    for names in similar.values():
        if len(names) > 1:
            quoted = join_names([repr(name) for name in names])
            yield Finding(f"the classes {quoted} differ in case or spacing only: are they one?")
    yield from _check_balance(counts, train.classes)


def _difference(train: Sequence[str], val: Sequence[str]) -> str:
    only = [(side, sorted(set(a) - set(b))) for side, a, b in (("train", train, val), ("val", val, train))]
    parts = [f"only in {side}: {join_names(names)}" for side, names in only if names]
    if parts:
        return f"the classes of train and val differ; {'; '.join(parts)}"
    c = next(c for c, (a, b) in enumerate(zip(train, val, strict=True)) if a != b)
    names = f"{printable_name(train[c])!r} in train and {printable_name(val[c])!r} in val"
    return f"the classes are numbered otherwise in val than in train: class {c} is {names}"


def _simplified(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c not in " _-.")


def _check_balance(counts: Counter[int], classes: Sequence[str]) -> Iterator[Finding]:
    if len(counts) < 2:
        return
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    if many >= _MAX_IMBALANCE * few:
        guess = 100 * many / counts.total()
        yield Finding(
            f"{printable_name(classes[most])} has {many} training images and {printable_name(classes[least])} has "
            f"{few}: always "
            f"saying the first would be right in {guess:.0f} % of cases: look at each class, not at top-1 alone"
        )


# ---------------------------------------------------------------------------------------------- pictures


def _check_pictures(train: ThumbnailStats, val: ThumbnailStats) -> Iterator[Finding]:
    for side, stats in (("train", train), ("val", val)):
        total = len(stats) + len(stats.unread)
        if stats.unread:
            text = f"{len(stats.unread)} of {total} images of {side} cannot be read, the first: {stats.unread[0]}"
            yield Finding(text, is_error=2 * len(stats.unread) >= total)
        if len(stats) > 1 and len(set(stats.digests)) == 1:
            yield Finding(
                f"all {len(stats)} images of {side} are the same picture, {_named(stats, [0])}", is_error=True
            )
            continue
        odd = np.flatnonzero(stats.has_odd_alpha).tolist()
        if odd:
            yield Finding(
                f"{len(odd)} of {len(stats)} images of {side} have {UNUSUAL_ALPHA_NOTE}: {_named(stats, odd)}"
            )
        flat = np.flatnonzero(stats.is_flat).tolist()
        if flat:
            text = f"{len(flat)} of {len(stats)} images of {side} are of one colour: {_named(stats, flat)}"
            yield Finding(text, is_error=2 * len(flat) >= len(stats))


def _check_size(train: Dataset, size: int, value_range: ValueRange | None) -> Iterator[Finding]:
    """Find whether half of the photos are enlarged by more than two. One that is smaller than `size` comes whole."""
    if size <= _SMALL_INPUT:
        return
    shorter: list[int] = []
    for i in range(0, len(train), max(1, len(train) // _NUM_SIZED)):
        try:
            shorter.append(min(train.image(i, min_side=size, value_range=value_range).size))
        except BadData:
            continue
    middle = sorted(shorter)[len(shorter) // 2] if shorter else size
    if 2 * middle < size:
        yield Finding(
            f"half of the training images are {middle} pixels or less on their short side, and the network's input is "
            f"{size}: --img-size {max(32, 2 ** math.ceil(math.log2(middle)))} would be quicker and lose little"
        )


def _check_duplicates(train: ThumbnailStats, val: ThumbnailStats) -> Iterator[Finding]:
    two_labels = [
        (a, n, b, m)
        for a, b in ((train, train), (val, val), (val, train))
        for n, m in exact_duplicates(a, b)
        if a.labels[n] != b.labels[m]
    ]
    if two_labels:
        a, n, b, m = two_labels[0]
        both = f"{printable_name(a.name(n))} ({_class(a, n)}) and {printable_name(b.name(m))} ({_class(b, m)})"
        text = f"{len(two_labels)} pictures stand under two classes; the first: {both} have the same pixels"
        yield Finding(text, is_error=len(two_labels) >= _ERROR_SHARE * (len(train) + len(val)))
    copies = exact_duplicates(val, train)
    if copies:
        text = (
            f"{len(copies)} of {len(val)} validation images are training images too, so the accuracy will flatter: "
            f"{_pairs(val, train, copies)}"
        )
        yield Finding(text, is_error=len(copies) >= _ERROR_SHARE * len(val))
    near = near_duplicates(val, train)
    if near:
        yield Finding(
            f"{len(near)} of {len(val)} validation images are nearly the same as a training image, so the accuracy may "
            f"flatter: {_pairs(val, train, near)}"
        )


def _check_labels(train: ThumbnailStats, val: ThumbnailStats) -> Iterator[Finding]:
    classes, count = train.dataset.classes, len(train)
    if count >= _MIN_PICTURES:
        agree = float((train.labels[_nearest_neighbours(train, train)] == train.labels).mean())
        guess = _chance_agreement(train.labels, train.labels, len(classes))
        if agree - guess < 2 * math.sqrt(guess * (1 - guess) / count):
            yield Finding(
                f"the images most alike are of one class in {100 * agree:.1f} % of cases, and {100 * guess:.1f} % is "
                "chance: either the classes differ in details only, or the labels do not belong to these images"
            )
    for cycle, nats in find_swapped_classes(train, val, len(classes)):
        if nats > _MIN_NATS:
            steps = zip(cycle, cycle[1:] + cycle[:1], strict=True)
            swaps = [
                f"val's {printable_name(classes[c])} look like train's {printable_name(classes[d])}" for c, d in steps
            ]
            text = f"{len(cycle)} classes have changed places between train and val: {'; '.join(swaps[:3])}"
            yield Finding(text, is_error=True)


def _class(stats: ThumbnailStats, n: int) -> str:
    return printable_name(stats.dataset.classes[int(stats.labels[n])])


def _named(stats: ThumbnailStats, numbers: Sequence[int]) -> str:
    return join_names([stats.name(n) for n in numbers], most=3)


def _pairs(val: ThumbnailStats, train: ThumbnailStats, pairs: Sequence[tuple[int, int]]) -> str:
    return join_names([f"{val.name(n)} (val) = {train.name(m)} (train)" for n, m in pairs], most=3)


# ---------------------------------------------------------------------------------- nearest neighbours

_MIN_OF_CLASS = 8  # pictures of a class, for its neighbours to tell anything


def _nearest_neighbours(these: ThumbnailStats, those: ThumbnailStats) -> NDArray[np.int64]:
    """Find, (N,), of each picture of these the nearest other one of those, by the distance of 8 x 8 thumbnails."""
    x, y = (_features(stats) for stats in (these, those))
    distances = (y**2).sum(axis=1)[None, :] - 2 * x @ y.T  # squared, less what all of a row share
    ids = {digest: m for m, digest in enumerate(those.digests)}
    copies = np.array([ids[digest] for digest in those.digests])
    own = np.array([ids.get(digest, -1) for digest in these.digests])
    distances[own[:, None] == copies[None, :]] = np.inf  # a copy says nothing about its class
    return np.asarray(distances.argmin(axis=1), dtype=np.int64)


def _chance_agreement(labels: NDArray[np.int64], others: NDArray[np.int64], num_classes: int) -> float:
    """Compute how often a label equals one drawn from `others`."""
    shares = [np.bincount(side, minlength=num_classes) / max(len(side), 1) for side in (labels, others)]
    return float(shares[0] @ shares[1])


def find_swapped_classes(
    train: ThumbnailStats, val: ThumbnailStats, num_classes: int
) -> list[tuple[tuple[int, ...], float]]:
    """Find classes that have changed places: cycles c -> d -> ... of `val` classes with the pictures of the next one.

    With each cycle comes how many nats likelier the pictures are under it. The classes of the nearest neighbours of a
    class's pictures are a multinomial, estimated on `train` against itself; then classes are exchanged, the two that
    gain most first, as long as `val` becomes likelier.
    """
    within = _confusion(train.labels, train.labels[_nearest_neighbours(train, train)], num_classes)
    across = _confusion(val.labels, train.labels[_nearest_neighbours(val, train)], num_classes)
    rates = within + 1.0
    nats = across @ np.log(rates / rates.sum(axis=1, keepdims=True)).T  # [class of val, class of train]
    place = np.arange(num_classes)  # of a class of val: the class of train that it is taken for
    known = (within.sum(axis=1) >= _MIN_OF_CLASS) & (across.sum(axis=1) >= _MIN_OF_CLASS)
    for _ in range(num_classes):
        own = nats[np.arange(num_classes), place]
        exchanged = nats[:, place]  # [c, d]: c in the place of d
        gain = np.where(known[:, None] & known, exchanged + exchanged.T - own[:, None] - own, 0.0)
        c, d = np.unravel_index(gain.argmax(), gain.shape)
        if gain[c, d] <= 1.0:
            break
        place[[c, d]] = place[[d, c]]
    return [(cycle, float(sum(nats[c, place[c]] - nats[c, c] for c in cycle))) for cycle in _cycles(place)]


def _cycles(permutation: NDArray[np.int64]) -> list[tuple[int, ...]]:
    """List the cycles of a permutation, fixed points left out."""
    cycles, seen = [], set()
    for start in range(len(permutation)):
        cycle, c = [], start
        while c not in seen:
            seen.add(c)
            cycle.append(c)
            c = int(permutation[c])
        if len(cycle) > 1:
            cycles.append(tuple(cycle))
    return cycles


def _confusion(labels: NDArray[np.int64], others: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (labels, others), 1)
    return counts


def _features(stats: ThumbnailStats) -> NDArray[np.float32]:
    halves = stats.thumbs.reshape(-1, THUMBNAIL_SIDE // 2, 2, THUMBNAIL_SIDE // 2, 2, 3).mean(axis=(2, 4))
    return np.asarray(halves.reshape(len(stats), -1) / 255, dtype=np.float32)


# --------------------------------------------------------------------------------------- contact sheet

_COLUMNS = 8
_TILE = (96, 176)  # the side of a picture on the sheet, at least and at most, in pixels
_GAP, _CAPTION = 8, 20
_BACKGROUND, _TEXT = (255, 255, 255), (20, 24, 30)


def contact_sheet(pictures: Sequence[tuple[NDArray[np.float32], str]], preprocessing: Preprocessing) -> Image.Image:
    """Draw network inputs float32 (C, H, W), each with its caption below, in rows of eight: an RGB picture.

    The normalisation is undone, so the sheet shows what training computes with: crops, flips, colours and all.
    """
    input_sides = pictures[0][0].shape[1:]
    scale = (
        max(1, -(-_TILE[0] // max(input_sides)))
        if max(input_sides) < _TILE[0]
        else min(1.0, _TILE[1] / max(input_sides))
    )
    height, width = (max(1, round(side * scale)) for side in input_sides)
    columns = min(_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sides = (_GAP + columns * (width + _GAP), _GAP + rows * (height + _CAPTION + _GAP))
    sheet = Image.new("RGB", sides, _BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (pixels, caption) in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (width + _GAP), _GAP + row * (height + _CAPTION + _GAP)
        resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR
        sheet.paste(denormalise(pixels, preprocessing).resize((width, height), resample), (left, top))
        pen.text((left, top + height + 2), _shorten(pen, font, caption, width), fill=_TEXT, font=font)
    return sheet


def denormalise(pixels: NDArray[np.float32], preprocessing: Preprocessing) -> Image.Image:
    """Give the RGB picture that a network's input (C, H, W) shows: the inverse of `Preprocessing.normalise`."""
    mean, std = (
        np.array(values, dtype=np.float64)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    levels = np.nan_to_num((pixels * std + mean) * 255, nan=0.0, posinf=255.0, neginf=0.0)
    planes = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(planes, (3, *planes.shape[1:])).transpose(1, 2, 0).copy())


def class_name_captions(labels: NDArray[np.generic], classes: Sequence[str]) -> Iterable[str]:
    """Give each image's class name; of images after mixup, whose labels are shares (N, classes), the two largest."""
    for label in labels:
        if np.ndim(label) == 0:
            yield classes[int(label)]
            continue
        shares = np.asarray(label, dtype=np.float64)
        best = [int(i) for i in np.argsort(-shares, kind="stable")[:2] if shares[i] > 0.1]
        single = len(best) < 2
        yield " + ".join(classes[i] if single else f"{100 * shares[i]:.0f}% {classes[i]}" for i in best) or "mixed"


def _shorten(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, max_width: int
) -> str:
    """Cut the text at its end where it is too wide for a tile."""
    text = " ".join(printable_name(text).split())
    if pen.textlength(text, font=font) <= max_width:
        return text
    while text and pen.textlength(text + "...", font=font) > max_width:
        text = text[:-1]
    return text + "..."
