"""Fusing a network: a copy with one layer in place of every linear tree, which proves its own answer.

Three things are replaced: our own trees (`Chain`, `Sum`); blocks of other projects that have a method `reparameterize`,
`switch_to_deploy` or `fuse`, by that method; and norms that alone read the output of a convolution or Linear, which are
folded into it by the algebra's own rules. Each replacement is proved before it stays, in float64 on drawn input, and
the whole network after them: what cannot be proved, or would change what somebody else sees - a hook, a weight that is
read elsewhere - is left as it is and named in an `UnfoldedWarning`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.reparam.copy_network import HOOK_FLAGS, HOOKS, copy_network
from onefold.reparam.dataflow import (
    ExampleInput,
    ObservedRun,
    callable_roots,
    copy_without_hooks,
    has_hooks,
    observe_run,
    preserve_rng_states,
    random_examples,
    random_like,
    run_copy,
)
from onefold.reparam.drift import EPS32, float64_drift, fused_layer_error, rounding_unit
from onefold.reparam.find_linear_trees import TrainingForward
from onefold.reparam.folding_rules import Chain, Sum, fused_layer, input_channels, is_linear
from onefold.reparam.fuse_conv_bn import fold_norms_, foldable_layers

_FUSING_METHODS = ("reparameterize", "switch_to_deploy", "fuse")
_MOST_TRIALS = 24  # of parts of the replacements, where all of them together change the answer
_MOST_NAMES = 6  # of one reason, in the warning


class UnfoldedWarning(UserWarning):
    """Parts of a network were left as they were, or could not be checked; the message names them and says why."""


@dataclass(eq=False)
class _Fused:
    """A fused copy, the names of what was replaced in it, and why other parts were left as they were, by name.

    `is_blind` is whether a forward could not be traced, which may compute something else for other inputs.
    """

    model: nn.Module
    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    is_blind: bool = False


def fuse(model: nn.Module, example: Tensor | ExampleInput | None = None) -> nn.Module:
    """Copy `model` with one convolution (or Linear) in place of every outermost `Sum` and `Chain`.

    Blocks of other projects that have a method `reparameterize()`, `switch_to_deploy()` or `fuse()` are fused in the
    copy by it, and norms that directly follow a convolution are folded into it. `model` and the random number
    generators are left as they are. Dtype, device, hooks on the fused layers and training flags are kept; a layer used
    twice stays one layer; the fused parameters can be trained where the originals could.

    The answer is checked on `example`, the arguments of a call; without it, on drawn images of a size that the network
    takes. What could not be folded, or not without changing the answer, a hook or a shared weight, is left as it is
    and listed with the reason in an `UnfoldedWarning` (see `unfused_norms`).

    Raises ValueError for a model in train mode.
    """
    in_training = next((name for name, norm in _norms(model) if norm.training), None)
    if in_training is not None and model.training:
        raise ValueError(f"norm {in_training!r} is in train mode and depends on the batch: call model.eval() first")
    args = (example,) if isinstance(example, Tensor) else example
    trees, blocks = dict(outermost_trees(model)), [name for name, part in model.named_modules() if _method_of(part)]
    with preserve_rng_states(model), torch.no_grad():
        norms = any(True for _ in _norms(model))
        watched = (
            trees if trees or blocks else foldable_layers(model)
        )  # what is watched of a plain network is not run for again
        runs = _observe(model, watched, blocks, args) if trees or blocks or norms else {}
        fused = _replaced(model, runs, args)
        proofs = [runs]
        if fused.replaced and fused.is_blind:
            proofs += _varied_runs(model, runs)
        if fused.replaced and not _same_answers(model, fused.model, proofs):
            fused = _largest_right(model, proofs, args, fused)
    remarks = [_summary(fused.left)] if fused.left else []
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        remarks.append("what is a TorchScript module in it was left as it is: fuse the network before it is scripted")
    if fused.replaced and None in runs.values():
        remarks.append(
            "the model takes none of the images that were drawn, so each replaced layer was checked by itself and not "
            "all of them together: give images that it takes, fuse(model, images)"
        )
    if remarks:
        warnings.warn("; ".join(remarks), UnfoldedWarning, stacklevel=2)
    for module in fused.model.modules():
        if isinstance(vars(module).get("forward"), TrainingForward):  # of layers that may be gone
            del module.forward
    return fused.model


def unfused_norms(model: nn.Module) -> list[str]:
    """List the names of the BatchNorms that a network still has: none if it is entirely fused."""
    return [name for name, _ in _norms(model)]


def outermost_trees(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The names and modules of a network's Chains and Sums that are not inside another one."""
    if isinstance(module, (Chain, Sum)) and is_linear(module):
        yield name, module
        return
    for key, child in module.named_children():
        yield from outermost_trees(child, f"{name}.{key}" if name else key)


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))


