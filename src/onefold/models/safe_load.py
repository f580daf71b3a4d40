"""Reading tensors from a file that may be anything: another kind of file, damaged, or hostile.

The format is recognized by the first bytes, never by the name: safetensors, the index of several such files, a zip of
torch.save or of numpy.savez, the older format of torch.save, a plain pickle, HDF5. Nothing in a file is ever executed,
and a small file cannot allocate much memory: the sizes that it declares are compared with its own before it is read.

Of a training's checkpoint the state dict is found by one rule for all formats (see `state_dicts`).

Every failure is a BadCheckpoint of one sentence.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from onefold.errors import BadCheckpoint, MissingExtra
from onefold.file_io import parse_json, read_json
from onefold.models.locate_weights import WEIGHTS_HINT, check_weights_file
from onefold.models.restricted_unpickler import (
    RefusedError,
    StoredTensor,
    UnpickledObject,
    as_array,
    iter_objects,
    load,
    load_legacy,
)
from onefold.models.state_dicts import MAX_TENSORS, KeyFilter, StateDict, as_mapping, choose_state_dict, is_tensor

_log = logging.getLogger("onefold")
_MAX_RATIO = 20  # weights compress by a factor of 1.1 (floats) to 4 (quantized); deflate reaches 1032 on zeros
_ALWAYS_ALLOWED = 16 << 20  # bytes: tiny test networks compress well
_ALWAYS_PICKLED = 1 << 20  # bytes of a pickle, of which each may be an object
_MAX_LISTED = 8  # of what a list or tuple holds
_MAX_NAME = 300  # characters; the longest known has 68
_MAX_HEADER = 32 << 20  # bytes of a safetensors file, or of an index: names, shapes and the metadata
_MAX_SHARDS = 1000
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")  # no folder, nothing hidden
# Classes that are not named in a note: their values are understood, or are no weights.
_HARMLESS = re.compile(
    r"(collections|datetime|pathlib|argparse|numpy|torch|builtins|copy_?reg|_codecs|types|functools|enum)\b|an? |numpy'"
)
_ZIP = b"PK\x03\x04"
_EXPORTED = re.compile(rb".{4}(TFL3|ET[0-9]{2})|\x08[\x03-\x20][\x12\x1a\x22\x3a\x42]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CheckpointContents:
    """What a file holds: tensors by name, its header's metadata, and the values beside the weights.

    `weights` says which of the file's state dicts these are, such as "state_dict_ema, averaged"; empty where there is
    no choice. `outside` are the names of those tensors that were not wrapped as the others are.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, object] = field(default_factory=dict)
    weights: str = ""
    outside: frozenset[str] = frozenset()


def read_tensors(
    path: Path, *, fits: KeyFilter | None = None, select: str = "", quiet: bool = False
) -> CheckpointContents:
    """Read the tensors of a file, on the CPU. Raises BadCheckpoint, or MissingExtra where HDF5 needs h5py.

    `fits` recognizes the network's tensors among those of a checkpoint. `select` is "plain", "averaged", or the key of
    a state dict in it; where it is empty and there are several, averaged ones are taken and the choice is logged.
    """
    check_weights_file(path)
    with _as_bad_checkpoint(path):
        with path.open("rb") as file:
            head = file.read(512)
        saved = _reader(head, path)(path)
        chosen, others = choose_state_dict(saved.values, fits, select, path)
        contents = CheckpointContents(
            tensors=saved.tensors(chosen.tensors, path),
            metadata=saved.metadata,
            extras={str(key): value for key, value in saved.values.items() if not is_tensor(value)},
            weights=f"{chosen.key or 'the whole file'}{', averaged' * chosen.averaged}" if others else "",
            outside=chosen.outside,
        )
        _check_tensors(contents.tensors, path)
        if not saved.is_sharded:  # of shards each was checked by itself
            _check_size(sum(tensor.nbytes for tensor in contents.tensors.values()), path)
    if not quiet:
        _tell(path, chosen, others, select, saved.unread)
    return contents


