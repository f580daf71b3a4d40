"""Images that are made of another one, by their names, and photos of one thing, by a column of a table.

| images | are |
|---|---|
| `a_mask.png`, `a_seg.png` beside `a.jpg` | masks: left out |
| `thumb_a.jpg`, `a_thumb.jpg`, `a-150x150.jpg` beside `a.jpg`, or below it in `thumbs/` | thumbnails: left out |
| `a_jpg.rf.1f0c9d.jpg` (Roboflow), `a_flipLR.jpg`, `a_aug3.jpg`, `a-edited.jpg`, `a - Copy.jpg` | of the photo a |
| `a (1).jpg`, `a 2.jpg` and `IMG_E1234.jpg` beside `a.jpg` and `IMG_1234.jpg`, no more than three | the same |
| `small/a.jpg`, `large/a.jpg`, `augmented/a_flip.jpg` in one class | of the photo a |
| `a.heic` beside `a.jpg`; `IMG_BURST20200101120000_1.jpg`; `film_frame_12.jpg` | of one photo, burst or video |
| of equal values in a column `lesion_id`, `patient`, `video` or the like | photos of one thing |

A val that is cut out of train has all images of a photo, or of a thing, or none: else a network would be scored on what
it has learned by heart.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations

from onefold.data.dataset_info import SPLITS, SplitImages
from onefold.data.splits import split_into_words

THUMBNAIL_KIND = "thumbnails beside their photos"

_MASK = re.compile(r"[ _.-](?:masks?|seg|segm|segmentation|gt|groundtruth|trimap|labelids|annotation)([ _-]?\d+)?$")
_THUMBNAIL = re.compile(
    r"(?:thumb(?:nail)?s?|tn)[ _.-](?P<a>.+)|(?P<b>.+?)[ _.-](?:thumb(?:nail)?|tn)|(?P<c>.+)-(?:\d{2,5}x\d{2,5}|scaled)"
)
_THUMBNAIL_HINTS = re.compile(r"thumb|tn|scaled|\dx\d")  # sooner found than the whole
_THUMBNAIL_FOLDERS = frozenset(("thumb", "thumbs", "thumbnail", "thumbnails", "_thumbs", "previews", "_previews"))
_PHOTO_FOLDERS = frozenset(("image", "images", "img", "imgs", "photo", "photos", "original", "originals", "full"))
_VERSION_FOLDERS = frozenset(
    ("small", "medium", "large", "lowres", "highres", "hires", "resized", "cropped", "full")
) | {
    *("original", "originals", "augmented", "augmentation", "aug", "flipped", "rotated", "edited"),
}
_MADE = (
    r"(?:aug(?:mented)?|flip(?:ped)?(?:lr|tb|ud|[hv])?|[hv]flip|mirror(?:ed)?|rot(?:at(?:ed?|ion))?|crop(?:ped)?|blur(?:red)?"
    r"|nois[ey]|bright(?:ness|er|ened)?|edit(?:ed)?|bearbeitet|copy|kopie|copie|copia|(?:new)?\d{1,3}deg(?:flip(?:lr|tb))?"
    r"|\d{2,5}x\d{2,5}|scaled|thumb(?:nail)?|orig(?:inal)?)"
)
_OF_PHOTO = re.compile(rf"(?P<photo>.*?)(?:\.rf\.[0-9a-z]{{6,}}|(?:[ _.-]+{_MADE}[ _-]?\(?\d{{0,4}}\)?)+|~\d)")
_BESIDE = re.compile(r"(?P<photo>.+?)(?: ?\(\d{1,2}\)| \d)|(?P<phone>img_)e(?P<number>\d{4,})")
_HINTS = re.compile(
    r"\.rf\.|~\d|\dx\d|deg|aug|flip|mirror|rot|crop|blur|nois|bright|edit|bearb|cop|kopie|scaled|thumb|orig"
)
_SERIES = re.compile(r".*(?P<burst>burst\d{8,}).*|(?P<video>.*[^\W_].*?)[ _.-]*frame[ _.-]*\d+")
_CONVERTED = (".heic", ".heif", ".hif", ".avif", ".webp")  # of which phones and tools write a JPEG too
_ROBOFLOW = re.compile(r"(?P<photo>.+)\.rf\.[0-9A-Za-z]{6,}\.\w+")
_MAX_COPIES = 20
_MAX_BESIDE = 4  # a photo and its copies; more are numbered photos: cat (1) to cat (500)
_THINGS = frozenset(("patient", "lesion", "subject", "participant", "person", "individual", "specimen", "identity")) | {
    *("video", "clip", "recording", "burst")
}
_NUMBERED_THINGS = frozenset(("plant", "tree", "leaf", "animal", "sequence", "scene", "session", "study", "case")) | {
    *("group", "slide", "trap", "tile", "family", "eye", "wound", "nodule", "scan", "object", "instance", "camera"),
    *("series", "seq", "observation"),
}  # with a word for a key: a column `plant` has kinds
_KEY_WORDS = frozenset(("id", "ids", "no", "nr", "number", "code", "key", "uid", "idx", "index", "instance"))
_NAME_WORDS = frozenset(("name", "file", "path"))  # of a video; a plant's is a kind


def find_masks(names: Sequence[str]) -> list[str]:
    """List, of names of images with "/", the masks: another image's name and `_mask`, `_seg`, `_gt` or the like.

    Only where that other image is in the same folder; its suffix may be another.
    """
    stems = {os.path.splitext(name)[0].lower() for name in names}
    ends = ((name, _MASK.search(os.path.splitext(name)[0].lower())) for name in names)
    return [name for name, end in ends if end and end.string[: end.start()] in stems]


def find_thumbnails(names: Sequence[str]) -> list[str]:
    """List, of names of images with "/", the thumbnails and smaller copies of another one that is there."""
    stems = {os.path.splitext(name)[0].casefold() for name in names}

    def is_thumbnail(name: str) -> bool:
        folder, slash, stem = os.path.splitext(name)[0].casefold().rpartition("/")
        match = _THUMBNAIL_HINTS.search(stem) and _THUMBNAIL.fullmatch(stem)
        photo = folder + slash + (match["a"] or match["b"] or match["c"]) if match else ""
        return bool(match) and (photo in stems or (f"{photo}-scaled" in stems and not stem.endswith("-scaled")))

    found = [name for name in names if is_thumbnail(name)]
    inside = [name for name in names if not _THUMBNAIL_FOLDERS.isdisjoint(name.casefold().split("/")[:-1])]
    if inside:
        photos = {_photo_key(name) for name in set(names).difference(inside)}
        found += [name for name in inside if name not in found and _photo_key(name) in photos]
    return found


def _photo_key(name: str) -> str:
    """Give the path of an image without folders for thumbnails and photos, and what marks a thumbnail."""
    *folders, stem = os.path.splitext(name)[0].casefold().split("/")
    match = _THUMBNAIL.fullmatch(stem)
    stem = (match["a"] or match["b"] or match["c"]) if match else stem
    return "/".join([*(part for part in folders if part not in (*_THUMBNAIL_FOLDERS, *_PHOTO_FOLDERS)), stem])


def group_by_photo(names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Give for each image the photo that it and others of its class are of, by their names; "" where it is of its own.

    Names that would put a whole class together, or more than half of it and more than 20 images, tell nothing.
    """
    stems = [os.path.splitext(name)[0].casefold() for name in names]
    paths = [_without_versions(stem) for stem in stems]
    there = Counter(zip(paths, labels, strict=True))
    versions = {path for path, stem in zip(paths, stems, strict=True) if path != stem}
    versions |= {
        path for path, name in zip(paths, names, strict=True) if os.path.splitext(name)[1].lower() in _CONVERTED
    }
    beside: dict[tuple[str, int], list[int]] = defaultdict(list)
    photos = [""] * len(names)
    for i, path in enumerate(paths):
        folder, slash, stem = path.rpartition("/")
        if _HINTS.search(stem) and (match := _OF_PHOTO.fullmatch(stem)):
            photos[i] = folder + slash + match["photo"]
        elif ("burst" in stem or "frame" in stem) and (match := _SERIES.fullmatch(stem)):
            photos[i] = folder + slash + (match["burst"] or match["video"])
        elif path in versions:
            photos[i] = path
        elif match := _BESIDE.fullmatch(stem):
            photo = folder + slash + (match["photo"] or match["phone"] + match["number"])
            if there[photo, labels[i]]:
                beside[photo, labels[i]].append(i)
    for (photo, _), those in beside.items():
        for i in those if len(those) < _MAX_BESIDE else ():
            photos[i] = photo
    known = {*zip(photos, labels, strict=True)}
    photos = [
        path if not photo and (path, label) in known else photo
        for photo, path, label in zip(photos, paths, labels, strict=True)
    ]
    of_class = Counter(labels)
    counts = Counter(each for each in zip(photos, labels, strict=True) if each[0])
    told = {
        each
        for each, count in counts.items()
        if 1 < count < of_class[each[1]] and (2 * count <= of_class[each[1]] or count <= _MAX_COPIES)
    }
    return [f"{label} {photo}" if (photo, label) in told else "" for photo, label in zip(photos, labels, strict=True)]


