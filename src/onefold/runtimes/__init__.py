"""Where a trained network runs: export it, open what was exported, load it.

    artifact = export(model, (3, 224, 224), "artifacts/onnx-fp32", runtime="onnx", about=About(model="...", fused=True))
    with load("artifacts/onnx-fp32", threads=2) as session:
        logits = session(images)

What `export` leaves explains itself: a README.md with code that loads it without onefold (docs/artifacts.md).
No runtime's own package, and not torch either, is imported before it is used; to list the runtimes imports nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onefold.runtimes.names import RUNTIMES as RUNTIMES

if TYPE_CHECKING:
    from onefold.runtimes.artifact import About as About
    from onefold.runtimes.artifact import Artifact as Artifact
    from onefold.runtimes.artifact import Parity as Parity
    from onefold.runtimes.base import Runtime as Runtime
    from onefold.runtimes.base import Session as Session
    from onefold.runtimes.base import find_runtime as find_runtime
    from onefold.runtimes.exporter import TOLERANCES as TOLERANCES
    from onefold.runtimes.exporter import UnfusedWarning as UnfusedWarning
    from onefold.runtimes.exporter import export as export
    from onefold.runtimes.exporter import load as load
    from onefold.runtimes.exporter import open_artifact as open_artifact
    from onefold.runtimes.profile import Layer as Layer
    from onefold.runtimes.profile import Profile as Profile

_HOMES = {
    "onefold.runtimes.artifact": ("About", "Artifact", "Parity"),
    "onefold.runtimes.base": ("Runtime", "Session", "find_runtime"),
    "onefold.runtimes.profile": ("Layer", "Profile"),
    "onefold.runtimes.exporter": ("TOLERANCES", "UnfusedWarning", "export", "load", "open_artifact"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "RUNTIMES",
    "TOLERANCES",
    "About",
    "Artifact",
    "Layer",
    "Parity",
    "Profile",
    "Runtime",
    "Session",
    "UnfusedWarning",
    "export",
    "find_runtime",
    "load",
    "open_artifact",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onefold.runtimes' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
