"""Our own format: one safetensors file that says what it holds, and that notices when it is no longer that.

The header's metadata has four texts:
    format        "pt", which other readers of safetensors expect
    onefold       the version of this format
    card          the `Card` as JSON, keys sorted
    card_sha256   of the card's text
and one more in files that `save_weights` wrote, where those of a run's `best/` have a manifest beside them:
    sha256        of the tensors, see `digest`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from onefold.errors import BadArgument, BadCheckpoint
from onefold.models.safe_load import Contents, read
from onefold.storage import replacing

FORMAT = "1"
MANIFEST = "manifest.json"  # of a run's sealed folder, which vouches for whole files


def _version() -> str:
    try:
        return version_of("onefold")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a file of weights is. Raises BadArgument where there are not as many classes named as counted."""

    model: str
    """Its name in the catalogue."""
    num_classes: int
    in_chans: int = 3
    classes: tuple[str, ...] | None = None
    """The names of the classes in the order of the logits; None where nobody wrote them down."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """How images are prepared: the keys of `Preprocessing`."""
    fused: bool = False
    drift: float | None = None
    """How far the fused network's answer lies from the training network's, relative; None where not measured."""
    recipe: str = ""
    version: str = field(default_factory=_version)
    """Of onefold, when this was written."""
    licence: str = ""
    source: str = ""
    """Where the weights are from, and what was changed on the way."""
    int8: Mapping[str, Any] | None = None
    """The parameters of quantization-aware training, as `quantize.QuantizationParams` writes them; None without it."""
    untrained: bool = False
    """Whether the weights were drawn and never trained: good for a latency, of unknown accuracy."""

    def __post_init__(self) -> None:
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise BadArgument(f"a card of {self.num_classes} classes cannot name {len(self.classes)}")

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values that JSON can write."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"preprocessing": dict(self.preprocessing)}

    def to_metadata(self) -> dict[str, str]:
        """The card as texts for a safetensors header. `save_weights` adds the tensors' sha256."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return {
            "format": "pt",
            "onefold": FORMAT,
            "card": text,
            "card_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Card:
        """The card that a header holds. Raises BadCheckpoint where it holds none, or not what it held when written."""
        if "onefold" not in metadata or "card" not in metadata:
            raise BadCheckpoint("this file carries no card of onefold: give the name of its model too")
        if metadata["onefold"] != FORMAT:
            raise BadCheckpoint(
                f"this file is of format {metadata['onefold'][:20]}, this onefold reads {FORMAT}: "
                "type `pip install --upgrade onefold`"
            )
        text = metadata["card"]
        if metadata.get("card_sha256") != hashlib.sha256(text.encode()).hexdigest():
            raise BadCheckpoint("the card in this file is not what was written: the file is damaged, get it again")
        try:
            return _card(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise BadCheckpoint(f"the card in this file cannot be read ({error})") from error


_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "num_classes": (int,),
    "in_chans": (int,),
    "classes": (list, type(None)),
    "preprocessing": (dict,),
    "fused": (bool,),
    "drift": (float, int, type(None)),
    "recipe": (str,),
    "version": (str,),
    "licence": (str,),
    "source": (str,),
    "int8": (dict, type(None)),
    "untrained": (bool,),
}


def _card(values: Any) -> Card:
    """A card from parsed JSON; what a later version added is left out. Raises ValueError, TypeError."""
    if not isinstance(values, dict):
        raise TypeError("it is not an object")
    known = {f.name: values[f.name] for f in fields(Card) if f.name in values}
    for name, value in known.items():
        if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
            raise TypeError(f"{name} is a {type(value).__name__}")
    if known.get("classes") is not None:
        if not all(isinstance(name, str) for name in known["classes"]):
            raise TypeError("classes are not all texts")
        known["classes"] = tuple(known["classes"])
    if "preprocessing" in known:  # JSON has no tuples
        told = known["preprocessing"].items()
        known["preprocessing"] = {word: tuple(value) if isinstance(value, list) else value for word, value in told}
    return Card(**known)


# ------------------------------------------------------------------------------------- in and out


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256, in hex, of tensors: for each name in sorted order its head, then its bytes, row-major, little-endian.

    A head is the UTF-8 text "<name> <dtype> <shape>" and a newline, such as "head.fc.weight float32 [10, 1024]".
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_weights(model: nn.Module, path: str | Path, card: Card) -> None:
    """Write a network's tensors and its card to one safetensors file, whole or not at all.

    Raises NotWritable, and BadArgument where the card counts other classes than the network has.
    """
    tensors = model.state_dict()
    rows = len(tensors["head.fc.weight"]) if "head.fc.weight" in tensors else 0
    if rows != card.num_classes:
        raise BadArgument(f"the card says {card.num_classes} classes and the model has {rows}: correct the card")
    write_weights(model, path, card)


