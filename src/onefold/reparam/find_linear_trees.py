"""Finding linear trees in the trace of a block's training forward pass, by their structure.

A tree is a convolution with the norm after it, or more: parallel ones that are added, skips, layer scales, norms after
the sum - as much as one of the routes can evaluate. Nodes in it are read by the tree alone.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.branches import activation_clamp
from onefold.reparam.copy_network import copy_network
from onefold.reparam.dataflow import preserve_rng_states
from onefold.reparam.folding_rules import Scale, is_linear, padding
from onefold.reparam.linear_trees import (
    Expression,
    InputNode,
    LayerNode,
    LinearTree,
    ScaleNode,
    SumNode,
    as_branches,
    merged_geometry,
    tree_layers,
)

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_SUBTRACTIONS = (operator.sub, operator.isub, torch.sub)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class SingleInputModule(nn.Module):
    """A block under the name `block`, whose forward pass takes one argument."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        """The block's answer."""
        return self.block(x)


class TrainingForward:
    """The base of a forward pass that has been put in place of a block's own."""


class TrainingTracer(fx.Tracer):
    """The trace of a block in training, through the modules named in `inner`; `blind` says which it could not follow.

    It is one of a copy without values. What a forward pass does beside its answer shows in the copy: a module that
    draws random numbers, counts its calls or writes to its buffers is not followed.
    """

    def __init__(self, block: nn.Module, inner: set[str]) -> None:
        super().__init__()
        self.inner, self.blind, self.stack = inner, dict[str, str](), list[str]()
        with _generators_kept():
            self.graph = self.trace(SingleInputModule(_valueless(block)))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Follow the call of an inner module; any other is one node."""
        path = self.path_of_module(m)
        if path in self.inner:
            last, before = next(iter(reversed(self.graph.nodes))), _state(m)
            self.stack.append(path)
            try:
                answer = forward(*args, **kwargs)
                if _state(m) == before:
                    return answer
                self.blind[path] = "it draws random numbers, or keeps something"
            except Exception as error:  # a forward with control flow that depends on its input may raise anything
                self.blind[path] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            finally:
                self.stack.pop()
            for name in [name for name in self.blind if name.startswith(f"{path}.")]:
                del self.blind[name]
            while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                self.graph.erase_node(node)
        return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Give parameters as they are, so that a forward that asks what they are gets the answer that it would get."""
        return attr_val

    def create_arg(self, a: Any) -> Any:
        """Refuse a tensor that a forward pass makes by itself: it would become a constant."""
        if isinstance(a, Tensor) and all(a is not t for t in (*self.root.parameters(), *self.root.buffers())):
            raise ValueError("it computes with a tensor that it makes itself")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note in which modules a node is."""
        node = super().create_node(*args, **kwargs)
        node.meta["stack"] = tuple(self.stack)
        return node


def _valueless(block: nn.Module) -> nn.Module:
    """A copy in train mode whose tensors have no values, and without forward passes of ours."""
    memo: dict[int, object] = {}
    for module in block.modules():
        for p in module._parameters.values():
            if p is not None and not isinstance(p, nn.UninitializedParameter):
                memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        memo.update({id(b): torch.empty_like(b, device="meta") for b in module._buffers.values() if b is not None})
    bare = copy_network(block, memo).train()
    for module in bare.modules():
        if isinstance(vars(module).get("forward"), TrainingForward):
            del module.forward
    return bare


@contextmanager
def _generators_kept() -> Iterator[None]:
    with preserve_rng_states(nn.Identity()):
        yield


def _state(module: nn.Module) -> list[object]:
    """What shows that a forward pass did more than to answer."""
    versions = [b._version for b in module.buffers(recurse=False)]
    return [*traced_facts(module), *versions, random.getstate(), torch.random.get_rng_state().tolist()]


def is_foldable_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of the kind that folds into a convolution."""
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))


def traced_facts(module: nn.Module) -> list[object]:
    """What a trace of a module's forward may depend on: its plain attributes, and which of its parts there are."""
    plain = [v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None) and k != "training"]
    return [*plain, *map(id, module._modules.values()), *map(id, module._parameters.values())]


