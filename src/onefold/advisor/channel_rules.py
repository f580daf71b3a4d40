"""The rule about channels that are no multiple of what a runtime's kernels take at once: padded, the answers stay.

Padded channels have weights of zero in all that reads them, so what they hold does not matter. Channels of values that
an elementwise operation, a pooling or a depthwise convolution ties together are padded together, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onefold.advisor.onnx_graph import OnnxGraph
from onefold.advisor.rule import Case, Remedy, Rule
from onefold.advisor.variant import Variant

_BLOCKS = {"avx512": 16, "avx2": 8, "neon": 4}
_ELEMENTWISE = (
    *("Relu", "Sigmoid", "HardSigmoid", "HardSwish", "Clip", "LeakyRelu", "Gelu", "Erf", "Tanh", "Elu", "Identity"),
    *("Softplus", "Mish", "Selu", "Celu"),
)
_POOLINGS = ("GlobalAveragePool", "AveragePool", "MaxPool", "ReduceMean", "Flatten")
_BINARY = ("Add", "Mul", "Sub", "Div")


@dataclass(eq=False)
class _Group:
    """Values that share their channels, and the constants with an entry a channel: (node, place, axis, filler)."""

    channels: int
    blocked: bool = False
    constants: list[tuple[Any, int, int, float]] = field(default_factory=list)
    depthwise: list[Any] = field(default_factory=list)


class _Channels:
    """Which values of a graph have which channels: groups are united as operations tie values together."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._parents: dict[str, str] = {}
        self._groups: dict[str, _Group] = {}
        for name in (*graph.output_names, *(each.name for each in graph.inputs)):
            self._block(name)
        for node in graph.nodes:
            self._read(node)

    def groups(self) -> list[_Group]:
        """The groups whose channels may be padded."""
        return [group for group in self._groups.values() if not group.blocked and group.channels]

    def _root(self, name: str) -> str:
        while name in self._parents:
            name = self._parents[name]
        if name not in self._groups:
            shape = self._graph.shape(name)
            channels = shape[1] if shape is not None and len(shape) in (2, 4) else None
            self._groups[name] = _Group(channels or 0, blocked=channels is None)
        return name

    def _of(self, name: str) -> _Group:
        return self._groups[self._root(name)]

    def _block(self, *names: str) -> None:
        for name in names:
            if name:
                self._of(name).blocked = True

    def _unite(self, a: str, b: str) -> None:
        first, second = self._root(a), self._root(b)
        if first == second:
            return
        one, other = self._groups[first], self._groups.pop(second)
        self._parents[second] = first
        one.blocked |= other.blocked or one.channels != other.channels
        one.constants += other.constants
        one.depthwise += other.depthwise

    def _ties(self, value: str, node: Any, place: int, axis: int, filler: float = 0.0) -> None:
        self._of(value).constants.append((node, place, axis, filler))

    def _read(self, node: Any) -> None:
        handled = {"Conv": self._read_conv, "BatchNormalization": self._read_norm, "Gemm": self._read_product}
        handled |= {"MatMul": self._read_product, **dict.fromkeys(_BINARY, self._read_binary)}
        if node.op_type in handled and handled[node.op_type](node):
            return
        takes, gives = node.input[0] if node.input else "", node.output[0]
        if node.op_type in _ELEMENTWISE or (node.op_type in _POOLINGS and self._keeps_channels(node)):
            self._unite(takes, gives)
        elif node.op_type != "Constant":
            self._block(*(name for name in node.input if name not in self._graph.constants), *node.output)

    def _keeps_channels(self, node: Any) -> bool:
        """Whether a pooling, or a flattening of one pixel, leaves the channels where they are."""
        takes, gives = (self._graph.shape(name) for name in (node.input[0], node.output[0]))
        return takes is not None and gives is not None and len(gives) >= 2 and takes[1] == gives[1]

    def _read_conv(self, node: Any) -> bool:
        weight, group = self._graph.constants.get(node.input[1]), self._graph.attribute(node, "group", 1)
        bias = node.input[2] if len(node.input) > 2 else ""
        if weight is None or weight.ndim != 4 or (bias and bias not in self._graph.constants):
            return False
        takes, gives = node.input[0], node.output[0]
        if group == 1:
            self._ties(takes, node, 1, 1)
        elif group == weight.shape[0] and weight.shape[1] == 1:
            self._unite(takes, gives)
            self._of(gives).depthwise.append(node)
        else:
            return False
        self._ties(gives, node, 1, 0)
        if bias:
            self._ties(gives, node, 2, 0)
        return True

    def _read_norm(self, node: Any) -> bool:
        if any(name not in self._graph.constants for name in node.input[1:5]) or len(node.output) > 1:
            return False
        self._unite(node.input[0], node.output[0])
        for place in range(1, 5):
            self._ties(node.output[0], node, place, 0, 1.0 if place == 4 else 0.0)
        return True

    def _read_product(self, node: Any) -> bool:
        """A classifier: its weights have an entry for each channel that it reads; what it gives is left."""
        weight = self._graph.constants.get(node.input[1])
        if weight is None or weight.ndim != 2 or self._graph.attribute(node, "transA", 0):
            return False
        axis = 1 if self._graph.attribute(node, "transB", 0) else 0
        if self._graph.shape(node.input[0]) != (1, weight.shape[axis]):
            return False
        self._ties(node.input[0], node, 1, axis)
        self._block(node.output[0])
        return True

    def _read_binary(self, node: Any) -> bool:
        gives = node.output[0]
        rank = len(self._graph.shape(gives) or ())
        for place, name in enumerate(node.input):
            constant = self._graph.constants.get(name)
            channels = self._of(gives).channels
            if constant is not None and constant.size > 1:
                if (
                    constant.ndim + 1 < rank
                    or constant.size != channels
                    or constant.shape[constant.ndim - rank + 1] != channels
                ):
                    return False
                self._ties(gives, node, place, constant.ndim - rank + 1, 1.0)
            elif constant is None:
                shape = self._graph.shape(name)
                if shape is None or len(shape) != rank or shape[1] != channels:
                    return False
                self._unite(gives, name)
        # 0 / 0 in a padded channel would be no number, and times a weight of zero stay none.
        return node.op_type != "Div" or node.input[1] in self._graph.constants


