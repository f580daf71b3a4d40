"""`accelerate` on the structures of other projects: outputs, gradients and buffers as before, by every route."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onefold import accelerate
from onefold.reparam import fuse, linear_trees, routes
from onefold.reparam.kernels.base import load_kernels
from onefold.reparam.routes import RouteCosts

INFINITY = float("inf")


class ConvNorm(nn.Sequential):
    def __init__(self, c_in: int, c_out: int, k: int = 1, stride: int = 1, groups: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(c_in, c_out, k, stride, dilation * (k // 2), dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out)


class NormAct(nn.BatchNorm2d):
    """As timm's: a norm whose own forward ends in an activation."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Plain(nn.Module):
    """A stem, and an inverted residual: MobileNetV2 to V4, EfficientNet, and with other activations many more."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), NormAct(8, act())
        self.expand, self.act = ConvNorm(8, 16), act()
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), act())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.project = ConvNorm(16, 8)
        self.drop_path = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x))
        y = self.depthwise(self.act(self.expand(x)))
        return x + self.drop_path(self.project(y * self.gate(y)))


class RepVGGDW(nn.Module):
    """RepViT's and LSNet's: a norm after the sum of a norm, a convolution and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv1, self.bn = ConvNorm(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)


class LayerScale(nn.Module):
    def __init__(self, channels: int, inplace: bool = False) -> None:
        super().__init__()
        self.inplace, self.gamma = inplace, nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma


class Branches(nn.Module):
    """A list of branches, a pointwise one and a skip: MobileOne's, GhostNetV3's, RepGhost's."""

    def __init__(self, num: int = 2, skip: bool = True, pointwise: bool = True, c: int = 8) -> None:
        super().__init__()
        self.kxk = nn.ModuleList(ConvNorm(c, c, 3, groups=c) for _ in range(num))
        self.scale = ConvNorm(c, c, 1, groups=c) if pointwise else None
        self.skip = nn.BatchNorm2d(c) if skip else None
        self.attn, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = 0 if self.scale is None else self.scale(x)
        for branch in self.kxk:
            out = out + branch(x)
        if self.skip is not None:
            out += self.skip(x)
        return self.act(self.attn(out))


class RepMixer(nn.Module):
    """FastViT's: a skip and a scaled difference of a mixer and a norm."""

    def __init__(self, scale: str = "module") -> None:
        super().__init__()
        self.mixer, self.norm = Branches(1), Branches(0, pointwise=False)
        self.mixer.act = self.norm.act = nn.Identity()
        if scale == "parameter":
            self.layer_scale = nn.Parameter(torch.rand(8, 1, 1))
        else:
            self.layer_scale = LayerScale(8, inplace=scale == "inplace")

    def forward(self, x: Tensor) -> Tensor:
        difference = self.mixer(x) - self.norm(x)
        if isinstance(self.layer_scale, nn.Parameter):
            return x + self.layer_scale * difference
        return x + self.layer_scale(difference)


class RepConv(nn.Module):
    """YOLOv6 and v7, mmpretrain: a dense convolution, a pointwise one and a norm; the activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.rbr_identity, self.rbr_dense, self.rbr_1x1 = nn.BatchNorm2d(8), ConvNorm(8, 8, 3), ConvNorm(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return F.relu(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


class Dilated(nn.Module):
    """UniRepLKNet's: a large kernel and dilated ones."""

    def __init__(self) -> None:
        super().__init__()
        self.origin = ConvNorm(8, 8, 7, groups=8)
        self.branches = nn.ModuleList(ConvNorm(8, 8, 3, groups=8, dilation=d) for d in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        for branch in self.branches:
            out = out + branch(x)
        return out


class Legacy(nn.Module):
    """RepViT's of the first release: two norms and a skip without one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv1, self.bn = ConvNorm(8, 8, 3, groups=8), ConvNorm(8, 8, 1, groups=8), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv1(x) + x)


STRUCTURES = {
    "plain": Plain,
    "plain_silu": partial(Plain, nn.SiLU),
    "plain_relu6": partial(Plain, nn.ReLU6),
    "repvggdw": RepVGGDW,
    "legacy": Legacy,
    "branches": Branches,
    "no_skip": partial(Branches, 3, False),
    "repmixer": RepMixer,
    "repmixer_parameter": partial(RepMixer, "parameter"),
    "repmixer_inplace": partial(RepMixer, "inplace"),
    "repconv": RepConv,
    "dilated": Dilated,
}


def shaken(model: nn.Module) -> nn.Module:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return model


def computed(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of input and parameters, and buffers, after two steps of a training."""
    for _ in range(2):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf * 1.0)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
    found = {"y": y.detach(), "x": leaf.grad}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()}


