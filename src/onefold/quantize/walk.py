"""A walk through the network in floating point, all batches abreast, only what is still read kept in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from onefold.quantize.graph import parameter
from onefold.quantize.qparams import Grid, Ranges, choose


@torch.no_grad()
def ranges_of(
    graph: GraphModule, batches: Sequence[Tensor], nodes: Collection[Node], ranges: Ranges
) -> dict[Node, Grid]:
    """The grid that each of these nodes' values would have."""
    values: dict[Node, list[object]] = {}
    found: dict[Node, Grid] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        values[node] = valued(graph, node, values, batches)
        if node in nodes:
            found[node] = choose([x for x in values[node] if isinstance(x, Tensor)], ranges)
        for before in node.all_input_nodes:
            if all(user in values for user in before.users):
                del values[before]
    return found


def valued(
    graph: GraphModule, node: Node, values: Mapping[Node, list[object]], batches: Sequence[Tensor]
) -> list[object]:
    """What a node gives for each batch, from what those before it gave."""
    if node.op == "placeholder":
        return list(batches)
    if node.op == "get_attr":
        return [parameter(graph, str(node.target))] * len(batches)

    def call(at: int) -> object:
        def value(before: Node) -> Any:
            return values[before][at]

        assert callable(node.target)
        return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    return [call(at) for at in range(len(batches))]
