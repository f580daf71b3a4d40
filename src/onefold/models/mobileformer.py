"""Mobile-Former: Bridging MobileNet and Transformer (arXiv 2108.05895, CVPR 2022).

Two streams run side by side: a MobileNet of inverted bottlenecks, and a transformer of at most six learned tokens. In
every block the tokens attend to the map (`to_former`), then to each other (`former`); the map passes its convolutions
(`mobile`), whose activations are computed from the new first token; at last the map attends to the new tokens
(`to_mobile`). The state between stages is the pair (map, tokens): `forward_features` gives and `forward_head` takes
it. Any input size will do.

    stem.conv, .act, .tokens        3x3, stride 2; the learned initial tokens
    stages.<i>.<j>                  blocks; a new stage where one strides
    <lite block>                    .depthwise .act .shuffle .pointwise: no bridges; the first block of each network
    <block>.to_former               .query .gate .project .norm
    <block>.former                  .query .project .norm .ffn.{0,2} .ffn_norm
    <block>.mobile, stride 1        .expand .act1 .depthwise .act2 .project
    <block>.mobile, stride 2        .depthwise1 .act1 .project1 .depthwise2 .act2 .project2
    <block>.to_mobile               .key .value
    head                            .to_former .conv .act .fc1 .dropout .fc

Convolutions, and head.fc1, are chains with their norm: <name>.0 and <name>.1; act1 and act2 are DynamicReLU. The
released weights are the same tensors in the same shapes under other names, so a table of names is enough to load them:
their features.<n> is the n-th block of all stages, and within a block each part here is one part there.

Shapes: (B, 3, H, W) -> maps at H/2, H/4, H/8, H/16, H/32 with tokens (B, T, D) -> (B, N).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onefold.models.key_mapping import KeyLayout, rename_by_module
from onefold.models.layers import BlockState, Classifier, FeatureMap, Head, conv_norm, init_weights_
from onefold.models.mobileformer_blocks import (
    BlockRow,
    DownsampleRow,
    LiteRow,
    MobileToFormer,
    Streams,
    StrideOneRow,
    channel_shuffle,
    create_block,
)
from onefold.reparam import Chain, conv_act


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Tokens (number, width), width of the stem, stages, the head's two widths, dropout, groups of 1x1 convolutions."""

    tokens: tuple[int, int]
    stem: int
    stages: tuple[tuple[BlockRow, ...], ...]
    head: tuple[int, int]
    dropout: float
    groups: int = 1


# The paper's specification tables, one line a stage, completed by the released code: the tables print only the first of
# a Down's two expansions. Dropout is that of the training commands published with the weights.
_SMALL = (
    (LiteRow(24, 12, 2), StrideOneRow(36, 12)),
    (DownsampleRow(72, 96, 24), StrideOneRow(72, 24)),
    (DownsampleRow(144, 192, 48), StrideOneRow(192, 48), StrideOneRow(288, 64)),
    (DownsampleRow(384, 384, 96), StrideOneRow(576, 96)),
)
VARIANTS = {
    "26m": Variant(tokens=(3, 128), stem=8, stages=_SMALL, head=(576, 1024), dropout=0.1, groups=4),
    "52m": Variant(tokens=(3, 128), stem=8, stages=_SMALL, head=(576, 1024), dropout=0.2),
    "96m": Variant(
        tokens=(4, 128),
        stem=12,
        stages=(
            (LiteRow(24, 12, 1),),
            (DownsampleRow(72, 64, 16),),
            (DownsampleRow(96, 128, 32), StrideOneRow(96, 32)),
            (DownsampleRow(192, 256, 64), StrideOneRow(256, 64), StrideOneRow(384, 88)),
            (DownsampleRow(528, 512, 128), StrideOneRow(768, 128)),
        ),
        head=(768, 1280),
        dropout=0.2,
    ),
    "151m": Variant(
        tokens=(6, 192),
        stem=12,
        stages=(
            (LiteRow(24, 12, 1),),
            (DownsampleRow(72, 64, 16), StrideOneRow(48, 16)),
            (DownsampleRow(96, 128, 32), StrideOneRow(96, 32)),
            (DownsampleRow(192, 256, 64), StrideOneRow(256, 64), StrideOneRow(384, 88), StrideOneRow(528, 88)),
            (DownsampleRow(528, 512, 128), StrideOneRow(768, 128), StrideOneRow(768, 128)),
        ),
        head=(768, 1280),
        dropout=0.2,
    ),
    "214m": Variant(
        tokens=(6, 192),
        stem=12,
        stages=(
            (LiteRow(24, 12, 1),),
            (DownsampleRow(72, 80, 20), StrideOneRow(60, 20)),
            (DownsampleRow(120, 160, 40), StrideOneRow(160, 40)),
            (DownsampleRow(240, 320, 80), StrideOneRow(320, 80), StrideOneRow(480, 112), StrideOneRow(672, 112)),
            (DownsampleRow(672, 640, 160), StrideOneRow(960, 160), StrideOneRow(960, 160)),
        ),
        head=(960, 1600),
        dropout=0.2,
    ),
    "294m": Variant(
        tokens=(6, 192),
        stem=16,
        stages=(
            (LiteRow(32, 16, 1),),
            (DownsampleRow(96, 96, 24), StrideOneRow(96, 24)),
            (DownsampleRow(144, 192, 48), StrideOneRow(192, 48)),
            (DownsampleRow(288, 384, 96), StrideOneRow(384, 96), StrideOneRow(576, 128), StrideOneRow(768, 128)),
            (DownsampleRow(768, 768, 192), StrideOneRow(1152, 192), StrideOneRow(1152, 192)),
        ),
        head=(1152, 1920),
        dropout=0.3,
    ),
    "508m": Variant(
        tokens=(6, 192),
        stem=24,
        stages=(
            (LiteRow(48, 24, 1),),
            (DownsampleRow(144, 160, 40), StrideOneRow(120, 40)),
            (DownsampleRow(240, 288, 72), StrideOneRow(216, 72)),
            (DownsampleRow(432, 512, 128), StrideOneRow(512, 128), StrideOneRow(768, 176), StrideOneRow(1056, 176)),
            (DownsampleRow(1056, 960, 240), StrideOneRow(1440, 240), StrideOneRow(1440, 240)),
        ),
        head=(1440, 1920),
        dropout=0.3,
    ),
}


