"""The card of a network, and our own format of weights: one safetensors file with its card and checksums.

The metadata in the file's header has these texts:
    format        "pt", which other readers of safetensors expect
    onefold       the version of this format
    card          the `Card` as JSON, keys sorted
    card_sha256   of the card's text
    sha256        of the tensors (see `tensors_sha256`); older runs' `best/` have it in their manifest only, of the
    whole file
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from onefold.accuracy_intervals import wilson_interval
from onefold.checksums import MANIFEST, read_sealed_folder, sealed_safetensors
from onefold.config import check_fields
from onefold.errors import BadArgument, BadCheckpoint
from onefold.file_io import atomic_replace, parse_json
from onefold.models.safe_load import CheckpointContents, read_tensors

_log = logging.getLogger("onefold")

_FORMAT, _PT = "1", "pt"
_KEYS = {"format", "onefold", "card", "card_sha256", "sha256"}


def _version() -> str:
    try:
        return version_of("onefold")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a file of weights is. Raises BadArgument for a field of another type, or as many class names as classes."""

    model: str
    """Its name in the catalogue."""
    num_classes: int
    in_chans: int = 3
    classes: tuple[str, ...] | None = None
    """The names of the classes in the order of the logits; None where they are not known."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """How images are prepared: the keys of `Preprocessing`."""
    fused: bool = False
    drift: float | None = None
    """`drift` from the training network to the fused one; None where it was not measured."""
    recipe: str = ""
    version: str = field(default_factory=_version)
    """The version of onefold that wrote this."""
    licence: str = ""
    source: str = ""
    """Where the weights are from, and how they were changed since."""
    int8: Mapping[str, Any] | None = None
    """The parameters of quantization-aware training, as `quantize.ModelQParams` writes them; None without it."""
    trained_on: Mapping[str, Any] | None = None
    """Digests of the images that it was trained on, as `data.fingerprint.TrainedOn` writes them; None: not recorded."""
    untrained: bool = False
    """Whether the weights are a random initialization: good for measuring latency, of no accuracy."""

    def __post_init__(self) -> None:
        check_fields(self, "the card")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise BadArgument(f"a card of {self.num_classes} classes cannot name {len(self.classes)}")

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values that JSON can write."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"preprocessing": dict(self.preprocessing)}

    def to_metadata(self) -> dict[str, str]:
        """The card as texts for a safetensors header. `save_weights` adds the tensors' sha256."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return {
            "format": _PT,
            "onefold": _FORMAT,
            "card": text,
            "card_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Card:
        """Read the card in a header. Raises BadCheckpoint where there is none, or one that was changed since."""
        if not is_onefold_file(metadata):
            raise BadCheckpoint("this file carries no card of onefold: give the name of its model too")
        if "onefold" not in metadata or "card" not in metadata:
            raise BadCheckpoint("the header of this file is not what was written: the file is damaged, get it again")
        if metadata["onefold"] != _FORMAT:
            raise BadCheckpoint(
                f"this file is of format {metadata['onefold'][:20]}, this onefold reads {_FORMAT}: "
                "type `pip install --upgrade onefold`"
            )
        text = metadata["card"]
        intact = metadata.get("card_sha256") == hashlib.sha256(text.encode()).hexdigest()
        if not intact or metadata.get("format", _PT) != _PT or metadata.keys() - _KEYS:
            raise BadCheckpoint("the card in this file is not what was written: the file is damaged, get it again")
        try:
            values = parse_json(text)
            if not isinstance(values, dict):
                raise TypeError("it is not an object")
            known = {f.name: values[f.name] for f in fields(cls) if f.name in values}  # without later versions' fields
            if isinstance(known.get("classes"), list):  # JSON has no tuples
                known["classes"] = tuple(known["classes"])
            if isinstance(known.get("preprocessing"), dict):
                settings = known["preprocessing"].items()
                known["preprocessing"] = {key: tuple(v) if isinstance(v, list) else v for key, v in settings}
            return cls(**known)
        except (ValueError, TypeError) as error:
            raise BadCheckpoint(f"the card in this file cannot be read ({error})") from error


def is_onefold_file(metadata: Mapping[str, str]) -> bool:
    """Whether a file is of our own format, by its metadata; also one that lost one of our keys to damage."""
    return len({"onefold", "card", "card_sha256"} & metadata.keys()) > 1


# --------------------------------------------------------------------------- writing and reading


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The sha256, in hex, of tensors: for each name in sorted order a header, then its bytes, row-major, little-endian.

    The header is the UTF-8 text "<name> <dtype> <shape>" and a newline, such as "head.fc.weight float32 [10, 1024]".
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_weights(model: nn.Module, path: str | Path, card: Card) -> None:
    """Write a network's tensors and its card to one safetensors file, atomically.

    Raises NotWritable, and BadArgument where the card counts other classes than the network has.
    """
    tensors = model.state_dict()
    rows = len(tensors["head.fc.weight"]) if "head.fc.weight" in tensors else 0
    if rows != card.num_classes:
        raise BadArgument(f"the card says {card.num_classes} classes and the model has {rows}: correct the card")
    write_weights(model, path, card)


