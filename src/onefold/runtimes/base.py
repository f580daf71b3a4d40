"""What a runtime is, and what everyone holds who has loaded a model from one.

A runtime is one module with both halves side by side, named in RUNTIMES (names.py) and imported when asked for:

    FILES        the files it writes, all named model.*
    PACKAGES     the packages whose versions matter
    PRECISIONS   what it can be asked for
    REFUSES      what else one would ask it for, and why it has none
    DETAILS      what the manifest says of its form (the opset, ...)
    READS_GRIDS  whether a network of 8 bits comes to it with quantize and dequantize operations, or as whole numbers
    OBSTACLE     a function: why this machine cannot run it, or None where it can; None for one that runs on any
    export       a traced network and a folder in, the files in the folder out
    load         the bytes of these files in, an engine out
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from onefold.errors import BadArgument
from onefold.runtimes.artifact import About, Artifact
from onefold.runtimes.names import RUNTIMES
from onefold.runtimes.reference import Floats

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


class Engine(Protocol):
    """What a runtime runs: images (B, C, H, W) float32, contiguous, in; logits (B, classes) float32 out."""

    @property
    def threads(self) -> int:
        """The number of threads that the runtime itself says it uses."""

    def __call__(self, images: Floats) -> Floats:
        """The logits; called with images that fit, possibly from several threads."""

    def close(self) -> None:
        """Give the memory and the threads back; called once, and the engine is not called after it."""


class Runtime(Protocol):
    """A module of this room (see the top of the file)."""

    FILES: tuple[str, ...]
    PACKAGES: tuple[str, ...]
    PRECISIONS: tuple[str, ...]
    REFUSES: Mapping[str, str]
    DETAILS: Mapping[str, object]
    READS_GRIDS: bool
    OBSTACLE: Callable[[], str | None] | None

    def export(self, program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
        """Write FILES into the folder. May raise anything; MissingExtra where a package is missing."""

    def load(self, content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
        """The engine for the bytes of FILES. May raise anything; MissingExtra where a package is missing."""


class EightBit(Protocol):
    """A network of 8 bits, such as `quantize` makes, in both of its forms."""

    @property
    def model(self) -> nn.Module:
        """Images to logits, computed on whole numbers: the answer that a device must give."""

    @property
    def graph(self) -> nn.Module:
        """The same with quantize and dequantize operations (quantized_decomposed), which converters read."""


class Session:
    """A loaded model: call it with images (B, C, H, W) float32 for logits (B, classes) float32, any B >= 1.

    Its answer to the reference was checked. It may be called from several threads. Close it, or use it in a `with`.
    """

    def __init__(self, artifact: Artifact, engine: Engine) -> None:
        self.artifact = artifact
        self._engine: Engine | None = engine

    @property
    def threads(self) -> int:
        """The number of threads that the runtime itself says it uses."""
        return self._open().threads

    def __call__(self, images: Floats) -> Floats:
        """Logits (B, classes). Raises BadArgument where the images are not float32 of the model's shape."""
        engine = self._open()
        shape = self.artifact.input_shape
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            came = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise BadArgument(
                f"expected a numpy array of float32, came {came}; use numpy.asarray(images, numpy.float32)"
            )
        if images.ndim != 4 or images.shape[1:] != shape or len(images) == 0:
            expected = f"(B, {', '.join(map(str, shape))}) with B >= 1"
            raise BadArgument(f"expected images of shape {expected}, came {images.shape}; resize or add the batch axis")
        return engine(np.ascontiguousarray(images))

    def close(self) -> None:
        """Give the memory and the threads back; closing twice is fine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({self.artifact.title}, {'closed' if self._engine is None else 'open'})"

    def _open(self) -> Engine:
        if self._engine is None:
            raise BadArgument(f"the session of {self.artifact.title} is closed; load the artifact again")
        return self._engine


def find_runtime(name: str) -> Runtime:
    """The runtime of this name; its vendor's package is not imported yet. Raises BadArgument with the nearest name."""
    if name not in RUNTIMES:
        near = difflib.get_close_matches(str(name).lower(), RUNTIMES, n=1, cutoff=0.4)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise BadArgument(f"there is no runtime {name!r}; {guess}choose one of: {', '.join(RUNTIMES)}")
    return cast(Runtime, import_module(RUNTIMES[name]))