def _tell(path: Path, chosen: StateDict, others: Sequence[StateDict], select: str, unread: Sequence[str]) -> None:
    """Log which weights were taken, and what in the file was not read."""
    if others and not select:
        known = {"plain": "plain weights", "averaged": "averaged weights"}
        taken, *rest = (f"{known[s.kind]} ({s.key or 'without a key'})" for s in (chosen, *others))
        way = f"{path.name}:{others[0].kind if others[0].kind != chosen.kind else others[0].key}"
        _log.info("%s holds %s and %s: the first are taken; %s takes others", path, taken, ", ".join(rest), way)
    if unread:
        shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        _log.info("%s: objects of %s are not read, since nothing in a file is executed; its tensors are", path, shown)


def _max_tensor_bytes(path: Path) -> int:
    """The bytes of tensors that a file of this size may hold."""
    return _ALWAYS_ALLOWED + _MAX_RATIO * path.stat().st_size


# ------------------------------------------------------------------------------------------ formats


def _reader(head: bytes, path: Path) -> Callable[[Path], _Saved]:
    if head.startswith(_ZIP):
        return _read_npz if _is_npz(path) else _read_torch
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_hdf5
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") and b"\0" not in head[:8]:
        return _read_shards
    if head[8:9] == b"{":
        return _read_safetensors
    if re.match(rb"\x80[\x02-\x05]", head):
        return _read_torch
    exported = _EXPORTED.match(head) or path.suffix.lower() == ".onnx"
    raise BadCheckpoint(f"{path} is {_of_export(head) if exported else _other_format(head)}: {WEIGHTS_HINT}")


def _of_export(head: bytes) -> str:
    name = {b"TFL3": "LiteRT", b"ET12": "ExecuTorch"}.get(head[4:8], "ONNX")
    return f"an exported network ({name}), not weights by their names (give those that it was exported from)"


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
    _check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadCheckpoint(f"{path} is a damaged or truncated zip archive: get it again") from error
    _check_size(sum(entry.file_size for entry in entries), path)
    return bool(entries) and all(entry.filename.endswith(".npy") for entry in entries)


_END, _END_BYTES, _MAX_COMMENT = b"PK\x05\x06", 22, 1 << 16
_ENTRY_BYTES = 512  # of the directory of a zip archive, with a name and what is said beside it


