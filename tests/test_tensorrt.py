"""What TensorRT has of its own, with a stand-in for its package: where there is no GPU, it is what is asked of it.

The stand-in answers with ONNX Runtime, reading and writing the memory whose addresses it is given. What is left for a
machine with a GPU is whether TensorRT itself takes the network.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onefold.errors import BadArgument, BadArtifact
from onefold.runtimes import ModelInfo, export, load
from onefold.runtimes import tensorrt as runtime
from onefold.runtimes.reference_logits import make_reference_images

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SHAPE = (3, 14, 14)
INFO = ModelInfo(model="small", fused=True)


class Small(nn.Module):
    """A layer, a constant of 32 bits, a gate, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)) + torch.tensor(0.25)
        return self.fc((x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))).mean((2, 3)))


def small() -> nn.Module:
    torch.manual_seed(3)
    return Small().eval()


def answer(x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return small()(torch.from_numpy(x)).numpy()


class Context:
    """What runs an engine: refuses a batch outside of the profile, as TensorRT does."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shape, self.addresses = engine, (), {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "images"
        least, _, most = self.engine.profile
        self.shape = shape
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        self.engine.calls.append(self.shape)
        images = view(self.addresses["images"], self.shape).copy()
        (logits,) = self.engine.session.run(None, {"images": images})
        view(self.addresses["logits"], logits.shape)[:] = logits
        return True


class Engine:
    """An engine, from what `Builder` put into the plan."""

    def __init__(self, plan: SimpleNamespace) -> None:
        self.profile, self.calls = plan.profile, plan.calls
        self.session = onnxruntime.InferenceSession(plan.model, providers=["CPUExecutionProvider"])

    def create_execution_context(self) -> Context:
        return Context(self)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        return (-1, 5)


def view(address: int, shape: tuple[int, ...]) -> np.ndarray:
    number = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * number).from_address(address)).reshape(shape)


STREAM = 7
FLAG = 3


def package(asked: SimpleNamespace) -> ModuleType:
    """The parts of `tensorrt` that the runtime uses; what was asked of them is written down."""
    made = ModuleType("tensorrt")
    made.__spec__ = ModuleSpec("tensorrt", None)  # torch may ask whether the package is there

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            assert severity == self.ERROR

    class Parser:
        def __init__(self, network: Any, log: Logger) -> None:
            self.network = network

        def parse(self, model: bytes) -> bool:
            self.network.model = model
            return not asked.unreadable

        def get_error(self, at: int) -> SimpleNamespace:
            return SimpleNamespace(desc=lambda: "no such operation")

    class Builder:
        def __init__(self, log: Logger) -> None: ...

        def create_network(self, flags: int) -> SimpleNamespace:
            asked.flags = flags
            return SimpleNamespace(get_input=lambda at: SimpleNamespace(shape=(-1, *SHAPE)))

        def create_builder_config(self) -> SimpleNamespace:
            clear, add = asked.cleared.append, asked.profiles.append
            return SimpleNamespace(clear_flag=clear, add_optimization_profile=add)

        def create_optimization_profile(self) -> SimpleNamespace:
            profile = SimpleNamespace()
            profile.set_shape = lambda name, *shapes: vars(profile).update({name: shapes})
            return profile

        def build_serialized_network(self, network: Any, config: Any) -> SimpleNamespace | None:
            plan = SimpleNamespace(model=network.model, profile=asked.profiles[-1].images, calls=asked.calls)
            return None if asked.unbuildable else plan

    made.Logger, made.OnnxParser, made.Builder = Logger, Parser, Builder  # type: ignore[attr-defined]
    made.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=FLAG)  # type: ignore[attr-defined]
    made.BuilderFlag = SimpleNamespace(TF32="TF32")  # type: ignore[attr-defined]
    made.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=Engine)  # type: ignore[attr-defined]
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """This machine as one with a GPU, whose memory is this one's; gives what TensorRT was asked for."""
    told = SimpleNamespace(cleared=[], profiles=[], calls=[], unreadable=False, unbuildable=False)
    stream = SimpleNamespace(cuda_stream=STREAM, synchronize=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", package(told))
    monkeypatch.setattr(runtime, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda given: nullcontext())
    monkeypatch.setattr(runtime, "_DEVICE", "cpu")
    return told


def away(folder: Path, precision: str) -> Path:
    """Exported where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    return export(small(), SHAPE, folder, runtime="tensorrt", info=INFO, precision=precision).folder


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_what_is_written_is_the_network_in_this_many_bits(tmp_path: Path, precision: str, error: float) -> None:
    """Read by ONNX Runtime: the answer, and that no number but images and logits has another type."""
    model = onnx.load(away(tmp_path / "a", precision) / "model.onnx")
    kinds = {tensor.data_type for tensor in model.graph.initializer} - {onnx.TensorProto.INT64}
    assert kinds == {onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT}
    assert {part.type.tensor_type.elem_type for part in (*model.graph.input, *model.graph.output)} == {1}
    x = make_reference_images(SHAPE, num_images=5, seed=1)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": x})
    assert np.abs(logits - answer(x)).max() < error * np.abs(answer(x)).max()


def test_without_a_gpu_it_is_not_loaded_and_with_one_it_is(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = away(tmp_path / "a", "fp32")
    with pytest.raises(
        BadArgument, match="TensorRT runs on an NVIDIA GPU, and PyTorch finds none on this machine: load"
    ):
        load(folder)
    asked = request.getfixturevalue("asked")
    x = make_reference_images(SHAPE, num_images=2 * runtime._MAX_BATCH + 3, seed=1)
    x.flags.writeable = False
    with load(folder) as session:
        np.testing.assert_allclose(session(x), answer(x.copy()), rtol=1e-4, atol=1e-6)
        assert session.threads == 1
    assert asked.calls == [(2, *SHAPE), (32, *SHAPE), (32, *SHAPE), (3, *SHAPE)]
    assert asked.flags == 1 << FLAG
    assert asked.cleared == ["TF32"]
    assert asked.profiles[0].images == ((1, *SHAPE), (1, *SHAPE), (32, *SHAPE))


def test_with_a_gpu_an_export_compares(tmp_path: Path, asked: SimpleNamespace) -> None:
    artifact = export(small(), SHAPE, tmp_path / "a", runtime="tensorrt", info=INFO, precision="fp16")
    assert artifact.parity is not None
    assert 0 < artifact.parity.difference < 0.005
    assert [shape[0] for shape in asked.calls] == [2, 1, 3]


@pytest.mark.parametrize(("trouble", "said"), [("unreadable", "no such operation"), ("unbuildable", "cannot build")])
def test_what_tensorrt_cannot_do_is_told(trouble: str, said: str, tmp_path: Path, asked: SimpleNamespace) -> None:
    setattr(asked, trouble, True)
    with pytest.raises(BadArgument, match=f"tensorrt cannot take this network: .*{said}"):
        export(small(), SHAPE, tmp_path / "a", runtime="tensorrt", info=INFO)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_reads_other_files_is_refused(asked: SimpleNamespace, tmp_path: Path) -> None:
    export(small(), SHAPE, tmp_path / "a", runtime="tensorrt", info=INFO)
    model = onnx.load(tmp_path / "a" / "model.onnx")
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "secret.bin")
    with pytest.raises(BadArtifact, match="other files"):
        runtime.load({"model.onnx": model.SerializeToString()}, precision="fp32", threads=1)
