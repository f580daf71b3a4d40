"""MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications (arXiv 1704.04861).

Depthwise 3x3 and pointwise 1x1 convolutions in turn, each with norm and activation. The paper leaves details open
in which every released set of weights differs from the next; those travel together as a `Flavour`.

    stem                    3x3, stride 2
    stages.<0..4>.<j>       layers: depthwise where j is even, pointwise where it is odd; a new stage where one strides
    <layer>.pad             SamePad where the flavour pads strided layers as TensorFlow does, else Identity
    <layer>.conv, .act      Chain of convolution and norm, the activation
    head.fc                 Linear, on the mean of the last map

Shapes: (B, 3, H, W) -> maps at H/2, H/4, H/8, H/16, H/32 -> (B, N).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from onefold.models.parts import Classifier, Feature, PooledHead, SamePad, init_
from onefold.reparam import Chain, rectified

Layers = tuple[tuple[int, int], ...]
"""Output channels and stride of each layer after the stem, at width 1."""

STEM = 32  # Table 1
MIN_WIDTH = 8  # TF-slim's mobilenet_v1.py: max(8, int(d * multiplier)); the paper's alpha has no floor

# Table 1. It prints stride 2 for the last 1024 too, with 7x7 in and out: a typo, the released networks have 1.
FULL: Layers = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# Table 5: without the five layers of 14 x 14 x 512.
SHALLOW: Layers = (*FULL[:6], *FULL[-2:])


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """What the paper leaves open: the activation, how strided layers pad, the norms' epsilon, the last dropout."""

    act: Callable[[], nn.Module] = nn.ReLU
    same_pad: bool = False
    eps: float = 1e-5
    dropout: float = 0.0


PAPER = Flavour()
TF = Flavour(act=nn.ReLU6, same_pad=True, eps=1e-3, dropout=0.001)  # TF-slim, Keras: dropout keeps .999
TIMM = Flavour(act=nn.ReLU6)
LEAKY = Flavour(act=partial(nn.LeakyReLU, 0.1))  # the public PyTorch weights of width 0.25


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Width multiplier, layers, flavour; `separable` False puts a dense 3x3 for each pair: Table 4's Conv MobileNet."""

    width: float = 1.0
    layers: Layers = FULL
    separable: bool = True
    flavour: Flavour = PAPER


class ConvUnit(nn.Module):
    """act(norm(conv(pad(x)))), k x k."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int, groups: int, flavour: Flavour) -> None:
        super().__init__()
        same = flavour.same_pad and stride > 1  # at stride 1 the two paddings are one
        padding = 0 if same else kernel_size // 2
        conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding, groups=groups, bias=False)
        self.pad = SamePad(kernel_size, stride) if same else nn.Identity()
        self.conv = Chain(conv, nn.BatchNorm2d(c_out, eps=flavour.eps))
        self.act = flavour.act()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return rectified(self.conv, self.act, self.pad(x))


def layer(c_in: int, c_out: int, stride: int, variant: Variant) -> list[ConvUnit]:
    """A depthwise and a pointwise convolution, or the dense one in their place."""
    if not variant.separable:
        return [ConvUnit(c_in, c_out, 3, stride, 1, variant.flavour)]
    depthwise = ConvUnit(c_in, c_in, 3, stride, c_in, variant.flavour)
    return [depthwise, ConvUnit(c_in, c_out, 1, 1, 1, variant.flavour)]


def mobilenetv1(variant: Variant, num_classes: int, in_chans: int) -> Classifier:
    """The training network of a variant; `num_classes` 0 leaves pooled features."""
    width = _scaled(STEM, variant)
    stem = ConvUnit(in_chans, width, 3, 2, 1, variant.flavour)
    groups: list[list[ConvUnit]] = [[]]
    features = [Feature(width, 2, "stem")]
    for base, stride in variant.layers:
        if stride > 1:
            groups.append([])
        c_in, width = width, _scaled(base, variant)
        groups[-1] += layer(c_in, width, stride, variant)
        features[len(groups) - 1 :] = [Feature(width, 1 << len(groups), f"stages.{len(groups) - 1}")]
    stages = nn.Sequential(*(nn.Sequential(*group) for group in groups))
    net = Classifier(stem, stages, PooledHead(width, num_classes, variant.flavour.dropout), features)
    init_(net)
    return net


def _scaled(base: int, variant: Variant) -> int:
    return max(MIN_WIDTH, int(base * variant.width))
