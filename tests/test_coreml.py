"""What Core ML has of its own: packages as one file, and answers checked without a Mac, by running the program here."""

from __future__ import annotations

import io
import json
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from available_runtimes import require
from coreml_interpreter import Machine
from onefold.errors import BadArgument, BadArtifact
from onefold.models import create_model
from onefold.quantize import QuantizationMethod, quantize
from onefold.reparam import fuse
from onefold.runtimes import Artifact, ModelInfo, export, load
from onefold.runtimes import coreml as runtime
from onefold.runtimes.base import suppress_output

require("coreml")
SHAPE = (3, 16, 16)
INFO = ModelInfo(model="small", fused=True, classes=("a", "b", "c", "d", "e"), preprocessing={"size": 16})


class Small(nn.Module):
    """A dense, a depthwise and a gated pointwise layer, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc(torch.relu(self.pointwise(x)).mean((2, 3)))


@pytest.fixture
def small(seeded: int) -> nn.Module:
    return Small().eval()


@pytest.fixture
def x(seeded: int) -> np.ndarray:
    return torch.randn(8, *SHAPE).numpy()


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    """This machine as a Mac, on which models are run by `Machine`."""
    import coremltools as real

    names = ("convert", "TensorType", "precision", "target", "ComputeUnit")
    tools = SimpleNamespace(models=SimpleNamespace(MLModel=Machine), **{name: getattr(real, name) for name in names})
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(runtime, "_coremltools", lambda: tools)
    return Machine


def away(model: object, images: np.ndarray, folder: Path, precision: str, info: ModelInfo = INFO) -> Artifact:
    """Exported here, where it cannot run."""
    if sys.platform == "darwin":
        pytest.skip("about machines that are no Mac")
    return export(model, images, folder, runtime="coreml", info=info, precision=precision)  # type: ignore[arg-type]


def answer(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_what_was_exported_elsewhere_is_proven_by_a_macs_first_load(
    small: nn.Module, x: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest, precision: str, error: float
) -> None:
    artifact = away(small, x[:2], tmp_path / "a", precision)
    assert artifact.parity is None
    with pytest.raises(BadArgument, match="Core ML runs on a Mac; this is ") as refused:
        load(artifact)
    assert refused.value.exit_status == 2
    request.getfixturevalue("mac")
    with load(artifact) as session:
        difference = np.abs(session(x) - answer(small, x)).max() / np.abs(answer(small, x)).max()
    assert difference < error
    with np.load(artifact.folder / "reference.npz") as reference:
        images, logits = reference["images"], reference["logits"]
    assert np.array_equal(logits, answer(small, images))


def test_a_mac_refuses_what_does_not_answer_as_it_promises(
    small: nn.Module, x: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = away(small, x[:2], tmp_path / "a", "fp32")
    machine = request.getfixturevalue("mac")
    honest = machine.predict
    monkeypatch.setattr(machine, "predict", lambda self, given: {"logits": honest(self, given)["logits"] * 1.001})
    with pytest.raises(BadArtifact, match="does not give its reference logits"):
        load(artifact)


def test_a_mac_compares_when_it_exports(small: nn.Module, x: np.ndarray, tmp_path: Path, mac: type[Machine]) -> None:
    artifact = export(small, x[:2], tmp_path / "a", runtime="coreml", info=INFO)
    assert artifact.parity is not None
    assert artifact.parity.difference < 1e-5


def test_a_network_of_8_bits_keeps_its_kernels_and_grids(
    small: nn.Module, x: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whole numbers and scales are found in the file as they are in ours, and the answers are the simulation's."""
    made = quantize(small, torch.randn(6, *SHAPE), QuantizationMethod(weight_qmax=63))
    artifact = away(made, x[:2], tmp_path / "a", "int8")
    runtime.unzip_mlpackage((artifact.folder / runtime.FILES[0]).read_bytes(), tmp_path / "p.mlpackage")
    program = Machine(str(tmp_path / "p.mlpackage")).function
    state = made.graph.state_dict()
    kernels = [op for op in program.operations if op.op_type == "constexpr_affine_dequantize"]
    for kernel, layer in zip(kernels, ("stem", "depthwise", "pointwise", "fc"), strict=True):
        assert np.array_equal(kernel.quantized_data.val, state[f"{layer}.weight_int8"].numpy())
        assert np.array_equal(kernel.scale.val, state[f"{layer}.weight_scale"].numpy())
    ours = [n for n in made.graph.graph.nodes if str(n.target).startswith("quantized_decomposed.quantize_per_tensor")]
    theirs = [op for op in program.operations if op.op_type == "quantize"]
    for node, op in zip(ours, theirs, strict=True):
        zero = 0 if op.zero_point is None else int(op.zero_point.val)
        without_sign = 128 if op.output_dtype.val == "uint8" else 0
        assert (np.float32(node.args[1]), node.args[2]) == (op.scale.val, zero - without_sign)
    request.getfixturevalue("mac")
    with load(artifact) as session:
        found = session(x)
    step = ours[-1].args[1]
    assert np.abs(found - answer(made.model, x)).max() <= 1.01 * step


