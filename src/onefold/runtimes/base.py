"""The interface of a runtime, the session that callers hold, and how vendors' packages are imported.

A runtime is one module with its export half and its load half side by side. It is named in RUNTIMES, imported when
asked for, and has these names:

    FILES               the files it writes, all named model.*
    PACKAGES            the packages whose versions the manifest records
    PRECISIONS          the precisions it can be exported in
    UNSUPPORTED_PRECISIONS             precisions a user may expect of it, each with the reason why it has none
    MANIFEST_DETAILS             facts for the manifest about its form (the opset, ...)
    ACCEPTS_QDQ         whether int8 models reach it with quantize and dequantize operations, or as integer arithmetic
    unavailable_reason  a function: why this machine cannot run it, or None where it can; None where any machine can
    export              writes FILES of a traced network into a folder
    load                makes an engine of the bytes of FILES
"""

from __future__ import annotations

import ctypes
import difflib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from threading import RLock
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from onefold.errors import BadArgument, BadArtifact, MissingExtra
from onefold.runtimes import RUNTIMES
from onefold.runtimes.artifact import Artifact, ModelInfo, manifest_sha256, read_files, read_manifest
from onefold.runtimes.reference_logits import Floats, make_reference_images

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

_muting = RLock()


class RuntimeEngine(Protocol):
    """A loaded network of one runtime: images (B, C, H, W) float32, contiguous, to logits (B, classes) float32."""

    @property
    def threads(self) -> int:
        """The number of threads that the runtime itself reports."""

    def __call__(self, images: Floats) -> Floats:
        """Compute the logits. The images fit the network; calls may come from several threads."""

    def close(self) -> None:
        """Release memory and threads. It is called once, and the engine is not called after it."""


