"""ExecuTorch with XNNPACK on the CPU: one model.pte, which is what an app on a phone loads.

The program takes one image per call, as an app passes it. With a dynamic batch, XNNPACK would get the network in
pieces with copies between them; so the images of a batch are run one after another.

ExecuTorch has one thread pool for the whole process, and a program keeps the pool that it was loaded with. Where a
session asks for another number of threads than the one before it, the pool is created again, and the programs that used
the old one are reloaded at their next call. Calls of all sessions are serialized.

Its Python package needs torch even to run a program; an app does not.
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

from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine, import_vendor_package, suppress_output
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

FILES = ("model.pte",)
PACKAGES = ("torch", "executorch")
PRECISIONS = ("fp32", "int8")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {}
MANIFEST_DETAILS: Mapping[str, object] = {"backend": "XNNPACK", "input": "one image (1, C, H, W)"}
ACCEPTS_QDQ = True
unavailable_reason = None

_METHOD = "forward"
_LAYERS = (
    "aten.convolution.",
    "aten.linear.",
    "aten.addmm.",
    "aten.mm.",
    "quantized_decomposed.dequantize_per_channel.",
)


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Lower the network to XNNPACK and write it. Raises RuntimeError where XNNPACK does not take one of its layers."""
    lowering = import_vendor_package("executorch.exir", extra="executorch")
    partition = _partition()
    with suppress_output():
        lowered = lowering.to_edge_transform_and_lower(
            _with_batch_of_one(program), [_drop_no_ops_], [partition.XnnpackPartitioner()]
        )
        # Layers left to ExecuTorch's portable kernels would be many times slower.
        nodes = lowered.exported_program().graph.nodes
        names = [node.target.__name__ for node in nodes if node.op == "call_function"]
        rejected = [name for name in names if name.startswith(_LAYERS)]
        if rejected:
            raise RuntimeError(f"XNNPACK does not take {len(rejected)} of its layers, such as {rejected[0]}")
        (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Load the program; XNNPACK packs its weights for this CPU."""
    return _ExecuTorch(
        import_vendor_package("executorch.extension.pybindings.portable_lib", extra="executorch"),
        content["model.pte"],
        threads,
    )


class _ExecuTorch:
    """An ExecuTorch program; `threads` is what the thread pool reported when the program was loaded."""

    def __init__(self, library: ModuleType, content: bytes, threads: int) -> None:
        self._library, self._content, self._requested_threads = library, content, threads
        self._method: Any = None
        with _process_lock:
            self._load()

    def __call__(self, images: Floats) -> Floats:
        import torch

        # torch warns of tensors that share read-only memory, so such images are copied.
        x = torch.from_numpy(images if images.flags.writeable else images.copy())
        with _process_lock:
            if self not in _on_current_pool:
                self._load()
            return np.concatenate([self._method([image])[0].numpy() for image in x.split(1)])

    def close(self) -> None:
        with _process_lock:
            self._unload()

    def _load(self) -> None:
        # ExecuTorch logs the processor and the pool to sys.stderr.
        with suppress_output():
            if self._library._threadpool_get_thread_count() != self._requested_threads:
                for engine in list(_on_current_pool):
                    engine._unload()
                self._library._unsafe_reset_threadpool(self._requested_threads)
            # The program reads its weights from these bytes for as long as it lives.
            self._program = self._library._load_program_from_buffer(self._content)
            self._method = self._program.load_method(_METHOD)
            self.threads = int(self._library._threadpool_get_thread_count())
        _on_current_pool.add(self)

    def _unload(self) -> None:
        self._method = self._program = None
        _on_current_pool.discard(self)


_process_lock = Lock()
_on_current_pool: WeakSet[_ExecuTorch] = WeakSet()
"""The engines whose programs use the thread pool that exists now."""


def _with_batch_of_one(program: ExportedProgram) -> ExportedProgram:
    """Trace the network again for a batch of one, rewritten into the forms that XNNPACK takes."""
    import torch

    (images,), _ = program.example_inputs
    network = program.module()
    assert isinstance(network, torch.fx.GraphModule)
    _drop_dropout_(network)
    _keep_dims_of_means_(network)
    _reshape_before_quantize_(network)
    network.recompile()
    with torch.no_grad():
        return torch.export.export(network, (images[:1],))


def _drop_dropout_(network: GraphModule) -> None:
    """Remove dropout, which does nothing in inference but would separate a layer from its quantization."""
    import torch

    for node in network.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        node.replace_all_uses_with(node.args[0])
        network.graph.erase_node(node)


def _keep_dims_of_means_(network: GraphModule) -> None:
    """Compute global means with keepdim=True and flatten after: XNNPACK takes no other mean."""
    import torch

    aten, graph = torch.ops.aten, network.graph
    for node in graph.find_nodes(op="call_function", target=aten.mean.dim):
        if (
            node.args[1:] not in (([2, 3],), ([-2, -1],), ([-1, -2],))
            or node.kwargs
            or node.args[0].meta["val"].ndim != 4
        ):
            continue
        with graph.inserting_before(node):
            kept = graph.call_function(aten.mean.dim, (*node.args, True))
            flat = graph.call_function(aten.flatten.using_ints, (kept, 1))
        node.replace_all_uses_with(flat)
        graph.erase_node(node)


def _reshape_before_quantize_(network: GraphModule) -> None:
    """Move reshapes before the quantize operation: an int8 layer must read a dequantized value directly."""
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operations

    aten, qdq, graph = torch.ops.aten, torch.ops.quantized_decomposed, network.graph
    for reshape in (aten.flatten.using_ints, aten.view.default, aten.reshape.default):
        for node in graph.find_nodes(op="call_function", target=reshape):
            value = node.args[0]
            if value.target is not qdq.dequantize_per_tensor.default:
                continue
            quantize = value.args[0]
            with graph.inserting_before(node):
                reshaped = graph.call_function(reshape, (quantize.args[0], *node.args[1:]))
                quantized = graph.call_function(quantize.target, (reshaped, *quantize.args[1:]))
                node.replace_all_uses_with(graph.call_function(value.target, (quantized, *value.args[1:])))
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _drop_no_ops_(network: GraphModule) -> Any:
    """Take out the copies to a larger shape that is the shape already: products of batches of one are full of them."""
    from torch.fx.passes.infra.pass_base import PassResult

    calls = [node for node in network.graph.nodes if node.op == "call_function"]
    copies = [node for node in calls if node.target.__name__ == "aten.expand_copy.default"]
    no_ops = [node for node in copies if node.args[0].meta["val"].shape == node.meta["val"].shape]
    for node in no_ops:
        node.replace_all_uses_with(node.args[0])
        network.graph.erase_node(node)
    network.recompile()
    return PassResult(network, bool(no_ops))


def _partition() -> ModuleType:
    """Import XNNPACK's partitioner, and undo the change its import makes to the process's logging."""
    root = logging.root
    handlers, level = list(root.handlers), root.level
    try:
        return import_vendor_package("executorch.backends.xnnpack.partition.xnnpack_partitioner", extra="executorch")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
