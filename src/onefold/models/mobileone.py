"""MobileOne: An Improved One millisecond Mobile Backbone (arXiv 2206.04040, CVPR 2023).

A unit is a sum of linear branches - k convolutions, a 1x1 convolution, a skip, each with its norm - then perhaps a
squeeze-excite gate, then ReLU. A depthwise 3x3 unit and a pointwise 1x1 unit make a block; blocks make stages.
Folded, each sum is one convolution (see `onefold.reparam`).

    stem                    one dense 3x3 unit, stride 2
    stages.<0..3>.<j>       units: depthwise where j is even, pointwise where it is odd; the first of a stage strides 2
    <unit>.conv             Sum: the k branches, the 1x1 branch if the kernel is larger, the skip if the shape allows
    <unit>.attn, .act       SqueezeExcite or Identity, ReLU
    head.fc                 Linear, on the mean of the last map

Shapes: (B, 3, H, W) -> maps at H/2, H/4, H/8, H/16, H/32 -> (B, N).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile

from torch import Tensor, nn

from onefold.models.key_mapping import KeyLayout, module_names, rename_by_module
from onefold.models.layers import Classifier, FeatureMap, PooledHead, SqueezeExcite, conv_norm, init_weights_
from onefold.reparam import Chain, Sum, conv_act

_BASE_WIDTHS = (64, 128, 256, 512)  # Table 7, with its stages 4 and 5 as one: they share width and a in every variant
_DEPTHS = (2, 8, 10, 1)  # Table 7: blocks in each stage, of every variant
_MAX_STEM = 64  # Table 7 has 64a; the published weights and FLOPs have min(64, 64a)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A column of Table 7: for each stage its width multiplier, its blocks, and how many of the last ones are gated.

    `make_branches` is the paper's k: the convolutions in a sum.
    """

    widths: tuple[float, float, float, float]
    branches: int
    depths: tuple[int, int, int, int] = _DEPTHS
    gated: tuple[int, int, int, int] = (0, 0, 0, 0)


# Table 7. The paper gives S0's stem k = 4 branches too; the published weights have one there, and so has this.
VARIANTS = {
    "s0": Variant(widths=(0.75, 1.0, 1.0, 2.0), branches=4),
    "s1": Variant(widths=(1.5, 1.5, 2.0, 2.5), branches=1),
    "s2": Variant(widths=(1.5, 2.0, 2.5, 4.0), branches=1),
    "s3": Variant(widths=(2.0, 2.5, 3.0, 4.0), branches=1),
    "s4": Variant(widths=(3.0, 3.5, 3.5, 4.0), branches=1, gated=(0, 0, 5, 1)),
}


class Unit(nn.Module):
    """act(attn(sum of branches)): Figure 3, left of a fold."""

    def __init__(self, conv: Sum, attn: nn.Module) -> None:
        super().__init__()
        self.conv, self.attn, self.act = conv, attn, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if isinstance(self.attn, nn.Identity):
            return conv_act(self.conv, self.act, x)
        y: Tensor = self.act(self.attn(self.conv(x)))
        return y


def make_branches(c_in: int, c_out: int, kernel_size: int, stride: int, groups: int, num: int) -> Sum:
    """`num` convolutions, a 1x1 one if they are larger, and a skip if input and output have one shape; all normed."""
    parallel: list[nn.Module] = [conv_norm(c_in, c_out, kernel_size, stride, groups) for _ in range(num)]
    if kernel_size > 1:
        parallel.append(conv_norm(c_in, c_out, 1, stride, groups))
    if c_in == c_out and stride == 1:
        parallel.append(nn.BatchNorm2d(c_in))
    return Sum(*parallel)


def zero_init_branches_(model: nn.Module) -> None:
    """Set the gains of norms to 0, in place, in units with a skip, except the skip's own; elsewhere to 1 / sqrt(N).

    The network then starts as a shallow one, of the other units, and learns within few steps; N branches share a unit's
    variance. Papers on MobileOne do not do this, and long trainings do not need it. Source: zero gains as in arXiv
    1706.02677, section 5.1.
    """
    for unit in model.modules():
        if isinstance(unit, Unit):
            has_skip = any(isinstance(branch, nn.BatchNorm2d) for branch in unit.conv)
            for branch in unit.conv:
                if isinstance(branch, Chain):
                    norm = branch[-1]
                    assert isinstance(norm, nn.BatchNorm2d)
                    nn.init.constant_(norm.weight, 0.0 if has_skip else len(unit.conv) ** -0.5)


def _block(c_in: int, c_out: int, stride: int, num: int, gated: bool) -> list[Unit]:
    """A depthwise unit and a pointwise unit, with `num` convolutions each."""
    depthwise = make_branches(c_in, c_in, 3, stride, c_in, num)
    pointwise = make_branches(c_in, c_out, 1, 1, 1, num)
    return [
        Unit(conv, SqueezeExcite(c) if gated else nn.Identity()) for conv, c in ((depthwise, c_in), (pointwise, c_out))
    ]


