"""Laws of the algebra: what folds, folds exactly; what does not, says so.

The independent derivation is a kernel read off by impulses: an affine, translation-invariant map is known from its
answers to single ones, and no folding rule is used to get them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from conftest import shaken
from onefold.reparam import Chain, Scale, Stencil, Sum, drift, fold, fuse, is_linear
from onefold.reparam.folding_rules import fused_layer

C = 8
bn, conv = nn.BatchNorm2d, nn.Conv2d


def conv_norm(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> Chain:
    """A padded convolution without bias, and its norm."""
    layer = conv(c_in, c_out, size, stride, size // 2 * dilation, dilation, groups, bias=False)
    return Chain(layer, bn(c_out))


def four(*shape: int) -> list[Chain]:
    return [conv_norm(*shape) for _ in range(4)]


TREES = {
    "conv + norm": lambda: conv_norm(C, 12, 3, 2),
    "conv with bias + norm without affine": lambda: Chain(conv(C, 12, 3), bn(12, affine=False)),
    "repvgg": lambda: Sum(conv_norm(C, C, 3), conv_norm(C, C, 1), bn(C)),
    "mobileone depthwise": lambda: Sum(*[conv_norm(C, C, 3, 1, C) for _ in range(4)], conv_norm(C, C, 1, 1, C), bn(C)),
    "mobileone depthwise, stride 2": lambda: Sum(
        *[conv_norm(C, C, 3, 2, C) for _ in range(4)], conv_norm(C, C, 1, 2, C)
    ),
    "mobileone pointwise": lambda: Sum(*[conv_norm(C, 12, 1) for _ in range(4)]),
    "acnet": lambda: Sum(
        conv_norm(C, C, 3),
        Chain(conv(C, C, (1, 3), padding=(0, 1)), bn(C)),
        Chain(conv(C, C, (3, 1), padding=(1, 0)), bn(C)),
    ),
    "diverse branch": lambda: Sum(
        conv_norm(C, 16, 3),
        conv_norm(C, 16, 1),
        Chain(conv(C, C, 1, padding=1, bias=False), bn(C), conv(C, 16, 3), bn(16)),
        Chain(conv(C, 16, 1, padding=1, bias=False), bn(16), nn.AvgPool2d(3, 1), bn(16)),
    ),
    "fastvit mixer": lambda: Sum(
        nn.Identity(),
        Chain(Sum(conv_norm(C, C, 7, 1, C), conv_norm(C, C, 3, 1, C), bn(C)), bn(C), Scale(C, 0.3)),
    ),
    "mixed groups and sizes": lambda: Sum(conv_norm(C, C, 3, 1, 4), conv_norm(C, C, 5, 1, 2), conv_norm(C, C, 1, 1, 8)),
    "two 3x3, strided": lambda: Chain(conv(C, 12, 3, 2, 3, bias=False), bn(12), conv(12, 6, 3, 2)),
    "dense then depthwise": lambda: Chain(conv(C, 12, 1, padding=1), conv(12, 12, 3, groups=12)),
    "norm before conv": lambda: Chain(bn(C), conv(C, 6, 3)),
    "dilated alone": lambda: conv_norm(C, C, 3, 1, 1, dilation=2),
    "dilated branches": lambda: Sum(
        conv_norm(C, C, 3, 1, C, 2), conv_norm(C, C, 3, 1, C, 3), conv_norm(C, C, 3, 1, C), bn(C)
    ),
    "dilated in series": lambda: Chain(conv(C, C, 3, 2, 4, 2), conv(C, C, 3, dilation=2)),
    "same padding": lambda: Sum(conv(C, C, 5, padding="same"), conv(C, C, 3, padding="same", dilation=2)),
    "average pool": lambda: Chain(nn.AvgPool2d(3, 2, 1), conv(C, 4, 1)),
    "spectral norm": lambda: Chain(parametrizations.spectral_norm(conv(C, 6, 3)), bn(6)),
    "weight norm": lambda: Sum(parametrizations.weight_norm(conv(C, 6, 3)), conv(C, 6, 3)),
    "one branch, synchronized norm": lambda: Sum(Chain(conv(C, 6, 1), nn.SyncBatchNorm(6))),
}


def by_impulses(tree: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """(O, I, size, size) responses around the centre of an image, and the bias: no rule of the algebra is used."""
    side = 8 * size + 1
    flat = torch.zeros(1, C, side, side, dtype=torch.float64)
    ones = flat.repeat(C, 1, 1, 1)
    ones[range(C), range(C), side // 2, side // 2] = 1
    base = tree(flat)
    return (tree(ones) - base).transpose(0, 1), base[0, :, base.shape[2] // 2, base.shape[3] // 2]


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_every_tree_folds_to_one_convolution(make, seeded):
    tree = shaken(make()).double()
    fused = fuse(tree)
    assert type(fused) is conv
    assert drift(tree, fused, torch.randn(2, C, 17, 19, dtype=torch.float64)) <= 1e-14


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_the_folded_kernel_is_the_one_that_impulses_show(make, seeded):
    tree = shaken(make()).double()
    responses, bias = by_impulses(tree, 5)
    fused = fuse(tree)
    assert torch.allclose(fused.bias, bias, atol=1e-13)
    folded, folded_bias = by_impulses(fused, 5)
    assert torch.allclose(folded, responses, atol=1e-13)
    assert torch.allclose(folded_bias, bias, atol=1e-13)
    # and every number of the kernel shows up: an impulse meets each tap once for each stride-th position
    if fused.stride == (1, 1):
        assert folded.abs().sum().item() == pytest.approx(fused.weight.abs().sum().item(), rel=1e-10)


def test_a_dilated_kernel_keeps_its_few_taps(seeded):
    fused = fuse(shaken(conv_norm(C, C, 3, 1, C, dilation=2)))
    assert fused.kernel_size == (3, 3)
    assert fused.dilation == (2, 2)


# ----------------------------------------------------------------------------- laws, on drawn geometry


@st.composite
def stencils(draw, channels: tuple[int, int] | None = None, *, padded: bool = True, stride: int | None = None):
    c_in, c_out = channels or (draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([2, 4, 6])))
    groups = draw(st.sampled_from([g for g in (1, 2, 4, 6) if c_in % g == 0 and c_out % g == 0]))
    size = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2))) if padded else (0, 0)
    step = stride or draw(st.integers(1, 2))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = torch.randn(c_out, c_in // groups, *size, dtype=torch.float64, generator=generator)
    bias = torch.randn(c_out, dtype=torch.float64, generator=generator)
    return Stencil(weight, bias, groups, (step, step), padding, dilation)


def images(channels: int) -> Tensor:
    return torch.randn(2, channels, 60, 51, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def apply(stencil: Stencil, x: Tensor) -> Tensor:
    return stencil.conv(torch.float64)(x)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_series_is_composition(data):
    a = data.draw(stencils())
    b = data.draw(stencils((a.channels[1], 4), padded=False))
    x = images(a.channels[0])
    assert torch.allclose(apply(a.then(b), x), apply(b, apply(a, x)), atol=1e-11)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_parallel_is_addition(data):
    a = data.draw(stencils())
    b = data.draw(stencils(a.channels, stride=a.stride[0]))
    x = images(a.channels[0])
    if a.grid == b.grid:
        assert torch.allclose(apply(a + b, x), apply(a, x) + apply(b, x), atol=1e-11)
        assert torch.allclose(apply(b + a, x), apply(a + b, x), atol=1e-12)
    else:
        with pytest.raises(ValueError, match="maps of one shape"):
            a + b


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_series_is_associative_and_distributes_over_parallel(data):
    a = data.draw(stencils((4, 4)))
    b = data.draw(stencils((4, 4), padded=False))
    c = data.draw(stencils((4, 4), padded=False))
    x = images(4)
    assert torch.allclose(apply(a.then(b).then(c), x), apply(a.then(b.then(c)), x), atol=1e-10)
    if b.grid == c.grid:
        assert torch.allclose(apply(a.then(b + c), x), apply(a.then(b) + a.then(c), x), atol=1e-10)


@given(stencils((4, 4)), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_diagonal_is_the_one_by_one_depthwise_kernel_that_it_looks_like(s, seed):
    gain, bias = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    d = Stencil.diagonal(gain, bias)
    x = images(4)
    assert torch.allclose(apply(s.then(d), x), apply(s, x) * gain.view(-1, 1, 1) + bias.view(-1, 1, 1), atol=1e-12)
    inner = Stencil(s.weight, s.bias, s.groups, s.stride, (0, 0), s.dilation)
    assert torch.allclose(apply(d.then(inner), x), apply(inner, apply(d, x)), atol=1e-12)


# --------------------------------------------------------------------------------------- vectors


def test_linear_layers_and_one_dimensional_norms_fold_to_a_linear(seeded):
    tree = shaken(Chain(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 4, bias=False))).double()
    fused = fuse(tree)
    assert type(fused) is nn.Linear
    assert drift(tree, fused, torch.randn(5, 6, dtype=torch.float64)) <= 1e-14


def test_a_sum_of_linear_layers_folds(seeded):
    tree = shaken(
        Sum(nn.Linear(6, 6), Chain(nn.Linear(6, 6), nn.BatchNorm1d(6)), nn.BatchNorm1d(6), Scale1d())
    ).double()
    assert drift(tree, fuse(tree), torch.randn(5, 6, dtype=torch.float64)) <= 1e-14


class Scale1d(nn.Module):
    """A stranger's linear layer: its rule is registered below, and nothing else had to change."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(1, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@fold.register
