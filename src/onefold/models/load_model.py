"""Networks in and out of files, folders and the Hugging Face hub.

`load_model` reads any of them: a file of our own format, another project's checkpoint, a folder, an id of the hub.
`save_pretrained` writes the folder that the hub expects. Nothing that the hub sends is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import nn

from onefold.errors import BadArgument, BadCheckpoint, NetworkFailed
from onefold.file_io import write_text
from onefold.models.catalogue import CATALOGUE, build_model, list_models, resolve_name
from onefold.models.checkpoint_metadata import (
    NUM_IMAGENET_CLASSES,
    adapt_preprocessing_to_channels,
    find_class_names,
    find_licence,
    find_preprocessing,
)
from onefold.models.layers import Classifier, FeatureNet
from onefold.models.load_weights import CLASSIFIER_KEYS, MappedWeights, copy_weights_, guess_model_name, read_weights
from onefold.models.locate_weights import (
    CONFIG_NAME,
    HUB_ID_PATTERN,
    WEIGHTS_NAME,
    LocatedWeights,
    locate_weights,
    one_line_error,
)
from onefold.models.weights_file import Card as Card
from onefold.models.weights_file import preprocessing_from_config, render_hub_config, render_hub_readme
from onefold.models.weights_file import read_card as read_card
from onefold.models.weights_file import save_weights as save_weights

_log = logging.getLogger("onefold")


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    weights: str | Path | None = None,
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> nn.Module:
    """A network by name, in train mode: (B, in_chans, H, W) -> logits (B, num_classes); 0 classes: pooled features.

    With `weights` (a file, or an id of the hub) it is the network that these weights fit, which may be a fused one.
    With `features_only` it gives a list of maps in place of logits: those at `out_indices` of its features, shallow
    to deep, all by default; what they are is its `feature_info`. There is no `pretrained`: weights are
    named, since their licences differ. Raises BadArgument, BadCheckpoint.

        model = onefold.create_model("mobileone_s0", num_classes=10)
        model(torch.randn(1, 3, 224, 224)).shape
    """
    if pretrained:
        released = CATALOGUE[resolve_name(name)].weights
        known = (
            f"weights={released!r}, of the Hugging Face hub, are released ones"
            if released
            else "none are known on the hub"
        )
        raise BadArgument(
            f"pretrained weights are named: create_model({name!r}, weights=...) takes a file, or an id of the hub; "
            f"for {resolve_name(name)} {known}"
        )
    if out_indices is not None and not features_only:
        raise BadArgument("out_indices chooses among feature maps: pass features_only=True with it")
    model: nn.Module = build_model(name, num_classes, in_chans)
    if weights is not None:
        model = load_weights_(model, weights, resolve_name(name))
    if not features_only:
        return model
    assert isinstance(model, Classifier)  # fused or not, these weights are of this network
    return FeatureNet(model, out_indices)


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
    others = [other for other in (base, *list_models(f"{base}.*")) if other != known and weights.variant is None]
    classes = weights.num_classes if num_classes is None else num_classes
    channels = weights.in_chans if in_chans is None else in_chans
    fresh = build_model(known, classes, channels)
    model = copy_weights_(fresh, weights, known, quiet=quiet).eval()
    card = _card(weights, file, known, model is not fresh, classes, quiet, others)
    if channels != weights.in_chans:
        card = replace(
            card, in_chans=channels, preprocessing=adapt_preprocessing_to_channels(card.preprocessing, channels)
        )
    return model, card


def read_weights_card(source: str | Path, *, name: str | None = None) -> Card:
    """Give the card that `load_model` would give, without making a network of it. Raises as `load_model` does."""
    file, weights = _open(source, quiet=True)
    return _card(weights, file, _model_name(weights, name), weights.is_fused, weights.num_classes, quiet=True)


def matching_model_names(source: str | Path, name: str | None) -> tuple[str, ...]:
    """Give the names in the catalogue that weights may be of, where they tell all but padding, activation and epsilon.

    `name` is the one that the user gave; it is among them. Empty where the weights tell it themselves.
    """
    _, weights = _open(source, quiet=True)
    if name is None or weights.variant is not None:
        return ()
    base = resolve_name(name).partition(".")[0]
    names = (base, *list_models(f"{base}.*"))
    return names if len(names) > 1 else ()


def load_weights_(model: nn.Module, source: str | Path, name: str) -> nn.Module:
    """Load weights into `model`, which is called `name`, and return the network that holds them.

    That is `model`, or its fused form where the weights are fused: see `load_weights.copy_weights_`.
    Raises BadCheckpoint.
    """
    _, weights = _open(source)
    return copy_weights_(model, weights, name)


# ---------------------------------------------------------------------------------- weights of a file


def _open(source: str | Path, *, quiet: bool = False) -> tuple[LocatedWeights, MappedWeights]:
    """The weights of a path or an id of the hub. Raises BadCheckpoint."""
    file = locate_weights(source)
    for note in () if quiet else file.notes:
        _log.info("%s", note)
    weights = read_weights(file.path, select=file.select, quiet=quiet)
    for key, expected in weights.layout.config.items():
        if file.config.get(key, expected) != expected:
            raise BadCheckpoint(
                f"{source} is a network with {key} {file.config[key]!r}, and of the {weights.layout.title} kind "
                f"only those with {expected!r} are known here"
            )
    return file, weights


def _model_name(weights: MappedWeights, name: str | None) -> str:
    """The name in the catalogue: the user's, else the card's, else a guess from shapes. Raises like load_model."""
    if name is not None:
        return resolve_name(name)
    if weights.card is not None:
        try:
            return resolve_name(weights.card.model)
        except BadArgument as error:
            raise BadCheckpoint(f"{weights.source} is of a model that this onefold does not have: {error}") from error
    base = guess_model_name(weights.tensors, weights.layout.family)
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


def _card(
    weights: MappedWeights,
    file: LocatedWeights,
    name: str,
    fused: bool,
    num_classes: int,
    quiet: bool = False,
    others: Sequence[str] = (),
) -> Card:
    """The card that a file carries, or else what is known of it as a card; `others` are names that it may have too."""
    kept = num_classes == weights.num_classes
    source = f"{file.source} ({weights.origin})" if weights.origin else file.source
    source = source if kept else f"{source}, with a randomly initialized classifier of {num_classes} classes"
    if weights.card is not None:
        card = weights.card
        return card if kept else replace(card, num_classes=num_classes, classes=None, source=source)
    default = CATALOGUE[name].input
    stated = preprocessing_from_config(file.config, default)
    stated = stated or preprocessing_from_config(find_preprocessing(weights.extras), default)
    remarks: list[str] = []
    classes = (weights.classes or find_class_names(file.config, num_classes, remarks)) if kept else None
    for remark in () if quiet else remarks:
        _log.info("the config beside %s: %s", file.source, remark)
    preprocessing = adapt_preprocessing_to_channels({**default, **stated}, weights.in_chans)
    if not quiet and len({**default, **stated}["mean"]) != weights.in_chans:
        kind = "grey images" if weights.in_chans == 1 else f"images of {weights.in_chans} channels"
        _log.info("%s is for %s: its mean and std are the averages of the colours'", file.source, kind)
    untold = ["its padding, activation and epsilon"] * bool(others)
    taken = {"size": f"{default['size']} pixels", "mean": f"mean {' '.join(map(str, default['mean']))}"}
    assumed = [key for key in taken if key not in stated]
    what = {"size": "the size of images", "mean": "the mean and std of images"}
    untold += ["how images are prepared"] if len(assumed) == len(taken) else [what[key] for key in assumed]
    if untold and not quiet:
        size = f" ({', '.join(taken[key] for key in assumed)})" if assumed else ""
        short = [*others[:1], *(f".{other.partition('.')[2]}" if "." in other else other for other in others[1:])]
        wrong = f"; if that is wrong: --model {', '.join(short)}" if others else ""
        if weights.num_classes == NUM_IMAGENET_CLASSES + 1 and others:
            wrong += f"; it has {NUM_IMAGENET_CLASSES + 1} classes, as TensorFlow's have"
        _log.info("%s does not tell %s: as %s%s%s", file.source, " or ".join(untold), name, size, wrong)
    return Card(
        model=name,
        num_classes=num_classes,
        in_chans=weights.in_chans,
        classes=classes,
        preprocessing=preprocessing,
        fused=fused,
        licence=file.licence or find_licence(weights.extras),
        source=source,
    )


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
    save_weights(model, folder / WEIGHTS_NAME, card)
    num_features = model.state_dict()[CLASSIFIER_KEYS[0]].shape[1] if card.num_classes else 0
    write_text(folder / CONFIG_NAME, json.dumps(render_hub_config(card, num_features), indent=2) + "\n")
    write_text(folder / "README.md", render_hub_readme(card, metrics or {}))


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
    if re.fullmatch(HUB_ID_PATTERN, repo_id) is None:
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
            raise BadArgument(f"the hub refused {repo_id} ({one_line_error(error)}): check `hf auth login`") from error
        except Exception as error:  # the network raises errors of whatever package the hub's client uses for it
            raise NetworkFailed(
                f"the Hugging Face hub cannot be reached to push {repo_id} ({type(error).__name__}: "
                f"{one_line_error(error)}): check the network and HF_HUB_OFFLINE"
            ) from error
    return f"https://huggingface.co/{repo_id}"
