"""Where a network of 8 bits loses: each layer alone on its grids, the rest in floating point, the answers compared.

What is measured is what counts, the change of the logits; a layer's own noise says little of what later ones make of
it. Mixed precision leaves in floating point those that cost most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from onefold.quantize.calibrate import Calibration, Kernel
from onefold.quantize.graph import Layer, layers
from onefold.quantize.qparams import Grid


@torch.no_grad()
def damage(graph: GraphModule, found: Calibration, batches: Sequence[Tensor]) -> dict[str, float]:
    """By layer: the noise that it alone - its kernel and what it gives - puts into the logits, over their power."""
    true = _answers(graph, {}, {}, batches)
    power = float(((true - true.mean(0)) ** 2).sum())
    costs = {}
    for layer in layers(graph):
        if layer in found.kernels:
            grids = {node: found.grids[node] for node in (layer.output,) if node in found.grids}
            answers = _answers(graph, grids, {layer.node: (layer, found.kernels[layer])}, batches)
            costs[layer.name] = float(((answers - true) ** 2).sum()) / power
    return costs


def _answers(
    graph: GraphModule,
    grids: Mapping[Node, Grid],
    kernels: Mapping[Node, tuple[Layer, Kernel]],
    batches: Sequence[Tensor],
) -> Tensor:
    return torch.cat([_Partly(graph, grids, kernels).run(batch) for batch in batches])


class _Partly(Interpreter):
    """The network in floating point, but for these points and kernels."""

    def __init__(
        self, graph: GraphModule, grids: Mapping[Node, Grid], kernels: Mapping[Node, tuple[Layer, Kernel]]
    ) -> None:
        super().__init__(graph)
        self._grids, self._kernels = grids, kernels

    def run_node(self, n: Node) -> Any:
        """The node's value."""
        if n in self._kernels:
            _, kernel = self._kernels[n]
            (x, *_), _ = self.fetch_args_kwargs_from_env(n)
            assert callable(n.target)
            value = n.target(x, kernel.weight, kernel.bias, *n.args[3:])
        else:
            value = super().run_node(n)
        return self._grids[n].snap(value) if n in self._grids else value
