"""Where weights are: a file, a folder, an id of the Hugging Face hub; and what a config.json beside them tells.

Nothing that the hub sends is ever unpickled: from there come safetensors and JSON alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onefold.errors import BadCheckpoint

FILE = "model.safetensors"
CONFIG = "config.json"
MAX_CONFIG = 16 << 20  # bytes; the names of 21,841 classes make one
HUB_ID = r"(?:hf[-_]hub:)?([\w][\w.-]*/[\w][\w.-]*)"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".npz", ".h5", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where weights are: the file, what the config beside it says, and what the user called them."""

    path: Path
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)


def find(source: str | Path) -> Found:
    """The file that a path or an id of the hub stands for. Raises BadCheckpoint."""
    path = Path(source)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # a name too long for a file, a folder that may not be entered
        raise BadCheckpoint(f"cannot look for {path}: {error.strerror}") from error
    if is_folder:
        return _in_folder(path)
    known_id = re.fullmatch(HUB_ID, str(source))
    if is_there or known_id is None or path.suffix in _SUFFIXES:
        return Found(path=path, source=str(source))
    return _on_hub(known_id[1])


def _in_folder(folder: Path) -> Found:
    for name in (FILE, "pytorch_model.bin"):
        if (folder / name).is_file():
            return Found(path=folder / name, source=str(folder), config=_config(folder / CONFIG))
    raise BadCheckpoint(f"{folder} is a folder without {FILE}: give the file of weights itself")


def _on_hub(repo_id: str) -> Found:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = _download(repo_id, FILE)
    except LocalEntryNotFoundError as error:  # neither in the cache nor within reach
        raise BadCheckpoint(_unreachable(repo_id)) from error
    except EntryNotFoundError as error:
        raise BadCheckpoint(
            f"{repo_id} on the hub has no {FILE}, and pickled files from there are not read: "
            "download the file you trust and give its path"
        ) from error
    try:
        config = _config(_download(repo_id, CONFIG))
    except EntryNotFoundError:
        config = {}
    return Found(path=path, source=repo_id, config=config)


def _download(repo_id: str, name: str) -> Path:
    """A file of a repository. Raises EntryNotFoundError where it has none of this name, BadCheckpoint otherwise."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, name))
    except EntryNotFoundError:
        raise
    except Exception as error:  # no network, no such repository, gated, offline: the hub's own zoo
        reason = " ".join(str(error).split())[:160]
        raise BadCheckpoint(f"{_unreachable(repo_id)} ({type(error).__name__}: {reason})") from error


def _unreachable(repo_id: str) -> str:
    return (
        f"there is no file {repo_id}, and it cannot be had from the Hugging Face hub: check the id, the network and "
        f"HF_HUB_OFFLINE; or copy its {FILE} here from another machine and give the path"
    )


def _config(path: Path) -> Mapping[str, Any]:
    """config.json as a mapping; empty where there is none. Raises BadCheckpoint."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError(f"larger than {MAX_CONFIG} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not an object")
    except (ValueError, TypeError, RecursionError) as error:
        raise BadCheckpoint(
            f"{path} cannot be read ({error}): get it again, or give the file of weights alone"
        ) from error
    return config


# ------------------------------------------------------------------------------ what config.json says


def classes_of(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """The classes that a config names: timm's label_names, or transformers' id2label, perhaps after a background."""
    names = config.get("label_names")
    table = config.get("id2label")
    if not isinstance(names, list) and isinstance(table, dict):
        names = [table.get(str(i)) for i in range(len(table))]
        names = names[1:] if len(names) == num_classes + 1 == 1001 else names
    if isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's pretrained_cfg says of preprocessing, in our words; nothing where it says nothing sound."""
    told = config.get("pretrained_cfg")
    if not isinstance(told, dict):
        return {}
    out: dict[str, Any] = {}
    for word in ("mean", "std"):
        value = told.get(word)
        if isinstance(value, list) and all(isinstance(v, (int, float)) for v in value):
            out[word] = tuple(float(v) for v in value)
    if isinstance(told.get("crop_pct"), (int, float)):
        out["crop_pct"] = float(told["crop_pct"])
    if told.get("interpolation") in ("bilinear", "bicubic", "nearest"):
        out["interpolation"] = told["interpolation"]
    size = told.get("input_size")
    if isinstance(size, list) and len(size) == 3 and all(isinstance(s, int) for s in size):
        out |= {"channels": size[0], "size": size[2]}
    return out


def text_of(config: Mapping[str, Any], *path: str) -> str:
    """The text at a path of keys in a config; empty where there is none."""
    value: object = config
    for word in path:
        value = value.get(word) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""
