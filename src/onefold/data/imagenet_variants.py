"""ImageNet-1k and its variants that test robustness, each recognised by its folders.

| set | folders | scored |
|---|---|---|
| ImageNet, and -Sketch (arXiv 1905.13549) | 1000 of WordNet ids | top-1 of 1000 |
| ImageNet-A (arXiv 1907.07174), -R (arXiv 2006.16241) | their 200 ids | top-1 among those 200, as their authors do |
| ImageNet-C (arXiv 1903.12261) | corruption/severity/class, or group/corruption/severity/class | mean error, mCE |
| ReaL (arXiv 2006.07159) | val/ with real.json beside it | the answer is one of an image's labels |

A class's index is the place of its WordNet id among the 1000 sorted ones, as every published network counts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from onefold.data.decode import printable_name
from onefold.data.folders import subfolders
from onefold.errors import BadData
from onefold.file_io import read_json

ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""AlexNet's top-1 errors in percent, means over severities, as published with ImageNet-C: mCE divides by them."""

_GROUPS = ("noise", "blur", "weather", "digital", "extra")
_SEVERITIES = ("1", "2", "3", "4", "5")

_SUBSETS = {  # SHA-256 of the sorted WordNet ids, a line each
    "f6aa4b23244554d9b864fd715ae20048f6a9686388911b2dfbf1ada01bf0f520": "ImageNet-A",
    "e19a59d84e3746fafd34d2ccf6ae604a44e9a0500a596f343c878a89e30ce624": "ImageNet-R",
}
_NUMBER = re.compile(r"_val_(\d{8})\.")


@cache
def wordnet_ids() -> tuple[str, ...]:
    """List the WordNet ids of the 1000 classes, sorted."""
    return tuple((Path(__file__).parent / "imagenet.txt").read_text(encoding="ascii").split())


def imagenet_variant(folder: Path, classes: Sequence[str]) -> str | None:
    """Name the dataset that has these class folders; None where they are not ImageNet's."""
    if not classes or not set(classes) <= set(wordnet_ids()):
        return None
    if len(classes) == len(wordnet_ids()):
        return "ImageNet-Sketch" if "sketch" in printable_name(folder.name).lower() else "ImageNet"
    return _SUBSETS.get(hashlib.sha256("\n".join(sorted(classes)).encode()).hexdigest(), "part of ImageNet")


def corruption_folders(folder: Path) -> dict[str, dict[str, Path]]:
    """Give corruption -> severity -> the folder of its classes; empty where `folder` has another layout."""
    folders = {path.name: _severities(path) for path in _walk_corruptions(folder)}
    return {name: folders[name] for name in sorted(folders)}


def _walk_corruptions(folder: Path) -> Iterator[Path]:
    for name in subfolders(folder):
        if _severities(folder / name):
            yield folder / name
        elif name in _GROUPS:
            inner = (folder / name / corruption for corruption in subfolders(folder / name))
            yield from (path for path in inner if _severities(path))


def _severities(folder: Path) -> dict[str, Path]:
    """Give the folders called 1 to 5, if all hold class folders; classes with such names hold images."""
    names = subfolders(folder)
    if not names or not set(names) <= set(_SEVERITIES) or not all(subfolders(folder / name) for name in names):
        return {}
    return {name: folder / name for name in names}


def mean_corruption_error(errors: Mapping[str, float]) -> float | None:
    """Compute mCE in percent: the mean over the fifteen corruptions of error / AlexNet's; None where one is missing."""
    if not set(ALEXNET_ERRORS) <= set(errors):
        return None
    return 100 * sum(errors[name] / error for name, error in ALEXNET_ERRORS.items()) / len(ALEXNET_ERRORS)


def find_real_labels(folder: Path) -> Path | None:
    """Find the file of ReaL labels in `folder` or beside it; None where there is none."""
    places = (folder / "real.json", folder.parent / "real.json")
    return next((path for path in places if path.is_file()), None)


def read_real_labels(path: Path, names: Sequence[str]) -> list[list[int]]:
    """Read the ReaL labels of each image, none for some, by the number in its name: ILSVRC2012_val_00000001.JPEG.

    Raises BadData for a file that is not a list of lists of classes, and for a name without such a number.
    """
    try:
        labels = read_json(path)
    except (OSError, ValueError) as error:
        raise BadData(f"cannot read the ReaL labels {printable_name(path)}: {error}") from error
    if not isinstance(labels, list) or not all(_is_labels(entry) for entry in labels):
        raise BadData(f"{printable_name(path)} is not a list of lists of classes from 0 to 999, as ReaL's real.json is")
    by_image = []
    for name in names:
        match = _NUMBER.search(name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(labels):
            raise BadData(
                f"{printable_name(name)} has no ReaL labels: expected a name like ILSVRC2012_val_00000001.JPEG"
            )
        by_image.append(labels[number - 1])
    return by_image


def _is_labels(value: object) -> bool:
    return isinstance(value, list) and all(type(label) is int and 0 <= label < 1000 for label in value)
