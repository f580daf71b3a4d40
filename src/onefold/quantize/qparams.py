"""Quantization parameters: scale and zero point of 8-bit tensors, how they are chosen, and the method's options.

A quantized value stands for scale * (q - zero_point), with an integer q in QMIN..QMAX. Activations are asymmetric, with
one scale and zero point per tensor; weights are symmetric, with one scale per channel or per tensor and the zero point
0. Rounding is to nearest, ties to even, as in every runtime's QuantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from onefold.errors import BadArgument
from onefold.quantize.graph import map_over_batches

RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]
Granularity = Literal["channel", "tensor"]
QMIN, QMAX = -128, 127
_BINS = 2048
_CANDIDATES = 60
_MAX_COUNTED = 4_000_000  # values of an activation, near which its histogram stays
_PERCENTILE = 0.9999
_CACHED = 2**17  # values of weights, that stay in a cache while scales are tried


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of an activation: int8, one pair for the whole tensor."""

    scale: float
    zero_point: int

    @classmethod
    def from_range(cls, low: float, high: float) -> QParams:
        """Choose the parameters that span low..high and represent 0 exactly, so that zero padding is exact.

        The zero point is rounded first, and the scale then made as large as both ends need. Without that, the range
        -1..1 would put black and white pixels half-way between two steps, and runtimes would round them differently.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        step = max(high - low, 1e-8) / (QMAX - QMIN)
        zero = min(max(round(QMIN - low / step), QMIN), QMAX)
        ends = [-low / (zero - QMIN) if zero > QMIN else 0.0, high / (QMAX - zero) if zero < QMAX else 0.0]
        return cls(float(np.float32(max(step, *ends))), zero)

    @property
    def low(self) -> float:
        """The smallest representable value."""
        return (QMIN - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The largest representable value."""
        return (QMAX - self.zero_point) * self.scale

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Round to the nearest representable values: a float tensor of any shape in and out."""
        q = (x * (1.0 / self.scale)).round_().add_(self.zero_point).clamp_(QMIN, QMAX)
        return q.sub_(self.zero_point).mul_(self.scale)


def choose_qparams(chunks: Sequence[Tensor], range_method: RangeMethod) -> QParams:
    """Choose parameters for a tensor given in chunks: by its extremes, a percentile, squared error or entropy.

    Sources: the percentile and the entropy as in Wu et al., arXiv 2004.09602; the entropy's search as in Migacz, "8-bit
    inference with TensorRT" (GTC 2017).
    """
    ends = map_over_batches(torch.aminmax, chunks)
    low, high = min(float(end.min) for end in ends), max(float(end.max) for end in ends)
    if range_method == "minmax" or not high > low:
        return QParams.from_range(low, high)
    # Of millions of values every n-th is counted, n being odd: the widths of maps are even.
    step = sum(chunk.numel() for chunk in chunks) // _MAX_COUNTED | 1
    width = torch.tensor(high) - torch.tensor(low)
    counts = sum(map_over_batches(lambda chunk: _count(chunk.flatten()[::step], low, width), chunks))
    assert isinstance(counts, Tensor)
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    if range_method == "percentile":
        return _by_percentile(counts, edges)
    loss = _squared_error if range_method == "mse" else _divergence
    return _by_search(counts, edges, loss)


def _count(values: Tensor, low: float, width: Tensor) -> Tensor:
    """Count float32 values from `low` to `low` + `width` in equal bins, as torch.histc does in twice the time."""
    counts = torch.bincount((values - low).div_(width).mul_(_BINS).int(), minlength=_BINS + 1).double()
    counts[_BINS - 1] += counts[_BINS]  # the largest value
    return counts[:_BINS]


def _by_percentile(counts: Tensor, edges: Tensor) -> QParams:
    """Keep all but one in ten thousand values; of a tensor with two tails, half of those are cut at each end."""
    cumulative = torch.cumsum(counts, 0) / counts.sum()
    tail = 1 - _PERCENTILE
    one_sided = float(edges[0]) >= 0
    below = 0.0 if one_sided else tail / 2
    first = int(torch.searchsorted(cumulative, below))
    last = int(torch.searchsorted(cumulative, 1 - (tail - below)))
    return QParams.from_range(float(edges[first]), float(edges[min(last + 1, len(edges) - 1)]))


def _by_search(counts: Tensor, edges: Tensor, loss: Callable[[Tensor, Tensor, QParams], float]) -> QParams:
    """Try narrower and narrower ranges, both ends scaled alike, and keep the one of the least loss."""
    centres = (edges[1:] + edges[:-1]) / 2
    low, high = float(edges[0]), float(edges[-1])
    candidates = [QParams.from_range(low * s, high * s) for s in np.linspace(1.0, 0.15, _CANDIDATES)]
    return min(candidates, key=lambda qparams: loss(counts, centres, qparams))


def _squared_error(counts: Tensor, centres: Tensor, qparams: QParams) -> float:
    # Within a bin values are uniform, which adds a term that is the same for all candidates: it is left out.
    return float((counts * (qparams.fake_quantize(centres) - centres) ** 2).sum())


def _divergence(counts: Tensor, centres: Tensor, qparams: QParams) -> float:
    """Compute KL(values, quantized values), the mass of each level spread over the bins that round to it."""
    inside = (centres >= qparams.low - qparams.scale / 2) & (centres <= qparams.high + qparams.scale / 2)
    level = (torch.round(centres / qparams.scale) + qparams.zero_point).clamp(QMIN, QMAX).long() - QMIN
    clipped = torch.where(inside, counts, 0.0)
    true = clipped.clone()
    ends = inside.nonzero().flatten()
    if not len(ends):  # all is clipped
        return math.inf
    true[ends[0]] += counts[: ends[0]].sum()
    true[ends[-1]] += counts[ends[-1] + 1 :].sum()
    seen = true > 0
    mass = torch.zeros(256, dtype=torch.float64).index_add_(0, level[seen], clipped[seen])
    bins = torch.zeros(256, dtype=torch.float64).index_add_(0, level[seen], torch.ones_like(clipped[seen]))
    spread = (mass / bins.clamp(min=1))[level]
    p, q = true[seen] / true.sum(), spread[seen] / spread[seen].sum()
    return float((p * torch.log(p / q.clamp(min=1e-12))).sum())


def weight_scales(weight: Tensor, *, qmax: int, per_tensor: bool, clip: bool) -> Tensor:
    """Choose positive float32 scales (O,) for the rows of `weight` (O, K); with `per_tensor` all are the same.

    A weight becomes at most `qmax`. With `clip` the largest weights are clipped where that lowers the squared error.
    """
    rows = weight.reshape(1, -1) if per_tensor else weight
    full = (rows.abs().amax(1) / qmax).clamp(min=1e-12)
    if clip:
        size = max(1, _CACHED // rows.shape[1])
        full = torch.cat(map_over_batches(partial(_clipping_scales, qmax), rows.split(size), full.split(size)))
    return full.float().expand(len(weight)).contiguous()


def _clipping_scales(qmax: int, rows: Tensor, full: Tensor) -> Tensor:
    """Of scales (O,) down to 0.6 times `full`, give those that round rows (O, K) with the least squared error."""
    best, least = full.clone(), torch.full_like(full, torch.inf)
    for share in np.linspace(1.0, 0.6, 41):
        scale = full * float(share)
        rounded = (rows / scale[:, None]).round_().clamp_(-qmax, qmax)
        error = rounded.mul_(scale[:, None]).sub_(rows).square_().sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


@dataclass(frozen=True, kw_only=True)
class QuantizationMethod:
    """The options of post-training quantization to int8.

    equalize             cross-layer equalization by "weights" or by "activations"; by default what suits `weights`
    range_method         how the ranges of activations are chosen
    clip_weights         clip the largest weights where that lowers the squared error of a row
    correct_weights      first change a weight so that it compensates for the errors of earlier layers, by least
                         squares; it suits photos of the same kind as the calibration's
    rounding             weights to the "nearest" integer, or by "gptq" (see gptq.py)
    correct_bias         change a bias by the mean error of its outputs
    weights              one scale per "channel" or, as DSPs need it, per "tensor"
    weight_qmax          the largest integer weight: 127, or 63 (7 bits) for x86 processors without VNNI
    power_of_two_scales  make the order in which a runtime scales its sums irrelevant: see cross_layer_equalization.py
    skip_layers          names of layers that stay in floating point
    """

    equalize: Literal["none", "weights", "activations"] | None = None
    range_method: RangeMethod = "mse"
    clip_weights: bool = True
    correct_weights: bool = False
    rounding: Literal["nearest", "gptq"] = "gptq"
    correct_bias: bool = True
    weights: Granularity = "channel"
    weight_qmax: int = 127
    power_of_two_scales: bool = True
    skip_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.equalize is None:
            object.__setattr__(self, "equalize", "weights" if self.weights == "tensor" else "activations")

    @property
    def title(self) -> str:
        """A short description for tables and manifests."""
        parts = [f"cross-layer equalization ({self.equalize})"] * (self.equalize != "none")
        parts += [f"{self.range_method} ranges"]
        parts += ["weight clipping"] * self.clip_weights + ["weight correction"] * self.correct_weights
        parts += ["GPTQ rounding"] * (self.rounding == "gptq") + ["bias correction"] * self.correct_bias
        parts += ["7-bit weights"] * (self.weight_qmax == 63)
        parts += [f"{len(self.skip_layers)} layers in fp32"] * bool(self.skip_layers)
        return f"per-{self.weights} weights, " + ", ".join(parts)


MINMAX_METHOD = QuantizationMethod(
    equalize="none",
    range_method="minmax",
    clip_weights=False,
    rounding="nearest",
    correct_bias=False,
    power_of_two_scales=False,
)
"""What vendors' tools do by default: ranges by extremes, rounding to nearest."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The quantization error of a layer: signal-to-noise ratio of its output and of its weights, in decibels."""

    name: str
    output_db: float
    weight_db: float
    quantized: bool


