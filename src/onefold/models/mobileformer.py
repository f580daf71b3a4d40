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
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onefold.models.key_mapping import Layout, by_module
from onefold.models.layers import Classifier, DynamicReLU, Feature, Head, State, conv_norm, hard_sigmoid, init_
from onefold.reparam import Chain, conv_act

Streams = tuple[Tensor, Tensor]
"""The map (B, C, H, W) and the tokens (B, T, D)."""

# ------------------------------------------------------------------------- bridges, and the Former

BRIDGE_HEADS = 2
FORMER_HEADS = 4
FFN_EXPANSION = 2  # where a transformer has 4


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) -> (B, N, T, C/N)."""
    return tokens.unflatten(2, (num_heads, -1)).transpose(1, 2)


def attend(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention where the keys are the values too: (B, N, T, c) and (B, N, c, P) -> (B, T, N c)."""
    scores = queries * queries.shape[-1] ** -0.5 @ keys
    values = scores.softmax(3) @ keys.transpose(2, 3)
    return values.transpose(1, 2).flatten(2)


class MobileToFormer(nn.Module):
    """Mobile -> Former: the tokens attend to the map, with a residual connection and a LayerNorm after it.

    The result of the attention is scaled by a gain for each channel in [0, 2], 2 hard_sigmoid of a Linear of the token.
    """

    def __init__(self, channels: int, token_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(token_dim, channels)
        self.gate = nn.Linear(token_dim, channels)
        self.project = nn.Linear(channels, token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The map (B, C, H, W) and the tokens (B, T, D) -> the new tokens (B, T, D)."""
        pixels = x.flatten(2).unflatten(1, (BRIDGE_HEADS, -1))  # (B, N, C/N, P)
        gathered = attend(split_heads(self.query(tokens), BRIDGE_HEADS), pixels)
        gain = 2 * hard_sigmoid(self.gate(tokens))
        new: Tensor = self.norm(tokens + self.project(gathered * gain))
        return new


class Former(nn.Module):
    """Tokens attend to tokens, then a feed-forward network; each adds to its input, and a norm comes after."""

    def __init__(self, token_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(token_dim, token_dim)
        self.project = nn.Linear(token_dim, token_dim)
        self.norm = nn.LayerNorm(token_dim)
        hidden = FFN_EXPANSION * token_dim
        self.ffn = nn.Sequential(nn.Linear(token_dim, hidden), nn.GELU(), nn.Linear(hidden, token_dim))
        self.ffn_norm = nn.LayerNorm(token_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        keys = split_heads(tokens, FORMER_HEADS).transpose(2, 3)  # (B, N, D/N, T)
        gathered = attend(split_heads(self.query(tokens), FORMER_HEADS), keys)
        tokens = self.norm(tokens + self.project(gathered))
        new: Tensor = self.ffn_norm(tokens + self.ffn(tokens))
        return new


class FormerToMobile(nn.Module):
    """Mobile <- Former: the pixels attend to the tokens, with a residual connection."""

    def __init__(self, channels: int, token_dim: int) -> None:
        super().__init__()
        self.key = nn.Linear(token_dim, channels)
        self.value = nn.Linear(token_dim, channels)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The map (B, C, H, W) and the tokens (B, T, D) -> the new map (B, C, H, W)."""
        pixels = x.flatten(2).unflatten(1, (BRIDGE_HEADS, -1))  # (B, N, C/N, P)
        keys, values = (split_heads(f(tokens), BRIDGE_HEADS) for f in (self.key, self.value))  # (B, N, T, C/N)
        # Scores stand tokens by pixels, so that neither the map nor the mixture has to be transposed.
        scores = keys * keys.shape[-1] ** -0.5 @ pixels
        mixture = values.transpose(2, 3) @ scores.softmax(2)  # (B, N, C/N, P)
        return x + mixture.reshape(x.shape)


# ------------------------------------------------------------- the Mobile stream: rows of the tables


class ChannelShuffle(nn.Module):
    """Reorders channels so that each group of the next convolution gets some of each of these groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def extra_repr(self) -> str:
        """The argument, for the module's repr."""
        return str(self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, channel i of group g now channel g of group i."""
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


def shuffle(channel_groups: int, conv_groups: int) -> nn.Module:
    """A shuffle of `channel_groups` groups where the pointwise convolutions are grouped, else nothing."""
    return ChannelShuffle(channel_groups) if conv_groups > 1 else nn.Identity()


@dataclass(frozen=True)
class Lite:
    """A row: a depthwise 3x3 to `hidden` channels, a pointwise 1x1 to `out`, and no tokens. "Bneck-lite"."""

    hidden: int
    out: int
    stride: int


@dataclass(frozen=True)
class Down:
    """A row: stride 2, by way of `hidden` to `out` channels, then by way of `second` back to `out`."""

    hidden: int
    second: int
    out: int
    stride: ClassVar[int] = 2


@dataclass(frozen=True)
class Keep:
    """A row: stride 1, by way of `hidden` to `out` channels."""

    hidden: int
    out: int
    stride: ClassVar[int] = 1


Row = Lite | Down | Keep


class LiteBlock(nn.Module):
    """Depthwise and pointwise convolution of the map, with a skip where shapes allow; tokens pass by."""

    def __init__(self, c_in: int, row: Lite, groups: int) -> None:
        super().__init__()
        self.depthwise = conv_norm(c_in, row.hidden, 3, row.stride, groups=c_in)
        self.act = nn.ReLU6()
        self.shuffle = shuffle(c_in, groups)
        self.pointwise = conv_norm(row.hidden, row.out, 1, groups=groups)
        self.skips = row.stride == 1 and c_in == row.out

    def forward(self, state: Streams) -> Streams:
        """(map, tokens) -> (map, tokens)."""
        x, tokens = state
        y = self.pointwise(self.shuffle(conv_act(self.depthwise, self.act, x)))
        return (x + y if self.skips else y), tokens


class Inverted(nn.Module):
    """An inverted bottleneck of stride 1 with a skip where widths allow: expand, depthwise, project."""

    def __init__(self, c_in: int, row: Keep, token_dim: int, groups: int) -> None:
        super().__init__()
        self.expand = conv_norm(c_in, row.hidden, 1, groups=groups)
        self.act1 = DynamicReLU(row.hidden, token_dim)
        self.depthwise = conv_norm(row.hidden, row.hidden, 3, groups=row.hidden)
        self.act2 = DynamicReLU(row.hidden, token_dim)
        self.project = conv_norm(row.hidden, row.out, 1, groups=groups)
        self.shuffle = shuffle(groups, groups)
        self.skips = c_in == row.out

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """(B, C, H, W) and its first token (B, D) -> (B, C', H, W)."""
        y = self.act1(self.shuffle(self.expand(x)), token)
        y = self.act2(self.depthwise(y), token)
        y = self.shuffle(self.project(y))
        return x + y if self.skips else y


class InvertedDown(nn.Module):
    """Two bottlenecks that expand in their depthwise convolution: one of stride 2, then one with a skip."""

    def __init__(self, c_in: int, row: Down, token_dim: int, groups: int) -> None:
        super().__init__()
        self.depthwise1 = conv_norm(c_in, row.hidden, 3, row.stride, groups=c_in)
        self.shuffle1 = shuffle(c_in, groups)
        self.act1 = DynamicReLU(row.hidden, token_dim)
        self.project1 = conv_norm(row.hidden, row.out, 1, groups=groups)
        self.depthwise2 = conv_norm(row.out, row.second, 3, groups=row.out)
        self.shuffle2 = shuffle(row.out, groups)
        self.act2 = DynamicReLU(row.second, token_dim)
        self.project2 = conv_norm(row.second, row.out, 1, groups=groups)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """(B, C, H, W) and its first token (B, D) -> (B, C', ceil(H/2), ceil(W/2))."""
        x = self.project1(self.act1(self.shuffle1(self.depthwise1(x)), token))
        return x + self.project2(self.act2(self.shuffle2(self.depthwise2(x)), token))


class Block(nn.Module):
    """Mobile -> Former, Former, Mobile, Mobile <- Former. The first of the new tokens controls the activations."""

    def __init__(self, c_in: int, row: Down | Keep, token_dim: int, groups: int) -> None:
        super().__init__()
        self.to_former = MobileToFormer(c_in, token_dim)
        self.former = Former(token_dim)
        self.mobile: nn.Module
        if isinstance(row, Down):
            self.mobile = InvertedDown(c_in, row, token_dim, groups)
        else:
            self.mobile = Inverted(c_in, row, token_dim, groups)
        self.to_mobile = FormerToMobile(row.out, token_dim)

    def forward(self, state: Streams) -> Streams:
        """(map, tokens) -> (map, tokens)."""
        x, tokens = state
        tokens = self.former(self.to_former(x, tokens))
        x = self.mobile(x, tokens[:, 0])
        return self.to_mobile(x, tokens), tokens


def block(c_in: int, row: Row, token_dim: int, groups: int) -> nn.Module:
    """What a row describes, on `c_in` channels and with pointwise convolutions of so many groups."""
    return LiteBlock(c_in, row, groups) if isinstance(row, Lite) else Block(c_in, row, token_dim, groups)


# ------------------------------------------------------------------------------------- the networks


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
        mean = conv_act(self.conv, self.act, self.shuffle(x)).mean((2, 3))
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
    scale_grouped_(net)
    return net


@torch.no_grad()
def scale_grouped_(net: nn.Module) -> None:
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

LITE_KEYS = {"conv.0": "depthwise.0", "conv.1": "depthwise.1", "conv.4": "pointwise.0", "conv.5": "pointwise.1"}
TO_FORMER_KEYS = {"alpha.0": "gate", "q": "query", "proj": "project", "layer_norm": "norm"}
FORMER_KEYS = {
    "q": "query",
    "channel_mlp": "project",
    "layer_norm": "norm",
    "ffn.0": "ffn.0",
    "ffn.2": "ffn.2",
    "ffn_norm": "ffn_norm",
}
TO_MOBILE_KEYS = {"k": "key", "proj": "value"}
KEEP_KEYS = {"conv1": "expand", "hyper1": "act1", "conv2": "depthwise", "hyper2": "act2", "conv3": "project"}
DOWN_KEYS = {
    "conv1": "depthwise1",
    "hyper1": "act1",
    "conv2": "project1",
    "conv3": "depthwise2",
    "hyper3": "act2",
    "conv4": "project2",
}
HEAD_KEYS = {
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
        _under(theirs, ours, LITE_KEYS)
        | _under(f"{theirs}.local_global", f"{ours}.to_former", TO_FORMER_KEYS)
        | _under(f"{theirs}.global_block", f"{ours}.former", FORMER_KEYS)
        | _under(f"{theirs}.global_local", f"{ours}.to_mobile", TO_MOBILE_KEYS)
        | _mobile_modules(theirs, f"{ours}.mobile", DOWN_KEYS if down else KEEP_KEYS)
    )


def _rename(keys: Collection[str]) -> dict[str, str]:
    """The released code's keys -> {key: ours}. A block of stride 2, known by its fourth convolution, begins a stage."""
    heads = {match[0] for key in keys if (match := re.match(r"features\.\d+\.conv4(?=\.)", key))}
    num_blocks = 1 + max(
        (int(match[1]) for key in keys if (match := re.match(r"features\.(\d{1,3})\.", key))), default=-1
    )
    modules = _under("stem", "stem.conv", {"0": "0", "1": "1"}) | _under(
        "local_global", "head.to_former", TO_FORMER_KEYS
    )
    modules |= HEAD_KEYS
    stage, place = 0, 0
    for n in range(num_blocks):
        down = f"features.{n}.conv4" in heads
        stage, place = (stage + 1, 0) if down and n else (stage, place)
        modules |= _block_modules(f"features.{n}", f"stages.{stage}.{place}", down)
        place += 1
    return by_module(keys, modules) | {key: "stem.tokens" for key in keys if key == "tokens.weight"}


LAYOUTS = (Layout(title="released Mobile-Former", family="mobileformer", signature=r"tokens\.weight", rename=_rename),)
