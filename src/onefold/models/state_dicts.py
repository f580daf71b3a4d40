"""The state dicts in a training's checkpoint, whatever they are called and whatever wrappers were around the network.

Where there are plain and averaged weights the averaged ones are taken, as their trainers evaluate them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from onefold.errors import BadCheckpoint
from onefold.models.restricted_unpickler import RefusedError, StoredTensor, UnpickledObject, as_array, module_tensors

# Words of averaged weights, in a key of a checkpoint or in front of the tensors' names.
_AVERAGED = re.compile(r"(^|[._-])(ema|swa|avg|averaged?|polyak|shadow)([._-]|$)|modelema|emamodel", re.I)
# What wraps parts of a network too: torch.compile, FSDP, checkpointed activations. No layer is called so.
_INNER_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")
_WRAPPERS = ("module", "_orig_mod", "_forward_module", "model", "net", "network", "backbone")
NON_WEIGHT_KEYS = re.compile(r"optim|sched|scaler|rng|loss|criterion|hist|metric|message_hub|loops", re.I)  # of keys
_MAX_CONTAINERS, _MAX_WRAPPERS = 3, 5  # how deep weights lie in a checkpoint's mappings, and in wrappers
_MAX_NAMES, _MAX_WORDS = 4, 16  # under how many keys one mapping is looked at; how many words are tried as wrappers
MAX_TENSORS = 20_000  # of one state dict

KeyFilter = Callable[[Collection[str]], bool]
"""Whether tensors of these names are of a network that the caller knows."""


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """Tensors by name, under `key` in a file, words joined by dots; `outside` are the names of some beside them."""

    key: str
    tensors: Mapping[str, Any]
    averaged: bool = False
    outside: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        """The word that selects it: "averaged" or "plain"."""
        return "averaged" if self.averaged else "plain"

    def unwrap(self, word: str, names: Sequence[str]) -> StateDict:
        """Give what the wrapper `word` holds, the tensors `names`, with the other tensors as they are beside it."""
        held, inner = {name.removeprefix(f"{word}."): self.tensors[name] for name in names}, set(names)
        beside = {name: leaf for name, leaf in self.tensors.items() if name not in inner and name not in held}
        return StateDict(
            key=f"{self.key}.{word}" if self.key else word,
            tensors=held | beside,
            averaged=self.averaged or _AVERAGED.search(word) is not None or "n_averaged" in self.tensors,
            outside=(self.outside & beside.keys()) | frozenset(beside),
        )


def choose_state_dict(
    values: Mapping[Any, Any], fits: KeyFilter | None, select: str, path: Path
) -> tuple[StateDict, list[StateDict]]:
    """Give the state dict to take, and the others that could be; RefusedError where `select` names none."""
    found = list(_state_dicts(values))
    if not found:
        raise BadCheckpoint(f"{path} holds no tensors: save model.state_dict()")
    if max(len(each.tensors) for each in found) > MAX_TENSORS:
        raise RefusedError(f"a state dict in it has more than {MAX_TENSORS} tensors, as no network here has")
    fitting = [inner for each in found for inner in _unwrapped(each, fits)] if fits else []
    if not fitting:
        fitting = [_without_common_wrappers(max(found, key=lambda each: len(each.tensors)))]
    chosen = [each for each in fitting if not select or select == each.kind or f"{each.key}.".startswith(f"{select}.")]
    if not chosen:
        known = ", ".join(dict.fromkeys(word for each in fitting for word in (each.kind, each.key) if word))
        raise RefusedError(f"it holds no weights {select!r}; there are: {known}")
    chosen.sort(key=lambda each: not each.averaged)  # stable: the file's order otherwise
    return chosen[0], [each for each in fitting if each is not chosen[0]]


def _state_dicts(values: Mapping[Any, Any]) -> Iterator[StateDict]:
    """Give every mapping in a checkpoint that holds tensors itself, the checkpoint first."""
    swapped = _swapped(values)
    queue: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), values)]
    visits: Counter[int] = Counter()  # of a mapping: a forged one contains itself, as often as it likes
    for path, mapping in queue:  # grows
        leaves = _without_inner_wrappers({str(key): value for key, value in mapping.items() if is_tensor(value)})
        key = ".".join(path)
        if leaves:
            yield StateDict(key=key, tensors=leaves, averaged=swapped.get(key, bool(_AVERAGED.search(key))))
        if len(path) < _MAX_CONTAINERS:
            for key, value in mapping.items():
                visits[id(value)] += isinstance(value, (Mapping, UnpickledObject))
                if visits[id(value)] <= _MAX_NAMES and not is_tensor(value) and not NON_WEIGHT_KEYS.search(str(key)):
                    inner = as_mapping(value)
                    queue += [] if inner is None else [((*path, str(key)), inner)]


def _without_inner_wrappers(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors by the names that they have without wrappers of parts; as they are where two would have one name."""
    renamed = {_INNER_WRAPPERS.sub("", name): leaf for name, leaf in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors


def _swapped(values: Mapping[Any, Any]) -> dict[str, bool]:
    """Which weights are averaged, by their key, for trainers that put the averaged ones in the plain ones' place."""
    if "current_model_state" in values:  # Lightning's WeightAveraging
        return {"state_dict": True, "current_model_state": False}
    meta = values.get("meta")
    if "ema_state_dict" in values and (
        "message_hub" in values or (isinstance(meta, Mapping) and "mmengine_version" in meta)
    ):
        return {"state_dict": True, "ema_state_dict": False}
    return {}


def _unwrapped(found: StateDict, fits: KeyFilter, depth: int = 0) -> Iterator[StateDict]:
    """Give the networks that `fits` recognizes in a state dict: as it is, or under some words in front of the names."""
    whole = fits(found.tensors)
    words: dict[str, list[str]] = {}
    for name in found.tensors.keys() - found.outside:
        word, dot, _ = name.partition(".")
        if dot and (not whole or word in _WRAPPERS or _AVERAGED.search(word)):
            words.setdefault(word, []).append(name)
    inner = [
        each
        for word, names in sorted(sorted(words.items(), key=lambda item: -len(item[1]))[:_MAX_WORDS])
        if len(names) > 1 and depth < _MAX_WRAPPERS
        for each in _unwrapped(found.unwrap(word, names), fits, depth + 1)
    ]
    taken = {
        name for word, names in words.items() if any(f".{word}." in f".{each.key}." for each in inner) for name in names
    }
    if whole:
        yield replace(found, tensors={name: leaf for name, leaf in found.tensors.items() if name not in taken})
    for each in inner:
        others = taken & each.outside  # those of the other networks in this state dict
        tensors = {name: leaf for name, leaf in each.tensors.items() if name not in others}
        yield replace(each, tensors=tensors, outside=each.outside - others)


def _without_common_wrappers(found: StateDict) -> StateDict:
    """The state dict without the words that wrappers put in front of all its names."""
    names = [name for name, leaf in found.tensors.items() if name != "n_averaged"]
    word = names[0].partition(".")[0] if names else ""
    if (word in _WRAPPERS or _AVERAGED.search(word)) and all(name.startswith(f"{word}.") for name in names):
        return _without_common_wrappers(replace(found.unwrap(word, names), outside=frozenset()))
    return found


def is_tensor(value: object) -> bool:
    """Whether a value of a checkpoint is a tensor, read or not."""
    return isinstance(value, (Tensor, StoredTensor)) or (
        isinstance(value, UnpickledObject)
        and (value.name.startswith("torch._utils._rebuild") or as_array(value) is not None)
    )


def as_mapping(value: object) -> Mapping[Any, Any] | None:
    """Give a value as a mapping: a dict, an object's attributes, or the state dict of a whole network; else None."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, UnpickledObject) or not value.values:
        return None
    return dict(module_tensors(value)) if "_modules" in value.values else value.values
