"""What ExecuTorch has of its own: one pool of threads under all sessions, layers that must go to XNNPACK, 8 bits."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from available_runtimes import require
from onefold.runtimes import ModelInfo, export, load
from onefold.runtimes.exporter import trace
from onefold.runtimes.reference_logits import make_reference_images

require("executorch")
SHAPE = (3, 32, 32)


class Small(nn.Module):
    """Two convolutions, a mean that drops its sizes, a dropout: what stands around a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.depthwise(torch.relu(self.stem(x)))).mean((2, 3)))


def small() -> nn.Module:
    torch.manual_seed(3)
    return Small().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("executorch") / "fp32"
    export(small(), SHAPE, folder, runtime="executorch", info=ModelInfo(model="small", fused=True))
    return folder


def test_sessions_of_other_numbers_of_threads_do_not_hurt_each_other(folder: Path) -> None:
    """The pool of threads is one: each change makes it anew, under the programs of all the others."""
    x = make_reference_images(SHAPE, num_images=3, seed=1)
    with torch.inference_mode():
        expected = small()(torch.from_numpy(x)).numpy()
    sessions = [load(folder, threads=threads) for threads in (1, 2, 1, 3)]
    for _ in range(3):
        for session in sessions:
            np.testing.assert_allclose(session(x), expected, rtol=1e-4, atol=1e-5)
        sessions.pop().close()
    assert sessions[0].threads == 1


def test_nothing_is_heard_of_the_pool_or_the_processor(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for threads in (2, 1, 2):
        load(folder, threads=threads).close()
    assert capfd.readouterr() == ("", "")


def test_an_export_leaves_the_logging_of_the_process_alone(folder: Path, tmp_path: Path) -> None:
    before = list(logging.root.handlers), logging.root.level
    export(small(), SHAPE, tmp_path / "out", runtime="executorch", info=ModelInfo(model="small", fused=True))
    assert (list(logging.root.handlers), logging.root.level) == before


def test_the_whole_network_goes_to_xnnpack() -> None:
    """One delegate and nothing beside it, though the mean drops its sizes and a dropout stands before the Linear."""
    from executorch.exir import to_edge_transform_and_lower

    from onefold.runtimes import executorch as runtime
    from onefold.runtimes.base import suppress_output

    program = trace(small(), torch.zeros(2, *SHAPE))
    partitioner = runtime._partition().XnnpackPartitioner()
    with suppress_output():
        lowered = to_edge_transform_and_lower(runtime._with_batch_of_one(program), partitioner=[partitioner])
    calls = [node.target.__name__ for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    assert calls == ["executorch_call_delegate", "getitem"]


class Whole(nn.Module):
    """A convolution and a Linear of 8 bits, as `quantized_decomposed` writes them."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("stem", (16, 3, 3, 3)), ("head", (10, 16))):
            self.register_buffer(name, torch.randint(-127, 128, shape, dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.linspace(0.002, 0.004, shape[0]))
            self.register_buffer(f"{name}_zero", torch.zeros(shape[0], dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = on_grid(x, 0.03, 3)
        x = on_grid(torch.relu(nn.functional.conv2d(x, self.kernel("stem"), None, 2, 1)), 0.02, -128)
        x = on_grid(x.mean((2, 3), keepdim=True), 0.01, -128)
        return on_grid(nn.functional.linear(torch.flatten(x, 1), self.kernel("head")), 0.02, 5)

    def kernel(self, name: str) -> Tensor:
        stored = (self.get_buffer(name), self.get_buffer(f"{name}_scale"), self.get_buffer(f"{name}_zero"))
        return torch.ops.quantized_decomposed.dequantize_per_channel(*stored, 0, -127, 127, torch.int8)


def on_grid(x: Tensor, scale: float, zero: int) -> Tensor:
    ops, facts = torch.ops.quantized_decomposed, (scale, zero, -128, 127, torch.int8)
    return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *facts), *facts)


def test_layers_of_8_bits_answer_as_pytorch_simulates_them(tmp_path: Path) -> None:
    """Also behind a reshaping, which must not leave the Linear in floating point; one step apart at the most."""
    import torch.ao.quantization.fx._decomposed  # registers the operations

    from onefold.runtimes import executorch as runtime

    torch.manual_seed(5)
    model = Whole().eval()
    x = make_reference_images(SHAPE, num_images=8, seed=2)
    with torch.inference_mode():
        expected = model(torch.from_numpy(x)).numpy()
    runtime.export(trace(model, torch.from_numpy(x)), tmp_path, info=ModelInfo(model="w", fused=True), precision="int8")
    content = {"model.pte": (tmp_path / "model.pte").read_bytes()}
    engine = runtime.load(content, precision="int8", threads=1)
    assert np.ptp(expected) > 0.5
    assert np.abs(engine(x) - expected).max() <= 0.0201
    engine.close()


class Computed(nn.Module):
    """A convolution whose kernel is computed from the image, which XNNPACK cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel * x.mean().sigmoid()).mean((2, 3))


def test_a_layer_that_would_run_slowly_is_refused(tmp_path: Path) -> None:
    from onefold.errors import BadArgument

    torch.manual_seed(4)
    with pytest.raises(BadArgument, match="XNNPACK does not take 1 of its layers"):
        export(Computed().eval(), SHAPE, tmp_path / "out", runtime="executorch", info=ModelInfo(model="c", fused=True))
    assert list(tmp_path.iterdir()) == []
