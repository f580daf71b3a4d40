"""Rules about folding and int8: branches and norms that one convolution could be, and float networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from onefold.advisor.onnx_graph import Array, OnnxGraph
from onefold.advisor.rule import Case, Remedy, Rule
from onefold.advisor.variant import Variant

_AFFINE = ("BatchNormalization", "Mul", "Add", "Sub", "Div")
_Affine = tuple[Array, Array]  # scale and shift of each channel, float64


def _detect_unfused(case: Case) -> Iterable[Remedy]:
    forms = case.forms
    if forms is None or forms.is_fused:
        return
    content = forms.fused()
    fused = OnnxGraph(content, case.variant.batch)
    nodes, macs = case.graph.nodes, (case.graph.total_macs(), fused.total_macs())
    if len(nodes) == len(fused.nodes) and macs[0] == macs[1]:
        return  # the norms that were left are folded by the export

    def apply(variant: Variant) -> Variant | None:
        return replace(variant, content=content) if variant.content != content else None

    yield Remedy(
        rule=FUSE,
        finding=f"branches and norms are not fused: {len(nodes)} operations, {len(fused.nodes)} when fused",
        evidence=case.overall_evidence(),
        change="fuse it: one convolution in place of each block's branches",
        predicted=macs[1] / macs[0] if all(macs) else None,
        apply=apply,
        command=case.export_command(case.variant.runtime),
    )


def _detect_foldable(case: Case) -> Iterable[Remedy]:
    graph = case.variant.graph()
    folded = [*fold_affine_(graph), *merge_branches_(graph), *fold_affine_(graph)]
    if not folded:
        return
    names = {name: node for node in case.graph.nodes for name in node.output}
    nodes = [names[name] for name in folded if name in names]
    kinds = sorted({node.op_type for node in nodes})

    def apply(variant: Variant) -> Variant | None:
        changed = variant.graph()
        found = [*fold_affine_(changed), *merge_branches_(changed), *fold_affine_(changed)]
        return replace(variant, content=changed.serialize()) if found else None

    yield Remedy(
        rule=FOLD,
        finding=f"{len(folded)} operations could be part of a convolution ({', '.join(kinds)})",
        evidence=case.evidence(nodes),
        change="fold norms, biases, scales and parallel convolutions into the convolutions",
        predicted=case.without(nodes) if case.time_of(nodes) else None,
        apply=apply,
        command=case.apply_command("fold"),
    )


def _detect_float(case: Case) -> Iterable[Remedy]:
    forms = case.forms
    if forms is None or case.variant.precision != "fp32":
        return
    heavy = [node for node in case.graph.nodes if case.graph.count_macs(node)]
    share, ratio, start = case.share_of(heavy), _peak_ratio(case), case.start_of_remade()

    def apply(variant: Variant) -> Variant | None:
        if variant.sha256 != start.sha256:
            return None  # another change has remade the graph: this one would undo it
        return replace(variant, content=forms.int8(variant.content), precision="int8")

    yield Remedy(
        rule=INT8,
        finding=f"{len(heavy)} convolutions and products are computed in fp32",
        evidence=case.evidence(heavy),
        change="quantize it to int8, calibrated on photos of the kind that it will see",
        predicted=None if ratio is None else 1 - share + share * ratio,
        apply=apply,
        command=case.export_command(case.variant.runtime, "--precision int8", "--data PHOTOS")
        if case.is_exportable
        else case.apply_command("int8"),
        against=start,
    )


def _peak_ratio(case: Case) -> float | None:
    """The time of a multiply-add in int8 over that in fp32, by the machine's measured rates."""
    if case.roofline is None:
        return None
    best = {p.kind: p.best for p in case.roofline.limits if p.threads == case.variant.threads}
    return best["fp32"] / best["int8"] if {"fp32", "int8"} <= set(best) else None


# ------------------------------------------------------------------------------------ folding in a graph


