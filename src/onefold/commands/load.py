"""`load_model`: a network and its card, of a run folder, a file of weights, an id of the hub, timm:NAME or artifact."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from onefold.commands.open_network import open_network
from onefold.commands.predictor import Source, is_timm, resolve_weights_file
from onefold.commands.timm_networks import stored_timm_name
from onefold.errors import BadArgument
from onefold.models.load_model import Card
from onefold.models.load_model import load_model as load_weights_file
from onefold.runtimes import Artifact, Session, exporter
from onefold.runtimes.artifact import is_artifact


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
    return load_weights_file(
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
