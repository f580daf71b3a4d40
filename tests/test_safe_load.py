"""Checkpoints as people have them: containers, wrappers, averages, objects beside the tensors; nothing is run."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import json
import logging
import os
import pathlib
import pickle
import pickletools
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from onefold.errors import BadCheckpoint, NetworkFailed
from onefold.models import create_model
from onefold.models.catalogue import CATALOGUE
from onefold.models.checkpoint_metadata import find_class_names
from onefold.models.load_model import load_model, read_weights_card
from onefold.models.restricted_unpickler import RefusedError, UnpickledObject, module_tensors
from onefold.models.safe_load import CheckpointContents, read_tensors
from onefold.models.weights_file import preprocessing_from_config

NAMES = ("stem.conv.weight", "stages.0.conv.weight", "head.fc.weight", "head.fc.bias")
PLAIN = {name: torch.full((2, 2), float(i + 1)) for i, name in enumerate(NAMES)}
EMA = {name: tensor + 100 for name, tensor in PLAIN.items()}


def fits(keys: Any) -> bool:
    return "stem.conv.weight" in keys


def under(prefix: str, tensors: dict[str, Tensor] = PLAIN) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def written(path: Path, content: Any) -> Path:
    """The content in the format that the suffix names."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in content.items()})
    elif path.suffix == ".h5":
        h5py = pytest.importorskip("h5py", reason="needs h5py")
        with h5py.File(path, "w") as file:
            for name, tensor in content.items():
                file[name] = tensor.numpy()
    elif path.suffix == ".old":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


def loaded(content: Any, folder: Path, suffix: str = ".pth", select: str = "") -> CheckpointContents:
    return read_tensors(written(folder / f"w{suffix}", content), fits=fits, select=select)


def check_is(contents: CheckpointContents, expected: dict[str, Tensor]) -> None:
    assert {name: t.tolist() for name, t in contents.tensors.items()} == {n: t.tolist() for n, t in expected.items()}


# ---------------------------------------------------------------------------------------- wrappers

PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "backbone.",
    "module._orig_mod.",
    "model.module.",
    "model.net.backbone.",
    "_orig_mod.module.model.",
    "my_own_name.",
    "_forward_module.model.",
)


@pytest.mark.parametrize("suffix", [".pth", ".old", ".pkl", ".safetensors", ".npz", ".h5"])
def test_wrappers_of_any_depth_are_undone_in_any_format(suffix: str, tmp_path: Path) -> None:
    for prefix in PREFIXES:
        check_is(loaded(under(prefix), tmp_path, suffix), PLAIN)


def test_what_stands_beside_the_wrapped_network_is_kept_where_it_may_be_of_it(tmp_path: Path) -> None:
    body = {name: tensor for name, tensor in PLAIN.items() if not name.startswith("head.")}
    head = {name: tensor for name, tensor in PLAIN.items() if name.startswith("head.")}
    contents = loaded(under("backbone.", body) | head | {"criterion.weight": torch.ones(3)}, tmp_path)
    assert set(contents.tensors) == {*NAMES, "criterion.weight"}
    assert contents.outside == {*head, "criterion.weight"}


# -------------------------------------------------------------------------- containers and averages


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv = nn.Linear(2, 2, bias=False)
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.stem.conv.weight.data.fill_(1.0)


