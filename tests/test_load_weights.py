"""Other projects' weights. What they must give is computed here a second time, from the facts about each project:
its key names, its shapes, its padding, activation and epsilon; nothing of it is taken from the tables under test."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from onefold.errors import BadCheckpoint
from onefold.models import create_model
from onefold.models.load_model import load_model, load_weights_
from onefold.models.load_weights import detect_layout, guess_model_name
from onefold.models.safe_load import read_tensors
from onefold.reparam import unfused_norms

Tensors = dict[str, Tensor]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    """Weights that keep a network's activations in bounds."""
    fan_in = int(np.prod(shape[1:])) or 1
    return torch.randn(shape, generator=generator) / fan_in**0.5


def rand_norm(generator: torch.Generator, width: int) -> Tensors:
    u = torch.rand((4, width), generator=generator)
    return {
        "weight": 0.5 + u[0],
        "bias": u[1] - 0.5,
        "running_mean": 0.2 * (u[2] - 0.5),
        "running_var": 0.5 + u[3],
        "num_batches_tracked": torch.tensor(7),
    }


def normed(x: Tensor, norm: Mapping[str, Tensor], eps: float) -> Tensor:
    return F.batch_norm(x, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"], False, 0.0, eps)


def written(tensors: Tensors, path: Path) -> Path:
    """The tensors as a file, in the container that the suffix names."""
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: t.numpy() for name, t in tensors.items()})
    elif path.suffix == ".h5":
        import h5py

        with h5py.File(path, "w") as file:
            for name, tensor in tensors.items():
                file[name] = tensor.numpy()
    else:
        torch.save(tensors, path)
    return path


# ------------------------------------------------------------------------------------- MobileOne

WIDTHS = {"s0": (48, 48, 128, 256, 1024), "s1": (64, 96, 192, 512, 1280), "s4": (64, 192, 448, 896, 2048)}
BLOCKS = (2, 8, 10, 1)


@dataclass
class OneUnit:
    """A unit in nobody's words: what Apple's code builds."""

    stage: int  # 0 is the stem
    j: int
    stride: int
    groups: int
    parts: dict[str, Any]


