"""Networks that folding could get wrong: each is fused right, or left alone with a name."""

from __future__ import annotations

import copy
import functools
import random
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from conftest import shaken
from onefold.reparam import Chain, Sum, UnfoldedWarning, fuse, unfused_norms

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + 0.3


def with_norm(layer: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    return shaken(nn.Sequential(layer, norm or nn.BatchNorm2d(8), nn.ReLU()))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class InnerScaled(nn.Conv2d):
    """Its forward is torch's; what that calls is not."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight, bias) * 3


class Clamped(nn.Conv2d):
    """The same as a convolution on small numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


class MaxNorm(nn.Conv2d):
    """As EEGNet's: its kernel is renormed in place at each call."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Padding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class ByWeight(nn.Conv2d):
    """Torch's function of its own weight, but of an input that the weight changed too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.weight.norm())


def deciding(kind: type[nn.Module], is_other: Callable[[Tensor], bool], method: str = "forward") -> type[nn.Module]:
    """A layer whose answer is doubled, or of a norm left out, for some inputs."""

    def decided(self: nn.Module, x: Tensor, *more: Tensor | None) -> Tensor:
        y = getattr(super(made, self), method)(x, *more)
        return (x if isinstance(self, nn.BatchNorm2d) else 2 * y) if is_other(x) else y

    made = type("Deciding", (kind,), {method: decided})
    return made


DECISIONS: dict[str, Callable[[Tensor], bool]] = {
    "one image": lambda x: len(x) == 1,
    "several images": lambda x: len(x) > 1,
    "an odd side": lambda x: x.shape[-1] % 2 == 1,
    "no square": lambda x: x.shape[-1] != x.shape[-2],
    "large values": lambda x: bool(x.abs().max() > 100),
    "small values": lambda x: bool(x.abs().max() < 1e-1),
    "positive values": lambda x: bool((x >= 0).all()),
    "its dtype": lambda x: x.dtype == torch.float32,
}


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight), self.bias)


class ClampingNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-20, 20)


class CallsAPart(nn.Module):
    """Of one image, or of negative ones, it takes the convolution without its norm."""

    def __init__(self, is_other: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.body, self.is_other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), is_other

    def forward(self, x: Tensor) -> Tensor:
        return self.body[0](x) if self.is_other(x) else self.body(x)


def monkeypatched() -> nn.Module:
    model = with_norm(nn.Conv2d(3, 8, 3))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) * 2
    return model


def hooked(place: int, kind: str) -> nn.Module:
    model = with_norm(nn.Conv2d(3, 8, 3))
    if kind == "forward":
        model[place].register_forward_hook(lambda _m, _i, y: y * 2)
    else:
        model[place].register_forward_pre_hook(lambda _m, x: (x[0] * 2,))
    return model


def pruned() -> nn.Module:
    layer = nn.Conv2d(3, 8, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return with_norm(layer)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.b, self.norm_b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_b(self.b(self.norm_a(self.a(x)).relu()))


class Decoder(nn.Module):
    """The first layer's kernel is used once more, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.encode(x), self.encode[0].weight)


class DecoderWithChoice(Decoder):
    """The same where the forward cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


class GainReader(nn.Module):
    """The norm's gains are read in the forward, as in squeeze-and-excite variants and slimming."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * (self.bn.weight / self.bn.weight.sum()).view(1, -1, 1, 1)


class AttributeReader(GainReader):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) / self.bn.num_features


class StepByStep(nn.Module):
    """Collects every layer's output, as perceptual losses do; the loop breaks on a value, so nothing can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
            if x.abs().sum() > 1e12:
                break
        return found


class Remembers(nn.Module):
    """The convolution's output is kept, and read after the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x)
        return self.bn(self.kept) + self.kept


class Counts(nn.Module):
    """Each call changes its state: a buffer that the answer depends on, an observer's, attributes, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.register_buffer("num_calls", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))
        self.count, self.kept, self.seen = 0, None, []

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        torch.maximum(self.largest, self.num_calls, out=self.largest)
        self.count += 1
        self.kept = self.conv(x)
        self.seen.append(self.count)
        return self.bn(self.conv(x) if self.count < 0 else self.kept) * self.num_calls


class CountsApart(Counts):
    """The same, so that the norm alone reads the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        self.count += 1
        self.seen.append(x)
        return self.bn(self.conv(x)) * self.num_calls


class Tokens(nn.Module):
    """A norm over tokens, as many as the Linear before it has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x.mean(2).transpose(1, 2)))


class Twice(nn.Module):
    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.one, self.two, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), norm

    def forward(self, x: Tensor) -> Tensor:
        if self.other:
            return self.bn(self.two(self.bn(self.one(x))))
        return self.one(self.bn(self.one(x)))