def fold_affine_(graph: OnnxGraph) -> list[str]:
    """Fold norms, scales and shifts of channels into the convolution before them, in place; what they gave, by name."""
    folded: list[str] = []
    for node in graph.nodes:
        if node.op_type not in _AFFINE:
            continue
        found = _affine_after_conv(graph, node)
        if found is None:
            continue
        conv, (scale, shift) = found
        weight = graph.constants[conv.input[1]].astype(np.float64)
        bias = graph.constants[conv.input[2]] if len(conv.input) > 2 and conv.input[2] else np.zeros(len(weight))
        _set_weights(
            graph,
            conv,
            weight * scale.reshape(-1, *[1] * (weight.ndim - 1)),
            bias.astype(np.float64) * scale + shift,
        )
        graph.remove([node])
        conv.output[0] = node.output[0]
        folded.append(node.output[0])
        graph.reindex()
    return folded


def _affine_after_conv(graph: OnnxGraph, node: Any) -> tuple[Any, _Affine] | None:
    """The convolution that a node could be part of, and what the node does to each of its channels."""
    for place, name in enumerate(node.input[:2]):
        conv = graph.producers.get(name)
        if (
            conv is None
            or conv.op_type != "Conv"
            or graph.sole_reader(name) is None
            or list(node.input).count(name) > 1
        ):
            continue
        weight = graph.constants.get(conv.input[1])
        if weight is None or (len(conv.input) > 2 and conv.input[2] and conv.input[2] not in graph.constants):
            continue
        affine = affine_of(graph, node, place, len(weight))
        if affine is not None:
            return conv, affine
    return None


def affine_of(graph: OnnxGraph, node: Any, place: int, channels: int) -> _Affine | None:
    """The scale and shift of each channel that a node applies to its input at `place`; None where it does not."""
    if node.op_type == "BatchNormalization":
        values = [graph.constants.get(name) for name in node.input[1:5]]
        if place or any(value is None or value.shape != (channels,) for value in values) or len(values) != 4:
            return None
        gamma, beta, mean, var = (np.asarray(value, dtype=np.float64) for value in values)
        scale = gamma / np.sqrt(var + graph.attribute(node, "epsilon", 1e-5))
        return scale, beta - mean * scale
    constant = graph.constants.get(node.input[1 - place])
    if constant is None or not np.issubdtype(constant.dtype, np.floating):
        return None
    if constant.size != 1 and constant.shape not in ((channels, 1, 1), (1, channels, 1, 1)):
        return None
    value = np.broadcast_to(constant.astype(np.float64).reshape(-1), (channels,))
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op_type == "Mul":
        return value, zero
    if node.op_type == "Add":
        return one, value
    if node.op_type == "Sub":
        return (one, -value) if place == 0 else (-one, value)
    return (1 / value, zero) if place == 0 and (value != 0).all() else None


def merge_branches_(graph: OnnxGraph) -> list[str]:
    """Merge parallel convolutions of one input, norms and skips among them, in place; the sums, by name."""
    merged: list[str] = []
    for node in graph.nodes:
        if node.op_type != "Add":
            continue
        found = _parallel(graph, node)
        if found is None:
            continue
        conv, weight, bias, gone = found
        _set_weights(graph, conv, weight, bias)
        graph.remove([node, *gone])
        conv.output[0] = node.output[0]
        merged.append(node.output[0])
        graph.reindex()
    return merged


def _parallel(graph: OnnxGraph, node: Any) -> tuple[Any, Array, Array, list[Any]] | None:
    """The convolution that a sum of two linear branches is, with its weights, and the branch that it makes needless."""
    parts = [graph.producers.get(name) for name in node.input]
    convs = [p for p in parts if p is not None and p.op_type == "Conv" and graph.sole_reader(p.output[0]) is not None]
    convs = [p for p in convs if p.input[1] in graph.constants and _is_centred(graph, p)]
    if not convs or node.input[0] == node.input[1]:
        return None
    main = max(convs, key=lambda p: graph.constants[p.input[1]].shape[-1])
    other_name = next(name for name in node.input if name != main.output[0])
    other = graph.producers.get(other_name)
    weight = graph.constants[main.input[1]].astype(np.float64)
    bias = _bias(graph, main, len(weight))
    added = _as_kernel(graph, other, other_name, main, weight.shape)
    if added is None:
        return None
    return main, weight + added[0], bias + added[1], [] if other_name == main.input[0] or other is None else [other]