def one_units(size: str, fused: bool, generator: torch.Generator) -> Iterator[OneUnit]:
    k, widths = (4 if size == "s0" else 1), WIDTHS[size]
    plan = [(0, 0, 3, widths[0], 3, 2, 1, 1, False)]
    width = widths[0]
    for s, (blocks, out) in enumerate(zip(BLOCKS, widths[1:], strict=True), 1):
        gated = {3: 5, 4: 1}.get(s, 0) if size == "s4" else 0
        for n in range(blocks):
            se, stride = n >= blocks - gated, 2 if n == 0 else 1
            plan += [(s, 2 * n, width, width, 3, stride, width, k, se), (s, 2 * n + 1, width, out, 1, 1, 1, k, se)]
            width = out
    for stage, j, c_in, c_out, kernel, stride, groups, branches, se in plan:
        shape = (c_out, c_in // groups, kernel, kernel)
        parts: dict[str, Any] = {}
        if fused:
            parts["folded"] = {"weight": rand(generator, *shape), "bias": 0.1 * rand(generator, c_out)}
        else:
            for i in range(branches):
                parts[f"branch{i}"] = (rand(generator, *shape), rand_norm(generator, c_out))
            if kernel > 1:
                parts["scale"] = (rand(generator, *shape[:2], 1, 1), rand_norm(generator, c_out))
            if c_in == c_out and stride == 1:
                parts["skip"] = rand_norm(generator, c_out)
        if se:
            for word, a, b in (("reduce", c_out // 16, c_out), ("expand", c_out, c_out // 16)):
                parts[word] = {"weight": rand(generator, a, b, 1, 1), "bias": rand(generator, a)}
        yield OneUnit(stage, j, stride, groups, parts)


def one_forward(units: list[OneUnit], head: Tensors, x: Tensor) -> Tensor:
    for unit in units:
        total: Any = 0
        for word, part in unit.parts.items():
            if word == "folded":
                pad = part["weight"].shape[2] // 2
                total = F.conv2d(x, part["weight"], part["bias"], unit.stride, pad, groups=unit.groups)
            elif word == "skip":
                total = total + normed(x, part, 1e-5)
            elif word == "scale" or word.startswith("branch"):
                pad = part[0].shape[2] // 2
                total = total + normed(F.conv2d(x, part[0], None, unit.stride, pad, groups=unit.groups), part[1], 1e-5)
        if "reduce" in unit.parts:
            reduce, expand = unit.parts["reduce"], unit.parts["expand"]
            gate = F.conv2d(total.mean((2, 3), keepdim=True), reduce["weight"], reduce["bias"]).relu()
            total = total * F.conv2d(gate, expand["weight"], expand["bias"]).sigmoid()
        x = total.relu()
    return F.linear(x.mean((2, 3)), head["weight"], head["bias"])


# project -> unit prefix of (stage, j), then words for: branch's conv and norm, scale's, skip, folded, gate, head
ONE_WORDS: dict[str, tuple[Callable[[int, int], str], dict[str, str]]] = {
    "Apple": (
        lambda s, j: f"stage{s}.{j}" if s else "stage0",
        {
            "branch.conv": "rbr_conv.{}.conv",
            "branch.norm": "rbr_conv.{}.bn",
            "scale.conv": "rbr_scale.conv",
            "scale.norm": "rbr_scale.bn",
            "skip": "rbr_skip",
            "folded": "reparam_conv",
            "reduce": "se.reduce",
            "expand": "se.expand",
            "head": "linear",
        },
    ),
    "timm": (
        lambda s, j: f"stages.{s - 1}.{j}" if s else "stem",
        {
            "branch.conv": "conv_kxk.{}.conv",
            "branch.norm": "conv_kxk.{}.bn",
            "scale.conv": "conv_scale.conv",
            "scale.norm": "conv_scale.bn",
            "skip": "identity",
            "folded": "reparam_conv",
            "reduce": "attn.fc1",
            "expand": "attn.fc2",
            "head": "head.fc",
        },
    ),
    "mmpretrain": (
        lambda s, j: f"backbone.stage{s}.{j}" if s else "backbone.stage0",
        {
            "branch.conv": "branch_conv_list.{}.conv",
            "branch.norm": "branch_conv_list.{}.norm",
            "scale.conv": "branch_scale.conv",
            "scale.norm": "branch_scale.norm",
            "skip": "branch_norm",
            "folded": "branch_reparam",
            "reduce": "se.conv1.conv",
            "expand": "se.conv2.conv",
            "head": "head.fc",
        },
    ),
    "corenet": (
        lambda s, j: f"layer_{s + 1}.{j}" if s else "conv_1",
        {
            "branch.conv": "rbr_conv.{}.block.conv",
            "branch.norm": "rbr_conv.{}.block.norm",
            "scale.conv": "rbr_scale.block.conv",
            "scale.norm": "rbr_scale.block.norm",
            "skip": "rbr_skip",
            "folded": "reparam_conv",
            "reduce": "se.se_layer.fc1.block.conv",
            "expand": "se.se_layer.fc2.block.conv",
            "head": "classifier.classifier_fc",
        },
    ),
}


def one_file(project: str, units: list[OneUnit], head: Tensors) -> Tensors:
    prefix, words = ONE_WORDS[project]
    out: Tensors = {f"{words['head']}.{leaf}": t for leaf, t in head.items()}
    for unit in units:
        base = prefix(unit.stage, unit.j)
        for word, part in unit.parts.items():
            if isinstance(part, tuple):
                kind, i = ("branch", word[6:]) if word.startswith("branch") else (word, "")
                out[f"{base}.{words[f'{kind}.conv'].format(i)}.weight"] = part[0]
                out |= {f"{base}.{words[f'{kind}.norm'].format(i)}.{leaf}": t for leaf, t in part[1].items()}
            else:
                out |= {f"{base}.{words[word]}.{leaf}": t for leaf, t in part.items()}
    return out


ONE_CASES = [  # entries as counted in the published files
    ("Apple", "s0", False, 1323, ""),
    ("Apple", "s0", True, 88, ""),
    ("Apple", "s4", False, 610, "mobileone_s4"),
    ("Apple", "s4", True, 136, "mobileone_s4"),
    ("timm", "s0", False, 1323, ""),
    ("mmpretrain", "s4", False, 610, "mobileone_s4"),
    ("corenet", "s4", False, 610, "mobileone_s4"),
]
SLOW_ONE_CASES = [
    ("Apple", "s1", False, 562, ""),
    ("Apple", "s1", True, 88, ""),
    ("timm", "s4", False, 610, ""),
    ("timm", "s4", True, 136, ""),
    ("mmpretrain", "s0", False, 1323, ""),
    ("mmpretrain", "s4", True, 136, ""),
    ("corenet", "s1", False, 562, ""),
    ("corenet", "s4", True, 136, ""),
]


@pytest.mark.parametrize(
    ("project", "size", "fused", "entries", "name"),
    [*ONE_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_ONE_CASES)],
)
def test_mobileone_of_each_project_gives_its_answer(
    project: str, size: str, fused: bool, entries: int, name: str, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    units = list(one_units(size, fused, generator))
    head = {"weight": rand(generator, 1000, WIDTHS[size][-1]), "bias": rand(generator, 1000)}
    file = one_file(project, units, head)
    assert len(file) == entries
    path = written(file, tmp_path / "anything.pth.tar")
    model, card = load_model(path, name=name or None)  # without a name it is told by keys and shapes
    assert (card.model, card.fused, card.num_classes) == (f"mobileone_{size}", fused, 1000)
    assert bool(unfused_norms(model)) is not fused
    assert not model.training
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        assert distance(model(x), one_forward(units, head, x)) < 1e-5


# ----------------------------------------------------------------------------------- MobileNetV1

V1_WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
V1_STRIDED = (0, 3, 7, 11, 23)  # of the 27 convolutions, counted from 0; odd ones are depthwise


@dataclass
class V1Layer:
    weight: Tensor  # OIHW
    norm: Tensors
    stride: int
    groups: int


def v1_layers(alpha: float, generator: torch.Generator) -> list[V1Layer]:
    layers, width = [], max(8, int(32 * alpha))
    layers.append(V1Layer(rand(generator, width, 3, 3, 3), rand_norm(generator, width), 2, 1))
    for base in V1_WIDTHS:
        out = max(8, int(base * alpha))
        stride = 2 if len(layers) in V1_STRIDED else 1
        layers.append(V1Layer(rand(generator, width, 1, 3, 3), rand_norm(generator, width), stride, width))
        layers.append(V1Layer(rand(generator, out, width, 1, 1), rand_norm(generator, out), 1, 1))
        width = out
    return layers


def v1_forward(layers: list[V1Layer], head: Tensors, x: Tensor, how: tuple[str, bool, float]) -> Tensor:
    """`how`: activation, TensorFlow's SAME padding (for even sizes), epsilon."""
    act, same, eps = how
    for layer in layers:
        pad = layer.weight.shape[2] // 2
        if same and layer.stride == 2:
            x, pad = F.pad(x, (0, 1, 0, 1)), 0
        x = normed(F.conv2d(x, layer.weight, None, layer.stride, pad, groups=layer.groups), layer.norm, eps)
        x = {"relu": F.relu, "relu6": F.relu6, "leaky": lambda y: F.leaky_relu(y, 0.1)}[act](x)
    return F.linear(x.mean((2, 3)), head["weight"], head["bias"])


def hwio(weight: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(weight.numpy(), (2, 3, 1, 0), (0, 1, 2, 3))))


def hwcm(weight: Tensor) -> Tensor:
    """TensorFlow's depthwise kernel: rows, columns, channels, 1."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(weight.numpy()[:, 0], 0, 2)[..., None]))


TF_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def slim_file(layers: list[V1Layer], head: Tensors) -> Tensors:
    out: Tensors = {"global_step": torch.tensor(1)}
    for i, layer in enumerate(layers):
        block = (i + 1) // 2
        scope = "MobilenetV1/Conv2d_0" if i == 0 else f"MobilenetV1/Conv2d_{block}_{'depth' if i % 2 else 'point'}wise"
        depthwise = i % 2 == 1
        kernel = f"{scope}/depthwise_weights" if depthwise else f"{scope}/weights"
        out[kernel] = hwcm(layer.weight) if depthwise else hwio(layer.weight)
        out[f"{kernel}/ExponentialMovingAverage"] = out[kernel] * 2
        out[f"{kernel}/RMSProp_1"] = out[kernel] * 3
        out |= {f"{scope}/BatchNorm/{theirs}": layer.norm[leaf] for theirs, leaf in TF_NORM.items()}
    out["MobilenetV1/Logits/Conv2d_1c_1x1/weights"] = hwio(head["weight"][:, :, None, None])
    out["MobilenetV1/Logits/Conv2d_1c_1x1/biases"] = head["bias"]
    return out


def keras_file(layers: list[V1Layer], head: Tensors) -> Tensors:
    out: Tensors = {}
    for i, layer in enumerate(layers):
        block = (i + 1) // 2
        name = "conv1" if i == 0 else f"conv_{'dw' if i % 2 else 'pw'}_{block}"
        leaf = "depthwise_kernel:0" if i % 2 else "kernel:0"
        out[f"{name}/{name}/{leaf}"] = hwcm(layer.weight) if i % 2 else hwio(layer.weight)
        out |= {f"{name}_bn/{name}_bn/{theirs}:0": layer.norm[leaf] for theirs, leaf in TF_NORM.items()}
    out["conv_preds/conv_preds/kernel:0"] = hwio(head["weight"][:, :, None, None])
    out["conv_preds/conv_preds/bias:0"] = head["bias"]
    return out


def torch_file(layers: list[V1Layer], head: Tensors, names: Callable[[int], tuple[str, str]]) -> Tensors:
    out: Tensors = {f"classifier.{leaf}": t for leaf, t in head.items()}
    for i, layer in enumerate(layers):
        conv, norm = names(i)
        out[f"{conv}.weight"] = layer.weight
        out |= {f"{norm}.{leaf}": t for leaf, t in layer.norm.items()}
    return out


def hf_names(i: int) -> tuple[str, str]:
    base = "mobilenet_v1.conv_stem" if i == 0 else f"mobilenet_v1.layer.{i - 1}"
    return f"{base}.convolution", f"{base}.normalization"


def timm_names(i: int) -> tuple[str, str]:
    if i == 0:
        return "conv_stem", "bn1"
    block = (i - 1) // 2
    first = (0, 1, 3, 5, 11)
    stage = max(s for s in range(5) if first[s] <= block)
    base = f"blocks.{stage}.{block - first[stage]}"
    return (f"{base}.conv_dw", f"{base}.bn1") if i % 2 else (f"{base}.conv_pw", f"{base}.bn2")


def plain_names(i: int) -> tuple[str, str]:
    return f"features.{i}.conv", f"features.{i}.bn"


TF = ("relu6", True, 1e-3)
V1_CASES: dict[str, tuple[Callable[..., Tensors], str, int, tuple[str, bool, float], str | None, str]] = {
    "TF-slim": (slim_file, ".npz", 1001, TF, None, "mobilenetv1_025.tf"),
    "TF-slim in safetensors": (slim_file, ".safetensors", 1001, TF, "mobilenetv1_025.tf", "mobilenetv1_025.tf"),
    "TF-slim, other classes": (slim_file, ".npz", 5, TF, None, "mobilenetv1_025.tf"),
    "Keras": (keras_file, ".h5", 1000, TF, None, "mobilenetv1_025.tf"),
    "transformers": (
        lambda a, b: torch_file(a, b, hf_names),
        ".safetensors",
        1001,
        TF,
        None,
        "mobilenetv1_025.tf",
    ),
    "timm": (
        lambda a, b: torch_file(a, b, timm_names),
        ".bin",
        1000,
        ("relu6", False, 1e-5),
        None,
        "mobilenetv1_025.timm",
    ),
    "plain": (
        lambda a, b: torch_file(a, b, plain_names),
        ".npz",
        1000,
        ("leaky", False, 1e-5),
        "mobilenetv1_025.leaky",
        "mobilenetv1_025.leaky",
    ),
}


@pytest.mark.parametrize("case", V1_CASES)
def test_mobilenetv1_of_each_project_gives_its_answer(case: str, tmp_path: Path) -> None:
    make, suffix, rows, how, name, expected = V1_CASES[case]
    generator = torch.Generator().manual_seed(2)
    layers = v1_layers(0.25, generator)
    head = {"weight": rand(generator, rows, 256), "bias": rand(generator, rows)}
    path = written(make(layers, head), tmp_path / f"weights{suffix}")
    model, card = load_model(path, name=name)
    classes = 1000 if rows == 1001 else rows  # class 0 of 1001 is the background
    assert (card.model, card.num_classes) == (expected, classes)
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        assert distance(model(x), v1_forward(layers, head, x, how)[:, -classes:]) < 1e-5


def test_keras_model_file_with_its_optimizer_is_read_too(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    layers = v1_layers(0.25, generator)
    head = {"weight": rand(generator, 1000, 256), "bias": rand(generator, 1000)}
    weights = keras_file(layers, head)
    file = {f"model_weights/{key}": t for key, t in weights.items()}
    file |= {f"optimizer_weights/Adam/conv1/{key.rsplit('/')[-1]}": t for key, t in list(weights.items())[:1]}
    model, _ = load_model(written(file, tmp_path / "model.h5"))
    assert torch.equal(model.state_dict()["stem.conv.0.weight"], layers[0].weight)


def test_what_the_file_cannot_tell_the_user_must(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    layers = v1_layers(0.25, generator)
    head = {"weight": rand(generator, 1000, 256), "bias": rand(generator, 1000)}
    path = written(torch_file(layers, head, plain_names), tmp_path / "w.npz")
    with pytest.raises(BadCheckpoint, match=r"give the name, mobilenetv1_025 or mobilenetv1_025\.tf or"):
        load_model(path)


def test_weights_made_for_other_padding_are_refused_with_the_right_name(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    layers = v1_layers(0.25, generator)
    head = {"weight": rand(generator, 1001, 256), "bias": rand(generator, 1001)}
    path = written(slim_file(layers, head), tmp_path / "w.npz")
    for wrong in ("mobilenetv1_025", "mobilenetv1_025.timm"):
        with pytest.raises(BadCheckpoint, match=r"type 'mobilenetv1_025\.tf' in its place"):
            create_model(wrong, weights=path)
    create_model("mobilenetv1_025.tf", weights=path)
    path = written(torch_file(layers, head, timm_names), tmp_path / "t.pth")
    with pytest.raises(BadCheckpoint, match=r"type 'mobilenetv1_025\.timm' in its place"):
        create_model("mobilenetv1_025.tf", weights=path)


# --------------------------------------------------------------------------------- Mobile-Former

# facts, section 2.3: tokens, their width, stem, head; L exp/out/stride, D exp,exp->out, K exp->out
FORMERS: dict[str, tuple[int, int, int, int, int, str]] = {
    "26m": (3, 128, 8, 576, 1024, "L24/12/2 K36/12 D72,96/24 K72/24 D144,192/48 K192/48 K288/64 D384,384/96 K576/96"),
    "96m": (
        *(4, 128, 12, 768, 1280),
        "L24/12/1 D72,64/16 D96,128/32 K96/32 D192,256/64 K256/64 K384/88 D528,512/128 K768/128",
    ),
    "294m": (
        *(6, 192, 16, 1152, 1920),
        "L32/16/1 D96,96/24 K96/24 D144,192/48 K192/48 D288,384/96 K384/96 K576/128 K768/128 "
        "D768,768/192 K1152/192 K1152/192",
    ),
}
FORMER_ENTRIES = {"26m": 460, "96m": 466, "294m": 616}
FORMER_PARAMS = {"26m": 3_232_788, "96m": 4_585_252, "294m": 11_422_648}


def linear(name: str, out: int, inp: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}


def affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    buffers = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,), f"{name}.num_batches_tracked": ()}
    return affine(name, width) | buffers


def conv(name: str, shape: tuple[int, ...], first: int = 0) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{first}.weight": shape} | batch_norm(f"{name}.{first + 1}", shape[0])


def gather(name: str, c: int, d: int) -> dict[str, tuple[int, ...]]:
    return (
        linear(f"{name}.alpha.0", c, d)
        | linear(f"{name}.q", c, d)
        | linear(f"{name}.proj", d, c)
        | affine(f"{name}.layer_norm", d)
    )


def former_block(n: int, row: str, c: int, d: int, g: int) -> dict[str, tuple[int, ...]]:
    base, kind = f"features.{n}", row[0]
    numbers = [int(v) for v in row[1:].replace(",", "/").split("/")]
    if kind == "L":
        hidden, out, _ = numbers
        return conv(f"{base}.conv", (hidden, 1, 3, 3)) | conv(f"{base}.conv", (out, hidden // g, 1, 1), 4)
    out, hidden = numbers[-1], numbers[0]
    last = numbers[1] if kind == "D" else hidden
    shapes = gather(f"{base}.local_global", c, d)
    for name in ("q", "channel_mlp"):
        shapes |= linear(f"{base}.global_block.{name}", d, d)
    shapes |= linear(f"{base}.global_block.ffn.0", 2 * d, d) | linear(f"{base}.global_block.ffn.2", d, 2 * d)
    shapes |= affine(f"{base}.global_block.layer_norm", d) | affine(f"{base}.global_block.ffn_norm", d)
    shapes |= linear(f"{base}.global_local.k", out, d) | linear(f"{base}.global_local.proj", out, d)
    for hyper, width in (("hyper1", hidden), ("hyper3" if kind == "D" else "hyper2", last)):
        shapes |= linear(f"{base}.{hyper}.hyper.0", d // 4, d) | linear(f"{base}.{hyper}.hyper.2", 2 * width, d // 4)
    if kind == "D":
        kernels = [(hidden, 1, 3, 3), (out, hidden // g, 1, 1), (last, 1, 3, 3), (out, last // g, 1, 1)]
    else:
        kernels = [(hidden, c // g, 1, 1), (hidden, 1, 3, 3), (out, hidden // g, 1, 1)]
    for i, kernel in enumerate(kernels, 1):
        shapes |= conv(f"{base}.conv{i}", kernel)
    return shapes


def former_shapes(size: str) -> dict[str, tuple[int, ...]]:
    t, d, c, width, features, rows = FORMERS[size]
    g = 4 if size == "26m" else 1
    shapes = {"tokens.weight": (t, d)} | conv("stem", (c, 3, 3, 3))
    for n, row in enumerate(rows.split()):
        shapes |= former_block(n, row, c, d, g)
        c = int(row.split("/")[1])
    shapes |= gather("local_global", c, d) | conv("classifier.conv", (width, c // g, 1, 1), 1)
    shapes |= linear("classifier.fc.0", features, width + d) | batch_norm("classifier.fc.1", features)
    return shapes | linear("classifier.classifier.1", 1000, features)


FORMER_PLACES = {  # a handful of each kind, for 294m
    "tokens.weight": "stem.tokens",
    "stem.0.weight": "stem.conv.0.weight",
    "stem.1.running_var": "stem.conv.1.running_var",
    "features.0.conv.1.bias": "stages.0.0.depthwise.1.bias",
    "features.0.conv.4.weight": "stages.0.0.pointwise.0.weight",
    "features.1.local_global.alpha.0.weight": "stages.1.0.to_former.gate.weight",
    "features.1.hyper3.hyper.2.bias": "stages.1.0.mobile.act2.expand.bias",
    "features.1.conv4.0.weight": "stages.1.0.mobile.project2.0.weight",
    "features.2.conv3.1.running_mean": "stages.1.1.mobile.project.1.running_mean",
    "features.2.hyper2.hyper.0.weight": "stages.1.1.mobile.act2.reduce.weight",
    "features.5.conv2.0.weight": "stages.3.0.mobile.project1.0.weight",
    "features.8.global_block.channel_mlp.weight": "stages.3.3.former.project.weight",
    "features.8.global_block.q.weight": "stages.3.3.former.query.weight",
    "features.9.conv3.0.weight": "stages.4.0.mobile.depthwise2.0.weight",
    "features.11.global_local.k.weight": "stages.4.2.to_mobile.key.weight",
    "features.11.global_local.proj.weight": "stages.4.2.to_mobile.value.weight",
    "features.11.global_block.ffn.2.weight": "stages.4.2.former.ffn.2.weight",
    "local_global.layer_norm.weight": "head.to_former.norm.weight",
    "local_global.proj.weight": "head.to_former.project.weight",
    "classifier.conv.1.weight": "head.conv.0.weight",
    "classifier.fc.1.weight": "head.fc1.1.weight",
    "classifier.classifier.1.weight": "head.fc.weight",
}


@pytest.mark.parametrize("size", ["26m", pytest.param("96m", marks=pytest.mark.slow), "294m"])
def test_every_tensor_of_a_released_mobileformer_has_its_place(size: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = former_shapes(size)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    counted = sum(int(np.prod(shape)) for key, shape in shapes.items() if not key.endswith(buffers))
    assert len(shapes) == FORMER_ENTRIES[size]
    assert counted == FORMER_PARAMS[size]
    file = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    file |= {key: torch.tensor(n) for n, key in enumerate(shapes) if key.endswith("num_batches_tracked")}
    wrapped = {"state_dict": file, "args": argparse.Namespace(model="x", lr=0.1), "epoch": 449}
    torch.save(wrapped, tmp_path / "x.pth.tar")
    model, card = load_model(tmp_path / "x.pth.tar", name="mobileformer_294m" if size == "294m" else None)
    assert card.model == f"mobileformer_{size}"
    ours = model.state_dict()
    if size == "294m":
        for theirs, place in FORMER_PLACES.items():
            assert torch.equal(ours[place], file[theirs]), place
    assert sorted(float(t.double().sum()) for t in ours.values()) == sorted(
        float(t.double().sum()) for t in file.values()
    )


# --------------------------------------------------------------------------- real weights, and timm

REAL = {
    "mobileone_s0_in1k_fused": ("mobileone_s0", "mobileone_s0", 224),
    "mobilenetv1_100_224_in1k_tfquant_folded": ("mobilenetv1_100.tf", "mnv1_100_224", 224),
    "mobilenetv1_050_160_in1k_tfquant_folded": ("mobilenetv1_050.tf", "mnv1_050_160", 160),
    "mobilenetv1_025_224_in1k_tf_unfused": ("mobilenetv1_025.tf", "mnv1_025_224_tf", 224),
    "mobilenetv1_025_224_in1k_pytorch_leaky_unfused": ("mobilenetv1_025.leaky", "mnv1_025_224_pt_leaky", 224),
}


@pytest.mark.parametrize("file", REAL)
def test_real_weights_give_the_logits_that_their_makers_measured(
    file: str, shared_data: Path, record_property: Callable[[str, object], None]
) -> None:
    name, key, size = REAL[file]
    model, card = load_model(shared_data / "weights" / f"{file}.npz", name=name)
    assert card.fused == ("unfused" not in file)
    with np.load(shared_data / "weights" / "reference_logits.npz") as references:
        expected = torch.from_numpy(references[key])
    x = torch.from_numpy(np.sin(np.arange(3 * size * size) * 0.01).astype(np.float32)).reshape(1, 3, size, size)
    with torch.no_grad():
        logits = model(x)[0]
    record_property("relative distance", distance(logits, expected))
    assert distance(logits, expected) < 1e-5
    assert float((logits - expected).abs().max()) < 1e-4
    assert int(logits.argmax()) == int(expected.argmax())


def test_real_weights_on_the_wrong_padding_are_another_network(shared_data: Path) -> None:
    """What the names' suffix is for: the very same tensors, without TensorFlow's padding, answer otherwise."""
    path = shared_data / "weights" / "mobilenetv1_050_160_in1k_tfquant_folded.npz"
    right, _ = load_model(path, name="mobilenetv1_050.tf")
    wrong, _ = load_model(path, name="mobilenetv1_050.timm")
    x = torch.from_numpy(np.sin(np.arange(3 * 64 * 64) * 0.01).astype(np.float32)).reshape(1, 3, 64, 64)
    with torch.no_grad():
        assert distance(wrong(x), right(x)) > 0.1


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Norm statistics far from fresh ones, so that a misplaced norm shows."""
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for leaf, tensor in rand_norm(generator, module.num_features).items():
                module.state_dict()[leaf].copy_(tensor)
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [
        "mobileone_s0",
        "mobilenetv1_100",
        *(pytest.param(f"mobileone_s{i}", marks=pytest.mark.slow) for i in (1, 2, 3, 4)),
    ],
)
def test_timms_networks_and_ours_give_one_answer(name: str, timm: Any, tmp_path: Path) -> None:
    theirs = shaken(timm.create_model(name))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "w.pth")
    ours, card = load_model(tmp_path / "w.pth")
    assert card.model == (name if name.startswith("mobileone") else f"{name}.timm")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert distance(ours(x), theirs(x)) < 1e-5