class InALeaf(nn.Module):
    """Its layers are called from a plain list, under which the copy has them too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.order = [self.conv, self.bn]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.layers = nn.ModuleList([self.conv, self.bn])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


class Liar(nn.Module):
    """A block whose own method makes something else of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.short = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + (self.short(x) if self.short is not None else 0)

    def switch_to_deploy(self) -> None:
        self.short = None


class Parent(nn.Module):
    """A root that folds its children itself, and knows them by name afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fused = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), False

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.fused else self.bn(self.conv(x))

    def fuse(self) -> nn.Module:
        self.conv, self.fused = torch.nn.utils.fuse_conv_bn_eval(self.conv, self.bn), True
        del self.bn
        return self


class Instance(nn.Module):
    """Looks at the type of what it is given: a trace takes the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y if isinstance(x, Tensor) else self.bn(y)


class Gated(Chain):
    def forward(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        return super().forward(x, act) * 2


class TreeReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tree = Chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.tree(x) * self.tree[0].weight.abs().mean()


def in_training() -> nn.Module:
    model = with_norm(nn.Conv2d(3, 8, 3))
    model[1].train()
    return model


def tiny_gain_in_half() -> nn.Module:
    """Its folded kernel would lie near 1e-7, where float16 has steps of 6e-8."""
    model = with_norm(nn.Conv2d(3, 8, 3))
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
        model[1].weight.fill_(1e-4)
        model[1].bias.zero_()
        model[1].running_mean.zero_()
    return model.half()


def mixed_dtypes() -> nn.Module:
    model = with_norm(nn.Conv2d(3, 8, 3))
    model[0].bfloat16()
    return model


def two_inputs() -> nn.Module:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = with_norm(nn.Conv2d(3, 8, 3))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.body(x) * scale

    return Both().eval()


def shared_statistics() -> nn.Module:
    model = shaken(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[3].running_mean = model[1].running_mean
    return model


def linear_tokens() -> nn.Module:
    return with_norm(Cosine(12, 8), nn.BatchNorm1d(8))


RIGHT, LEFT = "right", "left"
CASES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "weight standardization": (LEFT, lambda: with_norm(Standardized(3, 8, 3))),
    "output scaled": (LEFT, lambda: with_norm(Scaled(3, 8, 3))),
    "its inner forward scales": (LEFT, lambda: with_norm(InnerScaled(3, 8, 3))),
    "output clamped": (LEFT, lambda: with_norm(Clamped(3, 8, 3))),
    "kernel renormed in place": (LEFT, lambda: with_norm(MaxNorm(3, 8, 3))),
    "pads itself": (RIGHT, lambda: with_norm(Padding(3, 8, 3))),
    "input divided by the weight": (LEFT, lambda: with_norm(ByWeight(3, 8, 3))),
    "cosine Linear": (LEFT, linear_tokens),
    "a norm that clamps": (LEFT, lambda: with_norm(nn.Conv2d(3, 8, 3), ClampingNorm(8))),
    "forward of the instance": (LEFT, monkeypatched),
    "hook on the layer": (LEFT, lambda: hooked(0, "forward")),
    "hook on the norm": (LEFT, lambda: hooked(1, "forward")),
    "pre-hook on the layer": (LEFT, lambda: hooked(0, "pre")),
    "pre-hook on the norm": (LEFT, lambda: hooked(1, "pre")),
    "weight_norm": (LEFT, lambda: with_norm(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))),
    "spectral_norm": (LEFT, lambda: with_norm(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)))),
    "old weight_norm": (LEFT, lambda: with_norm(_old(nn.utils.weight_norm, nn.Conv2d(3, 8, 3)))),
    "old spectral_norm": (LEFT, lambda: with_norm(_old(nn.utils.spectral_norm, nn.Conv2d(3, 8, 3)))),
    "pruned": (LEFT, pruned),
    "tied weights": (LEFT, lambda: shaken(Tied())),
    "weight read by a decoder": (LEFT, lambda: shaken(Decoder())),
    "weight read where nothing can be traced": (LEFT, lambda: shaken(DecoderWithChoice())),
    "gain read by its parent": (LEFT, lambda: shaken(GainReader())),
    "attribute read by its parent": (LEFT, lambda: shaken(AttributeReader())),
    "shared statistics": (LEFT, shared_statistics),
    "every output collected": (LEFT, lambda: shaken(StepByStep())),
    "output kept": (LEFT, lambda: shaken(Remembers())),
    "tokens normed": (LEFT, lambda: shaken(Tokens())),
    "norm used twice": (LEFT, lambda: shaken(Twice(norm=True))),
    "layer used twice": (LEFT, lambda: shaken(Twice(norm=False))),
    "called from a list": (LEFT, lambda: shaken(InALeaf())),
    "two names": (RIGHT, lambda: shaken(TwoNames())),
    "a method that is wrong": (LEFT, lambda: shaken(nn.Sequential(Liar()))),
    "folded by its parent": (RIGHT, lambda: shaken(Parent())),
    "looks at the type": (LEFT, lambda: shaken(Instance())),
    "a tree with a forward of its own": (RIGHT, lambda: shaken(Gated(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))),
    "a tree whose weight is read": (LEFT, lambda: shaken(TreeReader())),
    "a norm in train mode": (LEFT, in_training),
    "no running statistics": (
        LEFT,
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval(),
    ),
    "reflected padding": (RIGHT, lambda: with_norm(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"))),
    "reflected padding in a tree": (
        RIGHT,
        lambda: shaken(Chain(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8))),
    ),
    "transposed": (LEFT, lambda: with_norm(nn.ConvTranspose2d(3, 8, 3))),
    "norm before the layer": (LEFT, lambda: shaken(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3)))),
    "bfloat16": (RIGHT, lambda: with_norm(nn.Conv2d(3, 8, 3)).bfloat16()),
    "a gain too small for float16": (LEFT, tiny_gain_in_half),
    "layer in bfloat16, norm in float32": (RIGHT, mixed_dtypes),
    "two inputs": (RIGHT, two_inputs),
}

