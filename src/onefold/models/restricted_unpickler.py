"""The pickles of checkpoints, read without unpickling: no class of a file is imported, no function of it is called.

A small interpreter of pickle's opcodes builds plain values: numbers, texts, lists, dicts. Tensors and numpy's arrays
and scalars are recognized by the names of their constructors and rebuilt here from their bytes. Every other object is a
`UnpickledObject`: it knows its class's name, holds what was stored in it, and does nothing.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
# The names of typed storages: torch.FloatStorage is one of float32.
_STORAGES = {
    name: _DTYPES[dtype]
    for name, dtype in (
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8")),
        *(("Bool", "bool"), ("ComplexFloat", "complex64"), ("ComplexDouble", "complex128"), ("Untyped", "uint8")),
    )
}
# What no honest checkpoint holds: a call of these would run a program, or open a file or a connection.
_PROGRAMS = re.compile(
    r"(os|posix|nt|subprocess|sys|shutil|socket|ctypes|importlib|runpy|pty|code|pip|webbrowser|http|urllib|requests)\."
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__|input|breakpoint|apply)$"
    r"|torch\.(load|hub|jit|ops|utils\.cpp_extension|utils\.model_zoo)\b"
)
_DICTS = (
    "builtins.dict",
    "addict.addict.Dict",
    *(f"collections.{k}" for k in ("OrderedDict", "defaultdict", "Counter")),
)
_SETS, _SEQUENCES = ("builtins.set", "builtins.frozenset"), ("builtins.list", "builtins.tuple")
_LEGACY = 0x1950A86A20F9469CFC6C  # the number at the start of a file of torch.save's older format
_MAX_MODULES, _MAX_TENSORS = 20_000, 200_000  # of a network; a forged one may contain itself
_MAX_COPIED = 50_000_000  # elements that calls in one pickle may copy


class RefusedError(Exception):
    """The pickle calls a program, or is none that is known here; the text is one clause."""


class Unordered(list[Any]):
    """The elements of a set, which need not be hashed, in an order that means nothing."""


@dataclass(eq=False, repr=False)
class UnpickledObject:
    """An object that was not made: its class or function by name, its arguments, what was set by key and appended."""

    name: str
    args: Any = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    @property
    def values(self) -> Mapping[Any, Any]:
        """Its attributes, or, for a kind of dict, what it maps."""
        if self.items:
            return self.items
        parts = self.state if isinstance(self.state, tuple) else (self.state,)  # (attributes, slots)
        return next((part for part in parts if isinstance(part, dict)), {})


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers in the file, under a key, or, in a plain pickle, as `data`; `view` is (key, offset, size) of a part."""

    key: str
    dtype: torch.dtype
    view: Any = None
    data: bytes | bytearray | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose numbers are still in the file: elements `offset + sum(index * stride)` of a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, storage: bytes | bytearray) -> Tensor:
        """Give the tensor, from the bytes of its storage. Raises RefusedError where it reaches past their end."""
        count = len(storage) // self.dtype.itemsize
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if math.prod(self.size) and not (last < count and self.offset >= 0 and min(self.stride, default=0) >= 0):
            raise RefusedError("a tensor reaches past the end of its storage")
        if not math.prod(self.size):
            return torch.empty(self.size, dtype=self.dtype)
        flat = torch.frombuffer(storage, dtype=self.dtype, count=count)
        return flat.as_strided(self.size, self.stride, self.offset)


def load(file: IO[bytes]) -> Any:
    """Give the value of the next pickle in a file. Raises RefusedError, and ValueError for one that is damaged."""
    return _Machine().run(file)


