"""PyTorch itself, without the model's code: the artifact is the list of its operator calls and its weights.

model.json           the steps, plain data (program.py says which and why not a .pt2)
model.safetensors    the weights
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.reference import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from onefold.runtimes.program import Program

FILES = ("model.json", "model.safetensors")
PACKAGES = ("torch", "safetensors")
PRECISIONS = ("fp32", "int8")
REFUSES: Mapping[str, str] = {}
DETAILS: Mapping[str, object] = {"form": "ATen calls, schema 1"}
READS_GRIDS = False
OBSTACLE = None


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Write the steps and the weights of the network."""
    from safetensors.torch import save

    from onefold.runtimes.program import write_program

    steps, weights = write_program(program)
    (folder / "model.json").write_text(json.dumps(steps, allow_nan=False, indent=1), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"model": about.model}))


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network, ready to answer on the CPU."""
    from safetensors.torch import load as load_weights

    from onefold.runtimes.program import Program

    weights = load_weights(content["model.safetensors"])
    return _Eager(Program(json.loads(content["model.json"]), weights), threads)


class _Eager:
    """A program of PyTorch operators."""

    def __init__(self, program: Program, threads: int) -> None:
        self._program, self.threads = program, threads

    def __call__(self, images: Floats) -> Floats:
        import torch

        # A tensor over memory that is read-only would warn, so such images are copied.
        x = torch.from_numpy(images if images.flags.writeable else images.copy())
        with torch.inference_mode(), _threads(self.threads):
            return cast(Floats, self._program(x).numpy())

    def close(self) -> None:
        del self._program


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """PyTorch's number of threads is one for the whole process: set here, and put back after."""
    import torch

    before = torch.get_num_threads()
    if before == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
