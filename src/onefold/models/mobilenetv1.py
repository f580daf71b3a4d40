"""MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications (arXiv 1704.04861).

Depthwise 3x3 and pointwise 1x1 convolutions in turn, each with norm and activation. Released weights differ
in details that the paper leaves open; those are a `ImplementationDetails`.

    stem                    3x3, stride 2
    stages.<0..4>.<j>       layers: depthwise where j is even, pointwise where it is odd; a new stage where one strides
    <layer>.pad             SamePad where the flavour pads strided layers as TensorFlow does, else Identity
    <layer>.conv, .act      Chain of convolution and norm, the activation
    head.fc                 Linear, on the mean of the last map

Shapes: (B, 3, H, W) -> maps at H/2, H/4, H/8, H/16, H/32 -> (B, N).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from onefold.models.key_mapping import KeyLayout
from onefold.models.layers import Classifier, FeatureMap, PooledHead, SamePad, init_weights_
from onefold.reparam import Chain, conv_act

_Layers = tuple[tuple[int, int], ...]
"""Output channels and stride of each layer after the stem, at width 1."""

_STEM = 32  # Table 1
_MIN_WIDTH = 8  # TF-slim's mobilenet_v1.py: max(8, int(d * multiplier)); the paper's alpha has no floor

# Table 1. It prints stride 2 for the last 1024 too, with 7x7 in and out: a typo, the released networks have 1.
_FULL: _Layers = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# Table 5: without the five layers of 14 x 14 x 512.
SHALLOW_LAYERS: _Layers = (*_FULL[:6], *_FULL[-2:])


@dataclass(frozen=True, kw_only=True)
class ImplementationDetails:
    """What the paper leaves open: the activation, how strided layers pad, the norms' epsilon, the last dropout."""

    act: Callable[[], nn.Module] = nn.ReLU
    same_pad: bool = False
    eps: float = 1e-5
    dropout: float = 0.0


PAPER_DETAILS = ImplementationDetails()
TF_SLIM_DETAILS = ImplementationDetails(
    act=nn.ReLU6, same_pad=True, eps=1e-3, dropout=0.001
)  # TF-slim, Keras: dropout keeps .999
TIMM_DETAILS = ImplementationDetails(act=nn.ReLU6)
LEAKY_RELU_DETAILS = ImplementationDetails(act=partial(nn.LeakyReLU, 0.1))  # the public PyTorch weights of width 0.25


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Width multiplier, layers, flavour; `separable` False puts a dense 3x3 for each pair: Table 4's Conv MobileNet."""

    width: float = 1.0
    layers: _Layers = _FULL
    separable: bool = True
    flavour: ImplementationDetails = PAPER_DETAILS


class ConvUnit(nn.Module):
    """act(norm(conv(pad(x)))), k x k."""

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, stride: int, groups: int, flavour: ImplementationDetails
    ) -> None:
        super().__init__()
        same = flavour.same_pad and stride > 1  # at stride 1 the two paddings are one
        padding = 0 if same else kernel_size // 2
        conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding, groups=groups, bias=False)
        self.pad = SamePad(kernel_size, stride) if same else nn.Identity()
        self.conv = Chain(conv, nn.BatchNorm2d(c_out, eps=flavour.eps))
        self.act = flavour.act()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return conv_act(self.conv, self.act, self.pad(x))


def _layer(c_in: int, c_out: int, stride: int, variant: Variant) -> list[ConvUnit]:
    """A depthwise and a pointwise convolution, or the dense one in their place."""
    if not variant.separable:
        return [ConvUnit(c_in, c_out, 3, stride, 1, variant.flavour)]
    depthwise = ConvUnit(c_in, c_in, 3, stride, c_in, variant.flavour)
    return [depthwise, ConvUnit(c_in, c_out, 1, 1, 1, variant.flavour)]