def _observe(
    model: nn.Module, units: Mapping[str, nn.Module], blocks: Sequence[str], example: ExampleInput | None
) -> dict[str, ObservedRun | None]:
    return {prefix: observe_run(root, prefix, units, blocks, example) for prefix, root in callable_roots(model)}


def _replaced(
    model: nn.Module, runs: Mapping[str, ObservedRun | None], example: ExampleInput | None, skip: Iterable[str] = ()
) -> _Fused:
    """Replace all that may be replaced, in a copy, but for the names in `skip`."""
    left = dict.fromkeys(skip, "the network's answer changes with it")
    trees = dict(outermost_trees(model))
    left |= _why_not_trees(model, trees, runs) | left
    # deepcopy finds the fused layers in its memo, as if it had copied the trees to them already.
    memo: dict[int, object] = {}
    for name, tree in trees.items():
        if name in left:
            continue
        try:
            layer = fused_layer(tree)
            wrong = _wrong_tree(tree, layer, _bare(tree, name, runs))
        except (TypeError, ValueError) as error:
            wrong = str(error)
        if wrong:
            left[name] = wrong
            continue
        for attribute in (*HOOKS, *HOOK_FLAGS):
            setattr(layer, attribute, copy.copy(getattr(tree, attribute)))
        memo[id(tree)] = layer
    fused = _Fused(model=copy_network(model, memo), replaced=[name for name in trees if name not in left], left=left)
    if next(_norms(fused.model), None) is not None:
        fused.model = _fuse_blocks_(fused.model, fused, runs)
        is_plain = not trees and not any(map(_method_of, model.modules()))
        folded, why, fused.is_blind = fold_norms_(fused.model, example, fused.left, runs if is_plain else None)
        fused.replaced += folded
        fused.left |= why
    return fused


def _summary(left: Mapping[str, str]) -> str:
    """One line: how many parts were left as they were, and their names by reason."""
    named = {name: why for name, why in left.items() if not any(_within(name, other) for other in left)}
    reasons: dict[str, list[str]] = {}
    for name, why in named.items():
        reasons.setdefault(why, []).append(name or "the model")
    lines = []
    for why, names in reasons.items():
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        lines.append(f"{', '.join(names[:_MOST_NAMES])}{more} ({why})")
    return f"could not fold {len(named)}: {'; '.join(lines)}"


def _within(name: str, other: str) -> bool:
    return name != other and (name.startswith(f"{other}.") or not other)


# ------------------------------------------------------------------------------------------- the proof


