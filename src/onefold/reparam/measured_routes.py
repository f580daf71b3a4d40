"""Measured routes: which route each part of a network trains by fastest, on this machine, by timing them there.

A count of operations (`routes.costs`) cannot know how good a processor's libraries are: a route that saves passes over
memory is slower than plain torch where the library's bfloat16 products are eight times as fast as the kernels' own.
So every part - a Chain or Sum, a block that `accelerate` has given another forward - is timed by itself, forward and
backward, on a batch of the size and type that it will get, and another route than plain torch is taken only where it
is faster by more than the noise. Every route computes the same numbers within rounding, and a training may take the
last bits of any: so that two runs do not differ by chance, the caller keeps what was chosen.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.branches import as_unit
from onefold.reparam.find_linear_trees import TrainingForward
from onefold.reparam.folding_rules import Chain, Route, Sum, per_branch
from onefold.reparam.routes import mixed, moments_in_training, num_output_positions, quickest, route_costs

PLAIN, BY_COUNT, AS_PARTS = "per_branch", "quickest", "as its parts"
ROUTES: Mapping[str, Route] = {
    PLAIN: per_branch,
    "moments": moments_in_training,
    "mixed": mixed,
    BY_COUNT: quickest,
}
"""The routes that can be chosen, by name. Of a block of another project `per_branch` is its own forward."""

GAIN = 1.03  # how much faster than plain torch a route has to be measured: less is noise
ROUNDS = 5
HOPELESS = 1.5  # times as slow as the fastest: not timed again
UNLIKELY = 5.0  # times the cost of the cheapest, by count: not timed at all
CLEAR = 1.75
"""How much faster than plain torch a network has to be by count for that to be beyond doubt. The count promises too
much: MobileOne-S0 is at 5.3 by it and was measured at 3.2, S1 at 1.8 and 1.4, MobileNetV1 at 1.4 and 1.1 (one Intel
Xeon, fp32).
"""
SMALLEST_MAPS = 1 << 15
"""Values of input and output together, over the batch, from which a part is timed. Of less a call takes some dozens of
microseconds whatever the route: there the count decides for units of ours, and other blocks stay as they are.
"""
WHOLE_PIXELS = 8 * 224 * 224  # of the images by which the whole network is timed
WHOLE_LIMIT_S = 10.0
SHORTEST_S = 2e-3  # of a sample: shorter calls are made several times
TIMED_VALUES = 6 << 20
"""Values of input and output together that are timed at the most, by fewer images: more than the caches hold."""


@dataclass(frozen=True)
class Part:
    """A part of a network whose route is to be chosen: its path, the calls to choose from, and what it was called with.

    `key` says all that a time depends on, but for the machine.
    """

    path: str
    module: nn.Module
    calls: Mapping[str, Callable[[Tensor], Any]]
    called: _Call
    is_ours: bool
    key: str


def measure_routes(
    model: nn.Module,
    images: Tensor,
    known: MutableMapping[str, str],
    *,
    limit_s: float = 20.0,
    on_measure: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Give the fastest route for each part of `model` that trains, by its path; names are those of `ROUTES`.

    `images` (B, C, H, W) are a batch as it will be trained on, in the memory format that it will have; the autocast
    region around the call is that of the training. The model is used up: give a copy; its modes say what trains.
    `known` are choices that were made before, by `Part.key`: they are taken, and those of this call are added to it.
    `on_measure` is called before the first part is timed. Parts that are still unmeasured after `limit_s` seconds get
    what a count of operations says (`quickest`), blocks of other projects their own forward. In the end the whole
    network is timed with these choices and as plain torch, which it stays where the choices gain nothing.
    """
    started: float | None = None
    choices: dict[str, str] = {}
    parts = list(_parts(model, images))
    for part in parts:
        if part.key not in known:
            if started is None:
                on_measure()
                started = time.perf_counter()
            late = time.perf_counter() - started > limit_s
            known[part.key] = (BY_COUNT if part.is_ours else PLAIN) if late else _fastest(part, len(images))
        choices[part.path] = known[part.key]
    plain = {part.path: PLAIN if PLAIN in part.calls else choices[part.path] for part in parts}
    if choices != plain:
        # Parts are not the whole: memory that one part leaves in the caches serves the next one, if both are of a kind.
        key = hashlib.sha256(repr([(p.key, choices[p.path]) for p in parts]).encode()).hexdigest()[:24]
        if key not in known:
            known[key] = _faster_whole(model, parts, {AS_PARTS: choices, PLAIN: plain}, images)
        choices = plain if known[key] == PLAIN else choices
    return choices