CONTAINERS: dict[str, Callable[[], Any]] = {
    "state_dict": lambda: {"state_dict": PLAIN, "epoch": 3},
    "model": lambda: {"model": PLAIN, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "model_state_dict": lambda: {"model_state_dict": under("module."), "loss": 0.1},
    "net, weights, params": lambda: {"net": PLAIN},
    "two deep": lambda: {"checkpoint": {"network": {"weights": PLAIN}}},
    "DeepSpeed": lambda: {"module": under("module."), "dp_world_size": 1},
    "list or tuple": lambda: (PLAIN, {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}),
    "Lightning": lambda: {
        "state_dict": under("model.") | {"val_acc.total": torch.ones(2)},
        "pytorch-lightning_version": "2.4",
        "loops": {},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
    },
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_state_dict_is_found(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "onefold")
    contents = loaded(CONTAINERS[kind](), tmp_path)
    contents.tensors.pop("val_acc.total", None)
    check_is(contents, PLAIN)
    assert contents.weights == ""
    assert caplog.text == ""


def swa() -> dict[str, Tensor]:
    return {"n_averaged": torch.tensor(5), **under("module.", EMA)}


AVERAGES: dict[str, Callable[[], Any]] = {
    "timm": lambda: {"state_dict": PLAIN, "state_dict_ema": EMA},
    "torchvision": lambda: {"model": under("module."), "model_ema": swa()},
    "averaged model beside": lambda: {"model": PLAIN, "averaged_model": swa()},
    "SWA": lambda: {"state_dict": PLAIN, "swa_state_dict": under("module.", EMA)},
    "BasicSR": lambda: {"params": PLAIN, "params_ema": EMA},
    "Lightning, in one dict": lambda: {"state_dict": under("model.") | under("model_ema.module.", EMA)},
    "Lightning, AveragedModel in one dict": lambda: {
        "state_dict": under("model.") | {f"swa_model.{name}": t for name, t in swa().items()}
    },
    "Lightning's WeightAveraging": lambda: {"state_dict": under("model.", EMA), "current_model_state": under("model.")},
    "mmengine": lambda: {
        "state_dict": EMA,
        "ema_state_dict": under("module.") | {"steps": torch.tensor(7)},
        "meta": {"mmengine_version": "0.10"},
    },
    "one flat dict": lambda: PLAIN | under("ema.", EMA),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_weights_are_taken_said_and_chosen(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "onefold")
    contents = loaded(AVERAGES[kind](), tmp_path)
    tensors = {name: tensor for name, tensor in contents.tensors.items() if tensor.ndim}
    assert {name: t.tolist() for name, t in tensors.items()} == {n: t.tolist() for n, t in EMA.items()}
    assert contents.weights.endswith(", averaged")
    assert "holds averaged weights" in caplog.text
    assert "and plain weights" in caplog.text
    assert "w.pth:plain takes others" in caplog.text
    caplog.clear()
    for select, expected in (("plain", PLAIN), ("averaged", EMA)):
        chosen = loaded(AVERAGES[kind](), tmp_path, select=select)
        assert chosen.tensors["stem.conv.weight"].tolist() == expected["stem.conv.weight"].tolist()
    assert caplog.text == ""  # who chose knows


def test_an_averaged_model_alone_is_no_choice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "onefold")
    network = Wrapped()
    contents = loaded(AveragedModel(network).state_dict(), tmp_path)
    assert contents.tensors["stem.conv.weight"].tolist() == network.stem.conv.weight.tolist()
    assert caplog.text == ""


def test_a_key_chooses_and_an_unknown_one_says_which_there_are(tmp_path: Path) -> None:
    both = {"state_dict": PLAIN, "best_state_dict": EMA}
    check_is(loaded(both, tmp_path), PLAIN)
    check_is(loaded(both, tmp_path, select="best_state_dict"), EMA)
    with pytest.raises(BadCheckpoint, match=r"no weights 'ema'; there are: plain, state_dict, best_state_dict"):
        loaded(both, tmp_path, select="ema")


# ------------------------------------------------------------------------------ what stands beside


class HistoryBuffer:
    def __init__(self) -> None:
        self.history = np.arange(3.0)


class Config(dict):
    pass


class Log(list):
    pass


BESIDE: dict[str, Callable[[], Any]] = {
    "numpy's float64": lambda: np.float64(91.2),
    "numpy's float32": lambda: np.float32(91.2),
    "numpy's int64, bool_": lambda: (np.int64(3), np.bool_(True)),
    "numpy's array": lambda: np.arange(6.0).reshape(2, 3).T,
    "numpy's texts": lambda: np.array(["cat", "dog"]),
    "numpy's objects": lambda: np.array([{"a": 1}, None], dtype=object),
    "numpy's random state": lambda: np.random.default_rng(0),
    "a date": lambda: [datetime.datetime(2026, 1, 1), datetime.timedelta(1), datetime.timezone.utc],
    "a path": lambda: [pathlib.Path("x"), pathlib.PureWindowsPath("y")],
    "a Namespace": lambda: argparse.Namespace(lr=0.1, nested=argparse.Namespace(out=pathlib.Path("x"))),
    "SimpleNamespace": lambda: types.SimpleNamespace(a=1),
    "collections": lambda: [
        collections.OrderedDict(a=1),
        collections.defaultdict(list),
        collections.Counter("abc"),
        collections.deque([1], maxlen=3),
    ],
    "sets": lambda: [{1, 2}, frozenset("ab"), {(1, 2)}],
    "numbers": lambda: [1 << 80, 2j, range(3), slice(1, 2), b"x", bytearray(b"y"), float("nan"), ...],
    "a class of one's own": lambda: HistoryBuffer(),
    "kinds of dict and list": lambda: [Config(a=Config(b=1)), Log([1, HistoryBuffer()])],
    "a function and a class": lambda: [written, HistoryBuffer, len],
    "a bound method": lambda: "abc".upper,
    "torch's own": lambda: [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
    "tensors of other kinds": lambda: [torch.ones(2).to_sparse(), torch.ones(1).to(torch.float8_e4m3fn)],
    "a module": lambda: nn.Linear(2, 2),
    "an optimizer": lambda: torch.optim.AdamW([nn.Parameter(torch.ones(2))]),
    "keys of any kind": lambda: {(1, "a"): 2, frozenset([1]): 3, None: 4, HistoryBuffer: 5},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_objects_beside_the_weights_are_no_reason_to_refuse(kind: str, tmp_path: Path) -> None:
    for suffix in (".pth", ".old", ".pkl"):
        check_is(loaded({"state_dict": PLAIN, "beside": BESIDE[kind]()}, tmp_path, suffix), PLAIN)


def test_plain_values_are_read_as_they_are(tmp_path: Path) -> None:
    values = {
        "acc": np.float32(0.5),
        "n": np.int64(-3),
        "name": "é",
        "list": [1, (2.5, None)],
        "od": {"a": {"b": True}},
    }
    extras = loaded({"state_dict": PLAIN, **values}, tmp_path).extras
    assert {key: extras[key] for key in values} == values
    for protocol in range(2, 6):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps({"w": {k: t.numpy() for k, t in PLAIN.items()}, **values}, protocol))
        contents = read_tensors(path, fits=fits)
        check_is(contents, PLAIN)
        assert {key: contents.extras[key] for key in values} == values


def test_a_class_that_is_gone_is_named_and_never_imported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "onefold")
    gone = types.ModuleType("mmengine_like")
    buffer = type("HistoryBuffer", (), {"__module__": "mmengine_like"})
    gone.HistoryBuffer = buffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmengine_like", gone)
    path = written(tmp_path / "w.pth", {"state_dict": PLAIN, "message_hub": buffer()})
    monkeypatch.delitem(sys.modules, "mmengine_like")
    check_is(read_tensors(path, fits=fits), PLAIN)
    assert "objects of mmengine_like.HistoryBuffer are not read, since nothing in a file is executed" in caplog.text
    assert "mmengine_like" not in sys.modules


def test_a_whole_network_gives_its_state_dict(tmp_path: Path) -> None:
    network = Wrapped()
    for content in (network, {"model": network, "ema": None}, nn.DataParallel(network)):
        for suffix in (".pth", ".old", ".pkl"):
            contents = loaded(content, tmp_path, suffix)
            assert {n: t.tolist() for n, t in contents.tensors.items()} == {
                "stem.conv.weight": [[1.0, 1.0], [1.0, 1.0]]
            }


def test_views_shared_and_strided_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = {
        "stem.conv.weight": base.view(4, 6).T,
        "part": base[3:9],
        "step": base[::5],
        "half": base[:4].half(),
        "bf16": base[:4].bfloat16(),
        "int": torch.tensor([1, -2]),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "parameter": nn.Parameter(base[:2].clone()),
    }
    for suffix in (".pth", ".old", ".pkl"):
        got = loaded(tensors, tmp_path, suffix).tensors
        for name, tensor in tensors.items():
            assert torch.equal(got[name], tensor.detach()), name
            assert got[name].dtype == tensor.dtype, name


# ------------------------------------------------------------------------------------ the docs' tables


def rows(heading: str) -> list[str]:
    """The first cells of the table under a heading of docs/formats.md."""
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    section = text.partition(f"### {heading}\n")[2].partition("\n#")[0]
    return [line.split("|")[1].strip().strip("`") for line in section.splitlines() if line.startswith("| ")][1:]


def test_each_row_of_the_docs_is_tested_here() -> None:
    assert rows("Wrappers") == [prefix for prefix in PREFIXES if prefix]
    assert rows("Containers") == list(CONTAINERS)
    assert rows("Averaged weights") == list(AVERAGES)
    assert rows("Names of classes") == list(CLASS_LISTS)
    assert rows("Preprocessing") == ["timm", *PROCESSORS, *ARGUMENTS]


# ----------------------------------------------------------------------------------- preprocessing

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]
CATALOGUE_INPUT = {
    "size": 224,
    "crop_pct": 0.875,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "channels": 3,
}
NORMAL = {"image_mean": MEAN, "image_std": STD}
PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shortest edge and crop": (
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 192, "width": 192}, "resample": 3, **NORMAL},
        {"size": 192, "crop_pct": 0.75, "interpolation": "bicubic", "mean": tuple(MEAN), "std": tuple(STD)},
    ),
    "one number each": ({"size": 256, "crop_size": 224, "resample": 0}, {"size": 224, "interpolation": "nearest"}),
    "height and width": ({"size": {"height": 160, "width": 160}}, {"size": 160, "crop_pct": 1.0}),
    "crop_pct": ({"size": {"shortest_edge": 192}, "crop_pct": 0.95}, {"size": 192, "crop_pct": 0.95}),
    "not normalized": ({"do_normalize": False, **NORMAL}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    "rescaled to -1 and 1": (
        {"do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True},
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    ),
    "image_size alone": ({"image_size": 128}, {"size": 128}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_transformers_say_of_preprocessing_is_read(kind: str) -> None:
    config, expected = PROCESSORS[kind]
    stated = preprocessing_from_config(config, CATALOGUE_INPUT)
    for key, value in expected.items():
        assert stated[key] == pytest.approx(value) if key != "interpolation" else stated[key] == value


def test_values_of_bytes_older_configs_and_huge_sizes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "onefold")
    default = CATALOGUE["mobileone_s0"].input
    found = preprocessing_from_config({"mean": [127.5] * 3, "std": [51.0] * 3, "input_size": [3, 96, 96]}, default)
    assert found == {"mean": (0.5,) * 3, "std": (0.2,) * 3, "channels": 3, "size": 96}
    assert "are divided by 255" in caplog.text
    assert preprocessing_from_config({"pretrained_cfg": {}, "image_size": 64}, default) == {"size": 64}
    assert preprocessing_from_config({"size": 10**6, "do_flip_channel_order": True}, default).get("size") is None
    assert "states size 1000000, which is not known here" in caplog.text
    assert "in the order BGR" in caplog.text


def test_what_is_no_preprocessing_is_said_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "onefold")
    stated = preprocessing_from_config(
        {"size": "big", "resample": 1, "image_mean": "x", "image_std": [0, 0, 0]}, CATALOGUE_INPUT
    )
    assert stated == {}
    for word in ("interpolation 1", "mean 'x'", "std"):
        assert word in caplog.text


ARGUMENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "timm's arguments": (
        argparse.Namespace(img_size=96, mean=MEAN, std=STD, crop_pct=1.0, interpolation="bicubic", input_size=None),
        {"size": 96, "mean": tuple(MEAN), "crop_pct": 1.0, "interpolation": "bicubic"},
    ),
    "torchvision's arguments": (
        argparse.Namespace(val_crop_size=160, val_resize_size=200, interpolation="bilinear"),
        {"size": 160, "crop_pct": 0.8},
    ),
    "mmengine's configuration": (
        {
            "cfg": "data_preprocessor = dict(\n    mean=[\n        127.5, 102.0, 76.5,\n    ],\n    num_classes=2,\n"
            "    std=[51.0, 51.0, 51.0],\n    to_rgb=True)\ntest_pipeline = [\n    dict(type='LoadImageFromFile'),\n"
            "    dict(edge='short', scale=256, type='ResizeEdge'),\n    dict(crop_size=192, type='CenterCrop'),\n]\n"
        },
        {"size": 192, "crop_pct": 0.75, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)},
    ),
    "img_norm_cfg": (
        {"cfg": "img_norm_cfg = dict(mean=[127.5, 102.0, 76.5], std=[51.0, 51.0, 51.0], to_rgb=True)"},
        {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "size": 224},
    ),
    "data_preprocessor": (
        argparse.Namespace(model={"data_preprocessor": {"mean": [127.5] * 3, "std": [51.0] * 3, "bgr_to_rgb": True}}),
        {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
    ),
}