def _varied_runs(model: nn.Module, runs: Mapping[str, ObservedRun | None]) -> list[dict[str, ObservedRun | None]]:
    """Runs on the first image alone, on a part of it and on other values, as far as the network takes them."""
    found: list[dict[str, ObservedRun | None]] = []
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x[:1],
        lambda x: x[:1, ..., : -(-x.shape[-1] * 3 // 4)],
        lambda x: -100 * x.abs(),
    )
    for changed in changes:
        others: dict[str, ObservedRun | None] = {}
        for prefix, root in callable_roots(model):
            seen = runs.get(prefix)
            given = () if seen is None else seen.args
            bare = copy_without_hooks(root)
            with suppress(Exception):  # a network that takes other inputs may raise anything
                args = tuple(changed(x) if isinstance(x, Tensor) and x.dim() else x for x in given)
                others[prefix] = ObservedRun(args=args, output=run_copy(bare, args), bare=bare)
        found.append(others)
    return found


def _same_answers(model: nn.Module, fused: nn.Module, proofs: Sequence[Mapping[str, ObservedRun | None]]) -> bool:
    return all(_same_answer(model, fused, runs) for runs in proofs)


def _same_answer(model: nn.Module, fused: nn.Module, runs: Mapping[str, ObservedRun | None]) -> bool:
    """Whether the fused network answers as the original did on the examples, as far as rounding allows."""
    if any(p.is_meta for p in model.parameters()):
        return True  # there are no numbers to compare
    after = dict(callable_roots(fused))
    for prefix, root in callable_roots(model):
        seen = runs.get(prefix)
        if seen is None:
            continue
        try:
            distance, allowed = float64_drift(root, after[prefix], seen.args, rounded=seen.output, bare=seen.bare)
        except Exception:  # a part that its network names was folded away, and whatever that raises there
            return False
        if not distance <= max(allowed, 8 * EPS32):
            return False
    return True


def _largest_right(
    model: nn.Module,
    proofs: Sequence[Mapping[str, ObservedRun | None]],
    example: ExampleInput | None,
    whole: _Fused,
) -> _Fused:
    """Fuse as many of the replacements as leave the answer alone, by halves; the rest is named."""
    every, trials, runs = set(whole.replaced), 0, proofs[0]
    good: list[str] = []

    def grow(names: list[str]) -> None:
        nonlocal trials
        trials += 1
        if trials <= _MOST_TRIALS:
            tried = _replaced(model, runs, example, every - {*good, *names})
            if _same_answers(model, tried.model, proofs):
                good.extend(names)
            elif len(names) > 1:
                grow(names[: len(names) // 2])
                grow(names[len(names) // 2 :])

    grow(whole.replaced[: len(whole.replaced) // 2])
    grow(whole.replaced[len(whole.replaced) // 2 :])
    return _replaced(model, runs, example, every - set(good))


# --------------------------------------------------------------------------------------- our own trees


def _why_not_trees(
    model: nn.Module, trees: Mapping[str, nn.Module], runs: Mapping[str, ObservedRun | None]
) -> dict[str, str]:
    """The trees that may not be folded: for a weight that is shared or read elsewhere, a hook inside, or a mode."""
    left: dict[str, str] = {}
    owners: dict[int, set[str]] = {}
    names = {id(tree): name for name, tree in trees.items()}
    holder = {"": names.get(id(model), "outside")}  # by path: a part of a tree may be reached around it too
    for path, module in model.named_modules(remove_duplicate=False):
        above = holder.get(path.rpartition(".")[0], "outside")
        holder[path] = names.get(id(module), above) if above == "outside" else above
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            owners.setdefault(id(tensor), set()).add(holder[path])
    for name, tree in trees.items():
        for path, part in tree.named_modules():
            if path and has_hooks(part):
                left.setdefault(name, f"layer {path!r} inside has a hook, which would be folded away")
            elif isinstance(part, _BatchNorm) and part.training:
                left.setdefault(name, f"norm {path!r} inside is in train mode")
            for key, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                if len(owners[id(tensor)]) > 1:
                    inner = f"{path}.{key}".lstrip(".")
                    left.setdefault(name, f"{inner!r} inside is shared with another part of the network")
        if any(seen is not None and name in seen.read_elsewhere for seen in runs.values()):
            left.setdefault(name, "a weight inside is read by another part of the network")
    return left


def _bare(tree: nn.Module, name: str, runs: Mapping[str, ObservedRun | None]) -> nn.Module:
    """A bare copy of a tree: that of the run, where there was one, for copies are what takes the time."""
    for prefix, seen in runs.items():
        if seen is not None and name.startswith(prefix):
            return seen.bare.get_submodule(name.removeprefix(prefix))
    return copy_without_hooks(tree)


def _wrong_tree(tree: nn.Module, layer: nn.Module, bare: nn.Module) -> str | None:
    """Why a tree's fused layer is not the tree, on drawn input in float64; None where it is. `bare` is a copy of it."""
    like, channels = next(tree.parameters()), input_channels(tree)
    device = "cpu" if like.device.type == "mps" else None  # which has no float64
    wide, layer = bare.to(device, torch.float64), copy.deepcopy(layer).to(device)
    reach = 1
    if isinstance(layer, nn.Conv2d):
        reach = max(k * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    num_inputs = channels or 1
    shape = (4, num_inputs) if isinstance(layer, nn.Linear) else (2, num_inputs, reach + 5, reach + 6)
    x = random_like(next(wide.parameters()), *shape)
    return fused_layer_error(wide(x), layer.double()(x), rounding_unit(tree))


# ------------------------------------------------------------------- blocks of other projects


def _method_of(module: nn.Module) -> str | None:
    """The name of a block's method that fuses it and can be called without arguments; None where it has none."""
    if isinstance(module, (Chain, Sum)):
        return None
    for name in _FUSING_METHODS:
        method = getattr(type(module), name, None)
        if callable(method):
            parameters = inspect.signature(method).parameters.values()
            if sum(p.default is p.empty and p.kind in (0, 1) for p in parameters) == 1:  # self
                return name
    return None


def _fuse_blocks_(
    module: nn.Module, fused: _Fused, runs: Mapping[str, ObservedRun | None], name: str = ""
) -> nn.Module:
    """Call the fusing method of every block that has one, outermost first; give the module that `module` became."""
    method = _method_of(module)
    if method is not None and name not in fused.left:
        why = _why_not_block(module, method, fused.model, runs, name)
        if why is None:
            module = _fuse_block_(module, method)
            fused.replaced.append(name)
        else:
            fused.left[name] = why
    for key, child in list(module.named_children()):
        result = _fuse_blocks_(child, fused, runs, f"{name}.{key}" if name else key)
        if result is not child:
            setattr(module, key, result)
    return module


def _fuse_block_(module: nn.Module, method: str) -> nn.Module:
    """Fuse a block by its method; dtype, device, hooks and flags stay as they were."""
    like = next(module.parameters(), torch.empty(0))
    trainable = any(p.requires_grad for p in module.parameters())
    old = (*module.parameters(), *module.modules())  # kept alive, so that no new object gets the id of an old one
    before = {id(part) for part in old}
    mode = module.training
    result = getattr(module, method)()
    block = result if isinstance(result, nn.Module) else module
    if block is not module:
        for attribute in (*HOOKS, *HOOK_FLAGS):
            setattr(block, attribute, getattr(module, attribute))
    block.to(device=like.device, dtype=like.dtype)  # some of them make float32 of any dtype
    for parameter in block.parameters():
        if id(parameter) not in before:  # and many detach the new kernel, which freezes it
            parameter.requires_grad_(trainable)
    for part in block.modules():
        if id(part) not in before:  # a new module is in train mode
            part.training = mode
    return block


def _why_not_block(
    block: nn.Module, method: str, network: nn.Module, runs: Mapping[str, ObservedRun | None], name: str
) -> str | None:
    """Why a block may not be fused by its own method, tried on a copy; None where the copy answers as the block."""
    if any(path and has_hooks(part) for path, part in block.named_modules()):
        return "a layer inside has a hook, which would be folded away"
    inside = {id(part) for part in block.modules()}
    ours = {id(p) for p in block.parameters()}
    for part in network.modules():
        if id(part) not in inside and any(id(p) in ours for p in part.parameters(recurse=False)):
            return "a weight inside is shared with another part of the network"
    if any(isinstance(part, _BatchNorm) and part.training for part in block.modules()):
        return "a norm inside is in train mode"
    try:
        other = _fuse_block_(copy_without_hooks(block), method)
    except Exception as error:  # another project's code may raise anything
        return f"its {method}() failed: {error}"
    inputs = [seen.part_inputs[name] for seen in runs.values() if seen is not None and name in seen.part_inputs]
    if not inputs:
        inputs = [(args, {}) for args in itertools.islice(random_examples(block), 1)]
    if not inputs:
        return f"what its {method}() makes cannot be checked: it was not called"
    (args, kwargs), *_ = inputs
    if any(p.is_meta for p in block.parameters()):
        return None
    try:
        distance, allowed = float64_drift(_WithArguments(block, kwargs), _WithArguments(other, kwargs), args)
    except Exception as error:
        return f"what its {method}() makes cannot be checked: {error}"
    # These methods compute in float32, whatever the dtype.
    return None if distance <= max(allowed, 64 * EPS32) else f"its {method}() changes its answer by {distance:.1g}"


class _WithArguments(nn.Module):
    """A block with the keyword arguments of its call."""

    def __init__(self, block: nn.Module, kwargs: Mapping[str, object]) -> None:
        super().__init__()
        self.block, self.kwargs = block, kwargs

    def forward(self, *args: object) -> object:
        """Call the block."""
        return self.block(*args, **self.kwargs)
