"""Loading what a user names: `load_model` a network and its card, `load` an artifact, `open_source` either, to predict.

A source is a run folder, a file of weights, an id of the hub, `timm:NAME` or an exported artifact, as text or a path;
what the verbs return (a run, fused weights, an artifact) is a path too.
"""

from __future__ import annotations

import difflib
import inspect
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from onefold.commands.open_network import (
    Predictor,
    open_network,
    open_predictor,
    resolve_weights_file,
    with_class_names,
)
from onefold.commands.timm_networks import is_timm, stored_timm_name
from onefold.data import Preprocessing
from onefold.data.image_inputs import prepare_images
from onefold.errors import BadArgument
from onefold.models import pretrained
from onefold.models.pretrained import Card
from onefold.runtimes import Artifact, Session, exporter
from onefold.runtimes.artifact import is_artifact

Source = str | os.PathLike[str]
_Verb = TypeVar("_Verb", bound=Callable[..., Any])


def suggest_argument_names(function: _Verb) -> _Verb:
    """Let a verb that is called with an argument that it does not have say by TypeError which one may be meant."""
    known = list(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
                raise TypeError(f"{function.__name__}() has no argument {name!r}: {hint}")
        return function(*args, **given)

    return checked  # type: ignore[return-value]


class SavedResult(os.PathLike[str]):
    """What a verb has written - a run, fused weights, an artifact: a path, which is opened once and then kept open."""

    @abstractmethod
    def __fspath__(self) -> str:
        """Give where it lies, as the verbs take it."""

    @cached_property
    def _predictors(self) -> dict[object, Predictor]:
        return {}


def load(artifact: Artifact | Source, *, threads: int = 1) -> Session:
    """Load an artifact on this machine, once every file and its logits for the reference images are checked.

    The session gives logits (B, classes) float32 of PIL images, uint8 arrays (H, W, 3), tensors (3, H, W) and lists of
    them, which it prepares as the artifact says; float32 (B, C, H, W) are taken as prepared. Raises BadArtifact where
    anything is not as it was when exported, MissingExtra where the runtime is not installed, BadArgument where this
    machine cannot run it.

        with onefold.load("artifacts/onnx-fp32", threads=2) as session:
            logits = session(image)
    """
    session = exporter.load(artifact if isinstance(artifact, Artifact) else Path(artifact), threads=threads)
    session.prepare = partial(prepare_images, preprocessing=Preprocessing.from_dict(session.artifact.preprocessing))
    return session


def load_model(
    source: Source,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    quiet: bool = False,
) -> tuple[nn.Module, Card]:
    """Load a network, in eval mode, and its card from a run folder, a file, an id of the hub, or `timm:NAME`.

    The network takes images (B, C, H, W) float32, prepared as `card.preprocessing` says, and gives logits (B, N).
    The name is taken from the card, or guessed from the tensors' shapes; `name` is needed where neither is enough.
    Fused weights give the fused network. For another `num_classes` than the weights' the classifier has a random
    initialization, and the card says so; for other `in_chans` the stem is adapted. What is assumed is logged unless
    `quiet`. An artifact gives a module without parameters, which its runtime computes: see `load`. Raises
    BadCheckpoint, BadArgument.

        model, card = onefold.load_model("runs/photos-finetune")
    """
    path = os.fspath(source)
    if is_artifact(Path(path)):
        _refuse_changes(path, num_classes, in_chans)
        session = exporter.load(Path(path))
        return SessionModule(session), _card_of(session.artifact)
    if is_timm(path) or is_timm(name or "") or stored_timm_name(resolve_weights_file(path)) is not None:
        _refuse_changes(path, num_classes, in_chans)
        network = open_network(path, name=name)
        return network.model, network.card
    return pretrained.load_model(
        resolve_weights_file(path), name=name, num_classes=num_classes, in_chans=in_chans, quiet=quiet
    )


def _refuse_changes(path: str, num_classes: int | None, in_chans: int | None) -> None:
    if num_classes is not None or in_chans is not None:
        raise BadArgument(
            f"{path} is loaded as it is: num_classes and in_chans are for the weights of onefold's networks"
        )


class SessionModule(nn.Module):
    """An artifact as a module: images (B, C, H, W) to logits (B, N) on the CPU, without parameters or gradients."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the logits in the artifact's runtime."""
        return torch.from_numpy(self.session(images.detach().cpu().float().numpy()))


def _card_of(artifact: Artifact) -> Card:
    """Give what an artifact's manifest says as the card of its weights."""
    return Card(
        model=artifact.model,
        num_classes=0 if artifact.details.get("features") is True else artifact.num_classes,
        in_chans=artifact.input_shape[0],
        classes=artifact.classes,
        preprocessing=artifact.preprocessing,
        fused=artifact.fused,
        drift=artifact.drift,
        licence=artifact.licence or "",
        source=artifact.source or "",
        untrained=artifact.details.get("untrained") is True,
    )


def select_ema_weights(source: Source, use_ema: bool | None) -> str:
    """Give the source with the choice that `use_ema` states among its weights, as FILE:averaged or FILE:plain."""
    path = os.fspath(source)
    return path if use_ema is None else f"{path}:{'averaged' if use_ema else 'plain'}"


@contextmanager
def open_source(
    source: Source | Predictor,
    *,
    model: str | None = None,
    use_ema: bool | None = None,
    classes: Source | None = None,
    img_size: int | None = None,
    threads: int = 1,
) -> Iterator[Predictor]:
    """Open a source for inference as the options of the verbs say; a predictor, and a `SavedResult`, stay open."""
    if isinstance(source, Predictor):
        yield source
        return
    key = model, use_ema, classes, img_size, threads
    kept = source._predictors if isinstance(source, SavedResult) else {}
    if key not in kept:
        opened = open_predictor(select_ema_weights(source, use_ema), name=model, threads=threads, size=img_size)
        kept[key] = with_class_names(opened, None if classes is None else Path(classes))
    try:
        yield kept[key]
    finally:
        if not isinstance(source, SavedResult):
            kept[key].close()
