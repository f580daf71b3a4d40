"""Layout: how one project names the tensors of one family of networks, and in which order it keeps their axes.

A family's file holds the layouts of the projects that release weights of it, in its `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

NEVER = r"(?!)"  # matches nothing


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One project's names for one family's tensors."""

    title: str
    """Whose it is, for messages."""
    family: str
    """What our names of the family begin with; empty where the file does not tell."""
    mark: str
    """A regular expression for a whole key that this layout has and no other."""
    rename: Callable[[Collection[str]], dict[str, str]]
    """Keys -> {key: ours}, without those that it cannot place."""
    idle: str = NEVER
    """A regular expression for the start of keys that carry nothing a network needs."""
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Last word of a key -> the order in which its axes become torch's (O, I/G, H, W)."""
    variant: str | None = ""
    """The suffix that a name needs for padding, activation and epsilon to be these weights'; None: it cannot tell."""
    config: Mapping[str, object] = field(default_factory=dict)
    """What a config.json beside the weights has to say, where it speaks of it."""
    background: bool = False
    """Whether a row before ImageNet's 1000 classes stands for none of them (TensorFlow's class 0)."""

    def is_of(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys is of this layout."""
        mark = re.compile(self.mark)
        return any(mark.fullmatch(key) for key in keys)

    def is_idle(self, key: str) -> bool:
        """Whether a key carries nothing that a network needs."""
        return re.match(self.idle, key) is not None

    def order(self, key: str) -> tuple[int, ...] | None:
        """The order in which the axes of this tensor become torch's, or None where they are."""
        return self.axes.get(re.split(r"[/.]", key)[-1].removesuffix(":0"))


def modules_of(keys: Collection[str]) -> set[str]:
    """The names of the modules that hold these tensors: each key without its last word."""
    return {key.rpartition(".")[0] for key in keys}


def by_module(keys: Collection[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Rename tensors by the module that holds them: {key: ours} for every key whose module is in the table."""
    parts = {key: key.rpartition(".") for key in keys}
    return {key: f"{modules[module]}.{leaf}" for key, (module, _, leaf) in parts.items() if module in modules}
