"""A first look at the data before hours are spent on them: what is surely wrong, and what is worth a second look.

Errors, on which no training starts unasked:
    classes with other names or numbers in val than in train; one class only; a class without images
    one picture under two classes, in 1 of 100 or more; classes that have changed places between train and val
    pictures of train that are in val too, 1 of 100 or more
    pictures that are all the same, or of which half or more are of one colour or unreadable
Warnings:
    fewer of any of these; a class that val lacks; names that differ in case or spacing only
    20 times as many images in one class as in another; labels that say nothing about the pictures
    pictures of val nearly the same as one of train; pictures much smaller than the network's input

Names, counts and sizes are those of all images. Pictures are looked at up to `MOST_TRAIN` and `MOST_VAL` of them, which
takes seconds: copies by their size first, the others by a fixed sample.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onefold.data.dataset import Source
from onefold.data.decode import printable
from onefold.data.folders import listed
from onefold.data.looks import Looks, alike, chance, look, moved_classes, nearest, same
from onefold.errors import BadData

MOST_TRAIN, MOST_VAL = 2000, 1000

_MANY = 0.01  # the share of images from which on a fault is an error
_UNEVEN = 20
_SIZED = 100  # pictures whose size is looked at
_SMALL_INPUT = 64  # a network's input that is no larger than this asks for no large photos
_SURE = 30.0  # nats by which exchanged classes explain val better
_ENOUGH = 200  # pictures below which neighbours tell nothing


@dataclass(frozen=True)
class Finding:
    """One sentence about the data, with names; an error is what no training should start on unasked."""

    text: str
    is_error: bool = False


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was found, errors first, and how many pictures were looked at."""

    findings: tuple[Finding, ...]
    num_train: int
    num_val: int

    def refuse_errors(self) -> None:
        """Raise BadData with the first error and the number of the others."""
        errors = [finding.text for finding in self.findings if finding.is_error]
        if errors:
            more = f"; and {len(errors) - 1} more of the kind" if len(errors) > 1 else ""
            raise BadData(f"{errors[0]}{more} (if that is meant, train with --no-check)")


def check_data(train: Source, val: Source, size: int) -> Checked:
    """Look at the data of a training whose network takes `size` x `size` pixels."""
    findings = list(_classes(train, val))
    num_train = num_val = 0
    if not any(finding.is_error for finding in findings):
        ours, theirs = look(train, MOST_TRAIN, beside=val), look(val, MOST_VAL, beside=train)
        num_train, num_val = (len(each) + len(each.unread) for each in (ours, theirs))
        findings += [*_pictures(ours, theirs), *_size(train, size)]
        if len(ours) and len(theirs):
            findings += [*_pairs(ours, theirs), *_labels(ours, theirs)]
    findings.sort(key=lambda finding: not finding.is_error)
    return Checked(findings=tuple(findings), num_train=num_train, num_val=num_val)


# --------------------------------------------------------------------------------------- names and counts


