"""What a network does with its layers: who reads their outputs and their weights, on a run and in its trace.

`observe_run` runs a copy on an example - images that the caller gives, or drawn ones of a size that the network takes -
and watches every torch function. `trace` follows the forward pass symbolically instead, for every input at once, but
knows nothing of shapes and fails where the control flow depends on data. Folding needs what both agree on.
"""

from __future__ import annotations

import copy
import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from onefold.reparam.copy_network import HOOKS, copy_network

_SIZES = (64, 224, 32, 28, 256, 384)  # of drawn images, in this order
_COSTLY = 10**10  # multiply-adds: seconds in float64, in which a network and its fused form run on the same images
_COUNTED = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_SHAPE_ONLY = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_leaf", "is_quantized", "is_sparse", "itemsize")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point),
        *(Tensor.is_complex, torch.is_floating_point, torch.numel, Tensor.__len__, Tensor.get_device),
    }
)
ExampleInput = tuple[Any, ...]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to this module, or changes what goes in or out of it."""
    return any(getattr(module, kind) for kind in HOOKS)


def output_tensors(output: object) -> Iterator[Tensor]:
    """The tensors in a model's output, which may be nested in mappings and sequences."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from output_tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from output_tensors(value)


def copy_without_hooks(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy to try things on: in eval mode, in `dtype`, and without hooks but those by which torch makes a weight."""
    bare = copy_network(model).eval()
    for module in bare.modules():
        for kind in HOOKS:
            hooks: dict[int, object] = getattr(module, kind)
            for key in [k for k, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils.")]:
                del hooks[key]
    return bare if dtype is None else bare.to(dtype)


@contextmanager
def preserve_rng_states(model: nn.Module) -> Iterator[None]:
    """Leave the random generators of torch, numpy and Python as they were found."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    numpy: Any = sys.modules.get("numpy")  # what is not imported has not been drawn from
    ours, theirs = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(ours)
        if theirs:
            numpy.random.set_state(theirs)


def run_copy(model: nn.Module, args: ExampleInput) -> object:
    """The answer of a bare copy to the example, without gradients and always with the same random numbers."""
    device = next((t.device.type for t in (*output_tensors(args), *model.parameters())), "cpu")
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    with torch.no_grad(), torch.autocast("cpu" if device in ("meta", "mps") else device, enabled=False):
        return model(*args)


def random_like(like: Tensor, *shape: int) -> Tensor:
    """Normal noise of this shape, the same at each call, with the device and dtype of `like`."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(device=like.device, dtype=like.dtype if like.is_floating_point() else torch.float32)


def varied_inputs(like: Tensor, channels: int, sides: Sequence[int]) -> Iterator[Tensor]:
    """Noise by whose batch, sides, sign and size a forward of somebody's own may decide what it computes."""
    for batch, more, size in ((2, 0, 1.0), (1, 0, 1.0), (1, 3, 1e3), (3, 1, 1e-3), (4, 8, 1.0)):
        x = size * random_like(like, batch, channels, *(side + more * i for i, side in enumerate(sides, 1)))
        yield x if batch < 4 else x.abs()


def random_examples(model: nn.Module) -> Iterator[ExampleInput]:
    """Inputs that a network might take, by the channels of its first layer: two images of usual sizes, or vectors."""
    first = next((m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear, _BatchNorm))), None)
    weights = () if first is None else (t for t in first.parameters() if not isinstance(t, nn.UninitializedParameter))
    like = next(iter(weights), None)
    if first is None or like is None:
        return
    if isinstance(first, _ConvNd):
        for size in _SIZES:
            sides = {1: (size,), 2: (size, size), 3: (16, size // 2, size // 2)}[len(first.kernel_size)]
            yield (random_like(like, 2, first.in_channels, *sides),)
    elif isinstance(first, nn.Linear):
        yield (random_like(like, 4, first.in_features),)
        yield (random_like(like, 2, 8, first.in_features),)
    else:
        yield (random_like(like, 2, first.num_features, 16, 16),)
        yield (random_like(like, 4, first.num_features),)


def callable_roots(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts that can be called: the model itself, or the parts of a container without a forward."""
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)) and type(model).forward is nn.Module.forward:
        for key, child in model.named_children():
            yield from callable_roots(child, f"{prefix}{key}.")
    else:
        yield prefix, model


# --------------------------------------------------------------------------------------------- a run


@dataclass(eq=False)
class ObservedRun:
    """What was seen of one root, on one example; all names are those within the whole network.

    `norm_inputs` names the layer whose output each norm takes, and how many dimensions that has.
    """

    args: ExampleInput
    output: object
    bare: nn.Module  # the copy that ran
    calls: Counter[str] = field(default_factory=Counter)
    read_elsewhere: set[str] = field(default_factory=set)  # layers whose weights are read outside of their own forward
    shared_output: set[str] = field(default_factory=set)  # layers whose output somebody else than a norm reads
    norm_inputs: dict[str, tuple[str, int]] = field(default_factory=dict)
    part_inputs: dict[str, tuple[ExampleInput, dict[str, Any]]] = field(default_factory=dict)
    macs: int = 0  # multiply-adds of its convolutions and Linears


def observe_run(
    root: nn.Module, prefix: str, units: Mapping[str, nn.Module], parts: Sequence[str], example: ExampleInput | None
) -> ObservedRun | None:
    """Run a copy of `root` and watch `units`, layers by name; None where it takes none of the drawn examples.

    The inputs of the modules named in `parts` are kept. An example that was given and fails raises what it raises. Of
    drawn images every second pixel is taken where they cost much and the network takes those too.
    """
    names = {name.removeprefix(prefix) for name in units if name.startswith(prefix) or not prefix}
    inner = [name.removeprefix(prefix) for name in parts if name.startswith(prefix)]
    for args in (example,) if example is not None else random_examples(root):
        try:
            seen = _Watch(copy_without_hooks(root), names, inner, prefix).seen(args)
        except Exception:  # a network that takes other inputs may raise anything
            if example is not None:
                raise
            continue
        if example is None and seen.macs > _COSTLY:
            with suppress(Exception):
                return _Watch(copy_without_hooks(root), names, inner, prefix).seen(
                    tuple(x[..., ::2, ::2] for x in args)
                )
        return seen
    return None


class _Watch(TorchFunctionMode):
    """Sees every call of a torch function, and whose weights and outputs are among its arguments."""

    def __init__(self, model: nn.Module, units: set[str], parts: Sequence[str], prefix: str) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix
        self.run = ObservedRun(args=(), output=None, bare=model)
        self.handles: list[RemovableHandle] = []
        self.stack: list[str] = []  # of the units whose forward is running
        self.owner: dict[int, str] = {}  # of a weight, by its id
        self.made: dict[int, tuple[str, weakref.ref[Tensor]]] = {}  # the outputs of units, while they live
        for name, module in model.named_modules():
            full = prefix + name
            if name in units:
                for tensor in (*module.parameters(), *module.buffers()):
                    self.owner[id(tensor)] = full
                self.handles.append(module.register_forward_pre_hook(partial(self._enter, full)))
                self.handles.append(module.register_forward_hook(partial(self._leave, full), always_call=True))
            if name in parts:
                self.handles.append(module.register_forward_pre_hook(partial(self._keep, full), with_kwargs=True))

    def seen(self, args: ExampleInput) -> ObservedRun:
        self.run.args = args
        with self:
            self.run.output = run_copy(self.model, args)
        alive = [name for name, reference in self.made.values() if reference() is not None]
        self.run.shared_output.update(alive)  # it is in the answer, or kept for another forward
        for handle in self.handles:
            handle.remove()
        return self.run

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SHAPE_ONLY:
            for tensor in output_tensors((args, kwargs)):
                owner = self.owner.get(id(tensor))
                if owner is not None and owner not in self.stack:
                    self.run.read_elsewhere.add(owner)
                maker = self._maker(tensor)
                if maker is not None and not (self.stack and self._takes(self.stack[-1], maker)):
                    self.run.shared_output.add(maker)
        result = func(*args, **kwargs)
        if func in _COUNTED and isinstance(result, Tensor):
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            self.run.macs += result.numel() * weight[0].numel()
        return result

    def _takes(self, norm: str, maker: str) -> bool:
        return self.run.norm_inputs.get(norm, ("", 0))[0] == maker

    def _maker(self, tensor: Tensor) -> str | None:
        made = self.made.get(id(tensor))
        return made[0] if made is not None and made[1]() is tensor else None

    def _enter(self, name: str, module: nn.Module, args: ExampleInput) -> None:
        self.run.calls[name] += 1
        self.stack.append(name)
        maker = self._maker(args[0]) if args and isinstance(args[0], Tensor) else None
        if maker is not None and isinstance(module, _BatchNorm):
            self.run.norm_inputs[name] = (maker, args[0].dim())

    def _leave(self, name: str, module: nn.Module, args: ExampleInput, output: object) -> None:
        self.stack.pop()
        if isinstance(output, Tensor):
            self.made[id(output)] = (name, weakref.ref(output))

    def _keep(self, name: str, module: nn.Module, args: ExampleInput, kwargs: dict[str, Any]) -> None:
        if name not in self.run.part_inputs:
            self.run.part_inputs[name] = copy.deepcopy((args, kwargs))


# ------------------------------------------------------------------------------------------- a trace


@dataclass(eq=False)
class NetworkTrace:
    """What the trace of a network shows: the layer that feeds each norm, and the layers somebody else reads.

    `blind` names the parts with a forward of their own that could not be traced.
    """

    feeds: dict[str, str] = field(default_factory=dict)
    shared_output: set[str] = field(default_factory=set)
    calls: Counter[str] = field(default_factory=Counter)
    read: set[int] = field(default_factory=set)  # ids of weights that a forward names outside of their layer
    flat: set[str] = field(default_factory=set)  # layers whose input was flattened to vectors just before
    blind: list[str] = field(default_factory=list)


class _Tracer(fx.Tracer):
    """Traces through blocks, down to torch's own layers, what is derived from them, and blocks that have hooks."""

    def __init__(self, read: set[int]) -> None:
        super().__init__()
        self.seen = read

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        own = isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)) or has_hooks(m)
        return own or super().is_leaf_module(m, qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            self.seen.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace(module: nn.Module, prefix: str = "") -> NetworkTrace:
    """Trace a network, in a copy that shares its parameters: tracing runs its forward, which may change its state."""
    found = NetworkTrace()
    if any(isinstance(m, _BatchNorm) for m in module.modules()):
        twin = copy_network(module, {id(p): p for p in module.parameters()})
        _trace(twin, prefix, found)
        originals = {id(b): id(a) for a, b in zip(module.buffers(), twin.buffers(), strict=True)}
        found.read = {originals.get(each, each) for each in found.read}
    return found


def _trace(module: nn.Module, prefix: str, into: NetworkTrace) -> None:
    """Add the trace of a part; a block that cannot be traced, or has hooks, is searched part by part."""
    if not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return
    try:
        graph = _Tracer(into.read).trace(module)
    except Exception:  # data-dependent control flow and the like: try its parts
        if type(module).forward is not nn.Module.forward:
            into.blind.append(prefix.rstrip("."))
        for key, child in module.named_children():
            _trace(child, f"{prefix}{key}.", into)
        return
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        name, called = f"{prefix}{node.target}", module.get_submodule(str(node.target))
        into.calls[name] += 1
        if has_hooks(called) and not isinstance(called, (_ConvNd, nn.Linear, _BatchNorm)):
            for key, child in called.named_children():
                _trace(child, f"{name}.{key}.", into)
        if isinstance(called, nn.Linear) and _is_flatten(node.args[0] if node.args else None, module):
            into.flat.add(name)
        before = node.args[0] if len(node.args) == 1 else None
        if isinstance(called, _BatchNorm) and isinstance(before, fx.Node) and before.op == "call_module":
            into.feeds[name] = f"{prefix}{before.target}"
        if len(node.users) != 1:
            into.shared_output.add(name)


def _is_flatten(node: object, module: nn.Module) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)
    return node.target in ("flatten", torch.flatten) and tuple(node.args[1:]) in ((1,), (1, -1))