def write_weights(model: nn.Module, path: str | Path, card: Card) -> None:
    """Do the same for any network, also one that is not in the catalogue, without a check of its card."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = sealed_safetensors(save(tensors, card.to_metadata()))
    with atomic_replace(Path(path)) as aside:
        aside.write_bytes(data)


def read_card(path: str | Path) -> Card:
    """Read the card of a file that `save_weights` wrote, and verify its tensors. Raises BadCheckpoint."""
    path = Path(path)
    return verify_checksums(read_tensors(path), path)


def verify_checksums(contents: CheckpointContents, path: Path, *, quiet: bool = False) -> Card:
    """Give the card of a file's contents, after a check of its checksums. Raises BadCheckpoint.

    That a file has none of its tensors is logged unless it is `quiet`.
    """
    try:
        card = Card.from_metadata(contents.metadata)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    written = contents.metadata.get("sha256")
    if written is not None:
        intact = written == tensors_sha256(contents.tensors)
    elif (path.parent / MANIFEST).exists():  # of a run of an older version
        intact = path.name in read_sealed_folder(path.parent, only=[path.name])
    else:
        intact = True
        if not quiet:
            _log.warning("%s has no checksum of its tensors, as older versions wrote it: damage is not noticed", path)
    if not intact:
        raise BadCheckpoint(f"{path} is damaged: it is not what was written; get it again")
    return card


# ------------------------------------------------------------------------------ what the hub's files say


_OF_BYTES = 2.0  # what the mean and deviation of values 0 to 1 are below, also under a factor of their own
MMENGINE_PATTERN = re.compile(r"\b(?:data_preprocessor|img_norm_cfg)['\"]?\s*[=:]")
"""How mmengine's and older configurations name what normalizes images, in a text of Python."""
_MMENGINE_PART, _MMENGINE_PIPELINE = 2000, 4000  # characters that are looked at
_MAX_SIDE = 4096  # pixels; a forged size could ask for any amount of memory


