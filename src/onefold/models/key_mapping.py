"""Layout: how one project names the tensors of one family of networks, and in which order it keeps their axes.

A family's file holds the layouts of the projects that release weights of it, in its `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class KeyLayout:
    """One project's names for one family's tensors."""

    title: str
    """Whose it is, for error messages."""
    family: str
    """How our names of the family start; empty where the file does not show it."""
    signature: str
    """A regular expression for a whole key that this layout has and no other."""
    rename: Callable[[Collection[str]], dict[str, str]]
    """A function from keys to {key: our key}, without those that it does not know."""
    ignored: str = r"(?!)"
    """A regular expression for the start of keys that a network does not need; by default it matches nothing."""
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """For the last word of a key, the order in which the axes become torch's (O, I/G, H, W)."""
    variant: str | None = ""
    """The suffix of the model names with the padding, activation and epsilon of these weights; None if it varies."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Values that a config.json beside the weights must have for these keys, where it has them."""
    background: bool = False
    """Whether there is a background class before ImageNet's 1000 (TensorFlow's class 0)."""

    def matches(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys is of this layout."""
        signature = re.compile(self.signature)
        return any(signature.fullmatch(key) for key in keys)

    def ignores(self, key: str) -> bool:
        """Whether a network does not need the tensor of this key."""
        return re.match(self.ignored, key) is not None

    def permutation(self, key: str) -> tuple[int, ...] | None:
        """The order in which the axes of this tensor become torch's; None where they are."""
        return self.axes.get(re.split(r"[/.]", key)[-1].removesuffix(":0"))


def module_names(keys: Collection[str]) -> set[str]:
    """The names of the modules that hold these tensors: the keys without their last words."""
    return {key.rpartition(".")[0] for key in keys}


def rename_by_module(keys: Collection[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Rename tensors by the module that holds them: {key: our key} where the module is in the table."""
    parts = {key: key.rpartition(".") for key in keys}
    return {key: f"{modules[module]}.{leaf}" for key, (module, _, leaf) in parts.items() if module in modules}
