"""Export a trained model to a runtime, open what was exported, load it.

    info = ModelInfo(model="mobileone_s0", fused=True)
    artifact = export(model, (3, 224, 224), "artifacts/onnx-fp32", runtime="onnx", info=info)
    with load("artifacts/onnx-fp32", threads=2) as session:
        logits = session(images)

Every artifact holds a README.md with code that loads it without onefold (docs/artifacts.md). Names are imported when
they are first used: listing RUNTIMES imports neither numpy nor torch, and no runtime's package is imported before it
is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

RUNTIMES: dict[str, str] = {
    name: f"onefold.runtimes.{name}"
    for name in ("onnx", "openvino", "executorch", "litert", "ncnn", "coreml", "mnn", "tensorrt", "web")
}
"""The module of each runtime by the runtime's name."""

if TYPE_CHECKING:
    from onefold.runtimes.artifact import Artifact as Artifact
    from onefold.runtimes.artifact import ModelInfo as ModelInfo
    from onefold.runtimes.artifact import Parity as Parity
    from onefold.runtimes.base import Runtime as Runtime
    from onefold.runtimes.base import Session as Session
    from onefold.runtimes.base import import_runtime as import_runtime
    from onefold.runtimes.exporter import TOLERANCES as TOLERANCES
    from onefold.runtimes.exporter import UnfusedWarning as UnfusedWarning
    from onefold.runtimes.exporter import export as export
    from onefold.runtimes.exporter import load as load
    from onefold.runtimes.exporter import open_artifact as open_artifact
    from onefold.runtimes.layer_times import LayerTime as LayerTime
    from onefold.runtimes.layer_times import Profile as Profile

_MODULE_OF = {
    name: module
    for module, names in {
        "artifact": ("Artifact", "ModelInfo", "Parity"),
        "base": ("Runtime", "Session", "import_runtime"),
        "layer_times": ("LayerTime", "Profile"),
        "exporter": ("TOLERANCES", "UnfusedWarning", "export", "load", "open_artifact"),
    }.items()
    for name in names
}

__all__ = [
    "RUNTIMES",
    "TOLERANCES",
    "Artifact",
    "LayerTime",
    "ModelInfo",
    "Parity",
    "Profile",
    "Runtime",
    "Session",
    "UnfusedWarning",
    "export",
    "import_runtime",
    "load",
    "open_artifact",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'onefold.runtimes' has no attribute {name!r}")
    return getattr(import_module(f"onefold.runtimes.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
