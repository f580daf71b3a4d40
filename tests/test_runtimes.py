"""The contract of every runtime, over RUNTIMES: a new one is picked up by its name; then what each has of its own.

Answers are compared with the module's own; hashes and digests are computed here by their written rule.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from available_runtimes import INSTALLED, RUNNABLE, unavailable
from onefold import runtimes
from onefold.cli import main
from onefold.errors import BadArgument, BadArtifact, GateFailed, MissingExtra
from onefold.quantize import quantize
from onefold.runtimes import RUNTIMES, Artifact, ModelInfo, export, import_runtime, load, onnx, open_artifact
from onefold.runtimes.artifact import manifest_sha256, read_manifest
from onefold.runtimes.base import open_for_cold_start
from onefold.runtimes.exporter import TracedModel
from onefold.runtimes.reference_logits import make_reference_images, read_reference, relative_difference, top1_agreement
from onefold.runtimes.sandbox import mark_as_trusted

SHAPE = (3, 17, 19)
CLASSES = ("ant", "bee", "cat", "caf\u00e9", "<b>", "new\nline", "\udce9")
INFO = ModelInfo(
    model="padded",
    fused=True,
    drift=2e-7,
    classes=CLASSES,
    preprocessing={"mean": [0.5, 0.5, 0.5], "size": 17},
    licence="Apache-2.0",
    source="made here",
)


class Padded(nn.Module):
    """Padding that depends on the image's size, activations in place, a depthwise layer and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU6(inplace=True)
        self.fc = nn.Linear(8, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = ((-(-n // 2) - 1) * 2 + 3 - n for n in x.shape[-2:])
        x = self.act(self.stem(F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))))
        x = self.depthwise(x)
        x = x * F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Tokens(nn.Module):
    """Tokens that meet the image by attention, a dynamic activation, a norm, a constant, as in Mobile-Former."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True))
        self.tokens = nn.Parameter(torch.randn(1, 4, 8))
        self.norm = nn.LayerNorm(8)
        self.slopes = nn.Linear(8, 16)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch = x.shape[0]
        local = x.flatten(2)
        tokens = self.tokens.expand(batch, -1, -1)
        tokens = self.norm(tokens + torch.softmax(tokens @ local / 8**0.5, -1) @ local.transpose(1, 2))
        low, high = self.slopes(tokens[:, 0]).view(batch, 2, 8, 1, 1).unbind(1)
        x = torch.maximum(x * low, x * high + torch.tensor(0.1))
        return self.head(torch.cat([x.amax((2, 3)), tokens.mean(1)], 1))


def padded() -> nn.Module:
    torch.manual_seed(1)
    return Padded().eval()


def images(num_images: int, seed: int = 5) -> np.ndarray:
    return make_reference_images(SHAPE, num_images=num_images, seed=seed)


def answer(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(x.copy())).numpy()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Gives the padded network as exported for a runtime; it is exported once."""

    @cache
    def exported(runtime: str) -> Artifact:
        folder = tmp_path_factory.mktemp("artifacts") / f"{runtime}-fp32"
        return export(padded(), images(2, seed=0), folder, runtime=runtime, info=INFO)

    return exported


@pytest.fixture(params=INSTALLED)
def made(request: pytest.FixtureRequest, artifact: Callable[[str], Artifact]) -> Artifact:
    """The padded network, exported for each runtime."""
    return artifact(request.param)


def reason_of(artifact: Artifact) -> str | None:
    """Why the artifact cannot run on this machine."""
    why = import_runtime(artifact.runtime).unavailable_reason
    return None if why is None else why()


@pytest.fixture(params=RUNNABLE)
def running(request: pytest.FixtureRequest, artifact: Callable[[str], Artifact]) -> Artifact:
    """The same, for each runtime that this machine can run."""
    return artifact(request.param)


@pytest.fixture(scope="session")
def onnx_artifact(artifact: Callable[[str], Artifact]) -> Artifact:
    """The padded network for ONNX Runtime: for what is the same for all runtimes."""
    return artifact("onnx")


@pytest.fixture
def copied(made: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


@pytest.fixture
def copied_running(running: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(running.folder, tmp_path / "copy"))


@pytest.fixture
def copied_onnx(onnx_artifact: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(onnx_artifact.folder, tmp_path / "copy"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reseal(folder: Path, edit: Callable[[dict], object] = lambda fields: None) -> None:
    """What a forger would do: edit the manifest and set every hash right again. Here it is opened without a child."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    for name, entry in fields["files"].items():
        entry |= {"num_bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    edit(fields)
    fields["sha256"] = hashlib.sha256(json.dumps(fields, indent=1).encode()).hexdigest()
    path.write_text(json.dumps(fields, indent=1) + "\n")
    with suppress(BadArtifact, BadArgument):
        mark_as_trusted(read_manifest(folder))


def refuses(folder: Path) -> str:
    """The message with which the folder is refused."""
    with pytest.raises(BadArtifact) as refused:
        load(folder)
    assert refused.value.exit_status == 4
    assert "\n" not in str(refused.value)
    return str(refused.value)


def is_whole(folder: Path) -> None:
    """Whether the folder loads, or where it cannot run here, is refused for that alone."""
    if said := reason_of(open_artifact(folder)):
        with pytest.raises(BadArgument, match=said):
            load(folder)
    else:
        load(folder).close()


# --- every runtime: what it answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_it_is_here(runtime: str) -> None:
    """The one skip of a runtime that is not here or cannot run here: the other tests have no case for it."""
    if why := unavailable(runtime):
        pytest.skip(why)
    assert runtime in RUNNABLE


def test_it_answers_as_the_module_does_for_any_batch(running: Artifact) -> None:
    model = padded()
    with load(running.folder) as session:
        for num_images in (1, 2, 3, 5):
            x = images(num_images)
            logits = session(x)
            assert logits.shape == (num_images, len(CLASSES))
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, answer(model, x), rtol=1e-4, atol=1e-5)


def test_the_answer_is_the_callers_own_and_so_are_the_images(running: Artifact) -> None:
    x = images(2)
    before = x.copy()
    x.flags.writeable = False
    with load(running) as session:
        first = session(x)
        kept = first.copy()
        session(images(2, seed=6))
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_array_equal(x, before)
        strided = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(session(strided), kept)


def test_calls_from_several_threads_do_not_mix(running: Artifact) -> None:
    batches = [images(1 + i % 3, seed=i) for i in range(12)]
    model, found = padded(), {}
    with load(running) as session:
        ask = [threading.Thread(target=lambda i=i: found.update({i: session(batches[i])})) for i in range(len(batches))]
        for thread in ask:
            thread.start()
        for thread in ask:
            thread.join()
    for i, x in enumerate(batches):
        np.testing.assert_allclose(found[i], answer(model, x), rtol=1e-4, atol=1e-5)


def test_a_network_of_tokens_exports_without_a_sound(
    made: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(2)
    model = Tokens().eval()
    artifact = export(
        model, SHAPE, tmp_path / "tokens", runtime=made.runtime, info=ModelInfo(model="tokens", fused=True)
    )
    if not reason_of(artifact):
        with load(artifact) as session:
            np.testing.assert_allclose(session(images(3)), answer(model, images(3)), rtol=1e-4, atol=1e-5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("wrong", "actual"),
    [
        (images(2).astype(np.float64), "float64"),
        ((images(2) * 50).astype(np.uint8), "uint8"),
        (images(1)[0], "(3, 17, 19)"),
        (images(2)[:, :1], "(2, 1, 17, 19)"),
        (images(2).transpose(0, 2, 3, 1), "(2, 17, 19, 3)"),
        (images(2)[:0], "(0, 3, 17, 19)"),
        (images(1).tolist(), "list"),
        (torch.from_numpy(images(1)), "Tensor"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_words(running: Artifact, wrong: object, actual: str) -> None:
    with load(running) as session, pytest.raises(BadArgument) as refused:
        session(wrong)  # type: ignore[arg-type]
    assert "expected" in str(refused.value)
    assert f"got {actual}" in str(refused.value)


def test_threads_are_what_the_runtime_says_it_uses(running: Artifact) -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        with load(running, threads=threads) as session:
            assert session.threads == threads
            session(images(1))
    assert torch.get_num_threads() == before
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(BadArgument, match="number of threads"):
            load(running, threads=wrong)  # type: ignore[arg-type]


def test_a_closed_session_says_so(running: Artifact) -> None:
    session = load(running)
    assert session.artifact == running
    assert repr(session) == f"Session(padded {running.runtime} fp32, open)"
    session.close()
    session.close()
    assert repr(session) == f"Session(padded {running.runtime} fp32, closed)"
    with pytest.raises(BadArgument, match="closed"):
        session(images(1))


# --- every runtime: what it leaves on disk ------------------------------------------------------------------------


def test_the_manifest_tells_all_that_a_user_must_know(made: Artifact) -> None:
    fields = json.loads((made.folder / "manifest.json").read_text())
    on_disk = {path.name for path in made.folder.iterdir()} - {"manifest.json"}
    assert set(fields["files"]) == on_disk == {*import_runtime(made.runtime).FILES, "reference.npz", "README.md"}
    for name, entry in fields["files"].items():
        assert entry == {"num_bytes": (made.folder / name).stat().st_size, "sha256": digest(made.folder / name)}
    told = {"model": "padded", "fused": True, "drift": 2e-7, "classes": list(CLASSES), "licence": "Apache-2.0"}
    told |= {"input_shape": list(SHAPE), "num_classes": 7, "dynamic_batch": True, "precision": "fp32", "schema": 1}
    told |= {"preprocessing": INFO.preprocessing, "source": "made here", "runtime": made.runtime}
    assert {name: fields[name] for name in told} == told
    assert fields["made_with"]["torch"] == torch.__version__
    packages = {"onefold", *import_runtime(made.runtime).PACKAGES}
    if reason_of(made):
        assert fields["parity"] is None
        assert set(fields["made_with"]) <= packages
    else:
        assert set(fields["made_with"]) == packages
        assert 0 <= fields["parity"]["difference"] < 1e-5 < fields["parity"]["tolerance"] == 1e-4
        assert fields["parity"]["top1_agreement"] == 1
    assert open_artifact(made.folder) == made == open_artifact(str(made.folder))


def test_the_reference_holds_the_example_and_pytorchs_answer(made: Artifact) -> None:
    with np.load(made.folder / "reference.npz") as reference:
        np.testing.assert_array_equal(reference["images"], images(2, seed=0))
        np.testing.assert_array_equal(reference["logits"], answer(padded(), images(2, seed=0)))


def test_no_file_names_a_folder_of_the_machine_that_made_it(made: Artifact) -> None:
    here = str(Path(__file__).parent).encode()
    for path in made.folder.iterdir():
        assert here not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()


def flip(data: bytes, at: float) -> bytes:
    index = int(at * (len(data) - 1))
    return data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda data: flip(data, 0),
    "middle bit": lambda data: flip(data, 0.5),
    "late bit": lambda data: flip(data, 0.9),
    "last byte": lambda data: flip(data, 1),
    "truncated": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\n",
    "zeros": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found(copied: Path, damage: str) -> None:
    for path in sorted(copied.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(DAMAGE[damage](whole))
        assert path.name in refuses(copied)
        with pytest.raises(BadArtifact):
            open_artifact(copied)
        path.write_bytes(whole)
    is_whole(copied)


def test_a_missing_file_is_named(copied: Path) -> None:
    for path in sorted(copied.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        assert path.name in refuses(copied)
        path.write_bytes(whole)
    is_whole(copied)


def test_a_resealed_but_broken_model_is_refused(copied_running: Path, running: Artifact) -> None:
    """The hashes fit; what then fails is the runtime's own reader, and it fails as an error of ours."""
    for name in import_runtime(running.runtime).FILES:
        whole = (copied_running / name).read_bytes()
        for damage in ("empty", "truncated", "zeros"):
            (copied_running / name).write_bytes(DAMAGE[damage](whole))
            reseal(copied_running)
            refuses(copied_running)
        (copied_running / name).write_bytes(whole)


def test_the_answer_is_checked_even_when_all_hashes_fit(copied_running: Path) -> None:
    """A reference that is 1 % off is refused, whatever tolerance the forged manifest states."""

    def widen(fields: dict) -> None:
        fields["parity"]["tolerance"] = 0.5

    with np.load(copied_running / "reference.npz") as reference:
        x, logits = reference["images"], reference["logits"]
    np.savez(copied_running / "reference.npz", images=x, logits=logits * np.float32(1.01))
    reseal(copied_running)
    assert "does not give its reference logits" in refuses(copied_running)
    reseal(copied_running, widen)
    assert "0.001 is allowed" in refuses(copied_running)
    np.savez(copied_running / "reference.npz", images=x, logits=logits)
    reseal(copied_running, widen)
    load(copied_running).close()


class Cancelling(nn.Module):
    """Its logits are a small difference of large numbers: by rounding alone they are wrong by much."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, bias=False)
        self.fc = nn.Linear(128, 5, bias=False)
        self.fc.weight.data[:, 64:] = (share - 1) * self.fc.weight.data[:, :64]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x).mean((2, 3))
        return self.fc(torch.cat([maps, maps], 1))


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 1e-4, 1e-4), (1e-2, 1e-4, 9.9e-4), (5e-4, 1e-3, 1e-3)])
def test_what_is_allowed_of_a_difference_follows_from_the_networks_own_rounding(
    share: float, least: float, most: float, tmp_path: Path, seeded: None
) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    model = Cancelling(share).eval()
    with torch.no_grad():
        x = torch.from_numpy(images)
        exact = copy.deepcopy(model).double()(x.double())
        own = float((model(x) - exact).abs().max() / exact.abs().max())
    pytest.importorskip("onnxruntime")
    artifact = export(model, images, tmp_path / "a", runtime="onnx", info=ModelInfo(model="c", fused=True))
    assert artifact.parity is not None
    assert least <= artifact.parity.tolerance <= most
    assert artifact.parity.tolerance == pytest.approx(min(max(16 * own, 1e-4), 1e-3), rel=0.05)
    load(artifact).close()


def test_the_room_has_every_name_it_shows() -> None:
    for name in runtimes.__all__:
        assert getattr(runtimes, name) is not None
    assert set(dir(runtimes)) == set(runtimes.__all__) == {"RUNTIMES", *runtimes._MODULE_OF}
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = runtimes.nothing_like_this


# --- an artifact that somebody else made is opened in a child process first ----------------------------------------

STANDS_IN = {
    "a signal": ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
    "an abort": ("import os; os.abort()", "was ended by SIGABRT"),
    "an exit": ("import os; os._exit(0 + 9)", "ended with status 9"),
    "no end": ("import time; time.sleep(99)", "did not answer within 3 s"),
    "all memory": ("bytearray(10 << 30)", "MemoryError"),
}


@pytest.mark.parametrize("kind", STANDS_IN)
def test_what_would_end_the_process_is_a_sentence(
    kind: str, copied_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package in the vendor's place does what its parser does for a forged file."""
    code, said = STANDS_IN[kind]
    (tmp_path / "vendor" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "vendor" / "onnxruntime" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "vendor"), *sys.path)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("onefold.runtimes.sandbox._LIMIT_S", 3 if kind == "no end" else 60)
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    assert main(["predict", str(copied_onnx), str(tmp_path / "x.png")]) == 4
    error = capsys.readouterr().err
    assert said in error
    assert [line for line in error.splitlines() if not line.startswith("predicting: ")] == [error.splitlines()[-1]]


def forged_graph(kind: str) -> Any:
    """An ONNX network of the padded one's form that asks for 10 GiB, or that does not end."""
    onnx = pytest.importorskip("onnx")
    make, numbers = onnx.helper, onnx.numpy_helper
    parts = onnx.TensorProto
    first, last = (make.make_tensor_value_info(name, parts.FLOAT, ["b", *shape]) for name, shape in FORM)
    pooled = make.make_node("GlobalAveragePool", ["images"], ["pooled"])
    if kind == "memory":
        constants = [numbers.from_array(np.array([10 << 28], np.int64), "size")]
        nodes = [make.make_node("ConstantOfShape", ["size"], ["large"]), make.make_node("ReduceMax", ["large"], ["x"])]
    else:
        body = make.make_graph(
            [make.make_node("Identity", ["on"], ["still"]), make.make_node("Sin", ["v"], ["w"])],
            "body",
            [make.make_tensor_value_info(n, t, s) for n, t, s in (("i", 7, []), ("on", 9, []), ("v", 1, [1, 1]))],
            [make.make_tensor_value_info(n, t, s) for n, t, s in (("still", 9, []), ("w", 1, [1, 1]))],
        )
        values = {"count": np.array(1 << 60), "go": np.array(True), "v0": np.ones((1, 1), np.float32)}
        constants = [numbers.from_array(value, name) for name, value in values.items()]
        nodes = [make.make_node("Loop", ["count", "go", "v0"], ["x"], body=body)]
    wide = numbers.from_array(np.zeros((1, FORM[1][1][0]), np.float32), "wide")
    nodes += [pooled, make.make_node("Flatten", ["pooled"], ["flat"]), make.make_node("ReduceMax", ["flat"], ["top"])]
    nodes += [make.make_node("Add", ["top", "x"], ["y"]), make.make_node("Add", ["y", "wide"], ["logits"])]
    graph = make.make_graph(nodes, "forged", [first], [last], [*constants, wide])
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)


FORM = (("images", SHAPE), ("logits", (len(CLASSES),)))


@pytest.mark.parametrize("kind", ["memory", "time"])
def test_a_graph_without_a_bound_is_refused_in_bounded_time_and_memory(
    kind: str, copied_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    (copied_onnx / "model.onnx").write_bytes(forged_graph(kind).SerializeToString())
    reseal(copied_onnx)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr("onefold.runtimes.sandbox._LIMIT_CPU_S", 3)
    said = refuses(copied_onnx)
    assert {"memory": "cannot run", "time": "used more than 3 s of a processor's time"}[kind] in said
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 << 20


def test_it_is_opened_in_a_child_once(
    copied_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    load(copied_onnx).close()
    (marker,) = (tmp_path / "cache" / "onefold" / "opened").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a child was started"))
        load(copied_onnx).close()
        marker.unlink()
        mark_as_trusted(read_manifest(copied_onnx))  # as `export` does for what it wrote
        load(copied_onnx).close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(copied_onnx / "manifest.json"))
    load(copied_onnx).close()
    assert "is tried in a process of its own each time" in caplog.text


def test_a_cold_start_is_of_the_artifact_that_was_opened(copied_onnx: Path) -> None:
    artifact = read_manifest(copied_onnx)
    call = open_for_cold_start(str(copied_onnx), manifest_sha256(artifact), "1", "2")
    assert np.asarray(call()).shape == (2, len(CLASSES))
    reseal(copied_onnx, lambda fields: fields.update(licence="another"))
    with pytest.raises(BadArtifact, match="changed while it was measured"):
        open_for_cold_start(str(copied_onnx), manifest_sha256(artifact), "1", "2")


# --- what is the same for all runtimes: folders and manifests -----------------------------------------------------


def test_weights_of_another_model_are_refused(copied_onnx: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = export(Padded().eval(), SHAPE, tmp_path / "other", runtime="onnx", info=INFO)
    shutil.copy(other.folder / "model.onnx", copied_onnx)
    assert "damaged" in refuses(copied_onnx)
    reseal(copied_onnx)
    assert "does not give its reference logits" in refuses(copied_onnx)
    shutil.copy(other.folder / "reference.npz", copied_onnx)
    reseal(copied_onnx)
    load(copied_onnx).close()


def test_any_flipped_bit_of_a_manifest_is_found(copied_onnx: Path) -> None:
    path = copied_onnx / "manifest.json"
    whole = path.read_bytes()
    for index in range(0, len(whole), 3):
        bit = 1 << (index // 3 % 8)
        path.write_bytes(whole[:index] + bytes([whole[index] ^ bit]) + whole[index + 1 :])
        with pytest.raises(BadArtifact):
            open_artifact(copied_onnx)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"ant"', '"ape"'), ('"fused": true', '"fused": false'), ("0.0001", "0.5"), ('"padded"', '"padded", "a": 1')],
)
def test_an_edited_manifest_is_refused(copied_onnx: Path, old: str, new: str) -> None:
    path = copied_onnx / "manifest.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert "manifest.json was changed" in refuses(copied_onnx)


FORGERIES: dict[str, tuple[Callable[[dict], object], str]] = {
    "future schema": (lambda f: f.update(schema=2), "update onefold"),
    "no schema": (lambda f: f.update(schema="1"), "not the manifest"),
    "zero schema": (lambda f: f.update(schema=0), "not the manifest"),
    "more fields": (lambda f: f.update(trust="me"), "trust"),
    "fewer fields": (lambda f: f.pop("licence"), "licence"),
    "near runtime": (lambda f: f.update(runtime="onyx"), "did you mean 'onnx'"),
    "removed runtime": (lambda f: f.update(runtime="eager"), "eager was removed and its format is no longer read"),
    "far runtime": (lambda f: f.update(runtime="os"), "choose one of"),
    "other runtime": (lambda f: f.update(runtime="openvino"), "not an artifact of openvino"),
    "precision": (lambda f: f.update(precision="int3"), "int3"),
    "classes": (lambda f: f.update(classes=["one"]), "1 classes"),
    "class of number": (lambda f: f.update(classes=[1] * 7), "strings"),
    "fused as text": (lambda f: f.update(fused="yes"), "'fused' must be bool"),
    "drift as whole": (lambda f: f.update(drift=True), "'drift' must be float"),
    "two sizes": (lambda f: f.update(input_shape=[3, 17]), "input_shape"),
    "size of text": (lambda f: f.update(input_shape=[3, 17, "19"]), "input_shape"),
    "huge shape": (lambda f: f.update(input_shape=[3, 1 << 40, 1 << 40]), "does not fit"),
    "no logits": (lambda f: f.update(num_classes=0, classes=None), "logits"),
    "other logits": (lambda f: f.update(num_classes=8, classes=None), "does not fit"),
    "parity failed": (lambda f: f["parity"].update(difference=1.0), "parity"),
    "parity unknown": (lambda f: f.update(parity=None), "never compared with PyTorch"),
    "parity of text": (lambda f: f.update(parity="fine"), "'parity' must be dict"),
    "parity negative": (lambda f: f["parity"].update(difference=-1.0), "parity"),
    "up": (lambda f: f["files"].update({"../model.onnx": f["files"].pop("model.onnx")}), "inside the folder"),
    "absolute": (lambda f: f["files"].update({"/etc/passwd": f["files"].pop("model.onnx")}), "inside the folder"),
    "below": (lambda f: f["files"].update({"a/b": f["files"].pop("model.onnx")}), "inside the folder"),
    "backslash": (lambda f: f["files"].update({"..\\b": f["files"].pop("model.onnx")}), "inside the folder"),
    "itself": (lambda f: f["files"].update({"manifest.json": f["files"].pop("model.onnx")}), "inside the folder"),
    "no reference": (lambda f: f["files"].pop("reference.npz"), "reference.npz"),
    "no model": (lambda f: f["files"].pop("model.onnx"), "not an artifact of onnx"),
    "bad hash": (lambda f: f["files"]["model.onnx"].update(sha256="0" * 63), "SHA-256"),
    "negative size": (lambda f: f["files"]["model.onnx"].update(num_bytes=-1), "damaged"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_resealed_manifest_is_still_validated(copied_onnx: Path, forgery: str) -> None:
    edit, said = FORGERIES[forgery]
    reseal(copied_onnx, edit)
    assert said in refuses(copied_onnx)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "{", "[" * 100_000, '{"schema": NaN}', '{"schema": 1e999}', "\0"]
)
def test_a_manifest_that_is_none_is_refused(copied_onnx: Path, text: str) -> None:
    (copied_onnx / "manifest.json").write_text(text)
    assert "manifest" in refuses(copied_onnx)


def test_a_place_that_holds_no_artifact_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("{}")
    assert "has no manifest.json" in refuses(tmp_path / "empty")
    assert "has no manifest.json" in refuses(tmp_path / "foreign")
    assert "found a file there" in refuses(tmp_path / "file")
    assert "found nothing there" in refuses(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "reference.npz"])
def test_links_and_special_files_are_refused(copied_onnx: Path, tmp_path: Path, name: str) -> None:
    path, aside = copied_onnx / name, tmp_path / "aside"
    path.rename(aside)
    path.symlink_to(aside)
    assert name in refuses(copied_onnx)
    path.unlink()
    path.hardlink_to(aside)
    assert name in refuses(copied_onnx)
    path.unlink()
    os.mkfifo(path)
    assert name in refuses(copied_onnx)
    path.unlink()
    path.mkdir()
    assert name in refuses(copied_onnx)


def test_a_reference_is_never_unpickled_nor_inflated(copied_onnx: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    logits = np.zeros((2, 7), np.float32)
    hostile = np.array([Trap()], dtype=object)
    np.savez(copied_onnx / "reference.npz", images=hostile, logits=logits)
    reseal(copied_onnx)
    refuses(copied_onnx)
    assert not marker.exists()
    np.savez_compressed(copied_onnx / "reference.npz", images=np.zeros((2, *SHAPE), np.float32), logits=logits)
    reseal(copied_onnx)
    assert "compressed" in refuses(copied_onnx)


def test_a_reference_whose_header_lies_takes_no_memory() -> None:
    data = io.BytesIO()
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4000000, 4000000), }"
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(96))
    with pytest.raises(BadArtifact, match="not a float32 array"):
        read_reference(data.getvalue(), (3, 4_000_000, 4_000_000), 7)


@pytest.mark.parametrize(
    "logits", [np.zeros((2, 7)), np.full((2, 7), np.nan), np.full((2, 7), np.inf), np.ones((3, 7))]
)
def test_a_reference_that_proves_nothing_is_refused(copied_onnx: Path, logits: np.ndarray) -> None:
    np.savez(copied_onnx / "reference.npz", images=images(2), logits=logits.astype(np.float32))
    reseal(copied_onnx)
    assert "reference.npz" in refuses(copied_onnx)


def test_difference_and_agreement_have_their_written_values() -> None:
    a, b = np.float32([[1, -4], [2, 0]]), np.float32([[1, -3], [0, 2]])
    assert relative_difference(a, b) == 2 / 3
    assert relative_difference(b, a) == 2 / 4
    assert relative_difference(a, a) == 0
    assert relative_difference(np.float32([[np.nan, 0]]), np.float32([[1, 0]])) == np.inf
    assert relative_difference(a, b[:1]) == np.inf
    assert top1_agreement(a, b) == 0.5


def test_made_up_images_are_the_same_everywhere_and_normalised() -> None:
    x = make_reference_images((3, 40, 24))
    assert x.dtype == np.float32
    assert x.shape == (2, 3, 40, 24)
    np.testing.assert_array_equal(x, make_reference_images((3, 40, 24)))
    assert abs(x.mean()) < 1e-5
    assert abs(x.std() - 1) < 1e-5
    assert np.abs(x[0] - x[1]).max() > 1


# --- what cannot be exported --------------------------------------------------------------------------------------


class Answering(nn.Module):
    """A model that answers what a function says."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x * self.scale)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


CANNOT: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "a fixed batch": (lambda x: pooled(x.reshape(2, *x.shape[1:])), "any batch size"),
    "a course that depends on values": (lambda x: pooled(x) if x.sum() > -1e9 else pooled(-x), "any batch size"),
    "several answers": (lambda x: (pooled(x), pooled(x)), "one tensor"),
    "a dict": (lambda x: {"logits": pooled(x)}, "one tensor"),
    "a map": (lambda x: x, "one tensor"),
    "chance": (lambda x: pooled(F.dropout(x, 0.5, training=True)), "not deterministic"),
    "zeros": (lambda x: pooled(x) * 0, "nothing could be compared"),
    "not a number": (lambda x: pooled(x) / 0 * 0, "nothing could be compared"),
    "a crash": (lambda x: pooled(x[:, :, :0]) @ torch.ones(7, 7), "does not take images"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_exported_is_refused_in_words(tmp_path: Path, case: str) -> None:
    function, said = CANNOT[case]
    with pytest.raises(BadArgument, match=said):
        export(Answering(function).eval(), SHAPE, tmp_path / "out", runtime="onnx", info=replace(INFO, classes=None))
    assert list(tmp_path.iterdir()) == []


def test_an_input_changed_in_place_is_refused(tmp_path: Path) -> None:
    class Greedy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pooled(x[:, :].clamp_(min=0))

    with pytest.raises(BadArgument, match="changes its images in place"):
        export(Greedy().eval(), SHAPE, tmp_path / "out", runtime="onnx", info=replace(INFO, classes=None))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runtime": "onnxruntime"}, "did you mean 'onnx'"),
        ({"runtime": "Onnx"}, "did you mean 'onnx'"),
        ({"runtime": "eager"}, "onefold fuse"),
        ({"precision": "int4"}, "cannot export 'int4'; choose one of: fp32"),
        (
            {"precision": "int8", "runtime": "tensorrt"},
            "its activations are symmetric, and ours have zero points; choose",
        ),
        ({"info": replace(INFO, classes=("one",))}, "7 logits, but 1 classes"),
        ({"info": replace(INFO, model="")}, "name of a model"),
        ({"info": replace(INFO, classes=range(7))}, "text for every class"),
        ({"info": replace(INFO, licence=7)}, "text"),
        ({"info": replace(INFO, drift=float("nan"))}, "drift"),
        ({"info": replace(INFO, preprocessing={"mean": object()})}, "JSON"),
        ({"info": replace(INFO, preprocessing={"mean": float("inf")})}, "JSON"),
        ({"example": (3, 17)}, "three sizes"),
        ({"example": (3, 17, 0)}, "three sizes"),
        ({"example": images(2).astype(np.float64)}, "float64"),
        ({"example": images(2)[0]}, "(3, 17, 19)"),
        ({"example": images(2)[:, :2]}, "does not take images"),
        ({"example": images(2) * np.float32("nan")}, "finite"),
        ({"model": Padded()}, "model.eval()"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path: Path, change: dict, said: str) -> None:
    call = {
        "model": padded(),
        "example": SHAPE,
        "folder": tmp_path / "out",
        "runtime": "onnx",
        "info": INFO,
    } | change
    with pytest.raises(BadArgument) as refused:
        export(**call)
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_only_an_artifact_is_ever_replaced(onnx_artifact: Artifact, copied_onnx: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    new = export(Padded().eval(), torch.from_numpy(images(2)), copied_onnx, runtime="onnx", info=INFO)
    assert new.files["model.onnx"] != onnx_artifact.files["model.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}
    (copied_onnx / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in (copied_onnx, tmp_path / "file"):
        with pytest.raises(BadArgument, match="choose a new name"):
            export(padded(), SHAPE, place, runtime="onnx", info=INFO)
    assert (copied_onnx / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_one_image_is_joined_by_its_mirror_image_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = padded().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    artifact = export(model, images(1), tmp_path / "out", runtime="onnx", info=INFO)
    with np.load(artifact.folder / "reference.npz") as reference:
        np.testing.assert_array_equal(reference["images"], np.concatenate([images(1), images(1)[..., ::-1]]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in model.parameters())


def test_no_runtime_changes_the_program_that_all_of_them_get(
    artifact: Callable[[str], Artifact], tmp_path: Path
) -> None:
    """A traced model is exported to each runtime in turn, and each artifact is the one that is made alone."""
    traced = TracedModel(padded(), images(2, seed=0))
    for runtime in INSTALLED:
        program = traced.program(qdq=False)
        before = str(program), {name: tensor.clone() for name, tensor in program.state_dict.items()}
        made = traced.export(tmp_path / runtime, runtime=runtime, info=INFO)
        assert (str(program), list(program.state_dict)) == (before[0], list(before[1]))
        assert all(torch.equal(program.state_dict[name], tensor) for name, tensor in before[1].items())
        if runtime in ("onnx", "web"):  # the files of others may differ from export to export
            assert made.files == artifact(runtime).files


def test_what_is_converted_to_onnx_once_is_the_same_for_each_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted, convert = [], onnx._convert
    monkeypatch.setattr(onnx, "_convert", lambda *given, **how: converted.append(1) or convert(*given, **how))
    model = quantize(padded(), torch.from_numpy(images(4)))
    traced = TracedModel(model, SHAPE)
    both, how = ("onnx", "openvino"), {"info": INFO, "precision": "int8"}
    together = [traced.export(tmp_path / runtime, runtime=runtime, **how) for runtime in both]
    assert len(converted) == 1
    alone = [export(model, SHAPE, tmp_path / "alone" / runtime, runtime=runtime, **how) for runtime in both]
    assert len(converted) == 3
    same = [(one.files["model.bin" if i else "model.onnx"]) for pair in (together, alone) for i, one in enumerate(pair)]
    assert same[:2] == same[2:]  # model.xml has numbers of its own in each export


def test_an_unfused_model_is_exported_loudly(tmp_path: Path) -> None:
    with pytest.warns(runtimes.UnfusedWarning, match="NOT FUSED"):
        artifact = export(padded(), SHAPE, tmp_path / "out", runtime="onnx", info=replace(INFO, fused=False))
    assert artifact.fused is False
    assert artifact.title == "padded onnx fp32 NOT FUSED"


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A runtime whose answer is off by `module.error` of the largest logit."""
    module = ModuleType("liar")
    truth = import_runtime("onnx")

    class Engine:
        threads = 1

        def __init__(self, engine: Callable[[np.ndarray], np.ndarray]) -> None:
            self.engine = engine

        def __call__(self, x: np.ndarray) -> np.ndarray:
            logits = self.engine(x)
            return logits + np.abs(logits).max() * np.float32(module.error)

        def close(self) -> None: ...

    for name in (
        "FILES",
        "PACKAGES",
        "PRECISIONS",
        "UNSUPPORTED_PRECISIONS",
        "MANIFEST_DETAILS",
        "unavailable_reason",
        "export",
    ):
        setattr(module, name, getattr(truth, name))
    module.load = lambda content, **how: Engine(truth.load(content, **how))
    monkeypatch.setitem(sys.modules, "liar", module)
    monkeypatch.setitem(RUNTIMES, "liar", "liar")
    return module


def test_the_gate_is_parity_of_a_ten_thousandth(liar: ModuleType, tmp_path: Path) -> None:
    liar.error = 3e-5
    artifact = export(padded(), SHAPE, tmp_path / "out", runtime="liar", info=INFO)
    assert artifact.parity.difference == pytest.approx(3e-5, rel=0.2)
    for error in (3e-4, np.nan):
        liar.error = error
        with pytest.raises(GateFailed, match="differ from PyTorch's"):
            export(padded(), SHAPE, tmp_path / "out", runtime="liar", info=INFO)
        refuses(tmp_path / "out")
    liar.error = 3e-5
    assert load(tmp_path / "out").artifact == artifact
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# --- what each runtime has of its own -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "package"),
    [
        ("onnx", "onnxruntime"),
        ("onnx", "onnx"),
        ("openvino", "openvino"),
        ("executorch", "executorch.exir"),
        ("coreml", "coremltools"),
        ("mnn", "MNN"),
    ],
)
def test_a_missing_package_is_named_with_the_line_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as missing:
        export(padded(), SHAPE, tmp_path / "out", runtime=runtime, info=INFO)
    assert f'pip install "onefold[{runtime}]"' in str(missing.value)
    assert missing.value.exit_status == 2
    assert list(tmp_path.iterdir()) == []


ALONE = """
import socket, sys
def refuse(*_): raise SystemExit("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
from onefold.runtimes import load
vendors = {"torch", "onnx", "onnxruntime", "openvino", "executorch", "coremltools", "MNN", "tensorrt"}
assert not vendors & set(sys.modules), "imported before it is used"
with load(sys.argv[1]) as session:
    assert session.artifact.runtime == sys.argv[2]
assert sys.argv[2] in ("executorch", "tensorrt") or "torch" not in sys.modules, "torch is not needed to run it"
assert "openvino_telemetry" not in sys.modules
"""


def test_a_session_needs_its_own_package_only_and_no_network(running: Artifact, tmp_path: Path) -> None:
    """In a fresh process with an empty home, where telemetry would ask for the network and leave its files.

    What onefold compiles (see litert.py), and that it was opened in a child first, is all that may be left there.
    """
    call = [sys.executable, "-W", "error", "-c", ALONE, str(running.folder), running.runtime]
    done = subprocess.run(call, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    ours = (".cache/onefold/nchw_to_nhwc-", ".cache/onefold/.nchw_to_nhwc-", ".cache/onefold/opened")
    assert all(name in (".cache", ".cache/onefold") or name.startswith(ours) for name in left)


def test_openvino_converts_with_its_telemetrys_stand_in(artifact: Callable[[str], Artifact]) -> None:
    artifact("openvino")
    from openvino.tools.ovc import convert_impl, telemetry_utils

    stand_ins = {convert_impl.tm.__name__, telemetry_utils.tm.__name__}
    assert stand_ins == {"openvino.tools.ovc.telemetry_stub"}


def test_openvino_stores_32_bits(artifact: Callable[[str], Artifact]) -> None:
    num_params = sum(p.numel() for p in padded().parameters())
    assert artifact("openvino").files["model.bin"].num_bytes >= 4 * num_params


def test_onnx_carries_its_metadata_and_its_opset(artifact: Callable[[str], Artifact]) -> None:
    made = artifact("onnx")
    import onnx

    model = onnx.load(made.folder / "model.onnx")
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert props["model"] == "padded"
    assert tuple(json.loads(props["classes"])) == CLASSES
    assert json.loads(props["preprocessing"]) == INFO.preprocessing
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    assert made.details["opset"] == 20
    assert [i.name for i in model.graph.input] == ["images"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert {tensor.data_location for tensor in model.graph.initializer} == {0}


def outside(folder: Path) -> bytes:
    """An ONNX network that reads its weights from a file in the current folder."""
    import onnx

    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], np.float32([1]).tobytes(), raw=True)
    onnx.external_data_helper.set_external_data(weight, "secret.bin")
    weight.ClearField("raw_data")
    x, y = (onnx.helper.make_tensor_value_info(name, 1, None) for name in ("images", "logits"))
    node = onnx.helper.make_node("Add", ["images", "w"], ["logits"])
    inner = onnx.helper.make_graph([node], "inner", [], [y], [weight])
    either = onnx.helper.make_node("If", ["c"], ["logits"], then_branch=inner, else_branch=inner)
    yes = onnx.helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True])
    graph = onnx.helper.make_graph([either], "outer", [x], [y], [yes])
    (folder / "secret.bin").write_bytes(np.float32([7]).tobytes())
    opset = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


READ_ONNX = {"onnx": "model.onnx", "openvino": "model.xml", "web": "model.onnx"}


@pytest.mark.parametrize("runtime", [runtime for runtime in READ_ONNX if runtime in INSTALLED])
def test_a_network_that_reads_other_files_is_refused(
    runtime: str, artifact: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(artifact(runtime).folder, tmp_path / "copy"))
    monkeypatch.chdir(tmp_path)
    (copied / READ_ONNX[runtime]).write_bytes(outside(tmp_path))
    reseal(copied)
    said = refuses(copied)
    assert any(words in said for words in ("other files", "not an OpenVINO network", "external data")), said
