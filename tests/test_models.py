"""The zoo: one contract, over every name of the catalogue, and the parts that the networks are made of.

A new family is picked up from CATALOGUE by itself. REPEATS names what has the structure of a quick name in other
numbers; `make test-slow` runs those too.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.errors import BadArgument
from onefold.models import CATALOGUE, Classifier, FeatureNet, create_model, list_models, resolve
from onefold.models.parts import DynamicReLU, SamePad, SqueezeExcite, conv_norm, init_
from onefold.reparam import drift, fuse, leftovers

REPEATS = {
    *(f"mobileone_s{n}" for n in (1, 2, 3)),
    *(f"mobileformer_{size}m" for size in (52, 151, 214, 294, 508)),
    *(f"mobilenetv1_{width}{dot}" for width in ("100", "075", "050") for dot in ("", ".tf", ".timm", ".leaky")),
    "conv_mobilenet_100",
}
FLAVOURS = {name for name in REPEATS if "." in name}
FIRST = {name.split("_")[0]: name for name in reversed(CATALOGUE)}.values()  # of each family
CLASSES = 10


def zoo(slow: set[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in CATALOGUE]


@torch.no_grad()
def shaken(name: str, size: tuple[int, int] = (64, 48)) -> Classifier:
    """A network in eval mode whose norms do something, and whose answer moves no more than its input does.

    Every norm gets the scale of what it meets, then everything about it is moved at random. Convolutions get a
    positive mean, as with zero mean a deep network is chaotic: it would show rounding, not errors.
    """
    torch.manual_seed(0)
    net = create_model(name, num_classes=CLASSES).eval()

    def settle(norm: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(norm, _BatchNorm)
        power = args[0].square().mean([d for d in range(args[0].ndim) if d != 1])
        power = power + power.mean() / 4

        def between(low: float, high: float) -> Tensor:
            return torch.empty_like(power).uniform_(low, high)

        norm.running_var.copy_(power * between(0.5, 2))
        norm.running_mean.copy_(power.sqrt() * between(-0.2, 0.2))
        norm.weight.copy_(between(0.5, 1.5))
        norm.bias.copy_(between(-0.3, 0.3))

    hooks = [m.register_forward_pre_hook(settle) for m in net.modules() if isinstance(m, _BatchNorm)]
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.add_(conv.weight.std() / 4)
    net(torch.randn(2, 3, *size))
    for hook in hooks:
        hook.remove()
    assert isinstance(net, Classifier)
    return net


@pytest.fixture(scope="module", params=zoo(REPEATS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def net(name: str) -> Classifier:
    """Shared by a name's tests: leave it as it is."""
    return shaken(name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 64, 48))


# --------------------------------------------------------------------------- the contract of a classifier


@torch.no_grad()
def test_logits_are_the_head_of_the_features(net: Classifier) -> None:
    x = images()
    logits = net(x)
    assert logits.shape == (2, CLASSES)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])
    state = net.forward_features(x)
    pooled = net.forward_head(state, pre_logits=True)
    assert pooled.shape == (2, net.num_features)
    assert torch.equal(net.forward_head(state), logits)
    assert torch.equal(net.get_classifier()(pooled), logits)
    assert net.num_classes == CLASSES


@torch.no_grad()
def test_an_image_is_answered_alone_as_in_a_batch(net: Classifier) -> None:
    x = images(3, 3, 40, 40)
    together = net(x)
    alone = torch.cat([net(image[None]) for image in x])
    assert (together - alone).norm() / together.norm() < 1e-5


