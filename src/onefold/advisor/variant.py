"""Variants: a network as a runtime is to run it - the ONNX graph, the precision, the threads, the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from onefold.advisor.onnx_graph import OnnxGraph
from onefold.errors import BadArgument
from onefold.runtimes import openvino
from onefold.runtimes.base import RuntimeEngine, import_runtime
from onefold.runtimes.layer_times import LayerTime, ProfileRequest, ProfilingRuntime
from onefold.runtimes.reference_logits import Floats, make_reference_images

ADVISED_RUNTIMES = ("onnx", "openvino")
"""The runtimes that read ONNX graphs and tell the time of each layer."""

INT8_OPS = ("QuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul")


def check_advised_runtimes(runtimes: Sequence[str]) -> None:
    """Raise BadArgument for a runtime that is not one of them, or that there is not."""
    for runtime in runtimes:
        import_runtime(runtime)
        if runtime not in ADVISED_RUNTIMES:
            raise BadArgument(
                f"the advisor tries {' and '.join(ADVISED_RUNTIMES)}, which run the same graph and tell the time of "
                f"each layer, not {runtime!r}: give --to {','.join(ADVISED_RUNTIMES)}"
            )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network as it is run: `content` is an ONNX file, `input_shape` one image's, `batch` the images of a call.

    `precision` is what the runtime is told to compute in: fp32, int8 where the graph is, bf16 or fp16.
    """

    content: bytes
    runtime: str
    input_shape: tuple[int, int, int]
    precision: str = "fp32"
    threads: int = 1
    batch: int = 1

    @cached_property
    def sha256(self) -> str:
        """The digest of the graph."""
        return hashlib.sha256(self.content).hexdigest()

    def graph(self) -> OnnxGraph:
        """The graph, read anew, so that it may be changed."""
        return OnnxGraph(self.content, self.batch)

    def images(self, count: int | None = None) -> Floats:
        """Drawn images (B, C, H, W), the same at each call: those of one call, or `count`."""
        return make_reference_images(self.input_shape, num_images=self.batch if count is None else count)


def graph_precision(graph: OnnxGraph) -> str:
    """The precision that a graph is written for: int8 where it quantizes, else fp32."""
    return "int8" if any(node.op_type in INT8_OPS for node in graph.nodes) else "fp32"


def open_engine(variant: Variant) -> RuntimeEngine:
    """Load a variant in its runtime. May raise anything that the runtime raises; BadArgument for another runtime."""
    runtime = import_runtime(variant.runtime)
    return runtime.load(_files(variant), precision=variant.precision, threads=variant.threads)


def profile_layers(variant: Variant, calls: int = 10) -> Sequence[LayerTime]:
    """Measure the time of each layer of a variant, as its runtime executes it."""
    runtime = cast(ProfilingRuntime, import_runtime(variant.runtime))
    request = ProfileRequest(images=variant.images(), calls=calls, threads=variant.threads)
    return runtime.profile(_files(variant), request, precision=variant.precision)


def _files(variant: Variant) -> dict[str, bytes]:
    """The files of the runtime that hold the graph."""
    if variant.runtime == "onnx":
        return {"model.onnx": variant.content}
    if variant.runtime == "openvino":
        return openvino.convert_onnx(variant.content)
    raise BadArgument(f"the advisor tries {' and '.join(ADVISED_RUNTIMES)}, not {variant.runtime}")