def load_legacy(file: IO[bytes]) -> tuple[Any, Mapping[str, bytearray]]:
    """Give the value of a file of pickle.dump, or of torch.save's older format, and the storages by their keys.

    The older format is five pickles - a number, its version, the machine's sizes, the value, the keys of the storages -
    and then for each storage its number of elements in eight bytes, and these.
    """
    value = load(file)
    if value != _LEGACY:
        return value, {}
    load(file), load(file)
    value, keys, storages = load(file), load(file), dict[str, bytearray]()
    found = (item.storage if isinstance(item, StoredTensor) else item for item in iter_objects(value))
    sizes = {item.key: item.dtype.itemsize for item in found if isinstance(item, Storage)}
    for key in map(str, keys):
        count = int.from_bytes(file.read(8), "little") * sizes.get(key, 1)
        storages[key] = bytearray(file.read(count) if count < 1 << 48 else b"")
        if len(storages[key]) < count:
            raise ValueError("a storage is cut off")
    return value, storages


def iter_objects(value: Any) -> Iterator[Any]:
    """Give everything in a value but numbers and texts, each object once."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float)):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, UnpickledObject):
            stack += [item.args, item.state, item.items, item.elements]
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            stack += item


def module_tensors(
    module: UnpickledObject, prefix: str = "", left: list[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Give the parameters and buffers of a pickled nn.Module by name, as its state dict would; raises RefusedError."""
    left = left or [_MAX_MODULES, _MAX_TENSORS]  # one count for all that lie in each other
    parts = {key: module.values.get(key) for key in ("_parameters", "_buffers", "_modules")}
    tables = {key: value if isinstance(value, dict) else {} for key, value in parts.items()}
    left[0] -= 1
    left[1] -= sum(map(len, tables.values()))
    if min(left) < 1:
        raise RefusedError(f"it is a network of more than {_MAX_MODULES} modules, or {_MAX_TENSORS} tensors")
    passing = module.values.get("_non_persistent_buffers_set", ())
    for table in ("_parameters", "_buffers"):
        for name, leaf in tables[table].items():
            if leaf is not None and name not in passing:
                yield f"{prefix}{name}", leaf
    for name, child in tables["_modules"].items():
        if isinstance(child, UnpickledObject):
            yield from module_tensors(child, f"{prefix}{name}.", left)