@pytest.mark.slow
def test_timms_reparameterized_network_and_ours_give_one_answer(timm: Any, tmp_path: Path) -> None:
    from timm.utils.model import reparameterize_model

    theirs = reparameterize_model(shaken(timm.create_model("mobileone_s4")))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours, card = load_model(tmp_path / "w.pth")
    assert card.fused
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert distance(ours(x), theirs(x)) < 1e-5


# ------------------------------------------------------------------------------ wrappers, and fitting


def small() -> Tensors:
    """timm's MobileNetV1 of width 0.25 for 10 classes."""
    generator = torch.Generator().manual_seed(6)
    layers = v1_layers(0.25, generator)
    head = {"weight": rand(generator, 10, 256), "bias": rand(generator, 10)}
    return torch_file(layers, head, timm_names)


SMALL = "mobilenetv1_025.timm"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {"state_dict": sd, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda sd: {"model": sd, "epoch": 3},
        lambda sd: {"model": {f"module.{k}": v for k, v in sd.items()}},
        lambda sd: {"state_dict": {f"module._orig_mod.{k}": v for k, v in sd.items()}},
        lambda sd: {k.replace("blocks.", "blocks._orig_mod."): v for k, v in sd.items()},
        lambda sd: {
            "model": {"_fsdp_wrapped_module." + k.replace(".0.", ".0._fsdp_wrapped_module."): v for k, v in sd.items()}
        },
        lambda sd: {"module." + k.replace(".0.", ".0._checkpoint_wrapped_module."): v for k, v in sd.items()},
        lambda sd: {re.sub("bn([0-9])[.]", r"bn\1._fsdp_wrapped_module._orig_mod.", k): v for k, v in sd.items()},
        lambda sd: {"state_dict": {k: v * 0 for k, v in sd.items()}, "state_dict_ema": sd},
        lambda sd: {k: v.double() for k, v in sd.items()},
        lambda sd: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in sd.items()},
    ],
)
def test_wrappings_of_trainers_are_undone(wrap: Callable[[Tensors], Any], tmp_path: Path) -> None:
    torch.save(wrap(small()), tmp_path / "w.bin")
    model, _ = load_model(tmp_path / "w.bin")
    for key, tensor in small().items():
        if key == "conv_stem.weight":
            assert torch.equal(model.state_dict()["stem.conv.0.weight"], tensor)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_two_tensors_that_would_have_one_name_are_refused(tmp_path: Path) -> None:
    whole = {**small(), "_orig_mod.conv_stem.weight": small()["conv_stem.weight"] + 1}
    torch.save(whole, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=r"1 are unexpected \(_orig_mod\.conv_stem\.weight\)"):
        load_model(tmp_path / "w.pth")


