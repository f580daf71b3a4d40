"""weights -> fused.safetensors: fuse, check that the answer is the same, and save."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from torch import Tensor, nn

from onefold import reparam
from onefold.commands.bench import bench
from onefold.commands.evaluate import evaluate
from onefold.commands.export import export
from onefold.commands.open_network import open_network
from onefold.commands.predict import predict
from onefold.commands.predictor import SavedResult, Source, is_timm, select_ema_weights, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.commands.timm_networks import save_timm
from onefold.errors import BadArgument
from onefold.models import ModelCost, count_flops
from onefold.models.load_model import save_weights

_log = logging.getLogger("onefold")


@dataclass(frozen=True, kw_only=True)
class FusedWeights(SavedResult):
    """A file of fused weights, how far its answer is off, and what the network costs now and did before.

    `drift` is the largest difference of outputs, relative to their size. `left_norms` counts the norms that could not
    be folded, and `was_fused` says that the weights were fused before. The verbs are methods: `predict`, `evaluate`,
    `export`, `bench`.
    """

    path: Path
    drift: float
    before: ModelCost
    after: ModelCost
    left_norms: int = 0
    was_fused: bool = False

    predict = predict
    evaluate = evaluate
    export = export
    bench = bench

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        params = f"{self.before.params:,} -> {self.after.params:,} parameters"
        how = "was fused already" if self.was_fused else f"drift {self.drift:.1e}"
        return f"FusedWeights({str(self.path)!r}, {how}, {params})"


@overload
def fuse(
    source: nn.Module,
    out: Tensor | tuple[object, ...] | None = None,
    *,
    example: Tensor | tuple[object, ...] | None = None,
) -> nn.Module: ...
@overload
def fuse(
    source: Source,
    out: Source = "fused.safetensors",
    *,
    model: str | None = None,
    use_ema: bool | None = None,
    tolerance: float | None = None,
) -> FusedWeights: ...
@suggest_argument_names
def fuse(
    source: nn.Module | Source,
    out: object = None,
    *,
    example: Tensor | tuple[object, ...] | None = None,
    model: str | None = None,
    use_ema: bool | None = None,
    tolerance: float | None = None,
) -> nn.Module | FusedWeights:
    """Fuse a network: one convolution in place of each block's branches and norms, the answer proved the same.

    Of a module, in eval mode, it gives a fused copy: see `onefold.reparam.fuse`; `fuse(module, example)` takes the
    arguments of a call to check the answer on. Of a run folder, a file of weights, an id of the hub or timm:NAME it
    writes the weights to `out` (fused.safetensors); those that are fused already are written as they are. `model` names
    the network where the weights do not, `use_ema` chooses EMA or plain weights where a checkpoint has both, and
    `tolerance` is the largest relative difference of outputs that passes: 1e-4, or 16 times the network's own rounding.

    Raises GateFailed where the difference is larger, BadCheckpoint, BadArgument, NotWritable; ValueError for a module
    in train mode.

        fused = onefold.fuse("runs/photos-finetune", "fused.safetensors")
        model = onefold.fuse(onefold.create_model("mobileone_s0").eval())
    """
    if isinstance(source, nn.Module):
        given = out if example is None else example  # `fuse(module, images)`
        return reparam.fuse(source, given)  # type: ignore[arg-type]  # the overloads say what it is
    if out is not None and not isinstance(out, str | os.PathLike):
        raise BadArgument(f"out is the file to write, not {type(out).__name__}")
    path = Path("fused.safetensors" if out is None else out)
    network = open_network(select_ema_weights(source, use_ema), name=model)
    fused, distance = network, network.card.drift or 0.0
    if network.is_fused:
        _log.info("%s is fused already: written as it is", os.fspath(source))
    else:
        with show_progress():
            fused, distance = network.fused(tolerance)
    if path.is_file():
        _log.info("%s was there already, and is replaced", path)
    write = save_timm if is_timm(fused.card.model) else save_weights
    write(fused.model, path, replace(fused.card, source=fused.card.source or os.fspath(source)))
    size = network.preprocessing.size
    return FusedWeights(
        path=path,
        drift=distance,
        before=count_flops(network.model, size),
        after=count_flops(fused.model, size),
        left_norms=fused.left_norms,
        was_fused=network.is_fused,
    )
