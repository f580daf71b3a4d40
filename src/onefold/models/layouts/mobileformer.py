"""How the released code names Mobile-Former.

ours                            theirs
stem.conv.{0,1}, stem.tokens    stem.{0,1}, tokens.weight
stages.<s>.<j>                  features.<n>, n counting the blocks of all stages through
<lite block>                    .conv.{0,1,4,5}
<block>.to_former, .former      .local_global, .global_block
<block>.mobile, .to_mobile      .conv<1-4>.{0,1} and .hyper<1-3>.hyper.{0,2}, .global_local
head.to_former, head.<...>      local_global, classifier.{conv,fc,classifier}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from onefold.models.layouts.base import Layout, by_module

LITE = {"conv.0": "depthwise.0", "conv.1": "depthwise.1", "conv.4": "pointwise.0", "conv.5": "pointwise.1"}
TO_FORMER = {"alpha.0": "gate", "q": "query", "proj": "project", "layer_norm": "norm"}
FORMER = {
    "q": "query",
    "channel_mlp": "project",
    "layer_norm": "norm",
    "ffn.0": "ffn.0",
    "ffn.2": "ffn.2",
    "ffn_norm": "ffn_norm",
}
TO_MOBILE = {"k": "key", "proj": "value"}
KEEP = {"conv1": "expand", "hyper1": "act1", "conv2": "depthwise", "hyper2": "act2", "conv3": "project"}
DOWN = {
    "conv1": "depthwise1",
    "hyper1": "act1",
    "conv2": "project1",
    "conv3": "depthwise2",
    "hyper3": "act2",
    "conv4": "project2",
}
HEAD = {
    "classifier.conv.1": "head.conv.0",
    "classifier.conv.2": "head.conv.1",
    "classifier.fc.0": "head.fc1.0",
    "classifier.fc.1": "head.fc1.1",
    "classifier.classifier.1": "head.fc",
}


def _under(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{a}": f"{ours}.{b}" for a, b in table.items()}


def _mobile(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    """Convolutions with their norms, and the two Linears that tell an activation."""
    modules: dict[str, str] = {}
    for a, b in table.items():
        leaves = {"hyper.0": "reduce", "hyper.2": "expand"} if a.startswith("hyper") else {"0": "0", "1": "1"}
        modules |= _under(f"{theirs}.{a}", f"{ours}.{b}", leaves)
    return modules


def _block(theirs: str, ours: str, down: bool) -> dict[str, str]:
    return (
        _under(theirs, ours, LITE)
        | _under(f"{theirs}.local_global", f"{ours}.to_former", TO_FORMER)
        | _under(f"{theirs}.global_block", f"{ours}.former", FORMER)
        | _under(f"{theirs}.global_local", f"{ours}.to_mobile", TO_MOBILE)
        | _mobile(theirs, f"{ours}.mobile", DOWN if down else KEEP)
    )


def rename(keys: Collection[str]) -> dict[str, str]:
    """The released code's keys -> {key: ours}. A block of stride 2, known by its fourth convolution, begins a stage."""
    heads = {match[0] for key in keys if (match := re.match(r"features\.\d+\.conv4(?=\.)", key))}
    num_blocks = 1 + max(
        (int(match[1]) for key in keys if (match := re.match(r"features\.(\d{1,3})\.", key))), default=-1
    )
    modules = _under("stem", "stem.conv", {"0": "0", "1": "1"}) | _under("local_global", "head.to_former", TO_FORMER)
    modules |= HEAD
    stage, place = 0, 0
    for n in range(num_blocks):
        down = f"features.{n}.conv4" in heads
        stage, place = (stage + 1, 0) if down and n else (stage, place)
        modules |= _block(f"features.{n}", f"stages.{stage}.{place}", down)
        place += 1
    return by_module(keys, modules) | {key: "stem.tokens" for key in keys if key == "tokens.weight"}


LAYOUTS = (Layout(title="released Mobile-Former", family="mobileformer", mark=r"tokens\.weight", rename=rename),)
