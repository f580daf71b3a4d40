"""Checksums: folders, texts, JSON and weights that notice when they are no longer what was written.

A sealed folder has a manifest.json with the size and SHA-256 of every other file in it, and of nothing else. A sealed
text has its SHA-256 in its first line, a JSON object that of its other members as "checksum". A safetensors file has
that of its tensors in its own metadata, so that it can be checked wherever it is copied to. All of them detect damage,
not malice: who can write a file can write its checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from onefold.errors import BadCheckpoint
from onefold.file_io import atomic_replace, parse_json, read_json, read_plain_file, write_text

_log = logging.getLogger("onefold")

MANIFEST = "manifest.json"
_FORMAT = 1
_MAX_MANIFEST_BYTES = 1 << 20

# ------------------------------------------------------------------------------------------ folders


def write_sealed_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write `contents` (file name -> bytes) and their manifest to `folder`, all of it or nothing.

    It takes bytes, and no function that writes, so that a full disk is an OSError and becomes NotWritable.
    """
    with atomic_replace(folder) as aside:
        aside.mkdir()
        for name, content in contents.items():
            (aside / name).write_bytes(content)
        entries = {name: _entry(content) for name, content in contents.items()}
        (aside / MANIFEST).write_text(_manifest(entries), encoding="utf-8")


def read_sealed_folder(folder: Path, only: Collection[str] | None = None) -> dict[str, bytes]:
    """Give every file of a sealed folder, or `only` some, as written; raises BadCheckpoint for the least difference."""
    try:
        manifest = _read(folder / MANIFEST, limit=_MAX_MANIFEST_BYTES)
        sealed = parse_json(manifest)
        entries = {str(name): {"bytes": int(e["bytes"]), "sha256": e["sha256"]} for name, e in sealed["files"].items()}
        if sealed["format"] != _FORMAT or any(Path(name).name != name for name in entries):
            raise ValueError(f"it is not of format {_FORMAT}")
        if manifest != _manifest(entries).encode():
            raise ValueError("it is not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{folder / MANIFEST} is missing or damaged: {error}") from error
    wanted = entries if only is None else [name for name in only if name in entries]
    try:
        contents = {name: _read(folder / name, limit=entries[name]["bytes"]) for name in wanted}
    except OSError as error:
        raise BadCheckpoint(f"{folder} is damaged: {error}") from error
    for name, content in contents.items():
        if _entry(content) != entries[name]:
            raise BadCheckpoint(f"{folder / name} is damaged: its size or SHA-256 is not what {MANIFEST} says")
    return contents


def copy_sealed_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of the sealed folder `source`, if there is one: by hard links where the disk has them."""
    if source.is_dir():
        with atomic_replace(target) as aside:
            shutil.copytree(source, aside, copy_function=_link)


def _manifest(entries: Mapping[str, Any]) -> str:
    return json.dumps({"format": _FORMAT, "files": dict(sorted(entries.items()))}, indent=1) + "\n"


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a plain file, never many more than `limit` of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, or not a plain file")
    with path.open("rb") as file:
        return file.read(limit + 1)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


# -------------------------------------------------------------------------------------------- texts


def write_sealed_text(path: Path, text: str) -> None:
    """Write a text below its SHA-256, which is of the file's name too: no other sealed text can stand in its place."""
    write_text(path, f"{_sum_of_text(path, text)}\n{text}")


def read_sealed_text(path: Path) -> str:
    """Read what `write_sealed_text` wrote. Raises OSError, and ValueError where it is damaged."""
    checksum, _, text = read_plain_file(path).decode("utf-8").partition("\n")
    if checksum != _sum_of_text(path, text):
        raise ValueError(f"{path} is damaged: its SHA-256 is not what its first line says")
    return text


def _sum_of_text(path: Path, text: str) -> str:
    return hashlib.sha256(f"{path.name}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


# --------------------------------------------------------------------------------------------- JSON

CHECKSUM = "checksum"
NO_CHECKSUM_NOTE = "no checksum, as in files of older versions: damage is not noticed"
_LINES = "lines_sha256"


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give a JSON object with "checksum": the SHA-256 of its other members, as JSON with sorted keys and no blanks."""
    return {**values, CHECKSUM: _sum_of_json(json.loads(json.dumps(values)))}  # as a reader will have them


def has_checksum(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object that was read has a checksum. Raises ValueError where it is not that of its members."""
    if CHECKSUM not in values:
        return False
    if values[CHECKSUM] != _sum_of_json({name: value for name, value in values.items() if name != CHECKSUM}):
        raise ValueError("its checksum is not that of what it holds")
    return True


def write_sealed_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum to a file."""
    write_text(path, json.dumps(with_checksum(values), indent=1) + "\n")


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote, without the checksum. Raises OSError, and ValueError where it is damaged.

    That a file has none is logged, once in a process.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    if not has_checksum(values):
        _say_unchecked(path)
    return {name: value for name, value in values.items() if name != CHECKSUM}


def sealed_lines(head: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> str:
    """Give JSON lines: the first has its own checksum, and the SHA-256 of the others as "lines_sha256"."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    first = with_checksum({**head, _LINES: hashlib.sha256(text.encode()).hexdigest()})
    return json.dumps(first, allow_nan=False) + "\n" + text


def lines_have_checksum(text: str) -> bool:
    """Whether JSON lines are such as `sealed_lines` gives. Raises ValueError where they are damaged."""
    first, _, rest = text.partition("\n")
    head = parse_json(first)
    if not isinstance(head, dict) or not has_checksum(head):
        return False
    if head.get(_LINES) != hashlib.sha256(rest.encode("utf-8", "surrogatepass")).hexdigest():
        raise ValueError("its lines are not those that the checksum in the first one is of")
    return True


def _sum_of_json(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@cache
def _say_unchecked(path: Path) -> None:
    _log.warning("%s has %s", path, NO_CHECKSUM_NOTE)


# ---------------------------------------------------------------------------------------- safetensors

_TORCH_NAMES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32"},
    **{"I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
}


def sealed_safetensors(data: bytes) -> bytes:
    """Give the bytes of a safetensors file with the SHA-256 of its tensors as "sha256" in its metadata.

    The checksum is of a header for each name in sorted order, the UTF-8 text "<name> <dtype> <shape>" and a newline,
    such as "head.fc.weight float32 [10, 1024]", each followed by the tensor's bytes, row-major and little-endian. The
    metadata are sorted, which safetensors leaves to chance, so that equal networks are equal files.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), memoryview(data)[start:]
    metadata, total = header.pop("__metadata__", {}), hashlib.sha256()
    for name, entry in sorted(header.items()):
        first, last = entry["data_offsets"]
        total.update(f"{name} {_TORCH_NAMES[entry['dtype']]} {entry['shape']}\n".encode())
        total.update(body[first:last])
    metadata |= {"sha256": total.hexdigest()}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":"))
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)  # as the format has it: the tensors begin at a multiple of 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded + bytes(body)
