"""An artifact opened with nothing around it, for whoever measures how it starts in a fresh process.

What is left out is the check of its answer: the first call here is the first one that the engine is given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onefold.runtimes.artifact import read_files, read_manifest
from onefold.runtimes.base import find_runtime
from onefold.runtimes.reference import make_images


def first_call(folder: str, threads: str, batch: str) -> Callable[[], object]:
    """A call without arguments that answers made-up images (batch, C, H, W); numbers come as text, as a shell has them.

    Raises BadArtifact where a file is not as it was when exported, MissingExtra.
    """
    artifact = read_manifest(Path(folder))
    runtime = find_runtime(artifact.runtime)
    engine = runtime.load(read_files(artifact), precision=artifact.precision, threads=int(threads))
    images = make_images(artifact.input_shape, num_images=int(batch))
    return lambda: engine(images)
