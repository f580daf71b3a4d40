"""ONNX Runtime Web: the model.onnx that a web page loads, run here by the same WebAssembly in Node.js.

A page passes the file to `onnxruntime-web`; here a process of Node.js does (web.mjs), and images and logits are sent
between the processes as raw numbers. The npm package is searched in the folder that ONEFOLD_NODE_MODULES names, or in
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
from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine
from onefold.runtimes.onnx import write_onnx
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.onnx",)
PACKAGES = ("torch", "onnx", "onnxscript")
PRECISIONS = ("fp32", "int8")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {}
MANIFEST_DETAILS: Mapping[str, object] = {"input": "images", "output": "logits", "execution_provider": "wasm"}
ACCEPTS_QDQ = True
unavailable_reason = None

_SCRIPT = Path(__file__).with_name("web.mjs")
_NODE_MODULES = "ONEFOLD_NODE_MODULES"
_MAX_BATCH = 16  # larger batches are not faster, and WebAssembly has at most 4 GiB
_TIMEOUT_S = 5.0  # for the process to end by itself


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network and write it with its name, classes and preprocessing inside."""
    write_onnx(program, folder / "model.onnx", info=info, precision=precision)


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Start a process of Node.js with the network. Raises MissingExtra where Node.js or the package is missing."""
    node = shutil.which("node")
    if node is None:
        raise MissingExtra(
            "the runtime web needs Node.js, and no `node` is on the PATH: install it (https://nodejs.org)"
        )
    return _Web(node, _node_modules(), content["model.onnx"], threads)


class _Web:
    """A process of Node.js with the network; calls are serialized. `threads` is what the runtime reported."""

    def __init__(self, node: str, modules: Path, model: bytes, threads: int) -> None:
        self._stderr, self._lock = TemporaryFile(), Lock()  # noqa: SIM115  (_stop closes it)
        call = [node, str(_SCRIPT), str(modules)]
        self._process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr)
        self._stop = finalize(self, _stop, self._process, self._stderr)
        try:
            (self.threads,) = struct.unpack("<I", self._request(struct.pack("<I", threads), model))
        except BaseException:
            self.close()
            raise

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            return np.concatenate([self._answer(images[i : i + _MAX_BATCH]) for i in range(0, len(images), _MAX_BATCH)])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _answer(self, images: Floats) -> Floats:
        data = self._request(struct.pack("<4I", *images.shape), images.astype("<f4", copy=False).data)
        return np.frombuffer(data, "<f4").reshape(len(images), -1).astype(np.float32)

    def _request(self, head: bytes, body: bytes | memoryview) -> bytes:
        """Send a message, return the reply. Raises RuntimeError where the process fails, LostWorker where it ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(struct.pack("<I", len(head) + memoryview(body).nbytes) + head)
            stdin.write(body)
            stdin.flush()
        except OSError as error:
            raise self._lost() from error
        header = stdout.read(8)
        if len(header) < 8:
            raise self._lost()
        length, status = struct.unpack("<II", header)
        data = stdout.read(length - 4)
        if len(data) < length - 4:
            raise self._lost()
        if status:
            message = data.decode(errors="replace")
            if status == 2:
                raise _missing(f"cannot be used by this Node.js ({message.strip()[:200]})")
            raise RuntimeError(message)
        return data

    def _lost(self) -> LostWorker:
        """Make the error of a process that ended, with its status and the last line of its stderr."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_TIMEOUT_S)
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        last = next((f": {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "")
        status = self._process.poll()
        return LostWorker(f"the process of Node.js ended with status {status}{last}; load the artifact again")


def _stop(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    """Close the pipes, at which the process ends by itself; kill it where it does not."""
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):
            stream.close()
    try:
        process.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stderr.close()


def _node_modules() -> Path:
    """Find the node_modules folder that has the package. Raises MissingExtra."""
    named, here = os.environ.get(_NODE_MODULES), Path.cwd()
    candidates = [Path(named).absolute()] if named else [folder / "node_modules" for folder in (here, *here.parents)]
    for candidate in candidates:
        if (candidate / "onnxruntime-web" / "package.json").is_file():
            return candidate
    raise _missing(f"is not in {named}" if named else f"is not in node_modules of {here} or above")


def _missing(why: str) -> MissingExtra:
    return MissingExtra(
        f"the runtime web needs the npm package onnxruntime-web, which {why}; type: npm install onnxruntime-web "
        f"(or name the node_modules folder that has it in {_NODE_MODULES})"
    )
