"""Rules about activations and gates: what they cost against cheaper forms. All of them change the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onefold.advisor.onnx_graph import OnnxGraph
from onefold.advisor.rule import Case, Remedy, Rule
from onefold.advisor.variant import Variant

_HARD_SWISH_OPSET = 14
_GATE_DEPTH = 10  # operations from a gate back to the pooling that it is computed from
_POOLS = ("GlobalAveragePool", "ReduceMean")


@dataclass(frozen=True, eq=False)
class Activation:
    """One activation as it is written in a graph: all its `nodes`, the value that it takes, the one that it gives."""

    kind: str
    nodes: tuple[Any, ...]
    takes: str
    gives: str


@dataclass(frozen=True, eq=False)
class Gate:
    """A squeeze-and-excite gate: the product, the map that it scales, and the nodes that compute the scale."""

    product: Any
    takes: str
    nodes: tuple[Any, ...]


def find_activations(graph: OnnxGraph) -> list[Activation]:
    """The smooth and the hard activations of a graph, each with all the nodes that it is written with."""
    found, used = list[Activation](), set[str]()
    for node in graph.nodes:
        match = _ending_at(graph, node)
        if match is not None and not used & {each.output[0] for each in match.nodes}:
            found.append(match)
            used |= {each.output[0] for each in match.nodes}
    for node in graph.nodes:  # what is left are gates, and sigmoids of their own
        if node.op_type == "Sigmoid" and node.output[0] not in used:
            found.append(Activation("sigmoid", (node,), node.input[0], node.output[0]))
    return found


def _ending_at(graph: OnnxGraph, node: Any) -> Activation | None:
    if node.op_type == "Gelu":
        return Activation("GELU", (node,), node.input[0], node.output[0])
    if node.op_type == "HardSwish":
        return Activation("hard-swish", (node,), node.input[0], node.output[0])
    if node.op_type != "Mul" or len(node.input) != 2:
        return None
    for takes, name in (node.input, node.input[::-1]):
        inner = graph.producers.get(name)
        is_gate = inner is not None and inner.op_type in ("Sigmoid", "HardSigmoid") and inner.input[0] == takes
        if inner is not None and is_gate and graph.sole_reader(name) is not None:
            kind = "SiLU" if inner.op_type == "Sigmoid" else "hard-swish"
            return Activation(kind, (inner, node), takes, node.output[0])
    return _gelu_by_erf(graph, node)


def _gelu_by_erf(graph: OnnxGraph, last: Any) -> Activation | None:
    """GELU written out: 0.5 x (1 + erf(x / sqrt 2)), the products in any order."""
    nodes, values, constants = [last], list(last.input), list[float]()
    names = list[str]()
    while values:
        name = values.pop()
        node = graph.producers.get(name)
        if name in graph.constants and graph.constants[name].size == 1:
            constants.append(float(graph.constants[name].reshape(())))
        elif node is not None and node.op_type == "Mul" and graph.sole_reader(name) is not None and len(nodes) < 3:
            nodes.append(node)
            values += node.input
        else:
            names.append(name)
    adds = [graph.producers.get(name) for name in names]
    add = next((n for n in adds if n is not None and n.op_type == "Add"), None)
    if add is None or len(names) != 2 or not any(abs(c - 0.5) < 1e-6 for c in constants):
        return None
    takes = next(name for name in names if name != add.output[0])
    erf = next((graph.producers.get(n) for n in add.input if n not in graph.constants), None)
    scaled = None if erf is None or erf.op_type != "Erf" else graph.producers.get(erf.input[0])
    if erf is None or scaled is None or scaled.op_type not in ("Mul", "Div") or takes not in scaled.input:
        return None
    return Activation("GELU", (*nodes, add, erf, scaled), takes, last.output[0])


def _harden(graph: OnnxGraph, found: Activation) -> str | None:
    """Write the hard form of an activation; the value that it gives, None where it has none."""
    if found.kind == "sigmoid":
        return graph.add_node("HardSigmoid", [found.takes], alpha=1 / 6, beta=0.5)
    if found.kind == "SiLU" and graph.opset >= _HARD_SWISH_OPSET:
        return graph.add_node("HardSwish", [found.takes])
    if found.kind in ("SiLU", "GELU"):  # GELU is near x sigmoid(1.702 x): Hendrycks and Gimpel, arXiv 1606.08415
        slope = 1.702 if found.kind == "GELU" else 1.0
        gate = graph.add_node("HardSigmoid", [found.takes], alpha=slope / 6, beta=0.5)
        return graph.add_node("Mul", [found.takes, gate])
    return None


def _relu(graph: OnnxGraph, found: Activation) -> str | None:
    return None if found.kind == "sigmoid" else graph.add_node("Relu", [found.takes])


def replace_activations(variant: Variant, write: Callable[[OnnxGraph, Activation], str | None]) -> Variant | None:
    """The variant with each activation as `write` writes it; None where there is none to replace."""
    graph, written = variant.graph(), dict[str, str]()
    for found in find_activations(graph):
        if found.gives in graph.output_names:
            continue
        made = write(graph, replace(found, takes=written.get(found.takes, found.takes)))
        if made is not None:
            graph.connect_readers(found.gives, made)
            written[found.gives] = made
    return replace(variant, content=graph.serialize()) if written else None


def _detect_smooth(case: Case) -> Iterable[Remedy]:
    found = [each for each in find_activations(case.graph) if each.kind != "hard-swish"]
    if not found:
        return
    nodes = [node for each in found for node in each.nodes]
    yield Remedy(
        rule=HARD,
        finding=f"smooth activations: {_counted(found)}",
        evidence=case.evidence(nodes),
        change="their hard forms (hard-sigmoid, hard-swish), with which the network has to be trained on",
        predicted=case.without(nodes),
        apply=lambda variant: replace_activations(variant, _harden),
        command=case.apply_command("hard-activations"),
    )


def _detect_not_relu(case: Case) -> Iterable[Remedy]:
    found = [each for each in find_activations(case.graph) if each.kind != "sigmoid"]
    if not found:
        return
    nodes = [node for each in found for node in each.nodes]
    yield Remedy(
        rule=RELU,
        finding=f"activations that are no ReLU: {_counted(found)}",
        evidence=case.evidence(nodes),
        change="ReLU in their place, with which the network has to be trained anew",
        predicted=case.without(nodes),
        apply=lambda variant: replace_activations(variant, _relu),
        command=case.apply_command("relu"),
    )


def find_gates(graph: OnnxGraph) -> list[Gate]:
    """The squeeze-and-excite gates of a graph: a map times a number a channel that is computed from its mean."""
    found = []
    for node in graph.nodes:
        if node.op_type != "Mul" or node.output[0] in graph.output_names:
            continue
        for takes, scale in (node.input, node.input[::-1]):
            shape = graph.shape(scale)
            nodes = _computed_from_mean(graph, scale, takes)
            if shape is not None and len(shape) == 4 and shape[2:] == (1, 1) and nodes:
                found.append(Gate(node, takes, (*nodes, node)))
                break
    return found


def _computed_from_mean(graph: OnnxGraph, scale: str, takes: str) -> list[Any]:
    """The nodes from the mean of the map `takes` to `scale`; none where it is not computed from that."""
    nodes, values = list[Any](), [scale]
    while values and len(nodes) <= _GATE_DEPTH:
        node = graph.producers.get(values.pop())
        if node is None or node in nodes:
            continue
        nodes.append(node)
        if node.op_type in _POOLS:
            return nodes if node.input[0] == takes and not values else []
        values += [name for name in node.input if name and name not in graph.constants]
    return []


def _without_gates(variant: Variant) -> Variant | None:
    graph = variant.graph()
    gates = find_gates(graph)
    for gate in gates:
        graph.connect_readers(gate.product.output[0], gate.takes)
    return replace(variant, content=graph.serialize()) if gates else None


def _detect_gates(case: Case) -> Iterable[Remedy]:
    gates = find_gates(case.graph)
    if not gates:
        return
    nodes = [node for gate in gates for node in gate.nodes]
    yield Remedy(
        rule=GATES,
        finding=f"{len(gates)} squeeze-and-excite gates",
        evidence=case.evidence(nodes),
        change="the network without them, which has to be trained anew",
        predicted=case.without(nodes),
        apply=_without_gates,
        command=case.apply_command("gates"),
    )


def _counted(found: Iterable[Activation]) -> str:
    kinds, counts = np.unique([each.kind for each in found], return_counts=True)
    return ", ".join(f"{count} {kind}" for kind, count in zip(kinds, counts, strict=True))


HARD = Rule(
    name="hard-activations",
    looks_for="sigmoid, SiLU and GELU",
    remedy="hard-sigmoid and hard-swish",
    source="MobileNetV3 (arXiv 1905.02244), section 5.2; MobileOne (arXiv 2206.04040), table 2",
    detect=_detect_smooth,
    order=4,
    changes_answers=True,
)
RELU = Rule(
    name="relu",
    looks_for="SiLU, GELU and hard-swish",
    remedy="ReLU, which runtimes compute inside the convolution",
    source="MobileOne (arXiv 2206.04040), table 2",
    detect=_detect_not_relu,
    order=4,
    changes_answers=True,
)
GATES = Rule(
    name="gates",
    looks_for="squeeze-and-excite gates",
    remedy="the network without them",
    source="MobileOne (arXiv 2206.04040), table 3",
    detect=_detect_gates,
    order=4,
    changes_answers=True,
)
ACTIVATION_RULES = (HARD, RELU, GATES)
