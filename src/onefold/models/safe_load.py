"""Reading tensors from a file that may be anything: another kind of file, damaged, or hostile.

The format is recognized by the first bytes, never by the name: safetensors, a zip of torch.save or of numpy.savez, the
older format of torch.save, HDF5. Nothing in a file is ever executed, and a small file cannot allocate much memory: the
sizes that it declares are compared with its own before it is read.

Every failure is a BadCheckpoint of one sentence.
"""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from onefold.errors import BadCheckpoint, MissingExtra

# Weights compress by a factor of 1.1 (floats) to 4 (quantized); deflate reaches 1032 on zeros.
MAX_RATIO = 20
ALWAYS_ALLOWED = 16 << 20  # bytes: tiny test networks compress well

MAX_NAME = 300  # characters; the longest known has 68

# Keys under which training programs keep the weights, averaged ones first: those are what they evaluate themselves.
_STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# The globals that a pickle of weights may use. torch's own list for weights_only runs nothing either, but has some,
# such as bytearray, with which a file of a kilobyte takes all memory.
_ALLOWED_GLOBALS = frozenset(
    (
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "argparse.Namespace",
        "_codecs.encode",
        "builtins.set",
        "__builtin__.set",
    )
)
_ALLOWED_TORCH_GLOBALS = r"torch\.(\w+Storage|storage\.\w+Storage|Size|device|b?float\d+|u?int\d+|bool)"
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_ZIP = b"PK\x03\x04"
_HINT = "give weights as .safetensors, .pth, .npz or .h5"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file holds: tensors by name, its header's metadata, and the plain values beside the weights."""

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, object] = field(default_factory=dict)


def read(path: Path) -> Contents:
    """Read the tensors of a file, on the CPU. Raises BadCheckpoint, or MissingExtra where HDF5 needs h5py."""
    _check_file(path)
    with _as_bad_checkpoint(path):
        with path.open("rb") as file:
            head = file.read(512)
        contents = _reader(head, path)(path)
        _check_tensors(contents.tensors, path)
    return contents


def max_bytes(path: Path) -> int:
    """The bytes of tensors that a file of this size may hold."""
    return ALWAYS_ALLOWED + MAX_RATIO * path.stat().st_size


# ------------------------------------------------------------------------------------------ formats


def _check_file(path: Path) -> None:
    if not path.exists():
        raise BadCheckpoint(f"there is no file {path}: {_HINT}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise BadCheckpoint(f"{path} is {kind}, not a file of weights: {_HINT}")
    if path.stat().st_size == 0:
        raise BadCheckpoint(f"{path} is empty: get it again")


def _reader(head: bytes, path: Path) -> Callable[[Path], Contents]:
    if head.startswith(_ZIP):
        return _read_npz if _is_npz(path) else _read_torch
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_hdf5
    if head[8:9] == b"{":
        return _read_safetensors
    if re.match(rb"\x80[\x02-\x05]", head):
        return _read_torch
    raise BadCheckpoint(f"{path} is {_other_format(head)}: {_HINT}")


def _other_format(head: bytes) -> str:
    text = head.lstrip().lower()
    if text.startswith(b"<"):
        return "a web page, not weights (the download was probably refused)"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (type `git lfs pull`)"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or head[257:262] == b"ustar":
        return "a packed archive, not weights (unpack it and give the file inside)"
    return "not a file of weights that is known here"


def _is_npz(path: Path) -> bool:
    """Whether a zip archive is numpy's. Raises BadCheckpoint for a decompression bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadCheckpoint(f"{path} is a damaged or truncated zip archive: get it again") from error
    _check_size(sum(entry.file_size for entry in entries), path)
    return bool(entries) and all(entry.filename.endswith(".npy") for entry in entries)


# ------------------------------------------------------------------------------------------ readers


def _read_safetensors(path: Path) -> Contents:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > size - 8:
        raise BadCheckpoint(f"{path} declares a header of {header} bytes and has {size}: it is truncated or forged")
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return Contents(tensors={name: file.get_tensor(name) for name in names}, metadata=file.metadata() or {})


def _read_npz(path: Path) -> Contents:
    with np.load(path, allow_pickle=False) as archive:
        return Contents(tensors={name: torch.from_numpy(np.array(archive[name])) for name in archive.files})


def _read_torch(path: Path) -> Contents:
    """Read a file of torch.save: of its pickle only tensors, plain values, and argparse's namespaces of those."""
    with _pickles(path) as pickles:
        refused = sorted({name for pickled in pickles for name in _globals_of(pickled)} - _ALLOWED_GLOBALS)
    refused = [name for name in refused if re.fullmatch(_ALLOWED_TORCH_GLOBALS, name) is None]
    if refused:
        names = f"{refused[0]}{', ...' if len(refused) > 1 else ''}"
        raise BadCheckpoint(
            f"{path} holds pickled objects ({names}) besides tensors, and those are never loaded: "
            "save model.state_dict() alone"
        )
    with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        # An open file, since torch chooses other readers for some suffixes of a path.
        saved = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(saved, Mapping):
        raise BadCheckpoint(f"{path} holds a {type(saved).__name__}, not a state dict: save model.state_dict()")
    weights = next((saved[key] for key in _STATE_DICT_KEYS if isinstance(saved.get(key), Mapping)), saved)
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    extras = {
        str(name): value for name, value in saved.items() if not isinstance(value, Tensor) and value is not weights
    }
    return Contents(tensors=_unwrapped(tensors), extras=extras)


@contextmanager
def _pickles(path: Path) -> Iterator[Iterable[IO[bytes]]]:
    """The pickles of torch.save's file: one in a zip; five at the start of a file of the older kind."""
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:  # as torch decides
            file.seek(0)
            yield repeat(file, 5)
            return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names) or sum(name.endswith("/data.pkl") for name in names) != 1:
            raise BadCheckpoint(f"{path} is a zip archive, but no file of torch.save: {_HINT}")
        with archive.open(next(name for name in names if name.endswith("/data.pkl"))) as file:
            yield [file]


