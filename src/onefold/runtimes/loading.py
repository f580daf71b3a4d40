"""Code that loads an artifact without onefold, for each runtime and platform, and how it prepares photos.

A template is snippets/<runtime>.<platform>.md, or .<precision>.md where a precision needs another: Markdown with @name@
where a fact or another file of that folder goes. Only numbers and words of our own go into code, never what people
wrote, such as the names of classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from onefold.runtimes.artifact import Artifact

PLATFORMS: dict[str, str] = {
    "python": "Python",
    "cpp": "C++",
    "swift": "Swift",
    "kotlin": "Kotlin",
    "javascript": "JavaScript",
}

CHANNELS_LAST = ("litert",)

# The keys of a manifest's preprocessing, and what the ten lines of Python call them.
_NAMES = {
    "size": "size",
    "crop_pct": "crop",
    "mean": "mean",
    "std": "std",
    "interpolation": "kernel",
    "channels": "channels",
}

# How far a kernel reaches, and its weight at the distance d, as Pillow defines them.
_KERNELS: dict[str, tuple[str, str]] = {
    "bilinear": ("widen", "1 - d"),
    "bicubic": ("2 * widen", "d < 1 ? (1.5 * d - 2.5) * d * d + 1 : ((2.5 - 0.5 * d) * d - 4) * d + 2"),
    "nearest": ("0.5", "1.0"),
}
_LUMA = "(19595 * {0} + 38470 * {1} + 7471 * {2} + 32768) >> 16"

# What a runtime is told of the precision, where it is not left to itself.
_HOW: dict[str, dict[str, str]] = {
    "coreml": {"fp32": "CPU_ONLY", "fp16": "CPU_AND_NE", "int8": "CPU_ONLY"},
    "mnn": {"fp32": "High", "fp16": "Low"},
}

_SWIFT = {"CPU_ONLY": "cpuOnly", "CPU_AND_NE": "cpuAndNeuralEngine"}

_PLACE = re.compile(r"@([a-z_.]+)@")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How photos become images of the network; `order` is that of the manifest's preprocessing."""

    order: tuple[str, ...]
    size: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    channels: int

    @property
    def short(self) -> int:
        """The short side of a photo before it is cropped."""
        return round(self.size / self.crop_pct)


def preparation(artifact: Artifact) -> Preparation | None:
    """How photos are prepared; None where the artifact does not say all of it, or not for its own shape."""
    told = artifact.preprocessing
    if set(told) != set(_NAMES):
        return None
    found = Preparation(
        order=tuple(told),
        size=artifact.input_shape[1],
        crop_pct=(*_numbers([told["crop_pct"]]), 0.0)[0],
        mean=_numbers(told["mean"]),
        std=_numbers(told["std"]),
        interpolation=str(told["interpolation"]),
        channels=artifact.input_shape[0],
    )
    sound = (
        (told["channels"], told["size"], told["size"]) == artifact.input_shape
        and found.channels in (1, 3)
        and 0 < found.crop_pct <= 1
        and len(found.mean) == len(found.std) == found.channels
        and min(found.std) > 0
        and found.interpolation in _KERNELS
    )
    return found if sound else None


def platforms(runtime: str) -> tuple[str, ...]:
    """The platforms that there is code for; none where the runtime is not known here."""
    return tuple(platform for platform in PLATFORMS if _template(f"{runtime}.{platform}") is not None)


def code(artifact: Artifact, platform: str) -> str:
    """The Markdown that shows how to use the artifact on one of its runtime's `platforms`."""
    named = f"{artifact.runtime}.{platform}"
    text = _template(f"{named}.{artifact.precision}") or _template(named)
    assert text is not None, f"there is no snippets/{named}.md"
    values = _values(artifact)
    prepared = preparation(artifact)
    if prepared is not None:
        values |= _numbers_of(prepared, last=artifact.runtime in CHANNELS_LAST)
    return _filled(text, values).rstrip()


def _values(artifact: Artifact) -> dict[str, str]:
    channels, height, width = artifact.input_shape
    known = _HOW.get(artifact.runtime, {"": ""})
    how = known.get(artifact.precision, min(known.values()))
    return {
        "channels": str(channels),
        "height": str(height),
        "width": str(width),
        "num_classes": str(artifact.num_classes),
        "how": how,
        "how_swift": _SWIFT.get(how, ""),
        "answer": "@named.python@" if artifact.classes is not None else "@numbered.python@",
        "photo": "@proof.python@" if preparation(artifact) is None else "@photo.python@",
    }


def _numbers_of(prepared: Preparation, *, last: bool) -> dict[str, str]:
    """What code is given of the preparation; `last` says that a pixel's channels lie side by side."""
    size, channels = prepared.size, prepared.channels
    reach, weight = _KERNELS[prepared.interpolation]
    yes, _, no = weight.partition(" : ")
    test, _, yes = yes.rpartition(" ? ")
    colour = channels == 3
    return {
        "names": ", ".join(_NAMES[key] for key in prepared.order),
        "grey": "" if colour else '.convert("L")',
        "size": str(size),
        "short": str(prepared.short),
        "mean": ", ".join(map(repr, prepared.mean)),
        "std": ", ".join(map(repr, prepared.std)),
        "place": f"(i * {size} + j) * {channels} + c" if last else f"(c * {size} + i) * {size} + j",
        "level": "p[c]" if colour else _LUMA.format("p[0]", "p[1]", "p[2]"),
        "level_kotlin": "p[c]" if colour else f"({_LUMA.format('p[0]', 'p[1]', 'p[2]')})".replace(">>", "shr"),
        "reach": reach,
        "weight": weight,
        "weight_kotlin": f"if ({test}) {yes} else {no}" if test else weight,
    }


def _filled(text: str, values: Mapping[str, str]) -> str:
    """The template with every place filled, those in what fills a place too."""

    def fill(place: re.Match[str]) -> str:
        found = values[place[1]] if place[1] in values else _template(place[1])
        assert found is not None, f"a template asks for {place[1]!r}: no such value, and no snippets/{place[1]}.md"
        return _filled(found.rstrip("\n"), values)

    return _PLACE.sub(fill, text)


def _template(name: str) -> str | None:
    path = files("onefold.runtimes") / "snippets" / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _numbers(value: object) -> tuple[float, ...]:
    """The numbers of a list; none where it is none, or holds anything else."""
    if not isinstance(value, list | tuple):
        return ()
    numbers = [each for each in value if isinstance(each, int | float) and not isinstance(each, bool)]
    return tuple(map(float, numbers)) if len(numbers) == len(value) else ()