def _classes(train: Source, val: Source) -> Iterator[Finding]:
    if train.classes != val.classes:
        yield Finding(_difference(train.classes, val.classes), is_error=True)
        return
    counts, held = (Counter(source.label(i) for i in range(len(source))) for source in (train, val))
    missing = [name for c, name in enumerate(train.classes) if not counts[c]]
    if len(counts) < 2:
        yield Finding(f"there is one class only, {listed([train.classes[c] for c in counts])}", is_error=True)
    elif missing:
        yield Finding(f"these classes have no image to train on: {listed(missing)}", is_error=True)
    unheld = [name for c, name in enumerate(train.classes) if counts[c] and not held[c]]
    if unheld:
        yield Finding(
            f"these classes have no image to validate on, so their accuracy will not be seen: {listed(unheld)}"
        )
    kin: dict[str, list[str]] = defaultdict(list)
    for name in train.classes:
        kin[_bare(name)].append(name)
    for names in kin.values():
        if len(names) > 1:
            told = listed([repr(name) for name in names])
            yield Finding(f"the classes {told} differ in case or spacing only: are they one?")
    yield from _balance(counts, train.classes)


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    only = [(side, sorted(set(a) - set(b))) for side, a, b in (("train", ours, theirs), ("val", theirs, ours))]
    told = [f"only in {side}: {listed(names)}" for side, names in only if names]
    if told:
        return f"the classes of train and val differ; {'; '.join(told)}"
    c = next(c for c, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    names = f"{printable(ours[c])!r} in train and {printable(theirs[c])!r} in val"
    return f"the classes are numbered otherwise in val than in train: class {c} is {names}"


def _bare(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c not in " _-.")


def _balance(counts: Counter[int], classes: Sequence[str]) -> Iterator[Finding]:
    if len(counts) < 2:
        return
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    if many >= _UNEVEN * few:
        guess = 100 * many / counts.total()
        yield Finding(
            f"{printable(classes[most])} has {many} training images and {printable(classes[least])} has {few}: always "
            f"saying the first would be right in {guess:.0f} % of cases: look at each class, not at top-1 alone"
        )


# ---------------------------------------------------------------------------------------------- pictures


def _pictures(train: Looks, val: Looks) -> Iterator[Finding]:
    for side, looks in (("train", train), ("val", val)):
        total = len(looks) + len(looks.unread)
        if looks.unread:
            text = f"{len(looks.unread)} of {total} images of {side} cannot be read, the first: {looks.unread[0]}"
            yield Finding(text, is_error=2 * len(looks.unread) >= total)
        if len(looks) > 1 and len(set(looks.digests)) == 1:
            yield Finding(
                f"all {len(looks)} images of {side} are the same picture, {_named(looks, [0])}", is_error=True
            )
            continue
        flat = np.flatnonzero(looks.is_flat).tolist()
        if flat:
            text = f"{len(flat)} of {len(looks)} images of {side} are of one colour: {_named(looks, flat)}"
            yield Finding(text, is_error=2 * len(flat) >= len(looks))


def _size(train: Source, size: int) -> Iterator[Finding]:
    """Whether photos are enlarged by more than two: one that is smaller than what is asked for comes whole."""
    if size <= _SMALL_INPUT:
        return
    shorter: list[int] = []
    for i in range(0, len(train), max(1, len(train) // _SIZED)):
        try:
            shorter.append(min(train.image(i, at_least=size).size))
        except BadData:
            continue
    middle = sorted(shorter)[len(shorter) // 2] if shorter else size
    if 2 * middle < size:
        yield Finding(
            f"half of the training images are {middle} pixels or less on their short side, and the network's input is "
            f"{size}: --img-size {max(32, 2 ** math.ceil(math.log2(middle)))} would be quicker and lose little"
        )


def _pairs(train: Looks, val: Looks) -> Iterator[Finding]:
    torn = [(a, n, b, m) for a, b in ((train, train), (val, val), (val, train)) for n, m in same(a, b)]
    torn = [each for each in torn if each[0].labels[each[1]] != each[2].labels[each[3]]]
    if torn:
        a, n, b, m = torn[0]
        both = f"{printable(a.name(n))} ({_class(a, n)}) and {printable(b.name(m))} ({_class(b, m)})"
        text = f"{len(torn)} pictures stand under two classes; the first: {both} have the same pixels"
        yield Finding(text, is_error=len(torn) >= _MANY * (len(train) + len(val)))
    copies = same(val, train)
    if copies:
        text = (
            f"{len(copies)} of {len(val)} validation images are training images too, so the accuracy will flatter: "
            f"{_couples(val, train, copies)}"
        )
        yield Finding(text, is_error=len(copies) >= _MANY * len(val))
    near = alike(val, train)
    if near:
        yield Finding(
            f"{len(near)} of {len(val)} validation images are nearly the same as a training image, so the accuracy may "
            f"flatter: {_couples(val, train, near)}"
        )


def _labels(train: Looks, val: Looks) -> Iterator[Finding]:
    classes, count = train.source.classes, len(train)
    if count >= _ENOUGH:
        agree = float((train.labels[nearest(train, train)] == train.labels).mean())
        guess = chance(train.labels, train.labels, len(classes))
        if agree - guess < 2 * math.sqrt(guess * (1 - guess) / count):
            yield Finding(
                f"the images most alike are of one class in {100 * agree:.1f} % of cases, and {100 * guess:.1f} % is "
                "chance: either the classes differ in details only, or the labels do not belong to these images"
            )
    for ring, nats in moved_classes(train, val, len(classes)):
        if nats > _SURE:
            told = [f"val's {printable(classes[c])} look like train's {printable(classes[d])}" for c, d in _steps(ring)]
            text = f"{len(ring)} classes have changed places between train and val: {'; '.join(told[:3])}"
            yield Finding(text, is_error=True)


def _steps(ring: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return zip(ring, ring[1:] + ring[:1], strict=True)


def _class(looks: Looks, n: int) -> str:
    return printable(looks.source.classes[int(looks.labels[n])])


def _named(looks: Looks, places: Sequence[int]) -> str:
    return listed([looks.name(n) for n in places], most=3)


def _couples(here: Looks, there: Looks, pairs: Sequence[tuple[int, int]]) -> str:
    return listed([f"{here.name(n)} (val) = {there.name(m)} (train)" for n, m in pairs], most=3)
