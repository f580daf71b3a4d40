"""The table of networks: what each costs before and after folding, and what its paper says of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onefold.errors import BadArgument
from onefold.models import CATALOGUE, Cost, cost, create_model, list_models
from onefold.reparam import fuse


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network: exact counts at `size` pixels, in training and folded, and the published accuracy in percent."""

    name: str
    size: int
    train: Cost
    folded: Cost
    top1: float | None
    source: str


def table(pattern: str = "*", size: int | None = None) -> Iterator[Row]:
    """Rows in the catalogue's order. Raises BadArgument for a pattern that no name matches, or a size below 32."""
    names = list_models(pattern) or list_models(f"*{pattern}*")
    if not names:
        raise BadArgument(f"no model is called like {pattern!r}: `onefold models` lists all")
    if size is not None and not 32 <= size <= 4096:
        raise BadArgument(f"size must be from 32 to 4096 pixels, not {size}")
    for name in names:
        entry = CATALOGUE[name]
        model, side = create_model(name).eval(), size or entry.size
        yield Row(
            name=name,
            size=side,
            train=cost(model, side),
            folded=cost(fuse(model), side),
            top1=entry.top1,
            source=entry.source,
        )