def _globals_of(pickled: IO[bytes]) -> Iterator[str]:
    """The names of the globals that a pickle uses; the pickle is parsed, not run."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield "a name made while loading"  # from the stack: not known without running the pickle


def _read_hdf5(path: Path) -> Contents:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra(f"reading {path} needs h5py: type `pip install h5py`") from error
    tensors: dict[str, Tensor] = {}

    def visit(name: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu":
            return  # groups, and the strings of a Keras model
        if item.external or item.is_virtual:
            raise BadCheckpoint(f"{path} keeps {name!r} in another file: give one file that holds its weights itself")
        _check_size(item.nbytes + sum(tensor.nbytes for tensor in tensors.values()), path)
        tensors[name] = torch.from_numpy(np.asarray(item[()]))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return Contents(tensors=tensors)


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that wrappers of a module add to all names."""
    for prefix in _WRAPPER_PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


# ------------------------------------------------------------------------------------------- checks


@contextmanager
def _as_bad_checkpoint(path: Path) -> Iterator[None]:
    """Turn any exception that a reader raises for a damaged file into a BadCheckpoint."""
    try:
        yield
    except (BadCheckpoint, MissingExtra):
        raise
    except PermissionError as error:
        raise BadCheckpoint(f"{path} may not be read by you: change its permissions") from error
    except Exception as error:  # SafetensorError, zlib.error, struct.error, MemoryError ...: readers raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"cannot read {path}, it is damaged or truncated ({reason}): get it again") from error


def _check_size(declared: int, path: Path) -> None:
    if declared > max_bytes(path):
        size = path.stat().st_size
        raise BadCheckpoint(
            f"{path} has {size} bytes and declares {declared}: that is a decompression bomb, not weights"
        )


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise BadCheckpoint where tensors are not dense, not of real numbers, or more than the file can hold."""
    if not tensors:
        raise BadCheckpoint(f"{path} holds no tensors: save model.state_dict()")
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise BadCheckpoint(f"{path} has an unprintable or too long name ({name[:40]!a}): it is damaged or forged")
        if tensor.numel() == 0:
            raise BadCheckpoint(f"{path} holds {name!r}, which is empty: it is damaged or forged")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise BadCheckpoint(
                f"{path} holds {name!r}, which is not a dense tensor of real numbers: save it as floats"
            )
    _check_size(sum(tensor.nbytes for tensor in tensors.values()), path)