def _without_versions(path: str) -> str:
    """Give a path without folders that hold the same photos in another form (small, large, augmented)."""
    if "/" not in path or _VERSION_FOLDERS.isdisjoint(parts := path.split("/")[:-1]):
        return path
    return "/".join([*(part for part in parts if part not in _VERSION_FOLDERS), path.rpartition("/")[2]])


def notes_of_shared_groups(parts: Sequence[SplitImages]) -> list[str]:
    """Say how many things of one split are in another too, where a column says of what the photos are."""
    notes = []
    grouped = [(part, {*part.groups} - {""}) for part in parts if part.groups is not None]
    grouped.sort(key=lambda each: SPLITS.index(each[0].split or "train"))
    for (one, things), (other, others) in combinations(grouped, 2):
        if both := sorted(things & others):
            column = other.group_column
            notes.append(
                f"{len(both)} of the {len(others)} {column} of {other.source} are in {one.source} too ({both[0]}): "
                "photos of one thing are on both sides, and the score flatters"
            )
    return notes


def notes_of_shared_photos(parts: Sequence[tuple[SplitImages, Sequence[str]]]) -> list[str]:
    """Say how many images of one split are versions of photos of another, by the names that Roboflow gives them.

    The parts come with the names of their images.
    """
    photos = []
    for part, names in parts:
        files = (_ROBOFLOW.fullmatch(name.rpartition("/")[2]) for name in names)
        photos.append((part, [(m["photo"], label) for m, label in zip(files, part.labels, strict=True) if m]))
    photos.sort(key=lambda each: SPLITS.index(each[0].split or "train"))
    notes = []
    for (one, first), (other, second) in combinations(photos, 2):
        known = {*first}
        if both := [photo for photo, label in second if (photo, label) in known]:
            called = (
                f"{len(both)} images of {other.source} are called as versions of photos in {one.source} ({both[0]})"
            )
            notes.append(f"{called}: then the score flatters")
    return notes


