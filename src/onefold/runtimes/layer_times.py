"""The time of each layer of an artifact, as its runtime measures it.

A runtime that can measure its layers has a function `profile`, and its name in PROFILED. Layers are those that the
runtime executes: one may stand for several of the model's.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from onefold.errors import BadArgument, BadArtifact, OnefoldError
from onefold.runtimes.artifact import Artifact, read_files, read_manifest
from onefold.runtimes.base import first_error_line, import_runtime
from onefold.runtimes.reference_logits import Floats, make_reference_images
from onefold.runtimes.sandbox import open_in_child_first

_PROFILED = ("onnx", "openvino")
WARMUP_CALLS = 3


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """A layer as the runtime executes it: its name, its type, and its median time in nanoseconds."""

    name: str
    kind: str
    ns: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The layers of an artifact in execution order; profiling makes each a little slower."""

    artifact: Artifact
    calls: int
    layers: tuple[LayerTime, ...]

    @property
    def ns(self) -> float:
        """The time of all layers in nanoseconds."""
        return sum(layer.ns for layer in self.layers)

    def time_by_type(self) -> dict[str, float]:
        """Sum the times by type of layer, the largest first."""
        totals: dict[str, float] = {}
        for layer in self.layers:
            totals[layer.kind] = totals.get(layer.kind, 0.0) + layer.ns
        return dict(sorted(totals.items(), key=lambda entry: -entry[1]))


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """The calls to profile: `calls` of them with these images (B, C, H, W)."""

    images: Floats
    calls: int
    threads: int


class ProfilingRuntime(Protocol):
    """The module of a runtime that measures its layers."""

    def profile(self, content: Mapping[str, bytes], request: ProfileRequest, *, precision: str) -> Sequence[LayerTime]:
        """Measure the layers' median times over the calls, without the first WARMUP. May raise anything."""


def profile(folder: Path | str, *, threads: int = 1, batch: int = 1, calls: int = 30) -> Profile:
    """Measure the layers of an artifact, with `batch` images per call.

    Raises BadArgument where its runtime does not measure them, BadArtifact, MissingExtra.
    """
    artifact = read_manifest(Path(folder))
    if artifact.runtime not in _PROFILED:
        raise BadArgument(
            f"{artifact.runtime} does not report the time of its layers; {' and '.join(_PROFILED)} do: export to one "
            "of them and profile that"
        )
    runtime = cast(ProfilingRuntime, import_runtime(artifact.runtime))
    open_in_child_first(artifact)
    images = make_reference_images(artifact.input_shape, num_images=batch)
    request = ProfileRequest(images=images, calls=calls, threads=threads)
    try:
        layers = runtime.profile(read_files(artifact), request, precision=artifact.precision)
    except OnefoldError:
        raise
    except Exception as error:
        raise BadArtifact(f"{artifact.runtime} cannot profile {artifact.folder}: {first_error_line(error)}") from error
    return Profile(artifact=artifact, calls=calls, layers=tuple(layers))


def median_layer_times(runs: Sequence[Sequence[LayerTime]]) -> list[LayerTime]:
    """Merge the layers of several runs into one list with median times, in the order of their first run."""
    times: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for layer in run:
            times.setdefault((layer.name, layer.kind), []).append(layer.ns)
    return [LayerTime(name=name, kind=kind, ns=statistics.median(samples)) for (name, kind), samples in times.items()]