def _check_directory(path: Path) -> None:
    """Raise BadCheckpoint for a zip archive of very many entries before Python makes an object of each."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END_BYTES - _MAX_COMMENT))
        tail = file.read()
    at = tail.rfind(_END)
    length = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if length == 0xFFFFFFFF:  # stated in 64 bits, somewhere before this
        at = tail.rfind(b"PK\x06\x06")
        length = int.from_bytes(tail[at + 40 : at + 48], "little") if at >= 0 else size
    if length > _ENTRY_BYTES * MAX_TENSORS:
        raise BadCheckpoint(f"{path} lists more entries than {MAX_TENSORS} tensors need: it is forged")


# ------------------------------------------------------------------------------------------ readers


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """What a format's reader found: values by key, in which tensors may still be `StoredTensor`s or numpy's arrays.

    `storages` gives the bytes of a storage by its key; `unread` are the names of classes that were not understood.
    `is_sharded` is whether they are of several files.
    """

    values: Mapping[Any, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    storages: Callable[[str], bytearray] = lambda _key: bytearray()
    unread: tuple[str, ...] = ()
    is_sharded: bool = False

    def tensors(self, leaves: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
        """Give the tensors themselves, which are of the file `path`; of those that share a storage it is read once."""
        storage, copied = lru_cache(maxsize=None)(self.storages), 0
        out: dict[str, Tensor] = {}
        for name, leaf in leaves.items():
            if isinstance(leaf, StoredTensor):
                data = leaf.storage.data
                out[name] = leaf.read(storage(leaf.storage.key) if data is None else data)
            elif isinstance(leaf, UnpickledObject):
                array = as_array(leaf)
                if array is None:
                    raise RefusedError(f"{name!r} is no dense tensor of numbers ({leaf.name}): save it as floats")
                copied += array.nbytes  # one array may stand under many names
                _check_size(copied, path)
                out[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
            else:
                out[name] = leaf
        return out


def _read_safetensors(path: Path) -> _Saved:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise BadCheckpoint(f"{path} declares a header of {length} bytes and has {size}: it is truncated or forged")
        if length > _MAX_HEADER:
            raise RefusedError(f"its header has {length} bytes, more than {MAX_TENSORS} tensors need")
        header = parse_json(file.read(length))
    if isinstance(header, dict) and len(header) > MAX_TENSORS:  # safetensors itself takes a minute for a million
        raise RefusedError(f"it has more than {MAX_TENSORS} tensors, as no network here has")
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return _Saved(values={name: file.get_tensor(name) for name in names}, metadata=file.metadata() or {})


def read_shard_index(path: Path) -> dict[str, str]:
    """Read which safetensors file beside an index holds each tensor. Raises BadCheckpoint, or ValueError for no JSON.

    The files are named alone, without a folder: an index reaches nothing that does not lie beside it.
    """
    if path.stat().st_size > _MAX_HEADER:
        raise RefusedError(f"it has {path.stat().st_size} bytes, more than {MAX_TENSORS} tensors need")
    index = read_json(path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise BadCheckpoint(f"{path} is JSON without a weight_map, no index of weights: {WEIGHTS_HINT}")
    if bad := [str(name) for name in shards.values() if not _SHARD_NAME.fullmatch(str(name))]:
        raise BadCheckpoint(
            f"{path} names {bad[0][:_MAX_NAME]!a}: expected names of .safetensors files in its folder; save other "
            "weights as one model.safetensors (max_shard_size)"
        )
    if len(shards) > MAX_TENSORS or len({*shards.values()}) > _MAX_SHARDS:
        raise RefusedError(f"it has more than {MAX_TENSORS} tensors or {_MAX_SHARDS} files, as no network here has")
    return shards


def _read_shards(path: Path) -> _Saved:
    """Read the tensors of an index's files, which hold those that it says and no others."""
    shards = read_shard_index(path)
    values: dict[Any, Any] = {}
    metadata: dict[str, str] = {}
    files = sorted({*shards.values()})
    if lost := [name for name in files if not path.with_name(name).is_file()]:
        raise BadCheckpoint(f"{path} names {lost[0]}, which is not there: get it too, beside the index")
    for name in files:
        shard = path.with_name(name)
        with _as_bad_checkpoint(shard):
            saved = _read_safetensors(shard)
        named = {key for key, file in shards.items() if file == name}
        if odd := sorted(named.symmetric_difference(saved.values)):
            raise BadCheckpoint(
                f"{shard} does not hold the tensors that {path.name} says ({odd[0][:_MAX_NAME]!a}): they do not belong "
                "together, get all of them again"
            )
        values |= saved.values
        metadata |= saved.metadata
    return _Saved(values=values, metadata=metadata, is_sharded=True)


def _read_npz(path: Path) -> _Saved:
    values: dict[Any, Any] = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            try:
                array = np.array(archive[name])
            except ValueError as error:
                if "Object arrays" not in str(error):
                    raise
                values[name] = _read_objects(archive.zip, f"{name}.npy")
            else:
                values[name] = array.tolist() if array.dtype.kind == "U" else torch.from_numpy(array)
    if not any(map(is_tensor, values.values())) and len(values) == 1:  # numpy.savez(file, weights=state_dict)
        values = {"state_dict": next(iter(values.values()))}
    return _Saved(values=values)


def _read_objects(archive: zipfile.ZipFile, name: str) -> object:
    """The objects of an array in an archive of numpy's: what it holds, if that is one object."""
    entry = archive.getinfo(name)
    if entry.file_size > _ALWAYS_PICKLED + _MAX_RATIO * entry.compress_size:
        raise RefusedError(f"its {name} of {entry.file_size} bytes is a decompression bomb, not weights")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version < (2, 0) else np.lib.format.read_array_header_2_0
        shape, _, _ = read_header(file)
        held = load(file)
    state = held.state if isinstance(held, UnpickledObject) and isinstance(held.state, tuple) else ()
    elements = state[-1] if state and isinstance(state[-1], list) else []
    return elements[0] if not shape and len(elements) == 1 else elements


