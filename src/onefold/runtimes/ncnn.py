"""ncnn on the CPU, one image at a time: model.ncnn.param is the network, as text, and model.ncnn.bin its weights.

The weights are stored in 32 bits. With the precision bf16 the runtime keeps them, and the values between the layers, in
16 bits while it computes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from onefold.errors import BadArtifact
from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine, import_vendor_package, suppress_output
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.ncnn.param", "model.ncnn.bin")
PACKAGES = ("torch", "pnnx", "ncnn")
PRECISIONS = ("fp32", "bf16")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {
    "int8": "its quantization is symmetric, and activations here have zero points"
}
MANIFEST_DETAILS: Mapping[str, object] = {"input": "in0", "output": "out0", "images_per_call": 1}
ACCEPTS_QDQ = True
unavailable_reason = None


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network by way of a TorchScript trace, and write it."""
    converter = import_vendor_package("pnnx", extra="ncnn")
    import torch

    (images,), _ = program.example_inputs
    image = images[:1].clone()
    shape = ",".join(map(str, image.shape))
    with TemporaryDirectory() as temporary:
        traced = Path(temporary) / "model.pt"
        with suppress_output(), torch.no_grad():
            # Exported again for one image: TorchScript traces have no dynamic batch.
            network: Any = torch.export.export(program.module(check_guards=False), (image,)).module(check_guards=False)
            torch.jit.trace(network, (image,), check_trace=False).save(traced)
        call = [converter.EXEC_PATH, traced.name, f"inputshape=[{shape}]f32", "fp16=0"]
        process = subprocess.run(call, cwd=temporary, capture_output=True, text=True, errors="replace", check=False)
        if process.returncode or not all((Path(temporary) / name).is_file() for name in FILES):
            raise RuntimeError(f"pnnx failed with status {process.returncode}: {process.stderr[-200:]}")
        for name in FILES:
            (folder / name).write_bytes((Path(temporary) / name).read_bytes())


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Load the network; ncnn arranges its weights for this CPU."""
    ncnn = import_vendor_package("ncnn", extra="ncnn")
    net = ncnn.Net()
    options = net.opt
    options.num_threads = threads
    options.use_vulkan_compute = False
    options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
    options.use_bf16_storage = options.use_bf16_packed = precision == "bf16"
    # Threads that spin after a call would slow what is measured right after it.
    options.openmp_blocktime = 0
    # From memory ncnn reads past the end of truncated weights; from a file it does not.
    with TemporaryDirectory() as temporary:
        param, weights = (Path(temporary) / name for name in FILES)
        for path in (param, weights):
            path.write_bytes(content[path.name])
        if net.load_param(str(param)) or net.load_model(str(weights)):
            raise BadArtifact("ncnn cannot read this network; export the model again")
    return _Ncnn(ncnn, net)


class _Ncnn:
    """An ncnn network; calls are serialized, as each uses all of its threads."""

    def __init__(self, ncnn: Any, net: Any) -> None:
        self._ncnn, self._net, self._lock = ncnn, net, Lock()

    @property
    def threads(self) -> int:
        return int(self._net.opt.num_threads)

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            return np.stack([self._answer(image) for image in images])

    def close(self) -> None:
        self._net.clear()
        del self._net

    def _answer(self, image: Floats) -> Floats:
        """Compute the logits (classes,) of one image (C, H, W)."""
        with self._net.create_extractor() as extractor:
            extractor.input("in0", self._ncnn.Mat(image))
            status, logits = extractor.extract("out0")
            if status:
                raise RuntimeError(f"ncnn failed with status {status}")
            return np.array(logits)