def test_the_older_torch_save_is_read(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    model, _ = load_model(tmp_path / "w.pth")
    assert torch.equal(model.state_dict()["head.fc.bias"], small()["classifier.bias"])


def test_class_names_beside_the_weights_are_kept(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(10)]
    for n, notes in enumerate(
        ({"classes": names}, {"meta": {"CLASSES": tuple(names)}}, {"meta": {"dataset_meta": {"classes": names}}})
    ):
        torch.save({"state_dict": small()} | notes, tmp_path / f"{n}.pth")
        assert load_model(tmp_path / f"{n}.pth")[1].classes == tuple(names)
    torch.save({"state_dict": small(), "classes": names[:9]}, tmp_path / "w.pth")
    assert load_model(tmp_path / "w.pth")[1].classes is None


def test_another_number_of_classes_keeps_the_fresh_classifier_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(small(), tmp_path / "w.pth")
    torch.manual_seed(0)
    model = create_model(SMALL, num_classes=3)
    fresh = model.state_dict()["head.fc.weight"].clone()
    with caplog.at_level(logging.INFO, logger="onefold"):
        assert load_weights_(model, tmp_path / "w.pth", SMALL) is model
    assert "a new last layer, for 3 classes, replaces its own for 10" in caplog.text
    assert torch.equal(model.state_dict()["head.fc.weight"], fresh)
    assert torch.equal(model.state_dict()["stem.conv.0.weight"], small()["conv_stem.weight"])
    model, card = load_model(tmp_path / "w.pth", num_classes=3)
    assert (card.num_classes, card.classes) == (3, None)
    assert "randomly initialized classifier of 3 classes" in card.source


def test_a_file_without_a_classifier_and_a_network_without_one(tmp_path: Path) -> None:
    torch.save({k: v for k, v in small().items() if not k.startswith("classifier")}, tmp_path / "w.pth")
    model, card = load_model(tmp_path / "w.pth")
    assert card.num_classes == 0
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 256)
    torch.save(small(), tmp_path / "w.pth")
    headless = create_model(SMALL, num_classes=0, weights=tmp_path / "w.pth")
    assert torch.equal(headless.state_dict()["stem.conv.0.weight"], small()["conv_stem.weight"])
    torch.save({k: v for k, v in small().items() if k != "classifier.weight"}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=r"1 tensors are missing \(head\.fc\.weight\)"):
        create_model(SMALL, num_classes=10, weights=tmp_path / "w.pth")


