"""`accelerate` trains networks of other projects by our routes: the same numbers, and for some of them in less time.

Given a batch it times each block both ways, and leaves those as they are that are no faster so (`measured_routes`).

Linear trees are found by their structure, in a symbolic trace of the network's forward pass: convolutions and norms in
series, parallel branches, skips, layer scales, whatever their classes are called. The smallest block that holds a whole
tree gets another forward for training, in which the tree is one step; its layers stay where they are, with their
parameters, buffers and names in the state_dict.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.branches import has_hooks
from onefold.reparam.find_linear_trees import (
    SingleInputModule,
    TrainingForward,
    TrainingTracer,
    find_linear_trees,
    is_foldable_norm,
    traced_facts,
)
from onefold.reparam.folding_rules import Chain, Sum
from onefold.reparam.linear_trees import LinearTree
from onefold.reparam.measured_routes import PLAIN, measure_routes, set_routes_
from onefold.reparam.routes import quickest, set_route_

_MOST_TRACES = 4  # of one block, whose attributes change between calls


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` took of a network: the names of the layers, and why other norms were left, by their names.

    `routes` are those that were measured to be the fastest, by the path of a block: `per_branch` is its own forward.
    """

    taken: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    routes: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        rest = "; ".join(
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({reason})"
            for reason, names in by_reason.items()
        )
        return f"{len(self.taken)} layers are taken" + (f", {len(self.left)} norms are left: {rest}" if rest else "")


def accelerate(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Train the linear trees of `model` by the quickest exact route, in place; gives the model back.

    Which route is quickest is estimated by a count of operations, which may be wrong for this processor: give `images`
    (B, C, H, W), a batch of the size that will be trained on, and each block is timed, in a few seconds, within the
    autocast region around this call; where plain torch is as fast, the block stays as it is. On a CPU; the next call
    in another process may choose otherwise where two routes are about as fast, and the last bits with it.

    Trees are convolutions with their norms, alone or in parallel, with skips, layer scales and norms after the sum, in
    whatever blocks they stand. Only training changes, and only its speed: values, gradients and running statistics stay
    within rounding, parameters and state_dict untouched. What was taken and what was left, and why, is in the model's
    attribute `acceleration`. A network in which nothing can be taken is given back as it is, with a warning that says
    why. `del block.forward` puts a block back.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    trees = [name for name, module in model.named_modules() if isinstance(module, (Chain, Sum))]
    set_route_(model, quickest)
    ours = [name for name in norms if any(name.startswith(f"{tree}.") or not tree for tree in trees)]
    found = _Search(model).run()
    for path, layers in found.owners.items():
        block = model.get_submodule(path)
        block.forward = _Forward(block, [model.get_submodule(name) for name in layers], found.inlined[path])
    taken = {name for layers in found.owners.values() for name in layers} | set(ours)
    left = {
        name: found.left.get(
            name, "no forward pass reaches it" if is_foldable_norm(norm) else "it is of vectors, not of maps"
        )
        for name, norm in norms.items()
        if name not in taken
    }
    model.acceleration = Acceleration(  # type: ignore[assignment]
        tuple(n for n, _ in model.named_modules() if n in taken), left
    )
    if images is not None:
        set_measured_routes_(model, measure_routes(copy.deepcopy(model), images, {}))
    if not taken:
        why = str(model.acceleration) if norms else "it has no norm with statistics"
        warnings.warn(f"{type(model).__name__} trains as it is, nothing of it was accelerated: {why}", stacklevel=2)
    return model


def set_measured_routes_(model: nn.Module, choices: Mapping[str, str]) -> list[str]:
    """Have the parts of a network, accelerated or ours, train by the routes chosen for their paths, in place.

    Blocks for which nothing was chosen, or `per_branch`, get their own forward back. Gives the paths that are no part
    of this network that could be taken.
    """
    blocks = {p: m for p, m in model.named_modules() if isinstance(vars(m).get("forward"), _Forward)}
    names = {id(module): name for name, module in model.named_modules()}
    back = {p: m.forward.layers for p, m in blocks.items() if choices.get(p, PLAIN) == PLAIN}
    unknown = set_routes_(model, {**dict.fromkeys(blocks, PLAIN), **choices})
    told = getattr(model, "acceleration", None)
    if isinstance(told, Acceleration):
        given_back = {names[id(layer)]: layer for layers in back.values() for layer in layers}
        norms = {name for name, layer in given_back.items() if isinstance(layer, _BatchNorm)}
        model.acceleration = Acceleration(  # type: ignore[assignment]
            tuple(name for name in told.taken if name not in given_back),
            {**told.left, **{name: "its block is as fast without" for name in told.taken if name in norms}},
            dict(choices),
        )
    return unknown


# ------------------------------------------------------------------------------------- training


class _Forward(TrainingForward):
    """The forward pass of a block whose linear trees are evaluated by routes; its own where they cannot be.

    It is what the trace of the block's own forward is, with one step for each tree. What the trace took for granted -
    training mode, plain attributes, no hooks - is compared at each call.
    """

    def __init__(self, block: nn.Module, layers: Sequence[nn.Module], inlined: Sequence[nn.Module]) -> None:
        self.block, self.layers, self.inlined = block, list(layers), list(inlined)
        self._program: Any = None
        self._seen: list[list[object]] = []
        self._traces = 0

    def __getstate__(self) -> dict[str, object]:
        return {"block": self.block, "layers": self.layers, "inlined": self.inlined}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["block"], state["layers"], state["inlined"])  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the block does."""
        block = self.block
        x = args[0] if args else None
        if len(args) != 1 or kwargs or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return type(block).forward(block, *args, **kwargs)
        if not all(m.training for m in self.inlined) or has_hooks((*self.inlined[1:], *self.layers)):
            return type(block).forward(block, x)
        seen = [traced_facts(module) for module in self.inlined]
        if self._program is None or seen != self._seen:
            if self._traces >= _MOST_TRACES:
                return type(block).forward(block, x)
            self._traces += 1
            self._program, self._seen = _program(block, self.layers, self.inlined), seen
        return self._program(SimpleNamespace(block=block), x)


def _program(block: nn.Module, layers: Sequence[nn.Module], inlined: Sequence[nn.Module]) -> Any:
    """The block's forward pass as a function of an object that has it as `block`, and of its input."""
    paths = {id(module): name for name, module in SingleInputModule(block).named_modules()}
    trace = TrainingTracer(block, {paths[id(module)] for module in inlined if id(module) in paths})
    kept = {paths[id(layer)] for layer in layers if id(layer) in paths}  # those that are still there
    steps: dict[fx.Node, fx.Node] = {}  # in place of the last nodes of trees
    for number, found in enumerate(find_linear_trees(trace.graph, block, kept).trees):

        def step(x: Tensor, tree: LinearTree = found.tree) -> Tensor:
            return tree(x)

        step.__name__ = f"linear_tree_{number}"
        with trace.graph.inserting_before(found.last):
            steps[found.last] = trace.graph.call_function(step, (steps.get(found.root, found.root),))
        found.last.replace_all_uses_with(steps[found.last])
        for node in reversed(found.nodes):
            trace.graph.erase_node(node)
    code = trace.graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"]


