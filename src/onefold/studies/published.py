"""The tables of the papers that studies are held against, as their sources print them.

MobileOne: arXiv 2206.04040 (CVPR 2023). CPU is an Intel Xeon Gold 5118, mobile an iPhone 12 with Core ML; one image.
MobileNetV1: arXiv 1704.04861; accuracies of its whole grid are those of TF-slim's checkpoints of 2018-02-22.
"""

from __future__ import annotations

from typing import NamedTuple


class Table9Row(NamedTuple):
    """A row of MobileOne's Table 9: top-1 in percent, millions of FLOPs and of parameters, milliseconds."""

    top1: float
    mflops: float
    mparams: float
    cpu_ms: float
    mobile_ms: float


TABLE_9 = {
    "Mobile-Former-96M": Table9Row(72.8, 96, 4.6, 37.36, 16.95),
    "ConViT-tiny": Table9Row(73.1, 1000, 5.7, 28.95, 10.99),
    "MobileViT-S": Table9Row(78.4, 1792, 5.6, 30.76, 9.21),
    "Mobile-Former-52M": Table9Row(68.7, 52, 3.6, 29.23, 9.02),
    "PiT-ti": Table9Row(71.3, 710, 4.9, 16.37, 8.81),
    "MobileViT-XS": Table9Row(74.8, 941, 2.3, 27.21, 6.97),
    "DeiT-tiny": Table9Row(72.2, 1300, 5.9, 16.68, 4.78),
    "MobileViT-XXS": Table9Row(69.0, 373, 1.3, 23.03, 4.70),
    "RepVGG-B1": Table9Row(78.4, 11800, 51.8, 193.7, 3.73),
    "RepVGG-A2": Table9Row(76.5, 5100, 25.5, 93.43, 2.41),
    "MobileOne-S4": Table9Row(79.4, 2978, 14.8, 26.60, 1.86),
    "RepVGG-B0": Table9Row(75.1, 3100, 14.3, 55.97, 1.82),
    "EfficientNet-B0": Table9Row(77.1, 390, 5.3, 28.71, 1.72),
    "RepVGG-A1": Table9Row(74.5, 2400, 12.8, 47.15, 1.68),
    "MobileOne-S3": Table9Row(78.1, 1896, 10.1, 16.47, 1.53),
    "MobileNetV2-x1.4": Table9Row(74.7, 585, 6.9, 15.67, 1.36),
    "RepVGG-A0": Table9Row(72.4, 1400, 8.3, 43.61, 1.28),
    "MobileNeXt-x1.4": Table9Row(76.1, 590, 6.1, 18.06, 1.27),
    "MobileOne-S2": Table9Row(77.4, 1299, 7.8, 14.87, 1.18),
    "MixNet-S": Table9Row(75.8, 256, 4.1, 40.09, 1.13),
    "MobileNetV3-L": Table9Row(75.2, 219, 5.4, 17.09, 1.09),
    "ShuffleNetV2-2.0": Table9Row(74.9, 591, 7.4, 20.85, 1.08),
    "MNASNet-A1": Table9Row(75.2, 312, 3.9, 24.06, 1.00),
    "MobileNetV2-x1.0": Table9Row(72.0, 300, 3.4, 13.65, 0.98),
    "MobileNetV1": Table9Row(70.6, 575, 4.2, 10.65, 0.95),
    "MobileNeXt-x1.0": Table9Row(74.0, 311, 3.4, 16.04, 0.92),
    "MobileOne-S1": Table9Row(75.9, 825, 4.8, 13.04, 0.89),
    "MobileNetV3-S": Table9Row(67.4, 56, 2.5, 10.38, 0.83),
    "ShuffleNetV2-1.0": Table9Row(69.4, 146, 2.3, 16.60, 0.68),
    "MobileOne-S0": Table9Row(71.4, 275, 2.1, 10.55, 0.79),
}

TABLE_1_CPU = {"MACs": 0.06, "parameters": 0.07}
"""Spearman's correlation of latency with each, of MobileOne's Table 1; p-values .80 and .77."""
TABLE_1_MOBILE = {"MACs": 0.47, "parameters": 0.30}
"""The same on the phone; p-values .03 and .18."""

TABLE_2 = {
    "ReLU": 1.53,
    "GELU": 1.63,
    "SE-ReLU": 2.10,
    "SiLU": 2.54,
    "Dynamic Shift-Max": 57.04,
    "DynamicReLU-A": 273.49,
    "DynamicReLU-B": 242.14,
}
"""MobileOne's Table 2: milliseconds of a 30-layer network on the phone by its activation."""

TABLE_3 = {"plain": 1.53, "squeeze-excite": 2.10, "skips": 2.62}
"""MobileOne's Table 3, as it is remembered: no source here confirms it."""

# TF-slim's mobilenet_v1.md: top-1 in percent by width and resolution.
TF_SLIM_TOP1 = {
    (1.0, 224): 70.9, (1.0, 192): 70.0, (1.0, 160): 68.0, (1.0, 128): 65.2,
    (0.75, 224): 68.4, (0.75, 192): 67.2, (0.75, 160): 65.3, (0.75, 128): 62.1,
    (0.5, 224): 63.3, (0.5, 192): 61.7, (0.5, 160): 59.1, (0.5, 128): 56.3,
    (0.25, 224): 49.8, (0.25, 192): 47.7, (0.25, 160): 45.5, (0.25, 128): 41.5,
}  # fmt: skip
TABLES_6_AND_7_TOP1 = {
    (1.0, 224): 70.6, (0.75, 224): 68.4, (0.5, 224): 63.7, (0.25, 224): 50.6,
    (1.0, 192): 69.1, (1.0, 160): 67.2, (1.0, 128): 64.4,
}  # fmt: skip
"""MobileNetV1's Tables 6 and 7; Table 9 has (0.5, 160): 60.2. Its other points are in a figure alone."""