@dataclass(frozen=True, kw_only=True)
class ModelQParams:
    """The parameters of an int8 model that are not in its weights: small enough for the card of a weights file.

    `activations` has the parameters of every quantized activation by name (`convert.activation_names`). The weights are
    rounded to the nearest integer with scales that follow from them, per "channel" or per "tensor", the largest of each
    being `weight_qmax`. `skip_layers` names the layers that stay in floating point.
    """

    activations: Mapping[str, QParams]
    weights: Granularity = "channel"
    weight_qmax: int = 127
    skip_layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Write plain values for JSON; `from_dict` is the exact inverse."""
        return {
            "version": _VERSION,
            "activations": {name: [q.scale, q.zero_point] for name, q in self.activations.items()},
            "weights": self.weights,
            "weight_qmax": self.weight_qmax,
            "skip_layers": self.skip_layers,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ModelQParams:
        """Read what `to_dict` wrote, now or in version 1. Raises BadArgument where the values are not valid."""
        if not isinstance(plain, Mapping):
            raise BadArgument(f"the quantization parameters of this network cannot be read: {plain!r:.80}")
        if "version" not in plain:
            plain = {_RENAMED.get(name, name): value for name, value in plain.items()}
        elif plain["version"] != _VERSION:
            raise BadArgument(f"quantization parameters of version {plain['version']!r:.20}: update onefold")
        try:
            activations = {str(name): _read_qparams(*pair) for name, pair in plain["activations"].items()}
            weights, weight_qmax = plain["weights"], plain["weight_qmax"]
            skip_layers = tuple(str(name) for name in plain["skip_layers"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadArgument(
                f"the quantization parameters of this network cannot be read ({error!r}): calibrate it again"
            ) from error
        if weights not in ("channel", "tensor") or weight_qmax not in (63, 127):
            raise BadArgument(
                f"expected weights per channel or per tensor up to 63 or 127, got {weights!r}, {weight_qmax!r}"
            )
        return cls(activations=activations, weights=weights, weight_qmax=weight_qmax, skip_layers=skip_layers)


_VERSION = 2
# The keys of version 1, which had no field `version`.
_RENAMED = {"points": "activations", "limit": "weight_qmax", "keep": "skip_layers"}


def _read_qparams(scale: Any, zero_point: Any) -> QParams:
    is_valid = type(scale) is float and 0 < scale < 1e30 and type(zero_point) is int and QMIN <= zero_point <= QMAX
    if not is_valid:
        raise ValueError(f"{scale!r:.40}, {zero_point!r:.40} are no scale and zero point")
    return QParams(scale, zero_point)
