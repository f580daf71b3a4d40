"""Images on disk: finding them, and the classes that folders give them.

Folders are read at any depth and links are followed, but for those back to a folder that they lie in. Hidden files (a
leading dot), the folders that archives and file servers leave behind, and what onefold itself wrote are left out. What
is an image is for `left_out_kind` to say; a link to nothing is none; what is inside, or whether it is a pipe, is for
`decode_image`. Names are relative to the folder, with "/", in the order of their code points; a file is opened by the
bytes of its name, and called as `normalize_name` says.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Crop, CropBox
from onefold.data.dataset_info import LeftOut
from onefold.data.decode import (
    ICLOUD_KIND,
    MASK_KIND,
    SUFFIXES,
    decode_crop,
    decode_image,
    left_out_kind,
    left_out_reason,
    printable_name,
    read_first_bytes,
    read_samples,
)
from onefold.data.photo_copies import THUMBNAIL_KIND, find_masks, find_thumbnails
from onefold.data.preprocessing import ValueRange
from onefold.data.remote_files import LocalFile, digest_bytes
from onefold.data.splits import parse_split_name
from onefold.errors import BadData
from onefold.file_io import normalize_name, suggest_path

_LOG = logging.getLogger("onefold.data")
_SYSTEM_NAMES = frozenset(("__macosx", "@eadir", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini")) | {
    *("$recycle.bin", "recycler", "system volume information", "#recycle", "@recycle", "icon\r")
}
_MASK_FOLDERS = frozenset(
    ("mask", "masks", "annotation", "annotations", "segmentation", "segmentations", "gt", "trimaps")
)
_LABEL_FOLDERS = frozenset(
    ("label", "labels", "lbl", "gts", "groundtruth", "ground_truth", "anno", "annos", "target")
) | {
    *("targets", "segmentationclass", "segmentationobject", "segmentationclassaug", "labelimages", "label_images"),
}  # that hold masks where each of their images has one beside it in images/
_IMAGE_FOLDERS = frozenset(("image", "images", "img", "imgs", "photo", "photos", "jpegimages"))
_LINK_KIND = "links to nothing"
_MAX_DEPTH = 100  # folders within each other: more are no work of people
_CLASS_DEPTH = 3  # folders above which one may be a class or a split


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images in one folder; `names` are relative to `root`. A Dataset."""

    root: Path
    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def label(self, i: int) -> int:
        """Give the class index of image i."""
        return self.labels[i]

    def name(self, i: int) -> str:
        """Give the name of image i, relative to the folder; NFC, since file systems write accents in two ways."""
        return normalize_name(self.names[i])

    def image(self, i: int, *, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
        """Decode image i; see `decode_image`."""
        return decode_image(self.root / self.names[i], min_side=min_side, value_range=value_range)

    def raw_samples(self, i: int) -> NDArray[Any] | None:
        """Read the samples of image i where they have more than 8 bits; see `read_samples`."""
        return read_samples(self.root / self.names[i])

    def crop(self, i: int, crop_box: CropBox) -> Crop:
        """Decode a crop of image i; see `decode_crop`."""
        return decode_crop(os.path.join(self.root, self.names[i]), crop_box)

    def num_bytes(self, i: int) -> int:
        """Give the size of the file of image i, or -1 where it is gone."""
        try:
            return (self.root / self.names[i]).stat().st_size
        except OSError:
            return -1

    def digest(self, i: int) -> str:
        """Give a digest of the file of image i, or "" where it is gone, or no file."""
        file = LocalFile(self.root / self.names[i])
        try:  # a pipe would be waited for
            return digest_bytes(file.read, file.num_bytes) if file.path.is_file() else ""
        except BadData:
            return ""


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """List every image that `paths` (files and folders) name, folders read at any depth, each path once.

    Raises BadData for a path that is not there and for a folder without images.
    """
    images: dict[Path, None] = {}  # a set that keeps the order
    for path in map(Path, paths):
        if not os.path.isdir(path):
            if not os.path.lexists(path):
                raise BadData(
                    f"{printable_name(path)} is not there: expected an image or a folder of images{suggest_path(path)}"
                )
            images[path] = None
            continue
        listing = list_folder(path)
        if not listing.images:
            raise no_images_message(path, listing)
        images.update(dict.fromkeys(path / name for name in listing.images))
        for left_out in listing.left_out():
            _LOG.warning("%s: left out %s", printable_name(path), left_out)
    return list(images)


def read_class_folders(folder: Path) -> ImageFiles:
    """List the images of `folder`, whose subfolders are the classes, sorted by name.

    Raises BadData where there are no class folders, and where one of them holds no images.
    """
    listing = list_folder(folder)
    classes = subfolders(folder)
    number = {name: label for label, name in enumerate(classes)}
    names = [name for name in listing.images if "/" in name]
    if not names:
        raise no_images_message(folder, listing)
    labels = [number[name.partition("/")[0]] for name in names]
    if empty := [classes[label] for label in sorted(set(range(len(classes))) - set(labels))]:
        raise BadData(
            f"class folders without images in {printable_name(folder)}: {join_names(empty)}; fill or remove them"
        )
    return ImageFiles(folder, names, labels, tuple(classes))


def subfolders(folder: Path) -> list[str]:
    """List the names of the subfolders of `folder`, hidden ones left out, sorted."""
    return sorted(name for name, is_folder, _ in _entries(folder) if is_folder and not is_hidden(name))


# ------------------------------------------------------------------------------------ what a folder holds


@dataclass(frozen=True, kw_only=True)
class FolderListing:
    """What a folder holds at any depth: names relative to it, with "/", in the order of their NFC forms.

    `others` has the files that are no images by what they are, `outputs` the folders that onefold wrote, `empty` those
    with no file at all.
    """

    images: list[str]
    others: Mapping[str, list[str]]
    hidden: int
    outputs: list[str]
    empty: list[str]

    def left_out(self, used: Collection[str] = (), reasons: Mapping[str, str] | None = None) -> list[LeftOut]:
        """Say what is left out by what it is, but for files that were `used`; `reasons` are by kind."""
        kinds = {kind: [name for name in names if name not in used] for kind, names in self.others.items()}
        found = [
            LeftOut(
                count=len(names),
                what=_what(kind, len(names)),
                reason=(reasons or {}).get(kind) or _reason(kind),
                examples=tuple(names[:2]),
            )
            for kind, names in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
            if names
        ]
        if self.outputs:
            reason = "runs and artifacts that onefold wrote"
            what = "folder" + "s" * (len(self.outputs) > 1)
            found.append(LeftOut(count=len(self.outputs), what=what, reason=reason, examples=tuple(self.outputs[:3])))
        if self.hidden:
            found.append(
                LeftOut(
                    count=self.hidden,
                    what="hidden file" + "s" * (self.hidden > 1),
                    reason="names with a dot, system folders",
                )
            )
        return found


def list_folder(folder: Path) -> FolderListing:
    """List what is in a folder and below it; links are followed, but not to a folder that they lie in.

    Raises BadData where a folder cannot be read.
    """
    images: list[str] = []
    others: dict[str, list[str]] = defaultdict(list)
    hidden, outputs, empty = 0, [], []
    # A folder that links reach twice is read twice where that may be two classes or splits, once below a class.
    pending: list[tuple[str, frozenset[tuple[int, int]], set[tuple[int, int]]]] = [("", frozenset(), set())]
    while pending:
        inner, ancestors, seen = pending.pop()
        try:
            status = (folder / inner).stat()
        except OSError as error:
            raise _unreadable(folder / inner, error) from error
        identity = status.st_dev, status.st_ino
        if identity in seen or identity in ancestors:
            continue
        seen.add(identity)
        check_depth(inner)
        entries = _entries(folder / inner)
        if inner and _is_output({name for name, *_ in entries}):
            outputs.append(inner)
            continue
        visible = [entry for entry in entries if not is_hidden(entry[0])]
        waiting = [inner + name for name, *_ in entries if name.startswith(".") and name.endswith(ICLOUD_KIND)]
        if waiting:
            others[ICLOUD_KIND] += waiting
        hidden += len(entries) - len(visible) - len(waiting)
        if inner and not visible:
            empty.append(inner.removesuffix("/"))
        for name, is_folder, is_dangling in visible:
            if is_dangling:
                others[_LINK_KIND].append(inner + name)
                continue
            if is_folder:
                below = seen if inner.count("/") >= _CLASS_DEPTH else set()
                pending.append((f"{inner}{name}/", ancestors | {identity}, below))
                continue
            kind = left_out_kind(name, partial(read_first_bytes, os.path.join(folder, inner, name)))
            (images if kind is None else others[kind]).append(inner + name)
    if masks := {*find_masks(images), *find_masks_in_folders(images)}:
        others[MASK_KIND] = sorted(masks)
        images = [name for name in images if name not in masks]
    if thumbnails := {*find_thumbnails(images)}:
        others[THUMBNAIL_KIND] = sorted(thumbnails)
    return FolderListing(
        images=sorted((name for name in images if name not in thumbnails), key=normalize_name),
        others={kind: sorted(names) for kind, names in others.items()},
        hidden=hidden,
        outputs=sorted(outputs),
        empty=sorted(empty),
    )


def find_masks_in_folders(images: Sequence[str]) -> list[str]:
    """List the images in folders called masks or the like that are called as one beside it, or in images/."""

    def key(name: str) -> str:
        parts = os.path.splitext(name)[0].split("/")
        return "/".join(
            part for part in parts if part.lower() not in (*_MASK_FOLDERS, *_LABEL_FOLDERS, *_IMAGE_FOLDERS)
        )

    folders = {folder: frozenset(folder.lower().split("/")) for folder in {name.rpartition("/")[0] for name in images}}
    of_masks = {folder for folder, around in folders.items() if around & _MASK_FOLDERS}
    of_labels = {folder for folder, around in folders.items() if around & _LABEL_FOLDERS} - of_masks
    found: list[str] = []
    if of_masks:
        photos = {key(name) for name in images if name.rpartition("/")[0] not in of_masks}
        found = [name for name in images if name.rpartition("/")[0] in of_masks and key(name) in photos]
    if of_labels:
        of_images = {folder for folder, around in folders.items() if around & _IMAGE_FOLDERS}
        photos = {key(name) for name in images if name.rpartition("/")[0] in of_images}
        labels = [name for name in images if name.rpartition("/")[0] in of_labels]
        found += labels if {*map(key, labels)} <= photos else []
    return found


@dataclass(eq=False)
class Folder:
    """A folder by its images: `num_direct` in it, `num_images` with those below; `children` by their names.

    Folders without images are left out, but for those that are empty: a class without images yet.
    """

    path: str = ""
    num_direct: int = 0
    num_images: int = 0
    children: dict[str, Folder] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]


