"""Rules about what moves and converts data: transposes, padding by itself, quantize and dequantize operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from onefold.advisor.onnx_graph import OnnxGraph
from onefold.advisor.rule import Case, Remedy, Rule
from onefold.advisor.variant import Variant, open_engine

_KEEPS_LAYOUT = ("Relu", "Sigmoid", "HardSigmoid", "HardSwish", "Clip", "LeakyRelu", "Gelu", "Erf", "Tanh", "Identity")
_QUANTIZED_OPS = (
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean"),
    *("MaxPool", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Resize"),
)
_WORTH_SAYING = 0.05  # of the time
_SAMPLES = 4  # drawn images that a missing range is read from


# ------------------------------------------------------------------------------------------- transposes


def cancel_transposes_(graph: OnnxGraph) -> list[Any]:
    """Remove pairs of transposes that undo each other, in place; those that were removed."""
    gone: list[Any] = []
    for node in graph.nodes:
        if node.op_type != "Transpose" or any(node is each for each in gone):
            continue
        last = node
        while (reader := graph.sole_reader(last.output[0])) is not None and reader.op_type in _KEEPS_LAYOUT:
            if reader.input[0] != last.output[0]:
                break
            last = reader
        if reader is None or reader.op_type != "Transpose" or reader.output[0] in graph.output_names:
            continue
        first, second = graph.attribute(node, "perm"), graph.attribute(reader, "perm")
        if first is None or second is None or [first[each] for each in second] != list(range(len(first))):
            continue
        graph.connect_readers(reader.output[0], last.output[0] if last is not node else node.input[0])
        graph.connect_readers(node.output[0], node.input[0])
        gone += [node, reader]
        graph.remove([node, reader])
        graph.reindex()
    return gone


def _detect_transposes(case: Case) -> Iterable[Remedy]:
    gone = cancel_transposes_(case.variant.graph())
    if not gone:
        return
    ours = [node for node in case.graph.nodes if node.output[0] in {each.output[0] for each in gone}]

    def apply(variant: Variant) -> Variant | None:
        graph = variant.graph()
        return replace(variant, content=graph.serialize()) if cancel_transposes_(graph) else None

    yield Remedy(
        rule=TRANSPOSES,
        finding=f"{len(gone)} transposes of which each two undo each other",
        evidence=case.evidence(ours),
        change="remove them",
        predicted=case.without(ours),
        apply=apply,
        command=case.apply_command("transposes"),
    )


def layout_remarks(case: Case) -> Iterable[str]:
    """What moves data and has no remedy here, where it takes a twentieth of the time: transposes left, resizing."""
    for kind, what in (
        ("Transpose", "channels last in one part and first in another: one layout in the whole network needs none"),
        ("Resize", "resizing inside the network: where the image can be resized before it, nothing is left of it"),
    ):
        nodes = [node for node in case.graph.nodes if node.op_type == kind]
        if nodes and case.share_of(nodes) >= _WORTH_SAYING:
            yield f"{len(nodes)} {kind}: {case.evidence(nodes)}; {what}"


# ---------------------------------------------------------------------------------------------- padding


def fold_pads_(graph: OnnxGraph) -> list[Any]:
    """Make paddings with zeros part of the convolutions that alone read them, in place; those that were removed."""
    gone: list[Any] = []
    for node in graph.nodes:
        conv = graph.sole_reader(node.output[0]) if node.op_type == "Pad" else None
        if conv is None or conv.op_type != "Conv" or conv.input[0] != node.output[0]:
            continue
        widths = _zero_padding(graph, node)
        plain = graph.attribute(conv, "auto_pad", b"NOTSET") == b"NOTSET"
        if widths is None or not plain:
            continue
        own = list(graph.attribute(conv, "pads", [0] * 4))
        graph.set_attribute(conv, "pads", [a + b for a, b in zip(own, widths, strict=True)])
        conv.input[0] = node.input[0]
        gone.append(node)
        graph.remove([node])
        graph.reindex()
    return gone


def _zero_padding(graph: OnnxGraph, node: Any) -> list[int] | None:
    """Top, left, bottom, right of a padding of maps with zeros; None of any other."""
    pads = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    value = graph.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    is_constant = graph.attribute(node, "mode", b"constant") == b"constant"
    if pads is None or pads.shape != (8,) or value is None or value.any() or not is_constant:
        return None
    widths = [int(each) for each in pads]
    if len(node.input) > 3 or any(widths[i] for i in (0, 1, 4, 5)) or min(widths) < 0:
        return None
    return [widths[i] for i in (2, 3, 6, 7)]


def _detect_pads(case: Case) -> Iterable[Remedy]:
    gone = {node.output[0] for node in fold_pads_(case.variant.graph())}
    if not gone:
        return
    ours = [node for node in case.graph.nodes if node.output[0] in gone]

    def apply(variant: Variant) -> Variant | None:
        graph = variant.graph()
        return replace(variant, content=graph.serialize()) if fold_pads_(graph) else None

    yield Remedy(
        rule=PADS,
        finding=f"{len(gone)} paddings by themselves before a convolution",
        evidence=case.evidence(ours),
        change="let the convolution pad",
        predicted=case.without(ours),
        apply=apply,
        command=case.apply_command("pads"),
    )


# -------------------------------------------------------------------------------- quantize and dequantize


def remove_idle_pairs_(graph: OnnxGraph) -> list[Any]:
    """Remove quantizations of what was just dequantized with the same scale, in place; those that were removed."""
    gone: list[Any] = []
    for node in graph.nodes:
        before = graph.producers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is None or before.op_type != "DequantizeLinear" or node.output[0] in graph.output_names:
            continue
        values = [graph.constants.get(name) for name in (*node.input[1:3], *before.input[1:3])]
        if len(values) != 4 or any(value is None for value in values):
            continue
        ours, theirs = values[:2], values[2:]
        if all(a is not None and b is not None and np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            graph.connect_readers(node.output[0], before.input[0])
            gone.append(node)
    graph.remove(gone)
    graph.reindex()
    return gone


def find_islands(graph: OnnxGraph) -> list[Any]:
    """Operations of an int8 graph whose inputs are dequantized and whose output nothing quantizes."""
    found = []
    for node in graph.nodes:
        if node.op_type not in _QUANTIZED_OPS or node.output[0] in graph.output_names:
            continue
        inputs = [graph.producers.get(name) for name in node.input if name and name not in graph.constants]
        is_fed = inputs and all(each is not None and each.op_type == "DequantizeLinear" for each in inputs)
        readers = graph.readers.get(node.output[0], [])
        is_quantized = any(each.op_type == "QuantizeLinear" for each in readers)
        if is_fed and not is_quantized and _leads_to_int8(graph, node):
            found.append(node)
    return found


def _leads_to_int8(graph: OnnxGraph, node: Any) -> bool:
    """Whether anything that is computed from a node is quantized: else it is the float end of the network."""
    values, seen = list(node.output), set[str]()
    while values:
        name = values.pop()
        if name in seen:
            continue
        seen.add(name)
        for reader in graph.readers.get(name, []):
            if reader.op_type == "QuantizeLinear":
                return True
            values += reader.output
    return False


def quantize_islands_(graph: OnnxGraph, variant: Variant) -> int:
    """Quantize the outputs of float operations between int8 ones, in place, by their ranges on drawn images."""
    islands = find_islands(graph)
    if not islands:
        return 0
    ranges = _ranges(variant, [node.output[0] for node in islands])
    for node, (low, high) in zip(islands, ranges, strict=True):
        name, low, high = node.output[0], min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-9)
        constants = [
            graph.add_constant(np.array(scale, dtype=np.float32), "scale"),
            graph.add_constant(np.array(round(-low / scale), dtype=np.uint8), "zero"),
        ]
        readers = list(graph.readers[name])
        quantized = graph.add_node("QuantizeLinear", [name, *constants])
        value = graph.add_node("DequantizeLinear", [quantized, *constants])
        for reader in readers:
            for place, each in enumerate(reader.input):
                if each == name:
                    reader.input[place] = value
    graph.reindex()
    return len(islands)


def _ranges(variant: Variant, names: list[str]) -> list[tuple[float, float]]:
    """The least and the greatest of each value, on drawn images, as ONNX Runtime computes them."""
    graph = variant.graph()
    shape = graph.add_constant(np.array([1], dtype=np.int64), "one")
    parts = [
        graph.add_node("Reshape", [graph.add_node(reduce, [name], keepdims=0), shape])
        for name in names
        for reduce in ("ReduceMin", "ReduceMax")
    ]
    output = graph.model.graph.output[0]
    output.name = graph.add_node("Concat", parts, axis=0)
    probe = replace(variant, content=graph.serialize(), runtime="onnx")
    engine = open_engine(probe)
    try:
        seen = np.stack([engine(part) for part in np.split(variant.images(_SAMPLES * variant.batch), _SAMPLES)])
    finally:
        engine.close()
    return list(zip(seen[:, ::2].min(0).tolist(), seen[:, 1::2].max(0).tolist(), strict=True))


def _detect_idle_pairs(case: Case) -> Iterable[Remedy]:
    gone = {node.output[0] for node in remove_idle_pairs_(case.variant.graph())}
    if not gone:
        return
    ours = [node for node in case.graph.nodes if node.output[0] in gone]

    def apply(variant: Variant) -> Variant | None:
        graph = variant.graph()
        return replace(variant, content=graph.serialize()) if remove_idle_pairs_(graph) else None

    yield Remedy(
        rule=QDQ_PAIRS,
        finding=f"{len(gone)} quantizations of what was just dequantized with the same scale",
        evidence=case.evidence(ours),
        change="remove them",
        apply=apply,
        command=case.apply_command("qdq-pairs"),
    )


def _detect_islands(case: Case) -> Iterable[Remedy]:
    islands = find_islands(case.graph) if case.variant.precision == "int8" else []
    if not islands:
        return
    kinds = ", ".join(sorted({node.op_type for node in islands}))

    def apply(variant: Variant) -> Variant | None:
        graph = variant.graph()
        return replace(variant, content=graph.serialize()) if quantize_islands_(graph, variant) else None

    yield Remedy(
        rule=ISLANDS,
        finding=f"{len(islands)} operations in float between int8 ones ({kinds})",
        evidence=case.evidence(islands),
        change="quantize their outputs too (here by the ranges of drawn images: calibrate them on photos)",
        apply=apply,
        command=case.apply_command("fp32-islands"),
    )


TRANSPOSES = Rule(
    name="transposes",
    looks_for="transposes that undo each other, with elementwise operations between them at most",
    remedy="remove both",
    source="ONNX Runtime's transpose optimizer, which stops at operations that it does not know",
    detect=_detect_transposes,
    order=3,
)
PADS = Rule(
    name="pads",
    looks_for="paddings with zeros before a convolution",
    remedy="the convolution's own padding",
    source="onnxruntime.ai, Graph optimizations (Pad and Conv fusion)",
    detect=_detect_pads,
    order=3,
)
QDQ_PAIRS = Rule(
    name="qdq-pairs",
    looks_for="values that are dequantized and quantized again with the same scale",
    remedy="remove the second",
    source="onnxruntime.ai, Quantize ONNX models (QDQ format)",
    detect=_detect_idle_pairs,
    order=3,
)
ISLANDS = Rule(
    name="fp32-islands",
    looks_for="float operations between quantized ones in an int8 graph",
    remedy="quantize their outputs too",
    source="onnxruntime.ai, Quantize ONNX models: an operation is int8 where its inputs and its output are quantized",
    detect=_detect_islands,
    order=4,
    changes_answers=True,
)
