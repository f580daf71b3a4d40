"""onefold: mobile vision backbones, trained wide and deployed thin.

    run = onefold.train("photos/", model="mobileone_s0", recipe="photos:finetune")
    run.predict("cat.jpg")
    int8 = run.fuse().export("onnx", precision="int8", data="photos/")
    onefold.report(".")

Each verb of the command line is a function of the same name, options and defaults. Names are loaded when they are
used, so that `import onefold` costs nothing. Of `train`, `bench`, `quantize` and `report` the package of that name is
the function, too: `onefold.train(...)` beside `from onefold.train import Plan`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version_of
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onefold.commands.advise import advise as advise
    from onefold.commands.bench import bench as bench
    from onefold.commands.deploy import deploy as deploy
    from onefold.commands.evaluate import evaluate as evaluate
    from onefold.commands.export import export as export
    from onefold.commands.fuse import fuse as fuse
    from onefold.commands.load import load_model as load_model
    from onefold.commands.predict import predict as predict
    from onefold.commands.predictor import load as load
    from onefold.commands.quantize import quantize as quantize
    from onefold.commands.report import report as report
    from onefold.commands.run import Run as Run
    from onefold.commands.study import study as study
    from onefold.commands.train import train as train
    from onefold.errors import OnefoldError as OnefoldError
    from onefold.models import create_model as create_model
    from onefold.models import list_models as list_models
    from onefold.models.load_model import Card as Card
    from onefold.models.load_model import from_pretrained as from_pretrained
    from onefold.models.load_model import push_to_hub as push_to_hub
    from onefold.models.load_model import save_pretrained as save_pretrained
    from onefold.models.load_model import save_weights as save_weights
    from onefold.reparam import accelerate as accelerate
    from onefold.reparam import drift as drift
    from onefold.reparam import unfused_norms as unfused_norms

_HOMES = {
    "onefold.commands.advise": ("advise",),
    "onefold.commands.bench": ("bench",),
    "onefold.commands.deploy": ("deploy",),
    "onefold.commands.evaluate": ("evaluate",),
    "onefold.commands.export": ("export",),
    "onefold.commands.fuse": ("fuse",),
    "onefold.commands.load": ("load_model",),
    "onefold.commands.predict": ("predict",),
    "onefold.commands.predictor": ("load",),
    "onefold.commands.quantize": ("quantize",),
    "onefold.commands.report": ("report",),
    "onefold.commands.run": ("Run",),
    "onefold.commands.study": ("study",),
    "onefold.commands.train": ("train",),
    "onefold.errors": ("OnefoldError",),
    "onefold.models": ("create_model", "list_models"),
    "onefold.models.load_model": (
        "Card",
        "from_pretrained",
        "push_to_hub",
        "save_pretrained",
        "save_weights",
    ),
    "onefold.reparam": ("accelerate", "drift", "unfused_norms"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Card",
    "OnefoldError",
    "Run",
    "accelerate",
    "advise",
    "bench",
    "create_model",
    "deploy",
    "drift",
    "evaluate",
    "export",
    "from_pretrained",
    "fuse",
    "list_models",
    "load",
    "load_model",
    "predict",
    "push_to_hub",
    "quantize",
    "report",
    "save_pretrained",
    "save_weights",
    "study",
    "train",
    "unfused_norms",
]

try:
    __version__ = _version_of("onefold")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"


class _VerbPackage(ModuleType):
    """A package that is called as the verb of its name: `onefold.train(...)`, and `from onefold.train import Plan`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _verb(self).__call__(*args, **kwargs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        """The verb's with its parameters in front, which help() does not show of a package."""
        verb = _verb(self)
        name, parameters = verb.__name__, [f"    {each}," for each in self.__signature__.parameters.values()]
        return "\n".join(
            [f"onefold.{name}: a verb, and a package.", "", f"{name}(", *parameters, ")", "", verb.__doc__]
        )

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(_verb(self))


def _verb(package: ModuleType) -> Any:
    name = package.__name__.rpartition(".")[2]
    return getattr(import_module(_HOME_OF[name]), name)


class _Root(ModuleType):
    """This package: Python sets each package in it as an attribute when that is imported, and verbs become callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOME_OF:
            value.__class__ = _VerbPackage
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onefold' has no attribute {name!r}")
    if name in _PACKAGES:
        return import_module(f"onefold.{name}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


_PACKAGES = ("bench", "quantize", "report", "train")
sys.modules[__name__].__class__ = _Root