for _name, _decision in DECISIONS.items():
    CASES |= {
        f"a layer that decides by {_name}": (LEFT, lambda d=_decision: with_norm(deciding(nn.Conv2d, d)(3, 8, 3))),
        f"a norm that decides by {_name}": (
            LEFT,
            lambda d=_decision: with_norm(nn.Conv2d(3, 8, 3), deciding(nn.BatchNorm2d, d)(8)),
        ),
    }
for _name, _decision in {**DECISIONS, "negative values": lambda x: bool((x <= 0).all())}.items():
    if _name in ("one image", "no square", "large values", "negative values"):
        CASES[f"a block that decides by {_name}"] = (LEFT, lambda d=_decision: shaken(CallsAPart(d)))
for _method in ("_conv_forward", "__call__"):
    CASES[f"a layer that decides in {_method}"] = (
        LEFT,
        lambda m=_method: with_norm(deciding(nn.Conv2d, DECISIONS["one image"], m)(3, 8, 3)),
    )


def _old(make: Callable[..., nn.Module], layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their deprecation
        return make(layer)


def _inputs(model: nn.Module) -> tuple[Tensor, ...]:
    weight = next(model.parameters())
    if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Linear):
        return (torch.randn(4, 12, generator=torch.Generator().manual_seed(1)),)
    x = X.to(weight.dtype)
    return (x, torch.tensor(2.0)) if type(model).__name__ == "Both" else (x,)


def _answer(model: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        answer = model(*args)
    return answer if isinstance(answer, list) else [answer]


@pytest.mark.parametrize(("expected", "make"), CASES.values(), ids=CASES.keys())
def test_it_is_fused_right_or_left_alone_with_a_name(expected, make, seeded):
    model = make()
    before, modes = copy.deepcopy(dict(model.named_buffers())), [m.training for m in model.modules()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnfoldedWarning)
        fused = fuse(model)
    said = " ".join(str(w.message) for w in caught if issubclass(w.category, UnfoldedWarning))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert [m.training for m in model.modules()] == modes
    left = unfused_norms(fused)
    assert bool(left) == (expected is LEFT)
    if left:
        assert said.startswith("could not fold")
        assert all(any(f" {part}" in said for part in (name, name.split(".")[0])) for name in left)
    args = _inputs(model)
    bound = 3e-2 if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-5
    for y, z in zip(_answer(model, args), _answer(fused, args), strict=True):
        assert (y.double() - z.double()).norm() <= bound * y.double().norm()


def test_no_generator_moves_and_no_hook_is_called(seeded):
    model = with_norm(nn.Conv2d(3, 8, 3))
    seen: list[object] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model[2].register_forward_hook(lambda *_: seen.append(2))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fused = fuse(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert not seen
    fused(X)
    assert seen == [2, 1]
    assert unfused_norms(fused) == []


def test_what_takes_no_drawn_image_is_told_and_taken_with_an_example(seeded):
    model = two_inputs()
    with pytest.warns(UnfoldedWarning, match="takes none of the images that were drawn"):
        fuse(model)
    fused = fuse(model, (X, torch.tensor(2.0)))
    assert unfused_norms(fused) == []


@pytest.mark.parametrize("kind", [Counts, CountsApart])
def test_what_a_forward_keeps_is_in_the_fused_network_as_it_was_in_the_model(seeded, kind):
    model = kind().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfoldedWarning)
        fused = fuse(model)
    assert bool(unfused_norms(fused)) == (kind is Counts)
    for network in (model, fused):
        assert (float(network.num_calls), float(network.largest)) == (0, 0)
        assert (network.count, network.kept, network.seen) == (0, None, [])
    torch.testing.assert_close(fused(X), model(X))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_left_as_it_is_and_said(seeded):
    model = torch.jit.trace(with_norm(nn.Conv2d(3, 8, 3)), X)
    with pytest.warns(UnfoldedWarning, match="TorchScript module in it was left as it is"):
        assert torch.equal(fuse(model)(X), model(X))


def test_a_container_without_a_forward_is_fused_part_by_part(seeded):
    parts = nn.ModuleList([with_norm(nn.Conv2d(3, 8, 3)), with_norm(nn.Conv2d(8, 8, 3))]).eval()
    assert unfused_norms(fuse(parts)) == []


def test_a_sum_that_is_left_keeps_working(seeded):
    shared = nn.Conv2d(3, 8, 1, bias=False)
    model = shaken(nn.Sequential(Sum(Chain(shared, nn.BatchNorm2d(8)), Chain(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))))
    model.shared = shared  # and nobody calls it, but somebody may
    model.forward = lambda x: model[0](x)
    with pytest.warns(UnfoldedWarning, match="is shared with another part"):
        fused = fuse(model)
    assert torch.equal(fused.shared.weight, shared.weight)


def two_blocks() -> nn.Sequential:
    return shaken(nn.Sequential(with_norm(nn.Conv2d(3, 8, 3)), with_norm(nn.Conv2d(8, 8, 3))))


def patched_block() -> nn.Module:
    model = two_blocks()
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) + 1
    return model


