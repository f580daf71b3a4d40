"""The table of networks: what each costs before and after folding, and what its paper says of it.

The costs at each network's own size are facts: they lie beside this file, as `count_model` has counted them, so that
the table is there before torch is imported. `python tests/test_models_table.py` writes them anew.
"""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from onefold.errors import BadArgument

COUNTS_FILE = Path(__file__).with_name("model_costs.json")

_progress = logging.getLogger("onefold.progress")


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One network: exact counts at `size` pixels, in training and folded, and the published accuracy in percent.

    The counts are those of `onefold.models.ModelCost`: params, macs, gate_macs, elementwise.
    """

    name: str
    size: int
    train: Mapping[str, int]
    folded: Mapping[str, int]
    top1: float | None
    source: str


def model_rows(pattern: str = "*", size: int | None = None) -> Iterator[ModelRow]:
    """Rows in the catalogue's order. Raises BadArgument for a pattern that no name matches, or a size below 32."""
    known = {row["name"]: ModelRow(**row) for row in json.loads(COUNTS_FILE.read_text(encoding="utf-8"))}
    names = fnmatch.filter(known, pattern.lower()) or fnmatch.filter(known, f"*{pattern.lower()}*")
    if not names:
        raise BadArgument(f"no model is called like {pattern!r}: `onefold models` lists all")
    if size is not None and not 32 <= size <= 4096:
        raise BadArgument(f"size must be from 32 to 4096 pixels, not {size}")
    for number, name in enumerate(names):
        _progress.debug("counting %s", name, extra={"done": number, "total": len(names)})
        row = known[name]
        yield row if size in (None, row.size) else count_model(name, size)


def count_model(name: str, size: int | None = None) -> ModelRow:
    """Count a network of the catalogue, on the meta device: nothing is drawn or computed."""
    import torch

    from onefold.models import CATALOGUE, count_flops, create_model
    from onefold.reparam import fuse

    entry = CATALOGUE[name]
    with torch.device("meta"):
        model, side = create_model(name).eval(), size or entry.size
        folded = fuse(model)
    return ModelRow(
        name=name,
        size=side,
        train=asdict(count_flops(model, side)),
        folded=asdict(count_flops(folded, side)),
        top1=entry.top1,
        source=entry.source,
    )
