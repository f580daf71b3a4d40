"""Where the time of a network goes, layer by layer, in the words of the runtime that runs it.

A runtime that can tell has a third half, `profile`, and its name in PROFILED. Layers are what the runtime made of the
network: fused ones stand for several of the model's.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from onefold.errors import BadArgument, BadArtifact, OnefoldError
from onefold.runtimes.artifact import Artifact, read_files, read_manifest
from onefold.runtimes.base import find_runtime
from onefold.runtimes.reference import Floats, make_images
from onefold.runtimes.vendor import first_line

PROFILED = ("onnx", "openvino")
WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer as the runtime runs it: its name, its type, and the median of its times in nanoseconds."""

    name: str
    kind: str
    ns: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The layers of an artifact in the order in which they run; asking for times makes each a little slower."""

    artifact: Artifact
    calls: int
    layers: tuple[Layer, ...]

    @property
    def ns(self) -> float:
        """The time of all layers."""
        return sum(layer.ns for layer in self.layers)

    def by_kind(self) -> dict[str, float]:
        """The time of each type of layer, the most first."""
        found: dict[str, float] = {}
        for layer in self.layers:
            found[layer.kind] = found.get(layer.kind, 0.0) + layer.ns
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What a runtime is to run while it takes the times: so many calls with these images (B, C, H, W)."""

    images: Floats
    count: int
    threads: int


class Profiled(Protocol):
    """A runtime's module that tells how long its layers take."""

    def profile(self, content: Mapping[str, bytes], calls: Calls, *, precision: str) -> Sequence[Layer]:
        """The layers with the median of their times over the calls, the first few left out. May raise anything."""


def profile(folder: Path | str, *, threads: int = 1, batch: int = 1, calls: int = 30) -> Profile:
    """The layers of an artifact with their times, `batch` images a call.

    Raises BadArgument where its runtime does not tell them, BadArtifact, MissingExtra.
    """
    artifact = read_manifest(Path(folder))
    if artifact.runtime not in PROFILED:
        raise BadArgument(
            f"{artifact.runtime} does not tell how long its layers take; {' and '.join(PROFILED)} do: export to one of "
            "them and profile that"
        )
    runtime = cast(Profiled, find_runtime(artifact.runtime))
    images = make_images(artifact.input_shape, num_images=batch)
    order = Calls(images=images, count=calls, threads=threads)
    try:
        layers = runtime.profile(read_files(artifact), order, precision=artifact.precision)
    except OnefoldError:
        raise
    except Exception as error:
        raise BadArtifact(f"{artifact.runtime} cannot profile {artifact.folder}: {first_line(error)}") from error
    return Profile(artifact=artifact, calls=calls, layers=tuple(layers))


def medians(runs: Sequence[Sequence[Layer]]) -> list[Layer]:
    """One list of layers from those of several calls, each with the median of its times, in the order of the last."""
    times: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for layer in run:
            times.setdefault((layer.name, layer.kind), []).append(layer.ns)
    return [Layer(name=name, kind=kind, ns=statistics.median(found)) for (name, kind), found in times.items()]