def by_force(monkeypatch: pytest.MonkeyPatch, costs: RouteCosts, by_layer: float) -> None:
    monkeypatch.setattr(routes, "route_costs", lambda unit, x: costs)
    monkeypatch.setattr(routes, "per_layer_cost", lambda *_: by_layer)
    monkeypatch.setattr(linear_trees, "_SMALLEST_MAPS", 0)


MOMENTS, MIXED = (RouteCosts(0.0, 1.0, 2.0), INFINITY), (RouteCosts(INFINITY, 0.0, 1.0), 0.0)


@pytest.mark.parametrize("route", [MOMENTS, None], ids=["one_convolution", "quickest"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_in_float64_all_is_within_rounding(name, route, seeded, monkeypatch):
    if route:
        by_force(monkeypatch, *route)
    model = shaken(STRUCTURES[name]().double()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    faster = accelerate(copy.deepcopy(model))
    assert list(faster.state_dict()) == list(before)
    assert all(torch.equal(faster.state_dict()[key], value) for key, value in before.items())
    assert not faster.acceleration.left
    x = 2 + torch.randn(3, 8, 9, 10, dtype=torch.float64)
    expected, found = computed(model, x), computed(faster, x)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert (value - found[key]).abs().max() <= 1e-10 * (1 + value.abs().max()), key
    model.load_state_dict(faster.state_dict())  # a checkpoint of either is one of the other
    assert torch.equal(model.eval()(x), faster.eval()(x))


@pytest.mark.skipif(load_kernels() is None, reason="needs a compiler")
@pytest.mark.parametrize("route", [MOMENTS, MIXED], ids=["one_convolution", "mixed"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_by_the_kernels_the_error_is_that_of_float32(name, route, seeded, monkeypatch):
    model = shaken(STRUCTURES[name]()).train()
    x = torch.randn(4, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    truth = computed(copy.deepcopy(model).double(), x.double())
    by_layer = computed(copy.deepcopy(model), x)
    by_force(monkeypatch, *route)
    found = computed(accelerate(copy.deepcopy(model)), x)
    for key, value in truth.items():
        own, ours = ((value - each[key]).abs().max() for each in (by_layer, found))
        assert ours <= 4 * own + 1e-5 * (1 + value.abs().max()), key


def within_rounding(model: nn.Module, faster: nn.Module, x: Tensor) -> None:
    """Compare one step of two networks in float64: outputs, gradients, buffers."""
    assert list(faster.state_dict()) == list(model.state_dict())
    outputs = []
    for each in (model, faster):
        torch.manual_seed(1)
        outputs.append(each(x))
        outputs[-1].square().sum().backward()
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-9 * (1 + outputs[0].abs().max())
    for (name, p), q in zip(model.named_parameters(), faster.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).abs().max() <= 1e-7 * (1 + p.grad.abs().max()), name
    for p, q in zip(model.buffers(), faster.buffers(), strict=True):
        assert (p - q).abs().max() <= 1e-9 * (1 + p.abs().max())


OF_TIMM = {  # and the norms that are left
    **dict.fromkeys(("mobileone_s0", "repvgg_a0", "fastvit_t8", "mobilenetv3_large_100", "mobilenetv4_conv_small"), 0),
    **{
        "efficientnet_b0": 0,
        "repvit_m0_9": 2,
        "starnet_s1": 1,
        "repghostnet_100": 0,
        "ghostnetv3_100": 0,
        "shvit_s1": 1,
    },
}


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "repvit_m0_9"])
def test_networks_of_timm_train_with_the_same_numbers(name, timm, seeded):
    model = timm.create_model(name, num_classes=7).double().train()
    faster = accelerate(copy.deepcopy(model))
    assert len(faster.acceleration.left) == OF_TIMM[name]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    within_rounding(model, faster, x)
    assert fuse(faster.eval())(x).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TIMM)
def test_networks_of_timm_as_one_convolution_a_tree(name, timm, seeded, monkeypatch):
    model = timm.create_model(name, num_classes=7).double().train()
    faster = accelerate(copy.deepcopy(model))
    assert len(faster.acceleration.left) == OF_TIMM[name]
    by_force(monkeypatch, *MOMENTS)
    within_rounding(model, faster, torch.randn(4, 3, 64, 64, dtype=torch.float64))


class Shared(nn.Module):
    """A convolution whose output is read twice, one that pads by reflection, and a norm of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)
        self.c, self.bn_c = nn.Conv2d(8, 8, 1), Halved(8)
        self.unused = nn.BatchNorm2d(8)
        self.d = ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = self.bn_a(y) + y
        x = self.bn_b(self.b(x))
        return self.d(self.bn_c(self.c(x)).relu())


class Halved(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def test_what_cannot_be_taken_is_left_and_named(seeded):
    model = Shared().double().train()
    faster = accelerate(copy.deepcopy(model))
    told = faster.acceleration
    assert told.taken == ("d.c", "d.bn")
    assert told.left == {
        "bn_a": "what it normalizes is read elsewhere too",
        "bn_b": "no convolution that folds with it stands before it",
        "bn_c": "it is of another kind, or computes something of its own",
        "unused": "no forward pass reaches it",
    }
    assert str(told).startswith("2 layers are taken, 4 norms are left: bn_a (what it normalizes is read")
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected, found = computed(model, x), computed(faster, x)
    assert all(torch.allclose(expected[key], found[key], atol=1e-10) for key in expected)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "it has no norm with statistics"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), "no convolution that folds with it stands before it"),
    ],
)
def test_a_network_of_which_nothing_is_taken_is_given_back_with_a_sentence(model, why):
    with pytest.warns(UserWarning, match=f"Sequential trains as it is, nothing of it was accelerated: .*{why}"):
        assert accelerate(model) is model
    assert not any("forward" in vars(module) for module in model.modules())


class Dropping(nn.Module):
    """What a trace would miss: random numbers, counters, control flow by values, other arguments."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.inner = kind, 0, ConvNorm(8, 8)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if self.kind == "random" and torch.rand(()) < 0.5:
            return x
        if self.kind == "counter":
            self.calls += 1
        if self.kind == "buffer":
            self.steps += 1
        if self.kind == "values" and x.mean() > 0:
            return x
        return self.inner(x) * scale


@pytest.mark.parametrize("kind", ["random", "counter", "buffer", "values", "arguments"])
def test_what_a_trace_would_miss_is_not_followed(kind, seeded):
    """The block runs as it is; what it holds is accelerated by itself."""
    model = nn.Sequential(Dropping(kind), nn.ReLU()).double().train()
    faster = accelerate(copy.deepcopy(model))
    assert faster.acceleration.taken == ("0.inner.c", "0.inner.bn")
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    torch.manual_seed(1)
    expected = computed(model, x)
    torch.manual_seed(1)
    found = computed(faster, x)
    assert all(torch.allclose(expected[key], found[key], atol=1e-10) for key in expected)
    assert (model[0].calls, model[0].steps) == (faster[0].calls, faster[0].steps)
    outputs = []
    for each in (model, faster):
        torch.manual_seed(3)
        outputs.append(each[0](x, scale=2.0))
    assert torch.allclose(*outputs)


def test_a_block_that_changes_afterwards_computes_what_it_is_then(seeded):
    model = Branches().double().train()
    faster = accelerate(copy.deepcopy(model))
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    computed(faster, x)
    seen: list[Tensor] = []
    faster.load_state_dict(model.state_dict())
    for each in (model, faster):
        each.skip, each.act = None, nn.Hardswish()
        each.kxk[0].register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    expected, found = computed(model, x), computed(faster, x)
    assert all(torch.allclose(expected[key], found[key], atol=1e-10) for key in expected)
    assert len(seen) == 4
    del faster.forward
    assert torch.equal(faster.eval()(x), model.eval()(x))


def test_copies_and_pickles_are_of_the_copy(seeded):
    model = accelerate(Plain().double().train())
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.stem.weight.zero_()
        own, theirs = computed(model, x), computed(other, x)
        assert not torch.allclose(own["y"], theirs["y"])
        assert other.acceleration == model.acceleration


def test_an_input_that_is_changed_meanwhile_is_noticed(seeded):
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = ConvNorm(8, 8), ConvNorm(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            x.mul_(2.0)
            return y + self.other(x)

    model = Changing().double().train()
    faster = accelerate(copy.deepcopy(model))
    assert len(faster.acceleration.taken) == 4  # each by itself
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    assert torch.allclose(model(x.clone()), faster(x.clone()), atol=1e-10)
