"""`activations` and `blocks`: what stands between convolutions costs, in a network of 30 layers (MobileOne).

The paper describes its network in words only. This one has a dense 3x3 stem of stride 2 and 29 dense 3x3 convolutions
in four stages of 32, 64, 128 and 256 channels, each with its norm (fused) and the activation, no skips: the same
convolutions whatever the activation is. What a gate has beside them is counted in its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from onefold.studies.published import TABLE_2, TABLE_3
from onefold.studies.study import (
    Measured,
    Point,
    Published,
    Study,
    StudySummary,
    latency_tables,
    order_conclusion,
    ratio_figure,
)

if TYPE_CHECKING:
    from torch import nn

ACTIVATIONS = (*TABLE_2, "hard-swish")


def _build(activation: str) -> nn.Module:
    from onefold.studies.plain_network import plain_network

    return plain_network(activation)


def _groups() -> Sequence[Sequence[Point]]:
    title = "paper, iPhone 12 ms"
    return [
        [
            Point(
                name=name,
                build=partial(_build, name),
                published={title: Published(TABLE_2[name])} if name in TABLE_2 else {},
            )
            for name in ACTIVATIONS
        ]
    ]


def _build_block(activation: str, has_skips: bool) -> nn.Module:
    from onefold.studies.plain_network import plain_network

    return plain_network(activation, has_skips=has_skips)


def _block_groups() -> Sequence[Sequence[Point]]:
    kinds = {"plain": ("ReLU", False), "squeeze-excite": ("SE-ReLU", False), "skips": ("ReLU", True)}
    title = "paper, iPhone 12 ms"
    return [
        [
            Point(
                name=name,
                build=partial(_build_block, *kind),
                published={title: Published(TABLE_3[name], confirmed=False)},
            )
            for name, kind in kinds.items()
        ]
    ]


def _summarize_blocks(measured: Measured) -> StudySummary:
    paper = {name: ms / TABLE_3["plain"] for name, ms in TABLE_3.items()}
    return StudySummary(
        tables=latency_tables(measured),
        figures=(ratio_figure(measured, "What a block costs", paper, "the paper, iPhone 12 (not confirmed)"),),
        conclusions=tuple(
            order_conclusion(target, rows, TABLE_3, is_confirmed=False)
            for target, rows in measured.rows.items()
            if len(rows) > 1
        ),
    )


def _summarize(measured: Measured) -> StudySummary:
    paper = {name: ms / TABLE_2["ReLU"] for name, ms in TABLE_2.items()}
    return StudySummary(
        tables=latency_tables(measured),
        figures=(ratio_figure(measured, "What an activation costs", paper, "the paper, iPhone 12"),),
        conclusions=tuple(
            order_conclusion(target, rows, TABLE_2) for target, rows in measured.rows.items() if len(rows) > 1
        ),
    )


STUDIES = {
    "blocks": Study(
        name="blocks",
        question="What do squeeze-excite gates and skip connections cost in a network of 30 layers?",
        source="MobileOne (arXiv 2206.04040), Table 3",
        groups=_block_groups,
        summarize=_summarize_blocks,
        precisions=("fp32", "int8"),
        notes=(
            "No source here confirms the numbers of Table 3; the plain network's and squeeze-excite's are Table 2's.",
        ),
    ),
    "activations": Study(
        name="activations",
        question="What does an activation function cost in a network of 30 layers?",
        source="MobileOne (arXiv 2206.04040), Table 2",
        groups=_groups,
        summarize=_summarize,
        precisions=("fp32", "int8"),
        notes=(
            "The paper describes its 30-layer network in words only; ours is stated in docs/studies.md.",
            "Table 2 has no row of hard-swish; it is measured beside the others.",
        ),
    ),
}
