"""How four projects name MobileOne: one tree, four vocabularies.

ours                            Apple's word
stem, stages.<s>.<j>            stage0, stage<s + 1>.<j>
.conv.<i>.{0,1}                 .rbr_conv.<i>.{conv,bn}        the k branches
.conv.<k>.{0,1}                 .rbr_scale.{conv,bn}           the 1x1 branch, where the kernel is larger
.conv.<last>                    .rbr_skip                      the norm of the skip, where there is one
.conv                           .reparam_conv                  all of them, folded
.attn.{reduce,expand}           .se.{reduce,expand}            S4
head.fc                         linear
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile

from onefold.models.layouts.base import Layout, by_module, modules_of

UNITS = (4, 16, 20, 2)  # units in each stage: two a block


@dataclass(frozen=True, kw_only=True)
class Words:
    """What one project calls the parts."""

    stem: str
    stages: tuple[str, str, str, str]
    branch: str
    scale: str
    conv: str
    norm: str
    skip: str
    folded: str
    reduce: str
    expand: str
    head: str


APPLE = Words(
    stem="stage0",
    stages=("stage1", "stage2", "stage3", "stage4"),
    branch="rbr_conv",
    scale="rbr_scale",
    conv="conv",
    norm="bn",
    skip="rbr_skip",
    folded="reparam_conv",
    reduce="se.reduce",
    expand="se.expand",
    head="linear",
)
TIMM = Words(
    stem="stem",
    stages=("stages.0", "stages.1", "stages.2", "stages.3"),
    branch="conv_kxk",
    scale="conv_scale",
    conv="conv",
    norm="bn",
    skip="identity",
    folded="reparam_conv",
    reduce="attn.fc1",
    expand="attn.fc2",
    head="head.fc",
)
MMPRETRAIN = Words(
    stem="backbone.stage0",
    stages=("backbone.stage1", "backbone.stage2", "backbone.stage3", "backbone.stage4"),
    branch="branch_conv_list",
    scale="branch_scale",
    conv="conv",
    norm="norm",
    skip="branch_norm",
    folded="branch_reparam",
    reduce="se.conv1.conv",
    expand="se.conv2.conv",
    head="head.fc",
)
CORENET = Words(
    stem="conv_1",
    stages=("layer_2", "layer_3", "layer_4", "layer_5"),
    branch="rbr_conv",
    scale="rbr_scale",
    conv="block.conv",
    norm="block.norm",
    skip="rbr_skip",
    folded="reparam_conv",
    reduce="se.se_layer.fc1.block.conv",
    expand="se.se_layer.fc2.block.conv",
    head="classifier.classifier_fc",
)


def unit(words: Words, theirs: str, ours: str, present: Collection[str]) -> dict[str, str]:
    """The modules of one unit, theirs -> ours; how many branches it has is told by what is `present`."""
    branches = (f"{theirs}.{words.branch}.{i}" for i in count())
    parallel = list(takewhile(lambda name: f"{name}.{words.conv}" in present, branches))
    scale = f"{theirs}.{words.scale}"
    parallel += [scale] if f"{scale}.{words.conv}" in present else []
    table = {f"{name}.{words.conv}": f"{ours}.conv.{i}.0" for i, name in enumerate(parallel)}
    table |= {f"{name}.{words.norm}": f"{ours}.conv.{i}.1" for i, name in enumerate(parallel)}
    table[f"{theirs}.{words.skip}"] = f"{ours}.conv.{len(parallel)}"
    table[f"{theirs}.{words.folded}"] = f"{ours}.conv"
    table[f"{theirs}.{words.reduce}"] = f"{ours}.attn.reduce"
    table[f"{theirs}.{words.expand}"] = f"{ours}.attn.expand"
    return table


def rename(words: Words, keys: Collection[str]) -> dict[str, str]:
    """Keys in one project's words -> {key: ours}."""
    present = modules_of(keys)
    modules = {words.head: "head.fc"} | unit(words, words.stem, "stem", present)
    for s, (stage, units) in enumerate(zip(words.stages, UNITS, strict=True)):
        for j in range(units):
            modules |= unit(words, f"{stage}.{j}", f"stages.{s}.{j}", present)
    return by_module(keys, modules)


def _layout(title: str, words: Words) -> Layout:
    dotted = words.stem.replace(".", r"\.")
    mark = rf"{dotted}\.({words.branch}\.0\.{words.conv}|{words.folded})\.weight"
    return Layout(title=f"{title} MobileOne", family="mobileone", mark=mark, rename=partial(rename, words))


LAYOUTS = (
    _layout("Apple", APPLE),
    _layout("timm", TIMM),
    _layout("mmpretrain", MMPRETRAIN),
    _layout("corenet", CORENET),
)