def mobilenetv1(variant: Variant, num_classes: int, in_chans: int) -> Classifier:
    """The training network of a variant; `num_classes` 0 leaves pooled features."""
    width = _scaled(_STEM, variant)
    stem = ConvUnit(in_chans, width, 3, 2, 1, variant.flavour)
    groups: list[list[ConvUnit]] = [[]]
    features = [FeatureMap(width, 2, "stem")]
    for base, stride in variant.layers:
        if stride > 1:
            groups.append([])
        c_in, width = width, _scaled(base, variant)
        groups[-1] += _layer(c_in, width, stride, variant)
        features[len(groups) - 1 :] = [FeatureMap(width, 1 << len(groups), f"stages.{len(groups) - 1}")]
    stages = nn.Sequential(*(nn.Sequential(*group) for group in groups))
    net = Classifier(stem, stages, PooledHead(width, num_classes, variant.flavour.dropout), features)
    init_weights_(net)
    return net


def _scaled(base: int, variant: Variant) -> int:
    return max(_MIN_WIDTH, int(base * variant.width))


# --------------------------------------------------------------------------------- released weights
#
# How five projects name MobileNetV1: 27 convolutions in a row, their norms, and a classifier.
#
#     ours                            TF-slim's word
#     stem.conv.{0,1}                 MobilenetV1/Conv2d_0[/BatchNorm]
#     stages.<s>.<2i>.conv.{0,1}      MobilenetV1/Conv2d_<b>_depthwise[/BatchNorm]
#     stages.<s>.<2i + 1>.conv.{0,1}  MobilenetV1/Conv2d_<b>_pointwise[/BatchNorm]
#     head.fc                         MobilenetV1/Logits/Conv2d_1c_1x1
#
# Where the norms are folded in already, a convolution is <layer>.conv and has a bias.

_BLOCKS = (1, 2, 2, 6, 2)  # depthwise-pointwise pairs in each stage
_PLACES = tuple((s, i) for s, num in enumerate(_BLOCKS) for i in range(num))
_LAYER_NAMES = ("stem", *(f"stages.{s}.{2 * i + half}" for s, i in _PLACES for half in (0, 1)))

_TORCH_LEAVES = {
    name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}  # the words that end a key
_NORM_LEAVES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_SLIM_LEAVES = {"weights": "weight", "depthwise_weights": "weight", "biases": "bias"} | _NORM_LEAVES
_KERAS_LEAVES = {"kernel": "weight", "depthwise_kernel": "weight", "bias": "bias"} | _NORM_LEAVES

_DENSE_AXES, _DEPTHWISE_AXES = (3, 2, 0, 1), (2, 3, 0, 1)  # of (H, W, in, out), and of (H, W, channels, 1)


def _split_dotted(key: str) -> tuple[str, str]:
    """torch's key -> module and leaf."""
    module, _, leaf = key.rpartition(".")
    return module, leaf


def _split_slim(key: str) -> tuple[str, str]:
    """A TensorFlow variable's name -> scope and leaf."""
    scope, _, leaf = key.removesuffix(":0").rpartition("/")
    return scope, leaf


def _split_keras(key: str) -> tuple[str, str]:
    """A Keras file's path, which repeats the layer's name or has a model's before it -> layer and leaf."""
    *_, layer, leaf = ("", *key.removesuffix(":0").split("/"))
    return layer, leaf


@dataclass(frozen=True, kw_only=True)
class _KeyNames:
    """What one project calls the 27 convolutions and their norms, in order, and the classifier."""

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    head: str
    leaves: Mapping[str, str] = field(default_factory=lambda: _TORCH_LEAVES)
    split: Callable[[str], tuple[str, str]] = _split_dotted


def _pairs(*names: str) -> tuple[str, ...]:
    """Two names a block, with its number {b} from 1, or its stage {s} and number {i} in it, put in."""
    return tuple(name.format(b=b, s=s, i=i) for b, (s, i) in enumerate(_PLACES, 1) for name in names)


