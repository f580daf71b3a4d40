"""Mobile-Former: counts against the paper, blocks against plain tensor arithmetic, logits against the released code."""

from __future__ import annotations

import copy
import math
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onefold.models import Classifier, FeatureNet, count_flops
from onefold.models.layers import DynamicReLU
from onefold.models.mobileformer import VARIANTS, mobileformer
from onefold.models.mobileformer_blocks import (
    Block,
    ChannelShuffle,
    DownsampleRow,
    Former,
    FormerToMobile,
    LiteBlock,
    LiteRow,
    MobileToFormer,
    StrideOneRow,
)
from onefold.reparam import drift, fuse
from onefold.reparam.fuse import unfused_norms

# Parameters and multiply-adds at 224 pixels, from an arithmetic count of the layer tables; the published MFLOPs, which
# also count one for each element that a BatchNorm or a DY-ReLU writes.
COUNTS = {
    "26m": (3_232_788, 23_550_208, 25.6),
    "52m": (3_469_092, 49_290_496, 51.3),
    "96m": (4_585_252, 92_017_040, 95.3),
    "151m": (7_595_828, 146_249_168, 150.8),
    "214m": (9_425_920, 208_374_240, 214.0),
    "294m": (11_422_648, 286_732_160, 293.8),
    "508m": (13_976_976, 498_467_680, 508.4),
}
# Logits 0, 250, 500, 750 for `picture` of two images with weights from `fill_`, by the released code in float64.
RELEASED = {
    "26m": (
        (-4.088859709089658, 2.571147614870273, -1.9135973821453032, 0.395388221534961),
        (-4.032793843366602, 2.696068853695659, -2.1389357110135045, 0.6114669769482607),
    ),
    "294m": (
        (-13.836157028675238, 1.262803307314434, 1.3780498960637937, 1.918835290067317),
        (-13.056284807578812, 0.8301453470302129, 1.1387072841209476, 1.4369077792781266),
    ),
}


def wave(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1] that only `name` decides, whatever the library's random generator does."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(count * 1.7 + count.square() * 0.013 + zlib.crc32(name.encode()) % 1000).reshape(shape)


@torch.no_grad()
def fill_(module: nn.Module) -> None:
    """Weights, biases and statistics in place from `wave` of their names: convolutions and Linear keep the variance."""
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        numbers = wave(name, value.shape)
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            numbers = 1 + numbers / 2
        elif value.ndim == 1:
            numbers = numbers / 4
        elif name != "stem.tokens":
            numbers = numbers * math.sqrt(2 / value[0].numel())
        value.copy_(numbers)


def exact(module: nn.Module) -> nn.Module:
    """The module in float64 and eval mode, with weights from `fill_`."""
    module = module.double().eval()
    fill_(module)
    return module


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-12 * theirs.abs().max().clamp(min=1))


# ------------------------------------------------ the same arithmetic, written plainly, one image at a time


