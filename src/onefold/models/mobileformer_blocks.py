"""The blocks of Mobile-Former: the bridges between its streams, the Former, the inverted bottlenecks.

A block is described by a row of the paper's specification tables; `create_block` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from onefold.models.layers import DynamicReLU, conv_norm, hard_sigmoid
from onefold.reparam import conv_act

Streams = tuple[Tensor, Tensor]
"""The map (B, C, H, W) and the tokens (B, T, D)."""

# ------------------------------------------------------------------------- bridges, and the Former

_BRIDGE_HEADS = 2
_FORMER_HEADS = 4
_FFN_EXPANSION = 2  # where a transformer has 4


def _split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) -> (B, N, T, C/N)."""
    return tokens.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor) -> Tensor:
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
        pixels = x.flatten(2).unflatten(1, (_BRIDGE_HEADS, -1))  # (B, N, C/N, P)
        gathered = _attend(_split_heads(self.query(tokens), _BRIDGE_HEADS), pixels)
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
        hidden = _FFN_EXPANSION * token_dim
        self.ffn = nn.Sequential(nn.Linear(token_dim, hidden), nn.GELU(), nn.Linear(hidden, token_dim))
        self.ffn_norm = nn.LayerNorm(token_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        keys = _split_heads(tokens, _FORMER_HEADS).transpose(2, 3)  # (B, N, D/N, T)
        gathered = _attend(_split_heads(self.query(tokens), _FORMER_HEADS), keys)
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
        pixels = x.flatten(2).unflatten(1, (_BRIDGE_HEADS, -1))  # (B, N, C/N, P)
        keys, values = (_split_heads(f(tokens), _BRIDGE_HEADS) for f in (self.key, self.value))  # (B, N, T, C/N)
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


def channel_shuffle(channel_groups: int, conv_groups: int) -> nn.Module:
    """A shuffle of `channel_groups` groups where the pointwise convolutions are grouped, else nothing."""
    return ChannelShuffle(channel_groups) if conv_groups > 1 else nn.Identity()


@dataclass(frozen=True)
class LiteRow:
    """A row: a depthwise 3x3 to `hidden` channels, a pointwise 1x1 to `out`, and no tokens. "Bneck-lite"."""

    hidden: int
    out: int
    stride: int


@dataclass(frozen=True)
class DownsampleRow:
    """A row: stride 2, by way of `hidden` to `out` channels, then by way of `second` back to `out`."""

    hidden: int
    second: int
    out: int
    stride: ClassVar[int] = 2


@dataclass(frozen=True)
class StrideOneRow:
    """A row: stride 1, by way of `hidden` to `out` channels."""

    hidden: int
    out: int
    stride: ClassVar[int] = 1


BlockRow = LiteRow | DownsampleRow | StrideOneRow


class LiteBlock(nn.Module):
    """Depthwise and pointwise convolution of the map, with a skip where shapes allow; tokens pass by."""

    def __init__(self, c_in: int, row: LiteRow, groups: int) -> None:
        super().__init__()
        self.depthwise = conv_norm(c_in, row.hidden, 3, row.stride, groups=c_in)
        self.act = nn.ReLU6()
        self.shuffle = channel_shuffle(c_in, groups)
        self.pointwise = conv_norm(row.hidden, row.out, 1, groups=groups)
        self.skips = row.stride == 1 and c_in == row.out

    def forward(self, state: Streams) -> Streams:
        """(map, tokens) -> (map, tokens)."""
        x, tokens = state
        y = self.pointwise(self.shuffle(conv_act(self.depthwise, self.act, x)))
        return (x + y if self.skips else y), tokens


class Inverted(nn.Module):
    """An inverted bottleneck of stride 1 with a skip where widths allow: expand, depthwise, project."""

    def __init__(self, c_in: int, row: StrideOneRow, token_dim: int, groups: int) -> None:
        super().__init__()
        self.expand = conv_norm(c_in, row.hidden, 1, groups=groups)
        self.act1 = DynamicReLU(row.hidden, token_dim)
        self.depthwise = conv_norm(row.hidden, row.hidden, 3, groups=row.hidden)
        self.act2 = DynamicReLU(row.hidden, token_dim)
        self.project = conv_norm(row.hidden, row.out, 1, groups=groups)
        self.shuffle = channel_shuffle(groups, groups)
        self.skips = c_in == row.out

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """(B, C, H, W) and its first token (B, D) -> (B, C', H, W)."""
        y = self.act1(self.shuffle(self.expand(x)), token)
        y = self.act2(self.depthwise(y), token)
        y = self.shuffle(self.project(y))
        return x + y if self.skips else y


class InvertedDown(nn.Module):
    """Two bottlenecks that expand in their depthwise convolution: one of stride 2, then one with a skip."""

    def __init__(self, c_in: int, row: DownsampleRow, token_dim: int, groups: int) -> None:
        super().__init__()
        self.depthwise1 = conv_norm(c_in, row.hidden, 3, row.stride, groups=c_in)
        self.shuffle1 = channel_shuffle(c_in, groups)
        self.act1 = DynamicReLU(row.hidden, token_dim)
        self.project1 = conv_norm(row.hidden, row.out, 1, groups=groups)
        self.depthwise2 = conv_norm(row.out, row.second, 3, groups=row.out)
        self.shuffle2 = channel_shuffle(row.out, groups)
        self.act2 = DynamicReLU(row.second, token_dim)
        self.project2 = conv_norm(row.second, row.out, 1, groups=groups)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """(B, C, H, W) and its first token (B, D) -> (B, C', ceil(H/2), ceil(W/2))."""
        x = self.project1(self.act1(self.shuffle1(self.depthwise1(x)), token))
        return x + self.project2(self.act2(self.shuffle2(self.depthwise2(x)), token))


class Block(nn.Module):
    """Mobile -> Former, Former, Mobile, Mobile <- Former. The first of the new tokens controls the activations."""

    def __init__(self, c_in: int, row: DownsampleRow | StrideOneRow, token_dim: int, groups: int) -> None:
        super().__init__()
        self.to_former = MobileToFormer(c_in, token_dim)
        self.former = Former(token_dim)
        self.mobile: nn.Module
        if isinstance(row, DownsampleRow):
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


def create_block(c_in: int, row: BlockRow, token_dim: int, groups: int) -> nn.Module:
    """What a row describes, on `c_in` channels and with pointwise convolutions of so many groups."""
    return LiteBlock(c_in, row, groups) if isinstance(row, LiteRow) else Block(c_in, row, token_dim, groups)
