"""The runtimes by name: for whoever lists them without importing anything."""

from __future__ import annotations

RUNTIMES: dict[str, str] = {
    "eager": "onefold.runtimes.eager",
    "onnx": "onefold.runtimes.onnx",
    "openvino": "onefold.runtimes.openvino",
    "executorch": "onefold.runtimes.executorch",
    "litert": "onefold.runtimes.litert",
    "ncnn": "onefold.runtimes.ncnn",
    "coreml": "onefold.runtimes.coreml",
    "mnn": "onefold.runtimes.mnn",
    "tensorrt": "onefold.runtimes.tensorrt",
    "web": "onefold.runtimes.web",
}
