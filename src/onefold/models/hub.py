"""Networks in and out of files, folders and the Hugging Face hub.

`load_model` reads any of them: a file of our own format, another project's checkpoint, a folder, an id of the hub.
`save_pretrained` writes the folder that the hub expects. Nothing that the hub sends is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from onefold.errors import BadArgument, BadCheckpoint, NetworkFailed, NotWritable
from onefold.models.catalogue import CATALOGUE, build, list_models, resolve
from onefold.models.load_weights import (
    CLASSIFIER,
    IMAGENET,
    Weights,
    class_names_in,
    guess_model,
    load_into_,
    read_weights,
)
from onefold.models.restricted_unpickler import Placeholder, objects
from onefold.models.state_dicts import NO_WEIGHTS
from onefold.models.weights_file import MMENGINE, config_licence, config_preprocessing, hub_config, hub_readme
from onefold.models.weights_file import Card as Card
from onefold.models.weights_file import read_card as read_card
from onefold.models.weights_file import save_weights as save_weights
from onefold.storage import read_json, write_text

FILE = "model.safetensors"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_IN_FOLDERS = (FILE, "pytorch_model.bin")
MAX_CONFIG = 16 << 20  # bytes; the names of 21,841 classes make one
HUB_ID = r"(?:hf[-_]hub:)?([\w][\w.-]*/[\w][\w.-]*)"
_log = logging.getLogger("onefold")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".npz", ".h5", ".ckpt", ".onnx", ".tflite", ".pte")
# What the verbs write to, and the usual folders for weights: runs/x is a path, and hf-hub:runs/x a repository.
_FOLDERS = ("runs", "artifacts", "deploy", "results", "demo", "checkpoints", "weights", "models", "outputs")


def load_model(
    source: str | Path,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    quiet: bool = False,
) -> tuple[nn.Module, Card]:
    """Load a network, in eval mode, and its card from a file, a folder, or an id of the hub ("timm/mobileone_s0...").

    The model's name is taken from the card, or guessed from the tensors' shapes; `name` is needed where neither is
    enough. Weights that are fused give the fused network. For another `num_classes` than the file's the classifier has
    a random initialization, and the card says so; for other `in_chans` the stem is adapted. What is assumed is logged
    unless it is `quiet`. Raises BadCheckpoint, BadArgument.
    """
    file, weights = _open(source, quiet=quiet)
    known = _model_name(weights, name)
    base = known.partition(".")[0]
    others = [base, *list_models(f"{base}.*")]
    if weights.variant is None and len(others) > 1 and not quiet:
        text = "%s does not tell its padding, activation and epsilon: taken as those of %s; if that is wrong: %s%s"
        tf = f"; it has {IMAGENET + 1} classes, as TensorFlow's have" if weights.num_classes == IMAGENET + 1 else ""
        _log.info(text, source, known, ", ".join(other for other in others if other != known), tf)
    classes = weights.num_classes if num_classes is None else num_classes
    channels = weights.in_chans if in_chans is None else in_chans
    fresh = build(known, classes, channels)
    model = load_into_(fresh, weights, known).eval()
    card = _card(weights, file, known, model is not fresh, classes, quiet)
    return model, replace(card, in_chans=channels)


def weights_card(source: str | Path, *, name: str | None = None) -> Card:
    """Give the card that `load_model` would give, without making a network of it. Raises as `load_model` does."""
    file, weights = _open(source, quiet=True)
    return _card(weights, file, _model_name(weights, name), weights.is_fused, weights.num_classes, quiet=True)


def possible_names(source: str | Path, name: str | None) -> tuple[str, ...]:
    """Give the names in the catalogue that weights may be of, where they tell all but padding, activation and epsilon.

    `name` is the one that the user gave; it is among them. Empty where the weights tell it themselves.
    """
    _, weights = _open(source, quiet=True)
    if name is None or weights.variant is not None:
        return ()
    base = resolve(name).partition(".")[0]
    names = (base, *list_models(f"{base}.*"))
    return names if len(names) > 1 else ()


def load_weights_(model: nn.Module, source: str | Path, name: str) -> nn.Module:
    """Load weights into `model`, which is called `name`, and return the network that holds them.

    That is `model`, or its fused form where the weights are fused: see `weights.load_into_`. Raises BadCheckpoint.
    """
    _, weights = _open(source)
    return load_into_(model, weights, name)


def load_training_weights_(model: nn.Module, source: str | Path, name: str) -> None:
    """Load weights into a training network, in place. Raises BadCheckpoint where they are fused, or do not fit."""
    if load_weights_(model, source, name) is not model:
        raise BadCheckpoint(
            f"{source} holds fused weights, from which no training network can be had: give the unfused ones "
            "(Apple's are named *_unfused), or use create_model(weights=) for the fused network"
        )


# ---------------------------------------------------------------------------------- weights of a file


def _open(source: str | Path, *, quiet: bool = False) -> tuple[WeightsFile, Weights]:
    """The weights of a path or an id of the hub. Raises BadCheckpoint."""
    file = locate(source)
    weights = read_weights(file.path, select=file.select, quiet=quiet)
    for key, expected in weights.layout.config.items():
        if file.config.get(key, expected) != expected:
            raise BadCheckpoint(
                f"{source} is a network with {key} {file.config[key]!r}, and of the {weights.layout.title} kind "
                f"only those with {expected!r} are known here"
            )
    return file, weights


def _model_name(weights: Weights, name: str | None) -> str:
    """The name in the catalogue: the user's, else the card's, else a guess from shapes. Raises like load_model."""
    if name is not None:
        return resolve(name)
    if weights.card is not None:
        try:
            return resolve(weights.card.model)
        except BadArgument as error:
            raise BadCheckpoint(f"{weights.source} is of a model that this onefold does not have: {error}") from error
    base = guess_model(weights.tensors, weights.layout.family)
    if base is None:
        raise BadCheckpoint(
            f"{weights.source} has the {weights.layout.title} layout and no size known here: give a name"
        )
    if weights.variant is not None:
        return f"{base}.{weights.variant}" if weights.variant else base
    names = [base, *list_models(f"{base}.*")]
    if len(names) > 1:
        raise BadCheckpoint(f"{weights.source} does not tell which of these it is: give the name, {' or '.join(names)}")
    return base


def _card(weights: Weights, file: WeightsFile, name: str, fused: bool, num_classes: int, quiet: bool = False) -> Card:
    """The card that a file carries, or else what is known of it as a card."""
    kept = num_classes == weights.num_classes
    source = f"{file.source} ({weights.origin})" if weights.origin else file.source
    source = source if kept else f"{source}, with a randomly initialized classifier of {num_classes} classes"
    if weights.card is not None:
        card = weights.card
        return card if kept else replace(card, num_classes=num_classes, classes=None, source=source)
    default = CATALOGUE[name].input
    stated = config_preprocessing(file.config, default)
    stated = stated or config_preprocessing(_in_checkpoint(weights.extras), default)
    remarks: list[str] = []
    classes = (weights.classes or class_names_in(file.config, num_classes, remarks)) if kept else None
    for remark in () if quiet else remarks:
        _log.info("the config beside %s: %s", file.source, remark)
    preprocessing = {**default, "channels": weights.in_chans, **stated}
    if not stated and not quiet:
        shown = ", ".join(f"{key} {value}" for key, value in default.items() if key != "channels")
        _log.info("%s does not say how images are prepared: as the catalogue's %s (%s)", file.source, name, shown)
    return Card(
        model=name,
        num_classes=num_classes,
        in_chans=weights.in_chans,
        classes=classes,
        preprocessing=preprocessing,
        fused=fused,
        licence=file.licence,
        source=source,
    )


def _in_checkpoint(extras: Mapping[str, object]) -> dict[str, Any]:
    """What a trainer's arguments or configuration in a checkpoint say of preprocessing, as keys of a config.json."""
    for found in objects({key: extras[key] for key in extras if not NO_WEIGHTS.search(str(key))}):
        values = found.values if isinstance(found, Placeholder) else found
        for key, inner in values.items() if isinstance(values, Mapping) else ():
            if isinstance(inner, str) and MMENGINE.search(inner[:MAX_CONFIG]):
                return {"data_preprocessor": inner[:MAX_CONFIG]}  # mmengine keeps its configuration as Python's text
            inner = inner.values if isinstance(inner, Placeholder) else inner
            if key in ("data_preprocessor", "img_norm_cfg") and isinstance(inner, Mapping):
                return {"data_preprocessor": inner}
    for key in ("args", "config", "hyper_parameters", "hparams", "opt"):
        given = extras.get(key)
        table = given.values if isinstance(given, Placeholder) else given
        if not isinstance(table, Mapping):
            continue
        keys = ("mean", "std", "crop_pct", "interpolation", "input_size")
        stated = {key: table[key] for key in keys if table.get(key) is not None}
        size, resized = table.get("val_crop_size", table.get("img_size")), table.get("val_resize_size")
        if isinstance(size, int) and "input_size" not in stated:
            stated["size"] = size
        if isinstance(size, int) and isinstance(resized, int) and resized:  # torchvision's
            stated["crop_pct"] = size / resized
        if stated:
            return {"pretrained_cfg": stated}
    return {}


