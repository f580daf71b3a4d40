"""Networks in and out of files, folders and the Hugging Face hub.

`load_model` reads whatever is there: a file of our own format, another project's checkpoint, a folder, an id of the
hub. `save_pretrained` writes the folder that the hub expects. Nothing that the hub sends is ever unpickled.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import nn

from onefold.errors import BadArgument, BadCheckpoint
from onefold.models.card import Card as Card
from onefold.models.card import read_card as read_card
from onefold.models.card import save_weights as save_weights
from onefold.models.find import CONFIG, FILE, HUB_ID, Found, classes_of, find, preprocessing_of, text_of
from onefold.models.modelcard import config_of, page_of
from onefold.models.safe_load import read
from onefold.models.weights import HEAD, Weights, fit_, seems, understand
from onefold.storage import write_text


def load_model(
    source: str | Path, *, name: str | None = None, num_classes: int | None = None
) -> tuple[nn.Module, Card]:
    """A network in eval mode and its card, from a file, a folder, or an id of the hub ("timm/mobileone_s0.apple_in1k").

    The model's name is taken from the card, or is told by the tensors' shapes; `name` is needed where neither can
    tell. Weights that are fused give the fused network. For another `num_classes` than the file's the classifier is
    fresh, and the card says so. Raises BadCheckpoint, BadArgument.
    """
    found, weights = _open(source)
    known = _name_of(weights, name)
    classes = weights.num_classes if num_classes is None else num_classes
    from onefold.models import create_model  # the catalogue imports this file when it loads weights

    fresh = create_model(known, num_classes=classes, in_chans=weights.in_chans)
    model = fit_(fresh, weights, known).eval()
    return model, _card(weights, found, known, model is not fresh, classes)


def load_weights_(model: nn.Module, source: str | Path, name: str) -> nn.Module:
    """Put weights into `model`, which is called `name`, and return the network that holds them.

    That is `model`, or its fused form where the weights are fused: see `weights.fit_`. Raises BadCheckpoint.
    """
    _, weights = _open(source)
    return fit_(model, weights, name)


def load_training_weights_(model: nn.Module, source: str | Path, name: str) -> None:
    """Put weights into a training network, in place. Raises BadCheckpoint for weights that are fused, or do not fit."""
    if load_weights_(model, source, name) is not model:
        raise BadCheckpoint(
            f"{source} holds fused weights, from which no training network can be had: give the unfused ones "
            "(Apple's are named *_unfused), or use create_model(weights=) for the fused network"
        )


# ------------------------------------------------------------------------------------ what they are


def _open(source: str | Path) -> tuple[Found, Weights]:
    """The weights that a path or an id stands for. Raises BadCheckpoint."""
    found = find(source)
    weights = understand(read(found.path), found.path)
    for word, expected in weights.layout.config.items():
        if found.config.get(word, expected) != expected:
            raise BadCheckpoint(
                f"{source} is a network with {word} {found.config[word]!r}, and of the {weights.layout.title} kind "
                f"only those with {expected!r} are known here"
            )
    return found, weights


def _name_of(weights: Weights, name: str | None) -> str:
    """The catalogue's name: the user's, else the card's, else what the shapes tell. Raises like load_model."""
    from onefold.models import list_models, resolve

    if name is not None:
        return resolve(name)
    if weights.card is not None:
        try:
            return resolve(weights.card.model)
        except BadArgument as error:
            raise BadCheckpoint(f"{weights.source} is of a model that this onefold does not have: {error}") from error
    base = seems(weights.tensors, weights.layout.family)
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


def _card(weights: Weights, found: Found, name: str, fused: bool, num_classes: int) -> Card:
    """The card that a file carries, or the one that can be written for it."""
    from onefold.models import CATALOGUE

    kept = num_classes == weights.num_classes
    source = found.source if kept else f"{found.source}, with a fresh classifier for {num_classes} classes"
    if weights.card is not None:
        card = weights.card
        return card if kept else replace(card, num_classes=num_classes, classes=None, source=source)
    return Card(
        model=name,
        num_classes=num_classes,
        in_chans=weights.in_chans,
        classes=(weights.classes or classes_of(found.config, num_classes)) if kept else None,
        preprocessing=dict(CATALOGUE[name].input) | preprocessing_of(found.config),
        fused=fused,
        licence=text_of(found.config, "pretrained_cfg", "license"),
        source=source,
    )


# ---------------------------------------------------------------------------- folders, and the hub


class Api(Protocol):
    """The two calls of huggingface_hub.HfApi that a push needs."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object:
        """Make the repository where there is none."""
        ...

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> object:
        """Send a folder's files as one commit."""
        ...


def save_pretrained(
    model: nn.Module, folder: str | Path, card: Card, *, metrics: Mapping[str, float] | None = None
) -> None:
    """Write the folder that the hub expects: config.json, model.safetensors (our own format), README.md.

    `metrics` (such as {"top1": 71.4}, percent) go to the README's front matter. Raises NotWritable, BadArgument.
    """
    folder = Path(folder)
    save_weights(model, folder / FILE, card)
    num_features = model.state_dict()[HEAD[0]].shape[1] if card.num_classes else 0
    write_text(folder / CONFIG, json.dumps(config_of(card, num_features), indent=2) + "\n")
    write_text(folder / "README.md", page_of(card, metrics or {}))


def from_pretrained(folder_or_id: str | Path) -> tuple[nn.Module, Card]:
    """`load_model`, under the name that the hub's users know."""
    return load_model(folder_or_id)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    card: Card,
    *,
    metrics: Mapping[str, float] | None = None,
    private: bool = False,
    api: Api | None = None,
) -> str:
    """Send a network to the Hugging Face hub as `save_pretrained` writes it; gives its address.

    Without an `api` it is huggingface_hub's, with the token of `hf auth login`. Raises BadArgument for an id that
    is none, and BadCheckpoint where the hub refuses.
    """
    if re.fullmatch(HUB_ID, repo_id) is None:
        raise BadArgument(f"{repo_id!r} is no id of the hub: give owner/name")
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, card, metrics=metrics)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"{card.model} from onefold {card.version}"
            )
        except Exception as error:  # no network, no token, no right: the hub's own zoo
            reason = " ".join(str(error).split())[:160]
            raise BadCheckpoint(
                f"the hub refused {repo_id} ({reason}): check the network and `hf auth login`"
            ) from error
    return f"https://huggingface.co/{repo_id}"
