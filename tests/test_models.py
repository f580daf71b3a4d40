"""The zoo: one contract, over every name of the catalogue, and the parts that the networks are made of.

A new family is picked up from CATALOGUE by itself. REPEATS names what has the structure of a quick name in other
numbers; `make test-slow` runs those too.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.errors import BadArgument
from onefold.models import CATALOGUE, Classifier, FeatureNet, create_model, list_models, resolve_name
from onefold.models.layers import DynamicReLU, SamePad, SqueezeExcite, conv_norm, init_weights_
from onefold.models.mobilenetv1 import Variant, mobilenetv1
from onefold.reparam import Route, drift, fuse, mixed, moments, per_branch, quickest, set_route_, unfused_norms

REPEATS = {
    *(f"mobileone_s{n}" for n in (1, 2, 3, 4)),
    *(f"mobileformer_{size}m" for size in (52, 151, 214, 294, 508)),
    *(f"mobilenetv1_{width}{dot}" for width in ("100", "075", "050") for dot in ("", ".tf", ".timm", ".leaky")),
    "conv_mobilenet_100",
}
FLAVOURS = {name for name in REPEATS if "." in name}
CLASSES = 10


def zoo(slow: set[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in CATALOGUE]


@torch.no_grad()
def shaken(name: str, size: tuple[int, int] = (48, 33)) -> Classifier:
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
    return torch.randn(shape or (2, 3, 48, 33))


# --------------------------------------------------------------------------- the contract of a classifier


@torch.no_grad()
def test_logits_are_the_head_of_the_features(net: Classifier) -> None:
    x = images()
    logits = net(x)
    assert logits.shape == (2, CLASSES)
    assert logits.isfinite().all()
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


def test_a_network_is_sent_to_another_process_whole(net: Classifier) -> None:
    """As `World.first` sends it, fused ones too: the same routes, tensors and answer."""
    for sent in (net, fuse(net)):
        received = pickle.loads(pickle.dumps(sent))
        assert [type(module) for module in received.modules()] == [type(module) for module in sent.modules()]
        assert list(received.state_dict()) == list(sent.state_dict())
        assert received(x := torch.rand(2, 3, 48, 33)).equal(sent(x))


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
    net, x = shaken(name, size=(33, 32)), images(1, 3, 33, 32)
    assert drift(net, fuse(net), x) < 2e-6
    folded = fuse(net.double())
    assert drift(net, folded, x.double()) < 1e-12
    assert unfused_norms(folded) == []
    assert not any("branches" in key or "running" in key for key in folded.state_dict())


def test_feature_networks_fold_too(net: Classifier) -> None:
    features = FeatureNet(net, out_indices=(1, 3))
    folded = fuse(features)
    assert drift(features, folded, images(1, 3, 65, 48)) < 2e-6
    assert unfused_norms(folded) == []
    assert folded.feature_info == features.feature_info


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "mobileone_s0" else pytest.mark.slow) for n in CATALOGUE]
)
def test_folding_at_full_size(name: str) -> None:
    net = shaken(name, size=(224, 224))
    x = images(1, 3, 224, 224)
    assert drift(net, fuse(net), x) < 2e-6
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
    x, labels = images(6, 3, 48, 48), torch.arange(6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        bad = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert bad == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
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
        loss = F.cross_entropy(mine(images(3, 3, 33, 33)), torch.arange(3))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in mine.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", zoo(set(CATALOGUE) - {"mobileone_s0", "mobilenetv1_025.tf"}))
@pytest.mark.parametrize("folded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["folded", "training"])
def test_exported_program_answers_any_batch(name: str, folded: bool) -> None:
    net: nn.Module = shaken(name)
    net = fuse(net) if folded else net
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (images(),), dynamic_shapes={"x": {0: batch}})
    run = program.module()
    for count in (1, 5):
        x = images(count, 3, 48, 33)
        assert (run(x) - net(x)).norm() / net(x).norm() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", zoo(set(CATALOGUE) - {"mobilenetv1_025"}))
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    net = fuse(shaken(name))
    x = images()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert (compiled(x) - net(x)).norm() / net(x).norm() < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
@pytest.mark.parametrize(
    ("route", "backend"),
    [
        *itertools.product((per_branch, moments, mixed, quickest), ["aot_eager"]),
        (per_branch, "inductor"),
        (quickest, "inductor"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_training_network_compiles(route: Route, backend: str) -> None:
    """As one graph by `per_branch`; the other routes run compiled code of their own, so the graph breaks at a unit."""
    torch._dynamo.reset()
    net = set_route_(shaken("mobilenetv1_025").train(), route)
    mine = copy.deepcopy(net)
    x, labels = images(2, 3, 64, 64), torch.tensor([1, 2])
    F.cross_entropy(net(x), labels).backward()
    F.cross_entropy(torch.compile(mine, backend=backend, fullgraph=route is per_branch)(x), labels).backward()
    for ours, theirs in zip(net.parameters(), mine.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(net.buffers(), mine.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------ names and arguments


@pytest.mark.parametrize(
    ("spelled", "proper"),
    [
        ("MobileOne-S0", "mobileone_s0"),
        ("mobile-former-508m", "mobileformer_508m"),
        ("mobile_former_26m", "mobileformer_26m"),
        ("mobilenetv1_1.0", "mobilenetv1_100"),
        ("mobilenet_v1_0.75", "mobilenetv1_075"),
        ("mobilenet-v1-0.5.tf", "mobilenetv1_050.tf"),
        ("MobileNetV1", "mobilenetv1_100"),
        ("mobilenetv1.timm", "mobilenetv1_100.timm"),
        ("mobilenetv1_025.leaky", "mobilenetv1_025.leaky"),
        ("conv_mobilenet", "conv_mobilenet_100"),
    ],
)
def test_usual_spellings_are_understood(spelled: str, proper: str) -> None:
    assert resolve_name(spelled) == proper


def test_every_name_is_its_own_spelling() -> None:
    assert [resolve_name(name) for name in CATALOGUE] == list(CATALOGUE)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadArgument, match=r"'mobileone_s9'.*mobileone_s"):
        create_model("mobileone_s9")
    with pytest.raises(BadArgument, match="list_models"):
        create_model("vgg")


def test_names_are_listed_by_pattern() -> None:
    assert list_models() == list(CATALOGUE)
    assert list_models("mobileone*") == [f"mobileone_s{n}" for n in range(5)]
    assert list_models("MOBILENETV1_025*") == [f"mobilenetv1_025{dot}" for dot in ("", ".tf", ".timm", ".leaky")]
    assert list_models("resnet*") == []


def test_rows_say_how_images_are_prepared() -> None:
    keys = ["size", "crop_pct", "mean", "std", "interpolation", "channels"]
    assert all(list(entry.input) == keys and entry.size == 224 for entry in CATALOGUE.values())
    assert all((entry.top1 is None) == (entry.source == "") for entry in CATALOGUE.values())
    centred = {name for name, entry in CATALOGUE.items() if entry.input["mean"] == (0.5, 0.5, 0.5)}
    assert centred == {name for name in CATALOGUE if name.endswith((".tf", ".timm"))}


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": -1},
        {"in_chans": 0},
        {"out_indices": (0,)},
        {"features_only": True, "out_indices": (5,)},
        {"features_only": True, "out_indices": ()},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(BadArgument):
        create_model("mobilenetv1_025", **arguments)  # type: ignore[arg-type]


def test_weights_go_to_the_hub_and_its_network_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, str]] = []

    def load_weights_(model: nn.Module, weights: object, name: str) -> nn.Module:
        asked.append((weights, name))
        return fuse(model.eval())

    monkeypatch.setattr("onefold.models.load_model.load_weights_", load_weights_)
    assert unfused_norms(create_model("MobileOne-S1", weights="w.safetensors")) == []
    features = create_model("mobilenetv1_0.25.tf", weights="w.safetensors", features_only=True, out_indices=(4,))
    assert asked == [("w.safetensors", "mobileone_s1"), ("w.safetensors", "mobilenetv1_025.tf")]
    assert isinstance(features, FeatureNet)
    assert unfused_norms(features) == []


# ------------------------------------------------------------------------------------ trees and their names


@pytest.mark.parametrize(
    ("name", "entries", "folded"),
    [("mobileone_s0", 1323, 88), ("mobileone_s1", 562, 88), ("mobileone_s4", 610, 136)],
)
def test_mobileone_has_as_many_tensors_as_the_released_weights(name: str, entries: int, folded: int) -> None:
    net = create_model(name).eval()
    assert len(net.state_dict()) == entries
    assert len(fuse(net).state_dict()) == folded


def test_mobileone_names() -> None:
    net = create_model("mobileone_s4").eval()
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert shapes["stem.conv.0.0.weight"] == (64, 3, 3, 3)
    assert shapes["stem.conv.1.0.weight"] == (64, 3, 1, 1)
    assert shapes["stages.0.2.conv.0.0.weight"] == (192, 1, 3, 3)
    assert shapes["stages.0.2.conv.1.0.weight"] == (192, 1, 1, 1)
    assert shapes["stages.0.2.conv.2.running_var"] == (192,)
    assert shapes["stages.2.19.attn.reduce.weight"] == (56, 896, 1, 1)
    assert "stages.2.9.attn.reduce.weight" not in shapes
    folded = {key: tuple(value.shape) for key, value in fuse(net).state_dict().items()}
    assert folded["stages.3.1.conv.weight"] == (2048, 896, 1, 1)
    assert folded["stages.3.1.conv.bias"] == (2048,)
    assert folded["head.fc.weight"] == (1000, 2048)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("mobileone_s0", [48, 48, 128, 256, 1024]),
        ("mobileone_s1", [64, 96, 192, 512, 1280]),
        ("mobileone_s2", [64, 96, 256, 640, 2048]),
        ("mobileone_s3", [64, 128, 320, 768, 2048]),
        ("mobileone_s4", [64, 192, 448, 896, 2048]),
        ("mobileformer_294m", [16, 24, 48, 128, 192]),
        ("mobilenetv1_100", [64, 128, 256, 512, 1024]),
        ("mobilenetv1_025", [16, 32, 64, 128, 256]),
        ("conv_mobilenet_100", [64, 128, 256, 512, 1024]),
    ],
)
def test_widths_of_the_maps(name: str, widths: list[int]) -> None:
    with torch.device("meta"):
        net = create_model(name, features_only=True)
    assert isinstance(net, FeatureNet)
    assert net.feature_info.channels() == widths


def test_mobilenetv1_names_and_flavours() -> None:
    net = create_model("mobilenetv1_025.tf")
    assert isinstance(net, Classifier)
    assert [len(stage) for stage in net.stages] == [2, 4, 4, 12, 4]  # type: ignore[arg-type]
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert shapes["stem.conv.0.weight"] == (8, 3, 3, 3)
    assert shapes["stages.3.0.conv.0.weight"] == (64, 1, 3, 3)
    assert shapes["stages.3.1.conv.1.running_mean"] == (128,)
    strided = [key for key, module in net.named_modules() if isinstance(module, SamePad)]
    assert strided == ["stem.pad", *(f"stages.{n}.0.pad" for n in range(1, 5))]
    acts = {
        dot: {type(m) for m in create_model(f"mobilenetv1_025{dot}").modules() if isinstance(m, _ACTIVATIONS)}
        for dot in ("", ".tf", ".timm", ".leaky")
    }
    assert acts == {"": {nn.ReLU}, ".tf": {nn.ReLU6}, ".timm": {nn.ReLU6}, ".leaky": {nn.LeakyReLU}}
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.001]  # not 0.999, which TF-slim keeps
    leaky = create_model("mobilenetv1_025.leaky")
    assert {m.negative_slope for m in leaky.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}
    assert {m.eps for m in leaky.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


def test_mobilenetv1_is_never_narrower_than_eight() -> None:
    net = mobilenetv1(Variant(width=0.1), num_classes=2, in_chans=3)
    assert net.stem.conv[0].out_channels == 8  # type: ignore[index, union-attr]
    assert FeatureNet(net).feature_info.channels() == [8, 12, 25, 51, 102]


_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)


# -------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_puts_windows_where_tensorflow_does(kernel_size: int, stride: int) -> None:
    pad = SamePad(kernel_size, stride)
    for height, width in ((8, 9), (7, 12), (1, 2)):
        y = F.max_pool2d(pad(torch.rand(1, 1, height, width) + 1), kernel_size, stride)
        assert y.shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))
    # TensorFlow's definition: as many zeros as ceil(size / stride) windows need, the smaller half of them before.
    row = torch.arange(1.0, 11.0).view(1, 1, 1, 10)
    padded = pad(row)[0, 0, (pad(row)[0, 0].sum(1) > 0).nonzero()[0, 0]]
    needed = max((math.ceil(10 / stride) - 1) * stride + kernel_size - 10, 0)
    assert padded.tolist() == [0.0] * (needed // 2) + row.flatten().tolist() + [0.0] * (needed - needed // 2)


def test_same_padding_is_symmetric_at_odd_sizes_and_one_sided_at_even_ones() -> None:
    conv = nn.Conv2d(1, 1, 3, 2, bias=False)
    odd, even = torch.randn(1, 1, 9, 9), torch.randn(1, 1, 8, 8)
    pad = SamePad(3, 2)
    assert torch.allclose(conv(pad(odd)), F.conv2d(odd, conv.weight, stride=2, padding=1))
    assert torch.allclose(conv(pad(even)), F.conv2d(F.pad(even, (0, 1, 0, 1)), conv.weight, stride=2))


def test_dynamic_relu_is_the_larger_of_two_lines_that_the_token_tells() -> None:
    act = DynamicReLU(channels=3, token_dim=8)
    x, token = images(2, 3, 4, 5), torch.randn(2, 8) * 5
    hidden = (token @ act.reduce.weight.T + act.reduce.bias).clamp(min=0)
    theta = ((hidden @ act.expand.weight.T + act.expand.bias + 3).clamp(0, 6)) / 6
    expected = torch.empty_like(x)
    for b in range(2):
        for c in range(3):
            first, second = (theta[b, c] - 0.5) * 2 + 1, (theta[b, 3 + c] - 0.5) * 2
            expected[b, c] = torch.maximum(first * x[b, c], second * x[b, c])
    assert torch.allclose(act(x, token), expected, atol=1e-6)
    init_weights_(act)
    assert torch.allclose(act(x, torch.zeros(2, 8)), x.relu())


def test_squeeze_excite_scales_each_channel_by_its_gate() -> None:
    gate = SqueezeExcite(32)
    assert gate.reduce.out_channels == 2
    x = images(2, 32, 4, 5)
    hidden = F.linear(x.mean((2, 3)), gate.reduce.weight.flatten(1), gate.reduce.bias).relu()
    gain = torch.sigmoid(F.linear(hidden, gate.expand.weight.flatten(1), gate.expand.bias))
    assert torch.allclose(gate(x), x * gain[:, :, None, None], atol=1e-6)


def test_fresh_weights_have_the_stated_deviations() -> None:
    dense, depthwise, linear = conv_norm(64, 128, 3), conv_norm(512, 512, 3, groups=512), nn.Linear(512, 100)
    for part in (dense, depthwise, linear):
        init_weights_(part)
    assert dense[0].weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.03)
    assert depthwise[0].weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not linear.bias.any()
    assert dense[1].weight.eq(1).all()
    assert not dense[1].bias.any()