@pytest.mark.parametrize("chans", [1, 2, 4, 7])
def test_a_stem_for_other_channels_answers_the_same_to_the_same_grey(chans: int, tmp_path: Path) -> None:
    """An image whose channels are all one grey gives what the grey image gives, however many channels there are."""
    torch.save(small(), tmp_path / "w.pth")
    rgb = create_model(SMALL, num_classes=10, weights=tmp_path / "w.pth").eval()
    other = create_model(SMALL, num_classes=10, in_chans=chans, weights=tmp_path / "w.pth").eval()
    grey = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        maps = rgb.stem.conv(grey.expand(-1, 3, -1, -1)), other.stem.conv(grey.expand(-1, chans, -1, -1))
    if chans == 1:  # a sum over channels: exactly so; else a repetition, which weighs the channels otherwise
        assert distance(maps[1], maps[0]) < 1e-5
    weight, there = other.state_dict()["stem.conv.0.weight"], small()["conv_stem.weight"]
    assert weight.shape[1] == chans
    if chans > 1:
        assert torch.allclose(weight, torch.stack([there[:, i % 3] for i in range(chans)], 1) * (3 / chans))


def folded_file() -> Tensors:
    """A plain MobileNetV1 of width 0.25 whose convolutions have biases and no norms."""
    generator = torch.Generator().manual_seed(8)
    out = {"classifier.weight": rand(generator, 10, 256), "classifier.bias": rand(generator, 10)}
    for i, layer in enumerate(v1_layers(0.25, generator)):
        out[f"features.{i}.conv.weight"] = layer.weight
        out[f"features.{i}.conv.bias"] = layer.norm["bias"]
    return out