def patched_root() -> nn.Module:
    model = two_blocks()
    model.forward = lambda x: model[1](model[0](x)) + 1
    return model


def patched_by_a_default() -> nn.Module:
    model = two_blocks()
    model[0].forward = lambda x, plain=model[0].forward: plain(x) + 1
    return model


def patched_by_a_partial() -> nn.Module:
    model = two_blocks()
    plain = model[0].forward

    @functools.wraps(plain)
    def doubled(x: Tensor) -> Tensor:
        return plain(x) * 2

    model[0].forward = functools.partial(doubled)
    return model


def patched_over_a_mapping() -> nn.Module:
    model = two_blocks()
    parts = {"first": model[0], "second": [model[1]]}
    model.steps = [lambda x: parts["second"][0](parts["first"](x))]
    model.forward = lambda x: model.steps[0](x)
    return model


def patched_tree() -> nn.Module:
    model = shaken(nn.Sequential(Chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU()))
    plain = model.forward
    model.forward = lambda x: plain(x) + 1
    return model


@pytest.mark.parametrize(
    "make",
    [patched_block, patched_root, patched_by_a_default, patched_by_a_partial, patched_over_a_mapping, patched_tree],
)
def test_a_forward_that_closes_over_layers_calls_the_copys_own(make, seeded):
    model = make()
    fused = fuse(model)
    assert unfused_norms(fused) == []
    before = _answer(model, (X,))[0], _answer(fused, (X,))[0]
    torch.testing.assert_close(*before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(_answer(fused, (X,))[0], before[1])
    assert not torch.equal(_answer(model, (X,))[0], before[0])


def test_a_forward_that_names_the_network_as_a_global_is_refused(seeded):
    model = two_blocks()
    scope = {"network": model}
    exec("network[0].forward = lambda x: network[0][1](network[0][0](x))", scope)
    kept = {"network": model, "owner": SimpleNamespace(network=model)}
    exec("def patched(x, plain=network[1].forward, owner=owner): return (owner.network, plain(x))[1]", kept)
    model[1].forward = kept["patched"]  # an attribute of that name is no global
    with pytest.raises(TypeError, match=r"'forward' of layer '0' is a function that calls .* a global, 'network'"):
        fuse(model)
    del model[0].forward
    assert unfused_norms(fuse(model)) == []


class Locked(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.guard = threading.Lock()


@pytest.mark.parametrize("nested", [False, True])
def test_what_cannot_be_copied_is_refused_by_the_name_of_its_attribute(nested):
    model = with_norm(Locked() if not nested else nn.Conv2d(3, 8, 3))
    if nested:
        model.cache = [iter(range(3)), (x for x in "ab")]
    where = r"'cache' of the network, a builtins\.list" if nested else r"'guard' of layer '0', a _thread\.lock"
    with pytest.raises(TypeError, match=f"cannot be copied, and fusing changes a copy: its attribute {where}"):
        fuse(model)
    if nested:
        del model.cache
    else:
        model[0].guard = None
    assert unfused_norms(fuse(model)) == []
