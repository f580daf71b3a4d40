"""A network as a list of calls: traced from a module, written as plain data, run again without the module's code.

A file of torch.export (.pt2) may hold pickles, and expressions that are evaluated as Python, when it is loaded, so it
is not a form to hand to others. Here a program is JSON - steps, each a call of a PyTorch operator on constants, weights
and the results of earlier steps - and its weights are safetensors. A program can call operators that PyTorch counts as
core ATen or can rewrite into core ATen, a few plain ones beside, and a dozen functions on integers: nothing else.

    {"schema": 1, "steps": [{"op": "aten.conv2d.default", "args": [{"input": 0}, {"weight": "stem.weight"}, ...],
                             "kwargs": {}}, ...], "answer": {"step": 41}}
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from onefold.errors import BadArgument, BadArtifact
from onefold.runtimes.vendor import first_line, quiet

SCHEMA = 1

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
_T = TypeVar("_T", str, list[Json], dict[str, Json])

_OPERATOR = re.compile(r"aten\.([a-z][A-Za-z0-9_]*)\.([A-Za-z][A-Za-z0-9_]*)")
_ON_INTEGERS: dict[str, Callable[..., object]] = {
    "python.getitem": operator.getitem,
    "python.add": operator.add,
    "python.sub": operator.sub,
    "python.mul": operator.mul,
    "python.floordiv": operator.floordiv,
    "python.mod": operator.mod,
    "python.neg": operator.neg,
    "python.eq": operator.eq,
    "python.ne": operator.ne,
    "python.lt": operator.lt,
    "python.le": operator.le,
    "python.gt": operator.gt,
    "python.ge": operator.ge,
}
# Plain operators that are neither core nor rewritten by torch.export, because they may or may not copy.
# fmt: off
_PLAIN = {
    "adaptive_max_pool2d", "alpha_dropout", "batch_norm", "broadcast_to", "chunk", "contiguous", "dropout",
    "expand_as", "feature_dropout", "flatten", "lift_fresh_copy", "mT", "movedim", "narrow", "positive", "ravel",
    "reshape", "reshape_as", "split", "swapaxes", "swapdims", "tensor_split", "to", "unflatten", "unfold", "view_as",
}
# fmt: on
# Core operators that can show memory which was never written.
_UNSAFE = ("as_strided", "empty", "new_empty", "resize", "set_")
_NAMED: dict[str, tuple[type, Mapping[str, object]]] = {
    "dtype": (
        torch.dtype,
        {
            name: getattr(torch, name)
            for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "bool")
        },
    ),
    "memory_format": (
        torch.memory_format,
        {name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last")},
    ),
    "layout": (torch.layout, {"strided": torch.strided}),
    "device": (torch.device, {"cpu": torch.device("cpu")}),
    "float": (float, {"inf": float("inf"), "-inf": float("-inf")}),
}


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """The network as PyTorch's own graph, for any batch size; `images` (B >= 2, C, H, W) are an example.

    Raises BadArgument where the network's course depends on the values or on the number of its images.
    """
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:
        raise BadArgument(
            f"this network cannot be exported for any batch size: {first_line(error)}; "
            "its forward may depend neither on the values of its images nor on a fixed number of them"
        ) from error


def write_program(program: ExportedProgram) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """The program as plain data, and the weights that it uses. Raises BadArgument where it is more than data."""
    signature = program.graph_signature
    if [spec.kind for spec in signature.output_specs] != [OutputKind.USER_OUTPUT]:
        raise BadArgument(
            "this network changes its buffers or has several answers; call model.eval() and give one tensor"
        )
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    names: dict[object, Json] = {}
    steps: list[Json] = []
    answer: Json = None
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            names[node] = {"input": 0} if spec.kind == InputKind.USER_INPUT else {"weight": spec.target or ""}
        elif node.op == "output":
            answer = _encode(node.args[0][0], names)
        elif node.op != "call_function":
            raise BadArgument(f"this network calls {node.target}, which the eager artifact cannot hold")
        elif not _is_assertion(node.target):
            names[node] = {"step": len(steps)}
            kwargs = {name: _encode(value, names) for name, value in node.kwargs.items()}
            steps.append({"op": _name(node.target), "args": _encode(node.args, names), "kwargs": kwargs})
    tensors: dict[str, Tensor] = {**program.state_dict, **program.constants}
    used = sorted(_weights_in(steps))
    return {"schema": SCHEMA, "steps": steps, "answer": answer}, {
        name: tensors[name].detach().clone(memory_format=torch.contiguous_format) for name in used
    }


@dataclass(frozen=True)
class _Slot:
    """A place among the values of a run: 0 is the input, i + 1 the result of step i."""

    index: int


@dataclass(frozen=True)
class _Step:
    call: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    done: tuple[int, ...]  # the slots that nobody reads after this step


class Program:
    """A network read from plain data: images (B, C, H, W) in, logits (B, classes) out."""

    def __init__(self, data: Json, weights: Mapping[str, Tensor]) -> None:
        """Raises BadArtifact where the data is not a program over these weights."""
        try:
            self._read(data, weights)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            if isinstance(error, BadArtifact):
                raise
            raise BadArtifact(f"the program is malformed: {first_line(error)}; export the model again") from error

    def __call__(self, images: Tensor) -> Tensor:
        """Run the steps in order; a result is let go after its last reader."""
        values: list[object] = [images, *([None] * len(self._steps))]
        for i, step in enumerate(self._steps):
            args = [_fill(arg, values) for arg in step.args]
            kwargs = {name: _fill(arg, values) for name, arg in step.kwargs.items()}
            values[i + 1] = step.call(*args, **kwargs)
            for index in step.done:
                values[index] = None
        answer = _fill(self._answer, values)
        if not isinstance(answer, Tensor):
            raise BadArtifact("the program does not answer with a tensor; export the model again")
        return answer

    def _read(self, data: Json, weights: Mapping[str, Tensor]) -> None:
        if not isinstance(data, dict) or data["schema"] != SCHEMA:
            raise BadArtifact(f"expected a program of schema {SCHEMA}; export the model again")
        steps: list[tuple[Callable[..., object], tuple[object, ...], dict[str, object]]] = []
        last: dict[int, int] = {}
        for i, step in enumerate(_expect(data["steps"], list)):
            fields = _expect(step, dict)
            args = tuple(_decode(arg, i, weights) for arg in _expect(fields["args"], list))
            kwargs = {name: _decode(arg, i, weights) for name, arg in _expect(fields["kwargs"], dict).items()}
            steps.append((_find(_expect(fields["op"], str)), args, kwargs))
            last |= dict.fromkeys(_slots_in([args, list(kwargs.values())]), i)
        self._answer = _decode(data["answer"], len(steps), weights)
        kept = _slots_in(self._answer)
        self._steps = [
            _Step(*step, tuple(slot for slot, when in last.items() if when == i and slot not in kept))
            for i, step in enumerate(steps)
        ]


def _encode(value: object, names: Mapping[object, Json]) -> Json:
    """A value of a traced graph as plain data; `names` has the data that stands for each node."""
    if isinstance(value, torch.fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return [_encode(item, names) for item in value]
    for key, (kind, table) in _NAMED.items():
        if isinstance(value, kind):
            for name, known in table.items():
                if value == known:
                    return {key: name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise BadArgument(f"this network uses the constant {value!r:.80}, which the eager artifact cannot hold")


def _decode(data: Json, num_steps: int, weights: Mapping[str, Tensor]) -> object:
    """The value that plain data stands for; a result can be that of the first `num_steps` steps only."""
    if isinstance(data, list):
        return [_decode(item, num_steps, weights) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError(f"a reference has one key, not {len(data)}")
    ((key, name),) = data.items()
    if key == "weight":
        return weights[_expect(name, str)]
    if key == "input" and name == 0:
        return _Slot(0)
    if key == "step" and type(name) is int and 0 <= name < num_steps:
        return _Slot(name + 1)
    return _NAMED[key][1][_expect(name, str)]


def _fill(arg: object, values: list[object]) -> object:
    if isinstance(arg, _Slot):
        return values[arg.index]
    if isinstance(arg, list):
        return [_fill(item, values) for item in arg]
    return arg


def _slots_in(arg: object) -> set[int]:
    if isinstance(arg, _Slot):
        return {arg.index}
    return set().union(*map(_slots_in, arg)) if isinstance(arg, list | tuple) else set()


def _weights_in(data: Json) -> set[str]:
    if isinstance(data, list):
        return set().union(*map(_weights_in, data))
    if not isinstance(data, dict):
        return set()
    if set(data) == {"weight"}:
        return {str(data["weight"])}
    return set().union(*map(_weights_in, data.values()))


def _is_assertion(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.name().startswith(("aten::_assert", "aten::sym_constr"))


def _name(target: object) -> str:
    """The name under which a call is written."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and _is_plain(target):
        return str(target)
    for name, function in _ON_INTEGERS.items():
        if function is target:
            return name
    raise BadArgument(f"this network calls {target}, which the eager artifact cannot hold; use plain PyTorch operators")


