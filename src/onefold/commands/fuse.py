"""weights -> fused.safetensors: fuse, check that the answer is the same, and save."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from onefold.commands.open_network import open_network
from onefold.commands.timm_networks import is_timm, save_timm
from onefold.errors import BadArgument
from onefold.models import Cost, cost
from onefold.models.hub import save_weights


@dataclass(frozen=True, kw_only=True)
class FuseResult:
    """What came of fusing: the file, how far its answer is off, and what it costs now and did before.

    `left_norms` counts the norms that could not be folded.
    """

    path: Path
    drift: float
    before: Cost
    after: Cost
    left_norms: int = 0


def fuse(source: str | Path, out: Path, *, name: str | None = None, tolerance: float | None = None) -> FuseResult:
    """Fuse weights into a file of our own format. Raises GateFailed where the drift exceeds the tolerance."""
    network = open_network(source, name=name)
    if network.is_fused:
        raise BadArgument(f"{source} is fused already: use it as it is")
    fused, distance = network.fused(tolerance)
    write = save_timm if is_timm(fused.card.model) else save_weights
    write(fused.model, out, replace(fused.card, source=fused.card.source or str(source)))
    size = network.preprocessing.size
    return FuseResult(
        path=out,
        drift=distance,
        before=cost(network.model, size),
        after=cost(fused.model, size),
        left_norms=fused.left_norms,
    )
