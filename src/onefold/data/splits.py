"""Splits: the words that people have for them in names of folders, files, tables and in columns; and the split by seed.

| split | words, of any case and form |
|---|---|
| train | train, training, trn, trainval |
| val | val, valid, validation, validate, validating, dev, devel, development, eval, evaluation, evaluate, public test |
| test | test, tests, testing, tst, holdout, held-out, private test |

A word stands alone or beside words that say nothing more (`train_set`, `ValImages`, `images_train`, `trainset`) and
numbers (`train2017`); or beside a stem that all splits share (`seg_train`, `seg_test`). `eval` and `public test` are
test where there is another val. These rules hold alike for folders, folders in tars, names of shards and tables, and
columns.

Where a place names no val, `split_by_seed` cuts it out of train.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onefold.data.dataset_info import Split

SPLIT_WORDS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("eval", "evaluation", "evaluate", "evaluating", "publictest"), "val"),
    **dict.fromkeys(("test", "tests", "testing", "tst", "holdout", "heldout", "privatetest"), "test"),
}
"""The words for splits, in lower case."""

WEAK_WORDS = ("eval", "evaluation", "evaluate", "evaluating", "publictest")
"""Words for val that mean test beside another word for val."""

FILLER_WORDS = (
    frozenset(("set", "sets", "data", "dataset", "datasets", "split", "splits", "folder", "subset", "part", "shard"))
    | frozenset(
        ("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "pics", "jpg", "jpeg")
    )
    | frozenset(("file", "files", "of", "final", "official"))
)
"""Words beside a word for a split that say nothing more."""

_TOKENS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|[^\W\d_]+|\d+")
_RUNS = re.compile(r"[^\W\d_]+|\d+")
_GLUED = re.compile(
    rf"({'|'.join(SPLIT_WORDS)})({'|'.join(sorted(FILLER_WORDS))})|({'|'.join(sorted(FILLER_WORDS))})(train|val|test)"
)


@dataclass(frozen=True)
class SplitName:
    """What a name says of a split: the split, the word for it, and what else is in the name: a stem, numbers."""

    split: Split
    word: str
    stem: str
    number: str

    @property
    def is_ambiguous(self) -> bool:
        """Whether it is a word that may mean val as well as test."""
        return self.word in WEAK_WORDS


def resolve_ambiguous_split(said: SplitName, has_val: bool) -> Split:
    """Give the split: where there is another val, a word that may mean either means test."""
    return "test" if said.is_ambiguous and has_val else said.split


def split_into_words(name: str) -> list[str]:
    """Divide a name into its words and numbers, in lower case: train_images2 and TrainImages2 have the same."""
    return [token.casefold() for token in _TOKENS.findall(unicodedata.normalize("NFKC", name))]


def parse_split_name(name: str) -> SplitName | None:
    """Read a split out of a name; None where it says none, or two."""
    tokens: list[str] = []
    for run in _RUNS.findall(unicodedata.normalize("NFKC", name)):
        whole = _GLUED.fullmatch(run.casefold())
        for word in [run.casefold()] if whole or run.casefold() in SPLIT_WORDS else split_into_words(run):
            glued = _GLUED.fullmatch(word)
            tokens += [part for part in glued.groups() if part] if glued else [word]
    text = " ".join(tokens).replace("hold out", "holdout").replace("held out", "heldout")
    text = re.sub(r"\b(public|private) test\b", r"\1test", text)
    tokens = re.sub(r"\btrain val\b", "trainval", text).split()
    words = [token for token in tokens if token in SPLIT_WORDS]
    if not words or len({SPLIT_WORDS[word] for word in words}) > 1:
        return None
    rest = [token for token in tokens if token not in SPLIT_WORDS and token not in FILLER_WORDS]
    stem, number = ([t for t in rest if t.isdigit() is is_number] for is_number in (False, True))
    return SplitName(SPLIT_WORDS[words[0]], words[0], " ".join(stem), " ".join(number))


def splits_by_folder_name(images: Sequence[str]) -> list[Split] | None:
    """Give the split of labelled images by the first of their folders that says one; None unless each has one."""
    found: dict[str, SplitName | None] = {}
    for image in images:
        folder = image.rpartition("/")[0]
        if folder not in found:
            found[folder] = next(filter(None, map(parse_split_name, folder.split("/"))), None)
            if found[folder] is None:
                return None
    has_val = any(said.split == "val" and not said.is_ambiguous for said in found.values() if said)
    return [resolve_ambiguous_split(said, has_val) for image in images if (said := found[image.rpartition("/")[0]])]


def split_by_seed(
    names: Sequence[str], labels: Sequence[int], seed: int, val_fraction: float, groups: Sequence[str] = ()
) -> dict[Split, list[int]]:
    """Give the numbers of train's and val's images: val has those of each class whose names' hashes are smallest.

    So the split depends on nothing but names and seed, and an image that is added later moves no more than a few
    others. A class of two or more is on both sides, unless `val_fraction` is 0 or 1, which give all to one side: 1 to
    evaluate on everything. Images of one of the `groups` ("" is none) are on one side; a class of one group may be on
    one side only.
    """
    is_val = [val_fraction == 1] * len(names)
    if 0 < val_fraction < 1:
        members: dict[int, list[int]] = defaultdict(list)
        for i, label in enumerate(labels):
            members[label].append(i)
        wanted = {n: min(max(round(val_fraction * len(images)), 1), len(images) - 1) for n, images in members.items()}
        if any(groups):
            for i in _whole_groups(names, labels, seed, groups, wanted):
                is_val[i] = True
            members.clear()
        for n, images in members.items():
            for i in sorted(images, key=lambda i: _hash(seed, names[i]))[: wanted[n]]:
                is_val[i] = True
    sides: dict[Split, list[int]] = {"train": [], "val": []}
    for i, held_out in enumerate(is_val):
        sides["val" if held_out else "train"].append(i)
    return sides


def _whole_groups(
    names: Sequence[str], labels: Sequence[int], seed: int, groups: Sequence[str], wanted: Mapping[int, int]
) -> list[int]:
    """Give val's images: groups in the order of their hashes, as long as no class has more than wanted of it.

    Of a class whose groups are all larger the first is taken that leaves half of its images or more to train on.
    """
    together: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        together[(group, -1) if group else (names[i], i)].append(i)
    units = [images for _, images in sorted(together.items(), key=lambda unit: _hash(seed, unit[0][0]))]
    of_class, num_val = Counter(labels), Counter[int]()
    found: list[int] = []
    for is_last in (False, True):
        for images in units:
            added = Counter(labels[i] for i in images)
            if is_last and all(num_val[n] for n in added):
                continue
            if all(num_val[n] + count <= (of_class[n] // 2 if is_last else wanted[n]) for n, count in added.items()):
                num_val.update(added)
                found += images
    return found


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