@torch.no_grad()
def test_features_are_the_last_maps_at_each_reduction(net: Classifier) -> None:
    x = images(1, 3, 97, 65)
    seen: list[tuple[str, Tensor]] = []

    def note(name: str, _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, Tensor]) -> None:
        seen.append((name, output if isinstance(output, Tensor) else output[0]))

    top = [("stem", net.stem), *((f"stages.{n}", stage) for n, stage in enumerate(net.stages))]
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in top]
    net(x)
    for hook in hooks:
        hook.remove()
    last = {y.shape[2:]: (name, y) for name, y in seen}  # later ones of a size replace earlier ones
    features = FeatureNet(net)
    maps, info = features(x), features.feature_info
    assert info.reduction() == [2, 4, 8, 16, 32]
    assert info.module_name() == [name for name, _ in last.values()]
    assert [(y.shape[1], *y.shape[2:]) for y in maps] == [
        (c, math.ceil(97 / r), math.ceil(65 / r)) for c, r in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert all(torch.equal(ours, theirs) for ours, (_, theirs) in zip(maps, last.values(), strict=True))
    assert net.feature_info == info.get_dicts()
    assert list(net.feature_info[0]) == ["num_chs", "reduction", "module"]


@torch.no_grad()
def test_features_come_in_the_order_asked_and_nothing_deeper_runs(net: Classifier) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a stage past the deepest map ran")

    x = images(1, 3, 64, 64)
    every = FeatureNet(net)(x)
    hooks = [part.register_forward_pre_hook(fail) for part in (net.stages[-1], net.head)]
    some = FeatureNet(net, out_indices=(2, 0))
    maps = some(x)
    for hook in hooks:
        hook.remove()
    assert torch.equal(maps[0], every[2])
    assert torch.equal(maps[1], every[0])
    assert some.feature_info.reduction() == [8, 2]
    assert torch.equal(FeatureNet(net, out_indices=[-1])(x)[0], every[-1])
    kept = {key for key in net.state_dict() if key.startswith(tuple(f"{part}." for part in ("stem", *_until(net, 2))))}
    assert set(some.state_dict()) == kept


def _until(net: Classifier, index: int) -> list[str]:
    deepest = int(net.features[index].module.removeprefix("stages."))
    return [f"stages.{n}" for n in range(deepest + 1)]


@torch.no_grad()
def test_resetting_the_classifier(net: Classifier) -> None:
    x, mine = images(), copy.deepcopy(net)
    pooled = net.forward_head(net.forward_features(x), pre_logits=True)
    mine.reset_classifier(0)
    assert mine.num_classes == 0
    assert torch.equal(mine(x), pooled)
    mine.double().reset_classifier(7)
    assert mine(x.double()).shape == (2, 7)
    with pytest.raises(BadArgument, match="num_classes"):
        mine.reset_classifier(-1)


@torch.no_grad()
def test_a_copy_answers_the_same_and_is_another_network(net: Classifier) -> None:
    x, mine = images(), copy.deepcopy(net)
    before = net(x)
    assert torch.equal(mine(x), before)
    for parameter in mine.parameters():
        parameter.mul_(1.1)
    assert not torch.equal(mine(x), before)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_and_sizes(name: str, channels: int) -> None:
    net = create_model(name, num_classes=3, in_chans=channels).eval()
    with torch.no_grad():
        assert net(images(1, channels, 33, 50)).shape == (1, 3)
    deployed = fuse(net)
    first = next(m for m in deployed.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == channels


# ------------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize("name", zoo(FLAVOURS | {"conv_mobilenet_100"}))
def test_every_network_folds_without_a_trace(name: str) -> None:
    net = shaken(name, size=(48, 33))
    x = images(1, 3, 48, 33)
    assert drift(net, fuse(net), x) < 2e-6
    folded = fuse(net.double())
    assert drift(net, folded, x.double()) < 1e-12
    assert leftovers(folded) == []
    assert not any("branches" in key or "running" in key for key in folded.state_dict())


def test_feature_networks_fold_too(net: Classifier) -> None:
    features = FeatureNet(net, out_indices=(1, 3))
    folded = fuse(features)
    assert drift(features, folded, images(1, 3, 65, 48)) < 2e-6
    assert leftovers(folded) == []
    assert folded.feature_info == features.feature_info


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "mobileone_s0" else pytest.mark.slow) for n in CATALOGUE]
)
def test_folding_at_full_size(name: str) -> None:
    net = shaken(name, size=(224, 224))
    x = images(1, 3, 224, 224)
    assert drift(net, fuse(net), x) < 2e-6
    if name != "mobileone_s0" or sys.gettrace() is None:
        assert drift(net.double(), fuse(net), x.double()) < 1e-12


def test_a_lost_branch_would_be_seen() -> None:
    net = shaken("mobileone_s0")
    x = images()
    folded = fuse(net)
    victim = net.stages[1][4].conv  # depthwise: four convolutions, the 1x1, the skip
    assert len(victim) == 6
    del victim[5]
    assert drift(net, folded, x) > 1e-3


def test_a_folded_network_is_trained_on_as_before(net: Classifier) -> None:
    folded = fuse(net).train()
    F.cross_entropy(folded(images()), torch.tensor([1, 2])).backward()
    still = [key for key, p in folded.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert still == []


# --------------------------------------------------------------------------------- training and execution


def test_a_step_of_training_reaches_every_parameter_and_lowers_the_loss(name: str) -> None:
    net = create_model(name, num_classes=CLASSES)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x, labels = images(8, 3, 64, 64), torch.arange(8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        bad = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert bad == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    dead = [key for key, p in net.named_parameters() if p.grad is not None and not p.grad.any()]
    assert dead == []


@torch.no_grad()
def test_channels_last_changes_nothing(net: Classifier) -> None:
    x = images()
    mine = copy.deepcopy(net).to(memory_format=torch.channels_last)
    y = net(x)
    assert (mine(x.to(memory_format=torch.channels_last)) - y).norm() / y.norm() < 1e-5
    folded = fuse(mine)
    assert (folded(x.to(memory_format=torch.channels_last)) - y).norm() / y.norm() < 1e-5


@torch.no_grad()
def test_bfloat16_autocast_stays_near(net: Classifier) -> None:
    x = images()
    y = net(x)
    for model in (net, fuse(net)):
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert low.dtype == torch.bfloat16
        assert (low.float() - y).norm() / y.norm() < 0.05


def test_bfloat16_autocast_trains(net: Classifier) -> None:
    mine = copy.deepcopy(net).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(mine(images(4, 3, 64, 64)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in mine.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", zoo(set(CATALOGUE) - set(FIRST) | {"conv_mobilenet_100"}))
@pytest.mark.parametrize("folded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["folded", "training"])
def test_exported_program_answers_any_batch(name: str, folded: bool) -> None:
    net: nn.Module = shaken(name)
    net = fuse(net) if folded else net
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (images(),), dynamic_shapes={"x": {0: batch}})
    run = program.module()
    for count in (1, 5):
        x = images(count, 3, 64, 48)
        assert (run(x) - net(x)).norm() / net(x).norm() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", zoo(set(CATALOGUE) - set(FIRST) | {"conv_mobilenet_100"}))
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    net = fuse(shaken(name))
    x = images()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert (compiled(x) - net(x)).norm() / net(x).norm() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_network_compiles(backend: str) -> None:
    torch._dynamo.reset()
    net = shaken("mobilenetv1_025").train()
    mine = copy.deepcopy(net)
    x, labels = images(), torch.tensor([1, 2])
    F.cross_entropy(net(x), labels).backward()
    F.cross_entropy(torch.compile(mine, backend=backend, fullgraph=True)(x), labels).backward()
    for ours, theirs in zip(net.parameters(), mine.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
