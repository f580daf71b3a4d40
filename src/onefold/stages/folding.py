"""best -> fused.safetensors -> artifacts/<runtime>-<precision>/: the two stages that change a network's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onefold.data import Preprocessing
from onefold.errors import BadArgument
from onefold.models import Cost, cost
from onefold.models.hub import save_weights
from onefold.quantize import Quantized
from onefold.runtimes import About, Artifact
from onefold.runtimes import export as export_to
from onefold.stages.foreign import is_foreign, save_foreign
from onefold.stages.network import TOLERANCE, Network, open_network
from onefold.stages.quantizing import Calibration, quantized, told


@dataclass(frozen=True, kw_only=True)
class Fused:
    """What came of fusing: the file, how far its answer is off, and what it costs now and did before."""

    path: Path
    drift: float
    before: Cost
    after: Cost


def fuse(source: str | Path, out: Path, *, name: str | None = None, tolerance: float = TOLERANCE) -> Fused:
    """Fuse weights into a file of our own format. Raises GateFailed where the drift exceeds the tolerance."""
    network = open_network(source, name=name)
    if network.is_fused:
        raise BadArgument(f"{source} is fused already: use it as it is")
    fused, distance = network.fused(tolerance)
    write = save_foreign if is_foreign(fused.card.model) else save_weights
    write(fused.model, out, replace(fused.card, source=fused.card.source or str(source)))
    size = network.preprocessing.size
    return Fused(path=out, drift=distance, before=cost(network.model, size), after=cost(fused.model, size))


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to export to: runtimes by name, one precision, the side of the images in pixels (None: the card's).

    int8 needs `calibration`; no other precision takes it.
    """

    runtimes: Sequence[str]
    precision: str = "fp32"
    size: int | None = None
    fused: bool = True
    tolerance: float = TOLERANCE
    calibration: Calibration | None = None


def export(source: str | Path, out: Path, order: Order, *, name: str | None = None) -> list[Artifact]:
    """One verified artifact a runtime, in `out`/<runtime>-<precision>; weights are fused first unless told not to."""
    network = open_network(source, name=name)
    if order.fused and not network.is_fused:
        network, _ = network.fused(order.tolerance)
    network = _at(network, order.size)
    made = _quantized(network, order)
    about, size = about_of(network, source, made), network.preprocessing.size
    suffix = "" if about.fused else "-unfused"
    return [
        export_to(
            network.model if made is None else made,
            (network.card.in_chans, size, size),
            out / f"{runtime}-{order.precision}{suffix}",
            runtime=runtime,
            about=about,
            precision=order.precision,
        )
        for runtime in order.runtimes
    ]


def about_of(network: Network, source: str | Path, made: Quantized | None = None) -> About:
    """What an artifact's manifest says of a network, and of how it was quantized."""
    card = network.card
    return About(
        model=card.model,
        fused=network.is_fused,
        drift=card.drift,
        classes=card.classes,
        preprocessing=network.preprocessing.to_dict(),
        licence=card.licence or None,
        source=card.source or str(source),
        details={**({} if made is None else told(made)), **({"untrained": True} if card.untrained else {})},
    )


def _quantized(network: Network, order: Order) -> Quantized | None:
    """The network of 8 bits, where that is what is asked for. BadArgument where photos are missing or too many."""
    if (order.precision == "int8") != (order.calibration is not None):
        raise BadArgument("int8 is calibrated on photos of the kind it will see: give --data with --precision int8")
    return None if order.calibration is None else quantized(network, order.calibration)


def _at(network: Network, size: int | None) -> Network:
    """The network, told to be used on images of another size."""
    if size is None:
        return network
    other = Preprocessing.from_dict({**network.preprocessing.to_dict(), "size": size})
    return replace(network, card=replace(network.card, preprocessing=other.to_dict()))