def _find(name: str) -> Callable[..., object]:
    """The function that a written name stands for, if it is one that a program may call."""
    if name in _ON_INTEGERS:
        return _ON_INTEGERS[name]
    parts = _OPERATOR.fullmatch(name)
    if parts is None:
        raise ValueError(f"{name!r:.80} is not the name of an operator")
    found = getattr(getattr(torch.ops.aten, parts[1]), parts[2])
    if not isinstance(found, torch._ops.OpOverload) or not _is_plain(found):
        raise ValueError(f"a program may not call {name}")
    return found


def _is_plain(target: torch._ops.OpOverload) -> bool:
    """Whether the operator, or what it is the in-place form of (`relu_`), is core ATen or can be rewritten into it."""
    name, overload = str(target).split(".")[1:]
    if name.startswith(_UNSAFE):
        return False
    if target._schema.is_mutable:
        if not name.endswith("_"):
            return False
        name = name.removesuffix("_")
        target = getattr(getattr(torch.ops.aten, name), overload)
    return name in _PLAIN or torch.Tag.core in target.tags or target in _rewritten()


@lru_cache(maxsize=1)
def _rewritten() -> frozenset[object]:
    return frozenset(torch.export.default_decompositions())


def _expect(data: Json, kind: type[_T]) -> _T:
    if type(data) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {data!r:.80}")
    return data
