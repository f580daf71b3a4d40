"""What the hub shows of a network: config.json and the README, from its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onefold.models.card import Card

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