# ------------------------------------------------------------------------------- finding a file


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file of weights, what the files beside it say, and the path or id that the user gave.

    `config` is config.json with the keys of preprocessor_config.json added; `select` chooses among its state dicts.
    """

    path: Path
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    select: str = ""


def locate(source: str | Path) -> WeightsFile:
    """Find the file of weights at a path, or download that of an id of the hub. Raises BadCheckpoint.

    After a path's colon may stand which weights of a checkpoint to take: FILE:plain, FILE:averaged, FILE:KEY.
    """
    path = Path(source)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # a name too long for a file, a folder that may not be entered
        raise BadCheckpoint(f"cannot look for {path}: {error.strerror}") from error
    if is_folder:
        for name in _IN_FOLDERS:
            if (path / name).is_file():
                return _with_files_beside(WeightsFile(path=path / name, source=str(path)))
        raise BadCheckpoint(f"{path} is a folder without {FILE}: give the file of weights itself")
    before, colon, select = str(source).rpartition(":")
    if not is_there and colon and Path(before).exists():
        return replace(locate(before), source=str(source), select=select)
    if not is_there and path.suffix not in _SUFFIXES and (repository := _repository(str(source))):
        return _on_hub(repository)
    file = WeightsFile(path=path, source=str(source))
    return _with_files_beside(file) if path.name in _IN_FOLDERS else file


def _repository(source: str) -> str:
    """Give the owner/name of the hub that a source names, empty where it is a path; BadCheckpoint for a local name."""
    hub_id = re.fullmatch(HUB_ID, source)
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
    raise BadCheckpoint(f"there is no {source}: {seen}; for the repository of the hub type hf-hub:{source}")


def _with_files_beside(file: WeightsFile) -> WeightsFile:
    """Add what the other files of its folder say."""
    folder = file.path.parent
    config = dict(_read_config(folder / CONFIG)) | dict(_read_config(folder / PREPROCESSOR))
    return replace(file, config=config, licence=config_licence(config, folder / "README.md"))


def _on_hub(repo_id: str) -> WeightsFile:
    """The weights of a repository of the hub, downloaded to its cache, with what the files beside them say."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = _download(repo_id, FILE)
    except EntryNotFoundError:
        raise BadCheckpoint(
            f"{repo_id} on the hub has no {FILE}, and pickled files from there are not read: "
            "download the file you trust and give its path"
        ) from None
    config: dict[str, Any] = {}
    for name in (CONFIG, PREPROCESSOR):
        if name == PREPROCESSOR and "pretrained_cfg" in config:
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
    if not config_licence(config, readme):
        try:
            readme = _download(repo_id, "README.md")
        except (EntryNotFoundError, NetworkFailed):
            _log.info("%s: the licence of these weights is not known here, since its README.md is not", repo_id)
    return WeightsFile(path=path, source=repo_id, config=config, licence=config_licence(config, readme))


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
            if name == FILE:
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
            f"path or the id; for a gated or private one `hf auth login` ({_in_one_line(error)})"
        ) from None
    except Exception as error:  # the network raises errors of whatever package the hub's client uses for it
        if cached is not None and not isinstance(cached, str):  # known of before: the repository has no such file
            raise errors.EntryNotFoundError(f"{repo_id} has no {name}") from None
        raise _hub_error(repo_id, error) from None