def preprocessing_from_config(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `Preprocessing` that a config states, as far as their values are valid; what is not is logged.

    They are those of timm's pretrained_cfg (older files have its keys themselves), else of transformers'
    preprocessor_config.json, or mmengine's data_preprocessor. What none of them says is as in `default`.
    """
    timm = config.get("pretrained_cfg") or (config if {"input_size", "mean", "std"} & config.keys() else None)
    model = config.get("model")
    inner = model.get("data_preprocessor") if isinstance(model, Mapping) else None
    mmengine = config.get("data_preprocessor", config.get("img_norm_cfg", inner))
    if isinstance(timm, Mapping):
        stated = _of_timm(timm)
    else:
        stated = _of_transformers(config, default) if mmengine is None else _of_mmengine(mmengine)
    scaled = {key: stated[key] for key in ("mean", "std") if _is_valid(key, stated.get(key))}
    if len(scaled) == 2 and all(max(values) > _OF_BYTES for values in scaled.values()):
        _log.info("the weights' config states mean and std of values 0 to 255; here they are divided by 255")
        stated |= {key: [v / 255 for v in values] for key, values in scaled.items()}
    if config.get("do_flip_channel_order") is True:
        _log.info("the weights' config gives the channels in the order BGR; here they are RGB: its answers may differ")
    out: dict[str, Any] = {}
    for key, value in stated.items():
        if _is_valid(key, value):
            out[key] = tuple(float(v) for v in value) if key in ("mean", "std") else value
        else:
            _log.info(
                "the config beside the weights states %s %r, which is not known here: %r", key, value, default[key]
            )
    if out.get("crop_pct", 0) > 1:
        _log.info("the weights' config pads images (crop_pct %.4g); here they are not: 1.0", out["crop_pct"])
        out["crop_pct"] = 1.0
    return out


def _is_valid(key: str, value: object) -> bool:
    if key in ("mean", "std"):
        numbers = value if isinstance(value, (list, tuple)) else ()
        return len(numbers) > 0 and all(_is_number(v) and (v > 0 or key == "mean") for v in numbers)
    if key == "interpolation":
        return value in ("bilinear", "bicubic", "nearest")
    kinds, most = ((int, float), math.inf) if key == "crop_pct" else ((int,), _MAX_SIDE)
    return type(value) in kinds and _is_number(value) and 0 < float(str(value)) <= most


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _of_timm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's pretrained_cfg states."""
    keys = ("mean", "std", "crop_pct", "interpolation")
    stated = {key: settings[key] for key in keys if settings.get(key) is not None}
    size = settings.get("input_size")
    if settings.get("size") is not None:
        stated["size"] = settings["size"]
    if isinstance(size, (list, tuple)) and len(size) == 3:
        stated |= {"channels": size[0], "size": _side(list(size[1:]))}
    elif size is not None:
        stated["size"] = _side(list(size) if isinstance(size, tuple) else size)
    tell_crop_mode(settings.get("crop_mode"))
    return stated


def tell_crop_mode(mode: object) -> None:
    """Log where images were cropped otherwise than here, in timm's word for it: the middle square is taken."""
    how = {"squash": "resizes images without their aspect ratio", "border": "pads images to squares"}.get(str(mode))
    if how is not None or mode not in (None, "center"):
        _log.info("the weights' config %s; here the middle square is taken", how or f"states crop_mode {mode!r}")


def _of_transformers(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' preprocessor_config.json states; without one the image_size of config.json."""
    stated: dict[str, Any] = {}
    if config.get("image_size") is not None:
        stated["size"] = _side(config["image_size"])
    resized = _side(config.get("size")) if config.get("do_resize", True) else None
    cropped = _side(config.get("crop_size")) if config.get("do_center_crop", "crop_size" in config) else None
    if isinstance(cropped or resized, int):
        stated["size"] = cropped or resized
        if resized:
            stated["crop_pct"] = cropped / resized if cropped else 1.0
        if cropped is None and isinstance(config.get("size"), Mapping) and "height" in config["size"]:
            tell_crop_mode("squash")
    if config.get("crop_pct") is not None:
        stated["crop_pct"] = config["crop_pct"]
    if config.get("resample") is not None:
        stated["interpolation"] = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(
            config["resample"], config["resample"]
        )
    if "image_mean" in config or "do_normalize" in config or "rescale_factor" in config:
        # (v * factor - offset - mean) / std is (v / 255 - mean') / std' with these
        factor = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
        offset = 1.0 if config.get("rescale_offset") else 0.0
        normalized = config.get("do_normalize", True)
        mean = config.get("image_mean", default["mean"]) if normalized else [0.0]
        std = config.get("image_std", default["std"]) if normalized else [1.0]
        with suppress(TypeError, ZeroDivisionError):  # refused by name, as they stand
            mean, std = [(v + offset) / factor for v in mean], [v / factor for v in std]
        channels = len(default["mean"])
        stated |= {
            key: v * channels if isinstance(v, list) and len(v) == 1 else v for key, v in (("mean", mean), ("std", std))
        }
    return stated


def _of_mmengine(given: object) -> dict[str, Any]:
    """What mmengine's data_preprocessor states: as a mapping, or in the text of a whole configuration.

    A text is only searched: for the numbers of `mean` and `std`, and the sides of the test pipeline's resize and crop.
    """
    stated: dict[str, Any] = {}
    is_rgb: object = False
    if isinstance(given, Mapping):
        stated = {key: given[key] for key in ("mean", "std") if given.get(key) is not None}
        is_rgb = given.get("to_rgb") or given.get("bgr_to_rgb")
    elif isinstance(given, str):
        parts = [given[at.end() : at.end() + _MMENGINE_PART] for at in MMENGINE_PATTERN.finditer(given)]
        part = next((part for part in parts if re.search(r"\bmean\b", part)), "")
        for key in ("mean", "std"):
            numbers = re.search(rf"\b{key}['\"]?\s*[=:]\s*[\[(]([-+\d.eE,\s]+)[\])]", part)
            with suppress(ValueError):
                stated |= {key: [float(v) for v in numbers[1].split(",") if v.strip()]} if numbers else {}
        is_rgb = re.search(r"\b(?:bgr_)?to_rgb['\"]?\s*[=:]\s*True", part)
        pipeline = given[given.find("test_pipeline") :][:_MMENGINE_PIPELINE] if "test_pipeline" in given else ""
        steps = re.findall(r"dict\(((?:[^()]|\([^()]*\))*)\)", pipeline)
        sides = [
            next((int(side[1]) for step in steps if kind in step and (side := re.search(pattern, step))), None)
            for kind, pattern in (("Resize", r"\b(?:scale|size)=[\[(]?(\d+)"), ("CenterCrop", r"crop_size=[\[(]?(\d+)"))
        ]
        resized, cropped = sides
        if cropped or resized:
            stated |= {"size": cropped or resized, "crop_pct": cropped / resized if cropped and resized else 1.0}
    if stated and not is_rgb:
        _log.info("the weights' config gives the channels in the order BGR; here they are RGB: its answers may differ")
    return stated


def _side(size: object) -> Any:
    """The side in pixels of the ways to state a size, of two the last, which is said; what is none as it stands."""
    if isinstance(size, Mapping):
        size = size["shortest_edge"] if "shortest_edge" in size else [size.get("width"), size.get("height", size)]
    if isinstance(size, list) and len(size) == 2 and None not in size and size[0] != size[1]:
        text = "the weights' config states images of %r by %r pixels; here they are squares of %r"
        _log.info(text, *size, size[-1])
    return size[-1] if isinstance(size, list) and size else size


# ------------------------------------------------------------------------------- what the hub shows

# Licence identifiers that the hub knows, of those that weights of these families have.
_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0")


def render_hub_config(card: Card, num_features: int) -> dict[str, Any]:
    """The config.json of a network: timm's keys, transformers' id2label, and under "onefold" the whole card."""
    settings = card.preprocessing
    size = settings.get("size", 224)
    pretrained: dict[str, Any] = {"input_size": [card.in_chans, size, size], "num_classes": card.num_classes}
    pretrained |= {key: settings[key] for key in ("mean", "std", "crop_pct", "interpolation") if key in settings}
    config: dict[str, Any] = {
        "architecture": card.model,
        "library_name": "onefold",
        "num_classes": card.num_classes,
        "num_features": num_features,
        "pretrained_cfg": pretrained,
        "onefold": card.to_dict(),
    }
    if card.classes is not None:
        config["label_names"] = list(card.classes)
        config["id2label"] = {str(i): name for i, name in enumerate(card.classes)}
        config["label2id"] = {name: i for i, name in enumerate(card.classes)}
    return config


def render_hub_readme(card: Card, metrics: Mapping[str, float], num_images: int = 0) -> str:
    """The README.md of a network: front matter in YAML (texts quoted as JSON, which YAML reads), then the page.

    Metrics called top1 are in percent; where they are of `num_images` images, the page gives their 95 % intervals.
    """
    return "\n".join([*_front_matter(card, metrics), "", *_page(card, metrics, num_images)]) + "\n"


def _front_matter(card: Card, metrics: Mapping[str, float]) -> list[str]:
    tags = ("image-classification", "onefold", card.model.partition("_")[0])
    lines = ["---", "library_name: onefold", "pipeline_tag: image-classification"]
    if card.licence.lower() in _LICENCES:
        lines.append(f"license: {card.licence.lower()}")
    elif card.licence:
        lines += ["license: other", f"license_name: {json.dumps(card.licence)}"]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if metrics:
        types = {name: "accuracy" if name.startswith("top") else json.dumps(name) for name in metrics}  # the hub's
        lines += ["metrics:", *(f"- {kind}" for kind in sorted(set(types.values())))]
        lines += ["model-index:", f"- name: {json.dumps(card.model)}", "  results:"]
        lines += [
            "  - task: {type: image-classification}",
            '    dataset: {name: "validation", type: custom}',
            "    metrics:",
        ]
        for name, value in metrics.items():
            lines.append(f"    - {{type: {types[name]}, name: {json.dumps(name)}, value: {value:.6g}}}")
    return [*lines, "---"]


def _page(card: Card, metrics: Mapping[str, float], num_images: int) -> list[str]:
    rows = {
        "structure": "fused: one convolution a unit" if card.fused else "training network, not fused",
        "drift of the fused network": "" if card.drift is None else f"{card.drift:.1e}, relative",
        "classes": f"{card.num_classes}" + ("" if card.classes is not None else ", not named"),
        "input": ", ".join(f"{key} {value}" for key, value in card.preprocessing.items()),
        "recipe": card.recipe,
        "trained on": _num_trained_on(card),
        "source": card.source,
        "licence": card.licence or "not stated",
        "written by": f"onefold {card.version}",
        **{name: f"{value:.6g}" + _interval(name, value, num_images) for name, value in metrics.items()},
    }
    table = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items() if value]
    load = ["import onefold", "", 'model, card = onefold.from_pretrained("<owner>/<name>")']
    return [f"# {_cell(card.model)}", "", "| | |", "|---|---|", *table, "", "```python", *load, "```"]


def _interval(name: str, value: float, num_images: int) -> str:
    if not num_images or not name.startswith("top1"):
        return ""
    low, high = wilson_interval(value / 100 * num_images, num_images)
    return f" (95 % interval {low:.1f} to {high:.1f}, {num_images} images)"


def _num_trained_on(card: Card) -> str:
    records = (card.trained_on or {}).get("records")
    counts = [each["images"] for each in records if isinstance(each, dict)] if isinstance(records, list) else []
    return f"{' and '.join(map(str, counts))} images, known by their digests" if counts else ""


def _cell(text: str) -> str:
    """A text escaped for a cell of a Markdown table: it cannot end the cell or the line, nor start an HTML tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
