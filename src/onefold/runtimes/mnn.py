"""MNN on the CPU: one model.mnn.

With the precision fp16 the weights are stored in 16 bits, and the runtime computes in 16 bits where the processor does
(ARMv8.2); on x86 it computes in 32. There is no int8: its converter swaps the batch with the channels of what lies
between QuantizeLinear and DequantizeLinear (3.6.1), so that it answers wrongly, or ends its process.

Its Python wrapper of the converter, `MNN.tools`, reports each use to its makers, and installs the package that it needs
for that by itself. It is never imported here: the converter proper, `_tools`, is run in a process of its own, which it
is also free to end.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.onnx import convert
from onefold.runtimes.reference import Floats
from onefold.runtimes.vendor import mute, require

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.mnn",)
PACKAGES = ("torch", "onnx", "onnxscript", "mnn")
PRECISIONS = ("fp32", "fp16")
REFUSES: Mapping[str, str] = {"int8": "its converter does not read our grids"}
DETAILS: Mapping[str, object] = {"input": "images", "output": "logits"}
READS_GRIDS = True
OBSTACLE = None

_CONVERT = "import sys, _tools; sys.exit(0 if _tools.mnnconvert(sys.argv) else 1)"
_WEIGHTS: dict[str, list[str]] = {"fp32": [], "fp16": ["--fp16"]}
_MODES = {"fp32": "high", "fp16": "low"}
_turn = Lock()
"""Its variables belong to the process, not to a network: all sessions take turns."""


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Convert the network by way of ONNX, and write it."""
    _mnn()
    model = convert(program, precision=precision)
    if precision == "fp16":
        _round_(model.graph)
    with TemporaryDirectory() as place:
        (Path(place) / "model.onnx").write_bytes(model.SerializeToString())
        call = [sys.executable, "-c", _CONVERT, "-f", "ONNX", "--modelFile", "model.onnx", "--MNNModel", FILES[0]]
        call += ["--bizCode", "onefold", *_WEIGHTS[precision]]
        done = subprocess.run(call, cwd=place, capture_output=True, text=True, errors="replace", check=False)
        made = Path(place) / FILES[0]
        if done.returncode or not made.is_file():
            raise RuntimeError(f"its converter ended with status {done.returncode}: {done.stderr.strip()[-200:]}")
        (folder / FILES[0]).write_bytes(made.read_bytes())


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network, its weights laid out for this CPU."""
    mnn = _mnn()
    how = {"backend": "CPU", "numThread": threads, "precision": _MODES[precision]}
    with TemporaryDirectory() as place, _turn, mute():
        path = Path(place) / FILES[0]
        path.write_bytes(content[FILES[0]])
        manager = mnn.nn.create_runtime_manager((how,))
        module = mnn.nn.load_module_from_file(
            str(path), ["images"], ["logits"], runtime_manager=manager, shape_mutable=True
        )
    return _Mnn(mnn.expr, module, threads)


class _Mnn:
    """A network of MNN. It does not tell its number of threads: `threads` is what it was given."""

    def __init__(self, expr: ModuleType, module: Any, threads: int) -> None:
        self._expr, self._module, self.threads = expr, module, threads

    def __call__(self, images: Floats) -> Floats:
        expr = self._expr
        with _turn:
            answer = self._module.forward([expr.const(images, list(images.shape), expr.NCHW, expr.float)])
            if len(answer) != 1:
                raise RuntimeError("MNN gives no answer to these images")
            return np.array(expr.convert(answer[0], expr.NCHW).read())

    def close(self) -> None:
        with _turn:
            del self._module


def _round_(graph: Any) -> None:
    """Round the weights to the nearest numbers of 16 bits: its converter would cut their digits off."""
    arrays = require("onnx.numpy_helper", extra="mnn")
    for tensor in graph.initializer:
        value = arrays.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(arrays.from_array(value.astype(np.float16).astype(np.float32), tensor.name))


def _mnn() -> ModuleType:
    """The package, which greets when it is imported."""
    with mute():
        return require("MNN", extra="mnn")