def as_array(value: Any) -> np.ndarray[Any, Any] | None:
    """Give the numpy array that a placeholder stands for; None where it stands for none of numbers."""
    if not isinstance(value, UnpickledObject):
        return None
    try:
        if value.name.endswith("multiarray._reconstruct"):
            _, shape, kind, is_fortran, data = value.state
            order: Any = "F" if is_fortran else "C"
        elif value.name.endswith("numeric._frombuffer"):
            data, kind, shape, order = value.args
        else:
            return None
        raw = data.encode("latin-1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, _numpy_dtype(kind)).reshape(shape, order=order)
    except (TypeError, ValueError, AttributeError):
        return None


# ---------------------------------------------------------------------------------- the interpreter


@dataclass(frozen=True)
class _Name:
    """A global of the pickle: never imported."""

    name: str


class _Machine:
    """The stack, its marks and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.inline: dict[int, tuple[bytes | bytearray, Any]] = {}

    def run(self, file: IO[bytes]) -> Any:
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[argument % (1 << 32)] = self.stack[-1]  # longer numbers may be made to have one hash
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument % (1 << 32)])
            elif name in ("GLOBAL", "INST"):
                named = _named(*str(argument).split(" ", 1))
                self.stack.append(self.called(named, tuple(self.marked())) if name == "INST" else named)
            elif name in _STEPS:
                _STEPS[name](self)
            elif name not in ("PROTO", "FRAME"):
                raise RefusedError(f"it has pickle's {name}, which torch.save does not write")
        raise ValueError("the pickle has no end")

    def marked(self) -> list[Any]:
        """Take everything after the last mark off the stack, and the mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def pop(self, count: int) -> tuple[Any, ...]:
        """Take so many items off the stack."""
        if len(self.stack) < count + (self.marks[-1] if self.marks else 0):
            raise ValueError("the pickle's stack is empty")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items

    def drop(self) -> None:
        """Take one item off the stack, or a mark."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop(1)

    def append(self, items: list[Any]) -> None:
        """Append to the list on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, list):
            target += items
        elif isinstance(target, UnpickledObject):
            target.elements += items

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top of the stack."""
        target = self.stack[-1]
        table = target.items if isinstance(target, UnpickledObject) else target
        if isinstance(table, dict):
            table.update({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def build(self) -> None:
        """Give the object on top of the stack its state."""
        (state,) = self.pop(1)
        if isinstance(self.stack[-1], UnpickledObject):
            self.stack[-1].state = state

    def persistent(self) -> None:
        """Put a storage of a tensor on the stack: torch's one use of persistent ids, but for the source of a class."""
        (identity,) = self.pop(1)
        if isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage":
            view = identity[5] if len(identity) > 5 else None
            self.stack.append(Storage(str(identity[2]), _storage_dtype(identity[1]), view))
        elif isinstance(identity, tuple) and len(identity) >= 2 and identity[0] == "module":
            self.stack.append(identity[1])
        else:
            raise RefusedError("it refers to something outside of itself")

    def called(self, function: Any, args: Any) -> Any:
        """Give what a function or class of the pickle makes of its arguments, or a placeholder."""
        if not isinstance(function, _Name) or not isinstance(args, tuple):
            return UnpickledObject("an object", args=args)
        name, first = function.name, args[0] if args else None
        if isinstance(first, (list, str)):
            self.copied += len(first)
            if self.copied > _MAX_COPIED:
                raise RefusedError("it copies one value again and again, until no memory is left")
        if name in _DICTS:
            if isinstance(first, dict):
                return first
            pairs = first if isinstance(first, list) else []
            return {_key(pair[0]): pair[1] for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2}
        if name in (*_SETS, *_SEQUENCES) and len(args) <= 1:
            elements = first if isinstance(first, (list, tuple)) else []
            return Unordered(elements) if name in _SETS else elements
        if name == "torch.Size":
            return first if isinstance(first, tuple) else ()
        if name == "_codecs.encode" and isinstance(first, str):
            return first.encode("latin-1", "replace")
        if name in ("copyreg._reconstructor", "copy_reg._reconstructor") and isinstance(first, _Name):
            return UnpickledObject(first.name, args=args[1:])
        if name.endswith("multiarray.scalar") and name.startswith("numpy.") and len(args) == 2:
            return _numpy_scalar(*args)
        if name == "torch.storage._load_from_bytes" and isinstance(first, (bytes, bytearray)):
            return self.inline[id(first)][1] if id(first) in self.inline else self.inline_storage(first)
        if name == "torch._tensor._rebuild_from_type_v2":
            return self.called(args[0], args[2])
        return _tensor(name, args) if name.startswith("torch._utils._rebuild") else UnpickledObject(name, args=args)

    def inline_storage(self, data: bytes | bytearray) -> Any:
        """Give the storage in the bytes that a tensor has in a plain pickle: a file of torch.save's older format."""
        value, storages = load_legacy(io.BytesIO(data))
        if isinstance(value, Storage) and value.key in storages:
            value = replace(value, data=storages[value.key])
        self.inline[id(data)] = data, value  # kept, so that no other bytes get their id
        return value


