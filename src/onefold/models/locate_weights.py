"""Finding the weights that a user names: a file, a folder, an id of the Hugging Face hub; and what lies beside them."""

from __future__ import annotations

import difflib
import errno
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onefold.errors import BadCheckpoint, NetworkFailed, NotWritable
from onefold.file_io import read_json, read_plain_file, suggest_path
from onefold.models.catalogue import CATALOGUE

WEIGHTS_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"  # of weights in several files
WEIGHTS_HINT = "give weights as .safetensors, .pth, .npz or .h5"
HUB_ID_PATTERN = r"(?:hf[-_]hub:)?([\w][\w.-]*/[\w][\w.-]*)"
CONFIG_NAME, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_IN_FOLDERS = (WEIGHTS_NAME, _INDEX_NAME, "pytorch_model.bin")
_AVERAGED = "ema.safetensors"  # beside the plain weights in a checkpoint of a training
_INDEX, _SHARD = ".index.json", re.compile(r"-[0-9]+-of-([0-9]+)\.\w+$")  # model-00001-of-00003.safetensors
_WEIGHTS = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".npz", ".h5", ".ckpt")
_SUFFIXES = (*_WEIGHTS, ".onnx", ".tflite", ".pte", ".json")
# What the verbs write to, and the usual folders for weights: runs/x is a path, and hf-hub:runs/x a repository.
_FOLDERS = ("runs", "artifacts", "deploy", "results", "demo", "checkpoints", "weights", "models", "outputs")
_MAX_CONFIG = 16 << 20  # bytes
_log = logging.getLogger("onefold")


@dataclass(frozen=True, kw_only=True)
class LocatedWeights:
    """A file of weights, what the files beside it say, and the path or id that the user gave.

    `config` is config.json with the keys of preprocessor_config.json added; `select` chooses among its state dicts.
    `notes` are sentences on what was assumed.
    """

    path: Path
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    select: str = ""
    notes: tuple[str, ...] = ()


def locate_weights(source: str | Path) -> LocatedWeights:
    """Find the file of weights at a path, or download that of an id of the hub. Raises BadCheckpoint.

    After a path's colon may stand which weights of a checkpoint to take: FILE:plain, FILE:averaged, FILE:KEY. What
    config.json and preprocessor_config.json say belongs to the weights beside them, where those are the only ones.
    """
    found = _locate(source)
    return found if isinstance(found, LocatedWeights) else replace(_on_hub(found.repo_id), select=found.select)


def check_weights_exist(source: str | Path) -> None:
    """Raise what `locate_weights` and reading the file would, where there is none, or the hub does not give it."""
    found = _locate(source)
    if isinstance(found, LocatedWeights):
        check_weights_file(found.path)
    else:
        _download_weights(found.repo_id)


