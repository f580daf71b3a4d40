"""A fused network as a torch.fx graph: its layers, and the activations between them that are quantized.

A *layer* is a convolution on a feature map, or the Linear that returns the logits; the small products of gates and
tokens stay in floating point. A quantized *activation* is a node of the graph whose value is stored in 8 bits: the
input of a layer, and its output after the ReLU (or clamp) that directly follows it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from onefold.errors import BadArgument

_T = TypeVar("_T")
aten = torch.ops.aten
CONV_OPS = (aten.conv2d.default, aten.conv2d.padding)
POOL_OPS = (aten.mean.dim, aten.adaptive_avg_pool2d.default)
LINEAR_OPS = (aten.linear.default,)
CLAMP_OPS = (
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default,
    aten.relu6.default, aten.relu6_.default, aten.clamp.default, aten.clamp_min.default,
)  # fmt: skip
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
PASSTHROUGH_OPS = (aten.dropout.default, aten.flatten.using_ints, aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class Layer:
    """A convolution or Linear of the graph; `name` is its module's, `output` the node after its ReLU or clamp."""

    name: str
    node: Node
    source: Node
    output: Node
    groups: int
    is_conv: bool

    @property
    def weight(self) -> str:
        """The attribute that holds its kernel (O, I/G, H, W) or matrix (O, I)."""
        return _attribute_name(self.node.args[1])

    @property
    def bias(self) -> str | None:
        """The attribute that holds its bias (O,), if it has one."""
        given = self.node.args[2] if len(self.node.args) > 2 else None
        return None if given is None else _attribute_name(given)


def clamp_bounds(clamp: object, args: tuple[object, ...]) -> tuple[float, float]:
    """The least and the greatest value that one of CLAMPS lets through, given what follows its first argument."""
    if clamp in (aten.relu.default, aten.relu_.default):
        return 0.0, math.inf
    if clamp in (aten.relu6.default, aten.relu6_.default):
        return 0.0, 6.0
    default = (-1.0, 1.0) if clamp in (aten.hardtanh.default, aten.hardtanh_.default) else (-math.inf, math.inf)
    low, high = (*args, None, None)[:2]
    return default[0] if low is None else float(low), default[1] if high is None else float(high)  # type: ignore[arg-type]


def trace(model: nn.Module, images: Tensor) -> GraphModule:
    """Trace the network to a graph with copied weights; `images` (B >= 2, C, H, W) are an example."""
    program = torch.export.export(copy.deepcopy(model), (images,), dynamic_shapes=({0: Dim("batch")},))
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    for module in graph.modules():
        module.training = False  # an exported graph has no modes, but its flag says that it trains
    return graph


def find_layers(graph: GraphModule) -> list[Layer]:
    """List the layers in execution order. Raises BadArgument where there are none."""
    result = list(_layers(graph))
    if not result:
        raise BadArgument("this network has no convolution that could be quantized")
    return result


def quantized_activations(of_layers: list[Layer]) -> list[Node]:
    """List every quantized activation of these layers once, in order; a zero-padded one before and after padding."""
    ordered: dict[Node, None] = {}
    for layer in of_layers:
        if (before := zero_padding_input(layer.source)) is not None:
            ordered[before] = None
        ordered |= {layer.source: None, layer.output: None}
    return list(ordered)


def zero_padding_input(node: Node) -> Node | None:
    """Find what a node pads with zeros, which quantization represents exactly; None where it is no such padding."""
    if node.target not in _PADS or (any(node.args[2:]) and node.args[2:] != ("constant",)):
        return None
    return _skip_passthrough(node.args[0]) if isinstance(node.args[0], Node) else None


def get_parameter(graph: GraphModule, name: str) -> Tensor:
    """Get the tensor of an attribute such as "stem.conv.weight"."""
    holder, _, last = name.rpartition(".")
    value = getattr(graph.get_submodule(holder), last)
    assert isinstance(value, Tensor)
    return value.detach()


def set_parameter(graph: GraphModule, name: str, value: Tensor) -> None:
    """Replace the values of an attribute."""
    holder, _, last = name.rpartition(".")
    getattr(graph.get_submodule(holder), last).data = value.contiguous()


