"""How to quantize, as one value; and what came of it, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onefold.quantize.qparams import Ranges


@dataclass(frozen=True, kw_only=True)
class Method:
    """Post-training quantization to 8 bits.

    `equalize` makes the ranges of channels alike first, by "weights" or by "activations" (see there); without it by
    what suits `weights`. `ranges` chooses those of activations; `search` clips weights where that lowers their
    squared error; with `restore` a kernel is first moved to make good what the layers before it lost, which suits
    photos of the calibration's own kind; `rounding` of weights is to the "nearest" or by the "moments" of their
    inputs; `correct` lets biases make up for the mean of what is lost. `weights` have a scale a "channel" or, as DSPs
    want it, a "tensor", and whole numbers up to `limit`: 127, or 63 where 16-bit sums saturate (x86 without VNNI).
    With `powers` the order in which a runtime scales sums hardly matters (see there). `keep` names layers left in
    floating point.
    """

    equalize: Literal["none", "weights", "activations"] | None = None
    ranges: Ranges = "mse"
    search: bool = True
    restore: bool = False
    rounding: Literal["nearest", "moments"] = "moments"
    correct: bool = True
    weights: Literal["channel", "tensor"] = "channel"
    limit: int = 127
    powers: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.equalize is None:
            object.__setattr__(self, "equalize", "weights" if self.weights == "tensor" else "activations")

    @property
    def title(self) -> str:
        """A few words for a table."""
        steps = (
            [f"equalized by {self.equalize}"] * (self.equalize != "none") + [self.ranges] + ["clipped"] * self.search
        )
        steps += ["restored"] * self.restore
        steps += ["by moments"] * (self.rounding == "moments") + ["corrected"] * self.correct
        steps += ["7-bit weights"] * (self.limit == 63) + [f"{len(self.keep)} kept"] * bool(self.keep)
        return f"per {self.weights}, " + ", ".join(steps)


PLAIN = Method(equalize="none", ranges="minmax", search=False, rounding="nearest", correct=False, powers=False)
"""What a vendor's tool does by default: extremes, rounding to nearest."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What a layer lost: signal to quantization noise of its output in decibels, and of its weights alone."""

    name: str
    output_db: float
    weight_db: float
    quantized: bool
