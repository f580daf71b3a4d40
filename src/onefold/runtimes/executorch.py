"""ExecuTorch with XNNPACK on the CPU: one model.pte, which is what an app on a phone loads.

The program takes one image, as an app gives it. With a batch of any size the network would reach XNNPACK in pieces,
each answer copied in between; so here the images of a batch are answered one after another.

ExecuTorch has one pool of threads for the whole process, and a program keeps to the pool that it was loaded with. Where
a session wants another number of threads than the one before it, the pool is made anew, and the programs that stood on
the old one are loaded again when they are next called. All sessions take turns.

Its package for Python needs torch, to run a program too; an app does not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np

from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.reference import Floats
from onefold.runtimes.vendor import quiet, require

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

FILES = ("model.pte",)
PACKAGES = ("torch", "executorch")
PRECISIONS = ("fp32", "int8")
REFUSES: Mapping[str, str] = {}
DETAILS: Mapping[str, object] = {"backend": "XNNPACK", "input": "one image (1, C, H, W)"}
READS_GRIDS = True
OBSTACLE = None

_METHOD = "forward"
_LAYERS = (
    "aten.convolution.",
    "aten.linear.",
    "aten.addmm.",
    "aten.mm.",
    "quantized_decomposed.dequantize_per_channel.",
)


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Lower the network to XNNPACK and write it. Raises RuntimeError where XNNPACK leaves one of its layers out."""
    lowering = require("executorch.exir", extra="executorch")
    partition = _partition()
    with quiet():
        lowered = lowering.to_edge_transform_and_lower(
            _for_one_image(program), [_drop_idle_], [partition.XnnpackPartitioner()]
        )
        outside = _layers_outside(lowered.exported_program())
        if outside:
            raise RuntimeError(f"XNNPACK does not take {len(outside)} of its layers, such as {outside[0]}")
        (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network, its weights packed by XNNPACK for this CPU."""
    return _ExecuTorch(
        require("executorch.extension.pybindings.portable_lib", extra="executorch"), content["model.pte"], threads
    )


class _ExecuTorch:
    """A program of ExecuTorch; `threads` is what the pool said when the program was loaded."""

    def __init__(self, library: ModuleType, content: bytes, threads: int) -> None:
        self._library, self._content, self._wanted = library, content, threads
        self._method: Any = None
        with _turn:
            self._load()

    def __call__(self, images: Floats) -> Floats:
        import torch

        # A tensor over memory that is read-only would warn, so such images are copied.
        x = torch.from_numpy(images if images.flags.writeable else images.copy())
        with _turn:
            if self not in _on_this_pool:
                self._load()
            return np.concatenate([self._method([image])[0].numpy() for image in x.split(1)])

    def close(self) -> None:
        with _turn:
            self._let_go()

    def _load(self) -> None:
        # Its notes on the processor and the pool go to sys.stderr.
        with quiet():
            if self._library._threadpool_get_thread_count() != self._wanted:
                for engine in list(_on_this_pool):
                    engine._let_go()
                self._library._unsafe_reset_threadpool(self._wanted)
            # The program reads its weights from these bytes for as long as it lives.
            self._program = self._library._load_program_from_buffer(self._content)
            self._method = self._program.load_method(_METHOD)
            self.threads = int(self._library._threadpool_get_thread_count())
        _on_this_pool.add(self)

    def _let_go(self) -> None:
        self._method = self._program = None
        _on_this_pool.discard(self)


_turn = Lock()
_on_this_pool: WeakSet[_ExecuTorch] = WeakSet()
"""The engines whose programs stand on the pool of threads as it is now."""


def _for_one_image(program: ExportedProgram) -> ExportedProgram:
    """The same network for a batch of one, in the forms that XNNPACK takes."""
    import torch

    (images,), _ = program.example_inputs
    network = program.module()
    assert isinstance(network, torch.fx.GraphModule)
    _drop_dropout_(network)
    _keep_sizes_(network)
    _reshape_before_grids_(network)
    network.recompile()
    with torch.no_grad():
        return torch.export.export(network, (images[:1],))


def _drop_dropout_(network: GraphModule) -> None:
    """Take out what does nothing outside of training, but would stand between a layer and its grid."""
    import torch

    for node in network.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        node.replace_all_uses_with(node.args[0])
        network.graph.erase_node(node)


def _keep_sizes_(network: GraphModule) -> None:
    """Let the means of whole maps keep the two sizes of 1, and drop these after: XNNPACK takes no other mean."""
    import torch

    aten, graph = torch.ops.aten, network.graph
    for node in graph.find_nodes(op="call_function", target=aten.mean.dim):
        if node.args[1:] not in (([2, 3],), ([-2, -1],), ([-1, -2],)) or node.kwargs or _rank(node.args[0]) != 4:
            continue
        with graph.inserting_before(node):
            kept = graph.call_function(aten.mean.dim, (*node.args, True))
            flat = graph.call_function(aten.flatten.using_ints, (kept, 1))
        node.replace_all_uses_with(flat)
        graph.erase_node(node)


def _reshape_before_grids_(network: GraphModule) -> None:
    """Reshape values before they are put on a grid, not after: a layer of 8 bits must read what lies on one."""
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operations

    aten, grids, graph = torch.ops.aten, torch.ops.quantized_decomposed, network.graph
    for reshape in (aten.flatten.using_ints, aten.view.default, aten.reshape.default):
        for node in graph.find_nodes(op="call_function", target=reshape):
            value = node.args[0]
            if value.target is not grids.dequantize_per_tensor.default:
                continue
            stored = value.args[0]
            with graph.inserting_before(node):
                reshaped = graph.call_function(reshape, (stored.args[0], *node.args[1:]))
                stored = graph.call_function(stored.target, (reshaped, *stored.args[1:]))
                node.replace_all_uses_with(graph.call_function(value.target, (stored, *value.args[1:])))
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _drop_idle_(network: GraphModule) -> Any:
    """Take out the copies to a larger shape that is the shape already: products of batches of one are full of them."""
    from torch.fx.passes.infra.pass_base import PassResult

    calls = [node for node in network.graph.nodes if node.op == "call_function"]
    copies = [node for node in calls if node.target.__name__ == "aten.expand_copy.default"]
    idle = [node for node in copies if node.args[0].meta["val"].shape == node.meta["val"].shape]
    for node in idle:
        node.replace_all_uses_with(node.args[0])
        network.graph.erase_node(node)
    network.recompile()
    return PassResult(network, bool(idle))


def _rank(node: Any) -> int:
    return int(node.meta["val"].ndim)


def _layers_outside(program: ExportedProgram) -> list[str]:
    """The convolutions, products and kernels that ExecuTorch's own, slower operators would have to run."""
    names = [node.target.__name__ for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith(_LAYERS)]


def _partition() -> ModuleType:
    """XNNPACK's half of the converter, whose import would set up the whole process's logging."""
    root = logging.root
    handlers, level = list(root.handlers), root.level
    try:
        return require("executorch.backends.xnnpack.partition.xnnpack_partitioner", extra="executorch")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
