"""onefold: mobile vision backbones, trained wide and deployed thin.

    model = onefold.create_model("mobileone_s0", num_classes=10)
    fused = onefold.fuse(model.eval())
    onefold.drift(model, fused, images)

Names are loaded when they are used, so that `import onefold` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version_of
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onefold.errors import OnefoldError as OnefoldError
    from onefold.models import create_model as create_model
    from onefold.models import list_models as list_models
    from onefold.models.hub import Card as Card
    from onefold.models.hub import from_pretrained as from_pretrained
    from onefold.models.hub import load_model as load_model
    from onefold.models.hub import push_to_hub as push_to_hub
    from onefold.models.hub import save_pretrained as save_pretrained
    from onefold.models.hub import save_weights as save_weights
    from onefold.reparam import accelerate as accelerate
    from onefold.reparam import drift as drift
    from onefold.reparam import fuse as fuse
    from onefold.reparam import unfused_norms as unfused_norms
    from onefold.runtimes import export as export
    from onefold.runtimes import load as load

_HOMES = {
    "onefold.errors": ("OnefoldError",),
    "onefold.models": ("create_model", "list_models"),
    "onefold.models.hub": (
        "Card",
        "from_pretrained",
        "load_model",
        "push_to_hub",
        "save_pretrained",
        "save_weights",
    ),
    "onefold.reparam": ("accelerate", "drift", "fuse", "unfused_norms"),
    "onefold.runtimes": ("export", "load"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Card",
    "OnefoldError",
    "accelerate",
    "create_model",
    "drift",
    "export",
    "from_pretrained",
    "fuse",
    "list_models",
    "load",
    "load_model",
    "push_to_hub",
    "save_pretrained",
    "save_weights",
    "unfused_norms",
]

try:
    __version__ = _version_of("onefold")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onefold' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