def test_fused_weights_give_the_fused_network_and_leave_one_for_training_as_it_is(tmp_path: Path) -> None:
    path, name = written(folded_file(), tmp_path / "w.npz"), "mobilenetv1_025"
    fused = create_model(name, num_classes=10, weights=path)
    assert not unfused_norms(fused)
    assert fused.training
    training = create_model(name, num_classes=10)
    before = {key: t.clone() for key, t in training.state_dict().items()}
    assert load_weights_(training, path, name) is not training
    assert all(torch.equal(t, before[key]) for key, t in training.state_dict().items())
    assert training.training
    assert load_weights_(fused, path, name) is fused  # into a network that is fused already
    with pytest.raises(BadCheckpoint, match="tensors are missing"):  # training weights into a fused network
        load_weights_(fused, written(small(), tmp_path / "w.pth"), "mobilenetv1_025.timm")


def test_training_weights_go_into_a_training_network(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    model = create_model(SMALL, num_classes=10)
    assert load_weights_(model, tmp_path / "w.pth", SMALL) is model
    assert torch.equal(model.state_dict()["stem.conv.0.weight"], small()["conv_stem.weight"])


def test_weights_go_into_feature_networks(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    whole = create_model(SMALL, num_classes=10, weights=tmp_path / "w.pth").eval()
    maps = create_model(SMALL, weights=tmp_path / "w.pth", features_only=True).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(10))
    with torch.no_grad():
        assert torch.equal(maps(x)[-1], whole.forward_features(x))


def test_weights_of_another_network_are_refused_with_the_keys_and_the_right_name(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=r"have another shape .*It seems to be mobilenetv1_025\.timm"):
        create_model("mobilenetv1_050.timm", num_classes=10, weights=tmp_path / "w.pth")
    with pytest.raises(
        BadCheckpoint, match=r"does not fit mobileone_s0: .*missing.*It seems to be mobilenetv1_025\.timm"
    ):
        create_model("mobileone_s0", num_classes=10, weights=tmp_path / "w.pth")
    part = {k: v for k, v in small().items() if not k.startswith("blocks.3.2")}
    torch.save(part | {"conv_head.weight": torch.zeros(4, 4, 1, 1)}, tmp_path / "w.pth")
    message = r"10 tensors are missing \(stages\.3\.4\.conv.*\); 1 are unexpected \(conv_head\.weight\).*incomplete"
    with pytest.raises(BadCheckpoint, match=message):
        create_model(SMALL, num_classes=10, weights=tmp_path / "w.pth")


def test_bookkeeping_beside_complete_weights_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onefold")
    ours = create_model(SMALL, num_classes=10).state_dict()
    thop = {
        f"{layer}total_{kind}": torch.zeros(1).double() for layer in ("", "stages.0.0.") for kind in ("ops", "params")
    }
    torch.save(ours | thop, tmp_path / "w.pth")
    model, _ = load_model(tmp_path / "w.pth", name=SMALL)
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())
    assert "left out, nothing of the network is missing (" in caplog.text
    assert "stages.0.0.total_ops" in caplog.text
    caplog.clear()
    load_model(tmp_path / "w.pth", name=SMALL, quiet=True)
    assert not caplog.text
    np.savez(tmp_path / "w.npz", epoch=np.array(3), **{key: tensor.numpy() for key, tensor in ours.items()})
    load_model(tmp_path / "w.npz", name=SMALL)
    assert "(epoch)" in caplog.text