def mobileone(variant: Variant, num_classes: int, in_chans: int) -> Classifier:
    """The training network of a variant; `num_classes` 0 leaves pooled features."""
    width = min(_MAX_STEM, int(_BASE_WIDTHS[0] * variant.widths[0]))
    stem = Unit(make_branches(in_chans, width, 3, 2, 1, num=1), nn.Identity())
    stages, features = nn.Sequential(), [FeatureMap(width, 2, "stem")]
    for base, a, depth, gated in zip(_BASE_WIDTHS, variant.widths, variant.depths, variant.gated, strict=True):
        units: list[Unit] = []
        for n in range(depth):
            c_in, width = width, int(base * a)
            units += _block(c_in, width, 2 if n == 0 else 1, variant.branches, gated=n >= depth - gated)
        features.append(FeatureMap(width, 4 << len(stages), f"stages.{len(stages)}"))
        stages.append(nn.Sequential(*units))
    net = Classifier(stem, stages, PooledHead(width, num_classes), features)
    init_weights_(net)
    return net


# --------------------------------------------------------------------------------- released weights
#
# Four projects name the same tree each in its own words.
#
# ours                            Apple's word
# stem, stages.<s>.<j>            stage0, stage<s + 1>.<j>
# .conv.<i>.{0,1}                 .rbr_conv.<i>.{conv,bn}        the k branches
# .conv.<k>.{0,1}                 .rbr_scale.{conv,bn}           the 1x1 branch, where the kernel is larger
# .conv.<last>                    .rbr_skip                      the norm of the skip, where there is one
# .conv                           .reparam_conv                  all of them, folded
# .attn.{reduce,expand}           .se.{reduce,expand}            S4
# head.fc                         linear


@dataclass(frozen=True, kw_only=True)
class _KeyNames:
    """What a project calls the parts (see the table above); the defaults are Apple's names."""

    stem: str = "stage0"
    stages: tuple[str, str, str, str] = ("stage1", "stage2", "stage3", "stage4")
    branch: str = "rbr_conv"
    scale: str = "rbr_scale"
    conv: str = "conv"
    norm: str = "bn"
    skip: str = "rbr_skip"
    folded: str = "reparam_conv"
    reduce: str = "se.reduce"
    expand: str = "se.expand"
    head: str = "linear"


_TIMM_KEYS = _KeyNames(
    stem="stem",
    stages=("stages.0", "stages.1", "stages.2", "stages.3"),
    branch="conv_kxk",
    scale="conv_scale",
    skip="identity",
    reduce="attn.fc1",
    expand="attn.fc2",
    head="head.fc",
)
_MMPRETRAIN_KEYS = _KeyNames(
    stem="backbone.stage0",
    stages=("backbone.stage1", "backbone.stage2", "backbone.stage3", "backbone.stage4"),
    branch="branch_conv_list",
    scale="branch_scale",
    norm="norm",
    skip="branch_norm",
    folded="branch_reparam",
    reduce="se.conv1.conv",
    expand="se.conv2.conv",
    head="head.fc",
)
_CORENET_KEYS = _KeyNames(
    stem="conv_1",
    stages=("layer_2", "layer_3", "layer_4", "layer_5"),
    conv="block.conv",
    norm="block.norm",
    reduce="se.se_layer.fc1.block.conv",
    expand="se.se_layer.fc2.block.conv",
    head="classifier.classifier_fc",
)


def _unit_modules(names: _KeyNames, theirs: str, ours: str, present: Collection[str]) -> dict[str, str]:
    """The modules of one unit, theirs -> ours; it has as many branches as are `present`."""
    branches = (f"{theirs}.{names.branch}.{i}" for i in count())
    parallel = list(takewhile(lambda name: f"{name}.{names.conv}" in present, branches))
    scale = f"{theirs}.{names.scale}"
    parallel += [scale] if f"{scale}.{names.conv}" in present else []
    table = {f"{name}.{names.conv}": f"{ours}.conv.{i}.0" for i, name in enumerate(parallel)}
    table |= {f"{name}.{names.norm}": f"{ours}.conv.{i}.1" for i, name in enumerate(parallel)}
    table[f"{theirs}.{names.skip}"] = f"{ours}.conv.{len(parallel)}"
    table[f"{theirs}.{names.folded}"] = f"{ours}.conv"
    table[f"{theirs}.{names.reduce}"] = f"{ours}.attn.reduce"
    table[f"{theirs}.{names.expand}"] = f"{ours}.attn.expand"
    return table


def _rename(names: _KeyNames, keys: Collection[str]) -> dict[str, str]:
    """Keys in one project's names -> {key: ours}."""
    present = module_names(keys)
    modules = {names.head: "head.fc"} | _unit_modules(names, names.stem, "stem", present)
    for s, (stage, depth) in enumerate(zip(names.stages, _DEPTHS, strict=True)):
        for j in range(2 * depth):  # a block is two units
            modules |= _unit_modules(names, f"{stage}.{j}", f"stages.{s}.{j}", present)
    return rename_by_module(keys, modules)


def _layout(title: str, names: _KeyNames) -> KeyLayout:
    dotted = names.stem.replace(".", r"\.")
    signature = rf"{dotted}\.({names.branch}\.0\.{names.conv}|{names.folded})\.weight"
    return KeyLayout(
        title=f"{title} MobileOne", family="mobileone", signature=signature, rename=partial(_rename, names)
    )


LAYOUTS = (
    _layout("Apple", _KeyNames()),
    _layout("timm", _TIMM_KEYS),
    _layout("mmpretrain", _MMPRETRAIN_KEYS),
    _layout("corenet", _CORENET_KEYS),
)