def test_a_network_of_mmengine_for_bgr_is_said_and_its_text_is_not_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "onefold")
    text = "data_preprocessor = dict(mean=[__import__('os').abort(), 2.0], std=[51.0, 51.0, 51.0])"
    assert preprocessing_from_config({"data_preprocessor": text}, CATALOGUE_INPUT) == {"std": (51.0, 51.0, 51.0)}
    assert "in the order BGR" in caplog.text
    caplog.clear()
    given = {"mean": [103.53, 116.28, 123.675], "std": [57.375] * 3, "to_rgb": True}
    stated = preprocessing_from_config({"model": {"data_preprocessor": given}}, CATALOGUE_INPUT)
    assert stated["mean"] == pytest.approx((0.406, 0.456, 0.485))
    assert "BGR" not in caplog.text


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_what_a_trainer_was_told_goes_with_its_weights(kind: str, tmp_path: Path) -> None:
    arguments, expected = ARGUMENTS[kind]
    state = create_model("mobilenetv1_025", num_classes=2).state_dict()
    torch.save({"state_dict": state, "args": arguments}, tmp_path / "w.pth")
    card = read_weights_card(tmp_path / "w.pth", name="mobilenetv1_025")
    assert {key: card.preprocessing[key] for key in expected} == expected


def test_a_choice_among_weights_is_part_of_their_name(tmp_path: Path) -> None:
    state = create_model("mobilenetv1_025", num_classes=2).state_dict()
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    path = tmp_path / "w.ckpt"
    torch.save({"state_dict": state, "state_dict_ema": averaged}, path)
    for suffix, expected in (("", averaged), (":averaged", averaged), (":plain", state), (":state_dict_ema", averaged)):
        model, card = load_model(f"{path}{suffix}", name="mobilenetv1_025")
        assert torch.equal(model.state_dict()["head.fc.bias"], expected["head.fc.bias"])
        assert card.source.startswith(f"{path}{suffix} (state_dict")