_SLIM_CONVS = tuple(
    f"MobilenetV1/{name}" for name in ("Conv2d_0", *_pairs("Conv2d_{b}_depthwise", "Conv2d_{b}_pointwise"))
)
_SLIM_KEYS = _KeyNames(
    convs=_SLIM_CONVS,
    norms=tuple(f"{name}/BatchNorm" for name in _SLIM_CONVS),
    head="MobilenetV1/Logits/Conv2d_1c_1x1",
    leaves=_SLIM_LEAVES,
    split=_split_slim,
)
_KERAS_KEYS = _KeyNames(
    convs=("conv1", *_pairs("conv_dw_{b}", "conv_pw_{b}")),
    norms=("conv1_bn", *_pairs("conv_dw_{b}_bn", "conv_pw_{b}_bn")),
    head="conv_preds",
    leaves=_KERAS_LEAVES,
    split=_split_keras,
)
_HF_LAYERS = ("conv_stem", *(f"layer.{i}" for i in range(26)))
_HF_KEYS = _KeyNames(
    convs=tuple(f"mobilenet_v1.{name}.convolution" for name in _HF_LAYERS),
    norms=tuple(f"mobilenet_v1.{name}.normalization" for name in _HF_LAYERS),
    head="classifier",
)
_TIMM_KEYS = _KeyNames(
    convs=("conv_stem", *_pairs("blocks.{s}.{i}.conv_dw", "blocks.{s}.{i}.conv_pw")),
    norms=("bn1", *_pairs("blocks.{s}.{i}.bn1", "blocks.{s}.{i}.bn2")),
    head="classifier",
)
_FEATURES_KEYS = _KeyNames(
    convs=tuple(f"features.{i}.conv" for i in range(27)),
    norms=tuple(f"features.{i}.bn" for i in range(27)),
    head="classifier",
)


def _rename(names: _KeyNames, keys: Collection[str]) -> dict[str, str]:
    """One project's keys -> {key: ours}; a layer without a norm is a folded one."""
    parts = {key: names.split(key) for key in keys}
    present = {module for module, _ in parts.values()}
    modules = {names.head: "head.fc"}
    for conv, norm, layer in zip(names.convs, names.norms, _LAYER_NAMES, strict=True):
        modules[conv] = f"{layer}.conv.0" if norm in present else f"{layer}.conv"
        modules[norm] = f"{layer}.conv.1"
    return {
        key: f"{modules[module]}.{names.leaves[leaf]}"
        for key, (module, leaf) in parts.items()
        if module in modules and leaf in names.leaves
    }


LAYOUTS = (
    KeyLayout(
        title="TF-slim MobileNetV1",
        family="mobilenetv1",
        signature=r"MobilenetV1/Conv2d_0/weights(:0)?",
        rename=partial(_rename, _SLIM_KEYS),
        # the optimizer's slots, averages, and ranges of quantization-aware training
        ignored=r"global_step|.*/(ExponentialMovingAverage|RMSProp(_1)?|Momentum)(:0)?$|.*_quant/",
        axes={"weights": _DENSE_AXES, "depthwise_weights": _DEPTHWISE_AXES},
        variant="tf",
        background=True,
    ),
    KeyLayout(
        title="Keras MobileNetV1",
        family="mobilenetv1",
        signature=r"(.*/)?conv_dw_1/depthwise_kernel(:0)?",
        rename=partial(_rename, _KERAS_KEYS),
        ignored=r"optimizer_weights/|(.*/)?(iteration|learning_rate)(:0)?$",
        axes={"kernel": _DENSE_AXES, "depthwise_kernel": _DEPTHWISE_AXES},
        variant="tf",
    ),
    KeyLayout(
        title="transformers MobileNetV1",
        family="mobilenetv1",
        signature=r"mobilenet_v1\.conv_stem\.convolution\.weight",
        rename=partial(_rename, _HF_KEYS),
        variant="tf",
        config={"tf_padding": True, "hidden_act": "relu6", "layer_norm_eps": 0.001},
        background=True,
    ),
    KeyLayout(
        title="timm MobileNetV1",
        family="mobilenetv1",
        signature=r"blocks\.0\.0\.conv_dw\.weight",
        rename=partial(_rename, _TIMM_KEYS),
        variant="timm",
    ),
    KeyLayout(
        title="plain MobileNetV1",
        family="mobilenetv1",
        signature=r"features\.0\.conv\.weight",
        rename=partial(_rename, _FEATURES_KEYS),
        variant=None,
    ),
)
