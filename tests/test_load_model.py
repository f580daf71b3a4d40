"""Our own format, hostile and damaged files, folders and the hub (which is never reached from here)."""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from onefold.checksums import sealed_safetensors, write_sealed_folder
from onefold.commands.fuse import fuse as fuse_command
from onefold.commands.open_network import open_network, resolve_weights_file
from onefold.commands.predictor import select_ema_weights
from onefold.data import Preprocessing
from onefold.data.image_inputs import prepare_image
from onefold.errors import BadArgument, BadCheckpoint, MissingExtra, NetworkFailed, NotWritable
from onefold.models import create_model
from onefold.models.load_model import (
    from_pretrained,
    load_model,
    load_weights_,
    push_to_hub,
    read_card,
    read_weights_card,
    save_pretrained,
    save_weights,
)
from onefold.models.safe_load import read_tensors
from onefold.models.weights_file import Card, preprocessing_from_config, tensors_sha256, verify_checksums
from onefold.reparam import drift, fuse
from onefold.train import RunFolder
from onefold.train.checkpoint import save_best

NAME = "mobilenetv1_025"
CLASSES = ("cat", "dog", "caf\u00e9 <b>", "a|b\n---")
FOREIGN_CLASSES = (*CLASSES[:3], "a|b ---")
"""The same as they are read from other projects' files: each run of blanks is one blank."""


def card(**changes: Any) -> Card:
    values: dict[str, Any] = {
        "model": NAME,
        "num_classes": 4,
        "classes": CLASSES,
        "preprocessing": {"size": 96, "mean": (0.5, 0.4, 0.3), "crop_pct": 0.9, "interpolation": "bicubic"},
        "recipe": "digits:tiny",
        "licence": "Apache-2.0",
        "source": "trained here",
    }
    return Card(**(values | changes))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model(NAME, num_classes=4).eval()


@pytest.fixture(scope="module")
def saved(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "model.safetensors"
    save_weights(model, path, card())
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)


# ------------------------------------------------------------------------------------ own format


def test_a_network_comes_back_as_it_was(model: nn.Module, saved: Path) -> None:
    again, read_back = load_model(saved)
    assert read_back == card()
    assert read_card(saved) == card()
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_fused_network_comes_back_fused(model: nn.Module, tmp_path: Path) -> None:
    fused = fuse(model)
    x = torch.randn(1, 3, 64, 64)
    told = card(fused=True, drift=drift(model, fused, x))
    save_weights(fused, tmp_path / "fused.safetensors", told)
    again, read_back = load_model(tmp_path / "fused.safetensors")
    assert read_back == told
    assert drift(fused, again, x) == 0


def test_the_digest_is_the_one_that_is_documented(saved: Path) -> None:
    import hashlib

    contents = read_tensors(saved)
    sums = hashlib.sha256()
    for name, tensor in sorted(contents.tensors.items()):
        kind = {torch.float32: "float32", torch.int64: "int64"}[tensor.dtype]
        sums.update(f"{name} {kind} [{', '.join(map(str, tensor.shape))}]\n".encode())
        sums.update(tensor.numpy().tobytes())
    assert contents.metadata["sha256"] == sums.hexdigest() == tensors_sha256(contents.tensors)


def test_the_digest_sees_names_kinds_and_shapes() -> None:
    t = torch.zeros(4)
    variants: list[dict[str, Tensor]] = [
        {"a": t},
        {"b": t},
        {"a": t.view(2, 2)},
        {"a": t.half().view(4)},
        {"a": t.int()},
        {"a": t[:2], "b": t[2:]},
    ]
    assert len({tensors_sha256(v) for v in variants}) == len(variants)


def test_any_flipped_bit_is_noticed(saved: Path, tmp_path: Path) -> None:
    """300 damaged copies: each is refused, or (a space in the header) holds exactly what was written."""
    whole, draw = saved.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    before = read_tensors(saved)
    path, refused = tmp_path / "w.safetensors", 0
    for i in range(300):
        at = draw.randrange(8 * (header if i % 3 else len(whole)))
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            contents = read_tensors(path)
            found = verify_checksums(contents, path)
        except BadCheckpoint:
            refused += 1
            continue
        assert found == card()
        assert contents.tensors.keys() == before.tensors.keys()
        assert all(torch.equal(contents.tensors[k], before.tensors[k]) for k in before.tensors)
    assert refused > 270


def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path) -> None:
    whole, draw = saved.read_bytes(), random.Random(1)
    for size in [0, 1, 7, 8, 9, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(40))]:
        (tmp_path / "w.safetensors").write_bytes(whole[:size])
        with pytest.raises(BadCheckpoint):
            load_model(tmp_path / "w.safetensors")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model_name=TEXT,
    classes=st.none() | st.lists(TEXT, max_size=6),
    loss=st.none() | st.floats(0, 1e3),
    fused=st.booleans(),
    recipe=TEXT,
)
def test_a_card_survives_its_metadata(
    model_name: str, classes: list[str] | None, loss: float | None, fused: bool, recipe: str
) -> None:
    told = Card(
        model=model_name,
        num_classes=7 if classes is None else len(classes),
        classes=None if classes is None else tuple(classes),
        fused=fused,
        drift=loss,
        recipe=recipe,
        source=recipe[::-1],
    )
    metadata = told.to_metadata()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    assert Card.from_metadata(metadata) == told