def test_offline_with_half_a_hub_cache_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(dict(create_model("mobilenetv1_025", num_classes=2).state_dict()), tmp_path / "model.safetensors")

    def download(repo_id: str, filename: str) -> str:
        if not (tmp_path / filename).exists():
            raise LocalEntryNotFoundError(f"{filename} is not in the cache")
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: download("", url.rpartition("/")[2]))
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda _, name: download("", name) if (tmp_path / name).exists() else None,
    )
    with pytest.raises(NetworkFailed, match=r"weights of me/pets are in the hub's cache and config\.json is not"):
        load_model("me/pets", name="mobilenetv1_025")
    (tmp_path / "config.json").write_text('{"model_type": "mobilenet_v1", "id2label": {"0": "cat", "1": "dog"}}')
    with pytest.raises(NetworkFailed, match=r"preprocessor_config\.json is not"):
        load_model("me/pets", name="mobilenetv1_025")
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 64}, "do_center_crop": false}')
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\n# Pets\n")
    card = load_model("me/pets", name="mobilenetv1_025")[1]
    assert (card.licence, card.classes, card.preprocessing["size"]) == ("apple-amlr", ("cat", "dog"), 64)


# --------------------------------------------------------------------------------- hostile pickles

GLOBAL_LIST = b"c__builtin__\nlist\n"


