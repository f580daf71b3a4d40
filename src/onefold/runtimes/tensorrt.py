"""TensorRT on an NVIDIA GPU: one model.onnx, from which an engine is built for this machine's GPU at loading.

Engines fit one kind of GPU and one version of TensorRT, so the artifact holds the ONNX network. It is strongly typed
(the only mode of version 11): each tensor is computed in its own type. With the precision fp16 the network is written
in 16 bits, its images and logits in 32. fp32 means fp32, not the GPU's TF32.

There is no int8: TensorRT's activations are symmetric, and ours have zero points. The same values with other parameters
would be another model than the one that was calibrated and simulated.

It runs where PyTorch finds a GPU, whose memory it uses; elsewhere it can only be exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine, import_vendor_package, suppress_native_output, suppress_output
from onefold.runtimes.onnx import refuse_external_data, write_onnx
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.onnx",)
PACKAGES = ("torch", "onnx", "onnxscript", "tensorrt")
PRECISIONS = ("fp32", "fp16")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {"int8": "its activations are symmetric, and ours have zero points"}
MANIFEST_DETAILS: Mapping[str, object] = {"input": "images", "output": "logits"}
ACCEPTS_QDQ = True

_MAX_BATCH = 32  # images per call; larger batches are split
_DEVICE = "cuda"


def unavailable_reason() -> str | None:
    """Explain why TensorRT cannot run here; None where PyTorch finds a GPU."""
    import torch

    with suppress_output():
        has_gpu = torch.cuda.is_available()
    return None if has_gpu else "TensorRT runs on an NVIDIA GPU, and PyTorch finds none on this machine"


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network and write it with its name, classes and preprocessing inside."""
    write_onnx(
        _to_fp16(program) if precision == "fp16" else program, folder / "model.onnx", info=info, precision=precision
    )


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Build an engine for this GPU, which takes a while."""
    tensorrt = import_vendor_package("tensorrt", extra="tensorrt")
    refuse_external_data(content["model.onnx"])
    with suppress_native_output():
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(_build(tensorrt, content["model.onnx"]))
    if engine is None:
        raise RuntimeError("TensorRT cannot read the engine that it built")
    return _TensorRt(runtime, engine)


class _TensorRt:
    """An engine with one execution context, so calls are serialized.

    `threads` is 1: one CPU thread waits for the GPU.
    """

    threads = 1

    def __init__(self, runtime: Any, engine: Any) -> None:
        import torch

        self._runtime, self._engine, self._lock = runtime, engine, Lock()
        self._context, self._stream = engine.create_execution_context(), torch.cuda.Stream()
        self._num_classes = int(engine.get_tensor_shape("logits")[-1])

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            return np.concatenate([self._answer(images[i : i + _MAX_BATCH]) for i in range(0, len(images), _MAX_BATCH)])

    def close(self) -> None:
        with self._lock:
            del self._context, self._engine, self._runtime

    def _answer(self, images: Floats) -> Floats:
        import torch

        with torch.cuda.stream(self._stream):
            # torch warns of tensors that share read-only memory, so such images are copied.
            x = torch.from_numpy(images if images.flags.writeable else images.copy()).to(_DEVICE)
            logits = torch.empty((len(images), self._num_classes), dtype=torch.float32, device=_DEVICE)
            fits = self._context.set_input_shape("images", tuple(x.shape))
            self._context.set_tensor_address("images", x.data_ptr())
            self._context.set_tensor_address("logits", logits.data_ptr())
            if not fits or not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError("TensorRT returned no logits for these images")
            self._stream.synchronize()
            return logits.cpu().numpy()


def _build(tensorrt: ModuleType, model: bytes) -> Any:
    """Build the serialized engine (plan) for batches of 1 to _MAX_BATCH images."""
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
    profile.set_shape("images", (1, *shape), (1, *shape), (_MAX_BATCH, *shape))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT cannot build an engine of the network")
    return plan


def _to_fp16(program: ExportedProgram) -> ExportedProgram:
    """Trace the network with weights and activations in fp16; images and logits stay in fp32."""
    import torch
    from torch.export import Dim

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = program.module(check_guards=False).half()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(images.half())
            return logits.float()

    (images,), _ = program.example_inputs
    with suppress_output(), torch.no_grad():
        return torch.export.export(Half(), (images,), dynamic_shapes=({0: Dim("batch")},))