def is_clear_by_count(model: nn.Module, images: Tensor) -> bool:
    """Whether a count of operations leaves no doubt that `model` trains faster by `quickest` than as plain torch.

    Of a batch of `images`, as in `measure_routes`; the model is used up. Never of blocks of other projects.
    """
    plain = cheapest = 0.0
    for part in _parts(model, images):
        unit = as_unit(part.module) if part.is_ours else None
        if unit is None:
            return False
        x = torch.empty(1, *part.called.shape, dtype=part.called.dtype).expand(len(images), -1, -1, -1)
        costs, places = route_costs(unit, x), num_output_positions(unit.geometry, x)
        plain += costs.per_branch * places
        cheapest += min(costs) * places
    return plain > CLEAR * cheapest


def set_routes_(model: nn.Module, choices: Mapping[str, str]) -> list[str]:
    """Have each part train by the route that `choices` names for its path, in place; parts without one stay.

    Gives the paths that are no part of this network, or not one that can be taken.
    """
    modules, unknown = dict(model.named_modules()), []
    for path, choice in choices.items():
        module = modules.get(path)
        if isinstance(module, (Chain, Sum)) and choice in ROUTES:
            module.route = ROUTES[choice]
        elif module is not None and isinstance(vars(module).get("forward"), TrainingForward):
            if choice == PLAIN:
                del module.forward
        elif choice != PLAIN:
            unknown.append(path)
    return unknown


# ---------------------------------------------------------------------------------------- the parts


class _Call(NamedTuple):
    """What a part was called with: no tensors, which a copy of the network could not take along."""

    shape: tuple[int, ...]  # of an image
    dtype: torch.dtype
    layout: torch.memory_format
    needs_grad: bool
    act: nn.Module | None
    outputs: int  # values of its answer for an image; 0 where that is no map

    @classmethod
    def of(cls, x: Tensor, act: nn.Module | None, y: Tensor) -> _Call:
        outputs = y[0].numel() if y.dim() == 4 else 0
        return cls(tuple(x.shape[1:]), x.dtype, _layout(x), x.requires_grad, act, outputs)


def _parts(model: nn.Module, images: Tensor) -> Iterator[Part]:
    """The parts of `model`, which is used up, that two images of the batch reach in training; each once."""
    calls: dict[str, _Call] = {}
    ours, blocks = list[Chain | Sum](), dict[nn.Module, TrainingForward]()
    for path, module in model.named_modules():
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()):
            continue  # its time is that of other processes too
        if isinstance(module, (Chain, Sum)) and module.route is quickest:
            ours.append(module)
            module.route = _recorded(path, calls)
        elif isinstance(own := vars(module).get("forward"), TrainingForward):
            blocks[module] = own
            module.forward = _Recorded(path, cast(Callable[..., Any], own), calls)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model(torch.randn(2, *images.shape[1:]).contiguous(memory_format=_layout(images[:1])))
    for tree in ours:
        tree.route = quickest
    for block, forward in blocks.items():
        block.forward = cast(Callable[..., Any], forward)
    for path, called in calls.items():
        module = model.get_submodule(path)
        is_trained = any(isinstance(m, _BatchNorm) and m.training for m in module.modules())
        size = (math.prod(called.shape) + called.outputs) * len(images)
        if not is_trained or len(called.shape) != 3 or not called.outputs or size < SMALLEST_MAPS:
            continue
        is_ours = isinstance(module, (Chain, Sum))
        batch = torch.empty(1, *called.shape, dtype=called.dtype).expand(len(images), -1, -1, -1)
        found = _calls_of_unit(module, batch, called.act) if is_ours else _calls_of_block(module)
        if not found:
            continue
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        trained = [p.requires_grad for p in module.parameters()]
        said = (type(module).__qualname__, repr(module), *found, *called, len(images), autocast, trained)
        key = hashlib.sha256(repr(said).encode()).hexdigest()[:24]
        yield Part(path, module, found, called, is_ours, key)


