"""A fused network as a graph: its layers, and the points between them whose values are put on grids.

A *layer* is a convolution on a map, or the Linear that gives the answer; the small products of gates and tokens stay in
floating point. A *point* is a node of the graph whose value is stored in 8 bits: what a layer reads, and what it gives
after the ReLU (or clamp) that directly follows it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from onefold.errors import BadArgument

aten = torch.ops.aten
CONVS = (aten.conv2d.default, aten.conv2d.padding)
POOLS = (aten.mean.dim, aten.adaptive_avg_pool2d.default)
LINEARS = (aten.linear.default,)
CLAMPS = (
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default,
    aten.relu6.default, aten.relu6_.default, aten.clamp.default, aten.clamp_min.default,
)  # fmt: skip
PADS = (aten.pad.default, aten.constant_pad_nd.default)
SAME = (aten.dropout.default, aten.flatten.using_ints, aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class Layer:
    """A convolution or Linear of the graph: `name` is its module's, `output` its value after its ReLU or clamp."""

    name: str
    node: Node
    source: Node
    output: Node
    groups: int
    is_conv: bool

    @property
    def weight(self) -> str:
        """The attribute that holds its kernel (O, I/G, H, W) or matrix (O, I)."""
        return _target(self.node.args[1])

    @property
    def bias(self) -> str | None:
        """The attribute that holds its bias (O,), if it has one."""
        given = self.node.args[2] if len(self.node.args) > 2 else None
        return None if given is None else _target(given)


def bounds_of(clamp: object, args: tuple[object, ...]) -> tuple[float, float]:
    """The least and the greatest value that one of CLAMPS lets through, given what follows its first argument."""
    if clamp in (aten.relu.default, aten.relu_.default):
        return 0.0, math.inf
    if clamp in (aten.relu6.default, aten.relu6_.default):
        return 0.0, 6.0
    default = (-1.0, 1.0) if clamp in (aten.hardtanh.default, aten.hardtanh_.default) else (-math.inf, math.inf)
    low, high = (*args, None, None)[:2]
    return default[0] if low is None else float(low), default[1] if high is None else float(high)  # type: ignore[arg-type]


def trace(model: nn.Module, images: Tensor) -> GraphModule:
    """The network as a graph that runs by itself, its weights copied; `images` (B >= 2, C, H, W) are an example."""
    program = torch.export.export(copy.deepcopy(model), (images,), dynamic_shapes=({0: Dim("batch")},))
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    for part in graph.modules():
        part.training = False  # an exported graph has no modes, and says that it trains
    return graph


def layers(graph: GraphModule) -> list[Layer]:
    """The layers in the order in which they run. Raises BadArgument where there are none."""
    found = list(_layers(graph))
    if not found:
        raise BadArgument("this network has no convolution that could be quantized")
    return found


def points(found: list[Layer]) -> list[Node]:
    """Every point of these layers, once, in order; what is padded with zeros is one before and after."""
    ordered: dict[Node, None] = {}
    for layer in found:
        if (before := padded(layer.source)) is not None:
            ordered[before] = None
        ordered |= {layer.source: None, layer.output: None}
    return list(ordered)


def padded(node: Node) -> Node | None:
    """What a node pads with zeros, which every grid has; None where it does something else."""
    if node.target not in PADS or (any(node.args[2:]) and node.args[2:] != ("constant",)):
        return None
    return _origin(node.args[0]) if isinstance(node.args[0], Node) else None


def parameter(graph: GraphModule, name: str) -> Tensor:
    """The tensor of an attribute such as "stem.conv.weight"."""
    holder, _, last = name.rpartition(".")
    value = getattr(graph.get_submodule(holder), last)
    assert isinstance(value, Tensor)
    return value.detach()


def put(graph: GraphModule, name: str, value: Tensor) -> None:
    """Give an attribute other values."""
    holder, _, last = name.rpartition(".")
    getattr(graph.get_submodule(holder), last).data = value.contiguous()


def _layers(graph: GraphModule) -> Iterator[Layer]:
    answer = next(node for node in graph.graph.nodes if node.op == "output")
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in (*CONVS, *LINEARS):
            continue
        is_conv = node.target in CONVS
        kept = not _reads_pooled(node) if is_conv else _is_last(node, answer)
        if not kept or not isinstance(node.args[0], Node):
            continue
        name = _target(node.args[1]).rpartition(".")[0]
        groups = node.args[6] if is_conv and len(node.args) > 6 else 1
        assert isinstance(groups, int)
        yield Layer(name, node, _origin(node.args[0]), _clamped(node), groups, is_conv)


def _reads_pooled(conv: Node) -> bool:
    """Whether a convolution is a gate's: what it reads was pooled over the map before."""
    source = conv.args[0]
    assert isinstance(source, Node)
    before = _origin(source)
    if before.target in CLAMPS and isinstance(before.args[0], Node):
        before = before.args[0]
    return before.target in POOLS or (before.target in CONVS and _reads_pooled(before))


def _is_last(node: Node, answer: Node) -> bool:
    return set(node.users) == {answer}


def _origin(node: Node) -> Node:
    """The node that computes a value, past what only passes it on."""
    while node.target in SAME and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _clamped(node: Node) -> Node:
    """The ReLU or clamp that alone reads a layer's value, or the layer."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in CLAMPS else node


def _target(node: object) -> str:
    if not isinstance(node, Node) or node.op != "get_attr":
        raise BadArgument("a layer's weights are computed in the network: fuse it first")
    return str(node.target)
