"""A plain network of 30 dense 3x3 convolutions for studies of what is between them: activations, gates, skips."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from onefold.models.layers import SqueezeExcite, conv_norm, hard_sigmoid, init_weights_

_STEM = 32
_STAGES = ((32, 7), (64, 8), (128, 8), (256, 6))  # channels and convolutions; the first of each has stride 2
_CLASSES = 1000
_SQUEEZE = 4


class PlainLayer(nn.Module):
    """A convolution with its norm, the activation, and where it is asked for a skip around both."""

    def __init__(self, c_in: int, c_out: int, stride: int, act: nn.Module, has_skip: bool) -> None:
        super().__init__()
        self.conv, self.act = conv_norm(c_in, c_out, 3, stride), act
        self.has_skip = has_skip and c_in == c_out and stride == 1

    def extra_repr(self) -> str:
        """Whether there is a skip, for the module's repr."""
        return f"has_skip={self.has_skip}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y: Tensor = self.act(self.conv(x))
        return x + y if self.has_skip else y


class PlainNetwork(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1000): the layers in series, the mean of the last map, one Linear."""

    def __init__(self, act: Callable[[int], nn.Module], has_skips: bool) -> None:
        super().__init__()
        layers, width = [PlainLayer(3, _STEM, 2, act(_STEM), False)], _STEM
        for channels, count in _STAGES:
            for place in range(count):
                layers.append(PlainLayer(width, channels, 1 + (place == 0), act(channels), has_skips))
                width = channels
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        logits: Tensor = self.fc(self.layers(x).mean((2, 3)))
        return logits


class _Coefficients(nn.Module):
    """From a map to numbers in (-1, 1) for each image: mean, two Linears, a hard sigmoid (arXiv 2003.10027)."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, channels // _SQUEEZE), nn.Linear(channels // _SQUEEZE, count)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, count)."""
        return 2 * hard_sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3)))))) - 1


class DynamicReLU(nn.Module):
    """max(a1 x + b1, a2 x + b2), with slopes and intercepts of the image: A shares them over channels, B does not.

    Slopes are 1 and 0 plus a number in (-1, 1), intercepts 0 plus one in (-0.5, 0.5): arXiv 2003.10027.
    """

    def __init__(self, channels: int, shares_channels: bool) -> None:
        super().__init__()
        self.coefficients = _Coefficients(channels, 4 if shares_channels else 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        a1, b1, a2, b2 = self.coefficients(x)[:, :, None, None].chunk(4, dim=1)
        return torch.maximum(x * (1 + a1) + 0.5 * b1, x * a2 + 0.5 * b2)


class DynamicShiftMax(nn.Module):
    """max over two sums of a channel and the one half the channels away, with factors of the image (MicroNet).

    The first sum has the factors 1 and 0, the second 0 and 0, each plus a number in (-1, 1): arXiv 2108.05894
    with two sums of two terms.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coefficients = _Coefficients(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        half = x.shape[1] // 2
        shifted = torch.cat((x[:, half:], x[:, :half]), dim=1)
        a, b, c, d = self.coefficients(x)[:, :, None, None].chunk(4, dim=1)
        return torch.maximum(x * (1 + a) + shifted * b, x * c + shifted * d)


class SqueezeExciteReLU(nn.Module):
    """A squeeze-excite gate, then ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn, self.act = SqueezeExcite(channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        y: Tensor = self.act(self.attn(x))
        return y


ACTIVATIONS: Mapping[str, Callable[[int], nn.Module]] = {
    "ReLU": lambda _: nn.ReLU(),
    "GELU": lambda _: nn.GELU(),
    "SE-ReLU": SqueezeExciteReLU,
    "SiLU": lambda _: nn.SiLU(),
    "hard-swish": lambda _: nn.Hardswish(),
    "Dynamic Shift-Max": DynamicShiftMax,
    "DynamicReLU-A": lambda channels: DynamicReLU(channels, shares_channels=True),
    "DynamicReLU-B": lambda channels: DynamicReLU(channels, shares_channels=False),
}


def plain_network(activation: str = "ReLU", *, has_skips: bool = False) -> PlainNetwork:
    """Build the network with one of `ACTIVATIONS`, and with skips where shapes allow if they are asked for."""
    net = PlainNetwork(ACTIVATIONS[activation], has_skips)
    init_weights_(net)
    return net