def _read_torch(path: Path) -> _Saved:
    """Read a file of torch.save, or of pickle.dump."""
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP  # as torch decides
        file.seek(0)
        if is_zip:
            value, storages = _read_zip(path)
        else:
            value, stored = load_legacy(file)
            storages = stored.__getitem__
    if isinstance(value, list | tuple):  # (model.state_dict(), optimizer.state_dict())
        value = {str(i): each for i, each in enumerate(value[:_MAX_LISTED]) if as_mapping(each) is not None} or value
    values = as_mapping(value)
    if values is None:
        kind = value.name if isinstance(value, UnpickledObject) else type(value).__name__
        raise BadCheckpoint(f"{path} holds a {kind}, not a state dict: save model.state_dict()")
    unknown = (
        found for found in iter_objects(value) if isinstance(found, UnpickledObject) and "_modules" not in found.values
    )
    names = sorted({found.name for found in unknown if _HARMLESS.match(found.name) is None})
    return _Saved(values=values, storages=storages, unread=tuple(names))


def _read_zip(path: Path) -> tuple[Any, Callable[[str], bytearray]]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = [name for name in names if name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in names):
            raise BadCheckpoint(
                f"{path} is a TorchScript archive, a program that is not run here: save the weights alone, "
                "torch.save(torch.jit.load(...).state_dict(), 'weights.pth')"
            )
        if len(set(names)) < len(names) or len(pickled) != 1:
            raise BadCheckpoint(f"{path} is a zip archive, but no file of torch.save: {WEIGHTS_HINT}")
        root = pickled[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise RefusedError("its numbers are big-endian: save it again on a little-endian machine")
        entry = archive.getinfo(pickled[0])
        if entry.file_size > _ALWAYS_PICKLED + _MAX_RATIO * entry.compress_size:
            raise RefusedError(f"its pickle of {entry.file_size} bytes is a decompression bomb, not weights")
        with archive.open(entry) as file:
            value = load(file)

    def storage(key: str) -> bytearray:
        with zipfile.ZipFile(path) as archive:
            return bytearray(archive.read(f"{root}data/{key}"))

    return value, storage


def _read_hdf5(path: Path) -> _Saved:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra(f"reading {path} needs h5py: type `pip install h5py`") from error
    tensors: dict[str, Tensor] = {}
    total = 0

    def visit(name: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu":
            return  # groups, and the strings of a Keras model
        if item.external or item.is_virtual:
            raise BadCheckpoint(f"{path} keeps {name!r} in another file: give one file that holds its weights itself")
        nonlocal total
        total += item.nbytes
        _check_size(total, path)
        if len(tensors) >= MAX_TENSORS:
            raise RefusedError(f"it has more than {MAX_TENSORS} tensors, as no network here has")
        tensors[name] = torch.from_numpy(np.asarray(item[()]))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return _Saved(values=tensors)


# ------------------------------------------------------------------------------------------- checks


@contextmanager
def _as_bad_checkpoint(path: Path) -> Iterator[None]:
    """Turn any exception that a reader raises for a damaged file into a BadCheckpoint."""
    try:
        yield
    except (BadCheckpoint, MissingExtra):
        raise
    except RefusedError as error:
        raise BadCheckpoint(f"{path} is not loaded: {error}") from error
    except PermissionError as error:
        raise BadCheckpoint(f"{path} may not be read by you: change its permissions") from error
    except Exception as error:  # SafetensorError, zlib.error, struct.error, MemoryError ...: readers raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"cannot read {path}, it is damaged or truncated ({reason}): get it again") from error


def _check_size(declared: int, path: Path) -> None:
    if declared > _max_tensor_bytes(path):
        size = path.stat().st_size
        raise BadCheckpoint(
            f"{path} has {size} bytes and declares {declared}: that is a decompression bomb, not weights"
        )


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise BadCheckpoint where tensors are not dense, or not of real numbers."""
    if not tensors:
        raise BadCheckpoint(f"{path} holds no tensors: save model.state_dict()")
    for name, tensor in tensors.items():
        if len(name) > _MAX_NAME or not name.isprintable():
            raise BadCheckpoint(f"{path} has an unprintable or too long name ({name[:40]!a}): it is damaged or forged")
        if tensor.numel() == 0:
            raise BadCheckpoint(f"{path} holds {name!r}, which is empty: it is damaged or forged")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise BadCheckpoint(
                f"{path} holds {name!r}, which is not a dense tensor of real numbers: save it as floats"
            )