class Stem(nn.Module):
    """The start of both streams: one convolution of the images, and tokens that are learned constants."""

    def __init__(self, in_chans: int, variant: Variant) -> None:
        super().__init__()
        self.conv = conv_norm(in_chans, variant.stem, 3, stride=2)
        self.act = nn.ReLU6()
        self.tokens = nn.Parameter(torch.randn(variant.tokens))

    def forward(self, x: Tensor) -> Streams:
        """Images (B, C, H, W) -> a map at half their size and, for each image, the same tokens."""
        return conv_act(self.conv, self.act, x), self.tokens.expand(x.shape[0], -1, -1)


class TwoStreamHead(Head):
    """A last Mobile -> Former, the mean of the map beside the first token, two fully connected layers."""

    def __init__(self, channels: int, variant: Variant, num_classes: int) -> None:
        (_, token_dim), (width, num_features) = variant.tokens, variant.head
        super().__init__(num_features, num_classes)
        self.to_former = MobileToFormer(channels, token_dim)
        self.shuffle = channel_shuffle(variant.groups, variant.groups)
        self.conv = conv_norm(channels, width, 1, groups=variant.groups)
        self.act = nn.ReLU6()
        self.fc1 = Chain(nn.Linear(width + token_dim, num_features), nn.BatchNorm1d(num_features))
        self.dropout = nn.Dropout(variant.dropout)

    def pool(self, state: BlockState) -> Tensor:
        """(map, tokens) -> (B, num_features). Raises TypeError where the tokens are missing."""
        if isinstance(state, Tensor):
            raise TypeError(
                "the head of a Mobile-Former takes (map, tokens), as forward_features gives, not a map alone"
            )
        x, tokens = state
        first = self.to_former(x, tokens)[:, 0]
        mean = conv_act(self.conv, self.act, self.shuffle(x)).mean((2, 3))
        both = torch.cat((F.hardswish(mean), first), dim=1)
        pooled: Tensor = self.dropout(F.hardswish(self.fc1(both)))
        return pooled


def mobileformer(variant: str | Variant, num_classes: int, in_chans: int) -> Classifier:
    """The training network of a variant, or of one of `VARIANTS`; `num_classes` 0 leaves the last Linear's input."""
    spec = VARIANTS[variant] if isinstance(variant, str) else variant
    width, reduction = spec.stem, 2
    stages, features = nn.Sequential(), {2: FeatureMap(width, 2, "stem")}
    for rows in spec.stages:
        blocks = nn.Sequential()
        for row in rows:
            blocks.append(create_block(width, row, spec.tokens[1], spec.groups))
            width, reduction = row.out, reduction * row.stride
        features[reduction] = FeatureMap(width, reduction, f"stages.{len(stages)}")
        stages.append(blocks)
    net = Classifier(Stem(in_chans, spec), stages, TwoStreamHead(width, spec, num_classes), tuple(features.values()))
    init_weights_(net)
    _scale_grouped_(net)
    return net