def _(op: Scale1d, onto: Stencil) -> Stencil:
    return onto.then(Stencil.diagonal(op.gain.to(onto.weight.dtype)))


# --------------------------------------------------------------------------------------- refusals


class Padded(conv):
    """A convolution with a forward pass of its own: the inherited rule would be wrong for it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def uneven_pool() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


REFUSALS = {
    "an activation in a Chain": (TypeError, "ReLU is not linear", lambda: Chain(conv(3, 3, 1), nn.ReLU())),
    "an activation in a Sum": (TypeError, "GELU is not linear", lambda: Sum(conv(3, 3, 1), nn.GELU())),
    "an empty Sum": (ValueError, "at least one branch", lambda: Sum()),
    "a forward of its own": (TypeError, "Padded is not linear", lambda: Chain(Padded(3, 3, 1), bn(3))),
    "a late padding": (ValueError, "only the first layer", lambda: Chain(conv(3, 3, 1), conv(3, 3, 3, padding=1))),
    "a late padding in a Sum": (
        ValueError,
        "only the first layer",
        lambda: Chain(bn(C), Sum(conv(C, C, 3, padding=1), conv(C, C, 1))),
    ),
    "a late padding put in afterwards": (
        ValueError,
        "only the first layer",
        lambda: fused_layer(Chain(conv(3, 3, 1)).append(conv(3, 3, 3, padding=1))),
    ),
    "reflecting padding": (
        ValueError,
        "pads by 'reflect'",
        lambda: fused_layer(Chain(conv(3, 3, 3, padding=1, padding_mode="reflect"))),
    ),
    "maps of two sizes": (ValueError, "maps of one shape", lambda: fused_layer(Sum(conv(3, 3, 3), conv(3, 3, 1)))),
    "uneven padding": (ValueError, "one side more", lambda: fused_layer(Sum(conv(3, 3, 2, padding="same")))),
    "channels that do not meet": (
        ValueError,
        "the next takes 5",
        lambda: fused_layer(Chain(conv(3, 4, 1), conv(5, 3, 1))),
    ),
    "an uneven pool": (
        ValueError,
        "does not fold",
        lambda: fused_layer(Chain(uneven_pool(), bn(C)).eval()),
    ),
    "nothing that has a width": (ValueError, "how many channels", lambda: fused_layer(Sum(nn.Identity()))),
    "train mode": (ValueError, r"call model.eval\(\) first", lambda: fuse(Chain(conv(3, 3, 1), bn(3)))),
    "no running statistics": (
        ValueError,
        "without running statistics",
        lambda: fused_layer(Chain(conv(3, 3, 1), bn(3, track_running_stats=False)).eval()),
    ),
}


@pytest.mark.parametrize(("kind", "says", "make"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_fold_is_refused_with_a_reason(kind, says, make):
    with pytest.raises(kind, match=says):
        make()


def test_is_linear_asks_for_a_rule_or_an_inherited_forward():
    assert is_linear(parametrizations.weight_norm(conv(3, 3, 1)))
    assert not is_linear(Padded(3, 3, 1))
    assert not is_linear(nn.Dropout())


def test_other_projects_tools_find_our_trees(timm, seeded):
    model = nn.Sequential(shaken(TREES["repvgg"]()), nn.ReLU(), shaken(TREES["conv + norm"]()))
    theirs = timm.utils.reparameterize_model(model)
    assert [type(m) for m in theirs] == [conv, nn.ReLU, conv]
    assert drift(model, theirs, torch.randn(2, C, 9, 9)) <= 2e-6
    assert isinstance(copy.deepcopy(model)[0], Sum)