def check_weights_file(path: Path) -> None:
    """Raise BadCheckpoint unless there is a file, with something in it."""
    if not path.exists():
        raise BadCheckpoint(f"there is no file {path}{suggest_path(path) or f': {WEIGHTS_HINT}'}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise BadCheckpoint(f"{path} is {kind}, not a file of weights: {WEIGHTS_HINT}")
    if path.stat().st_size == 0:
        raise BadCheckpoint(f"{path} is empty: get it again")


@dataclass(frozen=True)
class _HubWeights:
    """Weights in a repository of the hub, owner/name, and which state dict of them."""

    repo_id: str
    select: str


def _locate(source: str | Path) -> LocatedWeights | _HubWeights:
    """Find the file at a path, or the repository that is meant. Raises BadCheckpoint."""
    path, (before, colon, select) = Path(source), str(source).rpartition(":")
    try:
        is_folder, is_there = path.is_dir(), path.exists()
        is_chosen = not is_there and bool(colon) and Path(before).exists()
    except OSError as error:  # a name too long for a file, a folder that may not be entered
        raise BadCheckpoint(f"cannot look for {path}: {error.strerror}") from error
    if is_folder:
        return _in_folder(path, "")
    if is_chosen:
        found = _in_folder(Path(before), select) if Path(before).is_dir() else _beside(Path(before), select)
        return replace(found, source=str(source))
    if not is_there and path.suffix not in _SUFFIXES:
        choice = select if select in ("plain", "averaged") else ""
        repository = _repository(before if choice else str(source))
        if repository:
            return _HubWeights(repository, choice)
    return _beside(path, "")


def _in_folder(folder: Path, select: str) -> LocatedWeights:
    """The weights in a folder: of the usual names, or the only ones; of a training's checkpoint the averaged ones."""
    found = LocatedWeights(path=folder, source=str(folder), select=select)
    if (folder / WEIGHTS_NAME).is_file() and (folder / _AVERAGED).is_file() and select in ("", "plain", "averaged"):
        name = WEIGHTS_NAME if select == "plain" else _AVERAGED
        text = (
            f"{folder} holds averaged weights ({_AVERAGED}) and plain weights ({WEIGHTS_NAME}): the first are taken; "
        )
        notes = () if select else (f"{text}{folder}:plain takes others",)
        return _with_files_beside(replace(found, path=folder / name, select="", notes=notes))
    for name in _IN_FOLDERS:
        if (folder / name).is_file():
            notes = (f"{folder} holds {WEIGHTS_NAME} and {_INDEX_NAME}: the first is taken",)
            is_double = name == WEIGHTS_NAME and (folder / _INDEX_NAME).is_file()
            return _with_files_beside(replace(found, path=folder / name, notes=notes * is_double))
    there = _weights_in(folder)
    if not there and (artifacts := sorted(path.parent.name for path in folder.glob("*/manifest.json"))):
        shown = ", ".join(artifacts[:8])
        raise BadCheckpoint(
            f"{folder} holds folders that may be artifacts ({shown}): give one, as {folder / artifacts[0]}"
        )
    if len(there) != 1:
        seen = f"it holds {', '.join(there[:8])}{', ...' * (len(there) > 8)}" if there else "there is none in it"
        raise BadCheckpoint(f"{folder} is a folder without {WEIGHTS_NAME}: give the file of weights itself ({seen})")
    notes = (f"{folder}: the weights are {there[0]}, the only ones there",)
    return _with_files_beside(replace(found, path=folder / there[0], notes=notes))


def _beside(path: Path, select: str) -> LocatedWeights:
    """A file of weights with what is said beside it, where there are no other weights there that it may be of."""
    if (shard := _SHARD.search(path.name)) and int(shard[1]) > 1:
        indices = sorted(path.parent.glob(f"*{_INDEX}"))
        the_index = indices[0] if indices else f"their *{_INDEX}, beside all of them"
        raise BadCheckpoint(f"{path} is one of the {int(shard[1])} files of weights: give {the_index}")
    file = LocatedWeights(path=path, source=str(path), select=select)
    if path.name == WEIGHTS_NAME and not select and (path.parent / _AVERAGED).is_file():
        file = replace(file, notes=(f"{path} are plain weights; {path.parent / _AVERAGED} are the averaged ones",))
    beside = [name for name in (CONFIG_NAME, _PREPROCESSOR) if (path.parent / name).is_file()]
    if path.name in _IN_FOLDERS:
        return _with_files_beside(file)
    if not beside or not path.is_file():
        return file
    why = "there are other weights in that folder, of which it may be"
    if _weights_in(path.parent) == [path.name]:
        try:
            return _with_files_beside(file)
        except BadCheckpoint as error:
            why = str(error)
    return replace(file, notes=(f"{path}: the {' and '.join(beside)} beside it is not read: {why}",))


def _weights_in(folder: Path) -> list[str]:
    """The names of the files in a folder that by their suffix are weights; of several that have an index, that one."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return []
    indices = [name for name in names if name.endswith(_INDEX)]
    return indices + [n for n in names if n.endswith(_WEIGHTS) and not (indices and _SHARD.search(n))]


def _repository(source: str) -> str:
    """Give the owner/name of the hub that a source names, empty where it is a path; BadCheckpoint for a local name."""
    hub_id = re.fullmatch(HUB_ID_PATTERN, source)
    if hub_id is None or source != hub_id[1]:
        return "" if hub_id is None else hub_id[1]
    folder, name = source.split("/")
    if Path(folder).is_dir():
        there = ", ".join(sorted(entry.name for entry in Path(folder).iterdir())[:8]) or "nothing"
        seen = f"the folder {folder} holds {there}"
    elif folder.lower() in _FOLDERS or name in ("best", "last", "previous"):
        seen = f"the current folder {Path.cwd()} has no folder {folder}"
    else:
        return source
    there_is = suggest_path(source) or f": {seen}; for the repository of the hub type hf-hub:{source}"
    raise BadCheckpoint(f"there is no {source}{there_is}")


def _with_files_beside(file: LocatedWeights) -> LocatedWeights:
    """Add what the other files of its folder say."""
    folder = file.path.parent
    config = dict(_read_config(folder / CONFIG_NAME)) | dict(_read_config(folder / _PREPROCESSOR))
    return replace(file, config=config, licence=_licence_from_config(config, folder / "README.md"))


def _read_config(path: Path) -> Mapping[str, Any]:
    """config.json as a mapping; empty where there is none. Raises BadCheckpoint."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"larger than {_MAX_CONFIG} bytes")
        config = read_json(path)
        if not isinstance(config, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError) as error:
        raise BadCheckpoint(
            f"{path} cannot be read ({error}): get it again, or give the file of weights alone"
        ) from error
    return config


def _licence_from_config(config: Mapping[str, Any], readme: Path) -> str:
    """The licence in timm's pretrained_cfg, in config.json, or in the README's front matter; empty where none is."""
    settings = config.get("pretrained_cfg")
    for table in (settings if isinstance(settings, Mapping) else {}, config):
        if isinstance(table.get("license"), str) and table["license"]:
            return str(table["license"])
    try:
        front = read_plain_file(readme).decode("utf-8", "replace")[:65536].split("---")[1]
    except (OSError, IndexError):
        return ""
    stated = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([\w.+ -]+)", front, re.M))
    named = str(stated.get("license", ""))
    return str(stated.get("license_name", named) if named == "other" else named).strip()


def _on_hub(repo_id: str) -> LocatedWeights:
    """The weights of a repository of the hub, downloaded to its cache, with what the files beside them say."""
    from huggingface_hub.errors import EntryNotFoundError

    path = _download_weights(repo_id)
    config: dict[str, Any] = {}
    for name in (CONFIG_NAME, _PREPROCESSOR):
        if name == _PREPROCESSOR and "pretrained_cfg" in config:
            continue  # timm's and ours say all that in config.json
        try:
            config |= _read_config(_download(repo_id, name))
        except EntryNotFoundError:
            continue
        except NetworkFailed:
            raise NetworkFailed(
                f"the weights of {repo_id} are in the hub's cache and {name} is not, which says how images are "
                "prepared and what the classes are; the hub cannot be reached: fetch it once "
                f"(hf download {repo_id}), or give a folder that holds both"
            ) from None
    readme = path.parent / "README.md"
    if not _licence_from_config(config, readme):
        try:
            readme = _download(repo_id, "README.md")
        except (EntryNotFoundError, NetworkFailed):
            _log.info("%s: the licence of these weights is not known here, since its README.md is not", repo_id)
    return LocatedWeights(path=path, source=repo_id, config=config, licence=_licence_from_config(config, readme))


def _download_weights(repo_id: str) -> Path:
    """Download the file of weights of a repository, or its index and all files of that; give the file or the index."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _download(repo_id, WEIGHTS_NAME)
    except EntryNotFoundError:
        return _shards_on_hub(repo_id)
    except NetworkFailed:
        if not isinstance(huggingface_hub.try_to_load_from_cache(repo_id, _INDEX_NAME), str):
            raise
        return _shards_on_hub(repo_id)


def _shards_on_hub(repo_id: str) -> Path:
    """Download the index of weights in several files, and all of these; give the index."""
    from huggingface_hub.errors import EntryNotFoundError

    from onefold.models.restricted_unpickler import RefusedError  # with torch
    from onefold.models.safe_load import read_shard_index

    try:
        index = _download(repo_id, _INDEX_NAME)
    except EntryNotFoundError:
        raise BadCheckpoint(
            f"{repo_id} on the hub has no {WEIGHTS_NAME}, and pickled files from there are not read: "
            "download the file you trust and give its path"
        ) from None
    try:
        shards = sorted({*read_shard_index(index).values()})
    except (RefusedError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{index} is not loaded: {one_line_error(error)}") from error
    for name in shards:
        try:
            shard = _download(repo_id, name)
        except EntryNotFoundError:
            raise BadCheckpoint(f"{repo_id} on the hub has no {name}, which its {_INDEX_NAME} names") from None
        if shard.parent != index.parent:
            raise BadCheckpoint(f"{repo_id} was changed on the hub while it was downloaded: type it again")
    return index


def _download(repo_id: str, name: str) -> Path:
    """Give a file of a repository, from the hub or its cache.

    Raises EntryNotFoundError where the repository has no such file, BadCheckpoint where the hub has no such repository
    or does not let it be read, NetworkFailed where the hub cannot be reached, NotWritable where the cache cannot be
    written.
    """
    import huggingface_hub
    from huggingface_hub import errors

    no_such = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    cached = None
    try:
        cached = huggingface_hub.try_to_load_from_cache(repo_id, name)
        if not isinstance(cached, str):  # asked first, since a download tries six times to reach the hub
            found = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo_id, name))
            if name == WEIGHTS_NAME:
                text = "downloading %s of %s, %.1f MB, from huggingface.co"
                _log.info(text, name, repo_id, (found.size or 0) / 1e6)
        return Path(huggingface_hub.hf_hub_download(repo_id, name))
    except errors.LocalEntryNotFoundError as error:  # it is an EntryNotFoundError, but says that the cache has no file
        raise _hub_error(repo_id, error) from None
    except errors.EntryNotFoundError:
        raise
    except no_such as error:
        raise BadCheckpoint(
            f"there is no file {repo_id}, and the Hugging Face hub has no such repository that you may read: check the "
            f"path or the id; for a gated or private one `hf auth login` ({one_line_error(error)})"
            f"{_suggest(repo_id)}"
        ) from None
    except Exception as error:  # the network raises errors of whatever package the hub's client uses for it
        if cached is not None and not isinstance(cached, str):  # known of before: the repository has no such file
            raise errors.EntryNotFoundError(f"{repo_id} has no {name}") from None
        raise _hub_error(repo_id, error) from None


def _hub_error(repo_id: str, error: Exception) -> NetworkFailed | NotWritable:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return NotWritable(f"the hub's cache cannot be written ({one_line_error(error)}): make room, or set HF_HOME")
    first: BaseException = error  # the others were raised from it, and it is the shortest: "no route to host"
    while (cause := first.__cause__ or first.__context__) is not None and str(cause):
        first = cause
    return NetworkFailed(
        f"there is no file {repo_id}, and the Hugging Face hub cannot be reached ({type(error).__name__}: "
        f"{one_line_error(first)}): check the network and HF_HUB_OFFLINE; or copy its {WEIGHTS_NAME} here from "
        f"another machine and give the path{_suggest(repo_id)}"
    )


def _suggest(repo_id: str) -> str:
    """Give the end of an error on an id of the hub: a path here, or an id of released weights, of nearly that name."""
    released = [entry.weights for entry in CATALOGUE.values() if entry.weights and entry.weights != repo_id]
    near = difflib.get_close_matches(repo_id, sorted(released), n=1, cutoff=0.9)
    return suggest_path(repo_id) or (f"; did you mean {near[0]}?" if near else "")


def one_line_error(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())
