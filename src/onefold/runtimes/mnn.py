"""MNN on the CPU: one model.mnn.

With the precision fp16 the weights are stored in 16 bits, and the runtime computes in 16 bits where the processor can
(ARMv8.2); on x86 it computes in 32. There is no int8: the converter swaps batch and channels of what is between
QuantizeLinear and DequantizeLinear (3.6.1), so that the logits are wrong, or the process aborts.

MNN's Python wrapper of the converter, `MNN.tools`, reports each use to its makers, and installs the package that it
needs for that by itself. It is never imported here: the converter proper, `_tools`, runs in a process of its own, which
it may also abort.
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

from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine, import_vendor_package, suppress_native_output
from onefold.runtimes.onnx import convert_to_onnx
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.mnn",)
PACKAGES = ("torch", "onnx", "onnxscript", "mnn")
PRECISIONS = ("fp32", "fp16")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {"int8": "its converter misreads asymmetric QDQ models"}
MANIFEST_DETAILS: Mapping[str, object] = {"input": "images", "output": "logits"}
ACCEPTS_QDQ = True
unavailable_reason = None

_CONVERT = "import sys, _tools; sys.exit(0 if _tools.mnnconvert(sys.argv) else 1)"
_WEIGHTS: dict[str, list[str]] = {"fp32": [], "fp16": ["--fp16"]}
_MODES = {"fp32": "high", "fp16": "low"}
_process_lock = Lock()
"""MNN's variables belong to the process, not to a network, so calls of all sessions are serialized."""


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network by way of ONNX, and write it."""
    _mnn()
    model = convert_to_onnx(program, precision=precision)
    if precision == "fp16":
        _round_to_fp16_(model.graph)
    with TemporaryDirectory() as temporary:
        (Path(temporary) / "model.onnx").write_bytes(model.SerializeToString())
        call = [sys.executable, "-c", _CONVERT, "-f", "ONNX", "--modelFile", "model.onnx", "--MNNModel", FILES[0]]
        call += ["--bizCode", "onefold", *_WEIGHTS[precision]]
        process = subprocess.run(call, cwd=temporary, capture_output=True, text=True, errors="replace", check=False)
        converted = Path(temporary) / FILES[0]
        if process.returncode or not converted.is_file():
            raise RuntimeError(f"its converter ended with status {process.returncode}: {process.stderr.strip()[-200:]}")
        (folder / FILES[0]).write_bytes(converted.read_bytes())


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Load the network; MNN arranges its weights for this CPU."""
    mnn = _mnn()
    config = {"backend": "CPU", "numThread": threads, "precision": _MODES[precision]}
    with TemporaryDirectory() as temporary, _process_lock, suppress_native_output():
        path = Path(temporary) / FILES[0]
        path.write_bytes(content[FILES[0]])
        manager = mnn.nn.create_runtime_manager((config,))
        module = mnn.nn.load_module_from_file(
            str(path), ["images"], ["logits"], runtime_manager=manager, shape_mutable=True
        )
    return _Mnn(mnn.expr, module, threads)


class _Mnn:
    """An MNN network. MNN does not report its number of threads: `threads` is what was requested."""

    def __init__(self, expr: ModuleType, module: Any, threads: int) -> None:
        self._expr, self._module, self.threads = expr, module, threads

    def __call__(self, images: Floats) -> Floats:
        expr = self._expr
        with _process_lock:
            answer = self._module.forward([expr.const(images, list(images.shape), expr.NCHW, expr.float)])
            if len(answer) != 1:
                raise RuntimeError("MNN returned no logits for these images")
            return np.array(expr.convert(answer[0], expr.NCHW).read())

    def close(self) -> None:
        with _process_lock:
            del self._module


def _round_to_fp16_(graph: Any) -> None:
    """Round the weights to the nearest fp16 values: MNN's converter would truncate them."""
    arrays = import_vendor_package("onnx.numpy_helper", extra="mnn")
    for tensor in graph.initializer:
        value = arrays.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(arrays.from_array(value.astype(np.float16).astype(np.float32), tensor.name))


def _mnn() -> ModuleType:
    """Import the package, which prints a banner."""
    with suppress_native_output():
        return import_vendor_package("MNN", extra="mnn")