def write_weights(model: nn.Module, path: str | Path, card: Card) -> None:
    """The same for any network, also one that is not of the catalogue: its card is taken at its word."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = save(tensors, card.to_metadata() | {"sha256": digest(tensors)})
    with replacing(Path(path)) as aside:
        aside.write_bytes(data)


def read_card(path: str | Path) -> Card:
    """The card of a file that `save_weights` wrote, its tensors verified. Raises BadCheckpoint."""
    path = Path(path)
    return verified(read(path), path)


def verified(contents: Contents, path: Path) -> Card:
    """The card of a file's contents, once the file was found to be what was written. Raises BadCheckpoint."""
    try:
        card = Card.from_metadata(contents.metadata)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    written = contents.metadata.get("sha256")
    whole = _is_as_sealed(path) if written is None else written == digest(contents.tensors)
    if not whole:
        raise BadCheckpoint(f"{path} is damaged: it is not what was written; get it again")
    return card


def _is_as_sealed(path: Path) -> bool:
    """Whether a file is the one that the manifest of its folder names; True where there is no manifest."""
    manifest = path.with_name(MANIFEST)
    try:
        if not manifest.exists():
            return True
        written = json.loads(manifest.read_text(encoding="utf-8"))["files"][path.name]["sha256"]
        return bool(written == hashlib.sha256(path.read_bytes()).hexdigest())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadCheckpoint(f"{manifest} does not vouch for {path.name}: it is damaged, get both again") from error


# ------------------------------------------------------------------------------- what the hub shows

# Licence identifiers that the hub knows, of those that weights of these families have.
_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0")


def config_of(card: Card, num_features: int) -> dict[str, Any]:
    """config.json: timm's keys, transformers' id2label, and under "onefold" the whole card."""
    told = card.preprocessing
    size = told.get("size", 224)
    pretrained: dict[str, Any] = {"input_size": [card.in_chans, size, size], "num_classes": card.num_classes}
    pretrained |= {word: told[word] for word in ("mean", "std", "crop_pct", "interpolation") if word in told}
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


def page_of(card: Card, metrics: Mapping[str, float]) -> str:
    """README.md: front matter in YAML (its texts quoted as JSON, which YAML reads), then a page for people."""
    return "\n".join([*_front_matter(card, metrics), "", *_page(card, metrics)]) + "\n"


def _front_matter(card: Card, metrics: Mapping[str, float]) -> list[str]:
    tags = ("image-classification", "onefold", card.model.partition("_")[0])
    lines = ["---", "library_name: onefold", "pipeline_tag: image-classification", *_licence(card.licence)]
    lines += ["tags:", *(f"- {_quoted(tag)}" for tag in tags)]
    if metrics:
        lines += ["metrics:", *(f"- {kind}" for kind in sorted({_kind(name) for name in metrics}))]
        lines += ["model-index:", f"- name: {_quoted(card.model)}", "  results:"]
        lines += ["  - task: {type: image-classification}", '    dataset: {name: "validation", type: custom}']
        lines += ["    metrics:", *(_metric(name, value) for name, value in metrics.items())]
    return [*lines, "---"]


def _metric(name: str, value: float) -> str:
    return f"    - {{type: {_kind(name)}, name: {_quoted(name)}, value: {value:.6g}}}"


def _kind(metric: str) -> str:
    """The hub's name for a metric."""
    return "accuracy" if metric.startswith("top") else _quoted(metric)


def _licence(licence: str) -> list[str]:
    if not licence:
        return []
    if licence.lower() in _LICENCES:
        return [f"license: {licence.lower()}"]
    return ["license: other", f"license_name: {_quoted(licence)}"]


def _quoted(text: str) -> str:
    return json.dumps(text)


def _page(card: Card, metrics: Mapping[str, float]) -> list[str]:
    rows = {
        "structure": "fused: one convolution a unit" if card.fused else "training network, not fused",
        "drift of the fused network": "" if card.drift is None else f"{card.drift:.1e}, relative",
        "classes": f"{card.num_classes}" + ("" if card.classes is not None else ", not named"),
        "input": ", ".join(f"{word} {value}" for word, value in card.preprocessing.items()),
        "recipe": card.recipe,
        "source": card.source,
        "licence": card.licence or "not stated",
        "written by": f"onefold {card.version}",
        **{name: f"{value:.6g}" for name, value in metrics.items()},
    }
    table = [f"| {_cell(word)} | {_cell(value)} |" for word, value in rows.items() if value]
    load = ["import onefold", "", 'model, card = onefold.from_pretrained("<owner>/<name>")']
    return [f"# {_cell(card.model)}", "", "| | |", "|---|---|", *table, "", "```python", *load, "```"]


def _cell(text: str) -> str:
    """A text that cannot leave its cell or its line, nor start a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
