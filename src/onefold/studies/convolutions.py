"""`depth-width` and `standard-vs-separable`: MobileNetV1's Tables 3, 4 and 5, in time.

The paper counts multiply-adds; a study asks whether the time follows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from onefold.report.study_results import Conclusion
from onefold.studies.networks import named_point
from onefold.studies.study import (
    Measured,
    Point,
    Published,
    Row,
    Study,
    StudySummary,
    Target,
    cost_conclusion,
    latency_tables,
    ratio_figure,
)

if TYPE_CHECKING:
    from torch import nn

# Tables 4 and 5: top-1 in percent, millions of multiply-adds and of parameters.
_NETWORKS = {
    "MobileNet": ("mobilenetv1_100", 70.6, 569.0, 4.2),
    "Conv MobileNet": ("conv_mobilenet_100", 71.7, 4866.0, 29.3),
    "0.75 MobileNet": ("mobilenetv1_075", 68.4, 325.0, 2.6),
    "Shallow MobileNet": ("mobilenetv1_shallow", 65.3, 307.0, 2.9),
}
# Layers of 3x3 convolutions, as in MobileNetV1 at 224 pixels: channels in and out, side of the map.
_LAYERS = ((32, 64, 112), (128, 128, 56), (256, 256, 28), (512, 512, 14), (1024, 1024, 7))
# Table 3: the layer of 512 channels at 14 x 14, in millions of multiply-adds and of parameters. Its last row has the
# width of the one before it too.
_TABLE_3 = {
    "separable": (52.3, 0.27),
    "standard": (462.0, 2.36),
    "separable, width 0.75": (29.6, 0.15),
    "separable, width 0.75, resolution 0.714": (15.1, 0.15),
}


def _networks() -> Sequence[Sequence[Point]]:
    points = {
        title: named_point(
            name,
            title=title,
            published={
                "top-1 %": Published(top1),
                "paper, MACs M": Published(macs),
                "paper, params M": Published(params),
            },
        )
        for title, (name, top1, macs, params) in _NETWORKS.items()
    }
    return [
        [points["MobileNet"], points["Conv MobileNet"]],
        [points["0.75 MobileNet"], points["Shallow MobileNet"]],
    ]


def _summarize_networks(measured: Measured) -> StudySummary:
    claims = {
        "Conv MobileNet": "full convolutions give 1.1 points more of top-1",
        "Shallow MobileNet": "five layers fewer give 3.1 points less of top-1 than three quarters of the width",
    }
    conclusions = [
        cost_conclusion(target, rows[name], said, rows[name].macs / rows[rows[name].baseline].macs)
        for target, rows in measured.rows.items()
        for name, said in claims.items()
        if name in rows and rows[name].baseline in rows
    ]
    expected = _macs_over_baseline(measured)
    return StudySummary(
        tables=latency_tables(measured),
        figures=(ratio_figure(measured, "Time over the baseline's", expected, "multiply-adds, counted"),),
        conclusions=tuple(conclusions),
    )


def _build_layer(c_in: int, c_out: int, is_separable: bool) -> nn.Module:
    from torch import nn

    from onefold.models.layers import PooledHead, conv_norm

    if is_separable:
        layers = [conv_norm(c_in, c_in, 3, groups=c_in), nn.ReLU(), conv_norm(c_in, c_out, 1), nn.ReLU()]
    else:
        layers = [conv_norm(c_in, c_out, 3), nn.ReLU()]
    return nn.Sequential(*layers, PooledHead(c_out, 0))


def _layer(kind: str, c_in: int, c_out: int, side: int, of: str) -> Point:
    published = {}
    if of == "512 at 14" and kind in _TABLE_3:
        macs, params = _TABLE_3[kind]
        published = {"paper, MACs M": Published(macs), "paper, params M": Published(params)}
    return Point(
        name=f"{of}, {kind}",
        build=partial(_build_layer, c_in, c_out, kind != "standard"),
        shape=(c_in, side, side),
        published=published,
    )


def _layers() -> Sequence[Sequence[Point]]:
    groups = []
    for c_in, c_out, side in _LAYERS:
        of = f"{c_out} at {side}"
        group = [_layer(kind, c_in, c_out, side, of) for kind in ("separable", "standard")]
        if of == "512 at 14":
            group += [
                _layer("separable, width 0.75", 384, 384, 14, of),
                _layer("separable, width 0.75, resolution 0.714", 384, 384, 10, of),
            ]
        groups.append(group)
    return groups


def _summarize_layers(measured: Measured) -> StudySummary:
    conclusions = [each for target, rows in measured.rows.items() for each in _layer_conclusions(target, rows)]
    expected = _macs_over_baseline(measured)
    return StudySummary(
        tables=latency_tables(measured),
        figures=(ratio_figure(measured, "Time over the separable layer's", expected, "multiply-adds, counted"),),
        conclusions=tuple(conclusions),
    )


def _layer_conclusions(target: Target, rows: Mapping[str, Row]) -> list[Conclusion]:
    return [
        cost_conclusion(target, row, f"layer of {name}", row.macs / rows[row.baseline].macs)
        for name, row in rows.items()
        if name != row.baseline and row.baseline in rows
    ]


def _macs_over_baseline(measured: Measured) -> dict[str, float]:
    rows = next(iter(measured.rows.values()), {})
    return {name: row.macs / rows[row.baseline].macs for name, row in rows.items() if row.baseline in rows}


STUDIES = {
    "depth-width": Study(
        name="depth-width",
        question="Does the time of MobileNetV1 follow its multiply-adds: full convolutions, fewer layers, less width?",
        source="MobileNetV1 (arXiv 1704.04861), Tables 4 and 5",
        groups=_networks,
        summarize=_summarize_networks,
    ),
    "standard-vs-separable": Study(
        name="standard-vs-separable",
        question="How much faster is a depthwise separable convolution than a standard one, layer by layer?",
        source="MobileNetV1 (arXiv 1704.04861), Table 3 and section 3.1",
        groups=_layers,
        summarize=_summarize_layers,
        notes=("Each network is one layer, its norms fused, and the mean of its map.",),
    ),
}