def _hub_error(repo_id: str, error: Exception) -> NetworkFailed | NotWritable:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return NotWritable(f"the hub's cache cannot be written ({_in_one_line(error)}): make room, or set HF_HOME")
    first: BaseException = error  # the others were raised from it, and it is the shortest: "no route to host"
    while (cause := first.__cause__ or first.__context__) is not None and str(cause):
        first = cause
    return NetworkFailed(
        f"there is no file {repo_id}, and the Hugging Face hub cannot be reached ({type(error).__name__}: "
        f"{_in_one_line(first)}): check the network and HF_HUB_OFFLINE; or copy its {FILE} here from "
        "another machine and give the path"
    )


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _read_config(path: Path) -> Mapping[str, Any]:
    """config.json as a mapping; empty where there is none. Raises BadCheckpoint."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError(f"larger than {MAX_CONFIG} bytes")
        config = read_json(path)
        if not isinstance(config, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError) as error:
        raise BadCheckpoint(
            f"{path} cannot be read ({error}): get it again, or give the file of weights alone"
        ) from error
    return config


# ---------------------------------------------------------------------------- folders, and the hub


class HubApi(Protocol):
    """The methods of huggingface_hub.HfApi that `push_to_hub` calls."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object:
        """Create the repository where there is none."""
        ...

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> object:
        """Upload a folder's files as one commit."""
        ...