def resealed(**changes: Any) -> dict[str, str]:
    """Metadata whose card was changed by somebody who knows the format."""
    import hashlib

    text = json.dumps(card().to_dict() | changes)
    return {"onefold": "1", "card": text, "card_sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "carries no card"),
        ({"onefold": "1"}, "carries no card"),
        ({"onefold": "2", "card": "{}"}, "pip install --upgrade onefold"),
        ({"onefold": "1", "card": "{}", "card_sha256": "0"}, "not what was written"),
        (resealed(num_classes="4"), "num_classes must be a whole number, not '4'"),
        (resealed(num_classes=True), "num_classes must be a whole number, not True"),
        (resealed(num_classes=3), "cannot name 4"),
        (resealed(classes=[1, 2, 3, 4]), "classes must be"),
        (resealed(preprocessing=[1]), "preprocessing must be"),
        (resealed(model=None), "model must be"),
    ],
)
def test_a_card_that_cannot_be_is_refused(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(BadCheckpoint, match=message):
        Card.from_metadata(metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 10**9, "classes": None}, "contradicts itself"),
        ({"in_chans": 10**9}, "contradicts itself"),
        ({"fused": True}, "contradicts itself"),
        ({"model": "resnet50"}, "a model that this onefold does not have"),
        ({"model": "mobilenetv1_050"}, "It seems to be mobilenetv1_025"),
    ],
)
def test_a_card_that_does_not_fit_its_tensors_is_refused(
    changes: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    save_file(read_tensors(saved).tensors, tmp_path / "w.safetensors", resealed(**changes))
    with pytest.raises(BadCheckpoint, match=message):
        load_model(tmp_path / "w.safetensors")


def test_the_writer_refuses_a_card_of_other_classes(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="the card says 5 classes and the model has 4"):
        save_weights(model, tmp_path / "w.safetensors", card(num_classes=5, classes=None))
    with pytest.raises(BadArgument, match="cannot name 4"):
        card(num_classes=5)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_text("the old file")

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(NotWritable, match="no space to write"):
        save_weights(model, path, card())
    assert path.read_text() == "the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_an_own_file_starts_another_network_too(saved: Path) -> None:
    """Fine-tuning what one has: the same names as for anybody's weights, other classes allowed."""
    started = create_model(NAME, num_classes=2, weights=saved)
    assert torch.equal(started.state_dict()["stem.conv.0.weight"], read_tensors(saved).tensors["stem.conv.0.weight"])
    with pytest.raises(BadCheckpoint, match="other padding, activation or epsilon"):
        create_model(f"{NAME}.tf", num_classes=4, weights=saved)
    other, told = load_model(saved, num_classes=7)
    assert (told.num_classes, told.classes) == (7, None)
    assert "randomly initialized classifier" in told.source
    assert other(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_a_bare_state_dict_of_ours_needs_a_name(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(BadCheckpoint, match="does not tell which of these it is"):
        load_model(tmp_path / "w.pth")
    again, told = load_model(tmp_path / "w.pth", name=NAME)
    assert told.num_classes == 4
    assert drift(model, again, torch.randn(1, 3, 32, 32)) == 0
    with pytest.raises(BadArgument, match="there is no model 'mobilenet_v9'"):
        load_model(tmp_path / "w.pth", name="mobilenet_v9")


def test_a_runs_folder_is_verified_by_its_manifest(model: nn.Module, tmp_path: Path) -> None:
    """What training wrote up to 0.2: the card in the header, the sums in a manifest beside the file alone."""
    data = save(dict(model.state_dict()), card().to_metadata())
    write_sealed_folder(tmp_path / "best", {"model.safetensors": data, "metrics.json": b"{}"})
    assert load_model(tmp_path / "best")[1] == card()
    damaged = bytearray(data)
    damaged[-1000] ^= 1
    (tmp_path / "best" / "model.safetensors").write_bytes(damaged)
    for path in (tmp_path / "best", tmp_path / "best" / "model.safetensors"):
        with pytest.raises(BadCheckpoint, match=r"is damaged: its size or SHA-256 is not what manifest\.json says"):
            load_model(path)
    (tmp_path / "best" / "manifest.json").write_text("[]")
    with pytest.raises(BadCheckpoint, match=r"manifest\.json is missing or damaged"):
        load_model(tmp_path / "best")


def test_a_file_without_any_checksum_of_its_tensors_is_said_to_have_none(
    model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of our own that is: another project's file has none, and nobody expects one."""
    (tmp_path / "w.safetensors").write_bytes(save(dict(model.state_dict()), card().to_metadata()))
    assert load_model(tmp_path / "w.safetensors")[1] == card()
    assert "has no checksum of its tensors" in caplog.text
    caplog.clear()
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors", {"format": "pt", "source": "somewhere"})
    load_model(tmp_path / "w.safetensors", name=NAME)
    assert "checksum" not in caplog.text


def test_no_bit_of_the_lone_weights_of_a_run_is_free(model: nn.Module, tmp_path: Path) -> None:
    """`best/model.safetensors` without the folder around it: header, card and tensors are all checked."""
    folder = RunFolder(tmp_path / "run")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_best(folder, tensors, {"top1": 1.0}, card().to_metadata())
    whole = (folder.best / "model.safetensors").read_bytes()
    path, header = tmp_path / "w.safetensors", 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole)
    assert load_model(path)[1] == card()
    for byte in (*range(0, header, header // 90), *range(header, len(whole), (len(whole) - header) // 30)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :])
        with pytest.raises(BadCheckpoint):
            load_model(path, name=NAME)


def test_equal_networks_are_equal_files_that_others_can_read(model: nn.Module) -> None:
    """Safetensors writes the metadata in an order that differs from process to process."""
    metadata, tensors = card().to_metadata(), dict(model.state_dict())
    files = {sealed_safetensors(save(tensors, metadata)) for _ in range(9)}
    assert len(files) == 1
    content = files.pop()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"]["sha256"] == tensors_sha256(tensors)
    assert list(header["__metadata__"]) == ["card", "card_sha256", "format", "onefold", "sha256"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(content).items())


# --------------------------------------------------------------------------- damaged and hostile


class Evil:
    """Unpickled, it makes the file that it was given."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.made = (call, args)

    def __reduce__(self) -> Any:
        return self.made


def as_pth(path: Path, content: Any) -> None:
    torch.save(content, path)


def as_old_pth(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


def safetensors_of(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def vast_npy() -> bytes:
    """A header that claims 2^40 floats, and no floats."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def deflated_pth() -> bytes:
    """torch.save's file of 64 MiB of zeros, its entries deflated: some 64 KiB."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"stem.conv.weight": torch.zeros(16 << 20)}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return zipped({name: archive.read(name) for name in archive.namelist()})


def bytearray_pth() -> bytes:
    """A pickle that asks for 10 GB, with names that torch's weights_only lets pass."""
    buffer = io.BytesIO()
    torch.save({"stem.conv.weight": torch.zeros(1), "x": Evil(bytearray, 10**10)}, buffer)
    return buffer.getvalue()


def spread_pth() -> bytes:
    """One number, viewed as 2^40 of them."""
    buffer = io.BytesIO()
    torch.save({"stem.conv.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, buffer)
    return buffer.getvalue()


def gadgets(marker: Path) -> dict[str, Callable[[Path], object]]:
    """Files that would make `marker` if anything in them ran."""
    touch = f"touch {marker}"
    evil = {
        "os.system": Evil(os.system, touch),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "open": Evil(open, str(marker), "w"),
        "nested": Evil(list, [Evil(os.system, touch)]),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "torch.load": Evil(torch.load, str(marker)),
        "hub": Evil(torch.hub.load, "owner/name", "model"),
    }
    files: dict[str, Callable[[Path], object]] = {}
    for name, content in evil.items():
        files[f"{name} in .pth"] = lambda p, c=content: as_pth(p, {"state_dict": c})
        files[f"{name} beside weights"] = lambda p, c=content: as_pth(p, {"stem.conv.weight": torch.zeros(1), "x": c})
        files[f"{name} in old .pth"] = lambda p, c=content: as_old_pth(p, {"state_dict": c})
        files[f"{name} in a pickle"] = lambda p, c=content: as_pickle(p, c)
        files[f"{name} in .npz"] = lambda p, c=content: p.write_bytes(
            zipped({"stem.conv.weight.npy": npy(np.array([c], dtype=object), allow_pickle=True)})
        )
    return files


HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\n"
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "one byte": (b"\x80", "not a file of weights"),
    "web page": (HTML, "a web page, not weights"),
    "web page after spaces": (b"\n  " + HTML, "a web page, not weights"),
    "LFS pointer": (LFS, "git lfs pull"),
    "text": (b"mobileone_s0\n" * 100, "not a file of weights that is known here"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "a packed archive"),
    "tar": (bytes(257) + b"ustar" + bytes(250), "a packed archive"),
    "ONNX": (b"\x08\x07\x12\x07pytorch" + bytes(40), r"an exported network \(ONNX\), not weights"),
    "LiteRT": (b"\x1c\0\0\0TFL3" + bytes(40), r"an exported network \(LiteRT\), not weights"),
    "ExecuTorch": (b"\x50\0\0\0ET12" + bytes(40), r"an exported network \(ExecuTorch\), not weights"),
    "noise": (random.Random(5).randbytes(5000), "not a file of weights"),
    "zeros": (bytes(5000), "not a file of weights"),
    "bare .npy": (npy(np.zeros(5)), "not a file of weights"),
    "zip of nothing": (zipped({}), "not a file of weights"),
    "zip of a text": (zipped({"readme.txt": b"hello"}), "a zip archive, but no file of torch.save"),
    "torn zip": (zipped({"a.npy": npy(np.zeros(1000))})[:200], "damaged or truncated zip"),
    "npz of text": (zipped({"a.npy": b"hello"}), "cannot read"),
    "npz that claims 4 TiB": (zipped({"a.npy": vast_npy()}), "cannot read"),
    "npz of words": (zipped({"a.npy": npy(np.array(["x", "y"]))}), "holds no tensors"),
    "pickle bomb": (bytearray_pth(), "no size known here: give a name"),
    "npz bomb": (zipped({"a.npy": npy(np.zeros(16 << 20, np.float32))}), "that is a decompression bomb"),
    "pth bomb": (deflated_pth(), "that is a decompression bomb"),
    "pth of one number spread": (spread_pth(), "that is a decompression bomb"),
    "huge header": (safetensors_of(b"{" + b" " * 100, length=1 << 60), "truncated or forged"),
    "header past the end": (safetensors_of(b"{}", length=3000), "truncated or forged"),
    "header not JSON": (safetensors_of(b"{'a': 1}" + b" " * 8), "cannot read"),
    "header deep": (safetensors_of(b'{"a":' * 5000), "cannot read"),
    "header empty": (safetensors_of(b"{}"), "holds no tensors"),
    "tensor past the end": (
        safetensors_of(json.dumps({"a": entry([100], 0, 400)}).encode(), bytes(8)),
        "cannot read",
    ),
    "tensors that overlap": (
        safetensors_of(json.dumps({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}).encode(), bytes(12)),
        "cannot read",
    ),
    "shape that overflows": (
        safetensors_of(json.dumps({"a": entry([1 << 62, 8], 0, 8)}).encode(), bytes(8)),
        "cannot read",
    ),
    "hdf5 of noise": (b"\x89HDF\r\n\x1a\n" + random.Random(3).randbytes(3000), "cannot read"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file_is_refused_with_a_sentence(kind: str, suffix: str, tmp_path: Path) -> None:
    data, message = DAMAGED[kind]
    path = tmp_path / f"w{suffix}"  # the name says nothing
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        load_model(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 600


def test_nothing_in_a_file_is_ever_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    files = gadgets(marker)
    assert len(files) == 35
    path = tmp_path / "w.pth"
    for kind, write in files.items():
        write(path)
        with pytest.raises(BadCheckpoint) as caught:
            load_model(path)
        assert "\n" not in str(caught.value), kind
        assert "weights_only" not in str(caught.value), kind
        assert not marker.exists(), kind
    path.write_bytes(pickle.dumps(Evil(os.system, f"touch {marker}")))
    pickle.loads(path.read_bytes())  # the corpus is live: a careless reader runs it
    assert marker.exists()


def test_a_program_or_a_network_of_something_else_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pth")
    with pytest.raises(BadCheckpoint, match=r"has keys like weight, bias, of no layout known"):
        load_model(tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pth", "a") as archive:
        archive.writestr("m/constants.pkl", b"")  # as torch.jit.save writes
    with pytest.raises(BadCheckpoint, match="is a TorchScript archive, a program that is not run here"):
        load_model(tmp_path / "m.pth")
    for content in ([1, 2], torch.zeros(3), "text", {}, {"epoch": 3}, {"state_dict": {}}):
        torch.save(content, tmp_path / "m.pth")
        with pytest.raises(BadCheckpoint, match=r"save model\.state_dict\(\)"):
            load_model(tmp_path / "m.pth")


def test_truncated_and_torn_torch_files_are_refused(model: nn.Module, tmp_path: Path) -> None:
    draw = random.Random(4)
    for new in (True, False):
        torch.save(model.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        whole = (tmp_path / "w.pth").read_bytes()
        for _ in range(12):
            (tmp_path / "w.pth").write_bytes(whole[: draw.randrange(1, len(whole) - 1)])
            with pytest.raises(BadCheckpoint):
                load_model(tmp_path / "w.pth", name=NAME)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="there is no file"):
        load_model(tmp_path / "nowhere.pth")
    with pytest.raises(BadCheckpoint, match=r"is a folder without model\.safetensors"):
        load_model(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(BadCheckpoint, match="not a regular file"):
        load_model(tmp_path / "pipe.pth")
    with pytest.raises(BadCheckpoint, match="cannot look for"):
        load_model("x" * 5000)
    with pytest.raises(BadCheckpoint):
        load_model(tmp_path / "a\0b")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BadCheckpoint):
        load_model(tmp_path / "loop")


def test_hdf5_that_points_elsewhere_or_inflates_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(400))
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("conv1", (100,), "f4", external=[(str(secret), 0, 400)])
    with pytest.raises(BadCheckpoint, match="keeps 'conv1' in another file"):
        load_model(tmp_path / "outside.h5")
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("conv1", (1 << 40,), "f4", chunks=(1 << 20,))
    with pytest.raises(BadCheckpoint, match="that is a decompression bomb"):
        load_model(tmp_path / "bomb.h5")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["words"] = "text"
    with pytest.raises(BadCheckpoint, match="holds no tensors"):
        load_model(tmp_path / "empty.h5")


def test_hdf5_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "w.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(MissingExtra, match="pip install h5py"):
        load_model(tmp_path / "w.h5")


# ----------------------------------------------------------------------------- folders, and the hub


def test_a_pretrained_folder_goes_out_and_comes_back(model: nn.Module, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    save_pretrained(model, tmp_path / "out", card(), metrics={"top1": 71.4, "top5": 89.9})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again, told = from_pretrained(tmp_path / "out")
    assert told == card()
    assert drift(model, again, torch.randn(1, 3, 32, 32)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == NAME
    assert config["num_features"] == 256
    assert config["label_names"] == list(CLASSES)
    assert config["id2label"]["2"] == CLASSES[2]
    assert config["label2id"][CLASSES[3]] == 3
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 96]
    page = ModelCard((tmp_path / "out" / "README.md").read_text())
    front = page.data.to_dict()
    assert (front["library_name"], front["license"], front["pipeline_tag"]) == (
        "onefold",
        "apache-2.0",
        "image-classification",
    )
    results = {r.metric_name: r.metric_value for r in page.data.eval_results}
    assert results == {"top1": 71.4, "top5": 89.9}
    assert "trained here" in page.text


def test_a_page_cannot_be_broken_by_its_texts(model: nn.Module, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    nasty = 'x" \n---\n- y: [*a] | <script>alert(1)</script> #'
    save_pretrained(model, tmp_path, card(licence=nasty, source=nasty, recipe=nasty))
    text = (tmp_path / "README.md").read_text()
    front = ModelCard(text).data.to_dict()
    assert front["license"] == "other"
    assert front["license_name"] == nasty
    assert "<script" not in text.partition("\n---\n")[2]


def test_a_foreign_folder_tells_its_preprocessing_and_classes(tmp_path: Path, model: nn.Module) -> None:
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    config = {
        "architecture": "whatever",
        "label_names": list(CLASSES),
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3],
            "std": "no list",
            "crop_pct": 0.95,
            "interpolation": "random",
            "input_size": [3, 256, 256],
            "license": "mit",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, told = load_model(tmp_path, name=NAME)
    assert told.classes == FOREIGN_CLASSES
    assert told.licence == "mit"
    assert told.preprocessing["mean"] == (0.1, 0.2, 0.3)
    assert told.preprocessing["std"] == (0.229, 0.224, 0.225)  # the catalogue's, where the config says nothing sound
    assert told.preprocessing["interpolation"] == "bilinear"
    assert (told.preprocessing["size"], told.preprocessing["crop_pct"]) == (256, 0.95)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {str(i): c for i, c in enumerate(CLASSES)}}))
    assert load_model(tmp_path, name=NAME)[1].classes == FOREIGN_CLASSES
    for bad in ("[1]", "{", '{"a":' * 100_000, "\udcff"):
        (tmp_path / "config.json").write_bytes(bad.encode("utf-8", "surrogateescape"))
        with pytest.raises(BadCheckpoint, match=r"config\.json cannot be read"):
            load_model(tmp_path, name=NAME)


def test_weights_of_any_name_have_the_config_beside_them_where_they_are_the_only_ones(
    tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onefold")
    torch.save(model.state_dict(), tmp_path / "best.pth")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": list(CLASSES), "image_size": 64}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    for source in (tmp_path, tmp_path / "best.pth", f"{tmp_path / 'best.pth'}:plain"):
        told = load_model(source, name=NAME)[1]
        assert (told.classes, told.preprocessing["mean"], told.preprocessing["size"]) == (
            FOREIGN_CLASSES,
            (0.5,) * 3,
            64,
        )
    assert "best.pth, the only ones there" in caplog.text
    shutil.copy(tmp_path / "best.pth", tmp_path / "last.pth")
    assert load_model(tmp_path / "best.pth", name=NAME)[1].classes is None
    assert "the config.json and preprocessor_config.json beside it is not read: there are other weights" in caplog.text
    with pytest.raises(BadCheckpoint, match=r"give the file of weights itself \(it holds best\.pth, last\.pth\)"):
        load_model(tmp_path, name=NAME)
    (tmp_path / "deploy" / "onnx-int8").mkdir(parents=True)
    (tmp_path / "deploy" / "onnx-int8" / "manifest.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"may be artifacts \(onnx-int8\): give one, as .*onnx-int8"):
        load_model(tmp_path / "deploy", name=NAME)
    (tmp_path / "last.pth").unlink()
    (tmp_path / "config.json").write_text("[1]")
    assert load_model(tmp_path / "best.pth", name=NAME)[1].classes is None
    assert "is not read: " in caplog.text
    assert "not an object" in caplog.text


@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        ({"pretrained_cfg": {"input_size": [3, 192, 256]}}, 256, "192 by 256"),
        ({"pretrained_cfg": {"input_size": [3, 96, 96]}}, 96, ""),
        ({"crop_size": {"height": 192, "width": 256}, "do_center_crop": True}, 192, "256 by 192"),
        ({"size": {"height": 64, "width": 64}}, 64, ""),
        ({"size": {"shortest_edge": 80}}, 80, ""),
        ({"image_size": [48, 64]}, 64, "48 by 64"),
    ],
)
def test_a_size_that_is_no_square_is_said(
    config: dict[str, Any], size: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onefold")
    stated = preprocessing_from_config(config, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": 224, "crop_pct": 0.875})
    assert stated["size"] == size
    assert ("here they are squares" in caplog.text) == bool(said)
    assert said in caplog.text


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("squash", "the weights' config resizes images without their aspect ratio; here the middle square is taken"),
        ("border", "the weights' config pads images to squares; here the middle square is taken"),
        ("corner", "the weights' config states crop_mode 'corner'; here the middle square is taken"),
        ("center", ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "args"])
def test_another_way_to_crop_is_said(
    place: str, mode: str | None, said: str, tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    stated = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64], "crop_mode": mode}
    beside = {"args": argparse.Namespace(**stated)} if place == "args" else {}
    torch.save({"state_dict": model.state_dict(), **beside}, tmp_path / "w.pth")
    if place == "config.json":
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": stated}))
    caplog.set_level(logging.INFO, "onefold")
    assert load_model(tmp_path / "w.pth", name=NAME)[1].preprocessing["size"] == 64
    assert said in caplog.text
    assert ("here the middle square" in caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("args", "size", "untold"),
    [
        ({"input_size": 96, "crop_pct": 0.9}, 96, r"the mean and std of images: as \S+ \(mean 0.485 0.456 0.406\)"),
        ({"input_size": (96, 96)}, 96, "the mean and std of images"),
        ({"img_size": [96, 96], "mean": [0.5] * 3, "std": [0.5] * 3}, 96, ""),
        ({"image_size": 96, "mean": [0.5] * 3, "std": [0.5] * 3}, 96, ""),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, 224, r"the size of images: as \S+ \(224 pixels\)"),
        ({"crop_pct": 0.9}, 224, r"how images are prepared: as \S+ \(224 pixels, mean 0.485 0.456 0.406\)"),
        ({"lr": 0.1}, 224, r"how images are prepared: as \S+ \(224 pixels, mean 0.485 0.456 0.406\)"),
    ],
)
def test_each_part_of_the_preprocessing_that_is_not_told_is_said(
    args: dict[str, Any], size: int, untold: str, tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**args)}, tmp_path / "w.pth")
    caplog.set_level(logging.INFO, "onefold")
    assert load_model(tmp_path / "w.pth", name=NAME)[1].preprocessing["size"] == size
    assert re.search(f"does not tell its padding, activation and epsilon{' or ' * bool(untold)}{untold}", caplog.text)
    assert ("images" in caplog.text) == bool(untold)


@pytest.mark.parametrize("key", ["pretrained_cfg", "default_cfg"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timms_configuration_within_a_file_is_read(
    suffix: str, key: str, tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.95}
    if suffix == "pth":
        torch.save({"state_dict": model.state_dict(), key: config}, tmp_path / "w.pth")
    else:
        save_file(dict(model.state_dict()), tmp_path / "w.safetensors", {key: json.dumps(config)})
    caplog.set_level(logging.INFO, "onefold")
    told = load_model(tmp_path / f"w.{suffix}", name=NAME)[1].preprocessing
    assert (told["size"], told["mean"], told["std"], told["crop_pct"]) == (96, (0.5,) * 3, (0.25,) * 3, 0.95)
    assert "how images are prepared" not in caplog.text


def test_weights_that_are_named_twice_are_named_once(tmp_path: Path) -> None:
    path = tmp_path / "e.pth"
    path.touch()
    assert select_ema_weights(path, None) == str(path)
    assert select_ema_weights(path, True) == f"{path}:averaged"
    assert select_ema_weights(f"{path}:plain", False) == f"{path}:plain"
    assert select_ema_weights(f"timm:lcnet_035@{path}", False) == f"timm:lcnet_035@{path}:plain"
    for source in (f"{path}:plain", f"timm:lcnet_035@{path}:plain"):
        with pytest.raises(BadArgument, match=r"pth:plain names 'plain' weights, and 'averaged' ones are asked for"):
            select_ema_weights(source, True)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_licence_that_a_file_states_is_in_its_card(suffix: str, tmp_path: Path, model: nn.Module) -> None:
    path, tensors = tmp_path / f"w.{suffix}", dict(model.state_dict())
    if suffix == "pth":
        torch.save({"state_dict": tensors, "license": "cc-by-4.0\n"}, path)
    else:
        save_file(tensors, path, {"license": "cc-by-4.0"})
    assert load_model(path, name=NAME)[1].licence == "cc-by-4.0"
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": "mit"}}))
    assert load_model(path, name=NAME)[1].licence == "mit"


def write_shards(model: nn.Module, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Write weights in three files with an index, and config.json beside them, as transformers does."""
    folder.mkdir()
    tensors, shards = model.state_dict(), {}
    for i in range(3):
        shard = f"model-0000{i + 1}-of-00003.safetensors"
        part = {name: tensors[name].contiguous() for name in sorted(tensors)[i::3]}
        save_file(part, folder / shard, metadata)
        shards |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(CLASSES)), "image_size": 64}))


def test_weights_in_several_files_are_those_of_one(
    tmp_path: Path, model: nn.Module, hub: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "w"
    write_shards(model, folder)
    hub["me/large"] = {path.name: path for path in folder.iterdir()}
    for source in (folder, folder / "model.safetensors.index.json", "me/large"):
        monkeypatch.chdir(tmp_path)
        loaded, told = load_model(source, name=NAME)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
        assert (told.classes, told.preprocessing["size"]) == (FOREIGN_CLASSES, 64)
    with pytest.raises(BadCheckpoint, match=r"one of the 3 files of weights: give .*model\.safetensors\.index\.json"):
        load_model(folder / "model-00002-of-00003.safetensors", name=NAME)
    del hub["me/large"]["model-00003-of-00003.safetensors"]
    with pytest.raises(BadCheckpoint, match=r"me/large on the hub has no model-00003-of-00003\.safetensors, which its"):
        load_model("me/large", name=NAME)
    (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    assert load_model(folder, name=NAME)[1].classes == FOREIGN_CLASSES  # the only weights there, under another name
    (folder / "other.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../x.safetensors"}}))
    hub["me/large"]["model.safetensors.index.json"] = folder / "other.safetensors.index.json"
    with pytest.raises(BadCheckpoint, match=r"expected names of \.safetensors files in its folder"):
        load_model("me/large", name=NAME)


def test_several_files_are_taken_from_the_hubs_cache_without_a_network(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(model, tmp_path / "w")

    def fail(*_: Any) -> None:
        raise ConnectionError("offline")

    def cached(_: str, name: str) -> str | None:
        return str(tmp_path / "w" / name) if (tmp_path / "w" / name).is_file() else None

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    (tmp_path / "w" / "preprocessor_config.json").write_text("{}")
    assert load_model("me/large", name=NAME)[1].classes == FOREIGN_CLASSES
    (tmp_path / "w" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(NetworkFailed):
        load_model("me/large", name=NAME)


def test_several_files_that_were_changed_since_their_card_was_written_are_refused(
    tmp_path: Path, model: nn.Module
) -> None:
    metadata = card().to_metadata() | {"sha256": tensors_sha256(model.state_dict())}
    write_shards(model, tmp_path / "w", metadata)
    assert load_model(tmp_path / "w")[1] == card()
    write_shards(create_model(NAME, num_classes=4), tmp_path / "v", metadata)
    with pytest.raises(BadCheckpoint, match="is not what was written"):
        load_model(tmp_path / "v")


@pytest.mark.parametrize(
    "beside", [{"n_averaged": torch.tensor(3)}, {"loss.weight": torch.ones(3)}, {"m.total": torch.ones(1)}]
)
def test_what_stands_beside_a_wrapped_network_of_ours_is_left_out(
    tmp_path: Path, model: nn.Module, beside: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onefold")
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": {**wrapped, **beside}}, tmp_path / "w.pth")
    found = load_model(tmp_path / "w.pth", name=NAME)[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert ("1 tensors beside the network are left out" in caplog.text) == ("n_averaged" not in beside)


def test_the_averaged_weights_of_a_checkpoint_are_taken_said_and_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onefold")
    last, values = tmp_path / "run/last", {}
    for name, file in (("plain", "model.safetensors"), ("averaged", "ema.safetensors")):
        made = create_model(NAME, num_classes=2)
        save_weights(made, last / file, Card(model=NAME, num_classes=2))
        values[name] = made.state_dict()["head.fc.weight"]
    for source, taken, said in (
        (last, "averaged", "averaged weights (ema.safetensors) and plain weights (model.safetensors): the first are"),
        (f"{last}:plain", "plain", ""),
        (f"{last}:averaged", "averaged", ""),
        (last / "model.safetensors", "plain", "ema.safetensors are the averaged ones"),
        (last / "ema.safetensors", "averaged", ""),
    ):
        caplog.clear()
        assert torch.equal(load_model(source)[0].state_dict()["head.fc.weight"], values[taken]), source
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)
    (tmp_path / "run/log.jsonl").write_text("")
    shutil.copytree(last, tmp_path / "run/best")
    assert resolve_weights_file(f"{tmp_path / 'run'}:averaged") == resolve_weights_file(tmp_path / "run")
    with pytest.raises(BadArgument, match=r"run are averaged, and no plain ones are kept; .*/last:plain"):
        resolve_weights_file(f"{tmp_path / 'run'}:plain")


@pytest.mark.parametrize("config", [{}, {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "input_size": [3, 64, 64]}}])
def test_grey_weights_are_prepared_for_by_the_averages_of_the_colours(tmp_path: Path, config: dict[str, Any]) -> None:
    torch.save(create_model(NAME, num_classes=2, in_chans=1).state_dict(), tmp_path / "w.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = Preprocessing.from_dict(read_weights_card(tmp_path / "w.pth", name=NAME).preprocessing)
    mean = sum(config["pretrained_cfg"]["mean"]) / 3 if config else (0.485 + 0.456 + 0.406) / 3
    assert (told.channels, told.mean) == (1, pytest.approx((mean,)))
    assert told.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("channels", [2, 4, 13])
def test_weights_of_other_channels_carry_a_preprocessing_of_as_many(tmp_path: Path, channels: int, own: bool) -> None:
    """They are fused; photos, which have no such channels, are refused in one sentence, prepared arrays are not."""
    given, fused = tmp_path / "w.safetensors", tmp_path / "fused.safetensors"
    model = create_model(NAME, num_classes=2, in_chans=channels).eval()
    if own:  # a card that says nothing of it, as an older version wrote it
        save_weights(model, given, Card(model=NAME, num_classes=2, in_chans=channels, preprocessing={"size": 32}))
    else:
        save_file(model.state_dict(), given)
    fuse_command(given, fused, model=None if own else NAME)
    network = open_network(fused).with_size(32)
    told = network.preprocessing
    assert (network.card.in_chans, told.channels, len(told.mean), len(told.std)) == (channels,) * 4
    assert told.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,) * channels)
    image = np.zeros((channels, 32, 32), np.float32)
    assert prepare_image(image, told).shape == image.shape
    with pytest.raises(BadArgument, match=f"takes images of {channels} channels, and photos are read as 3 or 1"):
        told(Image.new("RGB", (40, 40)))


@pytest.mark.parametrize(("before", "after"), [(3, 4), (3, 1), (1, 3), (4, 3)])
def test_a_stem_for_other_channels_has_a_preprocessing_for_them(tmp_path: Path, before: int, after: int) -> None:
    torch.save(create_model(NAME, num_classes=2, in_chans=before).state_dict(), tmp_path / "w.pth")
    _, card = load_model(tmp_path / "w.pth", name=NAME, in_chans=after, quiet=True)
    told = Preprocessing.from_dict(card.preprocessing)
    assert (card.in_chans, told.channels, len(told.mean)) == (after,) * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_is_read_as_editors_save_it(tmp_path: Path, encoding: str) -> None:
    torch.save(create_model(NAME, num_classes=2).state_dict(), tmp_path / "w.pth")
    stated = {"label_names": ["caf\u00e9", "tea"], "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (tmp_path / "config.json").write_text(json.dumps(stated, ensure_ascii=False), encoding=encoding)
    told = read_weights_card(tmp_path / "w.pth", name=NAME)
    assert (told.classes, told.preprocessing["mean"]) == (("caf\u00e9", "tea"), (0.5, 0.5, 0.5))


def test_a_config_that_asks_for_another_network_is_refused(tmp_path: Path) -> None:
    from test_load_weights import hf_names, torch_file, v1_layers

    generator = torch.Generator().manual_seed(9)
    head = {"weight": torch.randn(3, 256, generator=generator), "bias": torch.zeros(3)}
    save_file(torch_file(v1_layers(0.25, generator), head, hf_names), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tf_padding": True, "hidden_act": "relu6"}))
    assert load_model(tmp_path)[1].model == "mobilenetv1_025.tf"
    (tmp_path / "config.json").write_text(json.dumps({"tf_padding": False}))
    with pytest.raises(BadCheckpoint, match="tf_padding False"):
        load_model(tmp_path)


def answer(status: int) -> Any:
    """What the hub's errors hold of an HTTP response, whatever package the client has it from."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> dict[str, dict[str, Path]]:
    """A hub of one process: repository -> file name -> file."""
    repositories: dict[str, dict[str, Path]] = {"me/mine": {"model.safetensors": saved}}

    def download(repo_id: str, filename: str) -> str:
        if repo_id not in repositories:
            raise RepositoryNotFoundError(f"404: no {repo_id}", response=answer(404))
        if filename not in repositories[repo_id]:
            raise EntryNotFoundError(f"404: no {filename}")
        return str(repositories[repo_id][filename])

    def metadata(url: str) -> Any:
        owner, name, *_, file = url.removeprefix("https://huggingface.co/").split("/")
        return SimpleNamespace(size=Path(download(f"{owner}/{name}", file)).stat().st_size)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    return repositories


def test_ids_of_the_hub_are_downloaded_as_safetensors_only(
    hub: dict[str, dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        assert load_model("me/mine")[1] == card()
    assert re.search(r"downloading model\.safetensors of me/mine, \d+\.\d MB, from huggingface\.co", caplog.text)
    assert load_model("hf-hub:me/mine")[1] == card()
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "mine-fp32").mkdir()
    with pytest.raises(
        BadCheckpoint, match=r"the folder me holds mine-fp32; for the repository of the hub type hf-hub:me"
    ):
        load_model("me/mine")
    (tmp_path / "me" / "mine-fp32").rmdir()
    (tmp_path / "me").rmdir()
    hub["me/pickled"] = {"pytorch_model.bin": tmp_path / "w.bin", "config.json": tmp_path / "c.json"}
    with pytest.raises(BadCheckpoint, match=r"has no model\.safetensors, and pickled files from there are not read"):
        load_model("me/pickled")
    with pytest.raises(
        BadCheckpoint, match=r"no file me/nothing, .*hub has no such repository.*: check the path or the id"
    ):
        create_model(NAME, num_classes=4, weights="me/nothing")


def test_a_timm_repository_needs_no_name(hub: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    from test_load_weights import small

    save_file(small(), tmp_path / "model.safetensors")
    config = {"architecture": "mobilenetv1_025", "pretrained_cfg": {"crop_pct": 0.95, "license": "apache-2.0"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hub["timm/mobilenetv1_025.in1k"] = {n: tmp_path / n for n in ("model.safetensors", "config.json")}
    _, told = load_model("timm/mobilenetv1_025.in1k")
    assert told.model == "mobilenetv1_025.timm"
    assert told.preprocessing["crop_pct"] == 0.95
    assert told.source == "timm/mobilenetv1_025.in1k"
    assert told.licence == "apache-2.0"


@pytest.mark.parametrize("what", ["no/such.pth", "a/b/c", "plainname", "", "/etc/nothing", "../up/x"])
@pytest.mark.usefixtures("offline")
def test_what_is_no_id_never_reaches_the_network(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"there is no file|a folder without"):
        load_model(what)


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for error in (LocalEntryNotFoundError("x"), OfflineModeIsEnabled("x"), OSError("no route")):

        def fail(*_: Any, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
        with pytest.raises(NetworkFailed, match=r"copy its model\.safetensors here from another machine") as raised:
            load_weights_(create_model(NAME, num_classes=4), "timm/x", NAME)
        assert raised.value.__suppress_context__


def test_the_hub_is_asked_once_and_its_first_cause_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fail(url: str) -> None:
        asked.append(url)
        raise ConnectionError("HTTPSConnectionPool, retries, " * 20) from OSError(-2, "Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    with pytest.raises(NetworkFailed, match=r"\(ConnectionError: \[Errno -2\] Name or service not known\): check"):
        load_model("timm/x")
    assert asked == ["https://huggingface.co/timm/x/resolve/main/model.safetensors"]


@pytest.mark.parametrize("what", ["runs/nothing", "artifacts/onnx-fp32", "deploy/onnx-int8", "demo/x", "mine/best"])
@pytest.mark.usefixtures("offline")
def test_a_path_of_a_folder_that_is_not_here_is_no_id(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = what.split("/")[0]
    with pytest.raises(
        BadCheckpoint,
        match=f"there is no {what}: the current folder {tmp_path} has no folder {folder}; .*hf-hub:{what}",
    ):
        load_model(what)


def test_a_cache_without_room_is_no_fault_of_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_: SimpleNamespace(size=None))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(NotWritable, match=r"hub's cache cannot be written .*No space left.*HF_HOME"):
        load_weights_(create_model(NAME, num_classes=4), "timm/x", NAME)


class FakeApi:
    """Keeps what it is sent."""

    def __init__(self, refuse: Exception | None = None) -> None:
        self.made: list[tuple[str, bool]] = []
        self.files: dict[str, bytes] = {}
        self.refuse = refuse

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        if self.refuse:
            raise self.refuse
        assert exist_ok
        self.made.append((repo_id, private))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert NAME in commit_message
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def test_a_push_sends_the_pretrained_folder(model: nn.Module, tmp_path: Path) -> None:
    api = FakeApi()
    assert push_to_hub(model, "me/mine", card(), private=True, api=api) == "https://huggingface.co/me/mine"
    assert api.made == [("me/mine", True)]
    for name, data in api.files.items():
        (tmp_path / name).write_bytes(data)
    assert from_pretrained(tmp_path)[1] == card()
    for error, kind, says in (
        (
            HfHubHTTPError("401\nnot you", response=answer(401)),
            BadArgument,
            r"hub refused me/mine \(401 not you.*login",
        ),
        (
            ConnectionError("no route"),
            NetworkFailed,
            r"cannot be reached to push me/mine .*: no route\)",
        ),
    ):
        with pytest.raises(kind, match=says):
            push_to_hub(model, "me/mine", card(), api=FakeApi(refuse=error))
    with pytest.raises(BadArgument, match="no id of the hub"):
        push_to_hub(model, "mine", card(), api=api)
