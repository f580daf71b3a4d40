"""The networks: `create_model` makes one by its name in the catalogue, from random initialization or with weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from onefold.errors import BadArgument
from onefold.models.catalogue import CATALOGUE as CATALOGUE
from onefold.models.catalogue import build_model
from onefold.models.catalogue import list_models as list_models
from onefold.models.catalogue import resolve_name as resolve_name
from onefold.models.flops import ModelCost as ModelCost
from onefold.models.flops import count_flops as count_flops
from onefold.models.layers import Classifier as Classifier
from onefold.models.layers import FeatureNet as FeatureNet
from onefold.models.pretrained import load_weights_


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