def build_folder_tree(images: Iterable[str], empty: Iterable[str] = ()) -> Folder:
    """Give the folders that images (names with "/") lie in, and the empty ones."""
    root = Folder()
    counts = Counter(name.rpartition("/")[0] for name in images)
    for path in [*counts, *empty]:
        check_depth(path)
        folder, count = root, counts[path]
        folder.num_images += count
        for name in path.split("/") if path else ():
            inner = f"{folder.path}/{name}" if folder.path else name
            folder = folder.children.setdefault(name, Folder(path=inner))
            folder.num_images += count
        folder.num_direct += count
    return root


def check_depth(path: str) -> None:
    """Raise BadData where a file lies in more folders than people make: trees of them are walked by recursion."""
    if path.count("/") > _MAX_DEPTH:
        shown = printable_name("/".join(path.split("/")[:3]))
        raise BadData(
            f"folders lie in each other more than {_MAX_DEPTH} deep, below {shown}: name the folder with the photos"
        )


def merge_initial_folders(folder: Folder) -> Folder:
    """Give a tree without folders that are the first letters of those within: a/abbey and b/bar are abbey and bar.

    A folder within these that holds folders alone is several classes: a/apse/indoor is `apse/indoor`. The same folder
    is given where there are none.
    """
    letters = {name: child for name, child in folder.children.items() if child.num_images}
    if len(letters) > 1 and all(map(_is_initial, letters, letters.values())):
        children: dict[str, Folder] = {}
        for child in (child for letter in letters.values() for child in letter.children.values()):
            plain = any(name.casefold() in _IMAGE_FOLDERS or parse_split_name(name) for name in child.children)
            inner = {} if child.num_direct or plain else child.children
            children |= {f"{child.name}/{name}": each for name, each in inner.items()} or {child.name: child}
    else:
        children = {name: merge_initial_folders(child) for name, child in folder.children.items()}
        if all(children[name] is child for name, child in folder.children.items()):
            return folder
    return Folder(folder.path, folder.num_direct, folder.num_images, children)