def _as_kernel(
    graph: OnnxGraph, other: Any, other_name: str, main: Any, shape: tuple[int, ...]
) -> tuple[Array, Array] | None:
    """A branch as a kernel of this shape and a bias: a convolution, a norm alone, or the input itself."""
    out_channels, group_width, side = shape[0], shape[1], shape[-1]
    strides = graph.attribute(main, "strides", [1, 1])
    is_skip = other_name == main.input[0]
    if other is not None and other.op_type == "Conv" and not is_skip:
        same = ("strides", [1, 1]), ("group", 1), ("dilations", [1, 1])
        if (
            other.input[0] != main.input[0]
            or other.input[1] not in graph.constants
            or graph.sole_reader(other.output[0]) is None
            or not _is_centred(graph, other)
            or any(graph.attribute(other, name, d) != graph.attribute(main, name, d) for name, d in same)
        ):
            return None
        kernel = graph.constants[other.input[1]].astype(np.float64)
        border = (side - kernel.shape[-1]) // 2
        if kernel.shape[:2] != shape[:2] or border < 0:
            return None
        padded = np.pad(kernel, ((0, 0), (0, 0), (border, border), (border, border)))
        return padded, _bias(graph, other, out_channels)
    scale, shift = np.ones(out_channels), np.zeros(out_channels)
    if not is_skip:
        if other is None or other.op_type != "BatchNormalization" or other.input[0] != main.input[0]:
            return None
        affine = affine_of(graph, other, 0, out_channels)
        if affine is None or graph.sole_reader(other.output[0]) is None:
            return None
        scale, shift = affine
    if out_channels != group_width * graph.attribute(main, "group", 1) or list(strides) != [1, 1]:
        return None
    kernel = np.zeros(shape)
    channels = np.arange(out_channels)
    kernel[channels, channels % group_width, side // 2, side // 2] = scale
    return kernel, shift


def _is_centred(graph: OnnxGraph, conv: Any) -> bool:
    """Whether a convolution has an odd square kernel, and pads by half of it on each side."""
    weight = graph.constants[conv.input[1]]
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or not weight.shape[2] % 2:
        return False
    half = weight.shape[2] // 2
    plain = graph.attribute(conv, "auto_pad", b"NOTSET") == b"NOTSET"
    is_dense = list(graph.attribute(conv, "dilations", [1, 1])) == [1, 1]
    has_bias = len(conv.input) < 3 or not conv.input[2] or conv.input[2] in graph.constants
    return plain and is_dense and has_bias and list(graph.attribute(conv, "pads", [0] * 4)) == [half] * 4


def _bias(graph: OnnxGraph, conv: Any, channels: int) -> Array:
    if len(conv.input) > 2 and conv.input[2]:
        return graph.constants[conv.input[2]].astype(np.float64)
    return np.zeros(channels)


def _set_weights(graph: OnnxGraph, conv: Any, weight: Array, bias: Array) -> None:
    dtype = graph.constants[conv.input[1]].dtype
    inputs = [conv.input[0], graph.add_constant(weight.astype(dtype), conv.input[1])]
    inputs.append(graph.add_constant(bias.astype(dtype), "bias"))
    del conv.input[:]
    conv.input.extend(inputs)


FUSE = Rule(
    name="fuse",
    looks_for="branches and norms of training that are still in the network",
    remedy="fuse it, which is proved to leave the answers",
    source="MobileOne (arXiv 2206.04040), section 3; RepVGG (arXiv 2101.03697)",
    detect=_detect_unfused,
    order=0,
    adopted=True,
)
FOLD = Rule(
    name="fold",
    looks_for="norms, biases, scales and parallel convolutions in the graph that a convolution could hold",
    remedy="fold them into its kernel and its bias",
    source="Jacob et al. (arXiv 1712.05877), section 3.2; RepVGG (arXiv 2101.03697)",
    detect=_detect_foldable,
    order=3,
    adopted=True,
)
INT8 = Rule(
    name="int8",
    looks_for="convolutions and products in fp32",
    remedy="8-bit weights and activations",
    source="Jacob et al. (arXiv 1712.05877); onnxruntime.ai, Quantize ONNX models",
    detect=_detect_float,
    order=2,
    changes_answers=True,
)