@pytest.mark.parametrize(
    ("key", "tensor"),
    [("epochs", torch.zeros(2)), ("stages.0.0.conv.bias", torch.zeros(1))],
)
def test_what_is_no_bookkeeping_is_refused_and_not_called_incomplete(key: str, tensor: Tensor, tmp_path: Path) -> None:
    ours = create_model(SMALL, num_classes=10).state_dict()
    torch.save({**ours, key: tensor}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=rf"1 are unexpected \({key}\)\.$"):
        load_model(tmp_path / "w.pth", name=SMALL)
    first = next(key for key in ours if key.startswith("stages.3."))
    torch.save({"epoch": torch.tensor(1)} | {k: v for k, v in ours.items() if k != first}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=r"1 tensors are missing .*; 1 are unexpected \(epoch\).*incomplete"):
        load_model(tmp_path / "w.pth", name=SMALL)


def test_weights_of_an_unknown_network_are_refused_by_their_keys(tmp_path: Path) -> None:
    torch.save({"layer1.0.conv1.weight": torch.zeros(3, 3)}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=r"keys like layer1\.0\.conv1\.weight, of no layout known"):
        load_model(tmp_path / "w.pth")
    wide = {k: (torch.zeros(40, 3, 3, 3) if k == "conv_stem.weight" else v) for k, v in small().items()}
    narrow = {k: torch.zeros(5, 5, 1, 1) if v.ndim == 4 else v for k, v in wide.items()}
    torch.save(narrow, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match="no size known here: give a name"):
        load_model(tmp_path / "w.pth")