class Runtime(Protocol):
    """The module of a runtime; the top of this file says what each name means."""

    FILES: tuple[str, ...]
    PACKAGES: tuple[str, ...]
    PRECISIONS: tuple[str, ...]
    UNSUPPORTED_PRECISIONS: Mapping[str, str]
    MANIFEST_DETAILS: Mapping[str, object]
    ACCEPTS_QDQ: bool
    unavailable_reason: Callable[[], str | None] | None

    def export(self, program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
        """Write FILES into the folder. May raise anything; MissingExtra where a package is missing."""

    def load(self, content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
        """Make an engine of the bytes of FILES. May raise anything; MissingExtra where a package is missing."""


class Int8Model(Protocol):
    """An int8 model in both of its forms, such as `quantize` makes."""

    @property
    def model(self) -> nn.Module:
        """Images to logits in integer arithmetic: the reference that a device must match."""

    @property
    def graph(self) -> nn.Module:
        """The same with quantize and dequantize operations (quantized_decomposed), which converters read."""


class Session:
    """A loaded artifact: images (B, C, H, W) float32 to logits (B, classes) float32, for any B >= 1.

    Its logits for the reference images were compared with PyTorch's. It may be called from several threads. Close it,
    or use it in a `with`. With `prepare` it takes whatever that makes inputs of.
    """

    def __init__(self, artifact: Artifact, engine: RuntimeEngine) -> None:
        self.artifact = artifact
        self.prepare: Callable[[object], Floats] | None = None
        self._engine: RuntimeEngine | None = engine

    @property
    def threads(self) -> int:
        """The number of threads that the runtime itself reports."""
        return self._open_engine().threads

    def __call__(self, images: object) -> Floats:
        """Compute logits (B, classes). Raises BadArgument where the images are not float32 of the model's shape."""
        engine = self._open_engine()
        shape = self.artifact.input_shape
        is_batch = isinstance(images, np.ndarray) and images.dtype == np.float32 and images.ndim == 4
        if self.prepare is not None and not is_batch:
            images = self.prepare(images)
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            actual = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise BadArgument(
                f"expected a numpy array of float32, got {actual}; use numpy.asarray(images, numpy.float32)"
            )
        if images.ndim != 4 or images.shape[1:] != shape or len(images) == 0:
            expected = f"(B, {', '.join(map(str, shape))}) with B >= 1"
            raise BadArgument(f"expected images of shape {expected}, got {images.shape}; resize or add the batch axis")
        return engine(np.ascontiguousarray(images))

    def close(self) -> None:
        """Release memory and threads; closing twice is fine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({self.artifact.title}, {'closed' if self._engine is None else 'open'})"

    def _open_engine(self) -> RuntimeEngine:
        if self._engine is None:
            raise BadArgument(f"the session of {self.artifact.title} is closed; load the artifact again")
        return self._engine


def import_runtime(name: str) -> Runtime:
    """Import the module of a runtime, but not its vendor's package. Raises BadArgument with the nearest name."""
    if name == "eager":
        raise BadArgument(
            "the runtime eager was removed and its format is no longer read: `onefold fuse` writes weights that eval, "
            "predict and bench run in PyTorch"
        )
    if name not in RUNTIMES:
        close = difflib.get_close_matches(str(name).lower(), RUNTIMES, n=1, cutoff=0.4)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise BadArgument(f"there is no runtime {name!r}; {guess}choose one of: {', '.join(RUNTIMES)}")
    return cast(Runtime, importlib.import_module(RUNTIMES[name]))


def check_precision(name: str, precision: str) -> Runtime:
    """Import the module of a runtime. Raises BadArgument where there is none, or it cannot export the precision."""
    runtime = import_runtime(name)
    if precision not in runtime.PRECISIONS:
        reason = runtime.UNSUPPORTED_PRECISIONS.get(precision)
        choices = ", ".join(runtime.PRECISIONS)
        why = "" if reason is None else f": {reason}"
        raise BadArgument(f"{name} cannot export {precision!r}{why}; choose one of: {choices}")
    return runtime


def open_for_cold_start(folder: str, digest: str, threads: str, batch: str) -> Callable[[], object]:
    """Open an artifact for a cold-start measurement; the call that is returned answers random images (batch, C, H, W).

    The logits are not compared with the reference here, so that the call is the first one the engine gets; so its
    manifest has to be the one of `digest` (`manifest_sha256`), which was opened with all checks before. Numbers are
    text because a fresh process receives them as arguments. Raises BadArtifact for a changed file, MissingExtra.
    """
    artifact = read_manifest(Path(folder))
    if manifest_sha256(artifact) != digest:
        raise BadArtifact(f"{artifact.folder} changed while it was measured; measure it again")
    runtime = import_runtime(artifact.runtime)
    engine = runtime.load(read_files(artifact), precision=artifact.precision, threads=int(threads))
    images = make_reference_images(artifact.input_shape, num_images=int(batch))
    return lambda: engine(images)


# ---------------------------------------------------------------------------------- vendors' packages


def import_vendor_package(module: str, *, extra: str) -> ModuleType:
    """Import a vendor's module. Raises MissingExtra, with the command to type, where it cannot be imported."""
    try:
        with suppress_output(), suppress_native_output():  # TensorFlow's native code logs when it is imported
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"the runtime {extra} needs the package {module} ({error})", extra) from error


@contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress the warnings, log lines and prints of a converter, whose failures are exceptions anyway.

    What native code writes is not suppressed (`suppress_native_output` does). Not for use from several threads at once.
    """
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


@contextmanager
def suppress_native_output() -> Iterator[None]:
    """Suppress what native code writes to file descriptors 1 and 2 of the process, such as banners and counters."""
    with _muting, open(os.devnull, "wb") as devnull, ExitStack() as restore:
        for stream in (1, 2):
            saved = os.dup(stream)
            restore.callback(os.close, saved)
            restore.callback(os.dup2, saved, stream)
        _flush_c_streams()
        for stream in (1, 2):
            os.dup2(devnull.fileno(), stream)
        try:
            yield
        finally:
            _flush_c_streams()


def _flush_c_streams() -> None:
    """Flush C's own buffers: behind a pipe C would write them only later, when nothing is muted any more."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Look up the version of each package; one that is not installed is left out."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def first_error_line(error: BaseException) -> str:
    """Shorten an error to one line for a message: the first line of its root cause, headings left out."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.endswith(":")] or lines
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