def _recorded(path: str, calls: dict[str, _Call]) -> Route:
    """`quickest`, noting what it is called with."""

    def route(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
        y = quickest(tree, x, act)
        calls[path] = _Call.of(x, act, y)
        return y

    return route


@dataclass(frozen=True)
class _Recorded(TrainingForward):
    """A block's forward pass, noting what it is called with; a trace of the block passes it over, as it does ours."""

    path: str
    original: Callable[..., Any]
    calls: dict[str, _Call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self.original(*args, **kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(y, Tensor):
            self.calls[self.path] = _Call.of(args[0], None, y)
        return y


def _calls_of_unit(tree: nn.Module, x: Tensor, act: nn.Module | None) -> dict[str, Callable[[Tensor], Any]]:
    """The routes of a unit of ours that are worth a look; none for another tree."""
    unit = as_unit(tree)
    if unit is None or _crashes(tree):
        return {}
    by_moments, by_mixing, by_branch = route_costs(unit, x)
    most = UNLIKELY * min(by_moments, by_mixing, by_branch)
    names = [PLAIN, *(["moments"] if by_moments <= most else []), *(["mixed"] if by_mixing <= most else [])]
    return {name: partial(_by_route, ROUTES[name], tree, act) for name in names}


def _by_route(route: Route, tree: nn.Module, act: nn.Module | None, x: Tensor) -> Tensor:
    return route(tree, x, act)


def _calls_of_block(block: nn.Module) -> dict[str, Callable[[Tensor], Any]]:
    accelerated = vars(block)["forward"]
    if _crashes(block):
        return {BY_COUNT: accelerated}
    return {PLAIN: partial(type(block).forward, block), BY_COUNT: accelerated}


def _crashes(part: nn.Module) -> bool:
    """Whether plain torch may write outside its memory: torch 2.13's weight gradient of a strided 1x1 convolution of
    few channels does, in channels_last, on some processors. Such a part is not timed, and never left to it.
    """
    convs = [m for m in part.modules() if type(m) is nn.Conv2d and m.kernel_size == (1, 1) and m.groups == 1]
    return any(max(conv.stride) > 1 and conv.in_channels < 8 for conv in convs)


def _layout(x: Tensor) -> torch.memory_format:
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


# ------------------------------------------------------------------------------------------- the times


def _fastest(part: Part, num_images: int) -> str:
    """The name of the call to take: the fastest, or plain torch where that is as fast within the noise."""
    if len(part.calls) == 1:
        return next(iter(part.calls))
    generator, called = torch.Generator().manual_seed(0), part.called
    count = max(2, min(num_images, -(-TIMED_VALUES // (math.prod(called.shape) + called.outputs))))
    x = torch.randn(count, *called.shape, generator=generator).to(called.dtype).contiguous(memory_format=called.layout)
    with torch.no_grad():
        y = part.calls[PLAIN](x)
    x.requires_grad_(called.needs_grad)
    grad = torch.randn(y.shape, generator=generator).to(y.dtype).contiguous(memory_format=_layout(y))
    inputs = [*([x] if called.needs_grad else []), *(p for p in part.module.parameters() if p.requires_grad)]

    def seconds(call: Callable[[Tensor], Any], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            torch.clear_autocast_cache()  # a step casts each weight once
            out = call(x)
            if inputs and out.requires_grad:
                torch.autograd.grad(out, inputs, grad, allow_unused=True)
        return time.perf_counter() - start

    seconds(part.calls[PLAIN], 1)
    times = max(1, min(20, round(SHORTEST_S / seconds(part.calls[PLAIN], 1))))
    return fastest({name: partial(seconds, call, times) for name, call in part.calls.items()})


def _faster_whole(
    model: nn.Module, parts: Sequence[Part], choices: Mapping[str, Mapping[str, str]], images: Tensor
) -> str:
    """The name of those choices by which a step of the whole network is faster, on as many images as are soon done."""
    count = max(2, min(len(images), -(-WHOLE_PIXELS // images[0, 0].numel())))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *images.shape[1:], generator=generator).contiguous(memory_format=_layout(images[:1]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    measured = {part.module for part in parts}
    for module in model.modules():  # blocks that were not timed stay as they are
        if module not in measured and isinstance(vars(module).get("forward"), TrainingForward):
            del module.forward

    def seconds(name: str) -> float:
        for part in parts:
            choice = choices[name][part.path]
            if part.is_ours:
                cast(Sum, part.module).route = ROUTES[choice]
            elif choice == PLAIN:
                vars(part.module).pop("forward", None)
            else:
                part.module.forward = part.calls[choice]
        torch.clear_autocast_cache()
        start = time.perf_counter()
        y = model(x)
        if isinstance(y, Tensor) and y.requires_grad and parameters:
            torch.autograd.grad(y.float().square().mean(), parameters, allow_unused=True)
        return time.perf_counter() - start

    return fastest({name: partial(seconds, name) for name in choices}, WHOLE_LIMIT_S)


def fastest(timed: Mapping[str, Callable[[], float]], limit_s: float = math.inf) -> str:
    """The name whose calls give the fewest seconds; PLAIN unless another's are fewer by more than the noise.

    Each is called once unseen, then in rounds, no further one after `limit_s` seconds; one that is far behind is not
    called again. What else the machine does slows neighbours in a round alike: so PLAIN is compared by the median of
    the rounds' ratios.
    """
    started = time.perf_counter()
    for call in timed.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    left = list(timed)
    for number in range(ROUNDS):
        for name in left if number % 2 else left[::-1]:
            seconds[name].append(timed[name]())
        best = min(min(seconds[name]) for name in left)
        left = [name for name in left if min(seconds[name]) <= HOPELESS * best]
        if len(left) == 1:
            return left[0]
        if time.perf_counter() - started > limit_s:
            break
    others = {name: statistics.median(seconds[name]) for name in left if name != PLAIN}
    if not others:
        return PLAIN
    best_other = min(others, key=others.__getitem__)
    if PLAIN not in left:
        return best_other
    ratios = [plain / its for plain, its in zip(seconds[PLAIN], seconds[best_other], strict=True)]
    return best_other if statistics.median(ratios) > GAIN else PLAIN