# --------------------------------------------------------------------------------------- search


class _Search:
    """Looks for linear trees in a network: in its trace, and in that of the parts of what cannot be traced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.owners: dict[str, list[str]] = {}  # of a block, by its path, the paths of its trees' layers
        self.inlined: dict[str, list[nn.Module]] = {}  # of such a block the modules that its trees reach through
        self.left: dict[str, str] = {}

    def run(self) -> _Search:
        self._search("", self.model)
        inlined = {path: {id(module) for module in modules[1:]} for path, modules in self.inlined.items()}
        for path in sorted(self.owners, key=lambda path: path.count("."), reverse=True):
            # A block through which another block's tree reaches is not called by itself any more.
            outer = next((o for o, ids in inlined.items() if id(self.model.get_submodule(path)) in ids), None)
            if outer is not None:
                self.owners[outer] += self.owners.pop(path)
                self.inlined[outer] += self.inlined.pop(path)
                inlined[outer] |= inlined.pop(path)
        return self

    def _search(self, path: str, block: nn.Module) -> None:
        if not any(is_foldable_norm(module) for module in block.modules()):
            return
        if type(block).forward is nn.Module.forward:  # a container
            self._search_parts(path, block)
            return
        inner = {name for name, module in SingleInputModule(block).named_modules() if _has_inner_norms(module)}
        try:
            trace = TrainingTracer(block, inner)
        except TypeError as error:  # it cannot be copied
            self._leave(path, block, str(error))
            return
        found = find_linear_trees(trace.graph, block, None)
        for name, reason in found.left.items():
            self.left[_joined(path, name)] = reason
        modules = dict(SingleInputModule(block).named_modules())
        for tree in found.trees:
            owner = _joined(path, tree.stack[-1])
            layers = [_joined(path, node.target) for node in tree.nodes if node.target in found.layers]
            inside = {name for node in tree.nodes for name in node.meta["stack"][len(tree.stack) :]}
            known = self.inlined.setdefault(owner, [modules[tree.stack[-1]]])
            known += [modules[name] for name in sorted(inside) if all(modules[name] is not m for m in known)]
            self.owners[owner] = list(dict.fromkeys([*self.owners.get(owner, []), *layers]))
        for name, reason in trace.blind.items():
            part = modules[name]
            self._leave(_joined(path, name), part, f"the forward pass of its block cannot be followed: {reason}")
            self._search_parts(_joined(path, name), part)

    def _search_parts(self, path: str, block: nn.Module) -> None:
        for key, child in block.named_children():
            self._search(f"{path}.{key}" if path else key, child)

    def _leave(self, path: str, block: nn.Module, reason: str) -> None:
        for name, module in block.named_modules():
            if isinstance(module, _BatchNorm):
                self.left[".".join(filter(None, (path, name)))] = reason


def _joined(path: str, target: object) -> str:
    """The path in the network of what a trace of the block at `path` calls block.NAME."""
    return ".".join(filter(None, (path, str(target).partition(".")[2])))


def _has_inner_norms(module: nn.Module) -> bool:
    """Whether a module has to be looked into: ours, and those whose forward was replaced, are left as they are."""
    if isinstance(module, (Chain, Sum, _BatchNorm, torch.jit.ScriptModule)):
        return False
    own = vars(module).get("forward")
    return (own is None or isinstance(own, _Forward)) and any(is_foldable_norm(part) for part in module.modules())