def called_as_groups(names: Iterable[str]) -> list[str]:
    """Give the columns that are called as one that says of what thing a photo is: lesion_id, patient."""
    found = []
    for name in names:
        words = split_into_words(name)
        is_sure = {*words[:1]} <= _THINGS
        is_thing = is_sure or (words[0] in _NUMBERED_THINGS and len(words) > 1)
        if words and is_thing and {*words[1:]} <= (_KEY_WORDS | _NAME_WORDS if is_sure else _KEY_WORDS):
            found.append(name)
    return found


def may_hold_groups(text: str) -> bool:
    """Whether a text, as the beginning of a table, may name such a column: quick, before the table is read."""
    return any(word in text.casefold() for word in (*_THINGS, *_NUMBERED_THINGS))


def find_group_column(columns: Mapping[str, Sequence[str]], labels: Sequence[str]) -> str | None:
    """Give the column of things whose values recur ("" is none): of several the one with fewest things.

    Those of which most classes have one thing only come last.
    """
    found = []
    for name, column in columns.items():
        things = {*column} - {""}
        if 1 < len(things) < sum(map(bool, column)):
            found.append((are_classes_of_one(column, labels), len(things), name))
    return min(found)[2] if found else None


def are_classes_of_one(groups: Sequence[str], labels: Sequence[Hashable]) -> bool:
    """Whether most classes are of one thing only, so that these cannot be divided."""
    per_class = Counter(label for label, group in {*zip(labels, groups, strict=True)} if group)
    return 2 * sum(count == 1 for count in per_class.values()) >= len({*labels})
