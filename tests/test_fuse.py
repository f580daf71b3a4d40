"""Fusing whole networks: what is kept, what is refused, and other projects' blocks."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from conftest import shaken
from onefold.reparam import Chain, Sum, UnfoldedWarning, dataflow, drift, fuse, unfused_norms

X = torch.randn(2, 3, 13, 11, generator=torch.Generator().manual_seed(0))


def tree(c_in: int = 3, c_out: int = 4) -> Sum:
    return Sum(
        Chain(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)),
        Chain(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)),
    )


def net() -> nn.Sequential:
    return shaken(nn.Sequential(tree(), nn.ReLU(), tree(4, 4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


def test_the_argument_is_untouched_and_the_copy_shares_nothing(seeded):
    model = net()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in fused.parameters()}
    assert [type(m).__name__ for m in fused] == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d"]


def test_fusing_twice_is_fusing_once(seeded):
    once = fuse(net())
    twice = fuse(once)
    assert drift(once, twice, X) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype, seeded):
    model = net().to(dtype)
    fused = fuse(model)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    assert drift(model, fused, X.to(dtype)) <= {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]


class NormWithAct(nn.BatchNorm2d):
    """As timm's norms: an activation as a child, which `fuse` tells by trying it on random numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Deployable(nn.Module):
    """As other projects' blocks: the method that fuses it draws a convolution before it fills it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def switch_to_deploy(self) -> None:
        before, norm = self.conv
        self.conv = nn.Conv2d(3, 3, 1)
        self.conv.weight.data = before.weight.data / (1 + norm.eps) ** 0.5
        self.conv.bias.data.zero_()


@pytest.mark.parametrize("make", [net, lambda: nn.Sequential(nn.Conv2d(3, 3, 1), NormWithAct(3)), Deployable])
def test_fuse_leaves_the_global_random_generator_as_it_was(make):
    model = make().eval()
    before = torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_device_is_kept():
    fused = fuse(net().to("meta"))
    assert {p.device.type for p in fused.parameters()} == {"meta"}


def test_every_fused_parameter_trains(seeded):
    fused = fuse(net()).train()
    before = [p.detach().clone() for p in fused.parameters()]
    fused(X).square().sum().backward()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    assert all(not torch.equal(p, q) for p, q in zip(fused.parameters(), before, strict=True))


def test_a_frozen_tree_stays_frozen_and_its_neighbours_do_not(seeded):
    model = net()
    model[0].requires_grad_(False)
    fused = fuse(model)
    assert [p.requires_grad for p in fused.parameters()] == [False, False, True, True, True, True]


def test_a_layer_used_twice_stays_one_layer(seeded):
    shared = tree(3, 3)
    model = shaken(nn.Sequential(shared, nn.ReLU(), shared))
    fused = fuse(model)
    assert fused[0] is fused[2]
    assert drift(model, fused, X) <= 1e-6


def test_a_tree_whose_weight_is_tied_to_another_layer_is_left(seeded):
    model = net()
    model[4] = nn.Conv2d(4, 4, 3)
    model[2][0][0].weight = model[4].weight
    with pytest.warns(
        UnfoldedWarning, match=r"could not fold 1: 2 \('0\.0\.weight' inside is shared with another part"
    ):
        fused = fuse(model)
    assert fused[2][0][0].weight is fused[4].weight
    assert type(fused[0]) is nn.Conv2d
    assert drift(model, fused, X) <= 1e-6


def test_tied_weights_outside_stay_tied(seeded):
    model = net()
    model.append(nn.Conv2d(2, 4, 1)).append(nn.Conv2d(4, 2, 1))
    model[6].weight = model[4].weight
    fused = fuse(model.eval())
    assert fused[6].weight is fused[4].weight
    assert fused[6].weight is not model[4].weight


def test_hooks_on_a_tree_are_kept_and_a_tree_with_one_inside_is_left(seeded):
    model = net()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    fused = fuse(model)
    fused(X)
    model(X)
    assert len(seen) == 2
    assert torch.allclose(*seen, atol=1e-5)
    model[2][1].register_forward_hook(lambda *_: None)
    with pytest.warns(UnfoldedWarning, match=r"could not fold 1: 2 \(layer '1' inside has a hook"):
        fused = fuse(model)
    assert len(fused[2][1]._forward_hooks) == 1
    assert drift(model, fused, X) <= 1e-6


def test_training_flags_are_kept(seeded):
    model = net()
    model.insert(1, nn.Dropout())
    model[1].train()
    fused = fuse(model)
    assert [m.training for m in fused] == [m.training for m in model]


def test_a_root_tree_becomes_the_layer_itself(seeded):
    assert type(fuse(shaken(tree()))) is nn.Conv2d


def test_attributes_that_name_a_tree_follow_it(seeded):
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tree()
            self.order = [self.body]

        def forward(self, x: Tensor) -> Tensor:
            return self.order[0](x)

    host = shaken(Host())
    fused = fuse(host)
    assert fused.order[0] is fused.body
    assert drift(host, fused, X) <= 1e-6


def test_drift_compares_all_outputs_and_refuses_train_mode(seeded):
    class Pair(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            return {"maps": [x, x + self.shift]}

    assert drift(Pair(0.0), Pair(0.0), X) == 0.0
    assert drift(Pair(0.0), Pair(1.0), X) == pytest.approx((X.numel() ** 0.5) / X.norm().item(), rel=1e-6)
    with pytest.raises(ValueError, match="eval mode"):
        drift(net().train(), net(), X)
    with pytest.raises(ValueError, match="same shapes"):
        drift(nn.Identity(), nn.MaxPool2d(2), X)


# ------------------------------------------------------------------------------------ other projects


class Branchy(nn.Module):
    """A block as many projects write it: the fold is its own method, in place, and leaves the kernel detached."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.slim = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.merged: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.slim(x) if self.merged is None else self.merged(x)

    def _merge(self) -> None:
        merged = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        merged.weight.data = self.wide.weight.data.clone()
        merged.weight.data[:, :, 1:2, 1:2] += self.slim.weight.data
        merged.weight.detach_()
        del self.wide, self.slim
        self.merged = merged


