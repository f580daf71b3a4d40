"""Expanding a fused network: it folds back to the same kernels, and starts training from the same function."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from conftest import shaken
from onefold.models import create_model
from onefold.reparam import Chain, Sum, expand, fuse, moments, per_branch, recalibrate_norms_, set_route_

VARIANTS = [f"mobileone_s{i}" for i in range(3)] + ["mobilenetv1_025", "mobilenetv1_025.tf", "mobileformer_26m"]
LARGE = [pytest.param(f"mobileone_s{i}", marks=pytest.mark.slow) for i in (3, 4)]


def furthest(a: nn.Module, b: nn.Module) -> float:
    """The largest relative distance of two networks' tensors, tensor by tensor."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n].double() - theirs[n].double()).norm() / ours[n].double().norm().clamp(min=1e-30))
        for n in ours
        if ours[n].is_floating_point()
    )


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A training network with fresh weights, and the fused form of another one whose norms do normalise."""
    torch.manual_seed(0)
    source = shaken(create_model(name, num_classes=4).to(dtype)).train()
    for norm in source.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 1.0
    with torch.no_grad():
        source(torch.randn(16, 3, 32, 32).to(dtype))
        for norm in source.modules():  # no channel is dead, or blown up by a small variance
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_var.clamp_(min=float(norm.running_var.mean()) / 2)
    return create_model(name, num_classes=4).to(dtype), fuse(source.eval())


@pytest.mark.parametrize("name", [*VARIANTS, *LARGE])
def test_an_expanded_network_folds_to_the_fused_one(name):
    like, fused = pair(name, torch.float64)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        like, fused = like.to(dtype), fused.to(dtype)
        expanded = expand(fused, like)
        assert [v.shape for v in expanded.state_dict().values()] == [v.shape for v in like.state_dict().values()]
        assert furthest(fused, fuse(expanded.eval())) <= bound


@pytest.mark.parametrize("name", ["mobileone_s0", "mobileone_s1", "mobilenetv1_025"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_on_the_photos_that_it_was_stated_for_training_starts_from_the_same_function(name, dtype, bound):
    like, fused = pair(name, dtype)
    photos = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expanded = expand(fused, like).eval()
    recalibrate_norms_(expanded, photos.split(4))
    assert furthest(fused, fuse(expanded)) <= {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    with torch.no_grad():
        wanted, got = fused(photos), expanded.train()(photos)
    assert float((wanted - got).norm() / wanted.norm()) <= bound


def test_training_moves_the_folded_kernel_as_far_as_the_fused_one():
    torch.manual_seed(0)
    tree = Sum(*(Chain(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)) for _ in range(4))).double()
    conv = nn.Conv2d(6, 6, 1).double()
    expanded = expand(nn.Sequential(conv), nn.Sequential(tree)).eval()
    x = torch.randn(16, 6, 5, 5).double()
    for norm in expanded.modules():  # only kernels learn here
        if isinstance(norm, nn.BatchNorm2d):
            norm.requires_grad_(False)
    for model in (conv, expanded):
        model(x).square().mean().backward()
    step, before = 0.1, conv.weight.clone()
    with torch.no_grad():
        for model in (conv, expanded):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= step * parameter.grad
    moved = fuse(expanded)[0].weight
    torch.testing.assert_close(moved - before, conv.weight - before, rtol=1e-6, atol=1e-12)


def test_branches_of_one_shape_begin_apart_and_by_the_seed():
    like, fused = pair("mobileone_s0", torch.float32)
    first, second = (expand(fused, like, torch.Generator().manual_seed(5)) for _ in range(2))
    again = second.state_dict()
    assert all(torch.equal(v, again[n]) for n, v in first.state_dict().items())
    for tree in first.modules():
        if isinstance(tree, Sum):
            kernels = [branch[0].weight for branch in tree if isinstance(branch, Chain)]
            alike = [(a, b) for a, b in pairwise(kernels) if a.shape == b.shape]
            assert not any(torch.allclose(a, b) for a, b in alike)


def test_the_arguments_are_untouched_and_the_random_state_too():
    like, fused = pair("mobilenetv1_025", torch.float32)
    before = {n: v.clone() for n, v in like.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    expand(fused, like, torch.Generator())
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(before[n], v) for n, v in like.state_dict().items())


def test_restating_is_exact_for_any_split_of_the_images_and_changes_no_function():
    model = shaken(create_model("mobileone_s1", num_classes=3).double())
    x = torch.randn(5, 3, 32, 32).double()
    before = model(x)
    recalibrate_norms_(model, [x[:1], x[1:4], x[4:]])
    assert float(((model(x) - before).norm() / before.norm()).detach()) <= 1e-12
    first = model.stem.conv[0]
    z = first[0](x)
    torch.testing.assert_close(first[1].running_mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(first[1].running_var, z.var((0, 2, 3), correction=0))


def test_a_whole_network_learns_by_the_moments_route_after_expansion():
    like, fused = pair("mobileone_s0", torch.float64)
    photos = torch.randn(4, 3, 32, 32).double()
    expanded = expand(fused, like).eval()
    recalibrate_norms_(expanded, [photos])
    by_branch = set_route_(expanded.train(), per_branch)(photos)
    by_moments = set_route_(expanded, moments)(photos)
    assert float((by_branch - by_moments).detach().norm() / by_branch.detach().norm()) <= 1e-9


def test_what_cannot_be_expanded_is_refused():
    like, fused = pair("mobilenetv1_025", torch.float32)
    with pytest.raises(ValueError, match=r"one convolution at 'stem\.conv'.*there is Chain"):
        expand(like, like)
    with pytest.raises(ValueError, match="outside of what folds they differ"):
        expand(fused, create_model("mobilenetv1_025", num_classes=5))
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        recalibrate_norms_(like.train(), [])
    with pytest.raises(ValueError, match="has got no images"):
        recalibrate_norms_(like.eval(), [])
    two = nn.Sequential(Chain(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match="cannot be expanded"):
        expand(nn.Sequential(nn.Conv2d(3, 3, 1)), two)