def _layers(graph: GraphModule) -> Iterator[Layer]:
    output = next(node for node in graph.graph.nodes if node.op == "output")
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in (*CONV_OPS, *LINEAR_OPS):
            continue
        is_conv = node.target in CONV_OPS
        is_layer = not _is_gate(node) if is_conv else set(node.users) == {output}
        if not is_layer or not isinstance(node.args[0], Node):
            continue
        name = _attribute_name(node.args[1]).rpartition(".")[0]
        groups = node.args[6] if is_conv and len(node.args) > 6 else 1
        assert isinstance(groups, int)
        yield Layer(name, node, _skip_passthrough(node.args[0]), _clamp_after(node), groups, is_conv)


def _is_gate(conv: Node) -> bool:
    """Whether a convolution belongs to a gate (squeeze and excitation): its input was pooled over the map."""
    source = conv.args[0]
    assert isinstance(source, Node)
    before = _skip_passthrough(source)
    if before.target in CLAMP_OPS and isinstance(before.args[0], Node):
        before = before.args[0]
    return before.target in POOL_OPS or (before.target in CONV_OPS and _is_gate(before))


def _skip_passthrough(node: Node) -> Node:
    """Find the node that computes a value, before dropout and changes of shape."""
    while node.target in PASSTHROUGH_OPS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _clamp_after(node: Node) -> Node:
    """Find the ReLU or clamp that is the only reader of a layer; the layer itself where there is none."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in CLAMP_OPS else node


def _attribute_name(node: object) -> str:
    if not isinstance(node, Node) or node.op != "get_attr":
        raise BadArgument("a layer's weights are computed in the network: fuse it first")
    return str(node.target)


def compute_node(
    graph: GraphModule, node: Node, values: Mapping[Node, list[object]], batches: Sequence[Tensor]
) -> list[object]:
    """Compute a node's value for each batch, from the `values` of the nodes before it.

    The graph is evaluated node by node with all batches side by side, rather than batch by batch, because calibration
    must see all values of a node before it can quantize it and go on.
    """
    if node.op == "placeholder":
        return list(batches)
    if node.op == "get_attr":
        return [get_parameter(graph, str(node.target))] * len(batches)

    def compute(batch: int) -> object:
        def argument(before: Node) -> Any:
            return values[before][batch]

        assert callable(node.target)
        return node.target(*map_arg(node.args, argument), **map_arg(node.kwargs, argument))

    return map_over_batches(compute, range(len(batches)))


_TASKS_A_THREAD = 2
_workers: ContextVar[tuple[Executor, int] | None] = ContextVar("workers", default=None)  # and how many they are


@contextmanager
def parallel_batches() -> Iterator[None]:
    """Let `map_over_batches` compute as many batches at a time as torch has threads, each on one of them.

    What is computed then does not depend on the number of threads, to the bit: torch's own threads divide a sum among
    them. Inside of another such block nothing changes.
    """
    count = torch.get_num_threads()
    if _workers.get() is not None:
        yield
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1)) as pool:
            token = _workers.set((pool, count))
            try:
                yield
            finally:
                _workers.reset(token)
    finally:
        torch.set_num_threads(count)


def map_over_batches(function: Callable[..., _T], *columns: Iterable[Any]) -> list[_T]:
    """Call the function, without gradients, for each row of the columns, which belong to batches."""

    def without_gradients(rows: Iterable[tuple[Any, ...]]) -> list[_T]:
        with torch.no_grad():
            return [function(*row) for row in rows]

    rows = [*zip(*columns, strict=False)]
    if (workers := _workers.get()) is None or not rows:
        return without_gradients(rows)
    pool, count = workers
    # Several rows at a time: a batch of small maps is computed in the time that it takes to hand it to another thread.
    size = -(-len(rows) // (_TASKS_A_THREAD * count))
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [result for part in pool.map(without_gradients, parts) for result in part]


def free_used_inputs(node: Node, *values: dict[Node, list[object]]) -> None:
    """Delete the values of a node's inputs that no later node reads; `values` hold every node computed so far."""
    for before in node.all_input_nodes:
        if all(user in values[0] for user in before.users):
            for held in values:
                del held[before]