def _is_initial(name: str, folder: Folder) -> bool:
    """Whether a folder is called by one letter, and holds nothing but folders that are words with it (not a/a_1)."""
    is_letter = len(name) == 1 and name.isalpha() and not folder.num_direct
    return is_letter and all(
        inner.casefold().startswith(name.casefold()) and inner[1:2].isalpha() for inner in folder.children
    )


def join_names(names: Sequence[str], most: int = 5) -> str:
    """Join the first few names and say how many more there are, for a message."""
    shown = ", ".join(printable_name(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def left_out_images(images: Iterable[str], reasons: Mapping[str, str], otherwise: str) -> list[LeftOut]:
    """Say why these images are in no split: by the nearest folder that has a reason, or `otherwise`."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for image in images:
        folder = image.rpartition("/")[0]
        while folder and folder not in reasons:
            folder = folder.rpartition("/")[0]
        where = folder or (image.partition("/")[0] if "/" in image else "")
        groups[where, reasons.get(folder, otherwise)].append(image)
    return [
        LeftOut(count=len(names), what=f"images in {where}/" if where else "images in no folder", reason=reason)
        for (where, reason), names in groups.items()
    ]


def _entries(folder: Path) -> list[tuple[str, bool, bool]]:
    """List (name, whether it is a folder, whether it is a link to nothing) of what `folder` holds, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, _is_folder(entry), _is_dangling(entry)) for entry in entries)
    except OSError as error:
        raise _unreadable(folder, error) from error


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden (a leading dot), or what systems and file servers leave behind."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _is_output(names: set[str]) -> bool:
    """Whether a folder with files of these names is a run or an artifact of onefold."""
    is_run = "recipe.json" in names and bool(names & {"log.jsonl", "best", "last", "samples.png", "check.json"})
    return is_run or {"manifest.json", "reference.npz"} <= names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _what(kind: str, count: int) -> str:
    if kind.startswith("."):
        return f"{kind} file{'s' * (count > 1)}"
    return "link to nothing" if kind == _LINK_KIND and count == 1 else kind


def _reason(kind: str) -> str:
    if kind == THUMBNAIL_KIND:
        return "smaller copies of other images, by their names"
    return "what they point to is not there" if kind == _LINK_KIND else left_out_reason(kind)


def _unreadable(folder: Path, error: OSError) -> BadData:
    return BadData(f"cannot read the folder {printable_name(folder)}: {error.strerror or error}")


def no_images_message(folder: Path, listing: FolderListing) -> BadData:
    """Say that a folder holds no images, and which files it holds."""
    if not listing.others:
        return BadData(f"{printable_name(folder)} holds no images: it has no files at all")
    most = sorted(listing.others.items(), key=lambda item: -len(item[1]))[:3]
    kinds = ", ".join(f"{len(names)} {printable_name(kind)} ({_reason(kind)})" for kind, names in most)
    suffixes = " ".join(sorted(SUFFIXES))
    return BadData(f"{printable_name(folder)} holds no images: of files it has {kinds} (images are {suffixes})")