def test_each_size_of_each_family_is_recognized_by_its_shapes() -> None:
    for name in ("mobileone_s1", "mobilenetv1_shallow", "mobilenetv1_100", "mobileformer_52m"):
        state = create_model(name, num_classes=2).state_dict()
        rng = torch.random.get_rng_state()
        assert guess_model_name(state, name.partition("_")[0]) == name
        assert torch.equal(torch.random.get_rng_state(), rng)


def test_weights_that_are_all_zero_are_refused_and_names_have_no_blanks_at_their_ends(tmp_path):
    state = create_model("mobilenetv1_025", num_classes=2).state_dict()
    torch.save({"state_dict": state, "class_to_idx": {"cats ": 0, "big  dogs": 1}}, tmp_path / "w.pth")
    assert load_model(tmp_path / "w.pth", name="mobilenetv1_025")[1].classes == ("cats", "big dogs")
    torch.save({key: torch.zeros_like(value) for key, value in state.items()}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match="all weights are 0"):
        load_model(tmp_path / "w.pth", name="mobilenetv1_025")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("bn1.running_var", lambda t: -t, "damaged or diverged"),
        ("bn1.weight", lambda t: t * float("nan"), "damaged or diverged"),
        ("conv_stem.weight", lambda t: t / 0, "damaged or diverged"),
        ("conv_stem.weight", lambda t: (t * 100).to(torch.int8), "floats: save it unquantized"),
        ("conv_stem.weight", lambda t: t.to(torch.float8_e4m3fn), r"no dense tensor of numbers .*float8_e4m3fn"),
        ("conv_stem.weight", lambda t: t[:0], "which is empty"),
        ("classifier.weight", lambda t: torch.tensor(1.0), r"a classifier of shape \(\)"),
        ("classifier.weight", lambda t: torch.zeros(1 << 20, 1), r"a classifier of shape \(1048576, 1\)"),
        ("classifier.bias", lambda t: torch.tensor(1.0), "another shape"),
        ("conv_stem.weight", lambda t: torch.zeros(1, 1 << 20, 1, 1), "another shape"),
        ("conv_stem.weight", lambda t: torch.tensor(1.0), "another shape"),
        ("conv_stem.weight", lambda t: t.to_sparse(), r"no dense tensor of numbers .*_rebuild_sparse_tensor"),
        ("conv_stem.weight", lambda t: t.to(torch.complex64), "not a dense tensor"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(
    key: str, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    file = small()
    torch.save(file | {key: change(file[key])}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match=message):
        load_model(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "stem.conv" + ".0" * 100_000])
def test_names_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    torch.save(small() | {name: torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match="unprintable or too long name") as caught:
        load_model(tmp_path / "w.pth")
    assert str(caught.value).isprintable()


def test_each_container_gives_the_same_tensors(tmp_path: Path) -> None:
    file = small()
    for suffix in (".safetensors", ".npz", ".h5", ".pth", ".whatever"):
        got = read_tensors(written(file, tmp_path / f"w{suffix}")).tensors
        assert got.keys() == file.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in file.items())
    layout = detect_layout(file)
    assert layout is not None
    assert layout.title == "timm MobileNetV1"
