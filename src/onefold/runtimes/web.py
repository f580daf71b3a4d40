"""ONNX Runtime Web: the model.onnx that a web page loads, run here by the same WebAssembly in Node.js.

A page gives the file to `onnxruntime-web`; here a process of Node.js does (web.mjs), and images and logits go to it and
back as raw numbers. The package is an npm one: it is looked for in the folder that ONEFOLD_NODE_MODULES names, or in
`node_modules` of the current folder and those above it.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import IO, TYPE_CHECKING
from weakref import finalize

import numpy as np

from onefold.errors import LostWorker, MissingExtra
from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.onnx import write
from onefold.runtimes.reference import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.onnx",)
PACKAGES = ("torch", "onnx", "onnxscript")
PRECISIONS = ("fp32", "int8")
REFUSES: Mapping[str, str] = {}
DETAILS: Mapping[str, object] = {"input": "images", "output": "logits", "execution_provider": "wasm"}
READS_GRIDS = True
OBSTACLE = None

_SCRIPT = Path(__file__).with_name("web.mjs")
_PLACE = "ONEFOLD_NODE_MODULES"
_IMAGES_A_CALL = 16  # more would not be quicker, and WebAssembly has 4 GiB at the most
_PATIENCE = 5.0  # seconds for the process to end by itself


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Convert the network and write it with its name, classes and preprocessing inside."""
    write(program, folder / "model.onnx", about=about, precision=precision)


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network in a process of Node.js. Raises MissingExtra where Node.js or the package is not there."""
    return _Web(_node(), _modules(), content["model.onnx"], threads)


class _Web:
    """A process of Node.js that holds the network; calls take turns. `threads` is what the runtime said it uses."""

    def __init__(self, node: str, modules: Path, model: bytes, threads: int) -> None:
        self._said, self._lock = TemporaryFile(), Lock()  # noqa: SIM115  (_end closes it)
        call = [node, str(_SCRIPT), str(modules)]
        self._process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        self._end = finalize(self, _end, self._process, self._said)
        try:
            (self.threads,) = struct.unpack("<I", self._ask(struct.pack("<I", threads), model))
        except BaseException:
            self.close()
            raise

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            return np.concatenate(
                [self._answer(images[i : i + _IMAGES_A_CALL]) for i in range(0, len(images), _IMAGES_A_CALL)]
            )

    def close(self) -> None:
        with self._lock:
            self._end()

    def _answer(self, images: Floats) -> Floats:
        data = self._ask(struct.pack("<4I", *images.shape), images.astype("<f4", copy=False).data)
        return np.frombuffer(data, "<f4").reshape(len(images), -1).astype(np.float32)

    def _ask(self, head: bytes, body: bytes | memoryview) -> bytes:
        """What the process answers to a message. RuntimeError where it cannot, LostWorker where it ended."""
        given, told = self._process.stdin, self._process.stdout
        assert given is not None
        assert told is not None
        try:
            given.write(struct.pack("<I", len(head) + memoryview(body).nbytes) + head)
            given.write(body)
            given.flush()
        except OSError as error:
            raise self._lost() from error
        start = told.read(8)
        if len(start) < 8:
            raise self._lost()
        length, status = struct.unpack("<II", start)
        data = told.read(length - 4)
        if len(data) < length - 4:
            raise self._lost()
        if status:
            said = data.decode(errors="replace")
            raise (
                _missing(f"cannot be used by this Node.js ({said.strip()[:200]})")
                if status == 2
                else RuntimeError(said)
            )
        return data

    def _lost(self) -> LostWorker:
        """The error that says how the process ended, with its last words."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((f": {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "")
        status = self._process.poll()
        return LostWorker(f"the process of Node.js ended with status {status}{last}; load the artifact again")


def _end(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    """Let the process end, by closing what it reads from; one that does not is killed."""
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):
            stream.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    said.close()


def _node() -> str:
    found = shutil.which("node")
    if found is None:
        raise MissingExtra(
            "the runtime web needs Node.js, and no `node` is on the PATH: install it (https://nodejs.org)"
        )
    return found


def _modules() -> Path:
    """The node_modules folder that has the package."""
    named, here = os.environ.get(_PLACE), Path.cwd()
    places = [Path(named).absolute()] if named else [folder / "node_modules" for folder in (here, *here.parents)]
    for place in places:
        if (place / "onnxruntime-web" / "package.json").is_file():
            return place
    raise _missing(f"is not in {named}" if named else f"is not in node_modules of {here} or above")


def _missing(why: str) -> MissingExtra:
    return MissingExtra(
        f"the runtime web needs the npm package onnxruntime-web, which {why}; type: npm install onnxruntime-web "
        f"(or name the node_modules folder that has it in {_PLACE})"
    )
