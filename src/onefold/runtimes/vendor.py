"""Other people's packages: asked for by name when used, and kept quiet while they work."""

from __future__ import annotations

import ctypes
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from threading import Lock
from types import ModuleType

from onefold.errors import MissingExtra

_muting = Lock()


def require(module: str, *, extra: str) -> ModuleType:
    """The module, imported now. Raises MissingExtra, with the line to type, where it cannot be."""
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        line = f'pip install "onefold[{extra}]"'
        raise MissingExtra(f"the runtime {extra} needs the package {module} ({error}); type: {line}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the warnings, log lines and prints of a converter: what it must say, it says by raising.

    What native code writes is not held back (`mute` does). Not for use from several threads at once.
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
def mute() -> Iterator[None]:
    """Hold back what native code writes to the standard output and error of the process: it greets, and counts."""
    with _muting, open(os.devnull, "wb") as nowhere, ExitStack() as back:
        for stream in (1, 2):
            kept = os.dup(stream)
            back.callback(os.close, kept)
            back.callback(os.dup2, kept, stream)
        _flush()
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
        try:
            yield
        finally:
            _flush()


def _flush() -> None:
    """Have C write now what it holds in its buffers, as it does by itself in front of a terminal only."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The installed version of each package; one that is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line that fits in a message: the first line of its first cause, headings apart."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.endswith(":")] or lines
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