def pad_channels_(graph: OnnxGraph, block: int) -> list[int]:
    """Pad channels to multiples of `block` wherever that leaves the answers, in place; the widths that were padded."""
    _flatten_pixels_(graph)
    padded = []
    work: dict[tuple[str, int], tuple[Any, list[tuple[int, int, float]]]] = {}
    for group in _Channels(graph).groups():
        missing = -group.channels % block
        if not missing or not group.constants:
            continue
        padded.append(group.channels)
        for node, place, axis, filler in group.constants:
            work.setdefault((node.output[0], place), (node, []))[1].append((axis, missing, filler))
        for node in group.depthwise:
            graph.set_attribute(node, "group", group.channels + missing)
    for (_, place), (node, changes) in work.items():
        value = graph.constants[node.input[place]]
        for axis, missing, filler in changes:
            widths = [(0, missing if each == axis else 0) for each in range(value.ndim)]
            value = np.pad(value, widths, constant_values=filler)
        node.input[place] = graph.add_constant(value, "padded")
    return sorted(padded)


def _flatten_pixels_(graph: OnnxGraph) -> None:
    """Write reshapes of maps of one pixel to rows as Flatten, which names no number of channels, in place."""
    for node in graph.nodes:
        takes, gives = (graph.shape(name) for name in (node.input[0] if node.input else "", node.output[0]))
        is_pixel = takes is not None and len(takes) == 4 and takes[2:] == (1, 1) and gives == takes[:2]
        if node.op_type in ("Reshape", "Squeeze") and is_pixel:
            source, name = node.input[0], node.output[0]
            graph.remove([node])
            graph.add_node("Flatten", [source], name, axis=1)
    graph.reindex()


def _block_of(case: Case) -> int:
    return next((block for feature, block in _BLOCKS.items() if feature in case.features), 8)


def _detect_odd_channels(case: Case) -> Iterable[Remedy]:
    block = _block_of(case)
    graph = case.variant.graph()
    before, widths = case.graph.total_macs(), pad_channels_(graph, block)
    if not widths:
        return
    after = OnnxGraph(graph.serialize(), case.variant.batch).total_macs()
    if before and after > 2 * before:
        return  # so much more work is no remedy
    touched = [
        node
        for node in case.graph.nodes
        if node.op_type == "Conv" and any((size or 0) % block for size in (case.graph.shape(node.input[1]) or ())[:2])
    ]

    def apply(variant: Variant) -> Variant | None:
        changed = variant.graph()
        return replace(variant, content=changed.serialize()) if pad_channels_(changed, block) else None

    kinds = ", ".join(map(str, sorted(set(widths))))
    yield Remedy(
        rule=CHANNELS,
        finding=f"channels that are no multiple of {block}: {kinds}",
        evidence=case.evidence(touched),
        change=f"pad them with zeros to multiples of {block}: {100 * (after / before - 1):.0f} % more multiply-adds"
        if before
        else f"pad them with zeros to multiples of {block}",
        apply=apply,
        command=case.apply_command("channels"),
    )


CHANNELS = Rule(
    name="channels",
    looks_for="channels that are no multiple of what the runtime's kernels take at once",
    remedy="pad them with zeros: the answers stay",
    source="ONNX Runtime's NCHWc kernels (mlas) and oneDNN's blocked layouts, whose blocks are vectors of 16, 8 or 4",
    detect=_detect_odd_channels,
    order=5,
)
