"""Mobile-Former: Bridging MobileNet and Transformer (arXiv 2108.05895, CVPR 2022).

Two streams side by side: a MobileNet of inverted bottlenecks and a transformer of at most six learned tokens, with
a bridge each way in every block. A block is, in this order: the tokens look at the map (`to_former`), then at each
other (`former`); the map passes its convolutions (`mobile`), whose activations the new first token tells; at last the
map looks at the new tokens (`to_mobile`). The state between stages is the pair (map, tokens): so is what
`forward_features` gives and `forward_head` takes. Any input size will do.

    stem.conv, .act, .tokens        3x3, stride 2; the tokens before they have seen anything
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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onefold.models.parts import Classifier, Feature, Head, State, conv_norm, init_
from onefold.models.twostream import Down, Keep, Lite, MobileToFormer, Row, Streams, block, shuffle
from onefold.reparam import Chain, rectified


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Tokens (number, width), width of the stem, stages, the head's two widths, dropout, groups of 1x1 convolutions."""

    tokens: tuple[int, int]
    stem: int
    stages: tuple[tuple[Row, ...], ...]
    head: tuple[int, int]
    dropout: float
    groups: int = 1


# The paper's specification tables, one line a stage, completed by the released code: the tables print only the first of
# a Down's two expansions. Dropout is that of the training commands published with the weights.
SMALL = (
    (Lite(24, 12, 2), Keep(36, 12)),
    (Down(72, 96, 24), Keep(72, 24)),
    (Down(144, 192, 48), Keep(192, 48), Keep(288, 64)),
    (Down(384, 384, 96), Keep(576, 96)),
)
VARIANTS = {
    "26m": Variant(tokens=(3, 128), stem=8, stages=SMALL, head=(576, 1024), dropout=0.1, groups=4),
    "52m": Variant(tokens=(3, 128), stem=8, stages=SMALL, head=(576, 1024), dropout=0.2),
    "96m": Variant(
        tokens=(4, 128),
        stem=12,
        stages=(
            (Lite(24, 12, 1),),
            (Down(72, 64, 16),),
            (Down(96, 128, 32), Keep(96, 32)),
            (Down(192, 256, 64), Keep(256, 64), Keep(384, 88)),
            (Down(528, 512, 128), Keep(768, 128)),
        ),
        head=(768, 1280),
        dropout=0.2,
    ),
    "151m": Variant(
        tokens=(6, 192),
        stem=12,
        stages=(
            (Lite(24, 12, 1),),
            (Down(72, 64, 16), Keep(48, 16)),
            (Down(96, 128, 32), Keep(96, 32)),
            (Down(192, 256, 64), Keep(256, 64), Keep(384, 88), Keep(528, 88)),
            (Down(528, 512, 128), Keep(768, 128), Keep(768, 128)),
        ),
        head=(768, 1280),
        dropout=0.2,
    ),
    "214m": Variant(
        tokens=(6, 192),
        stem=12,
        stages=(
            (Lite(24, 12, 1),),
            (Down(72, 80, 20), Keep(60, 20)),
            (Down(120, 160, 40), Keep(160, 40)),
            (Down(240, 320, 80), Keep(320, 80), Keep(480, 112), Keep(672, 112)),
            (Down(672, 640, 160), Keep(960, 160), Keep(960, 160)),
        ),
        head=(960, 1600),
        dropout=0.2,
    ),
    "294m": Variant(
        tokens=(6, 192),
        stem=16,
        stages=(
            (Lite(32, 16, 1),),
            (Down(96, 96, 24), Keep(96, 24)),
            (Down(144, 192, 48), Keep(192, 48)),
            (Down(288, 384, 96), Keep(384, 96), Keep(576, 128), Keep(768, 128)),
            (Down(768, 768, 192), Keep(1152, 192), Keep(1152, 192)),
        ),
        head=(1152, 1920),
        dropout=0.3,
    ),
    "508m": Variant(
        tokens=(6, 192),
        stem=24,
        stages=(
            (Lite(48, 24, 1),),
            (Down(144, 160, 40), Keep(120, 40)),
            (Down(240, 288, 72), Keep(216, 72)),
            (Down(432, 512, 128), Keep(512, 128), Keep(768, 176), Keep(1056, 176)),
            (Down(1056, 960, 240), Keep(1440, 240), Keep(1440, 240)),
        ),
        head=(1440, 1920),
        dropout=0.3,
    ),
}


class Stem(nn.Module):
    """Both streams begin: images pass one convolution, tokens are learned constants."""

    def __init__(self, in_chans: int, variant: Variant) -> None:
        super().__init__()
        self.conv = conv_norm(in_chans, variant.stem, 3, stride=2)
        self.act = nn.ReLU6()
        self.tokens = nn.Parameter(torch.randn(variant.tokens))

    def forward(self, x: Tensor) -> Streams:
        """Images (B, C, H, W) -> a map at half their size and, for each image, the same tokens."""
        return rectified(self.conv, self.act, x), self.tokens.expand(x.shape[0], -1, -1)


class TwoStreamHead(Head):
    """A last Mobile -> Former, the mean of the map beside the first token, two fully connected layers."""

    def __init__(self, channels: int, variant: Variant, num_classes: int) -> None:
        (_, token_dim), (width, num_features) = variant.tokens, variant.head
        super().__init__(num_features, num_classes)
        self.to_former = MobileToFormer(channels, token_dim)
        self.shuffle = shuffle(variant.groups, variant.groups)
        self.conv = conv_norm(channels, width, 1, groups=variant.groups)
        self.act = nn.ReLU6()
        self.fc1 = Chain(nn.Linear(width + token_dim, num_features), nn.BatchNorm1d(num_features))
        self.dropout = nn.Dropout(variant.dropout)

    def pool(self, state: State) -> Tensor:
        """(map, tokens) -> (B, num_features). Raises TypeError where the tokens are missing."""
        if isinstance(state, Tensor):
            raise TypeError(
                "the head of a Mobile-Former takes (map, tokens), as forward_features gives, not a map alone"
            )
        x, tokens = state
        first = self.to_former(x, tokens)[:, 0]
        mean = rectified(self.conv, self.act, self.shuffle(x)).mean((2, 3))
        both = torch.cat((F.hardswish(mean), first), dim=1)
        pooled: Tensor = self.dropout(F.hardswish(self.fc1(both)))
        return pooled


def mobileformer(variant: str, num_classes: int, in_chans: int) -> Classifier:
    """The training network of one of `VARIANTS`; `num_classes` 0 leaves the features that the last Linear sees."""
    spec = VARIANTS[variant]
    width, reduction = spec.stem, 2
    stages, features = nn.Sequential(), {2: Feature(width, 2, "stem")}
    for rows in spec.stages:
        blocks = nn.Sequential()
        for row in rows:
            blocks.append(block(width, row, spec.tokens[1], spec.groups))
            width, reduction = row.out, reduction * row.stride
        features[reduction] = Feature(width, reduction, f"stages.{len(stages)}")
        stages.append(blocks)
    net = Classifier(Stem(in_chans, spec), stages, TwoStreamHead(width, spec, num_classes), tuple(features.values()))
    init_(net)
    narrow_(net)
    return net


@torch.no_grad()
def narrow_(net: nn.Module) -> None:
    """Take grouped convolutions to N(0, 2 / (k k C_out)), the groups uncounted: as the released code starts them."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.div_(math.sqrt(module.groups))
