"""How five projects name MobileNetV1: 27 convolutions in a row, their norms, and a classifier.

    ours                            TF-slim's word
    stem.conv.{0,1}                 MobilenetV1/Conv2d_0[/BatchNorm]
    stages.<s>.<2i>.conv.{0,1}      MobilenetV1/Conv2d_<b>_depthwise[/BatchNorm]
    stages.<s>.<2i + 1>.conv.{0,1}  MobilenetV1/Conv2d_<b>_pointwise[/BatchNorm]
    head.fc                         MobilenetV1/Logits/Conv2d_1c_1x1

Where the norms are folded in already, a convolution is <layer>.conv and has a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from onefold.models.layouts.base import Layout

BLOCKS = (1, 2, 2, 6, 2)  # depthwise-pointwise pairs in each stage
PLACES = tuple((s, i) for s, num in enumerate(BLOCKS) for i in range(num))
LAYERS = ("stem", *(f"stages.{s}.{2 * i + half}" for s, i in PLACES for half in (0, 1)))

TORCH_LEAVES = {
    name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}  # the words that end a key
NORM_LEAVES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
SLIM_LEAVES = {"weights": "weight", "depthwise_weights": "weight", "biases": "bias"} | NORM_LEAVES
KERAS_LEAVES = {"kernel": "weight", "depthwise_kernel": "weight", "bias": "bias"} | NORM_LEAVES

DENSE_AXES, DEPTHWISE_AXES = (3, 2, 0, 1), (2, 3, 0, 1)  # of (H, W, in, out), and of (H, W, channels, 1)


def split_dotted(key: str) -> tuple[str, str]:
    """torch's key -> module and leaf."""
    module, _, leaf = key.rpartition(".")
    return module, leaf


def split_slim(key: str) -> tuple[str, str]:
    """A TensorFlow variable's name -> scope and leaf."""
    scope, _, leaf = key.removesuffix(":0").rpartition("/")
    return scope, leaf


def split_keras(key: str) -> tuple[str, str]:
    """A Keras file's path, which repeats the layer's name or has a model's before it -> layer and leaf."""
    *_, layer, leaf = ("", *key.removesuffix(":0").split("/"))
    return layer, leaf


@dataclass(frozen=True, kw_only=True)
class Words:
    """What one project calls the 27 convolutions and their norms, in order, and the classifier."""

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    head: str
    leaves: Mapping[str, str] = field(default_factory=lambda: TORCH_LEAVES)
    split: Callable[[str], tuple[str, str]] = split_dotted


def _pairs(*names: str) -> tuple[str, ...]:
    """Two names a block, with its number {b} from 1, or its stage {s} and number {i} in it, put in."""
    return tuple(name.format(b=b, s=s, i=i) for b, (s, i) in enumerate(PLACES, 1) for name in names)


SLIM_CONVS = tuple(
    f"MobilenetV1/{name}" for name in ("Conv2d_0", *_pairs("Conv2d_{b}_depthwise", "Conv2d_{b}_pointwise"))
)
SLIM = Words(
    convs=SLIM_CONVS,
    norms=tuple(f"{name}/BatchNorm" for name in SLIM_CONVS),
    head="MobilenetV1/Logits/Conv2d_1c_1x1",
    leaves=SLIM_LEAVES,
    split=split_slim,
)
KERAS = Words(
    convs=("conv1", *_pairs("conv_dw_{b}", "conv_pw_{b}")),
    norms=("conv1_bn", *_pairs("conv_dw_{b}_bn", "conv_pw_{b}_bn")),
    head="conv_preds",
    leaves=KERAS_LEAVES,
    split=split_keras,
)
HF_LAYERS = ("conv_stem", *(f"layer.{i}" for i in range(26)))
HF = Words(
    convs=tuple(f"mobilenet_v1.{name}.convolution" for name in HF_LAYERS),
    norms=tuple(f"mobilenet_v1.{name}.normalization" for name in HF_LAYERS),
    head="classifier",
)
TIMM = Words(
    convs=("conv_stem", *_pairs("blocks.{s}.{i}.conv_dw", "blocks.{s}.{i}.conv_pw")),
    norms=("bn1", *_pairs("blocks.{s}.{i}.bn1", "blocks.{s}.{i}.bn2")),
    head="classifier",
)
FEATURES = Words(
    convs=tuple(f"features.{i}.conv" for i in range(27)),
    norms=tuple(f"features.{i}.bn" for i in range(27)),
    head="classifier",
)


def rename(words: Words, keys: Collection[str]) -> dict[str, str]:
    """Keys in one project's words -> {key: ours}; a layer without a norm is a folded one."""
    parts = {key: words.split(key) for key in keys}
    present = {module for module, _ in parts.values()}
    modules = {words.head: "head.fc"}
    for conv, norm, layer in zip(words.convs, words.norms, LAYERS, strict=True):
        modules[conv] = f"{layer}.conv.0" if norm in present else f"{layer}.conv"
        modules[norm] = f"{layer}.conv.1"
    return {
        key: f"{modules[module]}.{words.leaves[leaf]}"
        for key, (module, leaf) in parts.items()
        if module in modules and leaf in words.leaves
    }


LAYOUTS = (
    Layout(
        title="TF-slim MobileNetV1",
        family="mobilenetv1",
        mark=r"MobilenetV1/Conv2d_0/weights(:0)?",
        rename=partial(rename, SLIM),
        # the optimizer's slots, averages, and ranges of quantization-aware training
        idle=r"global_step|.*/(ExponentialMovingAverage|RMSProp(_1)?|Momentum)(:0)?$|.*_quant/",
        axes={"weights": DENSE_AXES, "depthwise_weights": DEPTHWISE_AXES},
        variant="tf",
        background=True,
    ),
    Layout(
        title="Keras MobileNetV1",
        family="mobilenetv1",
        mark=r"(.*/)?conv_dw_1/depthwise_kernel(:0)?",
        rename=partial(rename, KERAS),
        idle=r"optimizer_weights/|(.*/)?(iteration|learning_rate)(:0)?$",
        axes={"kernel": DENSE_AXES, "depthwise_kernel": DEPTHWISE_AXES},
        variant="tf",
    ),
    Layout(
        title="transformers MobileNetV1",
        family="mobilenetv1",
        mark=r"mobilenet_v1\.conv_stem\.convolution\.weight",
        rename=partial(rename, HF),
        variant="tf",
        config={"tf_padding": True, "hidden_act": "relu6", "layer_norm_eps": 0.001},
        background=True,
    ),
    Layout(
        title="timm MobileNetV1",
        family="mobilenetv1",
        mark=r"blocks\.0\.0\.conv_dw\.weight",
        rename=partial(rename, TIMM),
        variant="timm",
    ),
    Layout(
        title="plain MobileNetV1",
        family="mobilenetv1",
        mark=r"features\.0\.conv\.weight",
        rename=partial(rename, FEATURES),
        variant=None,
    ),
)