@torch.no_grad()
def _scale_grouped_(net: nn.Module) -> None:
    """Initialize grouped convolutions by N(0, 2 / (k k C_out)), without regard to groups, as the released code does."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.div_(math.sqrt(module.groups))


# --------------------------------------------------------------------------------- released weights
#
# How the released code names Mobile-Former.
#
# ours                            theirs
# stem.conv.{0,1}, stem.tokens    stem.{0,1}, tokens.weight
# stages.<s>.<j>                  features.<n>, n counting the blocks of all stages through
# <lite block>                    .conv.{0,1,4,5}
# <block>.to_former, .former      .local_global, .global_block
# <block>.mobile, .to_mobile      .conv<1-4>.{0,1} and .hyper<1-3>.hyper.{0,2}, .global_local
# head.to_former, head.<...>      local_global, classifier.{conv,fc,classifier}

_LITE_KEYS = {"conv.0": "depthwise.0", "conv.1": "depthwise.1", "conv.4": "pointwise.0", "conv.5": "pointwise.1"}
_TO_FORMER_KEYS = {"alpha.0": "gate", "q": "query", "proj": "project", "layer_norm": "norm"}
_FORMER_KEYS = {
    "q": "query",
    "channel_mlp": "project",
    "layer_norm": "norm",
    "ffn.0": "ffn.0",
    "ffn.2": "ffn.2",
    "ffn_norm": "ffn_norm",
}
_TO_MOBILE_KEYS = {"k": "key", "proj": "value"}
_KEEP_KEYS = {"conv1": "expand", "hyper1": "act1", "conv2": "depthwise", "hyper2": "act2", "conv3": "project"}
_DOWN_KEYS = {
    "conv1": "depthwise1",
    "hyper1": "act1",
    "conv2": "project1",
    "conv3": "depthwise2",
    "hyper3": "act2",
    "conv4": "project2",
}
_HEAD_KEYS = {
    "classifier.conv.1": "head.conv.0",
    "classifier.conv.2": "head.conv.1",
    "classifier.fc.0": "head.fc1.0",
    "classifier.fc.1": "head.fc1.1",
    "classifier.classifier.1": "head.fc",
}


def _under(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{a}": f"{ours}.{b}" for a, b in table.items()}


def _mobile_modules(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    """Convolutions with their norms, and the two Linears of a dynamic activation."""
    modules: dict[str, str] = {}
    for a, b in table.items():
        leaves = {"hyper.0": "reduce", "hyper.2": "expand"} if a.startswith("hyper") else {"0": "0", "1": "1"}
        modules |= _under(f"{theirs}.{a}", f"{ours}.{b}", leaves)
    return modules


def _block_modules(theirs: str, ours: str, down: bool) -> dict[str, str]:
    return (
        _under(theirs, ours, _LITE_KEYS)
        | _under(f"{theirs}.local_global", f"{ours}.to_former", _TO_FORMER_KEYS)
        | _under(f"{theirs}.global_block", f"{ours}.former", _FORMER_KEYS)
        | _under(f"{theirs}.global_local", f"{ours}.to_mobile", _TO_MOBILE_KEYS)
        | _mobile_modules(theirs, f"{ours}.mobile", _DOWN_KEYS if down else _KEEP_KEYS)
    )


def _rename(keys: Collection[str]) -> dict[str, str]:
    """The released code's keys -> {key: ours}. A block of stride 2, known by its fourth convolution, begins a stage."""
    heads = {match[0] for key in keys if (match := re.match(r"features\.\d+\.conv4(?=\.)", key))}
    num_blocks = 1 + max(
        (int(match[1]) for key in keys if (match := re.match(r"features\.(\d{1,3})\.", key))), default=-1
    )
    modules = _under("stem", "stem.conv", {"0": "0", "1": "1"}) | _under(
        "local_global", "head.to_former", _TO_FORMER_KEYS
    )
    modules |= _HEAD_KEYS
    stage, place = 0, 0
    for n in range(num_blocks):
        down = f"features.{n}.conv4" in heads
        stage, place = (stage + 1, 0) if down and n else (stage, place)
        modules |= _block_modules(f"features.{n}", f"stages.{stage}.{place}", down)
        place += 1
    return rename_by_module(keys, modules) | {key: "stem.tokens" for key in keys if key == "tokens.weight"}


LAYOUTS = (
    KeyLayout(title="released Mobile-Former", family="mobileformer", signature=r"tokens\.weight", rename=_rename),
)
