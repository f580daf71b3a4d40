"""TensorRT on an NVIDIA GPU: one model.onnx, of which an engine is built for the GPU at hand when it is loaded.

Engines fit one kind of GPU and one version of TensorRT, so the artifact holds the network. Every number in it has the
type it is computed in (a strongly typed network, the one kind that version 11 has): with the precision fp16 the network
is written in 16 bits, its images and logits in 32. fp32 is that, and not the GPU's TF32.

There is no int8: TensorRT takes grids of int8 whose zero is 0, and ours have a zero of their own. The same values on
such grids would be another network than the one that was calibrated and simulated.

It runs where PyTorch sees a GPU, whose memory it uses; elsewhere it can be exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.onnx import refuse_other_files, write
from onefold.runtimes.reference import Floats
from onefold.runtimes.vendor import mute, quiet, require

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.onnx",)
PACKAGES = ("torch", "onnx", "onnxscript", "tensorrt")
PRECISIONS = ("fp32", "fp16")
REFUSES: Mapping[str, str] = {"int8": "it takes no grid whose zero is not 0, and ours have zeros of their own"}
DETAILS: Mapping[str, object] = {"input": "images", "output": "logits"}
READS_GRIDS = True

_MOST = 32  # images a call; larger batches are answered in parts
_DEVICE = "cuda"


def _obstacle() -> str | None:
    import torch

    with quiet():
        seen = torch.cuda.is_available()
    return None if seen else "TensorRT runs on an NVIDIA GPU, and PyTorch sees none on this machine"


OBSTACLE = _obstacle


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Convert the network and write it with its name, classes and preprocessing inside."""
    given = _in_16_bits(program) if precision == "fp16" else program
    write(given, folder / "model.onnx", about=about, precision=precision)


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network, built into an engine for this GPU, which takes a while."""
    tensorrt = require("tensorrt", extra="tensorrt")
    refuse_other_files(content["model.onnx"])
    with mute():
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(_build(tensorrt, content["model.onnx"]))
    if engine is None:
        raise RuntimeError("TensorRT cannot read the engine that it built")
    return _TensorRt(runtime, engine)


class _TensorRt:
    """An engine with one place for an answer in the making, so calls take turns.

    `threads` is 1: one thread of the CPU waits for the GPU.
    """

    threads = 1

    def __init__(self, runtime: Any, engine: Any) -> None:
        import torch

        self._runtime, self._engine, self._lock = runtime, engine, Lock()
        self._context, self._stream = engine.create_execution_context(), torch.cuda.Stream()
        self._num_classes = int(engine.get_tensor_shape("logits")[-1])

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            return np.concatenate([self._answer(images[i : i + _MOST]) for i in range(0, len(images), _MOST)])

    def close(self) -> None:
        with self._lock:
            del self._context, self._engine, self._runtime

    def _answer(self, images: Floats) -> Floats:
        import torch

        with torch.cuda.stream(self._stream):
            # A tensor over memory that is read-only would warn, so such images are copied.
            given = torch.from_numpy(images if images.flags.writeable else images.copy()).to(_DEVICE)
            logits = torch.empty((len(images), self._num_classes), dtype=torch.float32, device=_DEVICE)
            fits = self._context.set_input_shape("images", tuple(given.shape))
            self._context.set_tensor_address("images", given.data_ptr())
            self._context.set_tensor_address("logits", logits.data_ptr())
            if not fits or not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError("TensorRT gives no answer to these images")
            self._stream.synchronize()
            return logits.cpu().numpy()


def _build(tensorrt: ModuleType, model: bytes) -> Any:
    """The plan of an engine for batches of 1 to _MOST images."""
    log = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(log)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse(model):
        raise RuntimeError(f"TensorRT cannot read the network: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)[1:]
    profile.set_shape("images", (1, *shape), (1, *shape), (_MOST, *shape))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT cannot build an engine of the network")
    return plan


def _in_16_bits(program: ExportedProgram) -> ExportedProgram:
    """The same network with weights and values in 16 bits; images and logits stay in 32."""
    import torch
    from torch.export import Dim

    class Halved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = program.module(check_guards=False).half()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(images.half())
            return logits.float()

    (images,), _ = program.example_inputs
    with quiet(), torch.no_grad():
        return torch.export.export(Halved(), (images,), dynamic_shapes=({0: Dim("batch")},))