def save_pretrained(
    model: nn.Module, folder: str | Path, card: Card, *, metrics: Mapping[str, float] | None = None
) -> None:
    """Write the folder that the hub expects: config.json, model.safetensors (our own format), README.md.

    `metrics` (such as {"top1": 71.4}, percent) go to the README's front matter. Raises NotWritable, BadArgument.
    """
    folder = Path(folder)
    save_weights(model, folder / FILE, card)
    num_features = model.state_dict()[CLASSIFIER[0]].shape[1] if card.num_classes else 0
    write_text(folder / CONFIG, json.dumps(hub_config(card, num_features), indent=2) + "\n")
    write_text(folder / "README.md", hub_readme(card, metrics or {}))


def from_pretrained(folder_or_id: str | Path) -> tuple[nn.Module, Card]:
    """Load a network and its card as `load_model` does, under the name that users of the hub know."""
    return load_model(folder_or_id)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    card: Card,
    *,
    metrics: Mapping[str, float] | None = None,
    private: bool = False,
    api: HubApi | None = None,
) -> str:
    """Upload a network to the Hugging Face hub as `save_pretrained` writes it, and give its address.

    Without an `api` it is huggingface_hub's, with the token of `hf auth login`. Raises BadArgument for an id that
    is none, or that the hub refuses, and NetworkFailed where the hub cannot be reached.
    """
    if re.fullmatch(HUB_ID, repo_id) is None:
        raise BadArgument(f"{repo_id!r} is no id of the hub: give owner/name")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = api or HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, card, metrics=metrics)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"{card.model} from onefold {card.version}"
            )
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            raise BadArgument(f"the hub refused {repo_id} ({_in_one_line(error)}): check `hf auth login`") from error
        except Exception as error:  # the network raises errors of whatever package the hub's client uses for it
            raise NetworkFailed(
                f"the Hugging Face hub cannot be reached to push {repo_id} ({type(error).__name__}: "
                f"{_in_one_line(error)}): check the network and HF_HUB_OFFLINE"
            ) from error
    return f"https://huggingface.co/{repo_id}"
