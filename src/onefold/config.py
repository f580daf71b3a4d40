"""Frozen values that check their own fields and go to plain dicts and back without loss.

A field says what it may be in its annotation, `Annotated[float, Range(0.0, 1.0)]`; `check_fields` holds every field to
it, `to_dict` writes what JSON can hold, `from_dict` reads it back and names what it does not know.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from onefold.errors import BadArgument

_T = TypeVar("_T")


@dataclass(frozen=True)
class Range:
    """The range of a number, both ends allowed."""

    low: float
    high: float


# ------------------------------------------------------------------------------------- durations


@dataclass(frozen=True)
class Epochs:
    """A duration in passes over the data; a part of one is allowed. Written `5 epochs`."""

    count: Annotated[float, Range(0, 1_000_000)]

    def __post_init__(self) -> None:
        check_fields(self, "epochs")

    def __str__(self) -> str:
        return f"{self.count!r} epochs"

    def steps(self, steps_per_epoch: int) -> int:
        """The same duration in optimizer steps."""
        return round(self.count * steps_per_epoch)


@dataclass(frozen=True)
class Steps:
    """A duration in optimizer steps. Written `100 steps`."""

    count: Annotated[int, Range(0, 10**12)]

    def __post_init__(self) -> None:
        check_fields(self, "steps")

    def __str__(self) -> str:
        return f"{self.count!r} steps"

    def steps(self, steps_per_epoch: int) -> int:
        """The same duration in optimizer steps."""
        return self.count


Duration = Epochs | Steps


def parse_duration(text: str, where: str) -> Duration:
    """Read `5 epochs` or `100 steps`; raises BadArgument naming the field `where`."""
    number, _, unit = text.strip().partition(" ")
    try:
        if unit.strip() in ("epoch", "epochs"):
            return Epochs(int(number) if number.isdecimal() else float(number))
        if unit.strip() in ("step", "steps"):
            return Steps(int(number))
    except ValueError as error:
        raise BadArgument(f"{where} must be like '5 epochs' or '100 steps', not {text!r}") from error
    raise BadArgument(f"{where} must be like '5 epochs' or '100 steps', not {text!r}")


# ---------------------------------------------------------------------------------------- checks


def check_fields(value: Any, where: str) -> None:
    """Hold every field of the dataclass `value` to its annotation.

    Raises BadArgument naming the field (under `where`), what is allowed and what came.
    """
    hints = _hints(type(value))
    for field in fields(value):
        given = getattr(value, field.name)
        if not _fits(hints[field.name], given):
            raise BadArgument(f"{where}.{field.name} must be {_allowed(hints[field.name])}, not {given!r}")


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass; they are strings, and read once."""
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls, include_extras=True)
    return _HINTS[cls]


def _fits(hint: Any, given: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(args[0], given) and all(a.low <= given <= a.high for a in args[1:] if isinstance(a, Range))
    if origin is Literal:
        return isinstance(given, str) and given in args
    if origin in (Union, types.UnionType):
        return any(_fits(option, given) for option in args)
    if origin is tuple:
        options = args[:1] * len(given) if isinstance(given, tuple) and args[-1] is Ellipsis else args
        return isinstance(given, tuple) and len(given) == len(options) and all(map(_fits, options, given))
    if hint in (int, float):
        return isinstance(given, int if hint is int else (int, float)) and not isinstance(given, bool)
    return isinstance(given, origin or hint)  # origin: of Mapping[str, Any] only that it is one


def _allowed(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [f" from {a.low:g} to {a.high:g}" for a in args[1:] if isinstance(a, Range)]
        return _allowed(args[0]) + "".join(ranges)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_allowed, args))
    if origin is tuple:
        many = args[-1] is Ellipsis
        return "any number of " + _allowed(args[0]) if many else f"({', '.join(map(_allowed, args))})"
    plain = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))


# ----------------------------------------------------------------------------- to dicts and back


def to_dict(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON can hold them; a value inside carries its class's name as `kind`."""
    return {field.name: _encode(getattr(value, field.name)) for field in fields(value)}


def from_dict(cls: type[_T], given: Mapping[str, Any], where: str) -> _T:
    """The inverse of `to_dict`.

    Raises BadArgument for a key that `cls` does not have (with the nearest that it has), for one that is missing,
    and for a value out of its range.
    """
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise BadArgument(f"{where} has no field {key!r}{_nearest(str(key), known)}")
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in given]
    if needed:
        raise BadArgument(f"{where} needs {', '.join(map(repr, needed))}: give it as {where}.{needed[0]}")
    hints = _hints(cls)
    return cls(**{key: _decode(hints[key], item, f"{where}.{key}") for key, item in given.items()})


def _encode(value: Any) -> Any:
    if isinstance(value, (Epochs, Steps)):
        return str(value)
    if is_dataclass(value):
        return {"kind": type(value).__name__, **to_dict(value)}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def _decode(hint: Any, given: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(given, str) and (Epochs in options or Steps in options):
        return parse_duration(given, where)
    if isinstance(given, list):
        items = get_args(next((option for option in options if get_origin(option) is tuple), tuple[Any, ...]))
        hints = items[:1] * len(given) if items[-1] is Ellipsis else items
        return tuple(_decode(hint, item, where) for hint, item in zip(hints, given, strict=False))
    if not isinstance(given, Mapping):
        return given
    kinds = {option.__name__: option for option in options if isinstance(option, type) and is_dataclass(option)}
    if not kinds:
        raise BadArgument(f"{where} must be {_allowed(hint)}, not {dict(given)!r}")
    rest = {key: item for key, item in given.items() if key != "kind"}
    kind = given.get("kind", next(iter(kinds)) if len(kinds) == 1 else None)
    if kind not in kinds:
        raise BadArgument(f"{where}.kind must be one of {', '.join(map(repr, kinds))}, not {kind!r}")
    return from_dict(kinds[kind], rest, where)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
