"""The networks: `create_model` makes one by its name in the catalogue, from random initialization or with weights.

What needs torch is imported when it is first used: a file of weights that is not there is missed without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onefold.models.catalogue import CATALOGUE as CATALOGUE
    from onefold.models.catalogue import list_models as list_models
    from onefold.models.catalogue import resolve_name as resolve_name
    from onefold.models.flops import ModelCost as ModelCost
    from onefold.models.flops import count_flops as count_flops
    from onefold.models.layers import Classifier as Classifier
    from onefold.models.layers import FeatureNet as FeatureNet
    from onefold.models.load_model import create_model as create_model

_HOMES = {
    "catalogue": ("CATALOGUE", "list_models", "resolve_name"),
    "flops": ("ModelCost", "count_flops"),
    "layers": ("Classifier", "FeatureNet"),
    "load_model": ("create_model",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # for `import *`, which asks no __getattr__


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onefold.models' has no attribute {name!r}")
    return getattr(import_module(f"onefold.models.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