def _dict_of(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


_VALUES = frozenset(  # the opcodes that put their own argument on the stack
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": Unordered,
}
_STEPS: dict[str, Callable[[_Machine], Any]] = {
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "POP": _Machine.drop,
    "POP_MARK": _Machine.marked,
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "APPEND": lambda m: m.append(list(m.pop(1))),
    "APPENDS": lambda m: m.append(m.marked()),
    "ADDITEMS": lambda m: m.append(m.marked()),
    "LIST": lambda m: m.stack.append(m.marked()),
    "FROZENSET": lambda m: m.stack.append(Unordered(m.marked())),
    "TUPLE": lambda m: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m: m.stack.append(m.pop(1)),
    "TUPLE2": lambda m: m.stack.append(m.pop(2)),
    "TUPLE3": lambda m: m.stack.append(m.pop(3)),
    "DICT": lambda m: m.stack.append(_dict_of(m.marked())),
    "SETITEM": lambda m: m.set_items(list(m.pop(2))),
    "SETITEMS": lambda m: m.set_items(m.marked()),
    "BUILD": _Machine.build,
    "REDUCE": lambda m: m.stack.append(m.called(*m.pop(2))),
    "NEWOBJ": lambda m: m.stack.append(m.called(*m.pop(2))),
    "NEWOBJ_EX": lambda m: m.stack.append(m.called(*m.pop(3)[:2])),
    "OBJ": lambda m: m.stack.append((lambda found: m.called(found[0], tuple(found[1:])))(m.marked())),
    "STACK_GLOBAL": lambda m: m.stack.append(_named(*m.pop(2))),
    "BINPERSID": _Machine.persistent,
}


def _named(module: Any, name: Any) -> _Name:
    full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
    if _PROGRAMS.match(full):
        raise RefusedError(f"unpickled, it would call {full[:60]!a}, which no weights need: do not trust it")
    return _Name(full)


def _key(value: Any) -> Hashable:
    """Give a key that is quickly hashed, and not as all others of the file; what is none is known by its identity.

    The hash of long integers, and of tuples, is no secret: a file can be full of those that have the same one.
    """
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 63 else UnpickledObject("a key", args=value)
    kinds = (str, bytes, float, type(None), UnpickledObject, _Name)
    return value if isinstance(value, kinds) else UnpickledObject("a key", args=value)


# ------------------------------------------------------------------------------------------ tensors


def _storage_dtype(kind: Any) -> torch.dtype:
    match = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+?)Storage", kind.name if isinstance(kind, _Name) else "")
    if match is None or match[1] not in _STORAGES:
        raise RefusedError(f"it has a tensor of the unknown kind {str(getattr(kind, 'name', kind))[:60]!a}")
    return _STORAGES[match[1]]


def _tensor(name: str, args: tuple[Any, ...]) -> Any:
    """Give the tensor that torch's function of this name would rebuild; a placeholder for one that is not dense."""
    kind = name.rpartition(".")[2]
    if kind in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return args[0]
    if kind not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3") or not isinstance(args[0], Storage):
        return UnpickledObject(name, args=args)
    storage, offset, size, stride = args[:4]
    dtype = storage.dtype
    if kind == "_rebuild_tensor_v3":
        known = _DTYPES.get(args[6].name.removeprefix("torch.")) if isinstance(args[6], _Name) else None
        if known is None:
            return UnpickledObject(f"{name} of {getattr(args[6], 'name', '?')}", args=args)
        dtype = known
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise RefusedError("a tensor has an impossible shape")
    if isinstance(storage.view, tuple) and len(storage.view) == 3:
        offset += storage.view[1]
    return StoredTensor(storage, dtype, offset, tuple(size), tuple(stride))


def _numpy_dtype(kind: Any) -> np.dtype[Any]:
    """Give numpy's type of numbers from its pickled form. Raises ValueError for another."""
    code = kind.args[0] if isinstance(kind, UnpickledObject) and kind.name == "numpy.dtype" and kind.args else ""
    if not isinstance(code, str) or re.fullmatch(r"[<>|=]?[biuf][1248]", code) is None:
        raise ValueError("not an array of numbers")
    state = kind.state
    order: Any = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "=") else "="
    return np.dtype(code.lstrip("<>|=")).newbyteorder(order)


def _numpy_scalar(kind: Any, data: Any) -> Any:
    try:
        raw = data.encode("latin-1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, _numpy_dtype(kind))[0].item()
    except (TypeError, ValueError, IndexError):
        return UnpickledObject("numpy's scalar", args=(kind, data))