@pytest.mark.parametrize("name", ["mobileone_s0", "mobilenetv1_025", "mobileformer_26m"])
def test_every_family_is_converted(name: str, seeded: int, tmp_path: Path) -> None:
    model = fuse(create_model(name, num_classes=7).eval())
    images = torch.randn(2, 3, 32, 32).numpy()
    artifact = away(model, images, tmp_path / "a", "fp32", ModelInfo(model=name, fused=True))
    runtime.unzip_mlpackage((artifact.folder / runtime.FILES[0]).read_bytes(), tmp_path / "p.mlpackage")
    logits = Machine(str(tmp_path / "p.mlpackage")).predict({"images": images[:1]})["logits"]
    np.testing.assert_allclose(logits, answer(model, images[:1]), rtol=1e-4, atol=1e-5)


def test_the_same_network_is_the_same_file(small: nn.Module, x: np.ndarray, tmp_path: Path) -> None:
    hashes = {away(small, x[:2], tmp_path / name, "fp16").files[runtime.FILES[0]].sha256 for name in "ab"}
    assert len(hashes) == 1


def test_the_package_says_what_it_is(small: nn.Module, x: np.ndarray, tmp_path: Path) -> None:
    artifact = away(small, x[:2], tmp_path / "a", "fp32")
    runtime.unzip_mlpackage((artifact.folder / runtime.FILES[0]).read_bytes(), tmp_path / "p.mlpackage")
    told = Machine(str(tmp_path / "p.mlpackage")).metadata
    assert told["model"] == "small"
    assert json.loads(told["classes"]) == list(INFO.classes or ())
    assert not any("date" in name for name in told)


# --- archives -----------------------------------------------------------------------------------------------------


def archive(*entries: tuple[str, bytes], mode: int = stat.S_IFREG | 0o644, compression: int = 0) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as made, suppress_output():
        for name, data in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.compress_type = mode << 16, compression
            made.writestr(entry, data)
    return packed.getvalue()


GOOD = (("Manifest.json", b"{}"), ("Data/com.apple.CoreML/model.mlmodel", b"m" * 64))


def larger(data: bytes) -> bytes:
    """The last entry's size in the directory, set to 4 GB less one: what a bomb would claim."""
    at = data.rindex(b"PK\x01\x02") + 24
    return data[:at] + (0xFFFFFFFE).to_bytes(4, "little") + data[at + 4 :]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "up": (lambda: archive(*GOOD, ("../evil", b"")), "not a plain file"),
    "up inside": (lambda: archive(*GOOD, ("Data/../../evil", b"")), "not a plain file"),
    "absolute": (lambda: archive(*GOOD, ("/tmp/evil", b"")), "not a plain file"),
    "drive": (lambda: archive(*GOOD, ("C:/evil", b"")), "not a plain file"),
    "backslash": (lambda: archive(*GOOD, ("..\\evil", b"")), "not a plain file"),
    "hidden": (lambda: archive(*GOOD, (".evil", b"")), "not a plain file"),
    "folder": (lambda: archive(*GOOD, ("Data/evil/", b"")), "not a plain file"),
    "link": (lambda: archive(*GOOD, mode=stat.S_IFLNK | 0o777), "not a plain file"),
    "device": (lambda: archive(*GOOD, mode=stat.S_IFCHR | 0o777), "not a plain file"),
    "twice": (lambda: archive(*GOOD, GOOD[0]), "not a Core ML package"),
    "a file as folder": (lambda: archive(*GOOD, ("Manifest.json/evil", b"")), "not a Core ML package"),
    "no program": (lambda: archive(GOOD[0]), "not a Core ML package"),
    "no contents": (lambda: archive(GOOD[1]), "not a Core ML package"),
    "a bomb": (lambda: archive(*GOOD, ("Data/zeros", bytes(1 << 20)), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "a promise": (lambda: larger(archive(*GOOD)), "declares more"),
    "no archive": (lambda: b"PK" * 40, "not a Core ML package"),
    "nothing": (lambda: b"", "not a Core ML package"),
    "half": (lambda: archive(*GOOD)[:100], "not a Core ML package"),
    "changed": (lambda: archive(*GOOD).replace(b"mmm", b"mnm", 1), "not a Core ML package"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_archive_writes_nothing_outside_of_its_folder(case: str, tmp_path: Path) -> None:
    make, said = HOSTILE[case]
    with pytest.raises(BadArtifact, match=said):
        runtime.unzip_mlpackage(make(), tmp_path / "inside" / "p")
    assert {path.name for path in tmp_path.iterdir()} <= {"inside"}
    assert not Path("/tmp/evil").exists()
    assert not any("evil" in path.name for path in tmp_path.rglob("*"))


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    runtime.unzip_mlpackage(archive(*GOOD, ("Data/com.apple.CoreML/weights/weight.bin", b"w")), tmp_path / "p")
    (tmp_path / "p" / "Manifest.json").write_text('{"itemInfoEntries": {}}')
    (tmp_path / "p" / "left_out.json").write_text("{}")
    data = runtime.zip_mlpackage(tmp_path / "p")
    shutil.rmtree(tmp_path / "p")
    runtime.unzip_mlpackage(data, tmp_path / "p")
    found = {path.relative_to(tmp_path / "p").as_posix() for path in (tmp_path / "p").rglob("*") if path.is_file()}
    assert found == {"Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"}
