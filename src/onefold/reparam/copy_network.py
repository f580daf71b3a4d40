"""Copies of networks that call their own parts, also where a forward was replaced by a function that closes over some.

`deepcopy` leaves functions as they are, with the modules in their cells and defaults: a copy whose forward is such a
function would run the layers of the network that it is a copy of, and no proof on the copy would be of the copy.
"""

from __future__ import annotations

import copy
import dis
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
_MOST_NESTED = 3  # lists and mappings, in which functions are looked for


def copy_network(model: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """A deep copy; also of a network that keeps a tensor computed in its last forward, as old `weight_norm` does.

    Functions that modules keep, such as a forward in place of their class's, call the parts of the copy: `deepcopy`
    leaves functions as they are, with the modules that they close over. Raises TypeError, with the name of what hinders
    it, where a part of the network cannot be copied, or such a function names the network as a global.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        made: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:  # an object may raise anything where it is copied
        raise TypeError(_why_no_copy(model, error)) from error
    for path, module in model.named_modules():
        twin = memo.get(id(module))
        for key in vars(module) if isinstance(twin, type(module)) and twin is not module else ():
            if key not in ("_parameters", "_buffers", "_modules", *HOOKS, *HOOK_FLAGS) and key in vars(twin):
                try:
                    vars(twin)[key] = _of_copy(vars(twin)[key], memo)
                except _NamesNetworkError as error:
                    of = f"layer {path!r}" if path else "the network"
                    raise TypeError(
                        f"the network cannot be copied, and fusing changes a copy: its attribute {key!r} of {of} is a "
                        f"function that calls the network by the name of a global, {error}, and so would its copy: "
                        "make it a method of a class, or have it close over the network within a function"
                    ) from error
    return made


class _NamesNetworkError(Exception):
    """A function has a part of the network as a global; the text is its name."""


def _of_copy(value: Any, memo: dict[int, object], depth: int = 0) -> Any:
    """What stands in a copied network for a value in it: functions over parts of the original are over the copy's."""
    if isinstance(value, (nn.Module, Tensor)):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        owner = _of_copy(value.__self__, memo, depth + 1)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, FunctionType):
        return _function_of_copy(value, memo)
    if depth > _MOST_NESTED or type(value) not in (list, tuple, dict, partial):
        return value
    if type(value) is partial:
        parts = [_of_copy(part, memo, depth + 1) for part in (value.func, value.args, value.keywords)]
        is_same = parts[0] is value.func and parts[1] is value.args and parts[2] is value.keywords
        return value if is_same else partial(parts[0], *parts[1], **parts[2])
    old = list(value.values()) if type(value) is dict else list(value)
    new = [_of_copy(each, memo, depth + 1) for each in old]
    if all(a is b for a, b in zip(old, new, strict=True)):
        return value
    return dict(zip(value, new, strict=True)) if type(value) is dict else type(value)(new)


def _function_of_copy(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """The function itself where it reaches no part of the network, else another with the copy's parts."""
    known = memo.get(id(function))
    if isinstance(known, FunctionType):
        return known
    for name in _names_of_globals(function.__code__):
        if isinstance(function.__globals__.get(name), nn.Module) and id(function.__globals__[name]) in memo:
            raise _NamesNetworkError(repr(name))
    cells = function.__closure__ or ()
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, None, tuple(CellType() for _ in cells)
    )
    memo[id(function)] = made  # a function may close over itself
    is_same = True
    for cell, new in zip(cells, made.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            new.cell_contents = _of_copy(cell.cell_contents, memo)
            is_same = is_same and (new.cell_contents is cell.cell_contents or cell.cell_contents is function)
    defaults, by_name = function.__defaults__, function.__kwdefaults__
    made.__defaults__, made.__kwdefaults__ = _of_copy(defaults, memo), _of_copy(by_name, memo)
    if is_same and made.__defaults__ is defaults and made.__kwdefaults__ is by_name:
        memo[id(function)] = function
        return function
    made.__dict__.update(function.__dict__)
    made.__qualname__, made.__doc__, made.__module__ = function.__qualname__, function.__doc__, function.__module__
    return made


def _names_of_globals(code: CodeType) -> Iterator[str]:
    # co_names has the names of attributes too
    yield from (each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_of_globals(inner)


def _why_no_copy(model: nn.Module, error: Exception) -> str:
    """Name the attributes, in whatever part of the network, that cannot be copied."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            inner = value.items() if name in ("_parameters", "_buffers", *HOOKS) else [(name, value)]
            for key, each in inner if name != "_modules" else ():
                try:
                    copy.deepcopy(each)
                except Exception:
                    of = f"layer {path!r}" if path else "the network"
                    found.append(f"{key!r} of {of}, a {type(each).__module__}.{type(each).__qualname__}")
    what = "; ".join(found[:3]) or f"a {type(model).__qualname__}"
    return (
        f"the network cannot be copied, and fusing changes a copy: its attribute {what} ({error}). Set it to None "
        "while it is fused, or give its class a __deepcopy__"
    )