def bomb(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


HOSTILE: dict[str, bytes] = {
    "no end": b"\x80\x02]",
    "pops nothing": bomb(b"0"),
    "memo of nothing": bomb(b"h\x05"),
    "no mark": bomb(b"(0e"),
    "reduces a number": bomb(b"K\x01)R"),
    "an extension": bomb(b"\x82\x01"),
    "a persistent id of elsewhere": bomb(b"U\x03abcQ"),
    "ends empty": b"\x80\x02.",
    "sets items of a number": bomb(b"K\x01(K\x01K\x02u"),
    "copies one text again and again": bomb(
        b"X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x000" + b"c_codecs\nencode\nq\x010" + b"h\x01h\x00\x85R0" * 200
    ),
    "a tuple of tuples as a key": bomb(b")q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"}h\x00K\x01s"),
    "itself": bomb(b"]q\x00h\x00a"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_pickles_made_by_hand_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(HOSTILE[kind])
    with pytest.raises(BadCheckpoint) as caught:
        read_tensors(tmp_path / "w.pkl", fits=fits)
    assert str(caught.value).isprintable()


def long_keys(opcode: bytes, after: bytes) -> bytes:
    """Keys that all have one hash in CPython."""
    numbers = ((i * ((1 << 61) - 1) + 7).to_bytes(10, "little") for i in range(2, 30_000))
    return b"\x80\x02}(" + b"".join(opcode + b"\x0a" + number + after for number in numbers) + b"u."


def test_forged_pickles_take_neither_minutes_nor_gigabytes(tmp_path: Path) -> None:
    itself = b"\x80\x02}q\x00(" + b"".join(b"M" + i.to_bytes(2, "little") + b"h\x00" for i in range(3000)) + b"u."
    numbers = (b"%d" % (i * ((1 << 61) - 1) + 7) for i in range(2, 30_000))
    forged = {
        "itself under many keys": itself,
        "keys of one hash": long_keys(b"\x8a", b"N"),
        "a memo of one hash": b"\x80\x02}" + b"".join(b"p" + number + b"\n" for number in numbers) + b".",
    }
    for kind, pickled in forged.items():
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
        with pytest.raises(BadCheckpoint, match="holds no tensors"):
            raise AssertionError(f"{kind}: {read_tensors(tmp_path / 'w.pth', fits=fits)}")
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"}" * (8 << 20) + b".")
    with pytest.raises(BadCheckpoint, match="its pickle of 8388611 bytes is a decompression bomb"):
        read_tensors(tmp_path / "w.pth", fits=fits)
    array = np.zeros(1 << 20, np.float32)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({f"stem.conv{i}.weight": array for i in range(1000)}))
    with pytest.raises(BadCheckpoint, match="decompression bomb"):
        read_tensors(tmp_path / "w.pkl", fits=fits)


def test_a_header_of_very_many_tensors_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Safetensors takes more than a minute for a million; so does Python for the directory of a zip."""
    entries = ",".join(f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(60_000))
    header = ("{" + entries + "}").encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(60_000))
    with pytest.raises(BadCheckpoint, match=r"more than 20000 tensors"):
        read_tensors(path)
    path.write_bytes((40 << 20).to_bytes(8, "little") + b"{" + b" " * (40 << 20))
    with pytest.raises(BadCheckpoint, match="its header has 41943040 bytes, more than 20000 tensors need"):
        read_tensors(path)
    directory = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 12 << 20, 40, 0)
    (tmp_path / "w.pth").write_bytes(b"PK\3\4" + bytes(99) + directory)
    with pytest.raises(BadCheckpoint, match="lists more entries than 20000 tensors need"):
        read_tensors(tmp_path / "w.pth")


def test_many_tensors_and_tables_under_many_modules_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onefold.models.safe_load.MAX_TENSORS", 3)
    save_file(PLAIN, tmp_path / "w.safetensors")
    with pytest.raises(BadCheckpoint, match="more than 3 tensors"):
        read_tensors(tmp_path / "w.safetensors", fits=fits)
    parts = {
        str(i): UnpickledObject("m", state={"_modules": {}, "_parameters": dict.fromkeys(range(1000))})
        for i in range(300)
    }
    with pytest.raises(RefusedError, match="or 200000 tensors"):
        list(module_tensors(UnpickledObject("m", state={"_modules": parts})))


def test_a_pickle_without_its_memo_keeps_each_storage(tmp_path: Path) -> None:
    tensors = {f"stem.conv{i}.weight": torch.full((8,), float(i)) for i in range(50)}
    (tmp_path / "w.pkl").write_bytes(pickletools.optimize(pickle.dumps(tensors, 2)))
    found = read_tensors(tmp_path / "w.pkl").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_program_beside_good_weights_is_refused_by_its_name(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return __import__("os").system, ("true",)

    for suffix in (".pth", ".old", ".pkl"):
        with pytest.raises(
            BadCheckpoint, match=r"it would call 'posix\.system', which no weights need: do not trust it"
        ):
            loaded({"state_dict": PLAIN, "x": Evil()}, tmp_path, suffix)


def test_a_network_that_contains_itself_is_refused(tmp_path: Path) -> None:
    network = Wrapped()
    network._modules["again"] = network
    path = written(tmp_path / "w.pth", network)
    with pytest.raises(BadCheckpoint, match=r"network of more than|cannot read"):
        read_tensors(path, fits=fits)


def test_a_tensor_past_its_storage_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "w.pkl", {"stem.conv.weight": torch.arange(4.0)})
    data = path.read_bytes()
    assert data.count(b"K\x04\x85") == 1  # its shape
    path.write_bytes(data.replace(b"K\x04\x85", b"K\x09\x85"))
    with pytest.raises(BadCheckpoint, match="reaches past the end of its storage"):
        read_tensors(path, fits=fits)


# ------------------------------------------------------------------------------------- class names


def omega(values: list[str]) -> argparse.Namespace:
    """A list as OmegaConf holds it: nodes in a node."""
    return argparse.Namespace(_content=[argparse.Namespace(_val=value, _parent=None) for value in values])


CLASS_LISTS: dict[str, Any] = {
    "classes": {"classes": ["cat", "dog", "éa"]},
    "CLASSES": {"meta": {"CLASSES": ("cat", "dog", "éa")}},
    "dataset_meta": {"meta": {"dataset_meta": {"classes": ["cat", "dog", "éa"]}}},
    "class_to_idx": {"class_to_idx": {"dog": 1, "éa": 2, "cat": 0}},
    "idx_to_class": {"idx_to_class": {2: "éa", 0: "cat", 1: "dog"}},
    "names": {"names": {0: "cat", 1: "dog", 2: "éa"}},
    "labels": {"hyper_parameters": {"labels": ["cat", "dog", "éa"]}},
    "id2label": {"config": {"id2label": {"0": "cat", "2": "éa", "1": "dog"}}},
    "label2id": {"config": {"label2id": {"cat": "0", "éa": "2", "dog": "1"}}},
    "in a Namespace": {"args": argparse.Namespace(data=argparse.Namespace(class_names=["cat", "dog", "éa"]))},
    "JSON in a header": {"classes": json.dumps(["cat", "dog", "éa"])},
    "decomposed": {"classes": ["cat", "dog", "e\u0301a"]},
    "numbered from 1": {"config": {"id2label": {"1": "cat", "2": "dog", "3": "éa"}}},
    "COCO's categories": {"categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "éa"}, {"id": 1, "name": "cat"}]},
    "one text": {"hparams": {"class_names": "cat, dog, éa"}},
    "numpy's texts": {"hyper_parameters": {"classes": np.array(["cat", "dog", "éa"])}},
    "numpy's objects": {"classes": np.array(["cat", "dog", "éa"], dtype=object)},
    "numpy's scalars": {"class_to_idx": {np.str_("cat"): np.int64(0), "dog": np.int64(1), "éa": np.int64(2)}},
    "scikit-learn's encoder": {"label_encoder": argparse.Namespace(classes_=np.array(["cat", "dog", "éa"]))},
    "OmegaConf's list": {"cfg": argparse.Namespace(_content={"class_names": omega(["cat", "dog", "éa"])})},
    "index_to_class": {"index_to_class": {0: "cat", 1: "dog", 2: "éa"}},
    "label2idx": {"label2idx": {"dog": 1, "éa": 2, "cat": 0}},
    "vocab": {"vocab": ["cat", "dog", "éa"]},
    "ids and names": {"classes": {"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "éa"]}},
    "bytes": {"class_to_idx": {b"dog": 1, "éa".encode(): 2, b"cat": 0}},
    "bytes in a list": {"classes": [b"cat", b"dog", "éa".encode()]},
    "floats": {"idx_to_class": {1.0: "dog", 0.0: "cat", 2.0: "éa"}},
    "numbers in floats": {"class_to_idx": {"dog": 1.0, "éa": 2.0, "cat": 0.0}},
    "numbers before a list": {"classes": ["dog", "éa", "cat"], "class_to_idx": {"dog": 1, "éa": 2, "cat": 0}},
}


@pytest.mark.parametrize("kind", CLASS_LISTS)
def test_names_of_classes_are_found(kind: str, tmp_path: Path) -> None:
    extras = loaded({"state_dict": PLAIN, **CLASS_LISTS[kind]}, tmp_path).extras
    assert find_class_names(extras, 3) == ("cat", "dog", "éa")
    assert find_class_names(extras, 4) is None


def test_what_names_no_classes_is_not_taken_for_names(tmp_path: Path) -> None:
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    for extras in (
        {"classes": ["a", "", "c"]},
        {"classes": [1.5, 2, 3]},
        {"class_to_idx": {"a": 0, "b": 1, "c": 1}},
        {"class_to_idx": {"a": 2, "b": 3, "c": 4}},
        {"names": "abc"},
        {"labels": torch.tensor([0, 1, 2])},
        {"classes": "[" * 10_000},
        cycle,
    ):
        assert find_class_names(copy.copy(extras), 3) is None
    numbers = {"class_to_idx": {str(i): i for i in range(12)}}
    assert find_class_names(numbers, 12) == tuple(map(str, range(12)))  # in the order of the numbers, not of texts


@pytest.mark.parametrize(
    ("values", "count", "remark"),
    [
        ({"id2label": {1: "cat", 2: "dog"}}, 2, "its id2label (cat, dog) are numbered from 1: the first is taken for"),
        (
            {"categories": [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}]},
            2,
            "its categories (a, b) have the ids 3 to 9",
        ),
        (
            {"names": ["val/acc", "val/loss", "lr"]},
            3,
            "its names (val/acc, val/loss, lr) are not used: they name metrics",
        ),
        ({"labels": ["train_loss", "top1"]}, 2, "its labels (train_loss, top1) are not used: they name metrics"),
        (
            {"classes": ["a", "b", "c"]},
            2,
            "its classes (a, b, c) are not used: they are 3, of a network with 2 outputs",
        ),
        ({"id2label": {5: "a", 6: "b"}}, 2, "its id2label (a, b) are not used: their numbers are not 0 to 1"),
        (
            {"classes": ["b", "a"], "class_to_idx": {"a": 0, "b": 1}},
            2,
            "its class_to_idx (a, b) is taken, and its classes has another order",
        ),
        ({"classes": ["b", "a"], "class_to_idx": {"a": 1, "b": 0}}, 2, ""),
        (
            {"classes": ["b", "a"], "labels": ["x", "y"]},
            2,
            "its classes (b, a) is taken, and its labels (x, y) has others",
        ),
        (
            {"class_to_idx": {"a": torch.tensor(0), "b": torch.tensor(1)}},
            2,
            "its class_to_idx (a, b) are not used: their numbers are tensors, not integers",
        ),
        ({"names": ["fc.weight", "fc.bias"]}, 2, "its names (fc.weight, fc.bias) are not used: they name parameters"),
        ({"val": {"labels": ["1.png", "2.JPG"]}}, 2, "its labels (1.png, 2.JPG) are not used: they name files"),
        ({"classes": ["map", "tie"]}, 2, ""),
        ({"labels": [1, 0, 1]}, 2, ""),
        ({"names": ["a", "b"]}, 2, ""),
    ],
)
def test_what_is_assumed_of_names_or_not_taken_for_them_is_said(values: Any, count: int, remark: str) -> None:
    remarks: list[str] = []
    names = find_class_names(values, count, remarks)
    assert "\n".join(remarks)[: len(remark) or None] == remark
    assert (names is None) == ("not used" in remark or values == {"labels": [1, 0, 1]})


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", [set, frozenset])
@pytest.mark.parametrize("where", [lambda names: {"classes": names}, lambda names: {"cfg": {"class_names": names}}])
def test_the_order_of_a_set_is_not_that_of_the_outputs(
    where: Callable[[Any], dict[str, Any]], kind: type, protocol: int, tmp_path: Path
) -> None:
    torch.save({"state_dict": PLAIN, **where(kind(("zebra", "apple", "mango")))}, tmp_path / "w.pth",
               pickle_protocol=protocol)  # fmt: skip
    remarks: list[str] = []
    assert find_class_names(read_tensors(tmp_path / "w.pth").extras, 3, remarks) is None
    (remark,) = remarks
    assert remark.partition(" ")[2].endswith("(apple, mango, zebra) are not used: they are a set, which has no order")


def test_labels_of_images_and_names_of_an_optimizer_name_no_classes() -> None:
    for values in (
        {"labels": [1, 0, 1]},
        {"optimizer": {"names": ["a", "b", "c"]}},
        {"metrics": {"names": ["a", "b", "c"]}},
    ):
        assert find_class_names(values, 3) is None
    itself: dict[str, object] = {}
    itself |= {str(i): itself for i in range(3000)} | {"z": {"classes": [2, 0, 1]}}
    assert find_class_names(itself, 3) == ("2", "0", "1")


def test_names_in_the_header_of_safetensors_and_in_npz_are_found(tmp_path: Path) -> None:
    save_file(dict(PLAIN), tmp_path / "w.safetensors", {"id2label": json.dumps({"0": "cat", "1": "dog"})})
    assert find_class_names(read_tensors(tmp_path / "w.safetensors").metadata, 2) == ("cat", "dog")
    np.savez(tmp_path / "w.npz", classes=np.array(["cat", "dog"]), **{n: t.numpy() for n, t in PLAIN.items()})
    assert find_class_names(read_tensors(tmp_path / "w.npz").extras, 2) == ("cat", "dog")


def test_objects_in_an_archive_of_numpys_are_read_and_not_run(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in PLAIN.items()}
    np.savez(tmp_path / "w.npz", classes=np.array(["cat", "dog"], dtype=object), meta={"epoch": 3}, **arrays)
    contents = read_tensors(tmp_path / "w.npz", fits=fits)
    check_is(contents, PLAIN)
    assert find_class_names(contents.extras, 2) == ("cat", "dog")
    assert contents.extras["meta"] == {"epoch": 3}
    np.savez(tmp_path / "w.npz", params=arrays)
    check_is(read_tensors(tmp_path / "w.npz", fits=fits), PLAIN)
    np.savez(tmp_path / "w.npz", a=np.array([os.system], dtype=object), **arrays)
    with pytest.raises(BadCheckpoint, match="do not trust it"):
        read_tensors(tmp_path / "w.npz", fits=fits)


# ---------------------------------------------------------------------------------------- several files


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path) -> dict[str, str]:
    """Write PLAIN as two files, and give the index's map; the index has it too."""
    shards = {name: FIRST if name.startswith("st") else SECOND for name in PLAIN}
    for file in (FIRST, SECOND):
        save_file({name: PLAIN[name] for name in PLAIN if shards[name] == file}, folder / file, {"format": "pt"})
    write_index(folder, shards)
    return shards


def write_index(folder: Path, shards: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 64}, "weight_map": shards}), encoding="utf-8-sig")
    return index


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    shards = sharded(tmp_path)
    contents = read_tensors(tmp_path / "model.safetensors.index.json", fits=fits)
    check_is(contents, PLAIN)
    assert contents.metadata == {"format": "pt"}
    under_a_word = {f"model.{name}": file for name, file in shards.items()}
    for file in (FIRST, SECOND):
        save_file({f"model.{n}": PLAIN[n] for n in PLAIN if shards[n] == file}, tmp_path / file)
    check_is(read_tensors(write_index(tmp_path, under_a_word), fits=fits), PLAIN)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head.fc.bias": f"../{SECOND}"}, "expected names of .safetensors files in its folder"),
        ({"head.fc.bias": f"/tmp/{SECOND}"}, "expected names of .safetensors files"),
        ({"head.fc.bias": f"inner/{SECOND}"}, "expected names of .safetensors files"),
        ({"head.fc.bias": f"..\\{SECOND}"}, "expected names of .safetensors files"),
        ({"head.fc.bias": ".safetensors"}, "expected names of .safetensors files"),
        ({"head.fc.bias": "pytorch_model-00002-of-00002.bin"}, "save other weights as one model.safetensors"),
        ({"head.fc.bias": 7}, "expected names of .safetensors files"),
        ({"head.fc.bias": ["x"]}, "expected names of .safetensors files"),
        ({"head.fc.bias": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.safetensors, which is not there"),
        ({"head.fc.bias": FIRST}, "does not hold the tensors that model.safetensors.index.json says ('head.fc.bias')"),
        ({"lost": FIRST}, "does not hold the tensors that model.safetensors.index.json says ('lost')"),
        ({str(i): FIRST for i in range(20_001)}, "more than 20000 tensors"),
        ({str(i): f"{i}.safetensors" for i in range(1001)}, "1000 files"),
    ],
)
def test_an_index_reaches_what_lies_beside_it_and_nothing_else(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    index = write_index(tmp_path, sharded(tmp_path) | change)
    with pytest.raises(BadCheckpoint) as caught:
        read_tensors(index, fits=fits)
    assert sentence in str(caught.value)


def test_an_index_or_one_of_its_files_that_is_damaged_is_named(tmp_path: Path) -> None:
    shards = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    second = (tmp_path / SECOND).read_bytes()
    (tmp_path / SECOND).write_bytes(second[:-8])
    with pytest.raises(BadCheckpoint, match=f"{SECOND}, it is damaged or truncated"):
        read_tensors(index)
    (tmp_path / SECOND).write_bytes(second)
    for text in ("{", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map":' * 2000):
        index.write_text(text)
        with pytest.raises(BadCheckpoint, match=r"index\.json"):
            read_tensors(index)
    del shards["head.fc.bias"]
    with pytest.raises(BadCheckpoint, match="do not belong together"):
        read_tensors(write_index(tmp_path, shards))


def test_names_that_call_two_outputs_alike_are_said():
    remarks: list[str] = []
    assert find_class_names({"classes": ["cat", "cat", "dog"]}, 3, remarks) == ("cat", "cat", "dog")
    assert remarks == ["its classes call several outputs alike (cat): which of them is which cannot be told by name"]