# ------------------------------------------------------------------------------------- analysis


@dataclass(frozen=True, eq=False)
class _Part:
    """A node as a tree of the node `root`, and the nodes of that tree."""

    root: fx.Node
    expression: Expression
    nodes: tuple[fx.Node, ...] = ()
    tail: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, eq=False)
class _Found:
    """A tree in a graph; `stack` are the modules that hold all of it, from the outermost on."""

    tree: LinearTree
    root: fx.Node
    nodes: tuple[fx.Node, ...]
    stack: tuple[str, ...]

    @property
    def last(self) -> fx.Node:
        """The node whose value is the tree's."""
        return self.nodes[-1]


@dataclass(eq=False)
class _FoundTrees:
    """The trees of a graph, the names of their layers, and why other norms were left, by name."""

    trees: list[_Found] = field(default_factory=list)
    layers: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)


def find_linear_trees(
    graph: fx.Graph, block: nn.Module, allowed: set[str] | None, apart: frozenset[fx.Node] = frozenset()
) -> _FoundTrees:
    """The linear trees of a graph, and why each other norm in it is none; of `allowed` layers alone, where given.

    The nodes `apart` do not put trees together.
    """
    modules = dict(SingleInputModule(block).named_modules())
    parts: dict[fx.Node, _Part] = {}  # what an Identity gives is a part without nodes
    used: set[fx.Node] = set()  # the last nodes of parts that have become parts of others
    for node in graph.nodes:
        part = None if node in apart else _part(node, parts, modules, allowed)
        if part is not None:
            parts[node] = part
            used.update(part.nodes[:-1])
    found, order = _FoundTrees(), {node: number for number, node in enumerate(graph.nodes)}
    for node, part in parts.items():
        if node in used or not part.nodes:
            continue
        layers = list(tree_layers(part.expression))
        names = [str(each.target) for each in part.nodes if modules.get(str(each.target)) in layers]
        if _is_input_changed(part, order, modules):
            return find_linear_trees(graph, block, allowed, apart | {node})
        reason = _why_not(part, layers)
        if reason:
            found.left |= {name: reason for name in names if isinstance(modules[name], _BatchNorm)}
            continue
        act, nodes = _activation(node, modules) if not part.tail else None, part.nodes
        if act is not None:
            nodes = (*nodes, next(iter(node.users)))
        stack = nodes[0].meta["stack"]
        for each in nodes[1:]:
            shared = [a for a, b in zip(stack, each.meta["stack"], strict=False) if a == b]
            stack = tuple(shared)
        found.trees.append(_Found(LinearTree(part.expression, part.tail, act), part.root, nodes, stack))
        found.layers |= set(names)
    seen = found.layers | found.left.keys()
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _BatchNorm) and str(node.target) not in seen:
            found.left[str(node.target)] = "it is of another kind, or computes something of its own"
    return found


def _why_not(part: _Part, layers: Sequence[nn.Module]) -> str:
    """Why a part of a graph is no tree for the routes; empty where it is one."""
    if not any(isinstance(layer, nn.Conv2d) for layer in layers):
        before = part.root
        if before.op == "call_module" and len(before.users) > 1:
            return "what it normalizes is read elsewhere too"
        return "no convolution that folds with it stands before it"
    return "" if any(isinstance(layer, _BatchNorm) for layer in layers) else "it has no norm"


def _is_input_changed(part: _Part, order: Mapping[fx.Node, int], modules: Mapping[str, nn.Module]) -> bool:
    """Whether the input of a tree may be written to between its first step and its last."""
    first, last = order[part.nodes[0]], order[part.nodes[-1]]
    between = [user for user in part.root.users if first < order[user] < last and user not in part.nodes]
    return any(_may_change(user, modules) for user in between)


