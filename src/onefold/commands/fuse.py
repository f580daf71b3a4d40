"""best -> fused.safetensors -> artifacts/<runtime>-<precision>/: the two commands that change a network's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onefold.commands.open import TOLERANCE, Network, open_network
from onefold.commands.quantizing import Calibration, quantized, told
from onefold.commands.timm import is_timm, save_timm
from onefold.errors import BadArgument, GateFailed
from onefold.models import Cost, cost
from onefold.models.hub import save_weights
from onefold.quantize import Quantized
from onefold.runtimes import Artifact, ModelInfo
from onefold.runtimes import export as export_to


@dataclass(frozen=True, kw_only=True)
class FuseResult:
    """What came of fusing: the file, how far its answer is off, and what it costs now and did before."""

    path: Path
    drift: float
    before: Cost
    after: Cost


def fuse(source: str | Path, out: Path, *, name: str | None = None, tolerance: float = TOLERANCE) -> FuseResult:
    """Fuse weights into a file of our own format. Raises GateFailed where the drift exceeds the tolerance."""
    network = open_network(source, name=name)
    if network.is_fused:
        raise BadArgument(f"{source} is fused already: use it as it is")
    fused, distance = network.fused(tolerance)
    write = save_timm if is_timm(fused.card.model) else save_weights
    write(fused.model, out, replace(fused.card, source=fused.card.source or str(source)))
    size = network.preprocessing.size
    return FuseResult(path=out, drift=distance, before=cost(network.model, size), after=cost(fused.model, size))


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export to: runtimes by name, one precision, the side of the images in pixels (None: the card's).

    int8 needs `calibration`, unless the weights were trained as a network of 8 bits; no other precision takes it.
    """

    runtimes: Sequence[str]
    precision: str = "fp32"
    size: int | None = None
    fused: bool = True
    tolerance: float = TOLERANCE
    calibration: Calibration | None = None


def export(source: str | Path, out: Path, order: ExportOptions, *, name: str | None = None) -> list[Artifact]:
    """One verified artifact a runtime, in `out`/<runtime>-<precision>; weights are fused first unless told not to.

    Raises GateFailed where a runtime's answer is not PyTorch's, once the artifacts of the other runtimes are written.
    """
    network = open_network(source, name=name)
    if order.fused and not network.is_fused:
        network, _ = network.fused(order.tolerance)
    network = network.with_size(order.size)
    made = _quantized(network, order)
    suffix = "" if network.is_fused else "-unfused"
    artifacts, failures = [], []
    for runtime in order.runtimes:
        folder = out / f"{runtime}-{order.precision}{suffix}"
        try:
            artifacts.append(export_made(network, made, folder, runtime, order.precision))
        except GateFailed as error:
            failures.append(str(error))
    if failures:
        written = ", ".join(str(artifact.folder) for artifact in artifacts)
        raise GateFailed("; ".join(failures) + (f"; these are written: {written}" if written else ""))
    return artifacts


def export_made(network: Network, made: Quantized | None, folder: Path, runtime: str, precision: str) -> Artifact:
    """One verified artifact of a network, or of the one of 8 bits that was `made` of it."""
    size = network.preprocessing.size
    return export_to(
        network.model if made is None else made,
        (network.card.in_chans, size, size),
        folder,
        runtime=runtime,
        info=model_info(network, network.title, made),
        precision=precision,
    )


def _cost(network: Network) -> dict[str, int]:
    """What the exported network computes for one image, for whoever holds its latency against the machine's limits."""
    counted = cost(network.model, network.preprocessing.size)
    return {"params": counted.params, "macs": counted.macs}


def model_info(network: Network, source: str | Path, made: Quantized | None = None) -> ModelInfo:
    """What an artifact's manifest says of a network, and of how it was quantized."""
    card = network.card
    return ModelInfo(
        model=card.model,
        fused=network.is_fused,
        drift=card.drift,
        classes=card.classes,
        preprocessing=network.preprocessing.to_dict(),
        licence=card.licence or None,
        source=card.source or str(source),
        details={
            "cost": _cost(network),
            **({} if made is None else told(made)),
            **({"untrained": True} if card.untrained else {}),
        },
    )


def _quantized(network: Network, order: ExportOptions) -> Quantized | None:
    """The network of 8 bits, where that is what is asked for. BadArgument where photos are missing or too many."""
    photos, wanted = order.calibration is not None, order.precision == "int8"
    if (photos and not wanted) or (wanted and not photos and network.card.int8 is None):
        raise BadArgument("int8 is calibrated on photos of the kind it will see: give --data with --precision int8")
    return quantized(network, order.calibration) if wanted else None