class Reparameterized(Branchy):
    def reparameterize(self) -> None:
        self._merge()


class Switched(Branchy):
    def switch_to_deploy(self) -> None:
        self._merge()


class Fused(Branchy):
    def fuse(self) -> nn.Module:
        self._merge()
        return self.merged


class Broken(Branchy):
    def reparameterize(self) -> None:
        raise RuntimeError("not today")


class Asks(Branchy):
    def fuse(self, how: str) -> None:
        raise AssertionError(how)


@pytest.mark.parametrize("kind", [Reparameterized, Switched, Fused])
def test_blocks_that_fold_themselves_are_asked_to(kind, seeded):
    host = shaken(nn.Sequential(kind(), nn.BatchNorm2d(3)))
    fused = fuse(host)
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1
    assert drift(host, fused, X) <= 1e-6
    assert all(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("kind", [Reparameterized, Switched, Fused])
def test_the_root_is_asked_too(kind, seeded):
    root = shaken(kind())
    root.unused = nn.BatchNorm2d(3).eval()
    with pytest.warns(UnfoldedWarning, match="unused") if kind is not Fused else contextlib.nullcontext():
        fused = fuse(root)
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1
    assert drift(root, fused, X) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_foreign_kernel_gets_the_dtype_of_its_block(dtype, seeded):
    class Careless(Fused):
        def fuse(self) -> nn.Module:
            return super().fuse().float()

    fused = fuse(shaken(nn.Sequential(Careless(), nn.BatchNorm2d(3))).to(dtype))
    assert {p.dtype for p in fused.parameters()} == {dtype}


def test_a_block_that_fails_stays_as_it_was_and_is_named(seeded):
    host = shaken(nn.Sequential(Broken(), nn.BatchNorm2d(3), Asks()))
    why = r"could not fold 2: 0 \(its reparameterize\(\) failed: not today\); 1 \(no convolution or Linear stands"
    with pytest.warns(UnfoldedWarning, match=why):
        fused = fuse(host)
    assert drift(host, fused, X) == 0.0


class Plain(nn.Module):
    """Convolution and norm as attributes, the residual path read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.bn2, self.conv2 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, bias=False)
        self.conv3, self.bn3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))  # declared the other way round: only the data flow tells
        z = self.conv3(y)
        return self.bn3(z) + z  # z is read twice: this norm may not fold


def test_norms_fold_by_data_flow_not_by_order(seeded):
    model = shaken(nn.Sequential(Plain(), nn.Flatten(), nn.Linear(3 * 13 * 11, 4), nn.BatchNorm1d(4)))
    with pytest.warns(UnfoldedWarning, match=r"could not fold 1: 0\.bn3"):
        fused = fuse(model)
    assert unfused_norms(fused) == ["0.bn3"]
    assert drift(model, fused, X) <= 1e-6


def test_parts_of_an_untraceable_network_still_fold(seeded):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > -1e9 else x

    model = shaken(Branching())
    fused = fuse(model)
    assert unfused_norms(fused) == []
    assert drift(model, fused, X) <= 1e-6


TIMM = ["repvgg_a0", "fastvit_t8", "mobileone_s0", "mobilenetv1_100", "repvit_m0_9", "resnet18"]


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_fuse_with_the_same_answer(name, timm, seeded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = shaken(timm.create_model(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = fuse(model)
    x = torch.randn(1, 3, 96, 96) if name != "fastvit_t8" else torch.randn(1, 3, 128, 128)
    assert drift(model, fused, x) <= 1e-5
    if name != "repvit_m0_9":  # whose own method makes float32 kernels
        assert drift(model.double(), fuse(model), x.double()) <= 1e-12
    assert unfused_norms(fused) == []
    assert not [w for w in caught if issubclass(w.category, UnfoldedWarning)]


class Seen(nn.Sequential):
    """Keeps the sizes and dtypes that it runs on."""

    runs: ClassVar[list[tuple[tuple[int, ...], torch.dtype]]] = []

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:  # and not a trace of it
            Seen.runs.append((tuple(x.shape), x.dtype))
        return super().forward(x)


@pytest.mark.parametrize("side", [64, 32])
def test_a_network_without_blocks_is_run_once_and_its_proof_twice_on_fewer_pixels_if_that_is_costly(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataflow, "_COSTLY", 2 * 62 * 62 * 8 * 27 - (side == 32))
    network = shaken(Seen(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    Seen.runs.clear()
    assert unfused_norms(fuse(network)) == []
    first = [((2, 3, 64, 64), torch.float32)] * (side == 32)
    shape = (2, 3, side, side)
    assert Seen.runs == [*first, (shape, torch.float32), (shape, torch.float64), (shape, torch.float64)]