def _may_change(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an operation may write to its input."""
    if node.op == "call_module":
        return any(getattr(part, "inplace", False) for part in modules[str(node.target)].modules())
    name = str(node.target)
    in_place = node.target in _IN_PLACE or (node.op == "call_method" and name.endswith("_") and name[:2] != "__")
    return in_place or bool(node.kwargs.get("inplace")) or getattr(node.target, "__name__", "").endswith("_")


def _part(
    node: fx.Node, parts: Mapping[fx.Node, _Part], modules: Mapping[str, nn.Module], allowed: set[str] | None
) -> _Part | None:
    """The tree that a node ends, of as many nodes before it as are read by it alone; None for any other operation."""

    def before(value: object) -> _Part | None:
        if not isinstance(value, fx.Node):
            return None
        part = parts.get(value)
        if part is None or part.tail or (part.nodes and len(value.users) > 1):
            return _Part(value, InputNode())
        return part

    args = node.args
    if node.op == "call_module" and len(args) == 1 and not node.kwargs:
        name, first = str(node.target), before(args[0])
        module = modules[name]
        if first is None:
            return None
        if type(module) is nn.Identity:
            return first if isinstance(first.expression, InputNode) else _extended(first, first.expression, node)
        if _is_plain_conv(module) and (allowed is None or name in allowed):
            raw = first.root if isinstance(first.expression, InputNode) else args[0]
            assert isinstance(raw, fx.Node)
            return _Part(raw, LayerNode(module, InputNode()), (node,))
        if is_foldable_norm(module) and "weight" in module._parameters and (allowed is None or name in allowed):
            tail = _norm_tail(module)
            if tail is None:
                return None
            whole = LayerNode(module, first.expression)
            if not _is_supported(whole):
                assert isinstance(args[0], fx.Node)
                return _Part(args[0], LayerNode(module, InputNode()), (node,), tail)
            return _Part(first.root, whole, (*first.nodes, node), tail)
        gain = None if isinstance(first.expression, InputNode) else _gain_of(module)
        return None if gain is None else _extended(first, ScaleNode(gain, first.expression), node)
    if node.op != "call_function" or len(args) != 2 or node.kwargs:
        return None
    if node.target in _PRODUCTS:
        for part, factor in ((before(args[0]), args[1]), (before(args[1]), args[0])):
            gain = _parameter(factor, modules["block"])
            if gain is not None and part is not None and not isinstance(part.expression, InputNode):
                return _extended(part, ScaleNode(gain, part.expression), node)
    if node.target in _ADDITIONS + _SUBTRACTIONS:
        a, b = before(args[0]), before(args[1])
        sign = -1.0 if node.target in _SUBTRACTIONS else 1.0
        if a is None or b is None:  # 0 + x, as sums in a loop begin
            part, constant = (b, args[0]) if a is None else (a, args[1])
            plain = sign > 0 and constant == 0 and type(constant) in (int, float)
            is_tree = part is not None and not isinstance(part.expression, InputNode)
            return _extended(part, part.expression, node) if part is not None and plain and is_tree else None
        in_place = node.target in (operator.iadd, operator.isub)
        if a.root is not b.root or (in_place and isinstance(a.expression, InputNode)):
            return None
        terms = (*_terms(a.expression), *((ScaleNode(sign, b.expression),) if sign < 0 else _terms(b.expression)))
        total = SumNode(terms)
        nodes = tuple(sorted({*a.nodes, *b.nodes}, key=list(node.graph.nodes).index))
        return _Part(a.root, total, (*nodes, node)) if _is_supported(total) else None
    return None


def _parameter(value: object, block: nn.Module) -> Tensor | None:
    """The parameter of one value a channel that a node reads, such as a layer scale of shape (C, 1, 1)."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    owner, _, name = str(value.target).partition(".")[2].rpartition(".")
    parameter = block.get_submodule(owner)._parameters.get(name)
    shape = () if parameter is None else tuple(parameter.shape)
    return parameter if shape[-2:] == (1, 1) and len(shape) in (3, 4) and shape[:-3] in ((), (1,)) else None


def _extended(part: _Part, expression: Expression, node: fx.Node) -> _Part:
    return _Part(part.root, expression, (*part.nodes, node))


def _terms(expression: Expression) -> tuple[Expression, ...]:
    return expression.terms if isinstance(expression, SumNode) else (expression,)


def _is_supported(expression: Expression) -> bool:
    """Whether one of the routes takes a tree of this form."""
    if not any(isinstance(layer, nn.Conv2d) for layer in tree_layers(expression)):
        return True  # a norm alone, a sum of norms: it may become a part of one
    found = as_branches(expression)
    return merged_geometry(expression) is not None or (found is not None and _same_size(expression))


def _same_size(expression: Expression) -> bool:
    """Whether parallel convolutions of any kernels give maps of one size."""
    convs = [layer for layer in tree_layers(expression) if isinstance(layer, nn.Conv2d)]
    ahead = {
        (
            conv.stride,
            *((k - 1) * d - 2 * p for k, d, p in zip(conv.kernel_size, conv.dilation, padding(conv), strict=True)),
        )
        for conv in convs
    }
    return len(ahead) == 1


def _activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The clamp that alone reads a node, as a module; None for anything else."""
    user = next(iter(node.users), None)
    if user is None or len(node.users) > 1 or user.args != (node,):
        return None
    if user.op == "call_module" and not user.kwargs:
        module = modules[str(user.target)]
        return module if activation_clamp(module)[0] and not isinstance(module, nn.Identity) else None
    is_relu = user.target in (F.relu, torch.relu) or (user.op == "call_method" and user.target in ("relu", "relu_"))
    return nn.ReLU() if is_relu else None


# ------------------------------------------------------------------- what layers are, by what they compute


def _is_plain_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution and nothing else, padded by zeros, on both sides alike."""
    if not isinstance(module, nn.Conv2d) or not is_linear(module) or module.padding_mode != "zeros":
        return False
    try:
        padding(module)
    except ValueError:
        return False
    return "weight" in module._parameters  # and not made of others at each call


def _norm_tail(norm: nn.Module) -> tuple[nn.Module, ...] | None:
    """The modules that a norm's own forward applies after it has normalized, in order; None where it does otherwise.

    Norms of some projects hold an activation: what they compute is compared with that, on drawn input in float64.
    """
    if type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return ()
    tail = tuple(child for child in norm.children() if not isinstance(child, nn.Identity))
    try:
        return tail if _computes(norm, _normalize_then_children) else None
    except Exception:  # a forward with other arguments may raise anything
        return None


def _gain_of(module: nn.Module) -> Tensor | None:
    """The parameter by which a module scales channels; None where it is not all that it does."""
    if isinstance(module, Scale):
        return module.weight
    parameters = list(module.parameters())
    if len(parameters) != 1 or any(True for _ in module.buffers()) or parameters[0].is_meta:
        return None
    try:
        return parameters[0] if _computes(module, _scale_channels) else None
    except Exception:  # a forward with other arguments may raise anything
        return None


def _computes(module: nn.Module, expected: Any) -> bool:
    """Whether a module's answer, and its buffers after it, are as a function's of a copy of it and the input."""
    with _generators_kept(), torch.no_grad():
        one, other = (copy.deepcopy(module).to(device="cpu", dtype=torch.float64).train() for _ in range(2))
        for parameter, same in zip(one.parameters(), other.parameters(), strict=True):
            same.copy_(parameter.copy_(torch.rand(parameter.shape, dtype=torch.float64) + 0.5))
        channels = next(m.numel() for m in (*one.parameters(), *one.buffers()))
        x = torch.randn(3, channels, 3, 3, dtype=torch.float64)
        torch.manual_seed(0)
        answer = one(x.clone())
        torch.manual_seed(0)
        wanted = expected(other, x.clone())
        same_buffers = all(
            torch.allclose(a.double(), b.double(), rtol=1e-12)
            for a, b in zip(one.buffers(), other.buffers(), strict=True)
        )
    return same_buffers and answer.shape == wanted.shape and torch.allclose(answer, wanted, rtol=1e-12, atol=1e-12)


def _normalize_then_children(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, _BatchNorm)
    y = _BatchNorm.forward(norm, x)
    for child in norm.children():
        y = child(y)
    return y


def _scale_channels(module: nn.Module, x: Tensor) -> Tensor:
    return x * next(module.parameters()).reshape(-1, 1, 1)
