"""DatasetInfo: what a place holds - its classes, its splits, and what was left out and why; as lines, and as JSON.

The value is made by `read_dataset` before anything is decoded. `onefold data PLACE` prints it, a training prints it
before its first step and keeps it in the run folder, and the report shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from onefold.config import from_dict, to_dict
from onefold.data.decode import printable_name

if TYPE_CHECKING:
    from onefold.data.dataset import Dataset

Split = Literal["train", "val", "test"]
"""What images are for: to train on, to choose the best epoch with, and to be scored on once at the end."""

SPLITS: tuple[Split, ...] = ("train", "val", "test")

_MAX_NAMES = 8  # classes that a line names


@dataclass(frozen=True, kw_only=True)
class SplitImages:
    """The images of one split, or (split None) of all, before their classes are numbered.

    `labels` has each image's class by name, `numbered` the names in the order of their numbers where the place numbers
    them. `open` makes a Dataset of the images' class indices and the classes. `groups` says of what each photo is, by a
    column of a table; photos of one thing are on one side where val is cut out. `photo_names` are what the photos were
    called, by which versions of one are known, where the Dataset calls them otherwise (by rows of Parquet).
    """

    split: Split | None
    source: str
    labels: Sequence[str]
    open: Callable[[Sequence[int], tuple[str, ...]], Dataset]
    numbered: tuple[str, ...] | None = None
    groups: Sequence[str] | None = None
    group_column: str = ""
    photo_names: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The images of one split: where they come from ("valid/", or a part of train/ by seed), and of which classes."""

    name: Split
    source: str
    num_images: int
    images_per_class: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Files or images that belong to no split: how many, what they are, why they are not used, and some of them."""

    count: int
    what: str
    reason: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = f" ({', '.join(map(printable_name, self.examples))})" if self.examples else ""
        what = self.what.replace("images ", "image ", 1) if self.count == 1 else self.what
        return f"{self.count} {printable_name(what)}{named}: {printable_name(self.reason)}"


@dataclass(frozen=True, kw_only=True)
class PlaceImages:
    """The images of a place by split; `container` says what they lie in, the rest what was not taken as it is."""

    container: str
    splits: tuple[SplitImages, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a place holds.

    `container` says what the images lie in ("class folders", "tar shards", the name of a table ...), `class_order` by
    what rule the classes are numbered. `notes` has a sentence for each thing that somebody might have expected
    otherwise: where val comes from if there was none, which folders were taken for one class, and the like.
    """

    place: str
    container: str
    classes: tuple[str, ...]
    class_order: str
    splits: tuple[SplitInfo, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def split(self, name: Split) -> SplitInfo | None:
        """Give the split of that name; None where the place has none."""
        return next((split for split in self.splits if split.name == name), None)

    def lines(self, most: int | None = None) -> list[str]:
        """Give the dataset in lines for a person; no more than `most`, of which the last says how many are missing."""
        names = [printable_name(name) for name in self.classes[:_MAX_NAMES]]
        more = f" and {len(self.classes) - _MAX_NAMES} more" if len(self.classes) > _MAX_NAMES else ""
        kind = "class" if len(self.classes) == 1 else "classes"
        lines = [
            f"data: {printable_name(self.place)} ({printable_name(self.container)}), {len(self.classes)} {kind} "
            f"{self.class_order}: {', '.join(names)}{more}"
        ]
        width = len(str(max((split.num_images for split in self.splits), default=0)))
        lines += [
            f"  {split.name:5}  {split.num_images:{width}} images, {printable_name(split.source)}"
            for split in self.splits
        ]
        lines += [f"  note: {printable_name(note)}" for note in self.notes]
        lines += [f"  left out: {one}" for one in self.left_out]
        if most is not None and len(lines) > most:
            hidden = lines[most - 1 :]
            lines = [*lines[: most - 1], f"  and {len(hidden)} more lines: onefold data {printable_name(self.place)}"]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON; `from_dict` is the inverse."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> DatasetInfo:
        """Give the value that `to_dict` wrote. Raises BadArgument for an unknown, missing or impossible field."""
        return from_dict(cls, given, "dataset")