class Plain:
    """Operations on plain tensors that take their weights from a state dict by name."""

    def __init__(self, module: nn.Module) -> None:
        self.weights: dict[str, Any] = dict(module.state_dict())

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weights[f"{name}.weight"]) + self.weights[f"{name}.bias"]

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def conv_norm(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """Batch of one; groups told by the shapes."""
        kernel = self.weights[f"{name}.0.weight"]
        y = F.conv2d(x[None], kernel, None, stride, kernel.shape[2] // 2, groups=len(x) // kernel.shape[1])[0]
        gamma, beta, mean, var = (
            self.weights[f"{name}.1.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / (var + 1e-5).sqrt() * gamma + beta

    def dynamic_relu(self, name: str, x: Tensor, token: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.reduce", token).clamp(min=0)
        theta = h_sigmoid(self.linear(f"{name}.expand", hidden))[:, None, None]
        first, second = theta[: len(x)], theta[len(x) :]
        return torch.maximum(((first - 0.5) * 2 + 1) * x, (second - 0.5) * 2 * x)

    def to_former(self, name: str, x: Tensor, tokens: Tensor) -> Tensor:
        found = gather(self.linear(f"{name}.query", tokens), x.flatten(1).T, x.flatten(1).T, num_heads=2)
        alpha = 2 * h_sigmoid(self.linear(f"{name}.gate", tokens))
        return self.layer_norm(f"{name}.norm", tokens + self.linear(f"{name}.project", found * alpha))

    def former(self, name: str, tokens: Tensor) -> Tensor:
        found = gather(self.linear(f"{name}.query", tokens), tokens, tokens, num_heads=4)
        tokens = self.layer_norm(f"{name}.norm", tokens + self.linear(f"{name}.project", found))
        hidden = self.linear(f"{name}.ffn.0", tokens)
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return self.layer_norm(f"{name}.ffn_norm", tokens + self.linear(f"{name}.ffn.2", hidden))

    def to_mobile(self, name: str, x: Tensor, tokens: Tensor) -> Tensor:
        keys, values = self.linear(f"{name}.key", tokens), self.linear(f"{name}.value", tokens)
        return x + gather(x.flatten(1).T, keys, values, num_heads=2).T.reshape(x.shape)


def gather(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention, a head at a time: queries (Q, C), keys and values (K, C) -> (Q, C)."""
    found = []
    for q, k, v in zip(*(t.chunk(num_heads, dim=1) for t in (queries, keys, values)), strict=True):
        odds = torch.exp(torch.einsum("qc,kc->qk", q, k) / math.sqrt(q.shape[1]))
        found.append(torch.einsum("qk,kc->qc", odds / odds.sum(1, keepdim=True), v))
    return torch.cat(found, dim=1)


def h_sigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


def deal(x: Tensor, groups: int) -> Tensor:
    """A channel shuffle: the first channel of each group, then the second of each ..."""
    return x[torch.arange(len(x)).reshape(groups, -1).T.flatten()]


def plain_lite(p: Plain, x: Tensor, row: LiteRow, groups: int) -> Tensor:
    y = p.conv_norm("depthwise", x, row.stride).clamp(0, 6)
    y = p.conv_norm("pointwise", deal(y, len(x)) if groups > 1 else y)
    return x + y if x.shape == y.shape else y


def plain_block(
    p: Plain, x: Tensor, tokens: Tensor, row: DownsampleRow | StrideOneRow, groups: int
) -> tuple[Tensor, Tensor]:
    tokens = p.former("former", p.to_former("to_former", x, tokens))
    first = tokens[0]
    if isinstance(row, StrideOneRow):
        y = deal(p.conv_norm("mobile.expand", x), groups)
        y = p.dynamic_relu("mobile.act1", y, first)
        y = p.dynamic_relu("mobile.act2", p.conv_norm("mobile.depthwise", y), first)
        y = deal(p.conv_norm("mobile.project", y), groups)
        y = x + y if x.shape == y.shape else y
    else:
        y = p.conv_norm("mobile.depthwise1", x, stride=2)
        y = p.dynamic_relu("mobile.act1", deal(y, len(x)) if groups > 1 else y, first)
        middle = p.conv_norm("mobile.project1", y)
        y = p.conv_norm("mobile.depthwise2", middle)
        y = p.dynamic_relu("mobile.act2", deal(y, len(middle)) if groups > 1 else y, first)
        y = middle + p.conv_norm("mobile.project2", y)
    return p.to_mobile("to_mobile", y, tokens), tokens


def plain_head(p: Plain, x: Tensor, tokens: Tensor, groups: int) -> Tensor:
    first = p.to_former("to_former", x, tokens)[0]
    pooled = p.conv_norm("conv", deal(x, groups)).clamp(0, 6).mean((1, 2))
    y = p.linear("fc1.0", torch.cat((pooled * h_sigmoid(pooled), first)))
    gamma, beta, mean, var = (p.weights[f"fc1.1.{key}"] for key in ("weight", "bias", "running_mean", "running_var"))
    y = (y - mean) / (var + 1e-5).sqrt() * gamma + beta
    return p.linear("fc", y * h_sigmoid(y))


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_multiply_adds_are_the_papers(variant: str) -> None:
    params, macs, published = COUNTS[variant]
    with torch.device("meta"):
        net = mobileformer(variant, 1000, 3)
    count = count_flops(net, 224)
    assert (count.params, count.macs) == (params, macs)
    assert round((count.macs + count.elementwise) / 1e6, 1) == published


def test_variants_are_the_published_ones() -> None:
    assert list(VARIANTS) == list(COUNTS)


# ----------------------------------------------------------------------------- against plain arithmetic

MAP, TOKENS = wave("map", (2, 16, 5, 7)) * 2, wave("tokens", (2, 3, 32)) * 2


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("row", [StrideOneRow(48, 16), StrideOneRow(48, 24), DownsampleRow(32, 48, 24)], ids=str)
def test_block_is_its_definition(row: DownsampleRow | StrideOneRow, groups: int) -> None:
    block = exact(Block(16, row, 32, groups))
    x, tokens = block((MAP, TOKENS))
    for n in range(len(MAP)):
        y, new = plain_block(Plain(block), MAP[n], TOKENS[n], row, groups)
        assert x[n].shape == (row.out, math.ceil(5 / row.stride), math.ceil(7 / row.stride))
        assert close(x[n], y)
        assert close(tokens[n], new)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("row", [LiteRow(32, 16, 1), LiteRow(48, 24, 2)], ids=str)
def test_lite_block_is_its_definition(row: LiteRow, groups: int) -> None:
    block = exact(LiteBlock(16, row, groups))
    x, tokens = block((MAP, TOKENS))
    assert tokens is TOKENS
    assert all(close(x[n], plain_lite(Plain(block), MAP[n], row, groups)) for n in range(len(MAP)))


def test_bridges_and_former_are_their_definitions() -> None:
    net = exact(nn.ModuleDict({"up": MobileToFormer(16, 32), "mix": Former(32), "down": FormerToMobile(16, 32)}))
    up, mix, down = net["up"](MAP, TOKENS), net["mix"](TOKENS), net["down"](MAP, TOKENS)
    p = Plain(net)
    for n in range(len(MAP)):
        assert close(up[n], p.to_former("up", MAP[n], TOKENS[n]))
        assert close(mix[n], p.former("mix", TOKENS[n]))
        assert close(down[n], p.to_mobile("down", MAP[n], TOKENS[n]))


def test_dynamic_relu_is_its_definition() -> None:
    act = exact(nn.ModuleDict({"act": DynamicReLU(16, 32)}))
    y = act["act"](MAP, TOKENS[:, 0])
    assert all(close(y[n], Plain(act).dynamic_relu("act", MAP[n], TOKENS[n, 0])) for n in range(len(MAP)))


@pytest.mark.parametrize("variant", ["26m", "52m"])
def test_head_is_its_definition(variant: str) -> None:
    head = exact(mobileformer(variant, 10, 3).head)
    x, tokens = wave("x", (2, 96, 3, 4)), wave("tokens", (2, 3, 128))
    logits = head((x, tokens))
    groups = VARIANTS[variant].groups
    assert all(close(logits[n], plain_head(Plain(head), x[n], tokens[n], groups)) for n in range(len(x)))


@pytest.mark.parametrize("variant", RELEASED)
def test_logits_are_those_of_the_released_code(variant: str) -> None:
    net = exact(mobileformer(variant, 1000, 3))
    with torch.no_grad():
        logits = net(picture())[:, ::250]
    golden = torch.tensor(RELEASED[variant], dtype=torch.float64)
    assert (logits - golden).abs().max() <= 1e-9 * golden.abs().max()


def picture() -> Tensor:
    return wave("picture", (2, 3, 65, 94)) * 2


# ------------------------------------------------------------------------------------- laws of attention


def test_tokens_do_not_mind_the_resolution() -> None:
    """A map with every pixel doubled both ways holds nothing new for a token that averages over it."""
    bridge = exact(MobileToFormer(16, 32))
    finer = MAP.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert close(bridge(finer, TOKENS), bridge(MAP, TOKENS))


def test_bridges_treat_pixels_and_tokens_alike() -> None:
    up, mix, down = exact(MobileToFormer(16, 32)), exact(Former(32)), exact(FormerToMobile(16, 32))
    pixels, tokens = torch.randperm(35, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1])
    shuffled = MAP.flatten(2)[:, :, pixels].view_as(MAP)
    assert close(up(shuffled, TOKENS), up(MAP, TOKENS))
    assert close(up(MAP, TOKENS[:, tokens]), up(MAP, TOKENS)[:, tokens])
    assert close(mix(TOKENS[:, tokens]), mix(TOKENS)[:, tokens])
    assert close(down(shuffled, TOKENS).flatten(2), down(MAP, TOKENS).flatten(2)[:, :, pixels])
    assert close(down(MAP, TOKENS[:, tokens]), down(MAP, TOKENS))


def test_shuffle_connects_every_group_with_every_group() -> None:
    """Behind a shuffle a grouped convolution sees all inputs of the one before it; without, only its own group."""
    seen = {}
    for between in (ChannelShuffle(4), nn.Identity()):
        convs = (nn.Conv2d(16, 16, 1, groups=4, bias=False) for _ in range(2))
        net = nn.Sequential(next(convs), between, next(convs))
        for conv in (net[0], net[2]):
            nn.init.ones_(conv.weight)
        reach = net(torch.eye(16)[:, :, None, None])[:, :, 0, 0] != 0
        seen[type(between)] = reach.sum().item()
    assert seen == {ChannelShuffle: 16 * 16, nn.Identity: 16 * 4}


# ---------------------------------------------------------------------------------------- as a network


@pytest.fixture(scope="module")
def net() -> Classifier:
    torch.manual_seed(0)
    net = mobileformer("26m", 5, 2).eval()
    fill_(net)
    return net


IMAGES = wave("images", (2, 2, 65, 97)).float()


def test_features_and_head_make_the_network(net: Classifier) -> None:
    state = net.forward_features(IMAGES)
    assert [t.shape for t in state] == [(2, 96, 3, 4), (2, 3, 128)]
    logits, pooled = net.forward_head(state), net.forward_head(state, pre_logits=True)
    assert torch.equal(logits, net(IMAGES))
    assert pooled.shape == (2, net.num_features) == (2, 1024)
    assert torch.equal(net.get_classifier()(pooled), logits)
    with pytest.raises(TypeError, match=r"\(map, tokens\)"):
        net.forward_head(state[0])


def test_images_of_a_batch_do_not_meet(net: Classifier) -> None:
    apart = torch.cat([net(image[None]) for image in IMAGES])
    torch.testing.assert_close(apart, net(IMAGES))


def test_reset_classifier_leaves_the_rest() -> None:
    net = mobileformer("26m", 5, 3).eval()
    images = torch.randn(2, 3, 64, 64)
    pooled = net.forward_head(net.forward_features(images), pre_logits=True)
    net.reset_classifier(0)
    assert torch.equal(net(images), pooled)
    net.reset_classifier(9)
    assert net(images).shape == (2, 9)
    assert mobileformer("26m", 0, 3).eval()(images).shape == pooled.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_the_last_map_of_each_reduction(variant: str) -> None:
    spec = VARIANTS[variant]
    with torch.device("meta"):
        net = FeatureNet(mobileformer(variant, 5, 3)).eval()
    maps = net(torch.empty(1, 3, 65, 97, device="meta"))
    widths = [rows[-1].out for rows in spec.stages]
    assert [m.shape[1] for m in maps] == (widths if len(widths) == 5 else [spec.stem, *widths])
    assert [tuple(m.shape[2:]) for m in maps] == [(33, 49), (17, 25), (9, 13), (5, 7), (3, 4)]
    assert net.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert net.feature_info.channels() == [m.shape[1] for m in maps]


def test_fused_network_has_no_batch_norm_and_the_same_answer() -> None:
    net = exact(mobileformer("26m", 5, 2))
    fused = fuse(net)
    assert unfused_norms(fused) == []
    assert isinstance(fused.get_submodule("head.fc1"), nn.Linear)
    assert drift(net, fused, IMAGES.double()) < 1e-12


def test_every_weight_learns() -> None:
    torch.manual_seed(0)
    net = mobileformer("26m", 5, 2)
    fill_(net)
    F.cross_entropy(net(IMAGES), torch.tensor([1, 3])).backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert idle == []
    # Where softmax runs over the tokens, a bias of all keys changes nothing; a norm over the batch takes out fc1's.
    zero = [name for name, p in net.named_parameters() if p.grad is not None and p.grad.norm() < 1e-6]
    assert [name for name in zero if not name.endswith(("to_mobile.key.bias", "fc1.0.bias"))] == []


def test_fresh_weights_are_spread_as_in_the_released_code() -> None:
    torch.manual_seed(0)
    net = mobileformer("26m", 1000, 3)
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 3000:
            expected = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
            assert conv.weight.std().item() == pytest.approx(expected, rel=0.05), name
    fc = net.get_classifier()
    assert isinstance(fc, nn.Linear)
    assert fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert fc.bias.count_nonzero() == 0
    assert net.get_parameter("stem.tokens").std().item() == pytest.approx(1, rel=0.2)


def test_other_ways_to_run(net: Classifier) -> None:
    """A copy, channels last and bfloat16 give the same logits, each to its precision."""
    logits = net(IMAGES)
    assert torch.equal(copy.deepcopy(net)(IMAGES), logits)
    packed = copy.deepcopy(net).to(memory_format=torch.channels_last)
    images = IMAGES.to(memory_format=torch.channels_last)
    assert packed.forward_features(images)[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(packed(images), logits, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(IMAGES).float()
    assert 0 < (rough - logits).norm() / logits.norm() < 0.1


class Blocks(nn.Sequential):
    """A block of each kind, with shuffles: (map, tokens) -> (map, tokens)."""

    def __init__(self) -> None:
        super().__init__(
            LiteBlock(16, LiteRow(32, 16, 1), 4),
            Block(16, DownsampleRow(32, 48, 24), 32, 4),
            Block(24, StrideOneRow(48, 24), 32, 4),
        )
        self.eval()
        fill_(self)


def test_blocks_compile_whole() -> None:
    blocks, state = Blocks(), (MAP.float(), TOKENS.float())
    compiled = torch.compile(blocks, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(state), blocks(state))


def test_blocks_export_with_any_batch_and_size() -> None:
    blocks, state = Blocks(), (MAP.float(), TOKENS.float())
    auto = torch.export.Dim.AUTO
    program = torch.export.export(blocks, (state,), dynamic_shapes=(({0: auto, 2: auto, 3: auto}, {0: auto}),))
    others = wave("map", (3, 16, 8, 6)).float(), wave("tokens", (3, 3, 32)).float()
    torch.testing.assert_close(program.module()(others), blocks(others))


@pytest.mark.slow
def test_network_compiles_and_exports_whole(net: Classifier) -> None:
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), net(IMAGES))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(net, (IMAGES,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    images = wave("others", (3, 2, 96, 66)).float()
    torch.testing.assert_close(program.module()(images), net(images))
